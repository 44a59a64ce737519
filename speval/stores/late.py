"""Which results from side files of an earlier run may still be recorded.

Owns the rule, for both kinds of database. Invariant: an execution is recorded once, however often it is passed in; a completed
evaluation is not changed; and the claim of a live worker is not taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..codec import same
from ..model import Claim
from .base import Ended, TakenIn

__all__ = ["Adopted", "Standing", "Status", "StoredEnd", "judge", "note_refused", "sort_out", "standing_of"]

Status = Literal["pending", "in_progress", "completed", "failed"]


class StoredEnd(NamedTuple):
    """An attempt at the evaluation that is already recorded."""

    attempt: int
    worker: int | None
    started_at: float | None
    outcome: str


class Standing(NamedTuple):
    """The stored state of an evaluation."""

    id: int
    args: str
    status: Status  # in_progress also during a backoff
    attempt: int  # the latest
    released: int
    worker: int | None  # the worker that holds it
    is_alive: bool  # whether that worker has neither left nor been declared dead
    ends: Sequence[StoredEnd]


def standing_of(rows: Iterable[Sequence[Any]], ends: Iterable[Sequence[Any]]) -> dict[Any, Standing]:
    """Return the stored states of evaluations by name.

    Args:
        rows: Tuples of the name and the fields of a ``Standing`` without the last one.
        ends: Tuples of the evaluation and the fields of a ``StoredEnd``, one for each attempt.
    """
    of: dict[int, list[StoredEnd]] = {}
    for evaluation, *rest in ends:
        of.setdefault(evaluation, []).append(StoredEnd(*rest))
    return {name: Standing._make((id, *rest, of.get(id, ()))) for name, id, *rest in rows}


class Adopted(NamedTuple):
    """An attempt to record, with its new fencing token."""

    ended: Ended  # its claim has the id and the attempt number to record
    released: int  # the new value for the evaluation
    in_place: bool  # whether it replaces a row with the outcome "lost"


def sort_out(ended: Iterable[Ended], standing: Mapping[str, Standing]) -> tuple[TakenIn, list[Adopted]]:
    """Judge all results by the stored state of their evaluations; at most one result per evaluation is recorded at once."""
    taken, adopted, seen = TakenIn(), list[Adopted](), set[int]()
    for one in ended:
        judged = judge(one, standing.get(one.claim.name))
        if isinstance(judged, Adopted) and judged.ended.claim.id in seen:
            judged = "waits", "another result of this evaluation is recorded first"
        if isinstance(judged, Adopted):
            seen.add(judged.ended.claim.id)
            adopted.append(judged)
            taken.recorded.append(one.claim)
        elif judged == "known":
            taken.known.append(one.claim)
        else:
            (taken.waits if judged[0] == "waits" else taken.refused).append((one.claim, judged[1]))
    return taken, adopted


def note_refused(taken: TakenIn, adopted: Sequence[Adopted], refused: Collection[Claim]) -> None:
    """Correct what was to be recorded by what the database has refused: those results wait for the next start."""
    stale = {one.ended.claim for one in adopted if one.ended.claim in refused}
    if stale:
        pairs = list(zip(taken.recorded, adopted, strict=True))
        taken.recorded[:] = [claim for claim, one in pairs if one.ended.claim not in stale]
        taken.waits += [(claim, "the database has refused its token") for claim, one in pairs if one.ended.claim in stale]


def judge(ended: Ended, standing: Standing | None) -> Adopted | Literal["known"] | tuple[Literal["waits", "refused"], str]:
    """Decide about one result: record it, known already, later, or never."""
    claim, outcome, _ = ended
    # 1. The evaluation must exist and have the same args.
    if standing is None:
        return "waits", "the database has no evaluation with this name"
    if not same(standing.args, claim.args):
        return "refused", "the evaluation now has different args"
    # 2. The same execution: worker and number, or worker and start time, identify an attempt.
    real = [end for end in standing.ends if end.outcome != "lost"]
    if any(e.worker == claim.worker and claim.attempt == e.attempt for e in real):
        return "known"
    if any(e.worker == claim.worker and e.started_at == outcome.started_at for e in real):
        return "known"
    # 3. Its token is still valid: the worker died or ended without releasing the claim.
    id, number = standing.id, claim.attempt
    is_held = standing.status == "in_progress"
    if is_held and (id, standing.attempt, standing.worker) == (claim.id, number, claim.worker):
        return Adopted(ended, standing.released, False)
    # 4. Another worker holds it, or another attempt has ended it.
    if is_held and standing.is_alive:
        return "waits", "another worker holds the evaluation"
    if standing.status == "completed":
        return "refused", "another attempt has completed the evaluation"
    if any(e.attempt > number and e.outcome == "completed" for e in real):
        return "refused", "a later attempt completed the evaluation, and a retry made it pending again"
    newer = any(e.attempt >= number for e in real)
    if outcome.cause is not None and (newer or standing.status == "failed"):
        return "refused", "a later attempt has ended"
    # 5. The evaluation is free: reclaimed as lost, released, or in a new database.
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
