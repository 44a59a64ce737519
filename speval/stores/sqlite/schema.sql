-- Version 3. The state of an evaluation is the table it is in: fresh, claimed, queue, running, or attempts with its final row.
-- evaluations and attempts only grow. A whole range of evaluations that begin or wait for their first attempt is one row, so a
-- claim and its end cost the same however many evaluations there are. Only what was put back has a row for each evaluation.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value
) WITHOUT ROWID;

CREATE TABLE evaluations (
    -- In the order of the eval space. Ids are never reused, so late writes about a dropped evaluation are rejected.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name NOT NULL UNIQUE,    -- decimal numbers as integers: those of a list then arrive in the order of the index
    args TEXT NOT NULL,      -- JSON
    crc INTEGER              -- checksum.py; a row without one is damaged
);

-- Pending and never claimed: the ids from first to last.
CREATE TABLE fresh (
    first INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    updated_at REAL NOT NULL
);

-- In progress with attempt number 1: the ids from first to last.
CREATE TABLE claimed (
    first INTEGER PRIMARY KEY,
    last INTEGER NOT NULL,
    worker INTEGER REFERENCES workers,
    ahead INTEGER NOT NULL,    -- claimed ahead, so it may not have begun
    updated_at REAL NOT NULL
);
CREATE INDEX claimed_worker ON claimed (worker);

-- Pending, and claimed before or given other args.
CREATE TABLE queue (
    id INTEGER PRIMARY KEY REFERENCES evaluations,
    attempt INTEGER NOT NULL,     -- the latest attempt's number, half of the fencing token: it only ever grows
    released INTEGER NOT NULL,    -- released attempts
    forgiven INTEGER NOT NULL,    -- attempts before the last retry(): the budget used is the rest
    suspect INTEGER NOT NULL,     -- a worker died with it claimed ahead, and it is never claimed ahead again
    updated_at REAL NOT NULL
);

-- In progress after it was in queue, or held by its worker until its backoff is over.
CREATE TABLE running (
    id INTEGER PRIMARY KEY REFERENCES evaluations,
    attempt INTEGER NOT NULL,
    released INTEGER NOT NULL,
    forgiven INTEGER NOT NULL,
    suspect INTEGER NOT NULL,
    ahead INTEGER NOT NULL,
    held INTEGER NOT NULL,    -- its attempt has ended, and it waits for another one
    worker INTEGER REFERENCES workers,
    updated_at REAL NOT NULL
);
CREATE INDEX running_worker ON running (worker);

-- One row per attempt that ended, in the order of their commits: a reader that has seen seq N asks for what came after N.
CREATE TABLE attempts (
    seq INTEGER PRIMARY KEY,
    evaluation INTEGER NOT NULL REFERENCES evaluations,
    attempt INTEGER NOT NULL,
    worker INTEGER REFERENCES workers,
    started_at REAL,
    duration REAL,
    ended_at REAL NOT NULL,
    outcome TEXT NOT NULL,  -- completed, exception, timeout, crash, lost, unserializable
    result TEXT,            -- JSON
    error_type TEXT,
    error_message TEXT,
    error_traceback TEXT,
    final INTEGER NOT NULL,     -- its evaluation is completed or failed with it
    released INTEGER NOT NULL,  -- as they were in running, for the case that it is put back
    suspect INTEGER NOT NULL,
    crc INTEGER                 -- of the columns up to error_traceback; NULL where the attempts of a dropped evaluation were emptied
);
CREATE UNIQUE INDEX attempts_final ON attempts (evaluation) WHERE final;    -- no evaluation ends twice
CREATE INDEX attempts_earlier ON attempts (evaluation) WHERE NOT final;     -- nearly empty: most evaluations have one attempt
-- In the order of their ends: the latest failures are wanted, or those after some attempt.
CREATE INDEX attempts_failed ON attempts (seq) WHERE final AND outcome <> 'completed';

CREATE TABLE workers (
    id INTEGER PRIMARY KEY,  -- random: never taken twice, also not in a copy of this file
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    machine TEXT NOT NULL,
    start TEXT NOT NULL,
    lease REAL NOT NULL,
    beat INTEGER NOT NULL DEFAULT 0,
    dead INTEGER NOT NULL DEFAULT 0,  -- presumed dead: it holds nothing any more, what it held is being taken back
    started_at REAL NOT NULL,
    last_seen REAL NOT NULL,
    ended_at REAL
);
CREATE INDEX workers_here ON workers (id) WHERE ended_at IS NULL;

-- What speval 0.1.1 had as a table, for people and their scripts.
CREATE VIEW evals AS
SELECT
    CAST(e.name AS TEXT) AS name,
    CASE
        WHEN a.outcome = 'completed' THEN 'completed'
        WHEN a.seq IS NOT NULL THEN 'failed'
        WHEN c.first IS NOT NULL OR NOT r.held THEN 'in_progress'
        ELSE 'pending'
    END AS status,
    coalesce(a.ended_at, r.updated_at, c.updated_at, q.updated_at, f.updated_at) AS updated,
    a.result,
    e.args
FROM evaluations AS e
LEFT JOIN attempts AS a ON a.evaluation = e.id AND a.final
LEFT JOIN running AS r ON r.id = e.id
LEFT JOIN queue AS q ON q.id = e.id
LEFT JOIN claimed AS c ON c.first = (SELECT max(first) FROM claimed WHERE first <= e.id) AND c.last >= e.id
LEFT JOIN fresh AS f ON f.first = (SELECT max(first) FROM fresh WHERE first <= e.id) AND f.last >= e.id;
