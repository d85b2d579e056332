"""Predictions by the command line: files to score, and what the program says of them."""

import json
import sys

import pandas as pd

import medgemma_trainer as trainer
from conftest import SAMPLE

STAGES = ("trajectory", "classification", "generative")
SERIES = "clinical_trajectory"
MARKER = "ZYXWMARKER"
"""Stands in cells that no message may show."""

MARKED, VALUES = 7, ("44.41703", "149.31907")
"""A row of the shared table, and its extreme value and hour, to be found where they turn up."""


def write_data(table, path, **description):
    """Write a data file and the sample's description beside it, or one changed in some words."""
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    words = {**json.loads(SAMPLE.with_suffix(".json").read_text()), **description}
    path.with_suffix(".json").write_text(json.dumps(words))
    return path


def command(checkpoint, data, out, *more):
    """Return the command line that predicts a DKA file."""
    words = ["predict", "--checkpoint", str(checkpoint), "--data_path", str(data)]
    return [*words, "--predictions", str(out), *more]


def predicted(checkpoint, data, out, *more):
    """Predict a DKA file and return what was written."""
    assert trainer.main(command(checkpoint, data, out, *more)) == 0
    return read_predictions(out)


def read_predictions(out):
    """Read a file of predictions, empty texts as such, without time and model of the run."""
    kinds = {"id": str, "problem": str, "report": str}
    table = pd.read_csv(out, dtype=kinds).fillna({"problem": "", "report": ""})
    return table.drop(columns=["predicted_at", "model_sha256"])


def refused(capsys, words, *expected, out=None, code=2):
    """Expect a code, one line, and nothing written; return whether it names all of ``expected``."""
    capsys.readouterr()
    assert trainer.main(words) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert out is None or not list(out.parent.glob(f"{out.stem}*"))
    sys.stdout.write(error)  # shown where the test fails
    return all(str(text) in error for text in expected)


def spoil(table):
    """Return 30 rows of which some cannot be scored, and what must be said of each.

    They have no labels: a report for each command would take most of a test's time.
    """
    bad = table.head(30).drop(columns="label_escalation")
    cells = {
        3: (SERIES, f"24 (0h) -> {MARKER} (2h)", f"column {SERIES}: piece 2 is not of the form"),
        4: (SERIES, "", f"column {SERIES}: no series of this row holds a value"),
        9: (SERIES, f"24 ({MARKER}h)", f"column {SERIES}: piece 1 is not of the form"),
        10: (SERIES, "1e99 (0h)", f"column {SERIES}: holds a number that is too large"),
        11: ("subject_id", "", "column subject_id: is empty"),
        12: (SERIES, "24 (0h) -> 22 (900000h)", "more than 720000 h pass without an observation"),
        29: (SERIES, "24 (0h) ->", f"column {SERIES}: piece 2 is not of the form"),
    }
    for row, (column, content, _) in cells.items():
        bad.loc[row, column] = content
    bad["clinical_context"] = f"54-year-old {MARKER}"
    return bad, {row: problem for row, (_, _, problem) in cells.items()}
