-- The rows that are left (table kept), as the DKA format has them.

-- Each series, with hours since the window's first value.
CREATE TABLE cells AS
SELECT
    stay, position,
    string_agg(
        observation(value, hours_between(first, chart)), ' -> ' ORDER BY chart, known, item, value
    ) AS cell
FROM inputs JOIN series_items USING (item) SEMI JOIN kept USING (stay)
GROUP BY stay, position;

-- The last value of each other analyte.
CREATE TABLE last_values AS
SELECT stay, analyte, last(value ORDER BY chart, known, value) AS value
FROM inputs SEMI JOIN kept USING (stay)
WHERE analyte IS NOT NULL
    AND analyte NOT IN (SELECT analyte FROM series_items JOIN analytes USING (item))
GROUP BY stay, analyte;

-- The columns beside the series. Of an age above 89 no more is told. Any chosen part is an event.
CREATE TABLE row_columns AS
SELECT
    stay, subject_id, hadm_id, id,
    round_even(hours_between(first, time), 2) AS prediction_hours,  -- as the series' hours
    round_even(10 * hours_between(begins, time), 0) / 10 AS hours_since_admission,
    -- Age, sex, ward, hours since admission, other chemistry; no full stop.
    concat(
        CASE WHEN age_is_least OR age > 89 THEN 'Over ' ELSE '' END,
        least(CASE WHEN age_is_least THEN age - 1 ELSE age END, 89)::BIGINT,
        '-year-old ',
        CASE sex WHEN 'F' THEN 'woman' WHEN 'M' THEN 'man' ELSE 'patient' END,
        ', ',
        CASE unit WHEN '' THEN 'intensive care' ELSE coalesce(unit, 'not in intensive care') END,
        ', ', plain(hours_since_admission), ' h since admission',
        coalesce(', ' || chemistry, '')
    ) AS clinical_context,
    least(age, 90) AS "static_age [years]",
    CASE sex WHEN 'M' THEN 1 WHEN 'F' THEN 0 END AS static_sex_male,
    unit,
    list_contains(getvariable('outcome'), 'death') AND outcomes.death
    OR list_contains(getvariable('outcome'), 'icu') AND coalesce(icu, false)
    OR list_contains(getvariable('outcome'), 'unresolved') AND coalesce(unresolved, false)
        AS label_escalation,
    outcomes.death AS label_death,
    icu AS label_icu,
    unresolved AS label_unresolved,
    -- What ends an open gap, of GAP_EVENTS, and when; NULL where none is known to be open.
    CASE WHEN open_then THEN tidy(hours_between(time, coalesce(closes, ends))) END AS event_hours,
    CASE WHEN open_then THEN
        CASE WHEN closes IS NOT NULL THEN 1 WHEN stays.death IS NOT NULL THEN 2 ELSE 3 END
    END AS event
FROM kept
JOIN stays USING (stay)
JOIN windows USING (stay)
JOIN outcomes USING (stay)
JOIN gap_outcome USING (stay)
LEFT JOIN (
    SELECT
        stay,
        string_agg(analyte || ' ' || plain(value) || shown_unit, ', ' ORDER BY analyte) AS chemistry
    FROM last_values JOIN (SELECT DISTINCT analyte, shown_unit FROM analytes) USING (analyte)
    GROUP BY stay
) USING (stay);
