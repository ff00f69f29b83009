"""Signals: after the first signal, training finishes its step and saves; a second signal ends the process.

SIGTERM and SIGHUP are treated like SIGINT. Outside of training a signal raises KeyboardInterrupt immediately.
This loses nothing: results, weights and resume states are written atomically.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_STDERR = 2


class Terminated(KeyboardInterrupt):
    """KeyboardInterrupt raised by a signal other than SIGINT."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class Stop:
    """True after a signal has asked the training to stop. number: the number of that signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yield a Stop that the first signal sets; the second signal raises KeyboardInterrupt.

    Signals that are already ignored (nohup) stay ignored. Outside the main thread the Stop is never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, _) -> None:
        if stop:
            _raise(number)
        stop.number = number
        with contextlib.suppress(OSError):  # print() is not safe in a signal handler
            os.write(
                _STDERR, b"\nfastvid: stopping after this step; a second signal ends the process at once\n"
            )

    heard = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_on_signal() -> None:
    """Let SIGTERM and SIGHUP raise Terminated, unless the signal is ignored (nohup)."""
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS[1:]:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: _raise(number))


def ignore() -> None:
    """Ignore further signals: the process is exiting."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)
