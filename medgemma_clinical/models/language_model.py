"""The language model: loading in 4 bits or whole, LoRA layers, the built-in tiny model."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medgemma_clinical.distributed import check_flash_attention
from medgemma_clinical.files import InputError, RunFault, file_hash, json_hash, one_line
from medgemma_clinical.models.checkpoint_schema import (
    ATTENTIONS,
    HUB_ID,
    INT8_REFUSED,
    LORA_TARGETS,
    QUANTIZATIONS,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TINY = "tiny"
"""Name of the built-in random model."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of each ``--precision``. Gemma 3 overflows in float16."""

GEMMA_3 = ("gemma3", "gemma3_text")
"""What ``model_type`` says in config.json of a Gemma 3 with and without a vision tower."""

NO_ARCHITECTURE = "no config.json names its architecture (GGUF files and adapters have none)"

LARGEST_MODEL = {
    **{"num_hidden_layers": 256, "hidden_size": 2**15, "intermediate_size": 2**18},
    **{"num_attention_heads": 2**10, "num_key_value_heads": 2**10, "head_dim": 2**12},
    "vocab_size": 2**20,
}
"""Sizes far beyond those of Gemma 3's largest model."""

PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
"""Endings of files of weights that are not read."""

MACHINE_FAULT = re.compile(
    r"CUDA|quantize_blockwise|cuBLAS|CUBLAS|cuDNN|CUDNN|bitsandbytes|\blib(cu|nv)\w*\.so"
)
"""In the texts of errors that no file of a model has caused."""


def hush_libraries() -> None:
    """Silence the loading libraries' messages that report no fault."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A kernel that only speeds up inference on a CPU; retries of a download that fails anyway.
    for library in ("bitsandbytes.backends.cpu.ops", "huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def load_language_model(
    name: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    weights: str = "pretrained",
    origin: str = "--model_name",
    attention: str = ATTENTIONS[0],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Gemma 3 text model and its tokenizer, frozen; log its name before.

    Of a multimodal checkpoint (MedGemma-4B) only the language model is read.

    Args:
        name: hub id, folder, or ``tiny`` for the built-in random model.
        quantization: ``nf4`` or ``none``.
        dtype: of computation, and of the weights where they are not quantised.
        device: of the weights.
        revision: commit of a hub model; None takes the latest.
        weights: ``pretrained``, or ``random`` for a control, which is not quantised.
        origin: what names the model, for the log.
        attention: one of ``ATTENTIONS``.

    Raises:
        InputError: no access, no such model, not a Gemma 3, weights that do not fit it, or a
            quantisation or attention that cannot be used.
        RunFault: the weights cannot be quantised on this machine.
    """
    logger.info("language model: %s, named by %s", describe_base(name, revision), origin)
    hush_libraries()
    if quantization not in QUANTIZATIONS:
        reason = INT8_REFUSED if quantization == "int8" else f"give {' or '.join(QUANTIZATIONS)}"
        raise InputError(f"--quantization {quantization}: {reason}")
    if attention not in ATTENTIONS:  # transformers takes others for kernels of the hub
        raise InputError(f"--attention {attention}: give one of {', '.join(ATTENTIONS)}")
    if attention == "flash_attention_2":
        check_flash_attention(dtype, device)
    # On Hopper cards cuDNN's attention has given NaN gradients for masked batches.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == TINY:
        if quantization == "nf4":
            raise InputError("--quantization nf4: not for the tiny model: use none")
        model, tokenizer = tiny_language_model(attention)
        return model.to(device=device, dtype=dtype).requires_grad_(False).eval(), tokenizer
    if weights == "random":
        quantization = "none"  # packed weights cannot be drawn
    model, missing, tokenizer = _read_model(name, quantization, dtype, device, revision, attention)
    _check_loaded(name, missing, tokenizer)
    if weights == "random":
        draw_weights(model)
    for module in model.modules():
        # 4-bit weights that are repacked for fast CPU inference lose bits and gradients.
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval(), tokenizer


def _read_model(
    name: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None,
    attention: str,
) -> tuple[PreTrainedModel, set[str], PreTrainedTokenizerBase]:
    """Return model, keys without weights, and tokenizer; no code of a checkpoint ever runs."""
    import transformers

    check_folder(name)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with _weights_report() as report:
        try:
            facts = transformers.PretrainedConfig.get_config_dict(name, **source)[0]
            check_architecture(name, facts)
            check_sizes(name, facts)
            config = transformers.AutoConfig.from_pretrained(name, **source)
            model, found = transformers.Gemma3ForCausalLM.from_pretrained(
                name,
                **source,
                config=getattr(config, "text_config", config),
                key_mapping={r"^(model\.)?language_model\.(model\.)?": "model."},  # if multimodal
                quantization_config=nf4_config(dtype) if quantization == "nf4" else None,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                attn_implementation=attention,  # else config.json may name code of the hub
                output_loading_info=True,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # the libraries raise anything on files of another kind
            check_machine(name, error, "".join(report))
            raise InputError(loading_advice(name, error)) from error
    return model, found["missing_keys"], tokenizer


@torch.no_grad()
def draw_weights(model: PreTrainedModel) -> None:
    """Replace the weights by random ones, always the same, as a Gemma 3 has before training.

    Matrices are normal with the standard deviation of the model's configuration; norms, which
    multiply by 1 + weight, are zero.
    """
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        drawn = torch.zeros(weights.shape)
        if weights.ndim > 1:
            drawn.normal_(0, model.config.initializer_range, generator=generator)
        weights.copy_(drawn)


def check_architecture(name: str, facts: dict[str, Any]) -> None:
    """Refuse a model that is no Gemma 3, whether transformers knows its architecture or not.

    Args:
        name: of the model.
        facts: content of config.json; empty where there is none.

    Raises:
        InputError: naming what was found.
    """
    if not facts and os.path.isdir(name):
        return  # loading says that the folder is not whole
    text = facts.get("text_config") or facts
    if facts.get("model_type") not in GEMMA_3:
        named = facts.get("model_type") or facts.get("architectures")
        found = f"its config.json names {str(named)[:80]}" if named else NO_ARCHITECTURE
    elif text.get("use_bidirectional_attention"):
        found = "its config.json is of an embedding model, which reads text in both directions"
    else:
        return
    raise InputError(
        f"--model_name {name}: only Gemma 3 models: {found}: give google/medgemma-4b-pt, "
        "google/medgemma-27b-text-it or another Gemma 3"
    )


def check_sizes(name: str, facts: dict[str, Any]) -> None:
    """Refuse a model that no Gemma 3 comes near in size, or that brings its own quantisation.

    ``facts`` is the content of config.json; libraries build from it before they check.

    Raises:
        InputError: naming what is out of bounds.
    """
    for key, most in LARGEST_MODEL.items():
        size = dict(facts.get("text_config") or facts).get(key, 1)  # else the library's default
        if type(size) is not int or not 1 <= size <= most:
            raise InputError(f"--model_name {name}: config.json: {key} must be 1 to {most:,}")
    if facts.get("quantization_config") is not None:
        raise InputError(f"--model_name {name}: quantised already: give the original weights")


def check_folder(name: str) -> None:
    """Refuse a folder whose weights are pickled, or those of an adapter.

    Raises:
        InputError: naming the folder.
    """
    if not os.path.isdir(name):
        return
    if Path(name, "adapter_config.json").exists():
        raise InputError(f"--model_name {name}: an adapter: give the base model that it changes")
    endings = {path.suffix for path in Path(name).iterdir()}
    if endings & PICKLED and ".safetensors" not in endings:
        raise InputError(
            f"--model_name {name}: its weights are pickled, which can run code, and are not read: "
            "convert them to .safetensors"
        )


def check_machine(name: str, error: Exception, report: str) -> None:
    """Raise what is the fault of the card or of bitsandbytes, and of no file.

    Args:
        name: of the model.
        error: of the loading libraries.
        report: of transformers on single weights; it swallows their errors.

    Raises:
        RunFault: the weights cannot be quantised.
    """
    if "OutOfMemoryError" in report:
        raise torch.OutOfMemoryError("out of memory while the weights are quantised") from error
    if MACHINE_FAULT.search(report.replace(name, "")):
        raise RunFault(
            "bitsandbytes cannot quantise the weights: see what python -m bitsandbytes says, or "
            "take --quantization none"
        ) from error
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError)
    if isinstance(error, kinds) or MACHINE_FAULT.search(str(error).replace(name, "")):
        raise error


@contextlib.contextmanager
def _weights_report() -> Iterator[list[str]]:
    """Collect transformers' report on the weights of a model, which is not shown."""
    lines: list[str] = []
    source, handler = logging.getLogger("transformers.modeling_utils"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = source.level, source.propagate
    source.addHandler(handler)
    source.setLevel(logging.WARNING)
    source.propagate = False
    try:
        yield lines
    finally:
        source.removeHandler(handler)
        source.setLevel(before[0])
        source.propagate = before[1]


def _check_loaded(name: str, missing: set[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a checkpoint without some of its weights, and a tokenizer that loses text."""
    if missing:
        key = min(missing)
        raise InputError(f"--model_name {name}: the checkpoint lacks weights, {key} among them")
    probe = "24 (0h)"
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    if None in special or tokenizer.decode(ids) != probe:
        raise InputError(f"--model_name {name}: its tokenizer files are missing or damaged")


def nf4_config(dtype: torch.dtype) -> Any:
    """Return the settings of QLoRA. Source: Dettmers et al. 2023, "QLoRA"."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head"],
    )


def loading_advice(name: str, error: Exception) -> str:
    """Return one line on a failed download or load, with what to do."""
    text = " ".join(str(error).split())[:200]
    if os.path.isdir(name) or "/" not in name or not HUB_ID.fullmatch(name):
        return (
            f"--model_name {name}: not a hub id, not tiny, and no folder with a whole model: {text}"
        )
    return (
        f"--model_name {name}: cannot be loaded from the hub ({text}): accept its licence at "
        f"https://huggingface.co/{name}, then run: hf auth login (huggingface-cli login in older "
        "versions); --model_name tiny needs neither licence nor download"
    )


def base_name(name: str) -> str:
    """Return the name of a model as others may see it: of a folder without its path."""
    return one_line(os.path.basename(os.path.abspath(name))) if os.path.isdir(name) else name


def describe_base(name: str, revision: str | None) -> str:
    """Return name and place of a model that is about to be loaded."""
    if name == TINY:
        return "tiny, built in"
    if os.path.isdir(name):
        return f"{base_name(name)}, a folder"
    known = revision or cached_revision(name)
    return f"{name}, revision {known or 'the latest'}"


def base_facts(name: str) -> dict[str, str | None]:
    """Return what a checkpoint says of its base model, without the path of a folder."""
    return {
        "base_model": base_name(name),
        "base_sha256": base_content_hash(name),
        "base_revision": cached_revision(name),
    }


def base_content_hash(name: str) -> str | None:
    """Return the SHA-256 of a folder's model files; None for ``tiny`` and models of the hub."""
    if name == TINY or not os.path.isdir(name):
        return None
    endings = (".json", ".safetensors", ".model", ".jinja")
    files = [p for p in Path(name).iterdir() if p.suffix in endings and p.is_file()]
    return json_hash({p.name: file_hash(p) for p in files})


def cached_revision(name: str) -> str | None:
    """Return the commit of a hub model in the cache; None for a folder and for ``tiny``."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name == TINY or os.path.isdir(name):
        return None
    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no hub id: loading refuses it with advice
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def tiny_language_model(
    attention: str = ATTENTIONS[0],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a two-layer Gemma 3 with random but always the same weights, and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<bos>"]  # the ids of Gemma's own
    alphabet = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=specials[0], eos_token=specials[1], bos_token=specials[2]
    )
    config = Gemma3TextConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=1024,
        initializer_range=0.125,  # 1 / sqrt(64): the tied output can then be sure of a token
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config), tokenizer


def add_lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float) -> PreTrainedModel:
    """Put trainable low-rank layers on the seven projections of each language layer.

    The A matrices come from torch's global generator.

    Source: Hu et al. 2021, "LoRA".
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft asks for a property that transformers renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted: PreTrainedModel = get_peft_model(model, config)
    return adapted


def set_checkpointing(model: PreTrainedModel) -> None:
    """Have layers computed again in the backward pass instead of kept.

    The reentrant kind of checkpoint fails where embeddings come from outside of the model.
    """
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})


@torch.no_grad()
def embedding_rms(model: PreTrainedModel, ids: list[int]) -> float:
    """Return the root mean square of the scaled embeddings of some tokens."""
    embedding = model.get_input_embeddings()
    vectors = embedding(torch.tensor(ids, device=embedding.weight.device)).float()
    return float(vectors.square().mean().sqrt())
