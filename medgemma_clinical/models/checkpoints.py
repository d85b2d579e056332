"""Trained weights on the disk: written whole, read without running anything they may carry.

Stage 1 is one file: encoders with their normalisers, heads, configuration, hashes of the patients
that trained. Stages 2 and 3 are a folder: adapter/ (PEFT), modules.safetensors (all parts beside
the language model), config.json, README.md, model_facts.xml, NOTICE. With a merged adapter the
folder holds a whole language model in adapter's place.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medgemma_clinical import __version__
from medgemma_clinical.data.distributions import describe, last_values, row_medians
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import MIN_TIME_SCALE
from medgemma_clinical.evaluation.baselines import ENSEMBLE, Baselines
from medgemma_clinical.evaluation.decision import describe_threshold
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.monitoring import MonitorRule
from medgemma_clinical.evaluation.reference import check_reference
from medgemma_clinical.evaluation.rules import rules_of
from medgemma_clinical.evaluation.topics.cohort import case_mix, case_mix_cells
from medgemma_clinical.files import (
    READING_ERRORS,
    InputError,
    atomic,
    file_hash,
    json_hash,
    read_json,
    remove,
    write_json,
    write_text,
)
from medgemma_clinical.models.choices import DEMO, LLM_STAGES, LORA_RANK, MEMBERS, PREFIX_TOKENS
from medgemma_clinical.models.decoders import terms_of
from medgemma_clinical.models.encoders import encoder_name
from medgemma_clinical.models.language_model import HUB_ID, base_record, base_type
from medgemma_clinical.models.model_card import (
    TIMING,
    describe_recipe,
    model_card,
    shareable,
    shared_recipe,
)
from medgemma_clinical.models.model_facts import model_facts
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.models.trajectory import Stage1
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

logger = logging.getLogger(__name__)

TRAJECTORY_FILE = "medgemma_trajectory_best.pt"
CHECKPOINT_FORMAT = 14
"""Rises when the program and its older checkpoints no longer fit each other."""

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
MODULE_WEIGHTS = "modules.safetensors"
NOTICE, CARD, FACTS = "NOTICE", "README.md", "model_facts.xml"
IMPORT = "import.json"
"""File of the recipe of the training data, which ``from_long --like`` reads."""

BASELINES, MAX_BASELINES = "baselines.json", 2**26
"""File of a stage's baselines, and its largest size in bytes."""

HASHED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULE_WEIGHTS)
"""Files that decide a prediction; other files beside them do not matter."""

MERGED_MODEL = "language_model"
"""Folder of the language model in which an adapter is merged, beside the modules."""


MAX_CUTS = 100
FINEST = {"time_scale": MIN_TIME_SCALE, "rtol": 1e-6, "atol": 1e-6}
"""Least numbers of an encoder, which decide how many steps its solver takes."""

BOUNDS = {
    "members": MEMBERS[1],
    "num_prefix_tokens": PREFIX_TOKENS[1],
    "lora_rank": LORA_RANK[1],
    "report_tokens": 131_072,  # the longest context of a Gemma 3
}
"""Largest counts in a configuration, which decide how much is allocated when it is loaded."""


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
    residual_weight: float  # of the language model's own logit beside it
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
    mix = case_mix(demographics(dataset).iloc[train], row_medians(dataset).iloc[train])
    mix["last"] = describe(last_values(dataset).iloc[train])
    task = dataset.task_description()
    timing = {name: task[name] for name in TIMING}
    description = {**data.description(), "timing": timing, "recipe": {**dataset.recipe}}
    return cast(Config, {"version": __version__, **description, "case_mix": mix})


def describe_base(name: str) -> Config:
    """Return what a checkpoint stores of its base model."""
    return cast(Config, {**base_record(name), "base_type": base_type(name)})


def stage1_config(model: Stage1) -> Config:
    """Return the keys of a checkpoint by which the script rebuilds a stage 1."""
    name, members = encoder_name(model.encoder), len(model.members)
    stage1 = {"encoder": model.encoder.config, "encoder_class": name, "members": members}
    return cast(Config, stage1 | model.outcome.config)


def check_config(path: Path, config: Any, stages: tuple[str, ...]) -> None:
    """Check what a configuration makes the program allocate, and that all of it can be read."""
    try:
        json.dumps(config, allow_nan=False)  # plain types, finite numbers
        for entry in config.get("reference", {}).values():
            check_reference(entry)
        rules_of(config)
        for rules in config.get("models", {}).values():
            rules_of({**config, "decision": rules})
        mix = config.get("case_mix", {})
        case_mix_cells({"all": mix, "last": mix.get("last", {})}, "rows")
        MonitorRule.checked(config.get("monitor_rule", {}))
        describe_threshold(config.get("threshold_choice"), "rows")
        describe_recipe({**config, "recipe": shared_recipe(config)})
        encoder, base = config["encoder"], config.get("base_model", DEMO)
        counts = {name: config.get(name, 0) for name in BOUNDS}
        series = config["inputs"].get("series", config["features"])
        allowed = {
            "stage": config["stage"] in stages,
            "encoder": encoder is None
            or (encoder["input_dim"] == len(config["features"]) and encoder["hidden_dim"] <= 1024),
            **{name: not encoder or encoder.get(name, x) >= x for name, x in FINEST.items()},
            "features": 1 <= len(config["features"]) == len(config["units"]) <= 10_000,
            "static": len(config["inputs"]["static"]) <= 10_000,
            "series": series and type(series) is list and {*series} <= {*config["features"]},
            "events": 1 <= len(config.get("events", {"cuts": [1]})["cuts"]) <= MAX_CUTS,
            "base_model": config.get("base_sha256") or HUB_ID.fullmatch(base),
            **{name: type(n) is int and 0 <= n <= BOUNDS[name] for name, n in counts.items()},
        }
    except READING_ERRORS as error:
        raise InputError(f"{path}: damaged: its configuration cannot be read") from error
    if faults := [name for name, holds in allowed.items() if not holds]:
        raise InputError(f"{path}: damaged: {faults[0]} is out of bounds")


def check_format(path: Path, version: object) -> None:
    """Refuse a checkpoint of another version of the program."""
    if version != CHECKPOINT_FORMAT:
        raise InputError(
            f"{path}: checkpoint format {version!s:.20}, this program reads {CHECKPOINT_FORMAT}: "
            "train again, or use the version that wrote it"
        )


def _unfit(path: Path) -> InputError:
    return InputError(f"{path}: damaged, or not made from this base model: its weights do not fit")


def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load every key; integers would be converted in silence."""
    if not all(tensor.is_floating_point() for tensor in weights.values()):
        raise ValueError("weights that are no floating-point numbers")
    module.load_state_dict(weights)


# ------------------------------------------------------------------ baselines


def read_baselines(path: Path, config: Config) -> Baselines | None:
    """Return the checked baselines beside a checkpoint; None where this copy has none."""
    if "baselines_sha256" not in config:
        return None
    stage_folder = path
    if path.is_file():  # moved aside, medgemma_trajectory_best.1.pt belongs to trajectory.1
        stage_folder = path.with_name(path.stem.replace(Path(TRAJECTORY_FILE).stem, "trajectory"))
    places = (folder / BASELINES for folder in (stage_folder, path.parent))
    file = next((candidate for candidate in places if candidate.is_file()), None)
    if file is None:
        logger.info("%s: without %s: neither baselines nor ensemble", path, BASELINES)
        return None
    try:
        if file.stat().st_size > MAX_BASELINES:
            raise ValueError("too large")
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != config["baselines_sha256"]:
            raise ValueError("another content")
        baselines = outcome_of(config).read_baselines(content.decode())
        if {*config["models"]} != {*baselines.names, ENSEMBLE}:
            raise ValueError("other models")
    except READING_ERRORS as error:
        raise InputError(
            f"{file}: damaged, of an earlier version, or not of {path}: restore it, or copy the "
            "model elsewhere without it"
        ) from error
    return baselines


def without_baselines(config: Config) -> Config:
    """Return the configuration of a copy that holds no baselines."""
    keys = ("baselines_sha256", "baseline_inputs", "models")
    return cast(Config, {name: x for name, x in config.items() if name not in keys})


# ------------------------------------------------------------------ stage 1


def save_trajectory(
    path: Path,
    weights: dict[str, Tensor],
    config: Config,
    train_patients: NDArray[np.int64],
) -> None:
    """Write a stage 1 file of plain types and tensors; patients are ``training_hashes``."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": config,
        "weights": weights,
        "train_patients": torch.from_numpy(train_patients),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())  # a full disk is then an OSError as everywhere


def read_trajectory(path: Path) -> TrajectoryCheckpoint:
    """Read a stage 1 file."""
    if not path.is_file():
        raise InputError(f"{path}: no such stage 1 checkpoint: run --trajectory_only first")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if archive.testzip() or any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("damaged or compressed")
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_format(path, content["format"])
        config, weights, hashes = (content[k] for k in ("config", "weights", "train_patients"))
        for tensor in (hashes, *weights.values()):
            # A view of a small storage may have any size, which a copy would fill.
            size = tensor.numel() * tensor.element_size()
            if size > tensor.untyped_storage().nbytes() or not tensor.is_contiguous():
                raise ValueError("a tensor larger than its storage")
        patients = hashes.numpy().astype(np.int64, casting="no")
    except InputError:
        raise
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        raise InputError(f"{path}: not a stage 1 checkpoint, or damaged") from error
    check_config(path, config, ("trajectory",))
    return TrajectoryCheckpoint(config, weights, patients, path, file_hash(path))


def load_trajectory(model: Stage1, checkpoint: TrajectoryCheckpoint) -> None:
    """Load the weights of a trained stage 1 into ``model``, every key."""
    try:
        _load(model, checkpoint.weights)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _unfit(checkpoint.path) from error


# ------------------------------------------------------------------ stages 2 and 3


def save_llm(folder: Path, model: TrajectoryLLM, config: Config) -> None:
    """Replace ``folder`` by a stage 2 or 3 model without its base weights."""
    # Beside the adapter: a head inside an adapter's ``modules_to_save`` is easily lost.
    state = {name: tensor.contiguous() for name, tensor in _modules(model).state_dict().items()}
    with atomic(folder) as temporary:
        temporary.mkdir()
        model.llm.save_pretrained(temporary / "adapter", save_embedding_layers=False)
        remove(temporary / "adapter" / "README.md")  # an empty template
        adapter = read_json(temporary / ADAPTER_CONFIG)
        adapter["target_modules"].sort()  # a set, written in any order
        adapter["base_model_name_or_path"] = config["base_model"]  # without the path of a folder
        adapter["revision"] = config["base_revision"]
        write_json(temporary / ADAPTER_CONFIG, adapter)
        save_file(state, temporary / MODULE_WEIGHTS)
        write_text(temporary / NOTICE, terms_of(config).notice)
        write_card(temporary, config)
        write_config(temporary, config)


def write_card(
    folder: Path, config: Config, repo_id: str | None = None, min_cell: int = MIN_CELL
) -> None:
    """Write the card of a model, its facts and the recipe of its data, without small counts."""
    write_text(folder / CARD, model_card(config, repo_id, min_cell))
    write_text(folder / FACTS, model_facts(config, min_cell))
    if recipe := shareable(config, min_cell).get("recipe"):
        write_json(folder / IMPORT, recipe)


def write_config(folder: Path, config: Config) -> None:
    """Write the configuration of a stage 2 or 3 folder, with its hash and those of the files."""
    hashes = {name: file_hash(folder / name) for name in hashed_files(config)}
    content: Config = {"format": CHECKPOINT_FORMAT, **config, "files_sha256": hashes}
    write_json(folder / CONFIG, {**content, "config_sha256": json_hash(content)})


def is_merged(config: Any) -> bool:
    """Return whether a configuration says that the adapter is merged into the language model."""
    return isinstance(config, dict) and "merged_from" in config


def hashed_files(config: Config) -> tuple[str, ...]:
    """Return the files that decide a prediction, beside a language model with its own hash."""
    return (MODULE_WEIGHTS,) if is_merged(config) else HASHED_FILES


def _modules(model: TrajectoryLLM) -> nn.ModuleDict:
    return nn.ModuleDict({name: part for name, part in model.named_children() if name != "llm"})


def weights_sha256(model: Stage1 | TrajectoryLLM) -> str:
    """Return the hash of trained weights, which is the same for each copy of a model."""
    weights = model.state_dict() if isinstance(model, Stage1) else _modules(model).state_dict()
    if isinstance(model, TrajectoryLLM):
        weights |= _adapter_weights(model)
    return hash_weights(weights)


def _adapter_weights(model: TrajectoryLLM) -> dict[str, Tensor]:
    """Return the weights of the adapter, none where it is merged."""
    from peft import PeftModel, get_peft_model_state_dict  # takes seconds, and stage 1 needs none

    if not isinstance(model.llm, PeftModel):
        return {}
    return dict(get_peft_model_state_dict(model.llm, save_embedding_layers=False))


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the hash of named tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.float().numpy(force=True).tobytes())
    return digest.hexdigest()


def read_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """Return the trained weights of a stage 2 or 3 folder, whose files ``read_config`` checks."""
    weights: dict[str, Tensor] = {}
    for name in hashed_files(config):
        if name.endswith(".safetensors"):
            weights |= load_file(folder / name)
    return weights


def load_modules(model: TrajectoryLLM, folder: Path) -> None:
    """Load the parts of stage 2 or 3 beside the language model into ``model``, every key."""
    try:
        _load(_modules(model), load_file(folder / MODULE_WEIGHTS))
        # peft has loaded the adapter, and would only warn of missing keys.
        if expected := _adapter_weights(model):
            with safe_open(folder / ADAPTER_WEIGHTS, "pt") as adapter:
                if {*adapter.keys()} != {*expected}:
                    raise ValueError("an adapter of other keys")
    except Exception as error:  # safetensors has errors of its own
        raise _unfit(folder) from error


def read_config(folder: Path) -> Config:
    """Return the configuration of a stage 2 or 3 folder, its files checked by their hashes."""
    try:
        config: Config = read_json(folder / CONFIG)
        check_format(folder, config["format"])
        expected = {CONFIG: config.pop("config_sha256"), **config["files_sha256"]}
        files = {name: file_hash(folder / name) for name in hashed_files(config)}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: damaged: {CONFIG} cannot be read") from error
    for name, digest in {CONFIG: json_hash(config), **files}.items():
        if digest is None or digest != expected.get(name):
            raise InputError(f"{folder}: damaged: {name} is missing or not as it was written")
    check_config(folder, config, LLM_STAGES)
    return config
