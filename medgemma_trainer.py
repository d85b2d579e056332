"""Fine-tune MedGemma on irregular clinical series: encoder, soft prompt, LoRA, three stages.

    python medgemma_trainer.py --demo      # all three on sample data, minutes on a laptop CPU

    python medgemma_trainer.py --trajectory_only --dataset dka --data_path FILE.csv
    python medgemma_trainer.py --mode classification --dataset dka --data_path FILE.csv \\
        --ode_checkpoint ./checkpoints_medgemma_dka/medgemma_trajectory_best.pt
    python medgemma_trainer.py --mode generative --dataset dka --data_path FILE.csv \\
        --ode_checkpoint ./checkpoints_medgemma_dka/medgemma_trajectory_best.pt
    python medgemma_trainer.py --predict --checkpoint ./checkpoints_medgemma_dka/classification \\
        --data_path NEW.csv --predictions OUT.csv

A batch on its way: series -> ClinicalODERNN -> one state per observation; then

    stage 1  trajectory       attention-pooled head -> logit
    stage 2  classification   <bos> [soft tokens] [text] -> LLM -> last position -> head -> logit
    stage 3  generative       <bos> [soft tokens] [text] [report] -> LLM -> lm_head on the report

What lands in --output_dir: medgemma_trajectory_best.pt (stage 1's winner) and a folder for each
stage with run.json, history.jsonl, metrics.json, predictions_val.csv, predictions_test.csv,
report.html, best/ (stages 2 and 3) and generations_test.jsonl (stage 3).

Letters: B patients, L observations, F features, H state, P soft tokens, T text tokens,
S = 1 + P + T, D width of the LLM.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

if __name__ == "__main__":

    def leave(*_: object) -> None:
        """End by Ctrl-C while the libraries load, which takes two seconds; then main listens."""
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nobody ignores it
        signal.signal(signal.SIGINT, leave)

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dataset_format import (
    MAX_LEN,
    MAX_LEN_SEVERAL,
    OUTGOING,
    PARTIAL,
    SERIES_TEXT,
    SHOW_VALUES,
    Batch,
    Description,
    Findings,
    InputError,
    MIMICtrajectoryDataset,
    Parser,
    TrajectoryDataset,
    atomic,
    bands_of,
    case_mix_of,
    check_header,
    description_path,
    find_series,
    flush,
    flush_entry,
    forgiving,
    hash_of,
    ids_of,
    names,
    one_line,
    pack,
    partial_of,
    patient_events,
    plainly,
    read_pieces,
    remove,
    summarize,
    unpack,
)
from srtr_dataset import ORGANS, TABLES, SRTRTrajectoryDataset, find_table

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --------------------------------------------------------------------------- flags
#
# They stand before torch is imported, which takes 1.3 s: --help answers in a third of that.

DEFAULT_MODEL = "google/medgemma-4b-pt"
TRACKERS = ("none", "tensorboard", "wandb", "mlflow")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def number(
    kind: type, low: float, high: float = math.inf, *, open_low: bool = False
) -> Callable[[str], Any]:
    """Give an argparse type for finite numbers from ``low`` to ``high``."""

    def convert(text: str) -> Any:
        """Read one number, or say why it is none that is wanted."""
        try:
            value = kind(text)
            float(value)  # a whole number beyond all floats is no size of anything
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of kind {kind.__name__}"
            ) from None
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            relation = "above" if open_low else "at least"
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {relation} {low:g}{limit}")
        return value

    return convert


def solver_name(text: str) -> str:
    """Give an argparse type for the name of an ODE solver."""
    if text == "rk4":  # the encoder's own: torch need not be asked
        return text
    from dte_encoder import check_solver

    try:
        check_solver(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def precision_name(text: str) -> str:
    """Give an argparse type for the precision; float16 gets its reason."""
    if text in ("fp16", "float16", "half"):
        raise argparse.ArgumentTypeError("float16 overflows in Gemma 3: use bf16 or fp32")
    if text not in ("auto", "bf16", "fp32"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, bf16, fp32")
    return text


def build_parser() -> Parser:
    """Give the parser; every default of the program stands here or below, and nowhere else."""
    parser = Parser(
        prog="medgemma_trainer.py",
        description="Fine-tune MedGemma on irregular clinical series, in three stages.",
        usage="python medgemma_trainer.py [flags]",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to do").add_argument
    add("--trajectory_only", action="store_true", help="stage 1: train ODE-RNN only, skip LLM")
    add(
        "--mode",
        choices=("classification", "generative"),
        default="classification",
        help="stage 2 or 3",
    )
    add("--demo", action="store_true", help="all three stages on sample data with the tiny model")
    add("--ablation", action="store_true", help="train and compare what text and soft prompt add")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="compare stage folders, paired")
    add("--seeds", type=POSITIVE, metavar="N", help="the same with N seeds from --seed on, pooled")
    add("--predict", action="store_true", help="score new rows with a trained model")
    add("--checkpoint", type=Path, help="--predict: a run's stage folder, or stage 1's .pt")
    add("--predictions", type=Path, help="--predict: the CSV to write")
    add("--strict", action="store_true", help="--predict: refuse a file with a row it cannot score")
    add_data_flags(parser)
    add_training_flags(parser)
    add_model_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, help="./checkpoints_medgemma_{dataset} when not given")
    add("--report_patients", action="store_true", help="ten largest errors by id in report.html")
    add("--dry_run", action="store_true", help="estimate memory, take two steps, write nothing")
    add("--log_file", default="auto", help="log path (auto = timestamped, none = disable)")
    add("--report_to", choices=TRACKERS, default="none", help="tracker that gets the figures")
    add("--resume", action="store_true", help="go on with the same command's run that was stopped")
    add(
        "--resume_anyway",
        action="store_true",
        help="--resume with another number of processes, not exactly",
    )
    add("--deterministic", action="store_true", help="on a GPU: only exactly repeatable kernels")
    add("--save_every", type=WHOLE, default=0, metavar="STEPS", help="keep the state within epochs")
    return parser


MOST = 10**9
"""Of whatever is counted: what is larger fits neither arrays nor, multiplied, floats."""

POSITIVE, WHOLE = number(int, 1, MOST), number(int, 0, MOST)
RATE = number(float, 0, 1, open_low=True)


LENGTHS = f"{MAX_LEN}, of several series {MAX_LEN_SEVERAL}, SRTR 50"


def add_data_flags(parser: Parser) -> None:
    """Add what is read, and what is asked of it."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("dka", "srtr"), default="dka", help="kind of data")
    add("--organ", choices=("kidney", "liver"), default="kidney", help="SRTR only")
    add("--data_path", type=Path, default=Path("dka_training_data.csv"), help="path to DKA CSV")
    add("--data_dir", type=Path, help="path to SRTR data directory")
    add("--landmark_days", type=WHOLE, help="SRTR: asked so long after listing; 365, liver 90")
    add("--horizon_days", type=POSITIVE, help="SRTR: days looked ahead; 365, liver 90")
    add(
        "--transplant",
        choices=("negative", "exclude"),
        default="negative",
        help="SRTR: a transplant within the horizon is label 0, or left out",
    )
    add("--series", type=names, metavar="NAME,NAME", help="DKA: read these series only")
    add("--max_len", type=POSITIVE, help=f"most recent observations kept; {LENGTHS}")
    add("--series_text", choices=SERIES_TEXT, default="all", help="series in the LLM's text")
    add("--text_context", choices=("full", "none"), default="full", help="context in the text")
    add("--max_text_tokens", type=POSITIVE, help="of longer prompts each series loses its oldest")
    add("--max_samples", type=WHOLE, default=10000, help="max patients (0 = all)")
    add("--cache_dir", type=Path, help="keep what was read there, and read it from there again")
    add("--show_values", action="store_true", help=SHOW_VALUES)


def add_training_flags(parser: Parser) -> None:
    """Add how long and how fast it learns."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=POSITIVE, default=10, help="training epochs of stages 2 and 3")
    add("--trajectory_epochs", type=POSITIVE, default=100, help="training epochs of stage 1")
    add("--batch_size", type=POSITIVE, default=16, help="patients a batch")
    add("--gradient_accumulation", type=POSITIVE, default=1, help="batches a step, stages 2 and 3")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--patience", type=POSITIVE, default=10, help="early stopping patience in epochs")
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="of split, initialisation, order, bootstrap",
    )
    add(
        "--calibrate",
        choices=("none", "platt"),
        default="none",
        help="recalibrate on the validation part",
    )
    add("--encoder_lr", type=RATE, default=2e-3, help="learning rate of the ODE-RNN and its head")
    add("--head_lr", type=RATE, default=1e-3, help="learning rate of stage 2's head")


def add_model_flags(parser: Parser) -> None:
    """Add what the encoder and the language model are."""
    add = parser.add_argument_group("ODE-RNN").add_argument
    add("--ode_checkpoint", type=Path, help="pretrained ODE-RNN .pt (auto-freezes ODE-RNN)")
    add("--freeze_ode", action="store_true", help="freeze ODE-RNN without loading checkpoint")
    add(
        "--time_scale",
        type=number(float, 0, open_low=True),
        help="ODE-RNN time normalization in hours; 72.0 (DKA), 8760 (kidney), 2160 (liver)",
    )
    add("--solver", type=solver_name, default="rk4", help="rk4, or any method of torchdiffeq")
    add = parser.add_argument_group("language model").add_argument
    add("--model_name", default=DEFAULT_MODEL, help="a Gemma 3: hub id, folder, or tiny")
    add(
        "--quantization",
        choices=("nf4", "none"),
        help="nf4 on CUDA, none elsewhere, when not given",
    )
    add("--precision", type=precision_name, default="auto", help="auto, bf16 or fp32")
    add("--soft_prompt", choices=("on", "off"), default="on", help="off: the LLM reads text alone")
    add(
        "--num_prefix_tokens",
        type=number(int, 1, 4096),
        default=8,
        help="soft tokens: the latest states",
    )
    add("--projection_lr", type=RATE, default=1e-3, help="learning rate of the projection")
    add("--adapter_lr", type=RATE, default=2e-4, help="learning rate of the LoRA adapter")
    add("--lora_rank", type=number(int, 1, 1024), default=8, help="LoRA r")
    add("--lora_alpha", type=POSITIVE, default=16, help="LoRA alpha")
    add("--lora_dropout", type=number(float, 0, 0.99), default=0.05, help="LoRA dropout")


if __name__ == "__main__":
    build_parser().parse_args()  # answers --help, and ends for a wrong flag

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # noqa: E402
from torch.nn import functional  # noqa: E402

from dte_encoder import (  # noqa: E402
    MAX_SCALED_GAP,
    MOST_ALONE,
    ClinicalODERNN,
    Plan,
    keep_freed_memory,
    one_thread,
)

logger = logging.getLogger("medgemma_trainer")

SAMPLE_DATA = Path(__file__).parent / "tests" / "data" / "physionet2012_bicarbonate.csv"
DEMO_FLAGS = "--max_samples 1000 --trajectory_epochs 10 --epochs 4 --adapter_lr 1e-2"
TRAJECTORY_FILE = "medgemma_trajectory_best.pt"
TRAJECTORY_FORMAT = 3
"""Rises when older code and stage 1's files no longer fit each other."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MULTIMODAL_KEYS = {r"^(model\.)?language_model\.(model\.)?": "model."}
"""Where the text model's weights lie within a multimodal Gemma 3 checkpoint."""

HAI_DEF_NOTICE = (
    "HAI-DEF is provided under and subject to the HAI-DEF Terms of Use found at "
    "https://developers.google.com/health-ai-developer-foundations/terms\n"
)
"""Must accompany a derivative of MedGemma. Source: HAI-DEF Terms of Use, distribution."""

VERDICT_WEIGHT = 50
"""Of the verdict in stage 3's loss, beside 1 for each other token of the report."""

LOSS_ROWS = 256
"""Places of reports whose logits over the vocabulary are held at a time: 0.27 GB in float32."""

IGNORED = -100
"""Target of positions without loss, as in ``torch.nn.functional.cross_entropy``."""

WEIGHT_DECAY, BETAS, EPSILON = 0.01, (0.9, 0.999), 1e-8
NORM_PIECE = 2**18
WARMUP_STEPS = 100
WARMUP_SHARE = 0.1
"""Warm-up lasts 100 optimizer steps, or a tenth of a shorter run."""

AVERAGE_DECAY = 0.998
"""Weights that are scored and kept are an exponential average over about 500 steps."""

BOOTSTRAP_REPLICATES = 1000
CONFIDENCE = 0.95
DECISION_THRESHOLD = 0.5
CHUNK_CELLS = 2**20
"""Draws times rows that are looked at together: 8 MiB an array."""

NEWTON_STEPS, NEWTON_PRECISION = 40, 1e-9
BENEFIT_AT = np.arange(1, 100) / 100
"""Threshold risks of the decision curve."""

FEWEST_IN_SUBGROUP = 10
"""Patients with and patients without an event that a judgement needs."""

EQUAL_RISKS = 1e-9
"""Log-odds that differ by less, for their size, count as equal."""

COMPARED = (("auroc", "AUROC", ".3f"), ("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f"))
CARD = {
    "Intended use": (
        "Research on the question above, on data like those of the training part. Not a medical "
        "device, not for clinical use."
    )
}
NO_LANGUAGE_MODEL = "No weights of MedGemma or another language model are part of this one."
GENERATOR = "MedGemma Clinical Fine-Tuning"
"""What a page says of who wrote it."""

INTERVALS_TOLD = (
    f"95 % percentile of {BOOTSTRAP_REPLICATES:,} draws of patients with all their rows; shares of "
    "none or all: exact"
)
STAGE_TITLES = {
    "trajectory": "Stage 1, trajectory alone",
    "classification": "Stage 2, classification",
    "generative": "Stage 3, written reports",
}

NOT_KNOWN = "\N{EN DASH}"
INK, GRID, MODEL, OTHER = "#000001", "#000002", "#000003", "#000004"
PAPER_COLOURS = {INK: "#1f2933", GRID: "#d9dee3", MODEL: "#0b6fa4", OTHER: "#b4531f"}
PAGE_COLOURS = {INK: "--ink", GRID: "--grid", MODEL: "--model", OTHER: "--other"}
"""Colours that pictures are drawn in, and the page's own that take their place."""
GENERATION_BATCH = 16
BUCKET = 25
"""Batches whose rows are sorted by length together: less padding, and still a random order."""

BOOSTING = {"learning_rate": 0.03, "max_iter": 200, "max_leaf_nodes": 8, "l2_regularization": 1.0}
"""Small trees, slowly: the library's own defaults overfit a few thousand patients."""

SANITY_BATCHES = 2

Track = Callable[[dict[str, float], int], None]
"""Sends figures and the optimizer step they belong to somewhere."""

TRACKED_AS = "medgemma_clinical"
"""Name of the project, or experiment, at a tracker."""

ADVICE = (
    "lower --batch_size and raise --gradient_accumulation as much, add --gradient_checkpointing, "
    "or shorten the text by --series_text or --max_text_tokens"
)
EXIT_DONE, EXIT_INPUT, EXIT_FAULT, EXIT_INTERRUPTED = 0, 2, 3, 130

LAST = "last"
"""Folder of the states that ``--resume`` goes on from."""

STATE_FORMAT = 5
"""Rises when older states can no longer be gone on from."""

ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"

ECHO_SECONDS = 10.0
"""Of several processes: a second signal within this time is the first one's echo."""

CACHE_FORMAT, CACHE_ENDING = 1, ".safetensors"
DATA_MODULES = ("dataset_format", "srtr_dataset")
SOURCE_MARK = "\0"
"""Stands for the place of the data in what the cache keeps of the log."""

ABANDONED_SECONDS = 24 * 3600.0
"""After so long nobody is still writing a half-written file of the cache."""

STATES_KEPT = 2
STATE_NAME = re.compile(r"([0-9]{8})-([0-9a-f]{64})\.safetensors")
"""A state's running number and the SHA-256 of its file."""

MOST_SKIPPED = 5
"""Steps in a row that are skipped for a loss or gradient that is no number."""

STEPS_UNREAD = 8
"""After so many steps their losses are read back. In between a step of stage 1 makes the host wait
for nothing on a GPU; but of several processes each asks the others for signals."""

IMMATERIAL = {
    *("output_dir", "data_path", "data_dir", "ode_checkpoint", "log_file", "report_to"),
    *("report_patients", "show_values", "seeds", "ablation", "cache_dir"),
    *("resume", "resume_anyway", "save_every"),
}
"""Flags that do not change a result; files are known by their content."""


class NonFiniteLossError(RuntimeError):
    """The loss is no longer a number; its text says where and what to do."""


# --------------------------------------------------------------------------- model parts


class Output(NamedTuple):
    """What a stage's model says of a batch.

    loss: scalar, a sum over ``terms`` (patients, or answer tokens), so that no mean depends on how
    rows fall into batches. logit (B,): log-odds of the event, float32.
    """

    loss: Tensor
    terms: int
    logit: Tensor


class PooledHead(nn.Module):
    """Read one logit from a series of states: attention-pooled, joined with the last.

    Pooling and reading are both linear, so each state is read first: what is pooled is two numbers
    of each, by a third, and not the state.
    """

    def __init__(self, hidden_dim: int, prevalence: float) -> None:
        """Start near everyone's risk in the training part.

        Args:
            hidden_dim: H.
            prevalence: share of events in the training part, within (0, 1).
        """
        super().__init__()
        bound = hidden_dim**-0.5  # as torch.nn.Linear begins
        self.weight = nn.Parameter(torch.empty(3, hidden_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.tensor([math.log(prevalence / (1 - prevalence))]))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Give logits (B,) for states (B, L, H) and their ``pooling_mask``."""
        # How much a state counts among all, what it says as one of them, and what as the last.
        numbers = functional.linear(states, self.weight)  # (B, L, 3)
        score, evidence = numbers.split_with_sizes([1, 2], dim=2)
        # One softmax pools and picks: where all but the last are masked, that one's share is 1.
        shares = (score + mask.to(states.dtype)).softmax(dim=1)  # (B, L, 2)
        logit: Tensor = (shares * evidence).sum(dim=(1, 2)) + self.bias
        return logit


def pooling_mask(present: Tensor) -> Tensor:
    """Give what is added to scores, (B, L, 2), of series whose real places are ``present`` (B, L).

    First for all real places, then for the last of them alone: 0 there, elsewhere -inf.
    """
    number = torch.arange(1, present.shape[1] + 1, device=present.device)
    last = number == present.sum(1, keepdim=True)
    return torch.where(torch.stack([present, last], dim=2), 0.0, -math.inf)


class PlannedBatch(Batch):
    """A batch, and what stage 1 makes of it without weights, where that was made ahead.

    plan: see ``ClinicalODERNN.plan``; pooling (B, L, 2): see ``pooling_mask``.
    """

    plan: NotRequired[Plan]
    pooling: NotRequired[Tensor]


def planned(encoder: ClinicalODERNN, batches: Sequence[Batch]) -> list[PlannedBatch]:
    """Plan batches; best ahead, and on the host: see ``ClinicalODERNN.plan``."""
    plans = [encoder.plan(each["times"], each["values"], each["observed"]) for each in batches]
    # Not one by one beside the plans: see ``Loader.__iter__``.
    masks = [pooling_mask(each["observed"].any(dim=2)) for each in batches]
    return [
        PlannedBatch(**batch, plan=plan, pooling=pooling)
        for batch, plan, pooling in zip(batches, plans, masks, strict=True)
    ]


class TrajectoryClassifier(nn.Module):
    """Stage 1: encoder and head alone."""

    def __init__(self, encoder: ClinicalODERNN, prevalence: float) -> None:
        """Join the encoder with a new ``PooledHead``."""
        super().__init__()
        self.encoder = encoder
        self.head = PooledHead(encoder.hidden_dim, prevalence)

    def forward(self, batch: PlannedBatch) -> Output:
        """Give the binary cross-entropy (sum over B) and the logit of each patient.

        A plain ``Batch`` is planned here.
        """
        known = batch if "plan" in batch else planned(self.encoder, [batch])[0]
        series = known["times"], known["values"], known["observed"]
        states = self.encoder(*series, known["plan"])  # (B, L, H)
        logit = self.head(states, known["pooling"])
        return classification_output(logit, batch["labels"])


class SoftPrompt(nn.Module):
    """Turn states into tokens as large as the LLM's own.

    Gemma multiplies token embeddings by sqrt(D) inside its embedding module and takes
    ``inputs_embeds`` as already multiplied. A projection that starts anywhere else is some fifty
    times too small or disturbs everything, so each token is normalised and gets the RMS of the
    scaled embeddings.
    """

    scale: Tensor

    def __init__(self, hidden_dim: int, width: int, scale: float) -> None:
        """Make the projection.

        Args:
            hidden_dim: H.
            width: D of the language model.
            scale: root mean square of the scaled token embeddings.
        """
        super().__init__()
        self.linear = nn.Linear(hidden_dim, width)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, states: Tensor) -> Tensor:
        """Give tokens (B, P, D) for states (B, P, H)."""
        projected = self.linear(states)
        return self.scale * functional.rms_norm(projected, projected.shape[-1:])


class Trajectory(NamedTuple):
    """What the encoder says of a batch to a language model.

    states (B, P, H): after the latest P observations; mask (B, P) bool, False where a patient has
    fewer; logit (B,): log-odds of stage 1's head, zero where there is none.
    """

    states: Tensor
    mask: Tensor
    logit: Tensor


def encode(
    encoder: ClinicalODERNN, head: PooledHead | None, batch: Batch, tokens: int
) -> Trajectory:
    """Encode a batch and keep what a language model needs of it."""
    states = encoder(batch["times"], batch["values"], batch["observed"])  # (B, L, H)
    present = batch["observed"].any(dim=2)
    logit = head(states, pooling_mask(present)) if head else states.new_zeros(len(states))
    place = present.sum(1)[:, None] - tokens + torch.arange(tokens, device=states.device)
    index = place.clamp(min=0)[:, :, None].expand(-1, -1, states.shape[2])
    return Trajectory(states.gather(1, index), place >= 0, logit)


class TextBatch(Batch):
    """A batch with text: T tokens, padded on the right; and a frozen encoder's ``Trajectory``.

    input_ids (B, T) int64; text_mask (B, T) bool; targets (B, T) int64, the token itself at places
    of the answer and ``IGNORED`` elsewhere; verdict (B,) int64, place of the last token before the
    verdict. states, states_mask, trajectory_logit: as in ``Trajectory``, where they are known.
    """

    input_ids: Tensor
    text_mask: Tensor
    targets: Tensor
    verdict: Tensor
    states: NotRequired[Tensor]
    states_mask: NotRequired[Tensor]
    trajectory_logit: NotRequired[Tensor]


class TrajectoryLLM(nn.Module):
    """Encoder, soft prompt and adapted language model; stages 2 and 3 add what they read out.

    With a head of stage 1, its logit is added to what the language model says, which so has to
    learn only what text and dynamics say beyond it. Where no stage 1 was trained a new head learns
    along.
    """

    def __init__(
        self,
        encoder: ClinicalODERNN | None,
        llm: PreTrainedModel,
        *,
        trajectory_head: PooledHead | None = None,
        tokens: int,
        scale: float,
        bos: int,
        verdict: tuple[int, int],
    ) -> None:
        """Join the parts.

        Args:
            encoder: gives one state per observation; None where text is all that is read.
            llm: a Gemma 3 text model with LoRA layers; its base weights are frozen.
            trajectory_head: stage 1's head; None where its logit is not to be added.
            tokens: P.
            scale: root mean square of the scaled token embeddings.
            bos: id of the token that begins every input.
            verdict: ids of the tokens that tell yes from no.
        """
        super().__init__()
        self.encoder = encoder
        self.trajectory_head = trajectory_head
        self.llm = llm
        self.projection = (
            None
            if encoder is None
            else SoftPrompt(encoder.hidden_dim, llm.config.hidden_size, scale)
        )
        self.tokens = 0 if encoder is None else tokens
        self.bos = bos
        self.verdict = verdict

    @property
    def body(self) -> nn.Module:
        """The decoder without ``lm_head``."""
        body: nn.Module = self.llm.get_base_model().model
        return body

    def trajectory(self, batch: TextBatch) -> Trajectory | None:
        """Give what the encoder says, known already where it is frozen; None without encoder."""
        if self.encoder is None:
            return None
        if "states" in batch:
            return Trajectory(batch["states"], batch["states_mask"], batch["trajectory_logit"])
        return encode(self.encoder, self.trajectory_head, batch, self.tokens)

    def embed(
        self, batch: TextBatch, trajectory: Trajectory | None, *, left: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lay out <bos> [soft tokens] [text] without holes.

        Args:
            batch: series and text.
            trajectory: of the batch.
            left: padding in front, for generation, instead of behind.

        Returns:
            embeddings (B, S, D) in the LLM's dtype, mask (B, S) bool, and order (B, S) int64: which
            of 1 + P + T slots stands at each place, to move anything else along.
        """
        embedding = self.llm.get_input_embeddings()
        text = embedding(batch["input_ids"])  # (B, T, D)
        first = batch["input_ids"].new_full((len(text), 1), self.bos)
        slots, masks = [embedding(first)], [torch.ones_like(first, dtype=torch.bool)]
        if trajectory is not None and self.projection is not None:
            slots.append(self.projection(trajectory.states).to(text.dtype))
            masks.append(trajectory.mask)
        everything = torch.cat([*slots, text], dim=1)
        mask = torch.cat([*masks, batch["text_mask"]], dim=1)
        holes = (mask if left else ~mask).int()  # sorted, they move to one side
        order = torch.argsort(holes, dim=1, stable=True)
        longest = int(mask.sum(1).max())
        order = order[:, -longest:] if left else order[:, :longest]
        embeddings = everything.gather(1, order[:, :, None].expand(-1, -1, everything.shape[2]))
        return embeddings, mask.gather(1, order), order

    def read(self, batch: TextBatch, trajectory: Trajectory | None) -> tuple[Tensor, Tensor]:
        """Run the decoder body; give hidden states (B, S, D) and the order of slots (B, S)."""
        embeddings, mask, order = self.embed(batch, trajectory)
        result = self.body(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False)
        return result.last_hidden_state, order

    @property
    def text_start(self) -> int:
        """Slot of the first text token: behind <bos> and P soft tokens."""
        return 1 + self.tokens


class LLMClassifier(TrajectoryLLM):
    """Stage 2: a linear head on the last position; ``lm_head`` is never called."""

    def __init__(
        self,
        encoder: ClinicalODERNN | None,
        llm: PreTrainedModel,
        *,
        prevalence: float,
        **parts: Any,
    ) -> None:
        """Start at the trajectory head's logit, or, without one, at everyone's risk.

        Args:
            encoder: as for ``TrajectoryLLM``.
            llm: as for ``TrajectoryLLM``.
            prevalence: share of events in the training part, within (0, 1).
            parts: as for ``TrajectoryLLM``.
        """
        super().__init__(encoder, llm, **parts)
        self.head = nn.Linear(llm.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        known = self.trajectory_head is not None
        nn.init.constant_(self.head.bias, 0.0 if known else math.log(prevalence / (1 - prevalence)))

    def forward(self, batch: TextBatch) -> Output:
        """Give the binary cross-entropy (sum over B) and the logit of each patient."""
        trajectory = self.trajectory(batch)
        hidden, order = self.read(batch, trajectory)
        final = (order == (batch["verdict"] + self.text_start)[:, None]).nonzero(as_tuple=True)
        logit = self.head(hidden[final].float()).squeeze(1)  # (B,)
        if trajectory is not None:
            logit = logit + trajectory.logit
        return classification_output(logit, batch["labels"])


class AnswerLoss(torch.autograd.Function):
    """Weighted cross-entropy over the vocabulary that never holds the logits of all places.

    With 262,144 words the logits of one batch of reports would be larger than all else that a step
    keeps. ``lm_head`` is frozen, so a piece of ``LOSS_ROWS`` places gives its loss and at once the
    gradient of its hidden states; then its logits go.

    Source: Hsu et al. 2024, "Liger Kernel", fused linear cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        boost: Tensor,
        importance: Tensor,
        yes: int,
    ) -> Tensor:
        """Give the loss, a sum over places.

        Args:
            ctx: keeps the gradients for ``backward``.
            hidden: (N, D), where a token is about to be said.
            weight: (V, D) of ``lm_head``.
            targets: (N,) int64, the tokens.
            boost: (N,) float32, added to the logit of ``yes``.
            importance: (N,) float32, how much each place counts.
            yes: id of a token.
        """
        learns = any(ctx.needs_input_grad)
        loss, pieces = boost.new_zeros(()), []
        for rows in torch.arange(len(hidden), device=hidden.device).split(LOSS_ROWS):
            logits = functional.linear(hidden[rows], weight).float()  # (rows, V)
            logits[:, yes] += boost[rows]
            said = targets[rows, None]
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            loss += (importance[rows, None] * (log_sum - logits.gather(1, said))).sum()
            if learns:
                slope = logits.sub_(log_sum).exp_()  # softmax less the token, times its weight
                slope.scatter_add_(1, said, slope.new_full((), -1.0).expand_as(said))
                slope *= importance[rows, None]
                pieces.append((slope.to(weight.dtype) @ weight, slope[:, yes].clone()))
        if learns:
            ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of hidden states and boost."""
        (gradient,) = gradients
        hidden, boost = ctx.saved_tensors
        return gradient * hidden, None, None, gradient * boost, None, None


class LLMWriter(TrajectoryLLM):
    """Stage 3: the language model writes the report; ``lm_head`` sees the answer's places only."""

    def forward(self, batch: TextBatch) -> Output:
        """Give the weighted cross-entropy (sum over answer tokens) and the verdict's log-odds.

        The verdict is read where the report is about to say yes or no: causal attention keeps the
        report itself out of sight there. It is one token among a hundred that mostly copy, yet the
        one that matters: it counts ``VERDICT_WEIGHT`` times.
        """
        trajectory = self.trajectory(batch)
        hidden, order = self.read(batch, trajectory)
        slots = functional.pad(
            batch["targets"], (self.text_start, 0), value=IGNORED
        )  # (B, 1 + P + T)
        targets = slots.gather(1, order)[:, 1:]  # a place predicts the token behind it
        answer = targets != IGNORED
        at_verdict = (order[:, :-1] == (batch["verdict"] + self.text_start)[:, None])[answer]
        places = hidden[:, :-1][answer]  # (N, D)
        boost = torch.zeros(len(places), device=places.device)
        if trajectory is not None:
            boost = boost.masked_scatter(at_verdict, trajectory.logit)
        importance = torch.where(at_verdict, float(VERDICT_WEIGHT), 1.0)
        weight = self.llm.get_output_embeddings().weight
        loss = AnswerLoss.apply(places, weight, targets[answer], boost, importance, self.verdict[0])
        # In float32: sixteen bits would round many patients to the same risk.
        words = weight[list(self.verdict)].float()
        yes, no = functional.linear(places[at_verdict].float(), words).unbind(1)
        terms = int(answer.sum()) + (VERDICT_WEIGHT - 1) * len(yes)
        return Output(loss, terms, yes + boost[at_verdict] - no)

    @torch.no_grad()
    def write(self, batch: TextBatch, most: int, eos: list[int], pad: int) -> Tensor:
        """Continue reports greedily, batched, from the verdict on.

        Args:
            batch: its text ends right before the verdict.
            most: tokens to write at most.
            eos: ids that end a report.
            pad: id that fills finished rows.

        Returns:
            (B, at most ``most``) ids.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        self.eval()
        trajectory = self.trajectory(batch)
        embeddings, mask, _ = self.embed(batch, trajectory, left=True)

        def add_trajectory(written: Tensor, scores: Tensor) -> Tensor:
            """Weigh the verdict, the first token, as ``forward`` does."""
            if trajectory is None or written.shape[1] > 0:
                return scores
            verdict = scores.new_zeros(scores.shape[1])
            verdict[self.verdict[0]] = 1.0
            return scores + trajectory.logit.to(scores.dtype)[:, None] * verdict

        plan = GenerationConfig(
            max_new_tokens=most, do_sample=False, eos_token_id=eos, pad_token_id=pad
        )
        with self.llm.get_output_embeddings().register_forward_pre_hook(compact):
            written: Tensor = self.llm.generate(
                inputs_embeds=embeddings,
                attention_mask=mask.long(),
                generation_config=plan,
                logits_processor=LogitsProcessorList([add_trajectory]),
            )
        return written


def compact(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Copy what a module reads, so that its strides have no gaps.

    The last place of each row, as ``generate`` cuts it out of a prompt, is no matrix to torch: it
    then multiplies row by row and, in bfloat16 on a CPU, copies the weights of all words for each:
    batches of 16 wrote reports 3.5 times faster than one by one, so it is 8 times.
    """
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def classification_output(logit: Tensor, labels: Tensor) -> Output:
    """Give the unweighted binary cross-entropy, a sum over the B patients."""
    loss = functional.binary_cross_entropy_with_logits(logit, labels, reduction="sum")
    return Output(loss, len(labels), logit)


# --------------------------------------------------------------------------- language model


def hush_libraries() -> None:
    """Let those that load a model say nothing of what is no fault."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A kernel that only speeds up inference on a CPU; retries of a download that fails anyway.
    for library in ("bitsandbytes.backends.cpu.ops", "huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def load_language_model(
    name: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Gemma 3 text model and its tokenizer, frozen.

    Of a multimodal checkpoint (MedGemma-4B) only the language model is read.

    Args:
        name: hub id, folder, or ``tiny`` for the built-in random model.
        quantization: ``nf4`` or ``none``.
        dtype: of computation, and of the weights where they are not quantised.
        device: where the weights go.
        revision: commit of a hub model; None takes the latest.

    Raises:
        InputError: no access, no such model, not a Gemma 3, or weights that do not fit it.
    """
    import transformers
    from safetensors import SafetensorError

    hush_libraries()
    if name == "tiny":
        model, tokenizer = tiny_language_model()
        if quantization == "nf4":
            raise InputError("--quantization nf4: the tiny model has nothing to gain; use none")
        return model.to(device=device, dtype=dtype).requires_grad_(False).eval(), tokenizer
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type not in ("gemma3", "gemma3_text"):
            raise InputError(f"--model_name {name}: a {config.model_type} model; give a Gemma 3")
        multimodal = hasattr(config, "text_config")
        model, found = transformers.Gemma3ForCausalLM.from_pretrained(
            name,
            revision=revision,
            config=config.text_config if multimodal else config,
            key_mapping=MULTIMODAL_KEYS if multimodal else None,
            quantization_config=nf4_config(dtype) if quantization == "nf4" else None,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(explain_loading_error(name, error)) from error
    check_loaded(name, found["missing_keys"], tokenizer)
    if quantization == "nf4":
        check_quantized(name, model)
    return model.requires_grad_(False).eval(), tokenizer


def check_loaded(name: str, missing: set[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a checkpoint without some of its weights, and a tokenizer that loses text.

    Raises:
        InputError: naming what is wrong.
    """
    if missing:
        key = min(missing)
        raise InputError(f"--model_name {name}: the checkpoint lacks weights, {key} among them")
    probe = "24 (0h)"
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    if None in special or tokenizer.decode(ids) != probe:
        raise InputError(f"--model_name {name}: its tokenizer files are missing or damaged")


def check_quantized(name: str, model: PreTrainedModel) -> None:
    """Refuse a model in which nothing was quantised; keep 4-bit weights as they are on a CPU."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    if not layers:
        raise InputError(f"--quantization nf4: no layer of {name} was quantised")
    for layer in layers:  # repacked for fast CPU inference, weights would lose bits and gradients
        layer.support_avx512bf16_for_cpu = False


def nf4_config(dtype: torch.dtype) -> Any:
    """Give the 4-bit NormalFloat settings: double quantisation, computation in ``dtype``.

    Source: Dettmers et al. 2023, "QLoRA".
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head"],
    )


def explain_loading_error(name: str, error: Exception) -> str:
    """Turn a failed download or load into one line that says what to do."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"--model_name {name}: no space left on the disk to keep it"
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        return f"--model_name {name}: no folder with a model: it holds no config.json"
    if not isinstance(error, OSError):
        return f"--model_name {name}: its files are damaged or do not fit together: {text}"
    if os.path.isdir(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"--model_name {name}: not a hub id, not tiny, and no folder with a model: {text}"
    gated = re.search(r"gated|restricted|log in", text, re.IGNORECASE)
    problem = (
        "access to this gated model is not granted"
        if gated
        else "cannot be fetched from the hub (no network, no such model, or no access)"
    )
    return (
        f"--model_name {name}: {problem}: accept its licence at https://huggingface.co/{name}, "
        "then run: hf auth login (huggingface-cli login in older versions); --model_name tiny "
        "needs neither licence nor download"
    )


def base_content(name: str) -> dict[str, str] | None:
    """Give the hashes of a language model's files in a folder; None for one of the hub."""
    if name == "tiny" or not os.path.isdir(name):
        return None
    return {
        path.name: hash_once(path, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(Path(name).iterdir())
        if path.suffix in (".json", ".safetensors", ".model", ".jinja") and path.is_file()
    }


@cache
def hash_once(path: Path, size: int, changed: int) -> str:
    """Hash a large file once a process, as long as size and time of change stay."""
    digest = file_hash(path)
    assert digest is not None, (size, changed)
    return digest


def cached_revision(name: str) -> str | None:
    """Give the commit of a hub model in the cache; None for a folder and for ``tiny``."""
    from huggingface_hub import try_to_load_from_cache

    if name == "tiny" or os.path.isdir(name):
        return None
    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent.name if isinstance(file, str) else None


def tiny_language_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a two-layer Gemma 3 with random but always the same weights, and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<bos>"]  # the ids of Gemma's own
    alphabet = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=specials[0], eos_token=specials[1], bos_token=specials[2]
    )
    config = Gemma3TextConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=1024,
        initializer_range=0.125,  # 1 / sqrt(64): the tied output can then be sure of a token
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config), tokenizer


def add_lora(model: PreTrainedModel, rank: int, alpha: int, dropout: float) -> PreTrainedModel:
    """Put trainable low-rank layers on the seven projections of each language layer.

    Source: Hu et al. 2021, "LoRA". The A matrices come from torch's global generator.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft asks for a property that transformers renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted: PreTrainedModel = get_peft_model(model, config)
    return adapted


def set_checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """Switch whether layers are computed again in the backward pass instead of kept.

    The reentrant kind of checkpoint fails where embeddings come from outside of the model.
    """
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


class TextCollator:
    """Batches with text: tokenises every prompt and report once, then pads what a batch needs.

    Prompt, the words before the verdict, the verdict and the rest are tokenised apart, so that the
    verdict lies on the same token boundary whatever surrounds it. An instruction-tuned model gets
    the prompt as a user's turn in its own chat template.

    Attributes:
        sample: ids as they stand in every kind of prompt, whatever it tells.
        known: ``Trajectory`` of all N rows, from an encoder that no longer learns.
        shortened: how many prompts lost their oldest observations to ``most_tokens``.
        too_long: rows whose prompt is longer all the same, where that is no error.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        answers: bool,
        most_tokens: int | None = None,
        refuse_long: bool = True,
    ) -> None:
        """Tokenise.

        Args:
            dataset: gives prompts and reports.
            tokenizer: of the language model.
            answers: also the report, as the target (stage 3); all rows must have labels.
            most_tokens: of a prompt; longer ones lose their oldest observations.
            refuse_long: whether a prompt that is too long even so is an error.

        Raises:
            InputError: a prompt is longer than ``most_tokens`` even with one observation a series.
        """
        self.dataset = dataset
        self.known: Trajectory | None = None
        self.shortened = 0
        self.too_long: list[int] = []
        self._tokenizer = tokenizer
        self.pad = int(tokenizer.pad_token_id)
        self.bos = int(tokenizer.bos_token_id)
        self.before, self.behind, turn_end = chat_turns(tokenizer)
        self.eos = [int(tokenizer.eos_token_id), *turn_end]
        yes, no, shared = verdict_words(tokenizer)
        self.stem = self._ids([f"{dataset.outcome}:"])[0] + yes[:shared]
        self.verdict = (yes[shared], no[shared])
        self.sample = self._ids([f"{dataset.question} 0123456789 -> (h) .,"])[0]
        self.prompts = self._read_prompts(most_tokens)
        if self.too_long and refuse_long:
            needed = max(len(self.prompts[i]) for i in self.too_long)
            raise InputError(
                f"--max_text_tokens {most_tokens}: texts of {dataset.source} need {needed} "
                "tokens with one observation a series: raise it, or tell less by --series_text or "
                "--text_context"
            )
        self.answers: list[list[int]] = []
        if answers:
            rest = self._ids([self._behind_verdict(i) for i in range(len(dataset))])
            words = [yes[shared:] if label == 1 else no[shared:] for label in dataset.labels]
            self.answers = [w + r + [self.eos[-1]] for w, r in zip(words, rest, strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A context that spells "<bos>" stays text.
        plain = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return list(plain["input_ids"])

    def _read_prompts(self, most_tokens: int | None) -> list[list[int]]:
        """Tokenise all prompts, the too long ones with ever fewer of their oldest observations."""
        turns = len(self.before) + len(self.behind)
        prompts = self._ids([self._prompt(i) for i in range(len(self.dataset))])
        room = math.inf if most_tokens is None else most_tokens - turns
        for i, prompt in enumerate(prompts):
            told = max(len(times) for _, times, _ in self.dataset.measured(i))
            self.shortened += len(prompt) > room
            while len(prompt) > room and told > 1:
                told = min(told - 1, math.ceil(told * room / len(prompt)))
                prompt = self._ids([self._prompt(i, max(told, 1))])[0]
            if len(prompt) > room:
                self.too_long.append(i)
            prompts[i] = self.before + prompt + self.behind
        return prompts

    def _prompt(self, i: int, most: int | None = None) -> str:
        """Give the text of row ``i``, trimmed where it is a turn of a chat."""
        prompt = self.dataset.prompt(i, most)
        return prompt.strip() if self.before else prompt

    def _behind_verdict(self, i: int) -> str:
        word = " yes" if self.dataset.labels[i] == 1 else " no"
        return self.dataset.report(i).removeprefix(f"{self.dataset.outcome}:{word}")

    def lengths(self) -> NDArray[np.int64]:
        """Give the tokens of each row's text, (N,)."""
        answers = self.answers or [[]] * len(self.prompts)
        pairs = zip(self.prompts, answers, strict=True)
        return np.array([len(prompt) + len(self.stem) + len(answer) for prompt, answer in pairs])

    def __call__(self, indices: Sequence[int]) -> TextBatch:
        """Give the batch of the chosen series: prompt, words before the verdict, answer."""
        return self._batch(indices, [self.answers[i] if self.answers else [] for i in indices])

    def prompts_only(self, indices: Sequence[int]) -> TextBatch:
        """Give the batch that generation continues: it ends right before the verdict."""
        return self._batch(indices, [[] for _ in indices])

    def verdicts_only(self, indices: Sequence[int]) -> TextBatch:
        """Give the batch from which the verdict's odds are read: any answer, none is looked at."""
        return self._batch(indices, [[self.verdict[0]] for _ in indices])

    def _batch(self, indices: Sequence[int], answers: list[list[int]]) -> TextBatch:
        rows = [
            self.prompts[i] + self.stem + answer for i, answer in zip(indices, answers, strict=True)
        ]
        longest = max(map(len, rows))
        starts = torch.tensor([len(self.prompts[i]) + len(self.stem) for i in indices])
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        place = torch.arange(longest)
        text_mask = place < lengths[:, None]
        answer = (place >= starts[:, None]) & text_mask
        batch = TextBatch(
            **self.dataset.collate(indices),
            input_ids=input_ids,
            text_mask=text_mask,
            targets=torch.where(answer, input_ids, IGNORED),
            verdict=starts - 1,
        )
        if self.known is not None:
            chosen = batch["index"]
            batch["states"] = self.known.states[chosen]
            batch["states_mask"] = self.known.mask[chosen]
            batch["trajectory_logit"] = self.known.logit[chosen]
        return batch


def verdict_words(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], int]:
    """Give the ids of yes and of no, and how many of them both begin with."""
    yes, no = tokenizer([" yes", " no"], add_special_tokens=False)["input_ids"]
    shared = next(k for k, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
    return list(yes), list(no), shared


def chat_turns(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Give the ids in front of and behind a user's words, and those that end the answer.

    All empty where the tokenizer has no chat template: the model reads plain text.
    """
    if not tokenizer.chat_template:
        return [], [], []
    place = "PLACE"
    turns = [{"role": "user", "content": place}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, behind = text.split(place)
    before = before.removeprefix(tokenizer.bos_token)  # stands in front of the soft tokens
    ids = tokenizer([before, behind], add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    return ids[0], ids[1], [] if end in (None, tokenizer.unk_token_id) else [end]


@torch.no_grad()
def remember_trajectories(
    model: TrajectoryLLM, collate: TextCollator, device: torch.device, rows: int = 512
) -> None:
    """Encode every row once where the encoder no longer learns; the batches then bring it along."""
    if model.encoder is None or any(p.requires_grad for p in model.encoder.parameters()):
        return
    encoder, head = model.encoder.to(device).eval(), model.trajectory_head
    head = head.to(device).eval() if head else None
    parts = []
    for start in range(0, len(collate.dataset), rows):
        indices = range(start, min(start + rows, len(collate.dataset)))
        batch = to_device(collate.dataset.collate(indices), device)
        parts.append(encode(encoder, head, batch, model.tokens))
    collate.known = Trajectory(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))


# --------------------------------------------------------------------------- metrics


def metrics_of(labels: NDArray[Any], probability: NDArray[Any]) -> dict[str, float]:
    """Score probabilities: discrimination, accuracy at 0.5, Brier score and log-loss."""
    from sklearn import metrics

    return {
        "auroc": float(metrics.roc_auc_score(labels, probability)),
        "auprc": float(metrics.average_precision_score(labels, probability)),
        "accuracy": float(metrics.accuracy_score(labels, probability >= DECISION_THRESHOLD)),
        "brier": float(metrics.brier_score_loss(labels, probability)),
        "log_loss": float(metrics.log_loss(labels, probability)),
    }


def weighted_metrics(
    labels: NDArray[Any], probability: NDArray[Any], weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Compute ``metrics_of`` for many weightings of the rows at once.

    A bootstrap asks scikit-learn 1,000 times for what one cumulative sum answers (30 s against
    0.1 s for eight models of 385 patients); a test holds both equal.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
        weights: (R, n), how often each row counts in each of R weightings.

    Returns:
        (R,) values of each metric.
    """
    order = np.argsort(-probability, kind="stable")
    ties = np.flatnonzero(np.diff(-probability[order], prepend=-np.inf))  # first row of each value
    ordered = weights[:, order]
    events = ordered * labels[order]
    others = ordered - events
    if len(ties) < len(order):
        events, others = (np.add.reduceat(each, ties, axis=1) for each in (events, others))
    hits, alarms = events.cumsum(axis=1), others.cumsum(axis=1)  # at each value as threshold
    outranked = (others * (hits - events / 2)).sum(axis=1)
    share = weights / weights.sum(axis=1, keepdims=True)
    likelihood = np.where(labels == 1, probability, 1 - probability)
    floor = np.finfo(probability.dtype).eps  # as scikit-learn: no infinite loss
    return {
        "auroc": outranked / (hits[:, -1] * alarms[:, -1]),
        "auprc": (events * hits / np.maximum(hits + alarms, 1e-300)).sum(axis=1) / hits[:, -1],
        "accuracy": share @ ((probability >= DECISION_THRESHOLD) == labels),
        "brier": share @ (probability - labels) ** 2,
        "log_loss": share @ -np.log(likelihood.clip(floor, 1 - floor)),
    }


def patient_draws(labels: NDArray[Any], groups: NDArray[np.str_], seed: int) -> NDArray[np.float64]:
    """Draw patients with replacement, each with all of his rows.

    Those with and those without an event are not drawn apart: with their numbers held fixed, the
    intervals of all that depends on the prevalence (Brier score, calibration, PPV, net benefit)
    would be far too narrow. A draw that lacks a class is drawn again.

    Args:
        labels: (n,) of 0 and 1, both there.
        groups: (n,) patient of each row.
        seed: of the draws.

    Returns:
        (R, n): how often each row counts in each of R draws.
    """
    return np.concatenate(list(draw_chunks(labels, groups, seed)))


def draw_chunks(
    labels: NDArray[Any],
    groups: NDArray[Any],
    seed: int,
    split: NDArray[Any] | None = None,
) -> Iterator[NDArray[np.float64]]:
    """Give ``patient_draws`` some draws at a time, so that many rows need no more memory.

    The draws do not depend on where they are cut. ``split`` (n,) parts the rows: each part is to
    hold both classes in each draw, else its figures would not exist.

    Raises:
        ValueError: a class is not there.
    """
    owner, _ = patient_events(groups, labels)
    parts = np.zeros(len(labels)) if split is None else split
    needed = [(parts == part) & (labels == label) for part in np.unique(parts) for label in (0, 1)]
    if not all(rows.any() for rows in needed):
        raise ValueError("the rows need both labels 0 and 1: with one alone no figure exists")
    rng = np.random.default_rng(seed)
    patients = owner.max() + 1
    fair = np.full(patients, 1 / patients)
    size = max(1, CHUNK_CELLS // len(labels))
    left = BOOTSTRAP_REPLICATES
    while left:
        drawn = rng.multinomial(patients, fair, size=min(size, left)).astype(np.float64)
        draws = drawn[:, owner]
        draws = draws[np.all([draws[:, rows].any(axis=1) for rows in needed], axis=0)]
        left -= len(draws)
        yield draws


Figures = dict[Any, NDArray[np.float64]]
"""By name (a text, or several), what a figure is in each of R weightings of the rows, (R,)."""


def bootstrap(
    labels: NDArray[Any],
    groups: NDArray[Any],
    seed: int,
    ask: Callable[[NDArray[np.float64]], Figures],
    split: NDArray[Any] | None = None,
) -> Figures:
    """Ask for figures under all draws of ``draw_chunks``; ``ask`` takes weights (r, n)."""
    pieces = [ask(weights) for weights in draw_chunks(labels, groups, seed, split)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def interval(value: float, replicates: NDArray[np.float64]) -> dict[str, float]:
    """Give a figure with its 95 % percentile interval.

    Source: Efron and Tibshirani 1993, percentile method.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return {"value": value, "low": float(low), "high": float(high)}


def rarer_rows(labels: NDArray[Any], groups: NDArray[Any]) -> Share:
    """Give all rows, and those of the outcome that fewer patients have."""
    sides = [labels == 1, labels == 0]
    few = min(sides, key=lambda rows: len(np.unique(groups[rows])))
    return np.ones_like(few), few


def rarer_patients(labels: NDArray[Any], groups: NDArray[Any]) -> int:
    """Count the patients that have the rarer outcome."""
    return len(np.unique(groups[rarer_rows(labels, groups)[1]]))


def metrics_with_intervals(
    labels: NDArray[Any], probability: NDArray[Any], groups: NDArray[Any], seed: int
) -> dict[str, Any]:
    """Score probabilities (n,), each figure with its interval; see ``patient_draws``."""
    values = metrics_of(labels, probability)
    replicates = bootstrap(labels, groups, seed, partial(weighted_metrics, labels, probability))
    figures: dict[str, Any] = {
        name: interval(values[name], replicates[name]) for name in replicates
    }
    figures["auroc"] = share_estimate(
        values["auroc"], replicates["auroc"], rarer_rows(labels, groups), groups
    )
    return {"n": len(labels), "events": int(labels.sum()), **figures}


def paired_differences(
    labels: NDArray[Any],
    probability: NDArray[Any],
    reference: NDArray[Any],
    groups: NDArray[np.str_],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Compare two models (n,) on the same rows: figure less the reference's, with intervals.

    Both are scored on the same draws of patients, so that what they share cancels out.
    """
    own, other = metrics_of(labels, probability), metrics_of(labels, reference)

    def ask(weights: NDArray[np.float64]) -> Figures:
        first = weighted_metrics(labels, probability, weights)
        second = weighted_metrics(labels, reference, weights)
        return {name: first[name] - second[name] for name in first}

    draws = bootstrap(labels, groups, seed, ask)
    return {name: interval(own[name] - other[name], draws[name]) for name in draws}


class Estimate(TypedDict):
    """A figure with its 95 % interval; None where there is none, as the PPV of no alarm."""

    value: float | None
    low: float | None
    high: float | None


def estimate(value: float, replicates: NDArray[np.float64]) -> Estimate:
    """Give ``interval``, with None for what cannot be told.

    Replicates without a value are left out; of too many the interval would say too little.
    """
    known = replicates[np.isfinite(replicates)]
    if not math.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if len(known) < CONFIDENCE * len(replicates):
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def log_odds(probability: NDArray[Any]) -> NDArray[np.float64]:
    """Give the logit of probabilities (n,), those of exactly 0 or 1 moved by the float's step."""
    floor = np.finfo(np.float64).eps
    risk = np.clip(probability, floor, 1 - floor)
    return np.asarray(np.log(risk) - np.log1p(-risk))


def recalibrations(
    labels: NDArray[Any],
    logit: NDArray[np.float64],
    weights: NDArray[np.float64],
    start: NDArray[np.float64],
    *,
    slope: bool,
) -> NDArray[np.float64]:
    """Fit log-odds = a + b * logit by maximum likelihood, for many weightings of the rows at once.

    Newton's method, a step that overshoots halved; a test holds it equal to scikit-learn's logistic
    regression without penalty.

    Args:
        labels: (n,) of 0 and 1.
        logit: (n,) of the predicted probabilities, at about unit scale.
        weights: (R, n).
        start: (2,) a and b to begin with.
        slope: fit b too; else it stays as it began.

    Returns:
        (R, 2) a and b; NaN where no finite ones exist: classes that ``logit`` parts completely.
    """
    fitted = np.tile(start, (len(weights), 1))
    kept, height = fitted, np.full(len(weights), -np.inf)
    change = height
    for _ in range(NEWTON_STEPS):
        risk = 0.5 + 0.5 * np.tanh((fitted[:, :1] + fitted[:, 1:] * logit) / 2)  # (R, n)
        seen = np.where(labels == 1, risk, 1 - risk).clip(np.finfo(np.float64).tiny)
        likelihood = (weights * np.log(seen)).sum(axis=1)
        worse = likelihood < height - NEWTON_PRECISION * np.abs(height)  # overshot: half way back
        kept = np.where(worse[:, None], kept, fitted)
        height = np.where(worse, height, likelihood)
        steps = _newton_steps(labels, logit, weights, risk, slope=slope)
        fitted = np.where(worse[:, None], (kept + fitted) / 2, fitted + steps.clip(-2, 2))
        change = np.where(worse, np.inf, np.abs(steps).max(axis=1))
        if not (change > NEWTON_PRECISION).any():  # NaN stays NaN
            break
    fitted[~(change <= NEWTON_PRECISION)] = np.nan
    return fitted


def _newton_steps(
    labels: NDArray[Any],
    logit: NDArray[np.float64],
    weights: NDArray[np.float64],
    risk: NDArray[np.float64],
    *,
    slope: bool,
) -> NDArray[np.float64]:
    """Give Newton's step (R, 2) of the logistic likelihood where it gives ``risk`` (R, n)."""
    pull, curve = weights * (labels - risk), weights * risk * (1 - risk)
    g0, h00 = pull.sum(axis=1), curve.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if not slope:
            return np.stack([g0 / h00, np.zeros_like(g0)], axis=1)
        g1, h01, h11 = pull @ logit, curve @ logit, curve @ logit**2
        steps = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1)
        stepped: NDArray[np.float64] = steps / (h00 * h11 - h01**2)[:, None]
    return stepped


def weighted_calibration(
    labels: NDArray[Any], probability: NDArray[Any], weights: NDArray[np.float64]
) -> Figures:
    """Compute how far probabilities can be taken at their word, for many weightings at once.

    Slope and intercept come from a logistic fit of the label on the logit: a slope below 1 means
    risks that are too extreme. Calibration in the large is the intercept where the slope is held
    at 1: below 0 the risks are too high on average. The Brier skill compares with telling everyone
    the prevalence of these rows; 0 is no better, 1 is perfect.

    Source: Cox 1958; Steyerberg 2019, "Clinical Prediction Models", chapter 15; Murphy 1973.

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
        weights: (R, n), how often each row counts.

    Returns:
        (R,) of each figure; NaN where no fit exists.
    """
    logit = log_odds(probability)
    middle, spread = logit.mean(), logit.std()
    if equal := spread <= EQUAL_RISKS * (1 + abs(middle)):  # what is left is rounding
        spread = 1.0
    scaled, one = (logit - middle) / spread, np.ones((1, len(labels)))
    everyone = np.array([log_odds(labels.mean()), 0.0])
    start = recalibrations(labels, scaled, one, everyone, slope=True)[0]
    both = recalibrations(labels, scaled, weights, start, slope=True)
    own = np.array([middle, spread])  # the model's own log-odds, on the scaled logit
    own[0] = recalibrations(labels, scaled, one, own, slope=False)[0, 0]
    large = recalibrations(labels, scaled, weights, own, slope=False)[:, 0] - middle
    share = weights / weights.sum(axis=1, keepdims=True)
    prevalence = share @ labels
    with np.errstate(divide="ignore", invalid="ignore"):
        skill = 1 - share @ (probability - labels) ** 2 / (prevalence * (1 - prevalence))
    slope = np.full(len(both), np.nan) if equal else both[:, 1] / spread
    return {
        "calibration_slope": slope,
        "calibration_intercept": both[:, 0] - slope * middle,
        "calibration_in_the_large": large,
        "brier_skill": skill,
    }


def choose_threshold(labels: NDArray[Any], probability: NDArray[Any]) -> float:
    """Choose the probability from which on a row counts as an event, on the validation part.

    It makes sensitivity + specificity as large as can be; of several such the lowest. It lies
    midway to the next lower probability, so that rounding moves no row across.

    Source: Youden 1950, "Index for rating diagnostic tests".

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
    """
    from sklearn.metrics import roc_curve

    alarms, hits, thresholds = roc_curve(labels, probability, drop_intermediate=False)
    index = hits - alarms  # thresholds fall; sums of floats hide equal ones
    best = np.flatnonzero(np.isclose(index, index.max(), rtol=0, atol=1e-12))[-1]
    lower = thresholds[best + 1] if best + 1 < len(thresholds) else 0.0
    return float((thresholds[best] + lower) / 2)


class Decision(NamedTuple):
    """How a winner's log-odds become a probability and a prediction; kept with its weights.

    The probability is sigmoid(intercept + slope * logit); from the threshold on it is predicted.
    """

    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = DECISION_THRESHOLD

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Decision:
        """Read what lies with the weights; where nothing does, the log-odds count as they are."""
        known = facts.get("decision") or {}
        return cls(**{name: float(known[name]) for name in cls._fields if name in known})

    @property
    def sound(self) -> bool:
        """Whether all of it are numbers, and the order of the patients stays."""
        return all(map(math.isfinite, self)) and self.slope > 0

    @property
    def recalibrates(self) -> bool:
        """Whether the log-odds are changed at all."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    def probability(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give the probability of each log-odds (n,)."""
        scaled = torch.from_numpy(self.intercept + self.slope * logit)
        probability: NDArray[np.float64] = torch.sigmoid(scaled).numpy()
        return probability


def decide(labels: NDArray[np.float64], logit: NDArray[np.float64], calibrate: str) -> Decision:
    """Choose recalibration and threshold on the validation part.

    Source: Platt 1999, without his smoothed targets: the logistic fit whose slope and intercept
    calibration is judged by.

    Args:
        labels: (n,) of 0 and 1.
        logit: (n,) log-odds as the model gives them.
        calibrate: ``platt``, or ``none`` to leave them.
    """
    decision = Decision()
    if calibrate == "platt":
        fit = weighted_calibration(labels, decision.probability(logit), np.ones((1, len(labels))))
        slope = float(fit["calibration_slope"][0])
        if slope > 0:
            decision = Decision(slope, float(fit["calibration_intercept"][0]))
        elif slope <= 0:  # it would turn the order of the patients round
            logger.warning(
                "not recalibrated: in the validation part those of higher risk have fewer events"
            )
        else:
            logger.warning(
                "not recalibrated: the validation part's events part completely, or all risks are "
                "equal"
            )
    return decision._replace(threshold=choose_threshold(labels, decision.probability(logit)))


Share = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Rows (n,) that count, among rows (n,)."""


def threshold_shares(
    labels: NDArray[Any], probability: NDArray[Any], threshold: float
) -> dict[str, Share]:
    """Give what sensitivity, specificity, predictive values and share of alarms are shares of."""
    event, alarm = labels == 1, probability >= threshold
    return {
        "sensitivity": (event & alarm, event),
        "specificity": (~event & ~alarm, ~event),
        "ppv": (event & alarm, alarm),
        "npv": (~event & ~alarm, ~alarm),
        "alarms": (alarm, np.ones_like(alarm)),
    }


def weighted_shares(shares: dict[str, Share], weights: NDArray[np.float64]) -> Figures:
    """Compute shares for many weightings (R, n) at once; NaN where nothing is shared."""
    some, among = (
        np.stack(masks, axis=1).astype(float) for masks in zip(*shares.values(), strict=True)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (weights @ some) / (weights @ among)
    return dict(zip(shares, values.T, strict=True))


def share_estimate(
    value: float, replicates: NDArray[np.float64], share: Share, groups: NDArray[np.str_]
) -> Estimate:
    """Give ``estimate``; of none or all, whose draws do not vary, the exact interval by patients.

    An AUROC of 0 or 1 is told by as many pairs as patients have the rarer outcome.

    Source: Clopper and Pearson 1934.
    """
    if value not in (0.0, 1.0):
        return estimate(value, replicates)
    reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(np.unique(groups[share[1]])))
    low, high = (0.0, reach) if value == 0 else (1 - reach, 1.0)
    return {"value": value, "low": low, "high": high}


def weighted_benefit(
    labels: NDArray[Any],
    probability: NDArray[Any],
    at: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Compute the net benefit TP/n - FP/n * p/(1 - p), for many weightings at once.

    Source: Vickers and Elkin 2006, "Decision curve analysis".

    Args:
        labels: (n,) of 0 and 1.
        probability: (n,) of the event.
        at: (K,) threshold risks p within (0, 1), rising.
        weights: (R, n), how often each row counts.

    Returns:
        (R, K); treating all is what a ``probability`` of ones gives, treating none is zero.
    """
    place = np.searchsorted(at, probability, side="right")  # alarms at the first ``place`` risks
    order = np.argsort(place, kind="stable")
    bins = np.searchsorted(place[order], np.arange(1, len(at) + 1))
    counts = []
    for rows in (labels, 1 - labels):
        rising = np.cumsum(weights[:, order] * rows[order], axis=1)
        rising = np.pad(rising, ((0, 0), (1, 0)))
        counts.append(rising[:, -1:] - rising[:, bins])
    hits, alarms = counts
    benefit: NDArray[np.float64] = hits - alarms * at / (1 - at)
    return benefit / weights.sum(axis=1, keepdims=True)


def further_figures(
    labels: NDArray[Any],
    probability: NDArray[Any],
    groups: NDArray[np.str_],
    threshold: float,
    seed: int,
) -> dict[str, Estimate]:
    """Give calibration, and shares at the chosen threshold, of probabilities (n,)."""
    shares = threshold_shares(labels, probability, threshold)

    def ask(weights: NDArray[np.float64]) -> Figures:
        calibration = weighted_calibration(labels, probability, weights)
        return {**calibration, **weighted_shares(shares, weights)}

    values = ask(np.ones((1, len(labels))))
    return estimates(values, bootstrap(labels, groups, seed, ask), shares, groups)


def estimates(
    values: Figures, replicates: Figures, shares: dict[str, Share], groups: NDArray[np.str_]
) -> dict[str, Estimate]:
    """Join values (1,) and replicates (R,) to figures with intervals."""
    return {
        name: share_estimate(float(values[name][0]), replicates[name], shares[name], groups)
        if name in shares
        else estimate(float(values[name][0]), replicates[name])
        for name in values
    }


def baselines(data: Data) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Fit the simple models that every figure has to stand beside, with their usual settings.

    A logistic regression on each table of the data set, and on the largest also boosted trees.

    Returns:
        For each baseline the probabilities of ``val`` and ``test``, fitted on ``train`` only.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tables = data.dataset.baseline_inputs()
    facts = data.dataset.context_facts(data.split["train"])
    if not facts.empty:
        tables["logistic regression with context"] = tables["logistic regression"].join(facts)
    for name in [name for name in tables if name.startswith("logistic regression")]:
        tables[name.replace("logistic regression", "gradient boosting")] = tables[name]
    result = {}
    for name, table in tables.items():
        train = data.split["train"]
        model = make_pipeline(
            SimpleImputer(add_indicator=True, keep_empty_features=True),  # never measured: zero
            StandardScaler(),
            LogisticRegression(max_iter=2000),
        )
        if name.startswith("gradient boosting"):
            model = HistGradientBoostingClassifier(**BOOSTING, random_state=0)
            table = table.loc[:, table.iloc[train].notna().any()]  # it cannot bin an empty column
        inputs = table.to_numpy()
        model.fit(inputs[train], data.dataset.labels[train])
        result[name] = {
            part: model.predict_proba(inputs[data.split[part]])[:, 1] for part in ("val", "test")
        }
    return result


# --------------------------------------------------------------------------- stages


class Data(NamedTuple):
    """What a run learns from: the series, their split, a hash of all that was read, of its rows."""

    dataset: TrajectoryDataset
    split: dict[str, NDArray[np.int64]]
    fingerprint: str
    rows: str

    def prevalence(self) -> float:
        """Give the share of events in the training part."""
        return float(self.dataset.labels[self.split["train"]].mean())

    def facts(self) -> dict[str, Any]:
        """Give what a checkpoint must remember of its data, without any patient in it."""
        patients = np.unique(self.dataset.groups[self.split["train"]])
        return {
            "features": list(self.dataset.features),
            "units": list(self.dataset.units),
            "outcome": self.dataset.outcome,
            "question": self.dataset.question,
            **self.dataset.reading,
            "named": self.dataset.named,
            "data_sha256": self.fingerprint,
            "rows_sha256": self.rows,
            "train_sha256": hashlib.sha256("\n".join(patients).encode()).hexdigest(),
            "case_mix": self.dataset.case_mix(self.split["train"]),
        }


@dataclass
class Stage:
    """One stage as data; ``run_stage`` never asks which it is.

    Attributes:
        name: of the stage and its folder.
        model: maps a batch to an ``Output``.
        learning_rates: of each trainable part, a direct child of ``model``.
        loaders: batches of train, val and test.
        epochs: most passes over the training part.
        patience: epochs without a better score before training stops.
        monitor: key of the epoch's figures that chooses the winner.
        higher_is_better: direction of ``monitor``.
        save: writes the winner.
        load: reads it back into ``model``.
        accumulate: batches whose gradients are summed up for one step.
        describe: gives lines on what the model reads and the memory that it needs.
        after_test: what else the winner is asked on the test part; gives figures for the report.
        facts: what lies with the winner's weights.
        small: a step is too small for several threads of a CPU; validation, at twice the batch,
            gains too little by them.
    """

    name: str
    model: nn.Module
    learning_rates: dict[str, float]
    loaders: dict[str, Loader]
    epochs: int
    patience: int
    monitor: str
    higher_is_better: bool
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    accumulate: int = 1
    describe: Callable[[], list[str]] = list
    after_test: Callable[[Scored, Path], dict[str, Any]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    small: bool = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the trainable parameters of each part with its learning rate."""
        groups = []
        for part, rate in self.learning_rates.items():
            chosen = [p for p in getattr(self.model, part).parameters() if p.requires_grad]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "name": part})
        return groups


class Batches:
    """Positions in batches, the rows of a batch of about equal length where lengths are given.

    Training: shuffled by ``generator``, then sorted by length within runs of ``BUCKET`` batches,
    then the batches shuffled. Otherwise sorted throughout, since nothing depends on the order.

    Of several processes each gets its part of every training batch, which is then so many times
    larger, or, for scoring, every so many-th batch.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        batch_size: int,
        lengths: NDArray[np.int64] | None,
        *,
        shuffle: bool,
    ) -> None:
        """Keep what an order is made of; ``lengths`` (N,) goes by position in the data set."""
        self.rows = rows
        self.share, self.workers = processes().process_index, processes().num_processes
        self.batch_size = batch_size * (self.workers if shuffle else 1)
        self.lengths = lengths
        self.shuffle = shuffle
        self.done = 0  # batches of the next pass that were given before the run was stopped
        self.generator = torch.Generator()
        if shuffle and len(rows) < self.workers:
            raise InputError(f"{len(rows)} rows train, too few for {self.workers} processes")

    def __len__(self) -> int:
        """Give the number of batches of this process."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        if self.shuffle:  # a rest that cannot be shared out joins the batch before it
            return max(1, whole + (rest >= self.workers))
        batches = whole + (rest > 0)
        return len(range(self.share, batches, self.workers))

    def __iter__(self) -> Iterator[list[int]]:
        """Give batches of positions."""
        if not self.shuffle:
            yield from self._cut(self.rows)[self.share :: self.workers]
            return
        rows = self.rows[torch.randperm(len(self.rows), generator=self.generator).numpy()]
        run = self.batch_size * BUCKET
        batches = [b for k in range(0, len(rows), run) for b in self._cut(rows[k : k + run])]
        if len(batches) > len(self):
            batches[-2:] = [batches[-2] + batches[-1]]
        if self.lengths is not None:
            order = torch.randperm(len(batches), generator=self.generator)
            batches = [batches[k] for k in order.tolist()]
        for batch in batches[self.done :]:
            yield batch[self.share :: self.workers]

    def _cut(self, rows: NDArray[np.int64]) -> list[list[int]]:
        """Sort rows by length, where lengths are given, and cut them into batches."""
        if self.lengths is not None:
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        size = self.batch_size
        return [rows[k : k + size].tolist() for k in range(0, len(rows), size)]


def padding_share(batches: Batches, lengths: NDArray[np.int64]) -> float:
    """Give the share of padding among all tokens of one pass over ``batches``."""
    cut = [lengths[batch] for batch in batches]
    return float(1 - sum(n.sum() for n in cut) / sum(len(n) * n.max() for n in cut))


CPU = torch.device("cpu")

BATCHES_AHEAD, CELLS_AHEAD = 32, 2**20
"""Batches that a loader makes in a row, and numbers that they may hold together, at most."""


@dataclass
class Loader:
    """Batches as a model reads them: ``collate_fn`` makes each of its positions.

    torch's own of this name prepares batches in other processes; a batch takes too little for that.

    Attributes:
        batch_sampler: gives the positions.
        collate_fn: makes a batch of them.
        prepare: makes of a list of batches what the model reads; ``list`` leaves them as they are.
        device: where they are read. They go there in a row, too: with each copy the host waits for
            what the device does.
    """

    batch_sampler: Batches
    collate_fn: Callable[[Sequence[int]], Any]
    prepare: Callable[[list[Any]], list[Any]] = list
    device: torch.device = CPU

    def __len__(self) -> int:
        """Give the number of batches of this process."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        """Give the batches of one pass.

        More and more are made in a row, all collated first and then all prepared, while the
        processor has the code for it at hand: each by itself takes twice as long, and then a sixth
        of a step of stage 1.
        """
        positions, ahead = iter(self.batch_sampler), 1
        while collated := [self.collate_fn(each) for each in itertools.islice(positions, ahead)]:
            batches = [to_device(each, self.device) for each in self.prepare(collated)]
            cells = sum(part.numel() for batch in batches for part in batch.values())
            yield from batches
            ahead = max(1, min(2 * ahead, BATCHES_AHEAD, CELLS_AHEAD * ahead // max(1, cells)))


def make_loaders(
    split: dict[str, NDArray[np.int64]],
    batch_size: int,
    collate: Callable[[Sequence[int]], Any],
    lengths: NDArray[np.int64] | None = None,
    prepare: Callable[[list[Any]], list[Any]] = list,
) -> dict[str, Loader]:
    """Give loaders over positions; training is shuffled.

    Evaluation needs no gradients, so it takes twice the batch.
    """
    loaders = {}
    for part, rows in split.items():
        trains = part == "train"
        size = batch_size if trains else 2 * batch_size
        batches = Batches(rows, size, lengths, shuffle=trains)
        loaders[part] = Loader(batches, collate, prepare)
    return loaders


def trajectory_stage(args: argparse.Namespace, data: Data) -> Stage:
    """Stage 1: encoder and head alone, no LLM."""
    encoder = make_encoder(args, data)
    model = TrajectoryClassifier(encoder, data.prevalence())
    loaders = make_loaders(
        data.split, args.batch_size, data.dataset.collate, prepare=partial(planned, encoder)
    )
    facts = {"stage": "trajectory", **encoder_facts(encoder), **data.facts()}
    return Stage(
        name="trajectory",
        model=model,
        learning_rates={"encoder": args.encoder_lr, "head": args.encoder_lr},
        loaders=loaders,
        epochs=args.trajectory_epochs,
        patience=args.patience,
        monitor="val_auroc",
        higher_is_better=True,
        save=lambda folder: save_trajectory(model, facts, folder.parent / TRAJECTORY_FILE),
        load=lambda folder: load_trajectory(model, folder.parent / TRAJECTORY_FILE),
        facts=facts,
        small=args.batch_size <= MOST_ALONE,
    )


def llm_stage(args: argparse.Namespace, data: Data) -> Stage:
    """Stages 2 and 3: soft prompt and text before an adapted language model."""
    # Before minutes go into loading the language model.
    encoder, trajectory_head = make_reader(args, data)
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    base, tokenizer = load_language_model(
        args.model_name, args.quantization, dtype, default_device()
    )
    writes = args.mode == "generative"
    collate = TextCollator(
        data.dataset, tokenizer, answers=writes, most_tokens=args.max_text_tokens
    )
    scale = embedding_rms(base, collate.sample)
    tokens = min(args.num_prefix_tokens, int(data.dataset.lengths.max()))
    seed_everything(args.seed)
    adapted = add_lora(base, args.lora_rank, args.lora_alpha, args.lora_dropout)
    parts: dict[str, Any] = {
        "trajectory_head": trajectory_head,
        "tokens": tokens,
        "scale": scale,
        "bos": collate.bos,
        "verdict": collate.verdict,
    }
    model = (
        LLMWriter(encoder, adapted, **parts)
        if writes
        else LLMClassifier(encoder, adapted, prevalence=data.prevalence(), **parts)
    )
    remember_trajectories(model, collate, default_device())
    if args.gradient_checkpointing:
        set_checkpointing(model.llm, on=True)
    facts = llm_facts(args, model, data)
    if writes:
        facts["report_tokens"] = report_tokens(collate)
    return Stage(
        name=args.mode,
        model=model,
        learning_rates=llm_rates(args, model),
        loaders=make_loaders(data.split, args.batch_size, collate, collate.lengths()),
        epochs=args.epochs,
        patience=args.patience,
        monitor="val_loss" if writes else "val_auroc",
        higher_is_better=not writes,
        save=lambda folder: save_llm(model, facts, folder / "best"),
        load=lambda folder: load_llm(model, folder / "best"),
        accumulate=args.gradient_accumulation,
        describe=partial(describe_llm, model, collate, data.split["train"], args.batch_size),
        after_test=(
            partial(write_reports, model, collate, tokenizer)
            if isinstance(model, LLMWriter)
            else None
        ),
        facts=facts,
    )


def llm_rates(args: argparse.Namespace, model: TrajectoryLLM) -> dict[str, float]:
    """Give the learning rate of each part that the model has."""
    rates = {
        "encoder": args.encoder_lr,
        "trajectory_head": args.encoder_lr,
        "projection": args.projection_lr,
        "llm": args.adapter_lr,
        "head": args.head_lr,
    }
    return {name: rates[name] for name, _ in model.named_children()}


def llm_facts(args: argparse.Namespace, model: TrajectoryLLM, data: Data) -> dict[str, Any]:
    """Give what a winner's ``config.json`` names: base model, what it reads, its data."""
    encoder = model.encoder
    return {
        "stage": args.mode,
        "base_model": args.model_name,
        "base_revision": cached_revision(args.model_name),
        "base_class": type(model.llm.get_base_model()).__name__,
        "quantization": args.quantization,
        "precision": "float32" if args.precision == "fp32" else "bfloat16",
        "num_prefix_tokens": model.tokens,
        "text_context": args.text_context,
        "series_text": args.series_text,
        "text_computed": data.dataset.text_computed,
        "max_text_tokens": args.max_text_tokens,
        "trajectory_head": model.trajectory_head is not None,
        **({} if encoder is None else encoder_facts(encoder)),
        **data.facts(),
    }


def make_reader(
    args: argparse.Namespace, data: Data
) -> tuple[ClinicalODERNN | None, PooledHead | None]:
    """Give encoder and head for a language model, both None where text is all that it reads.

    With a stage 1 file both are its own and frozen. Without one both learn; an encoder that is
    frozen as it was made says nothing that a head could add.
    """
    if args.soft_prompt == "off":
        seed_everything(args.seed)
        return None, None
    encoder = make_encoder(args, data)
    if args.freeze_ode and not args.ode_checkpoint:
        return encoder, None
    head = PooledHead(encoder.hidden_dim, data.prevalence())
    if args.ode_checkpoint:
        head.load_state_dict(read_trajectory(args.ode_checkpoint)["head"])
        head.requires_grad_(False)
    return encoder, head


def make_encoder(args: argparse.Namespace, data: Data) -> ClinicalODERNN:
    """Give the encoder: of a stage 1 file, frozen, or new with the training part's normaliser.

    Raises:
        InputError: the file does not fit the data.
    """
    seed_everything(args.seed)
    dataset = data.dataset
    if args.ode_checkpoint:
        encoder = load_encoder(args.ode_checkpoint, args, data).requires_grad_(False)
    else:
        scale = args.time_scale or dataset.time_scale
        encoder = ClinicalODERNN(len(dataset.features), time_scale=scale, solver=args.solver)
        dataset.refuse_unmeasured(data.split["train"])
        values = torch.from_numpy(dataset.values[dataset.rows_of(data.split["train"])]).float()
        try:
            encoder.fit_normalizer(values, ~values.isnan())
        except ValueError as error:
            raise InputError(f"{error} (features: {', '.join(dataset.features)})") from error
        encoder.requires_grad_(not args.freeze_ode)
    longest = dataset.longest_gap()
    if longest > MAX_SCALED_GAP * encoder.time_scale:
        raise InputError(f"a gap of {longest:g} h in the data needs a larger --time_scale")
    return encoder


# --------------------------------------------------------------------------- memory


class Memory(NamedTuple):
    """Bytes of a training step: frozen weights, what learns, logits, one row's activations."""

    weights: int
    learning: int
    logits: int
    activations_a_row: int

    def step(self, rows: int) -> int:
        """Give the bytes at the peak of a step with so many rows."""
        return self.weights + self.learning + self.logits + rows * self.activations_a_row


def step_memory(model: TrajectoryLLM, tokens: int) -> Memory:
    """Estimate what a training step needs, from a forward pass of one row of zeros.

    What autograd keeps for the backward pass is counted, storage by storage, on whatever device
    the model is, ``meta`` included. With checkpoints one layer at a time is computed again.

    Args:
        model: the whole model.
        tokens: S of the longest row.
    """
    body, config = model.body, model.llm.config
    checkpoints = bool(getattr(body, "gradient_checkpointing", False))
    saved = saved_bytes(body, tokens, config.hidden_size)
    if checkpoints:
        set_checkpointing(model.llm, on=False)
        saved += saved_bytes(body, tokens, config.hidden_size) // config.num_hidden_layers
        set_checkpointing(model.llm, on=True)
    # Of one piece of AnswerLoss: in the model's precision, in float32, and its gradient.
    logits = LOSS_ROWS * config.vocab_size * (2 + 4 + 2) if isinstance(model, LLMWriter) else 0
    learning = trainable(model)
    return Memory(
        weights=sum(map(stored_bytes, {*model.parameters(), *model.buffers()} - {*learning})),
        # Weight, gradient, two moments of AdamW, weight average, the best of these. When gradients
        # are laid end to end they stand there twice, but the activations are gone by then.
        learning=6 * sum(map(stored_bytes, learning)),
        logits=logits,
        activations_a_row=saved,
    )


def stored_bytes(tensor: Tensor) -> int:
    """Give the bytes of a tensor, the scales of a 4-bit one included."""
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else list(state.as_dict(packed=True).values())
    return sum(t.numel() * t.element_size() for t in [tensor, *scales])


def saved_bytes(body: nn.Module, tokens: int, width: int) -> int:
    """Count what the decoder keeps for the backward pass of one row, weights apart."""
    weights = {p.untyped_storage()._cdata for p in body.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    norm = next(p for name, p in body.named_parameters() if name.endswith("norm.weight"))
    row = torch.zeros(1, tokens, width, dtype=norm.dtype, device=norm.device, requires_grad=True)
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=norm.device).tril()
    masks = {"full_attention": causal, "sliding_attention": causal}
    trained = body.training
    with (
        # Dropout must not change what the seed decides.
        torch.random.fork_rng([norm.device] if norm.device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        kept = body.train()(inputs_embeds=row, attention_mask=masks, use_cache=False)
    body.train(trained)
    del kept
    return sum(seen.values())


def describe_llm(
    model: TrajectoryLLM, collate: TextCollator, train: NDArray[np.int64], batch_size: int
) -> list[str]:
    """Say how many tokens a patient costs, how much of a batch is padding, what memory it needs."""
    lengths = collate.lengths()
    sorted_share, share = (
        padding_share(Batches(train, batch_size, by, shuffle=True), lengths)
        for by in (lengths, None)
    )
    lines = [
        f"tokens a patient: {model.tokens} soft, text median "
        f"{np.median(lengths[train]):.0f}, longest {lengths[train].max()}",
        f"padding: {sorted_share:.1%} of all tokens, in random order {share:.1%}",
    ]
    if collate.shortened:
        lines.append(f"{collate.shortened} prompts were too long: their oldest observations left")
    need = step_memory(model, 1 + model.tokens + int(lengths.max()))
    lines.append(
        f"memory of a step, estimated: weights {gib(need.weights)}, what learns "
        f"{gib(need.learning)}, {f'logits {gib(need.logits)}, ' if need.logits else ''}"
        f"activations of {batch_size} of the longest rows "
        f"{gib(batch_size * need.activations_a_row)}: {gib(need.step(batch_size))} in all"
    )
    if torch.cuda.is_available():
        held = torch.cuda.mem_get_info()[1]
        lines.append(f"the GPU has {gib(held)}")
        if need.step(batch_size) > held:
            lines.append(f"warning: that is too little: {ADVICE}")
    return lines


def gib(size: int) -> str:
    """Write bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"


def embedding_rms(model: PreTrainedModel, ids: list[int]) -> float:
    """Measure the root mean square of the scaled embeddings of some tokens."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        vectors = embedding(torch.tensor(ids, device=embedding.weight.device)).float()
    return float(vectors.square().mean().sqrt())


@torch.no_grad()
def write_reports(
    model: LLMWriter,
    collate: TextCollator,
    tokenizer: PreTrainedTokenizerBase,
    scored: Scored,
    folder: Path,
) -> dict[str, Any]:
    """Let the winner write the test patients' reports, and measure how true they are.

    Writes ``generations_test.jsonl`` with id, text, target, verdict and probability.

    Returns:
        Share of reports that have the expected form, share of stated numbers that are the
        patient's own, AUROC of the verdict's probability.
    """
    dataset = collate.dataset
    lengths = np.array([len(prompt) for prompt in collate.prompts])  # of all rows
    batches = progress_bar(
        Batches(scored.rows, GENERATION_BATCH, lengths, shuffle=False), "writing reports"
    )
    texts = written_reports(model, collate, tokenizer, batches, report_tokens(collate))
    texts = dict(gather(list(texts.items())))
    if not processes().is_main_process:
        return {}
    lines, scores = [], []
    for i, p in zip(scored.rows.tolist(), scored.probability, strict=True):
        text = texts[i]
        score = dataset.score_report(i, text)
        scores.append(score)
        line = {"id": str(dataset.ids[i]), "text": text, "target": dataset.report(i)}
        lines.append({**line, "verdict": score.verdict, "probability": float(p)})
    write_text(folder / "generations_test.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    stated = sum(score.stated for score in scores)
    return {
        "reports": len(scores),
        "parse_share": sum(score.parses for score in scores) / len(scores),
        "true_number_share": sum(score.true for score in scores) / max(stated, 1),
        "numbers_stated": stated,
        "verdict_auroc": auroc(scored),
    }


def report_tokens(collate: TextCollator) -> int:
    """Give the tokens that a report may have: the longest of the data, and a few more."""
    return max(map(len, collate.answers)) + 16


def written_reports(
    model: LLMWriter,
    collate: TextCollator,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[list[int]],
    most: int,
) -> dict[int, str]:
    """Let the model write the reports of some rows, of at most ``most`` tokens, by position."""
    device = next(model.parameters()).device
    texts: dict[int, str] = {}
    for indices in batches:
        prompts = to_device(collate.prompts_only(indices), device)
        ids = model.write(prompts, most, collate.eos, collate.pad).tolist()
        written = tokenizer.batch_decode(
            [collate.stem + row for row in ids], skip_special_tokens=True
        )
        texts.update(zip(indices, written, strict=True))
    return texts


# --------------------------------------------------------------------------- checkpoints


def encoder_facts(encoder: ClinicalODERNN) -> dict[str, Any]:
    """Give what rebuilds an encoder before its weights are read."""
    return {
        "hidden_dim": encoder.hidden_dim,
        "time_scale": encoder.time_scale,
        "solver": encoder.solver,
    }


def save_trajectory(model: TrajectoryClassifier, facts: dict[str, Any], path: Path) -> None:
    """Write stage 1's encoder (with its normaliser), head and facts; plain types only."""
    content = {
        "format": TRAJECTORY_FORMAT,
        "config": facts,
        "encoder": own_memory(model.encoder),
        "head": own_memory(model.head),
    }
    buffer = io.BytesIO()  # a full disk is then an OSError as everywhere
    torch.save(content, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def own_memory(module: nn.Module) -> dict[str, Tensor]:
    """Give copies of a module's tensors: of a view, torch.save writes all memory behind it."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def read_trajectory(path: Path) -> dict[str, Any]:
    """Read a stage 1 file without running anything that it may carry.

    Raises:
        InputError: missing, damaged, not a stage 1 file, or of another format.
    """
    try:
        archive = path.read_bytes()
        refuse_archive(archive)
        content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such stage 1 checkpoint: run --trajectory_only first"
        ) from error
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        raise InputError(f"{path}: not a stage 1 checkpoint, or damaged") from error
    if not isinstance(content, dict) or not {"format", "config", "encoder", "head"} <= set(content):
        raise InputError(f"{path}: not a stage 1 checkpoint of this program")
    if content["format"] != TRAJECTORY_FORMAT:
        raise InputError(
            f"{path}: format {content['format']}, this program reads {TRAJECTORY_FORMAT}: train "
            "stage 1 again, or use the version that made it"
        )
    return content


def refuse_archive(content: bytes) -> None:
    """Refuse an archive of weights that is damaged or would unfold to more than it is.

    PyTorch itself looks at neither checksums nor sizes.

    Raises:
        ValueError: saying which.
        zipfile.BadZipFile: it is none.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("it would unfold to more than it is")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")


def refuse_sizes(make: Callable[[], nn.Module], state: dict[str, Any]) -> None:
    """Refuse weights that are not those of a module, before memory is given to either.

    Args:
        make: gives the module.
        state: name and tensor of each weight.

    Raises:
        ValueError: naming a weight.
    """
    with torch.device("meta"):
        own = {name: tensor.shape for name, tensor in make().state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in state.items()}
    if other := [name for name in {**own, **found} if own.get(name) != found.get(name)]:
        raise ValueError(f"{other[0]} has another size")


def seal(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add the checksums of a winner's files, and of what is said of it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    facts = {**facts, "files_sha256": sums}
    return {**facts, "facts_sha256": facts_hash(facts)}


def facts_hash(facts: dict[str, Any]) -> str:
    """Hash what is said of a winner, its own checksum apart."""
    rest = {key: value for key, value in facts.items() if key != "facts_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_sealed(folder: Path) -> dict[str, Any]:
    """Read what a stage 2 or 3 winner says of itself, and check every file of it.

    Raises:
        ValueError: something is missing, changed, a link, or there is more than was written.
        OSError: it cannot be read.
    """
    facts: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if facts["facts_sha256"] != facts_hash(facts):
        raise ValueError("config.json is not as it was written")
    found = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in found} - {"config.json"}
    if names != set(facts["files_sha256"]):
        raise ValueError("there are other files than were written")
    for name, digest in facts["files_sha256"].items():
        if (folder / name).is_symlink() or file_hash(folder / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    return facts


def load_trajectory(model: TrajectoryClassifier, path: Path) -> None:
    """Read stage 1's winner back into ``model``, every key."""
    content = read_trajectory(path)
    model.encoder.load_state_dict(content["encoder"])
    model.head.load_state_dict(content["head"])


def load_encoder(path: Path, args: argparse.Namespace, data: Data) -> ClinicalODERNN:
    """Rebuild stage 1's encoder for another stage.

    Raises:
        InputError: it reads other features, or it was trained on patients whom this run holds out.
    """
    content = read_trajectory(path)
    config, own = content["config"], data.facts()
    for key in ("features", "units", "outcome"):
        if config.get(key) != own[key]:
            raise InputError(
                f"{path}: trained on {key} {config.get(key)}, the data have {own[key]}"
            )
    if args.time_scale not in (None, config.get("time_scale")):
        raise InputError(f"{path}: its --time_scale is {config['time_scale']}: leave the flag out")
    if config.get("rows_sha256") != own["rows_sha256"]:
        logger.warning(
            "%s was trained on another data file: make sure that none of its training patients is "
            "held out here",
            path,
        )
    elif config.get("train_sha256") != own["train_sha256"]:
        raise InputError(
            f"{path}: trained on another split of the same data, so that its training patients "
            "would be tested here: use the same --seed and --max_samples"
        )
    try:
        encoder = encoder_of({**config, "solver": args.solver}, content["encoder"])
        encoder.load_state_dict(content["encoder"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a whole stage 1 checkpoint: train it again") from error
    return encoder


def save_llm(model: TrajectoryLLM, facts: dict[str, Any], folder: Path) -> None:
    """Write a stage 2 or 3 winner: adapter/ (PEFT), modules.safetensors, config.json, NOTICE.

    Encoder, projection and head lie outside the language model and so in a file of their own: a
    head inside an adapter's ``modules_to_save`` is easily lost.
    """
    from safetensors.torch import save_file

    with atomic(folder) as temporary:
        temporary.mkdir()
        model.llm.save_pretrained(temporary / "adapter", save_embedding_layers=False)
        sort_targets(temporary / "adapter" / "adapter_config.json")
        state = {
            f"{part}.{key}": tensor.contiguous()
            for part, module in outside_llm(model).items()
            for key, tensor in module.state_dict().items()
        }
        save_file(state, temporary / "modules.safetensors")
        write_text(temporary / "NOTICE", HAI_DEF_NOTICE)
        sealed = json.dumps(seal(facts, temporary), indent=2)
        write_text(temporary / "config.json", sealed + "\n")


def sort_targets(config: Path) -> None:
    """Sort the adapted modules in PEFT's file: they are a set, written in any order."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts["target_modules"] = sorted(facts["target_modules"])
    write_text(config, json.dumps(facts, indent=2) + "\n")


def load_llm(model: TrajectoryLLM, folder: Path) -> None:
    """Read a winner back into ``model``, every key of adapter and modules."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    read_sealed(folder)
    state = load_file(folder / "modules.safetensors")
    for part, module in outside_llm(model).items():
        own = {
            k.removeprefix(f"{part}."): state.pop(k)
            for k in list(state)
            if k.startswith(f"{part}.")
        }
        module.load_state_dict(own)
    assert not state
    adapter = load_file(folder / ADAPTER_WEIGHTS)
    loaded = set_peft_model_state_dict(model.llm, adapter)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]


def outside_llm(model: TrajectoryLLM) -> dict[str, nn.Module]:
    """Give the parts beside the language model: encoder, projection and heads that there are."""
    return {name: part for name, part in model.named_children() if name != "llm"}


def clean(folder: Path) -> None:
    """Remove what runs that were killed left half-written; what they had moved aside comes back."""
    for path in folder.glob(f".*{OUTGOING}"):
        whole = path.with_name(path.name[1 : -len(OUTGOING)])
        if not whole.exists():
            path.rename(whole)
    for ending in (PARTIAL, OUTGOING):
        for path in folder.glob(f".*{ending}"):
            remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none; a file's name within it may be no text."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


# --------------------------------------------------------------------------- states


class State(NamedTuple):
    """All that training needs to go on as if it had not been stopped: tensors, and plain types."""

    tensors: dict[str, Tensor]
    story: dict[str, Any]


class States:
    """The latest states of a stage, in files whose names carry their checksums.

    Args:
        folder: where they lie.
        facts: of ``run.json``; each state holds them too, so that no single file is the only one.
    """

    def __init__(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Remember the place; nothing is made yet."""
        self.folder, self.facts = folder, facts
        self.damaged: set[Path] = set()

    def files(self) -> list[Path]:
        """Give the states that are there, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if STATE_NAME.fullmatch(path.name))

    def keep(self, state: State) -> None:
        """Write a state beside the one before; older and damaged ones go."""
        from safetensors.torch import save

        files = self.files()
        number = 1 + (int(files[-1].name[:8]) if files else 0)
        story = {**state.story, "facts": self.facts}
        content = save(state.tensors, {"story": json.dumps(story)})
        digest = hashlib.sha256(content).hexdigest()
        self.folder.mkdir(exist_ok=True)
        with atomic(self.folder / f"{number:08d}-{digest}.safetensors") as temporary:
            temporary.write_bytes(content)
        whole = [path for path in files if path not in self.damaged]
        for path in {*files} - {*whole[1 - STATES_KEPT :]}:
            remove(path)

    def newest(self) -> State:
        """Read the newest state that is whole; of several processes all read the same.

        Raises:
            InputError: there is none, or one is of another format.
            OSError: one cannot be read.
        """
        from accelerate.utils import broadcast_object_list

        found = self.newest_whole() if processes().is_main_process else None
        name = [found[0].name if found else ""]
        if processes().num_processes > 1:
            broadcast_object_list(name)
        return found[1] if found else read_state(self.folder / name[0])

    def newest_whole(self) -> tuple[Path, State]:
        """Give the newest state that is whole, and its file; nothing is changed.

        Raises:
            InputError: there is none, or one is of another format.
            OSError: one cannot be read.
        """
        for path in reversed(self.files()):
            try:
                state = read_state(path)
            except DamagedError as error:
                self.damaged.add(path)
                logger.warning("%s: going on from the state before", error)
                continue
            if self.facts and state.story.get("facts") != self.facts:
                raise InputError(f"{path}: a state of another run: start again without --resume")
            return path, state
        raise InputError(f"--resume {self.folder}: no state is whole: start again without --resume")


class DamagedError(InputError):
    """A state is not as it was written."""


def read_state(path: Path) -> State:
    """Read one state; nothing that it may carry is run.

    Raises:
        DamagedError: it is not as it was written, or nothing of this program.
        InputError: it is of another format.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if path.is_symlink():
        raise DamagedError(f"{path}: a link, not a state")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() not in path.name:
        raise DamagedError(f"{path}: damaged")
    try:
        length = int.from_bytes(content[:8], "little")
        story = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["story"])
        tensors = load(content)
        told = story.get("format")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: not a state of training") from error
    if told != STATE_FORMAT:
        raise InputError(
            f"{path}: a state of format {told}, this program reads {STATE_FORMAT}: go on with the "
            "version that it was begun with, or start again without --resume"
        )
    return State(tensors, story)


def state_of(stage: Stage, learner: Learner) -> State:
    """Give what training needs to go on, until its next step; each process must call it.

    Raises:
        NonFiniteLossError: see ``read_steps``.
    """
    read_steps(learner)
    tensors = remembered(learner)
    for process, numbers in enumerate(gather([random_numbers()])):
        tensors |= {f"random.{process}.{name}": each for name, each in numbers.items()}
    story = {
        "format": STATE_FORMAT,
        "parameters": parameters(stage, learner),
        "processes": processes().num_processes,
        "progress": vars(learner.progress),
        "stopping": vars(learner.stopping),
        "average_steps": learner.average.steps,
        "scheduled": learner.optimizer.scheduled,
    }
    return State(tensors, story)


def parameters(stage: Stage, learner: Learner) -> list[list[Any]]:
    """Give name and shape of each parameter that learns, in the order of ``Vectors``."""
    names = {parameter: name for name, parameter in stage.model.named_parameters()}
    return [[names[each], *each.shape] for each in learner.vectors.parameters]


def remembered(learner: Learner) -> dict[str, Tensor]:
    """Give all tensors that training goes on from, by name and the number of their vector.

    They are the memory that it learns in: what is copied there is brought back, and what is to be
    kept must be written before the next step.
    """
    parts = {
        "weights": learner.vectors.weights,
        "average": learner.average.shadow,
        "exp_avg": learner.optimizer.exp_avg,
        "exp_avg_sq": learner.optimizer.exp_avg_sq,
        "steps": learner.optimizer.steps,
        "best": learner.best,
    }
    return {f"{part}.{k}": each for part, own in parts.items() for k, each in enumerate(own)}


def random_numbers() -> dict[str, Tensor]:
    """Take down where the generators of this process stand that training draws from."""
    numbers = {"cpu": torch.get_rng_state()}
    if default_device().type == "cuda":
        numbers["cuda"] = torch.cuda.get_rng_state(default_device())
    return numbers


def go_on(stage: Stage, learner: Learner, state: State, folder: Path) -> None:
    """Bring back a state of training; the winner and the history become those of that time.

    Raises:
        InputError: the state is of another model.
    """
    tensors, story = state
    learner.stopping, learner.progress = told_of(story)
    if learner.stopping.best_epoch:
        learner.best = [torch.empty_like(weights) for weights in learner.vectors.weights]
    own = remembered(learner)
    refuse_other_model(parameters(stage, learner), own, state)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    learner.average.steps = story["average_steps"]
    learner.optimizer.scheduled = story["scheduled"]
    if learner.best:
        keep_winner(stage, learner, folder)
    if processes().is_main_process and learner.progress.history:
        write_text(folder / "history.jsonl", "".join(learner.progress.history))
    if story["processes"] == processes().num_processes:
        numbers = f"random.{processes().process_index}"
        torch.set_rng_state(tensors[f"{numbers}.cpu"])
        if f"{numbers}.cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"{numbers}.cuda"], default_device())
    else:
        logger.warning(
            "the state is of %d processes: the result is not the one of an undisturbed run",
            story["processes"],
        )
        share_out_anew(learner, story["processes"] / processes().num_processes)
        learner.progress.batches = min(learner.progress.batches, len(stage.loaders["train"]))
    logger.info(
        "going on in epoch %d after %d of its batches, %d steps in all",
        *(learner.stopping.epoch + 1, learner.progress.batches, learner.average.steps),
    )


def told_of(story: dict[str, Any]) -> tuple[EarlyStopping, Progress]:
    """Read how far a kept state had come.

    Raises:
        InputError: it does not tell all of it.
    """
    needed = ["progress", "stopping", "average_steps", "scheduled", "processes", "parameters"]
    if missing := [key for key in needed if key not in story]:
        raise InputError(f"--resume: the state lacks {missing[0]}: start again without --resume")
    try:
        return EarlyStopping(**story["stopping"]), Progress(**story["progress"])
    except TypeError as error:
        raise InputError("--resume: the state is of another program") from error


def refuse_other_model(parameters: list[list[Any]], own: dict[str, Tensor], state: State) -> None:
    """Refuse a state that is not, in names, sizes and kinds, what this model goes on from.

    Args:
        parameters: of this model, as in the state's story.
        own: tensors that are brought back.
        state: to be brought back.

    Raises:
        InputError: naming one parameter or tensor that differs.
    """
    tensors, story = state
    pairs = itertools.zip_longest(parameters, story["parameters"], fillvalue=[""])
    other = [mine[0] or kept[0] for mine, kept in pairs if mine != kept]
    rest = {key: t for key, t in tensors.items() if not key.startswith("random.")}
    expected, found = ({key: (t.shape, t.dtype) for key, t in each.items()} for each in (own, rest))
    other += [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if other or not all(f"random.{k}.cpu" in tensors for k in range(story["processes"])):
        raise InputError(f"--resume: the state is of another model: {(other or ['random'])[0]}")


def share_out_anew(learner: Learner, factor: float) -> None:
    """Count batches and schedule in those of another number of processes; nothing is exact then.

    Args:
        learner: as it was brought back.
        factor: processes then, divided by those now.
    """
    progress, optimizer = learner.progress, learner.optimizer
    progress.batches = round(progress.batches * factor)
    optimizer.scheduled = round(optimizer.scheduled * factor)


# --------------------------------------------------------------------------- signals


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end; ``code`` is what the program then ends with."""

    def __init__(self, number: int) -> None:
        """Remember which signal it was."""
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Heed:
    """What is done on signals: SIGTERM and SIGINT end the run, SIGUSR1 keeps its state.

    Within ``put_off`` an end waits for the next step, so that state and weights agree; elsewhere it
    comes at once. A second signal ends the process without further ado.
    """

    ENDING = (signal.SIGTERM, signal.SIGINT)
    KNOWN = (*ENDING, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.came = 0
        self.first = 0.0
        self.waits = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Heed signals for the length of a block; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on) for number in self.KNOWN}
        try:
            yield
        finally:
            self.came, self.first = 0, 0.0
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on(self, number: int, _: object) -> None:
        if number not in self.ENDING:
            self.came = self.came or number
            return
        now = time.monotonic()
        # A launcher passes on what the scheduler has sent to each process already.
        echo = ECHO_SECONDS if "LOCAL_RANK" in os.environ else 0.0
        if self.first and now - self.first >= echo:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        again, self.first = bool(self.first), self.first or now
        self.came = number  # where the exception is lost, the next step ends the run
        if not (again or self.waits):
            raise Stopped(number)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Raise nothing within a block."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Let an end wait for ``obey``, or for the end of the block."""
        with self._waiting():
            yield
        self.obey(self.asked())

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Let an end wait for the end of a block that one process goes through by itself."""
        with self._waiting():
            yield
        if self.came in self.ENDING:
            raise Stopped(self.came)

    def asked(self) -> int:
        """Give the signal that has come to any process, 0 for none."""
        anywhere = sum_over_processes(*(self.came == number for number in self.KNOWN))
        return next((n for n, count in zip(self.KNOWN, anywhere, strict=True) if count), 0)

    def obey(self, number: int) -> None:
        """Do what a signal asks for, the state being kept.

        Raises:
            Stopped: it asks to end.
        """
        if number in self.ENDING:
            raise Stopped(number)
        if number:
            self.came = 0
            logger.info("state kept, as %s asked", signal.Signals(number).name)


SIGNALS = Heed()


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep another run from a folder, or a file; when a run dies, its lock is free.

    Args:
        folder: or file, that is there.
        wait: for the other run, rather than refuse.

    Raises:
        InputError: another run has it.
    """
    import fcntl  # not on Windows, where nothing of this program has been tried

    busy = f"{folder}: another run is at work there: wait for it or choose another place"
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InputError(busy) from error
        except OSError:  # some network file systems know no locks
            logger.warning("%s cannot be locked: let no second run write there", folder)
        if not os.path.exists(folder) or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise InputError(busy)  # which has put another one there meanwhile
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep another run from writing a file, by a lock beside it that is free when this run dies.

    Raises:
        InputError: another run has it.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.touch(0o600)
    with locked(lock):
        try:
            yield
        finally:
            remove(lock)


# --------------------------------------------------------------------------- the one loop


class Scored(NamedTuple):
    """A part of the data as the model sees it, rows in the order of the data set.

    loss: mean over all terms; labels, logit (log-odds of the event), rows (positions in the data
    set): (n,); decision: what makes a probability of the log-odds.
    """

    loss: float
    labels: NDArray[np.float64]
    logit: NDArray[np.float64]
    rows: NDArray[np.int64]
    decision: Decision = Decision()

    @property
    def probability(self) -> NDArray[np.float64]:
        """Give the probability of the event, (n,)."""
        return self.decision.probability(self.logit)


class Vectors:
    """The parameters that learn, end to end: one vector for each rate, kind and device.

    The parameters become views of it. So norm, step, average and copy take the same few calls
    however many there are, and only gradients are still gathered one by one: otherwise an epoch of
    stage 1 takes 4 % longer. In exchange autograd no longer notices a weight that is changed
    between forward and backward.

    Attributes:
        rates: learning rate of each vector.
        weights: the vectors.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters of ``Stage.parameter_groups``, whose values stay."""
        members: dict[tuple[float, Any, Any], list[nn.Parameter]] = {}
        for group in groups:
            for parameter in group["params"]:
                kind = (group["lr"], parameter.dtype, parameter.device)
                members.setdefault(kind, []).append(parameter)
        self.rates = [rate for rate, *_ in members]
        # The largest first: behind a bias of one number the next would not be aligned.
        self._members = [sorted(own, key=lambda p: -p.numel()) for own in members.values()]
        self.weights = [_flatten_dense_tensors([p.detach() for p in own]) for own in self._members]
        for parameter, weights in zip(self.parameters, self.cut(self.weights), strict=True):
            parameter.data = weights

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in the order of their places."""
        return [parameter for own in self._members for parameter in own]

    def cut(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Give what such vectors hold of each parameter, as views in its shape."""
        pairs = zip(vectors, self._members, strict=True)
        return [piece for each, own in pairs for piece in _unflatten_dense_tensors(each, own)]

    def take_gradients(self) -> list[Tensor]:
        """Give the gradients as such vectors, zero where none came; the parameters have none then.

        Were they views to begin with, as the weights are, autograd would add each gradient to what
        is there instead of handing it over.
        """
        taken = []
        for own in self._members:
            slopes = [torch.zeros_like(p) if (g := p.grad) is None else g for p in own]
            taken.append(_flatten_dense_tensors(slopes))
            for parameter in own:
                parameter.grad = None
        return taken

    @contextlib.contextmanager
    def lent(self, others: list[Tensor]) -> Iterator[None]:
        """Put other vectors in place of the weights for the length of a block."""
        own = [weights.clone() for weights in self.weights]
        try:
            torch._foreach_copy_(self.weights, others)
            yield
        finally:
            torch._foreach_copy_(self.weights, own)


class WeightAverage:
    """Exponential moving average of the trainable weights, lent to the model for scoring.

    Source: Polyak and Juditsky 1992; the warm-up of the decay as in TensorFlow's
    ``ExponentialMovingAverage``.
    """

    def __init__(self, weights: list[Tensor], decay: float) -> None:
        """Start from the weights as they are."""
        self.weights = weights
        self.decay = decay
        self.steps = 0
        self.shadow = [each.clone() for each in weights]

    def update(self) -> None:
        """Move the average towards the weights after an optimizer step, taken or skipped."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, self.weights, 1 - decay)


class AdamW:
    """AdamW on a schedule, by torch's fused kernel, one call for each vector.

    What wraps that kernel in ``torch.optim.AdamW`` takes 1.1 s of a start, in which it loads a
    compiler that is not used, and 0.03 ms of each step, 0.08 where its code is not at hand. Unlike
    there a parameter without a gradient is moved as by one of zero.

    Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.

    Args:
        vectors: what learns.
        factor: on the learning rates, of the number of steps before.

    Attributes:
        exp_avg: mean of the gradients, for each vector, named as torch's own optimizer does.
        exp_avg_sq: mean of their squares.
        steps: taken, float32 on the vector's device.
        scheduled: steps as the schedule counts them, with those that were skipped.
    """

    def __init__(self, vectors: Vectors, factor: Callable[[int], float]) -> None:
        """Begin with moments of zero."""
        self.vectors, self.factor, self.scheduled = vectors, factor, 0
        self.exp_avg, self.exp_avg_sq = (
            [torch.zeros_like(weights) for weights in vectors.weights] for _ in range(2)
        )
        self.steps = [torch.zeros((), device=weights.device) for weights in vectors.weights]

    def step(self, gradients: Sequence[Tensor], skip: Tensor) -> None:
        """Move the weights by these gradients, one for each vector.

        Args:
            gradients: of the vectors.
            skip: float32 scalar on the device, 1 where nothing shall move, else 0.
        """
        vectors, factor = self.vectors, self.factor(self.scheduled)
        for rate, *own in zip(
            *(vectors.rates, vectors.weights, gradients),
            *(self.exp_avg, self.exp_avg_sq, self.steps),
            strict=True,
        ):
            weights, gradient, first, second, steps = ([each] for each in own)
            steps[0].add_(1).sub_(skip)
            torch._fused_adamw_(
                *(weights, gradient, first, second, [], steps),
                lr=rate * factor,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=WEIGHT_DECAY,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
        self.scheduled += 1


@dataclass
class EarlyStopping:
    """Remember the best epoch; ``exhausted`` after ``patience`` epochs without a better one."""

    patience: int
    higher_is_better: bool
    best: float = math.nan
    best_epoch: int = 0
    epoch: int = 0

    def improved(self, score: float) -> bool:
        """Count an epoch; tell whether its score is the best so far."""
        self.epoch += 1
        better = score > self.best if self.higher_is_better else score < self.best
        if self.best_epoch == 0 or better:
            self.best, self.best_epoch = score, self.epoch
        return self.best_epoch == self.epoch

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.epoch - self.best_epoch >= self.patience


@dataclass
class Progress:
    """How far training has come.

    Attributes:
        batches: of the epoch under way, how many this process has learned from.
        loss: their sum of losses.
        terms: what the losses were summed over.
        seconds: that the epoch took before the run was stopped.
        skipped: steps of the epoch that were not taken, since loss or gradient was no number.
        skipped_in_a_row: how many of them at last.
        history: the lines of ``history.jsonl``.
        over: training has ended.
    """

    batches: int = 0
    loss: float = 0.0
    terms: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    history: list[str] = field(default_factory=list)
    over: bool = False


class Tried(NamedTuple):
    """A step whose outcome nobody has read yet.

    batch: its number in the epoch; loss: the sum over all terms; norm: of its gradient;
    skip: 1 where one of them is no number, and the step was therefore not taken, else 0.
    """

    batch: int
    loss: Tensor
    terms: Tensor | int
    norm: Tensor
    skip: Tensor


@dataclass
class Learner:
    """What learns: the model as all processes share it, and all that training keeps beside it.

    ``best`` holds the averaged weights of the best epoch, empty before there is one; ``tried`` the
    steps that ``read_steps`` has not read yet.
    """

    model: nn.Module
    vectors: Vectors
    optimizer: AdamW
    average: WeightAverage
    stopping: EarlyStopping
    progress: Progress = field(default_factory=Progress)
    best: list[Tensor] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)


def begin(stage: Stage, device: torch.device) -> Learner:
    """Make what a stage learns with, from its weights as they are."""
    model = stage.model.to(device)
    stage.loaders["train"].device = device
    total = stage.epochs * -(-len(stage.loaders["train"]) // stage.accumulate)
    shared: nn.Module = model
    if processes().num_processes > 1:
        from accelerate import Accelerator

        # The precision is the model's own, whatever accelerate's configuration says.
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        shared = accelerator.prepare_model(model)
        torch.manual_seed(torch.initial_seed() + processes().process_index)  # dropout of its own
    vectors = Vectors(stage.parameter_groups())
    return Learner(
        shared,
        vectors,
        AdamW(vectors, warmup_cosine(total)),
        WeightAverage(vectors.weights, AVERAGE_DECAY),
        EarlyStopping(stage.patience, stage.higher_is_better),
    )


def run_stage(
    stage: Stage,
    folder: Path,
    device: torch.device,
    seed: int,
    track: Track = lambda figures, step: None,
    *,
    states: States | None = None,
    resume: bool = False,
    save_every: int = 0,
) -> EarlyStopping:
    """Train, keep the winner by validation in ``folder``, and leave the model as that winner.

    One line an epoch goes to ``history.jsonl``, its figures and step also to ``track``. The test
    part is not touched. Of several processes each takes a part of every batch, the first writes.

    Args:
        stage: what learns from what.
        folder: where winner and history go.
        device: where to learn.
        seed: of the order of the rows.
        track: see ``Track``.
        states: kept at first, before each validation, at last, and when a signal asks; or not.
        resume: go on from the newest of them.
        save_every: steps after which one is kept within an epoch; 0 for none.

    Raises:
        NonFiniteLossError: the loss is no number; the winner so far stays on disk.
        Stopped: a signal asked for it; the state is kept.
    """
    keep_freed_memory()  # not before: reading a large file would take 5 % more memory
    learner = begin(stage, device)
    if resume and states:
        go_on(stage, learner, states.newest(), folder)

    began = time.perf_counter()

    def count_seconds() -> None:
        nonlocal began
        now = time.perf_counter()
        learner.progress.seconds, began = learner.progress.seconds + now - began, now

    def keep() -> None:
        count_seconds()
        state = state_of(stage, learner) if states else None
        if states and state and processes().is_main_process:
            states.keep(state)

    def after_step() -> None:
        asked = SIGNALS.asked()
        if asked or (save_every and learner.average.steps % save_every == 0):
            keep()
        SIGNALS.obey(asked)

    if not resume:
        keep()
    ended_before = learner.progress.over
    while not learner.progress.over:
        with one_thread(stage.small and device.type == "cpu"), winner_kept(stage, learner, folder):
            with SIGNALS.put_off():
                train_loss = train_epoch(stage, learner, seed, after_step)
                keep()  # the validation may be long
            scored = validate(stage, learner, device)
        count_seconds()
        end_epoch(stage, learner, folder, train_loss, scored, track)
    if not ended_before:
        keep()
    processes().wait_for_everyone()  # the winner lies on the disk
    stage.load(folder)
    return learner.stopping


def validate(stage: Stage, learner: Learner, device: torch.device) -> Scored:
    """Score the validation part by the averaged weights.

    Raises:
        NonFiniteLossError: the loss is no number.
    """
    with learner.vectors.lent(learner.average.shadow):
        scored = evaluate(stage.model, stage.loaders["val"], device)
    if not math.isfinite(scored.loss):
        epoch = learner.stopping.epoch + 1
        raise NonFiniteLossError(f"the validation loss is {scored.loss} in epoch {epoch}")
    return scored


def end_epoch(
    stage: Stage,
    learner: Learner,
    folder: Path,
    train_loss: float,
    scored: Scored,
    track: Track,
) -> None:
    """Keep the epoch's weights if they are the best so far, tell its figures, go on to the next."""
    progress, stopping, average = learner.progress, learner.stopping, learner.average
    figures: dict[str, Any] = {
        "epoch": stopping.epoch + 1,
        "step": average.steps,
        "train_loss": train_loss if math.isfinite(train_loss) else None,
        "val_loss": scored.loss,
        "val_auroc": auroc(scored),
        "skipped_steps": progress.skipped,
        "seconds": round(progress.seconds, 3),
    }
    improved = stopping.improved(float(figures[stage.monitor]))
    if improved:
        learner.best = [weights.clone() for weights in average.shadow]
        keep_winner(stage, learner, folder)
    progress.history.append(json.dumps({**figures, "improved": improved}) + "\n")
    track({name: each for name, each in figures.items() if each is not None}, average.steps)
    if processes().is_main_process:
        write_text(folder / "history.jsonl", "".join(progress.history))
    logger.info(
        "epoch %d/%d: train loss %.4f, val loss %.4f, val AUROC %.4f, %.1f s%s%s",
        *(stopping.epoch, stage.epochs, train_loss, scored.loss, figures["val_auroc"]),
        figures["seconds"],
        f", {progress.skipped} steps skipped" if progress.skipped else "",
        ", best so far" if improved else "",
    )
    if stopping.exhausted:
        logger.info("no better %s for %d epochs: stopped", stage.monitor, stage.patience)
    over = stopping.exhausted or stopping.epoch == stage.epochs
    learner.progress = Progress(
        history=progress.history, over=over, skipped_in_a_row=progress.skipped_in_a_row
    )


def keep_winner(stage: Stage, learner: Learner, folder: Path) -> None:
    """Write the best weights so far, or, before there are any, the average as it is."""
    if processes().is_main_process:
        with learner.vectors.lent(learner.best or learner.average.shadow):
            stage.save(folder)


@contextlib.contextmanager
def winner_kept(stage: Stage, learner: Learner, folder: Path) -> Iterator[None]:
    """Keep the weights before a fault where no epoch has kept any yet."""
    try:
        yield
    except (NonFiniteLossError, KeyboardInterrupt):
        if not learner.best:
            keep_winner(stage, learner, folder)
        raise


def train_epoch(
    stage: Stage, learner: Learner, seed: int = 0, after_step: Callable[[], None] = lambda: None
) -> float:
    """Pass over the training part, or over what is left of it; give the mean loss over all terms.

    Args:
        stage: what learns from what.
        learner: goes on from its progress.
        seed: with the epoch's number, of the order of the rows; it depends on no epoch before.
        after_step: called after each optimizer step; ``state_of`` then gives where training is.
    """
    stage.model.train()
    progress, epoch = learner.progress, learner.stopping.epoch + 1
    loader = stage.loaders["train"]
    batches = loader.batch_sampler
    batches.generator.manual_seed(seed + epoch)
    batches.done = progress.batches
    bar = progress_bar(loader, f"{stage.name} {epoch}/{stage.epochs}", progress.batches)
    best = {} if epoch == 1 else {f"best {stage.monitor}": f"{learner.stopping.best:.4f}"}
    losses: list[Tensor] = []
    terms = 0
    stage.model.zero_grad()
    for number, batch in enumerate(bar, progress.batches + 1):
        steps = number % stage.accumulate == 0 or number == len(loader)
        with contextlib.nullcontext() if steps else unshared(learner.model):
            output = learner.model(batch)
            output.loss.backward()
        losses.append(output.loss.detach())
        terms += output.terms
        if not steps:
            continue
        # Sums of losses, divided by all their terms: as one large batch, whatever the lengths.
        take_step(learner, number, *sum_over_processes(sum(losses[1:], losses[0]), terms))
        losses, terms, progress.batches = [], 0, number
        if len(learner.tried) == STEPS_UNREAD or number == len(loader):
            read_steps(learner)
            if progress.terms and not bar.disable:
                shown = {"loss": f"{progress.loss / progress.terms:.4f}", **best}
                bar.set_postfix(shown, refresh=False)
        after_step()
    return progress.loss / progress.terms if progress.terms else math.nan


def take_step(learner: Learner, batch: int, loss: Tensor, terms: Tensor | int) -> None:
    """Change the weights by the gradients of a batch, or skip it where they are no numbers.

    Which of both is decided on the device, and the host does not wait for it: see ``read_steps``.

    Args:
        learner: what learns; its gradients are those of the sum of losses, or, of several
            processes, their mean, as DistributedDataParallel leaves them.
        batch: its number in the epoch.
        loss: sum over all terms of all processes.
        terms: their number.
    """
    gradients = learner.vectors.take_gradients()
    norm, share = norm_of(gradients), terms / processes().num_processes
    skip = ((loss.float() + norm) * 0).nan_to_num(nan=1.0)  # no number times zero is none
    # The mean, and clipped to a norm of 1: a sum whose norm is above ``share`` is divided by that.
    divisor = norm.clamp(min=share)
    for each in gradients:
        each.div_(divisor)
    learner.optimizer.step(gradients, skip)
    learner.average.update()  # where the step was skipped, towards the weights as they were
    learner.tried.append(Tried(batch, loss, terms, norm, skip))


def read_steps(learner: Learner) -> None:
    """Read what became of the steps since the last time, for which the host waits.

    So a run that has to stop does so up to ``STEPS_UNREAD`` - 1 steps late.

    Raises:
        NonFiniteLossError: too many were skipped one after the other.
    """
    progress, tried = learner.progress, learner.tried
    if not tried:
        return
    learner.tried = []
    losses = torch.stack([step.loss for step in tried]).tolist()
    skips = torch.stack([step.skip for step in tried]).tolist()
    for step, loss, skip in zip(tried, losses, skips, strict=True):
        terms = float(step.terms)
        if not skip:
            progress.loss, progress.terms = progress.loss + loss, progress.terms + terms
            progress.skipped_in_a_row = 0
            continue
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == MOST_SKIPPED:
            norm = float(step.norm) * processes().num_processes / terms
            raise NonFiniteLossError(
                f"the loss is {loss / terms}, its gradient {norm} at batch {step.batch} of epoch "
                f"{learner.stopping.epoch + 1}, the {MOST_SKIPPED}th time in a row: lower the "
                "learning rates or look for extreme values; the best state so far is kept"
            )


def norm_of(vectors: Sequence[Tensor]) -> Tensor:
    """Give the Euclidean norm of vectors laid end to end, a scalar on their device.

    In pieces: along millions of numbers float32 loses the fourth decimal on a CPU. A short one
    stays whole, since to cut it takes as long as its product.
    """
    pieces = [[each] if len(each) <= NORM_PIECE else each.split(NORM_PIECE) for each in vectors]
    first, *others = (piece @ piece for own in pieces for piece in own)
    return sum(others, first).float().sqrt()


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, device: torch.device, most_batches: int | None = None
) -> Scored:
    """Score a part of the data, in its own order; sums and counts, so batches do not matter.

    Each process scores its share of the batches; all get the whole.
    """
    model.eval()
    pieces = []
    for step, batch in enumerate(loader):
        if step == most_batches:
            break
        output = model(to_device(batch, device))
        logit = output.logit.double().cpu().numpy()
        columns = batch["index"].numpy(), batch["labels"].double().numpy(), logit
        pieces.append((float(output.loss), output.terms, columns))
    losses, terms, columns = zip(*gather(pieces), strict=True)
    rows, labels, logits = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.argsort(rows)
    return Scored(sum(losses) / sum(terms), labels[order], logits[order], rows[order])


@cache  # asked for twice a step, 1 % of stage 1's each time
def processes() -> PartialState:
    """Give what accelerate knows of this run: device, and the processes that share the work."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def gather(items: list[Any]) -> list[Any]:
    """Join the lists of all processes, in the order of the processes."""
    from accelerate.utils import gather_object

    joined: list[Any] = gather_object(items) if processes().num_processes > 1 else items
    return joined


def sum_over_processes(*numbers: Any) -> Sequence[Any]:
    """Add up each of some numbers over all processes; of several it gives float32 scalars."""
    if processes().num_processes == 1:
        return numbers
    from accelerate.utils import reduce

    own = torch.zeros(len(numbers), dtype=torch.float64, device=processes().device)
    for place, number in zip(own, numbers, strict=True):
        place.copy_(number) if isinstance(number, Tensor) else place.fill_(number)
    summed: Tensor = reduce(own, "sum")
    return summed.float().unbind()


def unshared(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let gradients add up without exchange between processes."""
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    context: contextlib.AbstractContextManager[None] = no_sync()
    return context


def auroc(scored: Scored) -> float:
    """Give the area under the ROC curve of a scored part."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(scored.labels, scored.probability))


def warmup_cosine(total: int) -> Callable[[int], float]:
    """Give the factor on the learning rate for each optimizer step: linear up, cosine to zero."""
    warmup = max(1, min(WARMUP_STEPS, round(WARMUP_SHARE * total)))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Give the parameters that learn."""
    return [p for p in model.parameters() if p.requires_grad]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every part of a batch; it is made on the CPU, and there it may stay as it is."""
    if device.type == "cpu":
        return batch
    return {name: part.to(device, non_blocking=True) for name, part in batch.items()}


def progress_bar(batches: Iterable[Any], what: str, done: int = 0) -> Any:
    """Wrap batches, of which some are done, in a bar; silent where the output is no terminal."""
    from tqdm import tqdm

    shown = sys.stderr.isatty() and processes().is_main_process
    return tqdm(batches, desc=what, leave=False, disable=not shown, initial=done)


def seed_everything(seed: int) -> None:
    """Seed every generator that an initialisation or a dropout may draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries beneath draw from it)
    torch.manual_seed(seed)


@contextlib.contextmanager
def repeatable(*, wanted: bool) -> Iterator[None]:
    """Let torch use only kernels that repeat to the last bit; on the CPU all of this program's do.

    Source: PyTorch's notes on reproducibility.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:  # asking imports torch's compiler, a second
            torch.use_deterministic_algorithms(before)


def default_device() -> torch.device:
    """Give the GPU of this process where there is one."""
    device: torch.device = processes().device
    return device


# --------------------------------------------------------------------------- report


def announce(stage: Stage, data: Data, args: argparse.Namespace) -> None:
    """Log what is about to be learned from what, and with which arithmetic."""
    for line in summarize(data.dataset):
        logger.info(line)
    for part, indices in data.split.items():
        events = int(data.dataset.labels[indices].sum())
        logger.info("%s: %d rows, %d events", part, len(indices), events)
    for group in stage.parameter_groups():
        count = sum(p.numel() for p in group["params"])
        logger.info(
            "%s: %s trainable parameters, learning rate %g",
            group["name"],
            f"{count:,}",
            group["lr"],
        )
    for line in stage.describe():
        logger.info(line)
    steps = -(-len(stage.loaders["train"]) // stage.accumulate)
    logger.info(
        "batch size %d: %d steps an epoch, at most %d epochs = %d steps; on %s",
        *(args.batch_size, steps, stage.epochs, steps * stage.epochs, default_device()),
    )


def write_results(
    stage: Stage, stopping: EarlyStopping, data: Data, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Score the winner: validation again, then the test part, once; write all figures.

    Returns:
        What ``metrics.json`` holds.
    """
    device, first = default_device(), processes().is_main_process
    raw = {part: evaluate(stage.model, stage.loaders[part], device) for part in ("val", "test")}
    assert stopping.best_epoch > 0
    decision = decide(raw["val"].labels, raw["val"].logit, args.calibrate)
    own_threshold = decide(raw["val"].labels, raw["val"].logit, "none").threshold
    stage.facts["decision"] = decision._asdict()
    if first:
        stage.save(folder)  # the winner, with what makes predictions of its log-odds
    scored = {part: each._replace(decision=decision) for part, each in raw.items()}
    simple = baselines(data)
    threshold = decision.threshold
    figures: dict[str, Any] = {"stage": stage.name, "selected_epoch": stopping.best_epoch}
    figures |= {"threshold": threshold, "calibration": {"method": args.calibrate}}
    scores: dict[str, dict[str, Any]] = {name: {} for name in simple}
    for part, each in scored.items():
        name, groups = "validation" if part == "val" else part, data.dataset.groups[each.rows]
        figures[name] = judged(each, data, threshold, args.seed)
        for baseline, risks in simple.items():
            scores[baseline][name] = metrics_with_intervals(
                each.labels, risks[part], groups, args.seed
            )
        if decision.recalibrates:
            known = figures["calibration"]
            known |= {"slope": decision.slope, "intercept": decision.intercept}
            known[f"{name} before"] = judged(raw[part], data, own_threshold, args.seed)
    figures["baselines"] = scores
    for part, result in scored.items():
        table = pd.DataFrame(
            {
                "id": data.dataset.ids[result.rows],
                "label": result.labels.astype(int),
                "probability": result.probability,
                "patient": data.dataset.groups[result.rows],
                **{name: risks[part] for name, risks in simple.items()},
            }
        )
        if first:
            write_text(folder / f"predictions_{part}.csv", table.to_csv(index=False))
    if first:
        write_text(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
    if stage.after_test:  # long: what stands above is safe by now
        figures["reports"] = stage.after_test(scored["test"], folder)
        if first:
            write_text(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
    if first:
        report_stage(stage, scored, simple, figures, data, folder, args)
    return figures


def judged(scored: Scored, data: Data, threshold: float, seed: int) -> dict[str, Any]:
    """Give metrics, calibration and shares of a part, with intervals."""
    groups = data.dataset.groups[scored.rows]
    further = further_figures(scored.labels, scored.probability, groups, threshold, seed)
    return metrics_with_intervals(scored.labels, scored.probability, groups, seed) | further


def table_of(figures: dict[str, Any]) -> str:
    """Lay out model and baselines, validation and test, as a plain table."""
    rows = []
    models = {figures["stage"]: figures, **figures["baselines"]}
    for name, scores in models.items():
        row = {"model": name}
        for part in ("validation", "test"):
            score = scores[part]["auroc"]
            row[f"{part} AUROC [95 %]"] = (
                f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
            )
        for metric in ("auprc", "brier", "accuracy"):
            row[f"test {metric}"] = f"{scores['test'][metric]['value']:.3f}"
        rows.append(row)
    test = figures["test"]
    return (
        pd.DataFrame(rows).to_string(index=False)
        + f"\ntest part: {test['n']} rows, {test['events']} events"
        + "".join(f"\n{name}: {value:.4g}" for name, value in figures.get("reports", {}).items())
        + recalibrated_text(figures)
    )


RECALIBRATED = {
    "calibration_slope": "calibration slope",
    "calibration_in_the_large": "calibration in the large",
    "brier": "Brier score",
    "log_loss": "log-loss",
}
"""What recalibration is to mend; the order of the patients, and so AUROC, stays."""


def recalibrated_text(figures: dict[str, Any]) -> str:
    """Say what recalibration changed on the test part; nothing where none was asked."""
    before = figures["calibration"].get("test before")
    if before is None:
        return ""
    told = [
        f"{name} {shown(before[key])} -> {shown(figures['test'][key])}"
        for key, name in RECALIBRATED.items()
    ]
    return f"\nrecalibrated on the validation part; test part: {'; '.join(told)}"


def run_facts(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Give what makes a run repeatable: arguments, versions, commit, seed, data, split."""
    return {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": versions(),
        "git_commit": git_commit(),
        "code_sha256": code_hash(),
        "processes": processes().num_processes,
        "seed": args.seed,
        "stage_1_sha256": file_hash(args.ode_checkpoint),
        "base_revision": None if args.trajectory_only else cached_revision(args.model_name),
        "base_sha256": None if args.trajectory_only else base_content(args.model_name),
        "device": str(default_device()),
        "data": data.facts(),
        "split": {
            part: {"n": len(rows), "events": int(data.dataset.labels[rows].sum())}
            for part, rows in data.split.items()
        },
    }


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that a result depends on."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "torchdiffeq", "scikit-learn")
    return {"python": sys.version.split()[0], **{p: metadata.version(p) for p in packages}}


def git_commit() -> str | None:
    """Give the commit of the program's folder, where it is a checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def file_hash(path: Path | None) -> str | None:
    """Hash a file; None where there is none."""
    return None if path is None else hash_of(path)


def code_hash() -> str:
    """Hash the program's own modules."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def peak_memory() -> str:
    """Tell the most memory that the process, and the GPU, have held."""
    try:
        import resource
    except ImportError:  # not on Windows
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
    return f"peak memory {host:,.0f} MiB" + (f", GPU {gpu:,.0f} MiB" if gpu else "")


# --------------------------------------------------------------------------- report.html


class Cohort(NamedTuple):
    """What a report judges: n rows that no fitting has seen.

    labels, probability: (n,), labels of 0 and 1; groups, ids: (n,), patient and row; subgroups:
    n rows of ordered categories (``TrajectoryDataset.subgroups``); baselines: probabilities (n,) of
    each simple model on the same rows, may be empty.
    """

    labels: NDArray[np.float64]
    probability: NDArray[np.float64]
    groups: NDArray[Any]
    ids: NDArray[Any]
    subgroups: pd.DataFrame
    baselines: dict[str, NDArray[np.float64]]


class Told(NamedTuple):
    """What a report says beside its figures; no patient in it.

    title: of the page; outcome: the event in a few words; asked, data, card: lines of name and
    text; flow, split: tables as they shall stand; history: an object an epoch; reports: figures of
    written reports; shift: a table from ``shift_table``. What is None gets no section.
    """

    title: str
    outcome: str
    asked: dict[str, str]
    data: dict[str, str]
    card: dict[str, str]
    flow: pd.DataFrame | None = None
    split: pd.DataFrame | None = None
    history: list[dict[str, Any]] | None = None
    reports: dict[str, float] | None = None
    shift: pd.DataFrame | None = None
    recalibrated: pd.DataFrame | None = None


def write_report(
    path: Path, cohort: Cohort, told: Told, *, threshold: float, seed: int, patients: bool = False
) -> str:
    """Write ``report.html``: one file that needs neither network nor script.

    Args:
        path: of the file.
        cohort: the rows that are judged.
        told: what is said of question, data and model.
        threshold: from ``choose_threshold`` on the validation part.
        seed: of the bootstrap.
        patients: list the ten largest errors, by id, label and probability.

    Returns:
        The verdict that stands on top.

    Raises:
        ValueError: the labels hold one class only.
    """
    found = assess(cohort, threshold, seed)
    good, sentences = verdict(cohort, found, told.outcome)
    text = render(
        "report",
        told=told,
        good=good,
        sentences=sentences,
        cards=headline(found),
        pictures=pictures(cohort, found, told, threshold),
        figures=discrimination_table(found),
        calibration=calibration_table(found),
        shares=share_table(found, threshold),
        baselines=baseline_table(cohort, found),
        subgroups=subgroup_table(found),
        written=written_table(told.reports or {}),
        errors=largest_errors(cohort) if patients else None,
    )
    write_text(path, text)
    return " ".join(sentences)


def render(name: str, **content: Any) -> str:
    """Fill a page of ``TEMPLATES``; all content is escaped."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    pages = Environment(
        loader=DictLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return pages.get_template(name).render(content) + "\n"


def assess(cohort: Cohort, threshold: float, seed: int) -> dict[Any, Any]:
    """Give every figure of a report with its interval, all from the same draws of patients.

    Returns:
        ``Estimate`` by name: metrics, calibration and shares of the model; ``(name, metric)`` of a
        baseline and ``(name, metric, "difference")`` model less baseline; ``("benefit", k)`` at
        ``BENEFIT_AT[k]``; ``("bin", k)``; ``("subgroup", column, level)``. And plain facts: ``n``,
        ``events``, ``patients``, ``bins`` (mean risk, rows), ``subgroups`` (column, level, rows,
        events, mean risk).
    """
    labels, probability, groups, _, table, baselines = cohort
    place = quantile_bins(labels, probability)
    bins = {
        ("bin", k): (in_bin & (labels == 1), in_bin)
        for k in range(place.max() + 1)
        if (in_bin := place == k).any()
    }
    shares: dict[Any, Share] = {**threshold_shares(labels, probability, threshold), **bins}
    members = subgroup_members(table)
    large = {
        key: rows
        for key, rows in members.items()
        if rarer_patients(labels[rows], groups[rows]) >= FEWEST_IN_SUBGROUP
    }

    def ask(weights: NDArray[np.float64]) -> Figures:
        """Give all figures under some draws."""
        own = weighted_metrics(labels, probability, weights)
        result = {**own, **weighted_calibration(labels, probability, weights)}
        result |= weighted_shares(shares, weights)
        for name, risk in baselines.items():
            for metric, other in weighted_metrics(labels, risk, weights).items():
                result[name, metric] = other
                result[name, metric, "difference"] = own[metric] - other
        benefit = weighted_benefit(labels, probability, BENEFIT_AT, weights)
        result |= {("benefit", k): column for k, column in enumerate(benefit.T)}
        with np.errstate(divide="ignore", invalid="ignore"):
            for key, rows in large.items():
                inside = weighted_metrics(labels[rows], probability[rows], weights[:, rows])
                result["subgroup", *key] = inside["auroc"]
        return result

    replicates = bootstrap(labels, groups, seed, ask)
    exact = {**shares, "auroc": rarer_rows(labels, groups)}
    return {
        **estimates(ask(np.ones((1, len(labels)))), replicates, exact, groups),
        "n": len(labels),
        "rarer": rarer_patients(labels, groups),
        "events": int(labels.sum()),
        "patients": len(np.unique(groups)),
        "bins": {
            k: (probability[rows].mean(), int(rows.sum())) for (_, k), (_, rows) in bins.items()
        },
        "subgroups": {
            key: (len(rows), int(labels[rows].sum()), probability[rows].mean())
            for key, rows in members.items()
        },
    }


def quantile_bins(
    labels: NDArray[np.float64], probability: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Sort rows (n,) into two to ten bins of about equal size by their risk; equal risks stay.

    A bin should hold five rows of the rarer class, else its share says nothing.
    """
    count = int(np.clip(min(labels.sum(), (1 - labels).sum()) // 5, 2, 10))
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, count + 1)))
    return np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, max(len(edges) - 2, 0))


def subgroup_members(table: pd.DataFrame) -> dict[tuple[str, str], NDArray[np.int64]]:
    """Give the rows of each group that has any, by column and level."""
    return {
        (str(column), str(level)): rows
        for column in table
        for level in table[column].cat.categories
        if len(rows := np.flatnonzero(table[column] == level))
    }


def best_baseline(found: dict[Any, Any], names: Iterable[str]) -> str | None:
    """Give the baseline with the largest AUROC on these rows: the hardest one to be better than."""
    return max(names, key=lambda name: found[name, "auroc"]["value"], default=None)


def verdict(cohort: Cohort, found: dict[Any, Any], outcome: str) -> tuple[bool, list[str]]:
    """Say in words what the figures say: whether all is well, and sentences."""
    score = found["auroc"]
    told = f"AUROC {shown(score)}"
    useful = score["low"] > 0.5
    if useful:
        first = (
            f"Of two rows, one with the event ({outcome}) and one without, the model gives the one "
            f"with the event the higher risk {percent(score['value'])} of the time ({told})."
        )
    elif score["high"] >= 0.5:
        first = (
            "This model is of no use as it stands: it tells rows with the event "
            f"({outcome}) from those without it no better than chance ({told}: the interval "
            "includes 0.5)."
        )
    else:
        first = f"This model is worse than chance: it ranks rows the wrong way round ({told})."
    rarer = found["rarer"]
    if rarer < FEWEST_IN_SUBGROUP:
        few = (
            f"Only {rarer} of {found['patients']} patients are of the rarer outcome: too few to "
            "judge a model."
        )
        first = f"{few} {first}"
    name = best_baseline(found, cohort.baselines)
    better, second = False, "No baseline was scored on these rows, so nothing says what it adds."
    if name is not None:
        difference = found[name, "auroc", "difference"]
        better = difference["low"] > 0
        word = "worse" if difference["high"] < 0 else "better" if better else "not better"
        chance = "" if better or difference["high"] < 0 else ", an interval that includes zero"
        second = (
            f"It is {word} than its best baseline, {name} (AUROC {shown(found[name, 'auroc'])}): "
            f"the paired difference is {shown(difference, '+.3f')}{chance}."
        )
    calibrated, third = calibration_sentence(found)
    enough = rarer >= FEWEST_IN_SUBGROUP
    return useful and better and calibrated and enough, [first, second, third]


def calibration_sentence(found: dict[Any, Any]) -> tuple[bool, str]:
    """Say whether the risks can be taken at their word, for all that can be told; and in words."""
    slope, large = found["calibration_slope"], found["calibration_in_the_large"]
    if found["rarer"] < FEWEST_IN_SUBGROUP or slope["low"] is None or large["low"] is None:
        return False, "Whether its risks can be taken at their word cannot be told from these rows."
    faults = []
    if slope["high"] < 1:
        faults.append("too extreme (high ones too high, low ones too low)")
    elif slope["low"] > 1:
        faults.append("too timid (too near to the average)")
    if large["high"] < 0:
        faults.append("too high on average")
    elif large["low"] > 0:
        faults.append("too low on average")
    told = f"calibration slope {shown(slope, '.2f')}"
    if not faults:
        return True, f"Nothing here says that its risks are off ({told})."
    word = " and ".join(faults)
    return False, f"Its risks cannot be taken at their word: they are {word} ({told})."


def shown(score: Any, form: str = ".3f", scale: float = 1) -> str:
    """Write a figure with its interval; a dash where there is none."""
    if score["value"] is None:
        return NOT_KNOWN
    value = f"{scale * score['value']:{form}}"
    if score["low"] is None:
        return f"{value} [{NOT_KNOWN}]"
    return f"{value} [{scale * score['low']:{form}}, {scale * score['high']:{form}}]"


def percent(value: float) -> str:
    """Write a share."""
    number = f"{100 * value:.0f}" if value >= 0.1 or value == 0 else f"{100 * value:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def headline(found: dict[Any, Any]) -> list[tuple[str, str, str]]:
    """Give the four figures at the top: name, value with interval, and what to hold them to."""
    return [
        ("AUROC", shown(found["auroc"]), "0.5 is chance, 1 is perfect"),
        ("AUPRC", shown(found["auprc"]), f"chance is {found['events'] / found['n']:.3f}"),
        ("Calibration slope", shown(found["calibration_slope"], ".2f"), "1 is right"),
        ("Brier skill", shown(found["brier_skill"], ".3f"), "0 is no better than the average risk"),
    ]


def two_columns(lines: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """Lay out figures with what they mean."""
    rows = [(name, value, meaning) for name, (value, meaning) in lines.items()]
    return pd.DataFrame(rows, columns=["Figure", "Value [95 %]", "Meaning"])


def discrimination_table(found: dict[Any, Any]) -> pd.DataFrame:
    """Lay out what tells how well the model ranks."""
    prevalence = found["events"] / found["n"]
    return two_columns(
        {
            "AUROC": (shown(found["auroc"]), "area under the ROC curve; 0.5 is chance"),
            "AUPRC": (
                shown(found["auprc"]),
                f"average precision; chance is the prevalence, {prevalence:.3f}",
            ),
            "Accuracy at 0.5": (shown(found["accuracy"]), "share of rows on the right side of 0.5"),
        }
    )


def calibration_table(found: dict[Any, Any]) -> pd.DataFrame:
    """Lay out what tells whether risks can be taken at their word."""
    return two_columns(
        {
            "Slope": (
                shown(found["calibration_slope"]),
                "1 is right; below 1 the risks are too extreme",
            ),
            "Intercept": (shown(found["calibration_intercept"]), "log-odds; 0 is right"),
            "Calibration in the large": (
                shown(found["calibration_in_the_large"]),
                "log-odds, slope held at 1; below 0 the risks are too high on average",
            ),
            "Brier score": (shown(found["brier"], ".4f"), "mean squared error of the risk"),
            "Brier skill": (
                shown(found["brier_skill"]),
                "against telling everyone the prevalence; 1 is perfect, 0 no better",
            ),
            "Log-loss": (shown(found["log_loss"], ".4f"), "nats a row"),
        }
    )


def share_table(found: dict[Any, Any], threshold: float) -> pd.DataFrame:
    """Lay out what an alarm at the chosen threshold means."""
    meanings = {
        "sensitivity": ("Sensitivity", "of the rows with the event, those with an alarm"),
        "specificity": ("Specificity", "of the rows without the event, those without alarm"),
        "ppv": ("PPV", "of the alarms, those with the event"),
        "npv": ("NPV", "of the rows without alarm, those without the event"),
        "alarms": ("Alarms", f"rows with a risk of at least {100 * threshold:.3g} %"),
    }
    return two_columns(
        {
            f"{name} (%)": (shown(found[key], ".1f", 100), meaning)
            for key, (name, meaning) in meanings.items()
        }
    )


def baseline_table(cohort: Cohort, found: dict[Any, Any]) -> pd.DataFrame:
    """Lay out model and baselines, with model less baseline, paired."""
    rows = [{"Model": "this model", **{m: shown(found[k], f) for k, m, f in COMPARED}}]
    rows[0] |= dict.fromkeys(("AUROC, difference", "Brier, difference"), "")
    for name in cohort.baselines:
        row = {"Model": name, **{m: shown(found[name, k], f) for k, m, f in COMPARED}}
        row["AUROC, difference"] = shown(found[name, "auroc", "difference"], "+.3f")
        row["Brier, difference"] = shown(found[name, "brier", "difference"], "+.4f")
        rows.append(row)
    return pd.DataFrame(rows)


def subgroup_table(found: dict[Any, Any]) -> pd.DataFrame:
    """Lay out the subgroups; ``few`` marks those that are too small for a figure."""
    rows = []
    for (column, level), (n, events, risk) in found["subgroups"].items():
        score = found.get(("subgroup", column, level))
        row = {"Group": f"{column}: {level}", "Rows": f"{n:,}", "Events": f"{events:,}"}
        row |= {"Observed": percent(events / n), "Mean risk": percent(risk)}
        row["AUROC [95 %]"] = "too few" if score is None else shown(score)
        rows.append({**row, "few": score is None})
    return pd.DataFrame(rows)


def written_table(reports: dict[str, float]) -> pd.DataFrame:
    """Lay out how true the written reports are."""
    meanings = {
        "reports": ("Reports written", ",.0f"),
        "parse_share": ("Share that has the expected form", ".3f"),
        "true_number_share": ("Share of stated numbers that are the patient's own", ".3f"),
        "numbers_stated": ("Numbers stated", ",.0f"),
        "verdict_auroc": ("AUROC of the verdict's probability", ".3f"),
    }
    rows = [(meanings[name][0], f"{value:{meanings[name][1]}}") for name, value in reports.items()]
    return pd.DataFrame(rows, columns=["Figure", "Value"])


def largest_errors(cohort: Cohort, most: int = 10) -> pd.DataFrame:
    """Give the rows whose risk is farthest from what happened: id, label and probability only."""
    order = np.argsort(-np.abs(cohort.labels - cohort.probability), kind="stable")[:most]
    return pd.DataFrame(
        {
            "id": cohort.ids[order],
            "label": cohort.labels[order].astype(int),
            "probability": [f"{p:.3f}" for p in cohort.probability[order]],
        }
    )


def shift_table(development: dict[str, float], cohort: dict[str, float]) -> pd.DataFrame:
    """Set the case mix of two sets of rows side by side, each from ``case_mix``."""

    def cell(mix: dict[str, float], name: str) -> str:
        """Write one fact of a case mix."""
        if f"{name}_median" in mix:
            low, middle, high = (mix[f"{name}_{place}"] for place in ("q1", "median", "q3"))
            return f"{middle:.3g} [{low:.3g}, {high:.3g}]"
        if name not in mix:
            return "not known"
        return f"{mix[name]:,.0f}" if name in ("rows", "patients") else percent(mix[name])

    lines = {
        "rows": "Rows",
        "patients": "Patients",
        "prevalence": "Prevalence of the event",
        "age": "Age in years, median [quartiles]",
        "women": "Women",
        "observations": "Observations a row, median [quartiles]",
    }
    return pd.DataFrame(
        {
            "": list(lines.values()),
            "Development": [cell(development, name) for name in lines],
            "These rows": [cell(cohort, name) for name in lines],
        }
    )


def report_stage(
    stage: Stage,
    scored: dict[str, Scored],
    simple: dict[str, dict[str, NDArray[np.float64]]],
    figures: dict[str, Any],
    data: Data,
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Write a stage's ``report.html`` about its test part, and log the verdict."""
    rows = scored["test"].rows
    dataset, facts = data.dataset, run_facts(args, data)
    cohort = Cohort(
        scored["test"].labels,
        scored["test"].probability,
        dataset.groups[rows],
        dataset.ids[rows],
        dataset.subgroups().iloc[rows],
        {name: risks["test"] for name, risks in simple.items()},
    )
    history = folder / "history.jsonl"
    lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
    told = Told(
        title=f"{STAGE_TITLES.get(stage.name, stage.name)}: {dataset.outcome}",
        outcome=dataset.outcome,
        asked=dataset.asked(),
        data={
            "Source": Path(dataset.source).name,
            "Kind": {"dka": "DKA format", "srtr": "SRTR Standard Analysis Files"}[args.dataset],
            "Rows read": f"{len(dataset):,} of {len(np.unique(dataset.groups)):,} patients",
            "SHA-256 of what was read": data.fingerprint,
            "Missing values": "masked, never filled in",
        },
        card=model_card(stage, figures, facts),
        flow=flow_table(dataset.flow),
        split=split_table(data),
        history=[json.loads(line) for line in lines] or None,
        reports=figures.get("reports"),
        recalibrated=recalibrated_table(figures),
    )
    text = write_report(
        folder / "report.html",
        cohort,
        told,
        threshold=figures["threshold"],
        seed=args.seed,
        patients=args.report_patients,
    )
    logger.info("%s\nreport: %s", text, folder / "report.html")


def recalibrated_table(figures: dict[str, Any]) -> pd.DataFrame | None:
    """Lay out what recalibration changed on the test part; None where none was asked."""
    before = figures["calibration"].get("test before")
    if before is None:
        return None
    rows = [
        (name[0].upper() + name[1:], shown(before[key]), shown(figures["test"][key]))
        for key, name in RECALIBRATED.items()
    ]
    return pd.DataFrame(rows, columns=["", "As learned", "Recalibrated"])


def split_table(data: Data) -> pd.DataFrame:
    """Lay out the parts: rows, patients, events."""
    rows = []
    for part, indices in data.split.items():
        labels = data.dataset.labels[indices]
        patients = len(np.unique(data.dataset.groups[indices]))
        events = f"{labels.sum():,.0f} ({percent(labels.mean())})"
        name = {"train": "training", "val": "validation"}.get(part, part)
        rows.append((name, f"{len(indices):,}", f"{patients:,}", events))
    return pd.DataFrame(rows, columns=["Part", "Rows", "Patients", "Events"])


def flow_table(flow: pd.DataFrame | None) -> pd.DataFrame | None:
    """Lay out who was left out by which rule."""
    if flow is None:
        return None
    columns = {"rule": "Left out", "removed": "Rows", "left": "Rows left"}
    return flow[list(columns)].rename(columns=columns)


def model_card(stage: Stage, figures: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """Give what whoever is handed a model has to know of it."""
    arguments, alone = facts["arguments"], stage.name == "trajectory"
    count = sum(p.numel() for p in stage.model.parameters())
    learned = sum(p.numel() for p in trainable(stage.model))
    licence = (
        NO_LANGUAGE_MODEL
        if alone
        else f"Where the language model is MedGemma or derived from it: {HAI_DEF_NOTICE.strip()}"
    )
    return {
        **CARD,
        "Limits": (
            "One data set, split by patient: nothing here says how the model fares in another "
            "hospital or another time. A label that treatment shapes makes a model that predicts "
            "treatment as well as disease. One test part of this size moves by chance: trust the "
            "intervals, not the point."
        ),
        "Model": "ODE-RNN with attention-pooled head" if alone else arguments["model_name"],
        "Parameters": f"{learned:,} learned of {count:,}",
        "Chosen epoch": f"{figures['selected_epoch']}, by {stage.monitor} on the validation part",
        "Validation AUROC": shown(figures["validation"]["auroc"]),
        "Intervals": INTERVALS_TOLD,
        "Seed": str(facts["seed"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "Commit": facts["git_commit"] or "not known",
        "SHA-256 of the code": facts["code_sha256"],
        "Licence": f"The code: Apache License 2.0. {licence}",
    }


# --------------------------------------------------------------------------- pictures


def pictures(cohort: Cohort, found: dict[Any, Any], told: Told, threshold: float) -> dict[str, Any]:
    """Draw a report's pictures as SVG whose colours and letters are those of the page."""
    drawn = {
        "roc": draw_roc(cohort, found, threshold),
        "precision": draw_precision(cohort, found),
        "calibration": draw_calibration(cohort, found),
        "benefit": draw_benefit(cohort, found),
    }
    return drawn | ({"learning": draw_learning(told.history)} if told.history else {})


def new_figure(
    panels: int = 1,
    heights: Sequence[float] | None = None,
    size: tuple[float, float] = (4, 3.7),
    *,
    sharex: bool = True,
) -> tuple[Any, list[Any]]:
    """Give a figure of the report with panels below each other, and their axes."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=sharex, squeeze=False, height_ratios=heights)
    for each in axes[:, 0]:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color=GRID, linewidth=0.6)
        each.set_axisbelow(True)
        each.tick_params(colors=INK, labelsize=9)
        for spine in each.spines.values():
            spine.set_color(INK)
    return figure, list(axes[:, 0])


def finish(figure: Any, name: str, alt: str) -> Any:
    """Turn a figure into SVG to be put into a page, with its text alternative.

    Colours that ``INK`` and its neighbours stand for become variables of the page's style, so that
    a dark page gets a light picture; identifiers get the picture's name, so that none is there
    twice.
    """
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    for each in figure.axes:
        for label in (each.xaxis.label, each.yaxis.label):
            label.set(color=INK, fontsize=10)
    look = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.8}
    figure.legend(loc="outside upper left", ncols=2, **look)  # above the curves, never on them
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for colour, variable in PAGE_COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    head = f'<svg role="img" aria-label="{escape(alt)}"'
    return Markup(re.sub(r"\n\s*", "\n", head + text.removeprefix("<svg").strip()))


def thinned(count: int, most: int = 400) -> NDArray[np.int64]:
    """Give so many of ``count`` points as a curve needs."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def draw_roc(cohort: Cohort, found: dict[Any, Any], threshold: float) -> Any:
    """Draw sensitivity over false alarms, of the model and its best baseline."""
    from sklearn.metrics import roc_curve

    figure, (axes,) = new_figure()
    axes.plot([0, 100], [0, 100], ":", color=INK, linewidth=1, label="chance")
    if name := best_baseline(found, cohort.baselines):
        alarms, hits, _ = roc_curve(cohort.labels, cohort.baselines[name])
        few = thinned(len(hits))
        axes.plot(100 * alarms[few], 100 * hits[few], "--", color=OTHER, label="best baseline")
    alarms, hits, _ = roc_curve(cohort.labels, cohort.probability)
    few = thinned(len(hits))
    axes.plot(100 * alarms[few], 100 * hits[few], color=MODEL, linewidth=2, label="model")
    sensitivity, specificity = (found[key]["value"] for key in ("sensitivity", "specificity"))
    point = 100 * (1 - specificity), 100 * sensitivity
    axes.plot(*point, "o", color=MODEL, markersize=6, clip_on=False, label="chosen threshold")
    axes.set(xlabel="false alarms, % of rows without event", xlim=(-1, 101), ylim=(-1, 101))
    axes.set_ylabel("sensitivity, % of events")
    alt = (
        f"ROC curve: AUROC {shown(found['auroc'])}. At the chosen threshold of "
        f"{100 * threshold:.3g} % risk the model finds {percent(sensitivity)} of the events with "
        f"an alarm in {percent(1 - specificity)} of the rows without event."
    )
    return finish(figure, "roc", alt)


def draw_precision(cohort: Cohort, found: dict[Any, Any]) -> Any:
    """Draw precision over sensitivity beside the prevalence."""
    from sklearn.metrics import precision_recall_curve

    figure, (axes,) = new_figure()
    prevalence = found["events"] / found["n"]
    axes.axhline(100 * prevalence, color=INK, linestyle=":", linewidth=1, label="prevalence")
    risks = [(cohort.probability, "-", MODEL, "model")]
    if name := best_baseline(found, cohort.baselines):
        risks.insert(0, (cohort.baselines[name], "--", OTHER, "best baseline"))
    for risk, line, colour, label in risks:
        precision, recall, _ = precision_recall_curve(cohort.labels, risk)
        few = thinned(len(recall))
        width = 2 if label == "model" else 1.5
        axes.step(
            100 * recall[few],
            100 * precision[few],
            line,
            where="post",
            color=colour,
            linewidth=width,
            label=label,
        )
    axes.set(xlabel="sensitivity, % of events", xlim=(-1, 101), ylim=(-1, 101))
    axes.set_ylabel("events among alarms (PPV), %")
    alt = (
        f"Precision-recall curve: AUPRC {shown(found['auprc'])}, where chance is the prevalence, "
        f"{prevalence:.3f}."
    )
    return finish(figure, "precision", alt)


def draw_calibration(cohort: Cohort, found: dict[Any, Any]) -> Any:
    """Draw what happened over what was predicted, by groups of equal size, and how risks lie."""
    figure, (axes, below) = new_figure(2, (4, 1))
    points = [(risk, found["bin", k]) for k, (risk, _) in found["bins"].items()]
    top = 100 * max(max(risk, score["high"] or score["value"]) for risk, score in points)
    top = min(100.0, 1.05 * top)
    axes.plot([0, 100], [0, 100], ":", color=INK, linewidth=1, label="as predicted")
    for risk, score in points:
        if score["low"] is not None:
            axes.plot([100 * risk] * 2, [100 * score["low"], 100 * score["high"]], color=MODEL)
    risks, seen = zip(*((100 * risk, 100 * score["value"]) for risk, score in points), strict=True)
    axes.plot(risks, seen, "o-", color=MODEL, linewidth=1, markersize=5, label="seen [95 %]")
    axes.set(ylabel="observed, %", xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
    below.hist(100 * cohort.probability, bins=40, range=(0, top), color=MODEL, alpha=0.5)
    below.set(xlabel="predicted risk, %", ylabel="rows")
    below.locator_params(axis="y", nbins=2)
    pairs = "; ".join(
        f"{a:.0f} % predicted, {b:.0f} % observed" for a, b in zip(risks, seen, strict=True)
    )
    alt = f"Calibration curve, groups of about equal size by rising risk: {pairs}."
    return finish(figure, "calibration", alt)


def draw_benefit(cohort: Cohort, found: dict[Any, Any]) -> Any:
    """Draw the net benefit over the threshold risk, beside treating all and none."""
    figure, (axes,) = new_figure()
    prevalence = found["events"] / found["n"]
    last = min(0.99, max(2 * prevalence, float(np.quantile(cohort.probability, 0.99))))
    at = BENEFIT_AT[: max(5, round(100 * last))]
    rows = [found["benefit", k] for k in range(len(at))]
    value, low, high = (
        100 * np.array([row[key] for row in rows]) for key in ("value", "low", "high")
    )
    everyone = 100 * (prevalence - (1 - prevalence) * at / (1 - at))
    axes.axhline(0, color=INK, linestyle=":", linewidth=1, label="treat none")
    axes.plot(100 * at, everyone, "--", color=OTHER, label="treat all")
    axes.fill_between(100 * at, low, high, color=MODEL, alpha=0.18, linewidth=0)
    axes.plot(100 * at, value, color=MODEL, linewidth=2, label="model [95 %]")
    ceiling = 110 * prevalence
    axes.set(xlabel="threshold risk, %", ylim=(-0.25 * ceiling, ceiling))
    axes.set_ylabel("net benefit, true alarms per 100 rows")
    best = np.maximum(everyone, 0)
    above = at[value > best + 1e-9]
    where = "nowhere"
    if len(above):
        whole = len(above) == round(100 * (above[-1] - above[0])) + 1
        where = f"between {percent(above[0])} and {percent(above[-1])}"
        where += "" if whole else ", not everywhere there"
    alt = (
        "Decision curve: net benefit of the model over the threshold risk, beside treating all and "
        f"treating none. The model lies above both {where}."
    )
    return finish(figure, "benefit", alt)


def draw_learning(history: list[dict[str, Any]]) -> Any:
    """Draw loss and validation AUROC of each epoch, and which one was kept."""
    figure, (upper, lower) = new_figure(2, (1, 1))
    history = [{k: math.nan if v is None else v for k, v in line.items()} for line in history]
    epochs = [line["epoch"] for line in history]
    kept = [line["epoch"] for line in history if line["improved"]][-1]
    marker = "o" if len(epochs) < 15 else ""
    for axes, key, line, colour, label in (
        (upper, "train_loss", "--", OTHER, "training"),
        (upper, "val_loss", "-", MODEL, "validation"),
        (lower, "val_auroc", "-", MODEL, None),
    ):
        values = [each[key] for each in history]
        axes.plot(epochs, values, line, color=colour, marker=marker, markersize=3, label=label)
    for axes in (upper, lower):
        axes.axvline(kept, color=INK, linestyle=":", linewidth=1)
    upper.set(ylabel="loss, nats")
    lower.set(xlabel="epoch (dotted: the one kept)", ylabel="validation AUROC")
    lower.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    last = history[-1]
    alt = (
        f"Learning curve of {len(epochs)} epochs; epoch {kept} was kept. In the last one the "
        f"training loss was {last['train_loss']:.3f}, the validation loss {last['val_loss']:.3f}, "
        f"the validation AUROC {last['val_auroc']:.3f}."
    )
    return finish(figure, "learning", alt)


TEMPLATES = {
    "parts": """\
{% macro lines(pairs) %}
<dl>
{% for name, text in pairs.items() %}
<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
{% endmacro %}
{% macro value(text) %}
{% if text is string and text.endswith("]") %}
{% set parts = text.split(" [") %}
{{ parts[0] }} <span class="whole">[{{ parts[1] }}</span>
{%- else %}
{{ text }}
{%- endif %}
{% endmacro %}
{% macro table(frame, caption) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ caption }}">
<table>
<caption>{{ caption }}</caption>
<thead><tr>
{% for name in frame.columns if name != "few" %}
<th scope="col">{{ value(name) }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in frame.to_dict("records") %}
<tr{% if row.get("few") %} class="few"{% endif %}>
{% for name in frame.columns if name != "few" %}
{% if loop.first %}
<th scope="row">{{ row[name] }}</th>
{% else %}
<td>{{ value(row[name]) }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
{% macro picture(name, caption) %}
<figure>
{{ pictures[name] }}
<figcaption>{{ caption }}</figcaption>
</figure>
{% endmacro %}
""",
    "page": """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="MedGemma Clinical Fine-Tuning">
<title>{{ told.title }}</title>
<link rel="icon" href="data:,">
<style>
:root { --ink: #1d2430; --soft: #566070; --page: #ffffff; --panel: #f3f5f8; --grid: #d5dae2;
  --model: #0b5cad; --other: #a8480a; --good: #17693a; --doubt: #a8480a; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8ebf0; --soft: #a9b2c0; --page: #14181f; --panel: #1f2530; --grid: #3a4352;
    --model: #7ab8ff; --other: #ffb069; --good: #7ddc9f; --doubt: #ffb069; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink);
  background: var(--page); font: 1rem/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid var(--grid);
  padding-bottom: .2rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
a { color: var(--model); }
.soft, figcaption, caption { color: var(--soft); }
.verdict { background: var(--panel); border-left: .4rem solid var(--doubt); padding: .8rem 1rem;
  margin: 1rem 0; }
.verdict.good { border-color: var(--good); }
.verdict p { margin: .2rem 0; font-size: 1.05rem; }
.cards { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.cards div { background: var(--panel); padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.cards small { color: var(--soft); font-size: .85rem; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: .6rem 0; max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
figcaption, caption { font-size: .9rem; text-align: left; }
caption { padding: .2rem 0 .4rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--grid); overflow-wrap: normal; }
.whole { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; min-width: 8rem; }
.few th, .few td { color: var(--soft); font-style: italic; font-weight: 400; }
dl { display: grid; grid-template-columns: minmax(8rem, 13rem) 1fr; gap: .35rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; } }
@media print { html { font-size: 9.5pt; } body { max-width: none; padding: 0; }
  h2, h2 + p, caption { break-after: avoid; } .pair { display: block; }
  figure, tr, .verdict, .cards div { break-inside: avoid; } .scroll { overflow: visible; }
  figure { max-width: 11cm; } thead { display: table-header-group; } }
</style>
</head>
<body>
<header>
<h1>{{ told.title }}</h1>
<p class="soft">Research software. Not a medical device, not for clinical use.</p>
</header>
<main>
{% block body %}{% endblock %}
</main>
</body>
</html>
""",
    "report": """\
{% extends "page" %}
{% block body %}
{% from "parts" import lines, value, table, picture with context %}
<section class="verdict{% if good %} good{% endif %}" aria-label="The result in words">
{% for sentence in sentences %}
<p>{{ sentence }}</p>
{% endfor %}
</section>
<div class="cards">
{% for name, figure, hold in cards %}
<div>{{ name }} <b>{{ value(figure) }}</b> <small>{{ hold }}</small></div>
{% endfor %}
</div>
<section>
<h2>What was asked</h2>
{{ lines(told.asked) }}
</section>
<section>
<h2>Data</h2>
{{ lines(told.data) }}
{% if told.flow is not none %}
{{ table(told.flow, "How the rows came about: who was left out, in this order") }}
{% endif %}
{% if told.split is not none %}
{{ table(told.split, "Split by patient: the test part was scored once, with the winner") }}
{% endif %}
{% if told.shift is not none %}
{{ table(told.shift, "Case mix: the data that the model learned from, and these rows") }}
{% endif %}
</section>
<section>
<h2>Discrimination</h2>
<p>Does the model give a higher risk to those who have the event? Square brackets hold 95 %
intervals throughout.</p>
{{ table(figures, "How well the model ranks") }}
<div class="pair">
{{ picture("roc", "ROC curve") }}
{{ picture("precision", "Precision-recall curve") }}
</div>
</section>
<section>
<h2>Calibration</h2>
<p>Of those who are told a risk of 20&nbsp;%, do 20&nbsp;% have the event?</p>
<div class="pair">
{{ table(calibration, "How far the risks can be taken at their word") }}
{{ picture("calibration", "Calibration curve; below it, how many rows have which risk") }}
</div>
{% if told.recalibrated is not none %}
{{ table(told.recalibrated, "Recalibration, fitted on the validation part: before and after") }}
{% endif %}
</section>
<section>
<h2>Usefulness</h2>
<p>Who acts from a certain risk on says with it how many false alarms a true one is worth. The net
benefit counts true alarms, less the false ones at that price. A model is of use where its curve
lies above both treating all and treating none.</p>
<div class="pair">
{{ picture("benefit", "Decision curve") }}
{{ table(shares, "At the threshold that was chosen on the validation part (Youden's index)") }}
</div>
</section>
<section>
<h2>Baselines</h2>
{% if baselines|length > 1 %}
<p>Simple models on the same rows. A difference is this model less the baseline, paired by patient:
above zero in AUROC, or below zero in Brier score, this model is better.</p>
{% else %}
<p>None was scored on these rows.</p>
{% endif %}
{{ table(baselines, "This model beside simple ones [95 %]") }}
</section>
<section>
<h2>Subgroups</h2>
<p>Grey: fewer than 10 events or 10 rows without event, too few for a figure.</p>
{{ table(subgroups, "The same model in parts of the rows") }}
</section>
{% if told.history %}
<section>
<h2>Learning</h2>
{{ picture("learning", "Learning curve") }}
</section>
{% endif %}
{% if told.reports %}
<section>
<h2>Written reports</h2>
{{ table(written, "Of the test part's reports") }}
</section>
{% endif %}
{% if errors is not none %}
<section>
<h2>Largest errors</h2>
<p>This section names patients: it is here because it was asked for.</p>
{{ table(errors, "The rows whose risk is farthest from what happened") }}
</section>
{% endif %}
<section>
<h2>Model card</h2>
{{ lines(told.card) }}
</section>
{% endblock %}
""",
    "comparison": """\
{% extends "page" %}
{% block body %}
{% from "parts" import lines, value, table, picture with context %}
<section class="verdict" aria-label="The result in words">
{% for sentence in sentences %}
<p>{{ sentence }}</p>
{% endfor %}
</section>
<section>
<h2>Side by side</h2>
<p>A difference is paired by patient. Square brackets hold 95&nbsp;% intervals; patients are drawn
once for all splits, each with all the rows that any test part holds of him.</p>
{{ table(comparison, "Test figures of each model") }}
{{ picture("comparison", "AUROC of each model, and its paired difference") }}
</section>
<section>
<h2>How it was made</h2>
{{ lines(told.card) }}
</section>
{% endblock %}
""",
}
"""The page; every value is escaped. Contrast of its colours is at least 4.5 (WCAG 2.1, AA)."""
# --------------------------------------------------------------------------- predict

PIECE_ROWS, LLM_PIECE_ROWS = 20_000, 2_000
"""Rows of a file in memory at a time, of stage 1 and of those with a text a row."""

SCORED_ROWS, LLM_SCORED_ROWS = 256, 32
"""Rows a batch when none are asked for."""

PREDICT_FLAGS = frozenset(
    f"--{name}"
    for name in (
        *("predict", "checkpoint", "predictions", "strict", "dataset", "organ", "data_path"),
        *("data_dir", "model_name", "quantization", "precision", "batch_size", "seed"),
    )
)


def is_text(value: object) -> bool:
    """Tell whether a stored fact is a text that says something."""
    return isinstance(value, str) and bool(value)


def are_texts(value: object) -> bool:
    """Tell whether a stored fact is a list of texts, one at least."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def is_count(value: object) -> bool:
    """Tell whether a stored fact is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


NEEDED_FACTS: dict[str, Callable[[Any], bool]] = {
    "stage": lambda value: value in STAGE_TITLES,
    "dataset": lambda value: value in ("dka", "srtr"),
    "max_len": is_count,
    "features": are_texts,
    "units": lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
    "outcome": is_text,
    "question": is_text,
}
"""What every winner says of itself, and whether a value can be that."""

NEEDED_OF_LANGUAGE: dict[str, Callable[[Any], bool]] = {
    "base_model": is_text,
    "base_revision": lambda value: value is None or is_text(value),
    "quantization": lambda value: value in ("nf4", "none"),
    "precision": lambda value: value in ("float32", "bfloat16"),
    "text_context": lambda value: value in ("full", "none"),
    "series_text": lambda value: value in SERIES_TEXT,
    "max_text_tokens": lambda value: value is None or is_count(value),
    "num_prefix_tokens": is_count,
    "trajectory_head": lambda value: isinstance(value, bool),
}


class Winner(NamedTuple):
    """A trained model ready to score, and what its checkpoint says of it.

    model: on the default device, in evaluation mode; tokenizer: None for stage 1.
    """

    model: TrajectoryClassifier | TrajectoryLLM
    facts: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None


def winner_place(checkpoint: Path) -> Path:
    """Find a winner: stage 1's file, or the folder ``best`` of stages 2 and 3.

    Raises:
        InputError: there is none.
    """
    beside = checkpoint.absolute().parent / TRAJECTORY_FILE
    if checkpoint.is_file():
        return checkpoint
    if (checkpoint / "best").is_dir():
        return checkpoint / "best"
    if checkpoint.is_dir() and checkpoint.absolute().name == "trajectory" and beside.is_file():
        return beside
    problem = "holds no winner" if checkpoint.exists() else "no such file or folder"
    raise InputError(
        f"--checkpoint {checkpoint}: {problem}: give the folder trajectory, classification or "
        f"generative of a run, or its {TRAJECTORY_FILE}"
    )


def winner_facts(checkpoint: Path) -> dict[str, Any]:
    """Give what a winner says of itself, without loading a language model.

    Args:
        checkpoint: a stage's folder, or stage 1's file.

    Raises:
        InputError: no winner there, damaged, or of a version that told too little.
    """
    place = winner_place(checkpoint)
    try:
        facts = dict(read_trajectory(place)["config"]) if place.is_file() else read_sealed(place)
        Decision.of(facts)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: damaged, or made by an older version: {error}") from error
    needed = NEEDED_FACTS | ({} if place.is_file() else NEEDED_OF_LANGUAGE)
    if missing := [key for key in needed if key not in facts]:
        raise InputError(
            f"{place}: made by an older version, which did not keep {', '.join(missing)}: "
            "train it again"
        )
    for key, fits in needed.items():
        if not fits(facts[key]):
            raise InputError(f"{place}: damaged: its {key} cannot be that")
    if len(facts["units"]) != len(facts["features"]) or not Decision.of(facts).sound:
        raise InputError(f"{place}: damaged: its units or its decision cannot be that")
    return facts


def load_winner(
    checkpoint: Path,
    model_name: str | None = None,
    quantization: str | None = None,
    precision: str | None = None,
) -> Winner:
    """Load a winner back from its folder or file, every key of it.

    Args:
        checkpoint: a stage's folder, or stage 1's file.
        model_name: where the base model lies now; None takes the stored one.
        quantization: of the base model; None takes the stored one.
        precision: ``bf16`` or ``fp32``; None takes the stored one.

    Raises:
        InputError: no winner there, damaged, or its base model cannot be loaded.
    """
    place, facts = winner_place(checkpoint), winner_facts(checkpoint)
    if place.is_dir():
        name = model_name or facts["base_model"]
        base, tokenizer = load_language_model(
            name,
            quantization or facts["quantization"],
            torch.float32 if (precision or facts["precision"])[-2:] == "32" else torch.bfloat16,
            default_device(),
            facts["base_revision"] if model_name is None else None,
        )
    from safetensors import SafetensorError

    model: TrajectoryClassifier | TrajectoryLLM
    try:
        if place.is_file():
            weights = read_trajectory(place)["encoder"]
            model = TrajectoryClassifier(encoder_of(facts, weights), prevalence=0.5)
            tokenizer = None
            load_trajectory(model, place)
        else:
            model = llm_of(facts, place, base, tokenizer)
            load_llm(model, place)
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = (
            "damaged"
            if place.is_file()
            else "damaged, made by another version, or not made from this base model"
        )
        raise InputError(f"{place}: {problem}: its weights do not fit") from error
    except (AssertionError, SafetensorError) as error:
        raise InputError(f"{place}: damaged: weights are missing") from error
    return Winner(model.to(default_device()).eval(), facts, tokenizer)


def encoder_of(facts: dict[str, Any], weights: dict[str, Any]) -> ClinicalODERNN:
    """Rebuild an encoder for weights that are still to be put in.

    Raises:
        ValueError: they are not those of such an encoder.
    """
    make = partial(
        ClinicalODERNN,
        len(facts["features"]),
        facts["hidden_dim"],
        time_scale=facts["time_scale"],
        solver=facts["solver"],
    )
    refuse_sizes(make, weights)
    return make()


def llm_of(
    facts: dict[str, Any],
    place: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> TrajectoryLLM:
    """Rebuild the model of stage 2 or 3, whose weights are still to be read, around its base."""
    from safetensors.torch import load_file

    adapter = json.loads((place / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    lora = load_file(place / ADAPTER_WEIGHTS)
    ranks = {tensor.shape[0] for name, tensor in lora.items() if "lora_A" in name}
    if ranks != {adapter["r"]}:
        raise ValueError(f"the adapter's rank is {adapter['r']}, its weights are of another")
    adapted = add_lora(base, adapter["r"], adapter["lora_alpha"], dropout=0.0)
    weights = load_file(place / "modules.safetensors")
    own = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    encoder = encoder_of(facts, own) if "hidden_dim" in facts else None
    yes, no, shared = verdict_words(tokenizer)
    parts: dict[str, Any] = {
        "trajectory_head": PooledHead(facts["hidden_dim"], 0.5)
        if facts["trajectory_head"]
        else None,
        "tokens": facts["num_prefix_tokens"],
        "scale": 1.0,  # a buffer: read with the weights
        "bos": int(tokenizer.bos_token_id),
        "verdict": (yes[shared], no[shared]),
    }
    if facts["stage"] == "generative":
        return LLMWriter(encoder, adapted, **parts)
    return LLMClassifier(encoder, adapted, prevalence=0.5, **parts)


class Rows(NamedTuple):
    """So many rows of what is to be scored, in the input's order.

    ids, numbers (n,): name and number of each in the file; dataset: the m of them that can be read;
    place (m,): where those stand among the n; read: bytes or rows of the input up to here.
    """

    ids: NDArray[Any]
    numbers: NDArray[np.int64]
    dataset: TrajectoryDataset
    place: NDArray[np.int64]
    read: int

    def without(self, bad: NDArray[np.bool_], problem: str, findings: Findings) -> Rows:
        """Take rows of the data set out, (m,) bool, and note why.

        Raises:
            InputError: there are such rows, and the findings are strict.
        """
        if not bad.any():
            return self
        numbers = self.numbers[self.place[bad]].tolist()
        if findings.strict:
            raise InputError(f"{findings.source}, row {numbers[0]}: {problem}")
        findings.problems.update(dict.fromkeys(numbers, problem))
        good = np.flatnonzero(~bad)
        return self._replace(dataset=self.dataset.subset(good), place=self.place[good])


def dka_rows(path: Path, facts: dict[str, Any], findings: Findings, most: int) -> Iterator[Rows]:
    """Read a DKA file so many rows at a time, as the checkpoint's own data were read.

    Raises:
        InputError: the file is not what the checkpoint reads, or cannot be read.
    """
    found = Description.beside(path)
    asked = replace(found, question=facts["question"])
    total = 0
    for table, read in read_pieces(path, findings, most):
        if total == 0:
            refuse_other_series(table, found, facts, path)
        if table.empty:
            continue
        total += len(table)
        dataset = MIMICtrajectoryDataset(
            table,
            facts["max_len"],
            description=asked,
            require_labels=False,
            series=facts["features"],
            series_text=facts.get("series_text", "all"),
            findings=findings,
        )
        dataset.features = tuple(facts["features"])  # spelled as the model knows them
        place = np.flatnonzero(~table.index.isin(list(findings.problems)))
        yield Rows(ids_of(table).to_numpy(), table.index.to_numpy(), dataset, place, read)
    if total == 0:
        raise InputError(f"{path}: no rows below the header: nothing to read")


def refuse_other_series(
    table: pd.DataFrame, description: Description, facts: dict[str, Any], path: Path
) -> None:
    """Refuse a file that lacks a series of the checkpoint's, or means something else by it.

    Raises:
        InputError: saying what differs.
    """
    check_header(table, str(path), [])
    found = {plainly(s.name): s for s in find_series(table, description, None, str(path))}
    beside = "its meaning stands in the JSON file beside it"
    for name, unit in zip(facts["features"], facts["units"], strict=True):
        series = found.get(plainly(name))
        if series is None:
            known = ", ".join(each.name for each in found.values())
            raise InputError(
                f"{path}: the checkpoint reads {name}, the file holds {known}; {beside}"
            )
        if series.unit != unit:
            raise InputError(
                f"{path}, column {series.column}: the checkpoint reads {name} in {unit or 'no'} "
                f"unit, the file has {series.unit or 'none'}; {beside}"
            )
    if description.outcome != facts["outcome"]:
        raise InputError(
            f"{path}: the checkpoint predicts {facts['outcome']}, the file's outcome is "
            f"{description.outcome}; {beside}"
        )


def srtr_rows(folder: Path, facts: dict[str, Any], findings: Findings, most: int) -> Iterator[Rows]:
    """Read the cohort of an SRTR folder, also registrations whose outcome is not known yet.

    Raises:
        InputError: the folder lacks the checkpoint's organ, or cannot be read.
    """
    options = {key: facts[key] for key in ("landmark_days", "horizon_days", "transplant")}
    try:
        dataset = SRTRTrajectoryDataset(
            folder, facts["organ"], **options, max_len=facts["max_len"], require_labels=False
        )
    except InputError as error:
        raise InputError(f"{error} (the checkpoint was trained on {facts['organ']})") from error
    for key in ("features", "units"):
        if facts[key] != (own := list(getattr(dataset, key))):
            raise InputError(f"the checkpoint has {key} {facts[key]}, this program reads {own}")
    dataset.series_text = facts.get("series_text", "all")
    dataset.question = facts["question"]
    for start in range(0, len(dataset), most):
        numbers = np.arange(start, min(start + most, len(dataset)))
        piece = dataset.subset(numbers)
        yield Rows(piece.ids, numbers, piece, np.arange(len(piece)), int(numbers[-1]) + 1)


def text_of(dataset: TrajectoryDataset, winner: Winner) -> TextCollator | None:
    """Tokenise what a language model reads of some rows; None where there is none, or no rows."""
    if winner.tokenizer is None or not len(dataset):
        return None
    most = winner.facts["max_text_tokens"]
    dataset.text_context = winner.facts["text_context"] == "full"
    dataset.text_computed = winner.facts.get("text_computed", False)
    return TextCollator(
        dataset, winner.tokenizer, answers=False, most_tokens=most, refuse_long=False
    )


def told(rows: Rows, winner: Winner, findings: Findings) -> tuple[Rows, TextCollator | None]:
    """Give what a language model reads, without the rows whose text is longer than it may be."""
    text = text_of(rows.dataset, winner)
    if text is None or not text.too_long:
        return rows, text
    long = np.isin(np.arange(len(rows.dataset)), text.too_long)
    problem = f"its text is longer than {winner.facts['max_text_tokens']} tokens"
    rows = rows.without(long, problem, findings)
    return rows, text_of(rows.dataset, winner)


@torch.no_grad()
def scored_logits(
    model: nn.Module, dataset: TrajectoryDataset, text: TextCollator | None, batch: int
) -> NDArray[np.float64]:
    """Give the log-odds of each row (m,), scored in batches of rows of about equal length."""
    device = default_device()
    collate: Callable[[Sequence[int]], Any] = dataset.collate
    lengths = dataset.lengths
    if text is not None:
        collate, lengths = text.verdicts_only, text.lengths()
    logit = np.empty(len(dataset))
    for indices in Batches(np.arange(len(dataset)), batch, lengths, shuffle=False):
        output = model(to_device(collate(indices), device))
        logit[indices] = output.logit.double().cpu().numpy()
    return logit


def reports_of(winner: Winner, dataset: TrajectoryDataset, batch: int) -> list[str]:
    """Let stage 3's winner write the report of each row."""
    text = text_of(dataset, winner)
    if text is None or winner.tokenizer is None:
        return []
    assert isinstance(winner.model, LLMWriter)
    batches = Batches(np.arange(len(dataset)), batch, text.lengths(), shuffle=False)
    most = winner.facts["report_tokens"]
    written = written_reports(winner.model, text, winner.tokenizer, batches, most)
    return [written[i] for i in range(len(dataset))]


def predict_rows(
    rows: Rows, winner: Winner, findings: Findings, batch: int
) -> tuple[pd.DataFrame, Rows]:
    """Score what can be scored of some rows.

    Returns:
        The lines of the prediction file, and the rows that are scored.

    Raises:
        InputError: a row cannot be scored, and the findings are strict.
    """
    facts, decision = winner.facts, Decision.of(winner.facts)
    if "time_scale" in facts:
        most = MAX_SCALED_GAP * facts["time_scale"]
        far = rows.dataset.longest_gaps() > most
        rows = rows.without(far, f"two observations lie more than {most:g} h apart", findings)
    rows, text = told(rows, winner, findings)
    logit = scored_logits(winner.model, rows.dataset, text, batch)
    rows = rows.without(
        ~np.isfinite(logit), "no finite score: its values are too extreme", findings
    )
    probability = decision.probability(logit[np.isfinite(logit)])
    lines = pd.DataFrame({"id": rows.ids, "probability": np.nan})
    lines["prediction"] = pd.Series(pd.NA, index=lines.index, dtype="Int64")
    lines.loc[rows.place, "probability"] = probability
    lines.loc[rows.place, "prediction"] = (probability >= decision.threshold).astype(int)
    if isinstance(winner.model, LLMWriter):
        lines["report"] = ""
        lines.loc[rows.place, "report"] = reports_of(winner, rows.dataset, batch)
    lines["problem"] = [findings.problems.pop(number, "") for number in rows.numbers.tolist()]
    return lines, rows


class Tally:
    """What is counted while rows are written: 40 bytes a row that has a label, nothing for others.

    Attributes:
        rows: of the input.
        scored: of them, those with a probability.
        positive: of them, those at or above the threshold.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.rows = self.scored = self.positive = 0
        self._labels: list[NDArray[np.int8]] = []
        self._probabilities: list[NDArray[np.float64]] = []
        self._groups: list[NDArray[np.uint64]] = []
        self._people: list[pd.DataFrame] = []

    def add(self, lines: pd.DataFrame, rows: Rows) -> None:
        """Count what was written of ``rows``, all of which are scored."""
        self.rows += len(lines)
        self.scored += len(rows.place)
        self.positive += int(lines["prediction"].eq(1).sum())
        known = ~np.isnan(rows.dataset.labels)
        self._labels.append(rows.dataset.labels[known].astype(np.int8))
        self._probabilities.append(lines["probability"].to_numpy(float)[rows.place[known]])
        groups = rows.dataset.groups[known].astype(object)
        self._groups.append(pd.util.hash_array(groups))  # eight bytes, however long a name
        people = rows.dataset.people()[known]
        self._people.append(people.astype({"observations": np.int32, "age": np.float32}))

    def counts(self) -> tuple[int, int]:
        """Give the labelled rows, and the events among them."""
        return sum(map(len, self._labels)), int(sum(labels.sum() for labels in self._labels))

    def cohort(self) -> tuple[Cohort, dict[str, float]]:
        """Give the labelled rows as a report judges them, without ids; and their case mix."""
        labels = np.concatenate(self._labels).astype(float)
        groups = np.concatenate(self._groups)
        people = pd.concat(self._people, ignore_index=True)
        probability = np.concatenate(self._probabilities)
        cohort = Cohort(labels, probability, groups, groups, bands_of(people), {})
        return cohort, case_mix_of(people, labels, groups)


def predict_arguments(args: argparse.Namespace, words: Sequence[str]) -> argparse.Namespace:
    """Leave of the flags what was given; all else comes from the checkpoint.

    Raises:
        InputError: a flag is missing, or one is given that the checkpoint decides.
    """
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    if unused := sorted(given - PREDICT_FLAGS):
        raise InputError(
            f"--predict has no use for {', '.join(unused)}: leave it out; what training decided "
            "comes with the checkpoint"
        )
    for flag, meaning in {
        "--checkpoint": "a run's stage folder or its .pt",
        "--predictions": "the CSV to write",
    }.items():
        if flag not in given:
            raise InputError(f"--predict: say by {flag} where {meaning} lies")
    for flag in PREDICT_FLAGS - given - {"--predict", "--strict", "--seed"}:
        setattr(args, flag.removeprefix("--"), None)
    return args


def refuse_other_data(args: argparse.Namespace, facts: dict[str, Any]) -> Path:
    """Give the file or folder to read, if it is of the checkpoint's kind.

    Raises:
        InputError: saying what differs, or what is missing.
    """
    for name in ("dataset", "organ"):
        own, asked = facts.get(name), getattr(args, name)
        if asked not in (None, own):
            raise InputError(
                f"--{name} {asked}: the checkpoint was trained on {own or facts['dataset']}"
            )
    flag, other = ("data_path", "data_dir")[:: 1 if facts["dataset"] == "dka" else -1]
    kind = f"the checkpoint was trained on --dataset {facts['dataset']}"
    if getattr(args, other) is not None:
        raise InputError(f"--{other}: {kind}: give its rows by --{flag}")
    source: Path | None = getattr(args, flag)
    if source is None:
        raise InputError(f"--predict: say which rows by --{flag}: {kind}")
    check_place(args.predictions, source, args.checkpoint)
    return source


def check_place(out: Path, source: Path, checkpoint: Path) -> None:
    """Refuse to write predictions, or the report beside them, over anything else.

    Raises:
        InputError: saying what lies there.
    """
    if out.suffix != ".csv":
        raise InputError(f"--predictions {out}: give the name of a .csv file")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--predictions {out}: give a file in a folder that is there")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"--predictions {out}: that is the file to read: give another")
    for taken in (source, checkpoint):
        if taken.is_dir() and out.resolve().is_relative_to(taken.resolve()):
            raise InputError(f"--predictions {out}: not within {taken}: give another folder")
    if {"run.json", "metrics.json"} & set(os.listdir(out.absolute().parent)):
        raise InputError(f"--predictions {out}: a run's own folder: give another")
    if out.exists():
        with out.open(encoding="utf-8", errors="replace") as file:
            header = file.readline().strip()
        if not header.startswith("id,probability,prediction"):
            raise InputError(f"--predictions {out}: is there and holds something else: rename one")
    page = report_beside(out)
    if page.is_dir():
        raise InputError(f"--predictions {out}: its report would be {page}, which is a folder")
    if page.exists() and GENERATOR not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(
            f"--predictions {out}: its report would replace {page}, which this program did not "
            "write: give another name"
        )


def report_beside(predictions: Path) -> Path:
    """Give the place of the report on labelled predictions."""
    return predictions.with_suffix(".report.html")


def predict(args: argparse.Namespace) -> int:
    """Score new rows with a winner, a piece of the input at a time; the file is whole or absent.

    Args:
        args: from ``predict_arguments``.

    Raises:
        InputError: what is wrong with checkpoint, input or place of the output.
    """
    if processes().num_processes > 1:
        raise InputError("--predict runs in one process: start it by python, not accelerate")
    facts = winner_facts(args.checkpoint)
    source = refuse_other_data(args, facts)
    findings = Findings(str(source), strict=args.strict)
    language = facts["stage"] != "trajectory"
    read = dka_rows if facts["dataset"] == "dka" else srtr_rows
    pieces = read(source, facts, findings, LLM_PIECE_ROWS if language else PIECE_ROWS)
    first = next(pieces)  # what is wrong with the input shows before a language model is loaded
    winner = load_winner(args.checkpoint, args.model_name, args.quantization, args.precision)
    batch = args.batch_size or (LLM_SCORED_ROWS if language else SCORED_ROWS)
    tally = Tally()
    try:
        with (
            sole_writer(args.predictions),
            atomic(args.predictions) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
            bar(source) as shown,
        ):
            for rows in itertools.chain([first], pieces):
                lines, scored = predict_rows(rows, winner, findings, batch)
                count_implausible(scored.dataset, findings)
                lines.to_csv(file, index=False, header=tally.rows == 0)
                tally.add(lines, scored)
                shown.update(rows.read - shown.n)
            remove(report_beside(args.predictions))  # of predictions that are no more
    except KeyboardInterrupt as stop:
        logger.error("interrupted: no predictions were written")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    say_predictions(tally, findings, facts, args)
    try:
        report_cohort(tally, facts, first.dataset, args)
    except KeyboardInterrupt as stop:
        logger.error("interrupted: the predictions are written, their figures are not")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    return EXIT_DONE


def bar(source: Path) -> Any:
    """Give a progress bar over the bytes of a file, or the rows of a folder; see ``progress``."""
    from tqdm import tqdm

    size = source.stat().st_size if source.is_file() else None
    unit = "B" if size else " rows"
    hidden = not sys.stderr.isatty()
    return tqdm(
        desc="predicting", total=size, unit=unit, unit_scale=True, leave=False, disable=hidden
    )


def count_implausible(dataset: TrajectoryDataset, findings: Findings) -> None:
    """Count the rows with a value outside the limits that are given for its series."""
    owner = np.repeat(np.arange(len(dataset)), dataset.lengths)
    for f, (name, unit) in enumerate(zip(dataset.features, dataset.units, strict=True)):
        limits = (
            dataset.described_limits(f)
            if isinstance(dataset, MIMICtrajectoryDataset)
            else dataset.plausible(f)
        )
        if limits is not None:
            outside = (dataset.values[:, f] < limits[0]) | (dataset.values[:, f] > limits[1])
            within = f"{limits[0]:g} to {limits[1]:g} {unit}".rstrip()
            problem = f"hold values of {name} outside {within}: is the unit right?"
            findings.counts[problem] += len(np.unique(owner[outside]))


def say_predictions(
    tally: Tally, findings: Findings, facts: dict[str, Any], args: argparse.Namespace
) -> None:
    """Tell what was found and written."""
    decision, known_decision = Decision.of(facts), "decision" in facts
    findings.tell()
    if not known_decision:
        logger.warning(
            "the checkpoint keeps no threshold, since its run did not reach its end: %g is taken",
            decision.threshold,
        )
    logger.info(
        "%s rows: %s scored, %s of them at or above the threshold %g; %s with a problem",
        *(f"{count:,}" for count in (tally.rows, tally.scored, tally.positive)),
        *(decision.threshold, f"{tally.rows - tally.scored:,}"),
    )
    logger.info("predictions: %s; %s", args.predictions, peak_memory())


def report_cohort(
    tally: Tally, facts: dict[str, Any], dataset: TrajectoryDataset, args: argparse.Namespace
) -> None:
    """Say how good the predictions are where labels are known, and write the report beside them."""
    path = report_beside(args.predictions)
    rows, events = tally.counts()
    if events in (0, rows):
        if rows:
            logger.info("%s labelled rows of one class only: no figures", f"{rows:,}")
        return
    cohort, mix = tally.cohort()
    figures = metrics_with_intervals(cohort.labels, cohort.probability, cohort.groups, args.seed)
    shown_figures = {
        name: shown(figure) for name, figure in figures.items() if isinstance(figure, dict)
    }
    counts = {"rows with a label": f"{rows:,}", "events": f"{events:,}"}
    logger.info("\n%s", pd.Series(counts | shown_figures).to_string())
    told = Told(
        title=f"{STAGE_TITLES[facts['stage']]}, on other rows: {facts['outcome']}",
        outcome=facts["outcome"],
        asked=dataset.asked(),
        data={
            "Source": Path(dataset.source).name,
            "Rows read": f"{tally.rows:,}",
            "Rows scored": f"{tally.scored:,}",
            "Scored rows with a label": f"{rows:,}, judged here",
            "Missing values": "masked, never filled in",
        },
        card=cohort_card(facts, args),
        shift=shift_table(facts["case_mix"], mix) if "case_mix" in facts else None,
    )
    threshold = Decision.of(facts).threshold
    text = write_report(path, cohort, told, threshold=threshold, seed=args.seed)
    logger.info(
        "%s\nThese figures flatter the model if it was trained on some of these patients.\n"
        "report: %s",
        *(text, path),
    )


def cohort_card(facts: dict[str, Any], args: argparse.Namespace) -> dict[str, str]:
    """Give what a reader of figures on other rows has to know of the model."""
    base = facts.get("base_model")
    licence = f"Where the language model is MedGemma or derived from it: {HAI_DEF_NOTICE.strip()}"
    return {
        **CARD,
        "Limits": (
            "The model was not changed for these rows: threshold and recalibration are those of "
            "its own validation part. If it learned from some of these patients, the figures "
            "flatter it."
        ),
        "Model": STAGE_TITLES[facts["stage"]] + (f", {base}" if base else ""),
        "Checkpoint": str(args.checkpoint),
        "SHA-256 of its training data": facts.get("data_sha256", "not known"),
        "Intervals": INTERVALS_TOLD,
        "Seed": f"{args.seed}, of the intervals",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "Commit": git_commit() or "not known",
        "SHA-256 of the code": code_hash(),
        "Licence": f"The code: Apache License 2.0. {licence if base else NO_LANGUAGE_MODEL}",
    }


# --------------------------------------------------------------------------- command line


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other flags or on the machine."""
    cuda = torch.cuda.is_available()
    if args.output_dir is None:
        args.output_dir = Path(f"./checkpoints_medgemma_{'demo' if args.demo else args.dataset}")
    if args.quantization is None:
        args.quantization = "nf4" if cuda and args.model_name != "tiny" else "none"
    args.resume = args.resume or args.resume_anyway
    if args.precision == "auto":
        args.precision = (
            "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
    return args


class Read(NamedTuple):
    """The user's data as read: fingerprints of all, of the rows; and what was said, by loggers."""

    dataset: TrajectoryDataset
    fingerprint: str
    rows: str
    said: list[list[Any]]


def read_data(args: argparse.Namespace) -> Read:
    """Read the user's data.

    Raises:
        InputError: nothing to learn from.
    """
    with heard() as said:
        dataset = read_dataset(args)
    return Read(dataset, dataset.fingerprint(), dataset.row_fingerprint(), said)


def read_dataset(args: argparse.Namespace) -> TrajectoryDataset:
    """Read the user's data from the files that the flags name."""
    source = data_source(args)
    if args.dataset == "srtr":
        if args.series:
            raise InputError("--series: for --dataset dka only, SRTR's series are fixed")
        return SRTRTrajectoryDataset(
            source,
            args.organ,
            landmark_days=args.landmark_days,
            horizon_days=args.horizon_days,
            transplant=args.transplant,
            **({"max_len": args.max_len} if args.max_len else {}),
        )
    if not source.exists():
        raise InputError(f"{source}: no such file: give the CSV by --data_path")
    return MIMICtrajectoryDataset(source, args.max_len, series=args.series)


def load_data(args: argparse.Namespace) -> Data:
    """Read the user's data, take at most ``--max_samples`` patients, split.

    Raises:
        InputError: nothing to learn from, or a cache that cannot be written.
    """
    read = read_cached(args) if args.cache_dir else read_data(args)
    dataset = read.dataset
    dataset.series_text = args.series_text
    dataset.text_context = args.text_context == "full"
    dataset.text_computed = args.mode == "generative"
    dataset = dataset.sample_patients(args.max_samples, args.seed)
    return Data(dataset, dataset.split(args.seed), read.fingerprint, read.rows)


# --------------------------------------------------------------------------- cache of data


@contextlib.contextmanager
def heard() -> Iterator[list[list[Any]]]:
    """Take down what the data modules log within a block: logger, level, text."""
    said: list[list[Any]] = []
    ear = logging.Handler()
    ear.emit = lambda record: said.append(  # type: ignore[method-assign]
        [record.name, record.levelno, record.getMessage()]
    )
    loggers = [logging.getLogger(name) for name in DATA_MODULES]
    for each in loggers:
        each.addHandler(ear)
    try:
        yield said
    finally:
        for each in loggers:
            each.removeHandler(ear)


def data_source(args: argparse.Namespace) -> Path:
    """Give the file or folder that the user's data are read from.

    Raises:
        InputError: none is given.
    """
    if args.dataset == "srtr" and args.data_dir is None:
        raise InputError("--dataset srtr: say where the SRTR files lie by --data_dir")
    source: Path = args.data_dir if args.dataset == "srtr" else args.data_path
    return source


def data_key(args: argparse.Namespace) -> str | None:
    """Hash all that decides what ``read_data`` gives; None where a file cannot be read.

    That is: content and relative name of each file, the flags that matter, the code that reads, and
    the packages that it reads with.

    Raises:
        InputError: no files to read, as without a cache.
    """
    source, here = data_source(args), Path(__file__).parent
    if args.dataset == "dka" and not source.is_file():
        return None
    if args.dataset == "srtr":
        tables = [find_table(source, f"{t}_{ORGANS[args.organ].suffix}").path for t in TABLES]
        files = {str(path.relative_to(source)): path for path in tables}
    else:  # how a file is read depends on its ending, not on its name
        files = {source.suffix.lower(): source, "description": description_path(source)}
    files |= {name: here / f"{name}.py" for name in DATA_MODULES}
    flags = ("dataset", "organ", "landmark_days", "horizon_days", "transplant", "series", "max_len")
    try:
        facts = [
            CACHE_FORMAT,
            {name: file_hash(path) for name, path in files.items()},
            [getattr(args, flag) for flag in flags],
            [metadata.version(package) for package in ("numpy", "pandas")],
        ]
    except OSError:  # reading it says why
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_cached(args: argparse.Namespace) -> Read:
    """Read the user's data from ``--cache_dir``, or from their files and keep them there.

    Raises:
        InputError: as ``read_data``; or the folder cannot be written in.
    """
    key = data_key(args)
    if key is None:
        return read_data(args)
    folder, source = args.cache_dir, str(data_source(args))
    for path in sorted(folder.glob(f"{key}-*{CACHE_ENDING}")):
        try:
            read = parse_cache(path, source, args.dataset)
        except Exception as error:  # whatever it is, the data themselves are there
            logger.warning(
                "%s: damaged or foreign (%s): read anew", one_line(str(path)), type(error).__name__
            )
            continue
        for name, level, text in read.said:
            logging.getLogger(name).log(level, "%s", text)
        logger.info("read from the cache %s", path)
        return read
    temporary = begin_cache(folder)  # refused before the data are read
    try:
        read = read_data(args)
        if data_key(args) == key:  # else the files have changed meanwhile
            keep_in_cache(read, source, temporary, folder / key)
    finally:
        remove(temporary)
    return read


def begin_cache(folder: Path) -> Path:
    """Give a file of the cache to write into, for its owner alone, under a name of its own.

    Raises:
        InputError: the folder cannot be written in.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.glob(f".*{PARTIAL}"):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                remove(path)  # of a run that was killed
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=PARTIAL, dir=folder)
        os.close(descriptor)
    except OSError as error:
        raise InputError(f"--cache_dir {folder}: {error.strerror}: choose another place") from error
    return Path(name)


def keep_in_cache(read: Read, source: str, temporary: Path, place: Path) -> None:
    """Write data into a file, and give it the name of ``place`` with its checksum.

    Raises:
        InputError: they cannot be written.
    """
    from safetensors.numpy import save

    arrays, rest = pack(read.dataset)
    del rest["source"]
    said = [[name, level, text.replace(source, SOURCE_MARK)] for name, level, text in read.said]
    facts = {"rest": rest, "said": said, "fingerprint": read.fingerprint, "rows": read.rows}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = save(arrays, {"facts": json.dumps(facts)})
    digest = hashlib.sha256(content).hexdigest()
    try:
        temporary.write_bytes(content)
        flush(temporary)
        os.replace(temporary, place.with_name(f"{place.name}-{digest}{CACHE_ENDING}"))
        flush_entry(place.parent)
    except OSError as error:
        raise InputError(f"--cache_dir {place.parent}: {error.strerror}: make room") from error


def parse_cache(path: Path, source: str, kind: str) -> Read:
    """Read one file of the cache; nothing that it may carry is run, nor believed of its sizes.

    Raises:
        Exception: of many kinds, where it is damaged or was not written by this program.
    """
    from safetensors.numpy import load

    if path.is_symlink() or not path.stem.endswith(f"-{file_hash(path)}"):
        raise ValueError("its checksum is another")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
    facts["rest"]["source"] = source
    dataset = unpack(
        SRTRTrajectoryDataset if kind == "srtr" else MIMICtrajectoryDataset,
        load(content),
        facts["rest"],
    )
    said = [[name, level, text.replace(SOURCE_MARK, source)] for name, level, text in facts["said"]]
    return Read(dataset, facts["fingerprint"], facts["rows"], said)


def refuse_together(words: Sequence[str]) -> None:
    """Refuse flags of which each says what to do.

    Raises:
        InputError: naming them.
    """
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    repeated = {"--ablation", "--seeds", "--resume"}  # several runs, each begun or gone on with
    ways = ("--predict", "--compare", "--demo", "--dry_run", "--ablation", "--seeds", "--resume")
    given |= {"--resume"} if "--resume_anyway" in given else set()
    chosen = [flag for flag in ways if flag in given]
    if len(chosen) > 1 and not repeated.issuperset(chosen):
        raise InputError(f"{' and '.join(chosen)} do not go together")
    if "--compare" in given and (unused := sorted(given - {"--compare", "--seed"})):
        raise InputError(f"--compare has no use for {', '.join(unused)}: leave it out")


def refuse_unused(args: argparse.Namespace) -> None:
    """Refuse flags that contradict the asked stage; others of another stage do no harm.

    Raises:
        InputError: naming them.
    """
    for flag in ("checkpoint", "predictions", "strict"):
        if getattr(args, flag):
            raise InputError(f"--{flag} goes with --predict only: leave it out")
    unused = {}
    if args.trajectory_only:
        off = args.soft_prompt == "off"
        unused = {"--soft_prompt off": off, "--ode_checkpoint": args.ode_checkpoint}
    elif args.soft_prompt == "off":
        unused = {"--ode_checkpoint": args.ode_checkpoint, "--freeze_ode": args.freeze_ode}
    if given := [flag for flag, there in unused.items() if there]:
        stage = "--trajectory_only" if args.trajectory_only else "--soft_prompt off"
        raise InputError(f"{stage} has no use for {', '.join(given)}: leave it out")


def stage_places(folder: Path) -> list[Path]:
    """Give all that a stage writes: its folder, what its tracker keeps, the winner of stage 1."""
    winner = [folder.parent / TRAJECTORY_FILE] if folder.name == "trajectory" else []
    return [folder, tracker_folder(folder), *winner]


def tracker_folder(folder: Path) -> Path:
    """Give the place of what a tracker keeps of a stage."""
    return folder.parent / "tracker" / folder.name


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[None]:
    """Make a stage's folder; an earlier result is set aside, and comes back if no run begins."""
    moves, made = moves_aside(stage_places(folder)), False
    try:
        with SIGNALS.held_back():
            for path, aside in moves.items():
                path.rename(aside)
                unfinished = bool(States(aside / LAST).files())
                hint = "; --resume would have gone on with it" if unfinished else ""
                logger.info("an earlier result was moved to %s%s", aside, hint)
            folder.mkdir()
            made = True
        yield
    except BaseException:
        if not has_begun(folder):
            with SIGNALS.held_back():
                if made:
                    discard([path for path in stage_places(folder) if os.path.lexists(path)])
                for path, aside in moves.items():
                    if os.path.lexists(aside):
                        aside.rename(path)
                        logger.info("%s was moved back", aside)
        raise


def has_begun(folder: Path) -> bool:
    """Tell whether a run has kept a state that can be gone on from, or all of its results."""
    if States(folder / LAST).files():
        return True
    try:
        return complete(begun(folder) or {})
    except InputError:  # what cannot be read is not thrown away
        return True


def discard(paths: list[Path]) -> None:
    """Remove what a run made that never began; what resists is out of the way at least."""
    for path in paths:
        away = partial_of(path)
        remove(away)
        path.rename(away)
        with contextlib.suppress(OSError):  # a network file system keeps what is open
            remove(away)
    with contextlib.suppress(OSError):  # another stage's, or none
        tracker_folder(paths[0]).parent.rmdir()


def moves_aside(paths: Iterable[Path]) -> dict[Path, Path]:
    """Give those of the paths that are there, and a name for each under a number free in all."""
    there = [path for path in paths if os.path.lexists(path)]
    for number in itertools.count(1):
        moves = {path: path.with_stem(f"{path.stem}.{number}") for path in there}
        if not any(map(os.path.lexists, moves.values())):
            break
    return moves


def train(args: argparse.Namespace, log: logging.handlers.MemoryHandler) -> int:
    """Run one stage from the user's data to its figures, or go on with it."""
    refuse_unused(args)
    check_tracker(args.report_to)
    data = load_data(args)
    folder = args.output_dir / stage_name(args)
    own, none = own_folder(folder, args), contextlib.nullcontext()
    earlier = identity(folder)
    try:
        # What is looked at before going on must not change until then.
        with own if args.resume else none:
            if args.resume and not left_to_do(folder, args, data):
                return EXIT_DONE
            stage = (trajectory_stage if args.trajectory_only else llm_stage)(args, data)
            if args.dry_run:
                rehearse(stage, data, args)
                return EXIT_DONE
            first, log_path = processes().is_main_process, log_place(args, folder)
            if first and log_path and args.log_file != "auto":  # before anything is moved aside
                open_log(log, log_path)
            with none if args.resume else own, tracking(args, folder) as track:
                if first and log_path and args.log_file == "auto":
                    open_log(log, log_path)
                processes().wait_for_everyone()  # the others read what the first one makes
                run_and_report(stage, data, folder, args, track)
    except KeyboardInterrupt as stop:
        if processes().is_main_process:
            tell_interrupted(folder, began=args.resume or identity(folder) != earlier)
        else:  # the first one may have been killed
            number = processes().process_index + 1
            logger.error("interrupted: process %d of this run ends: go on by --resume", number)
        return getattr(stop, "code", EXIT_INTERRUPTED)
    return EXIT_DONE


def log_place(args: argparse.Namespace, folder: Path) -> Path | None:
    """Give the path of the log, None for none.

    Raises:
        InputError: no file can lie there.
    """
    if args.log_file == "none":
        return None
    if args.log_file == "auto":
        return folder / f"train_{datetime.now():%Y%m%d_%H%M%S}.log"
    path = Path(args.log_file)
    if not path.parent.is_dir():  # said before a folder is made
        raise InputError(f"--log_file {path}: no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"--log_file {path}: a folder: give the name of a file")
    return path


def identity(folder: Path) -> int | None:
    """Give what tells a folder from another of its name; None where there is none."""
    return folder.stat().st_ino if folder.exists() else None


def tell_interrupted(folder: Path, *, began: bool) -> None:
    """Say what a run that was interrupted has reached."""
    if not began:
        logger.error("interrupted before the first step: nothing was reached, nothing is changed")
        return
    kept = (folder / "best").exists() or (folder.parent / TRAJECTORY_FILE).exists()
    logger.error(
        "interrupted: %s; %s%s",
        f"the best state so far lies in {folder.parent}" if kept else "no state reached yet",
        "its figures too" if (folder / "metrics.json").exists() else "no test figure written",
        "; the same command with --resume goes on" if States(folder / LAST).files() else "",
    )


@contextlib.contextmanager
def own_folder(folder: Path, args: argparse.Namespace) -> Iterator[None]:
    """Make a stage's folder, or take up the one that is resumed, and keep other runs from it.

    Raises:
        InputError: the place cannot be written, or another run is at work there.
    """
    with contextlib.ExitStack() as held:
        if processes().is_main_process and not (args.resume and not folder.exists()):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                with locked(folder.parent, wait=True):  # runs that start together queue here
                    if folder.exists():
                        held.enter_context(locked(folder))
                        clean_up(folder)
                    if not args.resume:
                        held.enter_context(fresh_folder(folder))
                        held.enter_context(locked(folder))
            except OSError as error:
                raise InputError(f"--output_dir {folder.parent}: {error.strerror}") from error
        yield


def clean_up(folder: Path) -> None:
    """Remove what dead runs of a stage left half-written; its states stay unless all is done."""
    for place in (folder, folder / LAST):
        clean(place)
    for path in stage_places(folder):
        remove(partial_of(path))
    with contextlib.suppress(InputError):
        if complete(begun(folder) or {}):
            remove(folder / LAST)


def stage_name(args: argparse.Namespace) -> str:
    """Give the stage that the arguments ask for: the name of its folder."""
    return "trajectory" if args.trajectory_only else str(args.mode)


def left_to_do(folder: Path, args: argparse.Namespace, data: Data) -> bool:
    """Tell whether a run that was stopped has anything left to do.

    Raises:
        InputError: it never began, or was begun otherwise, and in what.
    """
    known = begun(folder)
    if known is None or not (complete(known) or States(folder / LAST).files()):
        raise InputError(f"--resume: no run was begun in {folder}: start it without --resume")
    facts = json.loads(json.dumps(run_facts(args, data)))
    if other := differences(known, facts):
        raise InputError(
            f"--resume {folder}: that run was begun otherwise: {'; '.join(other)}: give the same "
            "command, or start a new run without --resume"
        )
    if complete(known):
        refuse_broken(folder, known)
        logger.info("%s: that run is finished: nothing left to do", folder)
        return False
    if known["processes"] != facts["processes"]:
        count = f"begun with {known['processes']} processes, now {facts['processes']}"
        if not args.resume_anyway:
            raise InputError(
                f"--resume {folder}: {count}: the result would not be the one of an undisturbed "
                "run: add --resume_anyway if you can do with that"
            )
        logger.warning("%s: the result is not the one of an undisturbed run", count)
    for key in ("versions", "code_sha256"):
        if known.get(key) != facts[key]:
            logger.warning("%s is not that of the run's beginning: last bits may differ", key)
    return True


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``run.json``: what is known of a run, with a checksum."""
    told = json.loads(json.dumps(facts))
    told["facts_sha256"] = facts_hash(told)
    write_text(folder / "run.json", json.dumps(told, indent=2) + "\n")


RESULTS = (
    *("metrics.json", "history.jsonl", "report.html", "generations_test.jsonl"),
    *("predictions_val.csv", "predictions_test.csv"),
)
"""What a finished run leaves in its folder beside the winner."""


def results_of(folder: Path) -> dict[str, str | None]:
    """Hash all that a run has led to: winner and figures, and what tells of them."""
    paths = [folder / name for name in RESULTS]
    paths += sorted((folder / "best").rglob("*"))
    if folder.name == "trajectory":
        paths.append(folder.parent / TRAJECTORY_FILE)
    return {p.relative_to(folder.parent).as_posix(): file_hash(p) for p in paths if p.is_file()}


def refuse_broken(folder: Path, known: dict[str, Any]) -> None:
    """Refuse a finished run of which something is missing or damaged.

    Raises:
        InputError: naming it.
    """
    for name, digest in known["results_sha256"].items():
        path = folder.parent / name
        try:
            whole = not path.is_symlink() and file_hash(path) == digest
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if not whole:
            raise InputError(
                f"{folder}: that run is finished, but {path} is missing, or not as it was "
                "written: start it anew without --resume"
            )


def begun(folder: Path) -> dict[str, Any] | None:
    """Give what is known of the run that was begun in a folder, None for none.

    ``run.json`` says it; where that is damaged or lost, the newest state does.

    Raises:
        InputError: it is damaged, and so are the states.
    """
    path = folder / "run.json"
    problem: Exception | None = None
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kinds = [type(known[key]) for key in ("arguments", "data", "versions")]
        kinds.append(type(known.get("results_sha256", {})))
        if known["facts_sha256"] != facts_hash(known) or set(kinds) != {dict}:
            raise ValueError("its checksum is another")
        return known
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = error
    if States(folder / LAST).files():
        facts: dict[str, Any] | None = States(folder / LAST).newest_whole()[1].story["facts"]
        if facts:
            return facts
    if problem:
        raise InputError(
            f"{path}: damaged, or of an older version: {problem}: start anew without --resume"
        ) from problem
    return None


def complete(known: dict[str, Any]) -> bool:
    """Tell of what ``run.json`` says whether all results are written: it gets their hashes last."""
    return "results_sha256" in known


def differences(known: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Say in what two runs differ that changes their results; both as ``run_facts``."""
    then, now = known["arguments"], facts["arguments"]
    told = [
        f"--{name} was {then.get(name)}, is {now.get(name)}"
        for name in sorted({*then, *now} - IMMATERIAL)
        if then.get(name) != now.get(name) and (name != "deterministic" or facts["device"] != "cpu")
    ]
    if known["data"] != facts["data"] and not told:
        told.append("the data are not the same")
    if known["stage_1_sha256"] != facts["stage_1_sha256"]:
        told.append("--ode_checkpoint is another file")
    if any(known.get(key) != facts[key] for key in ("base_revision", "base_sha256")):
        told.append(f"--model_name {now['model_name']} holds another model or revision")
    return told


def run_and_report(
    stage: Stage, data: Data, folder: Path, args: argparse.Namespace, track: Track
) -> None:
    """Train, score the winner, and show the table."""
    logger.info("stage %s -> %s", stage.name, folder)
    announce(stage, data, args)
    device, first = default_device(), processes().is_main_process
    evaluate(stage.model.to(device), stage.loaders["val"], device, SANITY_BATCHES)
    if first and not args.resume:  # from here on the run has begun
        write_facts(folder, run_facts(args, data))
    states = States(folder / LAST, begun(folder))
    stopping = run_stage(
        *(stage, folder, device, args.seed, track),
        states=states,
        resume=args.resume,
        save_every=args.save_every,
    )
    figures = write_results(stage, stopping, data, folder, args)
    steps = -(-len(stage.loaders["train"]) // stage.accumulate)
    track(plain_figures(figures), stopping.epoch * steps)
    logger.info("winner: epoch %d; %s", stopping.best_epoch, peak_memory())
    logger.info("\n%s\n\nresults: %s", table_of(figures), folder)
    if first:
        known = begun(folder)
        assert known is not None
        write_facts(folder, {**known, "results_sha256": results_of(folder)})
        remove(states.folder)  # all that it led to is written


def plain_figures(figures: dict[str, Any]) -> dict[str, float]:
    """Give the figures of ``metrics.json`` without intervals: ``test_auroc`` and the like."""
    return {
        f"{part}_{name}": figure["value"]
        for part in ("validation", "test")
        for name, figure in figures[part].items()
        if isinstance(figure, dict) and "value" in figure
    }


@contextlib.contextmanager
def tracking(args: argparse.Namespace, folder: Path) -> Iterator[Track]:
    """Lend what sends figures and a step to the chosen tracker.

    Numbers only: no text or row of a patient goes there, no path of the data, nor what the terminal
    shows. (A tracker may add by itself who ran which script where.)
    """
    if args.report_to == "none":
        yield lambda figures, step: None
        return
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    place = tracker_folder(folder)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=args.report_to,
        project_config=ProjectConfiguration(logging_dir=str(place)),
    )
    numbers = {k: v for k, v in vars(args).items() if isinstance(v, (int, float))}
    # Weights & Biases would take along the terminal's text, the command line and the code.
    quiet = {"console": "off", "disable_code": True, "disable_git": True, "x_disable_meta": True}
    try:
        accelerator.init_trackers(
            TRACKED_AS, numbers, {"wandb": {"dir": str(place), "settings": quiet}}
        )
    except Exception as error:  # each tracker has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--report_to {args.report_to}: cannot start: {reason}") from error
    try:
        yield lambda figures, step: accelerator.log(figures, step=step)
    finally:
        accelerator.end_training()


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        InputError: saying how to get it.
    """
    found = None if name == "none" else importlib.util.find_spec(name)
    if name != "none" and (found is None or found.origin is None):  # a bare folder is no package
        raise InputError(f"--report_to {name}: not installed: pip install {name}")


def rehearse(stage: Stage, data: Data, args: argparse.Namespace) -> None:
    """Take two steps on the longest rows and score two batches; nothing is written or kept."""
    announce(stage, data, args)
    device = default_device()
    batches = stage.loaders["train"].batch_sampler
    size = (data.dataset.lengths if batches.lengths is None else batches.lengths)[batches.rows]
    steps = 2 * stage.accumulate * batches.batch_size
    batches.rows = batches.rows[np.argsort(-size, kind="stable")[:steps]]
    learner = begin(stage, device)
    began = time.perf_counter()
    loss = train_epoch(stage, learner)
    seconds = (time.perf_counter() - began) / learner.average.steps
    scored = evaluate(stage.model, stage.loaders["val"], device, SANITY_BATCHES)
    logger.info(
        "dry run: %d steps on the longest rows, %.2f s each, loss %.4f; validation loss %.4f; %s; "
        "nothing was written",
        *(learner.average.steps, seconds, loss, scored.loss, peak_memory()),
    )


def open_log(log: logging.handlers.MemoryHandler, path: Path) -> None:
    """Send what was logged so far, and all that follows, to the log file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        target = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"--log_file {path}: {error.strerror}") from error
    target.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.setTarget(target)
    log.flush()


def run_demo(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the user's three commands on the sample data with the tiny model.

    Raises:
        InputError: a flag that the demo chooses itself.
    """
    free = ("--demo", "--output_dir", "--seed", "--log_file")
    if taken := [w for w in words if w.startswith("--") and w.split("=")[0] not in free]:
        raise InputError(f"--demo and {taken[0].split('=')[0]} do not go together")
    shared = ["--data_path", str(SAMPLE_DATA), "--model_name", "tiny", *DEMO_FLAGS.split()]
    shared += ["--output_dir", str(args.output_dir), "--seed", str(args.seed)]
    shared += ["--log_file", args.log_file]
    encoder = ["--ode_checkpoint", str(args.output_dir / TRAJECTORY_FILE)]
    for command in (
        ["--trajectory_only"],
        ["--mode", "classification", *encoder],
        ["--mode", "generative", *encoder],
    ):
        sys.stdout.write(f"\n$ python medgemma_trainer.py {' '.join(command + shared)}\n")
        if code := main(command + shared):
            return code
    return EXIT_DONE


# --------------------------------------------------------------------------- ablation

VARIANTS = {
    "stage 1 alone": "--trajectory_only",
    "text alone": "--mode classification --soft_prompt off",
    "soft prompt alone": "--mode classification --series_text none",
    "text + soft prompt": "--mode classification",
}
"""What ``--ablation`` trains: a name, and the flags that make it."""


def run_ablation(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Train and test what each part adds, on one split and seed, and compare.

    A variant that is already there, made from the same arguments and data, is not made again.

    Raises:
        InputError: a flag that the variants set themselves.
    """
    own = {"--trajectory_only", "--mode", "--ode_checkpoint", "--soft_prompt", "--freeze_ode"}
    if taken := [w for w in words if w.split("=")[0] in own]:
        raise InputError(f"--ablation and {taken[0].split('=')[0]} do not go together")
    if args.series_text == "none":
        raise InputError("--ablation: --series_text none leaves no text to compare with")
    shared = [w for w in words if w not in ("--ablation", "--resume", "--resume_anyway")]
    folders = {}
    for name in VARIANTS:
        folders[name], command = variant(name, shared, args.output_dir)
        logger.info("\n%s: python medgemma_trainer.py %s", name, " ".join(command))
        if code := run_or_go_on(command, folders[name]):
            return code
    if processes().is_main_process:
        start_logging()  # each variant has closed its own
        folder = args.output_dir / "ablation"
        table = join_predictions(folders)
        results = side_by_side([table], "stage 1 alone", args.seed)
        for name in VARIANTS:
            results[name]["seconds_an_epoch"] = seconds_an_epoch(folders[name])
        write_text(folder / "predictions_test.csv", table.to_csv(index=False))
        show(results, "stage 1 alone", folder, "ablation", args)
    return EXIT_DONE


def variant(name: str, words: Sequence[str], output_dir: Path) -> tuple[Path, list[str]]:
    """Give the folder of a variant's result, and the command line that makes it.

    Args:
        name: key of ``VARIANTS``.
        words: flags that all variants share.
        output_dir: of the ablation; stage 1 lies in it, the others below it.
    """
    if name == "stage 1 alone":
        place, stage = output_dir, "trajectory"
    else:
        place, stage = output_dir / "ablation" / re.sub(r"\W+", "_", name), "classification"
    command = [*words, *VARIANTS[name].split(), "--output_dir", str(place)]
    if "soft prompt" in name:
        command += ["--ode_checkpoint", str(output_dir / TRAJECTORY_FILE)]
    return place / stage, command


def run_or_go_on(command: list[str], folder: Path) -> int:
    """Run one of several commands, or go on with it; where its whole result is there, leave it."""
    args = resolve(build_parser().parse_args(command))
    done = reached(folder, args, load_data(args))
    if done == "all":
        logger.info("already there: %s", folder)
        if processes().is_main_process:
            with locked(folder):
                clean_up(folder)
        return EXIT_DONE
    if done == "none" and folder.exists():
        logger.info("%s: not what this command, code and data lead to: made anew", folder)
    return main([*command, "--resume"] if done == "part" else command)


def reached(folder: Path, args: argparse.Namespace, data: Data) -> str:
    """Tell how much an earlier run of the same command has reached: ``all``, ``part``, ``none``.

    A run of other code, other versions or another number of processes is not the same.
    """
    facts = json.loads(json.dumps(run_facts(args, data)))
    keys = ("versions", "code_sha256", "processes")
    try:
        known = begun(folder)
        if not known or differences(known, facts) or any(known[k] != facts[k] for k in keys):
            return "none"
        if complete(known):
            refuse_broken(folder, known)
            return "all"
        if not States(folder / LAST).files():
            return "none"
        States(folder / LAST).newest_whole()
    except InputError as error:  # it is moved aside, and made anew
        logger.warning("%s", error)
        return "none"
    return "part"


def seconds_an_epoch(folder: Path) -> float:
    """Give the median time of an epoch with its validation."""
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return float(np.median([json.loads(line)["seconds"] for line in lines]))


# --------------------------------------------------------------------------- several seeds


def run_seeds(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the same command with several seeds, each with a split of its own, and pool the tests.

    ``{seed}`` in a flag's value becomes the seed. A seed that is already there is not run again.

    Raises:
        InputError: one stage 1 for all seeds.
    """
    if args.ode_checkpoint and "{seed}" not in str(args.ode_checkpoint):
        raise InputError(
            "--seeds: each seed has a split of its own, and so a stage 1: write {seed} for its "
            f"number, as in --ode_checkpoint {args.output_dir}/seed_{{seed}}/{TRAJECTORY_FILE}"
        )
    shared = [word for word in without(words, "--seeds") if not word.startswith("--resume")]
    folders = {}
    for seed in range(args.seed, args.seed + args.seeds):
        place = args.output_dir / f"seed_{seed}"
        command = [word.replace("{seed}", str(seed)) for word in shared]
        command += ["--seed", str(seed), "--output_dir", str(place)]
        own = resolve(build_parser().parse_args(command))
        folders[seed] = place / ("trajectory" if own.trajectory_only else own.mode)
        logger.info("\nseed %d: python medgemma_trainer.py %s", seed, " ".join(command))
        if own.ablation:  # it looks itself for what is there
            folders[seed] = place / "ablation"
            code = main(command)
        else:
            code = run_or_go_on(command, folders[seed])
        if code:
            return code
    if processes().is_main_process:
        start_logging()  # each run has closed its own
        pool_seeds(folders, args)
    return EXIT_DONE


def pool_seeds(folders: dict[int, Path], args: argparse.Namespace) -> None:
    """Show mean, spread and pooled intervals over seeds; name the best by validation."""
    if args.ablation:
        reference = "stage 1 alone"
        types = {"id": str, "patient": str}
        tables = [pd.read_csv(f / "predictions_test.csv", dtype=types) for f in folders.values()]
    else:
        reference = next(iter(folders.values())).name
        tables = [read_predictions(reference, folder) for folder in folders.values()]
    common = [name for name in tables[0] if all(name in table for table in tables)]
    if fewer := sorted({str(name) for table in tables for name in table} - set(common)):
        logger.info("not in every split, so not pooled: %s", ", ".join(fewer))
    tables = [table[common] for table in tables]
    best = "" if args.ablation else best_by_validation(folders)
    results = side_by_side(tables, reference, args.seed)
    name = "seeds_ablation" if args.ablation else f"seeds_{reference}"
    show(results, reference, args.output_dir, name, args, further=best)
    logger.info(best)


def best_by_validation(folders: dict[int, Path]) -> str:
    """Say which seed's run has the highest AUROC on its validation part."""
    known = {
        seed: json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["validation"]
        for seed, folder in folders.items()
    }
    best = max(known, key=lambda seed: known[seed]["auroc"]["value"])
    return (
        f"Best by validation: seed {best} (AUROC {known[best]['auroc']['value']:.4f}), "
        f"{folders[best]}. Each seed has a validation part of its own, so luck has its share."
    )


def without(words: Sequence[str], flag: str) -> list[str]:
    """Give a command line without a flag and its one value."""
    kept, skip = [], False
    for word in words:
        if not skip and word.split("=")[0] != flag:
            kept.append(word)
        skip = word == flag
    return kept


# --------------------------------------------------------------------------- comparison

SAME = ["id", "patient", "label"]
"""Columns of a table of predictions that tell what was tested; each other one is a model."""


def read_predictions(name: str, folder: Path) -> pd.DataFrame:
    """Read what a stage said of its test part: ``SAME``, the model ``name``, the baselines.

    Raises:
        InputError: there is no whole result.
    """
    path = folder / "predictions_test.csv"
    if not path.exists():
        raise InputError(f"{folder}: no predictions_test.csv: name the folder of a finished stage")
    table = pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False)
    if missing := [column for column in (*SAME, "probability") if column not in table]:
        raise InputError(f"{path}: no column {missing[0]}: was it written by this program?")
    baselines = table.columns.drop([*SAME, "probability"])
    return table[[*SAME, "probability", *baselines]].rename(columns={"probability": name})


def join_predictions(folders: dict[str, Path]) -> pd.DataFrame:
    """Set the predictions of several stages side by side, with the baselines of the first.

    Raises:
        InputError: they were not tested on the same patients.
    """
    tables = {name: read_predictions(name, folder) for name, folder in folders.items()}
    reference, first = next(iter(tables.items()))
    for name, table in tables.items():
        if table[SAME[:2]].equals(first[SAME[:2]]) and not table[SAME].equals(first[SAME]):
            raise InputError(f"{reference} and {name} have other labels for the same patients")
        if nameless(folders[reference], folders[name]):
            raise InputError(
                f"{reference} and {name}: their data name no patients (no subject_id) and are not "
                "the same, so nothing tells that the same patients were tested"
            )
        if not table[SAME].equals(first[SAME]):
            both = len(set(table["id"]) & set(first["id"]))
            raise InputError(
                f"{reference} and {name} were tested on different patients ({len(first)} and "
                f"{len(table)} rows, {both} ids in both): compare runs on the same data and seed"
            )
    models = [table[name] for name, table in tables.items()]
    return pd.concat([first[SAME], *models, first.drop(columns=[*SAME, reference])], axis=1)


def nameless(one: Path, other: Path) -> bool:
    """Tell whether two runs know their rows by number alone and read other rows."""
    known: list[dict[str, Any]] = [(begun(folder) or {}).get("data", {}) for folder in (one, other)]
    numbered = any(not data.get("named", True) for data in known)
    return numbered and known[0].get("rows_sha256") != known[1].get("rows_sha256")


def side_by_side(
    tables: list[pd.DataFrame], reference: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Score the same models on one test part, or on those of several splits.

    Of several splits each figure is the mean, its interval that of the mean: patients are drawn
    once for all splits, each with all the rows that any test part holds of him.

    Args:
        tables: one a split: ``SAME``, then the probabilities of each model.
        reference: the model that the others are compared with, paired.
        seed: of the draws.

    Returns:
        Of each model n, events, each figure with its interval (and over several splits its
        standard deviation ``sd``), and ``minus_reference``: the paired differences.
    """
    whole = pd.concat(tables, keys=range(len(tables)))
    labels = whole["label"].to_numpy(dtype=float)
    split = whole.index.get_level_values(0).to_numpy()
    parts = {
        model: [(labels[split == k], t[model].to_numpy()) for k, t in enumerate(tables)]
        for model in whole.columns.drop(SAME)
    }
    values = {model: pd.DataFrame([metrics_of(*p) for p in each]) for model, each in parts.items()}

    def ask(weights: NDArray[np.float64]) -> Figures:
        """Give the mean over splits of each figure under some draws."""
        means: Figures = {}
        for model, each in parts.items():
            drawn = [weighted_metrics(*p, weights[:, split == k]) for k, p in enumerate(each)]
            means |= {(model, m): np.mean([d[m] for d in drawn], axis=0) for m in drawn[0]}
        return means

    groups = whole["patient"].to_numpy(dtype=np.str_)
    drawn = bootstrap(labels, groups, seed, ask, split)
    replicates = {
        model: {m: draws for (name, m), draws in drawn.items() if name == model} for model in parts
    }
    results: dict[str, dict[str, Any]] = {}
    for model, own in replicates.items():
        mean, other = values[model].mean(), values[reference].mean()
        figures = {m: interval(float(mean[m]), own[m]) for m in own}
        if len(tables) > 1:
            for metric, figure in figures.items():
                figure["sd"] = float(values[model][metric].std())
        paired = {
            m: interval(float(mean[m] - other[m]), own[m] - replicates[reference][m]) for m in own
        }
        counts = {"n": len(labels), "events": int(labels.sum())}
        results[model] = {**counts, **figures, "minus_reference": paired}
    return results


def run_compare(runs: list[Path], seed: int) -> int:
    """Set finished stages, tested on the same patients, side by side; the first is the reference.

    Raises:
        InputError: they were tested on different patients, or one has no result.
    """
    names = [str(run) for run in runs]
    if len({run.resolve() for run in runs}) < len(runs) or len(runs) < 2:
        raise InputError("--compare: name at least two different folders of stages")
    tested = join_predictions(dict(zip(names, runs, strict=True)))
    results = side_by_side([tested], names[0], seed)
    table = comparison_table(results, names[0]).to_string(index=False)
    logger.info("\n%s\n%s", table, counted(results))
    return EXIT_DONE


def show(
    results: dict[str, dict[str, Any]],
    reference: str,
    folder: Path,
    name: str,
    args: argparse.Namespace,
    further: str = "",
) -> None:
    """Print the table of a comparison; write ``NAME.json``, ``NAME.png`` and ``NAME.html``.

    Args:
        results: from ``side_by_side``.
        reference: the model that the others are compared with.
        folder: where to.
        name: of the files.
        args: of the run.
        further: one more sentence for the page.
    """
    text, before = json.dumps(results, indent=2) + "\n", folder / f"{name}.json"
    if before.exists() and before.read_text(encoding="utf-8") != text:
        for path, aside in moves_aside(
            folder / f"{name}{ending}" for ending in (".json", ".png", ".html")
        ).items():
            path.rename(aside)
            logger.info("an earlier result was moved to %s", aside)
    write_text(before, text)
    picture = draw_comparison(results, reference)
    repaint(picture)
    with atomic(folder / f"{name}.png") as temporary:
        picture.savefig(temporary, format="png", dpi=150)
    table, counts = comparison_table(results, reference), counted(results)
    best = max(results, key=lambda model: results[model]["auroc"]["value"])
    own, better = results[reference], results[best]["minus_reference"]["auroc"]
    sentences = [
        f"{reference}: test AUROC {shown(own['auroc'])}"
        + (f", standard deviation over splits {own['auroc']['sd']:.3f}" if args.seeds else "")
        + f" ({counts}).",
        "No model has a higher one."
        if best == reference
        else f"The highest has {best}: {shown(results[best]['auroc'])}; paired difference "
        f"{shown(better, '+.3f')}{'' if better['low'] > 0 else ', an interval with zero in it'}.",
        *([further] if further else []),
    ]
    seeds = f"{args.seed} to {args.seed + args.seeds - 1}" if args.seeds else str(args.seed)
    card = {"Seeds": seeds, "SHA-256 of the code": code_hash(), "Intervals": INTERVALS_TOLD}
    if args.seeds:
        card["What they leave out"] = (
            "the models are held as they were trained; how much training and split move a figure, "
            "its standard deviation tells"
        )
    alt = f"AUROC of {len(results)} models with intervals; the table above holds the numbers"
    page = render(
        "comparison",
        told=Told(f"Comparison: {name}", "", {}, {}, card),
        sentences=sentences,
        comparison=table,
        pictures={"comparison": finish(draw_comparison(results, reference), name, alt)},
    )
    write_text(folder / f"{name}.html", page)
    logger.info("\n%s\n%s\n\nresults: %s", table.to_string(index=False), counts, folder)


def repaint(figure: Any) -> None:
    """Give a picture that stands alone the colours that a page would give it, for light paper."""
    from matplotlib.colors import same_color

    figure.set_facecolor("white")
    for artist in figure.findobj():
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            own = getattr(artist, f"get_{part}", lambda: None)()
            for placeholder, colour in PAPER_COLOURS.items():
                if isinstance(own, (str, tuple)) and same_color(own, placeholder):
                    getattr(artist, f"set_{part}")(colour)


def counted(results: dict[str, dict[str, Any]]) -> str:
    """Say on how many rows and events a comparison rests."""
    first = next(iter(results.values()))
    parts = "test parts, joined" if "sd" in first["auroc"] else "test part"
    return f"{parts}: {first['n']} rows, {first['events']} events"


def comparison_table(results: dict[str, dict[str, Any]], reference: str) -> pd.DataFrame:
    """Lay out the test figures of all models."""
    table = []
    for name, result in results.items():
        row = {"model": name, "test AUROC [95 %]": shown(result["auroc"])}
        if "sd" in result["auroc"]:
            row["sd of AUROC"] = f"{result['auroc']['sd']:.3f}"
        difference = shown(result["minus_reference"]["auroc"], "+.3f")
        row[f"minus {reference} [95 %]"] = "" if name == reference else difference
        for metric, title, form in (("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f")):
            row[title] = f"{result[metric]['value']:{form}}"
            if "sd" in result[metric]:
                row[f"sd of {title}"] = f"{result[metric]['sd']:{form}}"
        if "seconds_an_epoch" in result:
            row["s an epoch"] = f"{result['seconds_an_epoch']:.0f}"
        table.append(row)
    return pd.DataFrame(table).fillna("")


def draw_comparison(results: dict[str, dict[str, Any]], reference: str) -> Any:
    """Draw AUROC and paired difference of each model with their intervals."""
    figure, panels = new_figure(2, size=(5.5, 0.5 * len(results) + 2), sharex=False)
    names = list(results)[::-1]
    scores = {name: result["auroc"] for name, result in results.items()}
    differences = {name: result["minus_reference"]["auroc"] for name, result in results.items()}
    titles = ("test AUROC", f"AUROC minus {reference}, paired")
    for axes, shown_here, title in zip(panels, (scores, differences), titles, strict=True):
        for place, name in enumerate(names):
            score = shown_here[name]
            axes.plot([score["low"], score["high"]], [place, place], color=MODEL)
            axes.plot(score["value"], place, "o", color=MODEL, markersize=4)
        axes.set_xlabel(title)
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False, axis="y")  # it would hide the ends of the intervals
    panels[0].plot([], [], "o-", color=MODEL, markersize=4, label="value and 95 % interval")
    panels[1].axvline(0, color=INK, linewidth=1)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; 0 done, 2 wrong input, 3 fault, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = resolve(build_parser().parse_args(words))
    memory = start_logging()
    own_mask = os.umask(0o077)  # what is made holds patients: for its owner alone
    try:
        refuse_together(words)
        with SIGNALS.listening(), repeatable(wanted=args.deterministic):
            return chosen(args, words, memory)
    except InputError as error:
        logger.error("%s", error.told(show_value=args.show_values))
        return EXIT_INPUT
    except KeyboardInterrupt as stop:
        logger.error("interrupted: nothing more was written")
        return getattr(stop, "code", EXIT_INTERRUPTED)
    except Exception as error:
        logger.error("%s", fault(error))
        if args.show_values:
            traceback.print_exc()
        return EXIT_FAULT
    finally:
        os.umask(own_mask)
        with contextlib.suppress(OSError):  # a log on a full disk ends no run
            if memory.target:
                memory.target.close()
        memory.close()


def fault(error: Exception) -> str:
    """Say in one line what went wrong where the user's input is not to blame."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, NonFiniteLossError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU has too little memory: {ADVICE}"
    if isinstance(error, MemoryError) or re.search("allocate memory|not enough memory", text):
        return f"the machine has too little memory: {ADVICE}"
    if isinstance(error, OSError):
        place = one_line(str(error.filename))
        denied = error.errno in (errno.EACCES, errno.EPERM)
        advice = "get yourself the right to it" if denied else "make room"
        return f"{place}: {error.strerror}: {advice}, or choose another place"
    if "CUDA" in text or "NVIDIA" in text:
        return f"the GPU or its driver fails: {text}: see what nvidia-smi says"
    if processes().num_processes > 1 and re.search("gloo|NCCL|[Cc]onnection", str(error)):
        return "another process of this run has ended: go on by --resume"
    # An exception's text may hold a patient's cell; where it arose never does.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"a fault of the program, {type(error).__name__} in {place}: please report it"


def chosen(
    args: argparse.Namespace, words: Sequence[str], memory: logging.handlers.MemoryHandler
) -> int:
    """Do what the command line asks for."""
    if args.compare:
        return run_compare(args.compare, args.seed)
    if args.seeds:
        return run_seeds(args, words)
    if args.ablation:
        return run_ablation(args, words)
    if args.predict:
        return predict(predict_arguments(args, words))
    return run_demo(args, words) if args.demo else train(args, memory)


def start_logging() -> logging.handlers.MemoryHandler:
    """Send messages to stdout and errors to stderr; give what holds them until a file is known."""
    logging.raiseExceptions = False  # a log that cannot be written shows no line of it elsewhere
    memory = logging.handlers.MemoryHandler(capacity=1, flushLevel=logging.NOTSET)
    terminal = logging.StreamHandler(forgiving(sys.stdout))
    faults = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    first = processes().is_main_process  # of several processes one speaks
    terminal.addFilter(lambda record: first and record.levelno < logging.ERROR)
    faults.setLevel(logging.ERROR)
    faults.setFormatter(logging.Formatter("error: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, faults, memory], force=True)
    return memory


def program(argv: Sequence[str] | None = None) -> int:
    """Run ``main``; several processes leave together, lest one finds the others gone."""
    code = main(argv)
    if processes().num_processes > 1 and code == EXIT_DONE:
        processes().wait_for_everyone()
        processes().destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(program())
