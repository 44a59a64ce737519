"""Which results of an earlier run, kept outside of the database, may still be recorded.

Owns the rule, for both kinds of database. Invariant: an execution is recorded once, however often it is handed in, a completed
evaluation is left as it is, and what a living worker holds is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..codec import same
from .base import Ended, TakenIn

__all__ = ["Adopted", "Standing", "Status", "StoredEnd", "judge", "sort_out", "standing_of"]

Status = Literal["pending", "in_progress", "completed", "failed"]


class StoredEnd(NamedTuple):
    """An attempt at the evaluation that is recorded already."""

    attempt: int
    worker: int | None
    started_at: float | None
    outcome: str


class Standing(NamedTuple):
    """How the evaluation of that name stands."""

    id: int
    args: str
    status: Status  # of one held for its backoff: in_progress
    attempt: int  # the latest
    released: int
    worker: int | None  # who holds it
    is_alive: bool  # whether that one is a worker that has neither left nor been declared dead
    ends: Sequence[StoredEnd]


def standing_of(rows: Iterable[Sequence[Any]], ends: Iterable[Sequence[Any]]) -> dict[Any, Standing]:
    """Return how evaluations stand.

    Args:
        rows: Of each the name, and the fields of a ``Standing`` up to the last.
        ends: Of each attempt its evaluation, and the fields of a ``StoredEnd``.
    """
    of: dict[int, list[StoredEnd]] = {}
    for evaluation, *rest in ends:
        of.setdefault(evaluation, []).append(StoredEnd(*rest))
    return {name: Standing._make((id, *rest, of.get(id, ()))) for name, id, *rest in rows}


class Adopted(NamedTuple):
    """An attempt to record, with the token it gets."""

    ended: Ended  # its claim has the id and the number under which it is recorded
    released: int  # of the evaluation, from then on
    in_place: bool  # of a row that says that this attempt was lost with its worker


def sort_out(ended: Iterable[Ended], standing: Mapping[str, Standing]) -> tuple[TakenIn, list[Adopted]]:
    """Judge all of them, by the standing of the evaluation of each name; of one evaluation only one is recorded at once."""
    taken, adopted, seen = TakenIn(), list[Adopted](), set[int]()
    for one in ended:
        judged = judge(one, standing.get(one.claim.name))
        if isinstance(judged, Adopted) and judged.ended.claim.id in seen:
            judged = "waits", "another result of the evaluation comes first"
        if isinstance(judged, Adopted):
            seen.add(judged.ended.claim.id)
            adopted.append(judged)
            taken.recorded.append(one.claim)
        elif judged == "known":
            taken.known.append(one.claim)
        else:
            (taken.waits if judged[0] == "waits" else taken.refused).append((one.claim, judged[1]))
    return taken, adopted


def judge(ended: Ended, standing: Standing | None) -> Adopted | Literal["known"] | tuple[Literal["waits", "refused"], str]:
    """Decide about one result: record it, it is recorded already, not now, or never."""
    claim, outcome, _ = ended
    # 1. What it is about has to be there.
    if standing is None:
        return "waits", "the database has no evaluation of that name"
    if not same(standing.args, claim.args):
        return "refused", "the evaluation has other args by now"
    # 2. The same execution: an attempt of one worker has one number and one start.
    real = [end for end in standing.ends if end.outcome != "lost"]
    if any(e.worker == claim.worker and claim.attempt == e.attempt for e in real):
        return "known"
    if any(e.worker == claim.worker and e.started_at == outcome.started_at for e in real):
        return "known"
    # 3. Its token is good still: the worker has died, or ended, without giving it back.
    id, number = standing.id, claim.attempt
    is_held = standing.status == "in_progress"
    if is_held and (id, standing.attempt, standing.worker) == (claim.id, number, claim.worker):
        return Adopted(ended, standing.released, False)
    # 4. Somebody else has it, or has ended it.
    if is_held and standing.is_alive:
        return "waits", "another worker holds the evaluation"
    if standing.status == "completed":
        return "refused", "the evaluation has been completed by another attempt"
    if any(e.attempt > number and e.outcome == "completed" for e in real):
        return "refused", "the evaluation was completed later, and put back since"
    newer = any(e.attempt >= number for e in real)
    if outcome.cause is not None and (newer or standing.status == "failed"):
        return "refused", "a later attempt has ended"
    # 5. It is free: taken back as lost, given back, or of a database that was made anew.
    lost = any(e.attempt == number and e.outcome == "lost" for e in standing.ends)
    if number < standing.attempt or newer:
        number, released, lost = standing.attempt + 1, standing.released, False
    elif lost:
        released = standing.released
    elif number == standing.attempt:
        released = max(0, standing.released - 1)
    else:
        released = standing.released + number - standing.attempt - 1
    return Adopted(ended._replace(claim=claim._replace(id=id, attempt=number)), released, lost)
