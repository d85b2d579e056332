"""Another unit in new data: false alarms in data of one unit, and the power, by share and patients.

python tests/benchmarks/units.py FILE ...  of DKA files whose ``static_unit_...`` name the unit.
False alarms: random halves of several sizes, all pairs of units, blocks of ids as months. Power:
the conversions of ``CASES`` in a share of new patients, of all units or of one that is new.
"""

import argparse
import itertools

import numpy as np
import pandas as pd
from common import write

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.distributions import (
    ASKS_UNIT,
    compare,
    describe,
    find_unit_change,
    last_values,
    row_medians,
)

NAMES = {"bun": "urea", "mg": "magnesium", "k": "potassium", "temp": "temperature"}
"""Abbreviations that a table of units cannot know."""

CASES = {
    "creatinine": 88.4,
    "glucose": 1 / 18.016,
    "potassium": 10,
    "magnesium": 1 / 2.431,
    "albumin": 10,
    "lactate": 9.008,
    "platelets": 10,
    "hgb": 1 / 1.611,
    "phosphate": 1 / 3.097,
    "bilirubin": 17.1,
    "urea": 6.006,
    "alt": 10,
    "troponint": 1000,
}
SHARES, COUNTS, DRAWS = (0.1, 0.25, 0.5, 1.0), (30, 60, 300), 20


def read(path):
    """Return medians and last values of the rows of a file."""
    table = pd.read_csv(path, dtype=str)
    label = next(name for name in table if name.startswith("label_"))
    dataset = MIMICtrajectoryDataset(path, max_len=400, label_column=label)
    dataset.static_inputs = dataset.static_names
    return [x.rename(columns=NAMES, level=1) for x in (row_medians(dataset), last_values(dataset))]


def units_of(rows):
    """Return the rows of each unit."""
    names = [name for name in rows["static"] if name.startswith("static_unit_")]
    return [rows[rows["static", name] == 1] for name in names]


def drawn(rows, count, rng):
    """Return some rows at random."""
    return rows.iloc[rng.permutation(len(rows))[:count]]


def pairs(rows, rng):
    """Yield kinds of comparison, training and new rows of the same units of measurement."""
    for _ in range(100):
        order = rng.permutation(len(rows))
        old, new = rng.choice([100, 200, 500, 1000, 2000]), rng.choice([20, 50, 100, 300, 1000])
        yield "random splits", rows.iloc[order[:old]], rows.iloc[order[-new:]]
    for old, new in itertools.permutations(units_of(rows), 2):
        yield "pairs of units", old, new
        for counts in ((100, 60), (300, 200)):
            yield (
                "pairs of few patients",
                *(drawn(*x, rng) for x in zip((old, new), counts, strict=True)),
            )
    ordered = rows.sort_index()
    for size in (60, 200):
        for begin in range(500, min(len(rows) - size, 40 * size), size):
            yield "months", ordered.iloc[:500], ordered.iloc[begin : begin + size]


def power(tables, name, factor, share, count, is_new_unit, rng):
    """Return the share of draws in which the other unit is found; None without patients."""
    rows = next((x for x in tables if ("series", name) in x), None)
    if rows is None:
        return None
    rows, found = rows[rows["series", name].notna()], []
    for draw in range(DRAWS):
        old, new = rows, rows
        if is_new_unit:
            units = units_of(rows)
            new = units[draw % len(units)]
            old = rows.drop(new.index)
        new = drawn(new, count, rng)
        if len(new) < count:
            continue
        old = drawn(old.drop(new.index, errors="ignore"), 600, rng)
        values = new["series", name].to_numpy(float).copy()
        values[: round(share * count)] *= factor
        entry = describe(old)["series"].get(name, {"share": 0})
        change = find_unit_change(name, entry, values)
        slope = change.conversion.slope if change else 0.0
        found.append(abs(slope / factor - 1) < 1e-3)
    return np.mean(found) if found else None


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, tables = np.random.default_rng(args.seed), []
    alarms, counts = pd.Series(dtype=float), pd.Series(dtype=float)
    for path in args.files:
        medians, lasts = read(path)
        tables.append(medians)
        for rows in (medians, lasts):
            for kind, old, new in pairs(rows, rng):
                texts = [x for x in compare(describe(old), new) if ASKS_UNIT in x]
                counts[kind] = counts.get(kind, 0) + 1
                alarms[kind] = alarms.get(kind, 0) + len(texts)
                for text in texts:
                    write(f"{path}, {kind}, {len(old)} and {len(new)} rows: {text}")
    write(pd.DataFrame({"comparisons": counts, "alarms": alarms}).astype(int).to_string())
    lines = []
    for (name, factor), is_new in itertools.product(CASES.items(), (False, True)):
        line = {"series": name, "factor": f"{factor:.3g}", "unit": "new" if is_new else "all"}
        for share, count in itertools.product(SHARES, COUNTS):
            value = power(tables, name, factor, share, count, is_new, rng)
            line[f"{share:g}/{count}"] = "" if value is None else f"{100 * value:.0f}"
        lines.append(line)
    write(pd.DataFrame(lines).to_string(index=False))


if __name__ == "__main__":
    main()
