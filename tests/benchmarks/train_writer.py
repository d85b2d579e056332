"""Train the demo's language model to copy numbers into reports, on made-up rows.

    python tests/benchmarks/train_writer.py [--out FOLDER] [--steps 2000] [--seed 0]

A Gemma 3 of less than a million parameters reads stage 3's prompts and learns to write its reports.
Series, texts and outcomes are drawn by the seed: labels are tossed, so the model learns the form
and where each number stands, and no medicine. Prompts and reports are the product's own, behind
random vectors in the place of soft tokens. Prints the loss, and how many reports on made-up rows
of another seed have the expected form and true numbers.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import ROOT, machine, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.evaluation.report_review import review_report
from medgemma_clinical.inference.generation import write_reports
from medgemma_clinical.models.language_model import embedding_rms
from medgemma_clinical.models.text_batches import TextCollator, verdict_words
from medgemma_clinical.models.trajectory_llm import LLMWriter

SERIES = [  # name, unit, middle, spread, decimals
    *[("Serum bicarbonate", "mmol/L", 24, 5, 0)] * 6,
    ("Anion gap", "mEq/L", 14, 5, 0),
    ("Creatinine", "mg/dL", 1.5, 1, 2),
    ("Serum potassium", "mmol/L", 4.2, 0.8, 1),
    ("Serum sodium", "mEq/L", 139, 5, 0),
    ("Base excess", "mmol/L", -2, 5, 1),
    ("Glucose", "mg/dL", 180, 60, 0),
    ("Arterial pH", "", 7.35, 0.08, 2),
]
OUTCOMES = [  # name, question
    *[("In-hospital death", "Will the patient die in hospital?")] * 3,
    ("Escalation", "Will care have to be escalated?"),
    ("Readmission", "Will the patient be readmitted within 30 days?"),
]
PLACES = ["coronary care unit", "cardiac surgery recovery unit", "medical ICU", "surgical ICU"]
PLACES += ["ward", "emergency department"]
SPECIALS = ["<pad>", "<eos>", "<bos>"]  # the ids of Gemma's own
VOCABULARY, LAYERS, WIDTH, BATCH, RATE = 512, 3, 128, 16, 3e-3
PROMPTS = PromptOptions(computed=True)  # as stage 3 has them
SOFT_TOKENS, ROWS, TABLES = 8, 64, 16  # at most before a text; of a table; tables at a time


def made_up(generator):
    """Draw a table of one series and one outcome, whose labels are tossed."""
    name, unit, middle, spread, decimals = SERIES[generator.integers(len(SERIES))]
    outcome, question = OUTCOMES[generator.integers(len(OUTCOMES))]
    span = generator.choice([12, 48, 48, 240])

    def row():
        n = min(int(generator.geometric(0.3)), 20)
        times = np.sort(generator.uniform(0, span, n)).round(generator.choice([0, 1, 2, 2, 2]))
        drift = np.linspace(0, generator.normal(0, spread), n)
        values = (generator.normal(middle, spread, n) + drift).round(decimals)
        pairs = zip(values.tolist(), times.tolist(), strict=True)
        words = f"{generator.integers(18, 95)}-year-old {generator.choice(['man', 'woman'])}"
        words += f", {generator.choice(PLACES)}" * (generator.random() < 0.9)
        words += f", {generator.integers(40, 160)} kg" * (generator.random() < 0.6)
        cell = " -> ".join(f"{value:g} ({time:g}h)" for value, time in pairs)
        context = words if generator.random() < 0.9 else ""
        return cell, context, int(generator.integers(2))

    columns = ["clinical_trajectory", "clinical_context", "label_escalation"]
    table = pd.DataFrame([row() for _ in range(ROWS)], columns=columns)
    about = Description(name, unit, question, outcome, plausible=None)
    return MIMICtrajectoryDataset(table, description=about)


def make_tokenizer(tables):
    """Learn frequent words; every digit is a token, and any other text falls back to bytes."""
    texts = [f" {word}" for word in ("no", "yes")] * 9000
    for table in tables:
        for i in range(len(table)):
            head = f"{table.outcome}: {('no', 'yes')[int(table.labels[i])]}."
            texts += [table.prompt(i, PROMPTS), table.report(i).removeprefix(head)]
            texts.append(f"{table.outcome}:")
    core = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    core.decoder = decoders.ByteLevel()
    options = {"vocab_size": VOCABULARY, "special_tokens": SPECIALS, "max_token_length": 20}
    options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(texts, trainers.BpeTrainer(**options, show_progress=False))
    named = dict(zip(("pad_token", "eos_token", "bos_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def make_model():
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        query_pre_attn_scalar=WIDTH // 4,
        layer_types=["full_attention"] * LAYERS,
        rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), rope),
        initializer_range=0.05,
        max_position_embeddings=4096,
    )
    return Gemma3ForCausalLM(config)


def batches(generator, tokenizer):
    """Yield (ids, targets) without end; rows of about one length stand together."""
    while True:
        rows = []
        for _ in range(TABLES):
            text = TextCollator(made_up(generator), tokenizer, PROMPTS, answers=True)
            prompts = [prompt + text.stem for prompt in text.prompt_ids]
            rows += zip(prompts, text.answer_ids, strict=True)
        rows.sort(key=lambda row: sum(map(len, row)))
        for start in generator.permutation(np.arange(0, len(rows), BATCH)):
            chosen = rows[start : start + BATCH]
            ids = [torch.tensor(prompt + answer) for prompt, answer in chosen]
            targets = [torch.tensor([-100] * len(a) + b) for a, b in chosen]
            yield pad_sequence(ids, True), pad_sequence(targets, True, padding_value=-100)


def loss_of(model, bos, ids, targets, scale, generator):
    """Return the cross-entropy of the reports behind <bos> and random soft tokens."""
    embedding = model.get_input_embeddings()
    soft = torch.randn(len(ids), int(generator.integers(SOFT_TOKENS + 1)), model.config.hidden_size)
    soft = scale * functional.rms_norm(soft, soft.shape[-1:])
    first = embedding(torch.full((len(ids), 1), bos))
    inputs = torch.cat([first, soft, embedding(ids)], dim=1)
    hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    hidden = hidden[:, -ids.shape[1] - 1 : -1]  # a state predicts the token behind it
    answer = targets != -100
    return functional.cross_entropy(model.lm_head(hidden[answer]), targets[answer])


def check(model, tokenizer, generator, tables=4):
    """Return the shares of reports in the expected form, and of true numbers, on new rows."""
    parses, stated, true = [], 0, 0
    _, no, yes = verdict_words(tokenizer)
    options = {"tokens": 0, "bos": tokenizer.bos_token_id, "verdict": (yes[0], no[0])}
    writer = LLMWriter(None, None, model, **options)
    for _ in range(tables):
        table = made_up(generator)
        text = TextCollator(table, tokenizer, PROMPTS, answers=True)
        verdicts = dict(enumerate((table.labels == 1).tolist()))
        for i, report in write_reports(writer, text, verdicts, text.report_tokens()).items():
            review = review_report(table, i, report)
            parses.append(review.parses)
            stated, true = stated + review.stated, true + review.true
    return np.mean(parses), true / max(stated, 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "medgemma_clinical/sample/writer")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # what is read of each table
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    generator, began = np.random.default_rng(args.seed), time.process_time()
    tokenizer = make_tokenizer([made_up(generator) for _ in range(40)])
    model = make_model()
    size = sum(weights.numel() for weights in model.parameters())
    on = machine("torch", "transformers", threads=1)
    write(f"{size:,} parameters, {args.steps} steps, seed {args.seed}; {on}")
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(args.steps // 10, 200), args.steps)
    source, losses = batches(generator, tokenizer), []
    for step in range(args.steps):
        if step % 100 == 0:
            scale = embedding_rms(model, tokenizer, "Will the patient die in hospital?")
        loss = loss_of(model, tokenizer.bos_token_id, *next(source), scale, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            seconds = time.process_time() - began
            write(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s")
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    form, true = check(model.float(), tokenizer, np.random.default_rng(args.seed + 1))
    write(f"new rows: {form:.1%} of the expected form, {true:.1%} of the numbers true")
    logging.disable(logging.NOTSET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
