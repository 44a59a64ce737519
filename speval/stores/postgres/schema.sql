-- The schema of one namespace in a PostgreSQL database, executed once, in one transaction. "speval" is replaced by its name.
--
-- The state of an evaluation is the table with its row: queue, then running, then attempts with final set. So evaluations and
-- attempts only grow, only small rows of queue and running are updated, and claims stay fast after a million evaluations.
-- Foreign keys are not used: they would cost a lookup per row, and every move is one statement anyway.

CREATE TABLE speval.meta (
    key text PRIMARY KEY,
    value text NOT NULL
);

CREATE TABLE speval.evaluations (
    id bigint PRIMARY KEY,                  -- in eval-space order, never reused
    name text COLLATE "C" NOT NULL,         -- NUL is stored as two characters: PostgreSQL text can't contain it
    args text NOT NULL,                     -- JSON as text: json does not allow NaN, jsonb loses the order of keys
    EXCLUDE USING hash (name WITH =)        -- names are unique; a btree index would limit names to 2.7 kB
);
CREATE SEQUENCE speval.ids MINVALUE 0 START 0;

-- Pending.
CREATE TABLE speval.queue (
    id bigint PRIMARY KEY,
    attempt integer NOT NULL DEFAULT 0,        -- number of the latest attempt; it only grows
    released integer NOT NULL DEFAULT 0,       -- released attempts
    forgiven integer NOT NULL DEFAULT 0,       -- attempts before the last retry(), which are not charged
    suspect boolean NOT NULL DEFAULT false,    -- a worker died while it was claimed ahead; it is not claimed ahead again
    put_back bigint,                           -- the id again, if it was claimed before
    updated_at double precision NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0,
    vacuum_truncate = false);
-- A worker claims after the last id it has claimed, which skips dead index entries. It may have passed these few rows.
CREATE INDEX queue_put_back ON speval.queue (put_back) WHERE put_back IS NOT NULL;

-- In progress, or held by its worker during a backoff.
CREATE TABLE speval.running (
    id bigint PRIMARY KEY,
    attempt integer NOT NULL,
    released integer NOT NULL,
    forgiven integer NOT NULL,
    suspect boolean NOT NULL,
    ahead boolean NOT NULL,   -- claimed ahead; it may not have started
    held boolean NOT NULL,    -- its attempt has ended, and another one follows after the backoff
    worker bigint NOT NULL,
    call integer NOT NULL,    -- the record() of this worker that claimed it; it identifies claims whose answer did not arrive
    updated_at double precision NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);
CREATE INDEX running_worker ON speval.running (worker, call);

-- One row per ended attempt; the last one of a completed or failed evaluation is final.
CREATE TABLE speval.attempts (
    seq bigint PRIMARY KEY,
    evaluation bigint NOT NULL,
    attempt integer NOT NULL,
    worker bigint,
    started_at double precision,
    duration double precision,
    ended_at double precision NOT NULL,
    outcome text NOT NULL,    -- completed, exception, timeout, crash, lost, unserializable
    result text,              -- JSON
    error_type text,
    error_message text,
    error_traceback text,
    final boolean NOT NULL,
    released integer NOT NULL,  -- as in running, for a later retry()
    suspect boolean NOT NULL
);
CREATE UNIQUE INDEX attempts_evaluation ON speval.attempts (evaluation, attempt);  -- an attempt can't be recorded twice
CREATE INDEX attempts_failed ON speval.attempts (seq) WHERE final AND outcome <> 'completed';
CREATE SEQUENCE speval.seqs;

CREATE TABLE speval.workers (
    id bigint PRIMARY KEY,   -- random
    host text NOT NULL,
    pid bigint NOT NULL,
    machine text NOT NULL,
    start text NOT NULL,
    lease double precision NOT NULL,
    expires_at double precision NOT NULL,  -- by the server clock; all other columns ending in _at use the worker's clock
    beat bigint NOT NULL DEFAULT 0,
    dead boolean NOT NULL DEFAULT false,   -- declared dead; its evaluations are being reclaimed
    floor integer NOT NULL DEFAULT 0,      -- its worker has abandoned every record() with a lower number; these do nothing
    started_at double precision NOT NULL,
    last_seen double precision NOT NULL,
    ended_at double precision
) WITH (fillfactor = 50);
CREATE INDEX workers_here ON speval.workers (id) WHERE ended_at IS NULL;
-- When a worker last checked all others, in milliseconds. A sequence, because it leaves no dead rows.
CREATE SEQUENCE speval.looked MINVALUE 0 START 0;

-- Eval spaces that were compared with the stored evaluations: the next start with the same space finds its digest.
CREATE TABLE speval.spaces (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    digest text NOT NULL UNIQUE,
    first bigint NOT NULL,     -- its lowest and highest id
    last bigint NOT NULL,
    gaps boolean NOT NULL,     -- between first and last there are ids of other spaces, stored in unlisted
    exact boolean NOT NULL     -- all its args are equal to the stored ones
);
CREATE TABLE speval.unlisted (
    space integer NOT NULL,
    id bigint NOT NULL,
    PRIMARY KEY (space, id)
);

-- The table of speval 0.1.1, for users and their scripts.
CREATE VIEW speval.evals AS
SELECT
    e.name,
    CASE WHEN a.seq IS NOT NULL THEN CASE a.outcome WHEN 'completed' THEN 'completed' ELSE 'failed' END
        WHEN NOT r.held THEN 'in_progress' ELSE 'pending' END AS status,
    coalesce(a.ended_at, r.updated_at, q.updated_at) AS updated,
    a.result,
    e.args
FROM speval.evaluations AS e
LEFT JOIN speval.queue AS q ON q.id = e.id
LEFT JOIN speval.running AS r ON r.id = e.id
LEFT JOIN speval.attempts AS a ON a.evaluation = e.id AND a.final;

-- The verbs of the workers: each is one call and one transaction. The server caches the plans of functions, also behind a
-- pooler that assigns transactions to different connections. Each name has a version, so an older release keeps its own
-- functions. The settings force plans for large tables, because the tables are empty when the first plan is made.
--
-- A disabled plan type adds 1e10 to the cost of a plan, and a server with jit compiles expensive plans, which takes a tenth
-- of a second per connection and plan. So jit is off too.
--
-- Adding 0 to a column keeps the planner from an index that looks equally good while a table is empty.
--
-- A transaction that moves rows to attempts holds the movers lock in shared mode: a reader of attempts can tell whether a
-- missing sequence number may still appear. Take the movers lock exclusively to block all writers. The lock of a worker
-- separates its calls from declaring it dead.

CREATE FUNCTION speval.clock() RETURNS double precision LANGUAGE sql VOLATILE AS $$
    SELECT extract(epoch FROM clock_timestamp())::double precision
$$;

-- The second key of the movers lock; the first one, 1936745846, is "spev".
CREATE FUNCTION speval.movers() RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT 'speval.attempts'::regclass::oid::integer
$$;

-- Checks the session and the schema version; other functions call it first. SP001: the client must open a transaction with our
-- settings, because in this one the snapshot would be older than the locks, or NULL in an array would be read as text. SP002: a
-- newer release has changed the schema.
CREATE FUNCTION speval.ready_1() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_schema text := (SELECT m.value FROM speval.meta AS m WHERE m.key = 'schema');
    v_release text := (SELECT m.value FROM speval.meta AS m WHERE m.key = 'release');
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' OR current_setting('array_nulls') <> 'on' THEN
        RAISE EXCEPTION 'this transaction is not as speval needs it' USING ERRCODE = 'SP001';
    END IF;
    IF v_schema IS DISTINCT FROM '1' THEN
        RAISE EXCEPTION '% %', v_schema, v_release USING ERRCODE = 'SP002';
    END IF;
END
$$;

-- Returns null if no worker has checked the others for some seconds, false if the worker is dead, has left, or is unknown.
CREATE FUNCTION speval.renew_1(p_worker bigint, p_now double precision, p_overdue double precision) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM speval.ready_1();
    -- Losing a renewal in a server crash is harmless: after a start of the server, leases count as renewed.
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE speval.workers AS w SET beat = beat + 1, last_seen = p_now, expires_at = speval.clock() + lease
    WHERE w.id = p_worker AND ended_at IS NULL AND NOT dead;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    RETURN CASE WHEN (SELECT s.last_value FROM speval.looked AS s) >= (speval.clock() - p_overdue) * 1000 THEN true END;
END
$$;

-- Checks the other workers. Rows: kind 0, once: id is the number of active workers, this one included. Kind 1: a worker that is
-- dead or whose lease has expired by the server clock. Kind 2: another worker on the machine of the caller. Kind 3: an orphaned
-- holder: an id in claims that no active worker has.
CREATE FUNCTION speval.look_1(p_worker bigint, p_machine text) RETURNS TABLE (
    kind integer, id bigint, host text, pid bigint, machine text, start text, lease double precision, beat bigint, dead boolean
)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_now double precision := speval.clock();
    -- While the server was down, no worker could renew its lease.
    v_started double precision := extract(epoch FROM pg_postmaster_start_time());
    v_living bigint;
BEGIN
    PERFORM speval.ready_1();
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM setval('speval.looked', greatest(0, v_now * 1000)::bigint);
    v_living := (SELECT count(*) FROM speval.workers AS w WHERE w.ended_at IS NULL);
    RETURN QUERY
    SELECT 0, v_living, NULL::text, NULL::bigint, NULL::text, NULL::text, NULL::double precision, NULL::bigint, NULL::boolean;
    RETURN QUERY
    SELECT CASE WHEN w.dead OR v_now > greatest(w.expires_at, v_started + w.lease) THEN 1 ELSE 2 END,
        w.id, w.host, w.pid, w.machine, w.start, w.lease, w.beat, w.dead
    FROM speval.workers AS w
    WHERE w.ended_at IS NULL AND w.id <> p_worker
        AND (w.dead OR w.machine = p_machine OR v_now > greatest(w.expires_at, v_started + w.lease))
    ORDER BY w.id;
    -- Skip from holder to holder through the index, which is fast for any number of claims; with many workers not every time.
    IF random() * v_living < 16 THEN
        RETURN QUERY
        WITH RECURSIVE holders (worker) AS (
            (SELECT r.worker FROM speval.running AS r ORDER BY r.worker LIMIT 1)
            UNION ALL
            SELECT (SELECT r.worker FROM speval.running AS r WHERE r.worker > holders.worker ORDER BY r.worker LIMIT 1)
            FROM holders WHERE holders.worker IS NOT NULL
        )
        SELECT 3, h.worker, NULL::text, NULL::bigint, NULL::text, NULL::text, NULL::double precision, NULL::bigint, NULL::boolean
        FROM holders AS h
        WHERE h.worker IS NOT NULL
            AND NOT EXISTS (SELECT FROM speval.workers AS w WHERE w.id = h.worker AND w.ended_at IS NULL);
    END IF;
END
$$;

-- Rows: kind 0, once: id failures, attempt the set concurrency, charged 1 if something is open and 0 if not, name 'lost' or
-- 'here', args 'paused' or 'going'. Kind 1: a claim. Kind 2: a refused attempt, by its position in the input; charged is 1 if
-- this worker has already recorded the same attempt.
CREATE FUNCTION speval.record_1(
    p_worker bigint, p_call integer, p_lost integer, p_now double precision,
    p_ids bigint[], p_attempts integer[], p_workers bigint[], p_again boolean[], p_outcomes text[],
    p_started double precision[], p_durations double precision[], p_results text[],
    p_types text[], p_messages text[], p_tracebacks text[],
    p_released bigint[], p_released_attempts integer[], p_released_workers bigint[],
    p_due bigint[], p_due_attempts integer[], p_due_workers bigint[],
    p_idle integer, p_ahead integer, p_after bigint, p_first bigint, p_last bigint, p_space integer, p_since bigint
) RETURNS TABLE (kind integer, id bigint, attempt integer, charged integer, name text, args text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_sort = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
    v_writes boolean := p_ids IS NOT NULL OR p_released IS NOT NULL OR p_due IS NOT NULL;
    v_floor integer;
    v_lost boolean;
    v_schema text;
    v_paused boolean;
    v_concurrency integer;
    v_rows tid[] := '{}';
    v_after bigint := p_after;
    v_claimed integer := 0;
    v_count integer;
    v_open boolean;
    v_failures bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' OR current_setting('array_nulls') <> 'on' THEN
        PERFORM speval.ready_1();
    END IF;
    -- A server crash may undo claims, and these evaluations run again; results are synced.
    IF p_ids IS NULL THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    ELSIF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    PERFORM pg_advisory_xact_lock_shared(1936745846, speval.movers());
    PERFORM pg_advisory_xact_lock(p_worker);
    SELECT w.floor INTO v_floor FROM speval.workers AS w WHERE w.id = p_worker AND w.ended_at IS NULL AND NOT w.dead;
    v_lost := NOT FOUND;
    IF v_floor > p_call THEN
        RETURN;  -- its worker has abandoned this call and made a later one
    END IF;
    SELECT coalesce(max(m.value) FILTER (WHERE m.key = 'paused'), '0') <> '0',
        max(least(m.value::numeric, 1000000)) FILTER (WHERE m.key = 'concurrency'),  -- the maximum of a worker
        max(m.value) FILTER (WHERE m.key = 'schema')
    INTO v_paused, v_concurrency, v_schema FROM speval.meta AS m WHERE m.key IN ('paused', 'concurrency', 'schema');
    IF v_schema IS DISTINCT FROM '1' THEN
        PERFORM speval.ready_1();
    END IF;

    IF p_ids IS NOT NULL THEN
        WITH gone AS (
            DELETE FROM speval.running AS r
            USING unnest(p_ids, p_attempts, p_workers, p_again, p_outcomes, p_started, p_durations, p_results, p_types,
                p_messages, p_tracebacks) WITH ORDINALITY
                AS g (id, attempt, worker, again, outcome, started, duration, result, type, message, traceback, place)
            WHERE r.id = g.id AND r.attempt = g.attempt AND r.worker + 0 = coalesce(g.worker, p_worker) AND NOT r.held
                AND g.again IS NOT TRUE
            RETURNING g.*, r.worker AS holder, r.released, r.suspect
        ), kept AS (
            UPDATE speval.running AS r SET held = true, ahead = false, updated_at = p_now
            FROM unnest(p_ids, p_attempts, p_workers, p_again, p_outcomes, p_started, p_durations, p_results, p_types,
                p_messages, p_tracebacks) WITH ORDINALITY
                AS g (id, attempt, worker, again, outcome, started, duration, result, type, message, traceback, place)
            WHERE p_again IS NOT NULL
                AND r.id = g.id AND r.attempt = g.attempt AND r.worker + 0 = coalesce(g.worker, p_worker) AND NOT r.held
                AND g.again
            RETURNING g.*, r.worker AS holder, r.released, r.suspect
        )
        INSERT INTO speval.attempts
        SELECT nextval('speval.seqs'), t.id, t.attempt, t.holder, t.started, t.duration, p_now, coalesce(t.outcome, 'completed'),
            t.result, t.type, t.message, t.traceback, t.again IS NOT TRUE, t.released, t.suspect
        FROM (SELECT * FROM gone UNION ALL SELECT * FROM kept ORDER BY place) AS t;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count < cardinality(p_ids) THEN
            RETURN QUERY
            SELECT 2, g.place, NULL::integer, (a.seq IS NOT NULL)::integer, NULL::text, NULL::text
            FROM unnest(p_ids, p_attempts, p_workers) WITH ORDINALITY AS g (id, attempt, worker, place)
            LEFT JOIN speval.attempts AS a
                ON a.evaluation = g.id AND a.attempt = g.attempt AND a.worker = coalesce(g.worker, p_worker)
            WHERE a.seq IS NULL OR a.xmin <> pg_current_xact_id()::xid;
        END IF;
    END IF;

    IF p_released IS NOT NULL THEN
        WITH back AS (
            DELETE FROM speval.running AS r
            USING unnest(p_released, p_released_attempts, p_released_workers) AS g (id, attempt, worker)
            WHERE r.id = g.id AND r.attempt = g.attempt AND r.worker + 0 = g.worker AND NOT r.held
            RETURNING r.*
        )
        INSERT INTO speval.queue SELECT b.id, b.attempt, b.released + 1, b.forgiven, b.suspect, b.id, p_now FROM back AS b;
    END IF;
    IF p_due IS NOT NULL THEN
        WITH back AS (
            DELETE FROM speval.running AS r
            USING unnest(p_due, p_due_attempts, p_due_workers) AS g (id, attempt, worker)
            WHERE r.id = g.id AND r.attempt = g.attempt AND r.worker + 0 = g.worker AND r.held
            RETURNING r.*
        )
        INSERT INTO speval.queue SELECT b.id, b.attempt, b.released, b.forgiven, b.suspect, b.id, b.updated_at FROM back AS b;
    END IF;
    -- A notification serializes the commits of the whole database, so frequent results send none.
    IF v_writes AND p_ids IS NULL THEN
        PERFORM pg_notify('speval.news', '');
    END IF;

    IF p_lost IS NOT NULL AND NOT v_lost THEN
        UPDATE speval.workers AS w SET floor = p_call WHERE w.id = p_worker;
        RETURN QUERY
        SELECT 1, r.id, r.attempt, r.attempt - r.released - r.forgiven, e.name, e.args
        FROM speval.running AS r JOIN speval.evaluations AS e ON e.id = r.id
        WHERE r.worker = p_worker AND r.call >= p_lost AND NOT r.held;
        GET DIAGNOSTICS v_claimed = ROW_COUNT;
    END IF;

    -- Needed only if the worker could have claimed something.
    v_lost := v_lost AND p_idle + p_ahead > 0 AND (v_writes OR EXISTS (
        SELECT FROM speval.queue AS q
        WHERE q.id BETWEEN p_first AND p_last
            AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
    ));
    IF NOT v_lost AND NOT v_paused AND v_floor IS NOT NULL AND p_idle > v_claimed THEN
        v_rows := ARRAY(
            SELECT q.ctid FROM speval.queue AS q
            WHERE q.put_back <= p_after AND q.put_back BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
            ORDER BY q.put_back LIMIT p_idle - v_claimed FOR UPDATE SKIP LOCKED
        );
        IF cardinality(v_rows) < p_idle - v_claimed THEN
            v_rows := v_rows || ARRAY(
                SELECT q.ctid FROM speval.queue AS q
                WHERE q.id > p_after AND q.id BETWEEN p_first AND p_last
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
                ORDER BY q.id LIMIT p_idle - v_claimed - cardinality(v_rows) FOR UPDATE SKIP LOCKED
            );
        END IF;
        IF cardinality(v_rows) > 0 THEN
            RETURN QUERY SELECT 1, c.* FROM speval.take_1(v_rows, p_worker, p_call, false, p_now) AS c;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            v_claimed := v_claimed + v_count;
        END IF;
    END IF;
    IF NOT v_lost AND NOT v_paused AND v_floor IS NOT NULL AND p_ahead > 0 AND v_claimed >= p_idle THEN
        v_rows := ARRAY(
            SELECT q.ctid FROM speval.queue AS q
            WHERE q.put_back <= p_after AND q.put_back BETWEEN p_first AND p_last
                AND q.attempt = q.released + q.forgiven AND NOT q.suspect
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
            ORDER BY q.put_back LIMIT p_ahead FOR UPDATE SKIP LOCKED
        );
        IF cardinality(v_rows) < p_ahead THEN
            v_rows := v_rows || ARRAY(
                SELECT q.ctid FROM speval.queue AS q
                WHERE q.id > p_after AND q.id BETWEEN p_first AND p_last
                    AND q.attempt = q.released + q.forgiven AND NOT q.suspect
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
                ORDER BY q.id LIMIT p_ahead - cardinality(v_rows) FOR UPDATE SKIP LOCKED
            );
        END IF;
        IF cardinality(v_rows) > 0 THEN
            RETURN QUERY SELECT 1, c.* FROM speval.take_1(v_rows, p_worker, p_call, true, p_now) AS c;
        END IF;
    END IF;

    IF NOT v_lost AND (v_claimed < p_idle OR (p_idle = 0 AND NOT v_writes)) THEN
        -- One statement has one snapshot, in which a moving row is in one of the tables. It scans running backwards, because
        -- the live rows are at the end.
        v_open := v_claimed > 0 OR EXISTS (
            SELECT FROM speval.queue AS q
            WHERE q.put_back BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
        ) OR EXISTS (
            SELECT FROM speval.queue AS q
            WHERE q.id > p_after AND q.id BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
        ) OR (
            SELECT r.id FROM speval.running AS r
            WHERE r.id BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = r.id))
            ORDER BY r.id DESC LIMIT 1
        ) IS NOT NULL;
        -- Skipped while another transaction had it locked and then rolled back: look for these only when nothing else is left.
        IF NOT v_open THEN
            v_open := EXISTS (
                SELECT FROM speval.queue AS q
                WHERE q.id BETWEEN p_first AND p_last
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = q.id))
            ) OR (
                SELECT r.id FROM speval.running AS r
                WHERE r.id BETWEEN p_first AND p_last
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = r.id))
                ORDER BY r.id DESC LIMIT 1
            ) IS NOT NULL;
            IF v_open THEN
                v_after := 0;
            ELSIF p_ids IS NOT NULL THEN
                PERFORM pg_notify('speval.news', '');  -- the last one: wakes waiting workers
            END IF;
        END IF;
    END IF;
    IF p_since IS NOT NULL THEN
        v_failures := (
            SELECT count(*) FROM speval.attempts AS a
            WHERE a.final AND a.outcome <> 'completed' AND a.seq > p_since AND a.evaluation BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.unlisted AS s WHERE s.space = p_space AND s.id = a.evaluation))
        );
    END IF;
    RETURN QUERY SELECT 0, v_failures, v_concurrency, v_open::integer, CASE WHEN v_lost THEN 'lost' ELSE 'here' END,
        CASE WHEN v_paused THEN 'paused' WHEN v_after < p_after THEN 'again' ELSE 'going' END;
END
$$;

-- Moves rows of the queue, which the caller has locked, to a worker.
CREATE FUNCTION speval.take_1(p_rows tid[], p_worker bigint, p_call integer, p_ahead boolean, p_now double precision)
RETURNS TABLE (id bigint, attempt integer, charged integer, name text, args text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH taken AS (
        DELETE FROM speval.queue AS q WHERE q.ctid = ANY (p_rows) RETURNING q.*
    ), put AS (
        INSERT INTO speval.running AS r
        SELECT t.id, t.attempt + 1, t.released, t.forgiven, t.suspect, p_ahead, false, p_worker, p_call, p_now FROM taken AS t
        RETURNING r.id, r.attempt, r.attempt - r.released - r.forgiven AS charged
    )
    SELECT p.id, p.attempt, p.charged, e.name, e.args FROM put AS p JOIN speval.evaluations AS e ON e.id = p.id;
END
$$;

CREATE FUNCTION speval.leave_1(p_worker bigint, p_now double precision) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1936745846, speval.movers());
    PERFORM speval.ready_1();  -- a migration holds this lock
    PERFORM pg_advisory_xact_lock(p_worker);
    WITH back AS (
        DELETE FROM speval.running AS r WHERE r.worker = p_worker RETURNING r.*
    )
    INSERT INTO speval.queue
    SELECT b.id, b.attempt, b.released + (NOT b.held)::integer, b.forgiven, b.suspect, b.id, p_now FROM back AS b;
    IF FOUND THEN
        PERFORM pg_notify('speval.news', '');
    END IF;
    UPDATE speval.workers AS w SET ended_at = p_now, last_seen = p_now WHERE w.id = p_worker AND w.ended_at IS NULL;
END
$$;

-- Reclaims a bounded number of evaluations from a worker: with a beat, from a dead worker whose beat is unchanged; without one,
-- from an orphaned holder. Null if the worker is alive or has ended.
CREATE FUNCTION speval.take_back_1(
    p_worker bigint, p_beat bigint, p_message text, p_max_attempts integer, p_now double precision, p_bound integer
) RETURNS TABLE (more boolean, pending bigint, failed text[])
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_sort = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    v_known bigint;
    v_taken bigint;
    v_pending bigint;
    v_failed text[];
BEGIN
    PERFORM pg_advisory_xact_lock_shared(1936745846, speval.movers());
    PERFORM speval.ready_1();  -- a migration holds this lock
    PERFORM pg_advisory_xact_lock(p_worker);
    IF p_beat IS NULL THEN
        IF EXISTS (SELECT FROM speval.workers AS w WHERE w.id = p_worker AND w.ended_at IS NULL) THEN
            RETURN;
        END IF;
    ELSE
        UPDATE speval.workers AS w SET dead = true WHERE w.id = p_worker AND ended_at IS NULL AND (dead OR beat = p_beat);
        IF NOT FOUND THEN
            RETURN;
        END IF;
    END IF;
    v_known := (SELECT w.id FROM speval.workers AS w WHERE w.id = p_worker);
    WITH taken AS (
        DELETE FROM speval.running AS r
        WHERE r.id = ANY (ARRAY(SELECT i.id FROM speval.running AS i WHERE i.worker = p_worker ORDER BY i.id + 0 LIMIT p_bound))
            AND r.worker = p_worker
        RETURNING r.*
    ), judged AS (
        SELECT t.*, NOT t.held AND NOT t.ahead AS charge,
            NOT t.held AND NOT t.ahead AND t.attempt - t.released - t.forgiven >= p_max_attempts AS final
        FROM taken AS t
    ), lost AS (
        INSERT INTO speval.attempts
        SELECT nextval('speval.seqs'), j.id, j.attempt, v_known, j.updated_at, NULL, p_now, 'lost', NULL, 'WorkerLost',
            p_message, '', j.final, j.released, j.suspect
        FROM (SELECT * FROM judged WHERE charge ORDER BY id) AS j
    ), back AS (
        -- Most evaluations claimed ahead never started, and it is unknown which did. The first time, they are not charged.
        INSERT INTO speval.queue
        SELECT j.id, j.attempt, j.released + (j.ahead)::integer, j.forgiven, j.suspect OR j.ahead, j.id, p_now
        FROM judged AS j WHERE NOT j.final
    )
    SELECT count(*), count(*) FILTER (WHERE NOT j.final), coalesce(array_agg(coalesce(e.name, '?') ORDER BY j.id)
        FILTER (WHERE j.final), '{}')
    INTO v_taken, v_pending, v_failed
    FROM judged AS j LEFT JOIN speval.evaluations AS e ON e.id = j.id;
    IF v_taken < p_bound AND p_beat IS NOT NULL THEN
        UPDATE speval.workers AS w SET ended_at = p_now WHERE w.id = p_worker;
    END IF;
    IF v_taken > 0 THEN
        PERFORM pg_notify('speval.news', '');
    END IF;
    RETURN QUERY SELECT v_taken = p_bound, v_pending, v_failed;
END
$$;
