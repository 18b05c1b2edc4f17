"""The next tokens, from the logits of a step: transformers' distribution, for many requests in few operations.

Shapes: B answers, V vocabulary, K likeliest tokens.
"""

import torch

from lora_alpaca.inference.sampling import Request, Sampling, Token

Choice = Token | Exception
LIKELIEST = 256  # tokens that are looked at first, before the whole vocabulary is sorted
_unseeded = torch.Generator()
_unseeded.seed()


class Chooser:
    """What the choice of a request's tokens depends on: the tokens so far, and random numbers of its own."""

    def __init__(self, request: Request):
        self.sampling, self.constraint = request.sampling, request.constraint
        self.prompt = list(request.prompt_ids)
        seed = request.sampling.seed
        self.random = _unseeded if seed is None else torch.Generator().manual_seed(seed)
        asked = self.sampling
        self.penalised = bool(asked.presence_penalty or asked.frequency_penalty)
        self.repeated = asked.repetition_penalty != 1
        self.changes = self.penalised or self.repeated or bool(asked.logit_bias) or self.constraint is not None
        self._counts: torch.Tensor | None = None  # of the answer's tokens, [V]
        self._seen: torch.Tensor | None = None  # whether a token is in prompt or answer, [V]

    def draw(self) -> torch.Tensor:
        """Return the next random number in [0, 1)."""
        return torch.rand((), generator=self.random, dtype=torch.double)

    def accept(self, token: int) -> None:
        """Take note of a token of the answer."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def changed(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores [V] after penalties, bias and constraint, in fp32."""
        asked = self.sampling
        scores = scores.clone()
        if self.repeated:
            if self._seen is None:
                self._seen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
                self._seen[torch.tensor(self.prompt, device=scores.device)] = True
            by = asked.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores < 0, scores * by, scores / by), scores)
        if self.penalised:
            if self._counts is None:
                self._counts = torch.zeros_like(scores)
            scores -= asked.frequency_penalty * self._counts + asked.presence_penalty * (self._counts > 0)
        if asked.logit_bias:
            ids = torch.tensor(list(asked.logit_bias), device=scores.device)
            scores[ids] += torch.tensor(list(asked.logit_bias.values()), device=scores.device)
        if self.constraint is not None:
            allowed = self.constraint.allowed().to(scores.device)
            scores[: len(allowed)].masked_fill_(~allowed, float("-inf"))
            scores[len(allowed) :] = float("-inf")
            if not bool(torch.isfinite(scores.max())):
                raise RuntimeError("the constraint allows no token")
        return scores


def choose(logits: torch.Tensor, choosers: list[Chooser]) -> list[Choice]:
    """Return the next token of each answer, of logits [B, V]; for an answer that has none, the error."""
    scores = logits.float()
    best, greedy = scores.max(-1)
    sound = torch.isfinite(best).tolist()
    errors: dict[int, Exception] = {
        row: FloatingPointError("the model's logits are not numbers") for row, good in enumerate(sound) if not good
    }
    own = scores
    if any(chooser.changes for chooser in choosers):
        scores = scores.clone()
        for row, chooser in enumerate(choosers):
            if chooser.changes and row not in errors:
                try:
                    scores[row] = chooser.changed(own[row])
                except Exception as error:  # of the request's own constraint or bias
                    errors[row] = error
        greedy = scores.argmax(-1)
    ids: list[int] = greedy.tolist()
    sampled = [row for row, c in enumerate(choosers) if c.sampling.temperature > 0 and row not in errors]
    if sampled:
        draws = torch.stack([choosers[row].draw() for row in sampled])
        few = scores if len(sampled) == len(ids) else scores[sampled]
        for row, number in zip(sampled, sample(few, [choosers[row].sampling for row in sampled], draws), strict=True):
            ids[row] = number
    choices: list[Choice] = [
        errors[row] if row in errors else _token(ids[row], own[row], chooser.sampling.logprobs)
        for row, chooser in enumerate(choosers)
    ]
    for row, (choice, chooser) in enumerate(zip(choices, choosers, strict=True)):
        if isinstance(choice, Token):
            try:
                chooser.accept(choice.id)
            except Exception as error:
                choices[row] = error
    return choices


def _token(number: int, scores: torch.Tensor, logprobs: int | None) -> Token:
    """Return a token, with log-probabilities by the model's own scores [V] if they were asked for."""
    if logprobs is None:
        return Token(number)
    known = scores.log_softmax(-1)
    top = known.topk(logprobs)
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(number, float(known[number]), pairs)


def sample(scores: torch.Tensor, samplings: list[Sampling], draws: torch.Tensor) -> list[int]:
    """Return an id for each row of scores [B, V], drawn by a number in [0, 1): temperature, top k, top p and min p.

    The likeliest K tokens are sorted. Only a row that may need more of them is drawn from all.
    """
    size = scores.shape[1]
    ids = [-1] * len(samplings)
    limited = [row for row, asked in enumerate(samplings) if asked.top_k or asked.top_p < 1 or asked.min_p]
    most = max((samplings[row].top_k for row in limited), default=0)
    for among in sorted({min(size, max(LIKELIEST, 2 * most)), size}):
        rows = [row for row in limited if ids[row] < 0]
        if rows:
            few = scores if len(rows) == len(ids) else scores[rows]
            chosen, sure = _among_likeliest(few, [samplings[row] for row in rows], draws[rows], among)
            for row, number, good in zip(rows, chosen.tolist(), sure.tolist(), strict=True):
                ids[row] = number if good else -1
    for row, asked in enumerate(samplings):
        if ids[row] < 0:
            above = scores[row].double() - scores[row].max()  # no temperature makes an infinity of it
            shares = (above / asked.temperature).exp().cumsum(-1)
            ids[row] = int(torch.searchsorted(shares, draws[row].to(shares.device) * shares[-1], right=True))
    return ids


def _among_likeliest(
    scores: torch.Tensor, asked: list[Sampling], draws: torch.Tensor, among: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return drawn ids [B], and [B] whether the K likeliest tokens of a row hold all that it may be drawn from."""
    size = scores.shape[1]
    columns = [[one.temperature, one.top_k or size, one.top_p, one.min_p] for one in asked]
    limits = torch.tensor(columns, dtype=torch.double, device=scores.device)
    temperature, top_k, top_p, min_p = limits[:, :, None].unbind(1)  # [B, 1] each
    best = scores.amax(-1, keepdim=True).double()
    values, ids = scores.topk(among)  # [B, K]
    kth = values.gather(1, (top_k.long() - 1).clamp(max=among - 1))
    kept = (values >= kth) | (top_k > among)  # those that equal the last of them too
    shares = ((values - best) / temperature).exp() * kept  # of the likeliest token's
    unlimited = top_k >= size
    total = shares.sum(-1, keepdim=True)
    if bool(unlimited.any()):
        total = torch.where(unlimited, ((scores - best) / temperature).exp().sum(-1, keepdim=True), total)
    before = shares.cumsum(-1) - shares
    kept &= (before < top_p * total) & (shares >= min_p)
    kept[:, 0] = True
    sure = ~kept[:, -1] | (among == size)
    ids, order = ids.sort(-1)  # so that two tokens that are nearly as likely do not change places by a rounding
    shares = (shares * kept).gather(1, order).cumsum(-1)
    places = torch.searchsorted(shares, draws.to(scores.device)[:, None] * shares[:, -1:], right=True)
    return ids.gather(1, places.clamp(max=among - 1))[:, 0], sure
