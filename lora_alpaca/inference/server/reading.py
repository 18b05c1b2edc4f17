"""Answers, read in a thread that also does other things: asyncio's."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

from lora_alpaca.inference.answer import Answer

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Return what a function returns in a thread of its own, which the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(found: T | None, error: BaseException | None) -> None:
        if not done.done():  # nobody waits any more
            done.set_result(found) if error is None else done.set_exception(error)  # type: ignore[arg-type]

    def run() -> None:
        found, failure = None, None
        try:
            found = work()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, found, failure)

    threading.Thread(target=run, daemon=True).start()
    return await done


async def pieces(answer: Answer) -> AsyncGenerator[str, None]:
    """Yield the pieces of an answer; those that are there at the same time as one."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        if not arrived.is_set():
            with suppress(RuntimeError):  # the loop has ended, and nobody reads
                loop.call_soon_threadsafe(arrived.set)

    answer.on_arrival(tell)
    while answer.finish_reason is None:
        arrived.clear()
        if not answer.is_ready:
            await arrived.wait()
            continue
        piece, failure = next(answer), None
        try:
            while answer.finish_reason is None and answer.is_ready:
                piece += next(answer)
        except Exception as error:
            failure = error
        yield piece
        if failure is not None:
            raise failure


async def together(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, str], None]:
    """Yield the pieces of several answers as they come, with the number of the answer. The first error ends all."""
    if len(answers) == 1:
        async with aclosing(pieces(answers[0])) as found:
            async for piece in found:
                yield 0, piece
        return
    arriving: asyncio.Queue[tuple[int, str | BaseException | None]] = asyncio.Queue()

    async def read(number: int, answer: Answer) -> None:
        try:
            async for piece in pieces(answer):
                arriving.put_nowait((number, piece))
            arriving.put_nowait((number, None))
        except Exception as error:
            arriving.put_nowait((number, error))

    tasks = [asyncio.create_task(read(number, answer)) for number, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            number, item = await arriving.get()
            if isinstance(item, BaseException):
                raise item
            left -= item is None
            if item is not None:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
