"""Models side by side: on one test part, over the splits of several seeds, and by command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from conftest import sign_table

SAMPLE = Path(__file__).parent / "data" / "physionet2012_bicarbonate.csv"


def table_of(seed: int, n: int = 120) -> pd.DataFrame:
    """Predictions of two models on rows of which some share a patient."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 4 == 0).astype(int)
    signal = labels + rng.normal(size=n)
    return pd.DataFrame(
        {
            "id": [f"r{k}" for k in range(n)],
            "patient": [f"p{k // 2}" for k in range(n)],
            "label": labels,
            "good": trainer.torch.sigmoid(trainer.torch.tensor(signal - 1)).numpy(),
            "bad": rng.uniform(size=n),
        }
    )


def test_one_test_part_gives_the_figures_of_each_model_and_their_paired_differences() -> None:
    table = table_of(0)
    labels, groups = table["label"].to_numpy(float), table["patient"].to_numpy(np.str_)
    results = trainer.side_by_side([table], "bad", seed=5)
    for name in ("good", "bad"):
        alone = trainer.metrics_with_intervals(labels, table[name].to_numpy(), groups, 5)
        against = (table[name].to_numpy(), table["bad"].to_numpy())
        paired = trainer.paired_differences(labels, *against, groups, 5)
        assert (results[name]["n"], results[name]["events"]) == (alone["n"], alone["events"])
        for metric in paired:
            assert results[name][metric] == pytest.approx(alone[metric])
            assert results[name]["minus_reference"][metric] == pytest.approx(paired[metric])


def test_over_several_splits_the_figure_is_the_mean_and_its_spread_is_told() -> None:
    tables = [table_of(seed) for seed in range(3)]
    result = trainer.side_by_side(tables, "bad", seed=0)["good"]
    scores = [roc_auc_score(t["label"], t["good"]) for t in tables]
    others = [roc_auc_score(t["label"], t["bad"]) for t in tables]
    assert result["auroc"]["value"] == pytest.approx(np.mean(scores))
    assert result["auroc"]["sd"] == pytest.approx(np.std(scores, ddof=1))
    gain = result["minus_reference"]["auroc"]
    assert gain["value"] == pytest.approx(np.mean(scores) - np.mean(others))
    assert gain["low"] < gain["value"] < gain["high"]
    assert (result["n"], result["events"]) == (360, 90)


def test_a_patient_of_several_splits_is_drawn_once_so_repeating_a_split_proves_nothing() -> None:
    once = trainer.side_by_side([table_of(1)], "bad", seed=0)["good"]
    thrice = trainer.side_by_side([table_of(1)] * 3, "bad", seed=0)["good"]
    for one, three in (
        (once["auroc"], thrice["auroc"]),
        (once["minus_reference"]["auroc"], thrice["minus_reference"]["auroc"]),
    ):
        assert three["low"] == pytest.approx(one["low"])
        assert three["high"] == pytest.approx(one["high"])


def test_splits_of_other_patients_make_the_interval_narrower() -> None:
    tables = [table_of(seed) for seed in range(4)]
    for k, table in enumerate(tables):
        table["patient"] += f"_{k}"
    one, four = (
        trainer.side_by_side(few, "bad", seed=0)["good"]["auroc"] for few in (tables[:1], tables)
    )
    assert four["high"] - four["low"] < 0.7 * (one["high"] - one["low"])


def test_few_events_in_a_split_leave_no_interval_without_ends(
    recwarn: pytest.WarningsRecorder,
) -> None:
    tables = [table_of(seed, n=24) for seed in range(3)]
    for table in tables:
        table["label"] = (np.arange(24) < 2).astype(int)  # two rows of one patient
    results = trainer.side_by_side(tables, "bad", seed=0)
    for figures in (results["good"], results["good"]["minus_reference"]):
        for metric in ("auroc", "auprc", "brier"):
            assert figures[metric]["low"] <= figures[metric]["value"] <= figures[metric]["high"]
    assert not recwarn.list


def test_many_rows_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [table_of(seed) for seed in range(2)]
    whole = trainer.side_by_side(tables, "bad", seed=0)
    monkeypatch.setattr(trainer, "CHUNK_CELLS", 7 * 240)
    sizes: list[int] = []
    real = trainer.weighted_metrics

    def seen(labels: Any, risk: Any, weights: Any) -> Any:
        sizes.append(len(weights))
        return real(labels, risk, weights)

    monkeypatch.setattr(trainer, "weighted_metrics", seen)
    pieces = trainer.side_by_side(tables, "bad", seed=0)
    assert max(sizes) == 7
    for metric in ("auroc", "log_loss"):
        assert pieces["good"][metric] == pytest.approx(whole["good"][metric])


def test_pooled_intervals_cover_the_true_mean_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "BOOTSTRAP_REPLICATES", 300)
    # Normal scores d apart have AUROC Phi(d / sqrt(2)): 0.7602 for d = 1, 0.6381 for d = 0.5.
    truth, covered, repeats = 0.7602 - 0.6381, 0, 500
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        patients = rng.permutation(600)
        scores = {"label": (np.arange(600) % 3 == 0).astype(int)}
        scores["good"] = scores["label"] + rng.normal(size=600)
        scores["bad"] = 0.5 * scores["label"] + rng.normal(size=600)
        whole = pd.DataFrame(scores)
        whole[["good", "bad"]] = 1 / (1 + np.exp(-whole[["good", "bad"]]))
        whole.insert(0, "patient", patients.astype(str))
        whole.insert(0, "id", patients.astype(str))
        tables = [whole.sample(300, random_state=repeat + k, ignore_index=True) for k in (0, 1)]
        paired = trainer.side_by_side(tables, "bad", repeat)["good"]["minus_reference"]["auroc"]
        covered += paired["low"] <= truth <= paired["high"]
    assert 0.93 <= covered / repeats <= 0.97


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of stage 1 on the same split, by one command."""
    folder = tmp_path_factory.mktemp("runs")
    table = pd.read_csv(SAMPLE, nrows=200)
    table["split"] = (["train"] * 6 + ["val", "test"] * 2) * 20
    table.to_csv(folder / "data.csv", index=False)
    assert trainer.main(seeds_command(folder)) == 0
    return folder


def seeds_command(folder: Path) -> list[str]:
    words = ["--trajectory_only", "--data_path", str(folder / "data.csv"), "--log_file", "none"]
    words += ["--trajectory_epochs", "2", "--seed", "3", "--seeds=2"]
    return [*words, "--output_dir", str(folder / "out")]


def test_predictions_name_the_patient_and_hold_the_baselines(runs: Path) -> None:
    table = pd.read_csv(runs / "out" / "seed_3" / "trajectory" / "predictions_test.csv")
    assert list(table)[:5] == ["id", "label", "probability", "patient", "last value"]
    figures = json.loads((runs / "out" / "seed_3" / "trajectory" / "metrics.json").read_text())
    assert roc_auc_score(table["label"], table["last value"]) == pytest.approx(
        figures["baselines"]["last value"]["test"]["auroc"]["value"]
    )


def test_several_seeds_are_run_pooled_and_the_best_is_chosen_by_validation(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [runs / "out" / f"seed_{seed}" / "trajectory" for seed in (3, 4)]
    before = [(place / "predictions_test.csv").stat().st_mtime_ns for place in places]
    assert trainer.main(seeds_command(runs)) == 0
    said = capsys.readouterr().out
    assert said.count("already there") == 2
    assert [(place / "predictions_test.csv").stat().st_mtime_ns for place in places] == before
    figures = [json.loads((place / "metrics.json").read_text()) for place in places]
    pooled = json.loads((runs / "out" / "seeds_trajectory.json").read_text())["trajectory"]["auroc"]
    scores = [figure["test"]["auroc"]["value"] for figure in figures]
    assert pooled["value"] == pytest.approx(np.mean(scores))
    assert pooled["sd"] == pytest.approx(np.std(scores, ddof=1))
    validation = [figure["validation"]["auroc"]["value"] for figure in figures]
    best = f"Best by validation: seed {3 + int(np.argmax(validation))} "
    assert best in said
    assert best in (runs / "out" / "seeds_trajectory.html").read_text()
    page = (runs / "out" / "seeds_trajectory.html").read_text()
    assert f"trajectory: test AUROC {pooled['value']:.3f} [" in page
    assert f"standard deviation over splits {pooled['sd']:.3f}" in page
    assert "logistic regression" in page
    assert page.count("<svg") == 1
    assert (runs / "out" / "seeds_trajectory.png").read_bytes().startswith(b"\x89PNG")
    assert {json.loads((p / "run.json").read_text())["arguments"]["seed"] for p in places} == {3, 4}


def test_runs_on_the_same_patients_are_compared_with_the_first(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(runs / "out" / f"seed_{seed}" / "trajectory") for seed in (3, 4)]
    assert trainer.main(["--compare", *places]) == 0
    said = capsys.readouterr().out
    for place in places:
        test = json.loads((Path(place) / "metrics.json").read_text())["test"]
        (row,) = [line for line in said.splitlines() if line.strip().startswith(place)]
        assert f"{test['auroc']['value']:.3f} [" in row
    assert f"minus {places[0]}" in said
    assert "logistic regression" in said
    assert "40 rows" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.assign(id=table["id"] + "x"), "different patients"),
        (lambda table: table.assign(label=1 - table["label"]), "other labels"),
        (lambda table: table.iloc[1:], "different patients"),
        (lambda table: table.drop(columns="patient"), "no column patient"),
        (None, "no predictions_test.csv"),
    ],
    ids=["other ids", "other labels", "fewer", "no patient", "no file"],
)
def test_what_was_not_tested_alike_is_not_compared(
    runs: Path, tmp_path: Path, change: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = runs / "out" / "seed_3" / "trajectory"
    if callable(change):
        table = pd.read_csv(place / "predictions_test.csv", dtype={"id": str})
        change(table).to_csv(tmp_path / "predictions_test.csv", index=False)
    assert trainer.main(["--compare", str(place), str(tmp_path)]) == 2
    problem = capsys.readouterr().err
    assert words in problem
    assert problem.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--compare", "run"], "two different folders"),
        (["--compare", "run", "run"], "two different folders"),
        (["--seeds", "2", "--demo"], "--demo and --seeds"),
        (["--seeds", "2", "--dry_run"], "--dry_run and --seeds"),
        (["--predict", "--seeds", "2"], "--predict and --seeds"),
        (["--predict", "--ablation"], "--predict and --ablation"),
        (["--ablation", "--seeds", "2", "--demo"], "--demo and --ablation and --seeds"),
        (["--compare", "a", "b", "--output_dir", "c"], "no use for --output_dir"),
        (["--seeds", "2", "--ode_checkpoint", "stage1.pt"], "{seed}"),
    ],
)
def test_what_makes_no_sense_together_is_refused(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main(words) == 2
    assert problem in capsys.readouterr().err


def test_each_seed_gets_the_stage_1_of_its_own_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.csv"
    pd.read_csv(SAMPLE, nrows=100).to_csv(data, index=False)
    seen = []
    real = trainer.main

    def stop(words: list[str]) -> int:
        seen.append(trainer.build_parser().parse_args(words))
        return 0 if len(seen) < 2 else 7

    monkeypatch.setattr(trainer, "main", stop)
    words = ["--data_path", str(data), "--seeds", "2", "--output_dir", str(tmp_path / "out")]
    words += ["--ode_checkpoint", f"{tmp_path}/s1/seed_{{seed}}/x.pt"]
    assert real(words) == 7, "the code of a run that failed is passed on"
    assert [str(args.ode_checkpoint) for args in seen] == [
        f"{tmp_path}/s1/seed_{seed}/x.pt" for seed in (0, 1)
    ]
    assert [(args.seed, args.seeds) for args in seen] == [(0, None), (1, None)]
    assert [args.output_dir.name for args in seen] == ["seed_0", "seed_1"]


def test_two_stages_of_several_seeds_keep_their_pages_and_other_results_are_set_aside(
    runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(runs / "out", out)
    words = [*seeds_command(runs)[:-1], str(out)]
    before = (out / "seeds_trajectory.json").read_bytes()
    assert trainer.main([*words, "--seeds", "3"]) == 0
    assert (out / "seeds_trajectory.1.json").read_bytes() == before
    assert (out / "seeds_trajectory.1.html").exists()


def test_seeds_whose_baselines_differ_are_pooled_over_those_they_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sign_table(120, seed=1)
    table["clinical_context"] = ["rare" if k == 7 else "" for k in range(120)]
    table.to_csv(tmp_path / "data.csv", index=False)
    words = ["--trajectory_only", "--data_path", str(tmp_path / "data.csv"), "--log_file", "none"]
    words += ["--trajectory_epochs", "1", "--seeds", "8", "--output_dir", str(tmp_path / "out")]
    assert trainer.main(words) == 0
    said = capsys.readouterr().out
    assert "not in every split, so not pooled: gradient boosting with context" in said
    pooled = json.loads((tmp_path / "out" / "seeds_trajectory.json").read_text())
    assert "logistic regression" in pooled
    assert "logistic regression with context" not in pooled


def test_runs_that_know_no_patients_are_compared_on_the_same_file_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = sign_table(120, seed=1)
    other = table.assign(clinical_trajectory=table["clinical_trajectory"][::-1].to_numpy())
    for name, each in (("a", table), ("b", other.assign(clinical_context="elsewhere"))):
        each.to_csv(tmp_path / f"{name}.csv", index=False)
        words = ["--trajectory_only", "--data_path", str(tmp_path / f"{name}.csv")]
        words += ["--trajectory_epochs", "1", "--log_file", "none"]
        assert trainer.main([*words, "--output_dir", str(tmp_path / name)]) == 0
    places = [str(tmp_path / name / "trajectory") for name in ("a", "b")]
    capsys.readouterr()
    assert trainer.main(["--compare", *places]) == 2
    assert "their data name no patients" in capsys.readouterr().err
    again = str(tmp_path / "a" / ".." / "a" / "trajectory")
    assert trainer.main(["--compare", places[0], again]) == 2
    assert "different folders" in capsys.readouterr().err


def test_a_picture_that_stands_alone_has_colours_for_paper() -> None:
    from matplotlib.colors import same_color

    labels, names = np.tile([0, 1], 30), [str(k) for k in range(60)]
    table = pd.DataFrame({"id": names, "patient": names, "label": labels})
    table["good"] = 0.2 + 0.5 * labels + np.linspace(-0.2, 0.2, 60)
    figure = trainer.draw_comparison(trainer.side_by_side([table], "good", 0), "good")
    trainer.repaint(figure)
    colours = [artist.get_color() for artist in figure.findobj() if hasattr(artist, "get_color")]
    assert not any(same_color(c, p) for c in colours for p in trainer.PAGE_COLOURS)
    assert any(same_color(c, trainer.PAPER_COLOURS[trainer.MODEL]) for c in colours)
