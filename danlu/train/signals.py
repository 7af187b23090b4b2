"""Asking a run to stop: a signal sets a flag, and whoever works looks at it between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
    """While it is entered, SIGTERM, SIGINT and SIGHUP ask for a stop and do nothing else.

    A signal that is ignored on entry stays ignored, as nohup and background jobs of a shell want it. Whoever sends a
    second SIGINT means it: that one raises KeyboardInterrupt. Outside the main thread, where Python takes no signals,
    it never asks.

    Attributes:
        number: the signal that asked, or None.
        at_once: whether a signal raises KeyboardInterrupt already the first time, because nothing needs saving now.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self.at_once = False
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to stop after this step."""
        return self.number is not None

    def ask(self, number: signal.Signals) -> None:
        """Ask for a stop as this signal would."""
        self.number = number

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._handlers = {number: signal.signal(number, self._hear) for number in heard}
            self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handlers:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        insists = number == signal.SIGINT and self.asked
        self.number = signal.Signals(number)
        if insists or self.at_once:
            raise KeyboardInterrupt


@contextmanager
def even_if_deaf(stopping: Stopping, seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Inside, a stop that may be at once comes to pass also while native code keeps Python from hearing signals.

    Learning merges from much text is one call of minutes. The system writes the number of every signal to a pipe all
    the same, where a thread reads it.

    Args:
        seconds: given to the main thread to end by itself, in order.
        end: called in that thread when they are over, and nothing has been heard; it is to end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    over = threading.Event()

    def listen() -> None:
        while number := os.read(read, 1):
            asked = number[0] in STOP_SIGNALS and stopping.at_once
            if asked and not over.wait(seconds) and stopping.at_once:
                end()
        os.close(read)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(write)
