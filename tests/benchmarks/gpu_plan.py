"""What the steps of gpu.py share: where they work, at which size, and how they run the program.

The program is imported when it is used: importing it touches the card.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from common import SAMPLE


class SkippedError(Exception):
    """A step cannot run on this machine; the text says why."""


@dataclass(frozen=True)
class Result:
    """What a step that passed has measured: figures, and what deserves a look."""

    figures: str
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Where and at which size the steps run.

    Attributes:
        folder: temporary, shared by all steps.
        toy: models of two narrow layers, for a machine without a GPU.
        peak_tflops: dense bfloat16 teraflop a second of the card by its data sheet, if known.
    """

    folder: Path
    toy: bool
    peak_tflops: float | None = None

    @property
    def model(self) -> Path:
        """Folder of the model in the shape of MedGemma-4B."""
        return self.folder / "model"

    @property
    def shallow(self) -> Path:
        """Folder of a model as wide: two layers, a small vocabulary, a window of 128 positions."""
        return self.folder / "shallow"

    @property
    def patients(self) -> int:
        """Rows of the data that the runs read: four fifths train."""
        return 40 if self.toy else 120

    @property
    def data(self) -> Path:
        """The first rows of the sample data."""
        return self.folder / "patients.csv"

    @property
    def runs(self) -> Path:
        """Output folder of the stages."""
        return self.folder / "runs"

    def dtype(self) -> torch.dtype:
        """Return the dtype that the program chooses on this machine."""
        return torch.bfloat16 if arguments_of().precision == "bf16" else torch.float32


def on_gpu() -> bool:
    return torch.cuda.is_available()


def skip_without_gpu() -> None:
    """Leave a step that measures CUDA.

    Raises:
        SkippedError: there is no GPU.
    """
    if not on_gpu():
        raise SkippedError("no GPU")


def run_program(*words: str, code: int = 0) -> str:
    """Run the trainer in this process; return what it prints, which also goes to stdout.

    Raises:
        AssertionError: another exit code.
    """
    import medgemma_trainer as trainer
    from medgemma_clinical.evaluation import metrics

    metrics.REPLICATES = 20  # the intervals need not be good
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        ended = trainer.main([*words])
    sys.stdout.write(text.getvalue())
    lines = text.getvalue().strip().splitlines() or [""]
    assert ended == code, f"the program ended with {ended} instead of {code}: {lines[-1]}"
    return text.getvalue()


def arguments_of(*words: str) -> argparse.Namespace:
    """Parse flags as the program does."""
    import medgemma_trainer as trainer
    from medgemma_clinical.commands.flags import complete

    return complete(trainer.build_parser().parse_args(["--data_path", str(SAMPLE), *words]))


def data_of(args: argparse.Namespace) -> Any:
    """Read and split the sample data as the program does."""
    import medgemma_trainer as trainer
    from medgemma_clinical.data.training_data import prepare_data

    return prepare_data(
        trainer.read_dataset(args),
        max_samples=args.max_samples,
        seed=args.seed,
        prompts=trainer.prompt_options(args),
    )
