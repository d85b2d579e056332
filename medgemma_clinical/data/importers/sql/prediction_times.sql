-- The question is asked a window after the first value of the main series. A value that is stored
-- after its window closes opens none: it is not known at the prediction time.
CREATE TABLE windows AS
WITH opening AS (
    SELECT stay, min(chart) AS first
    FROM converted JOIN series_items USING (item)
    WHERE position = 0 AND known <= chart + getvariable('window_length')
    GROUP BY stay
)
SELECT
    stay, first,
    first + getvariable('window_length') AS time,
    time + getvariable('horizon_length') AS until
FROM stays LEFT JOIN opening USING (stay);

-- Inputs are charted within the window and stored by its end.
CREATE TABLE inputs AS
SELECT converted.*, first, analyte
FROM converted JOIN windows USING (stay) LEFT JOIN analytes USING (item)
WHERE chart BETWEEN first AND time AND known <= time;
