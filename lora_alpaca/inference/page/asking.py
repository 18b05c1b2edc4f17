"""Answers as a page shows them: pictured some times a second while they grow, and stopped by a button."""

import html
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import gradio as gr

from lora_alpaca.errors import LoraAlpacaError, visible
from lora_alpaca.inference.answer import Answer

PICTURE = 0.06  # seconds between two pictures of an answer that grows
SHORTEST = 0.005  # seconds of tokens that tell a speed
HEARTBEAT = 0.5  # seconds after which a page is told even that nothing has changed, and may say that its reader left


class Reading:
    """An answer as far as it was read: its text, how fast it came, and how it ended."""

    def __init__(self, answer: Answer, changed: threading.Event):
        self.ended = self.stopped = False
        self.error: Exception | None = None
        self._answer, self._changed = answer, changed
        self._steps = 0
        self._first = self._last = 0.0  # when a token came
        answer.on_arrival(self._arrived)
        if answer.is_ready:  # since a moment ago
            self._arrived()

    @property
    def text(self) -> str:
        """Return what there is of the answer."""
        return self._answer.text

    @property
    def note(self) -> str:
        """Return a line on how the answer is getting on, or how it ended, with its tokens and their speed."""
        tokens = self._answer.completion_tokens
        if not self.ended and not tokens:
            return f"searching … {self._steps:,} tokens deep" if self._steps else "waiting for the first token …"
        counted = f"{tokens:,} token{'s' * (tokens != 1)}"
        seconds = self._last - self._first
        if tokens > 1 and seconds > SHORTEST:
            speed = (tokens - 1) / seconds
            counted += f" · {speed:,.{0 if speed >= 20 else 1}f} tokens/s"
        return f"{self._how_it_ended()} · {counted}" if self.ended else f"writing … {counted}"

    def read(self) -> None:
        """Read what has come, and wait for nothing."""
        try:
            while not self.ended and self._answer.is_ready:
                next(self._answer)
                self._steps += 1
        except StopIteration:
            self.ended = True
        except Exception as error:
            self.ended, self.error = True, error

    def stop(self) -> None:
        """Stop the model at its next token, if the answer has not ended."""
        if not self.ended:
            self.stopped = True
            self._answer.close()
            self._changed.set()

    def _arrived(self) -> None:
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._changed.set()

    def _how_it_ended(self) -> str:
        if self.error is not None:
            return "failed"
        if self.stopped:
            return "stopped"
        if self._answer.finish_reason == "length":
            return "cut off at max new tokens"
        stop = self._answer.stop
        return "ended by itself" if stop is None else f"ended at the stop text {visible(stop)!r}"


class Running:
    """The answers that are being written, by the session that asked for them: each waits for one question at a time."""

    def __init__(self) -> None:
        self._readings: dict[str | None, list[Reading]] = {}

    def follow(self, session: str | None, answers: Sequence[Answer]) -> Iterator[list[Reading]]:
        """Yield the readings of answers as they grow, up to their end. Raises what the model raises.

        A reader who leaves stops the model. Raises gr.Error if this session is still waiting for an answer.
        """
        changed = threading.Event()
        readings = [Reading(answer, changed) for answer in answers]
        if any(not reading.ended for reading in self._readings.get(session, ())):
            for reading in readings:
                reading.stop()
            raise busy()
        self._readings[session] = readings
        try:
            while True:
                changed.wait(HEARTBEAT)
                changed.clear()
                for reading in readings:
                    reading.read()
                yield readings
                if all(reading.ended for reading in readings):
                    break
                time.sleep(PICTURE)
        finally:
            for reading in readings:
                reading.stop()
            if self._readings.get(session) is readings:
                del self._readings[session]
        for reading in readings:
            if reading.error is not None:
                raise reading.error

    def stop(self, request: gr.Request) -> None:
        """Stop what a session waits for. Gradio's own `cancels` would end it too, but often shows an error there."""
        for reading in self._readings.get(request.session_hash, ()):
            reading.stop()


def busy() -> gr.Error:
    """Return the message to a visitor who does not wait for an answer."""
    return gr.Error("An answer is still being written; stop it first.", print_exception=False)


@contextmanager
def messages() -> Iterator[None]:
    """Show errors that a visitor can cause as a message on the page. Gradio reads messages as HTML."""
    try:
        yield
    except LoraAlpacaError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def buttons(running: bool) -> list[gr.Button]:
    """Return what the button that asks and the one that stops become."""
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]
