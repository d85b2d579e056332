"""Checkpoints on disk: two, whole, of this format, and nothing that runs code."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from medgemma_clinical.files import InputError
from medgemma_clinical.training import checkpoint_store
from medgemma_clinical.training.checkpoint_store import CheckpointStore
from toy_stage import small_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store with the checkpoints of steps 2 and 3."""
    store = CheckpointStore(tmp_path / "last")
    for step in (1, 2, 3):
        store.save(small_checkpoint(step))
    return store


def spoil(path: Path, damage: str) -> Path:
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_the_two_latest_are_kept_and_the_newest_is_read_as_it_was_written(
    store: CheckpointStore,
) -> None:
    numbers = [int(path.name.partition("-")[0]) for path in store.files()]
    assert numbers == [2, 3]
    read = store.newest()
    assert read.average_steps == 3
    assert torch.equal(read.average["head.weight"], torch.full((2, 3), 1.0))
    assert read.progress == small_checkpoint(3).progress
    assert [p.name for p in store.folder.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_one_gives_way_to_the_one_before(
    damage: str, store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    path = spoil(store.files()[-1], damage)
    assert store.newest().average_steps == 2
    assert f"{path}: damaged: resuming from the one before" in caplog.text


def test_a_damaged_one_is_none_of_the_two_that_are_kept(store: CheckpointStore) -> None:
    good, bad = store.files()
    spoil(bad, "cut")
    store.save(store.newest())
    assert store.files()[0] == good
    assert len(store.files()) == checkpoint_store.KEPT
    assert bad not in store.files()


def test_without_a_whole_one_there_is_nothing_to_resume(store: CheckpointStore) -> None:
    for path in store.files():
        spoil(path, "cut")
    with pytest.raises(InputError, match="no checkpoint is whole: start again without --resume"):
        store.newest()
    assert len(store.files()) == 2, "what cannot be read is left alone"


def test_another_format_is_refused_with_the_reason(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_store, "FORMAT", checkpoint_store.FORMAT + 1)
    with pytest.raises(InputError, match="a checkpoint of format 6, this program reads 7"):
        store.newest()


def test_a_disk_that_fails_is_no_damage(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read_bytes = store.files()[-1], Path.read_bytes

    def failing(self: Path) -> bytes:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match=path.name):
        store.newest()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content", ["bomb", "text", "list"])
def test_a_file_that_is_no_checkpoint_is_refused_and_its_code_does_not_run(
    content: str, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    if content == "text":
        buffer.write(b"no checkpoint")
    else:
        torch.save({"format": 6, "x": Bomb(tmp_path / "ran")} if content == "bomb" else [1], buffer)
    data = buffer.getvalue()
    path = tmp_path / f"00000001-{hashlib.sha256(data).hexdigest()}.pt"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a training checkpoint"):
        CheckpointStore(tmp_path).newest()
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_checkpoints_before(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.files()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(small_checkpoint(4))
    assert sorted(store.folder.iterdir()) == before
