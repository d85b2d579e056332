"""Terms under which a trained model may be passed on: of the code, and of its language model.

The name of a base model alone tells whether it is MedGemma. Where the name says nothing, the
notices of MedGemma and of Gemma go along.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from medgemma_clinical.models.language_model import TINY

HAI_DEF_LINK = "https://developers.google.com/health-ai-developer-foundations/terms"

HAI_DEF_NOTICE = (
    f"HAI-DEF is provided under and subject to the HAI-DEF Terms of Use found at {HAI_DEF_LINK}"
)
"""Must accompany a derivative of MedGemma. Source: HAI-DEF Terms of Use, distribution."""

GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)
"""Must accompany a derivative of Gemma. Source: Gemma Terms of Use 3.1, distribution."""


class Terms(NamedTuple):
    """Terms of a trained model: a sentence for cards and pages, the file NOTICE, the header's keys.

    The header's keys are those of Google's own cards.
    """

    sentence: str
    notice: str
    header: dict[str, str]


NO_BASE = Terms(
    "No weights of MedGemma or another language model are part of this model.",
    "No weights of MedGemma or another Gemma are part of this model or of its base.\n",
    {"license": "apache-2.0"},
)
HAI_DEF = Terms(
    f"The language model is MedGemma or derived from it: {HAI_DEF_NOTICE}.",
    f"{HAI_DEF_NOTICE}\n",
    {
        "license": "other",
        "license_name": "health-ai-developer-foundations",
        "license_link": HAI_DEF_LINK,
    },
)
GEMMA = Terms(
    f"The language model is a Gemma: {GEMMA_NOTICE}.", f"{GEMMA_NOTICE}\n", {"license": "gemma"}
)
EITHER = Terms(
    f"Where the language model is MedGemma or derived from it: {HAI_DEF_NOTICE}. Where it is "
    f"another Gemma: {GEMMA_NOTICE}.",
    f"{HAI_DEF_NOTICE}\n\n{GEMMA_NOTICE}\n",
    {"license": "other"},
)


def terms_of(config: dict[str, Any]) -> Terms:
    """Return the terms of a trained model, from the configuration of its checkpoint."""
    base = config.get("base_model")
    if base in (None, TINY):
        return NO_BASE
    if "medgemma" in base.lower():
        return HAI_DEF
    on_the_hub = config["base_sha256"] is None
    return GEMMA if on_the_hub and "gemma" in base.lower() else EITHER


def licence(config: dict[str, Any]) -> str:
    """Return the licence of a model's code and, where it has one, of its language model."""
    return f"The code: Apache License 2.0. {terms_of(config).sentence}"
