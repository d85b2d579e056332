"""Stages 2 and 3 on base models in folders, to be merged with their adapters."""

import re
from dataclasses import asdict

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForCausalLM

import medgemma_trainer as trainer
from language_models import (
    classifier_and_writer,
    data_of,
    disturb_adapter,
    llm_config,
    patients,
    text_config,
)
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import write_json
from medgemma_clinical.inference import merge
from medgemma_clinical.models.checkpoints import save_llm
from medgemma_clinical.models.language_model import tiny_language_model

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
    tiny_language_model()[1].save_pretrained(folder)
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
    decision = DecisionRule(threshold=0.5).to_config()
    words = {"quantization": quantization, "precision": precision, "prompts": prompts}
    config = llm_config(model, stage, data, base=base, decision=decision, **{**words, **more})
    folder = run / stage
    folder.mkdir(parents=True)
    save_llm(folder / "best", model, config)
    write_json(folder / "run.json", {"arguments": {"model_name": str(base)}})
    return folder


def spoil_file(model, folder, more):
    """Write a model, and one of its matrices wrong."""
    type(model).save_pretrained(model, folder, **more)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_merge(monkeypatch, fault):
    """Let the merge make one mistake."""
    right = merge.merge_adapter

    def wrong(llm, quantization):
        layers = [module for module in llm.modules() if isinstance(module, LoraLayer)]
        if fault == "a layer is left out":
            for module in layers[:7]:
                module.lora_B["default"].weight.data.zero_()
        if fault == "the adapter is lost":
            for module in layers:
                module.lora_B["default"].weight.data.zero_()
        if fault == "the adapter is added twice":
            for module in layers:
                module.lora_B["default"].weight.data *= 2
        if fault == "a scale is forgotten":
            for module in layers:
                module.scaling["default"] = 1.0
        merged = right(llm, quantization)
        if fault == "the head is no longer tied":
            head = torch.nn.Linear(64, merged.config.vocab_size, bias=False)
            merged.set_output_embeddings(head.to(merged.dtype))
            merged.config.tie_word_embeddings = False
        if fault == "not a number":
            merged.get_parameter("model.norm.weight").data[3] = torch.nan
        if fault == "the file differs from the model":
            merged.save_pretrained = lambda folder, **more: spoil_file(merged, folder, more)
        return merged

    monkeypatch.setattr(merge, "merge_adapter", wrong)
