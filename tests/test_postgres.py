"""A PostgreSQL database: what only a server can do to its workers, done by a real one."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from speval import aio, load_evals, speval
from speval.errors import (
    ArgsChangedError,
    DatabaseError,
    DatabaseMissingError,
    DatabaseUnavailableError,
    ForeignDatabaseError,
    NewerSchemaError,
    OptionError,
)
from speval.host import Process
from speval.model import Claim, Outcome
from speval.spaces.eager import Space
from speval.stores import make_store
from speval.stores.base import Ended, Record
from speval.stores.liveness import WorkerRow
from speval.url import PostgresUrl

from .conftest import WAIT, needs, rows, server_url, wait_for
from .postgres_server import Server, free_port
from .proxy import Proxy


async def seed(store, eval_space):
    space = Space()
    list(space.fill(eval_space))
    try:
        return await store.seed(space, "error")
    finally:
        space.close()


def done(claim: Claim, result="1") -> Ended:
    return Ended(claim, Outcome(None, result, None, 5.0, 0.25), False)


async def until(condition):
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def url(postgres, namespace) -> str:
    return postgres.url(namespace=namespace)


@pytest.fixture
def proxy(postgres):
    proxy = Proxy(postgres.port)
    yield proxy
    proxy.close()


@pytest.fixture
def through(proxy, postgres, namespace) -> str:
    """The URL of a database behind the proxy."""
    return proxy.url(postgres, namespace)


@pytest.fixture
async def stores():
    """Opens stores, and closes them."""
    opened = []

    async def open(url, eval_space=None, mode="create"):
        store = make_store(PostgresUrl.parse(url), mode)
        opened.append(store)
        await store.open()
        if eval_space is not None:
            await seed(store, eval_space)
        return store

    yield open
    for store in opened:
        await store.close()


@pytest.fixture
def own():
    """A server that the test may stop, for itself alone."""
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


# Answers that are lost


async def test_a_record_without_an_answer_is_not_repeated_if_it_was_committed(stores, proxy, through):
    store = await stores(through, range(5))
    worker = await store.register(30)
    claims = (await store.record(Record(worker, idle=2))).claims
    proxy.lose_the_answer_to("record_1")
    with pytest.raises(DatabaseUnavailableError):
        await store.record(Record(worker, [done(c, f'"{c.name}"') for c in claims], idle=2))
    assert proxy.lost.is_set()
    again = await store.record(Record(worker, [done(c, f'"{c.name}"') for c in claims], idle=2))
    assert (again.refused, [c.name for c in again.claims]) == ([], ["2", "3"])
    assert rows(through, "SELECT evaluation, result FROM attempts ORDER BY 1") == [(1, '"0"'), (2, '"1"')]
    # Once it is known, the same again is stale again.
    assert (await store.record(Record(worker, [done(claims[0])]))).refused == [claims[0]]


async def test_claims_without_an_answer_are_returned_before_new_ones(stores, proxy, through):
    store = await stores(through, range(10))
    worker = await store.register(30)
    for _ in range(2):
        proxy.lose_the_answer_to("record_1")
        with pytest.raises(DatabaseUnavailableError):
            await store.record(Record(worker, idle=2))
    got = (await store.record(Record(worker, idle=3))).claims
    assert [(c.name, c.attempt) for c in got] == [("0", 1), ("1", 1), ("2", 1)]
    assert rows(through, "SELECT count(*) FROM running") == [(3,)]


async def test_claims_without_an_answer_are_returned_also_when_none_are_wanted(stores, proxy, through):
    store = await stores(through, range(10))
    worker = await store.register(30)
    proxy.lose_the_answer_to("record_1")
    with pytest.raises(DatabaseUnavailableError):
        await store.record(Record(worker, idle=2))
    got = (await store.record(Record(worker))).claims
    assert [c.name for c in got] == ["0", "1"]
    assert (await store.record(Record(worker))).claims == []


async def test_an_abandoned_call_that_arrives_late_does_nothing(stores, url):
    store = await stores(url, range(10))
    worker = await store.register(30)
    (claim,) = (await store.record(Record(worker, idle=1))).claims
    # As if the second call had been held up on its way while the third was sent again in its place.
    late = store._calls + 1
    store._calls, store._unanswered = late, late
    assert [c.name for c in (await store.record(Record(worker, idle=1))).claims] == ["1"]
    await asyncio.to_thread(store._connection.run_once, 10, store._record, late, Record(worker, [done(claim)], idle=5, ahead=5))
    assert rows(url, "SELECT count(*) FROM running") == [(2,)]
    assert rows(url, "SELECT count(*) FROM attempts") == [(0,)]


@pytest.mark.parametrize("verb", ["record", "take back"])
async def test_calls_of_a_worker_and_its_death_are_serialized(stores, url, verb):
    store = await stores(url, range(10))
    worker = await store.register(30)
    other = await stores(url, range(10))
    its = await other.register(30)
    keeping = other.lease_keeping()
    with psycopg.connect(server_url(url)) as late:
        # As an earlier call of the worker does, that is still under way when the next one is sent.
        late.execute("SELECT pg_advisory_xact_lock(%s)", (worker,))
        if verb == "record":
            waits = asyncio.create_task(store.record(Record(worker, idle=1)))
        else:
            row = WorkerRow(worker, Process("host", 1, "elsewhere", "1"), 30, 0, True)
            waits = asyncio.create_task(asyncio.to_thread(keeping.take_back, row, 3, 100))
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        await until(lambda: rows(url, waiting) == [(1,)])
        assert not waits.done()
    assert await waits is not None
    assert (await other.record(Record(its, idle=1))).lost is False


async def test_a_seed_whose_commit_has_no_answer_is_not_repeated(stores, proxy, through):
    store = await stores(through)
    proxy.lose_the_answer_to("COMMIT")
    seeded = await seed(store, range(100))
    assert (seeded.new, seeded.unchanged) in {(100, 0), (0, 100)}
    assert rows(through, "SELECT count(*), count(DISTINCT name) FROM evaluations") == [(100, 100)]
    assert rows(through, "SELECT count(*) FROM queue") == [(100,)]


# Plans


async def test_a_claim_reads_only_the_rows_it_takes_also_without_statistics(stores, url):
    schema = PostgresUrl.parse(url).schema
    store = await stores(url)
    with psycopg.connect(server_url(url), autocommit=True) as connection:
        for table in ("queue", "running", "attempts", "evaluations"):
            connection.execute(f"ALTER TABLE {schema}.{table} SET (autovacuum_enabled = off)")
    await seed(store, range(20_000))
    worker = await store.register(30)
    claimed = 0
    for _ in range(100):
        claims = (await store.record(Record(worker, idle=2, ahead=20))).claims
        claimed += len(claims)
        await store.record(Record(worker, [done(claim) for claim in claims[2:]], released=claims[:2]))
    await store.close()  # the server counts what a connection has read at its end, if not before
    sql = """
        SELECT relname, coalesce(seq_tup_read, 0), coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables
        WHERE schemaname = ? AND relname IN ('queue', 'running')
    """
    await until(lambda: rows(url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'speval'") == [(0,)])
    for table, scanned, fetched in rows(url, sql, schema):
        # Seeding has not read these rows, and each claim reads a row two or three times.
        assert claimed <= scanned + fetched < 6 * claimed, (table, scanned, fetched, claimed)


# The feed


async def test_jit_is_off_for_plans_with_disabled_plan_types(stores, url):
    """With it, a server that has a compiler takes thirty times as long; the one of these tests has none."""
    await stores(url)
    functions = "SELECT proname, coalesce(proconfig, '{}') FROM pg_proc WHERE pronamespace = ?::regnamespace"
    found = dict(rows(url, functions, PostgresUrl.parse(url).schema))
    planned = [name for name, settings in found.items() if any(s.startswith("enable_") for s in settings)]
    assert "record_1" in planned
    assert [name for name in planned if "jit=off" not in found[name]] == []


async def test_the_feed_waits_for_an_uncommitted_sequence_number(stores, url):
    store = await stores(url, range(10))
    worker = await store.register(30)
    claims = (await store.record(Record(worker, idle=10))).claims
    schema = PostgresUrl.parse(url).schema
    with psycopg.connect(server_url(url)) as slow:
        slow.execute(f"SELECT pg_advisory_xact_lock_shared(1936745846, {schema}.movers())")
        slow.execute(f"SELECT nextval('{schema}.seqs')")
        await store.record(Record(worker, [done(claims[0]), done(claims[1])]))
        cursor, ended = await store.ended_since(0, 100)
        assert (cursor, ended) == (0, [])
        slow.execute(
            f"INSERT INTO {schema}.attempts"
            f" SELECT 1, 3, 1, {worker}, 1, 1, 1, 'completed', '3', NULL, NULL, NULL, true, 0, false"
        )
        slow.execute(f"DELETE FROM {schema}.running WHERE id = 3")
        assert await store.ended_since(cursor, 100) == (0, [])
    cursor, ended = await store.ended_since(cursor, 100)
    assert [e["name"] for _, e in ended] == ["2", "0", "1"]


async def test_the_feed_passes_a_sequence_number_that_was_rolled_back(stores, url):
    store = await stores(url, range(10))
    worker = await store.register(30)
    claims = (await store.record(Record(worker, idle=10))).claims
    await store.record(Record(worker, [done(claims[0])]))
    rows(url, "SELECT nextval('seqs') FROM generate_series(1, 3)")
    await store.record(Record(worker, [done(claims[1])]))
    cursor, ended = await store.ended_since(0, 100)
    cursor, more = await store.ended_since(cursor, 100)
    assert [e["name"] for _, e in ended + more] == ["0", "1"]
    assert await store.ended_since(cursor, 100) == (cursor, [])


@pytest.mark.parametrize("first", [2**15, 2**31, 2**40])
async def test_the_feed_continues_past_every_integer_size(stores, url, first):
    store = await stores(url, range(10))
    rows(url, "SELECT setval('seqs', ?)", first - 5)
    worker = await store.register(30)
    await store.record(Record(worker, [done(claim) for claim in (await store.record(Record(worker, idle=10))).claims]))
    cursor, names = 0, []
    for _ in range(5):
        cursor, ended = await store.ended_since(cursor, 3)
        names += [e["name"] for _, e in ended]
    assert (cursor, names) == (first + 5, [str(i) for i in range(10)])


async def test_the_feed_returns_each_end_exactly_once_with_many_writers(stores, url):
    workers = []
    for _ in range(4):
        store = await stores(url, range(2000))
        workers.append((store, await store.register(30)))

    async def work(store, worker):
        while claims := (await store.record(Record(worker, idle=7))).claims:
            await store.record(Record(worker, [done(c, c.args) for c in claims]))

    async def follow(store, seen):
        cursor = 0
        while len(seen) < 2000:
            cursor, ended = await store.ended_since(cursor, 100)
            seen.extend(e["name"] for _, e in ended)
            await asyncio.sleep(0)

    seen: list[str] = []
    async with asyncio.timeout(WAIT):
        await asyncio.gather(follow(await stores(url, range(2000)), seen), *(work(*w) for w in workers))
    assert Counter(seen) == {str(i): 1 for i in range(2000)}


# What a server does


COUNTED = """
import logging, os, sys, time
logging.basicConfig(level=logging.INFO)
from speval import speval
log = os.open("calls", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
def function(args):
    os.write(log, f"{args}\\n".encode())
    time.sleep(0.005)
    return args
print(speval(function, range(int(sys.argv[1])), "runs.db", lease=float(sys.argv[2])))
"""


def ended(url):
    try:
        return rows(url, "SELECT count(*) FROM evals WHERE status = 'completed'")[0][0]
    except psycopg.Error:
        return 0


def assert_all_done(copies, url, count, folder, twice):
    """Fail unless every copy ended well and every evaluation was completed, and executed once but for a few."""
    ends = [copy.communicate(timeout=90) for copy in copies]
    assert [copy.returncode for copy in copies] == [0] * len(copies), ends
    evaluations = load_evals(url)
    assert [(e["status"], e["result"]) for e in evaluations] == [("completed", i) for i in range(count)]
    calls = Counter((folder / "calls").read_text().split())
    assert set(calls) == {str(i) for i in range(count)}
    assert sum(calls.values()) - count <= twice, calls
    assert rows(url, "SELECT count(*) FROM attempts WHERE final") == [(count,)]
    assert rows(url, "SELECT evaluation, attempt FROM attempts GROUP BY 1, 2 HAVING count(*) > 1") == []
    return ends


def test_a_server_crash_loses_no_result_and_no_worker(own, scripts, tmp_path):
    url = scripts.database = own.url(namespace="crash")
    script = scripts.write(COUNTED)
    copies = [scripts.start(script, "800", "5") for _ in range(3)]
    for part in (100, 250):
        wait_for(lambda part=part: ended(url) >= part)
        own.stop(signal.SIGQUIT)
        own.start()
    ends = assert_all_done(copies, url, 800, tmp_path, twice=60)
    assert not any("is dead" in err for _, err in ends)


def test_a_server_that_hangs_longer_than_a_lease_kills_no_worker(own, scripts, tmp_path):
    url = scripts.database = own.url(namespace="still")
    script = scripts.write(COUNTED)
    copies = [scripts.start(script, "600", "1") for _ in range(3)]
    wait_for(lambda: ended(url) >= 60)
    own.signal_all(signal.SIGSTOP)
    time.sleep(3)
    own.signal_all(signal.SIGCONT)
    ends = assert_all_done(copies, url, 600, tmp_path, twice=600)
    assert not any("is dead" in err for _, err in ends)
    assert all("could not be renewed" in err for _, err in ends)


def test_terminated_connections_lose_nothing(url, scripts, tmp_path):
    scripts.database = url
    script = scripts.write(COUNTED)
    copies = [scripts.start(script, "600", "30") for _ in range(3)]
    killed = 0
    wait_for(lambda: ended(url) >= 30)
    with psycopg.connect(server_url(url), autocommit=True) as connection:
        while any(copy.poll() is None for copy in copies):
            killed += connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'speval'"
            ).fetchone()[0]
            time.sleep(0.3)
    assert killed >= 6
    assert_all_done(copies, url, 600, tmp_path, twice=0)


def test_a_disconnected_worker_stops_and_continues_when_the_network_is_back(postgres, proxy, namespace, scripts, tmp_path):
    url = postgres.url(namespace=namespace)
    scripts.database = proxy.url(postgres, namespace)
    log = (tmp_path / "log").open("w+")
    cut_off = scripts.start(scripts.write(COUNTED), "600", "1", stderr=log)
    wait_for(lambda: ended(url) >= 20)
    scripts.database = url
    other = scripts.start(scripts.write(COUNTED, "other.py"), "600", "1")
    wait_for(lambda: rows(url, "SELECT count(*) FROM workers") == [(2,)])
    proxy.stall()
    wait_for(lambda: rows(url, "SELECT count(*) FROM workers WHERE dead") != [(0,)])
    wait_for(lambda: "could not be renewed" in (tmp_path / "log").read_text())
    proxy.go_on()
    ends = assert_all_done([cut_off, other], url, 600, tmp_path, twice=20)
    log.close()
    assert "is dead" in ends[1][1]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs to mount a file system")
def test_a_full_disk_is_waited_for(own, tmp_path, caplog):
    folder = own.folder / "small"
    folder.mkdir()
    options = f"size=24M,mode=700,uid={own.folder.stat().st_uid}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount")
    try:
        with psycopg.connect(own.url(), autocommit=True) as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{folder}'")
            connection.execute("CREATE DATABASE small TABLESPACE small")
        url = own.url("small")
        ballast = folder / "ballast"

        async def function(args):
            if args == 50:
                with suppress(OSError):
                    ballast.write_bytes(b"x" * 24_000_000)
            return os.urandom(20_000).hex()

        async def run():
            running = asyncio.create_task(aio.speval(function, range(200), url, concurrency=4))
            await until(lambda: "disk of the server is full" in caplog.text)
            ballast.unlink()
            return await running

        summary = asyncio.run(run())
        assert (summary.completed, summary.recorded) == (200, 200)
    finally:
        own.stop()
        subprocess.run(["umount", folder], check=True)


PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


@needs("pgbouncer", PGBOUNCER is not None, "pgbouncer is not installed")
def test_each_transaction_may_use_another_connection_behind_pgbouncer(own, scripts, tmp_path):
    port, folder = free_port(), own.folder
    (folder / "pgbouncer.ini").write_text(
        f"""
        [databases]
        * = host=127.0.0.1 port={own.port}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = transaction
        default_pool_size = 3
        server_lifetime = 1
        """.replace("        ", "").replace("* =", "postgres = user=postgres")
    )
    pooler = subprocess.Popen([PGBOUNCER, str(folder / "pgbouncer.ini")], stderr=subprocess.PIPE, **own.owner)
    try:
        url = scripts.database = own.url(namespace="pooled").replace(str(own.port), str(port))
        script = scripts.write(COUNTED)
        copies = [scripts.start(script, "1000", "5") for _ in range(6)]
        assert_all_done(copies, url, 1000, tmp_path, twice=0)
    finally:
        pooler.terminate()
        pooler.communicate()


def may_make_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        return False
    name = f"speval-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made


@pytest.mark.skipif(not may_make_namespaces(), reason="needs to make network namespaces")
def test_four_hosts_share_one_server_while_one_is_disconnected_and_one_dies():
    server = Server(listen_addresses="'*'")
    is_ours = False
    try:
        server.trust("10.91.0.0/24")
        server.start()
        url = server.url(namespace="hosts").replace("127.0.0.1", "10.91.0.1")
        is_ours = subprocess.run(["ip", "netns", "add", "ada"], capture_output=True).returncode == 0
        command = [sys.executable, "examples/10_four_hosts.py", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parent.parent)
        assert "all 240 completed as they should be: True" in done.stdout, done.stdout + done.stderr
        assert "ended well: ['ada', 'barbara', 'frances']" in done.stdout, done.stdout + done.stderr
        assert "evaluated by all: True" in done.stdout
        assert "could not be renewed" in done.stderr
        assert rows(server.url(namespace="hosts"), "SELECT count(*) FROM attempts WHERE final") == [(240,)]
        # A namespace of another program still exists, and those of the example are gone.
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert "ada" in left.split()
        assert "-ada" not in left
    finally:
        if is_ours:
            subprocess.run(["ip", "netns", "delete", "ada"], check=True)
        server.close()


# Starting


def test_fifty_workers_that_start_at_once_create_one_schema_and_seed_once(url):
    barrier = threading.Barrier(50)
    failures = []

    def start():
        async def main():
            store = make_store(PostgresUrl.parse(url), "create")
            barrier.wait()
            await store.open()
            await seed(store, range(100))
            await store.close()

        try:
            asyncio.run(main())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert rows(url, "SELECT count(*) FROM evaluations") == [(100,)]


def test_namespaces_of_one_database_are_independent(postgres, namespace):
    one, other = postgres.url(namespace=f"{namespace}a"), postgres.url(namespace=f"{namespace}b")
    assert speval(lambda args: args, [1, 2], one).completed == 2
    assert speval(lambda args: -args, [1, 2, 3], other).recorded == 3
    assert [e["result"] for e in load_evals(one)] == [1, 2]
    assert [e["result"] for e in load_evals(other)] == [-1, -2, -3]


def test_reading_a_missing_namespace_creates_nothing(postgres, url):
    with pytest.raises(DatabaseMissingError, match="this database does not exist"):
        load_evals(url)
    with psycopg.connect(postgres.url()) as connection:
        assert connection.execute("SELECT to_regnamespace(%s)", (PostgresUrl.parse(url).schema,)).fetchone() == (None,)
    with pytest.raises(DatabaseError, match='database "nowhere" does not exist'):
        load_evals(postgres.url("nowhere"))


def test_a_newer_schema_is_refused_saying_what_to_install(url):
    speval(abs, [1], url)
    with psycopg.connect(server_url(url)) as connection:
        schema = PostgresUrl.parse(url).schema
        connection.execute(f"UPDATE {schema}.meta SET value = '2' WHERE key = 'schema'")
        connection.execute(f"UPDATE {schema}.meta SET value = '7.1' WHERE key = 'release'")
    with pytest.raises(NewerSchemaError, match=r"pip install 'speval>=7\.1'"):
        speval(abs, [1], url)


def test_a_schema_of_another_program_is_not_changed(postgres, url):
    schema = PostgresUrl.parse(url).schema
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema} CREATE TABLE meta (key text, value text)")
        with pytest.raises(ForeignDatabaseError, match="of another program"):
            speval(abs, [1], url)
        tables = connection.execute(
            "SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace(%s)", (schema,)
        ).fetchone()
        assert tables == (1,)


def test_a_database_without_utf8_is_refused(postgres, namespace):
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {namespace} ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    with pytest.raises(DatabaseError, match="its encoding LATIN1"):
        speval(abs, [1], postgres.url(namespace))


def test_a_user_needs_no_more_than_the_documented_privileges(postgres, namespace, url):
    schema, role = PostgresUrl.parse(url).schema, f"{namespace}_role"
    speval(abs, [1, 2], url)
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        connection.execute(f"CREATE ROLE {role} LOGIN")
    limited = url.replace("postgres@", f"{role}@")
    with pytest.raises(DatabaseError, match=r"permission denied.*docs/postgres\.md lists the required privileges"):
        load_evals(limited)
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
    assert len(load_evals(limited)) == 2
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}")
        connection.execute(f"GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}")
    assert speval(abs, [1, 2, 3], limited).completed == 3


# Values


async def test_every_text_is_returned_unchanged(url):
    names = [
        "a\0b",
        "\x10",
        "\x100",
        "\x10\x10",
        "tab\tnew\nline\r",
        "\\N",
        "{}",
        '"',
        "NULL",
        "é\U0001f600",
        "017",
        "17",
        "-0",
    ]
    values = [float("nan"), float("inf"), -0.0, 2**70, "\0", "\ud800", {"b": 1, "a": {"\0": "\\u0000"}}, ["\\", '"', "{,}"], ""]
    space = {name: [name, values] for name in names}

    def function(args):
        if args[0] == "a\0b":
            raise ValueError(f"a NUL: \0, and {args[0]}\x10")
        return args

    await aio.speval(function, space, url)
    evaluations = await aio.load_evals(url)
    assert [e["name"] for e in evaluations] == names
    assert repr([e["args"] for e in evaluations]) == repr(list(space.values()))
    assert repr([e["result"] for e in evaluations[1:]]) == repr(list(space.values())[1:])
    assert evaluations[0]["error"]["message"] == "a NUL: \0, and a\0b\x10"
    assert await aio.retry(url, ["a\0b"]) == 1
    with pytest.raises(ArgsChangedError, match="stored"):
        await aio.speval(function, space | {"a\0b": 1}, url)


async def test_large_results_are_sent_in_pieces_in_one_transaction(url, stores, monkeypatch):
    monkeypatch.setattr("speval.stores.postgres.store._MOST_TEXT", 1000)
    store = await stores(url, range(20))
    worker = await store.register(30)
    claims = (await store.record(Record(worker, idle=20))).claims
    stale = claims[7]._replace(attempt=9)
    ended = [done(c, f'"{"x" * 400}"') for c in [*claims[:7], stale, *claims[7:], claims[0]]]
    recorded = await store.record(Record(worker, ended, idle=1))
    assert (recorded.refused, recorded.open) == ([stale, claims[0]], False)
    assert (await store.summary()).completed == 20


# The command of the day


def test_a_missing_driver_names_the_extra(scripts):
    code = """
        import sys
        sys.modules["psycopg"] = None
        from speval import SpevalError, speval
        try:
            speval(abs, [1], "postgresql://u:secret@localhost/db")
        except SpevalError as error:
            print(error)
    """
    ran = scripts.run(code)
    assert ran.stdout == "a PostgreSQL database needs psycopg: pip install 'speval[postgres]'\n", ran.stderr


@pytest.mark.parametrize("wrong", ["refused", "database", "login"])
def test_no_password_is_ever_shown(postgres, scripts, wrong):
    place = {
        "refused": "127.0.0.1:1/x",
        "database": f"127.0.0.1:{postgres.port}/x",
        "login": f"127.0.0.1:{postgres.port}/postgres",
    }
    user = "nobody" if wrong == "login" else "postgres"
    code = f"""
        import logging, traceback
        logging.basicConfig(level=0)
        from speval import aio, speval
        from speval.options import checked_database
        from speval.stores import make_store
        from speval.stores.postgres import connection
        connection._LIMITS = dict.fromkeys(connection._LIMITS, 0.5)
        url = "postgresql://{user}:sesame@{place[wrong]}?sslpassword=sesame&connect_timeout=2"
        db = checked_database(url)
        print(repr(db), str(db), make_store(db))
        try:
            speval(abs, [1], url)
        except Exception:
            traceback.print_exc()
        else:
            print("no error")
    """
    ran = scripts.run(code)
    assert "speval.errors.Database" in ran.stderr
    assert "sesame" not in ran.stdout + ran.stderr.replace(code.strip(), "")


def test_a_malformed_url_is_refused_without_being_shown(scripts):
    for url in (
        "postgresql://u:se@same@h/db",
        "postgresql://u:se/same@h/db",
        "postgresql://u:12/same@h/db",
        "postgresql://u:se?same@h/db",
        "postgresql://u:12?a=same@h/db",
        "postgresql://u:se#same@h/db",
        "postgresql://u:se:same@h:x/db",
        "postgresql://u:same@[h/db",
        "postgresql://u:same@h/db?namespace=No Name",
    ):
        with pytest.raises(OptionError) as caught:
            speval(abs, [1], url)
        assert "same" not in str(caught.value), url


COMMANDS = [["status"], ["show", "0"], ["set", "concurrency", "2"], ["drop", "0", "--yes"], ["doctor"], ["ls", "--json"]]


def test_the_command_takes_a_url_and_shows_no_password(postgres, url, terminal, tmp_path):
    url = url.replace("postgres@", "postgres:sesame@")
    speval(abs, [1, 2], url)
    command = str(Path(sys.executable).with_name("speval"))
    for name, *rest in COMMANDS:
        done = subprocess.run([command, name, url, *rest], capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sesame" not in done.stdout + done.stderr
    live = terminal(command, "watch", url)
    assert live.end() == 0
    assert "sesame" not in live.text()
    assert PostgresUrl.parse(url).shown[:30] in live.text()
    done = subprocess.run([command, "copy", url, tmp_path / "copy.db"], capture_output=True, text=True, timeout=WAIT)
    assert done.stdout.startswith("1 evaluation and 1 attempt copied to ")
    wrong = subprocess.run([command, "status", url.replace("@127", "@here@127")], capture_output=True, text=True, timeout=WAIT)
    assert wrong.returncode == 2
    assert "sesame" not in wrong.stderr
