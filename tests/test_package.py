"""What is built and shipped."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_its_spaces_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("binary", "multiclass", "faults7"):
        assert f"tune_steel/search_spaces/{name}.toml" in names
    assert "tune_steel/stand_in.json" in names
    assert "tune_steel/py.typed" in names
    assert not [name for name in names if not re.match(r"tune_steel[/-]", name)]


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"),
            *("--disable-pip-version-check", "--target", str(site), str(wheel)),
        ],
        check=True,
    )
    script = "import tune_steel, sys; print(tune_steel.__file__); sys.argv[0] = 'tune-steel';"
    script += "from tune_steel.search import main; main()"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c", script, "--task", "faults7"),
            *("--source", "stand-in", "--dry-run"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout.splitlines()[0]
    assert "space faults7.toml:" in done.stdout


def test_the_constraints_name_a_version_of_every_tested_dependency_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
            assert match, line
            pinned[match[1].lower().replace("_", "-")] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = [extras[name] for name in ("cluster", "test", "dev")]  # not the benchmark's peers
    wanted = [*project["dependencies"], *chain(*tested)]
    for requirement in wanted:
        name = re.split(r"[\[<>=~!]", requirement)[0].lower()
        assert name in pinned, requirement
    assert pinned["torch"] == "2.13.0"


def test_no_file_is_longer_than_a_room_should_be() -> None:
    for path in (ROOT / "tune_steel").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name


@pytest.mark.parametrize(
    ("module", "foreign"),
    [
        # What workers train with, and all that it is made of.
        ("refit", {"ray", "optuna", "sklearn", "scipy.optimize"}),
        ("tables", {"torch"}),
        ("scores", {"torch"}),
        ("search", {"torch", "ray", "pandas"}),
        ("ray_tune", {"torch"}),
        ("job", {"torch", "ray.tune"}),
    ],
)
def test_a_room_does_not_import_what_it_must_not_know(module: str, foreign: set[str]) -> None:
    script = f"import sys, tune_steel.{module}; print(*({foreign!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.split() == []
