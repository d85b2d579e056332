"""Small Gemma 3 checkpoints and patients for the tests of the language-model parts."""

import contextlib
import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
)

import conftest  # noqa: F401  (names the folder of the models)
import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.training_data import Data, prepare_data
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.files import file_hash, json_hash
from medgemma_clinical.models.checkpoints import CONFIG, HASHED_FILES, describe_data, stage1_config
from medgemma_clinical.models.language_model import DEMO_FOLDER, base_record
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import LLMWriter
from trajectories import GAP

CPU = torch.device("cpu")
LAYERS, VOCABULARY = 2, 512
PREFIX = 4
LENGTHS = (1, 6, 2, 9, 3, 5, 4, 7, 1, 8, 2, 6, 3, 9, 5, 4, 1, 6, 2, 9, 3, 5, 4, 7)
"""Observations of each patient: fewer than, as many as, and more than the soft tokens."""

VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}

GENERATION = {"eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95, "do_sample": True}
"""From generation_config.json of Google's Gemma 3 checkpoints, which must not be followed."""


def text_config():
    """The dimensions of a small text model."""
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=1024,
        initializer_range=0.125,  # 1 / sqrt(64): the tied output can then be sure of a token
    )


def save_tokenizer(folder):
    """Write the demo's tokenizer, to which a digit is a token, into a model's folder."""
    for path in DEMO_FOLDER.glob("tokenizer*.json"):
        shutil.copy(path, folder)


def save_text_checkpoint(folder, seed=1):
    """Write a text-only Gemma 3 with weights that no other model has."""
    torch.manual_seed(seed)
    Gemma3ForCausalLM(text_config()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def shared_checkpoint():
    """Return a folder with the language model of most tests, made once for all workers."""
    folder = Path(os.environ["TEST_MODELS"]) / "tiny"
    with FileLock(folder.with_suffix(".lock")), torch.random.fork_rng(devices=[]):
        if not folder.exists():
            save_text_checkpoint(folder.with_suffix(".part"), seed=0).rename(folder)
    return str(folder)


TINY_MODEL = shared_checkpoint()


def patients():
    """24 patients of different lengths, half with an event, with their own split.

    Two static features of each, some unknown, and the question is asked hours behind the last
    observation, or at an unknown time.
    """
    rng, rows = np.random.default_rng(0), []
    for k, length in enumerate(LENGTHS):
        times = np.cumsum(rng.integers(1, 9, size=length))
        series = " -> ".join(f"{rng.integers(8, 30)} ({t}h)" for t in times)
        part = "train" if k < 16 else "val" if k < 20 else "test"
        rows.append((f"patient {k}", series, k % 2, "known diabetes " * (k % 3), part))
    columns = ["subject_id", "clinical_trajectory", "label_escalation", "clinical_context", "split"]
    dataset = MIMICtrajectoryDataset(pd.DataFrame(rows, columns=columns), description=GAP)
    dataset.static_names = "static_bmi [kg/m2]", "static_admissions"
    dataset.static = rng.normal([27, 2], [4, 1], size=(len(rows), 2))
    dataset.static[2::5, 0] = dataset.static[1::3, 1] = np.nan
    ends = dataset.times[dataset.offsets[1:] - 1]
    dataset.prediction_hours = ends + rng.integers(0, 30, size=len(rows))
    dataset.prediction_hours[4::6] = np.nan
    return dataset


def data_of(dataset):
    """The data set, split, with whole prompts."""
    return prepare_data(dataset, max_samples=0, seed=0, prompts=PromptOptions())


def stage1_for(dataset, members=1):
    """A stage 1 with random weights and the scales of all patients with a label."""
    data = Data(dataset, {"train": np.flatnonzero(~np.isnan(dataset.labels))}, None, "", "")
    encoder = {"input_dim": len(dataset.features)}
    model = trainer.build_stage1({"encoder": encoder, "members": members, **data.description()}, 3)
    model.fit_scales(data)
    return model


def build_config(stage1, stage, data, *, base=TINY_MODEL, **more):
    """What a checkpoint of stage 2 or 3 says of its model."""
    return {
        "stage": stage,
        **stage1_config(stage1),
        **{"num_prefix_tokens": PREFIX, "shuffled": False, "stage1_logit": True},
        **{"residual_weight": 1.0, "max_text_tokens": None, "report_tokens": 60},
        **{"base_weights": "pretrained", "quantization": "none", "precision": "fp32"},
        **{"lora_rank": 8, "lora_alpha": 16, "prompts": asdict(data.prompts)},
        **base_record(str(base)),
        **describe_data(data),
        **more,
    }


def llm_config(model, stage, data, **more):
    """The same of a built model."""
    return build_config(model.stage1, stage, data, num_prefix_tokens=model.tokens, **more)


def rehash(best, **changes):
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
    """A model of the hub: its layout with smaller widths and fewer layers.

    ``text`` holds entries of config.json on the language model that are not those of
    ``save_published``. With ``sight`` it has a vision tower, and so a prefix in front of names.
    """

    name: str
    text: dict
    sight: bool = False


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NARROW = {**HEADS, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
PUBLISHED = [
    # 4B leaves out heads and their width, which are the library's defaults.
    PublishedModel("google/medgemma-1.5-4b-it", {"hidden_size": 40, **LONG_CONTEXT}, sight=True),
    PublishedModel(  # heads narrower than hidden / heads, and a scale of its own
        "google/medgemma-27b-text-it",
        {"hidden_size": 84, **HEADS, "head_dim": 16, "query_pre_attn_scalar": 21, **LONG_CONTEXT},
    ),
    PublishedModel("google/gemma-3-12b-pt", {"hidden_size": 60, **HEADS, **LONG_CONTEXT}, True),
    PublishedModel("google/gemma-3-1b-it", {"hidden_size": 36, **NARROW, "rope_scaling": None}),
    PublishedModel("google/gemma-3-270m", {"hidden_size": 20, **NARROW, "rope_scaling": None}),
]
"""Source: config.json of these models and of their text-only copies on the hub."""


def save_published(folder, model):
    """Write a small checkpoint in the layout of a published one: configuration, names, shards."""
    text = {
        **{"model_type": "gemma3_text", "vocab_size": VOCABULARY, "num_hidden_layers": 7},
        **{"intermediate_size": 2 * model.text["hidden_size"], "rope_theta": 1000000.0},
        **{"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6, **model.text},
    }
    torch.manual_seed(6)
    config = Gemma3TextConfig(**{**text, "initializer_range": 0.2})
    base, words = Gemma3ForCausalLM, text
    if model.sight:
        base, sight = Gemma3ForConditionalGeneration, {"vision_config": VISION}
        sight["mm_tokens_per_image"] = 4
        config = Gemma3Config(text_config=config.to_dict(), **sight)
        words = {"model_type": "gemma3", "text_config": text, **sight}
    base(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    save_tokenizer(folder)
    words = {"architectures": [base.__name__], **words, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(words))
    return folder


def put_into_cache(cache, name, folder):
    """Copy a model into a cache as huggingface_hub keeps it."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def save_multimodal_checkpoint(folder, prefix, seed=2):
    """Write a Gemma 3 with a vision tower, its language weights named with ``prefix``."""
    tokens = {"boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
    words = {"text_config": text_config().to_dict(), "vision_config": VISION, **tokens}
    config = Gemma3Config(mm_tokens_per_image=4, **words)
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**GENERATION, cache_implementation="hybrid")
    model.save_pretrained(folder)
    save_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    renamed = {re.sub(r"^language_model\.model\.", prefix, k): v for k, v in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_json(path, **changes):
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def bring_code(folder, ran, *, whole=True):
    """Let a model's folder name code of its own, which would make the file ``ran``.

    ``whole``: the kinds of model and tokenizer stay known ones, which need no code.
    """
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    classes = {f"Auto{x}": f"own.{x}" for x in ("Config", "ModelForCausalLM")}
    edit_json(folder / "config.json", auto_map=classes, **({} if whole else {"model_type": "own"}))
    own = {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
    edit_json(folder / "tokenizer_config.json", auto_map=own)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")


def disturb_adapter(llm, size=0.05):
    """Make the adapter matter: LoRA's B starts at zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=generator)


Parts = namedtuple("Parts", "classifier writer collate")
"""Models of stages 2 and 3 that share stage 1, projection and language model."""


def classifier_and_writer(base=TINY_MODEL, *, new=False, members=1, attention="sdpa", **config):
    """Stage 2 and stage 3 models on the same parts, and the collator with answers.

    ``base`` is a name or a folder. The classifier's head has learned, unless it is ``new``: then it
    says nothing. ``config`` holds keys that differ from those of ``build_config``.
    """
    data = data_of(patients())
    stage1 = stage1_for(data.dataset, members)
    config = build_config(stage1, "classification", data, base=base, **config)
    options = {"device": CPU, "attention": attention, "seed": 5}
    classifier, tokenizer = trainer.build_llm(config, stage1, str(base), **options)
    disturb_adapter(classifier.llm)
    if not new:
        nn.init.normal_(classifier.head.weight)
    words = {name: getattr(classifier, name) for name in ("tokens", "bos", "verdict")}
    writer = LLMWriter(stage1, classifier.projection, classifier.llm, **words)
    collate = TextCollator(data.dataset, tokenizer, PromptOptions(), answers=True)
    return Parts(classifier.eval(), writer.eval(), collate)


@contextlib.contextmanager
def body_inputs(model):
    """Yield a list that fills with the keywords of each call of the decoder body."""
    seen = []
    body = model.llm.get_decoder()
    hook = body.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    yield seen
    hook.remove()


def plain_states(stage1, batch, row):
    """All states that row ``row`` can show a language model, by hand: (n, H), no padding."""
    length = int(batch["observed"][row].any(1).sum())
    series = [batch[name][row : row + 1, :length] for name in ("times", "values", "observed")]
    until = batch["prediction_hours"][row : row + 1]
    states = stage1.encoder(*series, until)[0]
    return states if until[0] > series[0][0, -1] else states[:-1]


def plain_sequence(model, batch, row):
    """Lay out one row by hand: (1, S, D) of <bos>, if any, soft tokens, text; no padding."""
    embedding = model.llm.get_input_embeddings()
    soft = model.projection.linear(plain_states(model.stage1, batch, row)[-model.tokens :])
    soft = soft / soft.square().mean(-1, keepdim=True).sqrt() * model.projection.scale
    text = embedding(batch["input_ids"][row, batch["text_mask"][row]])
    first = [embedding(torch.tensor([model.bos]))] if model.bos is not None else []
    return torch.cat([*first, soft.to(text.dtype), text])[None]
