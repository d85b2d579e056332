"""Trained models rebuilt from their checkpoints, for predictions and for the next stage."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from medgemma_clinical.data.competing_events import words_of
from medgemma_clinical.data.overlap import check_held_out
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import PromptOptions, TrajectoryDataset
from medgemma_clinical.distributed import default_device, few_threads
from medgemma_clinical.evaluation.baselines import (
    ENSEMBLE,
    STAGE_NAMES,
    Baselines,
    text_names,
)
from medgemma_clinical.evaluation.decision import Rules, read_rules
from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.rules import apply_rules, moves_of, rules_of
from medgemma_clinical.evaluation.target import events_of
from medgemma_clinical.evaluation.text_features import WORDS, TextModel
from medgemma_clinical.files import InputError, json_hash, read_json
from medgemma_clinical.models import checkpoints, text_encoder
from medgemma_clinical.models.checkpoints import Config, TrajectoryCheckpoint
from medgemma_clinical.models.choices import LLM_STAGES
from medgemma_clinical.models.language_model import base_name, base_record
from medgemma_clinical.models.outcome import (
    Outcome,
    forecasts_of_models,
    outcome_of,
    risk_columns,
    text_share,
)
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory import Stage1
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

if TYPE_CHECKING:  # see ``language_model``
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Builders(NamedTuple):
    """The functions of the script that build a model from its configuration."""

    stage1: Callable[..., Stage1]
    llm: Callable[..., tuple[TrajectoryLLM, PreTrainedTokenizerBase]]  # ``build_llm``


@dataclass(frozen=True)
class TrainedModel:
    """A trained model ready to score, in evaluation mode."""

    model: Stage1 | TrajectoryLLM
    config: Config
    tokenizer: PreTrainedTokenizerBase | None = None  # None for stage 1
    train_patients: NDArray[np.int64] | None = None  # of stage 1 alone
    baselines: Baselines | None = None
    text: TextModel | None = None  # a regression on texts
    text_model: str = ""  # where the language encoder lies whose states it reads

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.model.parameters()).device

    def checkpoint(self) -> TrajectoryCheckpoint:
        """Return a stage 1 as ``read_trajectory`` returns that of a file."""
        assert self.train_patients is not None
        return TrajectoryCheckpoint(
            config=self.config,
            weights=self.model.state_dict(),
            train_patients=self.train_patients,
            path=Path("the encoder"),
            sha256=checkpoints.weights_sha256(self.model),
        )

    def identity(self) -> dict[str, str | None]:
        """Return hashes that are equal where copies give equal risks: the stage's, the others'."""
        moves = {name: moves_of(rules) for name, rules in self.rules.items()}
        weights = checkpoints.weights_sha256(self.model)
        stage = [weights, moves.pop(self.name), *late_parts(self.config)]
        hashes: dict[str, str | None] = {"sha256": json_hash(stage), "baselines_sha256": None}
        if self.baselines:
            for name in text_names(self.text):  # which a shared copy lacks
                moves.pop(name, None)
            hashes["baselines_sha256"] = json_hash([self.baselines.sha256, moves])
        return hashes

    @cached_property
    def sha256(self) -> str:
        """The hash that a table of predictions names it by."""
        return model_sha256(self.config, checkpoints.weights_sha256(self.model))

    @property
    def name(self) -> str:
        """The stage among other models."""
        return STAGE_NAMES[self.config["stage"]]

    @cached_property
    def rules(self) -> dict[str, Rules]:
        """The decision rules of each model that gives a risk: the stage, baselines, ensemble."""
        rules: dict[str, Rules] = {self.name: rules_of(self.config)}
        if self.baselines:
            for name in (*self.baselines.names, ENSEMBLE):
                rules[name] = read_rules(self.config["models"][name])
        return rules

    def threshold(self, name: str) -> float:
        """Return the first risk from which on a model predicts the event."""
        return self.rules[name][self.outcome.targets[0].name].threshold

    @cached_property
    def outcome(self) -> Outcome:
        """What it predicts."""
        return outcome_of(self.config)

    def ending(self, name: str) -> str:
        """Return the end of a model's columns in predictions, without its line."""
        return column_ending(name, self.name)

    def columns(self, used: str) -> dict[str, str]:
        """Return the columns of predictions by those of a table of risks; the used model first."""
        columns = {target.column(used): target.output for target in self.outcome.targets}
        for name in self.rules:
            for target in self.outcome.targets if name != used else ():
                columns[target.column(name)] = f"{target.output}_{self.ending(name)}"
        return columns

    def model_named(self, use: str) -> str:
        """Return the model that ``stage``, ``best``, a name or the end of its columns means."""
        wanted = self.ending(wanted_model(self.config, use))
        for name in self.rules:
            if self.ending(name) == wanted:
                return name
        choices = ", ".join(["best", *map(self.ending, self.rules)])
        problem = "no such model" if self.baselines else "this copy of the model has no baselines"
        raise InputError(f"--use {use}: {problem}: choose from {choices}")

    def with_text(self, dataset: TrajectoryDataset) -> TrajectoryDataset:
        """Return a data set whose texts are read as the regression on texts needs them."""
        if self.text is None or self.text.reading.kind == WORDS:
            return dataset
        return text_encoder.with_states(dataset, self.encoder_name, self.encoder_record)

    @property
    def encoder_record(self) -> dict[str, str | None]:
        """The record of the language encoder whose states are read."""
        assert self.text is not None
        return {**self.text.reading.encoder}

    @cached_property
    def encoder_name(self) -> str:
        """The id, or the checked folder, of the language encoder."""
        record = self.encoder_record
        name = self.text_model or str(record["base_model"])
        digest = text_encoder.encoder_record(name)["base_sha256"] if os.path.isdir(name) else None
        if digest != record["base_sha256"]:
            problem = "is not the encoder of the training" if digest else "no such folder"
            place = record["base_model"]
            raise InputError(f"{name}: {problem}: say by --text_model where {place} lies")
        return name

    def loaded_encoder(self) -> text_encoder.TextEncoder:
        """Return the language encoder."""
        revision = self.encoder_record["base_revision"]
        return text_encoder.load_encoder(self.encoder_name, revision, default_device())

    @property
    def adds_late(self) -> bool:
        """Whether text, read by a language model or a regression, adds to stage 1's outputs."""
        return checkpoints.adds_text(self.config) or bool(self.config.get("stage1_logit"))

    def text_share(self, dataset: TrajectoryDataset) -> Array | None:
        """Return what texts add to the outputs of stage 1, (n, Q); None where they add nothing."""
        if not checkpoints.adds_text(self.config):
            return None
        assert self.text is not None
        weight = self.config["residual_weight"]
        return weight * text_share(self.outcome, self.text.numbers(dataset))

    @few_threads()
    def forecasts(
        self, dataset: TrajectoryDataset, forecast: Array, share: Array | None
    ) -> dict[str, Array]:
        """Return what each model says of n rows.

        ``forecast`` is the stage's own, ``share`` (n, Q) what text adds to the outputs in it.
        """
        beside = self.baselines.forecasts(dataset) if self.baselines else {}
        return forecasts_of_models(self.outcome, self.name, forecast, beside, share)

    def risks(self, name: str, forecast: Array) -> Array:
        """Return the delivered risks (n, T) of a model."""
        table = pd.DataFrame(risk_columns(self.outcome, {name: forecast}))
        delivered = apply_rules(table, {name: self.rules[name]}, self.outcome.targets)
        return delivered.to_numpy(float)

    def curves(
        self, name: str, forecast: Array, ids: NDArray[Any], hours: Sequence[float] | None = None
    ) -> pd.DataFrame:
        """Return the cumulative incidences of a model: columns id, hour, cause, incidence."""
        until, events, incidence = self.outcome.curves(forecast, hours, self.rules[name])
        index = pd.MultiIndex.from_product([range(len(ids)), events, until])
        table = index.to_frame(index=False, name=["id", "cause", "hour"])
        table["id"] = ids[table["id"]]
        return table.assign(incidence=incidence.ravel())[["id", "hour", "cause", "incidence"]]

    def risk_columns(self, name: str, forecast: Array, ending: str) -> dict[str, Array]:
        """Return the risks of a model by their columns in predictions, (n,) each."""
        names = [f"{target.output}{ending}" for target in self.outcome.targets]
        return dict(zip(names, self.risks(name, forecast).T, strict=True))

    @property
    def prompts(self) -> PromptOptions:
        """The options of the prompts that trained the model, of stages 2 and 3."""
        return PromptOptions(**self.config["prompts"])


def wanted_model(config: Config, use: str) -> str:
    """Return the model that ``--use`` means, of ``best`` the recommended one; refuse none."""
    wanted = config.get("best_model", use) if use == "best" else use
    if wanted is None:
        raise InputError(
            "--use best: no model is recommended, since few events cannot choose one: name a model "
            "by --use NAME, as in --use stage, or train on more data"
        )
    return wanted


def column_ending(name: str, stage: str) -> str:
    """Return the end of a model's columns in predictions, beside a stage."""
    return "stage" if name == stage else re.sub(r"\W+", "_", name)


# ------------------------------------------------------------------ where a model lies


def checkpoint_path(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: stage 1's file, or the folder of stage 2 or 3."""
    if path.is_file():
        return path
    if (path / "best").is_dir():
        return path / "best"
    if (path / checkpoints.MODULE_WEIGHTS).is_file():
        return path
    file = checkpoints.file_of_stage_1(path.absolute())
    if path.is_dir() and file.is_file():
        return file
    shared = path / checkpoints.TRAJECTORY_FILE  # in a run's folder, one of several models
    if shared.is_file() and not any((path / stage).is_dir() for stage in LLM_STAGES):
        return shared
    problem = "holds no trained model" if path.exists() else "no such file or folder"
    raise InputError(
        f"--checkpoint {path}: {problem}: name the folder trajectory, classification or "
        f"generative of a run, or its {checkpoints.TRAJECTORY_FILE}"
    )


def read_trained_config(path: Path) -> Config:
    """Return a checkpoint's configuration without loading a language model."""
    best = checkpoint_path(path)
    if best.is_file():
        return checkpoints.read_trajectory(best).config
    return checkpoints.read_config(best)


def read_model_sha256(path: Path) -> str:
    """Return ``TrainedModel.sha256`` of a checkpoint without loading a language model."""
    best = checkpoint_path(path)
    if best.is_file():
        stage1 = checkpoints.read_trajectory(best)
        return model_sha256(stage1.config, checkpoints.hash_weights(stage1.weights))
    config = checkpoints.read_config(best)
    weights = load_file(best / checkpoints.MODULE_WEIGHTS)
    if not checkpoints.is_merged(config):
        weights |= load_file(best / checkpoints.ADAPTER_WEIGHTS)
    return model_sha256(config, checkpoints.hash_weights(weights))


def model_sha256(config: Config, weights: str) -> str:
    """Return a hash that is equal for copies of a model, with or without baselines.

    An update makes another model of it, a threshold does not.
    """
    updated = config.get("updated", {})
    stage = [weights, moves_of(rules_of(config)), *late_parts(config)]
    names = "before", "model", "method", "data_sha256"
    return json_hash([stage, [updated.get(name) for name in names]])


def late_parts(config: Config) -> list[Any]:
    """Return weight and hash of what is added to stage 1's outputs."""
    text = [config["text_sha256"]] if checkpoints.adds_text(config) else []
    return [config.get("residual_weight"), *text]


# ------------------------------------------------------------------ loading


@contextlib.contextmanager
def damage_refused(path: Path) -> Iterator[None]:
    """Refuse a checkpoint from which no model can be built."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: damaged: its configuration is incomplete") from error
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
            raise
        raise InputError(f"{path}: damaged, or not made from this base model") from error


def rebuild_stage1(checkpoint: TrajectoryCheckpoint, builders: Builders) -> Stage1:
    """Return stage 1 with the weights of its checkpoint, every key."""
    with damage_refused(checkpoint.path):
        model = builders.stage1(checkpoint.config)
        model.load_state_dict(checkpoint.weights)
    return model


def load_trained_model(
    path: Path,
    builders: Builders,
    model_name: str | None = None,
    quantization: str | None = None,
    precision: str | None = None,
    device: torch.device | None = None,
    attention: str = "sdpa",
    text_model: str | None = None,
) -> TrainedModel:
    """Load a trained model, every key of it, from a stage's folder, ``best`` or stage 1's file.

    ``None`` takes what is stored; of ``model_name`` the hub's id, or the folder in ``run.json``.
    """
    best, device = checkpoint_path(path), device or default_device()
    # torch's random generators stay as they are.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if best.is_file():
            checkpoint = checkpoints.read_trajectory(best)
            stage1 = rebuild_stage1(checkpoint, builders).to(device).eval()
            beside = read_beside(best, checkpoint.config, text_model)
            return TrainedModel(
                stage1, checkpoint.config, None, checkpoint.train_patients, **beside
            )
        stored = checkpoints.read_config(best)
        check_no_control(path, stored)
        config = {**stored}
        config["quantization"] = quantization or stored["quantization"]
        config["precision"] = precision or stored["precision"]
        name = model_name or base_folder(best, stored)
        check_base(best, stored, name)
        beside = read_beside(best, stored, text_model)
        with damage_refused(best):
            model, tokenizer = builders.llm(
                config,
                builders.stage1(config) if config["encoder"] else None,
                name,
                device=device,
                revision=config["base_revision"] if model_name is None else None,
                adapter=None if checkpoints.is_merged(stored) else best / "adapter",
                attention=attention,
            )
            checkpoints.load_modules(model, best)
    return TrainedModel(model.to(device).eval(), stored, tokenizer, None, **beside)


def read_beside(best: Path, config: Config, text_model: str | None) -> dict[str, Any]:
    """Return the parts of a trained model that lie beside its checkpoint."""
    baselines, text = checkpoints.read_baselines(best, config), checkpoints.read_text(best, config)
    if baselines is not None:
        baselines = replace(baselines, text=text)
    name = text_model or ""
    if text is not None and text.reading.encoder.get("base_sha256") and not name:
        name = argument_of(best, "text_model")
    return {"baselines": baselines, "text": text, "text_model": name}


def argument_of(best: Path, name: str) -> str:
    """Return an argument of the run that left a checkpoint, empty where it is not known."""
    # A checkpoint holds no path; ``run.json`` does.
    folder = checkpoints.folder_of_stage_1(best) if best.is_file() else best.parent
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(read_json(folder / "run.json")["arguments"][name])
    return ""


def check_no_control(path: Path, config: Config) -> None:
    """Refuse a control, which is trained to be compared with and never to be used."""
    if config.get("shuffled") or config.get("base_weights") == "random":
        raise InputError(
            f"--checkpoint {path}: a control of --ablation, with soft tokens of other patients or "
            "random weights: take another model"
        )


def base_folder(best: Path, config: Config) -> str:
    """Return where a checkpoint's base model lies: the hub's id, or a folder of this machine."""
    if checkpoints.is_merged(config):
        return str(best / checkpoints.MERGED_MODEL)
    base = str(config["base_model"])
    if config["base_sha256"] is None:
        return base
    folder = argument_of(best, "model_name")
    if not os.path.isdir(folder):
        raise InputError(f"{best}: its base model is a folder, {base}: give it by --model_name")
    return folder


def check_base(best: Path, config: Config, name: str) -> None:
    """Refuse a base model of other content than the checkpoint's; warn where none is known."""
    base, stored = config["base_model"], config["base_sha256"]
    digest = base_record(name)["base_sha256"] if os.path.isdir(name) else None
    if stored and digest and stored != digest:
        problem = f"its files differ from those of {base}, on which {best} was trained"
        raise InputError(f"--model_name {name}: {problem}")
    if base != name and not (stored and digest):
        text = "%s was trained on %s: make sure that %s is the same"
        logger.warning(text, best, base, base_name(name))


# ------------------------------------------------------------------ stage 1 below stages 2 and 3


def stage1_risks(
    checkpoint: TrajectoryCheckpoint, text: TextCollator
) -> dict[str, NDArray[np.float64]]:
    """Return the columns (N,) of the risks that a frozen stage 1 itself gives each row."""
    assert text.states is not None
    outcome, name = outcome_of(checkpoint.config), STAGE_NAMES["trajectory"]
    forecast = outcome.forecast(text.states.outputs.double().numpy())
    table = pd.DataFrame(risk_columns(outcome, {name: forecast}))
    delivered = apply_rules(table, {name: rules_of(checkpoint.config)}, outcome.targets)
    return {str(column): delivered[column].to_numpy(float) for column in delivered}


def check_stage1(checkpoint: TrajectoryCheckpoint, data: Data, flags: dict[str, Any]) -> None:
    """Check that stage 1 fits data and flags, and was not trained on held-out patients."""
    config, path = checkpoint.config, checkpoint.path
    if checkpoints.adds_text(config):
        raise InputError(
            f"{path}: its risks also rest on texts, which the language model reads itself: train "
            "stage 1 without --text_features"
        )
    description = data.description()
    stored: dict[str, Any] = {key: config[key] for key in ("features", "units", "outcome")}
    actual = {key: description[key] for key in stored}
    if label := config["read_options"].get("label_column"):  # the cause of another outcome
        stored = {"label_column": label, **stored}
        actual["label_column"] = description["read_options"].get("label_column")
    for key, value in stored.items():
        if value != actual[key]:
            raise InputError(f"{path}: trained on {key} {value}, the data have {actual[key]}")
    events, given = events_of(config), data.dataset.competing_events
    if events != given:
        raise InputError(f"{path}: trained on {words_of(events)}, the data have {words_of(given)}")
    inputs = {"facts": config["inputs"]["static"], **config["inputs"]}
    stored = {name: "on" if value else "off" for name, value in inputs.items()}
    stored |= {"encoder": config.get("encoder_class"), "members": config["members"]}
    stored |= config["encoder"]
    for name, flag in flags.items():
        if flag != stored[name]:
            raise InputError(f"{path}: its --{name} is {stored[name]}: leave the flag out")
    complete = len(checkpoint.train_patients) and config.get("updated", {}).get("complete", True)
    check_held_out(
        data.dataset,
        data.split,
        checkpoint.train_patients if complete else None,
        path,
        has_ids=bool(config["has_patient_ids"]),
        same_rows=config["rows_sha256"] == data.rows_sha256,
    )
