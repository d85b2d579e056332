"""The outcome: death, intensive care and an anion gap that stays open, within the horizon."""

from collections.abc import Callable

import pytest

from mimic_files import Mini, extracted, write_tables

Case = Callable[[Mini, int], Mini]
MINUTE = 1 / 60


def open_gaps(mini, hadm, *later):
    """Two open gaps within the window, then others."""
    return mini.gaps(hadm, (1, 20), (4, 18), *later)


CASES = {
    # Admissions asked at 13 h, looked at until 85 h; then death, icu, unresolved.
    "closed": (lambda m, h: m.admit(h).settling(h), [0, 0, 0]),
    "closed at the edge of the horizon": (
        lambda m, h: open_gaps(m.admit(h), h, (85, 12)),
        [0, 0, 0],
    ),
    "closed a minute too late": (
        lambda m, h: open_gaps(m.admit(h), h, (80, 13), (85 + MINUTE, 9)),
        [0, 0, 1],
    ),
    "never quite closed": (lambda m, h: open_gaps(m.admit(h), h, (40, 12.1)), [0, 0, 1]),
    "reopened": (lambda m, h: m.admit(h).settling(h).gaps(h, (60, 12.5)), [0, 0, 1]),
    "reopened too late": (lambda m, h: m.admit(h).settling(h).gaps(h, (86, 20)), [0, 0, 0]),
    "open and closed at one time": (
        lambda m, h: m.admit(h).settling(h).gaps(h, (40, 13)),
        [0, 0, 0],
    ),
    "open and closed at one later time": (
        lambda m, h: m.admit(h).settling(h).gaps(h, (60, 9), (60, 13)),
        [0, 0, 0],
    ),
    "closed before, stays closed": (
        lambda m, h: m.admit(h).gaps(h, (1, 20), (4, 11), (40, 9)),
        [0, 0, 0],
    ),
    "closed before, never measured again": (
        lambda m, h: m.admit(h).gaps(h, (1, 20), (4, 11)),
        [0, 0, None],
    ),
    "closed before, never measured again, discharged": (
        lambda m, h: m.admit(h, 0, 60).gaps(h, (1, 20), (4, 11)),
        [0, 0, 0],
    ),
    "closed before, reopened": (
        lambda m, h: m.admit(h).gaps(h, (1, 20), (4, 11), (40, 13)),
        [0, 0, 1],
    ),
    "closed by a value that was not stored by then": (
        lambda m, h: open_gaps(m.admit(h), h).lab(h, 12.9, 10, stored=15.0).gaps(h, (80, 9)),
        [0, 0, 0],
    ),
    "discharged with an open gap": (
        lambda m, h: open_gaps(m.admit(h, 0, 60), h, (40, 13)),
        [0, 0, 0],
    ),
    "discharged with an open gap at the edge": (
        lambda m, h: open_gaps(m.admit(h, 0, 85), h, (40, 13)),
        [0, 0, 1],
    ),
    "discharged with a closed gap": (lambda m, h: m.admit(h, 0, 60).settling(h), [0, 0, 0]),
    "open, not measured again": (lambda m, h: open_gaps(m.admit(h), h), [0, 0, None]),
    "open, not measured again, in intensive care later": (
        lambda m, h: open_gaps(m.admit(h), h).icu(h, 30, 60),
        [0, 1, None],
    ),
    "discharged with a gap that had closed and reopened": (
        lambda m, h: m.admit(h, 0, 60).settling(h).gaps(h, (50, 13)),
        [0, 0, 1],
    ),
    "to intensive care, then discharged": (
        lambda m, h: open_gaps(m.admit(h, 0, 60), h).icu(h, 30, 40),
        [0, 1, 0],
    ),
    "a value after the discharge": (
        lambda m, h: m.admit(h, 0, 60).settling(h).gaps(h, (61, 30)),
        [0, 0, 0],
    ),
    "died in the horizon, gap open": (
        lambda m, h: open_gaps(m.admit(h, 0, 50, death=50.0), h),
        [1, 0, 1],
    ),
    "died in the horizon, gap closed": (
        lambda m, h: m.admit(h, 0, 50, death=50.0).settling(h),
        [1, 0, 0],
    ),
    "died at the edge": (lambda m, h: m.admit(h, 0, 85, death=85.0).settling(h), [1, 0, 0]),
    "died a minute after it": (
        lambda m, h: m.admit(h, 0, 99, death=85 + MINUTE).settling(h),
        [0, 0, 0],
    ),
    "died, only the flag says so": (
        lambda m, h: m.admit(h, 0, 50, expired=1).settling(h),
        [1, 0, 0],
    ),
    "died later on the day of the recorded discharge, gap open": (
        lambda m, h: m.admit(h, 0, 12, death=15.9).settling(h),
        [1, 0, 1],
    ),
    "to intensive care": (lambda m, h: m.admit(h).settling(h).icu(h, 30, 60), [0, 1, 0]),
    "to intensive care at the edge": (
        lambda m, h: m.admit(h).settling(h).icu(h, 85, None),
        [0, 1, 0],
    ),
    "to intensive care too late": (
        lambda m, h: m.admit(h).settling(h).icu(h, 85.02, 99),
        [0, 0, 0],
    ),
    "in intensive care from the moment on": (
        lambda m, h: m.admit(h).settling(h).icu(h, 13, 60),
        [0, None, 0],
    ),
    "in intensive care, and back again": (
        lambda m, h: m.admit(h).settling(h).icu(h, 2, 20).icu(h, 50, 60),
        [0, None, 0],
    ),
    "left intensive care before, and back": (
        lambda m, h: m.admit(h).settling(h).icu(h, 2, 13).icu(h, 50, 60),
        [0, 1, 0],
    ),
    "left intensive care before": (
        lambda m, h: m.admit(h).settling(h).icu(h, 2, 13),
        [0, 0, 0],
    ),
    "in intensive care without an end": (
        lambda m, h: m.admit(h).settling(h).icu(h, 2, None),
        [0, None, 0],
    ),
    "another admission's intensive care and death": (
        lambda m, h: (
            m.admit(h, 0, 50)
            .settling(h)
            .admit(h + 1000, 52, 70, subject=10_000 + h, death=70.0)
            .icu(h + 1000, 53, 70)
        ),
        [0, 0, 0],
    ),
}
NUMBERED = {name: number for number, name in enumerate(CASES, 1)}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """All cases in one folder, an admission each."""
    mini = Mini()
    for name, (case, _) in CASES.items():
        case(mini, NUMBERED[name])
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
    components = CASES[name][1]
    hadm = NUMBERED[name]
    assert by_death.labels(hadm) == components
    assert by_death.rows.loc[hadm, "label_escalation"] == components[0]
    if components[2] is None:
        assert hadm not in escalation.rows.index
    else:
        assert escalation.rows.loc[hadm, "label_escalation"] == int(1 in components)


def test_admissions_of_unknown_outcome_are_counted(escalation):
    removed = {rule: n for rule, n in escalation.removed().items() if rule.startswith("outcome")}
    assert removed == {
        "outcome not known: in hospital for the whole horizon, anion gap not measured again": 3,
    }


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("death", {1: 1, 2: 0, 3: 0, 4: 0, 5: 0}),
        ("icu", {1: 0, 2: 1, 3: 0, 5: 0}),
        ("unresolved", {1: 0, 2: 0, 3: 1, 4: 0, 5: 0}),
        ("death,icu", {1: 1, 2: 1, 3: 0, 4: 0, 5: 0}),
        ("death,unresolved", {1: 1, 2: 0, 3: 1, 4: 0, 5: 0}),
        ("death,icu,unresolved", {1: 1, 2: 1, 3: 1, 4: 0, 5: 0}),
    ],
)
def test_each_component_can_be_chosen(outcome, expected, tmp_path):
    mini = Mini().admit(1, 0, 50, death=50.0).settling(1)
    mini.admit(2).settling(2).icu(2, 30, 60)
    mini.admit(3).settling(3).gaps(3, (60, 14))
    mini.admit(4).settling(4).icu(4, 2, 60)
    mini.admit(5, 0, 60).gaps(5, (1, 20), (4, 18), (40, 13))
    result = extracted(mini.write(tmp_path), outcome.split(","))
    assert result.rows["label_escalation"].to_dict() == expected


DISCHARGED = ("discharged with", "closed before, never measured again, d", "to intensive care, t")


@pytest.mark.parametrize("outcome", ["escalation", "death"])
def test_discharges_alive_are_counted_or_left_out_whatever_else_happened(outcome, hospital):
    """But for a discharge at the horizon's edge, which is not within it."""
    counted = extracted(hospital, [outcome])
    excluded = extracted(hospital, [outcome], discharged="exclude")
    left_out = set(counted.rows.index) - set(excluded.rows.index)
    alive = {NUMBERED[name] for name in CASES if name.startswith(DISCHARGED)}
    alive -= {NUMBERED["discharged with an open gap at the edge"]}
    alive |= {NUMBERED["a value after the discharge"]}
    alive |= {NUMBERED["another admission's intensive care and death"]}
    assert left_out == alive
    assert counted.description["rows"]["discharged_alive"] == len(alive)
    assert excluded.description["rows"]["discharged_alive"] == 0
    rule = "discharged alive within the horizon (--discharged exclude)"
    assert excluded.removed()[rule] == len(alive)
    assert "competing event" in counted.description["definitions"]["discharge"]


def test_of_two_units_at_one_time_the_order_of_the_rows_does_not_decide(tmp_path):
    tables = Mini().admit(1).settling(1).icu(1, 2, 60).icu(1, 2, 70).tables()
    tables["icu/icustays"]["first_careunit"] = ["CCU", "MICU"]
    contexts = []
    for name, rows in (("one", slice(None)), ("other", slice(None, None, -1))):
        icu = tables["icu/icustays"].iloc[rows]
        folder = write_tables(tmp_path / name, {**tables, "icu/icustays": icu})
        contexts.append(extracted(folder, ["death"]).context(1))
    assert contexts[0] == contexts[1]
    assert "MICU" in contexts[0]


def test_the_horizon_is_respected(tmp_path):
    mini = Mini().admit(1, 0, 50, death=50.0).settling(1)
    mini.admit(2, 0, 30, death=30.0).settling(2)
    result = extracted(mini.write(tmp_path), ["death"], horizon_hours=20.0)
    assert result.rows["label_death"].to_dict() == {1: 0, 2: 1}
    assert result.description["question"] == "Will the patient die in hospital within 20 hours?"
