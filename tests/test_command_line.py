"""Bad input is one line and exit code 2, before anything is started or written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command
from searches import options_of

from tune_steel.errors import OptionError
from tune_steel.options import Options
from tune_steel.search import main

STAND_IN = ("--task", "binary", "--source", "stand-in")


def complaint(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """The one line that a mistake is answered with."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    assert list(folder.iterdir()) == []
    prefix = "tune_steel: error: "
    assert lines[0].startswith(prefix)
    return lines[0].removeprefix(prefix)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "ternary"), "unknown; allowed: binary, multiclass, faults7"),
        ((), "--task is missing"),
        (("--task", "binary", "--samples", "0"), "--samples 0: must be at least 1"),
        (
            ("--task", "binary", "--samples", "many"),
            "'--samples': Input should be a valid integer",
        ),
        (("--task", "binary", "--folds", "200"), "allowed are 1 (a plain split) to 20"),
        (
            ("--task", "faults7", "--source", "stand-in", "--threshold", "f1"),
            "--threshold f1: for two classes only; faults7 has 7",
        ),
        (("--task", "binary", "--folds", "0"), "allowed are 1 (a plain split) to 20"),
        (("--task", "binary", "--split", ".5", ".2", ".2"), "these sum to 0.9"),
        (("--task", "binary", "--split", "1", "0", "0"), "three shares above 0"),
        (("--task", "binary", "--data", "missing.csv"), "missing.csv"),
        (("--data", "missing.csv", "--target", "y"), "missing.csv"),
        (("--task", "binary", "--target", "y"), "give one of the two"),
        (("--target", "y"), "add --data FILE or --openml-id N"),
        (("--task", "binary", "--source", "web"), "'web' is not one of"),
        (("--task", "binary", "--max-epochs", "0"), "--max-epochs 0: must be at least 1"),
        (
            ("--task", "binary", "--max-epochs", "5", "--grace-period", "6"),
            "1 to --max-epochs (5)",
        ),
        (("--task", "binary", "--reduction-factor", "1"), "must be at least 2"),
        (("--task", "binary", "--cpus-per-trial", "0"), "--cpus-per-trial 0: a whole number or a"),
        (("--task", "binary", "--cpus-per-trial", "nan"), "a whole number or a share"),
        (("--task", "binary", "--cpus-per-trial", "0.00001"), "a whole number or a share"),
        (("--task", "binary", "--gpus-per-trial", "nan"), "--gpus-per-trial nan: a whole number"),
        (("--task", "binary", "--gpus-per-trial", "1.5"), "--gpus-per-trial 1.5: a whole number"),
        (("--task", "binary", "--split", "nan", "nan", "nan"), "three shares above 0"),
        (
            ("--data", "x.csv", "--target", "y", "--source", "stand-in"),
            "--source is for the Steel",
        ),
        (("--task", "binary", "--seed", "-1"), "--seed -1: must be at least 0"),
        (("--task", "binary", "--samples", "9" * 20), "must be at most 1000000000"),
        (("--task", "binary", "--concurrency", "0"), "--concurrency 0: must be at least 1"),
        (("--task", "binary", "--frobnicate"), "No such option: --frobnicate"),
        ((*STAND_IN, "--space", "missing.toml"), "missing.toml: there is no such space file"),
        ((*STAND_IN, "--data", "x.csv"), "give one of them"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = command(*arguments, TUNE_STEEL_DATA="")
    assert message in complaint(done, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("colour", "no such column in plates; its columns: size, weight"),
        ("site", "only one class"),
    ],
)
def test_a_wrong_target_is_one_line(
    command: Command, own_csv: Path, tmp_path: Path, target: str, message: str
) -> None:
    done = command("--data", own_csv, "--target", target)
    assert message in complaint(done, tmp_path / "elsewhere")


def test_a_space_with_an_unknown_key_is_one_line(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    space_file.write_text(space_file.read_text() + "[model2]\nx = 1\n")
    done = command(*STAND_IN, "--space", space_file)
    assert "small.toml: model2: unknown key; allowed: model, loss" in complaint(
        done, tmp_path / "elsewhere"
    )


def test_a_space_for_another_kind_of_task_is_one_line(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    done = command("--task", "faults7", "--source", "stand-in", "--space", space_file)
    assert "loss.pos_weight is for two classes" in complaint(done, tmp_path / "elsewhere")


def test_an_output_folder_that_cannot_be_made_is_one_line(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = command(*STAND_IN, "--output", tmp_path / "file" / "results")
    assert "no folder can be made there (Not a directory)" in complaint(
        done, tmp_path / "elsewhere"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop its rights to another user's")
def test_an_output_folder_of_someone_else_is_one_line(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    script = (
        "import os, sys; from pathlib import Path;"
        "from tune_steel.run_folder import make_folder;"
        "from tune_steel.errors import OptionError\n"
        "os.setuid(65534)\n"
        "try: make_folder(Path(sys.argv[1]), 'x')\n"
        "except OptionError as error: print(error)"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", script, str(locked)], capture_output=True, text=True, check=False
    )
    assert "no folder can be made there (Permission denied)" in done.stdout, done.stderr


def test_a_cluster_that_is_not_there_is_one_line(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    for address in ("127.0.0.1:1", "no-such-host.invalid:6379", "ray://127.0.0.1:1", "somewhere"):
        done = command(*STAND_IN, "--space", space_file, "--address", address)
        assert f"--address {address}: no Ray cluster can be joined there" in complaint(
            done, tmp_path / "elsewhere" / "results"
        )


def test_more_cpus_than_there_are_is_one_line(
    command: Command, space_file: Path, tmp_path: Path
) -> None:
    done = command(*STAND_IN, "--space", space_file, "--cpus-per-trial", 4096)
    assert "--cpus-per-trial 4096: this machine has" in complaint(
        done, tmp_path / "elsewhere" / "results"
    )


def test_a_dry_run_prints_the_space_the_splits_and_the_first_configs_and_runs_nothing(
    command: Command, tmp_path: Path
) -> None:
    done = command(*STAND_IN, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "splits: train 1747, val 97, test 97" in done.stdout
    assert "\nnumeric columns: V1, V2, " in done.stdout
    assert "\ncategorical columns: none\n" in done.stdout
    assert "ASHA may stop trials after epochs 6, 18 of 50" in done.stdout
    assert 'model.dropout = {"float": [0.0, 0.6], "default": 0.35}' in done.stdout
    first = json.loads(done.stdout.split("  0: ")[1].splitlines()[0])
    assert first["optimizer.lr"] == 0.001
    assert "  4: {" in done.stdout
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert command(*STAND_IN, "--dry-run").stdout == done.stdout


def test_help_names_every_option(command: Command) -> None:
    done = command("--help")
    assert done.returncode == 0
    for option in (
        "--task",
        "--samples",
        "--data",
        "--target",
        "--folds",
        "--address",
        "--dry-run",
    ):
        assert option in done.stdout


def test_another_system_than_linux_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tune_steel: error: tune_steel needs Linux")


def test_a_resumed_run_knows_its_earlier_run_by_a_relative_path_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = Options.from_dict(options_of(warm_start=(Path("results/x"),)).as_dict())
    before.resumed({"warm_start": (Path("results/x"),)}, {}, {})
    with pytest.raises(OptionError, match=r"--warm-start results/y: the run .* has .*/results/x"):
        before.resumed({"warm_start": (Path("results/y"),)}, {}, {})
