"""Soft prompt, layout, stages 2 and 3, text batches, generation: on the tiny model, float32."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from language_models import (
    PREFIX,
    Parts,
    arguments,
    body_inputs,
    classifier_and_writer,
    data_of,
    disturb_adapter,
    patients,
    plain_sequence,
    text_config,
)
from medgemma_trainer import (
    IGNORED,
    LLMClassifier,
    LLMWriter,
    Scored,
    SoftPrompt,
    TextBatch,
    TextCollator,
)

ROWS = [0, 3, 1, 2, 5]
"""Patients with 1, 9, 6, 2 and 5 observations; 4 soft tokens."""

KINDS = ("classifier", "writer")
MODES = ("classification", "generative")


@pytest.fixture(scope="module")
def parts() -> Parts:
    return classifier_and_writer()


@pytest.fixture(scope="module")
def batch(parts: Parts) -> TextBatch:
    return parts.collate(ROWS)


@pytest.fixture(scope="module")
def questions(parts: Parts) -> TextCollator:
    """Batches of stage 2: prompt and the words before the verdict, no answer."""
    return TextCollator(parts.collate.dataset, trainer.tiny_language_model()[1], answers=False)


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
    real = table[torch.tensor(list(itertools.chain(*collate.prompts)))].square().mean().sqrt()
    trajectory = model.trajectory(batch)
    assert trajectory is not None
    assert model.projection is not None
    rms = model.projection(trajectory.states)[trajectory.mask].square().mean(1).sqrt()
    assert len(rms) == 1 + 4 + 4 + 2 + 4
    torch.testing.assert_close(rms, real.expand_as(rms), rtol=0.1, atol=0)


def test_embedding_rms_is_that_of_the_scaled_embeddings() -> None:
    model, _ = trainer.tiny_language_model()
    vectors = model.get_input_embeddings()(torch.tensor([5, 6, 7, 8]))
    expected = float(vectors.detach().square().mean().sqrt())
    assert trainer.embedding_rms(model, [5, 6, 7, 8]) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(64**0.5 * 0.125, rel=0.2)


def test_soft_tokens_are_the_normalised_projections_of_states() -> None:
    soft = SoftPrompt(hidden_dim=3, width=5, scale=1.5)
    states = torch.randn(2, 4, 3)
    projected = soft.linear(states)
    expected = 1.5 * projected / projected.square().mean(2, keepdim=True).sqrt()
    torch.testing.assert_close(soft(states), expected)


def test_the_latest_states_are_kept_in_their_order_and_fewer_where_there_are_fewer(
    parts: Parts, batch: TextBatch
) -> None:
    encoder = parts.classifier.encoder
    assert encoder is not None
    head = trainer.PooledHead(encoder.hidden_dim, 0.3)
    states, mask, logit = trainer.encode(encoder, head, batch, PREFIX)
    assert states.shape == (len(ROWS), PREFIX, encoder.hidden_dim)
    for row in range(len(ROWS)):
        length = int(batch["observed"][row].any(1).sum())
        series = [batch[key][row : row + 1, :length] for key in ("times", "values", "observed")]
        alone = encoder(*series)
        assert mask[row].tolist() == [k >= PREFIX - length for k in range(PREFIX)]
        torch.testing.assert_close(states[row, mask[row]], alone[0, -PREFIX:])
        pooling = trainer.pooling_mask(series[2].any(dim=2))
        torch.testing.assert_close(logit[row : row + 1], head(alone, pooling))
    assert trainer.encode(encoder, None, batch, PREFIX).logit.tolist() == [0.0] * len(ROWS)


@pytest.mark.parametrize("width", [64, 96])
def test_the_projection_is_as_wide_as_the_language_model(width: int) -> None:
    base = Gemma3ForCausalLM(text_config(width)).requires_grad_(False)
    classifier, writer, collate = classifier_and_writer(base=base)
    assert classifier.projection is not None
    assert classifier.projection.linear.out_features == width
    assert classifier.head.in_features == width
    assert classifier(collate(ROWS)).logit.shape == writer(collate(ROWS)).logit.shape == (5,)


# ------------------------------------------------------------------------------- layout


def assert_layout(model: trainer.TrajectoryLLM, batch: TextBatch, left: bool) -> None:
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
    assert_layout(parts.writer, parts.collate.prompts_only(ROWS), left=True)


def test_special_tokens_written_in_a_context_stay_text() -> None:
    dataset = patients()
    dataset.contexts = np.array(["note <bos> copied <eos> from <pad> a page"] * len(dataset))
    collate = TextCollator(dataset, trainer.tiny_language_model()[1], answers=True)
    for prompt, answer in zip(collate.prompts, collate.answers, strict=True):
        assert not {collate.bos, *collate.eos, collate.pad} & set(prompt)
        assert not {collate.bos, *collate.eos, collate.pad} & set(answer[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_side_changes_no_last_state(parts: Parts, batch: TextBatch, kind: str) -> None:
    model = getattr(parts, kind)
    last = []
    for left in (False, True):
        embeddings, mask, _ = model.embed(batch, model.trajectory(batch), left=left)
        hidden = model.body(inputs_embeds=embeddings, attention_mask=mask.long()).last_hidden_state
        final = torch.full((len(mask),), -1) if left else mask.sum(1) - 1
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
    moved = batch[key].clone()  # type: ignore[literal-required]
    if key == "input_ids":
        moved[:, 0] += 1  # the first letter of the prompt, far from the readout
    else:
        moved[:, 1:] *= 3
        if key == "values":
            moved[:, 0] += 5
    model = getattr(parts, kind)
    before = model(batch).logit
    after = model(changed(batch, key, moved)).logit
    rows = [k for k, i in enumerate(ROWS) if key != "times" or i != 0]  # patient 0 has one time
    assert bool(((after - before).abs()[rows] > 1e-4).all())


def test_the_classifier_reads_the_last_position(parts: Parts, questions: TextCollator) -> None:
    model, batch = parts.classifier, questions(ROWS)
    logits = model(batch).logit
    for row in range(len(ROWS)):
        hidden = model.body(inputs_embeds=plain_sequence(model, batch, row)).last_hidden_state
        expected = model.head(hidden[0, -1])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=1e-5)


def test_a_new_classifier_says_everyones_risk(parts: Parts, batch: TextBatch) -> None:
    model = parts.classifier
    fresh = LLMClassifier(
        model.encoder, model.llm, prevalence=0.2, tokens=PREFIX, scale=1.0, bos=2, verdict=(5, 6)
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


def test_stage_3_asks_for_words_at_the_answers_places_only_and_a_piece_at_a_time(
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
    monkeypatch.setattr(trainer, "LOSS_ROWS", 20)
    model(batch).loss.backward()
    answer_tokens = int((batch["targets"] != IGNORED).sum())
    assert shapes == [20] * (answer_tokens // 20) + [answer_tokens % 20] * (answer_tokens % 20 > 0)
    assert len(shapes) > 2
    assert answer_tokens < batch["text_mask"].sum()


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_the_loss_over_the_vocabulary_equals_the_plain_one_however_it_is_cut(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LOSS_ROWS", rows)
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=rng, requires_grad=True)
    boost = torch.randn(50, generator=rng, requires_grad=True)
    weight, targets = torch.randn(40, 16, generator=rng), torch.arange(50) % 40
    importance = torch.rand(50, generator=rng)
    own = trainer.AnswerLoss.apply(hidden, weight, targets, boost, importance, 3)
    raised = hidden @ weight.T + functional.one_hot(torch.tensor(3), 40) * boost[:, None]
    plain = (functional.cross_entropy(raised, targets, reduction="none") * importance).sum()
    torch.testing.assert_close(own, plain)
    gradients = torch.autograd.grad(2 * own, (hidden, boost))
    torch.testing.assert_close(gradients, torch.autograd.grad(2 * plain, (hidden, boost)))
    with torch.no_grad():
        same = trainer.AnswerLoss.apply(hidden, weight, targets, boost, importance, 3)
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
        answer = torch.tensor(collate.answers[i])
        predicting = logits[-len(answer) - 1 : -1].clone()
        predicting[0, collate.verdict[0]] += trajectory.logit[row]
        losses = functional.cross_entropy(predicting, answer, reduction="none")
        total = total + trainer.VERDICT_WEIGHT * losses[0] + losses[1:].sum()
        count += len(answer) + trainer.VERDICT_WEIGHT - 1
    return total, count


@pytest.mark.parametrize("residual", [False, True])
def test_stage_3_loss_and_gradients_equal_those_of_full_logits(residual: bool) -> None:
    parts = classifier_and_writer(residual=residual)
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
    classifier, writer, collate = classifier_and_writer(residual=True)
    batch = collate(ROWS)
    added = writer.trajectory(batch)
    assert added is not None
    assert float(added.logit.detach().abs().min()) > 0.01
    with_it = writer(batch).logit
    writer.trajectory_head = None
    torch.testing.assert_close(with_it - writer(batch).logit, added.logit, rtol=1e-4, atol=1e-5)
    # Stage 2 starts there exactly.
    own = classifier.trajectory(batch)
    assert own is not None
    assert torch.equal(classifier(batch).logit, own.logit)


def test_the_verdict_is_read_before_the_report(
    parts: Parts, batch: TextBatch, questions: TextCollator
) -> None:
    _, model, collate = parts
    output = model(batch)
    asked = questions(ROWS)  # no answer in sight
    for row in range(len(ROWS)):
        logits = model.llm(inputs_embeds=plain_sequence(model, asked, row)).logits[0, -1]
        odds = logits[collate.verdict[0]] - logits[collate.verdict[1]]
        assert output.logit[row].item() == pytest.approx(odds.item(), abs=1e-5)


def test_no_label_and_no_report_moves_the_verdict(parts: Parts, batch: TextBatch) -> None:
    model = parts.writer
    flipped = patients()
    flipped.labels = 1 - flipped.labels
    other = TextCollator(flipped, trainer.tiny_language_model()[1], answers=True)(ROWS)
    assert not torch.equal(other["targets"], batch["targets"])
    torch.testing.assert_close(model(other).logit, model(batch).logit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_gives_finite_loss_and_float32_adapter_and_head(kind: str) -> None:
    exact, rough = classifier_and_writer(), classifier_and_writer(torch.bfloat16)
    model, reference = getattr(rough, kind), getattr(exact, kind)
    assert model.llm.get_input_embeddings().weight.dtype == torch.bfloat16
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    output = model(rough.collate(ROWS))
    output.loss.backward()
    assert output.logit.dtype == output.loss.dtype == torch.float32
    assert bool(torch.isfinite(output.loss))
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learning)
    expected = reference(exact.collate(ROWS)).logit
    torch.testing.assert_close(output.logit, expected, rtol=0.05, atol=0.1)


# ------------------------------------------------------------------------------- text batches


def test_targets_are_the_report_from_its_verdict_to_its_end(parts: Parts, batch: TextBatch) -> None:
    collate = parts.collate
    _, tokenizer = trainer.tiny_language_model()
    for row, i in enumerate(ROWS):
        target = batch["targets"][row]
        answer = target != IGNORED
        stem = f"{collate.dataset.outcome}: "
        report = collate.dataset.report(i).removeprefix(stem)
        assert tokenizer.decode(target[answer]) == report + "<eos>"
        rest = batch["input_ids"][row, batch["text_mask"][row] & ~answer]
        assert tokenizer.decode(rest) == collate.dataset.prompt(i) + stem
        assert torch.equal(target[answer], batch["input_ids"][row, answer])
        assert not bool(answer[~batch["text_mask"][row]].any())


def test_the_verdict_stands_right_behind_its_place(parts: Parts, batch: TextBatch) -> None:
    collate = parts.collate
    for row, i in enumerate(ROWS):
        place = int(batch["verdict"][row])
        word = int(batch["input_ids"][row, place + 1])
        assert word == collate.verdict[0 if collate.dataset.labels[i] == 1 else 1]
    assert collate.verdict[0] != collate.verdict[1]


def test_stage_2_text_ends_where_the_verdict_would_follow(questions: TextCollator) -> None:
    _, tokenizer = trainer.tiny_language_model()
    batch = questions(ROWS)
    for row, i in enumerate(ROWS):
        text = tokenizer.decode(batch["input_ids"][row, batch["text_mask"][row]])
        assert text == questions.dataset.prompt(i) + f"{questions.dataset.outcome}: "
        assert int(batch["verdict"][row]) == int(batch["text_mask"][row].sum()) - 1


def test_prompts_only_ends_right_before_the_verdict(parts: Parts) -> None:
    _, tokenizer = trainer.tiny_language_model()
    batch = parts.collate.prompts_only(ROWS)
    for row, i in enumerate(ROWS):
        text = tokenizer.decode(batch["input_ids"][row, batch["text_mask"][row]])
        assert text == f"{parts.collate.dataset.prompt(i)}{parts.collate.dataset.outcome}: "
    assert bool((batch["targets"] == IGNORED).all())


def test_text_is_padded_on_the_right_by_the_pad_token(parts: Parts, batch: TextBatch) -> None:
    lengths = batch["text_mask"].sum(1)
    steps = torch.arange(batch["text_mask"].shape[1])
    assert torch.equal(batch["text_mask"], steps < lengths[:, None])
    assert int(lengths.max()) == len(steps)
    assert set(batch["input_ids"][~batch["text_mask"]].tolist()) == {parts.collate.pad}


# ------------------------------------------------------------------------------- generation


def greedy(model: LLMWriter, sequence: Tensor, most: int, eos: int) -> list[int]:
    """Continue one row by a full forward pass for each token."""
    embedding = model.llm.get_input_embeddings()
    written: list[int] = []
    while len(written) < most and eos not in written:
        token = int(model.llm(inputs_embeds=sequence).logits[0, -1].argmax())
        written.append(token)
        sequence = torch.cat([sequence, embedding(torch.tensor([[token]]))], dim=1)
    return written


def test_batched_generation_equals_greedy_row_by_row_and_stops_at_the_end_token() -> None:
    _, model, collate = classifier_and_writer()
    disturb_adapter(model.llm, size=0.5)
    for name, weight in model.llm.named_parameters():
        if re.search(r"post_\w+_layernorm", name):
            weight.data.fill_(6.0)  # or the tiny model only repeats its last token
    prompts, most, pad = collate.prompts_only(ROWS), 12, 0
    with torch.no_grad():
        sequences = [plain_sequence(model, prompts, row) for row in range(len(ROWS))]
        free = [greedy(model, sequence, most, eos=-1) for sequence in sequences]
        assert len({tuple(row) for row in free}) == len(ROWS), "rows must differ to prove anything"
        end = next(token for token in free[0] if token != free[0][0])
        expected = [greedy(model, sequence, most, end) for sequence in sequences]
    assert 1 < len(expected[0]) < most
    assert max(map(len, expected)) == most
    written = model.write(prompts, most, eos=[end], pad=pad).tolist()
    assert written == [row + [pad] * (most - len(row)) for row in expected]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_writing_multiplies_with_all_words_once_a_token_whatever_the_rows(rows: list[int]) -> None:
    _, model, collate = classifier_and_writer()
    words = len(model.llm.get_output_embeddings().weight)
    products: list[tuple[str, int]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name in {"mm", "addmm", "bmm", "baddbmm"} and result.shape[-1] == words:
                products.append((name, result.shape[:-1].numel()))
            return result

    with Products():
        model.write(collate.prompts_only(rows), 3, eos=[-1], pad=0)
    assert products == [("mm", len(rows))] * 3


def test_stage_1_s_logit_weighs_the_written_verdict_and_no_other_token() -> None:
    _, model, collate = classifier_and_writer(residual=True)
    head = model.trajectory_head
    assert head is not None
    yes, prompts = collate.verdict[0], collate.prompts_only(ROWS)
    free = []
    for bias in (1000.0, -1000.0):
        torch.nn.init.constant_(head.bias, bias)
        written = model.write(prompts, 4, eos=[-1], pad=0)
        assert bool((written[:, 0] == yes).all()) == (bias > 0)
        free.append(written)
    sequences = [plain_sequence(model, prompts, row) for row in range(len(ROWS))]
    for row, sequence in enumerate(sequences):  # after a yes the model goes on by itself
        token = model.llm.get_input_embeddings()(torch.tensor([[yes]]))
        with torch.no_grad():
            rest = greedy(model, torch.cat([sequence, token], dim=1), 3, eos=-1)
        assert free[0][row, 1:].tolist() == rest


def test_the_verdict_counts_fifty_times_and_the_terms_say_so(parts: Parts) -> None:
    output = parts.writer(parts.collate(ROWS))
    tokens = sum(len(parts.collate.answers[i]) for i in ROWS)
    assert output.terms == tokens + 49 * len(ROWS)


def test_reports_are_written_from_the_prompt_and_scored_against_the_patient(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, collate = parts
    _, tokenizer = trainer.tiny_language_model()
    dataset, rows = collate.dataset, np.arange(len(patients()))[::-1]
    shift = 0

    def write(batch: TextBatch, most: int, eos: list[int], pad: int) -> Tensor:
        indices = ((batch["index"] + shift) % len(dataset)).tolist()
        texts = [f"{dataset.prompt(int(i))}{dataset.outcome}: " for i in batch["index"]]
        given = [ids[m] for ids, m in zip(batch["input_ids"], batch["text_mask"], strict=True)]
        assert [tokenizer.decode(ids) for ids in given] == texts
        answers = [collate.answers[i] for i in indices]
        assert most >= max(map(len, answers))
        return torch.tensor([a + [pad] * (most - len(a)) for a in answers])

    monkeypatch.setattr(model, "write", write)
    logit = 4 * dataset.labels[rows] - 2 + 0.01 * rows
    scored = Scored(0.0, dataset.labels[rows], logit, rows)
    probability = scored.probability
    figures = trainer.write_reports(model, collate, tokenizer, scored, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "generations_test.jsonl").read_text().splitlines()]
    for line, i, p in zip(lines, rows, probability, strict=True):
        verdict = int(dataset.labels[i])
        expected = dataset.report(int(i))
        ids = {"id": f"patient {i}", "text": expected, "target": expected}
        assert line == {**ids, "verdict": verdict, "probability": p}
    assert figures["reports"] == len(rows)
    assert figures["parse_share"] == figures["true_number_share"] == figures["verdict_auroc"] == 1

    shift = 1  # each patient gets the report of another
    figures = trainer.write_reports(model, collate, tokenizer, scored, tmp_path)
    assert figures["true_number_share"] < 0.5
    assert 0.5 < figures["parse_share"] < 1  # a single observation has no rate, so another form


# ------------------------------------------------------------------------------- the stage


def stage_weights(seed: int, mode: str = "classification") -> dict[str, Tensor]:
    flags = ["--model_name", "tiny", "--mode", mode, "--seed", str(seed)]
    stage = trainer.llm_stage(arguments(*flags), data_of(patients()))
    return {k: v for k, v in stage.model.state_dict().items() if "base_layer" not in k}


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    first, again, other = stage_weights(0), stage_weights(0), stage_weights(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    for part in ("lora_A", "projection.linear", "encoder.field"):
        keys = [k for k in first if part in k and "weight" in k]
        assert keys
        assert not any(torch.equal(first[k], other[k]) for k in keys)


@pytest.mark.parametrize(
    ("mode", "learning"),
    [
        ("classification", {"projection", "llm", "head"}),
        ("generative", {"projection", "llm"}),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_stage_trains_its_own_parts(mode: str, learning: set[str], frozen: bool) -> None:
    flags = ["--model_name", "tiny", "--mode", mode] + ["--freeze_ode"] * frozen
    stage = trainer.llm_stage(arguments(*flags), data_of(patients()))
    expected = learning if frozen else learning | {"encoder", "trajectory_head"}
    assert {group["name"] for group in stage.parameter_groups()} == expected
    grouped = [id(p) for group in stage.parameter_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in stage.model.parameters() if p.requires_grad)


def test_stage_2_reads_no_answer_and_stage_3_monitors_its_loss() -> None:
    data = data_of(patients())
    args = {mode: arguments("--model_name", "tiny", "--mode", mode) for mode in MODES}
    classification = trainer.llm_stage(args["classification"], data)
    generative = trainer.llm_stage(args["generative"], data)
    assert (classification.monitor, classification.higher_is_better) == ("val_auroc", True)
    assert (generative.monitor, generative.higher_is_better) == ("val_loss", False)
    for stage, answered in ((classification, False), (generative, True)):
        batch = next(iter(stage.loaders["val"]))
        ends = batch["verdict"] + 1 == batch["text_mask"].sum(1)
        assert bool(ends.all()) != answered


def test_a_dataset_of_this_file_is_what_the_tests_say() -> None:
    dataset = patients()
    assert isinstance(dataset, MIMICtrajectoryDataset)
    assert [int(dataset.lengths[i]) for i in ROWS] == [1, 9, 6, 2, 5]
    assert min(dataset.lengths) < PREFIX < max(dataset.lengths)
