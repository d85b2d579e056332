"""Small Gemma 3 checkpoints and patients for the tests of the language-model parts."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)

from dataset_format import MIMICtrajectoryDataset
from dte_encoder import ClinicalODERNN
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.data.trajectories import PromptOptions, TrajectoryDataset
from medgemma_clinical.files import file_hash, json_hash
from medgemma_clinical.models.checkpoints import CONFIG, HASHED_FILES, stage1_config
from medgemma_clinical.models.encoder import series_of
from medgemma_clinical.models.language_model import (
    add_lora,
    base_facts,
    embedding_rms,
    load_language_model,
    tiny_language_model,
)
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory import TrajectoryClassifier, fit_member
from medgemma_clinical.models.trajectory_llm import (
    LLMClassifier,
    LLMWriter,
    TextBatch,
    TrajectoryLLM,
)

CPU = torch.device("cpu")
LAYERS = 2
PREFIX = 4
LENGTHS = (1, 6, 2, 9, 3, 5, 4, 7, 1, 8, 2, 6, 3, 9, 5, 4)
"""Observations of each patient: fewer than, as many as, and more than the soft tokens."""

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""A small vision tower."""

GEMMA_GENERATION = {
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "top_k": 64,
    "top_p": 0.95,
}
"""What stands in generation_config.json of Google's Gemma 3 checkpoints."""


def patients() -> MIMICtrajectoryDataset:
    """Sixteen patients of different lengths, half with an event, with their own split.

    Two facts of each are declared, some unknown, and the question is asked hours behind the last
    observation, or at an unknown time.
    """
    rng = np.random.default_rng(0)
    rows = []
    for k, length in enumerate(LENGTHS):
        times = np.cumsum(rng.integers(1, 9, size=length))
        series = " -> ".join(f"{rng.integers(8, 30)} ({t}h)" for t in times)
        rows.append(
            {
                "subject_id": f"patient {k}",
                "clinical_trajectory": series,
                "label_escalation": k % 2,
                "clinical_context": "known diabetes " * (k % 3),
                "split": "train" if k < 8 else "val" if k < 12 else "test",
            }
        )
    dataset = MIMICtrajectoryDataset(pd.DataFrame(rows))
    dataset.static_names = "static_bmi [kg/m2]", "static_admissions"
    dataset.statics = rng.normal([27, 2], [4, 1], size=(len(rows), 2))
    dataset.statics[2::5, 0] = dataset.statics[1::3, 1] = np.nan
    ends = dataset.times[dataset.offsets[1:] - 1]
    dataset.prediction_hours = ends + rng.integers(0, 30, size=len(rows))
    dataset.prediction_hours[4::6] = np.nan
    return dataset


def data_of(dataset: TrajectoryDataset) -> Data:
    """The data set, split, with whole prompts."""
    return prepare_data(dataset, max_samples=0, seed=0, prompts=PromptOptions(), min_cell=0)


def llm_config(
    model: TrajectoryLLM, stage: str, data: Data, *, base: str | Path = "tiny", **more: Any
) -> dict[str, Any]:
    """What a checkpoint of stage 2 or 3 says of its model."""
    assert model.stage1 is not None
    return {
        "stage": stage,
        **stage1_config(model.stage1),
        "num_prefix_tokens": model.tokens,
        "shuffled": model.shuffled,
        "stage1_logit": model.adds_stage1,
        "residual_weight": model.residual_weight,
        "base_weights": "pretrained",
        **base_facts(str(base)),
        "base_class": "Gemma3ForCausalLM",
        "quantization": "none",
        "precision": "fp32",
        "prompts": asdict(data.prompts),
        "max_text_tokens": None,
        "report_tokens": 60,
        **data.description(),
        **more,
    }


def rehash(best: Path, **changes: Any) -> None:
    """Change a configuration and write all hashes anew, as a person who means harm can."""
    config = json.loads((best / CONFIG).read_text()) | changes
    config.pop("config_sha256")
    config["files_sha256"] = {name: file_hash(best / name) for name in HASHED_FILES}
    (best / CONFIG).write_text(json.dumps({**config, "config_sha256": json_hash(config)}))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Of the models that ``put_into_cache`` puts there."""

LONG_CONTEXT = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
"""What Google's config.json says of Gemma 3 from 4B on, in words of before transformers 5."""


class PublishedModel(NamedTuple):
    """A model of the hub, and its layout with smaller widths and fewer layers.

    name: hub id. text: entries of config.json on the language model, where they are not those of
    ``save_published``. sight: whether it has a vision tower, and so names its language weights
    with a prefix.
    """

    name: str
    text: dict[str, Any]
    sight: bool = False


PUBLISHED = [
    # 4B leaves out heads and their width, which are the library's defaults.
    PublishedModel("google/medgemma-1.5-4b-it", {"hidden_size": 40, **LONG_CONTEXT}, sight=True),
    PublishedModel(
        "google/medgemma-27b-text-it",
        # Heads narrower than hidden / heads, and a scale of its own.
        {"hidden_size": 84, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        | {"query_pre_attn_scalar": 21, **LONG_CONTEXT},
    ),
    PublishedModel(
        "google/gemma-3-12b-pt",
        {"hidden_size": 60, "num_attention_heads": 4, "num_key_value_heads": 2, **LONG_CONTEXT},
        sight=True,
    ),
    PublishedModel(
        "google/gemma-3-1b-it",
        {"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
        | {"sliding_window": 8, "rope_scaling": None},
    ),
    PublishedModel(
        "google/gemma-3-270m",
        {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
        | {"sliding_window": 8, "rope_scaling": None},
    ),
]
"""Source: config.json of these models and of their text-only copies on the hub."""


def save_published(folder: Path, model: PublishedModel) -> Path:
    """Write a small checkpoint in the layout of a published one: configuration, names, shards."""
    text = {
        **{"model_type": "gemma3_text", "vocab_size": 259, "num_hidden_layers": 7},
        **{"intermediate_size": 2 * model.text["hidden_size"], "rope_theta": 1000000.0},
        **{"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6, **model.text},
    }
    torch.manual_seed(6)
    config = Gemma3TextConfig(**{**text, "initializer_range": 0.2})
    if model.sight:
        whole = Gemma3Config(
            text_config=config.to_dict(), vision_config=VISION, mm_tokens_per_image=4
        )
        base: PreTrainedModel = Gemma3ForConditionalGeneration(whole)
        words: dict[str, Any] = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "mm_tokens_per_image": 4,
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": VISION,
        }
    else:
        base, words = Gemma3ForCausalLM(config), {"architectures": ["Gemma3ForCausalLM"], **text}
    base.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    tiny_language_model()[1].save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**words, "torch_dtype": "bfloat16"}))
    return folder


def put_into_cache(cache: Path, name: str, folder: Path | None = None, **config: Any) -> None:
    """Put a model into a cache as huggingface_hub keeps it: a folder's copy, or a config.json.

    Without both the hub is known to have no config.json there.
    """
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    if folder:
        shutil.copytree(folder, snapshot)
    elif config:
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
    else:
        (place / ".no_exist" / COMMIT).mkdir(parents=True)
        (place / ".no_exist" / COMMIT / "config.json").touch()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def text_config(hidden: int = 64) -> Gemma3TextConfig:
    """The dimensions of the tiny model, or a wider one."""
    base = tiny_language_model()[0].config.to_dict()
    return Gemma3TextConfig(**{**base, "hidden_size": hidden})


def save_text_checkpoint(folder: Path, seed: int = 1) -> Path:
    """Write a text-only Gemma 3 with weights that no other model has."""
    torch.manual_seed(seed)
    Gemma3ForCausalLM(text_config()).save_pretrained(folder)
    tiny_language_model()[1].save_pretrained(folder)
    return folder


def save_multimodal_checkpoint(folder: Path, prefix: str, seed: int = 2) -> Path:
    """Write a Gemma 3 with a vision tower, its language weights named with ``prefix``."""
    config = Gemma3Config(
        text_config=text_config().to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config = type(model.generation_config)(**GEMMA_GENERATION)
    model.save_pretrained(folder)
    tiny_language_model()[1].save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"^language_model\.model\.", prefix, k): v for k, v in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bring_code(folder: Path, ran: Path, *, whole: bool = True) -> None:
    """Let a model's folder name code of its own, which would make the file ``ran``.

    Args:
        folder: of a model.
        ran: the mark.
        whole: the kinds of model and tokenizer stay known ones, which need no code.
    """
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    classes = {f"Auto{x}": f"own.{x}" for x in ("Config", "ModelForCausalLM")}
    config = {**json.loads((folder / "config.json").read_text()), "auto_map": classes}
    config |= {} if whole else {"model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    own: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) | own
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")


def stage1_for(dataset: TrajectoryDataset, members: int = 1) -> TrajectoryClassifier:
    """A stage 1 with random weights and the scales of all patients."""
    split, built = {"train": np.flatnonzero(~np.isnan(dataset.labels))}, []
    data = Data(dataset, split, PromptOptions(), "", "", min_cell=0)
    for member in range(members):
        torch.manual_seed(3 + member)
        built.append(fit_member(ClinicalODERNN(len(dataset.features)), data))
        nn.init.normal_(built[-1].head.wide.weight, std=0.1)  # a new one says nothing
    return TrajectoryClassifier(built)


def disturb_adapter(llm: nn.Module, size: float = 0.05) -> None:
    """Make the adapter matter: LoRA's B starts at zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=generator)


class Parts(NamedTuple):
    """Models of stages 2 and 3 that share stage 1, projection and language model."""

    classifier: LLMClassifier
    writer: LLMWriter
    collate: TextCollator


def classifier_and_writer(
    dtype: torch.dtype = torch.float32,
    base: PreTrainedModel | None = None,
    *,
    new: bool = False,
    members: int = 1,
) -> Parts:
    """Stage 2 and stage 3 models on the same parts, and the collator with answers.

    The classifier's head has learned, unless it is ``new``: then it says nothing.
    """
    dataset = data_of(patients()).dataset
    tiny, tokenizer = load_language_model("tiny", "none", dtype, CPU)
    base = base or tiny
    collate = TextCollator(dataset, tokenizer, PromptOptions(), answers=True)
    scale = embedding_rms(base, collate.sample)
    torch.manual_seed(5)
    llm = add_lora(base, 8, 16, 0.0)
    disturb_adapter(llm)
    stage1 = stage1_for(dataset, members)
    layout: dict[str, Any] = {"tokens": PREFIX, "scale": scale, "bos": collate.bos}
    torch.manual_seed(7)
    classifier = LLMClassifier(stage1, llm, verdict=collate.verdict, prevalence=0.3, **layout)
    if not new:
        nn.init.normal_(classifier.head.weight)
    writer = LLMWriter(stage1, llm, verdict=collate.verdict, **layout)
    writer.projection = classifier.projection
    return Parts(classifier.eval(), writer.eval(), collate)


@contextlib.contextmanager
def body_inputs(model: TrajectoryLLM) -> Iterator[list[dict[str, Any]]]:
    """Yield a list that fills with the keywords of each call of the decoder body."""
    seen: list[dict[str, Any]] = []

    def keep(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    hook = model.body.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def plain_sequence(model: TrajectoryLLM, batch: TextBatch, row: int) -> Tensor:
    """Lay out one row by hand: (1, S, D) of <bos>, its soft tokens, its text; no padding."""
    embedding = model.llm.get_input_embeddings()
    length = int(batch["observed"][row].any(1).sum())
    times, values, observed, _ = (part[row : row + 1] for part in series_of(batch))
    series = times[:, :length], values[:, :length], observed[:, :length]
    assert isinstance(model.stage1, TrajectoryClassifier)
    assert model.projection is not None
    encoder = model.stage1.encoder
    assert isinstance(encoder, ClinicalODERNN)
    states = encoder(*series)[:, -PREFIX:]  # (1, up to P, H)
    soft = model.projection.linear(states)
    soft = soft / soft.square().mean(-1, keepdim=True).sqrt() * model.projection.scale
    text = batch["input_ids"][row : row + 1, batch["text_mask"][row]]
    return torch.cat([embedding(torch.tensor([[model.bos]])), soft, embedding(text)], dim=1)
