-- Labels become windows; each step is one rule.
-- Read: label (subject, prediction_time, label, zone), the time in UTC if there is a zone.

-- prediction: a label with its window, which ends at the prediction time.
CREATE TABLE prediction AS
SELECT
    row_number() OVER (ORDER BY TRY_CAST(subject AS HUGEINT), subject, prediction_time) AS number,
    dense_rank() OVER (ORDER BY TRY_CAST(subject AS HUGEINT), subject) AS person,
    *,
    CASE WHEN getvariable('time_unit') > 0
        THEN plain(epoch_us(prediction_time) / getvariable('time_unit'))
        ELSE replace((prediction_time + to_minutes(zone_minutes(zone)))::VARCHAR, ' ', 'T') || zone
    END AS shown,
    prediction_time - to_microseconds(getvariable('width')) AS opens
FROM label;

-- clock: zero of the hours of each prediction, filled batch by batch.
CREATE TABLE clock (number BIGINT, start TIMESTAMP);

-- target: a prediction with the clock of its row, for notes; it is no stay.
CREATE VIEW target AS
SELECT number, subject, NULL::BIGINT AS stay, coalesce(start, opens) AS start, prediction_time
FROM prediction
LEFT JOIN clock USING (number);

-- span: from the first window's beginning to the last prediction time; no other event is kept.
CREATE TABLE span AS
SELECT subject, any_value(person) AS person, min(opens) AS opens, max(prediction_time) AS closes
FROM prediction
GROUP BY subject;
