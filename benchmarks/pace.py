"""How long to time each of a list of cases so that all of them end on time and none is cut."""

from __future__ import annotations

import time


class Pace:
    """How many seconds to time the next case for, so that all of them end near ``end`` (of time.monotonic)."""

    def __init__(self, end: float, fewest: float, most: float) -> None:
        self.end, self.fewest, self.most = end, fewest, most
        self.passes, self.rest = 1.0, 0.0  # of a case: forward, backward, both; and seconds that are not timing

    def seconds(self, left: int) -> float:
        """For each pass of the next of ``left`` cases."""
        spare = (self.end - time.monotonic()) / left - self.rest
        return min(max(spare / self.passes, self.fewest), self.most)

    def learn(self, took: float, seconds: float, passes: int) -> None:
        """A case took so many seconds, with ``seconds`` of timing for each of its passes."""
        new = 1.0 if not self.rest else 0.4  # sizes differ within a suite: the last ones say more
        self.passes += new * (passes - self.passes)
        self.rest += new * (max(took - seconds * passes, 1e-3) - self.rest)
