"""Trained weights on the disk: written whole, read without running anything they may carry.

Stage 1 is one file: encoders with their normalisers, heads, configuration, hashes of the patients
that trained. Stages 2 and 3 are a folder: adapter/ (PEFT), modules.safetensors (all parts beside
the language model), config.json, README.md, NOTICE. With a merged adapter the folder holds a whole
language model in adapter's place.
"""

from __future__ import annotations

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
from medgemma_clinical.models.checkpoint_schema import check_adapter, check_config
from medgemma_clinical.models.trajectory import TrajectoryClassifier
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

TRAJECTORY_FILE = "medgemma_trajectory_best.pt"
CHECKPOINT_FORMAT = 7
"""Rises when the program and its older checkpoints no longer fit each other."""

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER_WEIGHTS = "adapter/adapter_model.safetensors"
MODULE_WEIGHTS = "modules.safetensors"
LLM_STAGES = ("classification", "generative")
HASHED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULE_WEIGHTS)
"""Files that decide a prediction; other files beside them do not matter."""

MERGED_MODEL = "language_model"
"""Folder of the language model in which an adapter is merged, beside the modules."""

HAI_DEF_NOTICE = (
    "HAI-DEF is provided under and subject to the HAI-DEF Terms of Use found at "
    "https://developers.google.com/health-ai-developer-foundations/terms\n"
)
"""Must accompany a derivative of MedGemma. Source: HAI-DEF Terms of Use, distribution."""

MODEL_CARD = """\
# {title}

A LoRA adapter and the modules beside it, trained on {base} ({revision}).

- Weight of the language model beside stage 1: {weight}
- Question: {question}
- Outcome: {outcome}
- Series: {series}
- Facts: {facts}
- Trained on: {kind} data whose SHA-256 is {data}
- To predict: `python medgemma_trainer.py --predict --checkpoint FOLDER --predictions FILE` and the
  flag that names the rows

Research on the question above, on data like those of the training part. Not a medical device, not
for clinical use. Figures with their intervals are in report.html and metrics.json of the run.

{licence}
"""


def licence(base_model: str | None) -> str:
    """Return the licence of a model's code and, where it has one, of its language model."""
    code = "The code: Apache License 2.0."
    if base_model is None:
        return f"{code} No weights of MedGemma or another language model are part of this model."
    notice = HAI_DEF_NOTICE.strip()
    return f"{code} Where the language model is MedGemma or derived from it: {notice}"


@dataclass(frozen=True)
class TrajectoryCheckpoint:
    """Content of a stage 1 file.

    weights is the state dict of a ``TrajectoryClassifier``; train_patients (n,) int64, sorted
    hashes of the patients that trained.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    train_patients: NDArray[np.int64]


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
    check_config(path, config, ("trajectory",))
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": config,
        "weights": model.state_dict(),
        "train_patients": torch.from_numpy(train_patients),
    }
    buffer = io.BytesIO()  # a full disk is then an OSError as everywhere
    torch.save(content, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


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
        checkpoint = TrajectoryCheckpoint(**content, train_patients=trained.numpy())
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


def check_floating(weights: dict[str, Tensor]) -> None:
    """Check that weights are floating-point numbers: others would be converted in silence.

    Raises:
        ValueError: naming one that is not.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}")


def load_trajectory(model: TrajectoryClassifier, path: Path) -> None:
    """Load a stage 1 file into ``model``, every key.

    Raises:
        InputError: see ``read_trajectory``, or the weights do not fit the model.
    """
    checkpoint = read_trajectory(path)
    try:
        check_floating(checkpoint.weights)
        model.load_state_dict(checkpoint.weights)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _unfit(path) from error


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
        write_text(temporary / "NOTICE", HAI_DEF_NOTICE)
        write_text(temporary / "README.md", model_card(config))
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


def describe_language_model(config: dict[str, Any]) -> str:
    """Return the base model of stage 2 or 3, and what makes it a control, in words."""
    words = [str(config["base_model"])]
    if config["base_weights"] == "random":
        words.append("with random weights in place of its own, a control")
    if config["shuffled"]:
        words.append("with soft tokens of other patients, a control")
    return ", ".join(words)


def describe_weight(config: dict[str, Any]) -> str:
    """Return the weight of the language model of stage 2 or 3 beside stage 1's logit, in words."""
    if not config["stage1_logit"]:
        return "stage 1's logit is not added"
    if config["residual_weight"] == 0:
        return "0: the language model adds nothing here, the predictions are those of stage 1"
    return f"{config['residual_weight']:g}, chosen on the validation part"


def model_card(config: dict[str, Any]) -> str:
    """Return the README of a trained model."""
    base, files = config["base_model"], config["base_sha256"]
    revision = f"SHA-256 of its files {files}" if files else f"revision {config['base_revision']}"
    units = zip(config["features"], config["units"], strict=True)
    return MODEL_CARD.format(
        title="Written reports" if config["stage"] == "generative" else "Classification",
        base=describe_language_model(config),
        weight=describe_weight(config),
        revision=f"{revision}, {config['quantization']}",
        question=config["question"],
        outcome=config["outcome"],
        series=", ".join(f"{name} ({unit})" if unit else name for name, unit in units),
        facts=", ".join(config["inputs"]["facts"]) or "none",
        kind=config["dataset"],
        data=config["data_sha256"],
        licence=licence(base),
    )


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
