"""A stage's folder: begun late, held alone, resumed by the same command, whole when finished."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medgemma_clinical.commands import run_folder
from medgemma_clinical.commands.run_folder import (
    check_resumable,
    describe_stop,
    differences,
    finish_run,
    folder_identity,
    is_complete,
    is_finished,
    opened,
    progress_of,
    read_run,
    state_store,
    write_run,
)
from medgemma_clinical.files import InputError, partial_path
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.training.signals import SIGNALS, Stopped


def facts_of(**arguments: Any) -> dict[str, Any]:
    return {
        "format": run_folder.RUN_FORMAT,
        "arguments": {"seed": 0, "output_dir": "a", "deterministic": False, **arguments},
        "versions": {"torch": "2.5"},
        "code_sha256": "c",
        "processes": 1,
        "rows_a_step": 16,
        "stage_1_sha256": None,
        "base_revision": None,
        "base_sha256": None,
        "device": "cpu",
        "data": {"data_sha256": "d"},
        "time_scale": 72.0,
    }


FACTS = facts_of()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "trajectory"


def run_steps(folder: Path, steps: int = 2) -> None:
    """Do what training does in a folder: write the best, history and checkpoints."""
    (folder.parent / TRAJECTORY_FILE).write_text("best")
    (folder / "history.jsonl").write_text("{}\n")
    for step in range(steps):
        state_store(folder).save({"step": step})


def begin(folder, facts=FACTS, *, resume=False):
    """Hold a folder for a new run."""
    args = Namespace(resume=resume, log_file="none", report_to="none", dry_run=False)
    return opened(args, folder, facts)


def resume(folder, facts=FACTS):
    """Hold a folder for a run that goes on."""
    return begin(folder, facts, resume=True)


@pytest.fixture
def stopped(folder: Path) -> Path:
    """A folder with a run that was stopped after two checkpoints."""
    with contextlib.suppress(KeyboardInterrupt), begin(folder):
        run_steps(folder)
        raise KeyboardInterrupt
    return folder


@pytest.fixture
def finished(folder: Path) -> Path:
    """A folder with a finished run, its tracker's files beside it."""
    with begin(folder):
        run_steps(folder)
        (folder / "metrics.json").write_text("{}")
        (folder / "best").mkdir()
        (folder / "best" / "config.json").write_text("{}")
        tracker = folder.parent / "tracker" / "trajectory"
        tracker.mkdir(parents=True)
        (tracker / "events").write_text("of the earlier run")
        finish_run(folder, 12.0)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files but the locks, which stay."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def raised_in(stop: type[BaseException], block: Any) -> None:
    with block:
        raise stop


# --------------------------------------------------------------------------- a new run


def test_a_run_holds_its_folder_and_leaves_its_facts(folder: Path) -> None:
    with begin(folder):
        assert not is_complete(folder)
        run_steps(folder)
        finish_run(folder, 12.0)
    run = read_run(folder)
    assert run is not None
    assert {key: run[key] for key in FACTS} == FACTS
    assert set(run["results_sha256"]) == {"trajectory/history.jsonl", TRAJECTORY_FILE}
    assert run["cost"]["tokens"] == 12.0
    assert run["cost"]["memory_mib"] > 1
    assert is_complete(folder)
    assert not state_store(folder).folder.exists()


def test_folder_best_and_tracker_of_an_earlier_run_get_one_number(finished: Path) -> None:
    (finished.parent / "medgemma_trajectory_best.1.pt").write_text("of the run before")
    before = contents(finished)
    with begin(finished):
        assert [p.name for p in finished.iterdir()] == ["run.json"]
        assert not (finished.parent / "tracker" / "trajectory").exists()
        run_steps(finished)
    assert contents(finished.with_name("trajectory.2")) == before
    assert (finished.parent / "medgemma_trajectory_best.2.pt").read_text() == "best"
    assert (finished.parent / "tracker" / "trajectory.2" / "events").exists()


def test_an_unfinished_run_is_moved_aside_with_a_hint(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = contents(stopped)
    with begin(stopped):
        run_steps(stopped)
    assert "--resume would have continued it" in caplog.text
    assert contents(stopped.with_name("trajectory.1")) == before


def test_a_link_to_nowhere_is_moved_aside_not_lost(folder: Path, tmp_path: Path) -> None:
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "not mounted")
    with begin(folder):
        run_steps(folder)
    assert folder.with_name("trajectory.1").is_symlink()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError, InputError])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_that_ends_before_its_first_checkpoint_leaves_everything_as_it_was(
    stop: type[BaseException], earlier: bool, finished: Path
) -> None:
    if not earlier:
        shutil.rmtree(finished.parent)
    before, identity = contents(finished.parent), folder_identity(finished)
    error = (lambda: InputError("x")) if stop is InputError else stop

    def work() -> None:
        with begin(finished):
            (finished / "train.log").write_text("x")
            (finished.parent / TRAJECTORY_FILE).write_text("half")
            (finished.parent / "tracker" / "trajectory").mkdir(parents=True)
            raise error()

    with pytest.raises(stop):
        work()
    assert contents(finished.parent) == before
    assert folder_identity(finished) == identity
    assert (finished.parent / "tracker").exists() == earlier


def test_after_its_first_checkpoint_a_run_stays(stopped: Path) -> None:
    assert len(state_store(stopped).files()) == 2
    assert read_run(stopped)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("fault", ["signal", "disk", "disk, then signal"])
def test_a_fault_while_an_earlier_result_is_moved_tears_nothing_apart(
    number: int, fault: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename, count = contents(finished.parent), Path.rename, 0

    def disturbed(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number and fault != "signal":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        moved = rename(self, target)
        if count == number + (fault != "signal") and fault != "disk":  # else while it is restored
            os.kill(os.getpid(), signal.SIGTERM)
        return moved

    monkeypatch.setattr(Path, "rename", disturbed)
    expected = Stopped if fault == "signal" or (fault != "disk" and number > 1) else InputError
    with SIGNALS.installed(), pytest.raises(expected), begin(finished):
        pytest.fail("the run does not begin")
    assert count >= number
    assert contents(finished.parent) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"^--output_dir .*file: (File exists|Not a directory)$"),
        begin(tmp_path / "file" / "trajectory"),
    ):
        pytest.fail("the run does not begin")


# --------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize("way", [begin, resume])
def test_two_runs_do_not_share_a_folder(way: Callable[..., Any], stopped: Path) -> None:
    before = contents(stopped.parent)
    with resume(stopped):
        assert state_store(stopped).files()
        with pytest.raises(InputError, match="another run is at work there"):
            raised_in(AssertionError, way(stopped))
        other = stopped.with_name("classification")  # another stage may run beside
        with pytest.raises(ZeroDivisionError):
            raised_in(ZeroDivisionError, begin(other))
    assert contents(stopped.parent) == before
    with resume(stopped):
        assert state_store(stopped).files()


def test_a_run_that_was_killed_frees_the_folder(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            with begin(folder):
                run_steps(folder)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with resume(folder):
        assert state_store(folder).files()


# --------------------------------------------------------------------------- resume


def refused(folder: Path, facts: dict[str, Any], match: str) -> None:
    before = contents(folder.parent) if folder.parent.exists() else None
    with pytest.raises(InputError, match=match):
        is_finished(folder, facts)
    assert (contents(folder.parent) if folder.parent.exists() else None) == before


def test_a_run_that_never_began_is_not_resumed_and_nothing_is_made(folder: Path) -> None:
    refused(folder, FACTS, "no run was begun in")
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    write_run(folder, FACTS)  # as of a run that was killed before its first checkpoint
    refused(folder, FACTS, "no run was begun in")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arguments": facts_of(seed=1)["arguments"]}, "--seed was 0, is 1"),
        ({"arguments": facts_of(encoder_lr=0.1)["arguments"]}, "--encoder_lr was None, is 0.1"),
        ({"data": {}}, "the data are not the same"),
        ({"stage_1_sha256": "x"}, "--ode_checkpoint is another file"),
        ({"base_revision": "x"}, "--model_name m holds another model or revision"),
        ({"time_scale": 9.0}, "the time scale was 72.0, is 9.0"),
        ({"base_sha256": "x"}, "--model_name m holds another model or revision"),
        ({"processes": 2}, "begun with 1 processes, now 2"),
        ({"rows_a_step": 8}, "--batch_size times --gradient_accumulation was 16, is 8"),
    ],
)
def test_another_command_is_refused_with_what_differs(
    changes: dict[str, Any], problem: str, stopped: Path
) -> None:
    facts = {**FACTS, **changes}
    facts["arguments"] = {"model_name": "m", **facts["arguments"]}
    write_run(stopped, {**FACTS, "arguments": {"model_name": "m", **FACTS["arguments"]}})
    assert differences(FACTS, FACTS) == []
    refused(stopped, facts, problem)


def test_flags_that_change_no_result_are_free(stopped: Path) -> None:
    facts = facts_of(output_dir="b", data_path="moved", resume=True, save_every=3, batch_size=3)
    assert not is_finished(stopped, facts)
    with resume(stopped, facts):
        assert state_store(stopped).files()


@pytest.mark.parametrize(("device", "differ"), [("cpu", 0), ("cuda:0", 1)])
def test_deterministic_matters_on_a_gpu_alone(device: str, differ: int) -> None:
    known, now = ({**facts_of(deterministic=d), "device": device} for d in (False, True))
    assert len(differences(known, now)) == differ


def test_other_versions_are_warned_of(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not is_finished(stopped, {**FACTS, "versions": {"torch": "3.0"}})
    assert "versions" in caplog.text


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{", None, ""])
def test_a_damaged_run_json_is_named(content: str | None, stopped: Path) -> None:
    path = stopped / "run.json"
    changed = path.read_text().replace('"seed": 0', '"seed": 1')
    path.write_text(changed if content is None else content)
    refused(stopped, FACTS, r"run\.json: damaged: start again without --resume")
    with begin(stopped):  # as the message says
        run_steps(stopped)
    assert read_run(stopped)


@pytest.mark.parametrize("way", [begin, resume])
def test_what_killed_runs_left_half_written_goes(way: Callable[..., Any], stopped: Path) -> None:
    left = [stopped / ".metrics.json.partial", stopped / "last" / ".x.pt.partial"]
    left.append(partial_path(stopped.parent / TRAJECTORY_FILE))
    for path in left:
        path.write_text("half")
    (stopped / ".best.old").mkdir()
    (stopped / ".best.old" / "config.json").touch()
    with way(stopped):
        run_steps(stopped)
    hidden = [path for path in stopped.parent.rglob(".*") if path.suffix != ".lock"]
    assert not hidden, "in a folder that was moved aside neither"
    (config,) = stopped.parent.rglob("config.json")
    assert config.parent.name == "best", "killed between two renames"


# --------------------------------------------------------------------------- a finished run


def test_a_finished_run_has_nothing_left_to_do(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (finished / "last").mkdir()  # killed before it was removed
    (finished / "notes.txt").touch()  # the user's own
    assert is_finished(finished, FACTS)
    assert str(finished) in caplog.text
    assert not (finished / "last").exists()


def test_a_finished_run_knows_each_of_its_files(finished: Path) -> None:
    files = [finished.parent / TRAJECTORY_FILE, finished / "best" / "config.json"]
    files += [finished / "metrics.json", finished / "history.jsonl"]
    for path in files:
        content = path.read_bytes()
        for spoiled in (content[:-1], None):
            path.write_bytes(spoiled) if spoiled is not None else path.unlink()
            refused(finished, FACTS, f"finished, but {path} is missing or was changed")
        path.write_bytes(content)
        check_resumable(finished, FACTS)  # whole again
        assert is_complete(finished)


# --------------------------------------------------------------------------- several runs


def test_progress_is_none_part_or_all(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert progress_of(folder, FACTS) == "none"
    with begin(folder):
        assert progress_of(folder, FACTS) == "none"
        run_steps(folder)
        assert progress_of(folder, FACTS) == "part"
        assert not caplog.text
        for path in state_store(folder).files():
            path.write_bytes(b"damaged")
        assert progress_of(folder, FACTS) == "none"
        assert "no intact state" in caplog.text
        finish_run(folder, 12.0)
    assert progress_of(folder, FACTS) == "all"
    (folder / "history.jsonl").unlink()
    assert progress_of(folder, FACTS) == "none"


@pytest.mark.parametrize(
    "change", [{"code_sha256": "x"}, {"versions": {}}, {"processes": 2}, {"data": {}}]
)
def test_a_run_of_other_code_versions_processes_or_data_is_no_progress(
    change: dict[str, Any], finished: Path
) -> None:
    assert progress_of(finished, {**FACTS, **change}) == "none"


def test_a_stop_is_described_by_what_was_reached(finished: Path, stopped: Path) -> None:
    assert "nothing was changed" in describe_stop(stopped, began=False)
    text = describe_stop(stopped, began=True)
    assert text.count("\n") == 0
    assert "best weights so far are in" in text
    assert "no test figures" in text
    assert "the same command with --resume continues" in text
    (stopped / "metrics.json").touch()
    shutil.rmtree(stopped / "last")
    (stopped.parent / TRAJECTORY_FILE).unlink()
    text = describe_stop(stopped, began=True)
    assert "no weights yet" in text
    assert "test figures are written" in text
    assert "--resume" not in text


def test_the_weights_of_stage_1_are_not_those_of_a_later_stage(stopped: Path) -> None:
    later = stopped.with_name("classification")
    later.mkdir()
    assert (stopped.parent / TRAJECTORY_FILE).exists()
    assert "no weights yet" in describe_stop(later, began=True)


def test_a_run_of_an_older_version_is_refused_as_such(stopped: Path) -> None:
    write_run(stopped, {key: value for key, value in FACTS.items() if key != "format"})
    with pytest.raises(InputError, match="of another version: start again without --resume"):
        read_run(stopped)
    assert progress_of(stopped, FACTS) == "none"


def test_run_json_is_plain_and_hashes_its_content(stopped: Path) -> None:
    run = json.loads((stopped / "run.json").read_text())
    assert run.pop("facts_sha256") == run_folder.json_hash(run)
    assert run == FACTS
