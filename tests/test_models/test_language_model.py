"""Base models: loading, refusals, 4-bit weights, LoRA, what training changes; on built ones."""

import builtins
import os
import re
import shutil

import bitsandbytes
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from train_writer import check

import language_models as made
from language_models import COMMIT, PUBLISHED, classifier_and_writer, edit_json, put_into_cache
from medgemma_clinical.commands.several import VARIANTS, variant_arguments
from medgemma_clinical.files import InputError
from medgemma_clinical.models import language_model
from medgemma_clinical.models.decoders import LORA_TARGETS
from medgemma_clinical.models.language_model import (
    DEMO_FOLDER,
    base_record,
    find_model,
)
from stages import arguments, stage_of_patients

LAYOUTS = {"hub": "language_model.model.", "new": "model.language_model."}
"""Names of the language weights: Google's published files, and transformers' own since 4.52."""

PROJECTIONS = {
    f"layers.{layer}.{block}.{name}"
    for layer in range(made.LAYERS)
    for block, names in (("self_attn", LORA_TARGETS[:4]), ("mlp", LORA_TARGETS[4:]))
    for name in names
}
IDS = torch.randint(6, 200, (2, 21), generator=torch.Generator().manual_seed(0))
FOUR_BITS = {"quantization": "nf4", "precision": "bf16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text-only checkpoint and a multimodal one in both layouts of names."""
    folders = {"text": made.save_text_checkpoint(tmp_path_factory.mktemp("text"))}
    for layout, prefix in LAYOUTS.items():
        folders[layout] = made.save_multimodal_checkpoint(tmp_path_factory.mktemp(layout), prefix)
    return folders


@pytest.fixture
def base(folders, tmp_path):
    return shutil.copytree(folders["text"], tmp_path / "base")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path)
    return tmp_path


def load(name, **more):
    return load_both(name, **more)[0]


def load_both(name, **more):
    options = {"nf4": None, "dtype": torch.float32, "device": made.CPU, **more}
    return language_model.load_language_model(str(name), **options)


def assert_refused(name):
    """Loading ends in one short line that names the model."""
    with pytest.raises(InputError, match=f"--model_name {re.escape(str(name))}: ") as caught:
        load(name)
    assert len(str(caught.value)) < 400 + len(str(name))


def assert_same_logits(model, folder, architecture):
    whole = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    expected = whole.eval()(input_ids=IDS).logits
    assert expected.std().item() > 0.1
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("published", PUBLISHED, ids=lambda model: model.name)
def test_load__each_published_layout_gives_the_logits_of_its_own_class(published, tmp_path):
    folder = made.save_published(tmp_path / "model", published)
    model, words = load(folder), ("ForCausalLM", "ForConditionalGeneration")[published.sight]
    assert_same_logits(model, folder, f"Gemma3{words}")
    rope = model.config.rope_parameters["full_attention"]
    assert rope.get("factor") == (8.0 if published.text["rope_scaling"] else None)
    assert [k for k, kind in enumerate(model.config.layer_types) if kind[0] == "f"] == [5]
    classifier, _, collate = classifier_and_writer(folder, **FOUR_BITS)
    assert classifier(collate([0])).logit.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load__takes_only_the_frozen_text_model_of_a_multimodal_one(folders, layout):
    model = load(folders[layout])
    assert_same_logits(model, folders["hub"], "Gemma3ForConditionalGeneration")
    assert type(model) is transformers.Gemma3ForCausalLM
    assert not [n for n, _ in model.named_modules() if re.search("vision|siglip|multi_modal", n)]
    assert not any(p.requires_grad or p.is_meta for p in model.parameters()) | model.training


def test_demo__is_small_and_its_tokenizer_keeps_any_text():
    model, tokenizer = load_both("demo")
    assert sum(weights.numel() for weights in model.parameters()) <= 1_000_000
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 4_000_000
    for text in ("24.08 (0h) -> -3 (2.5h)", " yes", "Ärztin, 5 µmol/L\n\t日本 🙂", "<bos> <pad>"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {*ids} & {*tokenizer.all_special_ids}
    assert len(tokenizer.tokenize("120345")) == 6, "each digit is a token"


@pytest.mark.slow
def test_demo__copies_the_numbers_of_made_up_rows_into_reports():
    form, true = check(*load_both("demo"), np.random.default_rng(43), tables=2)
    assert form >= 0.9
    assert true >= 0.95


def test_attention__a_folder_names_none_and_both_kinds_give_the_same(base):
    edit_json(base / "config.json", attn_implementation="someone/kernel")
    assert load(base).config._attn_implementation == "sdpa"
    found = []
    for attention in ("sdpa", "eager"):
        assert load("demo", attention=attention).config._attn_implementation == attention
        classifier, writer, collate = classifier_and_writer(base, attention=attention)
        assert classifier.llm.config._attn_implementation == attention
        classifier.train()(collate(range(8))).loss.backward()
        gradients = [p.grad for p in classifier.llm.parameters() if p.grad is not None]
        found.append((gradients, writer.write(collate(range(8)), 12, [1], 0)))
    (fused, report), (plain, same) = found
    torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-5)
    assert torch.equal(report, same)


UP = "model.layers.1.mlp.up_proj.weight"


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_digit(folder):
    text = (folder / "tokenizer.json").read_text()
    assert '"2":' in text
    (folder / "tokenizer.json").write_text(text.replace('"2":', '"lost":'))


def save_adapter(folder):
    """Transformers would load it, and follow the name of a base model in it."""
    llm = classifier_and_writer(folder).classifier.llm
    llm.save_pretrained(folder, save_embedding_layers=False)


FAULTS = {
    "no file": lambda base: [path.unlink() for path in base.iterdir()],
    "a lost weight": lambda base: edit_weights(base, lambda weights: weights.pop(UP)),
    "another shape": lambda base: edit_weights(base, lambda w: w.update({UP: torch.zeros(96, 64)})),
    "cut weights": lambda base: os.truncate(base / "model.safetensors", 200),
    "pickled weights": pickle_weights,
    "cut config.json": lambda base: os.truncate(base / "config.json", 200),
    "a list in config.json": lambda base: (base / "config.json").write_text("[]"),
    "no tokenizer": lambda base: (base / "tokenizer.json").unlink(),
    "an empty tokenizer": lambda base: (base / "tokenizer.json").write_text("{}"),
    "a tokenizer of another class": lambda base: edit_json(
        base / "tokenizer_config.json", tokenizer_class="BertTokenizer"
    ),
    "no end": lambda base: edit_json(base / "tokenizer_config.json", eos_token=None),
    "a tokenizer without the digit 2": lose_digit,
    "an adapter": save_adapter,
}
CONFIGS = [
    {"model_type": "gemma3n"},
    {"model_type": None},
    {"model_type": ["gemma3"] * 99},
    {"use_bidirectional_attention": True},  # of an embedding model
    {"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"model_type": "gemma3", "text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
    {"hidden_size": -5},
    {"num_attention_heads": "x"},
    {"hidden_activation": "__import__"},
]


@pytest.mark.parametrize("fault", FAULTS)
def test_load__refuses_a_folder_without_a_whole_model(fault, base):
    FAULTS[fault](base)
    assert_refused(base)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_load__refuses_what_it_cannot_train_in_a_folder_and_on_the_hub(config, base, cache):
    edit_json(base / "config.json", **config)
    put_into_cache(cache, "some/model", base)
    assert_refused(base)
    assert_refused("some/model")


@pytest.mark.parametrize("name", ["a/b/c", "-a", "x" * 300, "no-slash", "google/not-there"])
def test_find_model__refuses_a_name_that_is_neither_a_folder_nor_in_reach(name, cache):
    assert_refused(name)


@pytest.mark.parametrize("whole", [True, False])
def test_load__code_of_a_model_never_runs(whole, base, tmp_path, monkeypatch):
    made.bring_code(base, tmp_path / "ran", whole=whole)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    if whole:
        assert load(base).generate(IDS, max_new_tokens=1).shape == (2, 22)
    else:
        assert_refused(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError(),
        torch.AcceleratorError(),
        RuntimeError("CUDA driver error: out of memory"),
    ],
)
def test_load__a_fault_of_the_machine_is_not_blamed_on_the_files(error, base, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.Gemma3ForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)):
        load(base)


def test_hub__a_model_is_found_in_the_cache_and_its_revision_is_the_commit(folders, cache):
    name = "google/medgemma-4b-pt"
    put_into_cache(cache, name, folders["hub"])
    assert find_model(name).name == find_model(name, COMMIT).name == COMMIT
    stage = stage_of_patients("--mode", "generative", "--model_name", name)
    known = {"base_model": name, "base_sha256": None, "base_revision": COMMIT}
    assert stage.config.items() >= known.items()
    save_adapter(find_model(name))
    assert_refused(name)


def test_base_record__weights_are_hashed_once_a_process_and_when_they_change(base, monkeypatch):
    hashed, real = [], language_model.file_hash
    monkeypatch.setattr(language_model, "file_hash", lambda p: hashed.append(p.name) or real(p))
    first, again = base_record(str(base)), base_record(str(base))
    assert first == again == {**first, "base_model": "base", "base_revision": None}
    assert sorted(hashed) == sorted(p.name for p in base.iterdir() if p.suffix != ".py")
    (base / "README.md").write_text("notes")
    assert base_record(str(base)) == first
    del hashed[:]
    edit_weights(base, lambda weights: weights[UP].add_(1))
    assert base_record(str(base))["base_sha256"] != first["base_sha256"]
    assert hashed == ["model.safetensors"]
    assert set(base_record("demo").values()) == {"demo", None}


@pytest.mark.parametrize(("kind", "words"), [("text", {}), ("hub", FOUR_BITS)])
def test_build_llm__lora_alone_learns_in_float32_on_the_seven_projections(folders, kind, words):
    llm = classifier_and_writer(folders[kind], **words).classifier.llm
    weights = dict(llm.named_parameters())
    learning = {name: p.dtype for name, p in weights.items() if p.requires_grad}
    layers = {f"base_model.model.model.{name}" for name in PROJECTIONS}
    names = [f"{name}.lora_{x}.default.weight" for name in layers for x in "AB"]
    assert learning == dict.fromkeys(names, torch.float32)
    assert (llm.peft_config["default"].r, llm.peft_config["default"].lora_alpha) == (8, 16)
    packed = {n: m for n, m in llm.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert set(packed) == ({f"{name}.base_layer" for name in layers} if words else set())
    whole = load(folders[kind])
    for name, layer in packed.items():
        state, weight = layer.weight.quant_state, layer.weight.data
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert (weight.dtype, layer.compute_dtype) == (torch.uint8, torch.bfloat16)
        module = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        true = whole.get_submodule(module).weight
        error = bitsandbytes.functional.dequantize_4bit(weight, state).float() - true
        assert 0 < float(error.norm() / true.norm()) < 0.15
    words = llm.get_output_embeddings()
    assert type(words) is torch.nn.Linear
    assert words.weight is llm.get_input_embeddings().weight
    assert words.weight.dtype == (torch.bfloat16 if packed else torch.float32)


@pytest.mark.parametrize(("kind", "words"), [("classifier", FOUR_BITS), ("writer", {})])
def test_training__changes_what_learns_and_no_bit_of_the_base(folders, kind, words):
    parts = classifier_and_writer(folders["hub"], new=True, **words)
    model = getattr(parts, kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    for _ in range(3):  # the first step moves no LoRA A, as B is zero
        model.train()(parts.collate(range(8))).loss.backward()
        optimizer.step()
    after = model.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(learning)
    modules = {"llm", "projection", "stage1"} | ({"head"} if kind == "classifier" else set())
    assert {name.split(".")[0] for name in learning} == modules
    assert sum("quant_state" in n for n in before) == (len(PROJECTIONS) if words else 0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_training__recomputed_layers_or_an_evaluation_between_change_no_gradient(
    quantization, folders
):
    """On a CPU bitsandbytes may repack weights when it evaluates; no gradient passes those."""
    model, _, collate = classifier_and_writer(folders["text"], quantization=quantization)
    found = []
    for change in (lambda: None, lambda: language_model.set_checkpointing(model.llm)):
        change()
        model.train().zero_grad()
        model(collate(range(8))).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        with torch.no_grad():
            model.eval()(collate(range(4)))
    assert model.llm.get_decoder().gradient_checkpointing
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuda", [True, False])
def test_random_weights__are_never_in_four_bits(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    usual, random = ["--precision", "fp32", "--output_dir", "run"], ["--base_weights", "random"]
    given, kind = arguments(*usual), "nf4" if cuda else "none"
    assert given.quantization == kind
    for words in (random, ["--model_name", "demo"]):
        assert arguments(*usual, *words).quantization == "none"
        with pytest.raises(InputError, match="--quantization"):
            arguments(*usual, *words, "--quantization", "nf4")
    for own in (variant_arguments(name, given) for name in VARIANTS):
        assert own.quantization == ("none" if own.base_weights == "random" else kind)
