"""``predict``: score new rows with a trained model, and evaluate it where they have labels."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import (
    CENSORING,
    MIN_CELL,
    SEED,
    SHOW_VALUES,
    Table,
    check_quantization,
    check_threshold,
    parse_encoder,
)
from medgemma_clinical.flags import POSITIVE, Flag, names
from medgemma_clinical.models import choices

CHECKPOINT = Flag("checkpoint", Path, help="a stage folder, or stage 1's .pt", required=True)
USE = Flag("use", str, "stage", "stage, best or a baseline gives `probability`")
ENCODER = Flag("encoder", parse_encoder, help="your own class that it was trained with")
MODEL_NAME = Flag("model_name", str, help="where the base model lies, if it has moved")
TEXT_MODEL = Flag("text_model", str, help="where the encoder of texts lies, if it has moved")

FLAGS: Table = {
    "rows": (
        CHECKPOINT,
        Flag("data_path", Path, help="rows to score, of a model of --dataset dka"),
        Flag("data_dir", Path, help="rows to score, of a model of --dataset srtr"),
        Flag("dataset", str, help="refused unless the model was trained on it"),
        Flag("organ", str, help="refused unless the model was trained on it"),
        Flag("site", str, help="column of hospitals or units"),
        Flag("strict", bool, help="refuse rows that cannot be scored"),
        SHOW_VALUES,
    ),
    "what to write": (
        Flag("predictions", Path, help="CSV to write", required=True),
        USE,
        Flag("threshold", check_threshold, help="0.1 or 'sensitivity 0.9'; that of the training"),
        Flag("update", Path, help="write a recalibrated model", metavar="DIR"),
        Flag("aggregate", Path, help="write what sites can pool", metavar="JSON"),
        Flag("explain", bool, help="page of single patients"),
        Flag("patients", names, help="only these rows", needs="--explain"),
    ),
    "evaluation": (
        Flag("primary", str, help="baseline to compare with; that of the training"),
        CENSORING,
        SEED,
        MIN_CELL,
    ),
    "computation": (
        Flag("batch_size", POSITIVE, help="rows in one forward pass"),
        MODEL_NAME,
        TEXT_MODEL,
        ENCODER,
        Flag("quantization", check_quantization, help="that of the training"),
        Flag("precision", choices.PRECISIONS, help="that of the training"),
        Flag("attention", choices.ATTENTIONS, "sdpa", "attention kernels"),
    ),
}


def run(args: Namespace, trainer: Any) -> int:
    """Write a prediction for each row."""
    from medgemma_clinical.commands import predictions  # with torch, once the flags are read
    from medgemma_clinical.distributed import computing

    with computing():
        return predictions.predict(args, trainer.TrajectoryModel)
