"""The committed accuracies are reproducible: the recorded command gives the first numbers of each result."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvid import checkpoint, results
from fastvid.environment import environment
from fastvid.results import Evaluation

pytestmark = pytest.mark.slow

MEASURED = Path(__file__).resolve().parents[1] / "bench" / "results"
KIND = ("device", "platform", "fastvid", "python", "torch", "numpy")


@pytest.mark.parametrize("name", ["cifar10-2pct-200"])
def test_the_recorded_command_gives_the_first_numbers_of_its_lines(
    name, cifar10_root, teacher_file, tmp_path
):
    recorded = {run.method: run for run in results.read(MEASURED / name)[0] if run.seed == 0}
    there, here = next(iter(recorded.values())).environment, environment(torch.device("cpu"))
    (command,) = re.findall(
        rf"^\| `{name}` \| `fastvid ([^`]+)`", (MEASURED / "README.md").read_text(), re.MULTILINE
    )
    # these options override those in `command`, because the last value of an option counts
    paths = ["--data", str(cifar10_root), "--teacher", str(teacher_file), "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "fastvid", *shlex.split(command), *paths],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(there["threads"])},
    ) as process:
        told = []
        for line in process.stderr:
            told.append(line)
            if re.search(r": +\d+ %  student \d", line):  # the first evaluation is made
                break
        process.send_signal(signal.SIGTERM)
        told += process.stderr
    assert process.returncode == 143, "".join(told)
    (resume,) = tmp_path.glob("*-seed0.resume")
    state, compared = checkpoint.load_state(resume), 0
    for method, run in recorded.items():
        if not state["identities"][method].items() <= run.config.items():
            continue  # the line is of an earlier version, whose default settings were others
        compared += 1
        first = Evaluation(**state["curves"][method][0])
        if all(there[name] == here[name] for name in KIND):
            assert first == run.history[0]
        else:  # other bits, but the same training
            assert first.task_loss == pytest.approx(run.history[0].task_loss, rel=0.2)
    assert compared >= 3
