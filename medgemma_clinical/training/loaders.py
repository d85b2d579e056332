"""Batches of rows of about equal length, the same after every restart, shared over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medgemma_clinical.distributed import processes
from medgemma_clinical.files import InputError

BUCKET = 25
"""Batches whose rows are sorted by length together: less padding, and still a random order."""


class LengthBatches:
    """Positions in batches, the rows of a batch of about equal length where lengths are given."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        batch_size: int,
        lengths: NDArray[np.int64] | None = None,
        *,
        shuffle: bool,
        share: tuple[int, int] = (0, 1),  # number of this process, and of all
    ) -> None:
        """Keep rows (n,), their lengths by position (N,), and this process's share."""
        self.rows, self.batch_size, self.lengths = rows, batch_size, lengths
        self.shuffle = shuffle
        self.process, self.n_processes = share
        self.set_epoch(0, 0)
        if shuffle and len(rows) < self.n_processes:
            raise InputError(
                f"{len(rows)} rows train, too few for {self.n_processes} processes: start fewer"
            )

    def set_epoch(self, seed: int, epoch: int, done: int = 0) -> None:
        """Choose the order of the next pass; ``done`` batches at its start are left out."""
        self.seed, self.epoch, self.done = seed, epoch, done

    def __len__(self) -> int:
        """Return the number of batches of this process in a whole pass."""
        n_full, remainder = divmod(len(self.rows), self.batch_size)
        if self.shuffle:  # a rest that cannot be shared out joins another batch
            return max(1, n_full + (remainder >= self.n_processes))
        return len(range(self.process, n_full + (remainder > 0), self.n_processes))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batches of positions."""
        if not self.shuffle:  # sorted throughout: no result depends on the order
            yield from self._cut(self.rows)[self.process :: self.n_processes]
            return
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch]))
        rows = generator.permutation(self.rows)
        n_full = len(rows) // self.batch_size
        rows, remainder = np.split(rows, [n_full * self.batch_size])  # of any length
        run = self.batch_size * max(1, min(BUCKET, n_full // 4))  # a quarter of the rows at most
        batches = [b for k in range(0, len(rows), run) for b in self._cut(rows[k : k + run])]
        batches += self._cut(remainder)
        if self.lengths is not None:
            batches = [batches[k] for k in generator.permutation(len(batches))]
        if len(batches) > len(self):
            shortest = min(range(len(batches)), key=lambda k: len(batches[k]))
            batches[shortest - 1] += batches.pop(shortest)
        for batch in batches[self.done :]:
            yield batch[self.process :: self.n_processes]

    def _cut(self, rows: NDArray[np.int64]) -> list[list[int]]:
        """Sort rows by length, where lengths are given, and cut them into batches."""
        if self.lengths is not None:
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        return cut_rows(rows, self.batch_size)


def cut_rows(
    rows: Sequence[int] | NDArray[np.int64],
    size: int,
    lengths: NDArray[np.int64] | None = None,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """Cut rows into pieces of ``size`` rows and ``max_tokens`` at most; one row may be longer."""
    pieces = [np.asarray(rows[k : k + size]) for k in range(0, len(rows), size)]
    if lengths is not None and max_tokens is not None:
        row_limits = [max(1, max_tokens // lengths[piece].max()) for piece in pieces]
        pieces = [
            part
            for piece, number in zip(pieces, row_limits, strict=True)
            for part in np.array_split(piece, -(-len(piece) // number))
        ]
    return [piece.tolist() for piece in pieces]


def part_batches(
    split: dict[str, NDArray[np.int64]],
    batch_size: int,
    accumulate: int = 1,
    lengths: NDArray[np.int64] | None = None,
) -> dict[str, LengthBatches]:
    """Return the batches of each part: of "train" the rows of a step, of others those of a pass."""
    share = processes().process_index, processes().num_processes
    sizes = dict.fromkeys(split, 2 * batch_size)  # a pass without gradients takes more rows
    sizes["train"] = batch_size * accumulate * share[1]
    return {
        part: LengthBatches(rows, sizes[part], lengths, shuffle=part == "train", share=share)
        for part, rows in split.items()
    }
