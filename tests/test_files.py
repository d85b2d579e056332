"""Files are whole or absent, whatever lies in their way."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from medgemma_clinical.files import (
    LARGEST_JSON,
    atomic,
    partial_path,
    read_json,
    write_json,
    write_text,
)


def test_a_link_in_the_way_of_a_result_is_replaced_and_its_target_left(tmp_path: Path) -> None:
    target, result = tmp_path / "target", tmp_path / "result.json"
    target.write_text("kept")
    for link in (result, partial_path(result)):
        link.symlink_to(target)
    write_text(result, "new")
    assert target.read_text() == "kept"
    assert result.read_text() == "new"
    assert not result.is_symlink()
    assert sorted(tmp_path.iterdir()) == [result, target]


@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    result = tmp_path / "best"
    if folder:
        result.mkdir()
        (result / "weights").write_text("old")
    else:
        result.write_text("old")
    with contextlib.suppress(RuntimeError), atomic(result) as temporary:
        temporary.mkdir() if folder else temporary.write_text("half")
        raise RuntimeError("on the way")
    assert (result / "weights" if folder else result).read_text() == "old"
    assert list(tmp_path.iterdir()) == [result]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"9" * 5_000 + b"]",
        b" " * LARGEST_JSON + b"1",
    ],
    ids=["empty", "cut off", "no UTF-8", "deep", "deep and cut off", "a long number", "too large"],
)
def test_a_json_file_that_cannot_be_read_is_one_kind_of_error(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(json.JSONDecodeError) as caught:
        read_json(path)
    assert len(str(caught.value)) < 100


def test_json_reads_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, "\u00e9"], "b": {"c": True}}
    write_json(tmp_path / "data.json", content)
    assert read_json(tmp_path / "data.json") == content
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
