"""Single inputs that nearly tell the label: known only after the outcome, or made from it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.data.trajectories import TrajectoryDataset

MIN_AUROC, MIN_MINORITY = 0.95, 10
"""AUROC from which on a single input is suspected to know the outcome, and the patients with, and
without, the event that it takes: with ten and ten, one column of noise in 3,500 comes that far."""


def describe_leaks(dataset: TrajectoryDataset, train: NDArray[np.int64]) -> list[str]:
    """Warn of each single input that nearly tells the label on the training part."""
    labels, patients = dataset.labels[train], pd.factorize(dataset.groups[train])[0]
    lines = []
    for name, columns in _single_inputs(dataset, train).items():
        aurocs = [_auroc(column, labels, patients) for column in columns]
        if (highest := max(aurocs)) >= MIN_AUROC:
            lines.append(
                f"{name} alone ranks the training rows by their label (AUROC {highest:.3f}): is it "
                "known at the prediction time?"
            )
    return [*lines, *_leaking_words(dataset.contexts[train], labels, patients)]


def _single_inputs(
    dataset: TrajectoryDataset, train: NDArray[np.int64]
) -> dict[str, list[NDArray[np.float64]]]:
    """Return what each input may tell by itself, columns (n,): values, presence, counts."""
    inputs = {}
    for name, values in zip(dataset.static_names, dataset.static[train].T, strict=True):
        inputs[name] = [values, np.isnan(values).astype(float)]
    if dataset.prediction_hours is not None:
        hours = dataset.prediction_hours[train]
        first = dataset.times[dataset.offsets[train]]
        since = [hours, hours - first, hours - dataset.last_times[train]]
        inputs["prediction_hours"] = [*since, np.isnan(hours).astype(float)]
    owner = np.repeat(np.arange(len(train)), dataset.lengths[train])
    is_measured = ~np.isnan(dataset.values[dataset.rows_of(train)])
    for name, column in zip(dataset.features, is_measured.T, strict=True):
        count = np.bincount(owner[column], minlength=len(train)).astype(float)
        inputs[f"how often {name} is measured"] = [count, (count > 0).astype(float)]
    return inputs


def _auroc(
    column: NDArray[np.float64], labels: NDArray[np.float64], patients: NDArray[np.int64]
) -> float:
    """Return the AUROC of the known values of a column, in the better direction; 0 if few."""
    has_value = ~np.isnan(column)
    column, labels = column[has_value], labels[has_value]
    if minority_patients(labels, patients[has_value]) < MIN_MINORITY:
        return 0.0
    events = int(labels.sum())
    ranks = rankdata(column)[labels == 1].sum() - events * (events + 1) / 2
    auroc = ranks / (events * (len(labels) - events))
    return float(max(auroc, 1 - auroc))


def _leaking_words(
    contexts: NDArray[np.object_], labels: NDArray[np.float64], patients: NDArray[np.int64]
) -> list[str]:
    """Warn of words whose presence in a context nearly tells the label."""
    if minority_patients(labels, patients) < MIN_MINORITY:
        return []
    words = pd.Series(contexts).str.lower().str.findall(r"[^\W\d_]{2,}").explode().dropna()
    word_rows = words.reset_index().drop_duplicates().set_axis(["row", "word"], axis=1)
    word_rows["event"] = labels[word_rows["row"]]
    counts = word_rows.groupby("word")["event"].agg(["sum", "size"])
    sensitivity = counts["sum"] / labels.sum()
    false_positives = (counts["size"] - counts["sum"]) / (1 - labels).sum()
    auroc = 0.5 + (sensitivity - false_positives).abs() / 2
    return [
        f"clinical_context: the word {word!r} alone ranks the training rows by their label (AUROC "
        f"{value:.3f}): is it known at the prediction time?"
        for word, value in auroc[auroc >= MIN_AUROC].items()
    ]
