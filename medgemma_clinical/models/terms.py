"""Terms under which a trained model may be passed on: of the code, and of its language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from medgemma_clinical.models.language_model import DEMO

NOT_A_DEVICE = "Research software. Not a medical device, not for clinical use."
HAI_DEF_LINK = "https://developers.google.com/health-ai-developer-foundations/terms"
# Source: HAI-DEF Terms of Use, distribution; must accompany a derivative of MedGemma.
HAI_DEF_NOTICE = (
    f"HAI-DEF is provided under and subject to the HAI-DEF Terms of Use found at {HAI_DEF_LINK}"
)
# Source: Gemma Terms of Use 3.1, distribution; must accompany a derivative of Gemma.
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)


class Terms(NamedTuple):
    """Terms of a trained model: a sentence, the file NOTICE, and keys of a card's header."""

    sentence: str
    notice: str
    header: dict[str, str]


NO_BASE = Terms(
    "No weights of MedGemma or another model of Google are part of this model.",
    "No weights of MedGemma or another Gemma are part of this model or of its base.\n",
    {"license": "apache-2.0"},
)
# The header's keys are those of Google's own cards.
HAI_DEF_NAME = {"license_name": "health-ai-developer-foundations", "license_link": HAI_DEF_LINK}
HAI_DEF = Terms(
    f"The language model is MedGemma or derived from it: {HAI_DEF_NOTICE}.",
    f"{HAI_DEF_NOTICE}\n",
    {"license": "other", **HAI_DEF_NAME},
)
GEMMA = Terms(
    f"The language model is a Gemma: {GEMMA_NOTICE}.", f"{GEMMA_NOTICE}\n", {"license": "gemma"}
)
EITHER = Terms(
    f"If the language model is MedGemma or derived from it: {HAI_DEF_NOTICE}. If it is another "
    f"Gemma: {GEMMA_NOTICE}.",
    f"{HAI_DEF_NOTICE}\n\n{GEMMA_NOTICE}\n",
    {"license": "other"},
)


def terms_of(config: Mapping[str, Any]) -> Terms:
    """Return the terms of a trained model; a base of unknown origin has the notices of both."""
    base, in_folder = config.get("base_model"), config.get("base_sha256") is not None
    if base is None or (base == DEMO and not in_folder):
        return NO_BASE
    if "medgemma" in base.lower():
        return HAI_DEF
    return GEMMA if "gemma" in base.lower() and not in_folder else EITHER


def licence(config: Mapping[str, Any]) -> str:
    """Return the licence of a model's code and, where it has one, of its language model."""
    return f"The code: Apache License 2.0. {terms_of(config).sentence}"
