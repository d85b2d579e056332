-- The reference range that most often stands beside the values of an item, of those already in the
-- unit of its series.
CREATE TABLE reference_ranges AS
SELECT DISTINCT ON (item) item, low, high
FROM (
    SELECT item, low, high, count(*) AS count
    FROM measured JOIN factors USING (item, unit)
    WHERE factor = 1 AND (low < high OR (low IS NULL) <> (high IS NULL))
    GROUP BY item, low, high
)
ORDER BY item, count DESC, low, high;

-- Values in one unit for each item, from the tables measured and factors.
CREATE TABLE converted AS
SELECT
    stay, item, chart, known,
    CASE WHEN factor = 1 THEN value ELSE round_even(value * factor * 1e6, 0) / 1e6 END AS value
FROM measured JOIN factors USING (item, unit);
DROP TABLE measured;

-- The anion gap wherever serum sodium (50983), chloride (50902) and bicarbonate (50882) were drawn
-- together: sodium - chloride - bicarbonate. Of several values at one time the one known first
-- counts. The gap is known when all three are.
INSERT INTO converted BY NAME
WITH drawn AS (
    SELECT
        stay, chart, item,
        first(value ORDER BY known, value) AS value,
        first(known ORDER BY known, value) AS known
    FROM converted WHERE item IN (50983, 50902, 50882)
    GROUP BY stay, chart, item
),
differences AS (
    SELECT
        stay, chart,
        CASE WHEN count(known) = 3 THEN max(known) END AS known,
        max(value) FILTER (item = 50983)
        - max(value) FILTER (item = 50902)
        - max(value) FILTER (item = 50882) AS gap
    FROM drawn GROUP BY stay, chart HAVING count(*) = 3
)
SELECT
    stay, getvariable('computed_gap') AS item, chart, known,
    round_even(gap * 1e6, 0) / 1e6 AS value
FROM differences;
