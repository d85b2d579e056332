"""Metrics for TensorBoard, Weights & Biases or MLflow: numbers only, never text of a patient."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

Track = Callable[[Mapping[str, float], int], None]
"""Sends metrics and the optimizer step that they belong to."""

PROJECT = "medgemma_clinical"
"""Name of the project, or experiment, at a tracker."""

OPTIONS: dict[str, dict[str, Any]] = {
    "wandb": {
        "settings": {
            "console": "off",
            "disable_code": True,
            "disable_git": True,
            "x_disable_meta": True,
        }
    },
    "mlflow": {"tags": {"mlflow.user": "", "mlflow.source.name": "medgemma_trainer.py"}},
    "aim": {"capture_terminal_logs": False, "system_tracking_interval": None},
    "dvclive": {"save_dvc_exp": False, "dvcyaml": None},
    "trackio": {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False},
}
"""Without these, trackers would take along the terminal's text, command line, code and user."""

NO_USAGE_DATA = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}
"""Settings by which trackers send nothing about the user to their makers."""


def check_tracker(name: str) -> None:
    """Check that a tracker is installed; "none" always is."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a bare folder of that name is no package
        raise InputError(f"--report_to {name}: not installed: pip install {name}")


@contextlib.contextmanager
def tracking(name: str, folder: Path, numbers: Mapping[str, float]) -> Iterator[Track]:
    """Yield a function that sends metrics to a tracker; "none" yields one that does nothing."""
    if name == "none":
        yield lambda metrics, step: None
        return
    os.environ.update({**NO_USAGE_DATA, **os.environ})  # read when a tracker is imported
    project = ProjectConfiguration(logging_dir=str(folder))
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", log_with=name, project_config=project)
    location = {"dir": str(folder)} if name in ("wandb", "dvclive") else {}
    try:
        options = {name: {**OPTIONS.get(name, {}), **location}}
        accelerator.init_trackers(PROJECT, dict(numbers), options)
    except Exception as error:  # each tracker has errors of its own
        problem = str(error).partition("\n")[0]
        raise InputError(f"--report_to {name}: cannot start: {problem}") from error
    failures: list[Exception] = []  # after the first one training goes on without the tracker

    def send(metrics: Mapping[str, float], step: int) -> None:
        try:
            if not failures:
                accelerator.log(dict(metrics), step=step)
        except Exception as error:
            failures.append(error)
            logger.warning("--report_to %s: failed, training continues: %s", name, error)

    try:
        yield send
    finally:
        with contextlib.suppress(Exception):  # a result is not lost for its tracker
            accelerator.end_training()
