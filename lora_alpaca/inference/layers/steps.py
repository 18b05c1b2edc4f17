"""Steps of few tokens go to the compiled functions, once these are there and have given what the library gives."""

import functools
from types import SimpleNamespace
from typing import Any

import torch

from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.layers import kernels
from lora_alpaca.inference.layers.decoder import Decoder
from lora_alpaca.inference.layers.weights import OtherWeights

MOST = 64  # tokens in a step; more are faster as the library's large products
TOLERANCE = {torch.float32: 1e-3}  # of the largest difference between two logits of a token
SIXTEEN_BITS = 0.05


def put_in(adapters: Adapters, functions: kernels.Functions) -> "Steps | None":
    """Let the steps of a model on a CPU be made by the compiled functions, where it is one that they know."""
    model = adapters.model
    if model.device.type != "cpu" or not hasattr(getattr(model, "model", None), "layers"):
        return None
    steps = Steps(adapters, functions)

    @functools.wraps(model.forward)  # generate of transformers reads its signature
    def forward(*args: Any, **options: Any) -> Any:
        return steps.forward(*args, **options)

    model.forward = forward
    return steps


class Steps:
    """The forward of a model, which is the library's but for what the scheduler calls a step.

    What the compiled functions give is compared with the library's logits in the first step of every adapter; `reason`
    says why they are not used.
    """

    def __init__(self, adapters: Adapters, functions: kernels.Functions):
        self.adapters, self.functions, self.reason = adapters, functions, ""
        self._plain = adapters.model.forward
        self._decoders: dict[str, Decoder] = {}

    def forward(self, *args: Any, step: Any = None, logits_to_keep: Any = 0, **options: Any) -> Any:
        """Return what the model returns; of a step, its logits alone.

        The tokens of answers under way are computed apart from prompts: then they never depend on these.
        """
        if step is None:
            return self._plain(*args, logits_to_keep=logits_to_keep, **options)
        if self.reason or not 0 < step.answering <= MOST or not isinstance(logits_to_keep, torch.Tensor):
            return self._plain(*args, step=step, logits_to_keep=logits_to_keep, **options)
        if step.answering == len(step.ids):
            return SimpleNamespace(logits=self._answering(step, logits_to_keep)[None])
        answers, others = step.parts()
        early = logits_to_keep < step.answering
        first = self._answering(answers, logits_to_keep[early])
        then = self._plain(**others.inputs(), logits_to_keep=logits_to_keep[~early] - step.answering).logits[0]
        logits = torch.cat([first, then.to(first.dtype)])
        return SimpleNamespace(logits=logits[torch.argsort(torch.argsort((~early).int(), stable=True))][None])

    def _answering(self, step: Any, keep: torch.Tensor) -> torch.Tensor:
        """Return the logits [kept, vocabulary] of tokens of answers under way."""
        decoder = self._decoders.get(self.adapters.at_work)
        if decoder is not None and step.cache.layers:
            return decoder.logits(step, keep)
        decoder = self._made()
        expected: torch.Tensor = self._plain(**step.inputs(), logits_to_keep=keep).logits[0]
        if decoder is None:
            return expected
        found = decoder.logits(step, keep)
        self._accept(decoder, found, expected.float(), step.windows)
        return expected if self.reason else found

    def _made(self) -> Decoder | None:
        """Return the decoder for the adapter at work, None before the functions are there."""
        functions = self.functions.ready()
        if functions is None:
            return None
        try:
            return Decoder(functions, self.adapters.model, self.adapters.at_work)
        except OtherWeights as error:
            self.reason = str(error) or "its layers are others"
            return None

    def _accept(self, decoder: Decoder, found: torch.Tensor, expected: torch.Tensor, windows: set[Any]) -> None:
        """Take a decoder into use if its logits are those of the library, and its layers see as far."""
        spread = expected.amax(-1) - expected.amin(-1)
        error = float(((found - expected).abs().amax(-1) / spread.clamp(min=1e-6)).nan_to_num(float("inf")).max())
        limit = TOLERANCE.get(self.adapters.model.dtype, SIXTEEN_BITS)
        if decoder.windows != windows:
            self.reason = f"its attention has windows of {windows}"
        elif error > limit:
            self.reason = f"its logits would differ by {error:.2g} of their range"
        else:
            self._decoders[self.adapters.at_work] = decoder
