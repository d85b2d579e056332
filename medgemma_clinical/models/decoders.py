"""Types of language models: what is tested with this program, and what differs between them.

No other module asks for the type. What the library's configuration or the tokenizer tells (window,
width of a head, chat turns, first token) is read there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medgemma_clinical.files import InputError
from medgemma_clinical.models.choices import DEMO
from medgemma_clinical.models.language_model import base_type
from medgemma_clinical.models.terms import (
    GEMMA,
    HAI_DEF,
    LLAMA,
    NO_BASE,
    PHI,
    QWEN_3B,
    QWEN_72B,
    TXGEMMA,
    Licence,
    Terms,
    apache,
    terms_by_name,
)

logger = logging.getLogger(__name__)

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Projections of a language layer that an adapter changes."""

FUSED_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
"""The same where queries, keys and values are one projection."""


@dataclass(frozen=True)
class Decoder:
    """A type of language model."""

    types: tuple[str, ...]  # ``model_type`` of config.json; last that of the language model alone
    licences: tuple[Licence, ...]  # of its models, the strictest first
    example: str  # a model of the hub
    lora_targets: list[str] | str = field(default_factory=LORA_TARGETS.copy)  # as in peft


TESTED = (
    Decoder(("gemma3", "gemma3_text"), (HAI_DEF, GEMMA), "google/medgemma-4b-pt"),
    Decoder(
        ("gemma4", "gemma4_text"), (HAI_DEF, apache("Gemma 4", "gemma-4")), "google/gemma-4-31B-it"
    ),
    Decoder(("gemma2",), (TXGEMMA, GEMMA), "google/gemma-2-2b-it"),
    Decoder(("llama",), (LLAMA,), "meta-llama/Llama-3.2-1B-Instruct"),
    Decoder(
        ("qwen2",),
        (QWEN_3B, QWEN_72B, apache("Qwen2", r"qwen2(?!.*-(3|72)b)")),
        "Qwen/Qwen2.5-0.5B-Instruct",
    ),
    Decoder(("qwen3",), (apache("Qwen3", "qwen3"),), "Qwen/Qwen3-0.6B"),
    Decoder(
        ("mistral",),
        (apache("Mistral", "mistral-(7b|nemo)"),),
        "mistralai/Mistral-7B-Instruct-v0.3",
    ),
    Decoder(("olmo2",), (apache("OLMo 2", "olmo-2"),), "allenai/OLMo-2-0425-1B-Instruct"),
    Decoder(("phi3",), (PHI,), "microsoft/Phi-4-mini-instruct", FUSED_TARGETS),
)
"""Types that the tests train, resume, load again and export, in stages 2 and 3."""


def decoder_of(kind: str) -> Decoder:
    """Return what is known of a ``model_type``; of one that is not tested all layers learn."""
    for decoder in TESTED:
        if kind in decoder.types:
            return decoder
    return Decoder((kind,), (), "", "all-linear")


def is_tested(kind: str) -> bool:
    """Say whether the tests train models of a ``model_type``."""
    return any(kind in decoder.types for decoder in TESTED)


def check_tested(name: str, *, allow_untested: bool) -> None:
    """Refuse a base model of a type that is not tested, or warn of it where that is allowed."""
    kind = base_type(name)
    if is_tested(kind):
        return
    tested = ", ".join(decoder.types[-1] for decoder in TESTED)
    problem = f"--model_name {name}: its type {kind} is not tested (tested: {tested})"
    if not allow_untested:
        raise InputError(f"{problem}: give another, or add --allow_untested_model")
    logger.warning("%s: compare a short run with stage 1 before you rely on it", problem)


def terms_of(config: Mapping[str, Any]) -> Terms:
    """Return the terms of a trained model, by the type and the name of its base model."""
    base, in_folder = config.get("base_model"), config.get("base_sha256") is not None
    if base is None or (base == DEMO and not in_folder):
        return NO_BASE
    # Checkpoints without a type are older than other types than Gemma 3.
    licences = decoder_of(config.get("base_type", "gemma3_text")).licences
    return terms_by_name(licences, base, in_folder=in_folder)


def licence(config: Mapping[str, Any]) -> str:
    """Return the licence of a model's code and, where it has one, of its language model."""
    return f"The code: Apache License 2.0. {terms_of(config).sentence}"
