"""A CDS Hooks service of one trained model: FHIR observations in, a card with the risk out.

    CHECKPOINT=runs/trajectory LOGS=served uvicorn --app-dir tests/examples --factory serve:main

Not for clinical use. Put it behind a proxy that ends TLS and checks the client's token.
"""

import csv
import json
import logging
import math
import os
import re
import threading
import tomllib
import uuid
from collections import defaultdict
from datetime import UTC, date, datetime
from pathlib import Path

import pandas as pd
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from medgemma_trainer import TrajectoryModel

LOINC = "http://loinc.org"
HOOK = "patient-view"
FHIR_ID = r"[A-Za-z0-9\-.]{1,64}"
MAX_BODY = 10**7  # bytes
NOT_A_DEVICE = "Research software. Not a medical device, not for clinical use."
logger = logging.getLogger(__name__)


class RefusedError(Exception):
    """What a request lacks; its text never holds a patient's values."""

    def __init__(self, text, status=422):
        super().__init__(text)
        self.status = status


def main() -> FastAPI:
    """Build the service that the environment describes."""
    logging.basicConfig(level=logging.INFO)
    mapping = os.environ.get("MAPPING", Path(__file__).with_name("loinc.toml"))
    return make_app(os.environ["CHECKPOINT"], mapping, os.environ["LOGS"])


def make_app(checkpoint, mapping, logs, clock=lambda: datetime.now(UTC)) -> FastAPI:
    """Build the service; a mapping that does not fit the model stops it here."""
    model = TrajectoryModel.from_pretrained(checkpoint)
    mapping = tomllib.loads(Path(mapping).read_text(encoding="utf-8"))
    lock = threading.Lock()
    outcome, about = model.config["outcome"], f"medgemma-clinical {model.config['version']}"
    app = FastAPI(title=outcome)

    def score(row):
        return model.predictions(pd.DataFrame([row])).iloc[0]

    made_up = made_up_row(mapping)
    if problem := score(made_up)["problem"]:
        raise ValueError(f"the mapping does not fit the model: {problem}")
    log = Log(Path(logs), model, made_up)

    @app.get("/health")
    async def health():  # no thread and no lock: it answers while predictions wait
        return {"status": "ok", "outcome": outcome, "model": about}

    @app.get("/cds-services")
    def discover():
        codes = ",".join(f"{LOINC}|{code}" for code in mapping["codes"])
        query = f"Observation?patient={{{{context.patientId}}}}&code={codes}"
        prefetch = {"patient": "Patient/{{context.patientId}}", "observations": query}
        service = {"id": "risk", "hook": HOOK, "title": f"Risk: {outcome}"}
        service |= {"description": f"{model.config['question']} {NOT_A_DEVICE}"}
        return {"services": [{**service, "prefetch": prefetch}]}

    @app.post("/cds-services/risk")
    async def risk(request: Request):
        try:
            body = await read_body(request)
        except RefusedError as error:
            return operation_outcome(str(error), error.status)
        return await run_in_threadpool(answer, body)

    def answer(body):
        now = clock()
        try:
            row = read_request(body, mapping, now)
        except RefusedError as error:
            return operation_outcome(str(error), error.status)
        except Exception:  # of any kind: a body holds anything, and an error may quote a value
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


async def read_body(request):
    """Return the bytes of a request in JSON; refuse more than MAX_BODY before they are held."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RefusedError("the content type is not application/json", 415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RefusedError(f"more than {MAX_BODY:,} bytes", 413)
    return bytes(body)


def read_request(body, mapping, now):
    """Return the row of the data file that a request fills, with the id of its log."""
    request = json.loads(body)
    prefetch, context = request.get("prefetch") or {}, request["context"]
    patient, bundle = prefetch.get("patient"), prefetch.get("observations")
    if request["hook"] != HOOK:
        raise RefusedError(f"the hook is not {HOOK}")
    if not (patient and bundle):
        raise RefusedError("the prefetch of patient and observations is needed", 412)
    patient_id = context["patientId"]
    name = context.get("encounterId") or patient_id
    if not (re.fullmatch(FHIR_ID, patient_id) and re.fullmatch(FHIR_ID, name)):
        raise RefusedError("an id of the context is not of FHIR's form")
    check_patient(patient, bundle, patient_id)
    return make_row(patient, bundle, mapping, now) | {"id": name}


def check_patient(patient, bundle, patient_id):
    """Refuse what is not the whole Bundle of the patient of the context."""
    if (patient["resourceType"], bundle["resourceType"]) != ("Patient", "Bundle"):
        raise RefusedError("the prefetch holds no Patient, or no Bundle")
    if patient["id"] != patient_id:
        raise RefusedError("the Patient is not the one of the context")
    if any(link["relation"] == "next" for link in bundle.get("link", [])):
        raise RefusedError("the Bundle has a further page: prefetch all observations")
    for entry in bundle.get("entry", []):
        reference = entry["resource"]["subject"]["reference"].partition("/_history/")[0]
        if reference.split("/")[-2:] != ["Patient", patient_id]:
            raise RefusedError("an observation is not of the patient of the context")


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
    about = {"male": {"male": "1", "female": "0"}.get(patient.get("gender"), ""), "age": ""}
    if len(born := patient.get("birthDate", "")) == 10:  # FHIR also has years and months
        born, day = date.fromisoformat(born), now.date()
        if born > day:
            raise RefusedError("the birth date lies in the future")
        had_birthday = (day.month, day.day) >= (born.month, born.day)
        about["age"] = str(day.year - born.year - (not had_birthday))
    row |= {column: about[name] for name, column in mapping["patient"].items()}
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
    value = quantity["value"]
    if type(value) not in (int, float) or not math.isfinite(value):  # true is no number
        raise RefusedError(f"an observation of LOINC {code} has a value that is no number")
    return codes[code]["column"], time, value * factor


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


# ------------------------------------------------------------------ what monitor reads


class Log:
    """predictions.csv and predictions.inputs.csv of a folder, to which each prediction is added."""

    def __init__(self, folder, model, row):
        """Open both files for the owner alone; refuse those that do not fit, or no longer pair."""
        inputs, main = model.config["inputs"], model.config["features"][0]
        self.names = [*inputs.get("series", model.config["features"]), *inputs["static"]]
        self.cells = {main if k == "clinical_trajectory" else input_name(k): k for k in row}
        if absent := [name for name in self.names if name not in self.cells]:
            raise ValueError(f"the mapping has no column of the input {absent[0]}, spelled so")
        self.paths = folder / "predictions.csv", folder / "predictions.inputs.csv"
        measured = [x for name in self.names for x in (name, f"{name} measured")]
        columns = ["id", "probability", "prediction", "problem", "predicted_at", "model_sha256"]
        headers, self.model = (columns, ["id", *measured]), model.trained.sha256
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ids = []
        for path, header in zip(self.paths, headers, strict=True):
            if not path.exists():
                path.touch(mode=0o600)
                append(path, header)
            with path.open(newline="", encoding="utf-8") as file:
                lines = [*csv.reader(file)]
            if lines[:1] != [header]:
                raise ValueError(f"{path}: of other inputs: move it away")
            whole = [line for line in lines[1:] if len(line) == len(header)]
            if path == self.paths[0] and any(line[-1] != self.model for line in whole):
                raise ValueError(f"{path}: of another model: move both files away")
            ids.append([line[0] for line in whole])
        if ids[0] != ids[1]:
            first, second = self.paths
            raise ValueError(f"{first}: not of the same lines as {second}: remove what is single")

    def write(self, row, scored, now):
        """Add a prediction and the last value of each input of the model: both lines or none."""
        last = [row[self.cells[x]].rpartition("-> ")[2].partition(" (")[0] for x in self.names]
        result = ["" if pd.isna(scored[x]) else scored[x] for x in ("probability", "prediction")]
        time = now.astimezone(UTC).isoformat(timespec="seconds")
        inputs = [row["id"], *(y for x in last for y in (x, int(x != "")))]
        sizes = [path.stat().st_size for path in self.paths]
        try:
            append(self.paths[0], [row["id"], *result, scored["problem"], time, self.model])
            append(self.paths[1], inputs)
        except BaseException:
            for path, size in zip(self.paths, sizes, strict=True):
                os.truncate(path, size)
            raise


def input_name(column):
    """Return the name of the input that the program reads in a column."""
    if match := re.fullmatch(r"trajectory_([^\[]+?)\s*(?:\[.*\])?", column):
        return " ".join(match[1].replace("_", " ").split())
    return column


def append(path, line):
    """Add a line to a CSV file."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(line)
