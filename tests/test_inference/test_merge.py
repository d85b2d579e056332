"""Adapters merged into their base models: folders that compute what the trained model computes."""

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from medgemma_clinical.inference.merge import export_merged, merge_adapter
from medgemma_clinical.inference.merge_proof import PROOF_ROWS, proof_batch, proof_logits
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_models import (
    CPU,
    bring_code,
    classifier_and_writer,
    data_of,
    disturb_adapter,
    patients,
    rehash,
    save_multimodal_checkpoint,
)
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.inference import merge
from medgemma_clinical.models.checkpoints import MERGED_MODEL, save_llm
from medgemma_clinical.models.language_model import load_language_model
from medgemma_clinical.models.trained_model import load_trained_model, read_trained_config
from medgemma_clinical.models.trajectory_llm import LLMWriter
from merged_models import BUILDERS, llm_config, save_base, save_stage, spoil_merge

KINDS = {
    "float32": ("none", "fp32"),
    "bfloat16": ("none", "bf16"),
    "NF4 in bfloat16": ("nf4", "bf16"),
    "NF4 in float32": ("nf4", "fp32"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="module")
def stages(base, tmp_path_factory):
    """A stage 3 of each kind, whose adapters matter."""
    place = tmp_path_factory.mktemp("runs")
    return {
        kind: save_stage(place / kind, "generative", base, *words, change=0.1)
        for kind, words in KINDS.items()
    }


@pytest.fixture(scope="module")
def stage(stages):
    """A stage 3 in float32."""
    return stages["float32"]


def read_back(folder):
    """The exported language model, read by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / MERGED_MODEL, dtype="auto")
    return model.eval()


def written(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("stage_name", ["classification", "generative"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_computes_what_the_trained_one_computes(
    kind, stage_name, base, tmp_path
):
    quantization, precision = KINDS[kind]
    stage = save_stage(tmp_path / "run", stage_name, base, quantization, precision)
    out = tmp_path / "out"
    proof = export_merged(stage, out, BUILDERS)
    assert proof.holds
    assert proof.allowed < 0.15
    assert max(proof.words, proof.own) < (1e-4 if kind == "float32" else proof.allowed)
    trained, merged = load_trained_model(stage, BUILDERS), load_trained_model(out, BUILDERS)
    assert merged.rule == trained.rule
    batch = classifier_and_writer().collate(range(8))
    with torch.no_grad():
        expected, found = trained.model(batch), merged.model(batch)
    assert torch.equal(expected.offset, found.offset)
    assert (found.logit - expected.logit).abs().max() < (1e-4 if kind == "float32" else 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_an_ordinary_one_of_transformers_with_tied_embeddings(
    kind, base, stages, tmp_path
):
    out = tmp_path / "out"
    export_merged(stages[kind], out, BUILDERS)
    files = {"config.json", "generation_config.json", "model.safetensors", "NOTICE"}
    files |= {"tokenizer.json", "tokenizer_config.json"}
    beside = {"config.json", "modules.safetensors", "NOTICE", "README.md"}
    assert written(out) == beside | {f"{MERGED_MODEL}/{name}" for name in files}
    assert "quantization_config" not in json.loads((out / MERGED_MODEL / "config.json").read_text())
    weights = load_file(out / MERGED_MODEL / "model.safetensors")
    assert "lm_head.weight" not in weights
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    model = read_back(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == dtype
    original = load_file(base / "model.safetensors")
    assert weights.keys() == original.keys()
    key = "model.embed_tokens.weight"
    assert torch.equal(weights[key], original[key].to(dtype))
    tokenizer = AutoTokenizer.from_pretrained(out / MERGED_MODEL)
    assert (
        tokenizer("24 (0h)")["input_ids"]
        == AutoTokenizer.from_pretrained(base)("24 (0h)")["input_ids"]
    )


def test_the_language_model_of_a_multimodal_base_is_written_alone(tmp_path):
    base = save_multimodal_checkpoint(tmp_path / "multimodal", "language_model.model.")
    out = tmp_path / "out"
    export_merged(save_stage(tmp_path / "run", "classification", base), out, BUILDERS)
    config = json.loads((out / MERGED_MODEL / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert not any("vision" in key for key in load_file(out / MERGED_MODEL / "model.safetensors"))
    generation = json.loads((out / MERGED_MODEL / "generation_config.json").read_text())
    assert not {"cache_implementation", "top_k", "top_p"} & generation.keys()


def test_the_settings_of_generation_are_those_of_our_reports(stage, tmp_path):
    export_merged(stage, tmp_path / "out", BUILDERS)
    settings = read_back(tmp_path / "out").generation_config
    assert (settings.do_sample, settings.max_new_tokens) == (False, 60)
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == ([1], 0, 2)


def test_the_readme_says_what_the_folder_is(stage, tmp_path):
    export_merged(stage, tmp_path / "out", BUILDERS)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "`gemma` (SHA-256 of its files",
        "generative model",
        "fp32",
        "HAI-DEF Terms of Use",
    ):
        assert part in card
    assert {"{", "}"}.isdisjoint(card)


def test_words_of_a_checkpoint_are_no_markup_in_the_readme(stage):
    words = {key: f"<b>{key}</b> [x](http://y) `" for key in ("base_model", "question", "outcome")}
    card = merge.export_card(read_trained_config(stage) | words, "fp32")
    for text in words.values():
        assert f"`` {text} ``" in card


def test_a_model_of_text_alone_is_exported(base, tmp_path):
    parts = classifier_and_writer(base)
    alone = LLMWriter(None, None, parts.writer.llm, tokens=0, bos=2, verdict=parts.writer.verdict)
    unread = {"facts": [], "prediction_time": False}
    config = llm_config(parts.writer, "generative", data_of(patients()), base=base)
    config |= {"encoder": None, "members": 0, "inputs": unread, "num_prefix_tokens": 0}
    config |= {"stage1_logit": False}
    (tmp_path / "generative").mkdir()
    save_llm(tmp_path / "generative" / "best", alone, config)
    place = tmp_path / "generative"
    proof = export_merged(place, tmp_path / "out", BUILDERS, model_name=str(base))
    assert max(proof.words, proof.own) < 1e-4


# ------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_four_bit_weights_become_those_that_the_model_computed_with(precision, base):
    adapted = classifier_and_writer(base, quantization="nf4", precision=precision).writer.llm
    disturb_adapter(adapted, 0.0)
    products = {}
    for name, module in adapted.get_base_model().named_modules():
        if name.endswith(".base_layer"):
            unit = torch.eye(module.in_features, dtype=module.compute_dtype)
            products[name.removesuffix(".base_layer")] = module(unit).T
    assert len(products) == 14
    merged = merge_adapter(adapted, "nf4")
    for name, product in products.items():
        weight = merged.get_parameter(f"{name}.weight")
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, product.to(torch.bfloat16)), name


def test_each_change_is_rounded_once(base):
    """bfloat16 added to bfloat16 would round the change, and then the sum."""
    adapted = classifier_and_writer(base, precision="bf16").writer.llm
    generator, original, changes = torch.Generator().manual_seed(0), {}, {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            up.data.normal_(0, 0.01, generator=generator)
            original[f"{name}.weight"] = module.get_base_layer().weight.clone()
            changes[f"{name}.weight"] = (up.double() @ down.double()) * 16 / 8
    merged = merge_adapter(adapted, "none")
    assert len(changes) == 14
    for name, change in changes.items():
        expected = (original[name].double() + change).to(torch.bfloat16)
        found = merged.get_parameter(name)
        assert (found != expected).float().mean() < 1e-3, name  # where float32 and double differ
        assert (found != original[name]).any()


# ------------------------------------------------------------------------------- the proof


def test_the_rows_of_the_proof_are_padded_and_the_same_each_time(stage):
    trained = load_trained_model(stage, BUILDERS)
    model = trained.model
    batch, again = proof_batch(model), proof_batch(model)
    lengths = batch["text_mask"].sum(1)
    assert len(lengths) == PROOF_ROWS
    assert len(lengths.unique()) > 10
    assert torch.equal(batch["verdict"], lengths - 1)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert torch.equal(batch["states"], again["states"])
    assert batch["states_mask"].sum(1).unique().tolist() == [1, 2, 3, 4]
    assert batch["states_mask"][:, -1].all()  # the latest states stand last
    assert torch.allclose(batch["states"].std(-1, unbiased=False), torch.ones(()), atol=1e-3)
    logits = proof_logits(trained)
    assert logits.words.shape == (PROOF_ROWS, model.llm.config.vocab_size)
    assert logits.own.shape == (PROOF_ROWS,)
    assert (logits.own.abs() < 4 * logits.scale).all()
    assert logits.own.square().mean() > 0.1 * logits.scale.square().mean()
    model.stage1 = None  # without soft tokens the logits are others
    assert not torch.allclose(proof_logits(trained).words, logits.words, atol=0.01)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "NF4 in bfloat16"])
@pytest.mark.parametrize(
    "fault",
    [
        "a layer is left out",
        "a scale is forgotten",
        "the head is no longer tied",
        "not a number",
        "the file differs from the model",
    ],
)
def test_a_wrong_merge_is_refused_and_leaves_nothing(fault, kind, stages, tmp_path, monkeypatch):
    spoil_merge(monkeypatch, fault)
    with pytest.raises(RunFault, match=r"computes other logits .* nothing was written") as caught:
        export_merged(stages[kind], tmp_path / "out", BUILDERS)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_a_fault_keeps_the_earlier_export(stage, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_merged(stage, out, BUILDERS)
    before = (out / "config.json").read_bytes()
    spoil_merge(monkeypatch, "not a number")
    with pytest.raises(RunFault):
        export_merged(stage, out, BUILDERS)
    assert (out / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}


def test_a_head_that_says_nothing_has_no_difference(base, tmp_path):
    model = classifier_and_writer(base, new=True).classifier
    (tmp_path / "run").mkdir()
    config = llm_config(model, "classification", data_of(patients()), base=base)
    save_llm(tmp_path / "run" / "best", model, config)
    proof = export_merged(tmp_path / "run", tmp_path / "out", BUILDERS, model_name=str(base))
    assert proof.own == 0
    assert proof.holds


def test_one_model_is_in_memory_at_a_time(stage, tmp_path, monkeypatch):
    seen = []

    def load(*args, **kwargs):
        assert [ref() for ref in seen] == [None] * len(seen)
        trained = load_trained_model(*args, **kwargs)
        seen.append(weakref.ref(trained.model.llm.get_input_embeddings()))
        return trained

    monkeypatch.setattr(merge, "load_trained_model", load)
    export_merged(stage, tmp_path / "out", BUILDERS)
    assert len(seen) == 2


# ------------------------------------------------------------------------------- places


def test_an_earlier_export_is_replaced_and_nothing_else_is(stage, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_merged(stage, out, BUILDERS)
    before = written(out)
    export_merged(stage, out, BUILDERS)
    assert written(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(out)
    shutil.copytree(stage / "best", tmp_path / "best")
    for name in ("other", "file", "link", "best"):
        with pytest.raises(InputError, match=r"exists and is no earlier export: choose a new"):
            export_merged(stage, tmp_path / name, BUILDERS)
    assert written(other) == {"config.json"}
    monkeypatch.chdir(out)
    export_merged(stage, Path(), BUILDERS)
    assert [path.name for path in tmp_path.glob(".*")] == [".out.lock"]
    with pytest.raises(InputError, match="give a folder within one that exists"):
        export_merged(stage, tmp_path / "absent" / "out", BUILDERS)


@pytest.mark.parametrize(
    "name", ["model.gguf", "notes.txt", f"{MERGED_MODEL}/model.gguf", f"{MERGED_MODEL}/note.json"]
)
def test_what_a_person_put_into_an_export_is_not_deleted(name, stage, tmp_path):
    out = tmp_path / "out"
    export_merged(stage, out, BUILDERS)
    (out / name).symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match=rf"holds {re.escape(name)}, which no export writes"):
        export_merged(stage, out, BUILDERS)
    assert (out / name).is_symlink()


def test_all_files_of_an_export_are_known_as_such(tmp_path):
    base = save_base(tmp_path / "gemma")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(base)
    options = {"nf4": None, "dtype": torch.float32, "device": CPU}
    llm, _ = load_language_model(str(base), **options)
    llm.save_pretrained(tmp_path / "out" / MERGED_MODEL, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "out" / MERGED_MODEL)
    names = written(tmp_path / "out")
    assert len([name for name in names if "-of-" in name]) > 1
    assert f"{MERGED_MODEL}/chat_template.jinja" in names
    assert [name for name in names if not merge.EXPORTED_FILES.fullmatch(name)] == []


@pytest.mark.parametrize("key", ["shuffled", "base_weights"])
def test_a_control_is_refused(key, stage, tmp_path):
    control = shutil.copytree(stage / "best", tmp_path / "best")
    rehash(control, **{key: {"shuffled": True, "base_weights": "random"}[key]})
    with pytest.raises(InputError, match="a control of --ablation"):
        export_merged(control, tmp_path / "out", BUILDERS)


def test_an_export_is_not_exported_again(stage, tmp_path):
    export_merged(stage, tmp_path / "out", BUILDERS)
    with pytest.raises(InputError, match="whose adapter is merged already"):
        export_merged(tmp_path / "out", tmp_path / "again", BUILDERS)


def test_a_changed_export_is_refused_when_read(stage, tmp_path):
    out = tmp_path / "out"
    export_merged(stage, out, BUILDERS)
    weights = out / MERGED_MODEL / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="its files differ"):
        load_trained_model(out, BUILDERS)
    (out / "modules.safetensors").unlink()
    with pytest.raises(InputError, match="no trained model"):
        load_trained_model(out, BUILDERS)


# ------------------------------------------------------------------------------- what is not in it


@pytest.mark.parametrize("kind", ["float32", "NF4 in bfloat16"])
def test_no_place_of_this_machine_and_no_patient_is_in_the_folder(kind, base, stages, tmp_path):
    out = tmp_path / "out"
    export_merged(stages[kind], out, BUILDERS)
    dataset = patients()
    marks = [str(tmp_path.parent), str(base), str(stages[kind]), "known diabetes"]
    marks += [str(Path.cwd())]
    marks += [*map(str, dataset.ids), *map(str, dataset.groups)]
    for name in written(out):
        content = (out / name).read_bytes()
        assert [mark for mark in marks if mark.encode() in content] == [], name


def test_code_that_a_base_brings_is_neither_run_nor_passed_on(tmp_path):
    base = save_base(tmp_path / "gemma")
    bring_code(base, tmp_path / "ran")
    stage = save_stage(tmp_path / "run", "classification", base)
    out = tmp_path / "out"
    export_merged(stage, out, BUILDERS)
    assert not (tmp_path / "ran").exists()
    texts = [(out / name).read_text() for name in written(out) if name.endswith("config.json")]
    assert not any("auto_map" in text for text in texts)
    assert not any(name.endswith(".py") for name in written(out))
