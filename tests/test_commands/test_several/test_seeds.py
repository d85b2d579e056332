"""The same command with several seeds: each with its own split and stage 1, pooled at the end."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from conftest import SAMPLE
from finished_runs import write_run
from medgemma_clinical.commands.several import runs as several_runs
from medgemma_clinical.commands.several import seeds
from medgemma_clinical.commands.several.seeds import run_seeds, seed_arguments
from medgemma_clinical.evaluation.baselines import STAGE_1
from medgemma_clinical.evaluation.bootstrap import NO_VALUE
from medgemma_clinical.files import InputError
from medgemma_clinical.models.sharing.model_card import RANDOM_MODEL, RANDOM_MODEL_UNREAD

DATASET: Any = SimpleNamespace(outcome="Death")


def arguments(folder: Path, **changes: Any) -> Namespace:
    """The flags that ``--seeds`` looks at."""
    flags: dict[str, Any] = {
        "ablation": False,
        "data_dir": None,
        "data_path": Path("data.csv"),
        "min_cell": 0,
        "mode": "classification",
        "model_name": "google/medgemma-4b-pt",
        "ode_checkpoint": None,
        "output_dir": folder,
        "reference": "text",
        "seed": 3,
        "seeds": 2,
        "trajectory_only": True,
    }
    return Namespace(**{**flags, **changes})


@pytest.fixture
def unbegun(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run was begun before."""
    monkeypatch.setattr(several_runs, "run_progress", lambda args, dataset: "none")


def fake_train(made: list[Namespace], **changes: Any) -> Callable[[Namespace, Any], int]:
    """Return a training that writes a finished run and takes down its arguments."""

    def train(args: Namespace, dataset: Any) -> int:
        assert dataset is DATASET
        made.append(args)
        logging.getLogger("medgemma_trainer").info("a line of the run itself")
        write_run(several_runs.stage_folder(args), args.seed, **changes)
        return 0

    return train


def test_every_seed_has_its_folder_its_number_and_its_stage_1() -> None:
    place = Path("s1/seed_{seed}/x.pt")
    args = arguments(Path("out"), ode_checkpoint=place, log_file="run_{seed}.log", epochs=4)
    own = seed_arguments(7, args)
    assert (own.seed, own.seeds, own.output_dir) == (7, None, Path("out/seed_7"))
    assert own.ode_checkpoint == Path("s1/seed_7/x.pt")
    assert (own.log_file, own.epochs, own.data_path) == ("run_7.log", 4, Path("data.csv"))
    assert args.ode_checkpoint == place, "the command's own arguments stay"


def test_one_stage_1_for_all_splits_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, trajectory_only=False, ode_checkpoint=Path("stage1.pt"))
    with pytest.raises(InputError, match=r"write \{seed\}"):
        run_seeds(args, lambda _: DATASET, fake_train([]))


@pytest.mark.usefixtures("unbegun")
def test_the_seeds_are_pooled_and_the_best_is_chosen_by_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Namespace] = []
    with caplog.at_level(logging.INFO):
        code = run_seeds(arguments(tmp_path), lambda _: DATASET, fake_train(made))
    assert code == 0
    assert [(args.seed, args.seeds) for args in made] == [(3, None), (4, None)]
    folders = [tmp_path / f"seed_{seed}" / "trajectory" for seed in (3, 4)]
    tables = [pd.read_csv(folder / "predictions_test.csv") for folder in folders]
    scores = [roc_auc_score(table["label"], table["probability"]) for table in tables]
    pooled = json.loads((tmp_path / "seeds_trajectory.json").read_text())[STAGE_1]["auroc"]
    assert pooled["value"] == pytest.approx(np.mean(scores))
    assert pooled["sd"] == pytest.approx(np.std(scores, ddof=1))
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    best = 3 + int(np.argmax([each["validation"]["auroc"]["value"] for each in figures]))
    page = (tmp_path / "seeds_trajectory.html").read_text()
    known = figures[best - 3]
    validation, test = (known[part]["auroc"]["value"] for part in ("validation", "test"))
    for text in (page, caplog.text):
        assert (
            f"Best by validation: seed {best}, with an AUROC of {validation:.3f} [0.100, 0.900] "
            f"there and of {test:.3f} [0.100, 0.900] on its test part"
        ) in text
        assert f"is {min(scores):.3f} to {max(scores):.3f}, mean {pooled['value']:.3f} [" in text
    assert "Stage 1, trajectory alone, in 2 splits of the data: Death" in page
    assert "<title>Stage 1, trajectory alone" in page
    assert "seeds_trajectory" not in page
    assert page.index(seeds.BEYOND_CHANCE) < page.index("Gain and cost")
    assert f"{pooled['sd']:.3f}" in page
    assert (
        json.loads((tmp_path / "seeds_trajectory.json").read_text())[STAGE_1].items()
        >= {
            "seconds_an_epoch": 1.0,
            "tokens": 12.0,
            "memory_mib": 103.5,
        }.items()
    )
    assert (tmp_path / "seeds_trajectory.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_validation_and_test_of_each_seed_and_whether_they_disagree(
    tmp_path: Path,
) -> None:
    near, far = {"value": 0.7, "low": 0.6, "high": 0.8}, {"value": 0.9, "low": 0.85, "high": 0.95}
    unknown = dict.fromkeys(near)
    folders = {}
    for seed, (validation, test) in enumerate(
        [(near, near), (near, far), (far, near), (near, unknown)]
    ):
        folders[seed] = write_run(tmp_path / str(seed))
        parts = {"validation": {"auroc": validation}, "test": {"auroc": test}}
        (folders[seed] / "metrics.json").write_text(json.dumps(parts))
    table = seeds.split_table(folders)
    assert table["Seed"].tolist() == [0, 1, 2, 3]
    assert table["Validation"].tolist()[1:3] == ["0.700 [0.600, 0.800]", "0.900 [0.850, 0.950]"]
    assert table["Test"].tolist()[1:] == ["0.900 [0.850, 0.950]", "0.700 [0.600, 0.800]", NO_VALUE]
    assert [text[:6] for text in table["Test minus validation"]][:3] == [
        "+0.000",
        "+0.200",
        "-0.200",
    ]
    assert table[seeds.BEYOND_CHANCE].tolist() == ["no", "yes", "yes", NO_VALUE]


@pytest.mark.usefixtures("unbegun")
def test_the_console_gets_a_line_a_run_and_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from medgemma_clinical.commands.logs import start_logging

    handlers = logging.root.handlers[:]
    try:
        start_logging()
        run_seeds(arguments(tmp_path), lambda _: DATASET, fake_train([]))
    finally:
        logging.root.handlers[:] = handlers
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert not any("a line of the run itself" in line for line in lines)
    assert [line.split(":")[0] for line in lines[:2]] == ["seed 3", "seed 4"]
    assert "test AUROC 0." in lines[0]
    assert len(lines) <= 9, lines


@pytest.mark.usefixtures("unbegun")
def test_the_data_are_read_once_unless_each_seed_has_its_own(tmp_path: Path) -> None:
    for path, expected in (("data.csv", ["data.csv"]), ("d_{seed}.csv", ["d_3.csv", "d_4.csv"])):
        read: list[str] = []

        def keep(args: Namespace, read: list[str] = read) -> Any:
            read.append(args.data_path.name)
            return DATASET

        args = arguments(tmp_path / path, data_path=Path(path))
        assert run_seeds(args, keep, fake_train([])) == 0
        assert read == expected


def test_finished_runs_are_left_and_stopped_ones_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Namespace] = []
    args = arguments(tmp_path, seeds=3, resume=True)
    write_run(tmp_path / "seed_3" / "trajectory", 3)
    known = {3: "all", 4: "part", 5: "none"}
    monkeypatch.setattr(several_runs, "run_progress", lambda own, _: known[own.seed])
    with caplog.at_level(logging.INFO):
        run_seeds(args, lambda _: DATASET, fake_train(made))
    assert [(own.seed, own.resume) for own in made] == [(4, True), (5, False)]
    assert caplog.text.count("already there") == 1
    assert "seed 4: continued" in caplog.text


@pytest.mark.usefixtures("unbegun")
def test_a_run_that_fails_ends_the_command_with_its_code_and_its_name(tmp_path: Path) -> None:
    def fails(args: Namespace, dataset: Any) -> int:
        return 7 if args.seed == 4 else fake_train([])(args, dataset)

    args = arguments(tmp_path, seeds=3)
    assert run_seeds(args, lambda _: DATASET, fails) == 7
    assert not (tmp_path / "seed_5").exists()
    assert not (tmp_path / "seeds_trajectory.json").exists()

    def refuses(args: Namespace, dataset: Any) -> int:
        raise InputError("the test part has no event", "cell")

    with pytest.raises(InputError, match=r"^seed 3: the test part has no event$") as refused:
        run_seeds(args, lambda _: DATASET, refuses)
    assert refused.value.value == "cell"


@pytest.mark.usefixtures("unbegun")
def test_an_earlier_result_that_differs_is_moved_aside(tmp_path: Path) -> None:
    run_seeds(arguments(tmp_path), lambda _: DATASET, fake_train([]))
    before = (tmp_path / "seeds_trajectory.json").read_bytes()
    args = arguments(tmp_path, seed=5)
    run_seeds(args, lambda _: DATASET, fake_train([]))
    assert (tmp_path / "seeds_trajectory.1.json").read_bytes() == before
    assert (tmp_path / "seeds_trajectory.1.html").exists()


@pytest.mark.usefixtures("unbegun")
def test_baselines_that_some_split_lacks_are_not_pooled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(args: Namespace, dataset: Any) -> int:
        name = "with facts" if args.seed == 4 else "last value"
        return fake_train([], baseline=name)(args, dataset)

    with caplog.at_level(logging.INFO):
        run_seeds(arguments(tmp_path), lambda _: DATASET, train)
    assert "not in every split, so not pooled: last value, with facts" in caplog.text
    assert list(json.loads((tmp_path / "seeds_trajectory.json").read_text())) == [STAGE_1]


@pytest.mark.usefixtures("unbegun")
def test_a_combined_model_of_different_blends_is_not_pooled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(args: Namespace, dataset: Any) -> int:
        code = fake_train([], baseline="blend")(args, dataset)
        path = args.output_dir / "trajectory" / "predictions_test.csv"
        table = pd.read_csv(path, dtype={"id": str})
        if args.seed == 4:
            table["blend with facts"] = table["blend"]
        table.assign(combined=table["blend"]).to_csv(path, index=False)
        return code

    with caplog.at_level(logging.INFO):
        run_seeds(arguments(tmp_path), lambda _: DATASET, train)
    assert "so not pooled: blend with facts, combined" in caplog.text
    results = json.loads((tmp_path / "seeds_trajectory.json").read_text())
    assert list(results) == [STAGE_1, "blend"]


def test_ablations_of_several_seeds_read_the_data_once_and_are_pooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Namespace] = []
    seen: list[tuple[int, bool]] = []

    def keep(args: Namespace) -> Any:
        read.append(args)
        return DATASET

    def ablation(args: Namespace, dataset: Any, train: Any, seed_title: str) -> int:
        assert dataset is DATASET
        assert seed_title == f"seed {args.seed}, "
        seen.append((args.seed, args.ablation))
        folder = write_run(args.output_dir / "ablation", args.seed)
        table = pd.read_csv(folder / "predictions_test.csv")
        table["text"] = 1 - table["probability"]
        table["text + logit"] = table["last value"] / 2
        table = table.rename(columns={"probability": "stage 1"})
        table.to_csv(folder / "predictions_test.csv", index=False)
        costs = {
            "stage 1": {"tokens": args.seed, "memory_mib": None, "residual_weight": 0.0},
            "last value": {},
        }
        (folder / "ablation.json").write_text(json.dumps({**costs, "text": {"tokens": 70}}))
        return 0

    monkeypatch.setattr(seeds, "run_ablation", ablation)
    args = arguments(tmp_path, ablation=True)
    assert run_seeds(args, keep, fake_train([])) == 0
    assert (len(read), seen) == (1, [(3, True), (4, True)])
    results = json.loads((tmp_path / "seeds_ablation.json").read_text())
    assert set(results) == {"last value", "stage 1", "text", "text + logit"}
    assert [results[name].get("tokens") for name in ("stage 1", "text")] == [3.5, 70]
    assert results["text"]["minus_reference"]["auroc"]["value"] == 0, "the reference"
    gain = results["stage 1"]["minus_reference"]["auroc"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    page = (tmp_path / "seeds_ablation.html").read_text()
    assert "adds nothing to stage 1, in: stage 1." in page
    assert "Text, beside stage 1: " in page
    assert page.count("The AUROC of ") == 1
    assert "What each part of the model adds, in 2 splits of the data: Death" in page


def test_runs_with_the_random_model_have_a_notice(tmp_path: Path) -> None:
    for model, stage1_alone, notice in (
        ("tiny", False, RANDOM_MODEL),
        ("tiny", True, RANDOM_MODEL_UNREAD),
        ("google/medgemma-4b-pt", False, ""),
    ):
        args = arguments(tmp_path, model_name=model, trajectory_only=stage1_alone)
        assert several_runs.random_models_notice({"all": vars(args)}) == notice


def test_of_several_runs_only_those_with_the_random_model_are_said_to_show_nothing() -> None:
    notice = several_runs.random_models_notice
    alone, read = ({"model_name": "tiny", "trajectory_only": each} for each in (True, False))
    other = {"model_name": "google/medgemma-4b-pt", "trajectory_only": False}
    assert notice({"a": alone, "b": read, "c": {**other, "trajectory_only": True}}) == RANDOM_MODEL
    assert notice({"a": alone, "b": alone}) == RANDOM_MODEL_UNREAD
    for unread in (other, {}, {**other, "trajectory_only": True}):
        assert notice({"a": alone, "b": unread}) == ""
    for real in (other, {}):
        mixed = notice({"a": alone, "run/b": read, "c": real, "d": read})
        assert mixed.startswith("The language model of run/b and of d is tiny and random")


# --------------------------------------------------------------------------- by the command line


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Run two seeds of stage 1 on one given split; return the flags and the output folder."""
    folder = tmp_path_factory.mktemp("seeds")
    table = pd.read_csv(SAMPLE, nrows=100)
    table["split"] = (["train"] * 6 + ["val", "test"] * 2) * 10
    table.to_csv(folder / "data.csv", index=False)
    words = ["--trajectory_only", "--data_path", str(folder / "data.csv"), "--log_file", "none"]
    words += ["--trajectory_epochs", "2", "--seed", "3", "--seeds=2", "--min_cell", "0"]
    words += ["--output_dir", str(folder / "out")]
    assert trainer.main(words) == 0
    return words, folder / "out"


def test_the_command_line_runs_each_seed_once(
    two_seeds: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, folder = two_seeds
    places = [folder / f"seed_{seed}" / "trajectory" for seed in (3, 4)]
    run = [json.loads((place / "run.json").read_text())["arguments"] for place in places]
    assert [flags["seed"] for flags in run] == [3, 4]
    before = [(place / "predictions_test.csv").stat().st_mtime_ns for place in places]
    assert trainer.main(words) == 0
    assert capsys.readouterr().out.count("already there") == 2
    assert [(place / "predictions_test.csv").stat().st_mtime_ns for place in places] == before
    pooled = json.loads((folder / "seeds_trajectory.json").read_text())
    assert {STAGE_1, "logistic regression", "blend with facts", "combined"} < set(pooled)
    alone, both = (pooled[name]["auroc"]["value"] for name in ("blend with facts", "combined"))
    assert pooled["combined"]["minus_blend"]["auroc"]["value"] == pytest.approx(both - alone)
    page = (folder / "seeds_trajectory.html").read_text()
    assert "he model stage 1 (trajectory alone) joined with blend with facts is" in page


def test_runs_of_the_same_split_are_compared_by_the_command_line(
    two_seeds: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(two_seeds[1] / f"seed_{seed}" / "trajectory") for seed in (3, 4)]
    capsys.readouterr()
    assert trainer.main(["--compare", *places, "--min_cell", "0"]) == 0
    shown = capsys.readouterr().out
    for place in places:
        test = json.loads((Path(place) / "metrics.json").read_text())["test"]
        name = Path(place).relative_to(two_seeds[1]).as_posix()
        (row,) = [line for line in shown.splitlines() if line.strip().startswith(name)]
        assert f"{test['auroc']['value']:.3f} [" in row
    assert "20 rows" in shown
