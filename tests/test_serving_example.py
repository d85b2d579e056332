"""The example of a CDS Hooks service: cards from FHIR, refusals, what it logs for --monitor."""

import copy
import importlib.util
import logging
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from fastapi.testclient import TestClient

from conftest import DATA
from medgemma_clinical.files import InputError
from medgemma_trainer import TrajectoryModel

EXAMPLES = Path(__file__).parent / "examples"
MAPPING = EXAMPLES / "loinc.toml"
NOW = datetime(2026, 3, 3, 12, tzinfo=UTC)
PATIENT = {"resourceType": "Patient", "gender": "male", "birthDate": "1956-03-04"}
SECRETS = ("23.75", "enc-9", "pat-7", "1956", "101.5")

spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


def observation(code, value, unit, time, system="http://loinc.org", **more):
    quantity = {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": unit}
    coding = [{"system": "http://local", "code": "HCO3"}, {"system": system, "code": code}]
    found = {"resourceType": "Observation", "status": "final", "code": {"coding": coding}}
    return {**found, "effectiveDateTime": time, "valueQuantity": quantity, **more}


def request_of(*observations, patient=PATIENT, **context):
    """A request as an electronic record sends it, with both values prefetched."""
    entries = [{"resource": each} for each in observations]
    bundle = {"resourceType": "Bundle", "type": "searchset", "entry": entries}
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


def test_each_prediction_is_a_line_also_after_a_restart(client, runs, tmp_path):
    for number in ("1", "2"):
        client.post("/cds-services/risk", json=request_of(*READ, encounterId=number))
        client = TestClient(serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs"))
    client.post("/cds-services/risk", json=request_of(*READ, encounterId=None))
    assert written(tmp_path, "predictions.csv")["id"].tolist() == ["1", "2", "pat-7"]
    assert written(tmp_path, "predictions.inputs.csv")["id"].tolist() == ["1", "2", "pat-7"]


def test_without_an_observation_the_card_says_why_there_is_no_risk(client, tmp_path):
    (card,) = client.post("/cds-services/risk", json=request_of(*LEFT_OUT)).json()["cards"]
    assert card["summary"] == "In-hospital death: no risk"
    assert "no series of this row holds a value" in card["detail"]
    (line,) = written(tmp_path, "predictions.csv").to_dict("records")
    assert (line["probability"], line["prediction"]) == ("", "")


def spoiled(**changes):
    return request_of(*READ, {**READ[0], **changes})


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (request_of(observation("1963-8", 23.75, "mg/dL", NOW.isoformat())), 422, "1963-8"),
        (spoiled(effectiveDateTime="2026-03-03T06:00:00"), 422, "time zone"),
        (spoiled(effectiveDateTime="23.75"), 422, "Bundle"),
        (spoiled(code=None), 422, "Bundle"),
        (spoiled(valueQuantity={"value": "23.75x", "code": "mmol/L"}), 422, "Bundle"),
        (request_of(*READ, patient={"birthDate": "1956-23-75"}), 422, "Bundle"),
        ({**request_of(*READ), "context": {}}, 422, "Bundle"),
        ({**request_of(*READ), "prefetch": None}, 412, "prefetch"),
        ({**request_of(*READ), "prefetch": {"patient": PATIENT}}, 412, "prefetch"),
    ],
)
def test_a_request_that_cannot_be_read_gets_an_outcome_without_values(
    body, status, expected, client, tmp_path
):
    answer = client.post("/cds-services/risk", json=copy.deepcopy(body))
    assert answer.status_code == status
    assert answer.json()["resourceType"] == "OperationOutcome"
    assert expected in answer.json()["issue"][0]["diagnostics"]
    assert not [secret for secret in SECRETS if secret in answer.text]
    assert written(tmp_path, "predictions.csv").empty


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
    (tmp_path / "logs" / "predictions.inputs.csv").write_text("id,another input\n")
    with pytest.raises(ValueError, match="move it away"):
        serve.make_app(runs / "trajectory", MAPPING, tmp_path / "logs")


def test_the_mapping_fits_the_columns_that_it_is_made_for():
    header = pd.read_csv(DATA / "physionet2012_chemistry.csv.gz", nrows=0)
    row = serve.made_up_row(tomllib.loads(MAPPING.read_text()))
    others = {"subject_id", "clinical_context", "label_escalation"}
    assert {*header} - others == {*row} - {"id", "prediction_hours"}
