"""The scales and the head of stage 1, its members, and the classifier without a language model."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from dte_encoder import ClinicalODERNN
from language_models import data_of, patients, stage1_for
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.files import InputError
from medgemma_clinical.models.trajectory import Stage1, TrajectoryHead
from medgemma_trainer import build_stage1
from trajectories import dataset_of

LENGTHS = (5, 1, 3)
SUMMARIES, STATIC = 4, 3
ROWS = [3, 0, 7, 12]


def head_and_batch(static=STATIC):
    """A head that has learned; states (3, 7, 8) of 5, 1 and 3 observations, padded with noise."""
    torch.manual_seed(1)
    head = TrajectoryHead(8, summaries=SUMMARIES, static=static)
    assert not head.wide.weight.any()  # summaries say nothing at first
    head.summary_scaler.fit(torch.randn(9, SUMMARIES) * 3 + 1)
    head.static_scaler.fit(torch.randn(9, static) + 2)
    nn.init.normal_(head.wide.weight)
    present = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    tables = {"summaries": torch.randn(3, SUMMARIES), "static": torch.randn(3, static)}
    return head, torch.randn(3, 7, 8), {"observed": present.unsqueeze(2), **tables}


@pytest.mark.parametrize("static", [STATIC, 0])
def test_head__adds_up_states_summaries_and_facts_unknown_ones_masked(static):
    head, states, batch = head_and_batch(static)
    batch["summaries"][0, 1] = batch["static"][1:2, :1] = math.nan
    logits = head(states, batch)
    for row, length in enumerate(LENGTHS):
        alone, terms = states[row, :length], []
        shares = (alone @ head.attention.weight[0]).softmax(dim=0)
        read = torch.cat([shares @ alone, states[row, -1]])
        for name, scaler in (("summaries", head.summary_scaler), ("static", head.static_scaler)):
            known = ~batch[name][row].isnan()
            z = torch.where(known, (batch[name][row] - scaler.mean) / scaler.std, 0.0)
            terms.append(torch.cat([z, known.float()]))
        expected = head.output(read) + head.wide(terms[0])
        expected = expected + head.static(terms[1]) if static else expected
        torch.testing.assert_close(logits[row : row + 1], expected)
    assert (head.static is None) == (not static)


def test_fit_scales__are_those_of_the_training_part():
    data = data_of(patients())
    data.dataset.labels[1] = 0
    config = {"encoder": {"input_dim": 1}, "members": 2, **data.description()}
    model = build_stage1(config)
    model.fit_scales(data)
    own = data.dataset.subset(data.split["train"])
    assert np.nanmean(data.dataset.static_values()) != np.nanmean(own.static_values())
    for member in model.members:
        for scaler, table in (
            (member.encoder.scaler, own.values),
            (member.head.summary_scaler, own.summaries()),
            (member.head.static_scaler, own.static_values()),
        ):
            torch.testing.assert_close(scaler.mean, torch.tensor(np.nanmean(table, 0)).float())
        assert member.head.output.bias.sigmoid().item() == pytest.approx(own.labels.mean())
    assert len(model.members[0].head.summary_scaler.mean) == len(own.summary_names()) == 9


def test_fit_scales__names_the_features_of_a_series_without_scale():
    data = data_of(patients())
    data.dataset.values = np.full_like(data.dataset.values, np.inf)
    with pytest.raises(InputError, match="Anion gap"):
        stage1_for(data.dataset).fit_scales(data)


def test_fit_scales__summaries_of_few_patients_leave_nothing_in_the_weights():
    scalers = []
    for few in (5, 4):
        dataset = dataset_of(["3 (0h) -> 8 (5h)"] * few + ["3 (0h)"] * (20 - few))
        model = stage1_for(dataset)
        model.fit_scales(Data(dataset, {"train": np.arange(20)}, None, "", ""))
        scalers.append(model.members[0].head.summary_scaler)
    span, first = (dataset.summary_names().index(f"Anion gap {x}") for x in ("span", "first"))
    assert scalers[0].mean[span] == 25 / 20
    assert (scalers[1].mean[span], scalers[1].std[span], scalers[1].mean[first]) == (0, math.inf, 3)


@pytest.fixture(scope="module")
def three():
    """Three members and a planned batch."""
    dataset = data_of(patients()).dataset
    model = stage1_for(dataset, members=3)
    return model, dataset, model.collate(dataset)(ROWS)


def test_member__reads_the_state_at_the_prediction_time(three):
    model, dataset, batch = three
    states, logit = model.members[0](batch)
    series = [batch[name] for name in ("times", "values", "observed", "prediction_hours")]
    torch.testing.assert_close(states, model.encoder(*series))
    assert states.shape == (len(ROWS), 9 + 1, model.encoder.hidden_dim)
    later = {**dataset.collate(ROWS), "prediction_hours": batch["prediction_hours"] + 20}
    moved = model.members[0](model.plan(later))
    torch.testing.assert_close(moved[0][:, :-1], states[:, :-1])
    assert not torch.isclose(moved[1], logit).any()


def test_classifier__averages_logits_and_losses_and_keeps_the_first_members_states(three):
    model, _, batch = three
    alone = [Stage1([member])(batch) for member in model.members]
    for one, other in itertools.combinations(alone, 2):
        assert not torch.isclose(one.logit, other.logit).any()
    output, (states, logits) = model(batch), model.read(batch)
    torch.testing.assert_close(output.logit, torch.stack([each.logit for each in alone]).mean(0))
    torch.testing.assert_close(output.loss, torch.stack([each.loss for each in alone]).mean())
    assert output.terms == alone[0].terms == len(ROWS)
    assert torch.equal(states, model.members[0](batch)[0])
    assert torch.equal(logits, torch.stack([each.logit for each in alone]))
    risk = logits[0].double().sigmoid()
    likelihood = torch.where(batch["labels"] == 1, risk, 1 - risk)
    assert alone[0].loss.item() == pytest.approx(-likelihood.log().sum().item(), rel=1e-5)


def test_classifier__each_member_learns_as_if_alone(three):
    model, alone = copy.deepcopy(three[0]), copy.deepcopy(three[0])
    model(three[2]).loss.backward()
    for together, member in zip(model.members, alone.members, strict=True):
        Stage1([member])(three[2]).loss.backward()
        for found, own in zip(together.parameters(), member.parameters(), strict=True):
            torch.testing.assert_close(3 * found.grad, own.grad)


def test_classifier__plan_and_company_change_no_logit_and_one_plan_serves_all(three, monkeypatch):
    model, dataset, batch = three
    together, plans, original = model(batch).logit, [], ClinicalODERNN.plan
    monkeypatch.setattr(ClinicalODERNN, "plan", lambda *a: plans.append(1) or original(*a))
    assert torch.equal(model(dataset.collate(ROWS)).logit, together)
    assert len(plans) == 1
    alone = torch.cat([model(dataset.collate([row])).logit for row in ROWS])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
