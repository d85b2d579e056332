"""Several runs: what is made of each seed and ablation variant, and how they are compared."""

import contextlib
import itertools
import json
import logging
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
import stages
from conftest import SAMPLE, whole_reports
from finished_runs import write_run
from language_models import TINY_MODEL
from medgemma_clinical.commands import plan, repeats, run_folder, several
from medgemma_clinical.commands.compare import (
    built_in_models_notice,
    cost_of,
    join_predictions,
    model_names,
)
from medgemma_clinical.commands.prediction_files import read_predictions
from medgemma_clinical.commands.run_folder import stage_folder
from medgemma_clinical.commands.several import VARIANTS, run_ablation, run_seeds
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import MODEL, SHARED_TRAINING, Metrics
from medgemma_clinical.evaluation.target import LABEL, Target
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.files import InputError
from medgemma_clinical.models.model_card import built_in_sentence
from pages import Page
from predicting import refused
from test_times import ABOUT, RISKS, waiting

pytestmark = pytest.mark.slow

DRAWS, TUNES = 20, False
DATASET = SimpleNamespace(outcome="Death")
STAGE_1 = STAGE_NAMES["trajectory"]


def arguments(folder, **changes):
    """The flags of a command of several runs."""
    args = stages.arguments("--output_dir", str(folder))
    return Namespace(**{**vars(args), "seed": 3, **changes})


def fake_train(made, **options):
    """Return a training that writes a finished run and takes down its arguments."""

    def train(args, dataset):
        assert dataset is DATASET
        made.append(args)
        logging.getLogger("medgemma_trainer").info("a line of the run itself")
        write_run(stage_folder(args), len(made), **options)
        return 0

    return train


@pytest.fixture(autouse=True)
def unbegun(monkeypatch):
    """No run was begun before; nothing of a run is prepared."""
    for name in ("given_stage1", "run_data", "run_record"):
        monkeypatch.setattr(run_folder, name, lambda *_: None)
    monkeypatch.setattr(run_folder, "progress_in", lambda folder, facts: "none")
    monkeypatch.setattr(plan.distributed, "reset_peak_memory", lambda: None)  # collects garbage


def results_of(path):
    return json.loads(path.read_text())


# --------------------------------------------------------------------------- --seeds


def test_every_seed_has_its_folder_its_number_and_its_stage_1(tmp_path):
    place = Path("s1/seed_{seed}/x.pt")
    args = arguments(tmp_path, ode_checkpoint=place, log_file="run_{seed}.log", seeds=2)
    made = []
    assert run_seeds(args, lambda _: DATASET, fake_train(made)) == 0
    own = made[1]
    assert (own.seed, own.seeds, own.output_dir) == (4, None, tmp_path / "seed_4")
    assert (own.ode_checkpoint, own.log_file) == (Path("s1/seed_4/x.pt"), "run_4.log")
    assert args.ode_checkpoint == place, "the command's own arguments stay"
    with pytest.raises(InputError, match="ode_checkpoint"):
        run_seeds(arguments("out", ode_checkpoint=Path("x.pt"), seeds=2), None, None)


def test_the_seeds_are_pooled(tmp_path, caplog):
    made, args = [], arguments(tmp_path, seeds=2, trajectory_only=True)
    with caplog.at_level(logging.INFO):
        assert run_seeds(args, lambda _: DATASET, fake_train(made)) == 0
    assert [(own.seed, own.seeds) for own in made] == [(3, None), (4, None)]
    folders = [tmp_path / f"seed_{seed}" / "trajectory" for seed in (3, 4)]
    tables = [pd.read_csv(folder / "predictions_test.csv") for folder in folders]
    scores = [roc_auc_score(table["label"], table["probability"]) for table in tables]
    content = results_of(tmp_path / "seeds_trajectory.json")
    assert content["targets"] == json.loads(json.dumps([LABEL.to_json()]))
    pooled = Metrics.from_json({k: x for k, x in content.items() if k not in ("cost", "targets")})
    auroc = pooled.of(STAGE_1).loc["auroc"]
    expected = [np.mean(scores), np.std(scores, ddof=1), min(scores), max(scores)]
    assert auroc[["value", "sd", "min", "max"]].tolist() == pytest.approx(expected)
    assert content["cost"][STAGE_1]["seconds_an_epoch"] == 1
    assert content["cost"][STAGE_1]["memory_mib"] == 101.5
    page = (tmp_path / "seeds_trajectory.html").read_text()
    for text in (page, caplog.text):
        assert f"{min(scores):.3f} to {max(scores):.3f}" in text
    assert f"{pooled.widening:.2f} times as wide" in Page(page).text
    patients = len({*tables[0]["patient"], *tables[1]["patient"]})
    assert pooled.widening == pytest.approx(np.sqrt(1 + SHARED_TRAINING * patients / 80))
    for folder in folders:
        known = results_of(folder / "metrics.json")
        assert f"{known['validation']['auroc']['value']:.3f}" in page
    before = (tmp_path / "seeds_trajectory.json").read_bytes()
    other = arguments(tmp_path, seeds=2, seed=5, trajectory_only=True)
    run_seeds(other, lambda _: DATASET, fake_train([]))
    assert (tmp_path / "seeds_trajectory.1.json").read_bytes() == before
    assert (tmp_path / "seeds_trajectory.1.html").exists()


def test_the_data_are_read_once_unless_each_seed_has_its_own(tmp_path):
    for path, expected in (("data.csv", ["data.csv"]), ("d_{seed}.csv", ["d_3.csv", "d_4.csv"])):
        read = []

        def keep(args, read=read):
            read.append(args.data_path.name)
            return DATASET

        args = arguments(tmp_path / path, data_path=Path(path), seeds=2, trajectory_only=True)
        assert run_seeds(args, keep, fake_train([])) == 0
        assert read == expected


def test_finished_runs_are_left_stopped_ones_continued_and_failed_ones_named(tmp_path, monkeypatch):
    made, known = [], {3: "all", 4: "part", 5: "none"}
    args = arguments(tmp_path, seeds=3, trajectory_only=True)
    write_run(tmp_path / "seed_3" / "trajectory", 3)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "run_record", lambda own, *_: own)
        patch.setattr(run_folder, "progress_in", lambda folder, own: known[own.seed])
        run_seeds(args, lambda _: DATASET, fake_train(made))
    assert [(own.seed, own.resume) for own in made] == [(4, True), (5, False)]
    own = arguments(tmp_path / "fails", seeds=3, trajectory_only=True)
    assert run_seeds(own, lambda _: DATASET, lambda *_: 7) == 7
    assert not (tmp_path / "fails" / "seed_4").exists()

    def refuses(args, dataset):
        raise InputError("the test part has no event", "cell")

    with pytest.raises(InputError, match=r"^seed 3: ") as refused:
        run_seeds(own, lambda _: DATASET, refuses)
    assert refused.value.value == "cell"


def test_models_that_some_split_lacks_are_not_pooled(tmp_path):
    def train(args, dataset):
        code = fake_train([], baseline="blend")(args, dataset)
        path = args.output_dir / "trajectory" / "predictions_test.csv"
        table = pd.read_csv(path, dtype={"id": str}).assign(other=0.5)
        if args.seed == 4:
            table = table.rename(columns={"other": "blend with statics"})
        table.assign(ensemble=table["blend"]).to_csv(path, index=False)
        return code

    run_seeds(arguments(tmp_path, seeds=2, trajectory_only=True), lambda _: DATASET, train)
    assert list(results_of(tmp_path / "seeds_trajectory.json")["models"]) == ["blend"]


def test_ablations_of_several_seeds_are_pooled(tmp_path):
    args = arguments(tmp_path, seeds=2, ablation=["text", "text + logit"])
    made = []
    assert run_seeds(args, lambda _: DATASET, fake_train(made)) == 0
    assert len(made) == 6
    content = results_of(tmp_path / "seeds_ablation.json")
    assert content["model"] == "text"
    assert set(content["models"]) == {"stage 1", "text + logit", "last value"}
    assert content["cost"]["text"]["memory_mib"] == 100 + (2 + 5) / 2


# --------------------------------------------------------------------------- --ablation


def test_every_variant_has_its_flags_and_stands_beside_stage_1_and_the_baselines(
    tmp_path, monkeypatch, caplog
):
    made, forgotten = [], []
    monkeypatch.setattr(plan.distributed, "reset_peak_memory", lambda: forgotten.append(1))
    with caplog.at_level(logging.INFO):
        assert (
            run_ablation(arguments(tmp_path, ablation=[*VARIANTS]), DATASET, fake_train(made)) == 0
        )
    assert len({stage_folder(own) for own in made}) == len(VARIANTS) == len(forgotten)
    assert len({str({**vars(own), "output_dir": None}) for own in made}) == len(VARIANTS)
    content = results_of(tmp_path / "ablation" / "ablation.json")
    assert list(content["models"]) == [*list(VARIANTS)[1:], "last value"]
    table = pd.read_csv(tmp_path / "ablation" / "predictions_test.csv", dtype={"id": str})
    assert list(table) == ["id", "label", "patient", *VARIANTS, "last value"]
    reference = roc_auc_score(table["label"], table["stage 1"])
    for name in list(VARIANTS)[1:]:
        row = content["models"][name]["auroc"]
        auroc = roc_auc_score(table["label"], table[name])
        assert row["value"] == pytest.approx(auroc)
        assert row["difference"] == pytest.approx(auroc - reference), "the row minus the reference"
        assert f"{name}: test AUROC " in caplog.text
    assert "Death" in (tmp_path / "ablation" / "ablation.html").read_text()


@pytest.mark.parametrize(
    ("model", "words", "left_out"),
    [("minilm", True, []), (None, True, ["frozen"]), ("minilm", False, ["frozen", "words"])],
)
def test_variants_with_text_need_text_and_an_encoder(model, words, left_out, tmp_path, monkeypatch):
    names = ["words of the context"] if words else []
    monkeypatch.setattr(several, "baseline_names", lambda data: names)
    monkeypatch.setattr(several.run_folder, "run_data", lambda *args: None)
    usual = several.usual_variants(arguments(tmp_path, text_model=model), DATASET)
    missing = {*VARIANTS} - {*usual}
    assert len(missing) == len(left_out)
    assert all(any(word in name for name in missing) for word in left_out)


@pytest.mark.parametrize("names", [["text", "nothing"], ["nothing"], ["text", "last value"]])
def test_unknown_variants_are_refused(names, tmp_path, monkeypatch):
    monkeypatch.setattr(several, "baseline_names", lambda data: ["last value"])
    with pytest.raises(InputError, match=names[-1]):
        run_ablation(arguments(tmp_path, ablation=names), DATASET, fake_train([]))


def test_a_baseline_may_be_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(several, "baseline_names", lambda data: ["last value"])
    args = arguments(tmp_path, ablation=["last value", "text"])
    made = []
    assert run_ablation(args, DATASET, fake_train(made)) == 0
    assert [stage_folder(own).name for own in made] == ["trajectory", "classification"]
    assert results_of(tmp_path / "ablation" / "ablation.json")["model"] == "last value"


# --------------------------------------------------------------------------- compare


def test_finished_stages_of_one_folder_are_compared_by_their_names(tmp_path, capsys):
    for seed, stage in enumerate(("trajectory", "classification")):
        write_run(tmp_path / stage, seed, baseline=STAGE_1 if seed else "last value")
    runs = [str(tmp_path / stage) for stage in ("classification", "trajectory")]
    assert trainer.main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert STAGE_NAMES["classification"] in shown
    assert not list(tmp_path.glob("compare*"))
    assert trainer.main(["compare", *runs, "--output_dir", str(tmp_path / "out")]) == 0
    content = results_of(tmp_path / "out" / "compare.json")
    assert content["model"] == STAGE_NAMES["classification"]
    assert list(content["models"]) == [STAGE_1]
    assert (content["primary"], content["planned"]) == (None, [STAGE_1])
    known = json.loads((tmp_path / "classification" / "metrics.json").read_text())
    known["test"] = {**known.get("test", {}), "primary": STAGE_1}
    (tmp_path / "classification" / "metrics.json").write_text(json.dumps(known))
    assert trainer.main(["compare", *runs, "--output_dir", str(tmp_path / "again")]) == 0
    assert results_of(tmp_path / "again" / "compare.json")["primary"] == STAGE_1
    assert trainer.main(["compare", *runs, "--primary", "blend"]) == 2
    table, _ = join_predictions({"a": Path(runs[0]), "b": Path(runs[1])})
    gain = roc_auc_score(table["label"], table["b"]) - roc_auc_score(table["label"], table["a"])
    assert content["models"][STAGE_1]["auroc"]["difference"] == pytest.approx(gain)
    assert "Death" in (tmp_path / "out" / "compare.html").read_text()
    places = [tmp_path / name for name in ("a/trajectory", "b/trajectory")]
    assert model_names(places) == ["a/trajectory", "b/trajectory"]


@pytest.mark.parametrize("names", [["a"], ["a", "b"], []])
def test_a_file_of_predictions_is_of_one_model_if_it_names_any(names, tmp_path, capsys):
    runs = [write_run(tmp_path / stage, 0) for stage in ("trajectory", "classification")]
    path = runs[0] / "predictions_test.csv"
    if names:
        table = pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False)
        table[MODEL] = np.resize(names, len(table))
        table.to_csv(path, index=False)
    words = ["compare", *map(str, runs)]
    if len(names) > 1:
        assert refused(capsys, words, path)
        return
    assert trainer.main(words) == 0
    table = read_predictions(runs[0], STAGE_1, [LABEL])
    assert [*table] == ["id", "label", "patient", STAGE_1, "last value"]


def test_rows_without_names_are_compared_within_the_same_data_alone(tmp_path):
    for name, rows in (("a", "x"), ("b", "x"), ("c", "y")):
        write_run(tmp_path / name, data={"has_patient_ids": False, "rows_sha256": rows})
    join_predictions({name: tmp_path / name for name in "ab"})
    with pytest.raises(InputError, match="subject_id"):
        join_predictions({name: tmp_path / name for name in "ac"})
    (tmp_path / "a" / "history.jsonl").write_text("oops")
    assert cost_of(tmp_path / "a") == {}


def test_of_several_runs_only_those_with_the_built_in_model_are_said_to_show_nothing():
    alone, read = ({"model_name": "demo", "trajectory_only": each} for each in (True, False))
    other = {"model_name": "google/medgemma-4b-pt", "trajectory_only": False}
    for runs, expected in (
        ({"a": alone, "b": read, "c": {**other, "trajectory_only": True}}, built_in_sentence()),
        ({"a": alone, "b": alone}, ""),
        ({"a": alone, "b": other}, ""),
        ({"a": alone, "b": {}}, ""),
    ):
        assert built_in_models_notice(runs) == expected
    runs = {"a": alone, "run/b": read, "c": other, "d": read}
    assert built_in_models_notice(runs) == built_in_sentence(" of run/b and d")


# --------------------------------------------------------------------------- by the command line


def test_the_command_line_runs_each_seed_once(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    table = pd.read_csv(SAMPLE, nrows=100)
    table["split"] = (["train"] * 6 + ["val", "test"] * 2) * 10
    table.to_csv(tmp_path / "data.csv", index=False)
    words = ["--trajectory_only", "--data_path", str(tmp_path / "data.csv"), "--log_file", "none"]
    words += ["--trajectory_epochs", "2", "--seeds=2", "--output_dir", str(tmp_path / "out")]
    words += ["--series_name", "Bicarbonate", "--outcome", "Death"]
    assert trainer.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.split(":")[0] for line in lines[:2]] == ["seed 0", "seed 1"]
    assert not any("epoch" in line for line in lines[:2]), "a line a run"
    places = [tmp_path / "out" / f"seed_{seed}" / "trajectory" for seed in (0, 1)]
    before = [(place / "predictions_test.csv").stat().st_mtime_ns for place in places]
    assert trainer.main(words) == 0
    assert [(place / "predictions_test.csv").stat().st_mtime_ns for place in places] == before
    assert "ensemble" in results_of(tmp_path / "out" / "seeds_trajectory.json")["models"]
    capsys.readouterr()
    assert trainer.main(["compare", *map(str, places)]) == 0
    shown = capsys.readouterr().out
    for place in places:
        value = results_of(place / "metrics.json")["test"]["auroc"]["value"]
        (line,) = (x for x in shown.splitlines() if f"{place.parent.name}/trajectory" in x)
        assert f"{value:.3f} [" in line


ALONE, TESTED = "--trajectory_only", "trajectory/predictions_test.csv"
ABLATION = "--ablation=stage 1,states held", f"--model_name={TINY_MODEL}"
WAYS = [
    ((ALONE, "--calibrate=platt"), "trajectory/metrics.json", TESTED),
    (ABLATION, "ablation/ablation.json", TESTED),
    ((ALONE, "--seeds=2"), "seeds_trajectory.json", f"seed_*/{TESTED}"),
    (
        (ALONE, "--folds=2", "--seeds=2"),
        "repeats_trajectory/metrics.json",
        "repeat_*/folds_trajectory/predictions_folds.csv",
    ),
]
"""Flags, the metrics that they lead to, and the predictions that are behind these."""


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("flags", "place", "behind"), WAYS)
def test_runs_of_times_have_the_metrics_of_each_horizon(
    flags, place, behind, tmp_path, monkeypatch
):
    monkeypatch.undo()
    table = waiting(360).assign(split=["train"] * 160 + ["val"] * 100 + ["test"] * 100)
    table.to_csv(tmp_path / "waiting.csv", index=False)
    (tmp_path / "waiting.json").write_text(json.dumps({**ABOUT, "interventions": [2]}))
    words = [f"--data_path={tmp_path}/waiting.csv", f"--output_dir={tmp_path}", *flags]
    words += ["--horizon_hours=24,72", "--trajectory_epochs=3", "--encoder_lr=0.02"]
    write_last = repeats.write_repeat_results

    def write_whole(*args):
        with whole_reports():
            write_last(*args)

    monkeypatch.setattr(repeats, "write_repeat_results", write_whole)
    with whole_reports() if "--calibrate=platt" in flags else contextlib.nullcontext():
        assert trainer.main([*words, "--log_file=none"]) == 0
    content = results_of(tmp_path / place)
    targets = [Target.from_json(entry) for entry in content["targets"]]
    assert [target.name for target in targets] == RISKS
    part = content.get("test", content.get("folds", content))
    rows = [pd.read_csv(path) for path in sorted(tmp_path.glob(behind))]
    parts = [own for x in rows for _, own in x.groupby(x.get("fold", pd.Series(0, x.index)))]
    for target in targets[:2]:
        watched = [(own["event_hours"], own["event"], own[target.name]) for own in parts]
        aurocs = [metrics_at(*each, target.horizon)["auroc"] for each in watched]
        assert part[target.key("auroc")]["value"] == pytest.approx(np.mean(aurocs))
    for target, (name, own) in itertools.product(targets, part["models"].items()):
        first, model = part[target.key("auroc")]["value"], own[target.key("auroc")]
        if own["reference"] == part["model"]:
            assert model["difference"] == pytest.approx(model["value"] - first), name
    page = Page(next((tmp_path / place).parent.glob("[!.]*.html")).read_text()).text
    assert all(target.title in page for target in targets)
    if "--calibrate=platt" in flags:
        assert {*content["calibration"]["moves"]} == {*RISKS}
        for target in targets[::2]:  # a later risk is not below an earlier one, whatever fits best
            slope, level = (content["validation"][target.key(x)] for x in ("slope", "intercept"))
            assert (slope["value"], level["value"]) == pytest.approx((1, 0), abs=1e-6)
    if flags == ABLATION:
        runs = [str(tmp_path / x / "trajectory") for x in ("", "ablation/states_held")]
        assert trainer.main(["compare", *runs, f"--output_dir={tmp_path}/compared"]) == 0
        compared = results_of(tmp_path / "compared" / "compare.json")
        variant = compared["models"]["ablation/states_held/trajectory"]
        for target in targets:
            name = target.key("auroc")
            assert variant[name]["difference"] == part["models"]["states held"][name]["difference"]
