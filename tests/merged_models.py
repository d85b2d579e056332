"""Stages 2 and 3 on base models in folders, to be merged with their adapters."""

import re
from dataclasses import asdict

import torch
from transformers import Gemma3ForCausalLM

import medgemma_trainer as trainer
from language_models import (
    classifier_and_writer,
    data_of,
    disturb_adapter,
    llm_config,
    patients,
    save_tokenizer,
    text_config,
)
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import write_json
from medgemma_clinical.inference import serving
from medgemma_clinical.models.checkpoints import save_llm

BUILDERS = trainer.BUILDERS


def save_base(folder, *, lively=False):
    """Write a text-only Gemma 3 of two layers.

    Args:
        folder: to write.
        lively: what the model writes depends on what it reads; else it repeats its last token.
    """
    torch.manual_seed(1)
    model = Gemma3ForCausalLM(text_config())
    for name, weight in model.named_parameters():
        if lively and re.search(r"post_\w+_layernorm", name):
            weight.data.fill_(6.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_stage(run, stage, base, quantization="none", precision="fp32", *, change=0.05, **more):
    """Write the folder of a trained stage.

    Args:
        run: its run folder.
        stage: ``classification`` or ``generative``.
        base: folder of its base model.
        quantization: of the base model.
        precision: of computation.
        change: standard deviation of LoRA's B.
        more: keys of the configuration.
    """
    data = data_of(patients())
    parts = classifier_and_writer(base, quantization=quantization, precision=precision)
    model = parts.classifier if stage == "classification" else parts.writer
    disturb_adapter(model.llm, change)
    prompts = asdict(PromptOptions())
    decision = {"label": asdict(DecisionRule(threshold=0.5))}
    words = {"quantization": quantization, "precision": precision, "prompts": prompts}
    config = llm_config(model, stage, data, base=base, decision=decision, **{**words, **more})
    folder = run / stage
    folder.mkdir(parents=True)
    save_llm(folder / "best", model, config)
    write_json(folder / "run.json", {"arguments": {"model_name": str(base)}})
    return folder


def spoil_merge(monkeypatch, fault):
    """Let the merge make one mistake."""
    right = serving.merge_adapter

    def wrong(llm, quantization, adapter):
        merged = right(llm, quantization, adapter)
        if fault == "a matrix is negated":
            merged.get_parameter("model.layers.1.mlp.down_proj.weight").data.neg_()
        if fault == "the head is no longer tied":
            head = torch.nn.Linear(64, merged.config.vocab_size, bias=False)
            merged.set_output_embeddings(head.to(merged.dtype))
            merged.config.tie_word_embeddings = False
        if fault == "not a number":
            merged.get_parameter("model.norm.weight").data[3] = torch.nan
        return merged

    def lost(llm, quantization, adapter):
        return llm.unload() if quantization == "none" else llm.unload().dequantize()

    faulty = lost if fault == "the adapter is lost" else wrong
    monkeypatch.setattr(serving, "merge_adapter", faulty)
