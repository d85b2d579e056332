"""A language encoder that is not trained: it reads each text once, and states are kept by content.

Letters: N texts, D width of the encoder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import compute_batches, default_device, show_progress
from medgemma_clinical.files import InputError, atomic, json_hash, owner_only
from medgemma_clinical.models import language_model

logger = logging.getLogger(__name__)

CACHE = "text_states.safetensors"
"""File of states by the hash of their text; it holds no text."""

MAX_WINDOW = 512
"""Tokens that are read at once; longer texts are read in windows of which a quarter overlaps."""

BATCH_TOKENS = 8_192
"""Tokens of a batch, padding included."""

States = NDArray[np.float32]


class Window(NamedTuple):
    """Some tokens of a text that are read at once."""

    text: int  # its position
    begin: int  # of its first token in the text
    ids: list[int]


class TextEncoder:
    """An encoder, or the decoder of a language model, whose last hidden states are read."""

    def __init__(self, name: str, revision: str | None, device: torch.device) -> None:
        """Load the model ``name`` of the hub, or of a folder."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer  # they take seconds

        folder = language_model.find_model(name, revision, "--text_model")
        with language_model.loading(f"--text_model {name}"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            config = config.get_text_config()
            if config.is_encoder_decoder:
                raise ValueError("an encoder with a decoder: give one of both alone")
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = language_model.load_weights(AutoModel, folder, config, "", dtype=dtype)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        mark = tokenizer("a", add_special_tokens=False)["input_ids"]
        around = tokenizer("a")["input_ids"]
        start = next(k for k in range(len(around)) if around[k : k + len(mark)] == mark)
        self.before, self.behind = around[:start], around[start + len(mark) :]
        limits = [
            tokenizer.model_max_length,
            getattr(config, "max_position_embeddings", MAX_WINDOW),
        ]
        self.window = min(MAX_WINDOW, *limits) - len(self.before) - len(self.behind)

    def windows(self, texts: Sequence[str]) -> list[Window]:
        """Return the windows of all texts; an empty text has none."""
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        step = self.window - self.window // 4
        windows = []
        for k, text in enumerate(ids):
            last = max(len(text) - self.window, 0)
            begins = [*range(0, last, step), last]
            windows += [Window(k, b, text[b : b + self.window]) for b in begins if text]
        return windows

    def words(self, window: Window, count: int) -> str:
        """Return the first words of a window, by which a reader finds it."""
        first = self.tokenizer.decode(window.ids).split()[:count]
        return f'from token {window.begin}: "{" ".join(first)} ..."'

    @torch.no_grad()
    def means(self, windows: Sequence[Window]) -> States:
        """Return the mean last hidden state (windows, D) of the tokens of each window."""
        sizes = np.array([len(window.ids) for window in windows])
        order = np.argsort(-sizes, kind="stable")
        rows = max(1, BATCH_TOKENS // int(sizes.max(initial=1)))
        batches = [order[k : k + rows].tolist() for k in range(0, len(order), rows)]
        bar = show_progress((), "reading texts", len(windows))
        means: States | None = None
        for batch, part in compute_batches(batches, lambda b: self._read([windows[k] for k in b])):
            if means is None:
                means = np.empty((len(windows), part.shape[1]), np.float32)
            means[batch] = part
            bar.update(len(batch))
        bar.close()
        assert means is not None
        return means

    def _read(self, windows: Sequence[Window]) -> States:
        longest = max(len(window.ids) for window in windows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(windows), len(self.before) + longest + len(self.behind)), pad)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(windows):
            whole = [*self.before, *window.ids, *self.behind]
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
        device = next(self.model.parameters()).device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        states = output.last_hidden_state[:, len(self.before) :].float()  # (B, T, D)
        sizes = torch.tensor([len(window.ids) for window in windows], device=device)
        of_text = torch.arange(states.shape[1], device=device) < sizes[:, None]
        means = (states * of_text[..., None]).sum(dim=1) / sizes[:, None]
        result: States = means.numpy(force=True)
        return result

    def read(self, texts: Sequence[str]) -> States:
        """Return the mean last hidden state (N, D) of each text, NaN of an empty one."""
        windows = self.windows(texts)
        if not windows:
            return np.full((len(texts), self.model.config.hidden_size), np.nan, np.float32)
        means = self.means(windows)
        sums = np.zeros((len(texts), means.shape[1]))
        tokens = np.zeros(len(texts))
        for window, mean in zip(windows, means, strict=True):
            sums[window.text] += len(window.ids) * mean
            tokens[window.text] += len(window.ids)
        with np.errstate(invalid="ignore"):
            states: States = (sums / tokens[:, None]).astype(np.float32)
        return states


@lru_cache(maxsize=1)
def load_encoder(name: str, revision: str | None, device: torch.device) -> TextEncoder:
    """Return an encoder; the last one stays loaded."""
    return TextEncoder(name, revision, device)


def encoder_record(name: str) -> dict[str, str | None]:
    """Return a checkpoint's record of an encoder: name, hash of a folder, hub's commit."""
    return language_model.base_record(name, "--text_model")


def with_states(
    dataset: TrajectoryDataset,
    name: str,
    record: dict[str, str | None],
    cache: Path | None = None,
) -> TrajectoryDataset:
    """Return a data set whose contexts an encoder has read, those in the cache without it."""
    if dataset.text_encoder == record:
        return dataset
    view = copy.copy(dataset)
    hashes = np.array([text_hash(text) for text in dataset.contexts], object)
    states = read_cache(cache, record)
    texts = dict(zip(hashes, dataset.contexts, strict=True))
    new = {key: text for key, text in texts.items() if key not in states}
    if new:
        encoder = load_encoder(name, record["base_revision"], default_device())
        states |= dict(zip(new, encoder.read([*new.values()]), strict=True))
        write_cache(cache, record, states)
    view.text_states = np.stack([states[key] for key in hashes])
    view.text_encoder = record
    return view


def without_states(dataset: TrajectoryDataset) -> TrajectoryDataset:
    """Return a data set whose contexts no encoder has read."""
    if not dataset.text_encoder:
        return dataset
    view = copy.copy(dataset)
    view.text_states, view.text_encoder = None, {}
    return view


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# ------------------------------------------------------------------ the cache


def read_cache(path: Path | None, record: dict[str, str | None]) -> dict[str, States]:
    """Return the states (D,) by the hash of their text; none by another encoder."""
    if path is None or not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as file:
            about = file.metadata()
            states, hashes = file.get_tensor("states"), json.loads(about["texts"])
        if about["sha256"] != states_hash(states, hashes):
            raise ValueError("another content")
        known = dict(zip(hashes, states, strict=True))
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or altered: delete it, it is made again") from error
    return known if about["encoder"] == json_hash(record) else {}


def write_cache(
    path: Path | None, record: dict[str, str | None], states: dict[str, States]
) -> None:
    """Write the states of texts for the owner alone."""
    if path is None:
        return
    hashes, table = [*states], np.stack([*states.values()])
    about = {
        "texts": json.dumps(hashes),
        "sha256": states_hash(table, hashes),
        "encoder": json_hash(record),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with owner_only(), atomic(path) as temporary:
        save_file({"states": table}, temporary, about)


def states_hash(states: States, hashes: Sequence[str]) -> str:
    """Return the hash of states and of the texts that they are of."""
    digest = hashlib.sha256(np.ascontiguousarray(states).tobytes())
    digest.update(json.dumps([*hashes]).encode())
    return digest.hexdigest()
