"""The scripts that are killed: a copy among others, and one that ends itself before or after a chosen step."""

# One copy. What it has been given goes to its output line by line; each execution of its function to a log that all share.
COPY = """
import asyncio, json, os, secrets, sys, time
from concurrent.futures import ThreadPoolExecutor
from speval import as_completed

options = json.loads(sys.argv[1])
count = options.pop("count")
log = os.path.abspath("executions")
lengths = [0.001, 0.003, 0.01, 0.02, 0.05, 0.15, 0.3]

def begun(number):
    token = secrets.token_hex(8)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(file, f"{number} {os.getpid()} {time.time()} {token}\\n".encode())
    os.close(file)
    return {"number": number, "square": number**2, "token": token}

def blocking(args):
    result = begun(args["number"])
    time.sleep(args["seconds"])
    return result

async def waiting(args):
    result = begun(args["number"])
    await asyncio.sleep(args["seconds"])
    return result

function = waiting if options["executor"] == "coroutine" else blocking
if options["executor"] == "pool":
    options["executor"] = ThreadPoolExecutor(options["concurrency"])
space = [{"number": n, "seconds": lengths[n * 31 % 97 % 7]} for n in range(count)]
for e in as_completed(function, space, "runs.db", max_attempts=100_000, progress=False, **options):
    print(json.dumps([e["name"], e["status"], e["result"], e["attempts"]]), flush=True)
"""

# Forks a child for each kill, since an interpreter that has imported everything already is soon at its first commit.
POINTS = """
import functools, itertools, json, logging, os, shutil, signal, sqlite3, sys, threading
from concurrent.futures import ThreadPoolExecutor
from speval import speval
from speval.stores.sqlite.file import SqliteFile

scenario = json.loads(sys.argv[1])
logging.disable(logging.WARNING)

def arm(kind, point, side):
    seen = {"write": itertools.count(1), "close": itertools.count(1)}
    about = threading.local()

    def step(label, call):
        if scenario["only"] not in (None, label):
            return call()
        now = "close" if label == "close" else "write"
        here = next(seen[now]) == point and now == kind
        if here:
            os.write(1, (json.dumps({"label": label}) + "\\n").encode())
        if here and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if here and side == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def method(name, original):
        return lambda self, *args: step(name, functools.partial(original, self, *args))

    for name in ("_create", "_journal_mode"):
        setattr(SqliteFile, name, method(name, getattr(SqliteFile, name)))

    class Connection(sqlite3.Connection):
        def close(self):
            step("close", super().close)

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)

    transaction, patiently = SqliteFile._transaction, SqliteFile._patiently

    def labelled(self, begin, patience, work, *args, **kwargs):
        about.label = f"commit of {work.__name__.strip('_<>')}" if begin != "BEGIN" else None
        return transaction(self, begin, patience, work, *args, **kwargs)

    def counted(self, patience, statement):
        call = functools.partial(patiently, self, patience, statement)
        return step(about.label, call) if statement == "COMMIT" and about.label else call()

    SqliteFile._transaction, SqliteFile._patiently = labelled, counted

def note(db, args):
    file = os.open(f"{db}.executions", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.write(file, f"{args}\\n".encode())
    os.close(file)
    return {"number": args, "square": args**2}

def run(db):
    async def waiting(args):
        return note(db, args)

    options = dict(scenario["options"])
    function = waiting if options["executor"] == "coroutine" else functools.partial(note, db)
    if options["executor"] == "pool":
        options["executor"] = ThreadPoolExecutor(options["concurrency"])
    speval(function, range(scenario["count"]), db, max_attempts=100_000, progress=False, **options)

def kill_at(kind, point):
    db = f"{scenario['side']}-{kind}-{point}.db"
    for suffix in ("", "-wal"):
        if scenario["begin_with"] and os.path.exists(scenario["begin_with"] + suffix):
            shutil.copy(scenario["begin_with"] + suffix, db + suffix)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(kind, point, scenario["side"])
            run(db)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"db": db, "point": point, "code": code}), flush=True)
    return code

if scenario["points"]:
    for point in scenario["points"]:
        kill_at("write", point)
else:
    for kind in ("write", "close"):
        ended = 0  # by itself; how many commits a run has differs a little from run to run
        for point in itertools.count(1):
            ended = ended + 1 if kill_at(kind, point) != -signal.SIGKILL else 0
            if ended == 2:
                break
"""
