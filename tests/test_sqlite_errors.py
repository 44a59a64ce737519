"""What keeps SQLite from opening or writing a file is found out and named, with what helps; what passes is waited for."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from speval import aio
from speval.errors import DatabaseError

from .conftest import IMPORT_ALL, Scripts


def double(args):
    return args * 2


ME = pwd.getpwuid(os.geteuid()).pw_name

AS_NOBODY = f"""{IMPORT_ALL}
import os, resource, sys
speval.speval(abs, [], os.path.join(os.environ["HERE"], "warm.db"), executor="thread")  # all that is imported later
call, db = sys.argv[1:]
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)
try:
    if call == "speval":
        print(speval.speval(abs, [1, 2, 3], db, executor="thread").completed)
    else:
        print([e["result"] for e in speval.load_evals(db)])
except speval.SpevalError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def as_nobody(scripts: Scripts, monkeypatch, tmp_path):
    """Calls speval on a file as somebody without rights."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    monkeypatch.setenv("HERE", str(tmp_path))

    def call(how: str, db: Path) -> str:
        done = scripts.run(AS_NOBODY, how, str(db))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


# Permissions


async def test_a_file_that_may_not_be_read_or_written_is_named_with_the_chmod_that_helps(open_folder, as_nobody):
    db = open_folder / "runs.db"
    await aio.speval(double, [1], db)
    told = f"{db} belongs to {ME} and has mode 600; `chmod o+{{}} {db}` by {ME} helps"
    for call, right in (("speval", "rw"), ("load_evals", "r")):
        out = as_nobody(call, db)
        assert out.startswith(f"DatabaseError {db}: can't be "), out
        assert told.format(right) in out
    db.chmod(0o644)
    assert f"{db} belongs to {ME} and has mode 644; `chmod o+w {db}`" in as_nobody("speval", db)


async def test_a_folder_without_room_for_the_files_beside_is_named_and_not_the_database(open_folder, as_nobody):
    db = open_folder / "runs.db"
    await aio.speval(double, [1], db)
    db.chmod(0o666)
    out = as_nobody("speval", db)
    assert f"{open_folder} belongs to {ME} and has mode 755; `chmod o+w {open_folder}` by {ME} helps" in out


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
async def test_of_the_files_beside_a_database_the_one_that_is_closed_is_named(open_folder, as_nobody, suffix):
    db = open_folder / "runs.db"
    beside = Path(f"{db}{suffix}")

    async def function(args):
        db.chmod(0o666)
        for path in open_folder.iterdir():
            path.chmod(0o600 if path == beside else 0o666)
        open_folder.chmod(0o777)
        out = as_nobody("speval", db)
        assert out.startswith("DatabaseError"), out
        assert f"{beside} belongs to {ME} and has mode 600; `chmod o+rw {beside}`" in out
        return 1

    assert (await aio.speval(function, [1], db)).completed == 1


async def test_a_folder_on_the_way_that_may_not_be_entered_is_named(open_folder, as_nobody):
    inner = open_folder / "inner" / "deeper"
    inner.mkdir(parents=True)
    await aio.speval(double, [1], inner / "runs.db")
    (open_folder / "inner").chmod(0o700)
    for call in ("speval", "load_evals"):
        out = as_nobody(call, inner / "runs.db")
        assert (
            f"runs.db: can't be reached: {open_folder}/inner belongs to {ME} and has mode 700; `chmod o+x {open_folder}/inner`"
            in out
        )


# Names


async def test_a_name_too_long_for_the_files_beside_it_is_refused_before_anything_is_made(tmp_path):
    deep = tmp_path / ("d" * 240) / ("e" * 240)
    for db, what in ((tmp_path / ("n" * 250), "its name has 250 bytes"), (deep / "runs.db", "its path has")):
        for call in (aio.speval(double, [1], db), aio.load_evals(db)):
            with pytest.raises(DatabaseError, match=f"{what}.*choose a shorter one"):
                await call
    assert list(tmp_path.iterdir()) == []


async def test_symbolic_links_in_a_circle_are_an_error_of_ours(tmp_path):
    (tmp_path / "one.db").symlink_to("other.db")
    (tmp_path / "other.db").symlink_to("one.db")
    for call in (aio.speval(double, [1], tmp_path / "one.db"), aio.load_evals(tmp_path / "one.db")):
        with pytest.raises(DatabaseError, match=r"one\.db: can't be opened \(Too many levels of symbolic links\)"):
            await call


# Limits of the process and of the disk

LIMITED = """
import os, resource, sys
import speval
db = os.path.abspath("runs.db")
speval.speval(lambda x: "x" * 1000, range(10), db, executor="thread")
what = sys.argv[1]
if what == "size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
calls = []
try:
    if what == "size":
        speval.speval(lambda x: calls.append(x) or "x" * 5000, range(1000), db, executor="thread", on_changed="keep")
    else:
        from speval.stores.sqlite.control import SqliteControl
        from pathlib import Path
        import tempfile; tempfile.gettempdir()
        SqliteControl(Path(db)).close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
        taken = []
        while True:
            try: taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError: break
        for _ in range(int(sys.argv[2])): os.close(taken.pop())
        SqliteControl(Path(db)).close()
except speval.SpevalError as error:
    sys.stdout.write(f"{type(error).__name__} {error}\\n")
"""


def test_a_limit_of_the_size_of_files_ends_a_run_at_once_and_names_the_file_that_has_reached_it(scripts: Scripts):
    done = scripts.run(LIMITED, "size")
    assert done.stdout.startswith("DatabaseError runs.db: can't be written to (disk I/O error): "), done
    assert "runs.db-wal may not grow past 300000 bytes (`ulimit -f`); start with `ulimit -f unlimited`" in done.stdout


@pytest.mark.parametrize("free", [0, 1])
def test_too_many_open_files_are_named_as_such(scripts: Scripts, free):
    done = scripts.run(LIMITED, "files", str(free))
    told = "DatabaseUnavailableError runs.db: this process has reached its limit of 50 open files (`ulimit -n`)"
    assert done.stdout.startswith(told), done


@pytest.fixture
def mounted(tmp_path):
    """Mounts a disk of its own with some options, as long as the test runs."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a disk")
        disk.chmod(0o777)
        return disk

    yield mount
    subprocess.run(["umount", "-l", str(disk)], check=False, capture_output=True)


async def test_a_filesystem_that_is_mounted_read_only_is_named_and_can_be_read(mounted):
    disk = mounted("size=10m")
    await aio.speval(double, [1], disk / "runs.db")
    mounted_again = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False)
    assert mounted_again.returncode == 0
    with pytest.raises(DatabaseError, match=f"the filesystem of {disk} is mounted read-only"):
        await aio.speval(double, [1, 2], disk / "runs.db")
    with pytest.raises(DatabaseError, match=f"can't be created in {disk}: Read-only file system"):
        await aio.speval(double, [1, 2], disk / "new.db")
    assert [e["result"] for e in await aio.load_evals(disk / "runs.db")] == [2]


async def test_where_temporary_files_find_no_room_their_folder_is_named_and_not_the_database(mounted, tmp_path, scripts):
    disk = mounted("size=64k")
    (disk / "filler").write_bytes(bytes(60_000))
    code = """
    import speval
    for space in (range(10), range(0, 200_000, 2)):
        try:
            speval.speval(abs, space, "runs.db", executor="thread", on_changed="keep")
        except speval.DatabaseUnavailableError as error:
            print(error)
    """
    script = scripts.write(code)
    process = scripts.start(script, env=os.environ | {"SQLITE_TMPDIR": str(disk)})
    out, err = process.communicate(timeout=60)
    told = f"runs.db: can't write temporary files in {disk} (No space left on device); free some space there"
    assert told in out, out + err


async def test_a_folder_that_is_closed_under_a_reader_is_named_by_the_next_call(open_folder, as_nobody):
    db = open_folder / "inner" / "runs.db"
    await aio.speval(double, [1], db)
    db.chmod(0o644)
    (open_folder / "inner").chmod(0o755)
    assert as_nobody("load_evals", db) == "[2]"
    (open_folder / "inner").chmod(0o744)
    assert f"{open_folder}/inner belongs to {ME} and has mode 744; `chmod o+x {open_folder}/inner`" in as_nobody(
        "load_evals", db
    )
