"""The language model of stage 2 or 3 with its adapter merged, as a folder of transformers.

    DIR/language_model/       config.json, model.safetensors, tokenizer, generation_config.json
    DIR/modules.safetensors   encoder, projection and heads, as in best/
    DIR/config.json  DIR/README.md  DIR/NOTICE

The folder is a checkpoint like best/: the program loads it without the base model.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from medgemma_clinical.files import InputError, RunFault, atomic, locked, read_json, write_text
from medgemma_clinical.inference.hub import files_of
from medgemma_clinical.inference.merge_proof import (
    MergeProof,
    compare,
    proof_logits,
    tolerance,
)
from medgemma_clinical.models.checkpoints import (
    CARD,
    CONFIG,
    LLM_STAGES,
    MERGED_MODEL,
    MODULE_WEIGHTS,
    NOTICE,
    is_merged,
    write_config,
)
from medgemma_clinical.models.language_model import base_facts
from medgemma_clinical.models.sharing.model_card import code, describe_weight
from medgemma_clinical.models.sharing.terms import licence, terms_of
from medgemma_clinical.models.text_batches import chat_turns
from medgemma_clinical.models.trained_model import (
    Builders,
    TrainedModel,
    check_no_control,
    checkpoint_path,
    load_trained_model,
    read_trained_config,
)
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EXPORTED_FILES = re.compile(
    rf"{MODULE_WEIGHTS}|{CONFIG}|{CARD}|{NOTICE}|{MERGED_MODEL}/({NOTICE}|chat_template.jinja"
    r"|model(-\d+-of-\d+)?.safetensors"
    r"|(config|generation_config|tokenizer|tokenizer_config|model.safetensors.index).json)"
)
"""Names of all that an export may write."""

EXPORT_CARD = """\
# Language model with a merged adapter

{base} ({revision}).
The LoRA adapter of a {stage} model is merged into its weights, which are in {precision}.

- `language_model/`: an ordinary folder of transformers, which vLLM reads as well
- `modules.safetensors`, `config.json`: encoder, projection and heads, and what they read
- Weight of the language model beside stage 1: {weight}
- Question: {question}
- Outcome: {outcome}

The probability comes from stage 1's logit, this weight and the decision rule in `config.json`: a
text that `language_model/` writes does not hold it. To predict:
`python medgemma_trainer.py --predict --checkpoint FOLDER --predictions FILE` and the flag that
names the rows. To serve reports: medgemma_clinical/docs/serving.md of the program.

Research on the question above. Not a medical device, not for clinical use.

{licence}
"""


def export_merged(
    checkpoint: Path,
    folder: Path,
    builders: Builders,
    model_name: str | None = None,
) -> MergeProof:
    """Merge the adapter of a trained stage 2 or 3 into its base model; write both as a folder.

    The folder is read back and proves itself before it appears.

    Args:
        checkpoint: a stage's folder, or its ``best``.
        folder: to write; replaces an earlier export that holds no further file.
        builders: of the script.
        model_name: where the base model lies now, as for ``load_trained_model``.

    Raises:
        InputError: nothing to merge there, or the folder is another one's or being written.
        RunFault: the folder that was read back computes other logits.
    """
    place = check_mergeable(checkpoint)
    check_export_folder(folder)
    trained = load_trained_model(place, builders, model_name)
    assert isinstance(trained.model, TrajectoryLLM)
    before = proof_logits(trained)
    with cast("PeftModel", trained.model.llm).disable_adapter():
        without = proof_logits(trained)
    target = folder.absolute()  # a place such as "." has no name
    with locked(target), atomic(target) as temporary:
        write_merged(temporary, place, trained)
        del trained  # one model is in memory at a time
        merged = load_trained_model(temporary, builders)
        proof = compare(before, without, proof_logits(merged), allowed=tolerance(merged))
        if not proof.holds:
            raise RunFault(
                "the merged language model computes other logits than the trained one: "
                f"{proof.describe()}: nothing was written: please report it"
            )
    return proof


def check_mergeable(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint whose adapter can be merged.

    Raises:
        InputError: stage 1, a control, merged already, or as ``read_trained_config``.
    """
    place, config = checkpoint_path(checkpoint), read_trained_config(checkpoint)
    if config["stage"] not in LLM_STAGES:
        raise InputError(
            f"--checkpoint {checkpoint}: stage 1 has no language model to merge: use its .pt as it "
            "is, or name the folder classification or generative of a run"
        )
    check_no_control(checkpoint, config)
    if is_merged(config):
        raise InputError(
            f"--checkpoint {checkpoint}: an export, whose adapter is merged already: copy the "
            "folder, or name the run that it was made from"
        )
    return place


def check_export_folder(folder: Path) -> None:
    """Check that an export makes a new folder, or replaces an earlier export and no other file.

    Raises:
        InputError: naming what lies there.
    """
    if not folder.absolute().parent.is_dir():
        raise InputError(f"--export_dir {folder}: give a folder within one that exists")
    if not os.path.lexists(folder):
        return
    try:
        own = not folder.is_symlink() and is_merged(read_json(folder / CONFIG))
    except (OSError, ValueError):
        own = False
    if not own:
        raise InputError(
            f"--export_dir {folder}: exists and is no earlier export: choose a new name"
        )
    others = sorted(name for name in files_of(folder) if not EXPORTED_FILES.fullmatch(name))
    if others:
        raise InputError(
            f"--export_dir {folder}: holds {others[0]}, which no export writes: move it away, or "
            "choose a new name"
        )


def write_merged(folder: Path, place: Path, trained: TrainedModel) -> None:
    """Write the merged model and what stands beside it.

    Args:
        folder: to write.
        place: of the checkpoint.
        trained: loaded from there; its weights are changed.
    """
    config, model = trained.config, trained.model
    assert isinstance(model, TrajectoryLLM)
    assert trained.tokenizer is not None
    merged = merge_adapter(cast("PeftModel", model.llm), config["quantization"])
    for facts in (vars(merged.config), trained.tokenizer.init_kwargs):
        facts.pop("auto_map", None)  # names code that the base model brought, and is not read
    merged.generation_config = greedy_generation(trained.tokenizer, config.get("report_tokens"))
    # The names of the text model's own weights, also of a multimodal checkpoint.
    merged.save_pretrained(folder / MERGED_MODEL, save_original_format=False)
    trained.tokenizer.save_pretrained(folder / MERGED_MODEL)
    shutil.copyfile(place / MODULE_WEIGHTS, folder / MODULE_WEIGHTS)
    for each in (folder, folder / MERGED_MODEL):  # either may be passed on alone
        write_text(each / NOTICE, terms_of(config).notice)
    own_keys = ("base_model", "base_sha256", "base_revision", "quantization", "precision")
    content = {  # write_config makes the hashes anew
        **config,
        **base_facts(str(folder / MERGED_MODEL)),
        "quantization": "none",
        "precision": "fp32" if merged.dtype == torch.float32 else "bf16",
        "merged_from": {key: config[key] for key in own_keys},
    }
    write_config(folder, content)
    write_text(folder / CARD, export_card(config, content["precision"]))


@torch.no_grad()
def merge_adapter(llm: PeftModel, quantization: str) -> PreTrainedModel:
    """Add an adapter's matrices to the weights of its base model, in place.

    Four-bit weights become the bfloat16 ones that they stand for, as in each of their products.

    Args:
        llm: base model with LoRA layers.
        quantization: of the base model.

    Returns:
        The base model without LoRA layers.
    """
    from peft.tuners.lora import LoraLayer

    base: PreTrainedModel = llm.get_base_model()
    if quantization == "nf4":
        base = base.dequantize(dtype=torch.bfloat16).to(torch.bfloat16)
    for module in llm.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            change = module.get_delta_weight(llm.active_adapter).float()
            # In float32 and rounded once: bfloat16 would lose most of a small change.
            weight.data = change.add_(weight).to(weight.dtype)
    merged: PreTrainedModel = llm.unload()
    return merged


def greedy_generation(tokenizer: Any, report_tokens: int | None) -> Any:
    """Return the settings by which ``generate`` continues a text as the program does.

    Args:
        tokenizer: of the language model.
        report_tokens: tokens that a report may have, None for stage 2.
    """
    from transformers import GenerationConfig

    ends = [int(tokenizer.eos_token_id), *chat_turns(tokenizer)[2]]
    return GenerationConfig(
        bos_token_id=int(tokenizer.bos_token_id),
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=ends,
        do_sample=False,
        max_new_tokens=report_tokens,
    )


def export_card(config: dict[str, Any], precision: str) -> str:
    """Return the README of an export, from the configuration of the trained model."""
    files = config["base_sha256"]
    revision = f"SHA-256 of its files {files}" if files else f"revision {config['base_revision']}"
    return EXPORT_CARD.format(
        base=code(str(config["base_model"])),
        revision=f"{revision}, {config['quantization']}",
        stage=config["stage"],
        precision=precision,
        weight=describe_weight(config),
        question=code(config["question"]),
        outcome=code(config["outcome"]),
        licence=licence(config),
    )
