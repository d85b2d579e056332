"""What the rest of the program sees of an encoder, and how a batch reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from medgemma_clinical.files import InputError
from medgemma_clinical.models.encoder_plan import Plan

if TYPE_CHECKING:
    from medgemma_clinical.data.ragged import Batch
    from medgemma_clinical.data.trajectories import TrajectoryDataset


@runtime_checkable
class Encoder(Protocol):
    """A module that turns irregular series into one state per observation.

    An encoder is an ``nn.Module``. Its class takes ``(n_features, *, time_scale, solver,
    dynamics)`` and, to be rebuilt, its own ``config`` as keywords; ``name`` is its key among the
    registered encoders.
    Letters: B patients, L observations of the longest, F features, H state.
    """

    name: ClassVar[str]
    hidden_dim: int

    @property
    def longest_gap_hours(self) -> float:
        """The longest gap between two observations that the encoder accepts, in hours."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The keywords that rebuild the encoder before its weights are loaded; plain types."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze the weights, or let them learn; as of every ``nn.Module``."""
        ...

    def fit_normalizer(self, values: Tensor, observed: Tensor) -> None:
        """Fit the scale of each feature to the training split, (..., F) each."""
        ...

    def __call__(self, times: Tensor, values: Tensor, observed: Tensor, until: Tensor) -> Tensor:
        """Return the states (B, L + 1, H) of a padded batch, zero in padding rows.

        The last column is the state at the hours ``until`` (B,), not before the last observation.
        """
        ...


@runtime_checkable
class PlannedEncoder(Encoder, Protocol):
    """An encoder that prepares a batch on the host before its pass."""

    def plan(self, times: Tensor, values: Tensor, observed: Tensor, until: Tensor) -> Plan:
        """Return everything that ``run`` needs of a batch."""
        ...

    def run(self, plan: Plan) -> Tensor:
        """Return the states (B, L + 1, H) of a planned batch."""
        ...


def collate_with_plan(
    dataset: TrajectoryDataset, encoder: Encoder
) -> Callable[[Sequence[int]], Batch]:
    """Return a collate function whose batches bring the plan along of an encoder that plans."""
    if not isinstance(encoder, PlannedEncoder):
        return dataset.collate

    def collate(indices: Sequence[int]) -> Batch:
        batch = dataset.collate(indices)
        batch["plan"] = encoder.plan(*series_of(batch))
        return batch

    return collate


def series_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what an encoder reads of a batch."""
    return batch["times"], batch["values"], batch["observed"], batch["prediction_hours"]


def encode(encoder: Encoder, batch: Batch) -> Tensor:
    """Return the states (B, L + 1, H) of a batch, by its plan where it brings one along."""
    if "plan" in batch and isinstance(encoder, PlannedEncoder):
        return encoder.run(batch["plan"])
    return encoder(*series_of(batch))


def check_gaps(encoder: Encoder, dataset: TrajectoryDataset) -> None:
    """Raise an ``InputError`` where an encoder does not accept the longest gap of a data set."""
    longest = dataset.longest_gap()
    if longest > encoder.longest_gap_hours:
        raise InputError(f"a gap of {longest:g} h in the data needs a larger --time_scale")
