"""A stage's folder: begun late, held alone, resumed by the same command, whole when finished."""

import contextlib
import os
import shutil
import signal

import pytest

import medgemma_trainer  # noqa: F401, its flags
from medgemma_clinical.commands.run_folder import (
    FREE,
    RUN_FORMAT,
    finish_run,
    is_finished,
    opened,
    progress_in,
    read_run,
    state_folder,
)
from medgemma_clinical.files import InputError, partial_path, write_json
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.training.state import STATE_FILE, has_state, write_state


def facts_of(**arguments):
    arguments = {"seed": 0, "output_dir": "a", "encoder_lr": None, "model_name": "m", **arguments}
    numbers = {"format": RUN_FORMAT, "processes": 1, "rows_a_step": 16, "time_scale": 72.0}
    hashes = {"stage_1_sha256": None, "base_revision": None, "base_sha256": None}
    hashes["text_encoder"] = {}
    software = {"versions": {"torch": "2.5"}, "code_sha256": "c"}
    return {"arguments": arguments, "data": {"data_sha256": "d"}, **numbers, **hashes, **software}


FACTS = facts_of()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "trajectory"


def run_steps(folder):
    """Do what training does in a folder: write the best, history and states."""
    (folder.parent / TRAJECTORY_FILE).write_text("best")
    (folder / "history.jsonl").write_text("{}\n")
    for step in range(2):
        write_state(state_folder(folder), {"step": step, "epochs": []})


def begin(folder, facts=FACTS, *, resume=False):
    """Hold a folder for a new run."""
    return opened(folder, facts, resume=resume, log_file="none", report_to="none")


def resume(folder, facts=FACTS):
    """Hold a folder for a run that goes on."""
    return begin(folder, facts, resume=True)


@pytest.fixture
def stopped(folder):
    """A folder with a run that was stopped after two states."""
    with contextlib.suppress(KeyboardInterrupt), begin(folder):
        run_steps(folder)
        raise KeyboardInterrupt
    return folder


@pytest.fixture
def finished(folder):
    """A folder with a finished run, its tracker's files beside it."""
    with begin(folder):
        run_steps(folder)
        (folder / "metrics.json").write_text("{}")
        (folder / "best").mkdir()
        (folder / "best" / "config.json").write_text("{}")
        (folder.parent / "tracker" / "trajectory").mkdir(parents=True)
        (folder.parent / "tracker" / "trajectory" / "events").write_text("of the earlier run")
        finish_run(folder, 12.0)
    return folder


def contents(folder):
    """Return all files but the locks, which stay."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def refused(folder, facts, *named):
    before = contents(folder.parent) if folder.parent.exists() else None
    with pytest.raises(InputError) as error:
        is_finished(folder, facts)
    assert all(str(name) in str(error.value) for name in named)
    assert (contents(folder.parent) if folder.parent.exists() else None) == before


def test_a_finished_run_leaves_its_facts_and_has_nothing_left_to_do(finished):
    run = read_run(finished)
    assert {key: run[key] for key in FACTS} == FACTS
    assert run["cost"]["tokens"] == 12.0
    assert run["cost"]["memory_mib"] > 1
    (finished / "last").mkdir()  # killed before it was removed
    (finished / "notes.txt").touch()  # the user's own
    assert is_finished(finished, FACTS)
    assert not (finished / "last").exists()


def test_folder_best_and_tracker_of_an_earlier_run_get_one_number(finished, caplog):
    caplog.set_level("INFO")
    (finished.parent / "medgemma_trajectory_best.1.pt").write_text("of the run before")
    before = contents(finished)
    with begin(finished):
        assert [p.name for p in finished.iterdir()] == ["run.json"]
        assert not (finished.parent / "tracker" / "trajectory").exists()
        run_steps(finished)
    aside = finished.with_name("trajectory.2")
    assert contents(aside) == before
    assert [r.getMessage() for r in caplog.records] == [f"earlier result moved to {aside}"]
    assert (finished.parent / "medgemma_trajectory_best.2.pt").read_text() == "best"
    assert (finished.parent / "tracker" / "trajectory.2" / "events").exists()


@pytest.mark.parametrize("way", [begin, resume])
def test_two_runs_do_not_share_a_folder(way, stopped):
    before = contents(stopped.parent)
    with resume(stopped):
        with pytest.raises(InputError, match="trajectory"), way(stopped):
            pytest.fail("the run does not begin")
        with begin(stopped.with_name("classification")):  # another stage may run beside
            shutil.rmtree(stopped.with_name("classification"))
    assert contents(stopped.parent) == before


def test_a_run_that_was_killed_frees_the_folder(folder):
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
        assert has_state(state_folder(folder))


def test_a_run_that_never_began_is_not_resumed_and_nothing_is_made(folder):
    refused(folder, FACTS, folder)
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    write_json(folder / "run.json", FACTS)  # as of a run that was killed before its first state
    refused(folder, FACTS, folder)


DIFFERENCES = {
    "--seed": {"arguments": facts_of(seed=1)["arguments"]},
    "--encoder_lr": {"arguments": facts_of(encoder_lr=0.1)["arguments"]},
    "--ode_checkpoint": {"stage_1_sha256": "x"},
    "--model_name": {"base_revision": "x", "base_sha256": "x"},
    "--gradient_accumulation": {"rows_a_step": 8},
    "processes": {"processes": 2},
    "data": {"data": {}},
    "time scale": {"time_scale": 9.0},
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_command_is_refused_with_what_differs(name, stopped, caplog):
    refused(stopped, {**FACTS, **DIFFERENCES[name]}, name)
    assert progress_in(stopped, {**FACTS, **DIFFERENCES[name]}) == "none"
    assert not caplog.records, "no fault of the user: the result is moved aside"


def test_flags_that_change_no_result_are_free_and_other_versions_are_warned_of(stopped, caplog):
    facts = facts_of(**dict.fromkeys(FREE, "changed"))
    assert not is_finished(stopped, facts)
    assert progress_in(stopped, facts) == "part"
    assert not caplog.records
    assert not is_finished(stopped, {**FACTS, "versions": {"torch": "3.0"}})
    assert "versions" in caplog.text
    assert progress_in(stopped, {**FACTS, "versions": {"torch": "3.0"}}) == "none"


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{", "", '{"format": 1}'])
def test_a_damaged_run_json_is_named(content, stopped):
    (stopped / "run.json").write_text(content)
    refused(stopped, FACTS, "run.json")
    assert progress_in(stopped, FACTS) == "none"
    with begin(stopped):
        run_steps(stopped)
    assert read_run(stopped) == FACTS


@pytest.mark.parametrize("way", [begin, resume])
def test_what_killed_runs_left_half_written_goes(way, stopped):
    left = [stopped / ".metrics.json.partial", stopped / "last" / ".x.pt.partial"]
    for path in (*left, partial_path(stopped.parent / TRAJECTORY_FILE)):
        path.write_text("half")
    (stopped / ".best.old").mkdir()
    (stopped / ".best.old" / "config.json").touch()
    with way(stopped):
        run_steps(stopped)
    assert not list(stopped.parent.rglob(".*")), "in a folder that was moved aside neither"
    (config,) = stopped.parent.rglob("config.json")
    assert config.parent.name == "best", "killed between two renames"


def test_a_finished_run_knows_each_of_its_files(finished, caplog):
    files = [finished.parent / TRAJECTORY_FILE, finished / "best" / "config.json"]
    for path in (*files, finished / "metrics.json", finished / "history.jsonl"):
        content = path.read_bytes()
        for spoil in (lambda path: path.write_bytes(b"x"), os.unlink):
            spoil(path)
            refused(finished, FACTS, path)
            assert progress_in(finished, FACTS) == "none"
            assert caplog.messages.pop().startswith(str(path))
        path.write_bytes(content)
        assert progress_in(finished, FACTS) == "all"


def test_progress_is_none_part_or_all(folder, caplog):
    assert progress_in(folder, FACTS) == "none"
    with begin(folder):
        run_steps(folder)
        assert progress_in(folder, FACTS) == "part"
        assert not caplog.text
        (state_folder(folder) / STATE_FILE).write_bytes(b"damaged")
        assert progress_in(folder, FACTS) == "none"
        assert STATE_FILE in caplog.text
