"""TrajectoryClassifier: scikit-learn's own checks, its tools on a DataFrame, its parameters."""

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

from arrow_tables import ArrowStream
from conftest import SAMPLE
from medgemma_clinical.files import InputError
from medgemma_trainer import TrajectoryClassifier, fit_trajectory
from stages import parsed

pytestmark = pytest.mark.slow

LABEL = "label_escalation"


class OfArrays(TrajectoryClassifier):
    """The classifier on arrays, which scikit-learn's checks consist of: a row is a series."""

    @staticmethod
    def table(array):
        rows = [" -> ".join(f"{x} ({k}h)" for k, x in enumerate(row) if x == x) for row in array]
        return pd.DataFrame({"clinical_trajectory": rows})

    def fit(self, X, y):
        X, y = validate_data(self, X, y, ensure_all_finite="allow-nan", ensure_min_samples=2)
        return super().fit(self.table(X.tolist()), y)

    def predict_proba(self, X):
        if hasattr(self, "classes_"):
            X = validate_data(self, X, reset=False, ensure_all_finite="allow-nan")
            X = self.table(X.tolist())
        return super().predict_proba(X)


def test_scikit_learns_checks_pass_but_for_those_that_it_skips(monkeypatch):
    monkeypatch.setattr("medgemma_clinical.data.trajectories.MIN_CELL", 1)  # some fit six rows
    estimator = OfArrays(trajectory_epochs=2, encoder_lr=5e-2, allow_duplicates=True)
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    assert len(results) > 40
    assert [x["check_name"] for x in results if x["status"] not in ("passed", "skipped")] == []


@pytest.fixture(scope="module")
def rows():
    """Ninety stays of the sample data, numbered otherwise than by position."""
    return pd.read_csv(SAMPLE, nrows=90).set_index(np.arange(90) + 500)


@pytest.fixture(scope="module")
def model():
    """One epoch."""
    return TrajectoryClassifier(trajectory_epochs=1)


def test_the_parameters_are_flags_with_their_defaults():
    defaults = vars(parsed())
    parameters = TrajectoryClassifier().get_params()
    assert parameters.pop("random_state") == defaults["seed"]
    assert parameters.pop("description") is None
    assert parameters == {name: defaults[name] for name in parameters}


def test_fit__trains_stage_1_of_the_same_flags_and_writes_nothing(
    rows, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    parts = rows.assign(split=["train", "val", "test"] * 30)  # a split of its own is taken
    own, stage_1 = model.fit(parts), fit_trajectory(parts, trajectory_epochs=1)
    np.testing.assert_array_equal(own.predict_proba(rows), stage_1.predict_proba(rows))
    assert not list(tmp_path.iterdir())
    joblib.dump(own, "model.joblib")
    again = joblib.load("model.joblib")
    np.testing.assert_array_equal(again.predict_proba(rows), own.predict_proba(rows))
    own.fit(rows).model_.save_pretrained(tmp_path / "kept")
    with pytest.raises(ValueError, match="not tested"):
        own.model_.results()


def test_labels_beside_the_rows_stand_in_for_their_column(rows, model):
    expected = model.fit(rows).predict_proba(rows)
    words = np.where(rows[LABEL] == 1, "yes", "no")
    for table in (rows.drop(columns=LABEL), ArrowStream(rows.assign(**{LABEL: 0}))):
        own = model.fit(table, words)
        np.testing.assert_array_equal(own.predict_proba(table), expected)
        assert own.classes_.tolist() == ["no", "yes"]
        assert set(own.predict(table)) <= {"no", "yes"}
    with pytest.raises(InputError, match="ndarray"):
        model.fit(rows.to_numpy(), words)


def test_scikit_learns_tools_take_a_table(rows, model):
    y, folds = rows[LABEL], {"cv": GroupKFold(3), "groups": rows["subject_id"]}
    risks = cross_val_predict(model, rows, method="predict_proba", **folds)
    again = cross_val_predict(model, rows.drop(columns=LABEL), y, method="predict_proba", **folds)
    np.testing.assert_array_equal(risks, again)
    assert (cross_val_score(model, rows, y, scoring="roc_auc", **folds) > 0).all()
    search = GridSearchCV(model, {"members": [1, 2]}, scoring="roc_auc", cv=2, refit=False)
    assert len(search.fit(rows, y).cv_results_["params"]) == 2
