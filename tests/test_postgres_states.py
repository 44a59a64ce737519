"""A PostgreSQL server that is set up otherwise, speaks another language, or refuses: what is relied on, and what passes."""

import asyncio
import shutil
import signal
import socket
import subprocess
import threading
from contextlib import suppress

import psycopg
import pytest

from speval import load_evals, retry, speval
from speval.errors import DatabaseError, DatabaseUnavailableError, NewerSchemaError
from speval.host import _stat, this_process
from speval.spaces.eager import Space
from speval.stores import make_control, make_store
from speval.stores.base import Record
from speval.stores.postgres import connection as postgres_connection
from speval.stores.postgres import errors as postgres_errors
from speval.stores.postgres.errors import Verdict
from speval.url import PostgresUrl

from .conftest import needs, server_url
from .databases import PostgresPlace, ServerClock
from .postgres_server import Server, free_port

PGBOUNCER = shutil.which("pgbouncer", path="/usr/local/bin:/usr/bin:/usr/sbin")

# What some administrators set, and what some users have in their profile.
OTHERWISE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "statement_timeout": "20ms",
    "lock_timeout": "10ms",
    "idle_in_transaction_session_timeout": "10ms",
    "array_nulls": "off",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "synchronous_commit": "off",
    "search_path": "nowhere",
    "client_encoding": "LATIN1",
    "datestyle": "German",
}
COPY = """
import random, sys, time
from speval import speval
def function(n):
    if n % 10 == 0:
        raise ValueError(n)
    return "€" * n
print(speval(function, range(200), "runs.db", lease=5))
"""


@pytest.fixture
def url(postgres, namespace) -> str:
    return postgres.url(namespace=namespace)


@pytest.fixture
def own():
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


def test_workers_that_start_at_once_work_with_any_settings_of_their_role(postgres, namespace, scripts):
    role = f"{namespace}_role"
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN; GRANT CREATE ON DATABASE postgres TO {role}")
        for key, value in OTHERWISE.items():
            connection.execute(f"ALTER ROLE {role} SET {key} = '{value}'")
    url = scripts.database = postgres.url(namespace=namespace).replace("postgres@", f"{role}@")
    script = scripts.write(COPY)
    copies = [scripts.start(script) for _ in range(4)]
    for copy in copies:
        out, err = copy.communicate(timeout=100)
        assert "200 evaluations: 180 completed, 20 failed" in out, out + err
    evaluations = load_evals(url)
    assert [e["result"] for e in evaluations] == [None if n % 10 == 0 else "€" * n for n in range(200)]
    assert all(e["error"] is None or e["error"]["type"] == "ValueError" for e in evaluations)
    assert all(e["started"] % 1 for e in evaluations[1:20])  # with full precision
    assert retry(url) == 20


# What passes


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("53300", Verdict.PASSES),
        ("57P03", Verdict.PASSES),
        ("57P01", Verdict.PASSES),
        ("08006", Verdict.PASSES),
        ("40001", Verdict.PASSES),
        ("08P01", Verdict.MAY_PASS),
        ("25006", Verdict.MAY_PASS),
        ("53400", Verdict.STAYS),
        ("57P04", Verdict.STAYS),
        ("3D000", Verdict.STAYS),
        ("28P01", Verdict.STAYS),
        ("XX001", Verdict.STAYS),
    ],
)
def test_errors_are_classified_by_code_in_any_language(state, expected):
    severity, text = "ВАЖНО", "что-то случилось"
    fields = f"S{severity}\0V{severity}\0C{state}\0M{text}\0\0".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.recv(10_000)
                        client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)

        thread = threading.Thread(target=answer)
        thread.start()
        conninfo = f"host=127.0.0.1 port={listener.getsockname()[1]} sslmode=disable gssencmode=disable user=me dbname=x"
        with pytest.raises(psycopg.OperationalError) as caught:
            psycopg.connect(conninfo)
        why = postgres_errors.why_not_connected(caught.value, conninfo, 10)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert (why.state, why.verdict) == (state, expected)
    assert text in str(why)


def test_a_starting_worker_waits_for_a_free_connection_and_warns_once(postgres, namespace, scripts):
    role = f"{namespace}_role"
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1; GRANT CREATE ON DATABASE postgres TO {role}")
    limited = postgres.url(namespace=namespace).replace("postgres@", f"{role}@")
    scripts.database = limited
    with psycopg.connect(server_url(limited)):
        copy = scripts.start(
            scripts.write("from speval import speval\nprint(speval(abs, [1, 2], 'X'))".replace("'X'", '"runs.db"'))
        )
        line = copy.stderr.readline()
        assert "the server is unavailable" in line
        assert "retrying for up to 3600 s" in line
        assert copy.poll() is None
    out, err = copy.communicate(timeout=60)
    assert ("2 evaluations: 2 completed" in out, err) == (True, "")


def test_a_starting_worker_waits_for_a_server_that_is_starting(scripts):
    server = Server()
    try:
        scripts.database = server.url(namespace="early")
        copy = scripts.start(scripts.write('from speval import speval\nprint(speval(abs, [1, 2], "runs.db"))'))
        assert "the server is unavailable" in copy.stderr.readline()
        server.start()
        out, err = copy.communicate(timeout=60)
        assert "2 evaluations: 2 completed" in out, err
    finally:
        server.close()


def test_a_permanent_error_is_raised_at_once(postgres):
    for problem, url in {
        "does not exist": postgres.url("nowhere"),
        'role "nobody" does not exist': postgres.url().replace("postgres@", "nobody@"),
        "Name or service not known|resolve": "postgresql://postgres@nowhere.invalid/postgres",
    }.items():
        with pytest.raises(DatabaseError, match=f"can't connect: .*({problem})") as caught:
            speval(abs, [1], url)
        assert not isinstance(caught.value, DatabaseUnavailableError)


def test_a_standby_can_be_read_and_refuses_writers(own, monkeypatch):
    url = own.url(namespace="standby")
    speval(abs, [1], url, progress=False)
    own.stop(signal.SIGINT)
    (own.data / "standby.signal").touch()
    own.start()
    assert [e["result"] for e in load_evals(url)] == [1]
    with make_control(PostgresUrl.parse(url)) as control:
        assert control.overview().completed == 1
    monkeypatch.setattr(postgres_connection, "_LIMITS", dict.fromkeys(postgres_connection._LIMITS, 0.2))
    with pytest.raises(DatabaseError, match=r"the server is read-only .*target_session_attrs=read-write") as caught:
        speval(abs, [1, 2], url, progress=False)
    assert not isinstance(caught.value, DatabaseUnavailableError)


@needs("pgbouncer", PGBOUNCER is not None, "pgbouncer is not installed")
def test_a_pgbouncer_in_statement_mode_is_refused(own):
    port = free_port()
    ini = own.folder / "statement.ini"
    ini.write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={own.port} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = statement\n"
    )
    pooler = subprocess.Popen([PGBOUNCER, str(ini)], stderr=subprocess.DEVNULL, cwd=own.folder, **own.owner)
    try:
        url = own.url(namespace="pooled").replace(str(own.port), str(port))
        with pytest.raises(DatabaseError, match="statement mode; set pool_mode = transaction"):
            speval(abs, [1], url)
    finally:
        pooler.terminate()
        pooler.wait()


async def test_a_worker_ends_when_a_newer_release_has_changed_the_schema(url):
    store = make_store(PostgresUrl.parse(url))
    await store.open()
    try:
        space = Space()
        list(space.fill(range(5)))
        await store.seed(space, "error")
        worker = await store.register(30)
        await store.record(Record(worker, idle=1))
        control = make_control(PostgresUrl.parse(url), "write")
        with psycopg.connect(server_url(url)) as connection:
            schema = PostgresUrl.parse(url).schema
            connection.execute(f"UPDATE {schema}.meta SET value = CASE key WHEN 'schema' THEN '2' ELSE '7.1' END "
                               "WHERE key IN ('schema', 'release')")  # fmt: skip
        keeping = store.lease_keeping()
        for write in (
            store.record(Record(worker, idle=1)),
            asyncio.to_thread(control.retry),
            store.register(30),
            store.leave(worker),
            store.extend([("x", "1")], "error"),
            asyncio.to_thread(keeping.renew, worker, 10),
            asyncio.to_thread(keeping.reclaim, worker, 3),
        ):
            with pytest.raises(NewerSchemaError, match=r"has schema version 2.*pip install 'speval>=7\.1'"):
                await write
        control.close()
        space.close()
    finally:
        await store.close()


# Leases


@pytest.fixture
def place(postgres, namespace):
    place = PostgresPlace(postgres, namespace, ServerClock())
    yield place
    place.close()


def add_workers(place, count, machine):
    place.execute(
        "INSERT INTO workers (id, host, pid, machine, start, lease, expires_at, started_at, last_seen)"
        " SELECT n, 'host', 1, ?, '1', 30, ?, 1, 1 FROM generate_series(1, ?::bigint) AS n",
        machine, place.clock.now + 1e6, count,
    )  # fmt: skip


async def test_a_thousand_workers_check_as_often_in_total_as_a_few(place):
    store = place.store()
    await store.open()
    try:
        worker = await store.register(1e6)
        keeping = store.lease_keeping()
        asked, run = [], keeping._run
        keeping._run = lambda patience, work: asked.append(1) or run(patience, work)
        rates = {}
        for others in (2, 998):
            add_workers(place, others, "elsewhere")
            keeping.forget()
            asked.clear()
            ticks = 30 if others == 2 else 3000
            for _ in range(ticks):
                await asyncio.to_thread(keeping.look, worker)
                place.clock._now += 0.4  # of this process alone: the server need not know of each tick
            rates[others + 1] = len(asked) / (ticks * 0.4) * (others + 1)
            place.execute("DELETE FROM workers WHERE id <> ?", worker)
        assert rates[3] == pytest.approx(3 / 0.4)  # at each beat
        assert 5 < rates[999] < 20  # looks per second of all
    finally:
        await store.close()


async def test_the_last_of_many_workers_checks_with_its_next_renewal(place):
    store = place.store()
    await store.open()
    try:
        worker = await store.register(30)
        keeping = store.lease_keeping()
        add_workers(place, 999, "elsewhere")
        assert await asyncio.to_thread(keeping.look, worker) == ([], [])
        place.execute("UPDATE workers SET expires_at = ? WHERE id < 1000", place.clock.now + 5)
        place.clock.now += 9  # well before its next look
        assert await asyncio.to_thread(keeping.look, worker) == ([], [])
        assert await asyncio.to_thread(keeping.renew, worker, 10) is True
        dead, _ = await asyncio.to_thread(keeping.look, worker)
        assert len(dead) == 999
    finally:
        await store.close()


async def test_a_death_on_this_machine_is_detected_at_once_among_many_workers(place):
    store = place.store()
    await store.open()
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        worker = await store.register(30)
        keeping = store.lease_keeping()
        add_workers(place, 500, "elsewhere")
        here = this_process()
        place.execute(
            "UPDATE workers SET machine = ?, pid = ?, start = ? WHERE id = 7", here.machine, sleeper.pid, _stat(sleeper.pid)[1]
        )
        assert await asyncio.to_thread(keeping.look, worker) == ([], [])
        sleeper.kill()
        sleeper.wait()
        dead, _ = await asyncio.to_thread(keeping.look, worker)
        assert [row.id for row in dead] == [7]
    finally:
        sleeper.kill()
        sleeper.wait()
        await store.close()
