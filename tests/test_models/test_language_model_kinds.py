"""Which models are taken and which are refused, their layouts, their attention: on built ones."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers

from language_models import (
    CPU,
    PUBLISHED,
    PublishedModel,
    bring_code,
    classifier_and_writer,
    put_into_cache,
    save_published,
    save_text_checkpoint,
)
from medgemma_clinical.files import InputError
from medgemma_clinical.models.language_model import base_facts, load_language_model

IDS = torch.randint(6, 200, (2, 21), generator=torch.Generator().manual_seed(0))
FLASH = "flash_attention_2"
NOT_THERE = "google/gemma-3-4b-pt"


def load(name: str | Path, quantization: str = "none", **more: Any) -> Any:
    return load_language_model(str(name), quantization, torch.float32, CPU, **more)[0]


def refusal(name: str | Path, quantization: str = "none", **more: Any) -> str:
    """Return the refusal's text, which is one line."""
    with pytest.raises(InputError) as caught:
        load(name, quantization, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's models."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# ------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda model: model.name)
def test_each_published_layout_gives_the_logits_of_its_own_class(
    published: PublishedModel, tmp_path: Path
) -> None:
    folder = save_published(tmp_path / "model", published)
    kind = "Gemma3ForConditionalGeneration" if published.sight else "Gemma3ForCausalLM"
    whole = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    model = load(folder)
    expected = whole(input_ids=IDS).logits
    assert expected.std().item() > 0.1
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    rope = model.config.rope_parameters["full_attention"]
    assert rope.get("factor") == (8.0 if published.text["rope_scaling"] else None)
    assert [k for k, kind in enumerate(model.config.layer_types) if kind[0] == "f"] == [5]
    quantised = load(folder, "nf4")
    assert quantised(input_ids=IDS).logits.isfinite().all()


def test_a_model_in_shards_loads_by_its_hub_id_from_the_cache(cache: Path, tmp_path: Path) -> None:
    published = PUBLISHED[1]
    folder = save_published(tmp_path / "model", published)
    put_into_cache(cache, published.name, folder)
    logits = load(published.name)(input_ids=IDS).logits
    assert torch.equal(logits, load(folder)(input_ids=IDS).logits)
    assert base_facts(published.name)["base_model"] == published.name


# ------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "names llama"),
        ({"model_type": "gemma3n"}, "names gemma3n"),
        ({"model_type": "of_next_year"}, "names of_next_year"),
        ({"architectures": ["MambaLMHeadModel"]}, "names ['MambaLMHeadModel']"),
        ({"model_type": ["gemma3"] * 99}, "names ['gemma3', 'gemma3'"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "of an embedding model",
        ),
        (
            {"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}},
            "of an embedding model",
        ),
    ],
)
def test_another_architecture_is_named_and_no_licence_is_blamed(
    config: dict[str, Any], found: str, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    put_into_cache(cache, "some/model", **config)
    for name in (tmp_path, "some/model"):
        text = refusal(name)
        assert f"--model_name {name}: only Gemma 3 models: its config.json " in text
        assert found in text
        assert text.endswith(
            "give google/medgemma-4b-pt, google/medgemma-27b-text-it or another Gemma 3"
        )
        assert "licence" not in text
        assert len(text) < 400


def test_a_hub_model_without_config_json_is_no_question_of_a_licence(cache: Path) -> None:
    put_into_cache(cache, "some/model-GGUF")
    text = refusal("some/model-GGUF")
    assert "only Gemma 3 models: no config.json names its architecture (GGUF files and" in text
    assert "licence" not in text
    assert f"accept its licence at https://huggingface.co/{NOT_THERE}" in refusal(NOT_THERE)


def test_code_of_another_architecture_does_not_run(tmp_path: Path) -> None:
    folder = save_text_checkpoint(tmp_path / "model")
    bring_code(folder, tmp_path / "ran", whole=False)
    assert "names own: give" in refusal(folder)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------- attention


def test_plain_attention_gives_the_same_logits_with_padding_on_either_side(tmp_path: Path) -> None:
    folder = save_published(tmp_path / "model", PUBLISHED[1])
    fused, plain = load(folder), load(folder, attention="eager")
    assert fused.config._attn_implementation == "sdpa"
    assert plain.config._attn_implementation == "eager"
    for padding in (slice(15, None), slice(None, 6)):
        mask = torch.ones_like(IDS)
        mask[0, padding] = 0
        one, other = (m(input_ids=IDS, attention_mask=mask).logits for m in (fused, plain))
        kept = mask.bool()
        torch.testing.assert_close(other[kept], one[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tiny_model_takes_the_attention_too(attention: str) -> None:
    assert load("tiny", attention=attention).config._attn_implementation == attention


def test_plain_attention_gives_the_same_gradients_and_reports() -> None:
    found = []
    for attention in ("sdpa", "eager"):
        classifier, writer, collate = classifier_and_writer(base=load("tiny", attention=attention))
        classifier.train()(collate(range(8))).loss.backward()
        gradients = {n: p.grad for n, p in classifier.named_parameters() if p.grad is not None}
        written = writer.write(collate(range(8)), 12, collate.eos, collate.pad)
        found.append((gradients, written))
    (fused, report), (plain, same) = found
    assert fused.keys() == plain.keys() != set()
    for name, gradient in fused.items():
        torch.testing.assert_close(plain[name], gradient, rtol=1e-3, atol=1e-5)
    assert torch.equal(report, same)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash-attn, as far as looking for it goes."""
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))


def refusal_of_flash(device: str, dtype: torch.dtype) -> str:
    with pytest.raises(InputError) as caught:
        load_language_model("tiny", "none", dtype, torch.device(device), attention=FLASH)
    return str(caught.value)


@pytest.mark.usefixtures("flash_attn")
def test_flash_attention_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = save_text_checkpoint(tmp_path / "model"), {}

    def load_no_further(*_: object, **words: object) -> None:
        asked.update(words)
        raise MemoryError

    monkeypatch.setattr(transformers.Gemma3ForCausalLM, "from_pretrained", load_no_further)
    card = torch.device("cuda")
    with pytest.raises(MemoryError):
        load_language_model(str(folder), "nf4", torch.bfloat16, card, attention=FLASH)
    assert asked["attn_implementation"] == FLASH


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(
    ("device", "dtype", "lack"),
    [("cpu", torch.bfloat16, "an NVIDIA GPU"), ("cuda", torch.float32, "--precision bf16")],
)
def test_flash_attention_says_which_machine_it_needs(
    device: str, dtype: torch.dtype, lack: str
) -> None:
    assert f"--attention {FLASH} needs {lack}" in refusal_of_flash(device, dtype)


@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_or_broken_flash_attn_is_replaced_by_no_kernel_of_the_hub(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:  # as where the package was built for another torch
        (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(transformers.modeling_utils, "is_kernels_available", lambda: True)
    assert "the package flash-attn, 2.3.3 or later" in refusal_of_flash("cuda", torch.bfloat16)


@pytest.mark.parametrize("attention", ["flex_attention", "someone/kernel", "paged|eager"])
def test_another_attention_is_refused_before_it_is_fetched(attention: str) -> None:
    text = refusal("tiny", attention=attention)
    assert text == f"--attention {attention}: give one of sdpa, eager, {FLASH}"


# ------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [("int8", "overflows: use nf4"), ("fp4", "give nf4 or none")],
)
def test_weights_of_another_kind_are_refused_with_the_reason(
    quantization: str, reason: str
) -> None:
    text = refusal("tiny", quantization)
    assert text.startswith(f"--quantization {quantization}: ")
    assert reason in text
