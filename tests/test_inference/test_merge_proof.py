"""The proof of an export, on an adapter that was trained: what passes and what is refused."""

import shutil

import pytest
import torch
from medgemma_clinical.inference.merge import export_merged
from medgemma_clinical.inference.merge_proof import (
    PROOF_ROWS,
    MergeProof,
    ProofLogits,
    compare,
    computed_in_float32,
    proof_logits,
)

import medgemma_trainer as trainer
from conftest import sign_table
from language_models import rehash
from medgemma_clinical.files import RunFault
from medgemma_clinical.models.trained_model import load_trained_model
from merged_models import BUILDERS, save_base, spoil_merge

KINDS = {
    "float32": {},
    "bfloat16": {"precision": "bf16"},
    "NF4 in bfloat16": {"precision": "bf16", "quantization": "nf4"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stage 2 after two epochs on a base model in a folder, read in each precision."""
    place = tmp_path_factory.mktemp("trained")
    base = save_base(place / "gemma")
    sign_table(60, seed=1).to_csv(place / "signs.csv", index=False)
    words = ["--mode", "classification", "--model_name", str(base), "--epochs", "2"]
    words += ["--data_path", str(place / "signs.csv"), "--min_cell", "0", "--log_file", "none"]
    words += ["--batch_size", "8", "--adapter_lr", "0.001", "--precision", "fp32"]
    stages = {}
    for kind, precision in KINDS.items():
        stages[kind] = place / kind / "classification"
        if kind == "float32":
            assert trainer.main([*words, "--output_dir", str(place / kind)]) == 0
        else:
            shutil.copytree(stages["float32"], stages[kind])
            rehash(stages[kind] / "best", **precision)
    return stages


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_is_found_whole(kind, trained, tmp_path):
    proof = export_merged(trained[kind], tmp_path / "out", BUILDERS)
    near = 1e-3 if kind == "float32" else 0.1
    assert proof.shares == pytest.approx([1, 1], abs=near)
    assert max(proof.words, proof.own) < (1e-4 if kind == "float32" else proof.allowed / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fault",
    [
        "the adapter is lost",
        "the adapter is added twice",
        "a layer is left out",
        "a scale is forgotten",
    ],
)
def test_a_trained_adapter_that_is_not_whole_is_refused(
    fault, kind, trained, tmp_path, monkeypatch
):
    spoil_merge(monkeypatch, fault)
    with pytest.raises(RunFault, match=r"adapter's effect found: (-?0\.[0-6]|[12]\.)"):
        export_merged(trained[kind], tmp_path / "out", BUILDERS)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_the_proof_computes_in_float32_and_leaves_the_model_as_it_was(trained):
    half = load_trained_model(trained["bfloat16"], BUILDERS)
    model = load_trained_model(trained["bfloat16"], BUILDERS, precision="fp32")
    weights = {name: weight.clone() for name, weight in half.model.named_parameters()}
    found = proof_logits(half)
    for name, weight in half.model.named_parameters():
        assert weight.dtype == weights[name].dtype
        assert torch.equal(weight, weights[name]), name
    for name, weight in model.model.named_parameters():  # the same values in float32
        weight.data = weights[name].float()
    expected = proof_logits(model)
    # bfloat16 holds the factor of the embeddings, too.
    torch.testing.assert_close(found.words, expected.words, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.own, expected.own, rtol=0, atol=1e-2)


def test_packed_weights_compute_in_bfloat16_again_after_the_proof(trained):
    packed = load_trained_model(trained["NF4 in bfloat16"], BUILDERS)

    def dtypes():
        found = (getattr(each, "compute_dtype", None) for each in packed.model.modules())
        return {dtype for dtype in found if dtype is not None}

    assert dtypes() == {torch.bfloat16}
    with computed_in_float32(packed.model.llm):
        assert dtypes() == {torch.float32}
    assert dtypes() == {torch.bfloat16}


# ------------------------------------------------------------------------------- the figures


def logits(words):
    """Logits whose own readout says nothing."""
    silent = torch.zeros(PROOF_ROWS)
    return ProofLogits(words=words, own=silent, scale=silent)


def test_an_effect_below_the_rounding_is_not_judged():
    torch.manual_seed(0)
    without, effect = torch.randn(2, PROOF_ROWS, 200)
    for size, judged in ((0.05, True), (0.01, False)):
        before = logits(without + size * effect)
        proof = compare(before, logits(without), logits(without), allowed=0.3)
        assert proof.own_share is None
        assert (proof.words_share is not None) == judged
        assert proof.holds != judged
        assert ("changes nothing beyond rounding" in proof.describe()) != judged
        assert ("effect found: 0.00" in proof.describe()) == judged


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_the_share_is_that_of_the_effect(share):
    torch.manual_seed(0)
    without, effect, noise = torch.randn(3, PROOF_ROWS, 200)
    before, after = without + effect / 10, without + share * effect / 10 + noise / 20
    proof = compare(logits(before), logits(without), logits(after), allowed=0.3)
    assert proof.words_share == pytest.approx(share, abs=0.03)


NAN = float("nan")


@pytest.mark.parametrize(
    ("words", "own", "shares", "holds"),
    [
        (0.1, 0.1, (1.0, 1.0), True),
        (0.1, 0.1, (None, None), True),
        (0.1, 0.1, (0.8, 1.2), True),
        (0.3, 0.1, (1.0, 1.0), False),
        (0.1, 0.3, (1.0, 1.0), False),
        (NAN, 0.1, (1.0, 1.0), False),
        (0.1, 0.1, (0.7, 1.0), False),
        (0.1, 0.1, (None, 1.3), False),
        (0.1, 0.1, (1.0, NAN), False),
    ],
)
def test_differences_and_shares_must_hold(words, own, shares, holds):
    proof = MergeProof(words, own, allowed=0.2, words_share=shares[0], own_share=shares[1])
    assert proof.holds == holds
