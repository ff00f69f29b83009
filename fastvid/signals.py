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
        self.number = signal.SIGINT
        self._event = threading.Event()

    def set(self, number: int | None = None) -> None:
        if number is not None:
            self.number = signal.Signals(number)
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()


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
        if among_ranks and not stop:
            end.start()
        stop.set(number)
        if _at_once:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, on_signal) for number in NUMBERS}
    try:
        yield stop
    finally:
        end.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_on_sigterm() -> None:
    """SIGTERM is to SIGINT's KeyboardInterrupt what 143 is to 130. Outside the main thread: nothing."""
    def on_signal(*_) -> None:
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_signal)


def _end_now() -> None:
    print("fastvid: the other ranks did not answer: start the same command again, it goes on from the last checkpoint", file=sys.stderr)
    os._exit(1)
