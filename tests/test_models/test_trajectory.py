"""The scales and the head of stage 1, its members, and the classifier without a language model."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dte_encoder import ClinicalODERNN
from language_models import data_of, patients, stage1_for
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.files import InputError
from medgemma_clinical.models.trajectory import Stage1, TrajectoryCollator, TrajectoryHead
from medgemma_trainer import build_stage1
from trajectories import dataset_of

LENGTHS = (5, 1, 3)
SUMMARIES, STATIC = 4, 3
ROWS = [3, 0, 7, 12]


def head_and_batch(static=STATIC):
    """A head with scales; states (3, 7, 8) of 5, 1 and 3 observations, padded with noise."""
    torch.manual_seed(1)
    head = TrajectoryHead(8, summaries=SUMMARIES, static=static, dropout=0.3)
    head.summary_scaler.fit(torch.randn(99, SUMMARIES) * 3 + 1)
    head.static_scaler.fit(torch.randn(99, static) + 2)
    present = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    tables = {"summaries": torch.randn(3, SUMMARIES), "static": torch.randn(3, static)}
    return head, torch.randn(3, 7, 8), {"observed": present.unsqueeze(2), **tables}


@pytest.mark.parametrize("static", [STATIC, 0])
def test_head__reads_states_and_summaries_each_with_the_facts_unknown_ones_masked(static):
    head, states, batch = head_and_batch(static)
    batch["summaries"][0, 1] = batch["static"][1:2, :1] = math.nan
    learning, logits = head(states, batch), head.eval()(states, batch)
    assert not torch.isclose(learning, logits).any(), "dropout is of training alone"
    for row, length in enumerate(LENGTHS):
        observed, known = states[row, :length], {}
        for name, scaler in (("summaries", head.summary_scaler), ("static", head.static_scaler)):
            table = batch[name][row]
            known[name] = torch.cat([scaler(table[None])[0], (~table.isnan()).float()])
        shares = (observed @ head.attention.weight[0]).softmax(dim=0)
        first = head.output(torch.cat([shares @ observed, states[row, -1]]))
        first = first + (plain(head.static, known["static"]) if static else 0)
        second = plain(head.summaries, torch.cat([known["summaries"], known["static"]]))
        torch.testing.assert_close(logits[row, :, 0], torch.cat([first, second]))


def plain(network, inputs):
    """The network of one hidden layer."""
    first, last = (each for each in network if isinstance(each, nn.Linear))
    return last(first(inputs).relu())


def test_fit_scales__are_those_of_the_training_part():
    data = data_of(patients())
    data = replace(data, dataset=data.dataset.up_to(1 + np.arange(24) % 3))
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
            mean = torch.tensor(np.nanmean(table, 0)).float()  # of a single bin
            torch.testing.assert_close(scaler.knots[:, 0], mean)
        assert member.head.output.bias.sigmoid().item() == pytest.approx(own.labels.mean())
    assert len(model.members[0].head.summary_scaler.std) == len(own.summary_names()) == 9


def test_fit_scales__names_the_features_of_a_series_without_scale():
    data = data_of(patients())
    data.dataset.values = np.full_like(data.dataset.values, np.inf)
    with pytest.raises(InputError, match="Anion gap"):
        stage1_for(data.dataset).fit_scales(data)


def test_fit_scales__summaries_of_few_patients_leave_nothing_in_the_weights():
    scalers = []
    for few in (11, 10):
        dataset = dataset_of([f"{3 + k % 2} (0h)" + " -> 8 (5h)" * (k < few) for k in range(38)])
        model = stage1_for(dataset)
        model.fit_scales(Data(dataset, {"train": np.arange(38)}, None, "", ""))
        scalers.append(model.members[0].head.summary_scaler)
    span, first = (dataset.summary_names().index(f"Anion gap {x}") for x in ("span", "first"))
    assert scalers[0].knots[span, 0] == pytest.approx(55 / 38)
    assert scalers[1].knots[first, 0] == 3.5
    assert (scalers[1].knots[span, 0], scalers[1].std[span]) == (0, math.inf)


@pytest.fixture(scope="module")
def three():
    """Three members and a planned batch."""
    dataset = data_of(patients()).dataset
    model = stage1_for(dataset, members=3).eval()
    return model, dataset, TrajectoryCollator(model, dataset)(ROWS)


def test_member__reads_the_state_at_the_prediction_time(three):
    model, dataset, batch = three
    states, logit = model.members[0](batch)
    series = [batch[name] for name in ("times", "values", "observed", "prediction_hours")]
    torch.testing.assert_close(states, model.encoder(*series))
    assert states.shape == (len(ROWS), 9 + 1, model.encoder.hidden_dim)
    later = {**dataset.collate(ROWS), "prediction_hours": batch["prediction_hours"] + 20}
    moved = model.members[0](model.plan(later))
    torch.testing.assert_close(moved[0][:, :-1], states[:, :-1])
    assert not torch.isclose(moved[1], logit)[:, 0].any()


def alone(model):
    """Each member as a model of its own."""
    return [Stage1([(member.encoder, member.head)]) for member in model.members]


def entropy(logits, labels):
    """The cross-entropy, a sum over patients in the last but one column."""
    risk = logits.double().sigmoid()
    return -torch.where(labels == 1, risk, 1 - risk).log().sum(-1).float()


def test_classifier__averages_logits_and_keeps_the_first_members_states_and_each_loss(three):
    model, _, batch = three
    own = [member.eval()(batch) for member in alone(model)]
    for one, other in itertools.combinations(own, 2):
        assert not torch.isclose(one.logit, other.logit).any()
    output, (states, logits) = model(batch), model.read(batch)
    torch.testing.assert_close(output.logit, torch.stack([each.logit for each in own]).mean(0))
    torch.testing.assert_close(output.logit, logits.mean(dim=(0, 2, 3)))
    assert torch.equal(output.loss, torch.cat([each.loss for each in own]))
    torch.testing.assert_close(output.loss, entropy(logits.mean((2, 3)), batch["labels"]))
    assert output.terms == own[0].terms == len(ROWS)
    assert torch.equal(states, model.members[0](batch)[0])


def drawn(model, dataset, rows=ROWS, seed=0, epoch=1):
    collate = TrajectoryCollator(model, dataset)
    collate.draw(seed, epoch)
    return collate(rows)


def test_classifier__each_member_learns_as_if_alone(three):
    model, batch = copy.deepcopy(three[0]).train(), drawn(*three[:2])
    model(batch).loss.sum().backward()
    for together, member in zip(model.members, alone(copy.deepcopy(model)), strict=True):
        member.zero_grad()
        member(batch).loss.sum().backward()
        for found, own in zip(together.parameters(), member.parameters(), strict=True):
            torch.testing.assert_close(found.grad, own.grad)


def test_classifier__training_leaves_out_members_that_no_longer_learn(three):
    model, batch = copy.deepcopy(three[0]).train(), three[2]
    model.learn = [False, True, True]
    output = model(batch)
    output.loss.sum().backward()
    assert len(output.loss) == 2
    learned = [any(p.grad is not None for p in each.parameters()) for each in model.members]
    assert learned == model.learn
    assert len(model.eval()(batch).loss) == 3


def test_classifier__readings_and_an_earlier_observation_count_in_training_alone(three):
    model, (end, batch) = copy.deepcopy(three[0]), (three[2], drawn(*three[:2]))
    labels, expected = batch["labels"], model(end)
    assert torch.equal(model(batch).loss, expected.loss)
    model.train()
    logits = model.read(batch)[1].squeeze(3).unflatten(1, (2, len(ROWS)))  # (N, 2, B, 2)
    torch.testing.assert_close(logits[:, 0], model.read(end)[1].squeeze(3))
    each = [entropy(logits[..., k], labels) for k in range(2)]  # (N, 2)
    losses = entropy(logits.mean(3), labels) / 2 + sum(each) / 4
    for found, loss in ((model(batch), losses.mean(1)), (model(end), losses[:, 0])):
        torch.testing.assert_close(found.loss, loss)
        assert (found.terms, len(found.logit)) == (len(ROWS), 0)


@pytest.mark.parametrize("timed", [True, False])
def test_head__an_earlier_risk_is_that_of_the_series_up_to_there_and_sees_nothing_behind(timed):
    dataset = data_of(patients()).dataset
    dataset = dataset.with_inputs(dataset.static_inputs, prediction_time=timed)
    model, rows = stage1_for(dataset), range(len(dataset))
    for k in range(1, 10):
        lengths = np.minimum(dataset.lengths, k)
        cut, later = dataset.up_to(lengths), dataset.subset(np.array(rows))
        _, (expected,) = model.eval().read(cut.collate(rows))
        prefix = {
            "prefix_lengths": torch.from_numpy(lengths),
            "prefix_summaries": torch.from_numpy(cut.summaries()).float(),
        }
        behind = np.concatenate([np.arange(n) >= k for n in dataset.lengths])
        later.values[behind] = 99 - later.values[behind]
        later.times = later.times + 3.0 * behind
        later.prediction_hours = dataset.prediction_hours + 20
        for whole in (dataset, later):
            _, (logits,) = model.train().read({**whole.collate(rows), **prefix})
            torch.testing.assert_close(logits[len(rows) :], expected, rtol=0, atol=1e-5)
    assert (lengths == dataset.lengths).all()


def test_draw__depends_on_seed_epoch_and_row_alone_and_reaches_every_observation(three):
    model, dataset, batch = three
    assert not {"prefix_lengths", "prefix_summaries"} & {*batch}
    first, rows = drawn(model, dataset, range(len(dataset))), [9, 3, 15]
    again = drawn(model, dataset, rows)
    lengths, summaries = first["prefix_lengths"], first["prefix_summaries"]
    assert torch.equal(again["prefix_lengths"], lengths[rows])
    cut = dataset.up_to(lengths.numpy()).collate(range(len(dataset)))["summaries"]
    for found, expected in ((summaries, cut), (again["prefix_summaries"], cut[rows])):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    for other in ({"epoch": 2}, {"seed": 1}):
        redrawn = drawn(model, dataset, range(len(dataset)), **other)["prefix_lengths"]
        assert not torch.equal(redrawn, lengths)
    collate, seen = TrajectoryCollator(model, dataset), []
    for epoch in range(200):
        collate.draw(0, epoch)
        seen.append(collate.lengths.numpy())
    for row, length in zip(np.transpose(seen), dataset.lengths, strict=True):
        assert {*row.tolist()} == {*range(1, length + 1)}


def test_classifier__plan_and_company_change_no_logit_and_one_plan_serves_all(three, monkeypatch):
    model, dataset, batch = three
    together, plans, original = model(batch).logit, [], ClinicalODERNN.plan
    monkeypatch.setattr(ClinicalODERNN, "plan", lambda *a: plans.append(1) or original(*a))
    assert torch.equal(model(dataset.collate(ROWS)).logit, together)
    assert len(plans) == 1
    alone = torch.cat([model(dataset.collate([row])).logit for row in ROWS])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_pass_is_the_same_with_one_thread_and_two():
    table = np.random.default_rng(0).normal(20, 5, (400, 6)).round(3)
    dataset = dataset_of([" -> ".join(f"{v} ({k}h)" for k, v in enumerate(row)) for row in table])
    model = stage1_for(dataset).train()
    batch, found = drawn(model, dataset, range(len(dataset))), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model.zero_grad()
            loss = model(batch).loss.sum() / len(dataset)
            loss.backward()
        finally:
            torch.set_num_threads(1)
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
