"""Progress of a training: a bar with images/s and ETA on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

from fastvid.plan import BatchPlan


class Progress:
    """Progress of a training over `epochs` epochs of `plan`, of which `step` steps are already done."""

    def __init__(self, title: str, plan: BatchPlan, epochs: int, step: int = 0, least_seconds: float = 10.0):
        epoch, number = divmod(step, plan.steps_per_epoch)
        total, done = epochs * plan.num_images, epoch * plan.num_images + number * plan.batch_size
        self._title, self._total, self._done, self._first = title, total, done, done
        self._start = self._last_line = time.monotonic()
        self._least_seconds, self._text = least_seconds, ""
        self._bar, self._advanced = None, False
        if sys.stderr is not None and sys.stderr.isatty():
            style = dict(unit=" images", unit_scale=True, dynamic_ncols=True, smoothing=0.05, leave=False)
            layout = "{percentage:3.0f} %|{bar}| {rate_fmt}, ETA {remaining}{postfix}"
            self._bar = tqdm(total=total, initial=done, bar_format=layout, **style)
        self._line("from the start" if done == 0 else f"resumes at {100 * done / total:.0f} %")

    def advance(self, images: int) -> None:
        """Count `images` more. The rate ignores the first step, because that step may include compilation."""
        self._done += images
        if not self._advanced:
            self._advanced, self._start, self._first = True, time.monotonic(), self._done
            if self._bar is not None:
                self._bar.reset()
                self._bar.initial = self._bar.n = self._bar.last_print_n = self._done
        elif self._bar is not None:
            self._bar.update(images)
        silent = time.monotonic() - self._last_line
        if self._bar is None and silent >= 6 * self._least_seconds:  # evaluations can be far apart
            self._state()

    def status(self, text: str) -> None:
        """Show the newest accuracies: beside the bar, or as a line at most every `least_seconds`."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif time.monotonic() - self._last_line >= self._least_seconds or self._done == self._total:
            self._state()

    def _state(self) -> None:
        parts = [f"{100 * self._done / self._total:3.0f} %"]
        if self._text:
            parts.append(self._text)
        if self._done > self._first:
            rate = (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
            remaining = tqdm.format_interval((self._total - self._done) / rate)
            parts.append(f"{rate:,.0f} images/s  ETA {remaining}")
        self._line("  ".join(parts))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        say(f"{self._title}: {text}")


def say(text: str) -> None:
    """Print one line to stderr, above the bar if there is one."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):  # a closed pipe or a full disk must not stop the training
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
