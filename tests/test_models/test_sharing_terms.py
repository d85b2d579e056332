"""Terms by base model: of MedGemma, of another Gemma, of a folder whose name says nothing."""

from __future__ import annotations

from typing import Any

import pytest

from medgemma_clinical.models.sharing.terms import (
    EITHER,
    GEMMA,
    GEMMA_NOTICE,
    HAI_DEF,
    HAI_DEF_NOTICE,
    NO_BASE,
    Terms,
    licence,
    terms_of,
)

FOLDER = {"base_sha256": "0" * 64}
ON_THE_HUB = {"base_sha256": None}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"stage": "trajectory"}, NO_BASE),
        ({"base_model": "tiny", **ON_THE_HUB}, NO_BASE),
        ({"base_model": "google/medgemma-4b-pt", **ON_THE_HUB}, HAI_DEF),
        ({"base_model": "jane/MedGemma-tuned", **ON_THE_HUB}, HAI_DEF),
        ({"base_model": "medgemma-4b-pt", **FOLDER}, HAI_DEF),
        ({"base_model": "google/gemma-3-270m", **ON_THE_HUB}, GEMMA),
        ({"base_model": "jane/tuned", **ON_THE_HUB}, EITHER),
        ({"base_model": "gemma", **FOLDER}, EITHER),
        ({"base_model": "tiny-one", **FOLDER}, EITHER),
    ],
)
def test_terms_are_those_of_the_base_model(config: dict[str, Any], expected: Terms) -> None:
    assert terms_of(config) is expected


def test_notices_are_the_sentences_that_the_terms_ask_for() -> None:
    assert HAI_DEF.notice == f"{HAI_DEF_NOTICE}\n"
    assert GEMMA.notice == f"{GEMMA_NOTICE}\n"
    assert {HAI_DEF_NOTICE, GEMMA_NOTICE} <= {*EITHER.notice.splitlines()}
    assert HAI_DEF.header["license_link"] in HAI_DEF_NOTICE
    assert "provided under" not in NO_BASE.notice


def test_a_licence_names_code_and_language_model() -> None:
    for config, notice in (
        ({"base_model": "google/medgemma-4b-pt", **ON_THE_HUB}, HAI_DEF_NOTICE),
        ({"base_model": "google/gemma-3-270m", **ON_THE_HUB}, GEMMA_NOTICE),
        ({"stage": "trajectory"}, "No weights of MedGemma"),
    ):
        assert licence(config).startswith("The code: Apache License 2.0. ")
        assert notice in licence(config)
