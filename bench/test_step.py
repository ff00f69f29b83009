"""Speed of a training step: plain step, each optimisation, scaling of the cost. WRN-40-2 teaches WRN-16-1.

    python -m pytest bench/test_step.py --data DIR [--rows FILE.jsonl] [--quick]
    python bench/plot_step.py FILE.jsonl PICTURE.png     plots how the cost scales

DIR holds cifar-10-batches-py. The plain step is that of common distillation code: fp32, NCHW, eager,
torchvision's DataLoader with two workers (on a GPU one static batch), a batch and a teacher forward for every
method (even for the plain student, until LADDER removes this), the equations in plain PyTorch, loss.item().
Each variant runs in its own process (step.py). The processes take turns in each round, so that other load on
the machine slows all of them.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from clock import DEVICE, ON_GPU, quantiles
from step import Step

from fastvid.loader import dali_is_installed

FIVE = ("student", "kd", "fitnet", "at", "vid")
EAGER, COMPILED, CAPTURED, WHOLE = (False, False), (True, False), (False, True), (True, True)
LOADER = "dali" if dali_is_installed() else "torch"
PLAIN = {"loader": "static"} if ON_GPU else {}  # on a GPU, the batch is already in GPU memory
LADDER = {  # from the plain step to the step of fastvid: every rung keeps the changes of the rungs before
    "plain": PLAIN,
    "no idle teacher": {"idle_teacher": False},
    "our loader": {"loader": LOADER},
    "channels-last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "shared teacher": {"shared_teacher": True},
    "folded teacher": {"frozen_teacher": True},
    "fused losses": {"fused_losses": True},
    "our step": {"engine": EAGER},
    "tuned": {"tuned": True},
}
OURS = {name: value for change in LADDER.values() for name, value in change.items()}  # all rungs together
LADDER["compile"] = {"engine": COMPILED}
if ON_GPU:
    LADDER |= {"graph": {"engine": CAPTURED}, "compile and graph": {"engine": WHOLE}}


class Side:
    """A process of step.py, which takes steps when `microseconds` is called."""

    def __init__(self, spec: Step):
        self.spec = spec
        settings = {name: value for name, value in dataclasses.asdict(spec).items() if value is not None}
        command = [sys.executable, str(Path(__file__).with_name("step.py")), json.dumps(settings)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Side:
        assert self._process.stdout.readline() == "ready\n", f"{self.spec} did not start"
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def microseconds(self, steps: int) -> float:
        """Microseconds per step, over this number of steps."""
        print(steps, file=self._process.stdin, flush=True)
        return 1e6 * float(self._process.stdout.readline()) / steps


@pytest.fixture
def compare(pytestconfig, record):
    """compare(subject, {name: Step}): measures the steps in turns and records a row for each.

    The speed-up of a row compares it with the first step.
    """
    if not pytestconfig.option.data:
        pytest.skip("no CIFAR-10: give the folder of cifar-10-batches-py as --data")
    quick = pytestconfig.option.quick
    rounds = 1 if quick else 5

    def measure(subject: str, specs: dict[str, Step], **more) -> dict[str, float]:
        most = max(len(spec.methods) for spec in specs.values())
        steps = 1 if quick else 200 // most if ON_GPU else 3
        times: dict[str, list[float]] = {side: [] for side in specs}
        with ExitStack() as stack:
            sides = {}
            for name, spec in specs.items():  # each process is ready before the next process starts
                spec = dataclasses.replace(spec, data=str(pytestconfig.option.data))
                sides[name] = stack.enter_context(Side(spec))
            for number in range(rounds + 1):
                for name, side in sides.items():
                    time.sleep(0.3)  # lets the previous process finish its prefetching
                    microseconds = side.microseconds(steps)
                    if number:  # the first round is the warm-up
                        times[name].append(microseconds)
        middle = {name: quantiles(values) for name, values in times.items()}
        first = next(iter(middle.values()))
        for name, spec in specs.items():
            images, wall_us = spec.batch * len(spec.methods), middle[name]
            row = {"op": "step", "tap": subject, "shape": f"{spec.batch}x3x32x32", "dtype": spec.precision}
            row |= {"impl": name, "pass": "step", "launch": "host", "on": DEVICE.type}
            row |= {"gpu_us": None, "wall_us": wall_us, "images_per_s": round(1e6 * images / wall_us[0])}
            row |= {"speed_up": round(first[0] / wall_us[0], 3), "methods": spec.methods}
            record(row | {"student": spec.student} | more)
        return {name: values[0] for name, values in middle.items()}

    return measure


@pytest.mark.parametrize("subject, methods", [("vid", ("vid",)), ("five methods", FIVE)])
def test_each_measure_from_the_plain_step_to_ours(compare, subject, methods):
    taken, specs = {}, {}
    for rung, change in LADDER.items():
        taken |= change
        specs[rung] = Step(methods=methods, **taken)
    compare(subject, specs)


def test_students_together_beside_one_after_another(compare):
    engine = {"engine": WHOLE if ON_GPU else EAGER}
    distilled = FIVE[1:]
    alone = {name: Step(methods=(name,), **(OURS | engine)) for name in FIVE}
    middle = compare("together", {"together": Step(methods=distilled, **(OURS | engine))} | alone)
    assert middle["together"] < sum(middle[name] for name in distilled)


SCALES = {
    "batch": {size: {"batch": size} for size in (32, 64, 128, 256, 512)},
    "students": {count: {"methods": tuple(reversed(FIVE))[:count]} for count in range(1, 6)},
    "width": {width: {"student": (16, width)} for width in (1, 2, 4)},
}


@pytest.mark.parametrize("scale", SCALES)
def test_cost_of_a_step_against(compare, scale, pytestconfig):
    changes = list(SCALES[scale].items())[: 2 if pytestconfig.option.quick else None]
    settings = OURS | {"engine": WHOLE if ON_GPU else EAGER}
    specs = {str(value): Step(**(settings | change)) for value, change in changes}
    compare(f"scale: {scale}", specs, scale=scale)
