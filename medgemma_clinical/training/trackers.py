"""Figures for TensorBoard, Weights & Biases or MLflow: numbers only, never text of a patient."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

Track = Callable[[Mapping[str, float], int], None]
"""Sends figures and the optimizer step that they belong to."""

PROJECT = "medgemma_clinical"
"""Name of the project, or experiment, at a tracker."""

WANDB_SETTINGS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
}
"""Weights & Biases would take along the terminal's text, the command line and the code."""

MLFLOW_TAGS = {"mlflow.user": "", "mlflow.source.name": "medgemma_trainer.py"}
"""MLflow would take along the user's name and the path of the program."""


def check_tracker(name: str) -> None:
    """Check that a tracker is installed; "none" always is.

    Raises:
        InputError: saying how to install it.
    """
    if name == "none":
        return
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a bare folder of that name is no package
        raise InputError(f"--report_to {name}: not installed: pip install {name}")


@contextlib.contextmanager
def tracking(name: str, folder: Path, numbers: Mapping[str, float]) -> Iterator[Track]:
    """Yield a function that sends figures to a tracker; "none" yields one that does nothing.

    A tracker that fails once it has started gets one warning, and training goes on without it.

    Args:
        name: "none", "tensorboard", "wandb" or "mlflow".
        folder: for the files of the tracker.
        numbers: of the run's arguments.

    Raises:
        InputError: the tracker cannot start.
    """
    if name == "none":
        yield lambda figures, step: None
        return
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=name,
        project_config=ProjectConfiguration(logging_dir=str(folder)),
    )
    try:
        options = {
            "wandb": {"dir": str(folder), "settings": WANDB_SETTINGS},
            "mlflow": {"tags": MLFLOW_TAGS},
        }
        # TensorBoard names its files by the machine.
        with mock.patch("socket.gethostname", return_value="host"):
            accelerator.init_trackers(PROJECT, dict(numbers), options)
    except Exception as error:  # each tracker has errors of its own
        raise InputError(f"--report_to {name}: cannot start: {_first_line(error)}") from error
    works = True

    def attempt(action: Callable[[], None]) -> None:
        """Run an action of the tracker, unless an earlier one has failed."""
        nonlocal works
        try:
            if works:
                action()
        except Exception as error:
            works = False
            logger.warning(
                "--report_to %s: failed, training goes on without it: %s", name, _first_line(error)
            )

    try:
        yield lambda figures, step: attempt(lambda: accelerator.log(dict(figures), step=step))
    finally:
        attempt(accelerator.end_training)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
