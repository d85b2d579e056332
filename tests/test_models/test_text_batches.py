"""Prompts and reports as tokens: batches, long prompts, chat turns, states known ahead."""

import copy
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chat_templates import END, START, TEMPLATE, TEMPLATES
from language_models import (
    CPU,
    PREFIX,
    TINY_MODEL,
    classifier_and_writer,
    patients,
    plain_states,
)
from medgemma_clinical.data.texts import WHOLE_PROMPT
from medgemma_clinical.files import InputError
from medgemma_clinical.models import text_batches
from medgemma_clinical.models.language_model import DEMO_FOLDER
from medgemma_clinical.models.text_batches import TextCollator, chat_turns, other_patients
from medgemma_clinical.models.trajectory_llm import IGNORED
from trajectories import dataset_of

ROWS = [0, 3, 1, 2, 5]
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(DEMO_FOLDER)


@pytest.fixture(scope="module")
def parts():
    return classifier_and_writer()


def collator(dataset, tokenizer=TOKENIZER, options=WHOLE_PROMPT, **more):
    return TextCollator(dataset, tokenizer, options, **{"answers": False, **more})


def texts_of(batch):
    pairs = zip(batch["input_ids"], batch["text_mask"], strict=True)
    return [TOKENIZER.decode(ids[mask]) for ids, mask in pairs]


def test_batch__holds_prompt_words_before_the_verdict_and_report(parts):
    collate, batch = parts.collate, parts.collate(ROWS)
    dataset, asked = collate.dataset, collator(collate.dataset)(ROWS)
    verdicts = np.array([True, False, True, True, False])
    given = texts_of(collate.with_verdicts(ROWS, verdicts))
    for row, i in enumerate(ROWS):
        stem = f"{dataset.outcome}:"  # a space belongs to the word behind it
        question, report = dataset.prompt(i) + stem, dataset.report(i).removeprefix(stem)
        assert texts_of(batch)[row] == question + report + "<eos>"
        assert texts_of(asked)[row] == question
        assert given[row] == question + (" yes." if verdicts[row] else " no.")
        answer, place = batch["targets"][row] != IGNORED, int(batch["verdict"][row])
        assert TOKENIZER.decode(batch["targets"][row, answer]) == report + "<eos>"
        begun = len(TOKENIZER(dataset.prompt(i))["input_ids"]) + len(TOKENIZER(stem)["input_ids"])
        assert place + 1 == begun == int(answer.nonzero()[0])
        assert place == int(asked["verdict"][row]) == int(asked["text_mask"][row].sum()) - 1
        yes_or_no = parts.writer.verdict[0 if dataset.labels[i] == 1 else 1]
        assert batch["input_ids"][row, place + 1] == yes_or_no
    lengths = batch["text_mask"].sum(1)
    assert lengths.tolist() == collate.lengths()[ROWS].tolist()
    assert torch.equal(batch["text_mask"], torch.arange(int(lengths.max())) < lengths[:, None])
    assert set(batch["input_ids"][~batch["text_mask"]].tolist()) == {collate.pad}
    assert asked["targets"].unique().tolist() == [IGNORED]


def test_collator__special_tokens_written_in_a_context_stay_text():
    dataset = patients()
    dataset.contexts = np.array(["note <bos> copied <eos> from <pad> a page"] * len(dataset))
    collate = collator(dataset, answers=True)
    answers = [answer[:-1] for answer in collate.answer_ids]
    assert not {0, 1, 2} & {*chain(*collate.prompt_ids, *answers)}
    assert "<bos> copied" in texts_of(collate([0]))[0]


@pytest.mark.parametrize(
    ("no", "yes", "words"), [([7], [9], ([], [7], [9])), ([3, 7, 8], [3, 9], ([3], [7, 8], [9]))]
)
def test_verdict_words__begin_where_yes_and_no_differ(no, yes, words):
    assert text_batches.verdict_words(lambda *_, **__: {"input_ids": [no, yes]}) == words


def test_collator__a_long_prompt_loses_its_oldest_observations_and_nothing_else():
    series = [" -> ".join(f"{20 + k} ({k}h)" for k in range(n)) for n in (20, 3, 9, 1)]
    dataset, most = dataset_of(series, clinical_context=["old"] * 4), 50
    report, whole, cut = dataset.report(0), collator(dataset), collator(dataset, max_tokens=most)
    assert (whole.shortened, cut.shortened) == (0, 2)
    assert [len(prompt) > most for prompt in whole.prompt_ids] == [True, False, True, False]
    assert max(map(len, cut.prompt_ids)) <= most
    assert cut.prompt_ids[1] == whole.prompt_ids[1]
    head, tail = "old. Anion gap (mEq/L): ", ". Will care have to be escalated?\n"
    text, full = TOKENIZER.decode(cut.prompt_ids[0]), dataset.prompt(0)
    shown, all_of_it = (x.removeprefix(head).removesuffix(tail) for x in (text, full))
    assert text == head + shown + tail
    assert all_of_it.endswith(f" -> {shown}")
    one_more = all_of_it.removesuffix(f" -> {shown}").split(" -> ")[-1]
    longer = TOKENIZER(f"{head}{one_more} -> {shown}{tail}")["input_ids"]
    assert len(longer) > most  # no observation was left out needlessly
    assert dataset.report(0) == report
    with pytest.raises(InputError, match="--max_text_tokens"):
        collator(dataset, max_tokens=15)
    assert collator(dataset, max_tokens=15, refuse_long=False).too_long == [0, 1, 2, 3]


def chat_tokenizer(template, *tokens):
    """The tokenizer with a chat template and further tokens."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def test_collator__an_instruction_tuned_model_reads_a_users_turn():
    dataset, tokenizer = patients(), chat_tokenizer(TEMPLATE, START, END)
    end, collate = tokenizer.convert_tokens_to_ids(END), collator(dataset, tokenizer, answers=True)
    turns = [{"role": "user", "content": dataset.prompt(3)}]
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert [tokenizer.bos_token_id, *collate.prompt_ids[3]] == own
    assert (collate.eos, collate.answer_ids[3][-1]) == ([1, end], end)
    batch = collate([3])
    asked = tokenizer.decode(batch["input_ids"][0, : int(batch["verdict"][0]) + 1])
    assert asked == f"{tokenizer.decode(own[1:])}{dataset.outcome}:"
    cut = collator(dataset, tokenizer, max_tokens=60)
    assert cut.shortened > 0
    assert max(map(len, cut.prompt_ids)) <= 60  # the turns count too


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_turns__are_those_of_the_template_and_of_no_day(name):
    template, tokens, *turns, end = TEMPLATES[name]
    tokenizer = chat_tokenizer(template, *tokens)
    before, behind, ends = chat_turns(tokenizer)
    assert [tokenizer.decode(ids) for ids in (before, behind)] == turns
    assert ends == ([] if end is None else [tokenizer.convert_tokens_to_ids(end)])
    assert {*tokenizer.convert_tokens_to_ids(tokens)} >= {*before[:1], *ends}, "whole tokens"
    dataset = patients()
    collate = collator(dataset, tokenizer, answers=True)
    assert collate.answer_ids[3][-1] == (ends or [tokenizer.eos_token_id])[-1]
    if template:
        assert tokenizer.decode(collate.prompt_ids[3]) == dataset.prompt(3).strip().join(turns)


@pytest.mark.parametrize(
    "template", ["no turn", "{{ messages }}{{ messages }}", "{{ raise_exception('x') }}", "{{"]
)
def test_chat_turns__a_template_without_a_users_turn_is_refused_with_its_model(template, tmp_path):
    folder = shutil.copytree(TINY_MODEL, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="--model_name"):
        classifier_and_writer(folder)


def test_encode__a_frozen_encoder_is_run_once_and_its_states_equal_fresh_ones(monkeypatch):
    model, _, collate = classifier_and_writer(members=2)
    rows = [3, 12, 7]
    fresh = model.trajectory(collate(rows))
    monkeypatch.setattr(text_batches, "ENCODED_ROWS", 5)
    collate.encode(model.stage1, PREFIX, CPU)
    known = model.trajectory(collate(rows))
    assert torch.equal(known.mask, fresh.mask)
    torch.testing.assert_close(known.states[known.mask], fresh.states[fresh.mask])
    torch.testing.assert_close(known.outputs[:, 0], model.stage1(collate(rows)).logit)
    monkeypatch.setattr(model.stage1, "read", None)
    model(collate(rows)).loss.backward()


@pytest.mark.parametrize("tokens", [PREFIX, 64])
def test_soft_tokens__are_those_that_reach_the_decoder(parts, tokens):
    stage1, batch = parts.classifier.stage1, parts.collate(range(24))
    mask = text_batches.latest_states(stage1, batch, tokens).mask
    by_hand = np.minimum([len(plain_states(stage1, batch, row)) for row in range(24)], tokens)
    counted = text_batches.soft_tokens(parts.collate.dataset, tokens)
    assert counted.tolist() == mask.sum(1).tolist() == by_hand.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_other_patients__permutes_each_part_and_never_takes_the_same_patient(seed):
    rng = np.random.default_rng(seed)
    patient, part = rng.integers(0, 30, 120), rng.integers(0, 3, 30)
    groups = patient.astype(str)
    split = {name: np.flatnonzero(part[patient] == k) for k, name in enumerate("abc")}
    split["a"] = rng.permutation(split["a"])[2:]  # two rows lie in no part
    donors = other_patients(split, groups, seed)
    for rows in split.values():
        assert sorted(donors[rows]) == sorted(rows)
        assert (groups[donors[rows]] != groups[rows]).all()
    assert (donors == other_patients(split, groups, seed)).all()
    assert (donors != other_patients(split, groups, seed + 1)).any()


def test_other_patients__any_other_patient_may_be_drawn_and_too_few_are_refused():
    groups, split = np.array(list("aabcde")), {"train": np.arange(6)}
    draws = [other_patients(split, groups, seed) for seed in range(200)]
    for row in range(6):
        assert {draw[row] for draw in draws} == {*np.flatnonzero(groups != groups[row])}
    with pytest.raises(InputError, match="--soft_prompt"):
        other_patients({"val": np.arange(5)}, np.array(list("aaabc")), 0)


def test_batch__a_row_with_a_donor_reads_its_states_and_all_else_of_its_own():
    model, _, collate = classifier_and_writer(members=2)
    collate.encode(model.stage1, PREFIX, CPU)
    rows, everyone = [5, 3, 0, 8], collate(range(16))
    own = collate(rows)
    collate.donors = np.random.default_rng(0).permutation(16)
    batch, donors = collate(rows), collate.donors[rows]
    assert not torch.equal(own["states_mask"], batch["states_mask"])  # of other lengths
    for name, found in batch.items():
        borrowed = name in ("states", "states_mask")
        assert torch.equal(found, everyone[name][donors] if borrowed else own[name]), name
