-- The laboratory values of the wanted admissions, from the table labs.

-- A value that names no admission belongs to the only one of its patient around it.
CREATE TABLE around AS
SELECT labs.rowid AS lab, CASE WHEN count(stay) = 1 THEN min(stay) END AS stay
FROM labs LEFT JOIN stays
    ON stays.subject_id = labs.subject_id AND charttime BETWEEN begins AND ends
WHERE labs.hadm_id IS NULL AND isfinite(valuenum)
GROUP BY labs.rowid;

-- A value that names an admission of its patient belongs there from one day before the admission
-- (emergency department) to its end.
CREATE TABLE placed AS
SELECT
    itemid AS item, charttime AS chart, storetime AS stored, valuenum AS value, valueuom AS unit,
    ref_range_lower AS low, ref_range_upper AS high,
    labs.hadm_id IS NOT NULL AS named,
    named_stay.stay IS NOT NULL AS of_patient,
    CASE
        WHEN labs.hadm_id IS NULL THEN around.stay
        WHEN charttime BETWEEN begins - INTERVAL 24 HOURS AND ends THEN named_stay.stay
    END AS stay
FROM labs
LEFT JOIN stays AS named_stay
    ON named_stay.hadm_id = labs.hadm_id AND named_stay.subject_id = labs.subject_id
LEFT JOIN around ON around.lab = labs.rowid
WHERE isfinite(valuenum);
DROP TABLE around;

-- A value is known when it is stored, and never before it is charted.
CREATE TABLE measured AS
SELECT
    stay, item, chart, value, unit, low, high,
    CASE WHEN stored < chart THEN chart ELSE stored END AS known
FROM placed SEMI JOIN wanted USING (stay);

-- What is left out, and how the others found their admission.
CREATE TABLE value_counts AS
SELECT
    (SELECT count(*) FROM labs WHERE NOT coalesce(isfinite(valuenum), false))
        AS "without a number",
    count(*) FILTER (named AND NOT of_patient)
        AS "whose hadm_id is no admission of the patient",
    count(*) FILTER (NOT named AND stay IS NOT NULL)
        AS "without hadm_id, within one admission: taken",
    count(*) FILTER (NOT named AND stay IS NULL)
        AS "without hadm_id, within none or several",
    count(*) FILTER (named AND of_patient AND stay IS NULL)
        AS "outside the admission that they name",
    (SELECT count(*) FROM measured WHERE known IS NULL)
        AS "without a time of storing: no input, outcome alone"
FROM placed;
DROP TABLE placed;
DROP TABLE labs;
