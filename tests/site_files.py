"""Aggregates of sites whose rows are drawn."""

import json

import numpy as np
import pandas as pd

from medgemma_clinical.commands.pool import FORMAT
from medgemma_clinical.data.distributions import by_kind
from medgemma_clinical.evaluation.aggregate import aggregate
from pages import MODEL

EDGES = {MODEL: [0.05, 0.1, 0.2, 0.3, 0.45]}


def make_site(rows, min_cell=11, models=(MODEL, "blend"), **about):
    """Return the aggregate of some rows, as a file holds it."""
    n = len(rows)
    ages = pd.DataFrame({"static_age": np.arange(n) % 50 + 30.5})
    values = pd.DataFrame({"lactate": rows[MODEL].to_numpy() * 10})
    medians = by_kind(values, np.arange(n), ages, rows["patient"].to_numpy())
    people = rows[["label", "patient"]].assign(observations=3, age=ages["static_age"].mean())
    cohort = people.assign(sex="woman").reset_index(drop=True), medians
    table = rows[["id", "label", "patient", *models]].reset_index(drop=True)
    found = aggregate(table, EDGES, cohort, min_cell, seed=0)
    model = {"name": MODEL, "outcome": "Death <b>", "threshold": 0.3, "sha256": "0" * 64}
    model |= {"baselines_sha256": "1" * 64, **about}
    return json.loads(json.dumps({"format": FORMAT, "version": "1", "model": model, **found}))


def parts(rows, sizes=(600, 450, 300, 250)):
    ends = np.cumsum(sizes)
    return [rows.iloc[end - size : end] for end, size in zip(ends, sizes, strict=True)]
