"""Files are whole or absent, whatever lies in their way."""

import contextlib
import json
import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from filelock import FileLock, Timeout

from medgemma_clinical import files
from medgemma_clinical.files import InputError, atomic, locked, read_json, write_text


def content(path):
    return (path / "weights" if path.is_dir() else path).read_text()


def test_a_link_in_the_way_of_a_result_is_replaced_and_its_target_left(tmp_path):
    target, result = tmp_path / "target", tmp_path / "result.json"
    target.write_text("kept")
    for link in (result, files.partial_path(result)):
        link.symlink_to(target)
    write_text(result, "new")
    assert (content(target), content(result), result.is_symlink()) == ("kept", "new", False)
    assert sorted(tmp_path.iterdir()) == [result, target]


@pytest.mark.parametrize("fails", ["", "block", "disk"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_block_or_a_disk_that_fails_leaves_what_was_there(folder, fails, tmp_path, monkeypatch):
    def write(text):
        with atomic(result) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "weights" if folder else temporary).write_text(text)
            if text == fails:
                raise OSError(28, "fails")

    result = tmp_path / "best"
    write("old")
    if fails == "disk":
        monkeypatch.setattr(os, "fsync", MagicMock(side_effect=OSError(28, "fails")))
    with pytest.raises(OSError, match="best") if fails else contextlib.nullcontext():
        write("block")
    assert content(result) == ("old" if fails else "block")
    assert list(tmp_path.iterdir()) == [result]


def test_what_killed_runs_left_is_removed_and_a_folder_within_its_replacement_restored(tmp_path):
    for name in (".best.old", ".gone.old", ".half.partial", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    files.clean(tmp_path)
    assert {p.name: content(p) for p in tmp_path.iterdir()} == {"best": ".best.old", "gone": "gone"}


def test_an_earlier_result_is_moved_to_a_number_that_is_free_for_all(tmp_path):
    for name in ("a.csv", "b", "b.1"):
        (tmp_path / name).touch()
    moved = files.move_aside(tmp_path / name for name in ("a.csv", "a.log", "b"))
    assert moved == [tmp_path / "a.2.csv", tmp_path / "b.2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.2.csv", "b.1", "b.2"]


def test_a_lock_keeps_others_away_until_it_is_freed_and_files_belong_to_their_owner(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "run"), locked(tmp_path / "other"), pytest.raises(InputError):
            locked(tmp_path / "run").__enter__()
    before = os.umask(0o022)
    with files.owner_only():
        write_text(tmp_path / "own", "")
    write_text(tmp_path / "shared", "")
    os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("own", "shared")] == [
        0o600,
        0o644,
    ]


def test_a_lock_file_leaves_with_its_run_and_while_it_is_held(tmp_path, monkeypatch):
    removed, unlink = [], Path.unlink

    def checked(path, **options):
        with pytest.raises(Timeout):  # else another run could hold a file without a name
            FileLock(path, timeout=0).acquire()
        removed.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", checked)
    for fails in (False, True):
        with contextlib.suppress(KeyError), locked(tmp_path / "run"):
            assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
            if fails:
                raise KeyError
    assert removed == [".run.lock"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[" * 10**5, b"[" + b"9" * 5000 + b"]"], ids=len
)
def test_a_json_file_that_cannot_be_read_is_one_kind_of_error(text, tmp_path):
    (tmp_path / "data.json").write_bytes(text)
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "data.json")
