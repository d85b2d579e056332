"""Tests of cells read as series, against a slow reference."""

from __future__ import annotations

import numpy as np
import pytest

from medgemma_clinical.data.dka import series_cells
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError
from trajectories import dataset_of, one_series, random_text


def reference_parse(text: str) -> tuple[list[float], list[float]]:
    """Read a series slowly, one piece after the other."""
    pairs = []
    for piece in text.split("->"):
        value, hours = piece.replace(")", "").replace("h", "").split("(")
        pairs.append((float(hours), float(value)))
    pairs.sort(key=lambda pair: pair[0])
    return [hours for hours, _ in pairs], [value for _, value in pairs]


def test_series_written_with_plain_are_read_back_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    series = []
    for _ in range(300):
        length = int(rng.integers(1, 21))
        times = np.sort(rng.exponential(30.0, length)).tolist()
        values = (rng.normal(size=length) * 10.0 ** rng.integers(-8, 9, length)).tolist()
        series.append((times, values))
    texts = [
        " -> ".join(f"{plain(v)} ({plain(t)}h)" for t, v in zip(*pair, strict=True))
        for pair in series
    ]
    dataset = dataset_of(texts)
    assert dataset.times.dtype == dataset.values.dtype == np.float64
    assert dataset.values.shape == (len(dataset.times), 1)
    assert dataset.lengths.tolist() == [len(times) for times, _ in series]
    assert [one_series(dataset, i) for i in range(300)] == series


def test_parser_agrees_with_a_slow_reference_on_random_texts() -> None:
    rng = np.random.default_rng(1)
    texts = [random_text(rng) for _ in range(500)]
    dataset = dataset_of(texts)
    for i, text in enumerate(texts):
        assert one_series(dataset, i) == reference_parse(text), repr(text)


def test_parsing_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [random_text(np.random.default_rng(k)) for k in range(50)]
    whole = dataset_of(texts)
    monkeypatch.setattr(series_cells, "PARSE_ROWS", 7)
    assert dataset_of(texts).fingerprint() == whole.fingerprint()


def test_a_space_of_any_kind_counts_as_a_space() -> None:
    # A spreadsheet or a web page brings no-break spaces that nobody sees.
    dataset = dataset_of(["24\u00a0(0h)\u00a0-> 20\u2009(2\u202fh)", "1 (0h)"])
    assert one_series(dataset, 0) == ([0.0, 2.0], [24.0, 20.0])


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("24 (0h) \u2192 20 (2h)", "piece 1 holds the arrow U+2192: write ->"),
        ("24 (0h) -> 24,5 (0h)", "piece 2 holds a comma in a number: write a decimal point"),
        ("24 (0,5h)", "piece 1 holds a comma in a number"),
        ("24 (2150-01-01)", "piece 1 holds a date or a time of day: write the hours"),
        ("24 (2150-01-01 10:30)", "piece 1 holds a date"),
        ("24 (31.12.2150)", "piece 1 holds a date"),
        ("24 (10:30)", "piece 1 holds a date or a time of day"),
        ("24 (0)", "piece 1 has no unit of time: write h"),
        ("24 (0 hours)", "piece 1 has a word for hours: write h"),
        ("24 (1.25 Hrs)", "piece 1 has a word for hours: write h"),
        ("24 (0h) -> 20 (30min)", "piece 2 is in minutes: divide by 60"),
        ("24 (2 days)", "piece 1 is in days: multiply by 24"),
        ("24 (2 moons)", "piece 1 is not of the form VALUE (HOURSh), as 24 (0h)"),
        ("a -> b", "piece 1 is not of the form VALUE (HOURSh), as 24 (0h)"),
    ],
)
def test_a_usual_mistake_gets_its_conversion(cell: str, problem: str) -> None:
    text = series_cells.describe_unreadable(cell)
    assert text.startswith(problem)
    assert text.isascii()
    with pytest.raises(InputError, match=r"row 0, column clinical_trajectory: piece"):
        dataset_of([cell])
