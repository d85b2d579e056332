"""Files that lie in the way, planted or by mishap: none is changed, none ends a run late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import medgemma_trainer as trainer
from medgemma_clinical.commands.logs import LOG_MARK
from medgemma_clinical.files import locked

ROOT = Path(trainer.__file__).parent


@pytest.fixture
def data(dka_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    path.write_bytes(dka_file.read_bytes())
    return path


def words(data: Path, log: Path) -> list[str]:
    flags = ["--trajectory_only", "--trajectory_epochs", "1", "--data_path", str(data)]
    flags += ["--min_cell", "0"]
    return [*flags, "--output_dir", str(data.parent / "run"), "--log_file", str(log)]


def plant(kind: str, data: Path) -> Path:
    """Put something where the log is to be written; return the place."""
    log = data.parent / "own.log"
    match kind:
        case "the data":
            return data
        case "a link":
            log.symlink_to(data)
        case "a link to nothing":
            log.symlink_to(data.parent / "elsewhere")
        case "a link to a log":
            (data.parent / "first.log").write_text(LOG_MARK)
            log.symlink_to(data.parent / "first.log")
        case "a second name":
            log.write_text(LOG_MARK)
            os.link(log, data.parent / "first.log")
        case "an empty file":
            log.touch()
        case "a pipe":
            os.mkfifo(log)
        case "a folder":
            log.mkdir()
        case "a device":
            return Path(os.devnull)
    return log


LINKS = ("a link", "a link to nothing", "a link to a log", "a second name")


@pytest.mark.parametrize(
    "kind", ["the data", *LINKS, "an empty file", "a pipe", "a folder", "a device"]
)
def test_a_log_goes_into_nothing_but_a_log(
    kind: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = plant(kind, data)
    before = sorted(data.parent.iterdir())
    content = {path: path.read_bytes() for path in before if path.is_file()}
    assert trainer.main(words(data, log)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: --log_file {log}: ")
    assert sorted(data.parent.iterdir()) == before
    assert all(path.read_bytes() == text for path, text in content.items())


def test_a_new_log_is_for_its_owner_alone_and_the_next_run_appends(data: Path) -> None:
    log = data.parent / "own.log"
    for runs in (1, 2):
        assert trainer.main(words(data, log)) == 0
        text = log.read_text()
        assert text.startswith(LOG_MARK)
        assert text.count(LOG_MARK) == 1
        assert text.count("epoch 1/1") == runs
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_names_no_folder_and_the_console_does(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user = data.parent / "Jane Doe" / "study"
    user.mkdir(parents=True)
    data = data.rename(user / "data.csv")
    assert trainer.main(words(data, user / "own.log")) == 0
    text = (user / "own.log").read_text()
    assert "report: report.html; peak memory" in text
    assert "Jane" not in text
    assert str(data.parent.parent.parent) not in text
    assert f"report: {user}/run/trajectory/report.html; peak memory" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["kept", "missing"])
def test_a_link_in_the_place_of_a_lock_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".run.lock").symlink_to(tmp_path / target)
    with pytest.raises(OSError, match=r"\.run\.lock"), locked(tmp_path / "run"):
        pytest.fail("the lock is not taken")
    assert (tmp_path / "kept").read_text() == "kept"
    assert not (tmp_path / "missing").exists()


def test_a_link_in_the_place_of_a_lock_ends_a_run_with_one_line(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data.parent / "run"
    run.mkdir()
    (run / ".trajectory.lock").symlink_to(data.parent / "elsewhere")
    assert trainer.main(words(data, data.parent / "own.log")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in run.iterdir()] == [".trajectory.lock"]
    assert not (data.parent / "elsewhere").exists()


HOSTILE_STYLE = """
text.usetex: True
svg.fonttype: path
font.size: 400
figure.dpi: banana
savefig.format: nonsense
savefig.bbox: tight
axes.prop_cycle: cycler("linestyle", ["-", ":"])
no.such.key: 1
"""


def start(folder: Path, data: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "medgemma_trainer.py"), *words(data, folder / "own.log")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_matplotlibrc_in_the_working_folder_changes_no_picture(data: Path) -> None:
    pages = []
    for name, style in (("plain", ""), ("hostile", HOSTILE_STYLE)):
        folder = data.parent / name
        folder.mkdir()
        (folder / "matplotlibrc").write_text(style)
        done = start(folder, data.rename(folder / "data.csv"))
        assert done.returncode == 0, done.stderr[-2000:]
        data = (folder / "data.csv").rename(data)
        page = (data.parent / name / "run" / "trajectory" / "report.html").read_text()
        pages.append([line for line in page.splitlines() if "data:image/svg" in line])
    assert pages[0]
    assert pages[0] == pages[1]


def test_a_log_does_not_stand_where_a_result_comes(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data.parent / "run" / "trajectory"
    folder.mkdir(parents=True)
    assert trainer.main(words(data, folder / "metrics.json")) == 2
    assert "--log_file" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_pipe_in_the_place_of_the_data_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = data.with_name("pipe.csv")
    os.mkfifo(pipe)
    assert trainer.main(words(pipe, data.parent / "own.log")) == 2
    assert f"{pipe}: not a file" in capsys.readouterr().err


def test_a_line_break_in_a_file_name_makes_no_line(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = data.rename(data.with_name("x\nerror: forged.csv"))
    assert trainer.main(words(forged, data.parent / "own.log")) == 0
    shown = capsys.readouterr().out + (data.parent / "own.log").read_text()
    assert "error: forged" in shown
    assert not [line for line in shown.splitlines() if line.startswith("error: forged")]
