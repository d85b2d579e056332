"""The cache of data: the same to the last bit, never stale, nothing run or believed, for one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save

import medgemma_trainer as trainer
from dataset_format import InputError, MIMICtrajectoryDataset, TrajectoryDataset
from srtr_files import random_tables, write_folder

ROOT = Path(__file__).parent.parent
TABLE = pd.DataFrame(
    {
        "subject_id": [f"p{i // 2}" for i in range(80)],
        "clinical_trajectory": [f"{20 + i % 7} (5h) -> {9 + i % 5} (1.25h)" for i in range(80)],
        "trajectory_glucose [mg/dL]": ["", "180 (1h) -> 90.5 (7h)"] * 40,
        "clinical_context": ["54-year-old woman", "", "höchst 中文 \U0001f600", "a man"] * 20,
        "label_escalation": [0, 0, 1, 1] * 20,
        "unread": 1,
    }
)
FLOW = [{"rule": "under 18", "removed": 3, "left": 90}, {"rule": "left", "removed": 0, "left": 90}]
DESCRIPTION = {
    **{"series": "Gap", "plausible": [1, 60], "limits": {"glucose": [20, 900]}},
    "flow": FLOW,
}

Words = list[str]


@pytest.fixture
def dka(tmp_path: Path) -> Words:
    """Flags of a file with two series, contexts of many alphabets and a description."""
    TABLE.to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "data.json").write_text(json.dumps(DESCRIPTION))
    return ["--data_path", str(tmp_path / "data.csv"), "--cache_dir", str(tmp_path / "cache")]


@pytest.fixture
def srtr(tmp_path: Path) -> Words:
    """Flags of a folder of liver registrations."""
    cand, history = random_tables(600, "liver", seed=3)
    folder = tmp_path / "saf"
    folder.mkdir()
    write_folder(folder, cand, history, "liver", dates="iso")
    kind = ["--dataset", "srtr", "--organ", "liver", "--data_dir", str(folder)]
    return [*kind, "--cache_dir", str(tmp_path / "cache")]


@pytest.fixture
def mimic(tmp_path: Path) -> Words:
    """Flags of the file that the MIMIC-IV demo gives, whose description tells who was left out."""
    demo, out = ROOT / "tests" / "data" / "mimic_iv_demo", tmp_path / "demo.csv"
    words = ["from_mimic", "--mimic_dir", str(demo), "--out", str(out), "--cohort", "all"]
    program = [sys.executable, str(ROOT / "dataset_format.py")]
    subprocess.run([*program, *words], check=True, capture_output=True)
    return ["--data_path", str(out), "--cache_dir", str(tmp_path / "cache")]


def parse(words: Words) -> Any:
    return trainer.resolve(trainer.build_parser().parse_args(words))


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


class Count:
    """Counts how often the user's data are read, and the passes that hash them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads, self.fingerprints = 0, 0
        read, fingerprint = trainer.read_dataset, TrajectoryDataset.fingerprint

        def counted(args: Any) -> TrajectoryDataset:
            self.reads += 1
            return read(args)

        def hashed(dataset: TrajectoryDataset) -> str:
            self.fingerprints += 1
            return fingerprint(dataset)

        monkeypatch.setattr(trainer, "read_dataset", counted)
        monkeypatch.setattr(TrajectoryDataset, "fingerprint", hashed)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    return Count(monkeypatch)


def assert_same(one: Any, other: Any) -> None:
    """Hold two attributes of data sets equal: kind, type of numbers, and every bit."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.dtype == object:
            assert one.tolist() == other.tolist()
        else:
            assert one.tobytes() == other.tobytes()
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("kind", ["dka", "srtr", "mimic"])
def test_a_cached_load_is_the_fresh_one_to_the_last_bit(
    kind: str,
    request: pytest.FixtureRequest,
    count: Count,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = request.getfixturevalue(kind)
    caplog.set_level(logging.INFO)
    loads, said = [], []
    for given in (words[:-2], words, words):
        caplog.clear()
        loads.append(trainer.load_data(parse(given)))
        said.append([r.getMessage() for r in caplog.records if r.name in trainer.DATA_MODULES])
    assert (count.reads, count.fingerprints) == (2, 2)
    fresh, _, again = loads
    assert said[0] == said[1] == said[2] != []
    kept = {k: v for k, v in vars(fresh.dataset).items() if not k.startswith("_")}
    assert kept.keys() == vars(again.dataset).keys()
    for name, value in kept.items():
        assert_same(value, getattr(again.dataset, name))
    assert again.dataset.flow is not None
    assert fresh.facts() == again.facts()
    assert again.dataset.fingerprint() == again.fingerprint == fresh.fingerprint
    assert again.dataset.row_fingerprint() == again.rows == fresh.rows
    for part, rows in fresh.split.items():
        assert_same(rows, again.split[part])
    one, other = (load.dataset.collate(range(40)) for load in (fresh, again))
    for (name, tensor), twin in zip(one.items(), other.values(), strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert isinstance(twin, torch.Tensor)
        assert torch.equal(tensor, twin), name
    for i in range(len(fresh.dataset)):
        assert fresh.dataset.prompt(i) == again.dataset.prompt(i)
        assert fresh.dataset.report(i) == again.dataset.report(i)
    assert fresh.dataset.asked() == again.dataset.asked()
    features = range(len(fresh.dataset.features))
    assert [fresh.dataset.plausible(f) for f in features] == [
        again.dataset.plausible(f) for f in features
    ]


@pytest.mark.parametrize("kind", ["dka", "srtr"])
@pytest.mark.parametrize("change", ["byte", "beside", "flag", "code", "ending"])
def test_whatever_decides_the_data_makes_the_cache_another(
    kind: str,
    change: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    count: Count,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = request.getfixturevalue(kind)
    trainer.load_data(parse(words))
    paths = sorted((tmp_path / "saf").iterdir()) if kind == "srtr" else [tmp_path / "data.csv"]
    if change == "byte":
        content = bytearray(paths[0].read_bytes())
        place = content.rindex(b"2")
        content[place] = ord("1")
        os.utime(paths[0], (1, 1))
        paths[0].write_bytes(content)
    elif change == "beside" and kind == "dka":
        (tmp_path / "data.json").write_text(json.dumps({**DESCRIPTION, "series": "Gat"}))
    elif change == "beside":
        content = bytearray(paths[1].read_bytes())
        content[content.rindex(b"2")] = ord("1")
        paths[1].write_bytes(content)
    elif change == "flag":
        words += ["--max_len", "1"]
    elif change == "code":
        monkeypatch.setattr(trainer, "CACHE_FORMAT", 99)
    elif kind == "dka":
        Path(paths[0]).rename(tmp_path / "data.text")
        words[1] = str(tmp_path / "data.text")
    else:
        paths[0].rename(paths[0].with_suffix(".CSV"))
    trainer.load_data(parse(words))
    assert count.reads == 2
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize(
    "words",
    [
        "--seed 3",
        "--series_text none",
        "--text_context none",
        "--mode generative",
        "--max_samples 30",
        "--batch_size 4",
    ],
)
def test_what_does_not_decide_the_data_reads_the_same_cache(
    words: str, dka: Words, count: Count
) -> None:
    trainer.load_data(parse(dka))
    plain = trainer.load_data(parse([*dka[:-2], *words.split()]))
    again = trainer.load_data(parse([*dka, *words.split()]))
    assert count.reads == 2
    assert again.facts() == plain.facts()
    assert again.dataset.prompt(3) == plain.dataset.prompt(3)


def test_data_that_change_while_they_are_read_are_not_kept(
    dka: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = trainer.read_dataset

    def slow(args: Any) -> TrajectoryDataset:
        dataset = read(args)
        TABLE[:60].to_csv(tmp_path / "data.csv", index=False)
        return dataset

    monkeypatch.setattr(trainer, "read_dataset", slow)
    assert len(trainer.load_data(parse(dka)).dataset) == 80
    assert cached(tmp_path) == []


def test_a_moved_file_is_found_by_its_content_and_named_by_its_place(
    dka: Words, tmp_path: Path, count: Count, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer.load_data(parse(dka))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("data.csv", "data.json"):
        (tmp_path / name).rename(moved / name)
    caplog.clear()
    again = trainer.load_data(parse(["--data_path", str(moved / "data.csv"), *dka[2:]]))
    assert count.reads == 1
    assert again.dataset.source == str(moved / "data.csv")
    assert f"{moved / 'data.csv'}: 80 rows were not in time order; sorted" in caplog.messages
    assert not any(str(tmp_path / "data.csv") in message for message in caplog.messages)


def test_the_cache_is_for_its_owner_alone(dka: Words, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        trainer.load_data(parse(dka))
    finally:
        os.umask(before)
    (file,) = cached(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def truncated(content: bytes) -> bytes:
    return content[:-7]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def lying(content: bytes) -> bytes:
    return (2**62).to_bytes(8, "little") + content[8:]


def huge(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["times"] |= {"shape": [2**40], "data_offsets": [0, 2**43]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def unsound(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(content[8 : 8 + length])["__metadata__"]
    return save({"offsets": np.array([0, 10**9])}, facts)


def foreign(_: bytes) -> bytes:
    return pickle.dumps(Trap())


def empty(_: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("damage", [truncated, flipped, lying, huge, unsound, foreign, empty])
def test_a_damaged_or_foreign_file_is_read_anew_with_one_warning(
    damage: Callable[[bytes], bytes],
    sealed: bool,
    dka: Words,
    tmp_path: Path,
    count: Count,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sealed and damage is flipped:
        pytest.skip("whoever can seal a file can write any number into it")
    monkeypatch.chdir(tmp_path)
    fresh = trainer.load_data(parse(dka))
    (file,) = cached(tmp_path)
    content = damage(file.read_bytes())
    key = file.name.split("-")[0]
    file.unlink()
    digest = hashlib.sha256(content).hexdigest() if sealed else "0" * 64
    bad = file.with_name(f"{key}-{digest}.safetensors")
    bad.write_bytes(content)
    caplog.clear()
    again = trainer.load_data(parse(dka))
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert f"{bad}: damaged or foreign" in warned[0]
    assert count.reads == 2
    assert again.fingerprint == fresh.fingerprint
    assert file in cached(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_link_in_the_cache_is_not_followed(dka: Words, tmp_path: Path, count: Count) -> None:
    trainer.load_data(parse(dka))
    (file,) = cached(tmp_path)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    trainer.load_data(parse(dka))
    assert count.reads == 2
    assert not file.is_symlink()


def test_writers_at_the_same_time_leave_one_whole_file(dka: Words, tmp_path: Path) -> None:
    code = """
import sys, time, medgemma_trainer as trainer
from pathlib import Path
begin, read = trainer.begin_cache, trainer.read_dataset
def together(folder):
    temporary = begin(folder)
    while len(list(folder.glob(".*"))) < 3:
        time.sleep(0.01)
    return temporary
def slowly(args):
    time.sleep(0.5)
    return read(args)
trainer.begin_cache, trainer.read_dataset = together, slowly
args = trainer.resolve(trainer.build_parser().parse_args(sys.argv[1:]))
print(trainer.load_data(args).fingerprint)
"""
    command = [sys.executable, "-c", code, *dka]
    writers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = [writer.communicate(timeout=300)[0].splitlines()[-1] for writer in writers]
    assert len(set(found)) == 1
    (file,) = cached(tmp_path)
    assert trainer.parse_cache(file, "x", "dka").fingerprint == found[0]


def run(words: Words, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = trainer.main(["--trajectory_only", "--log_file", "none", *words])
    return code, capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_the_data_are_read(
    dka: Words,
    tmp_path: Path,
    count: Count,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cache").mkdir()

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(trainer.tempfile, "mkstemp", read_only)
    code, error = run([*dka, "--output_dir", str(tmp_path / "run")], capsys)
    assert (code, count.reads) == (2, 0)
    assert error == (
        f"error: --cache_dir {tmp_path / 'cache'}: Read-only file system: choose another place\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(
    dka: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("mine")
    code, error = run([*dka, "--output_dir", str(tmp_path / "run")], capsys)
    assert code == 2
    assert error == f"error: --cache_dir {tmp_path / 'cache'}: File exists: choose another place\n"
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_nothing(
    dka: Words,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "flush", full)
    code, error = run([*dka, "--output_dir", str(tmp_path / "run")], capsys)
    assert code == 2
    assert "No space left on device: make room" in error
    assert cached(tmp_path) == []


@pytest.mark.parametrize("kind", ["cell", "missing", "description"])
def test_errors_are_those_of_a_load_without_cache(
    kind: str, dka: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "cell":
        TABLE.assign(label_escalation=3).to_csv(tmp_path / "data.csv", index=False)
    elif kind == "missing":
        (tmp_path / "data.csv").unlink()
    else:
        (tmp_path / "data.json").write_text("[")
    place = ["--output_dir", str(tmp_path / "run")]
    plain = run([*dka[:-2], *place], capsys)
    assert plain[0] == 2
    for _ in range(2):
        assert run([*dka, *place], capsys) == plain
    assert not (tmp_path / "cache").exists() or cached(tmp_path) == []


def test_what_a_killed_run_left_goes_in_a_day(dka: Words, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    old, new = (tmp_path / "cache" / f".{name}{trainer.PARTIAL}" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    trainer.load_data(parse(dka))
    assert (old.exists(), new.exists()) == (False, True)


def test_a_run_from_the_cache_is_the_run_without(dka: Words, tmp_path: Path) -> None:
    short = ["--trajectory_only", "--log_file", "none", "--trajectory_epochs", "2"]
    figures = []
    for name, words in (("plain", dka[:-2]), ("first", dka), ("second", dka)):
        place = tmp_path / name
        assert trainer.main([*short, *words, "--output_dir", str(place)]) == 0
        figures.append((place / "trajectory" / "metrics.json").read_bytes())
    assert figures[0] == figures[1] == figures[2]


def test_a_batch_costs_its_own_rows_and_not_all(tmp_path: Path) -> None:
    """Counts the bytes that collating takes: the same from two hundred as from 200,000 rows."""
    code = """
import sys, tracemalloc
import numpy as np, pandas as pd
from dataset_format import MIMICtrajectoryDataset
rows = int(sys.argv[1])
text = ["20 (0h) -> 18 (2h) -> 16 (4h)"] * rows
table = pd.DataFrame({"clinical_trajectory": text, "label_escalation": 0})
dataset = MIMICtrajectoryDataset(table)
dataset.collate(range(16))
tracemalloc.start()
dataset.collate(range(100, 116))
print(tracemalloc.get_traced_memory()[1])
"""
    peaks = []
    for rows in (200, 200_000):
        command = [sys.executable, "-c", code, str(rows)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 1000


def test_pieces_of_a_text_come_back_whatever_they_hold() -> None:
    dataset = MIMICtrajectoryDataset(TABLE)
    dataset.contexts = np.array(["", "\ud800", "a\0b", "\U0001f600"] * 20, dtype=object)
    arrays, rest = trainer.pack(dataset)
    again = trainer.unpack(MIMICtrajectoryDataset, arrays, json.loads(json.dumps(rest)))
    assert again.contexts.tolist() == dataset.contexts.tolist()


def test_no_key_without_files(tmp_path: Path) -> None:
    args = parse(["--dataset", "srtr", "--cache_dir", str(tmp_path / "cache")])
    with pytest.raises(InputError, match="--data_dir"):
        trainer.load_data(args)
    assert not (tmp_path / "cache").exists()


def test_each_file_is_opened_as_seldom_as_can_be(dka: Words, tmp_path: Path) -> None:
    """Counts passes over the data file: one to read; a cache adds a hash before and one behind."""
    code = """
import sys, medgemma_trainer as trainer
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
trainer.load_data(trainer.resolve(trainer.build_parser().parse_args(sys.argv[1:])))
print([sum(name.endswith(ending) for name in opened) for ending in ("data.csv", ".safetensors")])
"""
    passes = []
    for words in (dka[:-2], dka, dka):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        passes.append(json.loads(done.stdout.splitlines()[-1]))
    assert passes == [[1, 0], [3, 0], [1, 2]]
