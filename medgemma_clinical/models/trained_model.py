"""Trained models rebuilt from their checkpoints, for predictions and for the next stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medgemma_clinical.data.ragged import summary_names
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.distributed import default_device
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.models.checkpoint_schema import (
    ATTENTIONS,
    DYNAMICS,
    MEMBERS,
)
from medgemma_clinical.models.checkpoints import (
    LLM_STAGES,
    MERGED_MODEL,
    MODULE_WEIGHTS,
    TRAJECTORY_FILE,
    TrajectoryCheckpoint,
    is_merged,
    load_llm,
    load_trajectory,
    read_adapter,
    read_config,
    read_trajectory,
    to_checkpoint,
)
from medgemma_clinical.models.encoder import Encoder
from medgemma_clinical.models.language_model import (
    DTYPES,
    add_lora,
    base_content_hash,
    base_name,
    load_language_model,
)
from medgemma_clinical.models.text_batches import TextCollator, verdict_words
from medgemma_clinical.models.trajectory import (
    TrajectoryClassifier,
    TrajectoryHead,
    TrajectoryMember,
)
from medgemma_clinical.models.trajectory_llm import LLMClassifier, LLMWriter, TrajectoryLLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A trained model ready to score.

    Attributes:
        model: in evaluation mode.
        config: its checkpoint's.
        tokenizer: None for stage 1.
        train_patients: of stage 1, see ``TrajectoryCheckpoint``; None for the others.
    """

    model: TrajectoryClassifier | TrajectoryLLM
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    train_patients: NDArray[np.int64] | None = None

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.model.parameters()).device

    def checkpoint(self) -> TrajectoryCheckpoint:
        """Return a stage 1 as ``read_trajectory`` returns that of a file."""
        assert isinstance(self.model, TrajectoryClassifier)
        assert self.train_patients is not None
        return to_checkpoint(self.model, self.config, self.train_patients)

    @property
    def rule(self) -> DecisionRule:
        """How a logit becomes a probability and a prediction."""
        return DecisionRule.from_config(self.config)

    @property
    def prompts(self) -> PromptOptions:
        """The options of the prompts that trained the model, of stages 2 and 3."""
        return PromptOptions(**self.config["prompts"])


def checkpoint_place(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: stage 1's file, or the folder of stage 2 or 3.

    Raises:
        InputError: there is none.
    """
    beside = path.absolute().parent / TRAJECTORY_FILE
    if path.is_file():
        return path
    if (path / "best").is_dir():
        return path / "best"
    if (path / MODULE_WEIGHTS).is_file():
        return path
    if path.is_dir() and path.absolute().name == "trajectory" and beside.is_file():
        return beside
    shared = path / TRAJECTORY_FILE  # in a run's folder, one of several models
    if shared.is_file() and not any((path / stage).is_dir() for stage in LLM_STAGES):
        return shared
    problem = "holds no trained model" if path.exists() else "no such file or folder"
    raise InputError(
        f"--checkpoint {path}: {problem}: name the folder trajectory, classification or "
        f"generative of a run, or its {TRAJECTORY_FILE}"
    )


def read_metrics(path: Path) -> dict[str, Any] | None:
    """Return the figures of the run that a checkpoint belongs to, None where they are not known.

    Args:
        path: as for ``load_trained_model``.
    """
    place = checkpoint_place(path)
    folder = place.parent / "trajectory" if place.is_file() else place.parent
    try:
        metrics: dict[str, Any] = read_json(folder / "metrics.json")
    except (OSError, ValueError):
        return None
    return metrics


def read_trained_config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration without loading a language model.

    Raises:
        InputError: no checkpoint there, damaged, or of another format.
    """
    place = checkpoint_place(path)
    return read_trajectory(place).config if place.is_file() else read_config(place)


def check_no_control(path: Path, config: dict[str, Any]) -> None:
    """Refuse a control, which is trained to be compared with and never to be used.

    Args:
        path: of the checkpoint, as the user names it.
        config: its configuration.

    Raises:
        InputError: it reads the soft tokens of other patients, or random weights.
    """
    if config.get("shuffled") or config.get("base_weights") == "random":
        raise InputError(
            f"--checkpoint {path}: a control of --ablation, with soft tokens of other patients or "
            "random weights: take another model"
        )


def load_trained_model(
    path: Path,
    encoders: Mapping[str, type],
    model_name: str | None = None,
    quantization: str | None = None,
    precision: str | None = None,
    device: torch.device | None = None,
    attention: str = ATTENTIONS[0],
) -> TrainedModel:
    """Load a trained model, every key of it.

    Args:
        path: a stage's folder, its ``best``, or stage 1's file.
        encoders: class of each registered name.
        model_name: where the base model lies now; None takes the hub's, or the place that the
            run's ``run.json`` knows.
        quantization: of the base model; None takes the stored one.
        precision: ``bf16`` or ``fp32``; None takes the stored one.
        device: of the weights; None takes the GPU if there is one.
        attention: of the language model; a checkpoint holds none.

    Raises:
        InputError: no checkpoint there, damaged, or its base model cannot be loaded.
    """
    place, device = checkpoint_place(path), device or default_device()
    if place.is_file():
        checkpoint = read_trajectory(place)
        classifier = build_stage1(checkpoint.config, encoders)
        load_trajectory(classifier, checkpoint)
        patients = checkpoint.train_patients
        return TrainedModel(
            classifier.to(device).eval(), checkpoint.config, train_patients=patients
        )
    config = read_config(place)
    name = model_name or base_place(place, config)
    check_base(place, config, name)
    base, tokenizer = load_language_model(
        name,
        quantization or config["quantization"],
        DTYPES[precision or config["precision"]],
        device,
        config["base_revision"] if model_name is None else None,
        origin="the checkpoint" if model_name is None else "--model_name",
        attention=attention,
    )
    model = build_llm(place, config, encoders, base, tokenizer)
    load_llm(model, place)
    return TrainedModel(model.to(device).eval(), config, tokenizer)


def base_place(place: Path, config: dict[str, Any]) -> str:
    """Return where the base model of a checkpoint lies: the hub's id, or a folder of this machine.

    A checkpoint holds no path; the ``run.json`` beside ``best`` does. A merged one holds the model.

    Args:
        place: folder of the trained model.
        config: its configuration.

    Raises:
        InputError: the base model is a folder whose place is not known.
    """
    base = str(config["base_model"])
    if is_merged(config):
        return str(place / MERGED_MODEL)
    if config["base_sha256"] is None:
        return base
    try:
        run = read_json(place.parent / "run.json")
        folder = str(run["arguments"]["model_name"])
    except (OSError, ValueError, LookupError, TypeError):
        folder = ""
    if os.path.isdir(folder):
        return folder
    raise InputError(
        f"{place}: its base model is a folder named {base}, whose place is not known here: give it "
        "by --model_name"
    )


def check_base(place: Path, config: dict[str, Any], name: str) -> None:
    """Refuse a base model of other content than the checkpoint's; warn where none is known.

    Args:
        place: folder of the trained model.
        config: its configuration.
        name: of the base model: hub id, folder or ``tiny``.

    Raises:
        InputError: both are folders, and their files differ.
    """
    base, stored, found = config["base_model"], config["base_sha256"], base_content_hash(name)
    if stored and found and stored != found:
        raise InputError(
            f"--model_name {name}: another base model than {base}, on which {place} was trained: "
            "its files differ"
        )
    if base != name and not (stored and found):
        logger.warning(
            "%s was trained on %s: make sure that %s is the same model",
            place,
            base,
            base_name(name),
        )


def build_llm(
    place: Path,
    config: dict[str, Any],
    encoders: Mapping[str, type],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> TrajectoryLLM:
    """Rebuild the model of stage 2 or 3 whose weights are still to be loaded."""
    if is_merged(config):
        adapted = base
    else:
        adapter = read_adapter(place)
        adapted = add_lora(base, adapter["r"], adapter["lora_alpha"], dropout=0.0)
    stage1 = build_stage1(config, encoders) if config["encoder"] else None
    _, no, yes = verdict_words(tokenizer)
    parts: dict[str, Any] = {
        "tokens": config["num_prefix_tokens"],
        "scale": 1.0,  # a buffer: read with the weights
        "bos": int(tokenizer.bos_token_id),
        "verdict": (yes[0], no[0]),
        "stage1_logit": config["stage1_logit"],
        "shuffled": config["shuffled"],
        "residual_weight": config["residual_weight"],
    }
    if config["stage"] == "generative":
        return LLMWriter(stage1, adapted, **parts)
    return LLMClassifier(stage1, adapted, prevalence=0.5, **parts)


def build_stage1(config: dict[str, Any], encoders: Mapping[str, type]) -> TrajectoryClassifier:
    """Rebuild stage 1, whose weights are still to be loaded, from a checkpoint's configuration.

    Raises:
        InputError: as ``build_encoder``.
    """
    inputs = config["inputs"]
    summaries = len(summary_names(config["features"], prediction_time=inputs["prediction_time"]))
    members = []
    for _ in range(config["members"]):
        encoder = build_encoder(config["encoder"], encoders)
        head = TrajectoryHead(
            encoder.hidden_dim, 0.5, summaries=summaries, facts=len(inputs["facts"])
        )
        members.append(TrajectoryMember(encoder, head))
    return TrajectoryClassifier(members)


def build_encoder(config: dict[str, Any], encoders: Mapping[str, type]) -> Encoder:
    """Rebuild an encoder whose weights are still to be loaded, from its name and keywords.

    Raises:
        InputError: no encoder of that name is registered, or it does not take these keywords.
    """
    options = dict(config)
    name = options.pop("name")
    if name not in encoders:
        raise InputError(f"the checkpoint's encoder {name} is none of {', '.join(encoders)}")
    try:
        encoder: Encoder = encoders[name](**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the checkpoint's encoder {name}: {error}") from error
    return encoder


def load_stage1(
    checkpoint: TrajectoryCheckpoint,
    encoders: Mapping[str, type],
    given: Mapping[str, Any],
    data: Data,
) -> TrajectoryClassifier:
    """Load stage 1 for a run with a language model on ``data``, which reads the same inputs.

    Args:
        checkpoint: the trained stage 1.
        encoders: class of each registered name.
        given: the run's ``solver``, ``time_scale``, ``dynamics``, ``members``, ``facts`` and
            ``prediction_time``; a flag at its default contradicts nothing.
        data: of this run, with the inputs of stage 1.

    Raises:
        InputError: stage 1 reads other features, was made by other flags, or patients who trained
            it are held out here.
    """
    config, path = checkpoint.config, checkpoint.place
    description = data.description()
    for key in ("features", "units", "outcome"):
        if config[key] != description[key]:
            raise InputError(
                f"{path}: trained on {key} {config[key]}, the data have {description[key]}"
            )
    column = config["reading"].get("label_column")
    if column not in (None, description["reading"].get("label_column")):
        raise InputError(f"{path}: trained on --label_column {column}: give the same")
    options = config["encoder"]
    stored = {"members": config["members"], **options}
    defaults = {"time_scale": None, "dynamics": DYNAMICS[0], "members": MEMBERS[0]}
    for name, default in defaults.items():
        if given[name] not in (default, stored.get(name)):
            raise InputError(f"{path}: its --{name} is {stored.get(name)}: leave the flag out")
    for name in ("facts", "prediction_time"):
        if given[name] == "off" and config["inputs"][name]:
            raise InputError(f"{path}: trained with --{name} on: leave the flag out")
    check_held_out(checkpoint, data)
    solver = given["solver"]
    if options.get("solver", solver) != solver:
        logger.warning("%s: trained with --solver %s, now %s", path, options["solver"], solver)
        config = {**config, "encoder": {**options, "solver": solver}}
    model = build_stage1(config, encoders)
    load_trajectory(model, checkpoint)
    return model


def stage1_risks(
    checkpoint: TrajectoryCheckpoint | None, collate: TextCollator
) -> NDArray[np.float64] | None:
    """Return the probability (N,) that stage 1 itself gives each row, None without a stage 1.

    Args:
        checkpoint: its decision rule makes probabilities.
        collate: holds the logits of its head.
    """
    if checkpoint is None or collate.states is None:
        return None
    rule = DecisionRule.from_config(checkpoint.config)
    return rule.probability(collate.states.logit.double().numpy())


def check_held_out(checkpoint: TrajectoryCheckpoint, data: Data) -> None:
    """Refuse an encoder that has seen patients of this run's validation or test part.

    A shared copy holds no hashes of its training patients. The copy is refused on its own training
    data, whose split may differ here; on other data a warning says that leaks cannot be found.

    Raises:
        InputError: their number, and how to avoid it.
    """
    named, path = bool(checkpoint.config["named"]), checkpoint.place
    same_rows = checkpoint.config["rows_sha256"] == data.rows_sha256
    if not len(checkpoint.train_patients):
        if same_rows:
            raise InputError(
                f"{path}: a shared copy, trained on these very data, does not know which patients "
                "trained it: give the file of the run itself"
            )
        logger.warning(
            "%s is a shared copy and does not know which patients trained it, so that a leak "
            "cannot be found: make sure that none of them is held out here",
            path,
        )
        return
    trained = data.count_overlap(checkpoint.train_patients, named, same_rows=same_rows)
    if trained:
        held_out = np.concatenate([data.split["val"], data.split["test"]])
        count = len(np.unique(data.dataset.groups[held_out]))
        raise InputError(
            f"{path}: {trained} of {count} held-out patients trained this encoder: use the same "
            "--seed and --max_samples, and the data of stage 1"
        )
    if not same_rows and not (named and data.dataset.named):
        logger.warning(
            "%s was trained on another data file, and patients without names are compared by their "
            "series alone: make sure that none of its training patients is held out here",
            path,
        )
