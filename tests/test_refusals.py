"""Every way in, given something wrong: code 2, one line that names the place, and nothing else.

The line shows no cell of a patient; no file is written, moved or changed.
"""

import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pandas as pd
import pytest

import dataset_format
import medgemma_trainer as trainer
import srtr_dataset
from conftest import SAMPLE
from dataset_format import MIMICtrajectoryDataset
from language_models import TINY_MODEL, rehash
from medgemma_clinical.commands import demo, predictions
from medgemma_clinical.commands.command_line import build_parser
from medgemma_clinical.commands.predict import FLAGS
from medgemma_clinical.evaluation.target import LABEL as TARGET
from medgemma_clinical.files import write_json
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_trainer import TrajectoryModel
from mimic_files import Mini
from predicting import MARKER, SERIES, write_data
from srtr_files import filler, write_folder
from stages import arguments, data_for, make_stage
from trajectories import LABEL

ENCODER, BMI = f"run/{TRAJECTORY_FILE}", "static_bmi [kg/m2]"
BAD_CHECKPOINTS = {
    "cut": {},
    "base": {"base_model": "no/such_model", "base_sha256": None},
    "kind": {"dataset": "sepsis"},
    "shuffled": {"shuffled": True},
    "random": {"base_weights": "random"},
}
BAD_RISKS = {"nan": "nan", "text": "much", "high": 7.0, "low": -0.1}
BAD_TABLES = {
    **{name: {"probability": each} for name, each in BAD_RISKS.items()},
    **{"turned": {"label": [1, 0] * 10}, "half": {"label": 0.5}, "ids": {"id": "0"}},
}


def of_python(call):
    """Return a function of Python in the manner of a ``main``."""

    def main(words):
        try:
            call(*words)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        return 0

    return main


PROGRAMS = {
    "trainer": trainer.main,
    "dataset": dataset_format.main,
    "srtr": srtr_dataset.main,
    "fit": of_python(trainer.fit_trajectory),
    "read": of_python(MIMICtrajectoryDataset),
    "score": of_python(lambda rows: TrajectoryModel.from_pretrained(ENCODER).predict_proba(rows)),
    "load": of_python(TrajectoryModel.from_pretrained),
}


# --------------------------------------------------------------------------- the world


def patients(rows=40):
    """Return patients whose ids, contexts and outcome no message may show."""
    table = pd.read_csv(SAMPLE, nrows=rows, dtype=str).drop(columns="static_weight [kg]")
    table["subject_id"] = [f"{MARKER}p{k // 2}" for k in range(rows)]
    table["id"] = [f"{MARKER}{k}" for k in range(rows)]
    table["clinical_context"] = f"54-year-old {MARKER}"
    return table.assign(
        **{LABEL: [k // 2 % 2 for k in range(rows)], BMI: [20 + k // 2 for k in range(rows)]}
    )


def cell(column, content):
    """Return what puts a content into line 7 of a file."""
    return lambda table: table[column].mask(table.index == 5, content)


BAD_CELLS = {
    "series": ({SERIES: cell(SERIES, f"24 (0h) -> {MARKER} (2h)")}, f"row 7, column {SERIES}"),
    "hours": ({SERIES: cell(SERIES, f"24 ({MARKER}h)")}, f"row 7, column {SERIES}"),
    "large": ({SERIES: cell(SERIES, "1e99 (0h)")}, f"row 7, column {SERIES}"),
    "patient": ({"subject_id": cell("subject_id", "")}, "row 7, column subject_id"),
    "static": ({BMI: cell(BMI, MARKER)}, f"row 7, column {BMI}"),
}
BAD_LABELS = {
    "label": ({LABEL: cell(LABEL, MARKER)}, f"row 7, column {LABEL}"),
    "unlabelled": ({LABEL: ""}, LABEL),
}
BAD_FILES = {
    "binary": (b"\x89PNG\r\n\x1a\n\0\0", ""),
    "empty": (b"", ""),
    "no_row": (f"{SERIES},{LABEL}\n".encode(), ""),
    "no_series": (f"id,{LABEL}\n{MARKER},1\n".encode(), SERIES),
    "doubled": (f"{SERIES},{SERIES},{LABEL}\n1 (0h),1 (0h),1\n".encode(), SERIES),
    "torn": (f'{SERIES},{LABEL}\n"24 (0h)",1\n"{MARKER}'.encode(), ""),
    "cut.csv.gz": (b"\x1f\x8b\x08\0\0", ""),
    "long": (
        f"Patient,Collected,Analyte,Result\n{MARKER},2024-01-20,x,{MARKER}\n".encode(),
        "from_long, --preview",
    ),
}
BAD_DESCRIPTIONS = {"deep": '{"series": ' + "[" * 100_000, "unknown": '{"no_such_key": 1}'}


def make_stages(folder):
    """Save stages that nobody trained: of DKA, of SRTR, and the later two of ``tiny``."""
    (folder / "tiny").symlink_to(TINY_MODEL)
    data = ["--data_path", str(folder / "data.csv"), "--model_name", TINY_MODEL]
    srtr = ["--trajectory_only", "--dataset", "srtr", "--data_dir", str(folder / "srtr")]
    flags = {"run": ["--trajectory_only", *data], "other": ["--trajectory_only", *data]}
    flags |= {"liver": [*srtr, "--organ", "liver", "--landmark_days", "90"]}
    for name, words in flags.items():
        place = folder / name / "trajectory"
        place.mkdir(parents=True)
        stage = make_stage(args := arguments(*words), data_for(args))
        stage.save(place, stage.config)
    for mode in ("classification", "generative"):
        args = arguments(*data, "--mode", mode, "--ode_checkpoint", str(folder / ENCODER))
        stage = make_stage(args, data_for(args))
        (folder / "run" / mode).mkdir()
        stage.save(folder / "run" / mode, stage.config)
        write_json(folder / "run" / mode / "run.json", {"arguments": {"model_name": TINY_MODEL}})


def make_predictions(folder):
    """Write test predictions of two runs that can be compared, and of others that cannot."""
    rows = pd.DataFrame({"id": range(20), "patient": range(20), "label": [0, 1] * 10})
    rows["id"] = MARKER + rows["id"].astype(str)
    other = rows.assign(probability=[0.1, 0.8, 0.7, 0.6] * 5)
    tables = {"run": rows.assign(probability=[0.2, 0.9, 0.4, 0.3] * 5), "other": other}
    tables |= {f"bad/{name}": other.assign(**change) for name, change in BAD_TABLES.items()}
    tables |= {"bad/column": rows, "bad/fewer": other.head(8), "bad/old": other}
    for name, table in tables.items():
        place = folder / name / "trajectory"
        place.mkdir(parents=True, exist_ok=True)
        table.to_csv(place / "predictions_test.csv", index=False)
        about = {} if name == "bad/old" else {"targets": [TARGET.to_json()]}
        write_json(place / "metrics.json", about)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "predictions_test.csv")
    shutil.copy(folder / "run" / "trajectory" / "metrics.json", folder / "pipe")


def make_world(folder):
    """Fill a folder with small data of every kind, good and bad, and with results of runs."""
    table = patients()
    write_data(table, folder / "data.csv")
    for name, (changes, _) in {**BAD_CELLS, **BAD_LABELS}.items():
        write_data(table.assign(**changes), folder / f"{name}.csv")
    for name, (content, _) in BAD_FILES.items():
        (folder / (name if "." in name else f"{name}.csv")).write_bytes(content)
    for name, text in BAD_DESCRIPTIONS.items():
        write_data(table, folder / f"{name}.csv").with_suffix(".json").write_text(text)
    write_data(table.drop(columns=LABEL), folder / "new.csv")
    write_data(table, folder / "unit.csv", unit="mg/dL")
    write_data(table.assign(trajectory_ph="7.4 (0h)"), folder / "second.csv")
    split = ["train"] * 28 + ["val"] * 6 + ["test"] * 6
    ph = ["" if 10 <= k < 28 else "7.4 (0h)" for k in range(40)]
    write_data(table.assign(split=split, trajectory_ph=ph), folder / "few.csv")
    write_data(table.drop(columns=BMI), folder / "bare.csv")
    people = f"Patient,Admitted,Died,Ward\n{MARKER},2024-01-21,{MARKER},{MARKER}\n"
    (folder / "people.csv").write_text(people)
    table.to_csv(folder / "bare_gap.csv", index=False)
    table.rename(columns={SERIES: "trajectory_ph"}).to_csv(folder / "ph.csv", index=False)
    (folder / "folder").mkdir()
    (folder / "broken" / "best").mkdir(parents=True)
    (folder / "broken" / "best" / "config.json").write_text("[]")
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 junk")
    write_folder(folder / "srtr", *filler("liver"), "liver")
    mimic = Mini().admit(1).settling(1).admit(2, age=10).write(folder / "mimic")
    shutil.copytree(mimic, folder / "torn_mimic")
    with (folder / "torn_mimic" / "hosp" / "labevents.csv").open("a") as file:
        file.write('"' + f"{MARKER},1\n" * 10_000)  # DuckDB leaves out in silence all behind it
    make_stages(folder)
    make_predictions(folder)
    for name, changes in BAD_CHECKPOINTS.items():
        shutil.copytree(folder / "run" / "classification", folder / "checkpoints" / name)
        rehash(folder / "checkpoints" / name / "best", **changes)
    cut = folder / "checkpoints" / "cut" / "best" / "modules.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def world(made, monkeypatch):
    """Work in the one world, which no refusal changes."""
    monkeypatch.chdir(made)


def listing():
    """Return each file below, but locks, with its size and its last change; and each folder."""
    facts = {path: path.lstat() for path in Path().rglob("*") if path.suffix != ".lock"}
    files = {path: (each.st_size, each.st_mtime_ns) for path, each in facts.items()}
    return {path: each if path.is_file() else None for path, each in files.items()}


# --------------------------------------------------------------------------- the contract


def assert_refused(capsys, program, words, *places):
    before = listing()
    capsys.readouterr()
    try:
        code = PROGRAMS[program](words)
    except SystemExit as stop:  # the parser
        code = stop.code
    out, error = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", error)
    assert [place for place in places if place not in error] == [], error
    assert not re.search(f"{MARKER}|Traceback", out + error)
    assert listing() == before


READING = {
    "check": "dataset check {}",
    "stage 1": "trainer --trajectory_only --data_path {}",
    "stage 2": "trainer --model_name tiny --data_path {}",
    "dry run": "trainer --trajectory_only --dry_run --data_path {}",
    "seeds": "trainer --trajectory_only --seeds 2 --data_path {}",
    "ablation": "trainer --ablation --model_name tiny --data_path {}",
    "fit": "fit {}",
    "read": "read {}",
}
SCORING = {
    "predict": "trainer predict --checkpoint run/trajectory --predictions out.csv --data_path {}",
    "score": "score {}",
}
STRICT = {**SCORING, "predict": f"{SCORING['predict']} --strict"}


def bad_files():
    """Yield each command that reads a file, with each bad file and what its line must name."""
    whole = {**{name: place for name, (_, place) in BAD_FILES.items()}, "missing": ""}
    whole |= dict.fromkeys(BAD_DESCRIPTIONS, "")
    cells, labels = ({k: place for k, (_, place) in t.items()} for t in (BAD_CELLS, BAD_LABELS))
    for commands, bad in (
        (READING, whole | cells | labels),
        (SCORING, {**whole, "unit": "", "bare": BMI}),
        (STRICT, cells),
    ):
        for entry, command in commands.items():
            for name, place in bad.items():
                if (entry, name) != ("check", "unlabelled"):  # can be predicted on
                    yield pytest.param(command, name, place, id=f"{entry}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name", "place"), list(bad_files()))
def test_a_bad_file_is_named_with_row_and_column(command, name, place, world, capsys):
    program, *words = command.format(name if "." in name else f"{name}.csv").split()
    assert_refused(capsys, program, words, name, *place.split(", "))


LONG = "dataset from_long --table long.csv --labels people.csv --out made.csv {}"
NO_LABELS = "--no_labels --prediction_time Admitted"
TRAIN = "trainer --trajectory_only --data_path data.csv"
PREDICT = "trainer predict --checkpoint {} --data_path new.csv --predictions out.csv"
STAGE_2 = f"trainer --model_name tiny --ode_checkpoint {ENCODER}"
OUT = "trainer predict --checkpoint run/trajectory --data_path new.csv --predictions {}"
LIVER = "trainer predict --checkpoint liver/trajectory --predictions out.csv {}"
KIND = "trainer predict --checkpoint run/trajectory --predictions out.csv {}"
EXPORT = "trainer export merged --checkpoint {} --out {}"
COMPARE = "trainer compare run/trajectory {}"
FINAL = "trainer --model_name tiny --data_path data.csv --folds 2 --final --ode_checkpoint {}/"
FINAL += f"folds_trajectory/fold_{{{{fold}}}}/{TRAJECTORY_FILE}"
MIMIC = "dataset from_mimic --mimic_dir mimic --cohort all --compute_gap reported --out made.csv {}"
SRTR = "srtr check --data_dir srtr --organ liver {}"
NEW = "predict --checkpoint x --predictions y.csv --data_path z.csv"
LANGUAGE_MODEL = (
    *("--lora_rank 4", "--quantization none", "--mode generative", "--soft_prompt off"),
    *("--ode_checkpoint x.pt", "--stage1_logit off", "--model_name tiny", "--epochs 2"),
)
CONTRADICTIONS = [
    ("--ablation --seeds 2 --dry_run", "--dry_run --ablation --seeds"),
    *((f"{way} --resume", "--resume") for way in ("demo", "--dry_run")),
    ("compare a b --model_name c", "--model_name"),
    ("demo --model_name=foo --epochs 1", "--model_name"),
    (f"{NEW} --solver rk4", "--solver"),
    (f"{NEW} --patients 1", "--explain --patients"),
    ("predict", "--checkpoint"),
    ("predict --checkpoint x --data_dir y", "--predictions"),
    *((f"--{verb}", f"--{verb} {verb}") for verb in ("predict", "monitor", "pool", "export")),
    ("--trajectory_only --compare a b", "--compare compare"),
    ("predct", "predct predict"),
    ("--use best", "--use"),
    ("demo --primary blend", "--primary"),
    ("pool a.json b.json", "--output_dir"),
    ("pool a.json b.json --output_dir x --min_cell 0", "--min_cell"),
    ("export merged --checkpoint x", "--out"),
    ("export --checkpoint x --out y", "KIND"),
    ("export merged --checkpoint x --out y --data_path z", "--data_path"),
    ("--ablation --mode generative", "--ablation --mode"),
    ("--ablation --seeds 2 --freeze_ode", "--ablation --freeze_ode"),
    ("--ablation --series_text none", "--ablation --series_text"),
    ("--seeds 2 --ode_checkpoint stage1.pt", "{seed}"),
    ("--leave_out ward --seeds 2", "--leave_out --seeds"),
    ("--folds 3 --seeds 1", "--folds --seeds"),
    ("--folds 3 --seeds 2 --ode_checkpoint fold_{fold}.pt", "{repeat} fold_{fold}"),
    ("--leave_out ward --folds 3", "--leave_out --folds"),
    ("--final", "--final --folds --leave_out"),
    ("--folds 3 --ode_checkpoint stage1.pt", "{fold}"),
    *(
        (f"--folds 3 --final --model_name tiny --ode_checkpoint {path}", f"--final {path}")
        for path in ("enc_{fold}.pt", "runs/enc_{fold}.pt", "fold_{fold}/x.pt")
    ),
    *((f"--trajectory_only {flag}", flag.split()[0]) for flag in LANGUAGE_MODEL),
    ("--soft_prompt off --members 2", "--ode_checkpoint --members"),
    ("--stage1_logit off", "--stage1_logit --ode_checkpoint"),
    ("--soft_prompt shuffled", "--soft_prompt --ode_checkpoint"),
    ("--soft_prompt off --stage1_logit off --ode_checkpoint x", "--soft_prompt --stage1_logit"),
    ("--model_name demo --quantization nf4", "--quantization"),
    ("--trajectory_only --data_dir X --data_path data.csv", "--data_dir"),
    ("--trajectory_only --dataset srtr --data_path X --data_dir srtr", "--data_path"),
    ("--trajectory_only", "dka_training_data.csv --data_path"),
    ("--trajectory_only --log_file missing/own.log", "--log_file"),
]

VALUES = [
    *("--epochs 0", "--batch_size 1.5", "--time_scale 0", "--time_scale inf", "--encoder_lr 0"),
    *("--lora_dropout 1", "--seed 5000000000", "--epochs " + "9" * 400, "--dataset mimic"),
    *("--solver euler", "--precision fp16", "--quantization int8"),
    *("--dropout 1", "--folds 1", "--traj", "--no_such_flag"),  # abbreviations are not accepted
]
OF_MIMIC = [
    *("--item 5", "--window_hours 0", "--window_hours nan", "--horizon_hours -1"),
    *("--horizon_hours 2e6", "--min_observations 0", "--max_note_words 0", "--threads -1"),
    *("--memory_limit much", "--memory_limit 2", "--series gap", "--series pH,ph"),
    *("--series all,pH", "--item 50882 --series pH", "--outcome sepsis", "--cohort none"),
    *("--outcome escalation,death", "--outcome ,", "--compute_gap missing", "--out out.txt"),
    "--windows 3",
]
OF_LONG = [
    ("", "people.csv prediction_time=? label=?"),
    ("--table missing.csv", "missing.csv"),
    ("--columns Result", "--columns Result"),
    ("--columns label=Died --prediction_time Admitted", "people.csv Died"),
    (f"{NO_LABELS}", "long.csv Result --bad_values"),
    (f"{NO_LABELS} --static ward=Wards", "people.csv --static ward=Wards"),
    (f"{NO_LABELS} --time_format %Q", "--time_format"),
    ("--below_limit none", "--below_limit"),
    ("--like data.csv", "--like data.csv"),
    ("--like missing.csv", "--like missing.csv"),
]
OF_SRTR = [
    *(("--landmark_days", text) for text in ("-1", "9" * 30)),
    *(("--horizon_days", text) for text in ("0", "nan", "", "\x1b[31m", "two\nlines")),
    *(("--organ", "heart"), ("--transplant", "x" * 200)),
]
NAMED = "--series_name Creatinine --unit mg/dL"
UNNAMED = ("--unit x", "--series_name= --unit x")  # the unit of no name
FIRST_STEPS = [  # a slip, and what leads on
    ("trainer", "", "dka_training_data.csv --data_path demo"),
    ("dataset", "", "check from_long"),
    ("srtr", "", "check"),
    ("trainer", "--trajectory-only --data_path data.csv", "--trajectory-only --trajectory_only"),
    ("trainer", "--data-path=data.csv", "--data-path --data_path"),
    ("dataset", "check data.csv --allow_duplicate", "--allow_duplicate --allow_duplicates"),
    ("trainer", "--trajectory_only --data_path new.csv", f"{LABEL} predict"),
    ("trainer", "--data_path data.csv --model_name no/model", "no/model licence login demo"),
]
CASES = [
    *((f"trainer {words}", words.split()[0]) for words in VALUES),
    *((f"trainer {words}", places) for words, places in CONTRADICTIONS),
    *((MIMIC.format(words), words.split()[0].removeprefix("--")) for words in OF_MIMIC),
    (MIMIC.format("--mimic_dir torn_mimic"), "labevents.csv"),
    (MIMIC.format("--mimic_dir folder"), "folder"),
    (MIMIC.format("--out deep.csv"), "deep"),  # beside a description of somebody else
    ("dataset from_eicu --eicu_dir folder --out made.csv", "folder"),
    ("dataset from_meds --meds_dir folder --out made.csv", "--labels"),
    ("dataset from_meds --meds_dir folder --list_codes", "folder"),
    *((LONG.format(words), places) for words, places in OF_LONG),
    *(((*SRTR.format("").split(), *pair), pair[0]) for pair in OF_SRTR),
    ("srtr check --data_dir missing", "missing"),
    *((f"{words[0]} {words[1]}", words[2]) for words in FIRST_STEPS),
    ("srtr check --data_dir folder", "folder"),
    ("trainer --trajectory_only --dataset srtr --data_dir folder", "folder"),
    ("dataset check data.csv --series lactate", "--series"),
    *((f"dataset check bare_gap.csv {words}", re.split("[= ]", words)[0]) for words in UNNAMED),
    *(
        (f"{TRAIN} {words}", re.split("[= ]", words)[0])
        for words in (*UNNAMED, NAMED, "--outcome AKI")
    ),
    ("dataset check ph.csv --series_name x --unit y", "ph.csv --series_name"),
    (f"trainer --trajectory_only --dataset srtr --data_dir srtr {NAMED}", "--series_name"),
    ("dataset check data.csv --max_len 0", "--max_len"),
    (f"{TRAIN} --series lactate", "--series"),
    (f"{TRAIN} --label_column label_death", "label_death"),
    (f"{TRAIN} --output_dir data.csv", "--output_dir"),
    (f"{TRAIN} --log_file data.csv", "--log_file data.csv"),
    (f"{TRAIN} --log_file folder", "--log_file folder"),
    (f"{TRAIN} --log_file {os.devnull}", os.devnull),
    (f"{TRAIN} --log_file empty.csv", "--log_file"),
    (f"{TRAIN} --log_file pipe/predictions_test.csv", "--log_file"),
    ("trainer --trajectory_only --data_path pipe/predictions_test.csv", "pipe"),
    (f"{TRAIN} --resume", "--resume"),
    ("trainer --data_path data.csv --model_name folder", "folder"),
    ("trainer --data_path data.csv --model_name no/such_model", "--model_name"),
    ("trainer --data_path data.csv --model_name tiny --ode_checkpoint broken.pt", "broken.pt"),
    ("trainer --data_path data.csv --model_name tiny --ode_checkpoint none.pt", "none.pt"),
    (f"{STAGE_2} --data_path unit.csv", f"{ENCODER} units"),
    (f"{STAGE_2} --data_path second.csv", f"{ENCODER} features"),
    (f"{STAGE_2} --data_path data.csv --seed 3 --max_len 3", ENCODER),  # another split
    ("trainer --trajectory_only --data_path few.csv --series ph", "ph"),
    ("trainer --trajectory_only --dataset srtr --data_dir srtr --series GFR", "--series"),
    ("trainer --data_path data.csv --model_name tiny --ablation=nothing", "nothing"),
    *((PREDICT.format(f"checkpoints/{name}"), name) for name in ("cut", "shuffled", "random")),
    (PREDICT.format("checkpoints/base"), "--model_name"),
    (PREDICT.format("checkpoints/kind"), "sepsis"),
    *((PREDICT.format(each), each) for each in ("missing", "broken", "broken.pt", "folder")),
    (f"{PREDICT.format('run/trajectory')} --use ensemble", "--use ensemble"),
    *((f"load {each}", each) for each in ("missing", "broken", "broken.pt", "folder")),
    *((f"load checkpoints/{each}", each) for each in ("cut", "shuffled", "random")),
    *((OUT.format(each), "--predictions") for each in ("new.csv", "folder", "missing/out.csv")),
    (LIVER.format("--data_dir srtr --organ kidney"), "--organ kidney"),
    (LIVER.format("--data_dir srtr --dataset dka"), "--dataset dka"),
    (LIVER.format("--data_path new.csv"), "--data_dir"),
    (KIND.format("--data_path new.csv --organ liver"), "--organ liver"),
    (KIND.format("--data_path new.csv --data_dir srtr"), "--data_path"),
    (KIND.format("--data_dir srtr"), "--data_path"),
    (KIND.format("--data_path new.csv --site ward"), "new.csv ward"),
    (KIND.format("--data_path data.csv --update broken"), "broken"),
    *((f"{TRAIN} {flag} ward", "data.csv ward") for flag in ("--site", "--leave_out")),
    (f"{TRAIN} --folds 20", "data.csv --folds"),
    (f"{TRAIN} --primary best", "--primary best"),
    *(
        (f"{PREDICT.format('run/trajectory')} --primary {name}", f"--primary {name}")
        for name in ("best", "ensemble")
    ),
    (FINAL.format("run"), f"{ENCODER} --final"),  # of a part of the patients
    (FINAL.format("missing"), f"missing/{TRAJECTORY_FILE}"),
    ("trainer --trajectory_only --dataset srtr --data_dir srtr --leave_out ward", "--leave_out"),
    (LIVER.format("--data_dir srtr --site ward"), "--site ward"),
    *((EXPORT.format(each, "made"), each) for each in ("missing", "broken", "checkpoints/cut")),
    *((EXPORT.format(each, "made"), each) for each in (ENCODER, "run/trajectory")),
    *((EXPORT.format(f"checkpoints/{each}", "made"), each) for each in ("shuffled", "random")),
    *(
        (EXPORT.format("run/generative", each), f"--out {each}")
        for each in ("broken", "data.csv", "run/generative", "missing/made", "data.csv/made")
    ),
    *((COMPARE.format(each), "compare") for each in ("", "run/trajectory")),
    *((COMPARE.format(each), each) for each in ("missing", "pipe")),
    *(
        (COMPARE.format(f"bad/{each}/trajectory"), each)
        for each in (*BAD_TABLES, "column", "fewer", "old")
    ),
]


@pytest.mark.parametrize(("command", "places"), CASES, ids=str)
def test_what_is_wrong_is_named(command, places, world, capsys):
    words = command.split() if isinstance(command, str) else command
    assert_refused(capsys, words[0], words[1:], *places.split())


# --------------------------------------------------------------------------- random command lines

EXAMPLES = 60
PATHS = ["data.csv", "new.csv", "label.csv", "empty.csv", "missing.csv", "srtr", "run", "folder"]
PATHS += ["run/trajectory", "other/trajectory", "broken/best", "broken.pt", ENCODER, ".", ".."]
PATHS += ["out.csv", "missing/out.csv"]
PATHS += ["data.csv/x", "{seed}.pt", "\u4e2d.csv", "none", "", "two\nlines.csv", "x" * 300]
NUMBERS = ["1", "2", "3", "8", "16", "30", "200", "0", "0.5", "1e-3", " 4 ", "1_0", "72.0"]
ODD = ["-1", "nan", "inf", "1e400", "1e-400", "0x10", "\uff11", "1,5", "9" * 5000, "1\n", "--", "-"]
ODD += ["", "--no_such_flag", "a b", "--help", "%s", "{seed}", "\x1b[31m", "a\nb"]
TEXTS = {
    "model_name": ["tiny"] * 6 + ["google/medgemma-4b-pt", "folder", "no such", "a\nb", "a/b/c"],
    "log_file": ["none", "none", "auto", "own.log", "missing/own.log", "folder"],
    "series": ["urea", "anion gap", "Urea,anion_gap", "urea,urea", ",", "a\nb", "\u2028"],
}
STAGE_1 = "--trajectory_only --data_path data.csv"
BEGINNINGS = [
    *[""] * 10,
    *[STAGE_1] * 9,
    f"{STAGE_1} --dry_run",
    "--trajectory_only --dataset srtr --organ liver --data_dir srtr",
    f"{STAGE_1} --seeds 2",
    "--model_name tiny --mode generative --data_path data.csv",
    "--model_name tiny --dry_run --soft_prompt off --data_path data.csv",
    f"--model_name tiny --ode_checkpoint {ENCODER} --data_path data.csv",
    "--model_name tiny --ablation --data_path data.csv",
    "demo",
    *["compare run/trajectory other/trajectory"] * 2,
    *["predict --checkpoint run/trajectory --data_path new.csv --predictions out.csv"] * 2,
    "export merged --checkpoint run/trajectory --out served",
]
"""What leads to each of the program's ways; chance adds the rest of a command."""


class StartedError(BaseException):
    """The command would now begin to learn or to score."""


def run(words):
    """Return an exit code, "parser CODE" or "started"."""
    try:
        return trainer.main(words)
    except SystemExit as stop:
        return f"parser {stop.code}"
    except StartedError:
        return "started"


def value(action, rng):
    """Return a word for a flag, more often a good one than any of the others."""
    if rng.random() < 0.1:
        return rng.choice([*PATHS, *ODD])
    if action.choices:
        return str(rng.choice([*action.choices, *action.choices, "x"]))
    good = PATHS if action.type is Path else [*NUMBERS * 3, *ODD]
    return rng.choice(TEXTS.get(action.dest, good))


def command_line(actions, rng):
    """Begin as a command may, add flags, and now and then lose, repeat or slip in a word."""
    words = rng.choice(BEGINNINGS).split()
    for action in rng.sample(actions, rng.choice([0, 1, 1, 2, 2, 3, 5])):
        flag = rng.choice(action.option_strings)
        values = [] if action.nargs == 0 else [value(action, rng)]
        joined = values and rng.random() < 0.2 and values != ["--"]  # argparse takes it away
        words += [f"{flag}={values[0]}"] if joined else [flag, *values]
    if words and rng.random() < 0.2:
        index = rng.randrange(len(words))
        words[index : index + 1] = rng.choice([[], [words[index]] * 2, [rng.choice(ODD)]])
    return words


@pytest.mark.slow
def test_random_command_lines_give_one_line_and_no_traceback(made, tmp_path, monkeypatch, capsys):
    """Refused ones leave everything as it was."""

    def start(*_, **__):
        raise StartedError

    def restore():
        os.chdir(tmp_path)
        shutil.rmtree("here", ignore_errors=True)
        shutil.copytree(made, "here", ignore=shutil.ignore_patterns("pipe"))
        os.chdir("here")

    for module, name in ((trainer, "validate"), (trainer, "backward")):
        monkeypatch.setattr(module, name, start)
    monkeypatch.setattr(predictions, "write_predictions", start)
    monkeypatch.setattr(demo, "SAMPLE_DATA", made / "data.csv")
    monkeypatch.chdir(tmp_path)
    restore()
    parsers = [build_parser("", "", table) for table in (trainer.FLAGS, FLAGS)]
    actions, seen = [action for each in parsers for action in each._actions], Counter()
    actions = [action for action in actions if action.dest != "version"]
    for seed in range(EXAMPLES):
        words = command_line(actions, Random(seed))
        before = listing()
        end = run(words)
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error, words
        if end in ("parser 2", 2):
            assert re.fullmatch(r"error: [^\n]+\n", error), (words, error)
            assert len(error.splitlines()) == 1, (words, error)
            assert listing() == before, words
        else:
            assert (end in ("parser 0", 0, "started"), error) == (True, ""), (words, end, error)
            restore()
        seen[end] += 1
    assert min(seen[end] for end in ("started", 2, "parser 2")) >= EXAMPLES // 12, seen
