"""Trajectory tables and texts that several test modules make."""

import re

import pandas as pd

from dataset_format import Description, MIMICtrajectoryDataset

SERIES, LABEL = "clinical_trajectory", "label_escalation"
GAP = Description(series="Anion gap", unit="mEq/L", outcome="Escalation", plausible=(-5, 60))


def table_of(series, **columns):
    """Make a DKA table; labels alternate where none are given."""
    labels = [i % 2 for i in range(len(series))]
    return pd.DataFrame({SERIES: series, LABEL: labels, **columns})


def dataset_of(series, max_len=20, **columns):
    return MIMICtrajectoryDataset(table_of(series, **columns), max_len, description=GAP)


def one_series(dataset, i):
    rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
    return dataset.times[rows].tolist(), dataset.values[rows, 0].tolist()


def random_number(rng):
    number = rng.normal(scale=10.0 ** rng.integers(-3, 4))
    form = rng.choice(["{:.0f}", "{:.2f}", "{:+.3f}", "{:e}", "{:.1E}", "{!r}", "{:.0f}."])
    text = str(form).format(float(number))
    return re.sub(r"\b0\.(?=\d)", ".", text) if rng.integers(2) else text


def random_text(rng):
    """Write a series with free spaces; every other time repeats an earlier one."""

    def space():
        return str(rng.choice(["", " ", "  ", "\t", "\n"]))

    hours = []
    pieces = []
    for _ in range(int(rng.integers(1, 13))):
        again = bool(hours) and rng.random() < 0.5
        hours.append(str(rng.choice(hours)) if again else random_number(rng))
        parts = (random_number(rng), "(", hours[-1], "h", ")")
        pieces.append(space() + "".join(part + space() for part in parts))
    return "->".join(pieces)
