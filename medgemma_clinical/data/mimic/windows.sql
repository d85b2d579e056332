-- The prediction time of each admission, and the values known by then.

-- A value opens a window only if it is stored within the window: otherwise it is not known at the
-- prediction time when that is.
CREATE TABLE opening AS
SELECT
    stay,
    min(chart) FILTER (item IN (SELECT item FROM series_items WHERE position = 0)) AS main,
    min(chart) FILTER (item = getvariable('reported_gap')) AS reported,
    min(chart) FILTER (item = getvariable('computed_gap')) AS computed,
    min(known) FILTER (item = getvariable('reported_gap')) AS reported_known
FROM converted
WHERE known <= chart + getvariable('window_length')
GROUP BY stay;

-- No series mixes reported and computed gaps, which differ by potassium: an admission uses computed
-- ones if all admissions do, or if none is reported by its prediction time.
CREATE TABLE gap_of_stay AS
SELECT
    stay,
    CASE
        WHEN getvariable('compute_gap') = 'always' THEN true
        WHEN getvariable('compute_gap') = 'reported' THEN false
        WHEN getvariable('main_is_gap')
            THEN coalesce(
                reported_known > computed + getvariable('window_length'), reported_known IS NULL
            )
        ELSE coalesce(any_known > main + getvariable('window_length'), true)
    END AS computes,
    CASE WHEN computes THEN getvariable('computed_gap') ELSE getvariable('reported_gap') END
        AS gap_item
FROM stays
LEFT JOIN opening USING (stay)
LEFT JOIN (
    SELECT stay, min(known) AS any_known FROM converted
    WHERE item = getvariable('reported_gap') GROUP BY stay
) USING (stay);

-- The question is asked a window after the first value of the main series.
CREATE TABLE windows AS
SELECT
    stay, gap_item,
    CASE
        WHEN NOT getvariable('main_is_gap') THEN main
        WHEN computes THEN computed
        ELSE reported
    END AS first,
    first + getvariable('window_length') AS time,
    time + getvariable('horizon_length') AS until
FROM gap_of_stay LEFT JOIN opening USING (stay);

-- Inputs are charted within the window and stored by its end.
CREATE TABLE inputs AS
SELECT converted.*, first, analyte
FROM converted JOIN windows USING (stay) LEFT JOIN analytes USING (item)
WHERE chart BETWEEN first AND time AND known <= time
    AND (item = gap_item OR item NOT IN (getvariable('reported_gap'), getvariable('computed_gap')));
