"""Ways to join stage 1 and the language model that the program does not have; see fusion.py."""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import CosineAnnealingLR

import medgemma_trainer as trainer
from medgemma_clinical.data.texts import direction, plain
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import default_device
from medgemma_clinical.evaluation.decision import RESIDUAL_WEIGHTS
from medgemma_clinical.models.trajectory import Output
from medgemma_clinical.models.trajectory_llm import (
    VERDICT_WEIGHT,
    LLMClassifier,
    LLMWriter,
    TextBatch,
)
from medgemma_clinical.training.stage import Stage

EVERY_LAYERS = 4
"""Decoder layers from one cross-attention to the next."""

GATE_SPEED = 20.0
"""Factor on a gate's parameter: one short epoch of small steps must be able to open the gate."""


class GatedCrossAttention(nn.Module):
    """Let decoder layers read the encoder's states; gates that start at zero change nothing.

    Source: Alayrac et al. 2022, "Flamingo"; without its feed-forward layers.
    """

    def __init__(self, hidden_dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, 4, kdim=hidden_dim, vdim=hidden_dim, batch_first=True)
            for _ in range(layers)
        )
        self.gates = nn.Parameter(torch.zeros(layers))

    def forward(self, layer: int, hidden: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states (B, S, D) with what a layer reads of states (B, P, H) added."""
        size = hidden.float().square().mean(dim=-1, keepdim=True).sqrt()
        query = hidden.float() / size
        read, _ = self.attentions[layer](
            query, states, states, key_padding_mask=~mask, need_weights=False
        )
        read = functional.rms_norm(read, read.shape[-1:]) * size.detach()
        return hidden + (torch.tanh(GATE_SPEED * self.gates[layer]) * read).to(hidden.dtype)


class CrossAttending(LLMClassifier):
    """Stage 2 with gated cross-attention in the place of soft tokens."""

    def __init__(self, *parts: Any, **keywords: Any) -> None:
        super().__init__(*parts, **keywords)
        layers: Any = self.llm.get_decoder().layers
        chosen = layers[EVERY_LAYERS - 1 :: EVERY_LAYERS] or layers[-1:]
        assert self.stage1 is not None
        hidden, width = self.stage1.encoder.hidden_dim, self.llm.config.hidden_size
        # The projection's name, and so its learning rate.
        self.projection = GatedCrossAttention(hidden, width, len(chosen))  # type: ignore[assignment]
        for number, layer in enumerate(chosen):
            layer.register_forward_hook(self.reader(number))

    def reader(self, number: int) -> Callable[..., Tensor]:
        """Return the hook of a layer."""

        def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            states, mask, *_ = self.read_states
            return self.projection(number, output, states, mask)  # type: ignore[misc]

        return add

    def read(self, batch: TextBatch, trajectory: Any) -> tuple[Tensor, Tensor]:
        self.read_states = trajectory
        return super().read(batch, None)


class MarginWriter(LLMWriter):
    """Stage 3 with a pairwise margin: each event of a batch above each other row."""

    def forward(self, batch: TextBatch) -> Output:
        output = super().forward(batch)
        labels = batch["labels"] == 1
        if not self.training or labels.all() or not labels.any():
            return output
        between = output.logit[labels][:, None] - output.logit[~labels]
        # As heavy as the verdict itself.
        margin = VERDICT_WEIGHT * len(labels) * functional.softplus(-between).mean()
        return output._replace(loss=output.loss + margin)


def caption(dataset: TrajectoryDataset, i: int) -> str:
    """Return what the projection learns to say of a patient's series."""
    clauses = []
    for feature, times, values in dataset.measured(i):
        figures = {"first": values[0], "last": values[-1]}
        figures |= {"lowest": values.min(), "highest": values.max()}
        stated = ", ".join(f"{word} {plain(value)}" for word, value in figures.items())
        trend = direction(times, values).text
        clauses.append(f"{dataset.features[feature]} {stated}, {trend}")
    return "; ".join(clauses)


def with_summary(data: Data, logits: NDArray[np.float64]) -> Data:
    """Return the data with each series' mean and spread and stage 1's risk behind the context."""
    dataset = copy.copy(data.dataset)
    contexts = []
    for i, context in enumerate(dataset.contexts):
        words = [context.rstrip(". ")]
        for feature, _, values in dataset.measured(i):
            mean, spread = plain(round(values.mean(), 1)), plain(round(values.std(), 1))
            words.append(f"{dataset.features[feature]} mean {mean}, spread {spread}")
        contexts.append(". ".join([*words, f"Estimated risk {expit(logits[i]):.0%}"]))
    dataset.contexts = np.array(contexts, dtype=object)
    return dataclasses.replace(data, dataset=dataset)


def warm_up(stage: Stage, args: argparse.Namespace, dataset: TrajectoryDataset) -> None:
    """Train the projection alone, an epoch, so that the language model says each caption.

    The loss is over the tokens that captions use: the whole vocabulary would cost more than the
    rest of the step.
    """
    assert stage.text is not None
    model: Any = stage.model.to(default_device()).train()
    texts = [caption(dataset, i) for i in range(len(dataset))]
    ids = [
        torch.tensor(x) for x in stage.text.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    used = torch.cat(ids).unique()
    weight = model.llm.get_output_embeddings().weight[used.to(default_device())]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "projection" not in n]
    for parameter in others:
        parameter.requires_grad_(False)
    batches, losses = stage.batches["train"], []
    optimizer = torch.optim.AdamW(model.projection.parameters(), lr=args.projection_lr)
    schedule = CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        chosen = [ids[i] for i in rows]
        padded = pad_sequence(chosen, batch_first=True, padding_value=-1)
        text = {"input_ids": padded.clamp(min=0), "text_mask": padded >= 0}
        batch = send_to_device({**stage.collate(rows), **text}, default_device())
        hidden, start = model.read(batch, model.trajectory(batch))
        row, place = batch["text_mask"].nonzero(as_tuple=True)
        logits = functional.linear(hidden[row, start[row] + place - 1], weight).float()
        targets = torch.searchsorted(used, padded[padded >= 0]).to(logits.device)
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        clip_grad_norm_(model.projection.parameters(), trainer.LARGEST_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    sys.stderr.write(f"captions: loss {losses[0]:.3f}, at the end {np.mean(losses[-5:]):.3f}\n")
    for parameter in others:
        parameter.requires_grad_(True)


def weighed(
    label: NDArray[Any],
    offset: NDArray[np.float64],
    logit: NDArray[np.float64],
    patients: NDArray[Any],
    seed: int,
) -> tuple[NDArray[np.float64], list[float]]:
    """Weigh what the language model adds to stage 1's log-odds.

    Args:
        label: (n,) of 0 and 1.
        offset: (n,) stage 1's log-odds.
        logit: (n,) those of both.
        patients: (n,) patient of each row.
        seed: divides the patients into halves.

    Returns:
        Log-odds (n,), and the weight of each half, which is chosen by the loss of the other half.
    """
    names, patient = np.unique(patients, return_inverse=True)
    half = (np.random.default_rng(seed).permutation(len(names)) % 2)[patient]
    candidates = offset + RESIDUAL_WEIGHTS[:, None] * (logit - offset)
    result, chosen = np.empty(len(label)), []
    for here in (half == 0, half == 1):
        losses = [log_loss(label[~here], expit(each[~here])) for each in candidates]
        best = int(np.argmin(losses))
        result[here] = candidates[best, here]
        chosen.append(round(float(RESIDUAL_WEIGHTS[best]), 1))
    return result, chosen
