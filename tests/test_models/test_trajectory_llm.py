"""Soft prompt, layout, readouts and losses of stages 2 and 3: on the tiny model, float32."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Gemma3ForCausalLM

from language_models import (
    PREFIX,
    Parts,
    body_inputs,
    classifier_and_writer,
    plain_sequence,
    text_config,
)
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.models import trajectory_llm
from medgemma_clinical.models.encoder import encode
from medgemma_clinical.models.language_model import tiny_language_model
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import (
    IGNORED,
    VERDICT_WEIGHT,
    LLMClassifier,
    LLMWriter,
    SoftPrompt,
    TextBatch,
    TrajectoryLLM,
    answer_loss,
    latest_states,
)

ROWS = [0, 3, 1, 2, 5]
"""Patients with 1, 9, 6, 2 and 5 observations; 4 soft tokens."""

KINDS = ("classifier", "writer")


@pytest.fixture(scope="module")
def parts() -> Parts:
    return classifier_and_writer()


@pytest.fixture(scope="module")
def batch(parts: Parts) -> TextBatch:
    return parts.collate(ROWS)


@pytest.fixture(scope="module")
def questions(parts: Parts) -> TextCollator:
    """Batches of stage 2: prompt and the words before the verdict, no answer."""
    tokenizer = tiny_language_model()[1]
    return TextCollator(parts.collate.dataset, tokenizer, PromptOptions(), answers=False)


def stage1_of(model: TrajectoryLLM) -> TrajectoryClassifier:
    assert isinstance(model.stage1, TrajectoryClassifier)
    return model.stage1


def changed(batch: TextBatch, key: str, value: Tensor) -> TextBatch:
    copy = dict(batch)
    copy[key] = value
    return copy  # type: ignore[return-value]


# ------------------------------------------------------------------------------- soft prompt


def test_soft_tokens_are_as_large_as_the_scaled_embeddings_of_real_prompts(
    parts: Parts, batch: TextBatch
) -> None:
    model, _, collate = parts
    width = model.llm.config.hidden_size
    table = model.llm.get_input_embeddings().weight * width**0.5  # Gemma's own scaling
    real = table[torch.tensor(list(itertools.chain(*collate.prompt_ids)))].square().mean().sqrt()
    trajectory = model.trajectory(batch)
    assert trajectory is not None
    assert model.projection is not None
    rms = model.projection(trajectory.states)[trajectory.mask].square().mean(1).sqrt()
    assert len(rms) == 1 + 4 + 4 + 2 + 4
    torch.testing.assert_close(rms, real.expand_as(rms), rtol=0.1, atol=0)


def test_soft_tokens_are_the_normalised_projections_of_states() -> None:
    soft = SoftPrompt(hidden_dim=3, width=5, scale=1.5)
    states = torch.randn(2, 4, 3)
    projected = soft.linear(states)
    expected = 1.5 * projected / projected.square().mean(2, keepdim=True).sqrt()
    torch.testing.assert_close(soft(states), expected)


def test_the_latest_states_are_kept_in_their_order_and_fewer_where_there_are_fewer(
    parts: Parts, batch: TextBatch
) -> None:
    stage1 = stage1_of(parts.classifier)
    encoder = stage1.encoder
    states, mask, logit = latest_states(stage1, batch, PREFIX)
    assert states.shape == (len(ROWS), PREFIX, encoder.hidden_dim)
    for row, patient in enumerate(ROWS):
        length = int(batch["observed"][row].any(1).sum())
        alone = parts.collate.dataset.collate([patient])
        own = encode(encoder, alone)[0, :-1]  # the last is the state at the prediction time
        assert mask[row].tolist() == [k >= PREFIX - length for k in range(PREFIX)]
        torch.testing.assert_close(states[row, mask[row]], own[-PREFIX:])
        torch.testing.assert_close(logit[row : row + 1], stage1(alone).logit)


def test_the_projection_is_as_wide_as_the_language_model() -> None:
    width = 96
    base = Gemma3ForCausalLM(text_config(width)).requires_grad_(False)
    classifier, writer, collate = classifier_and_writer(base=base)
    assert classifier.projection is not None
    assert classifier.projection.linear.out_features == width
    assert classifier.head.in_features == width
    assert classifier(collate(ROWS)).logit.shape == writer(collate(ROWS)).logit.shape == (5,)


# ------------------------------------------------------------------------------- layout


def assert_layout(model: TrajectoryLLM, batch: TextBatch, left: bool) -> None:
    """Hold what reached the decoder body against each row laid out by hand."""
    with body_inputs(model) as seen:
        if left:
            assert isinstance(model, LLMWriter)
            model.write(batch, 1, eos=[1], pad=0)
        else:
            model(batch)
    embeddings, mask = seen[0]["inputs_embeds"], seen[0]["attention_mask"]
    lengths = []
    for row in range(len(ROWS)):
        expected = plain_sequence(model, batch, row)[0]
        places = mask[row].nonzero().flatten()
        lengths.append(len(places))
        assert len(places) == int(places[-1] - places[0]) + 1, "a hole"
        assert int(places[-1]) == mask.shape[1] - 1 if left else int(places[0]) == 0
        torch.testing.assert_close(embeddings[row, places], expected, rtol=0, atol=1e-5)
        bos = model.llm.get_input_embeddings()(torch.tensor(model.bos))
        same = (embeddings[row, places] == bos).all(1).nonzero().flatten()
        assert same.tolist() == [0], "exactly one <bos>, first"
    assert len(set(lengths)) > 1
    assert max(lengths) == mask.shape[1], "no column of padding only"


def test_stage_2_and_3_lay_out_bos_soft_tokens_text(parts: Parts, batch: TextBatch) -> None:
    assert_layout(parts.classifier, batch, left=False)
    assert_layout(parts.writer, batch, left=False)


def test_generation_lays_out_the_same_behind_its_padding(parts: Parts) -> None:
    verdicts = np.array([True, False, True, True, False])
    assert_layout(parts.writer, parts.collate.with_verdicts(ROWS, verdicts), left=True)


def test_padding_side_changes_no_last_state(parts: Parts, batch: TextBatch) -> None:
    model, last = parts.writer, []
    for left in (False, True):
        embeddings, mask, text_start = model.embed(batch, model.trajectory(batch), left=left)
        hidden = model.body(inputs_embeds=embeddings, attention_mask=mask.long()).last_hidden_state
        final = text_start + batch["text_mask"].sum(1) - 1
        assert torch.equal(
            final, torch.full_like(final, mask.shape[1] - 1) if left else mask.sum(1) - 1
        )
        last.append(hidden[torch.arange(len(mask)), final])
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_company_order_and_batch_size_change_no_logit(parts: Parts, kind: str) -> None:
    model, collate = getattr(parts, kind), parts.collate
    together = model(collate(ROWS)).logit
    alone = torch.cat([model(collate([i])).logit for i in ROWS])
    reversed_order = model(collate(ROWS[::-1])).logit.flip(0)
    crowd = model(collate([*ROWS, 7, 13, 9])).logit[: len(ROWS)]
    assert float(together.detach().std()) > 0.01
    for other in (alone, reversed_order, crowd):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["input_ids", "values", "times"])
def test_prompt_and_trajectory_each_change_the_logit(
    parts: Parts, batch: TextBatch, kind: str, key: str
) -> None:
    model = getattr(parts, kind)
    before = model(batch).logit
    moved = batch[key].clone()  # type: ignore[literal-required]
    if key == "input_ids":
        moved[:, 0] += 1  # the first letter of the prompt, far from the readout
    else:
        moved[:, 1:] *= 3
        if key == "values":
            moved[:, 0] += 5
        else:  # the wait behind the last observation stays
            later = (moved - batch["times"]).max(dim=1).values
            batch = changed(batch, "prediction_hours", batch["prediction_hours"] + later)
    after = model(changed(batch, key, moved)).logit
    rows = [k for k, i in enumerate(ROWS) if key != "times" or i != 0]  # patient 0 has one time
    assert bool(((after - before).abs()[rows] > 1e-4).all())


def test_the_classifier_reads_the_last_position(parts: Parts, questions: TextCollator) -> None:
    model, batch = parts.classifier, questions(ROWS)
    logits = model(batch).logit
    for row in range(len(ROWS)):
        hidden = model.body(inputs_embeds=plain_sequence(model, batch, row)).last_hidden_state
        expected = model.head(hidden[0, -1]) + stage1_of(model)(batch).logit[row]
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=1e-5)


def test_a_new_classifier_of_text_alone_says_everyones_risk(parts: Parts, batch: TextBatch) -> None:
    llm = parts.classifier.llm
    fresh = LLMClassifier(
        None, llm, prevalence=0.2, tokens=PREFIX, scale=1.0, bos=2, verdict=(5, 6)
    ).eval()
    torch.testing.assert_close(fresh(batch).logit.sigmoid(), torch.full((len(ROWS),), 0.2))


def test_stage_2_never_calls_lm_head(questions: TextCollator) -> None:
    model, _, _ = classifier_and_writer()
    calls: list[int] = []
    model.llm.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    output = model(questions(ROWS))
    output.loss.backward()
    assert calls == []
    assert model.projection is not None
    assert model.projection.linear.weight.grad is not None


def test_stage_3_asks_for_words_at_the_answers_only_and_a_chunk_at_a_time(
    batch: TextBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, _ = classifier_and_writer()
    words = model.llm.get_output_embeddings().weight
    shapes: list[int] = []
    real = functional.linear

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is words:
            shapes.append(len(inputs))
        return real(inputs, weight, bias)

    monkeypatch.setattr(functional, "linear", linear)
    monkeypatch.setattr(trajectory_llm, "LOSS_ROWS", 20)
    loss = model(batch).loss
    answer_tokens = int((batch["targets"] != IGNORED).sum())
    expected = [20] * (answer_tokens // 20) + [answer_tokens % 20] * (answer_tokens % 20 > 0)
    assert shapes == expected
    loss.backward()
    assert sorted(shapes) == sorted(2 * expected), "once more in the backward pass"
    assert len(expected) > 2
    assert answer_tokens < batch["text_mask"].sum()


@pytest.mark.parametrize("rows", [7, 1000])
def test_the_loss_over_the_vocabulary_equals_the_plain_one_however_it_is_cut(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_llm, "LOSS_ROWS", rows)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=rng, requires_grad=True)
    boost = torch.randn(50, generator=rng, requires_grad=True)
    weight, targets = torch.randn(40, 16, generator=rng), torch.arange(50) % 40
    importance = torch.rand(50, generator=rng)
    own = answer_loss(hidden, weight, targets, boost, importance, 3)
    raised = hidden @ weight.T + functional.one_hot(torch.tensor(3), 40) * boost[:, None]
    plain = (functional.cross_entropy(raised, targets, reduction="none") * importance).sum()
    torch.testing.assert_close(own, plain)
    gradients = torch.autograd.grad(2 * own, (hidden, boost))
    torch.testing.assert_close(gradients, torch.autograd.grad(2 * plain, (hidden, boost)))
    with torch.no_grad():
        same = answer_loss(hidden, weight, targets, boost, importance, 3)
    assert torch.equal(same, own)


def test_stage_2_loss_is_the_summed_cross_entropy(parts: Parts, batch: TextBatch) -> None:
    output = parts.classifier(batch)
    p = output.logit.double().sigmoid()
    likelihood = torch.where(batch["labels"] == 1, p, 1 - p)
    assert output.loss.item() == pytest.approx((-likelihood.log().sum()).item(), rel=1e-5)
    assert output.terms == len(ROWS)


def plain_loss(parts: Parts, batch: TextBatch) -> tuple[Tensor, int]:
    """Stage 3's loss from full logits, row by row; and its terms."""
    model, collate = parts.writer, parts.collate
    trajectory = model.trajectory(batch)
    assert trajectory is not None
    total, count = torch.zeros(()), 0
    for row, i in enumerate(ROWS):
        logits = model.llm(inputs_embeds=plain_sequence(model, batch, row)).logits[0]
        answer = torch.tensor(collate.answer_ids[i])
        predicting = logits[-len(answer) - 1 : -1].clone()
        predicting[0, collate.verdict[0]] += trajectory.logit[row]
        losses = functional.cross_entropy(predicting, answer, reduction="none")
        total = total + VERDICT_WEIGHT * losses[0] + losses[1:].sum()
        count += len(answer) + VERDICT_WEIGHT - 1
    return total, count


def test_stage_3_loss_and_gradients_equal_those_of_full_logits() -> None:
    parts = classifier_and_writer()
    batch, projection = parts.collate(ROWS), parts.writer.projection
    assert projection is not None
    output = parts.writer(batch)
    plain, count = plain_loss(parts, batch)
    assert output.terms == count
    assert output.loss.item() / count == pytest.approx(plain.item() / count, abs=1e-5)
    (own,) = torch.autograd.grad(output.loss, projection.linear.weight)
    (expected,) = torch.autograd.grad(plain, projection.linear.weight)
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3 * float(own.abs().max()))


def test_stage_1_s_logit_is_added_to_both_verdicts() -> None:
    classifier, writer, collate = classifier_and_writer(new=True, members=2)
    batch = collate(ROWS)
    added = writer.trajectory(batch)
    assert added is not None
    assert float(added.logit.detach().abs().min()) > 0.01
    assert torch.equal(added.logit, stage1_of(writer)(batch).logit)
    known = {"states": added.states, "states_mask": added.mask}
    silent: TextBatch = {**batch, **known, "trajectory_logit": torch.zeros(len(ROWS))}  # type: ignore[typeddict-item]
    said = writer(batch).logit - writer(silent).logit
    torch.testing.assert_close(said, added.logit, rtol=1e-4, atol=1e-5)
    # Stage 2 starts there exactly.
    assert torch.equal(classifier(batch).logit, added.logit)


def test_the_verdict_is_read_before_the_report(
    parts: Parts, batch: TextBatch, questions: TextCollator
) -> None:
    _, model, collate = parts
    output = model(batch)
    asked = questions(ROWS)  # no answer in sight
    for row in range(len(ROWS)):
        logits = model.llm(inputs_embeds=plain_sequence(model, asked, row)).logits[0, -1]
        odds = logits[collate.verdict[0]] - logits[collate.verdict[1]]
        odds = odds + stage1_of(model)(asked).logit[row]
        assert output.logit[row].item() == pytest.approx(odds.item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gives_finite_loss_and_float32_adapter_and_head(
    parts: Parts, batch: TextBatch, kind: str
) -> None:
    rough = classifier_and_writer(torch.bfloat16)
    model, reference = getattr(rough, kind), getattr(parts, kind)
    assert model.llm.get_input_embeddings().weight.dtype == torch.bfloat16
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    output = model(rough.collate(ROWS))
    output.loss.backward()
    assert output.logit.dtype == output.loss.dtype == torch.float32
    assert bool(torch.isfinite(output.loss))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learning)
    expected = reference(batch).logit
    torch.testing.assert_close(output.logit, expected, rtol=0.05, atol=0.1)


def test_a_batch_without_answers_gives_the_verdict_and_no_loss(
    parts: Parts, batch: TextBatch, questions: TextCollator
) -> None:
    output = parts.writer(questions(ROWS))
    assert (output.loss.item(), output.terms) == (0.0, 0)
    torch.testing.assert_close(output.logit, parts.writer(batch).logit, rtol=0, atol=1e-5)


# ------------------------------------------------------------------- stage 1's logit, controls


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_counts_for_the_language_models_share_alone(
    kind: str, batch: TextBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = getattr(classifier_and_writer(), kind)
    whole = model(batch)
    assert whole.offset is not None
    torch.testing.assert_close(whole.offset, stage1_of(model)(batch).logit)
    for weight in (0.0, 0.3):
        monkeypatch.setattr(model, "residual_weight", weight)
        expected = whole.offset + weight * (whole.logit - whole.offset)
        torch.testing.assert_close(model(batch).logit, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_stage_1s_logit_the_answer_is_the_language_models(
    kind: str, batch: TextBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = getattr(classifier_and_writer(), kind)
    whole = model(batch)
    monkeypatch.setattr(model, "adds_stage1", False)
    alone = model(batch)
    assert not alone.offset.any()
    torch.testing.assert_close(alone.logit, whole.logit - whole.offset)
    assert not torch.equal(alone.loss, whole.loss)


def test_without_stage_1s_logit_the_head_starts_at_the_prevalence(
    parts: Parts, batch: TextBatch
) -> None:
    model = parts.classifier
    words: dict[str, Any] = {
        "tokens": PREFIX,
        "scale": 1.0,
        "bos": model.bos,
        "verdict": model.verdict,
    }
    new = LLMClassifier(model.stage1, model.llm, prevalence=0.3, stage1_logit=False, **words)
    torch.testing.assert_close(new(batch).logit.sigmoid(), torch.full((len(ROWS),), 0.3))


def test_a_shuffled_row_reads_the_soft_tokens_of_the_row_before_and_all_else_of_its_own(
    batch: TextBatch,
) -> None:
    model = classifier_and_writer().classifier
    own = model.trajectory(batch)
    model.shuffled = True
    other = model.trajectory(batch)
    assert own is not None
    assert other is not None
    for row in range(len(ROWS)):
        assert torch.equal(other.states[row], own.states[row - 1])
        assert torch.equal(other.mask[row], own.mask[row - 1])
    assert torch.equal(other.logit, own.logit)


def test_a_shuffled_row_that_is_alone_reads_no_soft_token(parts: Parts) -> None:
    model = classifier_and_writer().classifier
    model.shuffled = True
    alone = parts.collate([3])
    trajectory = model.trajectory(alone)
    assert model.embed(alone, trajectory).mask.sum() == 1 + alone["text_mask"].sum()


def test_a_stage_1_without_soft_tokens_gives_its_logit_alone(
    parts: Parts, batch: TextBatch
) -> None:
    model = parts.classifier
    words: dict[str, Any] = {"tokens": 0, "scale": 1.0, "bos": model.bos, "verdict": model.verdict}
    new = LLMClassifier(model.stage1, model.llm, prevalence=0.3, **words)
    assert new.projection is None
    trajectory = new.trajectory(batch)
    assert new.embed(batch, trajectory).mask.sum() == len(ROWS) + batch["text_mask"].sum()
    torch.testing.assert_close(new(batch).logit, stage1_of(new)(batch).logit)
