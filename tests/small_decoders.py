"""Small random checkpoints of every tested type of language model, without pytest."""

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chat_templates import TEMPLATES
from medgemma_clinical.models.language_model import DEMO_FOLDER

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.125},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
}
HEADS = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}


class Kind(NamedTuple):
    """What a small checkpoint has of the published ones of its type."""

    config: dict
    template: str  # name in ``TEMPLATES``
    lacks: tuple = ()  # special tokens that their tokenizers do not have


KINDS = {
    "gemma3_text": Kind({**HEADS, "sliding_window": 32}, "Gemma 3"),
    "gemma4_text": Kind(  # as 31B: no per-layer embeddings, values are keys, capped logits
        {
            **{**HEADS, "global_head_dim": 32, "sliding_window": 32, "attention_k_eq_v": True},
            **{"num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
            **{"final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision"},
        },
        "Gemma 4",
    ),
    "gemma2": Kind(  # as 2B: limited scores and logits
        {**HEADS, "sliding_window": 32, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0},
        "Gemma 3",
    ),
    "llama": Kind({}, "Llama 3.2", ("pad_token",)),
    "qwen2": Kind({"tie_word_embeddings": True}, "Qwen2.5", ("bos_token",)),
    "qwen3": Kind({"head_dim": 16, "tie_word_embeddings": True}, "Qwen3", ("bos_token",)),
    "mistral": Kind({"sliding_window": 32}, "Mistral", ("pad_token",)),
    "olmo2": Kind({}, "base model"),
    "phi3": Kind({}, "Phi 4"),
}


def save_decoder(folder, kind, **changes):
    """Write a small checkpoint of a tested type."""
    config, template, lacks = KINDS[kind]
    return save_model(folder, kind, config | changes, template, lacks)


def save_model(folder, kind, config, template, lacks=()):
    """Write a small checkpoint, and a tokenizer in the form of the published ones of its type."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokenizer.chat_template, tokens, *_ = TEMPLATES[template]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    for name in lacks:
        setattr(tokenizer, name, None)
    config = AutoConfig.for_model(kind, **{**SIZES, "vocab_size": len(tokenizer), **config})
    torch.manual_seed(1)  # not the weights of ``--base_weights random``
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if kind == "gemma4_text" and name.endswith("k_norm.weight"):
            # Its attention has no scale: random words would each look at one other alone.
            weight.data.mul_(len(weight) ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
