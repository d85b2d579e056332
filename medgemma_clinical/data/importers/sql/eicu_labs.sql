-- The laboratory values as MIMIC-IV has them, from eICU's lab. A value is filed under a unit stay, so
-- it is not known before that stay begins. A value that several unit stays of a hospital stay hold
-- counts once, from the earliest time. eICU's anion gaps bear no unit,
-- and its values no reference range.
CREATE TABLE labs AS
SELECT
    itemid, subject_id, hadm_id, intime + to_minutes(labresultoffset) AS charttime,
    min(intime + to_minutes(CASE WHEN labresultrevisedoffset < 0 THEN 0 ELSE labresultrevisedoffset
        END)) AS storetime, labresult AS valuenum,
    CASE labname WHEN 'anion gap' THEN 'mEq/L' ELSE labmeasurenamesystem END AS valueuom,
    NULL::DOUBLE AS ref_range_lower, NULL::DOUBLE AS ref_range_upper
FROM lab JOIN unit_stays USING (patientunitstayid) JOIN items USING (labname)
GROUP BY ALL;
DROP TABLE lab;
