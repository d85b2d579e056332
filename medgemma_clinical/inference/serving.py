"""Stages 2 and 3 for programs that serve language models: prompts as vectors, merged weights.

    DIR/language_model/       config.json, model.safetensors, tokenizer, generation_config.json
    DIR/modules.safetensors   encoder, projection and heads, as in best/
    DIR/config.json  DIR/README.md  DIR/model_facts.xml  DIR/NOTICE

The folder is a checkpoint like best/: the program loads it without the base model.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from medgemma_clinical.distributed import peak_memory, processes
from medgemma_clinical.files import InputError, RunFault, atomic, locked, write_text
from medgemma_clinical.inference.scoring import Scores
from medgemma_clinical.models import checkpoints
from medgemma_clinical.models.checkpoints import MERGED_MODEL, MODULE_WEIGHTS, Config
from medgemma_clinical.models.decoders import terms_of
from medgemma_clinical.models.language_model import base_record, quiet_libraries
from medgemma_clinical.models.text_batches import chat_turns
from medgemma_clinical.models.trained_model import (
    Builders,
    TrainedModel,
    checkpoint_path,
    load_trained_model,
)
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.training.loaders import LengthBatches

if TYPE_CHECKING:  # see ``language_model``
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PROOF_ROWS, PROOF_TOKENS = 8, 32
MERGE_TOLERANCE = {torch.float32: 2.0**-10, torch.bfloat16: 24 * 2.0**-8}
"""Largest difference of a logit, in standard deviations of a row's logits, times the root of the
number of layers: each adds a rounding error to the states, and such errors are independent."""


@torch.no_grad()
def prompt_embeds(scores: Scores, batch_size: int) -> list[Tensor]:
    """Embed <bos> [soft tokens] [text], in stage 3 [verdict], of each row: (S, D) on the CPU."""
    model, text = scores.trained.model, scores.text
    if not isinstance(model, TrajectoryLLM):
        raise InputError("stage 1 has no language model, and no prompts: name stage 2 or 3")
    if text is None:  # there are no rows
        return []
    verdicts = scores.verdicts
    embedded: dict[int, Tensor] = {}
    for positions in LengthBatches(scores.positions, batch_size, text.lengths(), shuffle=False):
        if isinstance(model, LLMWriter):
            # Greedy decoding alone would say yes from 0.5 on, whatever the threshold.
            batch = text.with_verdicts(positions, [verdicts[row] for row in positions])
        else:
            batch = text(positions)
        batch = send_to_device(batch, scores.trained.device)
        sequence = model.embed(batch, model.trajectory(batch))
        for row, vectors, mask in zip(positions, sequence.embeddings, sequence.mask, strict=True):
            embedded[row] = vectors[mask].cpu()
    return [embedded[row] for row in verdicts]


def export_merged(
    checkpoint: Path, folder: Path, builders: Builders, model_name: str | None = None
) -> float:
    """Write base model and merged adapter as a new folder, checked by its logits.

    Returns the largest difference of a logit, in standard deviations.
    """
    if processes().num_processes > 1:
        raise InputError("export runs in one process: start it by python, not accelerate")
    best = check_mergeable(checkpoint)
    if os.path.lexists(folder) or not folder.absolute().parent.is_dir():
        raise InputError(f"--out {folder}: give a new folder within one that exists")
    cpu = torch.device("cpu")  # the whole weights need not fit the GPU that trained packed ones
    trained = load_trained_model(best, builders, model_name, device=cpu)
    logits = proof_logits(trained)
    with locked(folder), atomic(folder) as temporary:
        write_merged(temporary, best, trained)
        del trained  # one model is in memory at a time
        merged = load_trained_model(temporary, builders, device=cpu)
        llm = cast("PreTrainedModel", merged.model.llm)
        differences = (proof_logits(merged) - logits) / logits.std(dim=1, keepdim=True)
        difference = float(differences.abs().amax())
        allowed = MERGE_TOLERANCE[llm.dtype] * math.sqrt(llm.config.num_hidden_layers)
        if not difference <= allowed:  # NaN fails
            raise RunFault(
                "the merged language model computes other logits than the trained one: "
                f"{difference:.2g} standard deviations apart (rounding explains {allowed:.2g}): "
                "nothing was written: please report it"
            )
    logger.info("largest difference of a logit after the merge: %.2g of their spread", difference)
    logger.info("export: %s; %s; see medgemma_clinical/docs/sharing.md", folder, peak_memory())
    return difference


def check_mergeable(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint whose adapter can be merged."""
    best = checkpoint_path(checkpoint)
    problem = "stage 1 has no language model to merge: name a folder of stage 2 or 3"
    if not best.is_file():
        if not checkpoints.is_merged(checkpoints.read_config(best)):
            return best
        problem = "an export, whose adapter is merged already: copy the folder"
    raise InputError(f"--checkpoint {checkpoint}: {problem}")


@torch.no_grad()
def proof_logits(trained: TrainedModel) -> Tensor:
    """Return the logits (R, V) float32 behind rows of random words."""
    llm = cast("PreTrainedModel", trained.model.llm)
    generator = torch.Generator().manual_seed(0)
    shape = (PROOF_ROWS, PROOF_TOKENS)
    ids = torch.randint(llm.config.vocab_size, shape, generator=generator)
    states = llm.get_decoder()(input_ids=ids.to(trained.device)).last_hidden_state[:, -1]  # (R, D)
    logits: Tensor = llm.get_output_embeddings()(states)
    return logits.float().cpu()


def merge_adapter(llm: PeftModel, quantization: str, adapter: Path) -> PreTrainedModel:
    """Merge an adapter, which lies in a folder as well, into its base model."""
    from peft import PeftModel

    with quiet_libraries():
        if quantization == "nf4":  # the bfloat16 weights meant: peft would pack the sum again
            lora = llm.peft_config[llm.active_adapter]
            base = llm.unload().dequantize(dtype=torch.bfloat16).to(torch.bfloat16)
            llm = PeftModel.from_pretrained(base, adapter, config=lora)
        return cast("PreTrainedModel", llm.merge_and_unload())


def write_merged(folder: Path, best: Path, trained: TrainedModel) -> None:
    """Write the merged model of a checkpoint, and what stands beside it; change its weights."""
    from transformers import GenerationConfig

    config = trained.config
    tokenizer = cast(Any, trained.tokenizer)
    llm = cast("PeftModel", trained.model.llm)
    merged = merge_adapter(llm, config["quantization"], best / "adapter")
    for settings in (vars(merged.config), tokenizer.init_kwargs):
        settings.pop("auto_map", None)  # names code that the base model brought, and is not read
    merged.generation_config = GenerationConfig(  # as the program continues a text
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=[int(tokenizer.eos_token_id), *chat_turns(tokenizer)[2]],
        do_sample=False,
        max_new_tokens=config.get("report_tokens"),
    )
    # The names of the text model's own weights, also of a multimodal checkpoint.
    merged.save_pretrained(folder / MERGED_MODEL, save_original_format=False)
    tokenizer.save_pretrained(folder / MERGED_MODEL)
    shutil.copyfile(best / MODULE_WEIGHTS, folder / MODULE_WEIGHTS)
    for path in (folder, folder / MERGED_MODEL):  # either may be passed on alone
        write_text(path / checkpoints.NOTICE, terms_of(config).notice)
    keys = ("base_model", "base_sha256", "base_revision", "quantization", "precision")
    origin = {"merged_from": {key: cast(Any, config)[key] for key in keys}}
    base = {
        **base_record(str(folder / MERGED_MODEL)),
        "quantization": "none",
        "precision": "fp32" if merged.dtype == torch.float32 else "bf16",
    }
    exported = checkpoints.without_baselines(config) | base | origin
    checkpoints.write_config(folder, cast(Config, exported))
    checkpoints.write_card(folder, cast(Config, config | origin))
