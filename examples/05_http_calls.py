"""Make a thousand HTTP calls, a hundred at a time, and after a crash only those that have no answer yet.

Shows:
    An async function. ``concurrency`` is the number of calls at the same time, ``timeout`` the time limit of a call,
    ``retry_on`` the exceptions that are tried again, and ``backoff`` the seconds before that. Answers are recorded as
    they arrive, so ``kill -9`` costs only the running calls.

Run:
    $ pip install aiohttp
    $ python examples/05_http_server.py &
    $ python examples/05_http_calls.py & sleep 3; kill -9 $!
    $ python examples/05_http_calls.py

    The database is the first argument, by default 05_http_calls.db in the current folder; delete it to start again. The second
    argument is the server's address. Leave the server running, it counts the requests.

Prints:
    484 answers are here already
    1000 evaluations: 1000 completed in 3.1 s (516 by this call)
    requests for numbers that had an answer: 0; numbers sent twice, being under way at a kill: 100
"""

import asyncio
import sys
from collections import Counter
from typing import Any

import aiohttp

from speval import DatabaseMissingError, aio

db = sys.argv[1] if len(sys.argv) > 1 else "05_http_calls.db"
url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8765"


async def names_answered() -> list[str]:
    try:
        return [e["name"] for e in await aio.load_evals(db, status="completed")]
    except DatabaseMissingError:  # the first start
        return []


async def main() -> None:
    # aiohttp's own limit of 100 connections is lifted: how many are open is for concurrency to say.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, raise_for_status=True) as session:

        async def get(path: str) -> Any:
            async with session.get(path) as response:
                return await response.json()

        async def square(number: int) -> Any:
            return await get(f"/square/{number}")

        answered = await names_answered()
        before = Counter(await get("/counts"))
        print(f"{len(answered)} answers are here already", flush=True)

        summary = await aio.speval(
            square,
            range(1000),
            db,
            timeout=10,
            concurrency=100,
            max_attempts=5,
            retry_on=aiohttp.ClientError,
            backoff=0.2,
        )
        print(summary)

        after = Counter(await get("/counts"))
        again = sum(after[name] - before[name] for name in answered)
        twice = sum(count > 1 for count in after.values())
        print(f"requests for numbers that had an answer: {again}; numbers sent twice, being under way at a kill: {twice}")


asyncio.run(main())
