"""Trained models rebuilt from their checkpoints, for predictions and for the next stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.models.encoder import Encoder
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedModel:
    """A trained model ready to score.

    Attributes:
        model: on the default device, in evaluation mode.
        config: its checkpoint's.
        tokenizer: None for stage 1.
    """

    model: TrajectoryClassifier | TrajectoryLLM
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def rule(self) -> DecisionRule:
        """Return how a logit becomes a probability and a prediction."""
        return DecisionRule.from_config(self.config)

    @property
    def prompts(self) -> PromptOptions:
        """Return the options of the prompts that trained the model."""
        return prompts_of(self.config)


def checkpoint_place(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: stage 1's file, or ``best`` of stages 2 and 3.

    Raises:
        InputError: there is none.
    """
    raise NotImplementedError


def read_trained_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration without loading a language model.

    Args:
        path: a stage's folder, its ``best``, or stage 1's file.

    Raises:
        InputError: no checkpoint there, damaged, or of another format.
    """
    raise NotImplementedError


def load_trained_model(
    path: Path,
    encoders: dict[str, type],
    model_name: str | None = None,
    quantization: str | None = None,
    precision: str | None = None,
) -> TrainedModel:
    """Load a trained model, every key of it.

    Args:
        path: a stage's folder, its ``best``, or stage 1's file.
        encoders: class of each registered name.
        model_name: where the base model lies now; None takes the stored place.
        quantization: of the base model; None takes the stored one.
        precision: ``bf16`` or ``fp32``; None takes the stored one.

    Raises:
        InputError: no checkpoint there, damaged, or its base model cannot be loaded.
    """
    raise NotImplementedError


def prompts_of(config: dict[str, Any]) -> PromptOptions:
    """Return the prompt options of a stage 2 or 3 configuration."""
    return PromptOptions(**config["prompts"])


def load_stage1_encoder(
    path: Path,
    encoders: dict[str, type],
    solver: str,
    time_scale: float | None,
    data: Data,
) -> tuple[Encoder, dict[str, Tensor]]:
    """Rebuild stage 1's encoder for a stage with a language model.

    Args:
        path: stage 1's file.
        encoders: class of each registered name.
        solver: of this run.
        time_scale: the user's, None where the flag is left out.
        data: of this run.

    Returns:
        The encoder, and the state dict of its head.

    Raises:
        InputError: the encoder reads other features, or patients who trained it are held out here.
    """
    raise NotImplementedError
