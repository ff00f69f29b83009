"""A long training on real images: memory, open files and threads stay as they are.

python -m pytest tests/test_soak.py --long      an hour; without --long a minute
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
from fastvid.learner import Learner

from fastvid import checkpoint
from fastvid.config import TrainConfig
from fastvid.methods import build
from fastvid.wresnet import WideResNet

pytestmark = pytest.mark.survival("soak")

METHODS = ("student", "kd", "fitnet", "at", "vid", "kd+at", "kd+vid")


def look(process):
    """(seconds since the epoch, resident KiB, open files, threads) of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return (
        time.time(),
        int(status["VmRSS"].split()[0]),
        len(os.listdir(f"/proc/{process}/fd")),
        int(status["Threads"]),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_files_and_threads_stay_as_they_are(cifar10_root, teacher_file, tmp_path, long, figure):
    seconds, warm_up = (
        (3600, 600) if long else (30, 10)
    )  # warm-up: after the first checkpoint, which an evaluation preceded
    size = (
        ("--method", "student,vid")
        if long
        else ("--method", "student", "--student-depth", "10", "--batch-size", "20")
    )
    evaluations, every = ("20000", "1min") if long else ("200000", "5epochs")
    often = ("--evaluations", evaluations, "--checkpoint-every", every)
    command = [
        sys.executable,
        "-m",
        "fastvid",
        "train",
        *size,
        *often,
        "--data",
        str(cifar10_root),
        "--teacher",
        str(teacher_file),
        "--per-class",
        "100",
        "--epochs",
        "1000000",
        "--engine",
        "eager",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    seen = []
    with subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        end = None
        while (end is None or time.monotonic() < end) and process.poll() is None:
            time.sleep(1)
            if end:
                seen.append(look(process.pid))
            elif any((tmp_path / "out").glob("*.resume")):
                end = time.monotonic() + warm_up + seconds
        assert process.poll() is None, "it ended by itself"
        steps_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    state = checkpoint.load_state(next((tmp_path / "out").glob("*.resume")))
    when, memory, files, threads = np.array([row for row in seen if row[0] > seen[0][0] + warm_up]).T
    slope = np.polyfit((when - when[0]) / 3600, memory / 1024, 1)[0]  # MiB per hour
    quarters = [np.median(part) / 1024 for part in np.array_split(memory, 4)]
    assert len(set(threads)) == 1 and files.max() - np.median(files) <= 4, (
        "a save opens a file, and closes it"
    )  # and the folder
    assert np.median(files[: len(files) // 4]) == np.median(files[-(len(files) // 4) :])
    # what leaks grows in every quarter; malloc, finding no hole for an activation of 8 MiB, grows by that now and then
    assert slope < 1 if long else min(np.diff(quarters)) < 2, f"{slope:.2f} MiB/h, quarters {quarters}"
    assert time.monotonic() - steps_at < 60
    saving = state["checkpoint_seconds"] / (state["checkpoint_seconds"] + state["seconds"])
    assert saving < 0.02
    figure("cost of checkpoints", f"{saving:.2%} of that training, with --checkpoint-every {every}")
    figure(
        "soak",
        f"{seconds} s after a warm-up of {warm_up} s, {state['position']:,} steps: resident memory {slope:+.2f} MiB/h "
        f"({quarters[0]:.1f} to {quarters[-1]:.1f} MiB by quarters), {threads[0]:.0f} threads, {np.median(files):.0f} files throughout",
    )


def test_saving_every_method_takes_less_than_two_percent_of_the_default_interval(tmp_path, figure):
    teacher, config = WideResNet(40, 2), TrainConfig()
    learners = []
    for method in METHODS:
        network = WideResNet(16, 1)
        learners.append(
            Learner(method, network, build(method, config, network, teacher), config, torch.device("cpu"))
        )
    began = time.perf_counter()
    for learner in learners:
        checkpoint.save_state(tmp_path / learner.name, {"learner": learner.state()})
    seconds = time.perf_counter() - began
    assert seconds < 0.02 * config.checkpoint_seconds
    figure(
        "checkpoint of seven methods",
        f"{seconds / config.checkpoint_seconds:.2%} of the time of the default --checkpoint-every",
    )
