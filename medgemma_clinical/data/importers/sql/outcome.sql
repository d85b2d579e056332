-- What happens within the horizon: after the prediction time, up to its end and including it. When an
-- open gap closes has no horizon.

-- Death in this hospital admission, and discharge alive.
CREATE TABLE ends_of_stays AS
SELECT
    stay,
    coalesce(death > time AND death <= until, false) AS died,
    NOT died AND coalesce(ends < until, false) AS discharged_alive
FROM stays JOIN windows USING (stay);

-- Intensive care at the prediction time, and stays in it that begin later.
CREATE TABLE intensive_care AS
SELECT
    stay,
    last(first_careunit ORDER BY intime, first_careunit)
        FILTER (intime <= time AND NOT coalesce(outtime <= time, false)) AS unit,
    coalesce(bool_or(intime > time AND intime <= until), false) AS admitted
FROM windows
JOIN stays USING (stay)
JOIN icustays USING (hadm_id)
GROUP BY stay;

-- The course of the anion gap, whenever it was stored: closed at or below 12 mEq/L (Kitabchi 2009,
-- resolution of ketoacidosis). Of several values at one time a closed one decides.
CREATE TABLE course AS
SELECT stay, chart, chart <= time AS before, chart <= until AS within, min(value) > 12 AS open
FROM converted JOIN windows USING (stay)
WHERE item = getvariable('gap_item')
GROUP BY stay, chart, before, within;

-- The gap at the prediction time, and what becomes of it.
CREATE TABLE gap_outcome AS
WITH marks AS (
    SELECT
        stay,
        max(chart) FILTER (before AND open) AS last_open,
        max(chart) FILTER (before AND NOT open) AS last_closed,
        coalesce(last_closed > last_open, last_closed IS NOT NULL) AS closed_then,
        min(chart) FILTER (NOT before AND NOT open) AS closes,
        max(chart) FILTER (NOT before AND open AND within) AS open_later,
        bool_or(NOT before AND within) AS measured_again
    FROM course GROUP BY stay
)
SELECT
    stay,
    closes,
    coalesce(last_open IS NOT NULL AND NOT closed_then, false) AS open_then,
    coalesce(closed_then OR closes <= until, false) AS closed,
    coalesce(open_later > CASE WHEN closed_then THEN time ELSE closes END, false) AS reopened,
    coalesce(measured_again, false) AS measured_again
FROM windows LEFT JOIN marks USING (stay);

-- The parts of the outcome: true, false, or NULL where it is not asked or not known.
CREATE TABLE outcomes AS
SELECT
    stay, discharged_alive, unit,
    died AS death,
    CASE WHEN unit IS NULL THEN coalesce(admitted, false) END AS icu,
    CASE
        WHEN reopened THEN true
        -- In hospital for the whole horizon, and the gap is not measured: unknown.
        WHEN NOT (measured_again OR died OR discharged_alive) THEN NULL
        WHEN closed THEN false
        -- A discharge alive is a competing event: no escalation can follow it in this admission.
        ELSE NOT discharged_alive
    END AS unresolved
FROM ends_of_stays
JOIN gap_outcome USING (stay)
LEFT JOIN intensive_care USING (stay);
