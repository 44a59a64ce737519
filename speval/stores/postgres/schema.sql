-- What one eval space of a PostgreSQL database consists of, executed once, in one transaction. "speval" stands for its schema.
--
-- A row's state is the table it is in: queue, then running, then attempts, the last one marked as final. So evaluations and
-- attempts only grow, small rows churn in queue and running, and a million ended ones slow nobody down. Nothing refers by foreign
-- key: each would be looked up for each row, and every move is one statement anyway.

CREATE TABLE speval.meta (
    key text PRIMARY KEY,
    value text NOT NULL
);

CREATE TABLE speval.evaluations (
    id bigint PRIMARY KEY,                  -- in the order of the eval space, never given again
    name text COLLATE "C" NOT NULL,         -- with NUL written as two characters, which no text can hold here
    args text NOT NULL,                     -- JSON; as text, because json knows no NaN and jsonb no order of keys
    EXCLUDE USING hash (name WITH =)        -- no name twice; other indexes hold no names above 2.7 kB
);
CREATE SEQUENCE speval.ids MINVALUE 0 START 0;

-- Pending.
CREATE TABLE speval.queue (
    id bigint PRIMARY KEY,
    attempt integer NOT NULL DEFAULT 0,        -- the latest attempt's number: it only ever grows
    released integer NOT NULL DEFAULT 0,       -- attempts given back unused
    forgiven integer NOT NULL DEFAULT 0,       -- attempts before the last retry(): the budget used is the rest
    suspect boolean NOT NULL DEFAULT false,    -- a worker died with it claimed ahead, and it is never claimed ahead again
    put_back bigint,                           -- its id once more, if it has been claimed before
    updated_at double precision NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000, autovacuum_vacuum_cost_delay = 0,
    vacuum_truncate = false);
-- Who claims goes on after the last id it has claimed, past what is dead in the index; these few it may have passed.
CREATE INDEX queue_put_back ON speval.queue (put_back) WHERE put_back IS NOT NULL;

-- In progress, or held by its worker until its backoff is over.
CREATE TABLE speval.running (
    id bigint PRIMARY KEY,
    attempt integer NOT NULL,
    released integer NOT NULL,
    forgiven integer NOT NULL,
    suspect boolean NOT NULL,
    ahead boolean NOT NULL,   -- claimed ahead, so it may not have begun
    held boolean NOT NULL,    -- its attempt has ended, and it waits for another one
    worker bigint NOT NULL,
    call integer NOT NULL,    -- the record() of this worker that claimed it, by which a claim whose answer was lost is found
    updated_at double precision NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_cost_delay = 0, vacuum_truncate = false);
CREATE INDEX running_worker ON speval.running (worker, call);

-- One row per attempt that ended; the last one of a completed or failed evaluation is final.
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
    released integer NOT NULL,  -- as they were in running, for whoever puts it back
    suspect boolean NOT NULL
);
CREATE UNIQUE INDEX attempts_evaluation ON speval.attempts (evaluation, attempt);  -- no attempt is recorded twice
CREATE INDEX attempts_failed ON speval.attempts (seq) WHERE final AND outcome <> 'completed';
CREATE SEQUENCE speval.seqs;

CREATE TABLE speval.workers (
    id bigint PRIMARY KEY,   -- random
    host text NOT NULL,
    pid bigint NOT NULL,
    machine text NOT NULL,
    start text NOT NULL,
    lease double precision NOT NULL,
    expires_at double precision NOT NULL,  -- by this server's clock, as all here that ends in _at is not
    beat bigint NOT NULL DEFAULT 0,
    dead boolean NOT NULL DEFAULT false,   -- it holds nothing any more, what it held is being taken back
    floor integer NOT NULL DEFAULT 0,      -- a record() with a lower number was given up by its worker and may do nothing
    started_at double precision NOT NULL,
    last_seen double precision NOT NULL,
    ended_at double precision
) WITH (fillfactor = 50);
CREATE INDEX workers_here ON speval.workers (id) WHERE ended_at IS NULL;
-- When any of the workers has last looked at all others, in milliseconds. No row: a sequence leaves no dead ones behind.
CREATE SEQUENCE speval.looked MINVALUE 0 START 0;

-- Spaces that were compared with what is stored: a start of the same space finds its digest and compares nothing.
CREATE TABLE speval.spaces (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    digest text NOT NULL UNIQUE,
    first bigint NOT NULL,     -- its lowest and highest id
    last bigint NOT NULL,
    gaps boolean NOT NULL,     -- in between there are others, those in strangers
    exact boolean NOT NULL     -- all its args are those that are stored
);
CREATE TABLE speval.strangers (
    space integer NOT NULL,
    id bigint NOT NULL,
    PRIMARY KEY (space, id)
);

-- What speval 0.1.1 had as a table, for people and their scripts.
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

-- What follows are the verbs of the workers, one call and so one transaction each. As functions their plans are kept by the
-- server, also behind a pooler that gives each transaction another connection. Each has a version in its name: an older release
-- goes on with its own. Plans are made for tables that will be large, however empty they are now.
--
-- What is switched off in a function costs ten thousand million in the planner's eyes, and what costs so much is compiled by a
-- server that can (jit), at a tenth of a second for each connection and each plan: so that is off too.
--
-- A sum with 0 keeps the planner from an index that looks as good while a table is empty.
--
-- Whoever moves rows to attempts holds the lock of movers, shared: a reader of attempts learns from it whether a number that
-- is missing may still come, and whoever must have everything stand still takes it alone. The lock of the worker keeps its calls
-- and its death apart.

CREATE FUNCTION speval.clock() RETURNS double precision LANGUAGE sql VOLATILE AS $$
    SELECT extract(epoch FROM clock_timestamp())::double precision
$$;

-- The lock of movers by its two keys; 1936745846 is "spev".
CREATE FUNCTION speval.movers() RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT 'speval.attempts'::regclass::oid::integer
$$;

-- Called first by those that do not look themselves. SP001: the client has to open a transaction of its own, since this one is not
-- as needed: its snapshot would be older than the locks it waits for, or NULL in an array would have been read as a text. SP002: a
-- newer release has changed the schema, and this function is not up to it.
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

-- Null: nobody has looked at the others for some seconds. False: declared dead, has left, or unknown.
CREATE FUNCTION speval.renew_1(p_worker bigint, p_now double precision, p_overdue double precision) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM speval.ready_1();
    -- A renewal that a crash of the server undoes costs nothing: nobody is judged for a lease after its start.
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE speval.workers AS w SET beat = beat + 1, last_seen = p_now, expires_at = speval.clock() + lease
    WHERE w.id = p_worker AND ended_at IS NULL AND NOT dead;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    RETURN CASE WHEN (SELECT s.last_value FROM speval.looked AS s) >= (speval.clock() - p_overdue) * 1000 THEN true END;
END
$$;

-- A look at the other workers. Answers: kind 0, once: id is how many have not ended, this one among them. Kind 1: one that is dead,
-- or whose lease is over by this server's clock. Kind 2: another one on the machine of the caller. Kind 3: whoever is said to hold
-- something and is none of those that have not ended.
CREATE FUNCTION speval.look_1(p_worker bigint, p_machine text) RETURNS TABLE (
    kind integer, id bigint, host text, pid bigint, machine text, start text, lease double precision, beat bigint, dead boolean
)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_now double precision := speval.clock();
    -- A server that has just started has kept nobody's lease.
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
    -- From holder to holder through the index, however many evaluations each of them holds; among many workers not each time.
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

-- Answers: kind 0, once: id failures, attempt the set concurrency, charged 1 if something is open and 0 if not, name 'lost' or
-- 'here', args 'paused' or 'going'. Kind 1: a claim. Kind 2: a refused one of the ended, by its place, with charged 1 if this very
-- attempt of this very worker is recorded already.
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
    -- A claim that a crash of the server undoes is an evaluation that runs again; a result is kept.
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
        RETURN;  -- its worker has given this call up, and a later one has been here
    END IF;
    SELECT coalesce(max(m.value) FILTER (WHERE m.key = 'paused'), '0') <> '0',
        max(least(m.value::numeric, 1000000)) FILTER (WHERE m.key = 'concurrency'),  -- no more than a worker goes to
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
    -- A notification keeps all commits of the database in line, so none goes with the results that end every minute.
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

    -- Told only to who could have claimed otherwise.
    v_lost := v_lost AND p_idle + p_ahead > 0 AND (v_writes OR EXISTS (
        SELECT FROM speval.queue AS q
        WHERE q.id BETWEEN p_first AND p_last
            AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
    ));
    IF NOT v_lost AND NOT v_paused AND v_floor IS NOT NULL AND p_idle > v_claimed THEN
        v_rows := ARRAY(
            SELECT q.ctid FROM speval.queue AS q
            WHERE q.put_back <= p_after AND q.put_back BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
            ORDER BY q.put_back LIMIT p_idle - v_claimed FOR UPDATE SKIP LOCKED
        );
        IF cardinality(v_rows) < p_idle - v_claimed THEN
            v_rows := v_rows || ARRAY(
                SELECT q.ctid FROM speval.queue AS q
                WHERE q.id > p_after AND q.id BETWEEN p_first AND p_last
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
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
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
            ORDER BY q.put_back LIMIT p_ahead FOR UPDATE SKIP LOCKED
        );
        IF cardinality(v_rows) < p_ahead THEN
            v_rows := v_rows || ARRAY(
                SELECT q.ctid FROM speval.queue AS q
                WHERE q.id > p_after AND q.id BETWEEN p_first AND p_last
                    AND q.attempt = q.released + q.forgiven AND NOT q.suspect
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
                ORDER BY q.id LIMIT p_ahead - cardinality(v_rows) FOR UPDATE SKIP LOCKED
            );
        END IF;
        IF cardinality(v_rows) > 0 THEN
            RETURN QUERY SELECT 1, c.* FROM speval.take_1(v_rows, p_worker, p_call, true, p_now) AS c;
        END IF;
    END IF;

    IF NOT v_lost AND (v_claimed < p_idle OR (p_idle = 0 AND NOT v_writes)) THEN
        -- One statement, one snapshot: what moves from one table to the other is seen in one of them. Backwards through running,
        -- where the living are at the end.
        v_open := v_claimed > 0 OR EXISTS (
            SELECT FROM speval.queue AS q
            WHERE q.put_back BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
        ) OR EXISTS (
            SELECT FROM speval.queue AS q
            WHERE q.id > p_after AND q.id BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
        ) OR (
            SELECT r.id FROM speval.running AS r
            WHERE r.id BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = r.id))
            ORDER BY r.id DESC LIMIT 1
        ) IS NOT NULL;
        -- Passed over while another had it claimed, which then came to nothing: only looked for when all else is done.
        IF NOT v_open THEN
            v_open := EXISTS (
                SELECT FROM speval.queue AS q
                WHERE q.id BETWEEN p_first AND p_last
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = q.id))
            ) OR (
                SELECT r.id FROM speval.running AS r
                WHERE r.id BETWEEN p_first AND p_last
                    AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = r.id))
                ORDER BY r.id DESC LIMIT 1
            ) IS NOT NULL;
            IF v_open THEN
                v_after := 0;
            ELSIF p_ids IS NOT NULL THEN
                PERFORM pg_notify('speval.news', '');  -- the last one: those who wait for it need not go on asking
            END IF;
        END IF;
    END IF;
    IF p_since IS NOT NULL THEN
        v_failures := (
            SELECT count(*) FROM speval.attempts AS a
            WHERE a.final AND a.outcome <> 'completed' AND a.seq > p_since AND a.evaluation BETWEEN p_first AND p_last
                AND (p_space IS NULL OR NOT EXISTS (SELECT FROM speval.strangers AS s WHERE s.space = p_space AND s.id = a.evaluation))
        );
    END IF;
    RETURN QUERY SELECT 0, v_failures, v_concurrency, v_open::integer, CASE WHEN v_lost THEN 'lost' ELSE 'here' END,
        CASE WHEN v_paused THEN 'paused' WHEN v_after < p_after THEN 'again' ELSE 'going' END;
END
$$;

-- Rows of the queue, locked by whoever calls, become a worker's.
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
    PERFORM speval.ready_1();  -- a release that changes the schema holds this lock
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

-- Take back a bounded number of what a worker holds: one that is dead if its beat is still the given one, or, without a beat,
-- one that is none of those that have not ended. Null if it is alive after all, or has ended.
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
    PERFORM speval.ready_1();  -- a release that changes the schema holds this lock
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
        -- Most of what was claimed ahead never began, and nobody knows which did. Once, and only once, it is not charged.
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
