-- A database of speval 0.1.1 becomes one of today's; its table has been renamed to evals_0_1 and schema.sql has run.

INSERT INTO evaluations (id, name, args, crc)
SELECT id, name, args, crc_of_evaluation(id, name, args) FROM (
    SELECT
        rowid AS id,
        CASE WHEN CAST(CAST(name AS INTEGER) AS TEXT) = name AND CAST(name AS INTEGER) >= 0 AND length(name) <= 18
            THEN CAST(name AS INTEGER) ELSE name END AS name,
        coalesce(args, 'null') AS args
    FROM evals_0_1
)
ORDER BY id;

INSERT INTO attempts (seq, evaluation, attempt, ended_at, outcome, result, crc)
SELECT seq, id, 1, ended_at, 'completed', result,
    crc_of_attempt(seq, id, 1, NULL, NULL, NULL, ended_at, 'completed', result, NULL, NULL, NULL)
FROM (
    SELECT
        row_number() OVER (ORDER BY updated, rowid) AS seq,
        rowid AS id,
        CAST(coalesce(updated, 0) AS REAL) AS ended_at,
        coalesce(result, 'null') AS result
    FROM evals_0_1
    WHERE status = 'completed'
)
ORDER BY seq;

-- What was in progress has no worker that could be asked; it is pending again. An old copy that still runs can't write
-- its result: the view that takes the table's place refuses it.
INSERT INTO states (id, status, attempt, last, updated_at)
SELECT o.rowid, CASE o.status WHEN 'completed' THEN 2 ELSE 0 END, a.seq IS NOT NULL, a.seq, coalesce(o.updated, 0)
FROM evals_0_1 AS o
LEFT JOIN attempts AS a ON a.evaluation = o.rowid
ORDER BY o.rowid;

DROP TABLE evals_0_1;
