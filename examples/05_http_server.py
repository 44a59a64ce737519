"""Answer requests slowly, refuse some, and count them; the server for 05_http_calls.py.

Shows:
    This file does not use speval. It simulates a service that is slow, sometimes fails, and charges for each request.

Run:
    $ pip install aiohttp
    $ python examples/05_http_server.py

    Its port is the first argument, by default 8765; 0 takes a free one. Stop it with Ctrl-C.

Prints:
    listening on http://127.0.0.1:8765
"""

import asyncio
import socket
import sys
from collections import Counter

from aiohttp import web

counts: Counter[str] = Counter()  # requests by number
refused: set[str] = set()


async def square(request: web.Request) -> web.Response:
    number = request.match_info["number"]
    if int(number) % 250 == 0 and number not in refused:
        refused.add(number)
        raise web.HTTPServiceUnavailable  # not counted: a refused request costs nothing
    counts[number] += 1
    await asyncio.sleep(0.3 + int(number) % 5 / 10)
    return web.json_response(int(number) ** 2)


async def tell_counts(_: web.Request) -> web.Response:
    return web.json_response(counts)


app = web.Application()
app.add_routes([web.get(r"/square/{number:\d+}", square), web.get("/counts", tell_counts)])
listener = socket.create_server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8765))
print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
web.run_app(app, sock=listener, print=None)
