"""Stages 2 and 3: encoder states as soft tokens in front of the text of an adapted LLM.

Letters: B patients, L observations, H state, P soft tokens, T text tokens, S positions of the
sequence <bos> [soft tokens] [text], D width of the LLM, V vocabulary, N answer tokens of a batch.
Some models have no <bos>: soft tokens then come first.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medgemma_clinical.data.trajectories import Batch
from medgemma_clinical.files import InputError, RunFault
from medgemma_clinical.models.outcome import LABELS, Outcome
from medgemma_clinical.models.trajectory import Output, Stage1

if TYPE_CHECKING:  # see ``language_model``
    from transformers import PreTrainedModel

IGNORED = -100
"""Target of positions without loss, as in ``torch.nn.functional.cross_entropy``."""

VERDICT_WEIGHT = 50
"""Weight of the verdict in stage 3's loss; each other token of the report counts 1."""

LOSS_ROWS = 128
"""Answer tokens whose logits over the vocabulary are in memory at a time."""

LOGIT_TOLERANCE = 0.02
"""Of the logits that the loss reads from the model's own, of their size: bfloat16 rounds them."""


class TrajectoryStates(NamedTuple):
    """The part of an encoder's output that a language model reads."""

    states: Tensor  # (B, P, H) the latest P
    mask: Tensor  # (B, P) bool, False where a patient has fewer
    outputs: Tensor  # (B, Q) of stage 1: the log-odds of a label, or hazards


class TextBatch(Batch):
    """A batch with text, padded on the right; ``TrajectoryStates`` where computed ahead."""

    input_ids: Tensor  # (B, T) int64
    text_mask: Tensor  # (B, T) bool
    targets: Tensor  # (B, T) int64, ids within the answer, ``IGNORED`` elsewhere
    verdict: Tensor  # (B,) int64, position in the text of the token before the verdict
    states: NotRequired[Tensor]  # (B, P, H)
    states_mask: NotRequired[Tensor]  # (B, P) bool
    stage1_outputs: NotRequired[Tensor]  # (B, Q)


class DecoderInput(NamedTuple):
    """What the decoder reads."""

    embeddings: Tensor  # (B, S, D) in the LLM's dtype
    mask: Tensor  # (B, S) bool, False in padding
    text_start: Tensor  # (B,) int64, position of the first text token


class SoftPrompt(nn.Module):
    """Turn states into tokens of the RMS of the language model's embeddings."""

    scale: Tensor

    def __init__(self, hidden_dim: int, width: int, scale: float) -> None:
        """Project from ``hidden_dim`` to ``width``; ``scale`` is the RMS of embeddings."""
        super().__init__()
        self.linear = nn.Linear(hidden_dim, width)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, states: Tensor) -> Tensor:
        """Return tokens (B, P, D) for states (B, P, H)."""
        # Gemma takes inputs_embeds as multiplied by sqrt(D) already; another size starts as noise.
        projected = self.linear(states)
        return self.scale * functional.rms_norm(projected, projected.shape[-1:])


def latest_states(stage1: Stage1, batch: Batch, tokens: int) -> TrajectoryStates:
    """Encode a batch; keep each patient's latest ``tokens`` states, up to the prediction time."""
    states, logits = stage1.read(batch)  # (B, L + 1, H), (N, B, 2, Q)
    length = batch["observed"].any(dim=2).sum(1)  # (B,)
    row = torch.arange(len(states), device=states.device)
    later = batch["prediction_hours"] > batch["times"][row, length - 1]
    position = (length + later)[:, None] - tokens + torch.arange(tokens, device=states.device)
    # The state at the prediction time stands in the last column, behind the padding.
    column = torch.where(position == length[:, None], states.shape[1] - 1, position.clamp(min=0))
    return TrajectoryStates(states[row[:, None], column], position >= 0, logits.mean(dim=(0, 2)))


class TrajectoryLLM(nn.Module):
    """Stage 1, soft prompt and adapted language model; the stages add their readout.

    Their outputs are added: the language model learns only what text and dynamics add.
    """

    def __init__(
        self,
        stage1: Stage1 | None,
        projection: SoftPrompt | None,
        llm: PreTrainedModel,
        *,
        tokens: int,
        bos: int | None,
        verdict: tuple[int, int],
        adds_stage1: bool = True,
        residual_weight: float = 1.0,
        outcome: Outcome = LABELS,
    ) -> None:
        """Join stage 1 (None: text alone), projection (None: no soft prompt) and language model.

        ``tokens`` is P, ``bos`` (None: nothing) begins every input, ``verdict`` are the ids of yes
        and no.
        """
        super().__init__()
        self.stage1 = stage1
        self.outcome = outcome
        self.llm = llm
        self.projection = projection
        self.tokens, self.bos, self.verdict = tokens, bos, verdict
        self.adds_stage1 = adds_stage1 and stage1 is not None
        self.residual_weight = residual_weight  # 1 while training, then fitted to validation

    def residual(self, states: Tensor) -> Tensor:
        """Return the language model's logits (B, W), from ``at_verdict`` (B, D)."""
        raise NotImplementedError

    def trajectory(self, batch: TextBatch) -> TrajectoryStates | None:
        """Return stage 1's states, from the batch where known; None without stage 1."""
        if self.stage1 is None:
            return None
        if "states" in batch:
            return TrajectoryStates(batch["states"], batch["states_mask"], batch["stage1_outputs"])
        return latest_states(self.stage1, batch, self.tokens)

    def offset(self, trajectory: TrajectoryStates | None, hidden: Tensor) -> Tensor:
        """Return stage 1's share (B, Q) of the outputs, the same for everyone where it has none."""
        if trajectory is None or not self.adds_stage1:
            outputs = hidden.new_tensor(self.outcome.null_outputs, dtype=torch.float32)
            return outputs.expand(len(hidden), -1)
        return trajectory.outputs

    def embed(
        self, batch: TextBatch, trajectory: TrajectoryStates | None, *, left: bool = False
    ) -> DecoderInput:
        """Lay out <bos> [soft tokens] [text] without holes; ``left`` puts the padding in front."""
        embedding = self.llm.get_input_embeddings()
        text = embedding(batch["input_ids"])  # (B, T, D)
        begin = [] if self.bos is None else [self.bos]
        first = batch["input_ids"].new_tensor([begin]).expand(len(text), -1)  # (B, 1 or 0)
        slots, masks = [embedding(first.long())], [torch.ones_like(first, dtype=torch.bool)]
        if trajectory is not None and self.projection is not None:
            slots.append(self.projection(trajectory.states).to(text.dtype))
            masks.append(trajectory.mask)
        text_start = torch.cat(masks, dim=1).sum(dim=1)
        mask = torch.cat([*masks, batch["text_mask"]], dim=1)  # (B, S + holes)
        lengths = mask.sum(dim=1)
        longest = int(lengths.max())
        # A stable sort moves the holes to one side and keeps the order of the rest.
        order = torch.argsort((mask if left else ~mask).int(), dim=1, stable=True)
        order = order[:, -longest:] if left else order[:, :longest]
        row = torch.arange(len(mask), device=mask.device)[:, None]
        return DecoderInput(
            embeddings=torch.cat([*slots, text], dim=1)[row, order],
            mask=mask[row, order],
            text_start=text_start + (longest - lengths if left else 0),
        )

    def read(self, batch: TextBatch, trajectory: TrajectoryStates | None) -> tuple[Tensor, Tensor]:
        """Return the hidden states (B, S, D) and where the text starts, (B,) int64."""
        sequence = self.embed(batch, trajectory)
        embeddings = sequence.embeddings
        # Causal attention never looks at padding behind the text. Without a mask sixteen bits take
        # flash attention; float32 would take plain products, and a longer text needs the window's.
        window = getattr(self.llm.config, "sliding_window", None) or math.inf
        within_window = embeddings.shape[1] <= window
        unmasked = within_window and embeddings.dtype == torch.bfloat16
        with adapters_in(embeddings.dtype, embeddings.device):
            result = self.llm.get_decoder()(
                inputs_embeds=embeddings,
                attention_mask=None if unmasked else sequence.mask.long(),
                use_cache=False,
            )
        return result.last_hidden_state, sequence.text_start


def adapters_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Compute the products of LoRA's float32 weights in bfloat16 where the base model's are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def at_verdict(hidden: Tensor, text_start: Tensor, batch: TextBatch) -> Tensor:
    """Return the states (B, D) float32 from which the verdict is read."""
    row = torch.arange(len(hidden), device=hidden.device)
    # In float32: sixteen bits would round many patients to the same risk.
    return hidden[row, text_start + batch["verdict"]].float()


class LLMClassifier(TrajectoryLLM):
    """Stage 2: a linear head on the last position; ``lm_head`` is never called."""

    def __init__(self, *parts: Any, head: nn.Linear, **options: Any) -> None:
        """Join the parts; ``head`` maps the width D to W logits, and starts at zero."""
        super().__init__(*parts, **options)
        self.head = head
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    @torch.no_grad()
    def start_at(self, targets: Any) -> None:
        """Begin with outputs that fit targets (n, ...) on average, where no stage 1 gives them."""
        if not self.adds_stage1:  # of other outputs ``null_outputs`` are the start
            start = torch.from_numpy(self.outcome.start(targets))
            self.head.bias.copy_(start.view(len(self.head.bias), -1)[:, -1])

    def residual(self, states: Tensor) -> Tensor:
        """Return what the head reads in states (B, D): (B, W) float32."""
        residual: Tensor = self.head(states)
        return residual

    def forward(self, batch: TextBatch) -> Output:
        """Return the loss (sum over B) and the logit of each patient."""
        trajectory = self.trajectory(batch)
        hidden, text_start = self.read(batch, trajectory)
        offset = self.offset(trajectory, hidden)
        residual = self.outcome.added(self.residual(at_verdict(hidden, text_start, batch)))
        outputs = offset + self.residual_weight * residual  # (B, Q)
        loss = self.outcome.loss(outputs[None], batch["outcomes"])
        return Output(loss, len(outputs), self.outcome.logit(outputs), outputs, offset)


def head_logits(states: Tensor, weight: Tensor, config: Any) -> Tensor:
    """Return the float32 logits (..., V) of states (..., D) by rows (V, D) of ``lm_head``.

    They are scaled (Cohere, Granite) and limited (Gemma) as by the model's own forward.
    """
    logits = functional.linear(states, weight).float()
    logits *= getattr(config, "logit_scale", None) or 1.0
    logits /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def answer_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    boost: Tensor,
    importance: Tensor,
    yes: int,
    config: Any,
) -> Tensor:
    """Return the weighted cross-entropy (sum over N) of states (N, D) by ``lm_head`` (V, D).

    ``boost`` (N,) is added to the logit of the id ``yes``, ``importance`` (N,) weighs each token,
    ``config`` is the language model's.
    """

    # Made twice, in chunks: all logits would be larger than all else that a step keeps.
    def chunk_loss(hidden: Tensor, targets: Tensor, boost: Tensor, importance: Tensor) -> Tensor:
        logits = head_logits(hidden, weight, config)  # (rows, V)
        logits[:, yes] += boost
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return (importance * losses).sum()

    chunks = zip(*(x.split(LOSS_ROWS) for x in (hidden, targets, boost, importance)), strict=True)
    losses = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return torch.stack(losses).sum()


class LLMWriter(TrajectoryLLM):
    """Stage 3: the language model writes the report; ``lm_head`` reads the answer's states only."""

    def residual(self, states: Tensor) -> Tensor:
        """Return the log-odds of yes against no in states (B, D): (B, 1) float32."""
        words = self.llm.get_output_embeddings().weight[list(self.verdict)].float()  # (2, D)
        yes, no = head_logits(states, words, self.llm.config).split(1, dim=1)
        return yes - no

    @torch.no_grad()
    def check_logits(self, base: str) -> None:
        """Refuse a model of which the loss reads other logits than its own forward computes."""
        self.eval()
        weight = self.llm.get_output_embeddings().weight
        ids = torch.tensor([self.verdict * 4], device=weight.device)  # (1, T)
        batch: Any = {"input_ids": ids, "text_mask": torch.ones_like(ids, dtype=torch.bool)}
        hidden, _ = self.read(batch, None)
        logits = head_logits(hidden, weight, self.llm.config)  # (1, S, V)
        if self.bos is not None:
            ids = functional.pad(ids, (1, 0), value=self.bos)
        with adapters_in(weight.dtype, weight.device):
            own = self.llm(input_ids=ids, use_cache=False).logits
        if not (logits - own).norm() <= LOGIT_TOLERANCE * own.norm():  # NaN fails
            problem = "the logits that stage 3 trains on are not those of the model's own forward"
            raise InputError(f"--model_name {base}: {problem}: give another, or train stage 2")

    def forward(self, batch: TextBatch) -> Output:
        """Return the weighted cross-entropy (sum over N, zero without answers) and the log-odds."""
        trajectory = self.trajectory(batch)
        hidden, text_start = self.read(batch, trajectory)
        offset = self.offset(trajectory, hidden)
        row, position = (batch["targets"] != IGNORED).nonzero(as_tuple=True)  # (N,) each
        is_verdict = position == batch["verdict"][row] + 1
        loss = answer_loss(
            hidden[row, text_start[row] + position - 1],  # a state predicts the token behind it
            self.llm.get_output_embeddings().weight,
            batch["targets"][row, position],
            offset[row, 0] * is_verdict,
            # It is one token among a hundred copied ones.
            torch.where(is_verdict, float(VERDICT_WEIGHT), 1.0),
            self.verdict[0],
            self.llm.config,
        )
        # Causal attention hides the report itself at the token before the verdict.
        residual = self.residual(at_verdict(hidden, text_start, batch))
        terms = len(row) + (VERDICT_WEIGHT - 1) * int(is_verdict.sum())
        outputs = offset + self.residual_weight * residual  # (B, 1)
        return Output(loss[None], terms, outputs.squeeze(1), outputs, offset)

    @torch.no_grad()
    def write(self, batch: TextBatch, max_tokens: int, eos: list[int], pad: int) -> Tensor:
        """Continue texts greedily to ``eos``, then by ``pad``: ids (B, at most ``max_tokens``)."""
        from transformers import GenerationConfig

        self.eval()
        sequence = self.embed(batch, self.trajectory(batch), left=True)
        greedy = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos, pad_token_id=pad
        )
        finite = torch.ones((), dtype=torch.bool, device=sequence.embeddings.device)

        def pack(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            """Copy states so that their strides have no gaps; note whether they are finite."""
            finite.logical_and_(inputs[0].isfinite().all())
            # Over the strides of ``generate`` torch multiplies, and copies the weights, row by row.
            return (inputs[0].clone(memory_format=torch.contiguous_format),)

        dtype, device = sequence.embeddings.dtype, sequence.embeddings.device
        with (
            self.llm.get_output_embeddings().register_forward_pre_hook(pack),
            adapters_in(dtype, device),
            torch.compiler.set_stance("force_eager"),  # layers that cache are compiled one by one
        ):
            ids: Tensor = self.llm.generate(
                inputs_embeds=sequence.embeddings,
                attention_mask=sequence.mask.long(),
                generation_config=greedy,
            )
        if not finite:
            raise RunFault("the language model's states are not finite: no report is written")
        return ids
