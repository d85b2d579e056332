"""Prompts as embeddings: what the trained model reads, and what a server continues as it does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from medgemma_clinical.inference.merge import export_merged
from medgemma_clinical.inference.prompt_embeds import prompt_embeds
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_models import LENGTHS, PREFIX, data_of, patients, plain_sequence
from medgemma_clinical.data.scoring import ScoringRows
from medgemma_clinical.data.tables import Findings
from medgemma_clinical.evaluation.decision import DecisionRule
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.scoring import score_rows
from medgemma_clinical.models.checkpoints import MERGED_MODEL
from medgemma_clinical.models.generation import write_reports
from medgemma_clinical.models.text_batches import TextCollator, soft_tokens
from medgemma_clinical.models.trained_model import load_trained_model
from merged_models import BUILDERS, save_base, save_stage

ROWS = [3, 0, 9, 1, 6]
"""Patients of 9, 1, 8, 6 and 4 observations, in no order."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with stages 2 and 3 whose language model writes other things for other patients."""
    place = tmp_path_factory.mktemp("run")
    base = save_base(place / "gemma", lively=True)
    for stage in ("classification", "generative"):
        save_stage(place, stage, base, change=0.5)
    return place


def load(run, stage):
    """Load a stage; the rule of stage 3 says yes for half of the rows, wherever they lie."""
    trained = load_trained_model(run / stage, BUILDERS)
    if stage == "generative":
        risks = DecisionRule().probability(logits_of(trained))
        between = float(np.sort(risks[ROWS])[1:3].mean())  # no rounding turns a verdict
        decision = DecisionRule(threshold=between).to_config()
        return replace(trained, config={**trained.config, "decision": decision})
    return trained


def collator(trained):
    dataset = data_of(patients()).dataset
    return TextCollator(dataset, trained.tokenizer, trained.prompts, answers=False)


def logits_of(trained):
    batch = collator(trained)(range(len(LENGTHS)))
    with torch.no_grad():
        return trained.model(batch).logit.double().numpy()


def verdicts_of(trained):
    return trained.rule.probability(logits_of(trained)) >= trained.rule.threshold


def prompts_of(trained, dataset, rows=ROWS, batch_size=32):
    """The prompts of some rows, in their order."""
    places = np.arange(len(rows))
    chosen = dataset.subset(np.asarray(rows))
    asked = ScoringRows(chosen.ids, places, chosen, places, len(rows))
    scores = score_rows(asked, trained, Findings("patients"), batch_size)
    return prompt_embeds(scores, trained, batch_size)


def embedded(model, ids):
    vectors = model.llm.get_input_embeddings()(torch.tensor(ids))
    return vectors


# ------------------------------------------------------------------------------- what is read


@torch.no_grad()
def test_prompts_of_stage_2_are_what_the_model_reads_without_padding(run):
    trained = load(run, "classification")
    prompts = prompts_of(trained, patients(), batch_size=2)
    text = collator(trained)
    for row, prompt in zip(ROWS, prompts, strict=True):
        expected = plain_sequence(trained.model, text([row]), 0)[0]
        assert prompt.shape == expected.shape
        tokens = soft_tokens(text.dataset, PREFIX)[row]
        assert len(prompt) == 1 + tokens + len(text.prompt_ids[row] + text.stem)
        assert torch.allclose(prompt, expected, atol=1e-4)


@torch.no_grad()
def test_prompts_of_stage_3_end_with_the_verdict_of_the_decision_rule(run):
    trained = load(run, "generative")
    text, verdicts = collator(trained), verdicts_of(trained)
    assert 0 < verdicts[ROWS].sum() < len(ROWS)
    greedy = logits_of(trained) > 0
    assert (verdicts != greedy)[ROWS].any(), "the threshold must matter"
    for row, prompt in zip(ROWS, prompts_of(trained, patients()), strict=True):
        batch = text.with_verdicts([row], verdicts[[row]])
        assert torch.allclose(prompt, plain_sequence(trained.model, batch, 0)[0], atol=1e-4)
        head = embedded(trained.model, text.stem + text.words[int(verdicts[row])])
        assert torch.equal(prompt[-len(head) :], head)


def test_embeddings_are_on_the_cpu_in_the_models_dtype_and_own_their_memory(run):
    trained = load_trained_model(run / "generative", BUILDERS, precision="bf16")
    for prompt in prompts_of(trained, patients()):
        assert (prompt.dtype, prompt.device.type) == (torch.bfloat16, "cpu")
        assert prompt.is_contiguous()
        assert not prompt.requires_grad
        assert prompt.untyped_storage().nbytes() == prompt.nbytes  # torch.save writes all of it


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_batch_changes_no_prompt(batch_size, run):
    trained = load(run, "generative")
    some = prompts_of(trained, patients(), batch_size=batch_size)
    for a, b in zip(some, prompts_of(trained, patients(), batch_size=3), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# ------------------------------------------------------------------------------- what is written


@torch.no_grad()
def test_plain_transformers_writes_our_reports_from_the_prompts(run, tmp_path):
    trained = load(run, "generative")
    text, verdicts = collator(trained), verdicts_of(trained)
    most = trained.config["report_tokens"]
    expected = write_reports(trained.model, text, [ROWS], verdicts, most)
    assert len(set(expected.values())) == len(ROWS), "rows must differ to prove anything"

    export_merged(run / "generative", tmp_path / "out", BUILDERS)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / MERGED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / MERGED_MODEL)
    outcome = trained.config["outcome"]
    for row, prompt in zip(ROWS, prompts_of(trained, patients()), strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        ids = llm.generate(inputs_embeds=prompt[None], attention_mask=mask)
        report = tokenizer.decode(ids[0], skip_special_tokens=True)
        head = f"{outcome}: {'yes' if verdicts[row] else 'no'}."
        assert head + report == expected[row]


def test_an_export_makes_the_same_prompts(run, tmp_path):
    export_merged(run / "generative", tmp_path / "out", BUILDERS)
    merged = load_trained_model(tmp_path / "out", BUILDERS)
    pairs = zip(
        prompts_of(merged, patients()),
        prompts_of(load_trained_model(run / "generative", BUILDERS), patients()),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------- refused


def changed(trained, **config):
    return replace(trained, config={**trained.config, **config})


def test_rows_that_cannot_be_scored_are_refused(run):
    trained = load(run, "generative")
    with pytest.raises(InputError, match="patients, row 0: its text is longer than 10 tokens"):
        prompts_of(changed(trained, max_text_tokens=10), patients())
    dataset = patients()
    dataset.times[dataset.offsets[4] - 1] = 1e7
    with pytest.raises(InputError, match="patients, row 0: more than 720000 h pass"):
        prompts_of(trained, dataset)
    assert len(prompts_of(trained, dataset, ROWS[1:])) == 4  # row 3 alone has the gap
    assert trained.model.stage1 is not None
    trained.model.stage1.get_parameter("members.0.head.wide.weight").data.fill_(torch.nan)
    with pytest.raises(InputError, match="patients, row 0: no finite score"):
        prompts_of(trained, patients())


def test_a_data_set_that_lacks_an_input_is_refused(run):
    trained = load(run, "generative")
    dataset = patients()
    dataset.static_names = ()
    inputs = {**trained.config["inputs"], "facts": ["static_bmi [kg/m2]"]}
    with pytest.raises(InputError, match="add the columns"):
        prompts_of(changed(trained, inputs=inputs), dataset)
