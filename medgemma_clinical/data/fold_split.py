"""Folds: each patient is held out once, by a model that learns from the other folds' patients."""

from __future__ import annotations

import copy
import logging

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.data.split import draw_split, patient_events
from medgemma_clinical.data.texts import code
from medgemma_clinical.data.training_data import labelled_rows
from medgemma_clinical.data.trajectories import UNKNOWN, TrajectoryDataset
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

MIN_OUTCOMES = 10
"""Patients with, and without, an event that a site needs to be held out: its AUROC is shown."""

PATIENTS_A_FOLD = 5
"""Patients with, and without, an event that each fold needs: with fewer, a bootstrap draw often
lacks the events of some fold."""


def foldable(dataset: TrajectoryDataset, max_samples: int, seed: int) -> TrajectoryDataset:
    """Return the rows that are assigned to folds: labelled, of at most ``max_samples`` patients."""
    rows = labelled_rows(dataset).sample_patients(max_samples, seed)
    if rows.parts is not None:
        logger.warning(
            "%s: the column split is ignored: folds replace it, so its test part also trains",
            rows.source,
        )
        rows = copy.copy(rows)
        rows.parts = None
    return rows


def draw_folds(
    groups: NDArray[np.str_], labels: NDArray[np.float64], folds: int, seed: int, source: str = ""
) -> NDArray[np.int64]:
    """Assign patients to folds, stratified by event; return the fold of each row, (N,)."""
    owner, event = patient_events(groups, labels)
    rng, needed = np.random.default_rng(seed), PATIENTS_A_FOLD * folds
    strata = [rng.permutation(np.flatnonzero(event == outcome)) for outcome in (True, False)]
    for patients, name in zip(strata, ("with", "without"), strict=True):
        if len(patients) < needed:
            raise InputError(
                f"{source}: {len(patients)} patients {name} an event, --folds {folds} needs "
                f"{needed}, {PATIENTS_A_FOLD} a fold: lower --folds"
            )
    fold = np.empty(len(event), dtype=np.int64)
    fold[np.concatenate(strata)] = np.arange(len(event)) % folds
    return fold[owner]


def site_folds(dataset: TrajectoryDataset) -> tuple[NDArray[np.int64], list[str]]:
    """Return each row's fold, (N,), -1 where its site only trains, and the names of the folds."""
    if dataset.sites is None:
        raise InputError(f"{dataset.source}: read without its sites: give site to the data set too")
    first, owner = np.unique(dataset.groups, return_index=True, return_inverse=True)[1:]
    event = patient_events(dataset.groups, dataset.labels)[1]
    names, site = np.unique(dataset.sites[first], return_inverse=True)
    counts = [np.bincount(site[event == x], minlength=len(names)) for x in (True, False)]
    large = (np.minimum(*counts) >= MIN_OUTCOMES) & (names != UNKNOWN)
    if large.sum() < 2:
        raise InputError(
            f"{dataset.source}: fewer than two sites have {MIN_OUTCOMES} patients with, and "
            f"{MIN_OUTCOMES} without, an event: use --folds"
        )
    logger.info("%d sites are held out in turn", large.sum())
    if small := (~large).sum():
        text = "%d sites only train: fewer than %d of their patients have, or lack, an event"
        logger.info(text, small, MIN_OUTCOMES)
    if moved := (dataset.sites != dataset.sites[first][owner]).sum():
        logger.info("%d rows count for the site of their patient's first row", moved)
    fold = np.where(large, np.cumsum(large) - 1, -1)
    return fold[site][owner], names[large].tolist()


def fold_dataset(
    dataset: TrajectoryDataset, fold: NDArray[np.int64], k: int, seed: int, site: str = ""
) -> TrajectoryDataset:
    """Return one run's data: rows whose ``fold`` (N,) is k test, a tenth of the rest validates."""
    rest = np.flatnonzero(fold != k)
    split = draw_split(dataset.groups[rest], dataset.labels[rest], seed, dataset.source)
    run_data = copy.copy(dataset)
    run_data.parts = np.where(fold == k, "test", "train").astype("U5")
    run_data.parts[rest[split["val"]]] = "val"
    tested = f"site {code(site)} tests" if site else f"of folds 0 to {fold.max()}, fold {k} tests"
    validated = f"a tenth of the other patients, drawn by seed {seed}, validates"
    run_data.parts_origin = f"{tested}, {validated}"
    return run_data
