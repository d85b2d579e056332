"""Terms under which a trained model may be passed on: of the code, and of its language model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

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
# Source: Llama 3.2 Community License 1.b, redistribution; must accompany a derivative of Llama.
LLAMA_NOTICE = (
    "Built with Llama. Llama{version} is licensed under the Llama{version} Community License, "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved"
)
APACHE_LINK = "https://www.apache.org/licenses/LICENSE-2.0"
MIT_LINK = "https://opensource.org/license/mit"
CHANGED = "this model adds trained weights to it"
"""Apache License 2.0, 4b: a notice says that the work was changed."""


class Terms(NamedTuple):
    """Terms of a trained model: a sentence, the file NOTICE, and keys of a card's header."""

    sentence: str
    notice: str
    header: dict[str, str]
    name_begins: str = ""  # with what the name of a model that is passed on must begin


@dataclass(frozen=True)
class Licence:
    """Licence of language models, known by their names in lower case."""

    model: str  # in words: "The language model is ..."
    name: str  # regular expression; the group ``version`` is put into the texts
    notice: str
    header: dict[str, str]  # the keys of the maker's own cards
    name_begins: str = ""

    def terms(self, version: str = "") -> Terms:
        """Return the terms of a model of this licence."""
        notice = self.notice.format(version=f" {version}" if version else "")
        header = {key: text.format(version=version) for key, text in self.header.items()}
        sentence = f"The language model is {self.model}: {notice}."
        return Terms(sentence, f"{notice}\n", header, self.name_begins)


def apache(model: str, name: str) -> Licence:
    """Return the licence of models that their maker publishes under the Apache License 2.0."""
    notice = f"{model} is licensed under the Apache License 2.0 found at {APACHE_LINK}; {CHANGED}"
    return Licence(f"a {model}", name, notice, {"license": "apache-2.0"})


HAI_DEF_NAME = {"license_name": "health-ai-developer-foundations", "license_link": HAI_DEF_LINK}
HAI_DEF = Licence(
    "MedGemma or derived from it",
    "medgemma",
    HAI_DEF_NOTICE,
    {"license": "other", **HAI_DEF_NAME},
)
TXGEMMA = replace(HAI_DEF, model="TxGemma or derived from it", name="txgemma")
GEMMA = Licence("a Gemma", "gemma", GEMMA_NOTICE, {"license": "gemma"})
LLAMA = Licence(
    "a Llama or derived from it",
    r"llama-?(?P<version>2|3(?:\.[1-3])?)\b",
    LLAMA_NOTICE,
    {"license": "llama{version}"},
    name_begins="Llama",
)
PHI_NOTICE = f"Phi: Copyright (c) Microsoft Corporation, MIT License found at {MIT_LINK}"
PHI = Licence("a Phi", "phi-?[34]", PHI_NOTICE, {"license": "mit"})
# Source: Qwen Research License and Qwen License 3c (notice), 4b (built with).
QWEN_NOTICE = (
    "Built with Qwen. Qwen is licensed under the Qwen {} AGREEMENT, Copyright (c) Alibaba Cloud. "
    "All Rights Reserved"
)
QWEN_3B = Licence(
    "a Qwen2.5-3B",
    r"qwen2\.5.*-3b",
    QWEN_NOTICE.format("RESEARCH LICENSE"),
    {"license": "other", "license_name": "qwen-research"},
)
QWEN_72B = Licence(
    "a Qwen2.5-72B",
    r"qwen2\.5.*-72b",
    QWEN_NOTICE.format("LICENSE"),
    {"license": "other", "license_name": "qwen"},
)
NO_BASE = Terms(
    "No weights of MedGemma or another model of Google are part of this model.",
    "No weights of MedGemma or another Gemma are part of this model or of its base.\n",
    {"license": "apache-2.0"},
)
UNKNOWN = Terms(
    "The language model has a licence of its own: see the page of the base model.",
    "The language model has a licence of its own: see the page of the base model.\n",
    {"license": "other"},
)


def terms_by_name(licences: tuple[Licence, ...], name: str, *, in_folder: bool) -> Terms:
    """Return the terms of a base model under one of ``licences``, the strictest first.

    Where its name does not tell which, these are the notices of all. Anyone may have chosen the
    name of a folder, so that it tells the strictest one alone.
    """
    for licence in licences[: 1 if in_folder else None]:
        if found := re.search(licence.name, name.lower()):
            return licence.terms(found.groupdict().get("version", ""))
    if not licences:
        return UNKNOWN
    every = [licence.terms() for licence in licences]
    sentences = (terms.sentence.replace("The", "If the", 1) for terms in every)
    pairs = zip(licences, every, strict=True)
    notices = "\n".join(f"If the language model is {x.model}: {terms.notice}" for x, terms in pairs)
    return Terms(" ".join(sentences), notices, {"license": "other"})


def built_in_sentence(of: str = "") -> str:
    """Return the sentence of a page about the built-in language model, ``of`` some runs."""
    return (
        f"The language model{of} is small and was trained on made-up rows to copy numbers into a "
        "report; it knows no medicine. Its metrics say nothing about MedGemma."
    )
