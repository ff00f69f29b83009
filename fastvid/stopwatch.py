"""One clock with named parts: every second of a training belongs to exactly one of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastvid.device import synchronize

PARTS = ("training", "preparation", "evaluation", "checkpoint")


class Stopwatch:
    """`with clock.part("evaluation"):` adds the block's time to that part, and pauses the enclosing part.

    seconds: wall-clock seconds by part. Both ends of a block synchronise with the device.
    """

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device, self._part, self._since = device, None, 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> str | None:
        synchronize(self._device)
        now, before = time.perf_counter(), self._part
        if before is not None:
            self.seconds[before] += now - self._since
        self._part, self._since = name, now
        return before
