"""A TCP proxy that lies: it stops forwarding, cuts connections, or loses answers, when a test tells it to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from .postgres_server import Server, free_port


class Proxy:
    """Stands between a server on this machine and whoever connects to ``port``."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lose: bytes | None = None
        self.lost = threading.Event()
        self.port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def url(self, server: Server, namespace: str) -> str:
        return server.url(namespace=namespace).replace(str(server.port), str(self.port))

    def stall(self) -> None:
        """Keep all connections and forward nothing, as a network that has come apart does."""
        self._goes_on.clear()

    def go_on(self) -> None:
        self._goes_on.set()

    def cut(self) -> None:
        """Close all connections there are."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for one in pair:
                _end(one)

    def lose_the_answer_to(self, text: str) -> None:
        """Forward the next request that holds the text, and cut its connection in place of the answer."""
        self.lost.clear()
        self._lose = text.encode()

    def close(self) -> None:
        _end(self._listener)
        self._goes_on.set()
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._pairs.append((client, server))
                doomed = threading.Event()
                for source, sink, answers in ((client, server, False), (server, client, True)):
                    self._start(self._pump, source, sink, doomed, answers)

    def _pump(self, source: socket.socket, sink: socket.socket, doomed: threading.Event, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._goes_on.wait()
                if answers and doomed.is_set():
                    self.lost.set()
                    break
                if not answers and self._lose is not None and self._lose in data:
                    self._lose = None
                    doomed.set()
                sink.sendall(data)
        _end(sink)
        _end(source)
        source.close()


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
