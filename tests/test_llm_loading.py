"""Loading, refusals, 4-bit weights, LoRA, what training changes, saving: on built checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import medgemma_trainer as trainer
from dataset_format import InputError
from language_models import (
    CPU,
    LAYERS,
    arguments,
    data_of,
    patients,
    save_multimodal_checkpoint,
    save_text_checkpoint,
    text_config,
)
from medgemma_trainer import LORA_TARGETS, Stage, load_language_model

ROOT = Path(trainer.__file__).parent
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
    """Give the refusal's text, which must be one line that names the model."""
    with pytest.raises(InputError) as caught:
        load_language_model(str(name), "none", torch.float32, CPU)
    text = str(caught.value)
    assert "\n" not in text
    assert str(name) in text
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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["text", *LAYOUTS])
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
    _, expected = trainer.tiny_language_model()
    text = "Anion gap (mEq/L): 24 (0h) -> 20.5 (2h)\n"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2)


def test_the_tiny_model_is_always_the_same_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (trainer.tiny_language_model()[0].state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[k], second[k]) for k in first)


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["text", *LAYOUTS])
@pytest.mark.parametrize("lost", ["layers.1.mlp.up_proj.weight", "embed_tokens.weight"])
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
    assert "damaged or do not fit together" in refusal(folder)


@pytest.mark.parametrize("kind", ["bert", "gemma2", "gemma3n"])
def test_a_model_that_is_no_gemma_3_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    text = refusal(tmp_path)
    assert kind in text
    assert "give a Gemma 3" in text


@pytest.mark.parametrize(
    ("present", "reason"),
    [
        ("nothing", "no folder with a model"),
        ("config", "no folder with a model"),
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


@pytest.mark.parametrize("name", ["fp16", "float16", "half"])
def test_float16_is_refused_with_its_reason(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments("--precision", name)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "float16 overflows" in message
    assert "bf16" in message
    assert message.count("\n") == 1


def test_the_tiny_model_is_not_quantised() -> None:
    with pytest.raises(InputError, match="tiny"):
        load_language_model("tiny", "nf4", torch.float32, CPU)


def hub_errors() -> dict[str, Exception]:
    """Build what is raised for a gated model without licence, as the libraries word it."""
    error = huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)
    detail = f"401 Client Error.\n\nCannot access gated repo for url {LICENCE}/resolve/main/x.json."
    Exception.__init__(error, detail)
    wrapped = OSError(
        f"You are trying to access a gated repo.\nMake sure to have access to it at {LICENCE}.\n"
        f"{detail}\nAccess to model google/medgemma-4b-pt is restricted. You must have access to "
        "it and be authenticated to access it. Please log in."
    )
    network = OSError(
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find "
        "them in the cached files.\nCheck your internet connection."
    )
    return {"gated": error, "wrapped": wrapped, "network": network}


def check_advice(text: str) -> None:
    assert LICENCE in text
    assert "hf auth login" in text
    assert "--model_name tiny" in text


@pytest.mark.parametrize("kind", hub_errors())
def test_a_model_that_cannot_be_fetched_ends_in_one_line_of_advice(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise hub_errors()[kind]

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    text = refusal(trainer.DEFAULT_MODEL)
    check_advice(text)
    assert ("gated" in text) == (kind != "network")


def run_quietly(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root, offline, with an empty cache, as a user has it."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONDEVMODE": ""}
    own |= environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, cwd=ROOT)


def test_the_whole_program_offline_ends_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    rows = ["subject_id,clinical_trajectory,label_escalation"]
    rows += [f"{k},24 (0h) -> {k} (2h),{k % 2}" for k in range(10)]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    code = "import sys, medgemma_trainer; sys.exit(medgemma_trainer.main(sys.argv[1:]))"
    flags = ["--data_path", str(tmp_path / "data.csv"), "--output_dir", str(tmp_path / "run")]
    done = run_quietly(code, *flags, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    check_advice(done.stderr)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- 4-bit weights


@pytest.mark.parametrize("kind", ["text", *LAYOUTS])
def test_nf4_quantises_every_projection_twice_and_nothing_else(
    folders: dict[str, Path], kind: str
) -> None:
    import bitsandbytes

    model = load(folders[kind], "nf4", torch.bfloat16)
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
    return trainer.add_lora(base, 8, 16, 0.0)


def gradients(model: Any, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Give hidden states, then gradients of inputs and adapter, of a pass in training mode."""
    model.train().zero_grad()
    inputs = inputs.clone().requires_grad_()
    hidden = model.get_base_model().model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    hidden[..., :9].square().sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    return hidden.detach(), [g for g in (inputs.grad, *(p.grad for p in learning)) if g is not None]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_evaluation_between_changes_neither_states_nor_gradients(
    folders: dict[str, Path], quantization: str
) -> None:
    """On a CPU bitsandbytes may repack weights when it evaluates; no gradient passes those."""
    model = adapted(folders["text"], quantization, torch.float32)
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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["text", "hub"])
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


@pytest.mark.parametrize("rank", [8, 3])
def test_the_adapter_has_as_many_parameters_as_the_formula_says(rank: int) -> None:
    base, _ = trainer.tiny_language_model()
    c = base.config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = 2 * (c.hidden_size + queries) + 2 * (c.hidden_size + keys)
    expected = c.num_hidden_layers * rank * (attention + 3 * (c.hidden_size + c.intermediate_size))
    llm = trainer.add_lora(base.requires_grad_(False), rank, 16, 0.0)
    assert sum(p.numel() for p in trainer.trainable(llm)) == expected


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_adapter_is_float32_seeded_and_changes_nothing_at_first(
    folders: dict[str, Path], quantization: str
) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = adapted(folders["text"], quantization, torch.bfloat16, seed)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    first, again, other = weights(0), weights(0), weights(1)
    for name, weight in first.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again[name])
        if "lora_B" in name:
            assert not weight.any()
        else:
            assert not torch.equal(weight, other[name])


# ------------------------------------------------------------------------------- training


def make_stage(
    folder: Path | str, mode: str, quantization: str, precision: str, *flags: str
) -> Stage:
    common = ["--model_name", str(folder), "--mode", mode, "--quantization", quantization]
    common += ["--precision", precision, "--epochs", "2", "--batch_size", "4", *flags]
    return trainer.llm_stage(arguments(*common), data_of(patients()))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer, 4-bit weights with their scales, outside of LoRA."""
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}


BASES = [("none", "fp32"), ("none", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")]


@pytest.mark.parametrize(("quantization", "precision"), BASES)
@pytest.mark.parametrize("mode", ["classification", "generative"])
def test_training_changes_the_stages_own_parts_and_no_bit_of_the_base(
    folders: dict[str, Path], tmp_path: Path, mode: str, quantization: str, precision: str
) -> None:
    flags = ["--freeze_ode"] if mode == "classification" else []
    stage = make_stage(folders["hub"], mode, quantization, precision, *flags)
    model = stage.model
    own = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    base = bits(model)
    trainer.evaluate(model, stage.loaders["val"], CPU)
    trainer.run_stage(stage, tmp_path, CPU, seed=0)
    after = bits(model)
    learned = dict(model.named_parameters())
    unchanged = [n for n, before in own.items() if torch.equal(learned[n], before)]
    assert unchanged == []
    moved = {n for n in base if not torch.equal(base[n], after[n])}
    assert moved == {n for n in own if "lora_" not in n}
    parts = {n.split(".")[0] for n in own}
    assert parts == {"llm", "projection"} | ({"head"} if flags else {"encoder", "trajectory_head"})
    assert not flags or not any(n.startswith("encoder") for n in moved)
    if quantization == "nf4":
        assert sum("quant_state" in n for n in base) == len(PROJECTIONS)


# ------------------------------------------------------------------------------- saving


def disturbed(stage: Stage) -> Stage:
    """Move all that a stage learns, so that nothing is as it was initialised."""
    for k, parameter in enumerate(trainer.trainable(stage.model)):
        generator = torch.Generator().manual_seed(k)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return stage


@pytest.mark.parametrize(("quantization", "precision"), [("none", "fp32"), ("nf4", "bf16")])
@pytest.mark.parametrize("mode", ["classification", "generative"])
def test_a_reloaded_winner_scores_the_same_to_the_last_bit(
    folders: dict[str, Path], tmp_path: Path, mode: str, quantization: str, precision: str
) -> None:
    kind = (folders["hub"], mode, quantization, precision)
    stage = disturbed(make_stage(*kind))
    expected = trainer.evaluate(stage.model, stage.loaders["test"], CPU)
    stage.save(tmp_path)
    fresh = make_stage(*kind, "--seed", "9")
    different = trainer.evaluate(fresh.model, stage.loaders["test"], CPU)
    assert not (different.probability == expected.probability).any()
    fresh.load(tmp_path)
    scored = trainer.evaluate(fresh.model, stage.loaders["test"], CPU)
    assert scored.probability.tolist() == expected.probability.tolist()
    assert scored.loss == expected.loss
    again = trainer.evaluate(stage.model, stage.loaders["test"], CPU)
    assert again.probability.tolist() == expected.probability.tolist(), "saving changed the model"


@pytest.fixture(scope="module")
def saved(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Path]:
    """A disturbed stage 2 on the multimodal checkpoint, and where its winner lies."""
    run = tmp_path_factory.mktemp("run")
    stage = disturbed(make_stage(folders["hub"], "classification", "none", "fp32"))
    stage.save(run)
    return stage, run / "best"


def test_a_winner_is_these_files(saved: tuple[Stage, Path]) -> None:
    _, best = saved
    files = {str(path.relative_to(best)) for path in best.rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    own = {"modules.safetensors", "config.json", "NOTICE"}
    assert files == own | {f"adapter/{name}" for name in adapter}
    assert [path.name for path in best.parent.iterdir()] == ["best"]
    assert "HAI-DEF is provided under and subject to" in (best / "NOTICE").read_text()


def test_a_winner_holds_only_what_was_learned(saved: tuple[Stage, Path]) -> None:
    stage, best = saved
    modules = load_file(best / "modules.safetensors")
    state = stage.model.state_dict()
    assert set(modules) == {k for k in state if not k.startswith("llm.")}
    assert {k.split(".")[0] for k in modules} == {
        "encoder",
        "trajectory_head",
        "projection",
        "head",
    }
    adapter = load_file(best / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(PROJECTIONS)
    assert all("lora_" in key for key in adapter)


def test_a_winner_names_its_base_model(saved: tuple[Stage, Path], folders: dict[str, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    facts = {
        "stage": "classification",
        "base_model": str(folders["hub"]),
        "base_class": "Gemma3ForCausalLM",
        "quantization": "none",
        "precision": "float32",
        "num_prefix_tokens": 8,
    }
    assert facts.items() <= config.items()
    assert "patient 0" not in json.dumps(config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_the_adapter_loads_with_plain_peft(
    saved: tuple[Stage, Path], folders: dict[str, Path]
) -> None:
    stage, best = saved
    plain = peft.PeftModel.from_pretrained(load(folders["hub"]), best / "adapter").eval()
    ids = torch.arange(6, 40)[None]
    llm = stage.model.get_submodule("llm").eval()
    expected = llm(input_ids=ids).logits
    assert torch.equal(plain(input_ids=ids).logits, expected)
    base = load(folders["hub"])(input_ids=ids).logits
    assert not torch.allclose(base, expected, atol=1e-3)


@pytest.mark.parametrize("file", ["modules.safetensors", "adapter/adapter_model.safetensors"])
def test_a_winner_that_lacks_a_weight_is_not_read(
    saved: tuple[Stage, Path], tmp_path: Path, file: str
) -> None:
    stage, best = saved
    shutil.copytree(best, tmp_path / "best")
    weights = load_file(tmp_path / "best" / file)
    lost = sorted(weights)[-1]
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "best" / file)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        stage.load(tmp_path)


HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def cached(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Build and save a 4-bit stage 2 by the hub's name, from a cache as the hub's client fills."""
    home, run = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("run")
    cache = home / "hub" / "models--google--medgemma-4b-pt"
    shutil.copytree(folders["hub"], cache / "snapshots" / HASH)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(HASH)
    code = (
        "import medgemma_trainer, language_models, pathlib, sys\n"
        "args = language_models.arguments('--quantization', 'nf4', '--precision', 'bf16')\n"
        "data = language_models.data_of(language_models.patients())\n"
        "medgemma_trainer.llm_stage(args, data).save(pathlib.Path(sys.argv[1]))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return run_quietly(code, str(run), HF_HOME=str(home), PYTHONPATH=paths), run / "best"


def test_loading_adapting_and_saving_print_nothing(
    cached: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    assert (cached[0].returncode, cached[0].stdout, cached[0].stderr) == (0, "", "")


def test_the_revision_of_a_hub_model_is_kept(
    cached: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    config = json.loads((cached[1] / "config.json").read_text())
    assert config["base_model"] == trainer.DEFAULT_MODEL
    assert config["base_revision"] == HASH
