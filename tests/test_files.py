"""Files are whole or absent, whatever lies in their way."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from medgemma_clinical.files import atomic, partial_path, write_text


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
