"""SIGINT and SIGTERM: a step is finished and saved first; what loses nothing is left at once.

Outside of training a signal raises KeyboardInterrupt where the process is; every file that matters is written whole or not at all.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)
GRACE = 20  # seconds from a signal to the end of a rank that cannot answer it; torchrun kills after 30


class Terminated(KeyboardInterrupt):
    """SIGTERM, where SIGINT would raise KeyboardInterrupt."""


class Stop:
    """Whether somebody has asked to end, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None  # no lock: a second signal may come while the first is handled

    def __bool__(self) -> bool:
        return self.number is not None


_at_once = False


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Inside, also while training, a signal raises KeyboardInterrupt: for minutes of work that changes nothing."""
    global _at_once
    before, _at_once = _at_once, True
    try:
        yield
    finally:
        _at_once = before


@contextmanager
def stop_on_signal(among_ranks: bool) -> Iterator[Stop]:
    """A Stop that SIGINT and SIGTERM set; the handlers do nothing else, so no save is torn. Outside the main thread: never set.

    Among several ranks one that hangs on a lost peer never comes to look. After GRACE seconds it ends all the same.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    end = threading.Timer(GRACE, _end_now)
    end.daemon = True

    def on_signal(number: int, _) -> None:
        first, stop.number = not stop, number
        if among_ranks and first:
            end.start()
        if _at_once:
            _leave(number)

    previous = {number: signal.signal(number, on_signal) for number in NUMBERS}
    try:
        yield stop
    finally:
        end.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_on_sigterm() -> None:
    """SIGTERM is to SIGINT's KeyboardInterrupt what 143 is to 130. Outside the main thread: nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: _leave(number))


def ignore() -> None:
    """From now on, for a process that ends anyway."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _leave(number: int) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _end_now() -> None:
    print(
        "fastvid: the other ranks did not answer: start the same command again, it goes on from the last checkpoint",
        file=sys.stderr,
    )
    os._exit(1)
