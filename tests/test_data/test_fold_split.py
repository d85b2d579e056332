"""Folds: who is dealt where, and what a fold's run may see."""

import copy

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.checks import describe_split
from medgemma_clinical.data.fold_split import draw_folds, fold_dataset, foldable, site_folds
from medgemma_clinical.data.trajectories import UNKNOWN
from medgemma_clinical.files import InputError
from visits import cohort


def folds_of(dataset, folds=5, seed=0):
    return draw_folds(dataset.groups, dataset.labels, folds, seed)


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_patients_are_dealt_out_evenly_and_whole(folds):
    dataset = MIMICtrajectoryDataset(cohort(177))
    table = pd.DataFrame({"fold": folds_of(dataset, folds), "patient": dataset.groups})
    assert set(table["fold"]) == set(range(folds))
    assert (table.groupby("patient")["fold"].nunique() == 1).all()
    events = set(dataset.groups[dataset.labels == 1])
    for own in (table["patient"].isin(events), ~table["patient"].isin(events)):
        sizes = table[own].groupby("fold")["patient"].nunique()
        assert len(sizes) == folds
        assert sizes.max() - sizes.min() <= 1


def test_folds_depend_on_their_seed_and_not_on_the_order_of_rows():
    table = cohort()
    first = MIMICtrajectoryDataset(table)
    again = MIMICtrajectoryDataset(table.sample(frac=1, random_state=0))
    dealt = [dict(zip(x.groups, folds_of(x), strict=True)) for x in (first, again)]
    assert dealt[0] == dealt[1] != dict(zip(first.groups, folds_of(first, seed=1), strict=True))


def test_a_folds_run_tests_it_validates_on_a_tenth_of_the_others_and_ignores_a_given_split():
    table = cohort()
    table["split"] = ["val" if "7" in name else "train" for name in table["subject_id"]]
    dataset = foldable(MIMICtrajectoryDataset(table), 0, 0)
    fold = folds_of(dataset)
    for k in range(5):
        split = fold_dataset(dataset, fold, k, 0).split(0)
        assert np.array_equal(split["test"], np.flatnonzero(fold == k))
        patients = {part: set(dataset.groups[rows]) for part, rows in split.items()}
        assert sum(map(len, patients.values())) == dataset.n_patients
        assert len(patients["val"]) == pytest.approx(0.1 * (dataset.n_patients * 4 / 5), abs=1)
    assert dataset.parts is None


def test_the_data_of_a_run_say_how_their_parts_came_about():
    dataset = MIMICtrajectoryDataset(cohort())
    fold, own = folds_of(dataset), [copy.copy(dataset) for _ in range(3)]
    own[0].parts, own[1].held_out, own[2].held_out = np.full(len(dataset), "train"), (), ("val",)
    own += [dataset, *(fold_dataset(dataset, fold, k, 0) for k in range(5))]
    own += [fold_dataset(dataset, fold, 0, 0, "east | 7")]
    told = [each.describe_origin(7) for each in own]
    assert len({*told}) == len(own)
    assert [f"fold {k}" in text for k, text in enumerate(told[4:9])] == [True] * 5
    assert "east" in told[9]
    assert "|" not in told[9], "it would end a cell"
    split = dataset.split(7)
    assert all(text in describe_split(each, split, 7) for each, text in zip(own, told, strict=True))


def test_only_labelled_rows_of_the_drawn_patients_are_dealt_out():
    dataset = MIMICtrajectoryDataset(cohort())
    dataset.labels[:3] = np.nan
    rows = foldable(dataset, 150, 0)
    assert rows.n_patients == 150
    assert not np.isnan(rows.labels).any()
    again = fold_dataset(rows, folds_of(rows), 0, 0).sample_patients(150, 0)
    assert len(again) == len(rows), "a run draws no others"


@pytest.mark.parametrize(("events", "folds"), [(9, 2), (24, 5)])
def test_too_few_patients_for_the_folds_are_refused(events, folds):
    groups, labels = np.arange(60).astype(str), (np.arange(60) < events).astype(float)
    for each, name in ((labels, " with "), (1 - labels, " without ")):
        with pytest.raises(InputError, match=f"data.csv: {events} patients{name}") as refused:
            draw_folds(groups, each, folds, 0, "data.csv")
        assert all(part in str(refused.value) for part in (f" {5 * folds}", "--folds"))
    fold = draw_folds(groups, (np.arange(60) <= events).astype(float), folds, 0)
    assert np.bincount(fold[: events + 1]).tolist() == [5] * folds


def test_a_site_is_a_fold_where_it_has_enough_patients_and_a_patient_is_of_the_first_rows_site():
    dataset = MIMICtrajectoryDataset(cohort())
    patient = np.array([int(name[1:]) for name in dataset.groups])
    dataset.sites = np.array(["c", "a", "b", UNKNOWN], dtype=object)[patient % 4].astype(str)
    dataset.sites[patient >= 196] = "small"
    first = np.unique(dataset.groups, return_index=True)[1]
    later = np.setdiff1d(np.arange(len(dataset)), first)
    dataset.sites[later[:40]] = "a"  # of whomever
    fold, names = site_folds(dataset)
    assert names == ["a", "b", "c"]
    assert (pd.Series(fold).groupby(dataset.groups).nunique() == 1).all()
    own = np.array([*names, "none"])[fold[first]]
    assert np.array_equal(own != "none", np.isin(dataset.sites[first], names))
    assert np.array_equal(own[own != "none"], dataset.sites[first][own != "none"])
    for sites, place in ((np.full(len(dataset), "a"), "--folds"), (None, "site")):
        dataset.sites = sites
        with pytest.raises(InputError, match=place):
            site_folds(dataset)
