"""What each part adds: the switches, paired differences, the ablation command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import medgemma_trainer as trainer
from conftest import SAMPLE
from dataset_format import SERIES_TEXT, MIMICtrajectoryDataset
from language_models import arguments, body_inputs, data_of, patients
from medgemma_trainer import Stage

ROWS = [3, 1, 9]


def built(*flags: str) -> Stage:
    """Make stage 2 of the tiny model from flags."""
    dataset = patients()
    args = arguments("--model_name", "tiny", *flags)
    dataset.series_text, dataset.text_context = args.series_text, args.text_context == "full"
    return trainer.llm_stage(args, data_of(dataset))


def seen_by_the_decoder(stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Give text ids, embeddings and mask of some rows, as they reach the decoder."""
    batch = stage.loaders["train"].collate_fn(ROWS)
    model = stage.model.eval()
    assert isinstance(model, trainer.TrajectoryLLM)
    with body_inputs(model) as seen:
        model(batch)
    return batch["input_ids"], seen[0]["inputs_embeds"], seen[0]["attention_mask"]


def test_without_soft_prompt_the_decoder_reads_the_same_text_and_nothing_else() -> None:
    ids, both, mask = seen_by_the_decoder(built())
    same, alone, text_mask = seen_by_the_decoder(built("--soft_prompt", "off"))
    assert torch.equal(ids, same)
    for row in range(len(ROWS)):
        soft = int(mask[row].sum() - text_mask[row].sum())
        assert soft == min(8, int(patients().lengths[ROWS[row]]))
        kept = both[row, mask[row].bool()]
        assert torch.equal(
            torch.cat([kept[:1], kept[1 + soft :]]), alone[row, text_mask[row].bool()]
        )


def test_without_soft_prompt_there_is_no_encoder_to_train_or_save() -> None:
    stage = built("--soft_prompt", "off")
    assert {name for name, _ in stage.model.named_children()} == {"llm", "head"}
    assert {group["name"] for group in stage.parameter_groups()} == {"llm", "head"}


@pytest.mark.parametrize("number", [1, 3])
def test_the_number_of_soft_tokens_changes_nothing_but_their_number(number: int) -> None:
    ids, eight, mask = seen_by_the_decoder(built())
    same, few, few_mask = seen_by_the_decoder(built("--num_prefix_tokens", str(number)))
    assert torch.equal(ids, same)
    for row in range(len(ROWS)):
        length = int(patients().lengths[ROWS[row]])
        dropped = min(8, length) - min(number, length)
        whole, part = eight[row, mask[row].bool()], few[row, few_mask[row].bool()]
        torch.testing.assert_close(torch.cat([whole[:1], whole[1 + dropped :]]), part)


@pytest.mark.parametrize("choice", SERIES_TEXT)
@pytest.mark.parametrize("context", ["full", "none"])
def test_what_the_text_tells_changes_the_text_alone(choice: str, context: str) -> None:
    stage = built("--series_text", choice, "--text_context", context)
    _, soft, _ = seen_by_the_decoder(built())
    ids, embeddings, _ = seen_by_the_decoder(stage)
    text = trainer.tiny_language_model()[1].decode(ids[0])
    assert ("known diabetes" in text) == (context == "full" and ROWS[0] % 3 > 0)
    assert ("->" in text) == (choice in ("all", "main"))
    assert ("Last values" in text) == (choice == "last")
    tokens = min(8, int(patients().lengths[ROWS[0]]))
    assert torch.equal(soft[0, : 1 + tokens], embeddings[0, : 1 + tokens])


def test_only_a_writer_is_told_what_it_would_have_to_compute() -> None:
    told = {}
    for mode in ("classification", "generative"):
        dataset = trainer.load_data(arguments("--data_path", str(SAMPLE), "--mode", mode)).dataset
        told[mode] = "Net change" in dataset.prompt(0)
    assert told == {"classification": False, "generative": True}


def test_a_context_is_never_told_where_it_is_switched_off() -> None:
    dataset = patients()
    dataset.text_context = False
    assert not any("diabetes" in dataset.prompt(i) for i in range(len(dataset)))


# --------------------------------------------------------------------------- paired differences


def two_models(
    rng: np.random.Generator, rows: int, gain: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw labels and two risks that share noise; the first sees ``gain`` more of the label."""
    labels = (rng.random(rows) < 0.3).astype(float)
    shared = rng.normal(size=rows)
    risks = [
        1 / (1 + np.exp(-(labels * signal + shared + 0.5 * rng.normal(size=rows))))
        for signal in (1.0 + gain, 1.0)
    ]
    return labels, risks[0], risks[1]


def test_a_model_differs_from_itself_by_nothing_and_signs_turn_with_the_order() -> None:
    labels, better, worse = two_models(np.random.default_rng(0), 400, gain=0.7)
    groups = np.arange(400).astype(str)
    none = trainer.paired_differences(labels, better, better, groups, seed=0)
    assert all(score == {"value": 0, "low": 0, "high": 0} for score in none.values())
    gain = trainer.paired_differences(labels, better, worse, groups, seed=0)["auroc"]
    loss = trainer.paired_differences(labels, worse, better, groups, seed=0)["auroc"]
    assert gain["value"] == roc_auc_score(labels, better) - roc_auc_score(labels, worse)
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    turned = {"value": -gain["value"], "low": -gain["high"], "high": -gain["low"]}
    assert loss == pytest.approx(turned)


def test_pairing_makes_the_interval_narrower_than_two_separate_ones() -> None:
    labels, better, worse = two_models(np.random.default_rng(1), 400, gain=0.3)
    groups = np.arange(400).astype(str)
    paired = trainer.paired_differences(labels, better, worse, groups, seed=0)["auroc"]
    alone = trainer.metrics_with_intervals(labels, better, groups, seed=0)["auroc"]
    assert paired["high"] - paired["low"] < 0.8 * (alone["high"] - alone["low"])


def test_paired_intervals_cover_the_true_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "BOOTSTRAP_REPLICATES", 400)
    rng = np.random.default_rng(2)
    labels, better, worse = two_models(rng, 400_000, gain=0.4)
    truth = roc_auc_score(labels, better) - roc_auc_score(labels, worse)
    groups, covered = np.arange(300).astype(str), 0
    for _ in range(500):
        labels, better, worse = two_models(rng, 300, gain=0.4)
        score = trainer.paired_differences(labels, better, worse, groups, seed=0)["auroc"]
        covered += score["low"] <= truth <= score["high"]
    assert 0.93 <= covered / 500 <= 0.97


# --------------------------------------------------------------------------- context facts


def test_context_facts_are_numbers_by_their_word_and_the_other_words() -> None:
    contexts = ["54-year-old woman, 76 kg, BMI 27.5", "61-year-old man, 80 kg", "man", ""] * 30
    table = pd.DataFrame(
        {
            "clinical_trajectory": ["1 (0h)"] * 120,
            "label_escalation": [0, 1] * 60,
            "clinical_context": [*contexts[:-1], "rare"],
        }
    )
    dataset = MIMICtrajectoryDataset(table)
    facts = dataset.context_facts(np.arange(120))
    numbers = ["year (number)", "kg (number)", "bmi (number)"]
    assert set(facts.columns) == {*numbers, "old", "woman", "man"}
    assert facts[numbers].to_numpy()[0].tolist() == [54, 76, 27.5]
    assert facts.loc[:3, "woman"].tolist() == [1, 0, 0, 0]
    assert facts.loc[2:3, "year (number)"].isna().all()
    # What counts as rare is decided by the training part alone.
    assert "rare" in dataset.context_facts(np.arange(100, 120))
    assert "rare" not in dataset.context_facts(np.arange(100))


def test_the_baseline_with_context_needs_contexts() -> None:
    data = data_of(patients())
    assert "logistic regression with context" in trainer.baselines(data)
    data.dataset.contexts = np.array([""] * len(data.dataset), dtype=object)
    assert "logistic regression with context" not in trainer.baselines(data)


# --------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Run the ablation once on the first sample stays."""
    folder = tmp_path_factory.mktemp("ablation")
    sample = Path(__file__).parent / "data" / "physionet2012_bicarbonate.csv"
    data = folder / "data.csv"
    pd.read_csv(sample, nrows=160).to_csv(data, index=False)
    words = ["--ablation", "--data_path", str(data), "--model_name", "tiny", "--epochs", "1"]
    words += ["--trajectory_epochs", "2", "--output_dir", str(folder / "run"), "--log_file", "none"]
    # Flags of stages 2 and 3 alone do not stop the variant of stage 1.
    words += ["--gradient_accumulation", "2", "--max_text_tokens", "400"]
    assert trainer.main(words) == 0
    return words, folder / "run"


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "ablation" / "ablation.json").read_text())
    return found


def test_the_ablation_sets_every_variant_beside_stage_1_and_the_baselines(
    ablation: tuple[list[str], Path],
) -> None:
    _, folder = ablation
    results = results_of(folder)
    assert list(results)[:4] == list(trainer.VARIANTS)
    assert {"logistic regression", "logistic regression with context"} < set(results)
    variants = {
        "stage 1 alone": folder / "trajectory",
        **{name: trainer.variant(name, [], folder)[0] for name in list(trainer.VARIANTS)[1:]},
    }
    tables = {n: pd.read_csv(f / "predictions_test.csv") for n, f in variants.items()}
    reference = tables["stage 1 alone"]
    for name, table in tables.items():
        assert table["id"].equals(reference["id"])
        own = roc_auc_score(table["label"], table["probability"])
        other = roc_auc_score(reference["label"], reference["probability"])
        assert results[name]["auroc"]["value"] == pytest.approx(own)
        difference = results[name]["minus_reference"]["auroc"]
        assert difference["value"] == pytest.approx(own - other)
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert results[name]["seconds_an_epoch"] > 0
    assert (folder / "ablation" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_each_variant_was_made_by_its_own_switches(ablation: tuple[list[str], Path]) -> None:
    _, folder = ablation
    flags = {}
    for name in list(trainer.VARIANTS)[1:]:
        place = trainer.variant(name, [], folder)[0] / "run.json"
        chosen = json.loads(place.read_text())["arguments"]
        flags[name] = (chosen["soft_prompt"], chosen["series_text"], bool(chosen["ode_checkpoint"]))
    assert flags == {
        "text alone": ("off", "all", False),
        "soft prompt alone": ("on", "none", True),
        "text + soft prompt": ("on", "all", True),
    }


def test_the_ablation_goes_on_where_it_was_stopped(
    ablation: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, folder = ablation
    before = results_of(folder)
    made: list[str] = []
    run_stage = trainer.run_stage

    def counted(stage: Stage, *rest: Any, **further: Any) -> Any:
        made.append(stage.name)
        return run_stage(stage, *rest, **further)

    monkeypatch.setattr(trainer, "run_stage", counted)
    assert trainer.main(words) == 0
    assert made == []
    assert results_of(folder) == before
    (folder / "ablation" / "soft_prompt_alone" / "classification" / "metrics.json").unlink()
    assert trainer.main(words) == 0
    assert made == ["classification"]
    after = results_of(folder)
    for result in (before, after):
        result["soft prompt alone"].pop("seconds_an_epoch")
    assert after == before
    assert trainer.main([*words, "--head_lr", "1e-2"]) == 0  # stage 1 too was made without it
    assert made == ["classification", "trajectory", *["classification"] * 3]


def test_other_data_or_another_stage_1_make_the_variants_anew(
    ablation: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, folder = ablation
    args = arguments(*words[1:], "--mode", "classification", "--series_text", "none")
    args.output_dir = folder / "ablation" / "soft_prompt_alone"
    args.ode_checkpoint = folder / trainer.TRAJECTORY_FILE
    place = args.output_dir / "classification"
    made = json.loads((place / "run.json").read_text())["arguments"]
    for name, value in made.items():  # the fixture's own flags, whatever ran since
        setattr(args, name, Path(value) if isinstance(getattr(args, name), Path) else value)
    data = trainer.load_data(args)
    assert trainer.reached(place, args, data) == "all"
    assert trainer.reached(place, args, data._replace(fingerprint="other")) == "none"
    content = args.ode_checkpoint.read_bytes()
    try:
        args.ode_checkpoint.write_bytes(content + b" ")
        assert trainer.reached(place, args, data) == "none"
        args.ode_checkpoint.unlink()
    finally:
        args.ode_checkpoint.write_bytes(content)
    assert trainer.reached(place, args, data) == "all"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--trajectory_only", "--soft_prompt", "off"], "--trajectory_only has no use for"),
        (["--trajectory_only", "--ode_checkpoint", "x.pt"], "no use for --ode_checkpoint"),
        (["--soft_prompt", "off", "--ode_checkpoint", "x.pt"], "no use for --ode_checkpoint"),
        (["--soft_prompt", "off", "--freeze_ode"], "no use for --freeze_ode"),
    ],
)
def test_flags_that_contradict_a_stage_are_refused(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main(flags) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--mode", "generative"], "--ablation and --mode do not go together"),
        (["--soft_prompt=off"], "--ablation and --soft_prompt do not go together"),
        (["--freeze_ode"], "--ablation and --freeze_ode do not go together"),
        (["--demo"], "--demo and --ablation do not go together"),
        (["--series_text", "none"], "leaves no text"),
    ],
)
def test_flags_that_the_ablation_sets_are_refused(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main(["--ablation", *flags]) == 2
    assert problem in capsys.readouterr().err
