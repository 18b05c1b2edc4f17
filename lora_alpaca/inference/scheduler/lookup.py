"""Guesses at how an answer goes on: as the text did before, where its last tokens stood before.

The tokens of a guess are checked in the step that would have made one token. It pays where they are often right and a
step with more tokens takes little longer; both are measured all the time.
"""

LAST = 3  # tokens that must have stood there before
SIZES = (1, 2, 4, 8)  # of guesses, in tokens
RATE = 0.2  # at which what was measured gives way to what is
STALE = 512  # steps after which a time is measured again
EXPECTED = 0.03  # of the time of a step that another token in it is thought to take, before that is known


class Pace:
    """How long steps take, by the number of their tokens."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._measured: dict[int, int] = {}  # in which step
        self._steps = 0

    def learn(self, tokens: int, seconds: float) -> None:
        """Take note of a step."""
        self._steps += 1
        if self._is_known(tokens):
            seconds = self._seconds[tokens] + RATE * (min(seconds, 2 * self._seconds[tokens]) - self._seconds[tokens])
        self._seconds[tokens], self._measured[tokens] = seconds, self._steps

    def ratio(self, tokens: int, more: int) -> float:
        """Return how many times as long a step with more tokens takes."""
        if self._is_known(tokens) and self._is_known(tokens + more):
            return max(1.0, self._seconds[tokens + more] / self._seconds[tokens])
        return 1 + EXPECTED * more

    def _is_known(self, tokens: int) -> bool:
        return tokens in self._measured and self._steps - self._measured[tokens] < STALE


class Lookup:
    """The places of all runs of a few tokens in a growing text, and how often the token that followed came again."""

    def __init__(self, prompt: int) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # where the text goes on after its last tokens
        self._prompt, self._read = prompt, LAST
        self.share = 0.5  # of the tokens of the answer that were right to be guessed

    def read(self, ids: list[int]) -> None:
        """Take note of what is new in the text."""
        for end in range(self._read, len(ids)):
            last = tuple(ids[end - LAST : end])
            before = self._places.get(last)
            if before is not None and end >= self._prompt:
                self.share += RATE * ((ids[before] == ids[end]) - self.share)
            self._places[last] = end
        self._read = max(self._read, len(ids))

    def guess(self, ids: list[int], most: int, pace: Pace, beside: int) -> list[int]:
        """Return how the text may go on, in at most so many tokens; `beside` is how many a step has without them."""
        self.read(ids)
        place = self._places.get(tuple(ids[-LAST:]))
        if place is None:
            return []
        size, best = 0, 1.0
        for tokens in SIZES:
            right = sum(self.share**number for number in range(1, tokens + 1))
            if (gain := (1 + right) / pace.ratio(beside, tokens)) > best:
                size, best = tokens, gain
        return ids[place : place + min(size, most)]
