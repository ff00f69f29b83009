"""The smallest training with all parts: 40 digits, 3 steps per epoch, short last batch, 10 test images."""

import itertools
import signal
from contextlib import contextmanager

import pytest

from fastvid.step import GroupStep

STEPS = 3  # per epoch
TINY = {
    "device": "cpu",
    "dataset": "digits",
    "per_class": 5,
    "validation_per_class": 1,
    "batch_size": 16,
    "epochs": 2,
    "evaluations": 1,
    "teacher_depth": 10,
    "teacher_width": 2,
    "student_depth": 10,
    "precision": "fp32",
}


def command(out, *methods, **settings):
    """The arguments of `fastvid train` for these methods; settings replace or add to those of TINY."""
    settings = TINY | {"method": ",".join(methods or ["student"]), "out": out} | settings
    return ["train", *options(**settings)]


def options(**settings):
    """options(batch_size=4) -> ["--batch-size", "4"]."""
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@contextmanager
def after_each_step(action):
    """Inside, action(group_step, images, labels) is called after each step."""
    real = GroupStep.__call__

    def step(self, images, labels, learning_rate):
        real(self, images, labels, learning_rate)
        action(self, images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupStep, "__call__", step)
        yield


def signal_after(step, number=signal.SIGINT, times=1):
    """Inside this context, the signal arrives in this step, counted from 1, so many times."""
    count = itertools.count(1)

    def act(*_):
        if next(count) == step:
            for _ in range(times):
                signal.raise_signal(number)

    return after_each_step(act)
