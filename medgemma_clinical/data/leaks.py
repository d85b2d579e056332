"""Single inputs that nearly tell the label: known only after the outcome, or made from it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from medgemma_clinical.data.small_cells import minority_patients
from medgemma_clinical.data.trajectories import TrajectoryDataset

STATED = (
    r"\b(expired|deceased|passed away|comfort care|comfort measures|hospice|withdrawal of care|"
    r"verstorben|verstarb|exitus|palliativ|therapiebegrenzung|sterbebegleitung)"
)
"""Words of notes that may state a death, or that nothing more is done."""

MIN_AUROC, MIN_MINORITY = 0.95, 10
"""AUROC from which on a single input is suspected to know the outcome, and the patients with, and
without, the event that it takes: with ten and ten, one column of noise in 3,500 comes that far."""


def describe_leaks(
    dataset: TrajectoryDataset,
    train: NDArray[np.int64],
    *,
    whole_texts: bool = False,  # whether a regression on texts is tried, which takes seconds
) -> list[str]:
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
    contexts = dataset.contexts[train]
    words = _leaking_words(contexts, labels, patients)
    if whole_texts and not words:
        words = _leaking_texts(contexts, labels, patients)
    return [*lines, *words, *_stated_outcomes(contexts)]


def _leaking_texts(
    contexts: NDArray[np.object_], labels: NDArray[np.float64], patients: NDArray[np.int64]
) -> list[str]:
    """Warn of texts whose words together nearly tell the label of other patients."""
    # A start does not pay for scikit-learn.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    from medgemma_clinical.data.terms import frequent_terms, term_vectorizer

    vocabulary = frequent_terms(contexts, patients)
    if not vocabulary or minority_patients(labels, patients) < MIN_MINORITY:
        return []
    table = term_vectorizer(vocabulary).fit_transform(contexts)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    model = LogisticRegression(C=100, max_iter=1000)  # many words may share the leak
    scores = cross_val_predict(
        model, table, labels, groups=patients, cv=folds, method="decision_function"
    )
    auroc = _auroc(scores, labels, patients)
    if auroc < MIN_AUROC:
        return []
    return [
        f"clinical_context: its words rank the rows of other patients by their label (AUROC "
        f"{auroc:.3f}): are they known at the prediction time?"
    ]


def _stated_outcomes(contexts: NDArray[np.object_]) -> list[str]:
    """Count the rows whose text has words that may state what came later."""
    texts = pd.Series(contexts).str.lower()
    words = texts.str.findall(STATED).explode().dropna().reset_index().drop_duplicates()
    words.columns = ["row", "word"]
    if words.empty:
        return []
    counts = ", ".join(f"{word} {n}" for word, n in words["word"].value_counts().items())
    return [
        f"clinical_context: {words['row'].nunique()} training rows hold words that may state what "
        f"came later ({counts}): read some of them"
    ]


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
