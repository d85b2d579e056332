-- What the context says of a subject at each prediction time; each step is one rule.
-- Read: prediction (of windows.sql), record (subject, code, time, value),
-- named (code, kind, name, unit, position).

-- named: codes of birth and sex. Source: MEDS 0.4.1, birth_code; GENDER as converters write it.
INSERT INTO named VALUES
    ('MEDS_BIRTH', 'person', 'birth', '', 0),
    ('GENDER//M', 'person', 'man', '', 0),
    ('GENDER//F', 'person', 'woman', '', 0);

-- static_value: the last number of a --context within the window, without a number its presence there;
-- what has no time is always known.
CREATE TABLE static_value AS
SELECT number, name, any_value(named.unit) AS unit, any_value(position) AS position,
    last(value ORDER BY time NULLS FIRST, value) FILTER (value IS NOT NULL) AS value
FROM prediction
JOIN record USING (subject)
JOIN named USING (code)
WHERE kind = 'context'
    AND (time IS NULL OR time BETWEEN opens AND prediction_time)
GROUP BY number, name;

-- person: age in full years, and sex if one is recorded; nothing later than the prediction time.
CREATE TABLE person AS
SELECT number,
    date_sub('year', min(time) FILTER (name = 'birth'), any_value(prediction_time)) AS age,
    CASE WHEN count(DISTINCT name) FILTER (name != 'birth') = 1
        THEN min(name) FILTER (name != 'birth') END AS sex
FROM prediction
JOIN record USING (subject)
JOIN named USING (code)
WHERE kind = 'person'
    AND (time IS NULL OR time <= prediction_time)
GROUP BY number;

-- context: person and last values in words; of an age above 89 no more is said, as by from_mimic.
CREATE TABLE context AS
SELECT number,
    concat_ws(', ',
        CASE
            WHEN age > 89 THEN 'Over 89-year-old ' || coalesce(sex, 'patient')
            WHEN age IS NOT NULL THEN age || '-year-old ' || coalesce(sex, 'patient')
            ELSE upper(sex[1]) || sex[2:]
        END,
        last_values
    ) AS clinical_context,
    CASE WHEN age > 89 THEN '90' ELSE age::VARCHAR END AS "static_age [years]",
    CASE sex WHEN 'man' THEN '1' WHEN 'woman' THEN '0' END AS static_sex_male
FROM prediction
LEFT JOIN person USING (number)
LEFT JOIN (
    SELECT number,
        string_agg(concat_ws(' ', name, plain(value), nullif(unit, '')), ', ' ORDER BY position)
            AS last_values
    FROM (SELECT * REPLACE (CASE WHEN value IS NOT NULL THEN unit END AS unit) FROM static_value)
    GROUP BY number
) USING (number);
