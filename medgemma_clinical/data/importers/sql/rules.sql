-- The rules that remove admissions, in their order: a column each, true where it applies. The request
-- decides which of the rules are used.
CREATE TABLE rules AS
WITH
-- Values of the main series within the window.
observed AS (
    SELECT stay, count(*) AS observations
    FROM inputs JOIN series_items USING (item) WHERE position = 0 GROUP BY stay
),
-- Ketoacidosis by what is known within the window (Kitabchi 2009, diagnosis): glucose above 250
-- mg/dL, bicarbonate at most 18 mEq/L, a gap above 12 mEq/L and, where any pH is known, one of at
-- most 7.30.
chemistry AS (
    SELECT
        stay,
        max(value) FILTER (analyte = 'glucose') > 250
        AND min(value) FILTER (analyte = 'bicarbonate') <= 18
        AND max(value) FILTER (analyte = 'anion gap') > 12
        AND coalesce(min(value) FILTER (analyte = 'pH') <= 7.30, true) AS in_ketoacidosis
    FROM inputs GROUP BY stay
)
SELECT
    stay,
    stays.subject_id,
    NOT coalesce(age >= 18, false) AS not_adult,
    NOT (coded AND coalesce(coded_at <= time, true)) AS not_coded,
    first IS NULL AS no_value,
    coalesce(time < begins, false) AS before_admission,
    coalesce(stays.death <= time, false) AS dead,
    NOT coalesce(ends > time, false) AS gone,
    coalesce(observations, 0) < getvariable('min_observations') AS too_few,
    NOT coalesce(in_ketoacidosis, false) AS no_ketoacidosis,
    unit IS NOT NULL AS in_intensive_care,
    discharged_alive AS excluded_discharge,
    unresolved IS NULL AS not_measured
FROM stays
JOIN windows USING (stay)
JOIN outcomes USING (stay)
LEFT JOIN observed USING (stay)
LEFT JOIN chemistry USING (stay)
ORDER BY stay;
