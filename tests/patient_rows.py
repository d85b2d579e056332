"""An explained row that the tests of the page of patients share, and a page of rows."""

import numpy as np

from medgemma_clinical.evaluation.patients import Explanation, patients_page
from medgemma_clinical.evaluation.report import write_report
from pages import OUTCOME

THRESHOLD = 0.2532

ROW = Explanation(
    id="<i>7</i> & $x$",
    probability=0.4,
    features=("lactate", "pH", "never"),
    units=("mmol/L", "", "x"),
    times=np.array([0.0, 5.0, 30.0]),
    values=np.array([[2.0, np.nan, np.nan], [4.5, 7.2, np.nan], [np.nan, 7.3, np.nan]]),
    references=((None, 2.0), (7.35, 7.45), None),
    spreads=np.array([2.0, 0.1, np.nan]),
    observations=("lactate 2 mmol/L", "lactate 4.5 mmol/L, pH 7.2", "pH 7.3"),
    hours=np.array([0.0, 5.0, 30.0, 48.0]),
    risks=np.array([0.1, 0.35, 0.3, 0.4]),
    static={"age": "54"},
    without={"lactate": 0.2, "pH": None},
)


def write_page(folder, *rows):
    """Write a page of rows and return its path."""
    path = folder / "out.patients.html"
    notes, method = ["None of these rows is in the training data."], {"Model": "Stage 1"}
    write_report(path, patients_page(rows, OUTCOME, THRESHOLD, notes, method))
    return path
