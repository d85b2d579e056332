"""Trained weights on the disk: written whole, read without running anything they may carry.

Stage 1 is one file: encoder with its normaliser, head, configuration, hashes of the patients that
trained. Stages 2 and 3 are a folder: adapter/ (PEFT), modules.safetensors (all parts beside the
language model), config.json, README.md, NOTICE.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medgemma_clinical.files import InputError, atomic, file_hash, json_hash, remove, write_json
from medgemma_clinical.files import write_text as write_file
from medgemma_clinical.models.encoder import Encoder
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

TRAJECTORY_FILE = "medgemma_trajectory_best.pt"
CHECKPOINT_FORMAT = 4
"""Rises when the program and its older checkpoints no longer fit each other."""

ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
MODULE_WEIGHTS = "modules.safetensors"

HAI_DEF_NOTICE = (
    "HAI-DEF is provided under and subject to the HAI-DEF Terms of Use found at "
    "https://developers.google.com/health-ai-developer-foundations/terms\n"
)
"""Must accompany a derivative of MedGemma. Source: HAI-DEF Terms of Use, distribution."""


@dataclass(frozen=True)
class TrajectoryCheckpoint:
    """Content of a stage 1 file.

    Attributes:
        config: of the model and its data, plain types.
        encoder: state dict of the encoder.
        head: state dict of the head.
        train_patients: (n,) int64, sorted hashes of the patients that trained.
    """

    config: dict[str, Any]
    encoder: dict[str, Tensor]
    head: dict[str, Tensor]
    train_patients: NDArray[np.int64]


def encoder_config(name: str, encoder: Encoder) -> dict[str, Any]:
    """Return what rebuilds an encoder: its registered name and its constructor's keywords."""
    return {"name": name, **encoder.config}


def save_trajectory(
    path: Path,
    model: TrajectoryClassifier,
    config: dict[str, Any],
    train_patients: NDArray[np.int64],
) -> None:
    """Write stage 1's best model; plain types and tensors only.

    Args:
        path: of the file.
        model: encoder and head.
        config: what rebuilds the model, and what it was trained on; plain types.
        train_patients: see ``Data.training_patients``.
    """
    raise NotImplementedError


def read_trajectory(path: Path) -> TrajectoryCheckpoint:
    """Read a stage 1 file.

    Raises:
        InputError: missing, damaged, not a stage 1 file, or of another format.
    """
    raise NotImplementedError


def load_trajectory(model: TrajectoryClassifier, path: Path) -> None:
    """Load a stage 1 file into ``model``, every key.

    Raises:
        InputError: see ``read_trajectory``.
        RuntimeError: the weights do not fit the model.
    """
    raise NotImplementedError


def save_llm(folder: Path, model: TrajectoryLLM, config: dict[str, Any]) -> None:
    """Write the best model of stage 2 or 3 as a folder.

    Args:
        folder: replaced as a whole where it exists.
        model: of which all but the base weights are written.
        config: what rebuilds the model, and what it was trained on; plain types.
    """
    raise NotImplementedError


def load_llm(model: TrajectoryLLM, folder: Path) -> None:
    """Load the best model of stage 2 or 3 into ``model``, every key of adapter and modules.

    Raises:
        InputError: see ``read_config``.
        RuntimeError: the weights do not fit the model.
    """
    raise NotImplementedError


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a stage 2 or 3 folder, its files compared with their hashes.

    Raises:
        InputError: a listed file is missing or changed, or the folder has another format.
    """
    raise NotImplementedError
