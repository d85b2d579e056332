"""Stages as the script wires them: what learns, at which rates, from what; steps; no idle work."""

import numpy as np
import pytest
import torch
from scipy.special import expit

import medgemma_trainer as trainer
from dte_encoder import ClinicalODERNN
from language_models import body_inputs, patients, plain_states
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.training.evaluate import outputs, score_batches
from stages import arguments, stage_of_patients, train_epoch

ONE, TWO, THREE = "--trajectory_only", "--mode classification", "--mode generative"
SERIES = {"series": ["Anion gap"]}
TRAINED = 16  # rows; four validate, four test
ROWS, FACTS = [3, 1, 9], ["static_bmi [kg/m2]", "static_admissions"]


def stage_of(flags=""):
    return stage_of_patients(*flags.split())


def save_stage1(folder, flags=""):
    """Write an untrained stage 1; return it and its file."""
    stage = stage_of(f"{ONE} {flags}")
    stage.save(folder / "trajectory", stage.config)
    return stage, folder / TRAJECTORY_FILE


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    return save_stage1(tmp_path_factory.mktemp("run"), "--members 2")


def test_members_and_seeds_begin_apart_and_the_first_member_is_the_single_run():
    begun = {}
    for seed in (0, 1, 2**32 - 1):
        alone = stage_of(f"{ONE} --seed {seed}").model
        many = stage_of(f"{ONE} --seed {seed} --members 3").model
        for name, tensor in alone.state_dict().items():
            assert torch.equal(many.state_dict()[name], tensor), name
        for member in many.members:
            for name, weight in member.named_parameters():
                begun.setdefault(name, []).append(weight.detach().numpy())
    drawn = {name for name, weights in begun.items() if weights[0].std() > 0}
    assert {"encoder.read.weight", "head.attention.weight", "head.static.1.weight"} <= drawn
    assert all(len({weight.tobytes() for weight in begun[name]}) == 9 for name in drawn)
    one, two = (stage_of(f"{TWO} --seed {seed}").model.state_dict() for seed in (0, 1))
    for part in ("lora_A", "projection.linear"):
        added = [name for name in one if part in name and "weight" in name]
        assert added
        assert not any(torch.equal(one[name], two[name]) for name in added)


def test_a_new_stage_2_predicts_what_stage_1_does(stage1):
    one, file = stage1
    stage = stage_of(f"{TWO} --ode_checkpoint {file}")
    expected = score_batches(one.model, one.batches["test"], one.collate)
    found = score_batches(stage.model, stage.batches["test"], stage.collate)
    np.testing.assert_allclose(found.outputs, expected.outputs, atol=1e-6)
    (risk,) = stage.stage1_risks.values()
    np.testing.assert_allclose(risk[found.rows], expit(expected.outputs[:, 0]), atol=1e-6)
    assert np.std(expected.outputs) > 0
    scored = outputs(stage.model, stage.batches["test"], stage.collate)
    assert not any(output.logit.requires_grad for _, output in scored)


def part_of(name):
    """Return the part of a parameter: of a member, whose number and encoder or head."""
    words = name.removeprefix("stage1.").split(".")
    return ".".join(words[: 3 if words[0] == "members" else 1])


PAIR = "--members 2 --encoder_lr 0.5"
MEMBERS = {f"members.{k}.{part}": 0.5 for k in (0, 1) for part in ("encoder", "head")}
HEADS = {name: rate for name, rate in MEMBERS.items() if "head" in name}
ADDED = {"projection": 1e-3, "llm": 2e-4}


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (f"{ONE} {PAIR}", MEMBERS),
        (f"{ONE} {PAIR} --freeze_ode", HEADS),
        (f"{PAIR} --adapter_lr 0.3", {**MEMBERS, **ADDED, "llm": 0.3, "head": 1e-3}),
        (f"{PAIR} --freeze_ode --head_lr 0.2", {**HEADS, **ADDED, "head": 0.2}),
        (f"{THREE} {PAIR} --projection_lr 0.4", {**MEMBERS, **ADDED, "projection": 0.4}),
        (f"{THREE} --ode_checkpoint FILE", ADDED),
        (f"{THREE} --soft_prompt off", {"llm": 2e-4}),
    ],
)
def test_a_stage_trains_its_parts_at_the_rates_of_their_flags(flags, rates, stage1):
    stage = stage_of(flags.replace("FILE", str(stage1[1])))
    names = {p: part_of(name) for name, p in stage.model.named_parameters()}
    grouped = [(p, group["lr"]) for group in stage.parameter_groups() for p in group["params"]]
    assert {(names[p], rate) for p, rate in grouped} == {*rates.items()}
    assert sorted(id(p) for p, _ in grouped) == sorted(id(p) for p in names if p.requires_grad)
    members = zip(stage.trainable_parameters().values(), stage.members(), strict=True)
    for parameter, member in members:  # a language model learns as one
        assert (f"members.{member}." in names[parameter]) if ONE in flags else member == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "facts", "time"),
    [
        ("", FACTS, True),
        ("--facts off", [], True),
        ("--prediction_time off --solver bosh3 --dropout 0.1", FACTS, False),
    ],
)
def test_stage_1_decides_what_stage_2_reads(flags, facts, time, tmp_path):
    one, file = save_stage1(tmp_path, flags)
    for more in ("", flags):
        stage = stage_of(f"--ode_checkpoint {file} {more}")
        for key in ("inputs", "encoder"):
            assert stage.config[key] == one.config[key]
    assert one.config["inputs"] == {"static": facts, "prediction_time": time, **SERIES}
    assert one.config["encoder"]["solver"] == ("bosh3" if "bosh3" in flags else "rk4")
    batch = stage.collate([13, 15])
    assert batch["static"].shape == (2, len(facts))
    assert torch.equal(batch["prediction_hours"], batch["times"].amax(dim=1)) != time


def decoder_inputs(stage):
    """Return text ids, embeddings and mask of some rows, as they reach the decoder."""
    batch = stage.collate(ROWS)
    with body_inputs(stage.model.eval()) as seen:
        stage.model(batch)
    return batch["input_ids"], seen[0]["inputs_embeds"], seen[0]["attention_mask"].bool()


def states_of(stage, rows):
    """Return how many states each row of stage 1's could show a language model."""
    batch = stage.collate(rows)
    return [len(plain_states(stage.model.stage1, batch, row)) for row in range(len(rows))]


@pytest.mark.slow
def test_the_number_of_soft_tokens_changes_nothing_but_their_number():
    whole = stage_of()
    (ids, eight, mask), states = decoder_inputs(whole), states_of(whole, ROWS)
    assert min(states) < 8 < max(states)
    for number, flags in ((0, "--soft_prompt off"), (3, "--num_prefix_tokens 3")):
        stage = stage_of(flags)
        same, few, few_mask = decoder_inputs(stage)
        assert torch.equal(ids, same)
        for row, n in enumerate(states):
            long, short = eight[row, mask[row]], few[row, few_mask[row]]
            dropped = min(8, n) - min(number, n)
            assert len(long) == len(short) + dropped
            torch.testing.assert_close(torch.cat([long[:1], long[1 + dropped :]]), short)
        read = {"stage1", "projection"} if number else set()
        parts = {name for name, _ in stage.model.named_children()}
        assert parts == {*stage.learning_rates} == {"llm", "head"} | read
        if not number:  # else a file that lacks facts would be refused for nothing
            assert stage.config["encoder"] is None
            assert stage.config["inputs"] == {"static": [], "prediction_time": False, **SERIES}
    most = stage_of("--num_prefix_tokens 4096")
    assert most.model.tokens == max(states_of(most, range(len(patients()))))


def test_soft_tokens_and_stage_1s_logit_go_one_without_the_other(stage1):
    first, file = stage1
    stage = stage_of(f"--soft_prompt off --ode_checkpoint {file}")
    text = decoder_inputs(stage_of("--soft_prompt off"))
    assert all(map(torch.equal, text, decoder_inputs(stage)))
    expected = first.model.eval()(first.collate(ROWS)).logit
    torch.testing.assert_close(stage.model(stage.collate(ROWS)).logit, expected)
    assert (stage.config["num_prefix_tokens"], stage.config["stage1_logit"]) == (0, True)
    whole = stage_of(f"--stage1_logit off --ode_checkpoint {file}")
    assert (whole.config["num_prefix_tokens"], whole.config["stage1_logit"]) == (8, False)
    logit = whole.model(whole.collate(ROWS)).logit
    torch.testing.assert_close(logit, logit[:1].expand(len(ROWS)))


@pytest.mark.parametrize(("way", "shuffled"), [("on", False), ("shuffled", True)])
def test_a_control_reads_the_states_of_other_patients_and_says_so(way, shuffled, stage1):
    stage = stage_of(f"--ode_checkpoint {stage1[1]} --soft_prompt {way}")
    assert stage.config["shuffled"] == shuffled == (stage.collate.donors is not None)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (TWO, PromptOptions("all", context=True, computed=False)),
        (f"{THREE} --series_text last", PromptOptions("last", context=True, computed=True)),
        (f"{TWO} --text_context none", PromptOptions("all", context=False, computed=False)),
        (f"{ONE} {THREE}", PromptOptions("all", context=True, computed=False)),
    ],
)
def test_a_stage_that_writes_reads_answers_and_what_it_would_have_to_compute(flags, options):
    assert trainer.run_folder.prompt_options(arguments(*flags.split())) == options
    stage, writes = stage_of(flags), options.computed
    if stage.text:
        assert stage.text.options == options
        batch = stage.collate(ROWS)
        assert bool((batch["verdict"] + 1 == batch["text_mask"].sum(1)).all()) != writes


def test_a_frozen_encoder_encodes_each_row_once_and_one_that_learns_each_batch_anew(
    tmp_path, monkeypatch
):
    one, file = save_stage1(tmp_path, "--dropout 0.4")
    logit = one.model.eval()(one.collate(ROWS)).logit
    rows, run = [], ClinicalODERNN.run

    def counted(encoder, plan):
        rows.append(plan.shape[0])
        return run(encoder, plan)

    monkeypatch.setattr(ClinicalODERNN, "run", counted)
    frozen = stage_of(f"--ode_checkpoint {file}")
    learns = stage_of(f"{THREE} --encoder_lr 0.1 --batch_size 4 --dropout 0.4")
    assert rows == [len(patients())]
    for stage, dropped in ((frozen, False), (learns, True)):
        again = [stage.model.train().trajectory(stage.collate(ROWS)).outputs for _ in range(2)]
        assert torch.equal(*again) != dropped
        assert torch.allclose(again[0][:, 0], logit) != dropped
    before = learns.model.eval().trajectory(learns.collate([0, 1]))
    rows.clear()
    for stage, expected in ((frozen, 0), (learns, TRAINED + 4)):
        state = trainer.set_up(stage)
        train_epoch(stage, state, seed=0)
        trainer.validate(stage, state)
        assert sum(rows) == expected
    after = learns.model.eval().trajectory(learns.collate([0, 1]))
    assert not torch.allclose(before.states, after.states)
    assert not torch.allclose(before.outputs, after.outputs)


def test_an_epoch_sends_no_position_through_the_layers_that_no_row_needs():
    stage = stage_of(f"{THREE} --batch_size 4")
    text = stage.collate(range(len(patients())))["text_mask"].sum(1)
    soft = torch.tensor(states_of(stage, range(len(patients())))).clamp(max=stage.model.tokens)
    assert stage.lengths.tolist() == (1 + soft + text).tolist()
    with body_inputs(stage.model) as seen:
        train_epoch(stage, trainer.set_up(stage), seed=3)
    stage.batches["train"].set_epoch(3, 1)
    expected = [(4, stage.lengths[rows].max()) for rows in stage.batches["train"]]
    assert [tuple(call["inputs_embeds"].shape[:2]) for call in seen] == expected
