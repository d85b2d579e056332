"""A CDS Hooks service of one trained model: FHIR observations in, a card with the risk out.

    CHECKPOINT=runs/trajectory LOGS=served uvicorn --app-dir tests/examples --factory serve:main

Not for clinical use. Put it behind a proxy that ends TLS and checks the client's token.
"""

import csv
import logging
import os
import re
import threading
import tomllib
import uuid
from collections import defaultdict
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from medgemma_trainer import TrajectoryModel

LOINC = "http://loinc.org"
NOT_A_DEVICE = "Research software. Not a medical device, not for clinical use."
logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """What a request lacks; its text never holds a patient's values."""


def main() -> FastAPI:
    """Build the service that the environment describes."""
    logging.basicConfig(level=logging.INFO)
    mapping = os.environ.get("MAPPING", Path(__file__).with_name("loinc.toml"))
    return make_app(os.environ["CHECKPOINT"], mapping, os.environ["LOGS"])


def make_app(checkpoint, mapping, logs, clock=lambda: datetime.now(UTC)) -> FastAPI:
    """Build the service; a mapping that does not fit the model stops it here."""
    model = TrajectoryModel.from_pretrained(checkpoint)
    mapping = tomllib.loads(Path(mapping).read_text(encoding="utf-8"))
    log, lock = Log(Path(logs), model), threading.Lock()
    outcome, about = model.config["outcome"], f"medgemma-clinical {model.config['version']}"
    app = FastAPI(title=outcome)

    def score(row):
        return model.predictions(pd.DataFrame([row])).iloc[0]

    def probe():
        with lock:
            return score(made_up_row(mapping))["problem"]

    if problem := probe():
        raise ValueError(f"the mapping does not fit the model: {problem}")

    @app.get("/health")
    def health():
        problem = probe()
        content = {"status": problem or "ok", "outcome": outcome, "model": about}
        return JSONResponse(content, 503 if problem else 200)

    @app.get("/cds-services")
    def discover():
        codes = ",".join(f"{LOINC}|{code}" for code in mapping["codes"])
        query = f"Observation?patient={{{{context.patientId}}}}&code={codes}"
        prefetch = {"patient": "Patient/{{context.patientId}}", "observations": query}
        service = {"id": "risk", "hook": "patient-view", "title": f"Risk: {outcome}"}
        service |= {"description": f"{model.config['question']} {NOT_A_DEVICE}"}
        return {"services": [{**service, "prefetch": prefetch}]}

    @app.post("/cds-services/risk")
    def risk(request: dict):
        now, prefetch = clock(), request.get("prefetch") or {}
        if not (prefetch.get("patient") and prefetch.get("observations")):
            return operation_outcome("the prefetch of patient and observations is needed", 412)
        try:
            context = request["context"]
            row = make_row(prefetch["patient"], prefetch["observations"], mapping, now)
            row["id"] = str(context.get("encounterId") or context["patientId"])
        except RefusedError as error:
            return operation_outcome(str(error), 422)
        except (KeyError, TypeError, ValueError, AttributeError):
            return operation_outcome("not a patient and a Bundle of observations in R4", 422)
        with lock:  # one prediction at a time, and its lines in both files together
            scored = score(row)
            log.write(row, scored, now)
        logger.info("one prediction, %s", "scored" if scored["problem"] == "" else "not scored")
        return {"cards": [make_card(scored, outcome, about, model.threshold)]}

    return app


def operation_outcome(text, status):
    """Answer an error as FHIR does."""
    issue = {"severity": "error", "code": "processing", "diagnostics": text}
    content = {"resourceType": "OperationOutcome", "issue": [issue]}
    return JSONResponse(content, status, media_type="application/fhir+json")


def make_card(scored, outcome, about, threshold):
    """Return a card of CDS Hooks, whose summary is shorter than 140 characters."""
    detail = f"Predicted from {100 * threshold:.1f} % on. {NOT_A_DEVICE}"
    text, indicator = "no risk", "info"
    if scored["problem"]:
        detail = f"{scored['problem']}. {NOT_A_DEVICE}"
    else:
        text = f"risk {100 * scored['probability']:.1f} %"
        indicator = "warning" if scored["prediction"] == 1 else "info"
    card = {"uuid": str(uuid.uuid4()), "summary": f"{outcome[:100]}: {text}", "detail": detail}
    return {**card, "indicator": indicator, "source": {"label": about}}


# ------------------------------------------------------------------ FHIR to a row


def make_row(patient, bundle, mapping, now):
    """Return the row of the data file that a patient and a Bundle of observations fill."""
    series = defaultdict(list)
    for entry in bundle.get("entry", []):
        found = read_observation(entry["resource"], mapping["codes"])
        if found is None:
            continue
        column, time, value = found
        if 0 <= (now - time).total_seconds() <= 3600 * mapping["lookback_hours"]:
            series[column].append((time, value))
    first = min((time for values in series.values() for time, _ in values), default=now)
    row = dict.fromkeys([*columns_of(mapping), *mapping["empty"], *mapping["patient"].values()], "")
    for column, values in series.items():
        texts = [f"{x:.6g} ({hours(time, first)}h)" for time, x in sorted(values)]
        is_static = column.startswith("static_")
        row[column] = f"{max(values)[1]:.6g}" if is_static else " -> ".join(texts)
    sexes = {"male": "1", "female": "0"}
    row[mapping["patient"]["male"]] = sexes.get(patient.get("gender"), "")
    if len(born := patient.get("birthDate", "")) == 10:  # FHIR also has years and months
        born, day = date.fromisoformat(born), now.date()
        had_birthday = (day.month, day.day) >= (born.month, born.day)
        row[mapping["patient"]["age"]] = str(day.year - born.year - (not had_birthday))
    return row | {"prediction_hours": hours(now, first)}


def read_observation(observation, codes):
    """Return column, time and value of an observation; None where the model does not read it."""
    coded = [x["code"] for x in observation["code"]["coding"] if x.get("system") == LOINC]
    code = next((x for x in coded if x in codes), None)
    quantity = observation.get("valueQuantity", {})
    is_final = observation["status"] in ("final", "amended", "corrected")
    if code is None or not is_final or "value" not in quantity or "comparator" in quantity:
        return None
    factor = codes[code]["units"].get(quantity.get("code") or quantity.get("unit"))
    if factor is None:
        accepted = ", ".join(codes[code]["units"])
        raise RefusedError(f"an observation of LOINC {code} has a unit other than {accepted}")
    time = datetime.fromisoformat(observation.get("effectiveDateTime", ""))
    if time.tzinfo is None:
        raise RefusedError(f"an observation of LOINC {code} has no time with its time zone")
    return codes[code]["column"], time, float(quantity["value"]) * factor


def columns_of(mapping):
    """Return the columns that observations fill, each once."""
    return list(dict.fromkeys(x["column"] for x in mapping["codes"].values()))


def hours(time, first):
    """Return the hours since the first observation, as a cell of the data file."""
    return f"{(time - first).total_seconds() / 3600:.4f}"


def made_up_row(mapping):
    """Return a row that any model scores whose columns the mapping knows."""
    row = make_row({}, {}, mapping, datetime.now(UTC))
    series = {x: "1 (0h)" for x in columns_of(mapping) if not x.startswith("static_")}
    return row | series | {"id": "made up"}


# ------------------------------------------------------------------ what --monitor reads


class Log:
    """predictions.csv and predictions.inputs.csv of a folder, to which each prediction is added."""

    def __init__(self, folder, model):
        """Open both files for the owner alone; refuse those of a model with other inputs."""
        inputs = model.config["inputs"]
        self.main = model.config["features"][0]  # the feature of the column clinical_trajectory
        self.names = [*inputs.get("series", model.config["features"]), *inputs["static"]]
        self.paths = folder / "predictions.csv", folder / "predictions.inputs.csv"
        measured = [x for name in self.names for x in (name, f"{name} measured")]
        headers = ["id", "probability", "prediction", "problem", "predicted_at"], ["id", *measured]
        folder.mkdir(parents=True, exist_ok=True)
        for path, header in zip(self.paths, headers, strict=True):
            if not path.exists():
                path.touch(mode=0o600)
                append(path, header)
            with path.open(newline="", encoding="utf-8") as file:
                if next(csv.reader(file)) != header:
                    raise ValueError(f"{path}: of other inputs: move it away")

    def write(self, row, scored, now):
        """Add a prediction, and the last value of each input that the model reads."""
        cells = {self.main if k == "clinical_trajectory" else input_name(k): k for k in row}
        last = [row[cells[name]].rpartition("-> ")[2].partition(" (")[0] for name in self.names]
        result = ["" if pd.isna(scored[x]) else scored[x] for x in ("probability", "prediction")]
        time = now.astimezone(UTC).isoformat(timespec="seconds")
        append(self.paths[0], [row["id"], *result, scored["problem"], time])
        append(self.paths[1], [row["id"], *(y for x in last for y in (x, int(x != "")))])


def input_name(column):
    """Return the name of the input that the program reads in a column."""
    if match := re.fullmatch(r"trajectory_([^\[]+?)\s*(?:\[.*\])?", column):
        return " ".join(match[1].replace("_", " ").split())
    return column


def append(path, line):
    """Add a line to a CSV file."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(line)
