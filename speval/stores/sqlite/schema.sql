-- Version 2. Wide columns (args, result) are kept out of the rows that change status, so that a claim costs the same
-- however large they are.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value
) WITHOUT ROWID;

CREATE TABLE evaluations (
    -- In the order of the eval space; never given again, so that what is said of a dropped evaluation fits no other.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name NOT NULL UNIQUE,    -- decimal numbers as integers: those of a list then arrive in the order of the index
    args TEXT NOT NULL,      -- JSON
    crc INTEGER              -- checksum.py; a row without one is damaged
);

CREATE TABLE states (
    id INTEGER PRIMARY KEY REFERENCES evaluations,
    status INTEGER NOT NULL DEFAULT 0,    -- 0 pending, 1 in_progress, 2 completed, 3 failed, 4 pending, held for backoff
    attempt INTEGER NOT NULL DEFAULT 0,   -- the latest attempt's number, half of the fencing token: it only ever grows
    released INTEGER NOT NULL DEFAULT 0,  -- attempts given back unused
    forgiven INTEGER NOT NULL DEFAULT 0,  -- attempts before the last retry(): the budget used is the rest
    -- 1: claimed ahead, so it may not have begun; 2: a worker died with it so claimed, and it is never claimed ahead again.
    ahead INTEGER NOT NULL DEFAULT 0,
    worker INTEGER REFERENCES workers,    -- who holds it, with status 1 and 4
    last INTEGER REFERENCES attempts,     -- the last attempt that ended
    updated_at REAL NOT NULL
);
CREATE INDEX states_pending ON states (id) WHERE status = 0;
-- By when they failed: the latest are wanted, or those after some attempt.
CREATE INDEX states_failed ON states (last) WHERE status = 3;
-- By status, not by worker, so that it also holds what a damaged file says is in progress with nobody.
CREATE INDEX states_held ON states (worker) WHERE status IN (1, 4);

-- One row per attempt that ended, in the order of their commits: whoever has seen seq N asks for what came after N.
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
    crc INTEGER             -- as above; NULL where what a dropped evaluation had was emptied
);

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
    CASE s.status WHEN 1 THEN 'in_progress' WHEN 2 THEN 'completed' WHEN 3 THEN 'failed' ELSE 'pending' END AS status,
    s.updated_at AS updated,
    CASE s.status WHEN 2 THEN a.result END AS result,
    e.args AS args
FROM evaluations AS e
JOIN states AS s ON s.id = e.id
LEFT JOIN attempts AS a ON a.seq = s.last;
