"""Runs of the whole program that are stopped and resumed: the same result, to the last bit."""

import json
import os
import shutil
import signal
import stat

import numpy as np
import pandas as pd
import pytest
import torch

import faults
import medgemma_trainer as trainer
from conftest import SAMPLE
from faults import result_of
from medgemma_clinical.commands import results, run_folder
from medgemma_clinical.files import locked
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.state import StateStore
from predicting import refused

STAGES = {
    "trajectory": "--trajectory_only --trajectory_epochs 4 --members 2",
    "classification": "--model_name tiny --epochs 3 --gradient_accumulation 2",
    "generative": "--model_name tiny --epochs 2 --lora_dropout 0.3 --mode generative",
}
EPOCH = 9  # steps: 72 of 90 rows train, 8 at a time
STEPS = {"trajectory": 4 * EPOCH, "classification": 3 * 5, "generative": 2 * EPOCH}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "patients.csv"
    pd.read_csv(SAMPLE, nrows=90).to_csv(path, index=False)
    return path


def command(stage, data, folder, *flags):
    words = f"{STAGES[stage]} --data_path {data} --output_dir {folder} --batch_size 8 --min_cell 0"
    return [*words.split(), "--log_file", "none", *flags]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A folder with a run of each stage, in a folder of its own, that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for stage in STAGES:
        assert trainer.main(command(stage, data, folder / stage)) == 0
    return folder


@pytest.fixture
def stopped(data, tmp_path):
    """The command of a run of stage 1 that was stopped in its second epoch."""
    stop(words := command("trajectory", data, tmp_path / "run"), EPOCH + 3)
    return words


def at_step(number, action, patch):
    """Call ``action`` just before so many-th step; return the list that fills with steps taken."""
    steps, iterate = [], LengthBatches.__iter__

    def counted(batches):
        for rows in iterate(batches):
            if batches.shuffle:
                steps.append(rows)
                if len(steps) == number:
                    action()
            yield rows

    patch.setattr(LengthBatches, "__iter__", counted)
    return steps


class PowerLoss(BaseException):
    """Ends a run without a chance to keep anything."""


def send(sent):
    """Return a function that sends this process a signal, or raises an exception."""

    def end(*_, **__):
        if not isinstance(sent, int):
            raise sent
        os.kill(os.getpid(), sent)

    return end


def stop(words, where, sent=signal.SIGTERM):
    """Run a command up to so many-th step, or to a function; return the steps that it kept."""
    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(where, send(sent), patch)
        if not isinstance(where, int):
            patch.setattr(*where, send(sent))
        try:
            assert trainer.main(words) == 128 + sent
        except PowerLoss:
            steps.pop()
    return steps


def contents(folder):
    """Return all files but the locks, which stay."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("stage", "where", "sent"),
    [
        *(("trajectory", number, signal.SIGTERM) for number in (1, 9, 10)),
        ("trajectory", 14, signal.SIGHUP),
        ("trajectory", 10, PowerLoss),  # costs the validation of the first epoch alone
        ("classification", 3, signal.SIGTERM),
        ("generative", 12, signal.SIGTERM),
        ("trajectory", (trainer, "validate"), signal.SIGINT),
        *((stage, (results, "write_results"), signal.SIGINT) for stage in STAGES),
        ("trajectory", (run_folder, "finish_run"), signal.SIGINT),
    ],
)
def test_a_stopped_run_resumes_to_the_same_result(
    stage, where, sent, data, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    before = stop(words := command(stage, data, folder), where, sent)
    progress = run_folder.state_store(folder / stage).newest()["progress"]
    assert progress["steps"] == len(before)
    (folder / stage / "report.html").unlink(missing_ok=True)
    for path in (folder / stage / "history.jsonl", *folder.glob("*.pt")):
        path.write_text("damaged")  # it comes back from the state
    torch.manual_seed(len(before))  # whatever the generators hold by now
    after = at_step(0, None, monkeypatch)
    assert trainer.main([*words, "--resume"]) == 0
    assert len(before) + len(after) == STEPS[stage]
    assert result_of(folder, stage) == result_of(undisturbed / stage, stage)
    assert (folder / stage / "report.html").exists()
    assert not (folder / stage / "last").exists()
    history = (folder / stage / "history.jsonl").read_text().splitlines()
    for line in history[progress["epoch"] :][:1]:  # with what came before the stop
        assert json.loads(line)["seconds"] > progress["seconds"] > 0


def test_states_come_every_so_many_steps_and_exact_kernels_change_nothing(
    data, undisturbed, tmp_path, monkeypatch
):
    kept, on, enabled = [], [], torch.are_deterministic_algorithms_enabled
    save = StateStore.save

    def saving(store, state):
        kept.append(state["progress"]["steps"])
        save(store, state)

    monkeypatch.setattr(StateStore, "save", saving)
    at_step(1, lambda: on.append(enabled()), monkeypatch)
    words = command("trajectory", data, tmp_path, "--save_every", "4", "--deterministic")
    assert trainer.main(words) == 0
    assert kept == sorted([0, *range(4, 37, 4), *range(9, 37, 9), 36])  # validation, the end
    assert (on, enabled()) == ([True], False)
    assert result_of(tmp_path, "trajectory") == result_of(undisturbed / "trajectory", "trajectory")


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_a_run_resumes_with_its_steps_cut_otherwise(stage, data, tmp_path, capsys):
    """Of the same rows a step, with layers computed again: the same to rounding."""
    flags = ("--lora_dropout", "0", "--gradient_accumulation", "1")
    one, two = tmp_path / "one", tmp_path / "two"
    assert trainer.main(command(stage, data, one, *flags)) == 0
    words = command(stage, data, two, *flags)
    stop(words, EPOCH + 3)
    before, words = contents(two), [*words, "--resume", "--gradient_checkpointing"]
    assert refused(capsys, [*words, "--batch_size", "4"], "--batch_size")
    assert refused(capsys, [*words, "--gradient_accumulation", "2"], "--gradient_accumulation")
    assert contents(two) == before
    assert trainer.main([*words, "--batch_size", "4", "--gradient_accumulation", "2"]) == 0
    risks = [pd.read_csv(k / stage / "predictions_test.csv")["probability"] for k in (one, two)]
    np.testing.assert_allclose(*risks, atol=2e-5)
    history = [pd.read_json(k / stage / "history.jsonl", lines=True) for k in (one, two)]
    np.testing.assert_allclose(*(each["train_loss"] for each in history), rtol=1e-4)


def test_a_sample_of_the_fault_trials_ends_well():
    assert faults.main(["--trials", "1", "--stages", "trajectory"]) == 0


def test_a_damaged_state_gives_way_to_the_one_before(
    stopped, undisturbed, tmp_path, monkeypatch, capsys
):
    _, last = run_folder.state_store(tmp_path / "run" / "trajectory").files()
    last.write_bytes(last.read_bytes()[:-1])
    after = at_step(0, None, monkeypatch)
    assert trainer.main([*stopped, "--resume"]) == 0
    assert last.name in capsys.readouterr().out
    assert len(after) == 3 * EPOCH
    expected = result_of(undisturbed / "trajectory", "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_another_command_or_other_data_are_refused_and_nothing_changes(
    stopped, data, tmp_path, capsys
):
    moved, other, slow = (shutil.copy(data, tmp_path / f"{name}.csv") for name in "abc")
    slow.with_suffix(".json").write_text('{"time_scale": 9}')
    other.write_text(data.read_text().replace(" (2.43h)", " (2.44h)"))
    before, new, folder = contents(tmp_path / "run"), tmp_path / "new", tmp_path / "run/trajectory"
    for flags, named in (
        ("--seed 1 --resume", "--seed"),
        ("--batch_size 4 --resume", "--batch_size"),
        (f"--data_path {other} --resume", folder),
        (f"--data_path {slow} --resume", folder),
        (f"--output_dir {new} --resume", new),
        (f"--log_file {tmp_path}", "--log_file"),
    ):
        assert refused(capsys, [*stopped, *flags.split()], named)
    with locked(folder):  # another run is at work there
        for flags in ([], ["--resume"]):
            assert refused(capsys, [*stopped, *flags], folder)
    assert contents(tmp_path / "run") == before
    assert not new.exists()
    assert trainer.main([*stopped, "--data_path", str(moved), "--resume"]) == 0


@pytest.mark.parametrize(("sent", "code"), [(KeyboardInterrupt, 130), (MemoryError, 3)])
@pytest.mark.parametrize("where", ["make_stage", "announce.log_run_summary", "memory.check_memory"])
def test_a_run_that_never_began_leaves_everything_as_it_was(
    where, sent, code, stopped, tmp_path, monkeypatch, capsys
):
    before = contents(tmp_path / "run")
    monkeypatch.setattr(f"medgemma_trainer.{where}", send(sent))
    assert refused(capsys, [*stopped, "--log_file", "auto"], code=code)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_for_its_owner_alone_and_stays_as_it_is(stage, data, undisturbed, capsys):
    before, folder = contents(undisturbed), undisturbed / stage
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert trainer.main(command(stage, data, folder, "--resume")) == 0
    assert str(folder / stage) in capsys.readouterr().out
    assert contents(undisturbed) == before


@pytest.mark.parametrize("stage", ["trajectory", "generative"])
def test_no_patient_is_in_what_a_run_writes_or_prints(stage, tmp_path, capsys):
    """But for predictions and reports, which are of patients."""
    table = pd.read_csv(SAMPLE, nrows=90, dtype=str)
    table["subject_id"] = "MARKERID" + table["subject_id"]
    table["clinical_context"] += ", MARKERCONTEXT"
    # A value that no coordinate of a picture happens to hold.
    table.loc[7, "clinical_trajectory"] = "731.97319 (0.73197h) -> 24 (9h)"
    path, folder, out = tmp_path / "patients.csv", tmp_path / "run", tmp_path / "run" / "out.csv"
    table.to_csv(path, index=False)
    stop(words := command(stage, path, folder, "--log_file", "auto"), 3)
    kept = contents(folder)
    assert any("/last/" in name for name in kept)
    assert trainer.main([*words, "--resume"]) == 0
    words = ["--predict", "--checkpoint", str(folder / stage), "--data_path", str(path)]
    assert trainer.main([*words, "--predictions", str(out)]) == 0
    printed = "".join(capsys.readouterr())
    assert all(piece in printed for piece in ("rows 90", "train 72", "epoch 2/", "blend"))
    assert not any(mark in printed for mark in ("MARKER", "731.97"))
    of_patients = ("predictions_val.csv", "predictions_test.csv", "out.csv", "_test.jsonl")
    for name, content in (kept | contents(folder)).items():
        shown = any(mark in content for mark in (b"MARKER", b"731.97"))
        assert not shown or name.endswith(of_patients), name
