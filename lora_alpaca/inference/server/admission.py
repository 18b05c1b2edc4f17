"""The bounded queue: how many answers may be asked for at the same time."""

import math

from lora_alpaca.inference.server.api_error import ApiError

LONGEST_WAIT = 60  # seconds that a client is told to wait, at most


class Admission:
    """Counts answers under way: up to `running` are made at once, and `waiting` more wait. For one thread alone."""

    def __init__(self, running: int, waiting: int):
        self.running, self.capacity = running, running + waiting
        self.taken = 0
        self._seconds = 1.0  # that an answer takes, on average of late

    def take(self, places: int) -> None:
        """Take places. Raises ApiError: 429 where they are not free, 400 where there never are so many."""
        if places > self.capacity:
            raise ApiError(400, f"{places} answers in one request; at most {self.capacity} are made or wait here")
        if self.taken + places > self.capacity:
            wait = min(LONGEST_WAIT, max(1, math.ceil(self._seconds)))
            raise ApiError(
                429,
                f"{self.taken} answers are being made or wait already, and {self.capacity} may; try again",
                code="queue_full",
                headers={"retry-after": str(wait)},
            )
        self.taken += places

    def release(self, places: int, seconds: float) -> None:
        """Free places of answers that took some seconds."""
        self.taken -= places
        self._seconds += 0.1 * (seconds - self._seconds)
