"""The base model: found in a folder or on the hub, read safely, frozen; the built-in one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from medgemma_clinical.distributed import default_device
from medgemma_clinical.files import (
    InputError,
    file_hash,
    is_out_of_memory,
    json_hash,
    one_line,
    read_json,
)
from medgemma_clinical.models.choices import DEMO
from medgemma_clinical.models.text_batches import chat_turns
from medgemma_clinical.provenance import PACKAGE

if TYPE_CHECKING:  # transformers takes seconds: a function that begins with a model loads it
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A harmless import warning: a kernel that speeds up 4-bit inference on a CPU is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)

DEMO_FOLDER = PACKAGE / "sample" / "writer"
"""The model ``demo``; see its README."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Of each ``--precision``. Gemma 3 overflows in float16."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""Name of a model of the hub; the built-in one has the same form."""

READ_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
"""Files of a base model that are downloaded and read; pickled weights are not."""

QUIET = dict.fromkeys(("bitsandbytes", "huggingface_hub", "httpx", "httpx2"), logging.CRITICAL)
QUIET["transformers"] = logging.ERROR
"""Libraries whose log repeats an error, or reports no fault, and from which level on it does."""


def machine_defaults(
    name: str, weights: str, quantization: str | None, precision: str
) -> tuple[str, str]:
    """Return ``--quantization`` and ``--precision``, chosen by the machine where they are not."""
    cuda = torch.cuda.is_available()
    whole = name == DEMO or weights == "random"  # cannot be packed
    if whole and quantization == "nf4":
        raise InputError(f"--quantization nf4: not for {DEMO} and random weights: use none")
    if quantization is None:
        quantization = "nf4" if cuda and not whole else "none"
    if precision == "auto":
        sixteen = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if sixteen else "fp32"
    return quantization, precision


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence messages that report no fault, for the length of a block."""
    before = {name: logging.getLogger(name).level for name in QUIET}
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():  # peft reads a property that transformers renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def find_model(name: str, revision: str | None = None, flag: str = "--model_name") -> Path:
    """Return the folder of a base model; one of the hub is downloaded, with its progress."""
    if name == DEMO:
        return DEMO_FOLDER
    if os.path.isdir(name):
        return Path(name)
    if "/" not in name or not HUB_ID.fullmatch(name):
        problem = f"no such folder; a model of the hub is named as in google/{name}"
        raise InputError(f"{flag} {name}: {problem}")
    try:
        with quiet_libraries():
            return Path(snapshot_download(name, revision=revision, allow_patterns=READ_FILES))
    except Exception as error:  # of HTTP, of the disk and of the library's own
        advice = f"accept its licence at https://huggingface.co/{name}, then run hf auth login"
        if not isinstance(error, (GatedRepoError, RepositoryNotFoundError)):
            problem = f"not in the cache, and the hub does not answer ({type(error).__name__})"
            advice = f"{problem}: try again online; before the first download {advice}"
        raise InputError(f"{flag} {name}: {advice}; {DEMO} needs no download") from error


@contextlib.contextmanager
def loading(flag: str, advice: str = "") -> Iterator[None]:
    """Silence the libraries that load a model, and refuse what they cannot load in one line."""
    try:
        with quiet_libraries():
            yield
    except Exception as error:  # the libraries raise anything on files of another kind
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if "scaled_dot_product_attention" in text:
            text, advice = "its type has no sdpa attention: add --attention eager", ""
        raise InputError(f"{flag}: cannot be loaded: {text}{advice}") from error


def load_language_model(
    name: str,
    *,
    nf4: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    weights: str = "pretrained",
    attention: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen language model, also out of a multimodal one, and its tokenizer.

    ``nf4`` None does not quantise; ``weights`` "random" draws them, for a control.
    """
    from transformers import GenerationConfig

    assert nf4 is None or weights == "pretrained", "quantised weights cannot be random"
    folder = find_model(name, revision)
    check_base_model(name, folder)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    advice = "; python -m bitsandbytes checks whether this machine can quantise" if nf4 else ""
    with loading(f"--model_name {name}", advice):
        config = text_config(folder)
        if getattr(config, "attn_logit_softcapping", None):  # sdpa cannot limit the scores
            options["attn_implementation"] = "eager"
        if weights == "random":
            model = draw_model(config, **options).to(device)
        else:
            options |= {"quantization_config": nf4, "device_map": {"": device}}
            model = load_text_model(folder, config, **options)
        tokenizer = load_tokenizer(folder)
    # By name: bitsandbytes must not be imported before its environment is set.
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for module in packed:  # repacked for a CPU, weights lose bits
        module.support_avx512bf16_for_cpu = False
    if nf4 and not packed:
        raise InputError(f"--quantization nf4: packs no layer of {name}: use none")
    # What its files set, such as a penalty for repeated digits, would join the settings of a call.
    model.generation_config = GenerationConfig()
    return model.requires_grad_(False).eval(), tokenizer


def text_config(folder: Path) -> Any:
    """Return the configuration of a folder's language model; refuse one without soft tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", 0):  # Gemma 4 E2B and E4B, Gemma 3n
        raise ValueError(
            f"{config.model_type} with per-layer embeddings, which soft tokens do not have: give "
            "a larger model of its kind"
        )
    return config


def load_text_model(folder: Path, config: Any, **options: Any) -> PreTrainedModel:
    """Load the language model of a folder."""
    from transformers import AutoModelForCausalLM

    return load_weights(AutoModelForCausalLM, folder, config, "model.", **options)


def load_weights(kind: Any, folder: Path, config: Any, prefix: str, **options: Any) -> Any:
    """Load a model, whose weights' names begin with ``prefix``; no code of a checkpoint runs."""
    model, info = kind.from_pretrained(
        folder,
        config=config,
        key_mapping={r"^(model\.)?language_model\.(model\.)?": prefix},  # if multimodal
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    # Only encoders have a pooler, which nothing reads.
    if missing := [name for name in info["missing_keys"] if "pooler" not in name]:
        raise ValueError(f"missing weights, such as {min(missing)}")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder; refuse one that does not restore text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer("24 (0h)", add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is None or tokenizer.decode(ids) != "24 (0h)":
        raise ValueError("its tokenizer does not restore text")
    if tokenizer.pad_token_id is None:  # padding is masked, whatever its id
        tokenizer.pad_token = tokenizer.eos_token
    chat_turns(tokenizer)  # refuses a template that has no turn for a prompt
    return tokenizer


def check_base_model(name: str, folder: Path) -> None:
    """Refuse an adapter, and a model that reads text both ways or is quantised."""
    config = base_config(name, folder)
    text = config.get("text_config") or config
    problem = ""
    if (folder / "adapter_config.json").exists():
        problem = "holds an adapter: give its base model"
    elif text.get("use_bidirectional_attention") in (True, "all"):  # "vision": of images alone
        problem = "an embedding model: give one that writes text"
    elif config.get("quantization_config") or text.get("quantization_config"):
        problem = "quantised already: give the original weights"
    if problem:
        raise InputError(f"--model_name {name}: {problem}")


def base_config(name: str, folder: Path) -> dict[str, Any]:
    """Return the content of a base model's config.json."""
    try:
        config: dict[str, Any] = {**read_json(folder / "config.json")}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--model_name {name}: no config.json of a model") from error
    return config


def base_type(name: str) -> str:
    """Return the ``model_type`` of a base model."""
    return str(base_config(name, find_model(name)).get("model_type"))[:80]


def draw_model(config: Any, **options: Any) -> PreTrainedModel:
    """Return a model with fixed random weights, as its kind has before training."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):  # drawn on the CPU, so that they are always the same
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def base_name(name: str) -> str:
    """Return the name of a model as others may see it: of a folder without its path."""
    return one_line(os.path.basename(os.path.abspath(name))) if os.path.isdir(name) else name


def base_record(name: str, flag: str = "--model_name") -> dict[str, str | None]:
    """Return a checkpoint's record of its base model: name, hash of a folder, hub's commit."""
    digest = commit = None
    if os.path.isdir(name) and name != DEMO:
        digest = content_hash(Path(name))
    elif name != DEMO:
        commit = find_model(name, flag=flag).name
    return {"base_model": base_name(name), "base_sha256": digest, "base_revision": commit}


def content_hash(folder: Path) -> str:
    """Return the SHA-256 of a folder's model files; the weights are read once a process."""
    hashes = {}
    for path in folder.iterdir():
        if path.suffix in (".json", ".safetensors", ".model", ".jinja") and path.is_file():
            status = path.stat()
            hashes[path.name] = cached_hash(path, status.st_size, status.st_mtime_ns)
    return json_hash(hashes)


@cache
def cached_hash(path: Path, size: int, changed: int) -> str | None:
    """Return the SHA-256 of a file, known as long as its size and time stay as they are."""
    return file_hash(path)


def cache_width(config: Any) -> int:
    """Return how many numbers of a token all layers keep: its keys and values."""
    layers = [config.per_layer_config[k] for k in range(config.num_hidden_layers)]
    heads = [layer.num_key_value_heads for layer in layers]
    sizes = [
        getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in layers
    ]
    return 2 * sum(n * size for n, size in zip(heads, sizes, strict=True))


def set_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, to save memory."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    # The reentrant kind fails where embeddings come from outside of the model.
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})


def check_compiler() -> None:
    """Refuse ``--compile_layers`` on a machine where torch cannot compile."""
    try:
        torch.compile(torch.sin)(torch.ones(1, device=default_device()))
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        advice = "install a C++ compiler, for a GPU also triton, or leave it out"
        raise InputError(f"--compile_layers: torch cannot compile: {advice}: {problem}") from error


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile each decoder layer, for batches of any length; dropout then draws otherwise."""
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True, backend=backend)


@torch.no_grad()
def embedding_rms(model: PreTrainedModel, tokenizer: Any, question: str) -> float:
    """Return the root mean square of the scaled embeddings of what stands in every prompt."""
    embedding = model.get_input_embeddings()
    text = f"{question} 0123456789 -> (h) .,"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    vectors = embedding(torch.tensor(ids, device=embedding.weight.device)).float()
    return float(vectors.square().mean().sqrt())
