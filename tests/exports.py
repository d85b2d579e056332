"""Two hospitals' exports as they come, small: tables, and the values that they stand for.

A is German: cp1252, semicolons, decimal commas, items with their unit, limits and remarks, ja and
nein, stay numbers. B has times with a zone across a change of clocks, a unit of another hospital,
several outcomes, an Excel file whose second sheet holds the patients, and notes. No real patient.
"""

import numpy as np
import pandas as pd

ITEMS = {
    "Kreatinin [µmol/L]": (lambda x: 60 + 90 * x, 0),
    "Kalium [mmol/L]": (lambda x: 3.4 + 2 * x, 1),
    "CRP [mg/L]": (lambda x: 1 + 110 * x, 1),
}
GERMAN = "%d.%m.%Y %H:%M"
SITES_A, SITES_B = ("Innere", "Chirurgie", "Intensiv"), ("Nord", "Süd", "St. Mary's")
NOTES = ("St. p. sepsis, febrile", 'fell at home, "confused"', "Z.n. Hüft-TEP;\nunremarkable")


def write_a(folder, patients=80, seed=7):
    """Write labor.csv and patienten.csv; return the value of each cell by stay, item and hour."""
    rng, values, stays, truth = np.random.default_rng(seed), [], [], {}
    for p in range(patients):
        for stay in range(1 + (p % 7 == 0)):
            start = pd.Timestamp("2019-03-01") + pd.Timedelta(40 * stay + p, "D")
            start += pd.Timedelta(int(rng.integers(1440)), "min")
            number, ill = 9000 + 2 * p + stay, rng.random()
            hours = np.sort(rng.uniform(-20, 80, 9)) if p % 11 else [60.0]  # too late for some
            for hour in hours:
                drawn = (start + pd.Timedelta(hour, "h")).floor("min")
                known = drawn + pd.Timedelta(int(rng.integers(30, 200)), "min")
                for item, (level, digits) in ITEMS.items():
                    value = round(level(0.6 * ill + 0.4 * rng.random()), digits)
                    text = f"{value:.{digits}f}".replace(".", ",")
                    if item.startswith("CRP") and value < 12:
                        value, text = 2.5, "<5"
                    if item.startswith("Kalium") and rng.random() < 0.05:
                        value, text = None, "hämolytisch"
                    line = (100000 + p, number, drawn, known, item, text)
                    values += [line] * rng.choice([1, 1, 1, 2])
                    is_known = start <= drawn and known <= start + pd.Timedelta("48h")
                    if is_known and value is not None:
                        since = round((drawn - start).total_seconds() / 3600, 2)
                        truth.setdefault((str(number), item), []).append((since, value))
            event = "ja" if ill + 0.3 * rng.random() > 0.75 else "nein"
            sex, age = rng.choice(["m", "w", ""]), int(rng.integers(20, 90))
            end = start + pd.Timedelta("9D")
            stays.append((100000 + p, number, start, age, sex, SITES_A[p % 3], end, event))
    names = ["Pat.-Nr.", "Fallnummer", "Entnahme", "Befund", "Parameter", "Ergebnis"]
    table = pd.DataFrame(values, columns=names).sample(frac=1, random_state=1)
    names = ["Pat.-Nr.", "Fallnummer", "Aufnahme", "Alter", "Geschlecht", "Klinik"]
    people = pd.DataFrame(stays, columns=[*names, "Entlassung", "AKI Stadium 3"])
    for name, content in (("labor", table), ("patienten", people)):
        times = content.select_dtypes("datetime")
        content = content.assign(**{x: times[x].dt.strftime(GERMAN) for x in times})
        content.to_csv(folder / f"{name}.csv", sep=";", index=False, encoding="cp1252")
    return truth


def write_b(folder, patients=80, seed=11):
    """Write lab.csv.gz, cohort.xlsx and notes.csv; return the values by patient, item and hour."""
    rng, values, cohort, notes, truth = np.random.default_rng(seed), [], [], [], {}
    for p in range(patients):
        mrn, site, ill = f"B{7 * p + 1003:06d}", SITES_B[p % 3], rng.random()
        start = pd.Timestamp("2021-03-26", tz="UTC") + pd.Timedelta(int(90 * p), "min")
        local = start.tz_convert("Europe/Berlin")
        for hour in np.sort(rng.uniform(-10, 60, 8)) if p % 9 else []:
            drawn = (start + pd.Timedelta(hour, "h")).floor("min")
            is_south = site == "Süd"
            lactate, creatinine = round(0.5 + 3 * ill + rng.random(), 1), 0.6 + ill + rng.random()
            shown = round(creatinine * (88.4 if is_south else 1), 2)
            shown_values = [("LACT_VEN", "mmol/l", lactate, lactate)]
            factor = 0.0113 if is_south else 1
            unit = "umol/l" if is_south else "mg/dl"
            shown_values.append(("CREA S/P", unit, shown, shown * factor))
            for item, unit, cell, value in shown_values:
                zoned = drawn.tz_convert("Europe/Berlin").isoformat()
                values.append((mrn, zoned, item, unit, cell))
                if start <= drawn <= start + pd.Timedelta("24h"):
                    since = round((drawn - start).total_seconds() / 3600, 2)
                    truth.setdefault((mrn, item), []).append((since, value))
        written = (local + pd.Timedelta(float(rng.uniform(-5, 40)), "h")).floor("min")
        notes.append((mrn, written.isoformat(), NOTES[p % 3]))
        event = ill + 0.3 * rng.random() > 0.75
        outcomes = ("Yes" if event else "No", "Yes" if event and p % 2 else "No")
        gender = ("female", "male", "diverse")[min(p % 20, 2) if p % 20 == 2 else p % 2]
        cohort.append((mrn, local.isoformat(), 20 + p % 70, gender, site, *outcomes))
    names = ["MRN", "Sample taken (local)", "Untersuchung", "Einheit", "Messwert"]
    pd.DataFrame(values, columns=names).to_csv(folder / "lab.csv.gz", index=False)
    names = ["MRN", "Admission date/time", "Age at admission", "Gender", "Klinik"]
    people = pd.DataFrame(cohort, columns=[*names, "ICU transfer <7d", "Died <30d"])
    with pd.ExcelWriter(folder / "cohort.xlsx") as book:
        readme = pd.DataFrame({"Readme": ["Export of 2022", "the second sheet holds the data"]})
        readme.to_excel(book, sheet_name="Info", index=False)
        people.to_excel(book, sheet_name="Patients", index=False)
    columns = ["MRN", "Written (local)", "Free text note"]
    pd.DataFrame(notes, columns=columns).to_csv(folder / "notes.csv", index=False)
    return truth


def answer(path, **changed):
    """Answer every open question of a preview's TOML by its first answer, some flags by hand."""
    lines, flag = [], ""
    for line in path.read_text(encoding="utf-8").splitlines()[2:]:
        is_first = " = " in line and not line.startswith(" ")
        flag = line.removeprefix("# ").partition(" = ")[0] if is_first else flag
        is_question = line.lstrip().startswith("# ") and line.count("# ") > 1
        if flag not in changed:
            lines.append(line.replace("# ", "", 1) if is_question else line)
        elif is_first:
            lines.append(f"{flag} = {changed[flag]}")
    path.write_text("\n".join(lines), encoding="utf-8")


def values_of(rows, main, key="subject_id"):
    """Return the values of a DKA file by the key of a row, item and hour."""
    read, names = {}, {"clinical_trajectory": main}
    names |= {name: name.removeprefix("trajectory_") for name in rows.filter(like="trajectory_")}
    for row in rows.fillna("").to_dict("records"):
        for column, item in names.items():
            pairs = [cell[:-2].split(" (") for cell in row[column].split(" -> ") if cell]
            if pairs:
                read[row[key], item] = [(float(hour), float(value)) for value, hour in pairs]
    return read
