"""Soft prompt, layout, readouts and losses of stages 2 and 3 on a small model."""

import copy
from itertools import chain

import numpy as np
import pytest
import torch
from torch.nn import functional

from language_models import PREFIX, body_inputs, classifier_and_writer, plain_sequence, plain_states
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.models import trajectory_llm
from medgemma_clinical.models.language_model import compile_layers
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import IGNORED, VERDICT_WEIGHT, latest_states
from stages import TINY, arguments, data_for, make_stage

ROWS = [0, 3, 1, 2, 4, 5]
"""Patients with 1, 9, 6, 2, 3 and 5 observations; 4 soft tokens; the fifth has no later time."""

BOTH = pytest.mark.parametrize("kind", ["classifier", "writer"])


@pytest.fixture(scope="module")
def parts():
    return classifier_and_writer()


@pytest.fixture(scope="module")
def rough():
    return classifier_and_writer(precision="bf16")


@pytest.fixture(scope="module")
def batch(parts):
    return parts.collate(ROWS)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def gradients(model, loss):
    """The gradients of all that learns."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, [*learning.values()]), strict=True))


def test_soft_prompt__tokens_are_projections_as_large_as_scaled_embeddings(parts, batch):
    model, _, collate = parts
    table = model.llm.get_input_embeddings().weight * model.llm.config.hidden_size**0.5  # Gemma's

    def size(ids):
        return table[torch.tensor(ids)].square().mean().sqrt()

    words = f"{collate.dataset.question} 0123456789 -> (h) .,"
    assert_close(model.projection.scale, size(collate.tokenizer(words)["input_ids"]))
    states, mask, _ = model.trajectory(batch)
    soft, projected = model.projection(states), model.projection.linear(states)
    rms = projected.square().mean(2, keepdim=True).sqrt()
    assert_close(soft, model.projection.scale * projected / rms)
    found = soft[mask].square().mean().sqrt()
    torch.testing.assert_close(found, size([*chain(*collate.prompt_ids)]), rtol=0.1, atol=0)


def test_latest_states__end_at_the_prediction_time_where_it_is_later(parts, batch):
    stage1 = parts.classifier.stage1
    states, mask, outputs = latest_states(stage1, batch, PREFIX)
    assert states.shape == (len(ROWS), PREFIX, stage1.encoder.hidden_dim)
    for row, patient in enumerate(ROWS):
        expected = plain_states(stage1, batch, row)[-PREFIX:]
        assert mask[row].tolist() == [k >= PREFIX - len(expected) for k in range(PREFIX)]
        assert_close(states[row, mask[row]], expected)
        expected = stage1(parts.collate.dataset.collate([patient])).logit
        assert_close(outputs[row], expected)
    dataset = parts.collate.dataset.subset(np.array([1, 1, 1, 3]))  # twins, and a longer row
    end = dataset.times[dataset.offsets[1] - 1]
    dataset.prediction_hours = np.array([end + 7, end, np.nan, np.nan])
    later, at_the_end, unknown, _ = latest_states(stage1, dataset.collate(range(4)), PREFIX).states
    assert_close(unknown, at_the_end)
    assert_close(later[:-1], at_the_end[1:])  # P tokens in all
    assert (later[-1] - at_the_end[-1]).abs().max() > 0.01


@pytest.mark.parametrize("way", ["classifier", "writer", "generation"])
def test_layout__is_bos_soft_tokens_text_without_holes(parts, batch, way):
    left = way == "generation"
    model = parts.classifier if way == "classifier" else parts.writer
    with body_inputs(model) as seen:
        model.write(batch, 1, eos=[1], pad=0) if left else model(batch)
    embeddings, mask = seen[0]["inputs_embeds"], seen[0]["attention_mask"].bool()
    lengths = mask.sum(1, keepdim=True)
    steps = torch.arange(int(lengths.max()))  # no column of padding only
    assert torch.equal(mask, steps >= len(steps) - lengths if left else steps < lengths)
    for row in range(len(ROWS)):
        assert_close(embeddings[row, mask[row]], plain_sequence(model, batch, row)[0])
    assert len(lengths.unique()) > 1
    start = model.embed(batch, model.trajectory(batch), left=left).text_start
    assert torch.equal(start + batch["text_mask"].sum(1) - 1, (steps * mask).amax(dim=1))


def test_classifier__a_new_one_of_text_alone_says_the_prevalence(parts):
    args = arguments(*TINY, "--soft_prompt", "off")
    dataset = parts.collate.dataset.subset(np.arange(24))
    dataset.labels[1] = 0
    stage = make_stage(args, data_for(args, dataset))
    assert_close(stage.model(stage.collate(ROWS)).logit.sigmoid(), torch.full((len(ROWS),), 7 / 16))


@BOTH
def test_logits__are_read_at_the_last_position_before_the_report(parts, batch, kind):
    model, data = getattr(parts, kind), (parts.collate.dataset, parts.collate.tokenizer)
    asked = TextCollator(*data, PromptOptions(), answers=False)(ROWS)  # no answer in sight
    output, without = model(batch), model(asked)
    assert_close(without.logit, output.logit)
    assert_close(output.offset[:, 0], model.stage1(batch).logit)
    yes, no = model.verdict
    for row in range(len(ROWS)):
        sequence = plain_sequence(model, asked, row)
        if kind == "classifier":
            hidden = model.llm.get_decoder()(inputs_embeds=sequence).last_hidden_state[0, -1]
            own = model.head(hidden)[0]
        else:
            words = model.llm(inputs_embeds=sequence).logits[0, -1]
            own = words[yes] - words[no]
        assert_close(output.logit[row], own + output.offset[row, 0])
    if kind == "writer":
        assert (without.loss.item(), without.terms) == (0.0, 0)


@BOTH
def test_residual_weight__counts_for_the_language_models_share_alone(parts, batch, kind):
    model = copy.copy(getattr(parts, kind))
    whole, stage1 = model(batch), model.stage1(batch).logit
    for weight in (0.0, 0.3):
        model.residual_weight = weight
        assert_close(model(batch).logit, stage1 + weight * (whole.logit - stage1))
    model.residual_weight, model.adds_stage1 = 1.0, False
    alone = model(batch)
    assert not alone.offset.any()
    assert_close(alone.logit, whole.logit - stage1)
    assert not torch.equal(alone.loss, whole.loss)


def test_classifier__loss_is_the_summed_cross_entropy_and_lm_head_is_never_called(parts, batch):
    calls, model = [], parts.classifier
    hook = model.llm.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    output = model(batch)
    hook.remove()
    risk = output.logit.double().sigmoid()
    likelihood = torch.where(batch["labels"] == 1, risk, 1 - risk)
    assert output.loss.item() == pytest.approx(-likelihood.log().sum().item(), rel=1e-5)
    assert (output.terms, calls) == (len(ROWS), [])


@pytest.mark.parametrize("rows", [20, 10_000])
def test_writer__loss_and_gradients_equal_those_of_full_logits(parts, batch, rows, monkeypatch):
    monkeypatch.setattr(trajectory_llm, "LOSS_ROWS", rows)
    model, collate, sizes, real = parts.writer, parts.collate, [], functional.cross_entropy

    def counting(logits, *more, **words):
        sizes.append(len(logits))
        return real(logits, *more, **words)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "cross_entropy", counting)
        output = model(batch)
        own = gradients(model, output.loss)
    offset, plain, count = model.stage1(batch).logit, 0.0, 0
    for row, i in enumerate(ROWS):
        logits = model.llm(inputs_embeds=plain_sequence(model, batch, row)).logits[0]
        answer = torch.tensor(collate.answer_ids[i])
        predicting = logits[-len(answer) - 1 : -1].clone()
        predicting[0, model.verdict[0]] += offset[row]
        losses = functional.cross_entropy(predicting, answer, reduction="none")
        plain = plain + VERDICT_WEIGHT * losses[0] + losses[1:].sum()
        count += len(answer) + VERDICT_WEIGHT - 1
    assert output.terms == count
    assert output.loss.item() == pytest.approx(plain.item(), rel=1e-5)
    tokens = int((batch["targets"] != IGNORED).sum())
    assert (sum(sizes), max(sizes)) == (2 * tokens, min(rows, tokens))  # again in the backward pass
    expected = gradients(model, plain)
    for name, gradient in own.items():
        atol = 1e-3 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(expected[name], gradient, rtol=1e-3, atol=atol)


@BOTH
def test_bf16__adapters_stay_float32_with_products_in_bfloat16(rough, kind):
    model, dtypes = getattr(rough, kind), []
    hooks = [
        module.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
        for name, module in model.llm.named_modules()
        if name.endswith(("lora_A.default", "lora_B.default"))
    ]
    output, plain = model(rough.collate(ROWS)), copy.deepcopy(model).float()
    expected = plain(rough.collate(ROWS))  # float32 stays as it is
    for hook in hooks:
        hook.remove()
    assert dtypes == [torch.bfloat16] * 28 + [torch.float32] * 28
    own, exact = gradients(model, output.loss), gradients(plain, expected.loss)
    assert {g.dtype for g in own.values()} == {torch.float32} == {output.logit.dtype}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.llm.get_input_embeddings().weight.dtype == torch.bfloat16
    torch.testing.assert_close(output.logit, expected.logit, rtol=0.05, atol=0.1)
    for part in ("llm", "projection"):
        names = [name for name in own if name.startswith(part)]
        one, other = (torch.cat([g[name].flatten() for name in names]) for g in (own, exact))
        assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize(
    ("precision", "window", "masked"),
    [("bf16", 1024, False), ("bf16", 64, True), ("fp32", 1024, True)],
)
def test_bf16__takes_no_mask_within_the_window_and_padding_still_changes_nothing(
    parts, rough, precision, window, masked, monkeypatch
):
    model, _, collate = rough if precision == "bf16" else parts
    monkeypatch.setattr(model.llm.config, "sliding_window", window)
    with body_inputs(model) as seen:
        together = model(collate(ROWS)).logit
    assert (seen[0]["attention_mask"] is not None) == masked
    alone = torch.cat([model(collate([i])).logit for i in ROWS])
    torch.testing.assert_close(together, alone, rtol=0, atol=0.05 if precision == "bf16" else 1e-5)


@pytest.mark.slow
def test_compiled_layers_compute_the_same_and_are_compiled_once_for_all_lengths():
    graphs, model = [], (parts := classifier_and_writer()).classifier.train()

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def gradients(rows):
        model.zero_grad()
        model(parts.collate(rows)).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    batches = ROWS, ROWS[:3], ROWS[3:]
    plain = [gradients(rows) for rows in batches]
    compile_layers(model.llm, count)
    for rows, expected in zip(batches, plain, strict=True):
        for found, gradient in zip(gradients(rows), expected, strict=True):
            assert_close(found, gradient)
    assert 0 < len(graphs) <= 2 * model.llm.config.num_hidden_layers
    graphs.clear()
    prompts = parts.collate.with_verdicts(ROWS, [True for _ in ROWS])
    parts.writer.write(prompts, 3, eos=[-1], pad=0)
    assert not graphs, "a report's layers, each with its cache, would be compiled one by one"
    parts.classifier.eval()(parts.collate(ROWS))
    assert graphs, "other passes are compiled afterwards, too"
