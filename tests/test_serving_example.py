"""The example of a CDS Hooks service: cards from FHIR, refusals, what it logs for monitor."""

import importlib.util
import json
import logging
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fastapi.testclient import TestClient

from conftest import DATA
from medgemma_clinical.files import InputError
from medgemma_trainer import TrajectoryModel

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent / "examples"
MAPPING = EXAMPLES / "loinc.toml"
JSON = {"content-type": "application/json; charset=utf-8"}
NOW = datetime(2026, 3, 3, 12, tzinfo=UTC)
PATIENT = {"resourceType": "Patient", "id": "pat-7", "gender": "male", "birthDate": "1956-03-04"}
SECRETS = ("23.75", "enc-9", "pat-7", "1956", "101.5")

spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


def observation(code, value, unit, time, system="http://loinc.org", **more):
    quantity = {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": unit}
    coding = [{"system": "http://local", "code": "HCO3"}, {"system": system, "code": code}]
    found = {"resourceType": "Observation", "status": "final", "code": {"coding": coding}}
    found["subject"] = {"reference": "https://fhir.example/R4/Patient/pat-7/_history/2"}
    return {**found, "effectiveDateTime": time, "valueQuantity": quantity, **more}


def request_of(*observations, patient=PATIENT, links=("self",), **context):
    """A request as an electronic record sends it, with both values prefetched."""
    entries = [{"resource": each} for each in observations]
    bundle = {"resourceType": "Bundle", "type": "searchset", "entry": entries}
    bundle["link"] = [{"relation": name, "url": "https://fhir.example/R4"} for name in links]
    context = {"userId": "Practitioner/1", "patientId": "pat-7", "encounterId": "enc-9", **context}
    words = {"hook": "patient-view", "hookInstance": "d1577c69-dfbe-44ad-ba6d-3e05e953b2ea"}
    return {**words, "context": context, "prefetch": {"patient": patient, "observations": bundle}}


READ = (
    observation("1963-8", 23.75, "mmol/L", "2026-03-03T06:00:00Z"),
    observation("1963-8", 19, "mmol/L", "2026-03-03T04:30:00-06:00"),
    observation("29463-7", 101500, "g", "2026-03-02T12:00:00Z"),
)
LEFT_OUT = (
    observation("99999-9", 1, "mmol/L", "2026-03-03T06:00:00Z"),  # of no input
    observation("1963-8", 1, "mmol/L", "2026-03-03T06:00:00Z", system="http://snomed.info/sct"),
    observation("1963-8", 1, "mmol/L", "2026-03-01T06:00:00Z"),  # older than 48 hours
    observation("1963-8", 1, "mmol/L", "2026-03-03T12:00:01Z"),  # after the prediction
    observation("1963-8", 1, "mmol/L", "2026-03-03T06:00:00Z", status="entered-in-error"),
    observation("1963-8", 1, "mmol/L", "2026-03-03T06:00:00Z", valueQuantity={"unit": "mmol/L"}),
)


@pytest.fixture
def client(runs, tmp_path):
    app = serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs", clock=lambda: NOW)
    return TestClient(app)


@pytest.fixture(scope="module")
def refusing(runs, tmp_path_factory):
    """A client whose service logs nothing, shared by all refusals, and its folder."""
    folder = tmp_path_factory.mktemp("refusing")
    app = serve.make_app(runs / "trajectory", MAPPING, folder / "logs", clock=lambda: NOW)
    return TestClient(app), folder


def written(tmp_path, name):
    return pd.read_csv(tmp_path / "logs" / name, dtype=str, keep_default_na=False)


def test_a_card_states_the_risk_of_the_row_and_both_files_log_it(client, runs, tmp_path):
    (service,) = client.get("/cds-services").json()["services"]
    assert (service["id"], service["hook"]) == ("risk", "patient-view")
    assert "http://loinc.org|1963-8," in service["prefetch"]["observations"]
    assert client.get("/health").json()["status"] == "ok"
    answer = client.post("/cds-services/risk", json=request_of(*LEFT_OUT, *READ))
    (card,) = answer.json()["cards"]
    row = {"clinical_trajectory": "23.75 (18h) -> 19 (22.5h)", "static_age [years]": 69}
    row |= {"static_sex_male": 1, "static_weight [kg]": 101.5, "prediction_hours": 24}
    table = pd.DataFrame([row | dict.fromkeys(tomllib.loads(MAPPING.read_text())["empty"])])
    model = TrajectoryModel.from_pretrained(runs / "trajectory")
    ((_, risk),) = model.predict_proba(table)
    assert card["summary"] == f"In-hospital death: risk {100 * risk:.1f} %"
    assert card["indicator"] == ("warning" if risk >= model.threshold else "info")
    assert "Not a medical device" in card["detail"]
    assert card["source"]["label"].startswith("medgemma-clinical ")
    (line,) = written(tmp_path, "predictions.csv").to_dict("records")
    assert (line["id"], line["predicted_at"]) == ("enc-9", "2026-03-03T12:00:00+00:00")
    assert line["model_sha256"] == model.trained.sha256
    assert float(line["probability"]) == pytest.approx(risk, abs=1e-6)
    assert line["prediction"] == str(int(risk >= model.threshold))
    (inputs,) = written(tmp_path, "predictions.inputs.csv").to_dict("records")
    assert (inputs["Serum bicarbonate"], inputs["Serum bicarbonate measured"]) == ("19", "1")
    assert (inputs["static_weight [kg]"], inputs["static_age [years]"]) == ("101.5", "69")
    assert inputs["static_unit_medical measured"] == "0"
    names = {*model.config["inputs"]["series"], *model.config["inputs"]["static"]}
    assert {*inputs} == {"id", *names, *(f"{name} measured" for name in names)}
    for path in (tmp_path / "logs").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


def test_each_prediction_is_a_line_also_after_a_restart(client, runs, tmp_path):
    for number in ("1", "2"):
        client.post("/cds-services/risk", json=request_of(*READ, encounterId=number))
        client = TestClient(serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs"))
    client.post("/cds-services/risk", json=request_of(*READ, encounterId=None))
    assert written(tmp_path, "predictions.csv")["id"].tolist() == ["1", "2", "pat-7"]
    assert written(tmp_path, "predictions.inputs.csv")["id"].tolist() == ["1", "2", "pat-7"]


def test_lines_of_another_model_stop_the_start(client, runs, tmp_path):
    client.post("/cds-services/risk", json=request_of(*READ))
    path = tmp_path / "logs" / "predictions.csv"
    line = path.read_text().rpartition(",")[0]
    path.write_text(f"{line},{'0' * 64}\n")
    with pytest.raises(ValueError, match="another model"):
        serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs")


def test_without_an_observation_the_card_says_why_there_is_no_risk(client, tmp_path):
    (card,) = client.post("/cds-services/risk", json=request_of(*LEFT_OUT)).json()["cards"]
    assert card["summary"] == "In-hospital death: no risk"
    assert "no series of this row holds a value" in card["detail"]
    (line,) = written(tmp_path, "predictions.csv").to_dict("records")
    assert (line["probability"], line["prediction"]) == ("", "")


def spoiled(**changes):
    return request_of(*READ, {**READ[0], **changes})


def value_of(value):
    return spoiled(valueQuantity={"value": value, "code": "mmol/L"})


OTHERS = ("Patient/pat-70", "Group/pat-7", "NoPatient/pat-7")
NO_IDS = ("A" * 65, "=1+1", "a\n")


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (request_of(observation("1963-8", 23.75, "mg/dL", NOW.isoformat())), 422, "1963-8"),
        (spoiled(effectiveDateTime="2026-03-03T06:00:00"), 422, "time zone"),
        (spoiled(effectiveDateTime="23.75"), 422, "Bundle"),
        (spoiled(code=None), 422, "Bundle"),
        *((value_of(x), 422, "1963-8") for x in ("23.75", True, float("nan"))),
        (value_of(10**400), 422, "Bundle"),
        *((spoiled(subject={"reference": x}), 422, "patient") for x in OTHERS),
        (spoiled(subject=None), 422, "Bundle"),
        (request_of(*READ, links=("self", "next")), 422, "further page"),
        (request_of(*READ, patient={**PATIENT, "id": "pat-8"}), 422, "Patient"),
        (request_of(*READ, patient={**PATIENT, "birthDate": "2026-03-04"}), 422, "birth"),
        *((request_of(*READ, encounterId=x), 422, "id of the context") for x in NO_IDS),
        ({**request_of(*READ), "hook": "order-sign"}, 422, "hook"),
        ([1], 422, "Bundle"),
        (request_of(*READ, patient={**PATIENT, "birthDate": "1956-23-75"}), 422, "Bundle"),
        ({**request_of(*READ), "context": {}}, 422, "Bundle"),
        ({**request_of(*READ), "prefetch": None}, 412, "prefetch"),
    ],
)
def test_a_request_that_cannot_be_read_gets_an_outcome_without_values(
    body, status, expected, refusing
):
    client, folder = refusing
    answer = client.post("/cds-services/risk", content=json.dumps(body), headers=JSON)
    assert answer.status_code == status
    assert answer.json()["resourceType"] == "OperationOutcome"
    assert expected in answer.json()["issue"][0]["diagnostics"]
    assert not [secret for secret in SECRETS if secret in answer.text]
    assert written(folder, "predictions.csv").empty


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (json.dumps(request_of(*READ)), {"content-type": "text/plain"}, 415),
        ("23.75", JSON, 422),
        (b"\xff", JSON, 422),
        ('{"prefetch":' + "[" * 10**5, JSON, 422),
        (json.dumps(request_of(*READ, note=" " * serve.MAX_BODY)), JSON, 413),
    ],
    ids=["text", "number", "bytes", "deep", "long"],
)
def test_what_is_no_request_gets_an_outcome_without_values(body, headers, status, refusing):
    client, folder = refusing
    answer = client.post("/cds-services/risk", content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["resourceType"] == "OperationOutcome"
    assert not [secret for secret in SECRETS if secret in answer.text]
    assert written(folder, "predictions.csv").empty


def test_health_answers_while_a_prediction_waits(client, monkeypatch):
    def wait(*_):
        answers.append(client.get("/health").json()["status"])
        return write(*_)

    answers, write = [], serve.Log.write
    monkeypatch.setattr(serve.Log, "write", wait)  # within the lock of the model
    client.post("/cds-services/risk", json=request_of(*READ))
    assert answers == ["ok"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_disk_that_is_full_leaves_both_files_or_none_with_the_line(
    fails, client, runs, tmp_path, monkeypatch
):
    def full(path, line):
        calls.append(path)
        append(path, line)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")

    calls, append = [], serve.append
    with monkeypatch.context() as patch:
        patch.setattr(serve, "append", full)
        with pytest.raises(OSError, match="space"):
            client.post("/cds-services/risk", json=request_of(*READ, encounterId="lost"))
    client.post("/cds-services/risk", json=request_of(*READ))
    for name in ("predictions.csv", "predictions.inputs.csv"):
        assert written(tmp_path, name)["id"].tolist() == ["enc-9"]


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.inputs.csv"])
@pytest.mark.parametrize("cut", [1, None])
def test_files_of_unequal_lines_stop_the_start(name, cut, client, runs, tmp_path):
    client.post("/cds-services/risk", json=request_of(*READ))
    path = tmp_path / "logs" / name
    text = path.read_text()
    path.write_text(text[: text.index("\n") + 1 + (9 if cut else 0)])  # killed within a write
    with pytest.raises(ValueError, match=r"predictions\.inputs\.csv"):
        serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs")


def test_no_value_reaches_the_log_of_the_service(client, caplog):
    with caplog.at_level(logging.DEBUG):
        client.post("/cds-services/risk", json=request_of(*READ))
        client.post("/cds-services/risk", json=spoiled(code=None))
    assert "one prediction, scored" in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_a_mapping_that_lacks_an_input_or_a_changed_model_stops_the_start(runs, tmp_path):
    path = tmp_path / "mapping.toml"
    path.write_text(MAPPING.read_text().replace('"static_unit_medical", ', ""))
    with pytest.raises(InputError, match="static_unit_medical"):
        serve.make_app(runs / "trajectory", path, tmp_path / "logs")
    config = {"features": ["Bicarbonate", "Lactate"], "inputs": {"static": []}}
    row = {"clinical_trajectory": "", "trajectory_LACTATE": ""}
    with pytest.raises(ValueError, match="Lactate"):  # the model reads it, the log would not
        serve.Log(tmp_path / "logs", SimpleNamespace(config=config), row)
    serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs")
    (tmp_path / "logs" / "predictions.inputs.csv").write_text("id,another input\n")
    with pytest.raises(ValueError, match="move it away"):
        serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs")


def test_the_mapping_fits_the_columns_that_it_is_made_for():
    header = pd.read_csv(DATA / "physionet2012_chemistry.csv.gz", nrows=0)
    row = serve.made_up_row(tomllib.loads(MAPPING.read_text()))
    others = {"subject_id", "clinical_context", "label_escalation"}
    assert {*header} - others == {*row} - {"id", "prediction_hours"}
