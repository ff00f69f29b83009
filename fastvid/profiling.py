"""Profile of a step: a table of operators and a trace, both from torch.profiler."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from fastvid.device import synchronize
from fastvid.errors import InputError
from fastvid.files import write_atomic
from fastvid.loader import TrainLoader
from fastvid.step import GroupStep

STEPS = 5
ROWS = 20  # rows of the table


def profile(step: GroupStep, batches: TrainLoader, folder: Path) -> str:
    """Profile a few steps, which do not affect the training. Returns a line that names the written files.

    Writes FOLDER/profile.txt, torch's table of operators (kernels on a GPU), and FOLDER/profile.json, a trace
    for chrome://tracing or Perfetto.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # hides a warning on machines without a GPU
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else []
    if not step.mode.captured:  # otherwise the host only launches the graph
        activities.append(ProfilerActivity.CPU)
    with step.clock.part("preparation"), step.rehearsal():
        _run(step, batches, range(2))
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            _run(step, batches, range(2, 2 + STEPS))
    kind = "cuda" if on_gpu else "cpu"
    names = ", ".join(student.name for student in step.students)
    table = profiler.key_averages().table(
        sort_by=f"self_{kind}_time_total", row_limit=ROWS, max_name_column_width=60
    )
    with tempfile.TemporaryDirectory(prefix=".profile-", dir=folder) as temporary:
        trace = Path(temporary, "profile.json")
        profiler.export_chrome_trace(str(trace))
        if not trace.is_file():  # torch reports no error on a full disk
            target = folder / "profile.json"
            raise InputError(f"{target}: cannot write the trace: make room there, or leave out --profile")
        write_atomic(folder / "profile.json", trace.read_bytes())
    text = f"{names} on {step.device}, {step.precision}: {STEPS} steps\n{table}\n"
    write_atomic(folder / "profile.txt", text.encode())
    return f"profile of {STEPS} steps: {folder / 'profile.txt'}, trace: {folder / 'profile.json'}"


def _run(step: GroupStep, batches: TrainLoader, numbers: range) -> None:
    for number in numbers:
        with record_function("loader: batch"):
            images, labels = batches.batch(number, 0)  # the first batch of an epoch is never short
        step(images, labels, 0.0)
    synchronize(step.device)
