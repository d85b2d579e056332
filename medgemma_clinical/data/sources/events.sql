-- Labels and events become trajectories; each step is one rule.
-- Read: label (subject, prediction_time, shown, label),
-- record (subject, code, time, known, value, unit), named (code, kind, name, unit, position),
-- factor (code, unit, factor).

-- event: a number with the times at which it was measured and known, in the unit of its series.
CREATE VIEW event AS
SELECT subject, name AS series, time, known,
    CASE WHEN factor IS NULL THEN value ELSE tidy(value * factor) END AS value
FROM record
JOIN named USING (code)
LEFT JOIN factor ON record.code = factor.code AND record.unit = factor.unit
WHERE kind = 'series' AND time IS NOT NULL AND known IS NOT NULL AND value IS NOT NULL;

-- asked: a label asks about the window that ends at its prediction time.
CREATE TABLE asked AS
SELECT
    row_number() OVER (ORDER BY TRY_CAST(subject AS HUGEINT), subject, prediction_time) AS number,
    *,
    prediction_time - to_microseconds(getvariable('width')) AS opens
FROM label;

-- usable: an event within the window, both ends included, that was also known by its end.
CREATE VIEW usable AS
SELECT number, series, time, known, value
FROM asked
JOIN event USING (subject)
WHERE time BETWEEN opens AND prediction_time
    AND known <= prediction_time;

-- observed: the values of a series at one time: all of them, the one stored last, or their mean.
CREATE TABLE observed AS
SELECT number, series, time,
    CASE getvariable('equal_times')
        WHEN 'last' THEN [found[-1]]
        WHEN 'mean' THEN [tidy(list_sum(found) / len(found))]
        ELSE found
    END AS found
FROM (
    SELECT number, series, time, list(value ORDER BY known, value) AS found
    FROM usable
    GROUP BY number, series, time
);

-- clock: hours count from the opening of the window, or from the first observation of the row.
CREATE TABLE clock AS
SELECT number, CASE getvariable('hours_from') WHEN 'window' THEN opens ELSE first END AS start
FROM asked
LEFT JOIN (SELECT number, min(time) AS first FROM observed GROUP BY number) USING (number);

-- trajectory: the text of a series, in order of time.
CREATE TABLE trajectory AS
SELECT number, series,
    sum(len(found))::BIGINT AS observations,
    string_agg(
        array_to_string(
            list_transform(found, lambda value: observation(value, hours_between(start, time))),
            ' -> '
        ),
        ' -> ' ORDER BY time
    ) AS text
FROM observed
JOIN clock USING (number)
GROUP BY number, series;
