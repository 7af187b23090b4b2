"""The waiting line before a model: one generation at a time in a worker thread, and everyone served in turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Make = Callable[[], Generator[Item, None, None]]


class Full(Exception):
    """So many requests are waiting already that another one is refused."""


class _End:
    """Marks the end of a job's items."""


class Job(Generic[Item]):
    """One request in the line: `async for` gives its items as they are made.

    Lives in the event loop that made it; only `work` runs in the worker thread.
    """

    def __init__(self, make: Make[Item]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item | Exception | _End] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.future: Future[None] | None = None

    def work(self) -> None:
        """Make the items; an exception is handed to the reader."""
        try:
            with closing(self._make()) as items:
                for item in items:
                    if self._cancelled.is_set():
                        break
                    self._give(item)
            self._give(_End())
        except Exception as error:
            self._give(error)

    def _give(self, item: Item | Exception | _End) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has gone, and nobody reads
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def cancel(self, reason: Exception | None = None) -> None:
        """Stop at the next item, or never begin; a job that is done does not mind. A reader gets the reason raised."""
        self._cancelled.set()
        if self.future is not None:
            self.future.cancel()
        self._items.put_nowait(reason or _End())

    async def __aiter__(self) -> AsyncIterator[Item]:
        while not isinstance(item := await self._items.get(), _End):
            if isinstance(item, Exception):
                raise item
            yield item


class Line:
    """First come, first served, with room for `waiting` jobs besides the one at work."""

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._jobs: set[Job[Any]] = set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    def join(self, make: Make[Item]) -> Job[Item]:
        """Queue up; raises Full where no room is left. Called in the event loop."""
        if len(self._jobs) > self._waiting:
            raise Full
        job = Job(make)
        self._jobs.add(job)
        job.future = self._worker.submit(job.work)
        job.future.add_done_callback(lambda _: self._jobs.discard(job))
        return job

    def end(self, reason: Exception | None = None) -> None:
        """Cancel every job. Called in the event loop."""
        for job in list(self._jobs):
            job.cancel(reason)

    def close(self) -> None:
        """Cancel every job and wait for the one at work to stop. Called in the event loop."""
        self.end()
        self._worker.shutdown(wait=True)
