"""A limit on the time of code in this process."""

import threading
import time

import pytest

from lora_alpaca.prompts.time_limit import time_limit


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_takes_too_long_is_stopped_and_what_does_not_is_left_alone():
    with pytest.raises(TimeoutError), time_limit(0.1):
        spin(5)
    with time_limit(5):
        spin(0.5)
    spin(0.5)  # nothing comes after its time


def test_every_thread_has_its_own_time():
    ended = {}

    def run(name: str, limit: float) -> None:
        try:
            with time_limit(limit):
                spin(1)
            ended[name] = "done"
        except TimeoutError:
            ended[name] = "stopped"

    threads = [threading.Thread(target=run, args=pair) for pair in (("short", 0.1), ("long", 10))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert ended == {"short": "stopped", "long": "done"}


def test_a_limit_that_runs_out_at_the_very_end_is_raised_inside_or_not_at_all():
    for _ in range(30):
        try:
            with time_limit(0):
                spin(0.01)
        except TimeoutError:
            pass
        spin(0.001)
