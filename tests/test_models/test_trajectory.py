"""The scales and the head of stage 1, its members, and the classifier without a language model."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dte_encoder import ClinicalODERNN
from language_models import data_of, patients, stage1_for
from medgemma_clinical.data.ragged import Batch
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.files import InputError
from medgemma_clinical.models.encoder import collate_with_plan, encode
from medgemma_clinical.models.trajectory import (
    MAX_Z_SCORE,
    MaskedScaler,
    TrajectoryClassifier,
    TrajectoryHead,
    TrajectoryMember,
    classification_output,
    fit_member,
)
from trajectories import dataset_of

LENGTHS = (5, 1, 3)
SUMMARIES, FACTS = 4, 3
ROWS = [3, 0, 7, 12]


def head_of(prevalence: float = 0.3, facts: int = FACTS) -> TrajectoryHead:
    torch.manual_seed(1)
    return TrajectoryHead(8, prevalence, summaries=SUMMARIES, facts=facts)


def padded(facts: int = FACTS) -> tuple[Tensor, Batch]:
    """States (3, 7, 8) of series of 5, 1 and 3 observations, with noise in the padding."""
    generator = torch.Generator().manual_seed(0)
    present = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    states = torch.randn(3, 7, 8, generator=generator)
    batch = {
        "observed": present.unsqueeze(2),
        "summaries": torch.randn(3, SUMMARIES, generator=generator),
        "facts": torch.randn(3, facts, generator=generator),
    }
    return states, batch  # type: ignore[return-value]


def replaced(batch: Batch, **columns: Tensor) -> Batch:
    return {**batch, **columns}  # type: ignore[typeddict-item]


# --------------------------------------------------------------------------- scales


def test_a_scale_is_that_of_what_is_known() -> None:
    scaler = MaskedScaler(2)
    scaler.fit(torch.tensor([[1.0, math.nan], [3.0, 10.0], [math.nan, 40.0], [8.0, 10.0]]))
    torch.testing.assert_close(scaler.mean, torch.tensor([4.0, 20.0]))
    torch.testing.assert_close(scaler.std, torch.tensor([26 / 3, 200.0]).sqrt())
    read = scaler(torch.tensor([[4.0 + math.sqrt(26 / 3), math.nan]]))
    torch.testing.assert_close(read, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


def test_a_constant_and_an_unknown_column_are_centred_and_not_magnified() -> None:
    """Rounding alone leaves a constant column a spread of 1e-16 of its mean."""
    scaler = MaskedScaler(3)
    row = torch.tensor([[-7 / 3, 1e6 / 3, math.nan]], dtype=torch.float64)
    scaler.fit(row.expand(21, -1))
    assert scaler.std.tolist() == [1.0, 1.0, math.inf]
    assert scaler.mean[2] == 0.0
    read = scaler(row.float())
    torch.testing.assert_close(read[:, :2], torch.zeros(1, 2), rtol=0, atol=0.1)
    assert read[0, 2:].tolist() == [0.0, 1.0, 1.0, 0.0]
    later = scaler(torch.tensor([[0.0, 0.0, 7.0]]))
    assert later[0, 2] == 0.0, "what training never saw moves no logit"


def test_an_extreme_entry_is_clipped() -> None:
    scaler = MaskedScaler(1)
    scaler.fit(torch.tensor([[-1.0], [1.0]]))
    read = scaler(torch.tensor([[3.0], [1e30], [-8.5]]))
    assert read[:, 0].tolist() == [3.0, MAX_Z_SCORE, -MAX_Z_SCORE]


# --------------------------------------------------------------------------- the head


def test_the_head_adds_up_states_summaries_and_facts() -> None:
    head, (states, batch) = head_of(), padded()
    generator = torch.Generator().manual_seed(2)
    tables = (
        torch.randn(9, SUMMARIES, generator=generator),
        torch.randn(9, FACTS, generator=generator),
    )
    head.fit_normalizer(*tables)
    nn.init.normal_(head.wide.weight)
    logits = head(states, batch)
    assert head.facts is not None
    for row, length in enumerate(LENGTHS):
        alone = states[row, :length]
        shares = (alone @ head.attention.weight[0]).softmax(dim=0)
        read = torch.cat([shares @ alone, states[row, -1]])
        expected = head.output.weight[0] @ read + head.output.bias[0]
        known = []
        for name, table in zip(("summaries", "facts"), tables, strict=True):
            z = (batch[name][row] - table.mean(0)) / table.std(0, unbiased=False)  # type: ignore[literal-required]
            known.append(torch.cat([z, torch.ones(len(z))]))
        expected = expected + head.wide.weight[0] @ known[0] + head.facts(known[1])[0]
        torch.testing.assert_close(logits[row], expected)


def test_padding_moves_no_logit_and_gets_no_gradient() -> None:
    head, (states, batch) = head_of(), padded()
    states.requires_grad_()
    logits = head(states, batch)
    logits.sum().backward()
    read = torch.cat([batch["observed"][..., 0], torch.ones(3, 1, dtype=torch.bool)], dim=1)
    assert states.grad is not None
    assert not states.grad[~read].any()
    assert bool(states.grad[read].any(dim=1).all())
    other = torch.where(read[..., None], states, 1e6)
    assert torch.equal(head(other, batch), logits)


@pytest.mark.parametrize("prevalence", [0.02, 0.5, 0.9])
def test_a_head_starts_at_the_risk_of_the_training_part(prevalence: float) -> None:
    """But for the states, and the facts where there are any: the summaries say nothing yet."""
    head, (states, batch) = head_of(prevalence, facts=0), padded(facts=0)
    nn.init.zeros_(head.output.weight)
    risk = head(states, batch).sigmoid()
    torch.testing.assert_close(risk, torch.full((3,), prevalence))


def test_summaries_begin_to_count_with_the_first_step() -> None:
    head, (states, batch) = head_of(), padded()
    assert not head.wide.weight.any()
    head(states, batch).sum().backward()
    assert head.wide.weight.grad is not None
    assert bool(head.wide.weight.grad.any())


@pytest.mark.parametrize("name", ["summaries", "facts"])
def test_what_is_unknown_is_a_masked_zero(name: str) -> None:
    head, (states, batch) = head_of(), padded()
    nn.init.normal_(head.wide.weight)
    table = batch[name]  # type: ignore[literal-required]
    unknown = table.clone()
    unknown[:, 1] = math.nan
    head.fit_normalizer(batch["summaries"] * 3 + 5, batch["facts"] * 3 + 5)
    scaler = head.summary_scaler if name == "summaries" else head.fact_scaler
    mean = table.clone()
    mean[:, 1] = scaler.mean[1]
    found = head(states, replaced(batch, **{name: unknown}))
    assert bool(found.isfinite().all())
    # Of a known mean it differs by the mask alone.
    assert not torch.isclose(found, head(states, replaced(batch, **{name: mean}))).any()
    mask = torch.ones(2 * table.shape[1])
    mask[table.shape[1] + 1] = 0.0
    hook = scaler.register_forward_hook(lambda module, inputs, output: output * mask)
    torch.testing.assert_close(found, head(states, replaced(batch, **{name: mean})))
    hook.remove()


def test_a_head_without_facts_has_no_network_of_facts(recwarn: pytest.WarningsRecorder) -> None:
    head, (states, batch) = head_of(facts=0), padded(facts=0)
    head.fit_normalizer(batch["summaries"], batch["facts"])
    assert head.facts is None
    assert not [name for name, _ in head.named_parameters() if "fact" in name]
    assert head(states, batch).shape == (3,)
    assert not list(recwarn)


def test_the_loss_is_the_summed_cross_entropy() -> None:
    logit, labels = torch.tensor([0.3, -2.0, 40.0]), torch.tensor([1.0, 0.0, 1.0])
    output = classification_output(logit, labels)
    expected = math.log1p(math.exp(-0.3)) + math.log1p(math.exp(-2.0))
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.terms == 3
    assert output.logit is logit


# --------------------------------------------------------------------------- members


def member_of(model: TrajectoryClassifier, number: int) -> TrajectoryMember:
    member = model.members[number]
    assert isinstance(member, TrajectoryMember)
    return member


def test_a_member_has_the_scales_of_the_training_part() -> None:
    data = data_of(patients())
    train = data.split["train"]
    encoder = ClinicalODERNN(1)
    member = fit_member(encoder, data)
    assert member.encoder is encoder
    own = data.dataset.subset(train)
    torch.testing.assert_close(encoder.value_mean[0].item(), float(np.nanmean(own.values)))
    for scaler, table in (
        (member.head.summary_scaler, own.summaries()),
        (member.head.fact_scaler, own.known_facts()),
    ):
        expected = torch.from_numpy(np.nanmean(table, axis=0)).float()
        torch.testing.assert_close(scaler.mean, expected)
        assert np.nanmean(data.dataset.known_facts()) != np.nanmean(own.known_facts())
    assert len(member.head.summary_scaler.mean) == len(data.dataset.summary_names()) == 9


def test_a_series_without_scale_names_the_features() -> None:
    data = data_of(patients())
    data.dataset.values = np.full_like(data.dataset.values, np.inf)
    with pytest.raises(InputError, match=r"feature 0 is not finite \(features: Anion gap\)"):
        fit_member(ClinicalODERNN(1), data)


def test_summaries_of_few_patients_leave_nothing_in_the_weights() -> None:
    texts = [*["3 (0h)"] * 9, "3 (0h) -> 8 (5h)", *["3 (0h)"] * 10]
    dataset = dataset_of(texts)
    split = {"train": np.arange(20)}
    shown, hidden = (
        fit_member(ClinicalODERNN(1), Data(dataset, split, PromptOptions(), "", "", fewest)).head
        for fewest in (0, 5)
    )
    span = dataset.summary_names().index("Anion gap span")
    assert float(shown.summary_scaler.mean[span]) == 5 / 20
    assert not hidden.summary_scaler.mean[span]
    assert hidden.summary_scaler.std[span] == math.inf
    first = dataset.summary_names().index("Anion gap first")
    assert float(hidden.summary_scaler.mean[first]) == 3


def test_the_head_reads_the_state_at_the_prediction_time() -> None:
    data = data_of(patients())
    model = stage1_for(data.dataset)
    batch = data.dataset.collate(ROWS)
    states, logit = member_of(model, 0)(batch)
    assert states.shape == (len(ROWS), 9 + 1, model.encoder.hidden_dim)
    torch.testing.assert_close(logit, member_of(model, 0).head(encode(model.encoder, batch), batch))
    later = replaced(batch, prediction_hours=batch["prediction_hours"] + 20)
    moved = member_of(model, 0)(later)
    torch.testing.assert_close(moved[0][:, :-1], states[:, :-1])
    assert not torch.isclose(moved[1], logit).any()


def test_members_logits_and_losses_are_averaged() -> None:
    data = data_of(patients())
    model = stage1_for(data.dataset, members=3)
    batch = data.dataset.collate(ROWS)
    alone = [TrajectoryClassifier([member_of(model, k)])(batch) for k in range(3)]
    for one, other in itertools.combinations(alone, 2):
        assert not torch.isclose(one.logit, other.logit).any()
    output = model(batch)
    torch.testing.assert_close(output.logit, torch.stack([each.logit for each in alone]).mean(0))
    torch.testing.assert_close(output.loss, torch.stack([each.loss for each in alone]).mean())
    assert output.terms == alone[0].terms == len(ROWS)


def test_each_member_learns_as_if_alone() -> None:
    data = data_of(patients())
    model = stage1_for(data.dataset, members=3)
    batch = data.dataset.collate(ROWS)
    alone = copy.deepcopy(model)
    model(batch).loss.backward()
    for k in range(3):
        member = member_of(alone, k)
        TrajectoryClassifier([member])(batch).loss.backward()
        for found, own in zip(member_of(model, k).parameters(), member.parameters(), strict=True):
            assert found.grad is not None
            assert own.grad is not None
            torch.testing.assert_close(3 * found.grad, own.grad)


def test_the_states_are_the_first_members() -> None:
    data = data_of(patients())
    model = stage1_for(data.dataset, members=2)
    batch = data.dataset.collate(ROWS)
    states, logits = model.read(batch)
    assert model.encoder is member_of(model, 0).encoder
    assert torch.equal(states, encode(member_of(model, 0).encoder, batch))
    assert torch.equal(logits, torch.stack([member_of(model, k)(batch)[1] for k in range(2)]))


@pytest.mark.parametrize("members", [1, 2])
def test_a_batch_with_and_without_its_plan_gives_the_same_logits(members: int) -> None:
    dataset = data_of(patients()).dataset
    model = stage1_for(dataset, members)
    planned = collate_with_plan(dataset, model.encoder)(ROWS)
    assert "plan" in planned
    together = model(planned)
    torch.testing.assert_close(model(dataset.collate(ROWS)).logit, together.logit)
    for k, row in enumerate(ROWS):
        alone = model(dataset.collate([row])).logit
        torch.testing.assert_close(alone, together.logit[k : k + 1], rtol=0, atol=1e-5)


def test_a_batch_without_a_plan_is_planned_once_for_all_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = data_of(patients())
    model, batch = stage1_for(data.dataset, members=3), data.dataset.collate(ROWS)
    planned = collate_with_plan(data.dataset, model.encoder)(ROWS)
    plans: list[int] = []
    original = ClinicalODERNN.plan

    def counting(*arguments: Tensor) -> object:
        plans.append(1)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ClinicalODERNN, "plan", counting)
    assert torch.equal(model(batch).logit, model(planned).logit)
    assert len(plans) == 1
