"""Trained weights on the disk: written whole, read without running anything they may carry.

Stage 1 is one file: encoders with their normalisers, heads, configuration, hashes of the patients
that trained. Stages 2 and 3 are a folder: adapter/ (PEFT), modules.safetensors (all parts beside
the language model), config.json, README.md, model_facts.xml, NOTICE. With a merged adapter the
folder holds a whole language model in adapter's place.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medgemma_clinical import __version__, files
from medgemma_clinical.data import distributions
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.evaluation.baselines import Baselines
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.text_features import TextModel
from medgemma_clinical.evaluation.topics.cohort import case_mix
from medgemma_clinical.files import InputError
from medgemma_clinical.models import model_card
from medgemma_clinical.models.decoders import terms_of
from medgemma_clinical.models.encoders import encoder_name
from medgemma_clinical.models.model_facts import model_facts
from medgemma_clinical.models.trajectory import Stage1
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

CHECKPOINT_FORMAT = 15
"""Rises when the program and its older checkpoints no longer fit each other."""

TRAJECTORY_FILE, TRAJECTORY_FOLDER = "medgemma_trajectory_best.pt", "trajectory"
"""Names of stage 1's file, and of the folder of its run beside it."""

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
MODULE_WEIGHTS = "modules.safetensors"
NOTICE, CARD, FACTS = "NOTICE", "README.md", "model_facts.xml"
IMPORT = "import.json"
"""File of the recipe of the training data, which ``from_long --like`` reads."""

BASELINES, TEXT = "baselines.json", "text.json"
"""Files of a stage's baselines, and of its regression on texts, which holds patients' words."""

HASHED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULE_WEIGHTS)
"""Files that decide a prediction; other files beside them do not matter."""

MERGED_MODEL = "language_model"
"""Folder of the language model in which an adapter is merged, beside the modules."""


class Config(TypedDict, total=False):
    """All that a checkpoint holds beside its weights: plain types, no row and no path.

    Stage 1's lies in its file, that of stages 2 and 3 is ``config.json``.
    """

    # Any stage.
    stage: str  # trajectory, classification or generative
    version: str  # of this program
    dataset: str  # kind of data, as ``--dataset``
    read_options: dict[str, Any]  # flags that decide what a row is
    features: list[str]  # series of a row
    units: list[str]  # of the features
    inputs: dict[str, Any]  # what stage 1 reads: ``static`` and ``series`` names, prediction_time
    outcome: str  # name of the label
    question: str  # that the prompt asks
    timing: dict[str, str]  # prediction time and horizon, in words
    recipe: dict[str, Any]  # of ``TrajectoryDataset``, where it is known
    has_patient_ids: bool  # whether the data name patients, or each row counts as one
    data_sha256: str  # of all that was read, before ``--max_samples``
    rows_sha256: str  # of labels, ids, patients and given split, whatever is read of the series
    case_mix: dict[str, Any]  # counts, shares, quartiles and distributions of training; ``last``:
    # distributions of the last values
    encoder: Any  # arguments of the encoder's class; None where no stage 1 is read
    encoder_class: str | None  # name of the user's own class; None: ``ClinicalODERNN``
    members: int  # encoders of stage 1, 0 where none is read
    events: dict[str, Any]  # of times to events: their names, horizons, cut points of the hazards

    # Stages 2 and 3.
    base_model: str  # hub id, name of a folder, or the built-in model
    base_type: str  # its ``model_type``; older checkpoints, of Gemma 3, do not have it
    base_sha256: str | None  # of a base model in a folder
    base_revision: str | None  # commit of a base model on the hub
    base_weights: str  # pretrained, or random: a control
    quantization: str  # of the base model
    precision: str  # of the base model's arithmetic
    lora_rank: int
    lora_alpha: int
    num_prefix_tokens: int  # maximum soft tokens of a row, 0 for none
    shuffled: bool  # soft tokens of other patients: a control
    stage1_logit: bool  # whether stage 1's logit is added
    residual_weight: float  # of the language model's own logit beside it; in stage 1 of the text's
    prompts: dict[str, Any]  # ``PromptOptions``
    max_text_tokens: int | None  # of a longer prompt the oldest values are left out
    report_tokens: int  # maximum tokens of a written report, stage 3
    merged_from: dict[str, Any]  # base model of an export, whose adapter is merged

    # Results, once training has ended.
    decision: dict[str, Any]  # ``DecisionRule`` of the stage, by target
    threshold_choice: str | None  # as ``--threshold`` was written; None: Youden's index
    models: dict[str, dict[str, Any]]  # the same of each baseline and of the ensemble
    best_model: str | None  # recommended, ``--use best``; None: none is
    monitor_rule: dict[str, Any]  # ``MonitorRule``
    reference: dict[str, Any]  # calibration of each model on held-out rows, to monitor it by
    metrics: dict[str, Any]  # content of ``metrics.json``
    baseline_inputs: dict[str, Any]  # what the baselines read, as ``inputs``
    baselines_sha256: str  # of ``baselines.json`` beside the checkpoint
    text_features: str  # what stage 1 and a regression read of texts: words, frozen or none
    text_sha256: str  # of ``text.json`` beside the checkpoint
    updated: dict[str, Any]  # rows and method of ``--update``

    # config.json alone.
    format: int  # CHECKPOINT_FORMAT
    files_sha256: dict[str, str | None]  # of the files that decide a prediction
    config_sha256: str  # of all these


@dataclass(frozen=True)
class TrajectoryCheckpoint:
    """A trained stage 1, as its file holds it."""

    config: Config
    weights: dict[str, Tensor]
    train_patients: NDArray[np.int64]  # (n,) sorted hashes; empty in a shared copy
    path: Path
    sha256: str | None  # of the file, or of weights in memory


# ------------------------------------------------------------------ configuration


def describe_data(data: Data) -> Config:
    """Return what a checkpoint stores of its data, and the version of the program."""
    dataset, train = data.dataset, data.split["train"]
    medians = distributions.row_medians(dataset).iloc[train]
    mix = case_mix(demographics(dataset).iloc[train], medians)
    mix["last"] = distributions.describe(distributions.last_values(dataset).iloc[train])
    task = dataset.task_description()
    config = {
        "version": __version__,
        **data.description(),
        "timing": {name: task[name] for name in model_card.TIMING},
        "recipe": {**dataset.recipe},
        "case_mix": mix,
    }
    return cast(Config, config)


def stage1_config(model: Stage1) -> Config:
    """Return the keys of a checkpoint by which the script rebuilds a stage 1."""
    config = {
        "encoder": model.encoder.config,
        "encoder_class": encoder_name(model.encoder),
        "members": len(model.members),
        **model.outcome.config,
    }
    return cast(Config, config)


def check_format(path: Path, version: object) -> None:
    """Refuse a checkpoint of another version of the program."""
    if version != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path}: checkpoint format {version!s:.20}, this program reads {CHECKPOINT_FORMAT}: "
            "train again, or use the version that wrote it"
        )


# ------------------------------------------------------------------ baselines


def folder_of_stage_1(file: Path) -> Path:
    """Return the folder that belongs to a file of stage 1; what was moved aside has a number."""
    return file.with_name(file.stem.replace(Path(TRAJECTORY_FILE).stem, TRAJECTORY_FOLDER))


def file_of_stage_1(folder: Path) -> Path:
    """Return the file that belongs to a folder of stage 1, the inverse of ``folder_of_stage_1``."""
    stem = folder.name.replace(TRAJECTORY_FOLDER, Path(TRAJECTORY_FILE).stem)
    return folder.with_name(f"{stem}.pt")


def read_baselines(path: Path, config: Config) -> Baselines | None:
    """Return the checked baselines beside a checkpoint; None where this copy has none."""
    content = read_beside(path, BASELINES, config.get("baselines_sha256"), Baselines.from_json)
    if content is None and "baselines_sha256" in config:
        logger.info("%s: without %s: neither baselines nor ensemble", path, BASELINES)
    return content


def read_text(path: Path, config: Config) -> TextModel | None:
    """Return the checked regression on texts beside a checkpoint; None where there is none."""
    text = read_beside(path, TEXT, config.get("text_sha256"), TextModel.from_json)
    if text is None and adds_text(config):
        raise InputError(f"{path}: its risks also rest on {TEXT}, which is not there: restore it")
    return text


def adds_text(config: Config) -> bool:
    """Return whether what texts say is part of the risks of a stage 1."""
    return config.get("stage") == "trajectory" and config.get("residual_weight", 0.0) > 0


def read_beside(
    path: Path, name: str, sha256: str | None, read: Callable[[str], Content]
) -> Content | None:
    """Return a checked file beside a checkpoint; None where it has none of this hash or copy."""
    if sha256 is None:
        return None
    file = path.parent / name
    stage_folder = folder_of_stage_1(path) if path.is_file() else path
    if (stage_folder / name).is_file():
        file = stage_folder / name
    if not file.is_file():
        return None
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("another content")
        return read(content.decode())
    except files.READING_ERRORS as error:
        raise InputError(
            f"{file}: damaged, of an earlier version, or not of {path}: restore it, or copy the "
            "model elsewhere without it"
        ) from error


def without_baselines(config: Config) -> Config:
    """Return the configuration of a copy that holds no baselines and no regression on texts."""
    keys = ("baselines_sha256", "baseline_inputs", "models", "text_sha256")
    return cast(Config, {name: x for name, x in config.items() if name not in keys})


# ------------------------------------------------------------------ stage 1


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write plain types and tensors, one tensor after the other."""
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch hides
                raise error.__context__ from None
            raise


def read_tensors(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read what ``write_tensors`` wrote; torch has no error of its own for a file of another kind.

    Code that the file may carry does not run. ``mapped`` tensors stay in the file until their use.
    """
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # torch.load compares no checksums
            raise ValueError("damaged")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return content


def save_trajectory(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    train_patients: NDArray[np.int64],
) -> None:
    """Write a stage 1 file; patients are ``training_hashes``."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": config,
        "weights": weights,
        "train_patients": torch.from_numpy(train_patients),
    }
    write_tensors(path, content)


def read_trajectory(path: Path) -> TrajectoryCheckpoint:
    """Read a stage 1 file."""
    if not path.is_file():
        raise InputError(f"{path}: no such stage 1 checkpoint: run --trajectory_only first")
    try:
        content = read_tensors(path)
        version, patients = content["format"], content["train_patients"].numpy()
        config, weights = content["config"], content["weights"]
    except Exception as error:
        raise InputError(f"{path}: not a stage 1 checkpoint, or damaged") from error
    check_format(path, version)
    return TrajectoryCheckpoint(config, weights, patients, path, files.file_hash(path))


# ------------------------------------------------------------------ stages 2 and 3


def save_llm(folder: Path, model: TrajectoryLLM, config: Config) -> None:
    """Replace ``folder`` by a stage 2 or 3 model without its base weights."""
    # Beside the adapter: a head inside an adapter's ``modules_to_save`` is easily lost.
    state = {name: tensor.contiguous() for name, tensor in modules_of(model).state_dict().items()}
    with files.atomic(folder) as temporary:
        temporary.mkdir()
        model.llm.save_pretrained(temporary / "adapter", save_embedding_layers=False)
        files.remove(temporary / "adapter" / "README.md")  # an empty template
        adapter = files.read_json(temporary / ADAPTER_CONFIG)
        adapter["target_modules"].sort()  # a set, written in any order
        adapter["base_model_name_or_path"] = config["base_model"]  # without the path of a folder
        adapter["revision"] = config["base_revision"]
        files.write_json(temporary / ADAPTER_CONFIG, adapter)
        save_file(state, temporary / MODULE_WEIGHTS)
        files.write_text(temporary / NOTICE, terms_of(config).notice)
        write_card(temporary, config)
        write_config(temporary, config)


def write_card(
    folder: Path, config: Config, repo_id: str | None = None, min_cell: int = MIN_CELL
) -> None:
    """Write the card of a model, its facts and the recipe of its data, without small counts."""
    files.write_text(folder / CARD, model_card.model_card(config, repo_id, min_cell))
    files.write_text(folder / FACTS, model_facts(config, min_cell))
    if recipe := model_card.shareable(config, min_cell).get("recipe"):
        files.write_json(folder / IMPORT, recipe)


def write_config(folder: Path, config: Config) -> None:
    """Write the configuration of a stage 2 or 3 folder, with its hash and those of the files."""
    hashes = {name: files.file_hash(folder / name) for name in hashed_files(config)}
    content: Config = {"format": CHECKPOINT_FORMAT, **config, "files_sha256": hashes}
    files.write_json(folder / CONFIG, {**content, "config_sha256": files.json_hash(content)})


def read_config(folder: Path) -> Config:
    """Return the configuration of a stage 2 or 3 folder, its files checked by their hashes."""
    try:
        config: Config = files.read_json(folder / CONFIG)
        version = config["format"]
        expected = {CONFIG: config.pop("config_sha256"), **config["files_sha256"]}
        names = hashed_files(config)
    except files.READING_ERRORS as error:
        raise InputError(f"{folder}: damaged: {CONFIG} cannot be read") from error
    check_format(folder, version)
    digests = {name: files.file_hash(folder / name) for name in names}
    for name, digest in {CONFIG: files.json_hash(config), **digests}.items():
        if digest is None or digest != expected.get(name):
            raise InputError(f"{folder}: damaged: {name} is missing or not as it was written")
    return config


def is_merged(config: Config) -> bool:
    """Return whether a configuration says that the adapter is merged into the language model."""
    return "merged_from" in config


def hashed_files(config: Config) -> tuple[str, ...]:
    """Return the files that decide a prediction, beside a language model with its own hash."""
    return (MODULE_WEIGHTS,) if is_merged(config) else HASHED_FILES


def modules_of(model: TrajectoryLLM) -> nn.ModuleDict:
    """Return the parts beside the language model."""
    return nn.ModuleDict({name: part for name, part in model.named_children() if name != "llm"})


def adapter_weights(model: TrajectoryLLM) -> dict[str, Tensor]:
    """Return the weights of the adapter, none where it is merged."""
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds, and stage 1 needs none

    if not isinstance(model.llm, PeftModel):
        return {}
    return dict(get_peft_model_state_dict(model.llm, save_embedding_layers=False))


def load_modules(model: TrajectoryLLM, folder: Path) -> None:
    """Load the parts of stage 2 or 3 beside the language model into ``model``, every key."""
    modules_of(model).load_state_dict(load_file(folder / MODULE_WEIGHTS))
    # peft has loaded the adapter, and would only warn of missing keys.
    expected = adapter_weights(model)
    if expected and expected.keys() != load_file(folder / ADAPTER_WEIGHTS).keys():
        raise ValueError("an adapter of other keys")


# ------------------------------------------------------------------ hashes of weights


def weights_sha256(model: Stage1 | TrajectoryLLM) -> str:
    """Return the hash of trained weights, which is the same for each copy of a model."""
    if isinstance(model, Stage1):
        return hash_weights(model.state_dict())
    return hash_weights(modules_of(model).state_dict() | adapter_weights(model))


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.float().numpy(force=True).tobytes())
    return digest.hexdigest()
