"""What a search leaves, read back: files, figures and model of one run agree."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL_SPACE
from optuna.trial import TrialState
from searches import SMALL, check_plain, finish, only_run, read, start

from benchmarks import quality_in_time, speed
from benchmarks.process import Usage
from tune_steel.choice import candidates, members
from tune_steel.ensemble import MEMBERS, combine
from tune_steel.loss import class_weights
from tune_steel.options import Options
from tune_steel.predict import load_model
from tune_steel.problem import Problem, load, resolve
from tune_steel.refit import Plan, refit, retrain, validation_rows
from tune_steel.scores import score
from tune_steel.searcher import StudySearcher
from tune_steel.study import open_study

pytestmark = pytest.mark.ray


def searcher_of(run: Path, problem: Problem, options: Options) -> StudySearcher:
    return StudySearcher(
        problem.space,
        open_study(run / "study.journal", run.name),
        search=options.search,
        seed=options.seed,
        max_epochs=options.max_epochs,
        budget=options.budget,
        max_failures=options.max_failures,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """One finished search on the stand-in, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    space = folder / "small.toml"
    space.write_text(SMALL_SPACE)
    given = ("--task", "binary", "--source", "stand-in", "--space", space)
    code, out, err = finish(start(folder, *given, *SMALL, "--profile"))
    assert code == 0, err
    return only_run(folder), out, err


def test_a_finished_run_has_all_its_files_and_no_other(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished
    assert sorted(p.name for p in run.iterdir()) == [
        "epochs.parquet",
        "model",
        "predictions.parquet",
        "report.txt",
        "run.json",
        "scores.parquet",
        "study.journal",
        "trials.parquet",
    ]


def test_trials_and_epochs_agree(finished: tuple[Path, str, str]) -> None:
    trials, epochs = read(finished[0], "trials"), read(finished[0], "epochs")
    assert trials["trial"].tolist() == list(range(8))
    assert set(trials["state"]) <= {"COMPLETE", "PRUNED"}
    assert trials["state"].nunique() == 2
    for _, trial in trials.iterrows():
        curve = epochs[epochs["trial"] == trial["trial"]]
        assert curve["epoch"].tolist() == list(range(1, trial["epochs"] + 1))
        best = curve["val_loss"].argmin()
        assert trial["best_epoch"] == best + 1
        assert trial["val_loss"] == curve["val_loss"].iloc[best] == curve["best_val_loss"].iloc[-1]
        assert trial["val_accuracy"] == curve["val_accuracy"].iloc[best]
        assert (curve["best_val_loss"] == curve["val_loss"].cummin()).all()
        folds = np.stack(curve["fold_val_loss"].to_list())
        assert folds.shape == (trial["epochs"], 3)
        np.testing.assert_allclose(folds.mean(axis=1), curve["val_loss"], rtol=1e-12)
    assert trials.loc[0, "state"] == "COMPLETE"
    pruned = trials[trials["state"] == "PRUNED"]
    assert set(pruned["epochs"]) <= {1, 3}


def test_the_study_tells_the_same_story_as_the_tables(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished
    trials = read(run, "trials")
    study = open_study(run / "study.journal", run.name)
    assert [t.state.name for t in study.trials] == trials["state"].tolist()
    for trial, (_, row) in zip(study.trials, trials.iterrows(), strict=True):
        assert trial.last_step == row["epochs"]
        assert trial.params.items() <= row.dropna().to_dict().items()
        assert trial.user_attrs["config"] == json.loads(row["config"])
        if trial.state == TrialState.COMPLETE:
            assert trial.value == row["val_loss"]


def test_the_first_trial_is_the_default_config(finished: tuple[Path, str, str]) -> None:
    first = json.loads(read(finished[0], "trials").loc[0, "config"])
    assert first["model"]["width_1"] == 8
    assert first["optimizer"] == {
        "name": "adam",
        "lr": 0.01,
        "weight_decay": 0.0,
        "batch_size": 64,
    }


def test_the_best_trial_is_the_one_with_the_lowest_validation_loss_that_had_a_full_chance(
    finished: tuple[Path, str, str],
) -> None:
    run, _, _ = finished
    trials = read(run, "trials")
    full = trials[(trials["state"] == "COMPLETE") | (trials["epochs"] >= 3)]
    best = full.loc[full["val_loss"].idxmin(), "trial"]
    assert json.loads((run / "run.json").read_text())["best_trial"] == best


def test_run_json_holds_what_it_takes_to_repeat_the_run(finished: tuple[Path, str, str]) -> None:
    record = json.loads((finished[0] / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["options"]["seed"] == 0
    assert record["options"]["budget"]["samples"] == 8
    assert record["splits"]["rows"] == {"train": 1747, "val": 97, "test": 97}
    assert len(record["splits"]["test_rows"]) == len(set(record["splits"]["test_rows"])) == 97
    assert not set(record["splits"]["test_rows"]) & set(record["splits"]["val_rows"])
    assert len(record["splits"]["test_hash"]) == 64
    assert record["space"]["leaves"]["model.depth"] == {"int": [1, 2], "default": 1}
    assert record["versions"]["torch"]
    assert record["machine"]["cpus"] >= 1
    assert record["data"]["content_hash"]


def test_the_parts_of_a_run_s_time_add_up_to_its_slots(finished: tuple[Path, str, str]) -> None:
    run, out, _ = finished
    profile = json.loads((run / "run.json").read_text())["profile"]
    assert all(s >= 0 for part in ("wall", "slots", "driver") for s in profile[part].values())
    assert sum(profile["slots"].values()) == pytest.approx(profile["slot_seconds"])
    epochs = read(run, "epochs")
    fit = profile["slots"]["training"] + profile["slots"]["scoring"]
    assert fit == pytest.approx(epochs["seconds"].sum())
    assert min(profile["slots"]["training"], profile["slots"]["scoring"]) > 0
    assert min(profile["wall"].values()) > 0
    assert min(profile["driver"].values()) > 0
    assert "Where the time went" in out


def test_the_test_rows_are_the_frozen_ones_and_no_other_row_was_tested(
    finished: tuple[Path, str, str],
) -> None:
    run, _, _ = finished
    record = json.loads((run / "run.json").read_text())
    predictions = read(run, "predictions")
    test = predictions[predictions["split"] == "test"]
    for _, rows in test.groupby(["model", test["seed"].fillna(-1)]):
        assert rows["row"].tolist() == record["splits"]["test_rows"]
    out_of_fold = predictions[predictions["split"] == "out-of-fold"]
    assert set(out_of_fold["model"]) == {"ensemble", "bagged", "tuned"}
    for _, folds in out_of_fold.groupby("model"):
        assert len(folds) == folds["row"].nunique() == 1941 - 97
        assert not set(folds["row"]) & set(record["splits"]["test_rows"])
    np.testing.assert_allclose(predictions["p0"] + predictions["p1"], 1, rtol=1e-12)


def test_scores_follow_from_the_predictions(finished: tuple[Path, str, str]) -> None:
    run, _, _ = finished
    record = json.loads((run / "run.json").read_text())
    weights = np.array(record["reference_weights"])
    predictions, scores = read(run, "predictions"), read(run, "scores")
    test = predictions[predictions["split"] == "test"]
    for model in ("ensemble", "bagged", "tuned", "default", "boosting"):
        rows = test[(test["model"] == model) & test["seed"].isna()]
        found = score(rows[["p0", "p1"]].to_numpy(), rows["y"].to_numpy(), weights)
        table = scores[(scores["model"] == model) & (scores["split"] == "test")]
        assert table.set_index("score")["value"].to_dict() == pytest.approx(found, rel=1e-12)
        sure = table[table["low"].notna()]
        assert len(sure) > 5
        assert ((sure["low"] <= sure["value"]) & (sure["value"] <= sure["high"])).all()
        if model != "ensemble":
            ensemble = scores[(scores["model"] == "ensemble") & (scores["split"] == "test")]
            gap = ensemble["value"].to_numpy() - table["value"].to_numpy()
            assert np.array_equal(table["ensemble_minus"], gap)
            assert (table["ensemble_minus_low"].dropna() <= table["ensemble_minus"]).all()
        assert (table["rows"] == 97).all()
    tuned = test[(test["model"] == "tuned") & test["seed"].notna()]
    mean = tuned.groupby("row")["p1"].mean()
    averaged = test[(test["model"] == "tuned") & test["seed"].isna()].set_index("row")["p1"]
    np.testing.assert_allclose(mean.loc[averaged.index], averaged, rtol=1e-12)
    assert tuned["seed"].nunique() == 5
    rows = test[test["model"] == "ensemble"]
    predicted = (rows["p1"] > rows["p0"]).astype(int)
    confusion = pd.crosstab(rows["y"], predicted).reindex(columns=[0, 1], fill_value=0)
    assert confusion.to_numpy().tolist() == record["test"]["confusion"]


def test_out_of_fold_predictions_give_the_validation_loss_that_the_search_recorded(
    finished: tuple[Path, str, str],
) -> None:
    run, _, _ = finished
    record = json.loads((run / "run.json").read_text())
    # The best trial was trained again in another process: the curve is the same to the last bit.
    assert record["test"]["reproduction_gap"] == 0
    predictions, trials = read(run, "predictions"), read(run, "trials")
    mine = (predictions["split"] == "out-of-fold") & (predictions["model"] == "tuned")
    folds = predictions[mine]
    weights = np.array(record["reference_weights"])
    losses = [
        score(rows[["p0", "p1"]].to_numpy(), rows["y"].to_numpy(), weights)["loss"]
        for _, rows in folds.groupby("fold")
    ]
    best = trials.set_index("trial").loc[record["best_trial"]]
    np.testing.assert_allclose(losses, best["fold_val_loss"], rtol=1e-9)


def test_the_stored_model_reproduces_the_stored_test_probabilities(
    finished: tuple[Path, str, str],
) -> None:
    from tune_steel.data import load_steel

    run, _, _ = finished
    predictions = read(run, "predictions")
    mine = (predictions["split"] == "test") & (predictions["model"] == "ensemble")
    rows = predictions[mine]
    model = load_model(run / "model")
    frame = load_steel(source="stand-in").frame.iloc[rows["row"]]
    np.testing.assert_allclose(
        model.predict_proba(frame), rows[["p0", "p1"]].to_numpy(), rtol=1e-6
    )
    assert set(model.predict(frame)) == {"named_fault", "Other_Faults"}


def test_the_members_that_ray_trained_are_those_of_this_process_bit_for_bit(
    finished: tuple[Path, str, str], one_thread: None
) -> None:
    import torch

    run, _, _ = finished
    record = json.loads((run / "run.json").read_text())
    options = Options.from_dict(record["options"])
    problem = resolve(options, load(options))
    trials = searcher_of(run, problem, options).records
    plans = [Plan.of(trial) for trial in members(candidates(trials, options), MEMBERS)]
    told = record["ensemble"]["members"]
    assert [plan.trial for plan in plans] == [member["trial"] for member in told]
    assert sum(member["weight"] for member in told) == pytest.approx(1)
    stored = {member.trial: member for member in load_model(run / "model").members}
    assert set(stored) == {member["trial"] for member in told if member["weight"] > 0}
    refits, weights = [], []
    for plan in plans:
        *_, again = refit(plan, problem.development, "cpu")
        assert again is not None
        refits.append(again.probabilities())
        weights.append(class_weights(plan.config, problem.development))
        if plan.trial in stored:
            *_, whole = retrain(plan, problem.development, "cpu", seed=options.seed)
            assert whole is not None
            (network,) = stored[plan.trial].networks
            for name, tensor in network.state_dict().items():
                assert torch.equal(tensor, whole.states[0][name]), name
    positions, _ = validation_rows(problem.development)
    y = problem.development.y[positions]
    fitted = combine(np.stack(refits), y, np.stack(weights))
    assert fitted.weights.tolist() == [member["weight"] for member in told]
    of_members = [member["calibration"] for member in told]
    for found, said in zip(
        (*fitted.of_members, fitted.calibration),
        (*of_members, record["ensemble"]["calibration"]),
        strict=True,
    ):
        assert found.temperature == said["temperature"]
        assert list(found.bias or ()) == (said["bias"] or [])


def test_the_stand_in_is_said_in_every_output(finished: tuple[Path, str, str]) -> None:
    run, _, printed = finished
    assert "STAND-IN" in printed
    assert (run / "report.txt").read_text().startswith("STAND-IN data: ")
    for name in ("trials", "epochs", "predictions", "scores"):
        assert set(read(run, name)["data_source"]) == {"stand-in"}
    assert json.loads((run / "run.json").read_text())["data_source"] == "stand-in"
    assert json.loads((run / "model" / "model.json").read_text())["data_source"] == "stand-in"


def test_what_a_run_prints_is_a_table_and_a_few_plain_lines(
    finished: tuple[Path, str, str],
) -> None:
    _, out, err = finished
    check_plain(err)
    assert "Test scores on 97 rows" in out
    assert (finished[0] / "report.txt").read_text() in out
    assert "boosting" in out
    assert "8 trials (" in out
    told = json.loads((finished[0] / "run.json").read_text())["ensemble"]["members"]
    used = [member for member in told if member["weight"] > 0]
    first = max(used, key=lambda member: member["weight"])
    line = f"ensemble of {len(used)} of {len(told)}: trial {first['trial']} (mlp) "
    assert line + f"{first['weight']:.2f}" in out


def test_the_speed_benchmarks_read_its_trials_and_when_they_ended(
    finished: tuple[Path, str, str],
) -> None:
    run = finished[0]
    trials = read(run, "trials").set_index("trial")
    outcome = speed.read_own(run.parent, 100)
    assert len(outcome.trials) == len(trials) == 8
    assert sum(trial.epochs for trial in outcome.trials) == len(read(run, "epochs"))
    best = trials.loc[json.loads((run / "run.json").read_text())["best_trial"]]
    assert outcome.chosen.best_val_loss == best["val_loss"]
    assert outcome.chosen.config["optimizer.lr"] == best["optimizer.lr"]
    began = datetime.strptime(run.name.split("-", 1)[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    ends = [trial.ended for trial in outcome.trials]
    assert began.timestamp() < ends[0]
    assert ends == sorted(ends)
    assert ends[-1] < (run / "scores.parquet").stat().st_mtime
    assert len(speed.read_own(run.parent, 5).trials) == 5
    usage = Usage(began.timestamp(), 0.0, 0.0, 0.0, 0, "")
    ours = quality_in_time.Ours(sys.executable, 60.0, 0, 2)
    points, _ = ours.read(run.parent, usage)
    assert sorted(at for at, _ in points) == pytest.approx([e - began.timestamp() for e in ends])
    assert sorted(loss for _, loss in points) == sorted(trials["val_log_loss"])
