"""Batches: each row once, in an order that seed and epoch give; predictions need no order."""

from itertools import chain

import numpy as np
import pytest

import medgemma_trainer as trainer
from medgemma_clinical.distributed import processes
from medgemma_clinical.files import InputError
from medgemma_clinical.training import evaluate as evaluation
from medgemma_clinical.training.loaders import LengthBatches, cut_rows, part_batches
from toy_stage import toy_stage

LENGTHS = np.random.default_rng(0).integers(5, 200, 3003)


def epoch_of(batches, epoch, seed=0, done=0):
    batches.set_epoch(seed, epoch, done)
    return list(batches)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_comes_once_an_epoch_in_any_number_of_processes(shuffle, lengths):
    for n, m in ((n, m) for n in (1, 2, 3, 5) for m in (1, 2, 7)):
        for rows in (*range(n, 3 * n * m + 2, 2), 97, 161, 390):
            given = np.arange(3, rows + 3), n * m, lengths
            parts = [LengthBatches(*given, shuffle=shuffle, share=(k, n)) for k in range(n)]
            shares = [epoch_of(part, 2) for part in parts]
            assert list(map(len, shares)) == list(map(len, parts))
            assert sorted(chain(*chain(*shares))) == list(range(3, rows + 3))
            steps = [[len(batch) for batch in step] for step in zip(*shares, strict=shuffle)]
            for counts in steps if shuffle else ():  # each process has work in each step
                assert min(counts) >= max(1, max(counts) - 1)
                assert sum(counts) < n * m + n
            assert shuffle or max(map(len, shares[0])) <= n * m


def test_the_order_is_of_seed_and_epoch_alone_and_goes_on_where_it_was_stopped():
    batches, orders = LengthBatches(np.arange(640), 16, LENGTHS, shuffle=True), {}
    for seed, epoch in ((0, 2), (1, 1), (0, 1), (1, 2), (2, 0), (0, 2)):
        order = epoch_of(batches, epoch, seed)
        assert orders.setdefault((seed, epoch), order) == order
    assert len({str(order) for order in orders.values()}) == 5, "no seed repeats another's epoch"
    assert epoch_of(batches, 2, done=13) == orders[0, 2][13:]


def test_rows_of_about_equal_length_share_a_batch_and_batches_come_in_any_order():
    def padding(lengths, *, shuffle):
        batches = list(LengthBatches(np.arange(3000), 16, lengths, shuffle=shuffle))
        longest = np.array([LENGTHS[batch].max() for batch in batches])
        order = np.corrcoef(np.arange(len(longest)), longest)[0, 1]
        neighbours = np.corrcoef(longest[1:], longest[:-1])[0, 1]
        assert not shuffle or max(abs(order), abs(neighbours)) < 0.2
        return 1 - LENGTHS[:3000].sum() / (longest @ list(map(len, batches)))

    assert padding(LENGTHS, shuffle=False) < 0.01
    assert padding(LENGTHS, shuffle=True) < 0.1 < 0.4 < padding(None, shuffle=True)


def test_the_short_batch_holds_random_rows():
    batches, counts = LengthBatches(np.arange(90), 16, np.arange(90), shuffle=True), np.zeros(90)
    for epoch in range(200):
        (short,) = (batch for batch in epoch_of(batches, epoch) if len(batch) < 16)
        counts[short] += 1
    for part in (counts[:1], counts[-1:], counts[:10], counts[-10:]):  # 10 of 90 rows are in it
        assert abs(part.mean() - 200 / 9) < 3 * np.sqrt(200 / 9 * 8 / 9 / len(part))


def test_rows_are_cut_into_passes_that_fit():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = rng.permutation(40)[: rng.integers(1, 40)].tolist()
        size, most = rng.integers(1, [20, 900]).tolist()
        passes = cut_rows(rows, size, LENGTHS, most)
        assert list(chain(*passes)) == rows
        assert max(map(len, passes)) <= size
        assert all(len(part) == 1 or len(part) * LENGTHS[part].max() <= most for part in passes)
        assert cut_rows(rows, size) == [rows[k : k + size] for k in range(0, len(rows), size)]


def test_only_the_parts_of_a_run_are_shared_by_processes(dka_file, monkeypatch):
    monkeypatch.setattr("medgemma_clinical.evaluation.metrics.REPLICATES", 20)
    model = trainer.fit_trajectory(dka_file, trajectory_epochs=1)
    model.batch_size = 16
    alone = model.predict_proba(dka_file)  # and so in whichever process it is called
    monkeypatch.setattr(evaluation, "gather_object", lambda _: pytest.fail("waits"))
    monkeypatch.setattr(processes(), "num_processes", 2)
    for index in (0, 1):
        monkeypatch.setattr(processes(), "process_index", index)
        np.testing.assert_array_equal(model.predict_proba(dka_file), alone)
        assert sorted(chain(*LengthBatches(np.arange(50), 8, shuffle=True))) == list(range(50))
        parts = part_batches({"train": np.arange(50), "val": np.arange(20)}, 4, accumulate=3)
        assert [len(batch) for batch in parts["train"]] == [12, 12, 1], "24 rows a step, halved"
        assert max(len(batch) for batch in parts["val"]) == 8, "twice as many rows a pass"
    with pytest.raises(InputError):
        part_batches({"train": np.arange(1)}, 4)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_evaluation_keeps_the_order_of_the_data(size, monkeypatch):
    stage, rows, sent = toy_stage(), np.array([41, 39, 47, 40, 38]), []
    monkeypatch.setattr(evaluation, "gather_object", lambda own: sent.extend(own) or sent)
    stage.model.train()
    for k in (0, 2, 1):
        batches = LengthBatches(rows, size, LENGTHS, shuffle=False, share=(k, 3))
        found = evaluation.score_batches(stage.model, batches, stage.collate)
    assert not stage.model.training, "without dropout"
    expected = stage.model(stage.collate(sorted(rows.tolist())))
    assert found.rows.tolist() == sorted(rows)
    np.testing.assert_allclose(found.outputs, expected.outputs.detach(), atol=1e-6)
    assert found.loss == pytest.approx(expected.loss.item() / 5)
