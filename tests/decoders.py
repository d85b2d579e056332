"""Every tested type of language model, small and random: trained, resumed, loaded, exported."""

import contextlib
import itertools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import medgemma_trainer as trainer
from language_models import patients
from medgemma_clinical.inference.serving import export_merged
from medgemma_clinical.models.checkpoints import CARD, MERGED_MODEL, NOTICE
from medgemma_clinical.models.decoders import TESTED, decoder_of
from medgemma_clinical.models.trained_model import load_trained_model
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.signals import Stopped
from medgemma_clinical.training.state import read_state
from small_decoders import SIZES, save_decoder
from stages import arguments, data_for, make_stage

MODES = {2: "classification", 3: "generative"}
ROOT = Path(__file__).parents[1]
STOP_AFTER = 2
"""Steps after which the run that is resumed is stopped, of four."""


class Case:
    """A stage on a small checkpoint of a type."""

    def __init__(self, place, kind, mode, quantization):
        self.base = place / kind
        self.run = place / f"{kind}-{mode}-{quantization}"
        self.words = ["--model_name", self.base, "--mode", mode, "--quantization", quantization]
        if not self.base.exists():
            save_decoder(self.base, kind)

    def stage(self):
        """Wire the stage over the 24 patients."""
        more = ["--precision", "bf16", "--num_prefix_tokens", 4, "--epochs", 1, "--batch_size", 4]
        args = arguments(*map(str, [*self.words, *more]))
        return make_stage(args, data_for(args, patients()))

    @torch.no_grad()
    def outputs(self, model):
        """What a model computes of some patients: their logits and, in stage 3, reports."""
        collate = self.trained.text
        logits = model.eval()(collate(range(8))).logit
        if not isinstance(model, LLMWriter):
            return logits, None
        prompts = collate.with_verdicts(range(8), np.zeros(8, bool))
        return logits, model.write(prompts, 8, collate.eos, collate.pad)


def train(case):
    """Train for an epoch: the loss is finite, and every part of the adapter learns."""
    case.trained = stage = case.stage()
    case.run.mkdir()
    (epoch,) = trainer.fit(stage, 0, case.run).progress.history
    assert np.isfinite([epoch["train_loss"], epoch["val_loss"]]).all()
    learned = {n: p for n, p in stage.model.llm.named_parameters() if "lora_B" in n}
    assert len(learned) >= 4 * SIZES["num_hidden_layers"]
    assert [name for name, weight in learned.items() if not weight.any()] == []


def resume(case):
    """Stop within the epoch and resume: the weights are those of the undisturbed run."""
    folder, step, stage = case.run / "stopped", trainer.step, case.stage()

    def stopping(state, *rest):
        return step(state, *rest) or state.progress.steps == STOP_AFTER

    folder.mkdir()
    with mock.patch.object(trainer, "step", stopping), contextlib.suppress(Stopped):
        trainer.fit(stage, 0, folder, save_every=1)
        raise AssertionError("was not stopped")
    trainer.fit(stage := case.stage(), 0, folder, resume=read_state(folder / "last"))
    for name, weight in case.trained.trainable_parameters().items():
        assert torch.equal(stage.trainable_parameters()[name], weight), name


def reload(case):
    """Load the trained model again: it computes the same to the last bit."""
    again = load_trained_model(case.run, trainer.BUILDERS, str(case.base)).model
    expected, found = case.outputs(case.trained.model), case.outputs(again)
    assert torch.equal(found[0], expected[0])
    assert expected[1] is None or torch.equal(found[1], expected[1])


def export(case):
    """Merge the adapter: the program proves the logits, and loads the export as a checkpoint."""
    folder = case.run / "export"
    export_merged(case.run, folder, trainer.BUILDERS, str(case.base))
    merged = load_trained_model(folder, trainer.BUILDERS).model
    apart = case.outputs(merged)[0] - case.outputs(case.trained.model)[0]
    assert apart.abs().max() < 0.5
    config = json.loads((folder / MERGED_MODEL / "config.json").read_text())
    assert config["model_type"] == case.base.name


def card(case):
    """Read card and notice: both state the licence of the type."""
    for folder in (case.run / "best", case.run / "export"):
        notice, text = ((folder / name).read_text() for name in (NOTICE, CARD))
        for licence in decoder_of(case.base.name).licences:
            assert licence.terms().notice in notice
            assert licence.terms().notice.strip() in text


STEPS = {"train": train, "resume": resume, "reload": reload, "export": export, "card": card}
"""The steps of a case, in their order."""


COLUMNS = ("train 2", "train 3", "resume", "reload", "export", "card")
"""Of the matrix: the steps of both stages, the first one of each by itself."""

LABELS = {"nf4": "NF4", "none": "bf16"}


def matrix(place):
    """Take all steps of all types; return the table of docs/training.md, and the errors."""
    head = ["Type", "Such as", *COLUMNS]
    lines, failed = [f"|{'|'.join(head)}|", "|---" * len(head) + "|"], {}
    for decoder in TESTED:
        kind, passed = decoder.types[-1], {column: [*LABELS.values()] for column in COLUMNS}
        for (quantization, label), (stage, mode) in itertools.product(
            LABELS.items(), MODES.items()
        ):
            for step, error in attempt(Case(place, kind, mode, quantization)).items():
                column = f"{step} {stage}" if step == "train" else step
                failed[kind, mode, label, step] = error
                passed[column] = [each for each in passed[column] if each != label]
        cells = ["yes" if len(x) == len(LABELS) else ", ".join(x) or "no" for x in passed.values()]
        lines.append(f"|`{kind}`|`{decoder.example}`|{'|'.join(cells)}|")
    return "\n".join(lines) + "\n", failed


def attempt(case):
    """Take the steps of a case; return those that failed with their errors."""
    errors = {}
    for name, step in STEPS.items():
        try:
            step(case)
        except Exception as error:
            errors[name] = error
    return errors
