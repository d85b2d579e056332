"""Trained weights on the disk: written whole, read without running anything they may carry.

Stage 1 is one file: encoders with their normalisers, heads, configuration, hashes of the patients
that trained. Stages 2 and 3 are a folder: adapter/ (PEFT), modules.safetensors (all parts beside
the language model), config.json, README.md, NOTICE. With a merged adapter the folder holds a whole
language model in adapter's place.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medgemma_clinical.files import (
    InputError,
    atomic,
    file_hash,
    json_hash,
    read_json,
    remove,
    write_json,
    write_text,
)
from medgemma_clinical.models.checkpoint_schema import (
    ATTENTIONS,
    COUNT,
    INT8_REFUSED,
    PRECISIONS,
    QUANTIZATIONS,
    check_adapter,
    check_config,
)
from medgemma_clinical.models.sharing.model_card import model_card
from medgemma_clinical.models.sharing.terms import terms_of
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

TRAJECTORY_FILE = "medgemma_trajectory_best.pt"
CHECKPOINT_FORMAT = 9
"""Rises when the program and its older checkpoints no longer fit each other."""

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
MODULE_WEIGHTS = "modules.safetensors"
NOTICE, CARD = "NOTICE", "README.md"
LLM_STAGES = ("classification", "generative")
HASHED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULE_WEIGHTS)
"""Files that decide a prediction; other files beside them do not matter."""


MERGED_MODEL = "language_model"
"""Folder of the language model in which an adapter is merged, beside the modules."""


@dataclass(frozen=True)
class TrajectoryCheckpoint:
    """A trained stage 1, as its file holds it.

    Attributes:
        config: rebuilds the model and says what it was trained on.
        weights: state dict of a ``TrajectoryClassifier``.
        train_patients: (n,) int64, sorted hashes of the patients that trained; none in a copy that
            is shared.
        place: the file, as errors name it.
        sha256: of the file.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    train_patients: NDArray[np.int64]
    place: Path
    sha256: str | None


# ------------------------------------------------------------------ configuration


def stage1_config(stage1: TrajectoryClassifier) -> dict[str, Any]:
    """Return the keys that rebuild stage 1: encoder with its keywords, number of members."""
    encoder = stage1.encoder
    return {"encoder": {"name": encoder.name, **encoder.config}, "members": len(stage1.members)}


def check_format(place: Path, found: object) -> None:
    """Refuse a checkpoint of another version of the program."""
    if found != CHECKPOINT_FORMAT:
        raise InputError(
            f"{place}: checkpoint format {found!s:.20}, this program reads {CHECKPOINT_FORMAT}: "
            "train again, or use the version that made it"
        )


def check_loading(
    quantization: str | None, precision: str | None, attention: str, batch_size: int | None
) -> None:
    """Check how a trained model shall be loaded; None leaves a choice to the checkpoint.

    Raises:
        InputError: naming the choices.
    """
    if quantization == "int8":
        raise InputError(f"quantization: {INT8_REFUSED}")
    for name, value, choices in (
        ("quantization", quantization, QUANTIZATIONS),
        ("precision", precision, PRECISIONS),
        ("attention", attention, ATTENTIONS),
    ):
        if value not in (None, *choices):
            raise InputError(f"{name} {value!r}: choose from {', '.join(choices)}")
    if batch_size is not None and not COUNT.holds(batch_size):
        raise InputError(f"batch_size {batch_size!r}: expected {COUNT.expected}")


def _unfit(place: Path) -> InputError:
    return InputError(f"{place}: damaged, or not made from this base model: its weights do not fit")


# ------------------------------------------------------------------ stage 1


def save_trajectory(
    path: Path,
    model: TrajectoryClassifier,
    config: dict[str, Any],
    train_patients: NDArray[np.int64],
) -> None:
    """Write stage 1's best model; plain types and tensors only.

    ``config`` rebuilds the model and says what it was trained on; for ``train_patients`` see
    ``Data.training_patients``.

    Raises:
        InputError: the configuration would be refused when it is read.
    """
    write_trajectory(path, to_checkpoint(model, config, train_patients))


def write_trajectory(path: Path, checkpoint: TrajectoryCheckpoint) -> None:
    """Write a stage 1 file.

    Raises:
        InputError: as ``save_trajectory``.
    """
    check_config(path, checkpoint.config, ("trajectory",))
    content = trajectory_bytes(checkpoint.config, checkpoint.weights, checkpoint.train_patients)
    with atomic(path) as temporary:
        temporary.write_bytes(content)  # a full disk is then an OSError as everywhere


def trajectory_bytes(
    config: dict[str, Any], weights: dict[str, Tensor], train_patients: NDArray[np.int64]
) -> bytes:
    """Return the content of a stage 1 file."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": config,
        "weights": weights,
        "train_patients": torch.from_numpy(train_patients),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_trajectory(path: Path) -> TrajectoryCheckpoint:
    """Read a stage 1 file.

    Raises:
        InputError: missing, damaged, not a stage 1 file, or of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                raise ValueError("torch compresses nothing")
            if damaged := archive.testzip():  # torch.load compares no checksums
                raise ValueError(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_format(path, content.pop("format"))
        trained = content.pop("train_patients")
        if trained.ndim != 1 or trained.dtype != torch.int64 or not trained.is_contiguous():
            raise ValueError("train_patients")
        checkpoint = TrajectoryCheckpoint(
            **content, train_patients=trained.numpy(), place=path, sha256=file_hash(path)
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such stage 1 checkpoint: run --trajectory_only first"
        ) from error
    except InputError:
        raise
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        raise InputError(f"{path}: not a stage 1 checkpoint, or damaged") from error
    check_config(path, checkpoint.config, ("trajectory",))
    return checkpoint


def to_checkpoint(
    model: TrajectoryClassifier, config: dict[str, Any], train_patients: NDArray[np.int64]
) -> TrajectoryCheckpoint:
    """Return a stage 1 in memory as if it had been read from a file."""
    weights = model.state_dict()
    content = trajectory_bytes(config, weights, train_patients)
    digest = hashlib.sha256(content).hexdigest()
    return TrajectoryCheckpoint(config, weights, train_patients, Path("the encoder"), digest)


def check_floating(weights: dict[str, Tensor]) -> None:
    """Check that weights are floating-point numbers: others would be converted in silence.

    Raises:
        ValueError: naming one that is not.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}")


def load_trajectory(model: TrajectoryClassifier, checkpoint: TrajectoryCheckpoint) -> None:
    """Load the weights of a trained stage 1 into ``model``, every key.

    Raises:
        InputError: the weights do not fit the model.
    """
    try:
        check_floating(checkpoint.weights)
        model.load_state_dict(checkpoint.weights)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _unfit(checkpoint.place) from error


# ------------------------------------------------------------------ stages 2 and 3


def save_llm(folder: Path, model: TrajectoryLLM, config: dict[str, Any]) -> None:
    """Write the best model of stage 2 or 3, all but its base weights, in place of ``folder``.

    Encoder, projection and heads lie beside the adapter: a head inside an adapter's
    ``modules_to_save`` is easily lost. Of a base model in a folder no path is written.

    Raises:
        InputError: the configuration would be refused when it is read.
    """
    from safetensors.torch import save_file

    check_config(folder, config, LLM_STAGES)

    state = {name: tensor.contiguous() for name, tensor in _modules(model).state_dict().items()}
    with atomic(folder) as temporary:
        temporary.mkdir()
        model.llm.save_pretrained(temporary / "adapter", save_embedding_layers=False)
        remove(temporary / "adapter" / "README.md")  # an empty template
        adapter = read_json(temporary / ADAPTER_CONFIG)
        adapter["target_modules"].sort()  # a set, written in any order
        adapter["base_model_name_or_path"] = config["base_model"]
        write_json(temporary / ADAPTER_CONFIG, adapter)
        save_file(state, temporary / MODULE_WEIGHTS)
        write_text(temporary / NOTICE, terms_of(config).notice)
        write_text(temporary / CARD, model_card(config))
        write_config(temporary, config)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a stage 2 or 3 folder, with its hash and those of the files."""
    hashes = {name: file_hash(folder / name) for name in hashed_files(config)}
    content = {"format": CHECKPOINT_FORMAT, **config, "files_sha256": hashes}
    write_json(folder / CONFIG, {**content, "config_sha256": json_hash(content)})


def is_merged(config: Any) -> bool:
    """Return whether a configuration says that the adapter is merged into the language model."""
    return isinstance(config, dict) and "merged_from" in config


def hashed_files(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the files that decide a prediction, beside a language model with its own hash."""
    return (MODULE_WEIGHTS,) if is_merged(config) else HASHED_FILES


def _modules(model: TrajectoryLLM) -> nn.ModuleDict:
    return nn.ModuleDict({name: part for name, part in model.named_children() if name != "llm"})


def load_llm(model: TrajectoryLLM, folder: Path) -> None:
    """Load the best model of stage 2 or 3 into ``model``, every key of modules and any adapter.

    Raises:
        InputError: see ``read_config``, or the weights do not fit the model.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(folder)
    try:
        modules = load_file(folder / MODULE_WEIGHTS)
        check_floating(modules)
        _modules(model).load_state_dict(modules)
        if is_merged(config):
            return
        adapter = load_file(folder / ADAPTER_WEIGHTS)
        check_floating(adapter)
        found = set_peft_model_state_dict(model.llm, adapter)
        missing = [key for key in found.missing_keys if "lora_" in key]
        if missing or found.unexpected_keys:
            raise RuntimeError([*missing, *found.unexpected_keys][0])
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise _unfit(folder) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a stage 2 or 3 folder, its files compared with their hashes.

    Further files, and links to files, do not matter.

    Raises:
        InputError: a file is missing or changed, the folder has another format, or its
            configurations are not as ``check_config`` and ``check_adapter`` expect.
    """
    try:
        config: dict[str, Any] = read_json(folder / CONFIG)
        check_format(folder, config.get("format"))
        expected = {CONFIG: config.pop("config_sha256"), **config["files_sha256"]}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: damaged: {CONFIG} cannot be read") from error
    files = {name: file_hash(folder / name) for name in hashed_files(config)}
    found = {CONFIG: json_hash(config), **files}
    for name, digest in found.items():
        if digest is None or digest != expected.get(name):
            raise InputError(f"{folder}: damaged: {name} is missing or not as it was written")
    check_config(folder, config, LLM_STAGES)
    if not is_merged(config):
        check_adapter(folder / ADAPTER_CONFIG, read_adapter(folder))
    return config


def read_adapter(folder: Path) -> Any:
    """Return the configuration of a folder's adapter.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return read_json(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: damaged: {ADAPTER_CONFIG} cannot be read") from error
