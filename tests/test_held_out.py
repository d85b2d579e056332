"""Held-out patients stay unseen by scales and stage 1; no metric depends on the batches."""

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.training_data import prepare_data
from medgemma_clinical.data.trajectories import PromptOptions
from medgemma_clinical.evaluation.baselines import fit_baselines, tune_baselines
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.hub import shared_copy
from medgemma_clinical.models import language_model
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory
from medgemma_clinical.models.trained_model import check_stage1, load_trained_model
from stages import STAGE_1, TINY, arguments, data_for, make_stage, parsed, stage1_of
from trajectories import GAP, SERIES, table_of
from visits import cohort

NAMED = {"subject_id": [f"patient {k}" for k in range(60)]}
NOTES = {"clinical_context": [f"note {k}" for k in range(60)]}
PARTS = {"split": ["train"] * 80 + ["val"] * 20 + ["test"] * 20}
TABLE = cohort().assign(prediction_hours="9")
TABLE["static_visit"] = TABLE["clinical_context"].str.split().str[-1].astype(int)


def many(**columns):
    """Sixty patients whose series all differ."""
    values = np.random.default_rng(5).uniform(8, 30, size=(60, 3)).round(3)
    return table_of([f"{a} (0h) -> {b} (3h) -> {c} (6h)" for a, b, c in values], **columns)


def drawn(table, seed=0, most=0, max_len=20, description=None):
    options = {"prompts": PromptOptions(), "max_samples": most, "seed": seed}
    return prepare_data(MIMICtrajectoryDataset(table, max_len, description=description), **options)


def stage1_file(folder, data, *flags):
    """Write the file of an untrained stage 1 on some data; return its path."""
    stage = make_stage(arguments(STAGE_1, *flags), data)
    stage.save(folder / "trajectory", stage.config)
    return folder / TRAJECTORY_FILE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The file of a stage 1 of two members on ``TABLE``."""
    return stage1_file(tmp_path_factory.mktemp("stage1"), drawn(TABLE), "--members", "2")


def built(table, *flags):
    """Return the stage 1 that a run with these flags would learn or read."""
    args = arguments(*flags)
    return stage1_of(args, data_for(args, MIMICtrajectoryDataset(table)))


def test_fit_scales__sees_the_training_part_alone():
    split, changed = MIMICtrajectoryDataset(TABLE).split(0), TABLE.copy()
    before = dict(built(TABLE, STAGE_1).named_buffers())
    held_out = np.concatenate([split["val"], split["test"]])
    changed.loc[held_out, SERIES] = "900 (0h) -> -900 (5h)"
    changed.loc[held_out, "static_visit"] = 900
    after = dict(built(changed, STAGE_1).named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed.loc[split["train"][0], SERIES] = "900 (0h)"
    changed.loc[split["train"][0], "static_visit"] = 900
    touched = dict(built(changed, STAGE_1).named_buffers())
    moved = {name for name in before if not torch.equal(before[name], touched[name])}
    for part in ("encoder.scaler.knots", "summary_scaler.knots", "static_scaler.knots"):
        assert any(part in name for name in moved), part


def known_to(few, value, fact):
    """120 patients: ``few`` of the training and the test part, know a series and a fact."""
    values = np.random.default_rng(5).uniform(8, 30, size=(120, 2)).round(3)
    table = table_of([f"{a} (0h) -> {b} (3h)" for a, b in values], **PARTS)
    table["subject_id"] = [f"patient {k}" for k in range(120)]
    table["trajectory_rare"] = [f"{k} (2h)" for k in range(few)] + [""] * (100 - few) + [value] * 20
    table["static_rare"] = [*range(few)] + [np.nan] * (100 - few) + [fact] * 20
    return table


def readings(few):
    """Return all that the models of such patients say of the test part, by what it knows."""
    args, found = arguments(STAGE_1), []
    for known in (("", np.nan), ("6 (2h)", 6.0), ("60 (1h) -> 70 (3h)", 60.0)):
        data = drawn(known_to(few, *known))
        dataset, test = data.dataset, data.split["test"]
        if not found:
            model = stage1_of(args, data).eval()
            train = data.split["train"]
            settings = tune_baselines(dataset, train, data.usable_static)
            baselines = fit_baselines(dataset, train, settings)
        with torch.no_grad():
            states, logits = model.read(dataset.collate(test))
        risks = pd.DataFrame(baselines.risks(dataset, test)).to_numpy()
        prompts = [dataset.prompt(i) for i in test]
        found.append((states[:, -1], logits[0, :, 0], logits[0, :, 1], risks, prompts))
    return zip(*found, strict=True)


@pytest.mark.parametrize("few", [10, 11])
def test_what_few_training_patients_have_changes_nothing_in_any_row(few):
    for without, *others in readings(few):
        for given in others:
            assert np.array_equal(without, given) == (few < 11)


# --------------------------------------------------------------------------- stage 1's patients


@pytest.mark.parametrize(
    ("trained", "table", "sample"),
    [
        (many(), many(), {"seed": 1, "max_len": 2}),  # the same file: by row number
        (many(**NAMED), many(**NAMED).replace("0h", "1h", regex=True).head(50), {"seed": 1}),
        (many(**NAMED), many(**NAMED), {"most": 30}),
        (many(), many().sample(frac=1, random_state=0, ignore_index=True), {}),
        (many(), many(**NAMED), {"seed": 1}),
    ],
)
def test_check_stage1__counts_held_out_patients_that_trained(trained, table, sample, tmp_path):
    first, data = drawn(trained), drawn(table, **sample)
    path = stage1_file(tmp_path, first)
    held_out = np.concatenate([data.split["val"], data.split["test"]])
    last = [
        each.dataset.values[each.dataset.offsets[1:][rows] - 1, 0]
        for each, rows in ((first, first.split["train"]), (data, held_out))
    ]
    leaked = np.isin(last[1], last[0]).sum()
    assert leaked
    with pytest.raises(InputError, match=rf"{TRAJECTORY_FILE}: {leaked} of {len(held_out)} "):
        check_stage1(read_trajectory(path), data, {})


@pytest.mark.parametrize(
    ("trained", "table", "warned"),
    [
        (many(**NAMED), many(**NAMED, **NOTES), False),  # the same split
        (many(), many(**NOTES), False),
        (many(), cohort(60).drop(columns="subject_id"), True),
        (many(**NAMED), cohort(60), False),
    ],
)
def test_check_stage1__warns_of_other_patients_without_names(
    trained, table, warned, tmp_path, caplog
):
    trained, data = (drawn(rows, description=GAP) for rows in (trained, table))
    path = stage1_file(tmp_path, trained)
    caplog.clear()
    check_stage1(read_trajectory(path), data, {})
    assert [str(path) in line for line in caplog.messages] == [True] * warned


def test_check_stage1__takes_a_shared_copy_on_other_data_alone(tmp_path, caplog):
    trained = load_trained_model(stage1_file(tmp_path, drawn(many())), trainer.BUILDERS)
    shared_copy(trained, tmp_path / "shared")
    copy, other = read_trajectory(tmp_path / "shared" / TRAJECTORY_FILE), drawn(many().head(50))
    with pytest.raises(InputError, match=TRAJECTORY_FILE):
        check_stage1(copy, drawn(many()), {})
    caplog.clear()
    check_stage1(copy, other, {})
    assert [str(copy.path) in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("mode", ["classification", "generative"])
def test_main__refuses_a_leak_before_a_language_model_is_loaded(
    mode, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(language_model, "load_language_model", lambda *_, **__: pytest.fail("late"))
    TABLE.to_csv(tmp_path / "data.csv", index=False)
    words = [*TINY, "--mode", mode, "--ode_checkpoint", str(checkpoint), "--seed", "1"]
    words += ["--data_path", str(tmp_path / "data.csv"), "--output_dir", str(tmp_path / "run")]
    assert trainer.main(words) == 2
    error = capsys.readouterr().err.splitlines()
    assert str(checkpoint) in error[-1]
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- its data and flags


@pytest.mark.parametrize("key", ["features", "units", "outcome", "label_column"])
def test_check_stage1__refuses_other_data(key, tmp_path):
    path, data = stage1_file(tmp_path, drawn(many())), drawn(many())
    if key == "label_column":
        data.dataset.read_options = {**data.dataset.read_options, key: "death"}
    else:
        setattr(data.dataset, key, "Death" if key == "outcome" else ("Lactate",))
    with pytest.raises(InputError, match=f"{TRAJECTORY_FILE}: .*{key}"):
        check_stage1(read_trajectory(path), data, {})


@pytest.mark.parametrize(
    ("flag", "same", "other"),
    [
        *(("members", "2", "3"), ("time_scale", "72", "24"), ("dynamics", "ode", "decay")),
        *(("solver", "rk4", "dopri5"), ("prediction_time", "on", "off"), ("facts", "on", "off")),
        ("dropout", str(parsed().dropout), "0.01"),
    ],
)
def test_make_stage1__loads_the_saved_one_frozen_or_refuses_a_flag(flag, same, other, checkpoint):
    words = "--ode_checkpoint", str(checkpoint), f"--{flag}"
    loaded, saved = built(TABLE, *words, same), read_trajectory(checkpoint).weights
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert not any(each.requires_grad for each in loaded.parameters())
    with pytest.raises(InputError, match=f"--{flag}"):
        built(TABLE, *words, other)


def test_make_stage1__takes_the_datas_clock_if_new_and_its_own_if_loaded(checkpoint, tmp_path):
    TABLE.to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "data.json").write_text('{"time_scale": 24}')
    loaded = ["--ode_checkpoint", str(checkpoint)]
    for flags, scale in (([], 24.0), (["--time_scale", "9"], 9.0), (loaded, 72.0)):
        assert built(tmp_path / "data.csv", *flags).encoder.time_scale == scale


@pytest.mark.parametrize("loaded", [False, True])
def test_make_stage1__refuses_a_gap_that_the_encoder_cannot_hold(loaded, checkpoint):
    table = TABLE.copy()
    table.loc[0, [SERIES, "prediction_hours"]] = "20 (0h) -> 21 (900000h)", "900000"
    with pytest.raises(InputError, match="--time_scale"):
        built(table, *(["--ode_checkpoint", str(checkpoint)] if loaded else []))
