"""A long training on real images: memory, open files and threads stay as they are.

python -m pytest -m "" tests/test_soak.py --long      an hour; without --long half a minute
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import options

from fastvid import checkpoint
from fastvid.config import TrainConfig
from fastvid.student import new_student
from fastvid.wresnet import WideResNet

pytestmark = [pytest.mark.slow, pytest.mark.survival("soak")]

METHODS = ("student", "kd", "fitnet", "at", "vid", "kd+at", "kd+vid")


def look(process):
    """(seconds since the epoch, resident KiB, open files, threads) of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{process}/fd"))
    return time.time(), int(status["VmRSS"].split()[0]), files, int(status["Threads"])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_files_and_threads_stay_as_they_are(cifar10_root, teacher_file, tmp_path, long, figure):
    seconds, warm_up = (3600, 600) if long else (30, 10)  # the warm-up begins after the first save
    every = "1min" if long else "5epochs"
    size = {"method": "student", "student_depth": 10, "batch_size": 20, "evaluations": 200_000}
    if long:
        size = {"method": "student,vid", "evaluations": 20_000}
    settings = size | {"data": cifar10_root, "teacher": teacher_file, "per_class": 100, "epochs": 1_000_000}
    settings |= {"engine": "eager", "device": "cpu", "checkpoint_every": every, "out": tmp_path / "out"}
    command = [sys.executable, "-m", "fastvid", "train", *options(**settings)]
    seen, end = [], None
    resume = tmp_path / "out" / "100-seed0.resume"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        while (end is None or time.monotonic() < end) and process.poll() is None:
            time.sleep(1)
            if end:
                seen.append(look(process.pid))
            elif resume.exists():
                end = time.monotonic() + warm_up + seconds
        assert process.poll() is None, "it ended by itself"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    when, memory, files, threads = np.array([row for row in seen if row[0] > seen[0][0] + warm_up]).T
    slope = np.polyfit((when - when[0]) / 3600, memory / 1024, 1)[0]  # MiB per hour
    quarters = [np.median(part) / 1024 for part in np.array_split(memory, 4)]
    assert len(set(threads)) == 1
    assert files.max() - np.median(files) <= 4, "a save opens a file and the folder, and closes them"
    assert np.median(files[: len(files) // 4]) == np.median(files[-(len(files) // 4) :])
    # A leak grows in every quarter. malloc grows only when there is no free block for an activation of 8 MiB.
    assert slope < 1 if long else min(np.diff(quarters)) < 2, f"{slope:.2f} MiB/h, quarters {quarters}"
    state = checkpoint.load_state(resume)
    saving = state["seconds"]["checkpoint"] / (state["seconds"]["checkpoint"] + state["seconds"]["training"])
    assert saving < 0.02
    figure("cost of checkpoints", f"{saving:.2%} of that training, with --checkpoint-every {every}")
    figure(
        "soak",
        f"{seconds} s after a warm-up of {warm_up} s, {state['step']:,} steps: "
        f"resident memory {slope:+.2f} MiB/h "
        f"({quarters[0]:.1f} to {quarters[-1]:.1f} MiB by quarters), {threads[0]:.0f} threads, "
        f"{np.median(files):.0f} files throughout",
    )


def test_saving_every_method_takes_less_than_two_percent_of_the_default_interval(tmp_path, figure):
    teacher, interval = WideResNet(40, 2), TrainConfig().checkpoint_seconds
    students = {
        name: new_student(name, TrainConfig(method=(name,)).resolved(), 10, teacher, torch.device("cpu"))
        for name in METHODS
    }
    began = time.perf_counter()
    state = {"students": {name: student.state() for name, student in students.items()}}
    checkpoint.save_state(tmp_path / "group.resume", state)
    seconds = time.perf_counter() - began
    assert seconds < 0.02 * interval
    figure(
        "checkpoint of seven methods",
        f"{seconds / interval:.2%} of the time of the default --checkpoint-every",
    )
