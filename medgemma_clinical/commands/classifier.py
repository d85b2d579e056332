"""TrajectoryClassifier: stage 1 as scikit-learn's tools fit, clone and tune it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted

from medgemma_clinical.commands.python import Training
from medgemma_clinical.data.dka import Meaning
from medgemma_clinical.data.table_files import ArrowTable, as_frame
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.trajectory_model import TrajectoryModel


@dataclass(eq=False, repr=False, kw_only=True)
class TrajectoryClassifier(ClassifierMixin, BaseEstimator):
    """Stage 1, encoder and head, as a scikit-learn classifier of the rows of a DataFrame.

    Import it from ``medgemma_trainer``. The rows have the DKA format. A tenth of the patients that
    it is fitted on, the validation part, chooses the epoch, and all others train, unless there is a
    column ``split``. Nothing is written: ``model_.save_pretrained(folder)`` keeps the model.

    Args:
        trajectory_epochs: and all others: the flags of the command line of the same name.
        description: what series and label are: a ``Description``, its JSON as a dict, or the path
            of the JSON or of the table beside it.
        random_state: ``--seed``; a number, a generator of numpy, or None for a new seed.

    Attributes:
        classes_: the two labels; the second one is the event.
        model_: the ``TrajectoryModel``.
    """

    training: ClassVar[Training]  # the script sets it

    trajectory_epochs: int = 100
    batch_size: int = 16
    encoder_lr: float = 1e-3
    dropout: float = 0.5
    patience: int = 10
    members: int = 1
    time_scale: float | None = None
    series: Sequence[str] | None = None
    max_len: int | None = None
    text_features: str = "none"
    text_model: str | None = None
    label_column: str = "label_escalation"
    series_name: str | None = None
    unit: str | None = None
    outcome: str | None = None
    allow_duplicates: bool = False
    description: Meaning | None = None
    random_state: Any = 0

    def __sklearn_tags__(self) -> Tags:
        """Return the tags by which scikit-learn knows a classifier of two classes of a table."""
        tags: Tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.string = tags.input_tags.allow_nan = True
        return tags

    def fit(self, rows: pd.DataFrame | ArrowTable, y: Any = None) -> Self:
        """Train on N rows; ``y`` (N,), two labels of any type, stands in for the label column."""
        rows = as_frame(rows)
        if not isinstance(rows, pd.DataFrame):
            raise InputError(f"rows of type {type(rows).__name__}: give a table, a row a stay")
        classes = np.array([0, 1])
        if y is not None:
            y = column_or_1d(y, warn=True)
            check_consistent_length(rows, y)
            check_classification_targets(y)
            classes, codes = np.unique(y, return_inverse=True)
            if len(classes) != 2:  # the words that scikit-learn's checks expect
                text = f"The type of the target is {type_of_target(y)}, of {len(classes)} classes"
                raise ValueError(f"Only binary classification is supported. {text}")
            rows = rows.assign(**{self.label_column: codes})
        flags: dict[str, Any] = {"max_samples": 0, **self.get_params(deep=False)}
        kind, seed = self.training.model.datasets["dka"], flags.pop("random_state")
        flags.pop("description")
        options = {name: flags.pop(name, None) for name in kind.options}
        options["outcome_kind"] = "label"  # times need fit_trajectory
        dataset = kind(rows, description=self.description, **options)
        dataset.held_out = ("val",)
        drawn = not isinstance(seed, (int, np.integer))
        flags["seed"] = check_random_state(seed).randint(2**31) if drawn else seed
        self.model_: TrajectoryModel = self.training.fit_trajectory(dataset, **flags)
        self.classes_ = classes
        return self

    def predict_proba(self, rows: pd.DataFrame | ArrowTable) -> NDArray[np.float64]:
        """Return the probabilities (N, 2) of each of ``classes_``."""
        check_is_fitted(self)
        return self.model_.predict_proba(rows)

    def predict(self, rows: pd.DataFrame | ArrowTable) -> NDArray[Any]:
        """Return the likelier label of each row (N,); ``model_.predict`` goes by its threshold."""
        likelier = self.predict_proba(rows).argmax(axis=1)
        return self.classes_[likelier]
