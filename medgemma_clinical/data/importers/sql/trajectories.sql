-- Events of a batch of subjects become trajectories; each step is one rule.
-- Read: prediction (of windows.sql), event (of events.sql), named (code, kind, name, position).

-- usable: an event within the window, both ends included, that was also known by its end.
CREATE OR REPLACE TEMP VIEW usable AS
SELECT number, position, time, known, value
FROM prediction
JOIN event USING (person)
WHERE event.person BETWEEN getvariable('first') AND getvariable('last')
    AND time BETWEEN opens AND prediction_time
    AND known <= prediction_time;

-- observed: the values of a series at one time: all of them, the one stored last, or their mean.
CREATE OR REPLACE TEMP TABLE observed AS
FROM usable WHERE getvariable('equal_times') = 'keep'
UNION ALL
SELECT number, position, time, max(known) AS known,
    CASE getvariable('equal_times')
        WHEN 'last' THEN last(value ORDER BY known, value)
        ELSE tidy(sum(value ORDER BY value) / count(*))
    END AS value
FROM usable
WHERE getvariable('equal_times') != 'keep'
GROUP BY number, position, time;

-- clock: hours count from the opening of the window, or from the first observation of the row.
INSERT INTO clock
SELECT number, CASE getvariable('hours_from') WHEN 'window' THEN opens ELSE min(time) END
FROM prediction
JOIN observed USING (number)
GROUP BY number, opens;

-- trajectory: the text of a series, in order of time, and the prediction time on its clock.
CREATE OR REPLACE TEMP TABLE trajectory AS
SELECT number, name AS series, count(*) AS observations,
    any_value(plain(round_even(hours_between(start, prediction_time), 2))) AS hours,
    string_agg(
        observation(value, hours_between(start, time)), ' -> ' ORDER BY time, known, value
    ) AS text
FROM observed
JOIN prediction USING (number)
JOIN clock USING (number)
JOIN (SELECT DISTINCT position, name FROM named WHERE kind = 'series') USING (position)
GROUP BY number, name;
