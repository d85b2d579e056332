"""Other language models than Gemma 3: each tested type passes all steps, others are refused."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration

import decoders
from decoders import Case, attempt
from language_models import (
    CPU,
    classifier_and_writer,
    data_of,
    llm_config,
    patients,
    plain_sequence,
)
from medgemma_clinical.files import InputError
from medgemma_clinical.inference import generation, hub
from medgemma_clinical.models.checkpoints import ADAPTER_CONFIG, save_llm
from medgemma_clinical.models.decoders import (
    LORA_TARGETS,
    TESTED,
    check_tested,
    decoder_of,
    terms_of,
)
from medgemma_clinical.models.language_model import cache_width, load_language_model
from medgemma_clinical.models.terms import GEMMA_NOTICE, HAI_DEF_NOTICE
from small_decoders import KINDS, save_decoder, save_model
from stages import arguments, data_for, make_stage

pytestmark = pytest.mark.slow

IDS = torch.randint(6, 200, (2, 40), generator=torch.Generator().manual_seed(0))
ROWS = [0, 3, 1, 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module", params=KINDS)
def base(request, place):
    """A small checkpoint of each tested type."""
    return save_decoder(place / request.param, request.param)


def load(folder, **more):
    options = {"nf4": None, "dtype": torch.float32, "device": CPU, **more}
    return load_language_model(str(folder), **options)


def test_the_checkpoints_of_the_tests_are_of_every_tested_type():
    assert [*KINDS] == [decoder.types[-1] for decoder in TESTED]


@pytest.mark.parametrize(
    ("mode", "quantization"), [("classification", "nf4"), ("generative", "none")]
)
def test_each_type_trains_resumes_loads_again_and_exports(base, mode, quantization):
    assert attempt(Case(base.parent, base.name, mode, quantization)) == {}


def test_the_matrix_of_the_page_is_the_one_of_the_benchmark():
    page = (decoders.ROOT / "medgemma_clinical/docs/training.md").read_text()
    kept = (decoders.ROOT / "tests/approved/decoders.txt").read_text()
    assert kept in page
    head, _, *rows = kept.splitlines()
    assert [cell.strip() for cell in head.split("|")[3:-1]] == [*decoders.COLUMNS]
    assert [row.split("`")[1] for row in rows] == [*KINDS]
    assert [row.split("|")[2].strip() for row in rows] == [f"`{d.example}`" for d in TESTED]


@torch.no_grad()
def test_soft_tokens_stand_behind_the_first_token_or_come_first(base):
    parts = classifier_and_writer(base)
    model, collate = parts.writer, parts.collate
    lacks = "bos_token" in KINDS[base.name].lacks
    assert (model.bos is None, collate.pad) == (lacks, int(collate.tokenizer.pad_token_id))
    for left in (False, True):
        batch = collate(ROWS)
        sequence = model.embed(batch, model.trajectory(batch), left=left)
        for row in range(len(ROWS)):
            expected = plain_sequence(model, batch, row)[0]
            found = sequence.embeddings[row][sequence.mask[row]]
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected)


def test_the_loss_and_the_log_odds_are_of_the_models_own_logits(base):
    parts = classifier_and_writer(base)
    model, collate = parts.writer, parts.collate
    weight = model.llm.get_output_embeddings().weight
    weight.data.mul_(20)  # a cap of the logits matters
    batch = collate([3])
    output, offset = model(batch), model.stage1(batch).logit
    logits = model.llm(inputs_embeds=plain_sequence(model, batch, 0)).logits[0]
    answer = torch.tensor(collate.answer_ids[3])
    predicting = logits[-len(answer) - 1 : -1].clone()
    yes, no = model.verdict
    expected = predicting[0, yes] - predicting[0, no] + offset[0]
    assert output.logit.item() == pytest.approx(expected.item(), rel=1e-4)
    predicting[0, yes] += offset[0]
    losses = torch.nn.functional.cross_entropy(predicting, answer, reduction="none")
    total = 50 * losses[0] + losses[1:].sum()
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_random_weights_are_those_that_the_type_starts_with(base):
    one, two, trained = (load(base, weights=w)[0] for w in ("random", "random", "pretrained"))
    fresh = AutoModelForCausalLM.from_config(trained.config)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, two.get_parameter(name))
        if weight.ndim == 1:
            assert torch.equal(weight, fresh.get_parameter(name)), name
        else:
            assert not torch.equal(weight, trained.get_parameter(name)), name
            assert float(weight.std()) == pytest.approx(0.125, rel=0.1), name


def test_the_adapter_learns_every_projection_and_names_the_commit_of_its_base(base, tmp_path):
    model = classifier_and_writer(base).classifier
    layers = [n for n, _ in model.llm.named_modules() if n.endswith("lora_A.default")]
    whole = [n for n, m in load(base)[0].named_modules() if type(m) is torch.nn.Linear]
    assert len(layers) == len(whole) - 1, "all but the head"
    config = llm_config(model, "classification", data_of(patients()), base=base)
    save_llm(tmp_path / "best", model, config | {"base_revision": "0" * 40})
    stored = json.loads((tmp_path / "best" / ADAPTER_CONFIG).read_text())
    assert stored["revision"] == "0" * 40


def test_rows_at_once__knows_what_a_token_keeps(base, monkeypatch):
    parts = classifier_and_writer(base)
    monkeypatch.setattr(generation, "ROWS_AT_ONCE", (1, 10**9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    on_card = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(parameters=lambda: iter([on_card]), llm=parts.writer.llm, tokens=4)
    assert 1 < generation.rows_at_once(model, parts.collate, 100) < 10**9
    with torch.no_grad():
        layers = parts.writer.llm(input_ids=IDS[:1, :1], use_cache=True).past_key_values.layers
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert cache_width(parts.writer.llm.config) == kept


# ------------------------------------------------------------------------------- refusals


def test_gemma_4_is_read_out_of_a_multimodal_checkpoint(place, tmp_path):
    base = save_decoder(place / "text", "gemma4_text")
    text = json.loads((base / "config.json").read_text())
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    sight |= {"num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4}
    whole = Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=sight, audio_config=None)
    )
    folder = tmp_path / "gemma"
    whole.save_pretrained(folder)
    for path in base.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    check_tested(str(folder), allow_untested=False)
    model, _ = load(folder)
    assert not [name for name, _ in model.named_modules() if "vision" in name]
    expected = whole.eval()(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def test_per_layer_embeddings_are_refused_by_the_name_of_the_type(tmp_path):
    more = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 600}
    with pytest.raises(InputError, match=r"--model_name .*gemma4_text with per-layer embeddings"):
        load(save_decoder(tmp_path / "e2b", "gemma4_text", **more))


def stage_on(base, *more):
    args = arguments("--mode", "classification", "--model_name", str(base), *more)
    return make_stage(args, data_for(args, patients()))


def test_a_type_that_is_not_tested_needs_a_flag_and_is_warned_of_once(tmp_path, caplog):
    base = save_model(tmp_path / "base", "olmo3", {}, "base model")
    with pytest.raises(InputError, match=r"--model_name .*olmo3.*--allow_untested_model"):
        stage_on(base)
    assert [
        r for r in caplog.records if r.levelno >= logging.WARNING and "olmo3" in r.message
    ] == []
    stage = stage_on(base, "--allow_untested_model")
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len([text for text in warnings if "olmo3" in text]) == 1
    assert (
        len([n for n, _ in stage.model.llm.named_modules() if n.endswith("lora_A.default")]) == 14
    )
    assert stage.config["base_type"] == "olmo3"
    assert terms_of(stage.config).header == {"license": "other"}
    assert stage.model(stage.collate(range(4))).logit.isfinite().all()


GRANITE = {
    **{"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "attention_multiplier": 0.0625,
}


@pytest.mark.parametrize(("kind", "config"), [("cohere", {}), ("granite", GRANITE)])
def test_logits_that_a_model_scales_are_scaled_in_the_loss_and_the_log_odds(kind, config, tmp_path):
    base = save_model(tmp_path / kind, kind, config, "base model")
    test_the_loss_and_the_log_odds_are_of_the_models_own_logits(base)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_logits_than_the_models_own_are_refused(precision, quantization, tmp_path):
    """Phi's head has a bias, which stage 3's loss does not read; stage 2 does not call it."""
    base = save_model(tmp_path / "phi", "phi", {}, "base model")
    words = ["--allow_untested_model", "--precision", precision, "--quantization", quantization]
    writer = [*words, "--mode", "generative"]
    assert stage_on(base, *writer).name == "generative", "no bias yet"
    weights = load_file(base / "model.safetensors")
    weights["lm_head.bias"] += 0.1 * torch.arange(len(weights["lm_head.bias"])) % 3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"--model_name .*own forward"):
        stage_on(base, *writer)
    assert stage_on(base, *words).name == "classification"


def test_nf4_that_packs_nothing_is_refused(tmp_path):
    base = save_model(tmp_path / "falcon", "falcon", {}, "base model")
    with pytest.raises(InputError, match=r"--quantization nf4: .*none"):
        stage_on(base, "--allow_untested_model", "--quantization", "nf4")


def test_a_type_without_sdpa_is_refused_with_the_attention_to_take(tmp_path):
    config = {"n_layer": 2, "n_head": 4}
    base = save_model(tmp_path / "bloom", "bloom", config, "base model")
    with pytest.raises(InputError, match=r"--model_name .*--attention eager$"):
        load(base)
    load(base, attention="eager")


def test_limited_scores_take_the_attention_that_limits_them(place, tmp_path):
    base = save_decoder(place / "limited", "gemma2")
    model, _ = load(base)
    own = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    assert torch.equal(model(input_ids=IDS).logits, own(input_ids=IDS).logits)
    for layer in model.get_decoder().layers:
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(model(input_ids=IDS).logits, own(input_ids=IDS).logits, atol=0.1)


# ------------------------------------------------------------------------------- terms

HUB, FOLDER = {"base_sha256": None}, {"base_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("kind", "name", "where", "key", "words"),
    [
        ("qwen3", "Qwen/Qwen3-0.6B", HUB, "apache-2.0", "Qwen3 is licensed under the Apache"),
        ("qwen2", "Qwen/Qwen2.5-7B-Instruct", HUB, "apache-2.0", "Qwen2 is licensed under"),
        ("qwen2", "Qwen/Qwen2.5-3B-Instruct", HUB, "qwen-research", "Built with Qwen. Qwen is"),
        ("qwen2", "Qwen/Qwen2.5-Math-72B", HUB, "qwen", "Built with Qwen. Qwen is licensed"),
        ("qwen2", "Qwen/Qwen2-72B", HUB, "other", "Built with Qwen. Qwen is licensed"),
        ("gemma2", "google/gemma-2-2b-it", HUB, "gemma", "Gemma is provided"),
        ("gemma2", "google/txgemma-2b", HUB, "health-ai-developer-foundations", "HAI-DEF is"),
        ("qwen3", "jane/tuned", HUB, "other", "Qwen3 is licensed under the Apache"),
        ("gemma4", "google/gemma-4-31B-it", HUB, "apache-2.0", "Gemma 4 is licensed"),
        ("gemma4_text", "google/gemma-4-31B", HUB, "apache-2.0", "Gemma 4 is licensed"),
        ("olmo2", "allenai/OLMo-2-0425-1B", HUB, "apache-2.0", "OLMo 2 is licensed"),
        ("mistral", "mistralai/Mistral-7B-v0.3", HUB, "apache-2.0", "Mistral is licensed"),
        ("mistral", "mistralai/Ministral-8B", HUB, "other", "Mistral is licensed"),
        ("phi3", "microsoft/Phi-4-mini-instruct", HUB, "mit", "Microsoft Corporation, MIT"),
        ("llama", "meta-llama/Llama-3.2-1B", HUB, "llama3.2", "Llama 3.2 Community License"),
        ("llama", "meta-llama/Meta-Llama-3-8B", HUB, "llama3", "Llama 3 Community License"),
        ("llama", "Llama-3.1-8B", FOLDER, "llama3.1", "Llama 3.1 Community License"),
        ("llama", "HuggingFaceTB/SmolLM2-135M", HUB, "other", "Llama Community License"),
        ("llama", "TinyLlama/TinyLlama-1.1B", HUB, "other", "Llama Community License"),
        ("olmo3", "allenai/Olmo-3-7B", HUB, "other", "a licence of its own"),
    ],
)
def test_the_terms_are_those_of_type_and_name(kind, name, where, key, words):
    terms = terms_of({"base_model": name, "base_type": kind, **where})
    assert terms.header.get("license_name", terms.header["license"]) == key
    assert words in terms.notice
    assert words in terms.sentence
    assert terms.sentence.startswith("If" if key == "other" and kind != "olmo3" else "The")
    assert ("Built with Llama" in terms.notice) == (kind == "llama")
    for notice in (GEMMA_NOTICE, HAI_DEF_NOTICE):
        assert (notice in terms.notice) == notice.startswith(words)
    assert terms.name_begins == ("Llama" if key.startswith("llama") else "")


def test_a_model_built_with_llama_is_pushed_under_a_name_that_says_so(monkeypatch):
    config = {"base_model": "meta-llama/Llama-3.2-1B", "base_type": "llama", **HUB}
    trained = SimpleNamespace(config=config)
    reached = []
    monkeypatch.setattr(hub, "columns_of_few", lambda _: reached.append(1) or ["x"])
    with pytest.raises(InputError, match=re.escape("llama-fans/dka: ")):
        hub.push_model(trained, "llama-fans/dka")
    assert reached == []
    with pytest.raises(InputError, match="training patients"):
        hub.push_model(trained, "jane/Llama-dka")


def test_a_checkpoint_without_a_type_is_of_gemma_3():
    assert decoder_of("gemma3_text").lora_targets == LORA_TARGETS
    assert GEMMA_NOTICE in terms_of({"base_model": "google/gemma-3-270m", **HUB}).notice
