-- All admissions, from the tables patients, admissions and ketoacidosis.
CREATE TABLE stays AS
WITH
-- A death in hospital: deathtime, or the discharge where only hospital_expire_flag says so.
recorded AS (
    SELECT
        admissions.*, gender, anchor_age, anchor_year,
        coalesce(deathtime, CASE WHEN hospital_expire_flag = 1 THEN dischtime END) AS death
    FROM admissions LEFT JOIN patients USING (subject_id)
),
-- A death after the discharge counts on the same day only, since discharges of the dead often bear
-- a date without a time; on a later day it was no death in hospital.
in_hospital AS (
    SELECT * REPLACE (
        CASE WHEN death > dischtime AND death::DATE != dischtime::DATE THEN NULL ELSE death END
        AS death
    )
    FROM recorded
),
-- Ages are those of the year of admission. MIMIC-IV writes 91 for all ages above 89: such a patient
-- has the least possible age.
aged AS (
    SELECT *, coalesce(anchor_age > 89, false) AS age_is_least, year(admittime) - anchor_year AS since FROM in_hospital
)
SELECT
    row_number() OVER (ORDER BY subject_id, hadm_id) AS stay,
    subject_id, hadm_id, id, admittime AS begins, coalesce(death, dischtime) AS ends, death,
    upper(gender) AS sex, age_is_least,
    CASE WHEN age_is_least THEN 90 + least(since, 0) ELSE anchor_age + since END AS age,
    hadm_id IN (SELECT hadm_id FROM ketoacidosis) AS coded,
    -- NULL where the code has no time: it is given at discharge.
    (SELECT min(entered) FROM ketoacidosis WHERE ketoacidosis.hadm_id = aged.hadm_id) AS coded_at
FROM aged;

-- The admissions whose laboratory values are read.
CREATE TABLE wanted AS
SELECT stay, subject_id FROM stays
WHERE coded OR getvariable('cohort') != 'dka';
