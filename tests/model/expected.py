"""What has to be stored, and shown to people, after each step."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis.stateful import invariant

from speval.host import Process
from speval.model import Claim
from speval.stores.base import Store
from speval.stores.control import Control

from .kinds import ATTEMPTS, VIEW, WORKERS, Kind
from .values import STATUSES, Attempt, Copy, Modelled, ModelledWorker


class Expected:
    """A database with what the model knows of it."""

    happened: ClassVar[Counter] = Counter()  # over all runs, to see that the interesting things do happen

    def __init__(self, kind: type[Kind]) -> None:
        super().__init__()
        self.kind = kind()
        self.runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.monkeypatch = pytest.MonkeyPatch()
        self.evaluations: dict[str, Modelled] = {}
        self.attempts: list[Attempt] = []
        self.workers: dict[int, ModelledWorker] = {}
        self.copies: list[Copy] = []
        self.issued: list[Claim] = []
        self.opened: list[Store] = []
        self.keepings: list = []
        self.first: dict[str, int] = {}
        self.gone: set[int] = set()
        self.max_attempts = 2
        self.at_once = 1  # evaluations taken back in one transaction
        self.results = 0
        self.pids = 100
        self.speaking = Process("host", 1, "here", "1")
        self.observer: Control | None = None
        self.seen: dict[int, int] = {}
        self.next_id = 0
        setattr_ = self.monkeypatch.setattr
        setattr_("speval.stores.liveness.is_gone", lambda p, machine: p.machine == machine and p.pid in self.gone)
        for name in self.kind.patched:
            setattr_(name, lambda: self.speaking)
        setattr_(self.kind.randomness, SimpleNamespace(randbits=lambda bits: self.next_id))

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def shown(self, evaluation):
        """Return the evaluation as people have to see it."""
        status = "pending" if evaluation.status == "held" else evaluation.status
        has_ended = not evaluation.is_open
        last = self.attempts[evaluation.last] if has_ended else None
        worker = last.worker if has_ended else evaluation.holder if status == "in_progress" else None
        error = None
        if status == "failed":
            text = ("SomeError", "boom", "Traceback: boom")
            if last.outcome == "lost":
                text = ("WorkerLost", f"worker {self.label(worker)} died or was out of reach", "")
            error = dict(zip(("cause", "type", "message", "traceback"), (last.outcome, *text), strict=True))
        return {
            "name": evaluation.name,
            "status": status,
            "updated": evaluation.updated,
            "result": json.loads(last.result) if status == "completed" else None,
            "args": evaluation.args,
            "attempts": evaluation.made,
            "error": error,
            "started": last.started_at if has_ended else evaluation.updated if status == "in_progress" else None,
            "duration": last.duration if has_ended else None,
            "worker": None if worker is None else self.label(worker),
        }

    def label(self, worker):
        return f"host:{self.workers[worker].process.pid}:{worker:012x}"

    @invariant()
    def the_file_holds_what_it_has_to(self):
        if self.observer is None:
            return
        self.happened["steps"] += 1
        by_id = sorted(self.evaluations.values(), key=lambda e: e.id)
        stored = self.kind.query(self.kind.stored)
        assert len(stored) == len(by_id), "an evaluation is lost"
        assert self.kind.states() == len(by_id)
        attempts = self.kind.query(ATTEMPTS)
        assert [Attempt(*row[1:]) for row in attempts] == self.attempts
        assert len({(a.id, a.attempt) for a in self.attempts}) == len(self.attempts), "an attempt is recorded twice"
        for e, (id, name, args, code, attempt, made, charged, worker, updated, recorded, last) in zip(
            by_id, stored, strict=True
        ):
            status = STATUSES[code]
            assert (id, name, args, status, attempt, worker) == (e.id, e.name, str(e.args), e.status, e.attempt, e.holder)
            if charged is None and not e.is_open:
                charged = e.charged  # not told of what has ended
            assert (made, charged, updated) == (e.made, e.charged, e.updated)
            # The budget is told by what was recorded, whatever the counters say.
            assert charged == recorded - e.forgiven + (status == "in_progress")
            assert charged <= self.max_attempts
            assert attempt >= self.seen.get(id, 0), "the number of an attempt has gone back"
            self.seen[id] = attempt
            assert (worker is not None) == (status in ("in_progress", "held"))
            assert worker is None or not self.workers[worker].ended, "held by one that has ended"
            assert last == (None if e.last is None else attempts[e.last][0])
        workers = self.kind.query(WORKERS)
        assert workers == [(w.id, w.beat, w.dead, w.ended) for _, w in sorted(self.workers.items())]

    @invariant()
    def people_see_what_the_file_holds(self):
        if self.observer is None:
            return
        expected = [self.shown(e) for e in sorted(self.evaluations.values(), key=lambda e: e.id)]
        assert list(self.observer.evaluations()) == expected
        view = sorted(self.kind.query(VIEW), key=lambda row: self.evaluations[row[0]].id)
        columns = [(e["name"], e["status"], e["updated"], e["result"], e["args"]) for e in expected]
        assert [(n, s, u, None if r is None else json.loads(r), json.loads(a)) for n, s, u, r, a in view] == columns
