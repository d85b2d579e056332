"""Trajectory tables and texts that several test modules make."""

import re

import numpy as np
import pandas as pd

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import prepare_data

SERIES, LABEL = "clinical_trajectory", "label_escalation"
GAP = Description(series="Anion gap", unit="mEq/L", outcome="Escalation", plausible=(-5, 60))


def table_of(series, **columns):
    """Make a DKA table; labels alternate where none are given."""
    labels = [i % 2 for i in range(len(series))]
    return pd.DataFrame({SERIES: series, LABEL: labels, **columns})


def dataset_of(series, max_len=20, **columns):
    return MIMICtrajectoryDataset(table_of(series, **columns), max_len, description=GAP)


def patients(rows=100, seed=1, *, observations=6, has_ids=True):
    """Make patients of one row each whose values no other seed's share."""
    values = np.random.default_rng(seed).normal(20, 5, (rows, observations)).round(3)
    series = [" -> ".join(f"{v} ({4 * k}h)" for k, v in enumerate(row)) for row in values]
    table = table_of(series).assign(**{LABEL: (np.arange(rows) % 5 == 0).astype(int)})
    return table.assign(subject_id=[f"P{seed}-{k}" for k in range(rows)]) if has_ids else table


def data_of(table, seed=0, *, max_len=20, max_samples=0, description=GAP, **options):
    dataset = MIMICtrajectoryDataset(table, max_len, description=description, **options)
    return prepare_data(dataset, max_samples=max_samples, seed=seed, prompts=PromptOptions())


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
