"""Runs of the whole program that are stopped and resumed: the same result, to the last bit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE
from faults import main as fault_trials
from faults import result_of
from medgemma_clinical.commands import results, run_folder
from medgemma_clinical.commands import stages as wiring
from medgemma_clinical.commands.run_folder import checkpoint_store, read_run
from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.training.checkpoint_store import KEPT, CheckpointStore, TrainingCheckpoint
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.signals import KNOWN

STAGES = {
    "trajectory": ["--trajectory_only", "--trajectory_epochs", "4", "--members", "2"],
    "classification": ["--mode", "classification", "--epochs", "3", "--gradient_accumulation", "2"],
    "generative": ["--mode", "generative", "--epochs", "2"],
}
BATCHES = 9
"""Of an epoch: 72 of 90 rows train, 8 at a time."""


@pytest.fixture(autouse=True, scope="module")
def few_draws() -> Iterator[None]:
    """Intervals need not be good here, only the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "REPLICATES", 20)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "patients.csv"
    pd.read_csv(SAMPLE, nrows=90).to_csv(path, index=False)
    return path


def command(stage: str, data: Path, folder: Path, *flags: str) -> list[str]:
    words = [*STAGES[stage], "--data_path", str(data), "--output_dir", str(folder)]
    return [
        *words,
        "--model_name",
        "tiny",
        "--batch_size",
        "8",
        "--log_file",
        "none",
        "--min_cell",
        "0",
        *flags,
    ]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each stage with a run that nobody stopped."""
    folders = {}
    for stage in STAGES:
        folders[stage] = tmp_path_factory.mktemp(stage) / "run"
        assert trainer.main(command(stage, data, folders[stage])) == 0
    return folders


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> list[str]:
    """Return the command of a run of stage 1 that was stopped in its second epoch."""
    words = command("trajectory", data, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        at_batch(BATCHES + 3, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    return words


def at_batch(number: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Call ``action`` just before so many-th batch of training."""
    count = 0
    iterate = LengthBatches.__iter__

    def counted(batches: LengthBatches) -> Iterator[list[int]]:
        nonlocal count
        for batch in iterate(batches):
            count += batches.shuffle
            if count == number and batches.shuffle:
                action()
            yield batch

    patch.setattr(LengthBatches, "__iter__", counted)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files but the locks, which stay."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    return error


def saved_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the steps at which a checkpoint is kept, growing as a run goes on."""
    steps: list[int] = []
    save = CheckpointStore.save

    def saving(store: CheckpointStore, checkpoint: TrainingCheckpoint) -> None:
        steps.append(checkpoint.average_steps)
        save(store, checkpoint)
        assert len(store.files()) <= KEPT

    patch.setattr(CheckpointStore, "save", saving)
    return steps


# --------------------------------------------------------------------------- the same result


@pytest.mark.parametrize(
    ("stage", "number", "sent"),
    [
        *(("trajectory", number, signal.SIGTERM) for number in (1, BATCHES, BATCHES + 1)),
        ("trajectory", 14, signal.SIGHUP),
        ("classification", 5, signal.SIGTERM),
        ("generative", BATCHES + 3, signal.SIGTERM),
    ],
)
def test_a_run_that_is_stopped_resumes_to_the_same_result(
    stage: str,
    number: int,
    sent: int,
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(stage, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_batch(number, send(sent), patch)
        assert trainer.main(words) == 128 + sent
    assert "with --resume continues" in one_line(capsys)
    torch.manual_seed(number)  # whatever the generators hold by now
    assert trainer.main([*words, "--resume"]) == 0
    pair = 2 if stage == "classification" else 1  # batches of a step, which is never cut
    epoch, inside = (number - 1) // BATCHES + 1, (number - 1) % BATCHES + 1
    done = min(-(-inside // pair) * pair, BATCHES)
    assert f"resuming in epoch {epoch} after {done} of its batches" in capsys.readouterr().out
    assert result_of(tmp_path / "run", stage) == result_of(undisturbed[stage], stage)
    assert not (tmp_path / "run" / stage / "last").exists()


class PowerLoss(BaseException):
    """Ends a run without a chance to keep anything."""


def test_a_loss_of_power_behind_an_epoch_costs_its_validation_alone(
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command("trajectory", data, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_batch(BATCHES + 1, raising(PowerLoss), patch)
        with pytest.raises(PowerLoss):
            trainer.main(words)
    assert trainer.main([*words, "--resume"]) == 0
    assert f"resuming in epoch 1 after {BATCHES} of its batches" in capsys.readouterr().out
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


@pytest.mark.parametrize("place", ["validate", "fit_baselines", "write_report", "finish_run"])
def test_a_run_that_is_stopped_while_it_validates_or_writes_resumes(
    place: str,
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = {"validate": trainer, "finish_run": run_folder}.get(place, results)
    words = command("trajectory", data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(module, place, lambda *_, **__: send(signal.SIGINT)())
        assert trainer.main(words) == 130
    (tmp_path / "run" / "trajectory" / "report.html").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        steps = saved_steps(patch)
        assert trainer.main([*words, "--resume"]) == 0
    assert bool(steps) == (place == "validate"), "training that had ended is not kept again"
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected
    assert (tmp_path / "run" / "trajectory" / "report.html").exists()


def test_checkpoints_come_every_so_many_steps_and_change_nothing(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = saved_steps(monkeypatch)
    words = command("trajectory", data, tmp_path / "run", "--save_every", "4")
    assert trainer.main(words) == 0
    ends = [*(BATCHES * k for k in range(1, 5)), BATCHES * 4]  # before validation, and at last
    assert steps == sorted([0, *range(4, 37, 4), *ends])
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_sigusr1_keeps_the_state_and_training_goes_on(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = saved_steps(monkeypatch)
    at_batch(5, send(signal.SIGUSR1), monkeypatch)
    assert trainer.main(command("trajectory", data, tmp_path / "run")) == 0
    assert steps[:3] == [0, 5, BATCHES]
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_deterministic_changes_nothing_on_the_cpu(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    wanted = []
    with pytest.MonkeyPatch.context() as patch:
        enabled = torch.are_deterministic_algorithms_enabled
        at_batch(1, lambda: wanted.append(enabled()), patch)
        words = command("trajectory", data, tmp_path / "run", "--deterministic")
        assert trainer.main(words) == 0
    assert wanted == [True]
    assert not enabled()
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_the_seconds_of_an_epoch_count_what_came_before_a_stop(stopped: list[str]) -> None:
    folder = Path(stopped[stopped.index("--output_dir") + 1]) / "trajectory"
    before = checkpoint_store(folder).newest().progress["seconds"]
    assert before > 0
    assert trainer.main([*stopped, "--resume"]) == 0
    lines = (folder / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["seconds"] > before


def test_a_sample_of_the_fault_trials_ends_well() -> None:
    kinds = ["killed at a write", "killed at any time", "disk full", "file damaged"]
    assert fault_trials(["--trials", "1", "--stages", "trajectory", "--kinds", *kinds]) == 0


# --------------------------------------------------------------------------- what is damaged


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    stopped: list[str],
    undisturbed: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = checkpoint_store(tmp_path / "run" / "trajectory").files()[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert trainer.main([*stopped, "--resume"]) == 0
    assert f"{path.name}: damaged: resuming from the one before" in capsys.readouterr().out
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_best_weights_and_history_come_back_from_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """Of a run that ends between its last epoch and its results: no epoch writes them again."""
    words = command("trajectory", data, tmp_path / "run", "--trajectory_epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_results", lambda *_: send(signal.SIGTERM)())
        assert trainer.main(words) == 143
        history = tmp_path / "run" / "trajectory" / "history.jsonl"
        best = tmp_path / "run" / TRAJECTORY_FILE
        written, weights = history.read_bytes(), read_trajectory(best).weights
        assert written.count(b"\n") == 2
        history.write_text("damaged")
        best.write_text("damaged")
        assert trainer.main([*words, "--resume"]) == 143
    assert history.read_bytes() == written
    again = read_trajectory(best).weights
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


# --------------------------------------------------------------------------- what is refused


def test_another_command_or_other_data_are_refused_and_nothing_changes(
    stopped: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, other, slow = (tmp_path / f"{name}.csv" for name in ("moved", "other", "slow"))
    shutil.copy(data, moved)
    shutil.copy(data, slow)
    slow.with_suffix(".json").write_text('{"time_scale": 9}')
    other.write_text(data.read_text().replace(" (2.43h)", " (2.44h)"))
    assert other.read_text() != data.read_text()
    before = contents(tmp_path / "run")
    for flags, problem in (
        (["--seed", "1"], "--seed was 0, is 1"),
        (["--encoder_lr", "0.01"], "--encoder_lr was 0.002, is 0.01"),
        (["--data_path", str(other)], "the data are not the same"),
        (["--data_path", str(slow)], "the time scale was 72.0, is 9.0"),
        (["--output_dir", str(tmp_path / "new")], "no run was begun"),
    ):
        capsys.readouterr()
        assert trainer.main([*stopped, *flags, "--resume"]) == 2
        assert problem in one_line(capsys)
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()
    assert trainer.main([*stopped, "--data_path", str(moved), "--resume"]) == 0


def test_two_runs_do_not_share_a_folder(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    before, run = contents(folder), read_run(folder)
    assert run is not None
    capsys.readouterr()
    with run_folder.resume_run(folder, run):
        codes = [trainer.main(words) for words in (stopped, [*stopped, "--resume"])]
    assert codes == [2, 2]
    assert capsys.readouterr().err.count("another run is at work there") == 2
    assert contents(folder) == before


def test_a_finished_run_says_so_and_does_nothing(
    data: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = undisturbed["trajectory"]
    before = contents(folder)
    assert trainer.main(command("trajectory", data, folder, "--resume")) == 0
    assert "finished: nothing left to do" in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize("way", ["--demo", "--predict", "--dry_run"])
def test_resume_goes_with_training_alone(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main([way, "--resume"]) == 2
    assert "do not go together" in one_line(capsys)


# --------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "place",
    [
        "commands.stages.make_stage",
        "commands.announce.announce",
        "training.train_state.set_up_training",
        "training.trackers.tracking",
    ],
)
def test_a_run_that_never_began_leaves_everything_as_it_was(
    place: str,
    stop: type[BaseException],
    stopped: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(tmp_path / "run")
    monkeypatch.setattr(f"medgemma_clinical.{place}", raising(stop))
    capsys.readouterr()
    code = trainer.main([*stopped, "--log_file", "auto"])
    assert code == (130 if stop is KeyboardInterrupt else 3)
    one_line(capsys)
    assert contents(tmp_path / "run") == before


def test_a_log_that_cannot_be_opened_moves_nothing_aside(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert trainer.main([*stopped, "--log_file", str(tmp_path)]) == 2
    assert "--log_file" in one_line(capsys)
    assert contents(tmp_path / "run") == before


def test_signals_are_the_systems_own_again_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in KNOWN]
    trainer.main(["--data_path", str(tmp_path / "missing.csv")])
    assert [signal.getsignal(number) for number in KNOWN] == before


def test_a_run_is_for_its_owner_alone(undisturbed: dict[str, Path]) -> None:
    for folder in undisturbed.values():
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("stage", ["trajectory", "generative"])
def test_no_patient_is_in_what_a_run_writes_or_prints(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for predictions and reports, which are of patients."""
    table = pd.read_csv(SAMPLE, nrows=90, dtype=str)
    table["subject_id"] = "MARKERID" + table["subject_id"]
    table["clinical_context"] += ", MARKERCONTEXT"
    # A value that no coordinate of a picture happens to hold.
    table.loc[7, "clinical_trajectory"] = "731.97319 (0.73197h) -> 24 (9h)"
    path = tmp_path / "patients.csv"
    table.to_csv(path, index=False)
    words = command(stage, path, tmp_path / "run")
    words[words.index("--log_file") + 1] = "auto"
    with pytest.MonkeyPatch.context() as patch:
        at_batch(3, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    kept = contents(tmp_path / "run")
    assert any("/last/" in name for name in kept)
    assert trainer.main([*words, "--resume"]) == 0
    checkpoint, out = tmp_path / "run" / stage, tmp_path / "run" / "out.csv"
    words = ["--predict", "--checkpoint", str(checkpoint), "--data_path", str(path)]
    assert trainer.main([*words, "--predictions", str(out)]) == 0
    table.loc[5, "clinical_trajectory"] = "MARKERVALUE"
    table.to_csv(path, index=False)
    assert trainer.main([*words, "--predictions", str(out), "--strict"]) == 2
    printed = "".join(capsys.readouterr())
    assert "MARKER" not in printed
    assert "731.97" not in printed
    of_patients = ("predictions_val.csv", "predictions_test.csv", "out.csv", "_test.jsonl")
    for name, content in (kept | contents(tmp_path / "run")).items():
        if not name.endswith(of_patients):
            assert b"MARKER" not in content, name
            assert b"731.97" not in content, name


def test_sixty_epochs_leak_neither_files_nor_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[int, int, int]] = {}
    end_epoch = trainer.end_epoch

    def counted(stage: Any, state: Any, *rest: Any) -> None:
        end_epoch(stage, state, *rest)
        if state.stopping.epoch in (30, 60):  # caches are warm by the first
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGESIZE")
            files = len(os.listdir("/proc/self/fd"))
            seen[state.stopping.epoch] = (files, len(gc.get_objects()), resident)

    monkeypatch.setattr(trainer, "end_epoch", counted)
    words = command("trajectory", data, tmp_path / "run", "--batch_size", "90", "--patience", "60")
    assert trainer.main([*words, "--trajectory_epochs", "60"]) == 0
    (files, objects, resident), after = seen[30], seen[60]
    assert after[0] == files
    assert after[1] - objects < 10 * 30  # of the log, some an epoch; of a graph, hundreds
    assert after[2] - resident < 8 * 2**20


def test_the_revision_that_loading_brings_into_the_cache_is_the_runs_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run with a hub model downloads it: before that no revision is known."""
    cache: list[str] = []
    load: Any = wiring.load_language_model

    def download(*given: Any, **words: Any) -> Any:
        cache.append("commit")
        return load(*given, **words)

    monkeypatch.setattr(wiring, "load_language_model", download)
    revision = lambda name: cache[0] if cache else None  # noqa: E731
    monkeypatch.setattr(run_folder, "cached_revision", revision)
    words = command("classification", data, tmp_path / "run", "--epochs", "1")
    with pytest.MonkeyPatch.context() as patch:
        at_batch(3, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    run = read_run(tmp_path / "run" / "classification")
    assert run is not None
    assert run["base_revision"] == "commit"
    assert trainer.main([*words, "--resume"]) == 0
