-- Notes become the end of a context.
-- Read: target (number, subject, stay, start, prediction_time),
-- note (subject, written, stay, text, words).

-- seen: the notes that were written by the prediction time, the newest first, and how many words
-- each may have. A note of the stay itself (a discharge summary) is about what comes later.
CREATE TABLE seen AS
SELECT number, start, note.rowid AS note_id, row_number() OVER newest AS position,
    getvariable('max_note_words') + words - sum(words) OVER newest AS room
FROM target
JOIN note ON note.subject = target.subject::VARCHAR AND written <= prediction_time
WHERE coalesce(note.stay != target.stay, true)
WINDOW newest AS (PARTITION BY number ORDER BY written DESC, md5(text) ROWS UNBOUNDED PRECEDING);

-- noted: each note with its hour on the clock of the row; the oldest loses its beginning.
CREATE VIEW noted AS
SELECT number, position,
    'Note (' || plain(round_even(hours_between(start, written), 2)) || 'h): ' || CASE
        WHEN words > room THEN array_to_string(string_split(text, ' ')[-room::INTEGER:], ' ')
        ELSE text
    END AS text
FROM seen
JOIN note ON note.rowid = note_id
WHERE room > 0;
