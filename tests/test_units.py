"""New data in other units: ``from_long --like``, ``predict`` and ``monitor`` name them."""

import numpy as np
import pandas as pd
import pytest

import dataset_format
import medgemma_trainer as trainer
from conftest import DATA
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.analytes import UNIT_RATIOS, conversions, unit_ratios
from medgemma_clinical.data.distributions import (
    ASKS_UNIT,
    compare,
    describe,
    find_unit_change,
    row_medians,
    unit_changes,
)
from medgemma_clinical.evaluation import monitoring

pytestmark = pytest.mark.slow

SERIES = {  # median, SD of the logarithm, effect of severity
    "Kreatinin [mg/dl]": (1.1, 0.45, 0.3),
    "CRP [mg/l]": (40.0, 0.9, 0.3),
    "Leukozyten [/nl]": (9.5, 0.35, 0.0),
    "Laktat [mmol/l]": (1.6, 0.4, 0.4),
    "Calcium [mg/dl]": (8.4, 0.08, 0.0),
    "Albumin [g/dl]": (3.1, 0.2, -0.1),
    "Phosphat [mg/dl]": (3.3, 0.3, 0.0),
    "Temperatur [°C]": (37.0, 0.018, 0.0),
    "Harnstoff [mmol/l]": (7.0, 0.55, 0.2),
    "Hb [g/dl]": (10.5, 0.18, 0.0),
    "Bilirubin [mg/dl]": (0.8, 0.6, 0.1),
    "Thrombozyten [/nl]": (190.0, 0.45, 0.0),
}
CHANGES = {  # new value, who, and what is said of it
    "Kreatinin": (lambda x: x * 88.4, "quarter", "divided by 88.4"),
    "CRP": (lambda x: x / 10, "all", "multiplied by 10"),
    "Leukozyten": (lambda x: x * 1000, "all", "divided by 1000"),
    "Laktat": (lambda x: x * 9.01, "late", "divided by 9.008"),
    "Calcium": (lambda x: x / 4.01, "all", "multiplied by 4.008"),
    "Albumin": (lambda x: x * 10, "quarter", "divided by 10"),
    "Phosphat": (lambda x: x / 3.1, "all", "multiplied by 3.097"),
    "Temperatur": (lambda x: 1.8 * x + 32, "quarter", "converted from °F to °C"),
    "Harnstoff": (lambda x: x * 6.01, "all", "divided by 6.006"),
    "Hb": (lambda x: x * 10, "late", "divided by 10"),
    "Bilirubin": (lambda x: x * 17.1, "all", "divided by 17.1"),
}
LATE = "2024-03", "2024-04"


def write_export(folder, seed, begin, months, patients=320):
    """Write a table with a value a line, and one of patients; return the values."""
    rng = np.random.default_rng(seed)
    severity = rng.normal(size=patients)
    days = rng.integers(0, 30 * months, patients)
    time = pd.Timestamp(begin) + pd.to_timedelta(days, unit="D") + pd.Timedelta(hours=12)
    label = (rng.random(patients) < 1 / (1 + np.exp(0.6 - 1.5 * severity))).astype(int)
    ids = [f"P{seed}{k:04d}" for k in range(patients)]
    told = pd.DataFrame({"patient": ids, "prediction_time": time, "label": label})
    folder.mkdir()
    told.to_csv(folder / "patients.csv", index=False)
    tables = []
    for name, (median, spread, effect) in SERIES.items():
        for hours in (20, 6):
            own = rng.normal(size=patients) * spread
            values = median * np.exp(own + effect * severity * spread)
            drawn = time - pd.to_timedelta(hours, unit="h")
            table = pd.DataFrame({"patient": ids, "time": drawn, "item": name, "value": values})
            tables.append(table[rng.random(patients) < 0.8])
    values = pd.concat(tables, ignore_index=True)
    values["month"] = values["time"].dt.strftime("%Y-%m")
    return values


def write_values(values, path):
    shown = values.assign(value=[f"{x:.4g}" for x in values["value"]])
    shown.drop(columns="month").to_csv(path, index=False)


def changed(values):
    """Return values in which each item of ``CHANGES`` has another unit somewhere."""
    other = values.copy()
    quarter = other["patient"].str[-1].isin(["1", "5"]) | other["patient"].str.endswith("08")
    masks = {"all": quarter | True, "quarter": quarter, "late": other["month"].isin(LATE)}
    for name, (convert, who, _) in CHANGES.items():
        rows = masks[who] & other["item"].str.startswith(name)
        other.loc[rows, "value"] = convert(other.loc[rows, "value"])
    return other


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an export, its file, and stage 1 of it."""
    folder = tmp_path_factory.mktemp("units")
    write_values(write_export(folder / "old", 1, "2023-01-01", 12), folder / "old" / "values.csv")
    series = [f"--series={name}={name}" for name in SERIES]
    words = ["from_long", "--table", folder / "old" / "values.csv"]
    words += ["--labels", folder / "old" / "patients.csv", "--out", folder / "old.csv"]
    words += ["--columns", "subject_id=patient", *series, "--window_hours", "24"]
    assert dataset_format.main([*map(str, words), "--outcome", "Death"]) == 0
    words = ["--trajectory_only", "--data_path", folder / "old.csv", "--output_dir", folder / "run"]
    words += ["--trajectory_epochs", "1", "--log_file", "none"]
    assert trainer.main([*map(str, words)]) == 0
    values = write_export(folder / "new", 2, "2024-01-01", 4)
    write_values(values, folder / "clean.csv")
    write_values(changed(values), folder / "changed.csv")
    return folder


def said(capsys, main, words):
    """Run a command; return its warnings of units by series, and all its lines."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 0
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    return [line for line in lines if ASKS_UNIT in line], lines


def named(texts, name):
    (text,) = [text for text in texts if f"{name}: " in text]
    return text


@pytest.mark.parametrize("which", ["clean", "changed"])
def test_commands_name_series_and_factor_and_nothing_of_the_same_units(
    which, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(monitoring, "REPLICATES", 100)
    monkeypatch.setattr(monitoring, "YEARS", 200)
    out = tmp_path / "new.csv"
    words = ["from_long", "--like", trained / "old.csv", "--table", trained / f"{which}.csv"]
    words += ["--labels", trained / "new" / "patients.csv", "--out", out]
    of_import, _ = said(capsys, dataset_format.main, words)
    checkpoint, risks = trained / "run" / "trajectory", tmp_path / "risks.csv"
    words = ["predict", "--checkpoint", checkpoint, "--data_path", out, "--predictions", risks]
    of_prediction, _ = said(capsys, trainer.main, words)
    rows = pd.read_csv(out, dtype=str)
    outcomes = pd.DataFrame({"id": pd.read_csv(risks, dtype=str)["id"]})
    outcomes["label"], outcomes["day"] = rows["label_escalation"], rows["prediction_time"]
    outcomes.to_csv(tmp_path / "outcomes.csv", index=False)
    words = ["monitor", risks, "--checkpoint", checkpoint, "--date", "day"]
    words += ["--outcomes", tmp_path / "outcomes.csv", "--output_dir", tmp_path / "monitor"]
    _, lines = said(capsys, trainer.main, words)
    if which == "clean":
        assert of_import == of_prediction == []
        assert not any("unit" in line for line in lines)
        return
    assert len(of_import) == len(of_prediction) == len(CHANGES)
    for name, (_, who, remedy) in CHANGES.items():
        for text in (named(of_import, name), named(of_prediction, name)):
            assert remedy in text
            assert ("of patients" in text) == (who != "all")
        assert all(month in named(of_import, name) for month in LATE) or who != "late"
        assert ("2024-01" in named(of_import, name)) is False or who == "quarter"
    assert lines[0].startswith("monitor: stop: ")
    assert not any("recalibrate" in line or "--update" in line for line in lines)
    page = (tmp_path / "monitor" / "monitor.html").read_text()
    assert all(remedy in page for _, _, remedy in CHANGES.values())


# ------------------------------------------------------------------ the table

MASSES = {  # g/mol
    "creatinine": 113.12, "glucose": 180.16, "lactate": 90.08, "hb": 16114, "bilirubin": 584.66,
    "calcium": 40.078, "magnesium": 24.305, "phosphate": 30.974, "uric acid": 168.11,
    "cholesterol": 386.65, "triglycerides": 885.4, "ammonia": 17.031, "iron": 55.845,
    "ferritin": 445000, "copper": 63.546, "zinc": 65.38, "vitamin b12": 1355.4, "folate": 441.4,
    "vitamin d": 400.64, "cortisol": 362.46, "t4": 776.87, "t3": 650.97, "testosterone": 288.42,
    "estradiol": 272.38, "progesterone": 314.46, "c peptide": 3020.3, "bnp": 3464,
    "nt probnp": 8457, "digoxin": 780.94, "vancomycin": 1449.3, "paracetamol": 151.16,
    "salicylate": 138.12, "phenytoin": 252.27, "valproate": 144.21, "ethanol": 46.068,
    "theophylline": 180.16, "homocysteine": 135.18, "fibrinogen": 340000, "carbamazepine": 236.27,
    "lead": 207.2, "pth": 9425, "aldosterone": 360.44,
}  # fmt: skip
CONVENTIONS = {"urea": (2.8014, 6.006, 60.06 / 28.014), "insulin": (6.945, 6.0)}
CONVENTIONS |= {"pressure": (1 / 0.133322,), "weight": (1 / 0.45359237,), "height": (2.54,)}


def test_each_ratio_is_that_of_its_molar_mass():
    known = {unit_ratios(name) for name in [*MASSES, *CONVENTIONS]}
    assert known == {*UNIT_RATIOS.values()}
    for name, mass in MASSES.items():
        for ratio in unit_ratios(name):
            powers = [np.log10(ratio) - np.log10(mass), np.log10(ratio) + np.log10(mass)]
            if ratio != 10:
                assert min(abs(x - round(x)) for x in powers) < 1e-3, name
    for name, expected in CONVENTIONS.items():
        assert unit_ratios(name) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("like", "names"),
    [
        ("creatinine", "Kreatinin (mg/dl)|créatinine|Creatinina|S-Kreatinin"),
        ("glucose", "Glukose|Glucosa|glucosio|Glycémie|glicemia|Blutzucker"),
        ("lactate", "Laktat|lattato|Lactato|Acide lactique"),
        ("urea", "BUN|Harnstoff-N|Urée|azotemia|urea nitrogen"),
        ("hb", "Hämoglobin|Haemoglobin|hémoglobine|Hemoglobina|emoglobina|HGB"),
        ("bilirubin", "Bilirubin gesamt|bilirubine|Bilirrubina"),
        ("calcium", "Kalzium|Calcio ionico|calcium_total"),
        ("uric acid", "Harnsäure|acide urique|ácido úrico|Urate"),
        ("cholesterol", "HDL-Cholesterin|LDL|cholestérol|colesterolo|Colesterol total"),
        ("triglycerides", "Triglyzeride|triglycérides|Triglicéridos|trigliceridi"),
        ("iron", "Eisen|Fer|hierro|Ferro"),
        ("vitamin b12", "Vitamin B12|vitamine B 12|Cobalamin"),
        ("vitamin d", "25-OH-D3|Vitamin D|vitamine D"),
        ("pressure", "PaO2|pCO2|blood pressure|Blutdruck"),
        ("weight", "Gewicht|poids|weight"),
        ("", "platelets|Thrombozyten|Natrium|CRP|alkaline phosphatase|Kreatinkinase|troponin I"),
    ],
)
def test_names_are_known_by_whole_words_in_some_languages(like, names):
    for name in names.split("|"):
        assert unit_ratios(name) == unit_ratios(like), name


def test_scales_with_an_offset_convert_both_ways():
    for name, value, other in (("Temperatur", 37.0, 98.6), ("HbA1c", 7.0, 53.0)):
        here, back = [x for x in conversions(name) if x.offset]
        assert np.exp(here.of_logs(np.log([value])))[0] == pytest.approx(other, abs=0.1)
        assert np.exp(back.of_logs(np.log([other])))[0] == pytest.approx(value, abs=0.05)
    assert not any(x.offset for x in conversions("sodium"))


# ------------------------------------------------------------------ the rule


@pytest.fixture(scope="module")
def chemistry():
    return row_medians(MIMICtrajectoryDataset(DATA / "physionet2012_chemistry.csv.gz", max_len=64))


def halves(rows, seed, sizes=(600, 300)):
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.iloc[order[: sizes[0]]], rows.iloc[order[-sizes[1] :]].copy()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "factor", "remedy"),
    [
        ("creatinine", 88.4, "divided by 88.4"),
        ("glucose", 1 / 18.016, "multiplied by 18.02"),
        ("potassium", 10, "divided by 10"),
        ("paco2", 1 / 7.5, "multiplied by 7.501"),
    ],
)
def test_a_share_of_patients_is_found(chemistry, name, factor, remedy, share):
    old, new = halves(chemistry, 3)
    new.loc[new.index[: int(share * len(new))], ("series", name)] *= factor
    column = new["series", name].to_numpy(float)
    found = find_unit_change(name, describe(old)["series"][name], column)
    assert found.conversion.remedy == remedy
    assert found.share == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("seed", range(4))
def test_a_factor_of_a_wide_series_is_found_in_all_patients(seed):
    rng = np.random.default_rng(seed)
    old, new = (40 * np.exp(rng.normal(size=n)) for n in (300, 200))
    old, new = old.clip(2.5, 250), new.clip(2.5, 250)  # limits of the assay
    entry = describe(pd.DataFrame({("series", "CRP"): old}))["series"]["CRP"]
    found = find_unit_change("CRP", entry, 5 * (new / 40) ** 0.8)  # narrower, too
    assert (found.conversion.remedy, found.share) == ("multiplied by 10", 1)


def test_sicker_patients_have_no_other_unit():
    """Shifted, wider, or of another mixture of two groups, as troponins are."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 500))
    high = rng.random((2, 500)) < [[0.2], [0.6]]
    populations = [
        (old, 1.2 + 1.4 * new),
        (old, -0.9 + 0.7 * new),
        (0.3 * old + 3 * high[0], 0.3 * new + 3 * high[1]),
        (0.3 * old + 3 * high[1], 0.3 * new + 3 * high[0]),
    ]
    for training, values in populations:
        rows = [pd.DataFrame({("series", "Troponin"): np.exp(x)}) for x in (training, values)]
        assert compare(describe(rows[0]), rows[1]) == []


def test_series_without_logarithms_do_not_matter():
    rng = np.random.default_rng(0)
    excess, urine = rng.normal(-2, 4, 300), np.where(np.arange(300) < 15, 0, rng.gamma(2, 50, 300))
    training = describe(pd.DataFrame({("series", "BE"): excess, ("series", "urine"): urine}))
    assert find_unit_change("BE", training["series"]["BE"], excess * 1000) is None
    assert find_unit_change("BE", training["series"]["BE"], np.zeros(50)) is None
    assert find_unit_change("urine", training["series"]["urine"], np.zeros(50)) is None
    many_zeros = np.where(np.arange(300) < 150, 0, urine / 1000)
    assert find_unit_change("urine", training["series"]["urine"], many_zeros) is None
    found = find_unit_change("urine", training["series"]["urine"], urine[::2] / 1000)
    assert found.conversion.remedy == "multiplied by 1000"
    for values in ([1e-300] * 40, [np.inf, *[1.0] * 30], [1e300] * 40, [-1.0] * 40, [np.nan] * 40):
        find_unit_change("urine", training["series"]["urine"], np.array(values))


def test_a_unit_that_all_months_suggest_is_seen_in_small_ones():
    rng, n = np.random.default_rng(0), 12 * 24
    old, new = (np.exp(0.5 * rng.normal(size=size)) for size in (300, n))
    entry = describe(pd.DataFrame({("series", "lactate"): old}))["series"]["lactate"]
    months = pd.Series([f"2024-{k % 12 + 1:02d}" for k in range(n)])
    inputs = pd.DataFrame({"lactate": new * np.where(np.arange(n) // 12 % 4, 1, 9.008)})
    training = {"static": {}, "series": {"lactate": entry}}
    _, problems = monitoring.compare_inputs(inputs, months, training)
    assert len(problems) > len(unit_changes("lactate", entry, inputs["lactate"], months, None))
    assert len(problems) >= 8
    assert monitoring.compare_inputs(inputs * 0 + new[:, None], months, training)[1].empty
