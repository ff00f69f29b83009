"""The committed accuracies can be had again: the recorded command, begun anew, gives the first numbers of its lines."""
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvid import checkpoint, results

MEASURED = Path(__file__).resolve().parents[1] / "bench" / "results"


@pytest.mark.parametrize("name", ["cifar10-2pct-200"])
def test_the_recorded_command_gives_the_first_numbers_of_its_lines(name, cifar10_root, teacher_file, tmp_path):
    recorded = {run.method: run for run in results.read(MEASURED / name)[0] if run.seed == 0}
    (command,) = re.findall(rf"^\| `{name}` \| `fastvid ([^`]+)`", (MEASURED / "README.md").read_text(), re.MULTILINE)
    here = ["--data", str(cifar10_root), "--teacher", str(teacher_file), "--out", str(tmp_path)]  # of two, the last counts
    threads = {"OMP_NUM_THREADS": str(next(iter(recorded.values())).environment["threads"])}
    with subprocess.Popen([sys.executable, "-m", "fastvid", *shlex.split(command), *here], stderr=subprocess.PIPE, text=True,
                          env=os.environ | threads) as process:
        told = []
        for line in process.stderr:
            told.append(line)
            if re.search(r": +\d+ %  student \d", line):  # the first evaluation is made
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 143, "".join(told)
    states = [checkpoint.load_state(path) for path in tmp_path.glob("*.resume")]
    assert len(states) == len(recorded)
    for path in tmp_path.glob("*.resume"):
        print(path.name, checkpoint.load_state(path)["history"])
