"""Reports that the language model writes behind the verdict of the decision rule."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SAMPLE
from dataset_format import Description, MIMICtrajectoryDataset
from language_models import (
    Parts,
    classifier_and_writer,
    disturb_adapter,
    patients,
    plain_sequence,
)
from medgemma_clinical.data.reports.review import ReportReview
from medgemma_clinical.data.reports.score import ReportScore
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.files import RunFault
from medgemma_clinical.models.generation import (
    report_figures,
    report_tokens,
    score_reports,
    write_reports,
)
from medgemma_clinical.models.language_model import tiny_language_model
from medgemma_clinical.models.text_batches import TextCollator
from medgemma_clinical.models.trajectory_llm import LLMWriter, TextBatch

ROWS = [0, 3, 1, 2, 5]
"""Patients with 1, 9, 6, 2 and 5 observations."""

VERDICTS = np.array([True, False, True, True, False])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return classifier_and_writer()


def greedy(model: LLMWriter, sequence: Tensor, most: int, eos: int) -> list[int]:
    """Continue one row by a full forward pass for each token."""
    embedding = model.llm.get_input_embeddings()
    written: list[int] = []
    while len(written) < most and eos not in written:
        token = int(model.llm(inputs_embeds=sequence).logits[0, -1].argmax())
        written.append(token)
        sequence = torch.cat([sequence, embedding(torch.tensor([[token]]))], dim=1)
    return written


def test_batched_generation_equals_greedy_row_by_row_and_stops_at_the_end_token() -> None:
    _, model, collate = classifier_and_writer()
    disturb_adapter(model.llm, size=0.5)
    for name, weight in model.llm.named_parameters():
        if re.search(r"post_\w+_layernorm", name):
            weight.data.fill_(6.0)  # or the tiny model only repeats its last token
    tokenizer = tiny_language_model()[1]
    questions = TextCollator(collate.dataset, tokenizer, PromptOptions(), answers=False)
    prompts, most, pad = questions(ROWS), 12, 0
    with torch.no_grad():
        sequences = [plain_sequence(model, prompts, row) for row in range(len(ROWS))]
        free = [greedy(model, sequence, most, eos=-1) for sequence in sequences]
        assert len({tuple(row) for row in free}) == len(ROWS), "rows must differ to prove anything"
        end = next(token for token in free[0] if token != free[0][0])
        expected = [greedy(model, sequence, most, end) for sequence in sequences]
    assert 1 < len(expected[0]) < most
    assert max(map(len, expected)) == most
    written = model.write(prompts, most, eos=[end], pad=pad).tolist()
    assert written == [row + [pad] * (most - len(row)) for row in expected]


def test_writing_multiplies_with_all_words_once_a_token_for_all_rows(parts: Parts) -> None:
    _, model, collate = parts
    words = len(model.llm.get_output_embeddings().weight)
    products: list[tuple[str, int]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name in {"mm", "addmm", "bmm", "baddbmm"} and result.shape[-1] == words:
                products.append((name, result.shape[:-1].numel()))
            return result

    with Products():
        model.write(collate.with_verdicts(ROWS, VERDICTS), 3, eos=[-1], pad=0)
    assert products == [("mm", len(ROWS))] * 3


def test_a_report_costs_its_prompt_once_and_then_one_position_a_token(parts: Parts) -> None:
    _, model, collate = parts
    positions: list[int] = []

    def count(_: Any, given: Any, named: dict[str, Any]) -> None:
        read = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        positions.append(read.shape[:2].numel())

    prompts = collate.with_verdicts([0, 1, 2], VERDICTS[:3])
    sequence = model.embed(prompts, model.trajectory(prompts), left=True)
    hook = model.body.register_forward_pre_hook(count, with_kwargs=True)
    model.write(prompts, 6, eos=[-1], pad=0)
    hook.remove()
    assert positions == [sequence.mask.numel(), *[3] * 5]


def test_states_that_are_not_finite_end_the_writing_of_reports() -> None:
    _, model, collate = classifier_and_writer()
    model.body.get_parameter("norm.weight").data[3] = torch.nan
    with pytest.raises(RunFault, match="not finite"):
        model.write(collate.with_verdicts(ROWS, VERDICTS), 3, eos=[-1], pad=0)


# ------------------------------------------------------------------------------- verdicts


def test_a_report_never_disagrees_with_the_decision_rule(parts: Parts) -> None:
    """Greedy decoding says yes from 0.5 on, whatever the threshold of the predictions."""
    _, model, collate = parts
    dataset = collate.dataset
    with torch.no_grad():
        logit = model(collate(range(len(dataset)))).logit.double().numpy()
    threshold = float(np.median(DecisionRule().probability(logit)))
    alarms = DecisionRule(threshold=threshold).probability(logit) >= threshold
    assert 0 < alarms[[0, 1, 3, 7, 12]].sum() < 5
    assert ((logit > 0) != alarms)[[0, 1, 3, 7, 12]].any(), "the threshold must matter"
    batches = [[3, 0], [7, 12, 1]]
    tokenizer = tiny_language_model()[1]
    texts = write_reports(model, collate, tokenizer, batches, alarms, most_tokens=3)
    assert sorted(texts) == [0, 1, 3, 7, 12]
    for i, text in texts.items():
        assert text.startswith(f"{dataset.outcome}: {'yes' if alarms[i] else 'no'}")
        assert dataset.score_report(i, text).verdict == int(alarms[i])


def answers_of(shift: int, parts: Parts) -> Any:
    """Stand in for ``LLMWriter.write``: the report of the patient ``shift`` positions further."""
    collate = parts.collate
    tokenizer = tiny_language_model()[1]

    def write(batch: TextBatch, most: int, eos: list[int], pad: int) -> Tensor:
        dataset = collate.dataset
        rows = []
        for row, i in enumerate(batch["index"].tolist()):
            word = "yes" if dataset.labels[i] == 1 else "no"
            text = tokenizer.decode(batch["input_ids"][row, batch["text_mask"][row]])
            assert text == f"{dataset.prompt(i)}{dataset.outcome}: {word}."
            other = (i + shift) % len(dataset)
            rows.append(collate.answer_ids[other][len(collate.words[int(dataset.labels[other])]) :])
        assert most >= max(map(len, rows))
        return torch.tensor([ids + [pad] * (most - len(ids)) for ids in rows])

    return write


def write_and_score(
    parts: Parts, rows: NDArray[np.int64]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write and score the reports of ``rows``, whose predictions are perfect."""
    _, model, collate = parts
    dataset = collate.dataset
    logit = 4 * dataset.labels[rows] - 2 + 0.01 * rows
    predictions = Predictions(0.0, dataset.labels[rows], logit, rows, np.zeros(len(rows)))
    verdicts = dataset.labels == 1
    tokenizer = tiny_language_model()[1]
    batches = [rows[:5].tolist(), rows[5:].tolist()]
    most = report_tokens(collate)
    texts = write_reports(model, collate, tokenizer, batches, verdicts, most)
    return score_reports(dataset, texts, predictions, 0, seed=0)


def test_reports_are_written_from_the_prompt_and_scored_against_the_patient(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, collate = parts
    dataset, rows = collate.dataset, np.arange(len(patients()))[::-1].copy()
    monkeypatch.setattr(model, "write", answers_of(0, parts))
    lines, figures = write_and_score(parts, rows)
    lines = json.loads(json.dumps(lines))
    for line, i in zip(lines, rows.tolist(), strict=True):
        expected = dataset.report(i)
        probability = DecisionRule().probability(np.array(4 * dataset.labels[i] - 2 + 0.01 * i))
        ids = {"id": f"patient {i}", "text": expected, "target": expected}
        verdict = int(dataset.labels[i])
        found = {"verdict": verdict, "probability": float(probability), "parses": True}
        assert line.items() >= {**ids, **found, "quality": 1.0, "invented": 0}.items()
    assert figures["reports"] == len(rows)
    assert figures["parse_share"]["value"] == figures["true_number_share"]["value"] == 1

    monkeypatch.setattr(model, "write", answers_of(1, parts))  # each gets the report of another
    _, figures = write_and_score(parts, rows)
    assert figures["true_number_share"]["value"] < 0.5
    assert (
        0.5 < figures["parse_share"]["value"] < 1
    )  # a single observation has no rate, so another form


@pytest.mark.parametrize(
    ("change", "wrong", "parses"),
    [
        (("", ""), 0, True),
        (("4.4 mEq/L at 10.62", "4.5 mEq/L at 10.62"), 1, True),
        (("4 mEq/L at 33.12 h", "4 mEq/L at 33.2 h"), 1, True),
        (("0.7 mg/dL", "0.07 mg/dL"), 1, True),
        ((" creatinine: from", " creatinine: only"), 4, False),
    ],
)
def test_a_wrong_number_of_a_later_series_counts_as_one(
    change: tuple[str, str], wrong: int, parses: bool
) -> None:
    names = ["serum bicarbonate", "potassium", "creatinine"]
    table = pd.read_csv(SAMPLE.with_name("physionet2012_chemistry.csv.gz"), nrows=1, dtype=str)
    description = Description(series="Serum bicarbonate", unit="mmol/L", outcome="Death")
    dataset = MIMICtrajectoryDataset(table, description=description, series=names)
    text = dataset.report(0).replace(*change)
    assert (text == dataset.report(0)) == (not wrong)
    score = dataset.score_report(0, text)
    assert (score.stated, score.true, score.parses) == (18, 18 - wrong, parses)


def test_figures_of_few_patients_with_or_without_an_abnormal_value_are_hidden() -> None:
    """A number of abnormal values tells of those who have one, and of those who have none."""
    description = Description(reference=(None, 30.0))
    for abnormal, shown in ((0, False), (10, False), (11, True), (29, True), (30, False)):
        cells = ["40 (0h) -> 20 (5h)" if k < abnormal else "20 (0h)" for k in range(40)]
        labels = np.arange(40, dtype=np.float64) % 2
        table = pd.DataFrame({"clinical_trajectory": cells, "label_escalation": labels})
        dataset = MIMICtrajectoryDataset(table, description=description)
        texts = {k: dataset.report(k) for k in range(40)}
        predictions = Predictions(0.0, labels, np.zeros(40), np.arange(40), np.zeros(40))
        _, figures = score_reports(dataset, texts, predictions, 11, seed=0)
        assert (figures["abnormal_values"] == abnormal) == shown
        for name in ("abnormal_named_share", "right_trend_share"):
            assert figures[name]["value"] == (1 if shown else None)
            assert (figures[name]["low"] is None) == (not shown)
        assert figures["invented"] == figures["inventing_share"]["value"] == 0
        _, figures = score_reports(dataset, texts, predictions, 0, seed=0)
        assert figures["abnormal_values"] == (abnormal or None)


def test_inventions_are_counted_and_shared_by_reports() -> None:
    table = pd.DataFrame({"clinical_trajectory": ["24 (0h)"] * 4, "label_escalation": [0, 1] * 2})
    dataset = MIMICtrajectoryDataset(table)
    texts = {k: dataset.report(k) for k in range(4)}
    texts[1] += " The patient smokes. The patient drinks."
    predictions = Predictions(0.0, dataset.labels, np.zeros(4), np.arange(4), np.zeros(4))
    lines, figures = score_reports(dataset, texts, predictions, 0, seed=0)
    assert [line["invented"] for line in lines] == [0, 2, 0, 0]
    assert (figures["invented"], figures["inventing_share"]["value"]) == (2, 0.25)


def reviews_of(stated: NDArray[np.int64], true: NDArray[np.int64]) -> list[ReportReview]:
    """Return reviews of reports without abnormal values and trends."""
    return [
        ReportReview(ReportScore(1, True, n, right), n, 0, 0, 0, 0, 0, 0)
        for n, right in zip(stated.tolist(), true.tolist(), strict=True)
    ]


def test_shares_of_reports_have_intervals_by_patient() -> None:
    rng = np.random.default_rng(0)
    stated = rng.integers(5, 20, 60)
    true, labels, patients = rng.binomial(stated, 0.7), np.arange(60) % 2, np.arange(60)
    figures = report_figures(reviews_of(stated, true), labels, patients, 0, seed=0)
    share = figures["true_number_share"]
    assert share["value"] == true.sum() / stated.sum()
    error = np.std(true - share["value"] * stated) / stated.mean() / np.sqrt(60)  # of a ratio
    assert share["high"] - share["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert figures["parse_share"]["value"] == figures["parse_share"]["high"] == 1
    assert 0.9 < figures["parse_share"]["low"] < 1

    reviews = reviews_of(stated, true)
    again = report_figures(reviews * 2, np.tile(labels, 2), np.tile(patients, 2), 0, seed=0)
    assert again["true_number_share"] == pytest.approx(share)
    rounded = report_figures(reviews, labels, patients, 11, seed=0)
    assert rounded["true_number_share"]["low"] == round(share["low"], 4)


def test_a_share_of_nothing_is_none() -> None:
    figures = report_figures(
        reviews_of(np.zeros(4, int), np.zeros(4, int)), np.arange(4) % 2, np.arange(4), 0, seed=0
    )
    assert figures["true_number_share"] == dict.fromkeys(("value", "low", "high"))
    assert figures["right_trend_share"] == dict.fromkeys(("value", "low", "high"))
    assert (figures["numbers_stated"], figures["abnormal_values"]) == (0, None)
