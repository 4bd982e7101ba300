"""Publish finished runs: the tables behind the README's figures, and the figures themselves.

    python -m scripts.publish results/<run> results/<run> ...

writes results/published/scores.parquet (the runs' score tables), runs.json (what it takes to
repeat them, and how long they took) and report.txt (what the first run printed), and puts the
figures and the report between their markers in the README. No row of the data is in these files.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.page import put
from tune_steel.scores import Interval

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results" / "published"
BEGIN, END = "<!-- figures: scripts/publish.py -->", "<!-- end of figures -->"
BEGIN_REPORT, END_REPORT = "<!-- report: scripts/publish.py -->", "<!-- end of report -->"
_KEPT = (
    *("run", "task", "data_source", "command", "options", "data", "started", "versions"),
    *("git_commit", "machine", "trials", "best_trial", "search_seconds", "evaluate_seconds"),
    "profile",
)
_PLACES = ("data", "space", "output", "warm_start")
_SCORES = ("accuracy", "macro_accuracy", "macro_precision", "log_loss", "auroc")


def collect(folders: list[Path]) -> None:
    """Writes the published files from run folders."""
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    runs = []
    for folder in folders:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if record["state"] != "finished":
            sys.exit(f"{folder}: the run is {record['state']}, only finished ones are published")
        if record.get("resumed"):
            sys.exit(f"{folder}: the run was resumed; those of one command are published")
        if "+changes" in (record["git_commit"] or "+changes"):
            sys.exit(f"{folder}: the run is not of a clean commit ({record['git_commit']})")
        kept = {key: record[key] for key in _KEPT}
        # Where files lay on the machine, and what kernel it runs, says nothing to others.
        kept["options"] = {
            key: value for key, value in record["options"].items() if key not in _PLACES
        }
        kept["machine"] = {
            **record["machine"],
            "system": record["machine"]["system"].split("-")[0],
        }
        runs.append(kept)
    tables = [pq.read_table(folder / "scores.parquet") for folder in folders]
    pq.write_table(pa.concat_tables(tables), PUBLISHED / "scores.parquet", compression="zstd")
    text = json.dumps(runs, indent=1) + "\n"
    (PUBLISHED / "runs.json").write_text(text, encoding="utf-8")
    report = (folders[0] / "report.txt").read_text(encoding="utf-8")
    lines = [line.rstrip() for line in report.splitlines()]
    (PUBLISHED / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def figures() -> str:
    """The README's table, from the published files."""
    runs = json.loads((PUBLISHED / "runs.json").read_text(encoding="utf-8"))
    scores = pq.read_table(PUBLISHED / "scores.parquet").to_pylist()
    lines = [
        "| task | model | " + " | ".join(_SCORES) + " |",
        "|---|---|" + "---|" * len(_SCORES),
    ]
    for run in runs:
        mine = [row for row in scores if row["run"] == run["run"] and row["split"] == "test"]
        models = list(dict.fromkeys(row["model"] for row in mine))
        for model in models:
            rows = {row["score"]: row for row in mine if row["model"] == model}
            cells = [
                Interval(rows[name]["value"], rows[name]["low"], rows[name]["high"]).said()
                for name in _SCORES
            ]
            title = f"{run['task']} ({mine[0]['rows']} test rows)" if model == models[0] else ""
            lines.append(f"| {title} | {model} | " + " | ".join(cells) + " |")
    lines.append("")
    for run in runs:
        states = run["trials"]["states"]
        ended = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        lines.append(
            f"- `{' '.join(run['command'])}`: {sum(states.values())} trials ({ended}), "
            f"{run['trials']['epochs']} epochs, {run['search_seconds'] / 60:.1f} minutes of "
            f"search and {run['evaluate_seconds']:.0f} s of retraining and scoring on "
            f"{run['machine']['cpus']} CPUs"
        )
    return "\n".join(lines)


def report() -> str:
    """What the first published run printed, as a Markdown block."""
    return f"```text\n{(PUBLISHED / 'report.txt').read_text(encoding='utf-8')}```"


def main() -> None:
    """Collects the runs that the command line names and rewrites the README's table."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m scripts.publish results/<run> ...")
    collect([Path(argument) for argument in sys.argv[1:]])
    readme = ROOT / "README.md"
    put(readme, BEGIN, END, figures())
    put(readme, BEGIN_REPORT, END_REPORT, report())


if __name__ == "__main__":
    main()
