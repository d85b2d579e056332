"""Merged adapters compute what the trained model computes; prompts as vectors are what it reads."""

import json
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from scipy.special import expit
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_models import (
    LENGTHS,
    PREFIX,
    bring_code,
    classifier_and_writer,
    data_of,
    disturb_adapter,
    patients,
    plain_sequence,
    save_multimodal_checkpoint,
)
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.trajectories import ScoringRows
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.inference import serving
from medgemma_clinical.inference.generation import write_reports
from medgemma_clinical.inference.scoring import score_rows
from medgemma_clinical.inference.serving import export_merged, merge_adapter, prompt_embeds
from medgemma_clinical.models import trained_model
from medgemma_clinical.models.checkpoints import MERGED_MODEL, save_llm
from medgemma_clinical.models.text_batches import TextCollator, soft_tokens
from medgemma_clinical.models.trained_model import load_trained_model
from medgemma_clinical.models.trajectory_llm import LLMWriter
from merged_models import BUILDERS, llm_config, save_base, save_stage, spoil_merge

KINDS = {
    "float32": ("none", "fp32"),
    "bfloat16": ("none", "bf16"),
    "NF4 in bfloat16": ("nf4", "bf16"),
    "NF4 in float32": ("nf4", "fp32"),
}
ROWS = [3, 0, 9, 1, 6]
"""Patients of 9, 1, 8, 6 and 4 observations, in no order."""


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


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def written(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------- the merge


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_base_plus_the_adapter_to_the_bit(kind, base, tmp_path):
    quantization, precision = KINDS[kind]
    llm = classifier_and_writer(base, quantization=quantization, precision=precision).writer.llm
    disturb_adapter(llm, 0.01)
    llm.save_pretrained(tmp_path)
    expected, without = {}, {}
    for name, module in llm.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            if quantization == "nf4":
                weight = bnb.dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16)
            change = module.lora_B["default"].weight @ module.lora_A["default"].weight
            # In float32 and rounded once: bfloat16 would lose most of a small change.
            expected[name] = (weight.float() + change * 16 / 8).to(weight.dtype)
            without[name] = weight.clone()
    merged = merge_adapter(llm, quantization, tmp_path)
    assert len(expected) == 14
    for name, weight in expected.items():
        found = merged.get_parameter(f"{name}.weight")
        assert found.dtype == (torch.float32 if kind == "float32" else torch.bfloat16)
        assert torch.equal(found, weight), name
        assert not torch.equal(found, without[name]), name


@pytest.mark.parametrize(
    ("kind", "stage_name"),
    [
        ("float32", "classification"),
        ("bfloat16", "generative"),
        ("NF4 in bfloat16", "generative"),
    ],
)
def test_the_exported_model_computes_what_the_trained_one_computes(
    kind, stage_name, base, out, tmp_path
):
    stage = save_stage(tmp_path / "run", stage_name, base, *KINDS[kind])
    assert export_merged(stage, out, BUILDERS) < (1e-4 if kind == "float32" else 0.15)
    trained, merged = load_trained_model(stage, BUILDERS), load_trained_model(out, BUILDERS)
    assert merged.rules[merged.name] == trained.rules[trained.name]
    batch = classifier_and_writer().collate(range(8))
    with torch.no_grad():
        expected, found = trained.model(batch), merged.model(batch)
    assert torch.equal(expected.offset, found.offset)
    assert (found.logit - expected.logit).abs().max() < (1e-4 if kind == "float32" else 0.5)


def test_a_model_of_text_alone_is_exported(base, out, tmp_path):
    parts = classifier_and_writer(base)
    alone = LLMWriter(None, None, parts.writer.llm, tokens=0, bos=2, verdict=parts.writer.verdict)
    config = llm_config(parts.writer, "generative", data_of(patients()), base=base)
    config |= {"encoder": None, "members": 0, "num_prefix_tokens": 0, "stage1_logit": False}
    config |= {"inputs": {"static": [], "prediction_time": False}}
    (tmp_path / "generative").mkdir()
    save_llm(tmp_path / "generative" / "best", alone, config)
    assert export_merged(tmp_path / "generative", out, BUILDERS, model_name=str(base)) < 1e-4


# ------------------------------------------------------------------------------- the folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "NF4 in bfloat16"])
def test_the_folder_is_an_ordinary_one_of_transformers_and_names_nobody(kind, base, stages, out):
    export_merged(stages[kind], out, BUILDERS)
    files = {"config.json", "generation_config.json", "model.safetensors", "NOTICE"}
    files |= {"tokenizer.json", "tokenizer_config.json"}
    beside = {"config.json", "modules.safetensors", "NOTICE", "README.md", "model_facts.xml"}
    assert written(out) == beside | {f"{MERGED_MODEL}/{name}" for name in files}
    assert "quantization_config" not in json.loads((out / MERGED_MODEL / "config.json").read_text())
    weights = load_file(out / MERGED_MODEL / "model.safetensors")
    original = load_file(base / "model.safetensors")
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    assert weights.keys() == original.keys(), "embeddings stay tied"
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    key = "model.embed_tokens.weight"
    assert torch.equal(weights[key], original[key].to(dtype))
    model = AutoModelForCausalLM.from_pretrained(out / MERGED_MODEL, dtype="auto")
    assert model.dtype == dtype
    settings = model.generation_config
    assert (settings.do_sample, settings.max_new_tokens) == (False, 60)
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == ([1], 0, 2)
    ids = [
        AutoTokenizer.from_pretrained(each)("24 (0h)")["input_ids"]
        for each in (out / MERGED_MODEL, base)
    ]
    assert ids[0] == ids[1]
    card = (out / "README.md").read_text()
    assert "`gemma, " in card
    assert "HAI-DEF Terms of Use" in card
    dataset = patients()
    marks = [str(out.parent), str(base), str(stages[kind]), str(Path.cwd()), "known diabetes"]
    marks += [*map(str, dataset.ids), *map(str, dataset.groups)]
    for name in written(out):
        content = (out / name).read_bytes()
        assert [mark for mark in marks if mark.encode() in content] == [], name


def test_of_a_multimodal_base_with_code_the_language_model_alone_is_written(out, tmp_path):
    base = save_multimodal_checkpoint(tmp_path / "multimodal", "language_model.model.")
    bring_code(base, tmp_path / "ran")
    export_merged(save_stage(tmp_path / "run", "classification", base), out, BUILDERS)
    config = json.loads((out / MERGED_MODEL / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert not any("vision" in key for key in load_file(out / MERGED_MODEL / "model.safetensors"))
    generation = json.loads((out / MERGED_MODEL / "generation_config.json").read_text())
    assert not {"cache_implementation", "top_k", "top_p"} & generation.keys()
    assert not (tmp_path / "ran").exists()
    texts = [(out / name).read_text() for name in written(out) if name.endswith("config.json")]
    assert not any("auto_map" in text for text in texts)
    assert not any(name.endswith(".py") for name in written(out))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("a matrix is negated", "bfloat16"),
        ("the adapter is lost", "NF4 in bfloat16"),
        ("the head is no longer tied", "bfloat16"),
        ("not a number", "float32"),
    ],
)
def test_a_wrong_merge_is_refused_and_leaves_nothing(fault, kind, stages, out, monkeypatch):
    spoil_merge(monkeypatch, fault)
    with pytest.raises(RunFault):
        export_merged(stages[kind], out, BUILDERS)
    assert not [*out.parent.iterdir()]


def test_one_model_is_in_memory_at_a_time_and_none_on_a_gpu(stage, out, monkeypatch):
    """A card that trains 27B in NF4 has no room for its merged weights."""
    seen = []
    monkeypatch.setattr(trained_model, "default_device", lambda: torch.device("meta"))

    def load(*args, **kwargs):
        assert [ref() for ref in seen] == [None] * len(seen)
        trained = load_trained_model(*args, **kwargs)
        seen.append(weakref.ref(trained.model.llm.get_input_embeddings()))
        return trained

    monkeypatch.setattr(serving, "load_trained_model", load)
    export_merged(stage, out, BUILDERS)
    assert len(seen) == 2


def test_what_exists_is_not_replaced(stage, out):
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(InputError, match="--out"):
        export_merged(stage, out, BUILDERS)
    assert written(out) == {"mine"}


def test_an_export_is_neither_exported_again_nor_read_when_changed(stage, out, tmp_path):
    export_merged(stage, out, BUILDERS)
    with pytest.raises(InputError, match="merged already"):
        export_merged(out, tmp_path / "again", BUILDERS)
    weights = out / MERGED_MODEL / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match="its files differ"):
        load_trained_model(out, BUILDERS)
    (out / "modules.safetensors").unlink()
    with pytest.raises(InputError, match="no trained model"):
        load_trained_model(out, BUILDERS)


# ------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with stages 2 and 3 whose language model writes other things for other patients."""
    place = tmp_path_factory.mktemp("run")
    base = save_base(place / "gemma", lively=True)
    for stage in ("classification", "generative"):
        save_stage(place, stage, base, change=0.5)
    return place


def load(place, stage):
    """Load a stage; the rule of stage 3 says yes for some rows, but not for those above 0.5."""
    trained = load_trained_model(place / stage, BUILDERS)
    if stage == "generative":
        risks = np.sort(expit(logits_of(trained))[ROWS])
        no = 3 if (risks < 0.5).sum() == 2 else 2
        lower, upper = risks[no - 1 : no + 1]
        assert upper - lower > 1e-3, "no rounding turns a verdict"
        decision = {"label": asdict(DecisionRule(threshold=float(lower + upper) / 2))}
        return replace(trained, config={**trained.config, "decision": decision})
    return trained


def collator(trained):
    dataset = data_of(patients()).dataset
    return TextCollator(dataset, trained.tokenizer, trained.prompts, answers=False)


def logits_of(trained):
    batch = collator(trained)(range(len(LENGTHS)))
    with torch.no_grad():
        return trained.model(batch).logit.double().numpy()


def verdicts_of(trained):
    return expit(logits_of(trained)) >= trained.threshold(trained.name)


def prompts_of(trained, dataset, rows=ROWS, batch_size=32):
    """The prompts of some rows, in their order."""
    positions = np.arange(len(rows))
    chosen = dataset.subset(np.asarray(rows))
    scoring = ScoringRows(chosen.ids, positions, chosen, positions, len(rows))
    scores = score_rows(scoring, trained, Findings("patients"), batch_size)
    return prompt_embeds(scores, batch_size)


@torch.no_grad()
@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_prompts_are_what_the_model_reads_without_padding(stage, run):
    """Those of stage 3 end with the verdict of the decision rule."""
    trained = load(run, stage)
    text = collator(trained)
    verdicts = verdicts_of(trained)
    if stage == "generative":
        assert 0 < verdicts[ROWS].sum() < len(ROWS)
        assert (verdicts != (logits_of(trained) > 0))[ROWS].any(), "the threshold must matter"
    for row, prompt in zip(ROWS, prompts_of(trained, patients(), batch_size=2), strict=True):
        writes = stage == "generative"
        batch = text.with_verdicts([row], verdicts[[row]]) if writes else text([row])
        expected = plain_sequence(trained.model, batch, 0)[0]
        assert torch.allclose(prompt, expected, atol=1e-4)
        words = text.prompt_ids[row] + text.stem
        words += text.words[int(verdicts[row])] if writes else []
        assert len(prompt) == 1 + soft_tokens(text.dataset, PREFIX)[row] + len(words)


def test_embeddings_are_on_the_cpu_in_the_models_dtype_and_own_their_memory(run):
    trained = load_trained_model(run / "generative", BUILDERS, precision="bf16")
    for prompt in prompts_of(trained, patients()):
        assert (prompt.dtype, prompt.device.type) == (torch.bfloat16, "cpu")
        assert prompt.is_contiguous()
        assert not prompt.requires_grad
        assert prompt.untyped_storage().nbytes() == prompt.nbytes  # torch.save writes all of it


@pytest.mark.slow
@torch.no_grad()
def test_plain_transformers_writes_our_reports_from_the_prompts(run, out):
    trained = load(run, "generative")
    text, verdicts = collator(trained), verdicts_of(trained)
    chosen = {row: bool(verdicts[row]) for row in ROWS}
    expected = write_reports(trained.model, text, chosen, trained.config["report_tokens"])
    assert len(set(expected.values())) == len(ROWS), "rows must differ to prove anything"
    export_merged(run / "generative", out, BUILDERS)
    merged = replace(load_trained_model(out, BUILDERS), config=trained.config)
    llm = AutoModelForCausalLM.from_pretrained(out / MERGED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(out / MERGED_MODEL)
    prompts = zip(prompts_of(trained, patients()), prompts_of(merged, patients()), strict=True)
    for row, (prompt, same) in zip(ROWS, prompts, strict=True):
        assert torch.equal(prompt, same), "an export makes the same prompts"
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        ids = llm.generate(inputs_embeds=prompt[None], attention_mask=mask)
        report = tokenizer.decode(ids[0], skip_special_tokens=True)
        head = f"{trained.config['outcome']}: {'yes' if verdicts[row] else 'no'}."
        assert head + report == expected[row]


SETTINGS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [*range(30, 60)],
    "num_beams": 4,
    "min_new_tokens": 20,
    "return_dict_in_generate": True,
}
"""What files of a base model can say of writing, and reports must not follow."""


def written_ids(folder, end):
    """Token ids that a model writes for some rows behind a yes, to one of the ids ``end``."""
    trained = load_trained_model(folder, BUILDERS)
    prompts = collator(trained).with_verdicts(ROWS, [True for _ in ROWS])
    return trained.model.write(prompts, 20, end, pad=0).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_in_files_of_the_base_model_change_no_report(name, file, run, out, tmp_path):
    """Neither of the trained model nor of the exported one."""
    end = written_ids(run / "generative", [-1])[0][5:6]
    expected = written_ids(run / "generative", end)
    assert expected[0].count(0) > 10, "a row ends before the last token"
    base = save_base(tmp_path / "gemma", lively=True)
    (base / "generation_config.json").unlink()
    words = json.loads((base / file).read_text()) if file == "config.json" else {}
    (base / file).write_text(json.dumps({**words, name: SETTINGS[name]}))
    stage = save_stage(tmp_path / "run", "generative", base, change=0.5)
    assert written_ids(stage, end) == expected
    export_merged(stage, out, BUILDERS)
    assert written_ids(out, end) == expected
