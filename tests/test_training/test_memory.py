"""Steps that do not fit the memory: the same in smaller passes, or with less in memory."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import medgemma_trainer as trainer
from medgemma_clinical.files import RunFault
from medgemma_clinical.training import memory
from medgemma_clinical.training.state import read_state
from stages import STAGE_1, stage_of_patients
from toy_stage import LENGTHS, toy_stage

FLAGS = ("--mode", "generative", "--lora_dropout", "0.5", "--batch_size", "3")
FULL = torch.OutOfMemoryError("CUDA out of memory")


def checkpointing(stage):
    """Return whether layers are computed again in the backward pass."""
    return stage.model.llm.base_model.model.model.gradient_checkpointing


def limit_memory(stage, error=FULL, *, always=False):
    """Let passes of several rows fail without checkpointing, or all; return the rows of each."""
    tries = []

    def fail(model, inputs):
        if model.training:
            tries.append(inputs[0]["index"].tolist())
            if always or (len(tries[-1]) > 1 and not checkpointing(stage)):
                raise error

    stage.model.register_forward_pre_hook(fail)
    return tries


def raise_error(error):
    """Return a hook that raises."""

    def fail(*_):
        raise error

    return fail


def take_step(stage):
    """Return the rows of the first step, and its loss, terms and gradients."""
    stage.model.train().zero_grad()
    state, rows = trainer.set_up(stage), next(iter(stage.batches["train"]))
    loss, terms = trainer.backward(stage, state, rows)
    return rows, [loss, torch.tensor(terms), *(p.grad for p in state.parameters)]


@pytest.fixture
def check_on_gpu(monkeypatch):
    """Check a stage's memory as on a GPU, computing on the CPU."""
    fits, cpu, gpu = memory._fits, torch.device("cpu"), SimpleNamespace(type="cuda")
    monkeypatch.setattr(memory, "_fits", lambda stage, rows, device: fits(stage, rows, cpu))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)

    def check(stage):
        with monkeypatch.context() as patch:
            patch.setattr(stage.model, "to", lambda device: stage.model)
            memory.check_memory(stage, gpu)

    return check


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize(("size", "room"), [(8, 64), (24, 40), (8, 24), (8, 8)])
def test_passes_of_any_size_are_one_large_batch(size, room, lengths, check_on_gpu):
    """As asked for, or where that does not fit: the mean is over rows, not over passes."""
    whole = toy_stage(size=24, dropout=0.0, lengths=lengths)
    cut = toy_stage(size=size, accumulate=24 // size, dropout=0.0, lengths=lengths)
    cut.model.room, cut.model.scoring_room, tries = room, 3 * room, []
    check_on_gpu(cut)
    assert size * 8 == room or cut.max_tokens > room / 2, "no smaller than needed"
    cut.model.register_forward_pre_hook(lambda _, inputs: tries.append(inputs[0]))
    rows, expected = take_step(whole)
    assert len(rows) == 24
    torch.testing.assert_close(take_step(cut), (rows, expected))
    assert max(batch["tokens"] for batch in tries) <= room
    tries.clear()
    losses = [trainer.score(stage, "val").losses for stage in (whole, cut)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert max(batch["tokens"] for batch in tries) > min(room, 80), "as many as fit"
    weights = [trainer.fit(stage, 7).parameters for stage in (whole, cut)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "error", "always", "caught"),
    [
        *((flags, FULL, True, RunFault) for flags in (FLAGS, (STAGE_1,))),
        ((*FLAGS, "--gradient_checkpointing"), FULL, True, RunFault),
        (FLAGS, RuntimeError("another"), False, RuntimeError),
        (FLAGS, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), False, None),
    ],
)
def test_single_rows_that_never_fit_end_the_run(flags, error, always, caught, check_on_gpu):
    stage = stage_of_patients(*flags)
    limit_memory(stage, error, always=always)
    match = "--max_len" if always else "another"
    with pytest.raises(caught, match=match) if caught else contextlib.nullcontext():
        check_on_gpu(stage)
    assert caught or checkpointing(stage)


@pytest.mark.parametrize("limited", [False, True])
def test_a_trial_of_the_longest_rows_leaves_only_the_way_that_fits(limited, check_on_gpu):
    def content():
        gradients = [str(p.grad) for p in stage.model.parameters()]
        weights = [tensor.tolist() for tensor in stage.model.state_dict().values()]
        return gradients, weights, torch.get_rng_state().tolist()

    stage, scored = stage_of_patients(*FLAGS), []
    tries, collate, before = limit_memory(stage) if limited else [], stage.collate, content()
    stage.collate = lambda rows: scored.append(rows) or collate(rows)
    memory.check_memory(stage, torch.device("cpu"))
    (rows,) = scored  # on a CPU nothing is trained
    val = stage.batches["val"]
    assert set(rows) <= set(val.rows)
    assert sorted(stage.lengths[rows]) == sorted(stage.lengths[val.rows])[-val.batch_size :]
    check_on_gpu(stage)
    assert content() == before
    assert checkpointing(stage) == stage.recomputes == limited
    longest = memory.longest_rows(stage, "train", 3)
    assert set(longest) <= set(stage.batches["train"].rows)
    assert min(stage.lengths[longest]) == sorted(stage.lengths[stage.batches["train"].rows])[-3]
    train = stage.batches["train"].rows
    shortest = [train[stage.lengths[train].argmin()]]
    # Two trials: cut, such passes would be small.
    assert tries == [shortest, longest, shortest, longest][: 4 * limited]


def test_kernels_are_loaded_by_the_shortest_row_before_the_card_is_full(check_on_gpu, monkeypatch):
    stage, events, empty_like = toy_stage(), [], torch.empty_like

    def reserve(parameter):
        events.append("reserve")
        return empty_like(parameter)

    monkeypatch.setattr(torch, "empty_like", reserve)
    stage.model.register_forward_pre_hook(lambda _, inputs: events.append(inputs[0]["tokens"]))
    check_on_gpu(stage)
    lengths = LENGTHS[stage.batches["train"].rows]
    first, second = events[:2]
    assert (first, second) == (lengths.min(), "reserve")
    assert 8 * lengths.max() in events[2:]


def test_large_passes_are_cut_and_layers_are_computed_again_instead_of_small_ones(
    check_on_gpu, monkeypatch
):
    monkeypatch.setattr(memory, "RECOMPUTE_TOKENS", 2 * 100)
    stage = stage_of_patients(*FLAGS[:-1], "8")
    stage.lengths = np.full_like(stage.lengths, 100)
    tries = limit_memory(stage)
    check_on_gpu(stage)
    assert [len(rows) for rows in tries] == [1, 8, 1, 4, 1, 2, 1, 8]
    assert (stage.recomputes, stage.max_tokens) == (True, None)


@pytest.mark.parametrize(
    ("error", "caught", "match"),
    [(FULL, RunFault, "--resume.*--gradient_accumulation"), (RuntimeError("x"), RuntimeError, "x")],
)
def test_what_ends_a_step_for_lack_of_memory_names_what_resume_accepts(error, caught, match):
    """A trial has sized the passes; then something else takes memory."""
    stage = toy_stage()
    stage.model.register_forward_pre_hook(raise_error(error))
    with pytest.raises(caught, match=match):
        take_step(stage)


@pytest.mark.parametrize("room", [1000, 100, 16])
def test_a_resumed_run_cuts_its_steps_as_the_stopped_one(room, check_on_gpu, tmp_path):
    """Whatever else a card holds by then; where less fits, less."""
    stage = toy_stage(size=24, lengths=LENGTHS)
    stage.model.room = 64
    check_on_gpu(stage)
    trainer.fit(stage, 7, tmp_path)
    again = toy_stage(size=24, lengths=LENGTHS)
    again.model.room = room
    memory.restore_passes(again, read_state(tmp_path / "last")["passes"])
    check_on_gpu(again)
    assert (again.max_tokens == stage.max_tokens) == (room >= 64)
    assert again.max_tokens <= 64


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_a_resumed_run_recomputes_as_before_and_where_the_flag_is_new(flag, before):
    stage = stage_of_patients(*FLAGS, *["--gradient_checkpointing"] * flag)
    memory.restore_passes(stage, {"recomputes": before, "max_tokens": 900})
    assert checkpointing(stage) == stage.recomputes == (before or flag)
    assert stage.max_tokens == (None if flag and not before else 900)


def test_a_process_that_has_room_follows_one_that_has_not(check_on_gpu, monkeypatch):
    others = iter([1.0, 1.0, 0.0])  # the other process has room for 6 of 24 rows
    monkeypatch.setattr(memory, "reduce", lambda own, how: own + next(others))
    stage = toy_stage(size=24)
    check_on_gpu(stage)
    assert stage.max_tokens == 6 * LENGTHS[:37].max()


def test_a_trial_computes_the_gradients_of_all_members(check_on_gpu):
    stage = stage_of_patients(STAGE_1, "--members", "2")
    check_on_gpu(stage)
    assert stage.max_tokens is None
