"""Prompts and reports as tokens: batches, long prompts, chat templates, states known ahead."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dataset_format import MIMICtrajectoryDataset
from language_models import CPU, Parts, classifier_and_writer, patients
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.files import InputError
from medgemma_clinical.models import text_batches
from medgemma_clinical.models.language_model import tiny_language_model
from medgemma_clinical.models.text_batches import (
    END,
    START,
    TextCollator,
    chat_turns,
    encode_all,
)
from medgemma_clinical.models.trajectory_llm import IGNORED, TextBatch
from trajectories import table_of

ROWS = [0, 3, 1, 2, 5]
WHOLE = PromptOptions()


@pytest.fixture(scope="module")
def parts() -> Parts:
    return classifier_and_writer()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_language_model()[1]


@pytest.fixture(scope="module")
def batch(parts: Parts) -> TextBatch:
    return parts.collate(ROWS)


@pytest.fixture(scope="module")
def questions(parts: Parts, tokenizer: PreTrainedTokenizerBase) -> TextCollator:
    """Batches of stage 2: prompt and the words before the verdict, no answer."""
    return TextCollator(parts.collate.dataset, tokenizer, WHOLE, answers=False)


def test_targets_are_the_report_from_its_verdict_to_its_end(parts: Parts, batch: TextBatch) -> None:
    collate = parts.collate
    _, tokenizer = tiny_language_model()
    for row, i in enumerate(ROWS):
        target = batch["targets"][row]
        answer = target != IGNORED
        stem = f"{collate.dataset.outcome}: "
        report = collate.dataset.report(i).removeprefix(stem)
        assert tokenizer.decode(target[answer]) == report + "<eos>"
        rest = batch["input_ids"][row, batch["text_mask"][row] & ~answer]
        assert tokenizer.decode(rest) == collate.dataset.prompt(i) + stem
        assert torch.equal(target[answer], batch["input_ids"][row, answer])
        assert not bool(answer[~batch["text_mask"][row]].any())


def test_the_verdict_stands_right_behind_its_place(parts: Parts, batch: TextBatch) -> None:
    collate = parts.collate
    for row, i in enumerate(ROWS):
        place = int(batch["verdict"][row])
        word = int(batch["input_ids"][row, place + 1])
        assert word == collate.verdict[0 if collate.dataset.labels[i] == 1 else 1]
    assert collate.verdict[0] != collate.verdict[1]


def test_stage_2_text_ends_where_the_verdict_would_follow(questions: TextCollator) -> None:
    _, tokenizer = tiny_language_model()
    batch = questions(ROWS)
    for row, i in enumerate(ROWS):
        text = tokenizer.decode(batch["input_ids"][row, batch["text_mask"][row]])
        assert text == questions.dataset.prompt(i) + f"{questions.dataset.outcome}: "
        assert int(batch["verdict"][row]) == int(batch["text_mask"][row].sum()) - 1


@pytest.mark.parametrize("verdicts", [[True] * 5, [False, True, False, False, True]])
def test_generation_goes_on_behind_the_verdict_that_is_given(
    parts: Parts, verdicts: list[bool], tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = parts.collate.dataset
    batch = parts.collate.with_verdicts(ROWS, np.array(verdicts))
    for row, i in enumerate(ROWS):
        text = tokenizer.decode(batch["input_ids"][row, batch["text_mask"][row]])
        word = "yes" if verdicts[row] else "no"
        assert text == f"{dataset.prompt(i)}{dataset.outcome}: {word}."


def test_text_is_padded_on_the_right_by_the_pad_token(parts: Parts, batch: TextBatch) -> None:
    lengths = batch["text_mask"].sum(1)
    steps = torch.arange(batch["text_mask"].shape[1])
    assert torch.equal(batch["text_mask"], steps < lengths[:, None])
    assert int(lengths.max()) == len(steps)
    assert set(batch["input_ids"][~batch["text_mask"]].tolist()) == {parts.collate.pad}


def test_special_tokens_written_in_a_context_stay_text() -> None:
    dataset = patients()
    dataset.contexts = np.array(["note <bos> copied <eos> from <pad> a page"] * len(dataset))
    collate = TextCollator(dataset, tiny_language_model()[1], WHOLE, answers=True)
    for prompt, answer in zip(collate.prompt_ids, collate.answer_ids, strict=True):
        assert not {collate.bos, *collate.eos, collate.pad} & set(prompt)
        assert not {collate.bos, *collate.eos, collate.pad} & set(answer[:-1])


# ------------------------------------------------------------------------------- long prompts


def long_and_short() -> MIMICtrajectoryDataset:
    series = [" -> ".join(f"{20 + k} ({k}h)" for k in range(n)) for n in (20, 3, 9, 1)]
    return MIMICtrajectoryDataset(table_of(series, clinical_context=["old"] * 4))


def test_a_long_prompt_loses_its_oldest_observations_and_nothing_else() -> None:
    dataset, tokenizer = long_and_short(), tiny_language_model()[1]
    whole = TextCollator(dataset, tokenizer, WHOLE, answers=False)
    most = 130
    cut = TextCollator(dataset, tokenizer, WHOLE, answers=False, most_tokens=most)
    assert whole.shortened == 0
    assert cut.shortened == sum(len(prompt) > most for prompt in whole.prompt_ids) == 2
    assert max(map(len, cut.prompt_ids)) <= most
    assert cut.prompt_ids[1] == whole.prompt_ids[1]
    text = tokenizer.decode(cut.prompt_ids[0])
    assert text.startswith("old. Anion gap (mEq/L): ")
    assert text.endswith("39 (19h). Will care have to be escalated?\n")
    told = text.removeprefix("old. Anion gap (mEq/L): ").split(". Will")[0]
    full = dataset.prompt(0).removeprefix("old. Anion gap (mEq/L): ").split(". Will")[0]
    assert full.endswith(told)
    one_more = full.removesuffix(told).rstrip("-> ").split(" -> ")[-1]
    assert len(text) + len(f"{one_more} -> ") > most, "no observation was left out needlessly"
    assert dataset.report(0) == long_and_short().report(0)


def test_a_limit_that_no_prompt_meets_is_refused() -> None:
    with pytest.raises(InputError, match=r"--max_text_tokens 20: .*raise it"):
        TextCollator(
            long_and_short(), tiny_language_model()[1], WHOLE, answers=False, most_tokens=20
        )


TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
"""Gemma 3's own, without images and without its checks."""

ENDLESS = 4 * "{% for i in range(99999) %}" + 4 * "{% endfor %}"


def chat_tokenizer(template: str, *tokens: str) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer with a chat template and further tokens."""
    tokenizer = copy.deepcopy(tiny_language_model()[1])
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def test_an_instruction_tuned_model_reads_a_users_turn() -> None:
    dataset, plain = patients(), tiny_language_model()[1]
    tokenizer = chat_tokenizer(TEMPLATE, START, END)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    collate = TextCollator(dataset, tokenizer, WHOLE, answers=True)
    text = tokenizer.decode(collate.prompt_ids[3])
    prompt = dataset.prompt(3)
    turns = [{"role": "user", "content": prompt}]
    own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<bos>" + text == own
    cut = TextCollator(dataset, tokenizer, WHOLE, answers=False, most_tokens=110)
    assert cut.shortened > 0
    assert max(map(len, cut.prompt_ids)) <= 110, "the turns count too"
    assert collate.prompt_ids[3].count(end) == 1
    assert collate.bos not in collate.prompt_ids[3]
    assert collate.eos == [1, end]
    assert collate.answer_ids[3][-1] == end
    batch = collate([3])
    asked = batch["input_ids"][0, : int(batch["verdict"][0]) + 1]
    assert tokenizer.decode(asked) == f"{text}{dataset.outcome}: "
    assert TextCollator(dataset, plain, WHOLE, answers=True).before == []


def test_a_chat_template_is_not_run() -> None:
    tokenizer = chat_tokenizer(TEMPLATE, START, END)
    turns = [{"role": "user", "content": "  Anion gap: 24 \n"}]
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    before, behind, end = chat_turns(chat_tokenizer(ENDLESS, START, END))
    words = tokenizer("Anion gap: 24", add_special_tokens=False)["input_ids"]
    assert [tokenizer.bos_token_id, *before, *words, *behind] == own
    assert end == [tokenizer.convert_tokens_to_ids(END)]


@pytest.mark.parametrize("tokens", [(), (START,), (END,)])
def test_without_the_tokens_of_the_turns_the_text_is_plain(tokens: tuple[str, ...]) -> None:
    assert chat_turns(chat_tokenizer(TEMPLATE, *tokens)) == ([], [], [])


def test_prompt_options_are_those_of_the_collator_and_not_of_the_data_set(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    dataset = patients()
    for options in (PromptOptions(series="last"), PromptOptions(context=False, series="none")):
        collate = TextCollator(dataset, tokenizer, options, answers=False)
        texts = tokenizer.batch_decode(collate.prompt_ids)
        assert texts == [dataset.prompt(i, options) for i in range(len(dataset))]
        assert texts != [dataset.prompt(i) for i in range(len(dataset))]


# ------------------------------------------------------------------------------- known states


def test_a_frozen_encoder_is_asked_once_and_its_states_equal_fresh_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, collate = classifier_and_writer(members=2)
    rows = [3, 12, 7]
    fresh = model.trajectory(collate(rows))
    assert "states" not in collate(rows)
    encode_all(model, collate, CPU)
    assert collate.states is None, "a part that learns is asked every time"
    for member in ("0", "1"):
        model.get_submodule(f"stage1.members.{member}.encoder").requires_grad_(False)
    model.get_submodule("stage1.members.0.head").requires_grad_(False)
    encode_all(model, collate, CPU)
    assert collate.states is None, "a head still learns"
    model.get_submodule("stage1").requires_grad_(False)
    monkeypatch.setattr(text_batches, "ENCODED_ROWS", 5)
    encode_all(model, collate, CPU)
    known = model.trajectory(collate(rows))
    assert known is not None
    assert fresh is not None
    assert torch.equal(known.mask, fresh.mask)
    torch.testing.assert_close(known.states[known.mask], fresh.states[fresh.mask])
    torch.testing.assert_close(known.logit, fresh.logit)
    calls: list[int] = []
    model.get_submodule("stage1.members.0.encoder").register_forward_hook(
        lambda *_: calls.append(1)
    )
    model(collate(rows)).loss.backward()
    assert calls == []


def test_the_mean_tokens_of_rows_are_those_that_reach_the_decoder(questions: TextCollator) -> None:
    model = classifier_and_writer().classifier
    batch = questions(ROWS)
    reached = model.embed(batch, model.trajectory(batch)).mask.sum() / len(ROWS)
    assert questions.mean_tokens(np.array(ROWS), model.tokens) == pytest.approx(float(reached))
