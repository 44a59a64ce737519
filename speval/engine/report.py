"""What the log says of outcomes that are recorded.

Owns the lines about evaluations, and the number of those that have ended. Invariant: an outcome is reported after the commit
that records it, and a refused one is not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..model import Claim
from ..stores.base import Ended
from .failures import Told
from .held import Held

__all__ = ["Report"]

logger = logging.getLogger("speval.worker")


class Report:
    """Reports outcomes.

    Args:
        held: Where claims wait that are to be tried again.

    Attributes:
        recorded: How many evaluations have ended.
    """

    def __init__(self, held: Held) -> None:
        self.recorded = 0
        self._held = held
        self._told = Told(logger)

    def outcomes(self, ended: Sequence[Ended], refused: Sequence[Claim]) -> None:
        """Log what was recorded, and hold what is to be tried again."""
        stale, is_shown = set(refused), logger.isEnabledFor(logging.DEBUG)
        for claim, outcome, again in ended:
            if stale and claim in stale:
                continue
            self.recorded += not again
            if outcome.error is None:
                if is_shown:
                    logger.debug("evaluation %r completed in %.3f s", claim.name, outcome.duration)
                continue
            what = f"{outcome.error['type']}: {outcome.error['message']}".partition("\n")[0]
            if again:
                pause = self._held.hold(claim)
                text = "evaluation %r will be tried again in %.1f s, after attempt %d: %s"
                self._told.say(logging.WARNING, what, text, claim.name, pause, claim.charged)
            else:
                self._told.say(logging.ERROR, what, "evaluation %r failed in attempt %d: %s", claim.name, claim.charged)

    def sum_up(self) -> None:
        """Log how many failures were not told one by one."""
        self._told.sum_up()
