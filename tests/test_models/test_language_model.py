"""Loading, refusals, 4-bit weights, LoRA and what training changes: on built checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from language_models import (
    COMMIT,
    CPU,
    LAYERS,
    Parts,
    bring_code,
    classifier_and_writer,
    put_into_cache,
    save_multimodal_checkpoint,
    save_text_checkpoint,
    text_config,
)
from medgemma_clinical.files import InputError, RunFault, one_line
from medgemma_clinical.models.language_model import (
    LORA_TARGETS,
    add_lora,
    base_content_hash,
    base_facts,
    cached_revision,
    describe_base,
    embedding_rms,
    load_language_model,
    set_checkpointing,
    tiny_language_model,
)

MEDGEMMA = "google/medgemma-4b-pt"
LICENCE = "https://huggingface.co/google/medgemma-4b-pt"
LAYOUTS = {"hub": "language_model.model.", "new": "model.language_model."}
"""Names of the language weights: Google's published files, and transformers' own since 4.52."""

PROJECTIONS = {
    f"layers.{layer}.{block}.{name}"
    for layer in range(LAYERS)
    for block, names in (("self_attn", LORA_TARGETS[:4]), ("mlp", LORA_TARGETS[4:]))
    for name in names
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text-only checkpoint and the same multimodal one in both layouts of names."""
    made = {"text": save_text_checkpoint(tmp_path_factory.mktemp("text"))}
    for layout, prefix in LAYOUTS.items():
        made[layout] = save_multimodal_checkpoint(tmp_path_factory.mktemp(layout), prefix)
    return made


def load(folder: Path, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    return load_language_model(str(folder), quantization, dtype, CPU)[0]


def refusal(name: str | Path) -> str:
    """Return the refusal's text, which must be one line that names the model."""
    with pytest.raises(InputError) as caught:
        load_language_model(str(name), "none", torch.float32, CPU)
    text = str(caught.value)
    assert "\n" not in text
    assert one_line(str(name)) in text
    return text


# ------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_language_part_of_a_multimodal_checkpoint_gives_the_same_logits(
    folders: dict[str, Path], layout: str
) -> None:
    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(folders["hub"]).eval()
    own = load(folders[layout])
    ids = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = whole(input_ids=ids).logits
    assert expected.std().item() > 0.1
    torch.testing.assert_close(own(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_a_text_only_checkpoint_gives_its_own_logits(folders: dict[str, Path]) -> None:
    plain = transformers.Gemma3ForCausalLM.from_pretrained(folders["text"]).eval()
    ids = torch.arange(6, 30)[None]
    logits = load(folders["text"])(input_ids=ids).logits
    torch.testing.assert_close(logits, plain(input_ids=ids).logits, rtol=0, atol=0)
    assert not torch.equal(logits, load(folders["hub"])(input_ids=ids).logits)


@pytest.mark.parametrize(("kind", "quantization"), [("text", "none"), ("hub", "nf4")])
def test_only_the_frozen_text_model_is_loaded(
    folders: dict[str, Path], kind: str, quantization: str
) -> None:
    model = load(folders[kind], quantization)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    assert not [n for n in names if re.search("vision|siglip|multi_modal|image", n, re.IGNORECASE)]
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert not any(p.is_meta for p in model.parameters())


def test_the_tokenizer_comes_from_the_folder(folders: dict[str, Path]) -> None:
    _, tokenizer = load_language_model(str(folders["hub"]), "none", torch.float32, CPU)
    _, expected = tiny_language_model()
    text = "Anion gap (mEq/L): 24 (0h) -> 20.5 (2h)\n"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2)


def test_the_tiny_model_is_always_the_same_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (tiny_language_model()[0].state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[k], second[k]) for k in first)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "lost"),
    [("text", "layers.1.mlp.up_proj.weight"), ("hub", "embed_tokens.weight")],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, lost: str
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not (k.endswith(lost) and "vision" not in k)}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights" in refusal(folder)


def test_a_weight_of_another_shape_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["text"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "no folder with a whole model" in refusal(folder)


@pytest.mark.parametrize(
    ("present", "reason"),
    [
        ("nothing", "no folder with a whole model"),
        ("config", "no folder with a whole model"),
        ("no tokenizer", "tokenizer files are missing or damaged"),
    ],
)
def test_a_folder_without_a_whole_model_is_refused(
    folders: dict[str, Path], tmp_path: Path, present: str, reason: str
) -> None:
    if present == "config":
        text_config().save_pretrained(tmp_path)
    if present == "no tokenizer":
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folders["text"] / name, tmp_path)
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_damaged_file_is_refused(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(folders["text"], tmp_path / "model")
    file = folder / {"weights": "model.safetensors", "config": "config.json"}[damage]
    file.write_bytes(file.read_bytes()[:200])
    assert f"--model_name {folder}: " in refusal(folder)


def test_a_missing_folder_gets_no_advice_about_the_hub(tmp_path: Path) -> None:
    text = refusal(tmp_path / "run401" / "gated")  # neither is the hub's word here
    assert "licence" not in text
    assert "no folder with a" in text


def test_the_tiny_model_is_not_quantised() -> None:
    with pytest.raises(InputError, match="tiny"):
        load_language_model("tiny", "nf4", torch.float32, CPU)


def test_a_model_that_cannot_be_fetched_ends_in_one_line_of_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(
            f"You are trying to access a gated repo.\nMake sure to have access: {LICENCE}"
        )

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    text = refusal(MEDGEMMA)
    for words in ("a gated repo. Make sure", LICENCE, "hf auth login", "--model_name tiny"):
        assert words in text


@pytest.mark.parametrize("name", ["a/b/c", "-a", "x" * 300])
def test_a_name_that_is_no_hub_id_has_no_revision_and_is_refused(name: str) -> None:
    assert cached_revision(name) is None
    assert "not a hub id" in refusal(name)


# ------------------------------------------------------------------------------- 4-bit weights


def test_nf4_quantises_every_projection_twice_and_nothing_else(folders: dict[str, Path]) -> None:
    import bitsandbytes

    model = load(folders["hub"], "nf4", torch.bfloat16)
    quantised = {
        n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)
    }
    assert set(quantised) == {f"model.{name}" for name in PROJECTIONS}
    for layer in quantised.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.dtype == torch.uint8
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nf4_weights_are_near_the_checkpoints_own(folders: dict[str, Path]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    plain, rough = load(folders["hub"]), load(folders["hub"], "nf4")
    for name in PROJECTIONS:
        true = plain.get_submodule(f"model.{name}").weight
        weight = rough.get_submodule(f"model.{name}").weight
        error = dequantize_4bit(weight.data, weight.quant_state).float() - true
        relative = float(error.square().mean().sqrt() / true.square().mean().sqrt())
        assert 0 < relative < 0.15


def adapted(folder: Path | str, quantization: str, dtype: torch.dtype, seed: int = 0) -> Any:
    base, _ = load_language_model(str(folder), quantization, dtype, CPU)
    torch.manual_seed(seed)
    return add_lora(base, 8, 16, 0.0)


def gradients(model: Any, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return hidden states, then gradients of inputs and adapter, of a pass in training mode."""
    model.train().zero_grad()
    inputs = inputs.clone().requires_grad_()
    hidden = model.get_base_model().model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    hidden[..., :9].square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    return hidden.detach(), [g for g in (inputs.grad, *(p.grad for p in learning)) if g is not None]


def test_an_evaluation_between_changes_neither_states_nor_gradients(
    folders: dict[str, Path],
) -> None:
    """On a CPU bitsandbytes may repack weights when it evaluates; no gradient passes those."""
    model = adapted(folders["text"], "nf4", torch.float32)
    inputs = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    hidden, before = gradients(model, inputs)
    with torch.no_grad():
        body = model.eval().get_base_model().model
        scored = body(inputs_embeds=inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(scored, hidden, rtol=0, atol=1e-5)
    again, after = gradients(model, inputs)
    assert torch.equal(again, hidden)
    assert len(before) == len(after) == 1 + 2 * len(PROJECTIONS)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(("kind", "quantization"), [("text", "none"), ("hub", "nf4")])
def test_lora_lies_on_the_seven_projections_of_each_layer_and_nowhere_else(
    folders: dict[str, Path], kind: str, quantization: str
) -> None:
    model = adapted(folders[kind], quantization, torch.float32)
    carriers = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert carriers == {f"base_model.model.model.{name}" for name in PROJECTIONS}
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{n}.lora_{x}.default.weight" for n in carriers for x in "AB"}
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.bias) == (8, 16, "none")


def test_the_adapter_is_float32_seeded_and_changes_nothing_at_first(
    folders: dict[str, Path],
) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = adapted(folders["text"], "nf4", torch.bfloat16, seed)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    first, again, other = weights(0), weights(0), weights(1)
    for name, weight in first.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again[name])
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert not torch.equal(weight, other[name])


def test_the_adapter_of_gemma_3_4b_has_the_known_size() -> None:
    """Sizes of the model: Gemma 3's config.json."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
    with torch.device("meta"):  # shapes without weights
        base = transformers.Gemma3ForCausalLM(config).requires_grad_(False)
        llm = add_lora(base, 8, 16, 0.0)
    assert sum(p.numel() for p in llm.parameters() if p.requires_grad) == 14_901_248


def test_embedding_rms_is_that_of_the_scaled_embeddings() -> None:
    model, _ = tiny_language_model()
    vectors = model.get_input_embeddings()(torch.tensor([5, 6, 7, 8]))
    expected = float(vectors.detach().square().mean().sqrt())
    assert embedding_rms(model, [5, 6, 7, 8]) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(64**0.5 * 0.125, rel=0.2)


# ------------------------------------------------------------------------------- training


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer, 4-bit weights with their scales."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(parts: Parts, kind: str, steps: int = 3) -> nn.Module:
    """Take some steps, with an evaluation in front, where bitsandbytes may repack weights."""
    model: nn.Module = getattr(parts, kind)
    with torch.no_grad():
        model.eval()(parts.collate(range(4)))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(parts.collate(range(8))).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("kind", "quantization", "dtype"),
    [("classifier", "nf4", "bfloat16"), ("writer", "none", "float32")],
)
def test_training_changes_what_learns_and_no_bit_of_the_base(
    folders: dict[str, Path], kind: str, quantization: str, dtype: str
) -> None:
    base = load(folders["hub"], quantization, getattr(torch, dtype))
    parts = classifier_and_writer(base=base, new=True)
    before = bits(getattr(parts, kind))
    model = train(parts, kind)
    after = bits(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in before if not torch.equal(before[n], after[n])} == learning
    modules = {"llm", "projection", "stage1"}
    modules |= {"head"} if kind == "classifier" else set()
    assert {n.split(".")[0] for n in learning} == modules
    if quantization == "nf4":
        assert sum("quant_state" in n for n in before) == len(PROJECTIONS)


def test_recomputed_layers_change_no_gradient() -> None:
    found = []
    for on in (False, True):
        model, _, collate = classifier_and_writer()
        if on:
            set_checkpointing(model.llm)
        assert model.body.gradient_checkpointing == on
        model.train()(collate(range(8))).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() != set()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("whole", [True, False])
def test_code_that_a_model_folder_brings_never_runs(
    whole: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders["text"], tmp_path / "model")
    bring_code(folder, tmp_path / "ran", whole=whole)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if whole:
        load(folder)
    else:
        assert "only Gemma 3 models" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_attention_is_torchs_whatever_the_folder_names(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["text"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["attn_implementation"] = "someone/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).config._attn_implementation == "sdpa"


def test_pickled_weights_and_adapters_are_no_base_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["text"], tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "google/other"}')
    assert "an adapter: give the base model" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load(folder)
    (folder / "model.safetensors").unlink()
    assert "its weights are pickled, which can run code, and are not read" in refusal(folder)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("device-side assert triggered"),
        RuntimeError("Attempted to use bitsandbytes native library functionality"),
        OSError("libcudart.so.13: cannot open shared object file"),
        ImportError("Using 4-bit quantization requires bitsandbytes"),
        AttributeError("function 'cquantize_blockwise_fp16_nf4' not found"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_fault_of_the_card_is_not_blamed_on_the_files(
    error: Exception, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(transformers.Gemma3ForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load(folders["text"])
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError, "out of memory"),
        (RuntimeError("CUDA error: invalid argument"), RunFault, "take --quantization none"),
    ],
)
def test_a_fault_while_weights_are_quantised_is_one_of_the_machine(
    error: Exception,
    expected: type[Exception],
    text: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The loading library swallows such an error and raises one without its cause."""
    import bitsandbytes.functional

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
        with pytest.raises(expected, match=text):
            load(folders["text"], "nf4")
    assert tuple(capfd.readouterr()) == ("", "")
    load(folders["text"], "nf4")


def test_a_folder_is_named_by_its_name_alone_and_before_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), pytest.raises(InputError):
        load_language_model(str(tmp_path), "none", torch.float32, CPU, origin="the checkpoint")
    assert f"language model: {tmp_path.name}, a folder, named by the checkpoint" in caplog.text
    assert str(tmp_path) not in caplog.text
    digest = base_content_hash(str(folders["text"]))
    known = {"base_model": folders["text"].name, "base_sha256": digest, "base_revision": None}
    assert base_facts(str(folders["text"])) == known
    assert base_facts(MEDGEMMA)["base_model"] == MEDGEMMA
    assert describe_base("tiny", None) == "tiny, built in"
    assert describe_base(MEDGEMMA, "0" * 40) == f"{MEDGEMMA}, revision {'0' * 40}"
    assert describe_base("no/such", None) == "no/such, revision the latest"


def test_attention_by_cudnn_is_switched_off() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_language_model("tiny", "none", torch.float32, CPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_hash_of_a_folder_follows_its_model_files_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["text"], tmp_path / "model")
    first = base_content_hash(str(folder))
    (folder / "README.md").write_text("notes")
    (folder / ".DS_Store").write_bytes(b"\0")
    assert base_content_hash(str(folder)) == first == base_content_hash(str(folders["text"]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert base_content_hash(str(folder)) != first
    assert base_content_hash("tiny") is base_content_hash(MEDGEMMA) is None
    assert cached_revision("tiny") is cached_revision(str(folder)) is None


def test_a_hub_model_loads_in_silence_from_the_cache_and_its_commit_is_known(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    put_into_cache(tmp_path, MEDGEMMA, folders["hub"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base, _ = load_language_model(MEDGEMMA, "nf4", torch.bfloat16, CPU)
    add_lora(base, 8, 16, 0.0).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert cached_revision(MEDGEMMA) == COMMIT
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 10**8, "layer_types": None}, "num_hidden_layers must be 1 to 256"),
        ({"hidden_size": -5}, "hidden_size"),
        ({"num_attention_heads": "x"}, "num_attention_heads"),
        ({"hidden_activation": "__import__"}, "__import__"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already"),
    ],
)
def test_a_base_model_of_absurd_facts_is_refused_in_one_line(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    folder = save_text_checkpoint(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=problem) as caught:
        load_language_model(str(folder), "none", torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_an_empty_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_text_checkpoint(tmp_path / "base")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="--model_name"):
        load_language_model(str(folder), "none", torch.float32, CPU)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_random_weights_are_those_of_a_model_before_training_and_always_the_same(
    quantization: str, folders: dict[str, Path]
) -> None:
    def random_model() -> Any:
        folder = str(folders["hub"])
        return load_language_model(folder, quantization, torch.float32, CPU, weights="random")[0]

    one, two, trained = random_model(), random_model().state_dict(), load(folders["hub"])
    assert not any(parameter.requires_grad for parameter in one.parameters())
    for name, weights in one.named_parameters():
        assert torch.equal(weights, two[name])
        assert weights.shape == trained.get_parameter(name).shape
        size = one.config.initializer_range if weights.ndim > 1 else 0
        assert float(weights.std()) == pytest.approx(size, rel=0.1)
        assert not torch.equal(weights, trained.get_parameter(name)) or weights.ndim == 1
    assert one.lm_head.weight is one.get_input_embeddings().weight
