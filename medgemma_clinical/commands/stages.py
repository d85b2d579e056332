"""Wire the three stages: from flags and data to what the training loop needs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from medgemma_clinical.commands.announce import describe_texts
from medgemma_clinical.commands.results import generate_reports
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.distributed import default_device
from medgemma_clinical.models.checkpoints import (
    TRAJECTORY_FILE,
    TrajectoryCheckpoint,
    save_llm,
    save_trajectory,
    stage1_config,
)
from medgemma_clinical.models.encoder import check_gaps, collate_with_plan
from medgemma_clinical.models.generation import report_tokens
from medgemma_clinical.models.language_model import (
    DTYPES,
    add_lora,
    base_facts,
    embedding_rms,
    load_language_model,
    set_checkpointing,
)
from medgemma_clinical.models.text_batches import TextCollator, encode_all
from medgemma_clinical.models.trained_model import load_stage1, stage1_risks
from medgemma_clinical.models.trajectory import TrajectoryClassifier, fit_member
from medgemma_clinical.models.trajectory_llm import LLMClassifier, LLMWriter, TrajectoryLLM
from medgemma_clinical.training.loaders import make_loaders
from medgemma_clinical.training.seeds import seed_everything
from medgemma_clinical.training.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prompt_options(args: Namespace) -> PromptOptions:
    """Return what prompts hold; a model that writes reports also reads what they compute."""
    return PromptOptions(
        series=args.series_text,
        context=args.text_context == "full",
        computed=args.mode == "generative" and not args.trajectory_only,
    )


def make_stage(
    args: Namespace,
    data: Data,
    encoders: Mapping[str, type],
    checkpoint: TrajectoryCheckpoint | None = None,
) -> Stage:
    """Wire the stage that the flags choose.

    Args:
        args: of the command line.
        data: of the run.
        encoders: class of each registered name; a new stage 1 takes the first.
        checkpoint: a trained stage 1, which a language model then reads frozen.

    Raises:
        InputError: data, stage 1 or language model cannot be used.
    """
    stage1 = stage1_of(args, data, encoders, checkpoint)  # before minutes go into the LLM
    if args.trajectory_only:
        assert stage1 is not None
        return trajectory_stage(args, data, stage1)
    parts = make_llm_parts(args, data, stage1, checkpoint)
    if args.mode == "classification":
        return classification_stage(args, data, parts)
    return generative_stage(args, data, parts)


def trajectory_stage(args: Namespace, data: Data, model: TrajectoryClassifier) -> Stage:
    """Wire stage 1: encoder and head, no language model."""
    config = {"stage": "trajectory", **stage1_config(model), **data.description()}
    patients = data.training_patients()

    return Stage(
        name="trajectory",
        model=model,
        learning_rates={"members": args.encoder_lr},
        loaders=make_loaders(
            data.split, args.batch_size, collate_with_plan(data.dataset, model.encoder)
        ),
        epochs=args.trajectory_epochs,
        patience=args.patience,
        monitor="val_auroc",
        higher_is_better=True,
        hides_events=data.hides_events,
        config=config,
        train_patients=patients,
        save=lambda folder, config: save_trajectory(
            folder.parent / TRAJECTORY_FILE, model, config, patients
        ),
    )


@dataclass(frozen=True)
class LLMParts:
    """What stages 2 and 3 build their model from.

    Attributes:
        stage1: None where the language model reads text alone.
        checkpoint: of ``stage1``, None where it learns anew.
        llm: with a new LoRA adapter.
        tokenizer: of the language model.
        collate: tokenised prompts, and reports for stage 3.
        keywords: of ``TrajectoryLLM``.
    """

    stage1: TrajectoryClassifier | None
    checkpoint: TrajectoryCheckpoint | None
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    collate: TextCollator
    keywords: dict[str, Any]


def classification_stage(args: Namespace, data: Data, parts: LLMParts) -> Stage:
    """Wire stage 2: soft prompt and text, a linear head on the language model's last position."""
    prevalence = data.prevalence()
    model = LLMClassifier(parts.stage1, parts.llm, prevalence=prevalence, **parts.keywords)
    return llm_stage(args, data, model, parts, {})


def generative_stage(args: Namespace, data: Data, parts: LLMParts) -> Stage:
    """Wire stage 3: soft prompt and text, the language model writes verdict and report."""
    model = LLMWriter(parts.stage1, parts.llm, **parts.keywords)
    most = report_tokens(parts.collate)
    return replace(
        llm_stage(args, data, model, parts, {"report_tokens": most}),
        monitor="val_loss",
        higher_is_better=False,
        generate=lambda predictions: generate_reports(
            model, parts.collate, parts.tokenizer, predictions, most
        ),
    )


def llm_stage(
    args: Namespace,
    data: Data,
    model: TrajectoryLLM,
    parts: LLMParts,
    further: dict[str, Any],
) -> Stage:
    """Wire what stages 2 and 3 share: rates, loaders, the best model on disk.

    Args:
        args: of the command line.
        data: of the run.
        model: of the stage.
        parts: of the model.
        further: entries of the checkpoint's configuration beside the shared ones.
    """
    encode_all(model, parts.collate, default_device())
    if args.gradient_checkpointing:
        set_checkpointing(model.llm)
    rates = {
        "stage1": args.encoder_lr,
        "projection": args.projection_lr,
        "llm": args.adapter_lr,
        "head": args.head_lr,
    }

    return Stage(
        name=args.mode,
        model=model,
        learning_rates={name: rates[name] for name, _ in model.named_children()},
        loaders=make_loaders(data.split, args.batch_size, parts.collate, parts.collate.lengths()),
        epochs=args.epochs,
        patience=args.patience,
        monitor="val_auroc",
        higher_is_better=True,
        hides_events=data.hides_events,
        config={**llm_config(args, data, model), **further},
        stage1=stage1_risks(parts.checkpoint, parts.collate),
        tokenizer=parts.tokenizer,
        tokens=parts.collate.mean_tokens(data.split["train"], model.tokens),
        save=lambda folder, config: save_llm(folder / "best", model, config),
        accumulate=args.gradient_accumulation,
        describe=lambda: describe_texts(
            parts.collate, model.tokens, data.split["train"], data.min_cell
        ),
        save_memory=None if args.gradient_checkpointing else lambda: set_checkpointing(model.llm),
    )


def make_llm_parts(
    args: Namespace,
    data: Data,
    stage1: TrajectoryClassifier | None,
    checkpoint: TrajectoryCheckpoint | None,
) -> LLMParts:
    """Make what stage 2 or 3 builds its model from; see ``LLMParts``."""
    base, tokenizer = load_language_model(
        args.model_name,
        args.quantization,
        DTYPES[args.precision],
        default_device(),
        weights=args.base_weights,
        attention=args.attention,
    )
    most, answers = args.max_text_tokens, args.mode == "generative"
    collate = TextCollator(data.dataset, tokenizer, data.prompts, answers=answers, most_tokens=most)
    longest = int(data.dataset.lengths.max())
    keywords = {
        "tokens": 0 if args.soft_prompt == "off" else min(args.num_prefix_tokens, longest),
        "scale": embedding_rms(base, collate.sample),
        "bos": collate.bos,
        "verdict": collate.verdict,
        "stage1_logit": args.stage1_logit == "on",
        "shuffled": args.soft_prompt == "shuffled",
    }
    seed_everything(args.seed)
    llm = add_lora(base, args.lora_rank, args.lora_alpha, args.lora_dropout)
    return LLMParts(stage1, checkpoint, llm, tokenizer, collate, keywords)


def llm_config(args: Namespace, data: Data, model: TrajectoryLLM) -> dict[str, Any]:
    """Return the checkpoint's configuration: base model, what the model reads, its data."""
    unread: dict[str, Any] = {"facts": [], "prediction_time": False}
    without: dict[str, Any] = {"encoder": None, "members": 0, "inputs": unread}
    return {
        "stage": args.mode,
        **base_facts(args.model_name),
        "base_class": type(model.llm.get_base_model()).__name__,
        "base_weights": args.base_weights,
        "quantization": args.quantization,
        "precision": args.precision,
        "num_prefix_tokens": model.tokens,
        "shuffled": model.shuffled,
        "stage1_logit": model.adds_stage1,
        "residual_weight": model.residual_weight,
        "prompts": asdict(data.prompts),
        "max_text_tokens": args.max_text_tokens,
        **data.description(),
        **(without if model.stage1 is None else stage1_config(model.stage1)),
    }


def stage1_of(
    args: Namespace,
    data: Data,
    encoders: Mapping[str, type],
    checkpoint: TrajectoryCheckpoint | None,
) -> TrajectoryClassifier | None:
    """Return the stage 1 that learns or is read, None where a language model reads text alone.

    That of a checkpoint is frozen; without a checkpoint a new one learns.
    """
    if checkpoint is None:
        return None if args.soft_prompt == "off" else make_stage1(args, data, encoders)
    model = load_stage1(checkpoint, encoders, vars(args), data)
    check_gaps(model.encoder, data.dataset)
    return model.requires_grad_(False)


def make_stage1(args: Namespace, data: Data, encoders: Mapping[str, type]) -> TrajectoryClassifier:
    """Make members of the first encoder with new weights, scales fitted to the training part.

    Raises:
        InputError: the training part cannot be normalised, or a gap is too long.
    """
    dataset = data.dataset
    dataset.check_measured(data.split["train"], data.min_cell)
    scale = data.time_scale(args.time_scale)
    members = []
    for member in range(args.members):
        seed_everything((args.seed + member) % 2**32)
        encoder = next(iter(encoders.values()))(
            len(dataset.features),
            time_scale=scale,
            solver=args.solver,
            dynamics=args.dynamics,
        ).requires_grad_(not args.freeze_ode)
        members.append(fit_member(encoder, data))
    check_gaps(members[0].encoder, dataset)
    return TrajectoryClassifier(members)
