"""Flags that leave out a part of the input: each changes that part alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from language_models import body_inputs, patients
from medgemma_clinical.commands import stages as wiring
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.language_model import tiny_language_model
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from medgemma_clinical.training.stage import Stage
from stages import STAGE_1, arguments, stage_of_patients

ROWS = [3, 1, 9]


def decoder_inputs(stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Return text ids, embeddings and mask of some rows, as they reach the decoder."""
    batch = stage.loaders["train"].collate_fn(ROWS)
    model = stage.model.eval()
    assert isinstance(model, TrajectoryLLM)
    with body_inputs(model) as seen:
        model(batch)
    return batch["input_ids"], seen[0]["inputs_embeds"], seen[0]["attention_mask"]


def test_without_soft_prompt_the_decoder_reads_the_same_text_and_nothing_else() -> None:
    ids, both, mask = decoder_inputs(stage_of_patients())
    stage = stage_of_patients("--soft_prompt", "off")
    same, alone, text_mask = decoder_inputs(stage)
    assert torch.equal(ids, same)
    for row in range(len(ROWS)):
        soft = int(mask[row].sum() - text_mask[row].sum())
        assert soft == min(8, int(patients().lengths[ROWS[row]]))
        kept = both[row, mask[row].bool()]
        text = alone[row, text_mask[row].bool()]
        assert torch.equal(torch.cat([kept[:1], kept[1 + soft :]]), text)
    assert {name for name, _ in stage.model.named_children()} == {"llm", "head"}
    assert set(stage.learning_rates) == {"llm", "head"}, "no encoder to train"
    assert stage.config["encoder"] is None


def test_text_and_stage_1s_logit_go_without_soft_tokens(tmp_path: Path) -> None:
    first = stage_of_patients(STAGE_1)
    first.save(tmp_path / "trajectory", first.config)
    file = str(tmp_path / TRAJECTORY_FILE)
    stage = stage_of_patients("--soft_prompt", "off", "--ode_checkpoint", file)
    text = decoder_inputs(stage_of_patients("--soft_prompt", "off"))
    assert all(map(torch.equal, text, decoder_inputs(stage)))
    batch = stage.loaders["train"].collate_fn(ROWS)
    torch.testing.assert_close(stage.model(batch).logit, first.model.eval()(batch).logit)
    assert {name for name, _ in stage.model.named_children()} == {"stage1", "llm", "head"}
    assert (stage.config["num_prefix_tokens"], stage.config["stage1_logit"]) == (0, True)
    assert stage.stage1 is not None
    whole = stage_of_patients("--stage1_logit", "off", "--ode_checkpoint", file)
    assert (whole.config["num_prefix_tokens"], whole.config["stage1_logit"]) == (8, False)
    output = whole.model(whole.loaders["train"].collate_fn(ROWS))
    torch.testing.assert_close(output.logit, output.logit[:1].expand(len(ROWS)))


def test_a_control_of_random_weights_asks_for_them_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    load: Any = wiring.load_language_model

    def counted(*args: Any, weights: str, **more: Any) -> Any:
        asked.append(weights)
        return load(*args, weights=weights, **more)

    monkeypatch.setattr(wiring, "load_language_model", counted)
    configs = [stage_of_patients(*flags).config for flags in ((), ("--base_weights", "random"))]
    assert asked == ["pretrained", "random"] == [config["base_weights"] for config in configs]


def test_a_control_reads_soft_tokens_of_another_row_and_says_so() -> None:
    stage = stage_of_patients("--soft_prompt", "shuffled")
    assert isinstance(stage.model, TrajectoryLLM)
    assert stage.model.shuffled
    assert stage.config["shuffled"] is True
    assert stage_of_patients().config["shuffled"] is False


def test_the_number_of_soft_tokens_changes_nothing_but_their_number() -> None:
    number = 3
    ids, eight, mask = decoder_inputs(stage_of_patients())
    same, few, few_mask = decoder_inputs(stage_of_patients("--num_prefix_tokens", str(number)))
    assert torch.equal(ids, same)
    for row in range(len(ROWS)):
        length = int(patients().lengths[ROWS[row]])
        dropped = min(8, length) - min(number, length)
        whole, part = eight[row, mask[row].bool()], few[row, few_mask[row].bool()]
        torch.testing.assert_close(torch.cat([whole[:1], whole[1 + dropped :]]), part)


@pytest.mark.parametrize(
    ("series", "context"),
    [("all", "none"), ("main", "full"), ("last", "full"), ("none", "none")],
)
def test_text_options_change_the_text_alone(series: str, context: str) -> None:
    _, soft, _ = decoder_inputs(stage_of_patients())
    ids, embeddings, _ = decoder_inputs(
        stage_of_patients("--series_text", series, "--text_context", context)
    )
    text = tiny_language_model()[1].decode(ids[1])
    assert ("known diabetes" in text) == (context == "full")
    assert ("->" in text) == (series in ("all", "main"))
    assert ("Last values" in text) == (series == "last")
    tokens = min(8, int(patients().lengths[ROWS[1]]))
    assert torch.equal(soft[1, : 1 + tokens], embeddings[1, : 1 + tokens])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--mode", "classification"], False),
        (["--mode", "generative"], True),
        (["--mode", "generative", "--trajectory_only"], False),
    ],
)
def test_only_a_model_that_writes_reads_what_it_would_have_to_compute(
    flags: list[str], expected: bool
) -> None:
    assert wiring.prompt_options(arguments(*flags)).computed == expected
