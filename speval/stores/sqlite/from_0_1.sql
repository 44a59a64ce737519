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

INSERT INTO attempts (seq, evaluation, attempt, ended_at, outcome, result, final, released, suspect, crc)
SELECT seq, id, 1, ended_at, 'completed', result, 1, 0, 0,
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
INSERT INTO queue (id, attempt, released, forgiven, suspect, updated_at)
SELECT rowid, 0, 0, 0, 0, coalesce(updated, 0)
FROM evals_0_1
WHERE status <> 'completed' OR status IS NULL
ORDER BY rowid;

DROP TABLE evals_0_1;
