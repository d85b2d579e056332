"""The proof of an export: the merged model computes what the trained one computes.

Both are run in float32 on their own weights, over rows of random words and soft tokens; so is the
trained model without its adapter, which shows how much of the adapter the merged one has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional

from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory_llm import TextBatch, TrajectoryLLM, at_verdict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROOF_ROWS = 32
PROOF_TOKENS = (5, 48)
"""Rows of the proof, and the tokens of the shortest and of the longest."""

TOLERANCE = {torch.float32: 2.0**-10, torch.bfloat16: 12 * 2.0**-8}
"""Largest difference of two logits that rounding of the written weights explains, a share of the
logits' spread (a bound in logits would depend on the size of a model's weights), times the root of
the number of layers. bfloat16 rounds to 2^-8. Each layer adds such an error to the states;
independent errors grow with the root of their number; the largest of millions lies five to six
standard deviations out. The factor 2 is room for the outliers among the states of a trained model.
In float32 the order of the sums decides, and that on a GPU is another one."""

SMALLEST_EFFECT = 1 / 6
"""Root mean square of an adapter's effect, a share of the tolerance, from which on the proof judges
the effect. Of a smaller one rounding to bfloat16 may lose a good part: a change of a weight by less
than half a step of its grid is gone."""

SHARE_BOUND = 0.25
"""The share of the adapter's effect in the merged model lies within 1 +- this: rounding loses less
of an effect that the proof judges, and a lost adapter has 0, a doubled one about 2."""


@dataclass(frozen=True)
class MergeProof:
    """How far the logits of the merged model are from those of the trained one.

    Attributes:
        words: largest difference of a logit over the vocabulary, as a share of the row's standard
            deviation.
        own: largest difference of the logit of the stage's own readout, as a share of the row's
            ``ProofLogits.scale``.
        allowed: largest share that rounding explains.
        words_share: share of the adapter's effect on the logits over the vocabulary that the merged
            model has; None where the effect is too small to be judged.
        own_share: the same on the logit of the stage's own readout.
    """

    words: float
    own: float
    allowed: float
    words_share: float | None
    own_share: float | None

    @property
    def shares(self) -> list[float]:
        """Return the shares that are known."""
        return [share for share in (self.words_share, self.own_share) if share is not None]

    @property
    def holds(self) -> bool:
        """Return whether rounding explains the differences, and the adapter is there; NaN fails."""
        close = self.words <= self.allowed and self.own <= self.allowed
        return close and all(abs(share - 1) <= SHARE_BOUND for share in self.shares)

    def describe(self) -> str:
        """Return the figures in words."""
        effect = " and ".join(f"{share:.2f}" for share in self.shares)
        return (
            f"largest difference in {PROOF_ROWS} rows: of a logit over the vocabulary "
            f"{self.words:.2g} of their spread, of the stage's own logit {self.own:.2g} of its "
            f"size (rounding explains {self.allowed:.2g}); "
            + (
                f"share of the adapter's effect found: {effect}"
                if effect
                else "the adapter changes nothing beyond rounding, so nothing shows if it is whole"
            )
        )


@dataclass(frozen=True)
class ProofLogits:
    """Logits at the last position of R rows, float32 on the CPU.

    Attributes:
        words: (R, V), over the vocabulary.
        own: (R,), of the stage's readout.
        scale: (R,), root mean square of ``own`` over all states as long as the row's, which is
            what rounding grows with.
    """

    words: Tensor
    own: Tensor
    scale: Tensor


def proof_batch(model: TrajectoryLLM) -> TextBatch:
    """Make the rows of the proof: random words of the vocabulary behind random soft tokens.

    The rows have different lengths and are padded, as batches of patients are; no data are needed.
    """
    generator = torch.Generator().manual_seed(0)
    shortest, longest = PROOF_TOKENS
    row = torch.arange(PROOF_ROWS)
    lengths = shortest + row * (longest - shortest) // (PROOF_ROWS - 1)
    ids = torch.randint(
        model.llm.config.vocab_size, (PROOF_ROWS, longest), generator=generator
    )  # (R, T)
    batch: dict[str, Tensor] = {
        "input_ids": ids,
        "text_mask": torch.arange(longest) < lengths[:, None],
        "verdict": lengths - 1,
    }
    if model.stage1 is not None:
        width = model.stage1.encoder.hidden_dim
        states = torch.randn(PROOF_ROWS, model.tokens, width, generator=generator)  # (R, P, H)
        present = 1 + row % max(model.tokens, 1)
        batch["states"] = functional.layer_norm(states, (width,))
        batch["states_mask"] = torch.arange(model.tokens) >= model.tokens - present[:, None]
        batch["trajectory_logit"] = torch.randn(PROOF_ROWS, generator=generator)
    return cast(TextBatch, batch)


@contextlib.contextmanager
def computed_in_float32(llm: nn.Module) -> Iterator[None]:
    """Let a language model compute in float32 on its own weights, a matrix at a time.

    The rounding of states would hide a small adapter; that of the weights is what a file holds.
    """
    kept: dict[nn.Module, Tensor] = {}
    packed: dict[Any, torch.dtype] = {}

    def widen(module: nn.Module, _: object) -> None:
        kept[module] = cast(Tensor, module.weight).data
        module.weight.data = kept[module].float()

    def narrow(module: nn.Module, _: object, __: object) -> None:
        module.weight.data = kept.pop(module)

    embedding = cast("PreTrainedModel", llm).get_input_embeddings()
    hooks = [embedding.register_forward_hook(lambda *call: call[2].float())]
    for module in llm.modules():
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):  # four-bit weights
            packed[module] = cast(Any, module).compute_dtype
            module.compute_dtype = torch.float32  # type: ignore[assignment]
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(narrow))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, dtype in packed.items():
            layer.compute_dtype = dtype


@torch.no_grad()
def proof_logits(trained: TrainedModel) -> ProofLogits:
    """Compute the logits of the rows of the proof, in float32 on the weights of the model."""
    model = trained.model
    assert isinstance(model, TrajectoryLLM)
    batch = send_to_device(proof_batch(model), trained.device)
    with computed_in_float32(model.llm):
        hidden, text_start = model.read(batch, model.trajectory(batch))
        states = at_verdict(hidden, text_start, batch)  # (R, D)
        words = model.llm.get_output_embeddings()(states)  # (R, V)
    own = model.residual(states)
    units = torch.eye(states.shape[1], device=states.device)
    readout = model.residual(units) - model.residual(torch.zeros_like(units[:1]))  # (D,)
    scale = readout.norm() * states.square().mean(dim=1).sqrt()
    return ProofLogits(words.cpu(), own.cpu(), scale.cpu())


def tolerance(trained: TrainedModel) -> float:
    """Return the largest difference that rounding explains in a model as it was written."""
    model = trained.model
    assert isinstance(model, TrajectoryLLM)
    return TOLERANCE[model.llm.dtype] * math.sqrt(model.llm.config.num_hidden_layers)


def compare(
    before: ProofLogits, without: ProofLogits, after: ProofLogits, *, allowed: float
) -> MergeProof:
    """Compare the logits of two models of equal shape, see ``MergeProof``.

    Args:
        before: of the trained model.
        without: of the trained model without its adapter.
        after: of the merged model.
        allowed: see ``tolerance``.
    """
    spread = before.words.std(dim=1, keepdim=True)
    words = [(logits.words - without.words) / spread for logits in (before, after)]
    scale = torch.where(before.scale == 0, 1.0, before.scale)  # a silent head has none
    own = [(logits.own - without.own) / scale for logits in (before, after)]
    return MergeProof(
        words=float((words[1] - words[0]).abs().amax()),
        own=float((own[1] - own[0]).abs().amax()),
        allowed=allowed,
        words_share=effect_share(*words, smallest=SMALLEST_EFFECT * allowed),
        own_share=effect_share(*own, smallest=SMALLEST_EFFECT * allowed),
    )


def effect_share(effect: Tensor, found: Tensor, *, smallest: float) -> float | None:
    """Return the share of an adapter's effect that another model has.

    The share is the factor of ``effect`` that comes nearest to ``found``; errors of rounding
    average out over all logits.

    Args:
        effect: logits with the adapter less those without.
        found: logits of the other model less those without.
        smallest: root mean square of an effect that is judged.

    Returns:
        The share; None of a smaller effect.
    """
    size = effect.square().mean()
    if size.sqrt() < smallest:
        return None
    return float((effect * found).mean() / size)
