"""Terms by base model: of MedGemma, of another Gemma, of a folder whose name says nothing."""

import pytest

from medgemma_clinical.models.sharing import terms

FOLDER, HUB = {"base_sha256": "0" * 64}, {"base_sha256": None}
HAI_DEF, GEMMA = terms.HAI_DEF_NOTICE, terms.GEMMA_NOTICE


@pytest.mark.parametrize(
    ("config", "licence", "notices"),
    [
        ({"stage": "trajectory"}, "apache-2.0", ()),
        ({"base_model": "tiny", **HUB}, "apache-2.0", ()),
        ({"base_model": "google/medgemma-4b-pt", **HUB}, "other", (HAI_DEF,)),
        ({"base_model": "jane/MedGemma-tuned", **HUB}, "other", (HAI_DEF,)),
        ({"base_model": "medgemma-4b-pt", **FOLDER}, "other", (HAI_DEF,)),
        ({"base_model": "google/gemma-3-270m", **HUB}, "gemma", (GEMMA,)),
        ({"base_model": "jane/tuned", **HUB}, "other", (HAI_DEF, GEMMA)),
        ({"base_model": "gemma", **FOLDER}, "other", (HAI_DEF, GEMMA)),
        ({"base_model": "tiny-one", **FOLDER}, "other", (HAI_DEF, GEMMA)),
    ],
)
def test_terms_of__pass_on_the_notices_of_the_base_model(config, licence, notices):
    found = terms.terms_of(config)
    assert found.header["license"] == licence
    for notice in (HAI_DEF, GEMMA):
        assert (notice in found.notice.splitlines()) == (notice in notices)
        assert (notice in terms.licence(config)) == (notice in notices)
    linked = found.header.get("license_link")
    assert linked in HAI_DEF if notices == (HAI_DEF,) else linked is None
