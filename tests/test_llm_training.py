"""Stages 2 and 3 as they train: batches, accumulation, checkpoints, known states, memory, chat."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import medgemma_trainer as trainer
from dataset_format import InputError, MIMICtrajectoryDataset
from language_models import CPU, arguments, classifier_and_writer, data_of, patients
from medgemma_trainer import Batches, Stage, TextCollator
from trajectories import table_of

GEMMA = {
    "270M": (640, 2048, 18, 4, 1, 256),
    "1B": (1152, 6912, 26, 4, 1, 256),
    "4B": (2560, 10240, 34, 8, 4, 256),
    "27B": (5376, 21504, 62, 32, 16, 128),
}
"""Width, inner width, layers, heads, key heads, width of a head. Source: Gemma 3's config.json."""

LORA_PARAMETERS = {"270M": 1_898_496, "1B": 6_522_880, "4B": 14_901_248, "27B": 56_758_272}


def stage_2(*flags: str, data: Any = None) -> Stage:
    words = ["--model_name", "tiny", "--lora_dropout", "0", *flags]
    return trainer.llm_stage(arguments(*words), data or data_of(patients()))


# --------------------------------------------------------------------------- batches


def lengths_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 200, rows)


@pytest.mark.parametrize("rows", [1, 16, 47, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_is_in_one_batch_and_the_number_of_batches_is_known(
    rows: int, shuffle: bool
) -> None:
    positions = np.arange(rows) + 3
    batches = Batches(positions, 16, lengths_of(rows + 3), shuffle=shuffle)
    cut = list(batches)
    assert len(cut) == len(batches)
    assert max(map(len, cut)) <= 16
    assert sorted(row for batch in cut for row in batch) == positions.tolist()


def test_training_order_is_random_seeded_and_without_lengths_a_plain_shuffle() -> None:
    batches = Batches(np.arange(640), 16, lengths_of(640), shuffle=True)
    orders = []
    for seed in (1, 1, 2):
        batches.generator.manual_seed(seed)
        orders.append(list(batches))
    assert orders[0] == orders[1] != orders[2]
    batches.lengths = None
    batches.generator.manual_seed(1)
    expected = torch.randperm(640, generator=torch.Generator().manual_seed(1)).tolist()
    assert [row for batch in batches for row in batch] == expected


def test_rows_of_about_equal_length_share_a_batch_and_batches_come_in_any_length() -> None:
    lengths = lengths_of(3200)
    batches = Batches(np.arange(3200), 16, lengths, shuffle=True)
    share = trainer.padding_share(batches, lengths)
    longest = np.array([lengths[batch].max() for batch in batches])
    batches.lengths = None
    assert share < 0.1 < 0.4 < trainer.padding_share(batches, lengths)
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2
    within = longest[: trainer.BUCKET]
    assert within.tolist() != sorted(within), "the batches of a bucket come in random order"


@pytest.mark.parametrize("rows", [64, 66, 65, 129])
def test_two_processes_share_out_every_batch(rows: int) -> None:
    shares = []
    for share in (0, 1):
        batches = Batches(np.arange(rows), 16, lengths_of(rows), shuffle=True)
        batches.share, batches.workers = share, 2
        batches.generator.manual_seed(1)
        shares.append(list(batches))
        assert len(shares[-1]) == len(batches)
        assert all(shares[-1]), "a process without rows would wait for the others"
    together = [row for pair in zip(*shares, strict=True) for half in pair for row in half]
    assert sorted(together) == list(range(rows))


def test_scores_come_back_in_the_order_of_the_data_set() -> None:
    stage = stage_2()
    scored = trainer.evaluate(stage.model, stage.loaders["test"], CPU)
    rows = data_of(patients()).split["test"]
    assert scored.rows.tolist() == rows.tolist()
    assert scored.labels.tolist() == patients().labels[rows].tolist()
    one = stage.loaders["test"].collate_fn([int(rows[2])])
    expected = stage.model(one).logit.sigmoid().item()
    assert scored.probability[2] == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------- gradients


def gradients_of(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Train an epoch without moving any weight; give the gradient of its only step."""
    learner = trainer.begin(stage, CPU)
    found: dict[str, Tensor] = {}

    names = {parameter: name for name, parameter in stage.model.named_parameters()}

    def keep(gradients: list[Tensor], _: Tensor) -> None:
        learning = [names[parameter] for parameter in learner.vectors.parameters]
        found.update(zip(learning, learner.vectors.cut(gradients), strict=True))

    monkeypatch.setattr(learner.optimizer, "step", keep)
    monkeypatch.setattr(trainer, "norm_of", lambda _: torch.zeros(()))  # nothing is clipped
    trainer.train_epoch(stage, learner)
    return found


@pytest.mark.parametrize("mode", ["classification", "generative"])
def test_accumulated_gradients_equal_those_of_the_large_batch(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Eight rows in threes: 3 + 3 + 2, with reports of unequal length.
    flags = ["--mode", mode, "--freeze_ode"]
    whole = gradients_of(stage_2(*flags, "--batch_size", "8"), monkeypatch)
    small = ["--batch_size", "3", "--gradient_accumulation", "4"]
    parts = gradients_of(stage_2(*flags, *small), monkeypatch)
    assert whole.keys() == parts.keys() != set()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_last_batches_of_an_epoch_make_a_step_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = stage_2("--freeze_ode", "--batch_size", "3", "--gradient_accumulation", "2")
    learner = trainer.begin(stage, CPU)
    trainer.train_epoch(stage, learner)
    assert learner.average.steps == 2  # 3 + 3, then 2


def test_the_schedule_ends_with_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--freeze_ode", "--batch_size", "3", "--gradient_accumulation", "2", "--epochs", "2"]
    stage = stage_2(*flags)
    learner = trainer.begin(stage, CPU)
    for _ in range(stage.epochs):
        trainer.train_epoch(stage, learner)
        learner.progress = trainer.Progress()
    assert learner.optimizer.factor(learner.optimizer.scheduled) == pytest.approx(0, abs=1e-9)


def test_recomputed_layers_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--freeze_ode", "--batch_size", "8"]
    plain = gradients_of(stage_2(*flags), monkeypatch)
    stage = stage_2(*flags, "--gradient_checkpointing")
    assert isinstance(stage.model, trainer.TrajectoryLLM)
    assert stage.model.body.gradient_checkpointing
    again = gradients_of(stage, monkeypatch)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------- known states


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A stage 1 file of the sixteen patients."""
    data = data_of(patients())
    stage = trainer.trajectory_stage(arguments("--trajectory_epochs", "1"), data)
    stage.save(tmp_path / "trajectory")
    return tmp_path / trainer.TRAJECTORY_FILE


@pytest.mark.parametrize("mode", ["classification", "generative"])
def test_a_frozen_encoder_is_asked_once_and_its_states_equal_fresh_ones(
    mode: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_2("--mode", mode, "--ode_checkpoint", str(trained))
    model = stage.model.eval()
    assert isinstance(model, trainer.TrajectoryLLM)
    batch = stage.loaders["test"].collate_fn([3, 12, 7])
    bare = {
        k: v for k, v in batch.items() if k not in ("states", "states_mask", "trajectory_logit")
    }
    known, fresh = model.trajectory(batch), model.trajectory(bare)  # type: ignore[arg-type]
    assert known is not None
    assert fresh is not None
    assert torch.equal(known.mask, fresh.mask)
    torch.testing.assert_close(known.states[known.mask], fresh.states[fresh.mask])
    torch.testing.assert_close(known.logit, fresh.logit)
    calls: list[int] = []
    assert model.encoder is not None
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    trainer.train_epoch(stage, trainer.begin(stage, CPU))
    trainer.evaluate(model, stage.loaders["val"], CPU)
    assert calls == []


def test_an_encoder_that_learns_is_asked_every_time() -> None:
    batch = stage_2().loaders["train"].collate_fn([0, 1])
    assert "states" not in batch


def test_a_new_stage_2_predicts_what_stage_1_does(trained: Path) -> None:
    stage = stage_2("--ode_checkpoint", str(trained))
    assert {group["name"] for group in stage.parameter_groups()} == {"projection", "llm", "head"}
    first = trainer.trajectory_stage(arguments(), data_of(patients()))
    first.load(trained.parent / "trajectory")
    one = trainer.evaluate(first.model, first.loaders["test"], CPU).probability
    two = trainer.evaluate(stage.model, stage.loaders["test"], CPU).probability
    np.testing.assert_allclose(one, two, atol=1e-6)


# --------------------------------------------------------------------------- work


def places_through(model: Any) -> list[int]:
    """Give the list of the places (rows times length) of each pass through the layers, growing."""
    places: list[int] = []

    def count(_: Any, given: Any, named: dict[str, Any]) -> None:
        read = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
        places.append(read.shape[:2].numel())

    model.body.register_forward_pre_hook(count, with_kwargs=True)
    return places


@pytest.mark.parametrize("mode", ["classification", "generative"])
def test_an_epoch_sends_no_place_through_the_layers_that_it_does_not_need(mode: str) -> None:
    stage = stage_2("--mode", mode, "--freeze_ode", "--batch_size", "4")
    model, batches = stage.model, stage.loaders["train"].batch_sampler
    assert isinstance(model, trainer.TrajectoryLLM)
    assert isinstance(batches, Batches)
    places = places_through(model)
    trainer.train_epoch(stage, trainer.begin(stage, CPU))
    batches.generator.manual_seed(1)  # as the epoch did
    batches.done = 0
    # <bos>, as many soft tokens as the batch's longest series fills, the text.
    expected = []
    for rows in batches:
        batch = stage.loaders["train"].collate_fn(rows)
        soft = batch["states_mask"].sum(1)
        text = batch["text_mask"].sum(1)
        expected.append(len(rows) * int((1 + soft + text).max()))
    assert places == expected


def test_a_report_costs_its_prompt_once_and_then_one_place_a_token() -> None:
    _, model, collate = classifier_and_writer()
    places = places_through(model)
    prompts = collate.prompts_only([0, 1, 2])
    embeddings, _, _ = model.embed(prompts, model.trajectory(prompts), left=True)
    model.write(prompts, 6, eos=[-1], pad=0)
    assert places == [3 * embeddings.shape[1], *[3] * 5]


def test_scoring_keeps_nothing_for_gradients_and_takes_twice_the_batch() -> None:
    stage = stage_2("--freeze_ode", "--batch_size", "2")
    sizes: list[int] = []
    kept: list[bool] = []

    def note(_: Any, given: Any, output: trainer.Output) -> None:
        sizes.append(len(output.logit))
        kept.append(output.loss.requires_grad)

    stage.model.register_forward_hook(note)
    trainer.evaluate(stage.model, stage.loaders["test"], CPU)
    assert not any(kept)
    assert max(sizes) == 4


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("size", GEMMA)
def test_shapes_and_memory_follow_the_configuration_of_every_gemma_3(size: str) -> None:
    width, inner, layers, heads, keys, head = GEMMA[size]
    config = Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
    )
    with torch.device("meta"):  # shapes without weights
        base = Gemma3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        llm = trainer.add_lora(base, 8, 16, 0.0)
        model = trainer.LLMClassifier(
            trainer.ClinicalODERNN(1),
            llm,
            prevalence=0.5,
            tokens=8,
            scale=1.0,
            bos=2,
            verdict=(5, 6),
        )
    assert sum(p.numel() for p in trainer.trainable(llm)) == LORA_PARAMETERS[size]
    assert model.projection is not None
    assert model.projection.linear.weight.shape == (width, 64)
    need = {tokens: trainer.step_memory(model, tokens) for tokens in (50, 100)}
    base_bytes = 2 * sum(p.numel() for p in base.parameters() if not p.requires_grad)
    assert need[50].weights == pytest.approx(base_bytes, rel=1e-3)
    ratio = need[100].activations_a_row / need[50].activations_a_row
    assert 1.9 < ratio < 2.1, "activations grow with the tokens"
    learning = sum(p.numel() * p.element_size() for p in trainer.trainable(model))
    assert need[50].learning == 6 * learning
    assert need[50].logits == 0, "stage 2 never asks for words"
    writer = trainer.LLMWriter(model.encoder, llm, tokens=8, scale=1.0, bos=2, verdict=(5, 6))
    reports = trainer.step_memory(writer, 50)
    assert reports.logits == trainer.LOSS_ROWS * 262_208 * 8
    assert reports.activations_a_row == need[50].activations_a_row
    assert reports.step(3) == need[50].step(3) - 6 * 4 * (width + 1) + reports.logits
    per_token_and_layer = need[100].activations_a_row / 100 / layers / (2 * width)
    assert 30 < per_token_and_layer < 100, "some dozens of vectors of the model's width"
    trainer.set_checkpointing(llm, on=True)
    assert trainer.step_memory(model, 100).activations_a_row < 0.2 * need[100].activations_a_row


def test_the_estimate_is_what_autograd_really_keeps() -> None:
    model = classifier_and_writer().classifier.train()
    model.requires_grad_(False)
    model.llm.requires_grad_(True)
    batch = classifier_and_writer().collate([3, 13])  # both of nine observations
    embeddings, mask, _ = model.embed(batch, model.trajectory(batch))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model.body(inputs_embeds=embeddings.detach().requires_grad_(), attention_mask=mask)
    assert result.last_hidden_state.requires_grad
    estimate = 2 * trainer.saved_bytes(model.body, embeddings.shape[1], embeddings.shape[2])
    assert estimate == pytest.approx(sum(kept.values()), rel=0.15)


def test_the_estimate_disturbs_neither_mode_nor_random_numbers() -> None:
    model = classifier_and_writer().classifier.eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trainer.saved_bytes(model.body, 20, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.body.training


def test_four_bit_weights_count_with_their_scales() -> None:
    class Scales:
        def as_dict(self, packed: bool) -> dict[str, Tensor]:
            assert packed
            return {"absmax": torch.zeros(3, dtype=torch.uint8), "nested": torch.zeros(2)}

    weight = torch.zeros(5, dtype=torch.uint8)
    assert trainer.stored_bytes(weight) == 5
    weight.quant_state = Scales()  # type: ignore[attr-defined]
    assert trainer.stored_bytes(weight) == 5 + 3 + 8


def test_a_dry_run_measures_and_leaves_nothing(
    dka_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    train_epoch = trainer.train_epoch

    def counted(stage: Stage, learner: trainer.Learner) -> float:
        loss = train_epoch(stage, learner)
        steps.append(learner.average.steps)
        return loss

    monkeypatch.setattr(trainer, "train_epoch", counted)
    for stage in (["--trajectory_only"], ["--mode", "generative", "--model_name", "tiny"]):
        words = [*stage, "--dry_run", "--data_path", str(dka_file), "--batch_size", "4"]
        assert trainer.main(words) == 0
        printed = capsys.readouterr().out
        assert "dry run: 2 steps on the longest rows" in printed
    assert "memory of a step, estimated: weights" in printed
    assert steps == [2, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_takes_the_longest_rows_and_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_2("--batch_size", "1", "--gradient_accumulation", "3")
    seen: list[int] = []
    stage.model.register_forward_hook(
        lambda model, given, _: seen.extend(given[0]["index"].tolist()) if model.training else None
    )
    data = data_of(patients())
    args = arguments("--model_name", "tiny", "--batch_size", "1", "--gradient_accumulation", "3")
    trainer.rehearse(stage, data, args)
    batches = stage.loaders["train"].batch_sampler
    assert batches.lengths is not None
    train = data.split["train"]
    longest = train[np.argsort(-batches.lengths[train], kind="stable")[:6]]
    assert sorted(seen) == sorted(longest.tolist())


def test_more_soft_tokens_than_observations_cost_nothing() -> None:
    model = stage_2("--num_prefix_tokens", "4096").model
    assert isinstance(model, trainer.TrajectoryLLM)
    assert model.tokens == max(patients().lengths)


def test_too_little_memory_ends_with_what_to_do(
    dka_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "train_epoch", full)
    words = ["--trajectory_only", "--data_path", str(dka_file), "--output_dir", str(tmp_path / "x")]
    assert trainer.main(words) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for flag in ("--batch_size", "--gradient_accumulation", "--gradient_checkpointing"):
        assert flag in error
        assert flag in trainer.build_parser().format_help()


# --------------------------------------------------------------------------- text


def long_and_short() -> MIMICtrajectoryDataset:
    series = [" -> ".join(f"{20 + k} ({k}h)" for k in range(n)) for n in (20, 3, 9, 1)]
    return MIMICtrajectoryDataset(table_of(series, clinical_context=["old"] * 4))


def test_a_long_prompt_loses_its_oldest_observations_and_nothing_else() -> None:
    dataset, tokenizer = long_and_short(), trainer.tiny_language_model()[1]
    whole = TextCollator(dataset, tokenizer, answers=False)
    most = 130
    cut = TextCollator(dataset, tokenizer, answers=False, most_tokens=most)
    assert whole.shortened == 0
    assert cut.shortened == sum(len(prompt) > most for prompt in whole.prompts) == 2
    assert max(map(len, cut.prompts)) <= most
    assert cut.prompts[1] == whole.prompts[1]
    text = tokenizer.decode(cut.prompts[0])
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
            long_and_short(), trainer.tiny_language_model()[1], answers=False, most_tokens=20
        )


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_an_instruction_tuned_model_reads_a_users_turn() -> None:
    dataset, plain = patients(), trainer.tiny_language_model()[1]
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    collate = TextCollator(dataset, tokenizer, answers=True)
    text = tokenizer.decode(collate.prompts[3])
    prompt = dataset.prompt(3)
    turns = [{"role": "user", "content": prompt}]
    own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<bos>" + text == own
    cut = TextCollator(dataset, tokenizer, answers=False, most_tokens=110)
    assert cut.shortened > 0
    assert max(map(len, cut.prompts)) <= 110, "the turns count too"
    assert collate.prompts[3].count(end) == 1
    assert collate.bos not in collate.prompts[3]
    assert collate.eos == [1, end]
    assert collate.answers[3][-1] == end
    batch = collate([3])
    asked = batch["input_ids"][0, : int(batch["verdict"][0]) + 1]
    assert tokenizer.decode(asked) == f"{text}{dataset.outcome}: "
    assert TextCollator(dataset, plain, answers=True).before == []


def test_series_of_several_kinds_go_through_stage_3(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "clinical_trajectory": [f"{rng.integers(5, 40)} (0h) -> 9 (4h)" for _ in range(40)],
            "trajectory_ph": [f"7.{rng.integers(1, 5)} (1h)" if k % 3 else "" for k in range(40)],
            "label_escalation": [0, 1] * 20,
        }
    )
    table.to_csv(tmp_path / "data.csv", index=False)
    words = ["--mode", "generative", "--model_name", "tiny", "--epochs", "1", "--log_file", "none"]
    words += ["--data_path", str(tmp_path / "data.csv"), "--output_dir", str(tmp_path / "run")]
    assert trainer.main([*words, "--series_text", "last"]) == 0
    reports = (tmp_path / "run" / "generative" / "generations_test.jsonl").read_text()
    assert reports.count("ph: ") >= 4
