-- A database of speval 0.1.1 becomes one of version 1; its table has been renamed to evals_0_1 and schema.sql has run.

INSERT INTO evaluations (id, name, args)
SELECT
    rowid,
    CASE WHEN CAST(CAST(name AS INTEGER) AS TEXT) = name AND CAST(name AS INTEGER) >= 0 AND length(name) <= 18
        THEN CAST(name AS INTEGER) ELSE name END,
    coalesce(args, 'null')
FROM evals_0_1
ORDER BY rowid;

INSERT INTO attempts (evaluation, attempt, ended_at, outcome, result)
SELECT rowid, 1, coalesce(updated, 0), 'completed', coalesce(result, 'null')
FROM evals_0_1
WHERE status = 'completed'
ORDER BY updated, rowid;

-- What was in progress has no worker that could be asked; it is pending again. An old copy that still runs can't write
-- its result: the view that takes the table's place refuses it.
INSERT INTO states (id, status, attempt, last, updated_at)
SELECT o.rowid, CASE o.status WHEN 'completed' THEN 2 ELSE 0 END, a.seq IS NOT NULL, a.seq, coalesce(o.updated, 0)
FROM evals_0_1 AS o
LEFT JOIN attempts AS a ON a.evaluation = o.rowid
ORDER BY o.rowid;

DROP TABLE evals_0_1;
