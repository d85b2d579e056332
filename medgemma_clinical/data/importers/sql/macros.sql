-- A number in the fewest digits that read back as the same: 24, 4.08.
CREATE MACRO plain(x) AS CASE
    WHEN abs(x) >= 1e15 THEN CAST(x AS VARCHAR)
    WHEN x = trunc(x) THEN CAST(CAST(x AS BIGINT) AS VARCHAR)
    WHEN abs(x) >= 1e-4 THEN CAST(x AS VARCHAR)
    ELSE rtrim(CAST(CAST(x AS DECIMAL(38, 20)) AS VARCHAR), '0')
END;

-- The zone at the end of a time, Z or +02:00, and the minutes that it is ahead of UTC.
CREATE MACRO zone_of(cell) AS regexp_extract(cell, '(Z|[+-]\d\d(:?\d\d)?)$');
CREATE MACRO zone_minutes(zone) AS CASE WHEN zone IN ('', 'Z') THEN 0 ELSE
    (CASE WHEN zone[1] = '-' THEN -1 ELSE 1 END)
    * (60 * CAST(zone[2:3] AS INTEGER) + coalesce(TRY_CAST(ltrim(zone[4:], ':') AS INTEGER), 0))
END;

CREATE MACRO hours_between(early, late) AS date_diff('second', early, late) / 3600;

-- One observation of the DKA format: 24 (2.5h).
CREATE MACRO observation(value, hours) AS
    plain(value) || ' (' || plain(round_even(hours, 2)) || 'h)';

-- A computed number without the digits that arithmetic leaves: 91.8816, not 91.88159999999999.
CREATE MACRO tidy(x) AS CAST(format('{:.10g}', x) AS DOUBLE);

-- A unit for comparison: mg/dL is mg/dl, and one of both signs of micro is the other.
CREATE MACRO comparable_unit(unit) AS lower(translate(unit, 'µ', 'μ'));

-- Whether a code is the wanted one, or begins like it up to its star; the case does not count.
CREATE MACRO is_code(code, wanted) AS CASE
    WHEN ends_with(wanted, '*') THEN
        starts_with(comparable_unit(code), left(comparable_unit(wanted), -1))
    ELSE comparable_unit(code) = comparable_unit(wanted)
END;

-- Whether a cell is a number or a limit, whatever its decimal sign and what stands between thousands.
CREATE MACRO looks_numeric(cell) AS regexp_full_match(cell,
    '[<>≤≥]?=?\s*[+-]?(\d+[.,]?\d*|[.,]\d+|[1-9]\d{0,2}([.,''\p{Zs}]\d{3})+([.,]\d+)?)([eE][+-]?\d+)?');

-- Whether a cell is a number with its unit behind it: 4,1 mmol/L, 12 %.
CREATE MACRO holds_unit(cell) AS
    regexp_full_match(cell, '[<>≤≥]?=?\s*[+-]?[\d.,]*\d\s*(%|mmHg|[[:alpha:]µμ°]+/[[:alnum:]µμ.*²]+)');

-- The unit behind the name of an item, as in Kreatinin (mg/dl) and Hb [g/L]; other words are none.
CREATE MACRO unit_within(item) AS trim(regexp_extract(item,
    '.[\[(]\s*(%|‰|mmHg|kPa|°[CF]|f[lL]|pg|ng|mg|kg|cm|sec?|[^\s()\[\]]{0,10}/\s*(\d*[mdcnfpuµμk]?[lLg]|h|min|d|24h|m2|m²|mmol|mol))\s*[\])]\s*$', 1));

-- The letters behind a number, which may be a unit or a laboratory's flag: L of 2.3 L.
CREATE MACRO letters_behind(cell) AS
    regexp_extract(cell, '^[<>≤≥]?=?\s*[+-]?[\d.,]*\d\s*\(?([[:alpha:]]{1,2})\)?$', 1);

-- A number without the flag of a laboratory beside it: 2,3 of 2,3 +, 2,3 H, 2,3* and ↑ 2,3; a sign
-- needs a space, as 2+ is a grade and 2- may be negative. Any other cell stays as it is.
CREATE MACRO without_signs(cell) AS regexp_replace(
    regexp_replace(cell,
        '(\s*([*!↑↓▲▼⬆⬇]+|[(\[](HH?|LL?|[*!]|\+{1,2}|-{1,2})[)\]]|HH?|LL)|\s+(\+{1,3}|-{1,3}))+$', ''),
    '^([*!↑↓▲▼⬆⬇]+|[(\[](HH?|LL?|[*!]|\+{1,2}|-{1,2})[)\]])\s*', '');
CREATE MACRO without_flag(cell) AS CASE
    WHEN cell[1] BETWEEN '0' AND '9' AND cell[-1] BETWEEN '0' AND '9' THEN cell
    WHEN list_contains(getvariable('result_flags'), letters_behind(cell))
        THEN regexp_replace(cell, '\s*\(?[[:alpha:]]{1,2}\)?$', '')
    WHEN looks_numeric(without_signs(cell)) THEN without_signs(cell)
    ELSE cell
END;

-- The number in a text that is none, for its size: 2.3 of 2,3 ?.
CREATE MACRO number_within(text) AS TRY_CAST(
    replace(regexp_extract(text, '\d+([.,]\d+)?'), ',', '.') AS DOUBLE);

-- The one sign of a number, and whether it may stand before thousands: 1,250.
CREATE MACRO sign_of(cell) AS
    CASE WHEN looks_numeric(cell) THEN regexp_extract(cell, '^[^.,]*([.,])[^.,]*$', 1) ELSE '' END;
CREATE MACRO may_be_thousands(cell) AS
    regexp_full_match(cell, '[<>≤≥]?=?\s*[+-]?[1-9]\d{0,2}[.,]\d{3}');

-- A number with a decimal point: of 'comma' or 'point' other signs stand between thousands, of ''
-- either sign is the decimal one.
CREATE MACRO without_thousands(cell) AS
    CASE WHEN regexp_full_match(cell, '[<>≤≥]?=?\s*[+-]?[1-9]\d{0,2}([,''\p{Zs}]\d{3})+(\.\d+)?')
        THEN regexp_replace(cell, '[,''\p{Zs}]', '', 'g')
        ELSE cell
    END;
CREATE MACRO with_point(cell, decimal) AS CASE
    WHEN NOT looks_numeric(cell) THEN cell
    WHEN decimal = 'comma' THEN without_thousands(translate(cell, ',.', '.,'))
    WHEN decimal = 'point' THEN without_thousands(cell)
    ELSE replace(cell, ',', '.')
END;

-- A text at a limit of detection, "<0.3" or "> 500", and its value: half of a lower limit, or the limit.
CREATE MACRO is_limit(text) AS regexp_full_match(text, '[<>≤≥]=?\s*\d+(\.\d+)?');
CREATE MACRO at_limit(text) AS CASE
    WHEN getvariable('below_limit') != 'drop' AND is_limit(text)
        THEN TRY_CAST(ltrim(text, '<>≤≥= ') AS DOUBLE)
            / CASE WHEN text[1] IN ('<', '≤') AND getvariable('below_limit') = 'half' THEN 2 ELSE 1 END
END;
