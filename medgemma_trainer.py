"""Fine-tune MedGemma on irregular clinical series: encoder, soft prompt, LoRA, three stages.

    python medgemma_trainer.py --demo      # all three on sample data, minutes on a laptop CPU

    python medgemma_trainer.py --trajectory_only --dataset dka --data_path FILE.csv
    python medgemma_trainer.py --mode classification --dataset dka --data_path FILE.csv \\
        --ode_checkpoint ./checkpoints_medgemma_dka/medgemma_trajectory_best.pt  # or generative
    python medgemma_trainer.py --predict --checkpoint ./checkpoints_medgemma_dka/classification \\
        --data_path NEW.csv --predictions OUT.csv

Data flow: series -> ClinicalODERNN -> a state after each of L observations and one at the
prediction time; then

    stage 1  trajectory       heads of states and of summaries -> logit
    stage 2  classification   <bos> [soft tokens] [text] -> LLM -> last position -> head -> logit
    stage 3  generative       <bos> [soft tokens] [text] [report] -> LLM -> lm_head on the report

Stages 2 and 3 add stage 1's logit to their own, stage 3 to that of its verdict, "yes" or "no". The
loss is the cross-entropy of the label in stages 1 and 2, of the report's tokens in stage 3.

This file holds, in this order: flags; what is read; the models; the three stages; the training
loop; what a training state holds; one run; ``main``. The rest is in ``medgemma_clinical``.

Letters: B patients, L observations, F features, H state, P soft tokens, D width of the LLM.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

# First of all: the package sets what libraries read as they load.
from medgemma_clinical.files import InputError

# A harmless import warning: a kernel that speeds up 4-bit inference on a CPU is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce, send_to_device, set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import BitsAndBytesConfig, get_cosine_schedule_with_warmup

from dataset_format import HOURS, MIMICtrajectoryDataset
from dte_encoder import DYNAMICS, SOLVERS, ClinicalODERNN
from medgemma_clinical import distributed
from medgemma_clinical.commands import (
    command_line,
    compare,
    flags,
    folds,
    pool,
    python,
    repeats,
    results,
    run_folder,
    run_log,
    several,
)
from medgemma_clinical.commands.classifier import TrajectoryClassifier
from medgemma_clinical.commands.command_line import POSITIVE, RATE, WHOLE, Parser, names, number
from medgemma_clinical.commands.demo import run_demo
from medgemma_clinical.commands.logs import RUN_LOG, command_logging
from medgemma_clinical.commands.monitor import rule_config, run_monitor
from medgemma_clinical.commands.predict import predict
from medgemma_clinical.commands.python import (
    cross_validate,
    fit_classification,
    fit_generative,
    fit_trajectory,
)
from medgemma_clinical.data.competing_events import OUTCOME_KINDS
from medgemma_clinical.data.dka import LABEL, NAMING
from medgemma_clinical.data.summaries import summary_names
from medgemma_clinical.data.texts import SERIES_TEXT
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.decision import Predictions
from medgemma_clinical.evaluation.monitoring import PERIODS
from medgemma_clinical.evaluation.time_table import check_horizons
from medgemma_clinical.inference.serving import export_merged
from medgemma_clinical.inference.trajectory_model import Program, TrajectoryModel
from medgemma_clinical.models import (
    checkpoints,
    decoders,
    encoders,
    language_model,
    text_batches,
    trained_model,
)
from medgemma_clinical.models.checkpoints import Config, TrajectoryCheckpoint, describe_data
from medgemma_clinical.models.outcome import fit_outcome, outcome_of
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory import (
    Stage1,
    TrajectoryCollator,
    TrajectoryHead,
)
from medgemma_clinical.models.trajectory_llm import LLMClassifier, LLMWriter, SoftPrompt
from medgemma_clinical.training import memory
from medgemma_clinical.training.evaluate import score_batches
from medgemma_clinical.training.loaders import part_batches
from medgemma_clinical.training.signals import SIGNALS, Stopped
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import (
    TrainState,
    WeightAverage,
    read_state,
    write_state,
)
from medgemma_clinical.training.trackers import TRACKERS, Track
from srtr_dataset import ORGANS, SRTRTrajectoryDataset

__all__ = ["TrajectoryClassifier", "TrajectoryModel", "main"]
__all__ += ["cross_validate", "fit_classification", "fit_generative", "fit_trajectory"]

logger = logging.getLogger("medgemma_trainer")

DATASETS: dict[str, Any] = {"dka": MIMICtrajectoryDataset, "srtr": SRTRTrajectoryDataset}
"""Class of each kind of data, by ``--dataset``."""

WARMUP_STEPS, WARMUP_SHARE = 100, 0.1
"""Warm-up lasts 100 optimizer steps, or a tenth of a shorter run."""

LARGEST_NORM = 1.0
"""Gradients of a larger norm are scaled down to it."""

# --------------------------------------------------------------------------- flags


def build_parser() -> Parser:
    """Return the parser: every flag, with its default and its tags (``flags.TAGS``), is here."""
    parser = Parser("medgemma_trainer.py", formatter_class=command_line.Help, allow_abbrev=False)
    parser.description = (__doc__ or "").partition("\n")[0]
    parser.add_argument("--version", action="version", version=command_line.VERSION)
    on_off, llm = ("on", "off"), language_model

    group = parser.add_argument_group("what to do")
    add, switch = flags.adders(group, "leave_out folds dry_run")
    switch("--trajectory_only", "stage 1: train ODE-RNN only, skip LLM", "stage1")
    options: dict[str, Any] = {"choices": checkpoints.LLM_STAGES, "default": "classification"}
    add("--mode", "stage 2 or 3", "llm text", **options)
    add, switch = flags.adders(group, "demo")
    switch("--demo", "all three stages on sample data with a small model")
    switch("--open", "with --demo: open the first report in a browser", "free")
    add, switch = flags.adders(group, "ablation free")
    switch("--ablation", "train and compare variants that lack a part each")
    add("--arms", "with --ablation: these variants only", type=names, metavar="NAME,NAME")
    add("--reference", "--ablation: reference model", default="stage 1", metavar="NAME")
    add, switch = flags.adders(group, "compare")
    add("--compare", "compare stage folders, paired", type=Path, nargs="+", metavar="RUN")
    add, switch = flags.adders(group, "pool")
    options = {"type": Path, "nargs": "+", "metavar": "SITE.json", "needs": "--output_dir"}
    add("--pool", "pool what sites wrote by --aggregate", **options)
    add, switch = flags.adders(group, "stage1 llm text free")
    options = {"type": POSITIVE, "metavar": "N"}
    add(
        "--seeds",
        "repeat, or redraw the folds, with N seeds; pool the results",
        "ablation folds",
        **options,
    )
    add, switch = flags.adders(group, "stage1 llm text cross_validate")
    options = {"type": number(int, 2, 20), "metavar": "K"}
    add("--folds", "K-fold cross-validation, each patient predicted once", "folds free", **options)
    options = {"metavar": "COLUMN"}
    add("--leave_out", "DKA: hold out each site of a column in turn", "leave_out free", **options)
    needs = "--folds or --leave_out"
    options = {"type": WHOLE, "metavar": "K", "needs": needs}
    tags = "-cross_validate folds leave_out"
    add("--only_fold", "train fold K alone, from 0; then join them", tags, **options)
    switch("--final", "after the folds: train on all patients", "leave_out folds", needs=needs)
    add, switch = flags.adders(group, f"{flags.TRAINING} predict compare keyword")
    add("--primary", "baseline to compare with; the blend that reads most", metavar="NAME")
    add, switch = flags.adders(group, "predict")
    needs = "--checkpoint, --predictions, --data_path or --data_dir"
    switch("--predict", "score new rows with a trained model", needs=needs)
    add, switch = flags.adders(group, "export")
    needs = "--checkpoint, --export_dir"
    text = "write a copy to share, or stage 2 or 3 with LoRA merged"
    add("--export", text, choices=("shared", "merged"), needs=needs)
    add("--export_dir", "with --export: folder to write", type=Path)
    add, switch = flags.adders(group, "predict")
    add(
        "--checkpoint",
        "model to use: a stage folder, or stage 1's .pt",
        "export monitor",
        type=Path,
    )
    add("--predictions", "with --predict: CSV to write", type=Path)
    add("--curves", "times: CSV of cumulative incidences to write", "free", type=Path)
    add("--use", command_line.USE, "free default monitor", default="stage", metavar="NAME")
    add("--update", "with --predict: write a recalibrated model", "free", type=Path, metavar="DIR")
    options = {"type": Path, "metavar": "JSON"}
    add("--aggregate", "with --predict: write what sites can pool", "free", **options)
    switch("--strict", "with --predict: refuse rows it cannot score")
    switch("--explain", "with --predict: page of single patients", "free")
    options = {"type": names, "metavar": "ID,ID", "needs": "--explain"}
    add("--patients", "with --explain: only these rows", "free", **options)

    add, switch = flags.adders(group, "monitor")
    needs = "--checkpoint, --outcomes, --date, --output_dir"
    options = {"type": Path, "nargs": "+", "metavar": "CSV", "needs": needs}
    add("--monitor", "judge predictions by their outcomes", **options)
    add("--outcomes", "with --monitor: CSV of id, label and a date", type=Path)
    add("--date", "with --monitor: column of the date", metavar="COLUMN")
    options = {"choices": tuple(PERIODS), "default": "month"}
    add("--period", "with --monitor: what is judged together", **options)

    group = parser.add_argument_group("data")
    add, switch = flags.adders(group, f"{flags.TRAINING} keyword")
    add("--dataset", "kind of data", "predict", choices=tuple(DATASETS), default="dka")
    add("--organ", "SRTR only", "predict", choices=tuple(ORGANS), default="kidney")
    path = Path("dka_training_data.csv")
    add("--data_path", "path to DKA CSV", "predict free -keyword", type=Path, default=path)
    add("--data_dir", "path to SRTR data directory", "predict free -keyword", type=Path)
    add("--landmark_days", "SRTR: prediction time after listing; 365, liver 90", type=WHOLE)
    options = {"type": command_line.parse_days, "metavar": "DAYS,DAYS"}
    add("--horizon_days", "SRTR: days looked ahead; 365, liver 90", **options)
    options = {"choices": OUTCOME_KINDS}
    add("--outcome_kind", "a label, or time to events; label where there is one", **options)
    removals = ("apart", "together")
    add("--removals", "SRTR times: improved apart from other removals", choices=removals)
    options = {"type": command_line.parse_hours, "metavar": "HOURS,HOURS"}
    add("--horizon_hours", "DKA: with times, risks by these hours", **options)
    labels = ("negative", "exclude")
    add("--transplant", "SRTR: label 0, or row left out", choices=labels, default="negative")
    add("--label_column", "DKA: outcome column, 0 or 1", default=LABEL, metavar="NAME")
    switch("--allow_duplicates", "DKA: allow equal rows across the split", "free")
    for name, text in NAMING.items():
        add(f"--{name}", text)
    add("--site", "DKA: column of hospitals or units", "predict monitor free", metavar="COLUMN")
    add("--series", "DKA: read these series only", type=names, metavar="NAME,NAME")
    add("--max_len", "latest observations kept; 20, several series 64, SRTR 50", type=POSITIVE)
    add("--series_text", "series in the prompt", "-stage1", choices=SERIES_TEXT, default="all")
    context = ("full", "none")
    add("--text_context", "context in the prompt", "-stage1", choices=context, default="full")
    options = {"type": POSITIVE}
    add("--max_text_tokens", "longer prompts lose their oldest values", "-stage1", **options)
    add("--max_samples", "max patients (0 = all)", type=WHOLE, default=10000)
    switch("--show_values", command_line.SHOW_VALUES, "predict export monitor free -keyword")

    group = parser.add_argument_group("training")
    add, switch = flags.adders(group, f"{flags.TRAINING} keyword")
    add("--epochs", "training epochs of stages 2 and 3", "-stage1", type=POSITIVE, default=10)
    add("--trajectory_epochs", "training epochs of stage 1", "-llm", type=POSITIVE, default=100)
    add("--batch_size", "patients in one forward pass", "predict free", type=POSITIVE, default=16)
    options = {"type": POSITIVE, "default": 1}
    add("--gradient_accumulation", "passes a step, stages 2 and 3", "-stage1 free", **options)
    switch("--gradient_checkpointing", "less memory, a third more time", "-stage1 free")
    add("--patience", "early stopping patience in epochs", type=POSITIVE, default=10)
    options = {"type": number(int, 0, 2**32 - 1), "default": 0}
    add("--seed", "of split, weights, bootstrap", "predict compare monitor demo default", **options)
    options = {"choices": ("auto", "none", "platt"), "default": "auto"}
    add("--calibrate", "recalibrate: auto where folds show a need, platt always", **options)
    options = {"type": flags.check_threshold, "metavar": "RISK"}
    add("--threshold", "0.1 or 'sensitivity 0.9'; by Youden's index", "predict monitor", **options)
    add("--monitor_rule", "TOML: when --monitor says what", "-ablation", type=Path)
    options = {"choices": ("km", "regression"), "default": "km"}
    add(
        "--censoring",
        "times: weights by Kaplan-Meier or the inputs",
        "predict default",
        **options,
    )
    options = {"type": RATE, "default": 1e-3}
    add("--encoder_lr", "learning rate of the ODE-RNN and its head", "-text", **options)
    add("--head_lr", "learning rate of stage 2's head", "-stage1", type=RATE, default=1e-3)

    group = parser.add_argument_group("ODE-RNN")
    add, switch = flags.adders(group, f"{flags.TRAINING} -ablation")
    tags = "-stage1 free cross_validate"
    add("--ode_checkpoint", "pretrained ODE-RNN .pt (auto-freezes ODE-RNN)", tags, type=Path)
    switch("--freeze_ode", "freeze ODE-RNN without loading checkpoint", "-text keyword")
    add, switch = flags.adders(group, f"{flags.TRAINING} -text keyword stage1_file")
    tags, options = "-ablation predict export", {"type": flags.parse_encoder}
    options |= {"metavar": "PACKAGE.MODULE:CLASS"}
    add("--encoder", "your own class in place of ClinicalODERNN", tags, **options)
    add("--time_scale", "hours; JSON or 72 (DKA), 8760 (kidney), 2160 (liver)", type=HOURS)
    add("--solver", "rk4, or adaptive", choices=SOLVERS, default="rk4")
    add("--dynamics", "state between observations", "-ablation", choices=DYNAMICS, default="ode")
    members = number(int, *checkpoints.MEMBERS)
    add("--members", "averaged encoders", type=members, default=1)
    add("--dropout", "of stage 1 in training", type=number(float, 0, 0.99), default=0.5)
    add("--facts", "stage 1 reads static features", "-ablation", choices=on_off, default="on")
    add("--prediction_time", "carry the state to it", choices=on_off, default="on")

    group = parser.add_argument_group("language model")
    add, switch = flags.adders(group, f"{flags.TRAINING} -stage1 keyword")
    base = "google/medgemma-4b-pt"
    add("--model_name", "hub id, folder, or demo", "predict export", default=base)
    switch("--allow_untested_model", "take a type of model that is not tested", "free")
    options = {"type": flags.check_quantization, "choices": llm.QUANTIZATIONS}
    add("--quantization", "nf4 on CUDA, else none", "predict", **options)
    options = {"choices": ("auto", *llm.DTYPES), "default": "auto"}
    add("--precision", "bf16 where native", "predict", **options)
    options = {"choices": llm.ATTENTIONS, "default": "sdpa"}
    add("--attention", "attention kernels", "predict default", **options)
    options = {"choices": llm.BASE_WEIGHTS, "default": "pretrained"}
    add("--base_weights", "random: a control", "-ablation", **options)
    prompts = (*on_off, "shuffled")
    add("--soft_prompt", "shuffled: a control", "-ablation", choices=prompts, default="on")
    options = {"choices": on_off, "default": "on"}
    add("--stage1_logit", "add stage 1's logit to it", "-ablation -text", **options)
    tokens = number(int, *checkpoints.PREFIX_TOKENS)
    add("--num_prefix_tokens", "number of soft tokens", type=tokens, default=8)
    add("--projection_lr", "learning rate of the projection", type=RATE, default=1e-3)
    add("--adapter_lr", "learning rate of the LoRA adapter", type=RATE, default=2e-4)
    add("--lora_rank", "LoRA r", type=number(int, *checkpoints.LORA_RANK), default=8)
    add("--lora_alpha", "LoRA alpha", type=POSITIVE, default=16)
    switch("--compile_layers", "fuse the operations of each layer by torch.compile")
    add("--lora_dropout", "LoRA dropout", type=number(float, 0, 0.99), default=0.05)

    group = parser.add_argument_group("output")
    add, switch = flags.adders(group, f"{flags.TRAINING} keyword")
    tags = "compare pool monitor demo free"
    add("--output_dir", "run folder; ./checkpoints_medgemma_{dataset}", tags, type=Path)
    switch("--report_patients", "list the largest errors in report.html", "free folder")
    add("--min_cell", command_line.MIN_CELL, "predict default free", type=WHOLE, default=0)
    switch("--dry_run", "two steps, time and memory, nothing written", "-keyword")
    tags = "demo free folder"
    add("--log_file", "log path (auto = timestamped, none = disable)", tags, default="auto")
    options = {"choices": TRACKERS, "default": "none"}
    add("--report_to", "tracker that receives the metrics", "free folder", **options)
    switch("--resume", "continue the stopped run of the same command", "-dry_run free folder")
    switch("--deterministic", "on a GPU: only repeatable kernels")
    options = {"type": WHOLE, "default": 0, "metavar": "STEPS"}
    add("--save_every", "also keep the state so often", "free folder", **options)
    return parser


# --------------------------------------------------------------------------- what is read


def read_dataset(args: Namespace, source: Path | pd.DataFrame | None = None) -> TrajectoryDataset:
    """Read the data that the flags name, or a given source, with the flags that its kind knows."""
    kind = DATASETS[args.dataset]
    source = getattr(args, kind.source_flag) if source is None else source
    if source is None or (isinstance(source, Path) and not os.path.exists(source)):
        problem = f"--dataset {args.dataset}" if source is None else f"{source}: no such file"
        advice = f"give the data by --{kind.source_flag}, or see sample data by --demo alone"
        raise InputError(f"{problem}: {advice}")
    rows: TrajectoryDataset = kind(source, **flags.dataset_options(args, DATASETS))
    flags.check_outcome(args, rows)
    return rows


# --------------------------------------------------------------------------- the models


def build_stage1(config: Config, seed: int = 0) -> Stage1:
    """Encoder and head of each member: series -> states (B, L + 1, 64) -> logit (B,)."""
    inputs, members = config["inputs"], []
    summaries = summary_names(config["features"], prediction_time=inputs["prediction_time"])
    outcome = outcome_of(config)
    sizes = {"summaries": len(summaries), "static": len(inputs["static"]), "width": outcome.width}
    for member in range(config["members"]):
        torch.manual_seed(distributed.derived_seed(seed, member))  # no two members start alike
        encoder_class = encoders.find_encoder(config.get("encoder_class"), ClinicalODERNN)
        encoder = encoder_class(**config["encoder"])
        head = TrajectoryHead(encoder.hidden_dim, **sizes, dropout=encoder.dropout)
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
    targets = decoders.decoder_of(llm.config.model_type).lora_targets
    lora = LoraConfig(  # Source: Hu et al. 2021, "LoRA"
        r=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=dropout,
        target_modules=targets,  # the projections of each layer
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
    options: dict[str, Any] = {"tokens": tokens, "bos": tokenizer.bos_token_id}
    options |= {"verdict": (yes[0], no[0]), "adds_stage1": config["stage1_logit"]}
    options["residual_weight"] = config["residual_weight"]
    if config["stage"] == "generative":  # lm_head writes the report
        return LLMWriter(stage1, projection, llm, **options), tokenizer
    outcome = outcome_of(config)
    head = nn.Linear(width, outcome.residual_width)
    return LLMClassifier(stage1, projection, llm, head=head, outcome=outcome, **options), tokenizer


BUILDERS = trained_model.Builders(build_stage1, build_llm)

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
        changed_flags = flags.changed(args, flags.tagged("stage1_file"))
        trained_model.check_stage1(checkpoint, data, changed_flags)
        model = trained_model.rebuild_stage1(checkpoint, BUILDERS).requires_grad_(False)
    elif args.soft_prompt == "off" and not args.trajectory_only:
        return None
    else:
        data.check_inputs()
        encoder: dict[str, Any] = {"input_dim": len(data.dataset.features)}
        encoder |= {"time_scale": data.time_scale(args.time_scale), "dropout": args.dropout}
        if not encoder_class:
            encoder |= {"hidden_dim": 64, "solver": args.solver, "dynamics": args.dynamics}
        config: Config = {"encoder": encoder, "encoder_class": encoder_class}
        config |= {"members": args.members, **describe_data(data)}
        config |= cast(Config, fit_outcome(data).config)
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
        begin_epoch=collate.begin_epoch,
        batch_size=args.batch_size,
        lengths=data.dataset.lengths,
        epochs=args.trajectory_epochs,
        patience=args.patience,
        config={
            "stage": "trajectory",
            **checkpoints.stage1_config(model),
            **describe_data(data),
            **rule_config(args, model.outcome),
        },
        save=save,
        targets=data.dataset.targets(),
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
        **checkpoints.describe_base(args.model_name),
        "num_prefix_tokens": tokens,
        "shuffled": args.soft_prompt == "shuffled",
        "stage1_logit": args.stage1_logit == "on" and stage1 is not None,
        "residual_weight": 1.0,
        "prompts": asdict(data.prompts),
        **describe_data(data),
        **rule_config(args, fit_outcome(data)),
        **(text_only if stage1 is None else checkpoints.stage1_config(stage1)),
    }


def llm_stage(
    args: Namespace, data: Data, stage1: Any, checkpoint: TrajectoryCheckpoint | None
) -> Stage:
    """Stages 2 and 3: LoRA, projection and stage 2's head learn; stage 1 too if not frozen."""
    dataset, device, donors = data.dataset, distributed.default_device(), None
    risks: dict[str, Any] = {}
    decoders.check_tested(args.model_name, allow_untested=args.allow_untested_model)
    if args.soft_prompt == "shuffled":
        donors = text_batches.other_patients(data.split, dataset.groups, args.seed)
    tokens = 0 if args.soft_prompt == "off" else args.num_prefix_tokens
    soft = text_batches.soft_tokens(dataset, tokens)
    config = llm_config(args, data, stage1, int(soft.max()))
    options = {"attention": args.attention, "dropout": args.lora_dropout, "seed": args.seed}
    model, tokenizer = build_llm(config, stage1, args.model_name, device=device, **options)
    options = {"answers": args.mode == "generative", "max_tokens": args.max_text_tokens}
    text = TextCollator(dataset, tokenizer, data.prompts, **options)
    if checkpoint is not None:
        text.encode(stage1, model.tokens, device)  # frozen: once for the whole run
        risks = trained_model.stage1_risks(checkpoint, text)
    text.donors = donors
    if args.gradient_checkpointing:
        language_model.set_checkpointing(model.llm)
    if args.compile_layers:
        language_model.compile_layers(model.llm)
    if isinstance(model, LLMWriter):
        config["report_tokens"] = text.report_tokens()
    elif not model.adds_stage1:
        # The outputs that the head's are added to; of others ``null_outputs`` are the start.
        start = model.outcome.start(dataset.targets()[data.split["train"]])
        model.head.bias.data.copy_(torch.from_numpy(start).view(len(model.head.bias), -1)[:, -1])
    rates = {"projection": args.projection_lr, "llm": args.adapter_lr}
    rates |= {"stage1": args.encoder_lr, "head": args.head_lr}
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
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
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
        save_best(stage, state, folder)
        run_folder.write_history(folder, progress.history)
    else:
        save_state(stage, state)
    epochs = max(stage.final_epochs or [stage.epochs])
    bar = distributed.show_progress((), stage.name, epochs * len(batches), progress.steps)
    while not progress.over:
        epoch = progress.epoch + 1
        bar.set_description_str(f"{stage.name}, epoch {epoch}/{epochs}", refresh=False)
        # Train: all of the epoch, or what a stopped run has left of it.
        batches.set_epoch(seed, epoch, progress.batches)
        stage.begin_epoch(seed, epoch, state.learning(stage.patience))
        stage.model.train()
        state.optimizer.zero_grad()
        with SIGNALS.deferred():
            for number, rows in enumerate(batches):
                begun = time.perf_counter()
                loss, terms = backward(stage, state, rows)
                stop = step(state, loss, terms)
                bar.update()
                if (epoch, number) == (1, 1):  # the first step warms up
                    run_log.log_epoch_time(stage, time.perf_counter() - begun, rows)
                if stop or (save_every and progress.steps % save_every == 0):
                    save_state(stage, state)
                if stop:
                    raise Stopped(SIGNALS.received or signal.SIGTERM)
            save_state(stage, state)
        predictions = validate(stage, state) if len(stage.batches["val"].rows) else None
        # Keep the good epochs, and stop where no member has reached a lower loss for long.
        if keep_good(stage, state, predictions):
            save_best(stage, state, folder)
        exhausted = bool(progress.losses) and epoch - max(progress.lowest_epochs) >= stage.patience
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
    set_best(stage, state)
    center(stage)
    run_log.record_average(progress, folder)
    if folder and distributed.processes().is_main_process:
        stage.save(folder, stage.config)
    return state


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
        with exchange, memory.advised(stage, part):
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
    state.progress.check_validation(predictions.loss)
    return predictions


def keep_good(stage: Stage, state: TrainState, predictions: Predictions | None) -> bool:
    """Early stopping: keep the averaged weights of the epochs that are good for some member.

    These are the epochs whose validation loss is within ``LOSS_TOLERANCE`` of the member's lowest
    so far; without a validation part those that the folds chose, or the last one. A member whose
    patience has ended keeps its own. Return whether this epoch is among them.
    """
    progress, epoch = state.progress, state.progress.epoch + 1
    if predictions is None:
        chosen = [k for k in stage.final_epochs or [epoch] if k <= epoch] or [epoch]
        progress.averaged = [chosen for _ in {*state.members}]
    else:
        learns = progress.learning(stage.patience) if epoch > 1 else itertools.repeat(True)
        pairs = zip(predictions.losses.tolist(), learns, strict=False)
        progress.losses.append([loss if learned else math.inf for loss, learned in pairs])
        progress.averaged = progress.good_epochs()
    good = {*itertools.chain(*progress.averaged)}
    if epoch in good:
        state.epochs[epoch] = [weight.cpu().clone() for weight in state.average.weights]
    state.epochs = {k: weights for k, weights in state.epochs.items() if k in good}
    return epoch in good


def set_best(stage: Stage, state: TrainState) -> None:
    """Set the mean weights of the good epochs; of a member whose mean is not good, the best one."""
    progress = state.progress
    state.set_weights(state.mean_weights())
    if progress.losses:
        losses, lowest_epochs = score(stage, "val").losses, progress.lowest_epochs
        for member, loss in enumerate(losses):
            if not loss <= progress.limits[member]:
                progress.averaged[member] = [lowest_epochs[member]]
        state.set_weights(state.mean_weights())


def center(stage: Stage) -> None:
    """Shift stage 1's logits until its risks of the training part agree with the events there.

    The noise of dropout, which evaluation lacks, raises the risks of a rare event.
    """
    if isinstance(stage.model, Stage1) and stage.targets is not None:
        batches = part_batches({"all": stage.batches["train"].rows}, stage.batch_size)["all"]
        for member in stage.model.alone():
            predictions = score_batches(member, batches, stage.collate)
            shift = member.outcome.shift(predictions, stage.targets[predictions.rows])
            member.shift(torch.from_numpy(shift))


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


def training_state(stage: Stage, state: TrainState) -> dict[str, Any]:
    """Return all that resumes training to the bit; each process brings its generators."""
    random, device = {"cpu": torch.get_rng_state()}, distributed.default_device()
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    names, weights = list(stage.trainable_parameters()), (p.detach() for p in state.parameters)
    return {
        "weights": dict(zip(names, weights, strict=True)),
        "average": dict(zip(names, state.average.weights, strict=True)),
        "epochs": {k: dict(zip(names, kept, strict=True)) for k, kept in state.epochs.items()},
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "progress": vars(state.progress),
        "random": gather_object([random]),
        "passes": {"max_tokens": stage.max_tokens, "recomputes": stage.recomputes},
    }


def load_training_state(stage: Stage, state: TrainState, content: dict[str, Any]) -> None:
    """Restore a state of ``training_state``, random generators included, to the bit."""
    expected = {name: p.shape for name, p in stage.trainable_parameters().items()}
    same_shapes = {name: weight.shape for name, weight in content["weights"].items()} == expected
    if not same_shapes or len(content["random"]) != state.accelerator.num_processes:
        raise InputError("--resume: another model or number of processes: start without --resume")
    state.set_weights(content["weights"].values())
    device = distributed.default_device()
    state.average.weights = [weight.to(device) for weight in content["average"].values()]
    state.epochs = {epoch: [*weights.values()] for epoch, weights in content["epochs"].items()}
    state.optimizer.load_state_dict(content["optimizer"])
    state.schedule.load_state_dict(content["schedule"])
    vars(state.progress).update(content["progress"])
    random = content["random"][state.accelerator.process_index]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)
    position = state.progress.epoch + 1, state.progress.batches, state.progress.steps
    logger.info("resuming in epoch %d after %d of its steps, %d steps in all", *position)


# --------------------------------------------------------------------------- one run


def train(args: Namespace, dataset: TrajectoryDataset | None = None) -> int:
    """Run one stage from the user's data to its results, or resume it; return the exit code."""
    RUN_LOG.begin()
    run_log.check_output(args)
    dataset = read_dataset(args) if dataset is None else dataset
    checkpoint = run_folder.given_stage1(args)
    return run_folder.interruptible(args, lambda: train_stage(args, dataset, checkpoint))


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
        stage = folds.with_final_epochs(make_stage(args, data, checkpoint), args)
        stopped = read_state(run_folder.state_folder(folder)) if args.resume else None
        if stopped is not None:
            memory.restore_passes(stage, stopped["passes"])
        check_horizons(data.dataset)
        run_log.log_run_summary(stage, data, args)
        memory.check_memory(stage, distributed.default_device())
        if args.dry_run:
            dry_run(stage, args.seed)
            return None
        with run_folder.opened(args, folder, run_record) as track:
            saving: dict[str, Any] = {"resume": stopped, "save_every": args.save_every}
            state = fit(stage, args.seed, folder, track, **saving, on_epoch=trial.on_epoch)
            if args.final:  # trained on all patients: nothing is held out
                config, baselines = folds.write_final(stage, data, folder, args)
            else:  # the only place where test patients are scored
                parts = [part for part in trial.parts if len(data.split[part])]
                predictions = {part: score(stage, part) for part in parts}
                written = folder, state.progress, run_record, args
                options: dict[str, Any] = {"with_baselines": trial.baselines}
                config, baselines = results.write_results(
                    predictions, stage, data, *written, **options
                )
            track(results.metrics_for_tracker(config), state.progress.steps)
            run_folder.finish_run(folder, stage.tokens, config.get("best_model"))
    model: Any = stage.model.eval()
    tokenizer, hashes = stage.text and stage.text.tokenizer, stage.train_patients
    return TrajectoryModel(trained_model.TrainedModel(model, config, tokenizer, hashes, baselines))


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


# --------------------------------------------------------------------------- main


def run(args: Namespace, given: set[str]) -> int:
    """Run the command of the flags; return the exit code."""
    flags.check_flags(flags.complete(args), given)
    distributed.check_launch()
    with SIGNALS.installed(), distributed.exact_kernels(deterministic=args.deterministic):
        if args.compare:
            return compare.run_compare(args, args.output_dir if "--output_dir" in given else None)
        if args.pool:
            return pool.run_pool(args.pool, args.output_dir)
        if args.monitor:
            return run_monitor(args, given)
        if not args.demo:
            distributed.check_gpu()
        if args.folds and args.seeds:
            return repeats.run_repeats(args, read_dataset, train)
        if args.seeds:
            return several.run_seeds(args, read_dataset, train)
        if args.folds or args.leave_out:
            return folds.run_folds(args, read_dataset, train)
        if args.ablation:
            return several.run_ablation(args, read_dataset(args), train)
        if args.predict:
            return predict(args, given)
        if args.export:
            name = args.model_name if "--model_name" in given else None
            if args.export == "shared":
                model = TrajectoryModel.from_pretrained(args.checkpoint, model_name=name)
                model.save_shared(args.export_dir)
                logger.info("export: %s", args.export_dir)
            else:
                export_merged(args.checkpoint, args.export_dir, BUILDERS, name)
            return command_line.EXIT_DONE
        return run_demo(args, train) if args.demo else train(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong input, 3 a fault, 128 + N ended by signal N."""
    args, given = build_parser().parse_given(sys.argv[1:] if argv is None else argv)
    if args.output_dir is None:
        args.output_dir = Path(f"./checkpoints_medgemma_{'demo' if args.demo else args.dataset}")
    distributed.set_environment()
    with command_logging(first=distributed.processes().is_main_process):
        return command_line.run_command(lambda: run(args, given), show_values=args.show_values)


def program() -> int:
    """Run ``main``; several processes leave together, so that none finds the others gone."""
    if not (code := main()):
        distributed.leave_together()
    return code


# ``fit_trajectory`` and its like check their keywords, then call ``read_dataset``, ``train_stage``.
python.bind(Program(DATASETS, BUILDERS, build_parser(), read_dataset, train_stage, train))

if __name__ == "__main__":
    sys.exit(program())
