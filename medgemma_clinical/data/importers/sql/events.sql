-- Values become events of their series, in batches of subjects that fit the memory.
-- Read: prediction and span (of windows.sql), record (subject, code, time, known, value),
-- named (code, kind, name, unit, position).

-- event: a number with the times at which it was measured and known.
CREATE TABLE event AS
SELECT person, position, time, known, value
FROM record
JOIN named USING (code)
JOIN span USING (subject)
WHERE kind = 'series' AND time IS NOT NULL AND known IS NOT NULL AND value IS NOT NULL
ORDER BY person;

-- batch: consecutive subjects with so many pairs of a prediction and an event.
CREATE TABLE batch AS
SELECT min(person) AS first, max(person) AS last
FROM (
    SELECT person, (sum(pairs) OVER (ORDER BY person) - pairs) // getvariable('max_pairs') AS batch
    FROM (SELECT person, count(*) AS events FROM event GROUP BY person)
    JOIN (SELECT person, count(*) AS predictions FROM prediction GROUP BY person) USING (person),
    LATERAL (SELECT events * predictions AS pairs)
)
GROUP BY batch;
