-- The tables of an admission as MIMIC-IV has them, from eICU's patient and admissionDx.

-- Unit stays on the clock of their hospital stay: offsets count from the admission to the unit. The
-- base date is arbitrary; between hospital stays of a patient as many years pass as in their ages.
-- Hospital stays of unknown discharge status or unknown age are left out.
CREATE TABLE unit_stays AS
SELECT
    *, uniquepid AS subject_id, patienthealthsystemstayid AS hadm_id,
    -- '> 89' is the least possible age, 90.
    CASE WHEN age LIKE '>%' THEN 90 ELSE TRY_CAST(age AS INTEGER) END AS years,
    min(years) OVER (PARTITION BY uniquepid) AS anchor_age,
    min(years) OVER (PARTITION BY patienthealthsystemstayid) - anchor_age AS years_since,
    TIMESTAMP '2000-07-01' + to_years(years_since) - to_minutes(hospitaladmitoffset) AS intime
FROM patient WHERE hospitaldischargestatus != '' AND years IS NOT NULL;

CREATE VIEW patients AS
SELECT
    subject_id, min(left(gender, 1)) AS gender, min(anchor_age) AS anchor_age, 2000 AS anchor_year
FROM unit_stays GROUP BY subject_id;

-- An admission begins with the first stay in a unit: before it the data base does not know the
-- patient.
CREATE VIEW admissions AS
SELECT
    subject_id, hadm_id, min(intime) AS admittime,
    arg_min(patientunitstayid, (intime, patientunitstayid)) AS id,
    min(intime + to_minutes(hospitaldischargeoffset)) AS dischtime, NULL::TIMESTAMP AS deathtime,
    max(hospitaldischargestatus = 'Expired')::INTEGER AS hospital_expire_flag
FROM unit_stays GROUP BY subject_id, hadm_id;

-- Step-down units are no intensive care.
CREATE VIEW icustays AS
SELECT
    hadm_id, intime, intime + to_minutes(unitdischargeoffset) AS outtime,
    unittype AS first_careunit
FROM unit_stays WHERE unitstaytype NOT LIKE 'stepdown%';

CREATE VIEW ketoacidosis AS
SELECT hadm_id, intime + to_minutes(admitdxenteredoffset) AS entered
FROM admissionDx JOIN unit_stays USING (patientunitstayid)
WHERE admitdxpath LIKE '%|Diabetic ketoacidosis';
