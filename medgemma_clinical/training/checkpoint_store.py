"""Training checkpoints on disk: the two latest, each known to be whole by its hash."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgemma_clinical.files import InputError, atomic, remove

logger = logging.getLogger(__name__)

FORMAT = 6
"""Rises when older checkpoints can no longer be resumed."""

KEPT = 2
FILE_NAME = re.compile(r"([0-9]{8})-([0-9a-f]{64})\.pt")
"""Running number and SHA-256 of a checkpoint's file."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """All that training needs to continue as if it had not been stopped; tensors and plain types.

    Attributes:
        weights: of each parameter that learns, by its name.
        average: exponential average of each.
        average_steps: optimizer steps so far.
        best: averaged weights of the best epoch; empty before the first.
        optimizer: state dict.
        schedule: state dict.
        random: states of the random generators of each process, "cpu" and "cuda".
        progress: attributes of ``Progress``.
        stopping: attributes of ``EarlyStopping``.
    """

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    average_steps: int
    best: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    random: list[dict[str, Tensor]]
    progress: dict[str, Any]
    stopping: dict[str, Any]


class DamagedCheckpointError(InputError):
    """A checkpoint's file is not as it was written."""


class CheckpointStore:
    """The latest checkpoints of a stage, in files ``NUMBER-SHA256.pt``.

    Args:
        folder: where they lie; made by the first ``save``.
    """

    def __init__(self, folder: Path) -> None:
        """Keep the place."""
        self.folder = folder
        self._damaged: set[Path] = set()

    def files(self) -> list[Path]:
        """Return the checkpoints' files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if FILE_NAME.fullmatch(path.name))

    def save(self, checkpoint: TrainingCheckpoint) -> None:
        """Write a checkpoint beside the one before; older and damaged ones are removed."""
        files = self.files()
        number = 1 + (int(files[-1].name[:8]) if files else 0)
        buffer = io.BytesIO()
        # Not ``asdict``, which would copy each tensor.
        content = {each.name: getattr(checkpoint, each.name) for each in fields(checkpoint)}
        torch.save({"format": FORMAT, **content}, buffer)
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        self.folder.mkdir(exist_ok=True)
        with atomic(self.folder / f"{number:08d}-{digest}.pt") as temporary:
            temporary.write_bytes(buffer.getbuffer())
        whole = [path for path in files if path not in self._damaged]
        for path in {*files} - {*whole[1 - KEPT :]}:
            remove(path)

    def newest(self) -> TrainingCheckpoint:
        """Read the newest checkpoint that is whole; nothing on disk is changed.

        Raises:
            InputError: none is whole, or the newest is of another format.
            OSError: one cannot be read.
        """
        for path in reversed(self.files()):
            try:
                return read_checkpoint(path)
            except DamagedCheckpointError as error:
                self._damaged.add(path)
                logger.warning("%s: resuming from the one before", error)
        raise InputError(
            f"--resume {self.folder}: no checkpoint is whole: start again without --resume"
        )


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """Read one checkpoint; code that a file may carry does not run.

    Raises:
        DamagedCheckpointError: the file is not as it was written.
        InputError: it is of another format, or no checkpoint.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() not in path.name:
        raise DamagedCheckpointError(f"{path}: damaged")
    again = "start again without --resume"
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = content.pop("format")
    except (pickle.UnpicklingError, RuntimeError, AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not a training checkpoint: {again}") from error
    if found != FORMAT:
        raise InputError(
            f"{path}: a checkpoint of format {found}, this program reads {FORMAT}: continue with "
            f"the version that wrote it, or {again}"
        )
    return TrainingCheckpoint(**content)
