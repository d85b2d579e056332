"""Reports that the language model writes behind the verdict of the decision rule."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig

from language_models import body_inputs, classifier_and_writer, disturb_adapter, plain_sequence
from medgemma_clinical.evaluation.report_review import review_report
from medgemma_clinical.files import RunFault
from medgemma_clinical.inference import generation
from medgemma_clinical.inference.generation import rows_at_once, write_reports

ROWS = [0, 3, 1, 2, 5]
"""Patients with 1, 9, 6, 2 and 5 observations."""

VERDICTS = np.arange(16) % 3 == 0


@pytest.fixture(scope="module")
def parts():
    """What the writer writes depends on what it reads; else it repeats its last token."""
    parts = classifier_and_writer()
    disturb_adapter(parts.writer.llm, size=0.5)
    for name, weight in parts.writer.llm.named_parameters():
        if re.search(r"post_\w+_layernorm", name):
            weight.data.fill_(12.0)
    return parts


@torch.no_grad()
def greedy(model, sequence, most, eos):
    """Continue one row by a full forward pass for each token."""
    embedding, written = model.llm.get_input_embeddings(), []
    while len(written) < most and eos not in written:
        written.append(int(model.llm(inputs_embeds=sequence).logits[0, -1].argmax()))
        sequence = torch.cat([sequence, embedding(torch.tensor([written[-1:]]))], dim=1)
    return written


def test_write__a_padded_batch_equals_greedy_row_by_row_and_stops_at_the_end_token(parts):
    _, model, collate = parts
    prompts, most, pad = collate.with_verdicts(ROWS, VERDICTS[ROWS]), 12, 0
    sequences = [plain_sequence(model, prompts, row) for row in range(len(ROWS))]
    free = [greedy(model, sequence, most, eos=-1) for sequence in sequences]
    assert len({tuple(row) for row in free}) == len(ROWS)
    end = next(token for token in free[0] if token != free[0][0])
    expected = [greedy(model, sequence, most, end) for sequence in sequences]
    assert 1 < len(expected[0]) < most == max(map(len, expected))
    written = model.write(prompts, most, eos=[end], pad=pad).tolist()
    assert written == [row + [pad] * (most - len(row)) for row in expected]


@pytest.mark.parametrize("broken", [0, 2])
def test_write__states_that_are_not_finite_are_refused_by_one_check_a_batch(parts, broken):
    _, model, collate = parts
    with body_inputs(model) as seen:

        def spoil(*call):
            if len(seen) == 1 + broken:
                call[2].last_hidden_state[1, -1, 3] = torch.inf

        hook = model.llm.get_decoder().register_forward_hook(spoil)
        with pytest.raises(RunFault):
            model.write(collate.with_verdicts(ROWS, VERDICTS[ROWS]), 4, eos=[-1], pad=0)
        hook.remove()
    assert len(seen) == 4  # not one check a token, for which a GPU would wait


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")]
)
def test_write_reports__go_on_behind_the_verdicts_and_in_halves_without_memory(
    error, parts, monkeypatch
):
    _, model, collate = parts
    dataset, write, sizes = collate.dataset, model.write, []
    verdicts = {i: bool(VERDICTS[i]) for i in (3, 0, 11, 5, 2, 7, 12, 1)}
    monkeypatch.setattr(generation, "CPU_ROWS", 5)
    whole = write_reports(model, collate, verdicts, 5)
    assert whole.keys() == verdicts.keys()
    for i, text in whole.items():
        assert text.startswith(f"{dataset.outcome}: {'yes' if VERDICTS[i] else 'no'}.")
        assert review_report(dataset, i, text).verdict == VERDICTS[i]
        assert write_reports(model, collate, {i: verdicts[i]}, 5) == {i: text}

    def fits(batch, *more):
        sizes.append(len(batch["index"]))
        if sizes[-1] > limit:
            raise error
        return write(batch, *more)

    monkeypatch.setattr(model, "write", fits)
    limit = 2
    assert write_reports(model, collate, verdicts, 5) == whole
    assert sizes == [5, 2, 3, 1, 2, 1, 2]  # what did not fit is not tried again
    limit = 0
    with pytest.raises(RunFault, match="--max_text_tokens"):
        write_reports(model, collate, verdicts, 5)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 96), (torch.bfloat16, 193)])
def test_rows_at_once__count_what_torch_keeps_cached_and_the_bytes_of_a_number(
    dtype, rows, monkeypatch
):
    """After training the driver sees a full card; 66 GiB are free, 1,000 tokens of 4B a row."""
    gib = 2**30
    for name, size in (("reserved", 70 * gib), ("allocated", 5 * gib)):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda _, size=size: size)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gib, 79 * gib))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    config = Gemma3TextConfig(hidden_size=2560, num_hidden_layers=34, **heads)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(parameters=lambda: iter([gpu]), tokens=8)
    model.llm = SimpleNamespace(config=config, dtype=dtype)
    collate = SimpleNamespace(lengths=lambda: np.array([100, 692]))
    assert rows_at_once(model, collate, 300) == rows
