"""What the README says is what the published files and the code say."""

import json
import re
import subprocess
import sys
from pathlib import Path

from scripts import publish

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readmes_figures_are_those_of_the_published_files() -> None:
    shown = README.split(publish.BEGIN)[1].split(publish.END)[0].strip()
    assert shown == publish.figures()
    assert shown.count("| tuned |") == 3
    printed = README.split(publish.BEGIN_REPORT)[1].split(publish.END_REPORT)[0].strip()
    assert printed == publish.report()


def test_published_figures_are_of_the_real_table_and_a_clean_commit() -> None:
    runs = json.loads((publish.PUBLISHED / "runs.json").read_text())
    for run in runs:
        assert run["data_source"] in ("file", "cache", "openml")
        assert re.fullmatch(r"[0-9a-f]{40}", run["git_commit"])


def test_every_option_that_the_readme_names_exists() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tune_steel.search", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    named = set(re.findall(r"--[a-z][a-z-]+", README.split("## Measured beside it")[0]))
    assert {"--task", "--data", "--target", "--split", "--space", "--address"} <= named
    for option in named:
        assert option in done.stdout, option


def test_the_readmes_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)) - {"sure"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
