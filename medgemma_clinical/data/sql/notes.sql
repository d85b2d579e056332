-- Notes become the end of a context.
-- Read: asked (number, subject, stay, start, prediction_time), note (subject, written, stay, text).

-- noted: the notes that were written by the prediction time, the oldest first, each with its hour
-- on the clock of the row. The newest fill the words that are allowed; the oldest loses its
-- beginning. A note of the stay itself (a discharge summary) is about what comes later.
CREATE TABLE noted AS
WITH seen AS (
    SELECT number, written, text, string_split(text, ' ') AS words,
        round_even(hours_between(start, written), 2) AS hour,
        getvariable('max_note_words') - coalesce(sum(len(words)) OVER newer, 0) AS room
    FROM asked
    JOIN note ON note.subject = asked.subject::VARCHAR AND written <= prediction_time
    WHERE coalesce(note.stay != asked.stay, true)
    WINDOW newer AS (
        PARTITION BY number ORDER BY written DESC, text DESC
        ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
    )
)
SELECT number,
    string_agg(
        'Note (' || plain(hour) || 'h): ' || array_to_string(words[-room::INTEGER:], ' '), ' '
        ORDER BY written, text
    ) AS text
FROM seen
WHERE room > 0
GROUP BY number;
