"""Where a step's time goes: a trace for a viewer, and a summary for a reader."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from fastvid.device import synchronize
from fastvid.engine import GroupStep
from fastvid.errors import InputError
from fastvid.files import write_atomic
from fastvid.loader import TrainLoader

STEPS = 5
ROWS = 12  # operators that the summary lists


def profile(step: GroupStep, loader: TrainLoader, epoch: int, folder: Path | None) -> str:
    """Profile a few steps on batches of `epoch`; they leave no trace in the training. Returns the line that names the largest cost.

    Writes FOLDER/profile.json, a trace for chrome://tracing or Perfetto, and FOLDER/profile.txt: time per part of a step and per operator,
    which on a GPU is a kernel. A part is what the host, or a GPU on its behalf, does for it; a captured step has none.
    """
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # or the profiler tells that it starts, stops, and finds no GPU
    on_gpu = step.device.type == "cuda"
    batches = (
        batch
        for number in range(epoch, epoch + 10**6)
        for batch in loader.epoch(number)
        if len(batch.labels) == loader.plan.size(0)
    )  # a short one would be compiled or captured here
    with step.rehearsal():
        step.begin_epoch(0.0)
        _run(step, batches, 2)
        activities = [ProfilerActivity.CUDA] if on_gpu else []
        if not step.mode.captured:  # whose host does nothing but launch it
            activities.append(ProfilerActivity.CPU)
        with torch.profiler.profile(
            activities=activities, acc_events=True
        ) as profiler:  # else torch 2.11 warns that it keeps one cycle
            _run(step, batches, STEPS)
    averages = profiler.key_averages()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in averages if event.device_type == kind]
    of_a_part = re.compile(
        f"({'|'.join(re.escape(who) for who in ('loader', 'teacher', *(one.name for one in step.learners)))}): "
    )
    parts = [
        (event.key, event.device_time_total if on_gpu else event.cpu_time_total)
        for event in averages
        if event.device_type == DeviceType.CPU and of_a_part.match(event.key)
    ]
    costs = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in events
        if not of_a_part.match(event.key)
    ]
    costs = sorted((cost for cost in costs if cost[1]), key=lambda cost: -cost[1])
    if not costs:
        return "the profiler saw nothing: this process may not read the GPU's counters"
    total = sum(time for _, time, _ in costs) if on_gpu else sum(time for _, time in parts)
    what, noun = ("kernel", "kernels") if on_gpu else ("operator", "operators")
    names = ", ".join(learner.name for learner in step.learners)
    lines = [
        f"{names} on {step.device}, {step.precision}: {total / STEPS / 1000:.2f} ms and "
        f"{sum(count for *_, count in costs) / STEPS:.0f} {noun} per step (mean of {STEPS} steps)",
        "",
    ]
    if parts:
        lines += _table(
            "part", [(name, time, STEPS) for name, time in sorted(parts, key=lambda part: -part[1])], total
        ) + [""]
    lines += _table(what, costs[:ROWS], total)
    name, time, count = costs[0]
    largest = f"largest cost of a step: {name}, {time / total:.0%} of {total / STEPS / 1000:.2f} ms in {count / STEPS:.0f} calls"
    if folder:
        with tempfile.TemporaryDirectory(prefix=".profile-", dir=folder) as temporary:
            trace = Path(temporary, "profile.json")
            profiler.export_chrome_trace(str(trace))
            if not trace.is_file():  # on a full disk it says nothing
                raise InputError(
                    f"{folder / 'profile.json'}: cannot write the trace: make room there, or leave out --profile"
                )
            write_atomic(folder / "profile.json", trace.read_bytes())
        write_atomic(folder / "profile.txt", ("\n".join([*lines, "", largest]) + "\n").encode())
        largest += f" (more in {folder / 'profile.txt'}, trace in {folder / 'profile.json'})"
    return largest


def _run(step: GroupStep, batches: Iterable, count: int) -> None:
    for _ in range(count):
        with record_function("loader: batch"):
            images, labels = next(batches)
        step(images, labels, 0.0)
    synchronize(step.device)


def _table(title: str, rows: list[tuple[str, float, int]], total: float) -> list[str]:
    """rows: (name, microseconds, calls), of all steps together."""
    lines = [f"{title:60}{'ms per step':>14}{'share':>8}{'calls':>8}"]
    return lines + [
        f"{name[:59]:60}{time / STEPS / 1000:14.3f}{time / total:8.1%}{count / STEPS:8.0f}"
        for name, time, count in rows
    ]
