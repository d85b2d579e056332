"""Runs that are stopped and go on: the same to the last bit, or refused in one line."""

from __future__ import annotations

import errno
import gc
import json
import math
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
from dataset_format import InputError
from faults import main as faults
from faults import result_of

STAGES = {
    "trajectory": ["--trajectory_only", "--trajectory_epochs", "4"],
    "classification": ["--mode", "classification", "--epochs", "3", "--gradient_accumulation", "2"],
    "generative": ["--mode", "generative", "--epochs", "2"],
}
BATCHES = 9
"""Of an epoch: 72 of 90 rows train, 8 at a time."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "patients.csv"
    pd.read_csv(SAMPLE, nrows=90).to_csv(path, index=False)
    return path


def command(stage: str, data: Path, folder: Path, *flags: str) -> list[str]:
    words = [*STAGES[stage], "--data_path", str(data), "--output_dir", str(folder)]
    return [*words, "--model_name", "tiny", "--batch_size", "8", "--log_file", "none", *flags]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder a stage, with a run that nobody stopped."""
    folders = {}
    for stage in STAGES:
        folders[stage] = tmp_path_factory.mktemp(stage) / "run"
        assert trainer.main(command(stage, data, folders[stage])) == 0
    return folders


def at_batch(number: int, what: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen just before so many-th batch of training."""
    count = 0
    iterate = trainer.Loader.__iter__

    def counted(loader: trainer.Loader) -> Iterator[Any]:
        nonlocal count
        for batch in iterate(loader):
            count += loader.batch_sampler.shuffle
            if count == number and loader.batch_sampler.shuffle:
                what()
            yield batch

    monkeypatch.setattr(trainer.Loader, "__iter__", counted)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [1, 5, BATCHES, BATCHES + 1, 14])
def test_a_run_that_is_stopped_goes_on_to_the_same_result(
    stage: str,
    number: int,
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(stage, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_batch(number, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    assert "--resume goes on" in one_line(capsys)
    torch.manual_seed(number)  # whatever the generators hold by now
    assert trainer.main([*words, "--resume"]) == 0
    said = capsys.readouterr().out
    pair = 2 if stage == "classification" else 1  # batches a step: a step is never cut
    epoch, inside = (number - 1) // BATCHES + 1, (number - 1) % BATCHES + 1
    done = min(-(-inside // pair) * pair, BATCHES)
    assert f"going on in epoch {epoch} after {done} of its batches" in said
    assert result_of(tmp_path / "run", stage) == result_of(undisturbed[stage], stage)
    assert not (tmp_path / "run" / stage / trainer.LAST).exists()


class PowerLoss(BaseException):
    """Ends a run without a chance to keep anything."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_of_power_behind_an_epoch_costs_its_validation_alone(
    stage: str,
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise PowerLoss

    words = command(stage, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_batch(BATCHES + 1, fail, patch)
        with pytest.raises(PowerLoss):
            trainer.main(words)
    assert trainer.main([*words, "--resume"]) == 0
    assert f"going on in epoch 1 after {BATCHES} of its batches" in capsys.readouterr().out
    assert result_of(tmp_path / "run", stage) == result_of(undisturbed[stage], stage)


def test_the_seconds_of_an_epoch_count_what_came_before_a_stop(stopped: list[str]) -> None:
    folder = Path(stopped[stopped.index("--output_dir") + 1]) / "trajectory"
    before = trainer.States(folder / trainer.LAST).newest().story["progress"]["seconds"]
    assert before > 0
    assert trainer.main([*stopped, "--resume"]) == 0
    lines = (folder / "history.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["seconds"] > before


def test_a_run_that_is_stopped_while_it_validates_or_writes_goes_on(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("auroc", "baselines", "report_stage"):
        words = command("trajectory", data, tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, lambda *_: send(signal.SIGINT)())
            assert trainer.main(words) == 130
        with monkeypatch.context() as patch:
            steps = steps_kept(patch)
            assert trainer.main([*words, "--resume"]) == 0
        assert bool(steps) == (name == "auroc"), "training that had ended is not kept again"
        expected = result_of(undisturbed["trajectory"], "trajectory")
        assert result_of(tmp_path / name, "trajectory") == expected


def steps_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the list of the steps at which a state is kept, growing as a run goes on."""
    steps: list[int] = []
    keep = trainer.States.keep

    def kept(self: trainer.States, state: trainer.State) -> None:
        steps.append(state.story["average_steps"])
        keep(self, state)
        assert len(self.files()) <= trainer.STATES_KEPT

    monkeypatch.setattr(trainer.States, "keep", kept)
    return steps


def test_states_are_kept_every_so_many_steps_and_change_nothing(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_kept(monkeypatch)
    words = command("trajectory", data, tmp_path / "run", "--save_every", "4")
    assert trainer.main(words) == 0
    ends = [*(BATCHES * k for k in range(1, 5)), BATCHES * 4]  # before validation, and at last
    assert steps == sorted([0, *range(4, 37, 4), *ends])
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_sigusr1_keeps_the_state_and_goes_on(
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = steps_kept(monkeypatch)
    at_batch(5, send(signal.SIGUSR1), monkeypatch)
    assert trainer.main(command("trajectory", data, tmp_path / "run")) == 0
    assert steps[:3] == [0, 5, BATCHES]
    assert "state kept, as SIGUSR1 asked" in capsys.readouterr().out
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_signals_are_the_systems_own_again_afterwards(data: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in trainer.Heed.KNOWN]
    trainer.main(["--data_path", str(tmp_path / "missing.csv")])
    assert [signal.getsignal(number) for number in trainer.Heed.KNOWN] == before


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> list[str]:
    """The command of a run of stage 1 that was stopped in its second epoch."""
    words = command("trajectory", data, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        at_batch(BATCHES + 3, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    return words


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--seed", "1"], "--seed was 0, is 1"),
        (["--encoder_lr", "0.01"], "--encoder_lr was 0.002, is 0.01"),
        (["--trajectory_epochs", "9"], "--trajectory_epochs was 4, is 9"),
    ],
)
def test_another_command_does_not_go_on(
    flags: list[str],
    problem: str,
    stopped: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert trainer.main([*stopped, *flags, "--resume"]) == 2
    assert problem in one_line(capsys)
    assert contents(tmp_path / "run") == before


def test_other_data_do_not_go_on_and_the_same_data_elsewhere_do(
    stopped: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, other = tmp_path / "moved.csv", tmp_path / "other.csv"
    shutil.copy(data, moved)
    other.write_text(data.read_text().replace(" (2.43h)", " (2.44h)"))
    assert other.read_text() != data.read_text()
    capsys.readouterr()
    assert trainer.main([*stopped, "--data_path", str(other), "--resume"]) == 2
    assert "the data are not the same" in one_line(capsys)
    assert trainer.main([*stopped, "--data_path", str(moved), "--resume"]) == 0


def test_a_finished_run_says_so_and_does_nothing(
    data: Path, undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = undisturbed["trajectory"]
    before = contents(folder)
    assert trainer.main(command("trajectory", data, folder, "--resume")) == 0
    assert "finished: nothing left to do" in capsys.readouterr().out
    assert contents(folder) == before


def test_a_run_that_never_began_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main(command("trajectory", data, tmp_path / "run", "--resume")) == 2
    assert "no run was begun" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_new_run_moves_an_unfinished_one_aside_and_says_how_to_go_on(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path / "run" / "trajectory")
    capsys.readouterr()
    assert trainer.main(stopped) == 0
    assert "--resume would have gone on with it" in capsys.readouterr().out
    assert contents(tmp_path / "run" / "trajectory.1") == before


def newest(folder: Path) -> list[Path]:
    return trainer.States(folder / "trajectory" / trainer.LAST).files()[::-1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "link"])
def test_a_damaged_state_gives_way_to_the_one_before(
    damage: str,
    stopped: list[str],
    undisturbed: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = spoil(newest(tmp_path / "run")[0], damage)
    assert trainer.main([*stopped, "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"{path.name}: " in said
    assert "going on from the state before" in said
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


def test_a_state_of_another_format_is_refused_and_left_alone(
    stopped: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = contents(tmp_path / "run")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "STATE_FORMAT", trainer.STATE_FORMAT + 1)
        assert trainer.main([*stopped, "--resume"]) == 2
    assert "a state of format" in one_line(capsys)
    assert contents(tmp_path / "run") == before
    assert trainer.main([*stopped, "--resume"]) == 0


def test_a_state_that_cannot_be_read_is_a_fault_and_left_alone(
    stopped: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before, path = contents(tmp_path / "run"), newest(tmp_path / "run")[0]
    read_bytes = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read_bytes(self)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        assert trainer.main([*stopped, "--resume"]) == 3
    assert path.name in one_line(capsys)
    assert contents(tmp_path / "run") == before
    assert trainer.main([*stopped, "--resume"]) == 0


def test_a_damaged_state_is_none_of_the_two_that_are_kept(
    stopped: list[str], tmp_path: Path
) -> None:
    states = trainer.States(tmp_path / "run" / "trajectory" / trainer.LAST)
    good, bad = states.files()
    spoil(bad, "cut")
    state = states.newest()
    states.keep(state)
    assert states.files()[0] == good
    assert len(states.files()) == trainer.STATES_KEPT
    assert bad not in states.files()


def spoil(path: Path, damage: str) -> Path:
    """Damage a state; give where it lies then."""
    content = bytearray(path.read_bytes())
    if damage == "link":
        elsewhere = path.with_name("elsewhere")
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        return path
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_without_a_whole_state_the_run_is_refused(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in newest(tmp_path / "run"):
        spoil(path, "cut")
    capsys.readouterr()
    assert trainer.main([*stopped, "--resume"]) == 2
    assert "no state is whole" in one_line(capsys)


def test_the_winner_of_a_state_replaces_a_damaged_one(
    stopped: list[str], undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "run" / trainer.TRAJECTORY_FILE).write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:  # no later epoch is to be better
        patch.setattr(trainer, "auroc", lambda scored: 0.0)
        patch.setattr(trainer, "write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert trainer.main([*stopped, "--resume"]) == 130
    trainer.read_trajectory(tmp_path / "run" / trainer.TRAJECTORY_FILE)


def test_a_history_that_is_lost_comes_back_from_the_state(data: Path, tmp_path: Path) -> None:
    """Of a run that ends between its last epoch and its figures: no epoch writes it again."""
    words = command("trajectory", data, tmp_path / "run", "--trajectory_epochs", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_results", lambda *_: send(signal.SIGTERM)())
        assert trainer.main(words) == 143
    history = tmp_path / "run" / "trajectory" / "history.jsonl"
    told = history.read_bytes()
    assert told.count(b"\n") == 2
    history.write_text("damaged")
    assert trainer.main([*words, "--resume"]) == 0
    assert history.read_bytes() == told


def test_leftovers_of_a_killed_run_are_cleaned(stopped: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trajectory"
    left = [folder / ".metrics.json.partial", folder / trainer.LAST / ".x.safetensors.partial"]
    for path in left:
        path.write_text("half")
    (folder / ".best.old").mkdir()
    assert trainer.main([*stopped, "--resume"]) == 0
    assert not any(path.exists() for path in (*left, folder / ".best.old"))


def test_two_runs_do_not_share_a_folder(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    before = contents(folder)
    capsys.readouterr()
    with trainer.locked(folder):
        for words in (stopped, [*stopped, "--resume"]):
            assert trainer.main(words) == 2
            assert "another run is at work there" in one_line(capsys)
    assert contents(folder) == before
    assert trainer.main([*stopped, "--resume"]) == 0  # the lock went with its holder


def test_another_number_of_processes_goes_on_only_when_asked(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    facts = {**json.loads((folder / "run.json").read_text()), "processes": 2}
    facts["facts_sha256"] = trainer.facts_hash(facts)
    (folder / "run.json").write_text(json.dumps(facts))
    states = trainer.States(folder / trainer.LAST)
    state = states.newest()
    states.facts = facts
    tensors = {**state.tensors, "random.1.cpu": state.tensors["random.0.cpu"].clone()}
    states.keep(trainer.State(tensors, {**state.story, "processes": 2}))
    capsys.readouterr()
    assert trainer.main([*stopped, "--resume"]) == 2
    assert "--resume_anyway" in one_line(capsys)
    assert trainer.main([*stopped, "--resume_anyway"]) == 0
    said = capsys.readouterr().out
    assert "not the one of an undisturbed run" in said
    assert "after 6 of its batches" in said  # three of two processes


@pytest.mark.parametrize(("way", "code"), [("--demo", 2), ("--predict", 2), ("--dry_run", 2)])
def test_resume_goes_with_training_alone(
    way: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.main([way, "--resume"]) == code
    assert "do not go together" in one_line(capsys)


def test_several_seeds_go_on_within_a_seed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("trajectory", data, tmp_path / "run", "--seeds", "2")
    with monkeypatch.context() as patch:
        at_batch(4 * BATCHES + 3, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    capsys.readouterr()
    assert trainer.main(words) == 0
    said = capsys.readouterr().out
    assert "already there" in said
    assert "going on in epoch 1 after 3 of its batches" in said


def test_what_a_run_makes_is_for_its_owner_alone(undisturbed: dict[str, Path]) -> None:
    for folder in undisturbed.values():
        for path in (folder, *folder.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_faults_of_every_kind_end_well() -> None:
    assert faults(["--trials", "1", "--stages", "trajectory"]) == 0


def test_another_model_is_refused(stopped: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    args = trainer.resolve(trainer.build_parser().parse_args([*stopped]))
    stage = trainer.trajectory_stage(args, trainer.load_data(args))
    learner = trainer.begin(stage, torch.device("cpu"))
    state = trainer.States(folder / "trajectory" / trainer.LAST).newest()
    name = next(k for k, t in state.tensors.items() if k.startswith("weights.") and len(t) > 1)
    before = [p.clone() for p in stage.model.parameters()]
    for tensors in (
        {**state.tensors, name: torch.zeros(1)},  # which would fit by broadcasting
        {key: tensor for key, tensor in state.tensors.items() if key != name},
        {**state.tensors, "weights.more": torch.zeros(1)},
    ):
        with pytest.raises(InputError, match="another model"):
            trainer.go_on(stage, learner, trainer.State(tensors, state.story), folder)
    first, *rest = state.story["parameters"]
    for parameters in (
        [["other", *first[1:]], *rest],
        [[first[0], 1], *rest],
        rest,
        [*rest, first],
    ):
        story = {**state.story, "parameters": parameters}
        with pytest.raises(InputError, match=r"another model: (encoder|head)\."):
            trainer.go_on(stage, learner, trainer.State(state.tensors, story), folder)
    assert all(torch.equal(a, b) for a, b in zip(stage.model.parameters(), before, strict=True))


def test_two_hundred_epochs_leak_neither_files_nor_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[int, int, int]] = {}
    end_epoch = trainer.end_epoch

    def counted(stage: trainer.Stage, learner: trainer.Learner, *rest: Any) -> None:
        end_epoch(stage, learner, *rest)
        if learner.stopping.epoch in (100, 200):  # caches are warm by the first
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            seen[learner.stopping.epoch] = (
                files,
                len(gc.get_objects()),
                pages * os.sysconf("SC_PAGESIZE"),
            )

    monkeypatch.setattr(trainer, "end_epoch", counted)
    words = command("trajectory", data, tmp_path / "run", "--batch_size", "90", "--patience", "200")
    assert trainer.main([*words, "--trajectory_epochs", "200"]) == 0
    (files, objects, resident), after = seen[100], seen[200]
    assert after[0] == files
    assert after[1] - objects < 10 * 100  # of the log, some an epoch; of a graph, hundreds
    assert after[2] - resident < 8 * 2**20


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{", None, ""])
def test_a_damaged_beginning_is_known_from_the_states_too(
    content: str | None,
    stopped: list[str],
    undisturbed: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run" / "trajectory" / "run.json"
    known = trainer.begun(path.parent)
    changed = path.read_text().replace('"seed": 0', '"seed": 1')
    path.write_text(changed if content is None else content)
    if content == "":
        path.unlink()
    assert trainer.begun(path.parent) == known
    capsys.readouterr()
    assert trainer.main([*stopped, "--seed", "1", "--resume"]) == 2
    assert "--seed was 0, is 1" in one_line(capsys)
    assert trainer.main([*stopped, "--resume"]) == 0
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected
    assert trainer.complete(json.loads(path.read_text()))


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{"])
def test_a_damaged_beginning_without_states_is_named(
    content: str, stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    shutil.rmtree(folder / trainer.LAST)
    (folder / "run.json").write_text(content)
    capsys.readouterr()
    assert trainer.main([*stopped, "--resume"]) == 2
    assert "run.json: damaged" in one_line(capsys)


@pytest.mark.parametrize("key", ["arguments", "data", "results_sha256"])
def test_facts_of_another_shape_are_named(
    key: str, stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    shutil.rmtree(folder / trainer.LAST)
    trainer.write_facts(folder, {**json.loads((folder / "run.json").read_text()), key: [1]})
    capsys.readouterr()
    assert trainer.main([*stopped, "--resume"]) == 2
    assert "run.json: damaged" in one_line(capsys)


def test_a_state_of_another_run_is_refused(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    facts = {**json.loads((folder / "run.json").read_text()), "seed": 5}
    trainer.write_facts(folder, facts)
    capsys.readouterr()
    assert trainer.main([*stopped, "--resume"]) == 2
    assert "a state of another run" in one_line(capsys)


@pytest.mark.parametrize("change", ["moment", "average", "best", "story", "dtype"])
def test_a_state_that_does_not_fit_is_refused_before_it_is_used(
    change: str, stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "trajectory"
    states = trainer.States(folder / trainer.LAST, trainer.begun(folder))
    tensors, story = states.newest()
    first = {part: next(k for k in tensors if k.startswith(part)) for part in ("average", "best")}
    moment = next(key for key in tensors if key.startswith("exp_avg."))
    if change == "moment":  # the optimizer would read beyond its end
        tensors[moment] = torch.zeros(3)
    elif change == "dtype":
        tensors[moment] = tensors[moment].double()
    elif change == "story":
        story = {key: value for key, value in story.items() if key != "average_steps"}
    else:
        del tensors[first[change]]
    states.keep(trainer.State(tensors, story))
    capsys.readouterr()
    assert trainer.main([*stopped, "--resume"]) == 2
    assert "--resume: the state" in one_line(capsys)


def test_a_winner_lost_between_two_renames_comes_back(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(undisturbed["classification"] / "classification", tmp_path / "x"))
    (place / "best").rename(place / ".best.old")
    trainer.clean(place)
    assert trainer.read_sealed(place / "best")


def test_a_signal_between_two_renames_leaves_one_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old").touch()
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name.endswith(trainer.PARTIAL):
            raise trainer.Stopped(signal.SIGTERM)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(trainer.Stopped), trainer.atomic(tmp_path / "best") as temporary:
        temporary.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "old").exists()


def test_a_log_that_cannot_be_opened_moves_nothing_aside(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("trajectory", data, tmp_path / "run", "--trajectory_epochs", "1")
    assert trainer.main(words) == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    (tmp_path / "folder").mkdir()
    assert trainer.main([*words, "--log_file", str(tmp_path / "folder")]) == 2
    assert "--log_file" in one_line(capsys)
    assert contents(tmp_path / "run") == before


def test_a_full_disk_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, trainer.atomic(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write gives it
    assert str(tmp_path / "x") in trainer.fault(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_knows_each_of_its_files(
    stage: str,
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(undisturbed[stage], tmp_path / "run"))
    words = command(stage, data, folder, "--resume")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    names = {path.name for path in files}
    assert {"metrics.json", "history.jsonl", "predictions_test.csv", "report.html"} <= names
    for path in files:
        content = path.read_bytes()
        for spoiled in (content[:-1], content.replace(content[:1], b"~", 1), None):
            path.write_bytes(spoiled) if spoiled is not None else path.unlink()
            capsys.readouterr()
            assert trainer.main(words) == 2
            assert f"is finished, but {path} is missing, or not as it was" in one_line(capsys)
        path.write_bytes(content)
    (folder / stage / "notes.txt").touch()  # the user's own
    assert trainer.main(words) == 0
    assert "notes" not in str(trainer.results_of(folder / stage))


def test_a_run_that_was_killed_before_its_hashes_is_not_finished(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command("trajectory", data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "results_of", lambda folder: send(signal.SIGTERM)())
        assert trainer.main(words) == 143
    (tmp_path / "run" / "trajectory" / "report.html").unlink()
    assert trainer.main([*words, "--resume"]) == 0
    assert (tmp_path / "run" / "trajectory" / "report.html").exists()
    expected = result_of(undisturbed["trajectory"], "trajectory")
    assert result_of(tmp_path / "run", "trajectory") == expected


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("place", ["announce", "begin", "state_of", "tracking", "moves_aside"])
def test_a_run_that_never_began_leaves_everything_as_it_was(
    place: str,
    stop: type[BaseException],
    earlier: bool,
    stopped: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    (folder / "tracker" / "trajectory").mkdir(parents=True)
    (folder / "tracker" / "trajectory" / "events").write_text("of the earlier run")
    if not earlier:
        shutil.rmtree(folder)
        folder.mkdir()
    before = contents(folder)
    assert bool(before) == earlier
    monkeypatch.setattr(trainer, place, lambda *_: (_ for _ in ()).throw(stop))
    capsys.readouterr()
    assert trainer.main([*stopped, "--log_file", "auto"]) == (
        130 if stop is KeyboardInterrupt else 3
    )
    said = one_line(capsys)
    assert stop is MemoryError or "before the first step" in said
    assert contents(folder) == before
    assert bool(list(folder.iterdir())) == earlier


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_signal_while_an_earlier_result_is_set_aside_tears_nothing_apart(
    number: int,
    stopped: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    (folder / "tracker" / "trajectory").mkdir(parents=True)
    before, rename, count = contents(folder), Path.rename, 0

    def signalled(self: Path, target: Path) -> Path:
        nonlocal count
        moved = rename(self, target)
        count += 1
        if count == number:
            send(signal.SIGTERM)()
        return moved

    monkeypatch.setattr(Path, "rename", signalled)
    capsys.readouterr()
    assert trainer.main(stopped) == 143
    assert "before the first step" in one_line(capsys)
    assert count > number
    assert contents(folder) == before


def test_a_link_to_nowhere_is_moved_aside_not_lost(stopped: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "trajectory"
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "not mounted")
    assert trainer.main(stopped) == 0
    assert folder.with_name("trajectory.1").is_symlink()


def test_folder_winner_and_tracker_of_a_run_get_one_number(
    stopped: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / trainer.TRAJECTORY_FILE).unlink()  # as of a run without a winner yet
    assert trainer.main(stopped) == 0
    content = (folder / trainer.TRAJECTORY_FILE).read_bytes()
    assert trainer.main(stopped) == 0
    assert (folder / "trajectory.2" / "metrics.json").exists()
    aside = (folder / trainer.TRAJECTORY_FILE).with_stem("medgemma_trajectory_best.2")
    assert aside.read_bytes() == content


def test_what_was_looked_at_before_going_on_cannot_change_until_then(
    stopped: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    codes = []
    make = trainer.trajectory_stage

    def meanwhile(*given: Any) -> trainer.Stage:
        monkeypatch.setattr(trainer, "trajectory_stage", make)
        codes.append(trainer.main([*stopped, "--seed", "1"]))
        return make(*given)

    monkeypatch.setattr(trainer, "trajectory_stage", meanwhile)
    assert trainer.main([*stopped, "--resume"]) == 0
    assert codes == [2]
    assert json.loads((tmp_path / "run" / "trajectory" / "run.json").read_text())["seed"] == 0


def test_seeds_whose_states_are_all_damaged_begin_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = command("trajectory", data, tmp_path / "run", "--seeds", "2")
    with monkeypatch.context() as patch:
        at_batch(BATCHES + 3, send(signal.SIGTERM), patch)
        assert trainer.main(words) == 143
    for path in newest(tmp_path / "run" / "seed_0"):
        spoil(path, "cut")
    assert trainer.main(words) == 0
    assert "no state is whole" in capsys.readouterr().out


def test_leftovers_beside_a_finished_run_go(
    data: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(undisturbed["trajectory"], tmp_path / "run"))
    left = [folder / "trajectory" / ".metrics.json.partial", folder / "trajectory" / trainer.LAST]
    left[0].write_text("half")
    left[1].mkdir()
    left.append(trainer.partial_of(folder / trainer.TRAJECTORY_FILE))
    left[2].write_text("half")
    assert trainer.main(command("trajectory", data, folder, "--resume")) == 0
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("what", ["link", "unreadable"])
def test_a_result_behind_a_link_or_unreadable_is_not_trusted(
    what: str,
    data: Path,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(undisturbed["trajectory"], tmp_path / "run"))
    path = folder / "trajectory" / "metrics.json"
    if what == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        file_hash = trainer.file_hash

        def refused(asked: Path | None) -> str | None:
            if asked == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return file_hash(asked)

        monkeypatch.setattr(trainer, "file_hash", refused)
    capsys.readouterr()
    assert trainer.main(command("trajectory", data, folder, "--resume")) == 2
    said = one_line(capsys)
    assert str(path) in said
    assert ("cannot be read" in said) == (what == "unreadable")


def test_what_a_tracker_kept_of_an_earlier_run_is_moved_aside_with_it(
    stopped: list[str], tmp_path: Path
) -> None:
    kept = tmp_path / "run" / "tracker" / "trajectory"
    kept.mkdir(parents=True)
    (kept / "events").write_text("of the earlier run")
    assert trainer.main(stopped) == 0
    assert not kept.exists()
    assert (kept.with_name("trajectory.1") / "events").read_text() == "of the earlier run"


def test_a_base_model_that_was_changed_does_not_go_on(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    then = trainer.base_content(str(tmp_path))
    assert then == trainer.base_content(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    now = trainer.base_content(str(tmp_path))
    run = {"arguments": {"model_name": "x"}, "data": {}, "stage_1_sha256": None}
    both = ({**run, "base_revision": None, "base_sha256": content} for content in (then, now))
    assert trainer.differences(*both) == ["--model_name x holds another model or revision"]


@pytest.mark.parametrize("stage", STAGES)
def test_deterministic_changes_nothing_on_the_cpu(
    stage: str, data: Path, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    wanted = []
    with pytest.MonkeyPatch.context() as patch:
        ask = torch.are_deterministic_algorithms_enabled
        at_batch(1, lambda: wanted.append(ask()), patch)
        assert trainer.main(command(stage, data, tmp_path / "run", "--deterministic")) == 0
    assert wanted == [True]
    assert not ask()
    assert result_of(tmp_path / "run", stage) == result_of(undisturbed[stage], stage)


def test_an_epoch_without_a_single_step_has_no_training_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = trainer.take_step

    def without_number(
        learner: trainer.Learner, batch: int, loss: torch.Tensor, *rest: Any
    ) -> None:
        take_step(learner, batch, loss * math.nan, *rest)

    monkeypatch.setattr(trainer, "take_step", without_number)
    words = command("trajectory", data, tmp_path / "run", "--batch_size", "40")
    assert trainer.main([*words, "--trajectory_epochs", "2"]) == 0
    text = (tmp_path / "run" / "trajectory" / "history.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["train_loss"] for line in lines] == [None, None]
    assert [line["skipped_steps"] for line in lines] == [2, 2]


@pytest.mark.parametrize(("ranked", "codes"), [(True, [143]), (False, [-15])])
def test_an_echo_of_a_signal_is_none_of_its_own(
    ranked: bool, codes: list[int], data: Path, tmp_path: Path
) -> None:
    """Where a launcher passes signals on, two at once are one; else the second ends at once."""
    child = os.fork()
    if child == 0:
        if ranked:
            os.environ["LOCAL_RANK"] = "0"
        with pytest.MonkeyPatch.context() as patch:

            def twice() -> None:
                send(signal.SIGTERM)()
                send(signal.SIGTERM)()

            at_batch(3, twice, patch)
            os._exit(trainer.main(command("trajectory", data, tmp_path / "run")))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in codes


def test_memory_that_is_not_there_is_named() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**13)
    assert "too little memory" in trainer.fault(caught.value)


def test_another_revision_of_the_base_model_does_not_go_on() -> None:
    run = {"arguments": {"model_name": "google/x"}, "data": {}, "stage_1_sha256": None}
    run["base_sha256"] = None
    then, now = ({**run, "base_revision": name} for name in ("a", "b"))
    assert trainer.differences(then, then) == []
    assert trainer.differences(then, now) == [
        "--model_name google/x holds another model or revision"
    ]


@pytest.mark.parametrize("stage", STAGES)
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
    told = "".join(capsys.readouterr())
    assert "MARKER" not in told
    assert "731.97" not in told
    of_patients = ("predictions_val.csv", "predictions_test.csv", "out.csv", "_test.jsonl")
    for name, content in (kept | contents(tmp_path / "run")).items():
        if not name.endswith(of_patients):
            assert b"MARKER" not in content, name
            assert b"731.97" not in content, name


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_what_a_winner_says_of_its_adapter_depends_on_no_order_of_hashes(
    stage: str, undisturbed: dict[str, Path]
) -> None:
    """Each process hashes strings in its own way: a set of names would come in another order."""
    path = undisturbed[stage] / stage / "best" / "adapter" / "adapter_config.json"
    modules = json.loads(path.read_text())["target_modules"]
    assert len(modules) == 7
    assert modules == sorted(modules)
