"""The outcome: death, intensive care and an anion gap that stays open, within the horizon."""

import pytest

from mimic_files import Mini, extracted, write_tables

MINUTE = 1 / 60
OPEN, SETTLED = ((1, 20), (4, 18)), ((1, 20), (4, 18), (40, 9))
CLOSED_BEFORE = ((1, 20), (4, 11))

# Admissions asked at 13 h, looked at until 85 h: how they end, gaps, stays in intensive care; then
# death, icu, unresolved.
CASES = {
    "closed": ({}, SETTLED, (), [0, 0, 0]),
    "closed at the edge of the horizon": ({}, (*OPEN, (85, 12)), (), [0, 0, 0]),
    "closed a minute too late": ({}, (*OPEN, (80, 13), (85 + MINUTE, 9)), (), [0, 0, 1]),
    "never quite closed": ({}, (*OPEN, (40, 12.1)), (), [0, 0, 1]),
    "reopened": ({}, (*SETTLED, (60, 12.5)), (), [0, 0, 1]),
    "reopened too late": ({}, (*SETTLED, (86, 20)), (), [0, 0, 0]),
    "open and closed at one time": ({}, (*SETTLED, (40, 13)), (), [0, 0, 0]),
    "open and closed at one later time": ({}, (*SETTLED, (60, 9), (60, 13)), (), [0, 0, 0]),
    "closed before, stays closed": ({}, (*CLOSED_BEFORE, (40, 9)), (), [0, 0, 0]),
    "closed before, never measured again": ({}, CLOSED_BEFORE, (), [0, 0, None]),
    "closed before, not measured, discharged": ({"end": 60}, CLOSED_BEFORE, (), [0, 0, 0]),
    "closed before, reopened": ({}, (*CLOSED_BEFORE, (40, 13)), (), [0, 0, 1]),
    "discharged with an open gap": ({"end": 60}, (*OPEN, (40, 13)), (), [0, 0, 0]),
    "discharged with an open gap at the edge": ({"end": 85}, (*OPEN, (40, 13)), (), [0, 0, 1]),
    "discharged with a closed gap": ({"end": 60}, SETTLED, (), [0, 0, 0]),
    "discharged with a reopened gap": ({"end": 60}, (*SETTLED, (50, 13)), (), [0, 0, 1]),
    "open, not measured again": ({}, OPEN, (), [0, 0, None]),
    "open, not measured, in intensive care later": ({}, OPEN, ((30, 60),), [0, 1, None]),
    "to intensive care, then discharged": ({"end": 60}, OPEN, ((30, 40),), [0, 1, 0]),
    "a value after the discharge": ({"end": 60}, (*SETTLED, (61, 30)), (), [0, 0, 0]),
    "died in the horizon, gap open": ({"end": 50, "death": 50.0}, OPEN, (), [1, 0, 1]),
    "died in the horizon, gap closed": ({"end": 50, "death": 50.0}, SETTLED, (), [1, 0, 0]),
    "died at the edge": ({"end": 85, "death": 85.0}, SETTLED, (), [1, 0, 0]),
    "died a minute after it": ({"end": 99, "death": 85 + MINUTE}, SETTLED, (), [0, 0, 0]),
    "died, only the flag says so": ({"end": 50, "expired": 1}, SETTLED, (), [1, 0, 0]),
    "died later on the day of the discharge": ({"end": 12, "death": 15.9}, SETTLED, (), [1, 0, 1]),
    "to intensive care": ({}, SETTLED, ((30, 60),), [0, 1, 0]),
    "to intensive care at the edge": ({}, SETTLED, ((85, None),), [0, 1, 0]),
    "to intensive care too late": ({}, SETTLED, ((85.02, 99),), [0, 0, 0]),
    "in intensive care from the moment on": ({}, SETTLED, ((13, 60),), [0, None, 0]),
    "in intensive care, and back again": ({}, SETTLED, ((2, 20), (50, 60)), [0, None, 0]),
    "left intensive care before, and back": ({}, SETTLED, ((2, 13), (50, 60)), [0, 1, 0]),
    "left intensive care before": ({}, SETTLED, ((2, 13),), [0, 0, 0]),
    "in intensive care without an end": ({}, SETTLED, ((2, None),), [0, None, 0]),
    "closed by a value that was not stored by then": ({}, (*OPEN, (80, 9)), (), [0, 0, 0]),
    "another admission's intensive care and death": ({"end": 50}, SETTLED, (), [0, 0, 0]),
}
NUMBERS = {name: number for number, name in enumerate(CASES, 1)}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """All cases in one folder, an admission each."""
    mini = Mini()
    for name, (ends, gaps, stays, _) in CASES.items():
        hadm = NUMBERS[name]
        mini.admit(hadm, 0, **ends).gaps(hadm, *gaps)
        for start, end in stays:
            mini.icu(hadm, start, end)
    mini.lab(NUMBERS["closed by a value that was not stored by then"], 12.9, 10, stored=15.0)
    hadm = NUMBERS["another admission's intensive care and death"]
    mini.admit(hadm + 1000, 52, 70, subject=10_000 + hadm, death=70.0).icu(hadm + 1000, 53, 70)
    return mini.write(tmp_path_factory.mktemp("mimic"))


@pytest.fixture(scope="module")
def by_death(hospital):
    """Rows whatever else is unknown."""
    return extracted(hospital, ["death"])


@pytest.fixture(scope="module")
def escalation(hospital):
    return extracted(hospital)


@pytest.mark.parametrize("name", CASES)
def test_each_component_and_their_union(name, by_death, escalation):
    components, hadm = CASES[name][3], NUMBERS[name]
    assert by_death.labels(hadm) == components
    assert by_death.rows.loc[hadm, "label_escalation"] == components[0]
    if components[2] is None:
        assert hadm not in escalation.rows.index
    else:
        assert escalation.rows.loc[hadm, "label_escalation"] == int(1 in components)


def test_admissions_of_unknown_outcome_are_counted(escalation):
    removed = [n for rule, n in escalation.removed().items() if rule.startswith("outcome not")]
    assert removed == [3]


@pytest.mark.parametrize(
    "outcome", ["icu", "unresolved", "death,icu", "death,unresolved", "death,icu,unresolved"]
)
def test_any_components_can_be_chosen(outcome, hospital, by_death):
    chosen = outcome.split(",")
    parts = by_death.rows[[f"label_{name}" for name in chosen]]
    if chosen == ["icu"] or "unresolved" in chosen:
        parts = parts[parts.iloc[:, -1].notna()]
    found = extracted(hospital, chosen).rows["label_escalation"]
    assert found.to_dict() == (parts == 1).any(axis=1).astype(int).to_dict()


@pytest.mark.parametrize("outcome", ["escalation", "death"])
def test_discharges_alive_are_counted_or_left_out_whatever_else_happened(outcome, hospital):
    """But for a discharge at the horizon's edge, which is not within it."""
    counted = extracted(hospital, [outcome])
    excluded = extracted(hospital, [outcome], discharged="exclude")
    left_out = set(counted.rows.index) - set(excluded.rows.index)
    alive = {NUMBERS[k] for k, (ends, *_) in CASES.items() if ends in ({"end": 60}, {"end": 50})}
    assert left_out == alive
    assert counted.description["rows"]["discharged_alive"] == len(alive)
    assert excluded.description["rows"]["discharged_alive"] == 0
    rule = "discharged alive within the horizon (--discharged exclude)"
    assert excluded.removed()[rule] == len(alive)
    assert "competing event" in counted.description["definitions"]["discharge"]


def test_of_two_units_at_one_time_the_order_of_the_rows_does_not_decide(tmp_path):
    tables = Mini().admit(1).settling(1).icu(1, 2, 60).icu(1, 2, 70).tables()
    tables["icu/icustays"]["first_careunit"] = ["CCU", "MICU"]
    for name, step in (("one", 1), ("other", -1)):
        icu = tables["icu/icustays"].iloc[::step]
        folder = write_tables(tmp_path / name, {**tables, "icu/icustays": icu})
        assert ", MICU," in extracted(folder, ["death"]).context(1)
