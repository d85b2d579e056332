"""Aggregates of sites whose rows are drawn."""

import json

import numpy as np

from medgemma_clinical.commands.pool import FORMAT
from medgemma_clinical.evaluation.aggregate import aggregate
from pages import MODEL

HASHES = {MODEL: "0" * 64, "blend": "1" * 64}


def make_site(rows, models=(MODEL, "blend"), **hashes):
    """Return the aggregate of some rows, as a file holds it."""
    found = aggregate(rows, {name: {**HASHES, **hashes}[name] for name in models})
    about = {"format": FORMAT, "version": "1", "outcome": "Death <b>"}
    return json.loads(json.dumps(about | found))


def parts(rows, sizes=(600, 450, 300, 250)):
    ends = np.cumsum(sizes)
    return [rows.iloc[end - size : end] for end, size in zip(ends, sizes, strict=True)]
