"""Prompts and reports as tokens, in padded batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from medgemma_clinical.data.split import Split
from medgemma_clinical.data.trajectories import PromptOptions, TrajectoryDataset
from medgemma_clinical.distributed import few_threads
from medgemma_clinical.files import InputError
from medgemma_clinical.models.trajectory import Stage1
from medgemma_clinical.models.trajectory_llm import (
    IGNORED,
    TextBatch,
    TrajectoryStates,
    latest_states,
)

if TYPE_CHECKING:  # see ``language_model``
    from transformers import PreTrainedTokenizerBase

MARK = "@prompt@"
"""What stands for a user's or a model's words while a chat template is read."""

FIXED_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Put before a chat template: no prompt depends on the day on which it is made.

Source: Llama 3.2's template names this day where it knows none."""

SPARE_TOKENS = 16
"""Tokens that a written report may have beyond the longest one of the data."""

ENCODED_ROWS = 512
"""Rows that a frozen encoder reads at a time."""


class TextCollator:
    """Make batches with text: every prompt and report is tokenised once, then padded by batch."""

    def __init__(
        self,
        dataset: TrajectoryDataset,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptOptions,
        *,
        answers: bool,
        max_tokens: int | None = None,
        refuse_long: bool = True,
    ) -> None:
        """Tokenise prompts and, if ``answers``, reports of labelled rows.

        A prompt above ``max_tokens`` loses its oldest observations, then is refused or noted.
        """
        self.dataset = dataset
        self.options = prompts
        self.states: TrajectoryStates | None = None  # of all N rows; see ``encode``
        self.donors: NDArray[np.int64] | None = None  # (N,) whose soft tokens are read
        self.shortened = 0  # prompts that lost their oldest observations
        self.too_long: list[int] = []  # rows whose prompt is longer all the same
        self.tokenizer = tokenizer
        self.pad = int(tokenizer.pad_token_id)
        self.before, self.behind, turn_end = chat_turns(tokenizer)  # turns around a prompt
        self.eos = [int(tokenizer.eos_token_id), *turn_end]  # ends of an answer
        # Tokenised apart: the verdict lies on the same token boundary whatever surrounds it.
        shared, no, yes = verdict_words(tokenizer)
        self.stem = self._ids([f"{dataset.outcome}:"])[0] + shared  # words before the verdict
        stop = self._ids(["."])[0]
        self.words = no + stop, yes + stop  # ids of "no." and "yes."
        self.prompt_ids = self._read_prompts(max_tokens)
        if self.too_long and refuse_long:
            needed = max(len(self.prompt_ids[i]) for i in self.too_long)
            raise InputError(
                f"--max_text_tokens {max_tokens}: prompts of {dataset.source} need {needed} "
                "tokens with one observation a series: raise it, or shorten the prompts by "
                "--series_text or --text_context"
            )
        self.answer_ids = self._read_answers() if answers else [[] for _ in self.prompt_ids]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A context that spells "<bos>" stays text.
        plain = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return list(plain["input_ids"])

    def _read_prompts(self, max_tokens: int | None) -> list[list[int]]:
        turns = len(self.before) + len(self.behind)
        prompts = self._ids([self._prompt(i, self.options) for i in range(len(self.dataset))])
        room = math.inf if max_tokens is None else max_tokens - turns
        for i, prompt in enumerate(prompts):
            latest = max(len(times) for _, times, _ in self.dataset.measured(i))
            self.shortened += len(prompt) > room
            while len(prompt) > room and latest > 1:
                latest = max(min(latest - 1, math.ceil(latest * room / len(prompt))), 1)
                prompt = self._ids([self._prompt(i, replace(self.options, latest=latest))])[0]
            if len(prompt) > room:
                self.too_long.append(i)
            prompts[i] = self.before + prompt + self.behind
        return prompts

    def _prompt(self, i: int, options: PromptOptions) -> str:
        prompt = self.dataset.prompt(i, options)
        return prompt.strip() if self.before else prompt  # as most templates do

    def _read_answers(self) -> list[list[int]]:
        labels = self.dataset.labels.astype(int).tolist()
        heads = [f"{self.dataset.outcome}: {('no', 'yes')[label]}." for label in labels]
        endings = [self.dataset.report(i).removeprefix(head) for i, head in enumerate(heads)]
        pairs = zip(labels, self._ids(endings), strict=True)
        return [self.words[label] + ids + [self.eos[-1]] for label, ids in pairs]

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each row's text, (N,)."""
        pairs = zip(self.prompt_ids, self.answer_ids, strict=True)
        return np.array([len(prompt) + len(self.stem) + len(answer) for prompt, answer in pairs])

    @few_threads()
    @torch.no_grad()
    def encode(self, stage1: Stage1, tokens: int, device: torch.device) -> None:
        """Encode every row once by a frozen stage 1; batches then bring the states along."""
        stage1.to(device).eval()
        parts = []
        for start in range(0, len(self.dataset), ENCODED_ROWS):
            rows = range(start, min(start + ENCODED_ROWS, len(self.dataset)))
            batch = stage1.plan(self.dataset.collate(rows))
            parts.append(latest_states(stage1, send_to_device(batch, device), tokens))
        columns = zip(*parts, strict=True)
        self.states = TrajectoryStates(*(torch.cat(tensors).cpu() for tensors in columns))

    def report_tokens(self) -> int:
        """Return the tokens that a written report may have: some more than the longest answer."""
        return max(map(len, self.answer_ids)) + SPARE_TOKENS

    def __call__(self, indices: Sequence[int]) -> TextBatch:
        """Return the batch of B positions: prompt, words before the verdict, answer if known."""
        return self._batch(indices, [self.answer_ids[i] for i in indices])

    def with_verdicts(self, indices: Sequence[int], verdicts: Sequence[bool]) -> TextBatch:
        """Return the batch of B positions that generation continues behind as many verdicts."""
        return self._batch(indices, [self.words[int(verdict)] for verdict in verdicts])

    def _batch(self, indices: Sequence[int], answers: list[list[int]]) -> TextBatch:
        texts = [self.prompt_ids[i] + self.stem for i in indices]
        rows = [torch.tensor(text + answer) for text, answer in zip(texts, answers, strict=True)]
        starts = torch.tensor([len(text) for text in texts])
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
        position = torch.arange(input_ids.shape[1])
        text_mask = position < torch.tensor([len(row) for row in rows])[:, None]
        answer = (position >= starts[:, None]) & text_mask
        batch = TextBatch(
            **self.dataset.collate(indices),
            input_ids=input_ids,
            text_mask=text_mask,
            targets=torch.where(answer, input_ids, IGNORED),
            verdict=starts - 1,
        )
        if self.states is not None:
            index = batch["index"]
            source = index if self.donors is None else torch.from_numpy(self.donors)[index]
            batch["states"] = self.states.states[source]
            batch["states_mask"] = self.states.mask[source]
            batch["stage1_outputs"] = self.states.outputs[index]
        return batch


def soft_tokens(dataset: TrajectoryDataset, max_tokens: int) -> NDArray[np.int64]:
    """Return the soft tokens of each row, (N,), at most ``max_tokens``; see ``latest_states``."""
    later = dataset.prediction_times() > dataset.times[dataset.offsets[1:] - 1]
    return np.minimum(dataset.lengths + later, max_tokens)


def verdict_words(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Return the ids that " no" and " yes" begin with, and the rest of each."""
    no, yes = tokenizer([" no", " yes"], add_special_tokens=False)["input_ids"]
    shared = next(k for k, (a, b) in enumerate(zip(no, yes, strict=False)) if a != b)
    return no[:shared], no[shared:], yes[shared:]


def chat_turns(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Return the ids around a user's words and at an answer's end; none for a model of plain text.

    They are those of the tokenizer's template, without the first token of every input.
    """
    if not tokenizer.chat_template:
        return [], [], []
    chat = [{"role": role, "content": MARK} for role in ("user", "assistant")]
    template = FIXED_DAY + tokenizer.get_chat_template()
    options: dict[str, Any] = {"tokenize": False, "enable_thinking": False}  # the answer is short
    render = partial(tokenizer.apply_chat_template, chat_template=template, **options)
    before, mark, behind = render(chat[:1], add_generation_prompt=True).partition(MARK)
    if not mark or MARK in behind:
        raise ValueError("its chat template does not show a user's words once")
    before = before.removeprefix(tokenizer.bos_token or "")
    end = render(chat).rpartition(MARK)[2].strip()
    ids = tokenizer([before, behind, end], add_special_tokens=False)["input_ids"]
    return ids[0], ids[1], [i for i in ids[2][:1] if i != tokenizer.eos_token_id]


def other_patients(split: Split, groups: NDArray[np.str_], seed: int) -> NDArray[np.int64]:
    """Draw a permutation of each part, (N,), in which no row gets a row of its own patient."""
    generator, donors = np.random.default_rng(seed), np.arange(len(groups))
    for part, rows in split.items():
        _, patient, count = np.unique(groups[rows], return_inverse=True, return_counts=True)
        order = rows[np.argsort(generator.permutation(len(count))[patient], kind="stable")]
        shift = count.max(initial=0)  # a patient's rows stand side by side
        if 2 * shift > len(rows):
            raise InputError(f"--soft_prompt shuffled: too few patients in the part {part}")
        donors[order] = np.roll(order, shift)
    return donors
