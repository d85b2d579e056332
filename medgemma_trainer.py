"""Fine-tune MedGemma on irregular clinical series: encoder, soft prompt, LoRA, three stages.

    python medgemma_trainer.py demo        # all three on sample data, minutes on a laptop CPU

    python medgemma_trainer.py --trajectory_only --dataset dka --data_path FILE.csv
    python medgemma_trainer.py --mode classification --dataset dka --data_path FILE.csv \\
        --ode_checkpoint ./checkpoints_medgemma_dka/medgemma_trajectory_best.pt  # or generative
    python medgemma_trainer.py predict --checkpoint ./checkpoints_medgemma_dka/classification \\
        --data_path NEW.csv --predictions OUT.csv

Data flow: series -> ClinicalODERNN -> a state after each of L observations and one at the
prediction time; then

    stage 1  trajectory       heads of states and of summaries -> logit
    stage 2  classification   <bos> [soft tokens] [text] -> LLM -> last position -> head -> logit
    stage 3  generative       <bos> [soft tokens] [text] [report] -> LLM -> lm_head on the report

Stages 2 and 3 add stage 1's logit to their own, stage 3 to that of its verdict, "yes" or "no". The
loss is the cross-entropy of the label in stages 1 and 2 (``Outcome.loss``), of the report's tokens
in stage 3 (``trajectory_llm.answer_loss``).

This file holds, in this order: flags; what is read; the models; the three stages; the training
loop; what is decided after it; what a training state holds; one run. Commands other than the
training, and what they share, are in ``medgemma_clinical``.

Letters: B patients, L observations, F features, H state, P soft tokens, D width of the LLM.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical import __main__ as verbs
from medgemma_clinical.commands import flags
from medgemma_clinical.commands.command_line import (
    CENSORING,
    MIN_CELL,
    SEED,
    SHOW_VALUES,
    Table,
    changed,
    check_quantization,
    check_threshold,
    parse_days,
    parse_encoder,
    parse_hours,
)
from medgemma_clinical.data.competing_events import OUTCOME_KINDS
from medgemma_clinical.data.dka import LABEL, NAMING, Meaning
from medgemma_clinical.data.texts import SERIES_TEXT, TEXT_FEATURES
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.flags import HOURS, POSITIVE, RATE, WHOLE, Flag, names, number
from medgemma_clinical.models import choices
from srtr_dataset import ORGANS, SRTRTrajectoryDataset

# --------------------------------------------------------------------------- flags

STAGE_1_FILE = {"encoder", "time_scale", "solver", "dynamics", "members", "dropout", "facts"}
STAGE_1_FILE |= {"prediction_time"}
"""Flags that the file of a trained stage 1 decides."""

FOLDS, MEMBERS = number(int, 2, 20), number(int, *choices.MEMBERS)
TOKENS, RANK = number(int, *choices.PREFIX_TOKENS), number(int, *choices.LORA_RANK)
SHARE, ON_OFF, REMOVALS = number(float, 0, 0.99), ("on", "off"), ("apart", "together")
BASE, CALIBRATE = "google/medgemma-4b-pt", ("auto", "none", "platt")

# Ways of training (``flags.WAYS``) that do not read a flag, and what a flag needs.
ABLATION = "stage1 folds leave_out dry_run"
PLANNED, VARIED, VARIED_1 = "ablation dry_run", "stage1 ablation", "text ablation"
OWN = "ablation"
OF_FOLDS = "--folds or --leave_out"

# Name, form, default, help, ways that do not read it, needs.
FLAGS: Table = {
    "what to train": (
        Flag("trajectory_only", bool, False, "stage 1: train ODE-RNN only, skip LLM", "ablation"),
        Flag("mode", choices.LLM_STAGES, "classification", "stage 2 or 3", VARIED),
        Flag("folds", FOLDS, None, "predict each patient once, in N folds", f"leave_out {PLANNED}"),
        Flag("leave_out", str, None, "DKA: hold out each site of this column", f"folds {PLANNED}"),
        Flag("only_fold", WHOLE, None, "train this fold alone, from 0", PLANNED, OF_FOLDS),
        Flag("final", bool, False, "after folds: train on all patients", PLANNED, OF_FOLDS),
        Flag("seeds", POSITIVE, None, "repeat, or redraw folds, N times", "leave_out dry_run"),
        Flag("ablation", names, None, "compare variants: all, or these", ABLATION, bare=""),
        Flag("dry_run", bool, help="two steps, time and memory, nothing written"),
        Flag("primary", str, None, "baseline to compare with; the blend that reads most"),
    ),
    "data": (
        Flag("dataset", ("dka", "srtr"), "dka", "kind of data"),
        Flag("organ", tuple(ORGANS), "kidney", "SRTR only"),
        Flag("data_path", Path, Path("dka_training_data.csv"), "path to DKA CSV"),
        Flag("data_dir", Path, None, "path to SRTR data directory"),
        Flag("landmark_days", WHOLE, None, "SRTR: prediction time after listing; 365, liver 90"),
        Flag("horizon_days", parse_days, None, "SRTR: days looked ahead; 365, liver 90"),
        Flag("outcome_kind", OUTCOME_KINDS, None, "label, or time to events; label where it is"),
        Flag("removals", REMOVALS, None, "SRTR times: improved apart from other removals"),
        Flag("horizon_hours", parse_hours, None, "DKA: with times, risks by these hours"),
        Flag("transplant", ("negative", "exclude"), "negative", "SRTR: label 0, or row left out"),
        Flag("label_column", str, LABEL, "DKA: outcome column, 0 or 1"),
        Flag("allow_duplicates", bool, help="DKA: allow equal rows across the split"),
        *(Flag(name, help=text) for name, text in NAMING.items()),
        Flag("site", str, None, "DKA: column of hospitals or units"),
        Flag("series", names, None, "DKA: read these series only"),
        Flag("max_len", POSITIVE, None, "latest observations kept; 20, several series 64, SRTR 50"),
        Flag("series_text", SERIES_TEXT, "all", "series in the prompt", "stage1"),
        Flag("text_context", ("full", "none"), "full", "context in the prompt", "stage1"),
        Flag("text_features", TEXT_FEATURES, "none", "text beside stage 1 and a regression", OWN),
        Flag("text_model", str, None, "encoder of --text_features frozen: hub id or folder"),
        Flag("max_text_tokens", POSITIVE, None, "longer prompts lose the oldest values", "stage1"),
        Flag("max_samples", WHOLE, 10000, "max patients (0 = all)"),
        SHOW_VALUES,
    ),
    "training": (
        Flag("epochs", POSITIVE, 10, "training epochs of stages 2 and 3", "stage1"),
        Flag("trajectory_epochs", POSITIVE, 100, "training epochs of stage 1", "llm"),
        Flag("batch_size", POSITIVE, 16, "patients in one forward pass"),
        Flag("gradient_accumulation", POSITIVE, 1, "passes a step, stages 2 and 3", "stage1"),
        Flag("gradient_checkpointing", bool, False, "less memory, a third more time", "stage1"),
        Flag("patience", POSITIVE, 10, "early stopping patience in epochs"),
        SEED,
        Flag("calibrate", CALIBRATE, "auto", "auto where folds show a need, platt always"),
        Flag("threshold", check_threshold, None, "0.1 or 'sensitivity 0.9'; by Youden's index"),
        Flag("monitor_rule", Path, None, "TOML: when monitor says what", "ablation"),
        CENSORING,
        Flag("encoder_lr", RATE, 1e-3, "learning rate of the ODE-RNN and its head", "text"),
        Flag("head_lr", RATE, 1e-3, "learning rate of stage 2's head", "stage1"),
    ),
    "ODE-RNN": (
        Flag("ode_checkpoint", Path, None, "pretrained ODE-RNN .pt (auto-freezes ODE-RNN)", VARIED),
        Flag("freeze_ode", bool, False, "freeze ODE-RNN without loading checkpoint", VARIED_1),
        Flag("encoder", parse_encoder, None, "your class in place of ClinicalODERNN", VARIED_1),
        Flag("time_scale", HOURS, None, "hours; JSON or 72 (DKA), 8760, liver 2160", "text"),
        Flag("solver", choices.SOLVERS, "rk4", "rk4, or adaptive", "text"),
        Flag("dynamics", choices.DYNAMICS, "ode", "state between observations", VARIED_1),
        Flag("members", MEMBERS, 1, "averaged encoders", "text"),
        Flag("dropout", SHARE, 0.5, "of stage 1 in training", "text"),
        Flag("facts", ON_OFF, "on", "stage 1 reads static features", VARIED_1),
        Flag("prediction_time", ON_OFF, "on", "carry the state to it", "text"),
    ),
    "language model": (
        Flag("model_name", str, BASE, "hub id, folder, or demo", "stage1"),
        Flag("allow_untested_model", bool, False, "take a type that is not tested", "stage1"),
        Flag("quantization", check_quantization, None, "nf4 on CUDA, else none", "stage1"),
        Flag("precision", ("auto", *choices.PRECISIONS), "auto", "bf16 where native", "stage1"),
        Flag("attention", choices.ATTENTIONS, "sdpa", "attention kernels", "stage1"),
        Flag("base_weights", choices.BASE_WEIGHTS, "pretrained", "random: a control", VARIED),
        Flag("soft_prompt", (*ON_OFF, "shuffled"), "on", "shuffled: a control", VARIED),
        Flag("stage1_logit", ON_OFF, "on", "add stage 1's logit to it", f"{VARIED} text"),
        Flag("num_prefix_tokens", TOKENS, 8, "number of soft tokens", "stage1"),
        Flag("projection_lr", RATE, 1e-3, "learning rate of the projection", "stage1"),
        Flag("adapter_lr", RATE, 2e-4, "learning rate of the LoRA adapter", "stage1"),
        Flag("lora_rank", RANK, 8, "LoRA r", "stage1"),
        Flag("lora_alpha", POSITIVE, 16, "LoRA alpha", "stage1"),
        Flag("compile_layers", bool, False, "fuse operations of layers by torch.compile", "stage1"),
        Flag("lora_dropout", SHARE, 0.05, "LoRA dropout", "stage1"),
    ),
    "output": (
        Flag("output_dir", Path, None, "run folder; ./checkpoints_medgemma_{dataset}"),
        Flag("report_patients", bool, help="list the largest errors in report.html"),
        MIN_CELL,
        Flag("log_file", str, "auto", "log path (auto = timestamped, none = disable)"),
        Flag("report_to", choices.TRACKERS, "none", "tracker that receives the metrics"),
        Flag("resume", bool, False, "continue the stopped run of the same command", "dry_run"),
        Flag("deterministic", bool, help="on a GPU: only repeatable kernels"),
        Flag("save_every", WHOLE, 0, "steps after which the state is kept, too"),
    ),
}

if __name__ == "__main__":  # help and wrong flags answer before torch is loaded
    sys.exit(verbs.program(FLAGS))

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import reduce, send_to_device, set_seed
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from dte_encoder import ClinicalODERNN
from medgemma_clinical import distributed
from medgemma_clinical.commands import (
    classifier,
    folds,
    python,
    repeats,
    results,
    run_folder,
    run_log,
    several,
)
from medgemma_clinical.commands.logs import RUN_LOG
from medgemma_clinical.commands.monitoring import rule_config
from medgemma_clinical.data.summaries import summary_names
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.baselines import STAGE_NAMES, fit_baselines, tune_baselines
from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.rules import apply_rules, fit_rules, recommend
from medgemma_clinical.evaluation.target import check_horizons, observed_rows
from medgemma_clinical.inference import trajectory_model
from medgemma_clinical.models import (
    checkpoints,
    decoders,
    encoders,
    language_model,
    text_batches,
    trained_model,
)
from medgemma_clinical.models.checkpoints import Config, TrajectoryCheckpoint
from medgemma_clinical.models.outcome import (
    first_auroc,
    fit_outcome,
    outcome_of,
    weighted,
    with_text,
)
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory import Stage1, TrajectoryCollator, TrajectoryHead
from medgemma_clinical.models.trajectory_llm import LLMClassifier, LLMWriter, SoftPrompt
from medgemma_clinical.training import memory
from medgemma_clinical.training.evaluate import auroc_of, center, score_batches
from medgemma_clinical.training.loaders import part_batches
from medgemma_clinical.training.signals import SIGNALS, Stopped
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import (
    NonFiniteLossError,
    TrainState,
    WeightAverage,
    generators,
    load_training_state,
    read_state,
    set_generators,
    training_state,
    warmup_and_cosine,
    write_state,
)
from medgemma_clinical.training.trackers import Track

__all__ = ["TrajectoryClassifier", "TrajectoryModel", "main"]
__all__ += ["cross_validate", "fit_classification", "fit_generative", "fit_trajectory"]

logger = logging.getLogger("medgemma_trainer")

DATASETS: dict[str, Any] = {"dka": MIMICtrajectoryDataset, "srtr": SRTRTrajectoryDataset}
"""Class of each kind of data, by ``--dataset``."""

WARMUP_STEPS, WARMUP_SHARE = 100, 0.1
"""Warm-up lasts 100 optimizer steps, or a tenth of a shorter run."""

LARGEST_NORM = 1.0
"""Gradients of a larger norm are scaled down to it."""

# --------------------------------------------------------------------------- what is read


def read_dataset(
    args: Namespace,
    source: Path | pd.DataFrame | None = None,
    description: Meaning | None = None,
) -> TrajectoryDataset:
    """Read the data that the flags name, or a given source, with the flags that its kind knows."""
    kind = DATASETS[args.dataset]
    source = getattr(args, kind.source_flag) if source is None else source
    if source is None or (isinstance(source, Path) and not os.path.exists(source)):
        problem = f"--dataset {args.dataset}" if source is None else f"{source}: no such file"
        advice = f"give the data by --{kind.source_flag}, or see sample data by the command demo"
        raise InputError(f"{problem}: {advice}")
    options = flags.dataset_options(vars(args), FLAGS, DATASETS)
    if description is not None:
        if args.dataset != "dka":
            raise InputError(f"description: not for --dataset {args.dataset}: leave it out")
        options["description"] = description
    rows: TrajectoryDataset = kind(source, **options)
    if args.text_features == "frozen":  # once, whatever runs this command makes
        rows = run_folder.with_text_states(args, rows)
    if args.mode == "generative" and not args.trajectory_only and rows.note_problem:
        raise InputError(f"--mode generative: {rows.note_problem}")
    return rows


# --------------------------------------------------------------------------- the models


def build_stage1(config: Config, seed: int = 0) -> Stage1:
    """Encoder and head of each member: series -> states (B, L + 1, 64) -> logit (B,)."""
    inputs, outcome = config["inputs"], outcome_of(config)
    summaries = summary_names(config["features"], prediction_time=inputs["prediction_time"])
    encoder_class = encoders.find_encoder(config.get("encoder_class"), ClinicalODERNN)
    members = []
    for member in range(config["members"]):
        torch.manual_seed(distributed.derived_seed(seed, member))  # no two members start alike
        encoder = encoder_class(**config["encoder"])
        head = TrajectoryHead(
            encoder.hidden_dim,
            summaries=len(summaries),
            static=len(inputs["static"]),
            dropout=encoder.dropout,
            width=outcome.width,
        )
        members.append((encoder, head))
    return Stage1(members, outcome)


def build_llm(
    config: Config,
    stage1: Stage1 | None,
    base: str,
    *,
    device: torch.device,
    revision: str | None = None,
    attention: str = "sdpa",
    adapter: Path | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[LLMClassifier | LLMWriter, Any]:
    """<bos> [P soft tokens] [text] -> LLM in NF4 with LoRA -> head or ``lm_head``; tokenizer.

    Training and loading both build here. ``config`` is the checkpoint's, ``base`` and ``revision``
    locate the base model, ``adapter`` is the folder of a trained one.
    """
    # They take seconds to load, and stage 1 needs none of them.
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import BitsAndBytesConfig

    dtype = language_model.DTYPES[config["precision"]]
    nf4 = BitsAndBytesConfig(  # Source: Dettmers et al. 2023, "QLoRA"
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head"],
    )
    llm, tokenizer = language_model.load_language_model(
        base,
        nf4=nf4 if config["quantization"] == "nf4" else None,
        dtype=dtype,
        device=device,
        revision=revision,
        weights=config["base_weights"],
        attention=attention,
    )
    torch.manual_seed(seed)
    lora = LoraConfig(  # Source: Hu et al. 2021, "LoRA"
        r=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=dropout,
        target_modules=decoders.decoder_of(llm.config.model_type).lora_targets,
        task_type="CAUSAL_LM",
    )
    with language_model.quiet_libraries():
        if adapter is not None:
            llm = PeftModel.from_pretrained(llm, adapter, config=lora)
        elif not checkpoints.is_merged(config):
            llm = get_peft_model(llm, lora)
    width, tokens = llm.config.hidden_size, config["num_prefix_tokens"]  # 2560 in MedGemma-4B
    projection = None
    if stage1 is not None and tokens:  # Linear 64 -> width, as large as the model's own embeddings
        scale = language_model.embedding_rms(llm, tokenizer, config["question"])
        projection = SoftPrompt(stage1.encoder.hidden_dim, width, scale)
    _, no, yes = text_batches.verdict_words(tokenizer)
    options: dict[str, Any] = {
        "tokens": tokens,
        "bos": tokenizer.bos_token_id,
        "verdict": (yes[0], no[0]),
        "adds_stage1": config["stage1_logit"],
        "residual_weight": config["residual_weight"],
    }
    if config["stage"] == "generative":  # lm_head writes the report
        writer = LLMWriter(stage1, projection, llm, **options)
        if not decoders.is_tested(llm.config.model_type):
            writer.check_logits(base)
        return writer, tokenizer
    outcome = outcome_of(config)
    head = nn.Linear(width, outcome.residual_width)
    return LLMClassifier(stage1, projection, llm, head=head, outcome=outcome, **options), tokenizer


BUILDERS = trained_model.Builders(build_stage1, build_llm)


class TrajectoryModel(trajectory_model.TrajectoryModel):  # noqa: D101
    __doc__ = trajectory_model.TrajectoryModel.__doc__
    builders, datasets = BUILDERS, DATASETS


# --------------------------------------------------------------------------- the three stages


def make_stage(args: Namespace, data: Data, checkpoint: TrajectoryCheckpoint | None) -> Stage:
    """Wire the stage that the flags choose; ``checkpoint`` is a trained stage 1, read frozen."""
    set_seed(args.seed)
    stage1 = make_stage1(args, data, checkpoint)  # before minutes go into the language model
    if args.trajectory_only:
        return trajectory_stage(args, data, stage1)
    return llm_stage(args, data, stage1, checkpoint)


def make_stage1(args: Namespace, data: Data, checkpoint: TrajectoryCheckpoint | None) -> Any:
    """Return the stage 1 that learns or is read; None where a language model reads text alone."""
    encoder_class = args.encoder and encoders.register(args.encoder)
    if checkpoint is not None:
        trained_model.check_stage1(checkpoint, data, changed(vars(args), FLAGS, STAGE_1_FILE))
        model = trained_model.rebuild_stage1(checkpoint, BUILDERS).requires_grad_(False)
    elif args.soft_prompt == "off" and not args.trajectory_only:
        return None
    else:
        data.check_inputs()
        encoder = {
            "input_dim": len(data.dataset.features),
            "time_scale": data.time_scale(args.time_scale),
            "dropout": args.dropout,
        }
        if not encoder_class:
            encoder |= {"hidden_dim": 64, "solver": args.solver, "dynamics": args.dynamics}
        config: Config = {
            "encoder": encoder,
            "encoder_class": encoder_class,
            "members": args.members,
            **checkpoints.describe_data(data),
            **cast(Config, fit_outcome(data).config),
        }
        model = build_stage1(config, args.seed)
        model.fit_scales(data)
        for member in model.members:
            member.encoder.requires_grad_(not args.freeze_ode)
    model.check_gaps(data.dataset)
    return model


def trajectory_stage(args: Namespace, data: Data, model: Stage1) -> Stage:
    """Stage 1: encoder and head learn, no language model."""
    patients, collate = data.training_patients(), TrajectoryCollator(model, data.dataset)

    def save(folder: Path, config: Config) -> None:
        path = folder.parent / checkpoints.TRAJECTORY_FILE
        checkpoints.save_trajectory(path, model.state_dict(), config, patients)

    return Stage(
        name="trajectory",
        model=model,
        learning_rates={"members": args.encoder_lr},
        batches=part_batches(data.split, args.batch_size),
        collate=collate,
        batch_size=args.batch_size,
        lengths=data.dataset.lengths,
        epochs=args.trajectory_epochs,
        patience=args.patience,
        config={
            "stage": "trajectory",
            **checkpoints.stage1_config(model),
            **checkpoints.describe_data(data),
            **rule_config(args.monitor_rule),
        },
        save=save,
        begin_epoch=collate.begin_epoch,
        finish=lambda: center(model, data, collate, args.batch_size),
        auroc=auroc_of(data.dataset, model.outcome),
        train_patients=patients,
    )


def llm_config(args: Namespace, data: Data, stage1: Stage1 | None, tokens: int) -> Config:
    """Return the config of stage 2 or 3's checkpoint; ``tokens`` is P."""
    text_only: Config = {"encoder": None, "members": 0, **cast(Config, fit_outcome(data).config)}
    text_only["inputs"] = {**data.description()["inputs"], "static": [], "prediction_time": False}
    return {
        "stage": args.mode,
        "base_weights": args.base_weights,
        "quantization": args.quantization,
        "precision": args.precision,
        "lora_rank": args.lora_rank,
        "lora_alpha": args.lora_alpha,
        "max_text_tokens": args.max_text_tokens,
        **cast(Config, language_model.base_record(args.model_name)),
        "base_type": language_model.base_type(args.model_name),
        "num_prefix_tokens": tokens,
        "shuffled": args.soft_prompt == "shuffled",
        "stage1_logit": args.stage1_logit == "on" and stage1 is not None,
        "residual_weight": 1.0,
        "prompts": asdict(data.prompts),
        **checkpoints.describe_data(data),
        **rule_config(args.monitor_rule),
        **(text_only if stage1 is None else checkpoints.stage1_config(stage1)),
    }


def text_collator(args: Namespace, data: Data, tokenizer: Any) -> TextCollator:
    """Return what makes batches of prompts, in stage 3 with the reports to learn."""
    return TextCollator(
        data.dataset,
        tokenizer,
        data.prompts,
        answers=args.mode == "generative",
        max_tokens=args.max_text_tokens,
    )


def llm_stage(
    args: Namespace, data: Data, stage1: Any, checkpoint: TrajectoryCheckpoint | None
) -> Stage:
    """Stages 2 and 3: LoRA, projection and stage 2's head learn; stage 1 too if not frozen."""
    dataset, device = data.dataset, distributed.default_device()
    decoders.check_tested(args.model_name, allow_untested=args.allow_untested_model)
    donors = None
    if args.soft_prompt == "shuffled":  # refuses too few patients before the model is loaded
        donors = text_batches.other_patients(data.split, dataset.groups, args.seed)
    tokens = 0 if args.soft_prompt == "off" else args.num_prefix_tokens
    soft = text_batches.soft_tokens(dataset, tokens)
    config = llm_config(args, data, stage1, int(soft.max()))
    model: Any
    model, tokenizer = build_llm(
        config,
        stage1,
        args.model_name,
        device=device,
        attention=args.attention,
        dropout=args.lora_dropout,
        seed=args.seed,
    )
    text = text_collator(args, data, tokenizer)
    text.donors = donors
    risks: dict[str, Any] = {}
    if checkpoint is not None:
        text.encode(stage1, model.tokens, device)  # frozen: once for the whole run
        risks = trained_model.stage1_risks(checkpoint, text)
    if args.gradient_checkpointing:
        language_model.set_checkpointing(model.llm)
    if args.compile_layers:
        language_model.compile_layers(model.llm)
    if args.mode == "generative":
        config["report_tokens"] = text.report_tokens()
    else:
        model.start_at(dataset.targets()[data.split["train"]])
    rates = {
        "stage1": args.encoder_lr,
        "projection": args.projection_lr,
        "llm": args.adapter_lr,
        "head": args.head_lr,
    }
    # Grouped by text alone: soft tokens count observations, so batches would differ in risk.
    words = text.lengths()
    return Stage(
        name=args.mode,
        model=model,
        learning_rates={name: rates[name] for name, _ in model.named_children()},
        batches=part_batches(data.split, args.batch_size, args.gradient_accumulation, words),
        collate=text,
        batch_size=args.batch_size,
        lengths=1 + soft + words,  # at most: not every model has a <bos>
        epochs=args.epochs,
        patience=args.patience,
        config=config,
        save=lambda folder, config: checkpoints.save_llm(folder / "best", model, config),
        text=text,
        stage1_risks=risks,
        recomputes=args.gradient_checkpointing,
        auroc=auroc_of(dataset, model.outcome),
    )


# --------------------------------------------------------------------------- the one loop


def set_up(stage: Stage) -> TrainState:
    """Return the state before the first step: AdamW, warm-up and cosine, average of the weights."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    model = stage.model.to(distributed.default_device())
    if accelerator.num_processes > 1:  # DistributedDataParallel; dropout is each process's own
        model = accelerator.prepare_model(model)
        torch.manual_seed(distributed.derived_seed(torch.initial_seed(), accelerator.process_index))
    parameters = list(stage.trainable_parameters().values())
    optimizer = AdamW(stage.parameter_groups(), fused=True)
    # A --final, which ends at the last of ``final_epochs``, keeps the schedule of its folds.
    total = stage.epochs * len(stage.batches["train"])
    warmup = max(1, min(WARMUP_STEPS, round(WARMUP_SHARE * total)))
    schedule = warmup_and_cosine(optimizer, warmup, total)
    average, members = WeightAverage(parameters), stage.members()
    return TrainState(accelerator, model, parameters, members, optimizer, schedule, average)


def fit(
    stage: Stage,
    seed: int,
    folder: Path | None = None,
    track: Track | None = None,
    *,
    resume: dict[str, Any] | None = None,
    save_every: int = 0,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
) -> TrainState:
    """Train with early stopping; leave the model with the mean weights of its good epochs.

    ``resume`` is the state of a stopped run. In a folder, the state is written before the first
    step, before each validation, at the end, every ``save_every`` steps and on a signal. Processes
    share each step; the first one writes. ``on_epoch`` gets the metrics of each epoch, and ends
    the training by a true value.
    """
    state = set_up(stage)
    progress, batches = state.progress, stage.batches["train"]
    state.folder = run_folder.state_folder(folder) if folder else None
    if resume is not None:
        load_training_state(stage, state, resume)
        resume.clear()  # a copy on the host, which the caller holds until the training ends
        save_best(stage, state, folder)
        run_folder.write_history(folder, progress.history)
    else:
        save_state(stage, state)
    epochs = max(stage.final_epochs or [stage.epochs])
    bar = distributed.show_progress((), stage.name, epochs * len(batches), progress.steps)
    while not progress.over:
        epoch = progress.epoch + 1
        bar.set_description_str(f"{stage.name}, epoch {epoch}/{epochs}", refresh=False)
        with SIGNALS.deferred():
            train_epoch(stage, state, seed, save_every, bar)
            save_state(stage, state)
        predictions = validate(stage, state) if len(stage.batches["val"].rows) else None
        # Keep the epochs whose validation loss is within ``LOSS_TOLERANCE`` of the lowest, and stop
        # where no member has reached a lower one for long.
        losses = None if predictions is None else predictions.losses
        if state.keep_good(losses, stage.patience, stage.final_epochs):
            save_best(stage, state, folder)
        lowest_epoch = max(progress.lowest_epochs) if progress.losses else epoch
        exhausted = bool(epoch - lowest_epoch >= stage.patience)
        state.add_elapsed()
        run_log.record_epoch(stage, progress, predictions, folder, track, exhausted=exhausted)
        if predictions is not None:
            bar.set_postfix_str(f"val loss {predictions.loss:.3f}", refresh=False)
        stopped = on_epoch is not None and bool(on_epoch({**progress.history[-1]}))
        progress.over = exhausted or stopped or epoch == epochs
        progress.next_epoch()
        if progress.over:
            save_state(stage, state)
    bar.close()
    state.set_best(lambda: score(stage, "val").losses)
    stage.finish()
    run_log.record_average(progress, folder)
    if folder and distributed.processes().is_main_process:
        stage.save(folder, stage.config)
    return state


def train_epoch(stage: Stage, state: TrainState, seed: int, save_every: int, bar: Any) -> None:
    """Take the steps of an epoch: all of them, or what a stopped run has left."""
    progress, batches = state.progress, stage.batches["train"]
    epoch = progress.epoch + 1
    batches.set_epoch(seed, epoch, progress.batches)
    stage.begin_epoch(seed, epoch, state.learning(stage.patience))
    stage.model.train()
    state.optimizer.zero_grad()
    for done, rows in enumerate(batches):
        begun = time.perf_counter()
        with saved_on_fault(stage, state):
            loss, terms = backward(stage, state, rows)
        stop = step(state, loss, terms)
        bar.update()
        if (epoch, done) == (1, 1):  # the first step warms up
            run_log.log_epoch_time(stage, time.perf_counter() - begun, rows)
        if stop or (save_every and progress.steps % save_every == 0):
            save_state(stage, state)
        if stop:
            raise Stopped(SIGNALS.received or signal.SIGTERM)


def backward(stage: Stage, state: TrainState, rows: list[int]) -> tuple[Tensor, int]:
    """Add up gradients, loss and terms of a step over its passes.

    The loss that a model returns is the sum of its cross-entropies, of each member of stage 1, and
    ``terms`` is their number, so passes of any size add up. ``check_memory`` has sized them.
    """
    accelerator, losses, terms = state.accelerator, [], 0
    passes = stage.passes(rows)
    for part in passes:
        is_last = part is passes[-1]  # processes exchange gradients in the last one
        exchange = contextlib.nullcontext() if is_last else accelerator.no_sync(state.model)
        with exchange, memory.advised():
            output = state.model(send_to_device(stage.collate(part), accelerator.device))
            output.loss.sum().backward()
        losses.append(output.loss.detach().mean())
        terms += output.terms
        del output  # and what its graph holds, before the next pass
    return torch.stack(losses).sum(), terms


def step(state: TrainState, loss: Tensor, terms: int) -> bool:
    """Move the weights by the mean gradient, or skip the step where numbers are not finite.

    The gradients are those of the sum of losses. Return whether a signal has come to any process.
    """
    counts = loss.new_tensor([terms, float(SIGNALS.received > 0)])
    total = reduce(torch.cat([loss.view(1), counts]).double(), "sum")
    for parameter in state.parameters:
        if parameter.grad is not None:  # to the mean over all terms, as of one large batch
            parameter.grad.mul_(state.accelerator.num_processes / total[1])
    norms = [clip_grad_norm_(group, LARGEST_NORM) for group in state.by_member()]
    norm = torch.stack(norms).max()
    all_loss, all_terms, stop, size = torch.cat([total, norm.double().view(1)]).tolist()
    if state.progress.count(all_loss, all_terms, size):
        state.optimizer.step()
        state.schedule.step()
    state.optimizer.zero_grad()
    state.average.update(state.progress.steps)
    return bool(stop)


def score(stage: Stage, part: str) -> Predictions:
    """Return the predictions of a part by the current weights."""
    batches = stage.batches[part]
    bar = distributed.show_progress(batches, f"{stage.name}: {results.SCORED[part]}", len(batches))
    return score_batches(stage.model, bar, stage.collate)


def validate(stage: Stage, state: TrainState) -> Predictions:
    """Score the validation part with the averaged weights."""
    with state.swapped_weights(state.average.weights):
        predictions = score(stage, "val")
    if not math.isfinite(predictions.loss):  # no epoch can be chosen by it
        epoch = state.progress.epoch + 1
        raise NonFiniteLossError(f"the validation loss is {predictions.loss} in epoch {epoch}")
    return predictions


# --------------------------------------------------------------------------- decisions


def decide(
    stage: Stage,
    data: Data,
    val: Predictions,
    options: decision.EvaluationOptions,
    *,
    with_baselines: bool,
) -> results.Decided:
    """Choose what is chosen after training, by the validation part alone.

    These are the weight of a language model beside stage 1, recalibration and threshold of each
    model, and the recommended one.
    """
    outcome, name, dataset = outcome_of(stage.config), STAGE_NAMES[stage.name], data.dataset
    of_rule, seed = options.decision(), options.seed
    observed, targets = observed_rows(outcome.targets, dataset, val.rows, options.censoring, seed)
    text = results.tuned_text(stage, data)
    adds_text = text is not None and stage.name == "trajectory"
    if text is not None and adds_text:
        fitted = results.fitted_text(stage, data, text, data.split["train"])
        val = with_text(outcome, val, fitted.numbers(dataset, val.rows))
    weight, losses = None, partial(outcome.row_losses, dataset.targets()[val.rows])
    if adds_text:
        weight = decision.fit_text_weight(val.offset, val.outputs, losses)
    elif stage.config.get("stage1_logit"):
        weight = decision.fit_residual_weight(
            val.offset,
            val.outputs,
            observed["patient"].to_numpy(str),
            losses,
            partial(first_auroc, outcome, observed),
        )
    val = weighted(val, weight)
    table = results.risk_table(stage, val, observed, {})
    rules = fit_rules(table, [name], targets, of_rule)
    decided = results.Decided(weight, rules, targets, text)
    results.log_decisions(decided, of_rule, observed)
    # All processes have decided this; the first one writes the rest.
    if not len(data.split["test"]) or not distributed.processes().is_main_process:
        return decided
    settings, forecasts = None, {}
    if with_baselines:  # here they have learned from the training part alone
        train = data.split["train"]
        with distributed.few_threads():
            fits = outcome.fits(dataset, train)
            settings = tune_baselines(dataset, train, data.usable_static, fits, text=text)
            baselines = fit_baselines(dataset, train, settings, fits)
            forecasts = baselines.forecasts(dataset, val.rows)
    table = results.risk_table(stage, val, observed, forecasts)
    models = [model for model in targets[0].models(table) if model not in STAGE_NAMES.values()]
    rules |= fit_rules(table, models, targets, of_rule)
    table = apply_rules(table, rules, targets)
    metrics = evaluate(table, seed, decided.thresholds, primary=options.primary, targets=targets)
    best = recommend(table, metrics, targets, name, models)
    return results.Decided(weight, rules, targets, text, settings, table, metrics, best)


# --------------------------------------------------------------------------- training state


def save_best(stage: Stage, state: TrainState, folder: Path | None) -> None:
    """Write the mean weights of the good epochs, if there are any."""
    if folder and state.epochs and distributed.processes().is_main_process:
        with state.swapped_weights(state.mean_weights()):
            stage.save(folder, stage.config)


def save_state(stage: Stage, state: TrainState) -> None:
    """Write the state of training; each process brings its share, the first one writes."""
    if state.folder is not None:
        state.add_elapsed()
        content = training_state(stage, state)
        if distributed.processes().is_main_process:
            write_state(state.folder, content)


@contextlib.contextmanager
def saved_on_fault(stage: Stage, state: TrainState) -> Iterator[None]:
    """Keep the steps before one for which memory is lacking; of several processes one may fail."""
    before = generators()
    try:
        yield
    except RunFault:
        if state.accelerator.num_processes == 1:
            set_generators(before)
            save_state(stage, state)
        raise


# --------------------------------------------------------------------------- one run


def train(args: Namespace, dataset: TrajectoryDataset | None = None) -> int:
    """Run one stage from the user's data to its results, or resume it; return the exit code."""
    RUN_LOG.begin()
    folder, log_file = run_folder.stage_folder(args), "none" if args.dry_run else args.log_file
    run_log.check_output(folder, log_file, args.report_to)
    dataset = read_dataset(args) if dataset is None else dataset
    checkpoint = run_folder.given_stage1(args)
    return run_folder.interruptible(folder, lambda: train_stage(args, dataset, checkpoint))


def train_stage(
    args: Namespace,
    dataset: TrajectoryDataset,
    checkpoint: TrajectoryCheckpoint | None,
    trial: python.Trial = python.WHOLE_RUN,
) -> TrajectoryModel | None:
    """Train one stage in its folder, or in memory; None after a dry run or a finished one."""
    data = run_folder.run_data(args, dataset, checkpoint)
    results.check_primary(args.primary, data)
    run_record = run_folder.run_record(args, data, checkpoint)
    folder = run_folder.stage_folder(args)
    if args.resume and run_folder.is_finished(folder, run_record):
        return None
    with distributed.few_threads(stage1=args.trajectory_only):
        stage = make_stage(args, data, checkpoint)
        if args.final:
            stage = folds.with_final_epochs(stage, run_folder.folds_folder(args))
        stopped = read_state(run_folder.state_folder(folder)) if args.resume else None
        if stopped is not None:
            memory.restore_passes(stage, stopped["passes"])
        check_horizons(data.dataset)
        run_log.log_run_summary(stage, data, args.seed, facts=args.facts == "on")
        memory.check_memory(stage, distributed.default_device())
        if args.dry_run:
            dry_run(stage, args.seed)
            return None
        with run_folder.opened(
            folder,
            run_record,
            resume=args.resume,
            log_file=args.log_file,
            report_to=args.report_to,
        ) as track:
            state = fit(
                stage,
                args.seed,
                folder,
                track,
                resume=stopped,
                save_every=args.save_every,
                on_epoch=trial.on_epoch,
            )
            if args.final:  # trained on all patients: nothing is held out
                joint = run_folder.folds_folder(args)
                config, baselines, text = folds.write_final(stage, data, folder, joint)
            else:
                val = score(stage, "val")
                options, progress = decision.EvaluationOptions.of(args), state.progress
                decided = decide(stage, data, val, options, with_baselines=trial.baselines)
                # The only place where test patients are scored.
                is_tested = trial.test and len(data.split["test"])
                test = score(stage, "test") if is_tested else None
                result = results.evaluate_run(stage, data, decided, test, progress, options)
                results.write(folder, stage, data, result, progress, run_record)
                config, baselines, text = result.config, result.baselines, result.text
            track(results.metrics_for_tracker(config), state.progress.steps)
            run_folder.finish_run(folder, stage.tokens, config.get("best_model"))
    model: Any = stage.model.eval()
    tokenizer, hashes = stage.text and stage.text.tokenizer, stage.train_patients
    return TrajectoryModel(
        trained_model.TrainedModel(
            model, config, tokenizer, hashes, baselines, text, args.text_model or ""
        )
    )


def dry_run(stage: Stage, seed: int) -> None:
    """Take two steps on the longest rows and measure them; write nothing."""
    state, batches = set_up(stage), stage.batches["train"]
    longest = memory.longest_rows(stage, "train", 2 * batches.batch_size)
    stage.begin_epoch(seed, 1, state.learning(stage.patience))
    stage.model.train()
    for k in (0, 1):  # each process takes its share of them
        rows = longest[k::2][batches.process :: batches.n_processes]
        step(state, *backward(stage, state, rows))
    state.add_elapsed()
    run_log.log_dry_run(stage, state.progress, longest)


def run(args: Namespace) -> int:
    """Train what the flags choose; return the exit code."""
    set_defaults(args)
    with SIGNALS.installed(), distributed.computing(deterministic=args.deterministic):
        if args.compile_layers:
            language_model.check_compiler()
        if args.folds and args.seeds:
            return repeats.run_repeats(args, read_dataset, train)
        if args.seeds:
            return several.run_seeds(args, read_dataset, train)
        if args.folds or args.leave_out:
            return folds.run_folds(args, read_dataset, train)
        if args.ablation is not None:
            return several.run_ablation(args, read_dataset(args), train)
        return train(args)


def set_defaults(args: Namespace) -> None:
    """Set the flags that depend on the machine or on other flags."""
    if args.output_dir is None:
        args.output_dir = Path(f"./checkpoints_medgemma_{args.dataset}")
    args.quantization, args.precision = language_model.machine_defaults(
        args.model_name, args.base_weights, args.quantization, args.precision
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0 done, 2 wrong input, 3 a fault, 128 + N ended by signal N."""
    return verbs.main(sys.argv[1:] if argv is None else argv, FLAGS)


# The functions of Python, and scikit-learn's estimator on them.
PYTHON = python.Training(TrajectoryModel, FLAGS, read_dataset, train_stage, train)
fit_trajectory = PYTHON.with_flags(PYTHON.fit_trajectory, "stage1")
fit_classification = PYTHON.with_flags(PYTHON.fit_classification, "llm")
fit_generative = PYTHON.with_flags(PYTHON.fit_generative, "llm")
cross_validate = PYTHON.cross_validate


class TrajectoryClassifier(classifier.TrajectoryClassifier):  # noqa: D101
    __doc__ = classifier.TrajectoryClassifier.__doc__
    training = PYTHON
