"""What the model knows: evaluations, attempts and workers as they have to be stored, and the copies at work."""

from __future__ import annotations

from dataclasses import dataclass, field

from speval.host import Process
from speval.model import Claim
from speval.stores.base import Store

from ..conftest import MovableClock

NAMES = ["0", "1", "2", "3", "a", "07", "7", "b c", "é", "10", "9", "-1"]
STATUSES = {0: "pending", 1: "in_progress", 2: "completed", 3: "failed", 4: "held"}


@dataclass
class Attempt:
    """A row that has to be in the table of attempts, in this order."""

    id: int
    attempt: int
    worker: int
    outcome: str
    result: str | None
    started_at: float
    duration: float | None


@dataclass
class Modelled:
    """What has to be stored of one evaluation."""

    id: int
    name: str
    args: int
    updated: float
    status: str = "pending"
    attempt: int = 0
    made: int = 0  # attempts that people are shown
    charged: int = 0  # attempts charged to the present budget, one under way included
    forgiven: int = 0  # rows of attempts before the present budget
    holder: int | None = None
    is_ahead: bool = False  # the claim under way was taken ahead
    is_suspect: bool = False  # a worker died with it claimed ahead
    last: int | None = None  # the place of its last attempt in the list of all

    @property
    def is_open(self) -> bool:
        return self.status not in ("completed", "failed")

    def put_back(self, wall: float, *, charge: bool) -> None:
        if self.status == "in_progress" and not charge:
            self.charged -= 1
            self.made -= 1
        self.status, self.holder, self.updated = "pending", None, wall


@dataclass
class ModelledWorker:
    id: int
    process: Process
    lease: float
    beat: int = 0
    dead: bool = False
    ended: bool = False
    expires_at: float = 0.0  # by the server's clock, where one decides


@dataclass
class Copy:
    """One running copy of a script."""

    process: Process
    clock: MovableClock
    store: Store
    keeping: object = None
    space: dict[str, int] = field(default_factory=dict)
    ids: set[int] = field(default_factory=set)
    worker: int = 0
    stalls: bool = False
    claims: list[Claim] = field(default_factory=list)
    since: int = 0  # attempts recorded when it seeded
    cursor: int = 0
    followed: int = 0  # attempts that the feed has passed
    sights: dict = field(default_factory=dict)  # what it has seen of the others
