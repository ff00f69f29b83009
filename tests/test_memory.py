"""A batch that does not fit into memory, for real: the command in a process that may take 400 MiB more than a small batch needs.

Each map of a WRN-10-4 on 1400 digits is 350 MiB in fp32, those before it are a quarter of that. So it is torch that asks for too much,
and not oneDNN, which answers less well.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from fastvid.engine import GroupStep

from fastvid import cli, results

TRAIN = [
    "train",
    "--device",
    "cpu",
    "--loader",
    "torch",
    "--dataset",
    "digits",
    "--method",
    "student",
    "--precision",
    "fp32",
    "--student-depth",
    "10",
    "--student-width",
    "4",
    "--epochs",
    "2",
    "--evaluations",
    "1",
    "--batch-size",
    "1400",
]
SMALL = ["--per-class", "2", "--validation-per-class", "1", "--batch-size", "10"]

LIMITED = """
import contextlib, io, resource, sys
from pathlib import Path
from fastvid import cli
small, large = (text.split() for text in sys.argv[1:])
with contextlib.redirect_stderr(io.StringIO()):
    assert cli.main(small) == 0  # all that a training loads is loaded now
(size,) = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:")]
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 400 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.exit(cli.main(large))
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output folder with a finished run of this batch size and an interrupted one, made in no time: their steps do nothing."""
    monkeypatch.setattr(GroupStep, "__call__", lambda self, *batch: None)
    assert cli.main([*TRAIN, "--seed", "1", "--out", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(GroupStep, "__call__", lambda self, *batch: signal.raise_signal(signal.SIGINT))
    assert cli.main([*TRAIN, "--out", str(tmp_path / "out")]) == 130
    return tmp_path / "out"


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is measured in /proc")
def test_a_batch_that_does_not_fit_ends_in_one_line_and_leaves_results_and_resume_state_as_they_were(
    out, tmp_path
):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    commands = (
        " ".join([*TRAIN, *SMALL, "--out", str(tmp_path / "other")]),
        " ".join([*TRAIN, "--out", str(out)]),
    )
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, *commands],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # a thread that came later would take address space of its own
    *lines, last = ran.stderr.splitlines()
    peak = re.fullmatch(
        rf"fastvid: error: out of memory: a batch of 1400 in fp32 for student does not fit on cpu \(peak ([\d,]+) MiB\): "
        rf"set a smaller --batch-size or train fewer methods at once; what was saved in {out} is untouched",
        last,
    )
    assert ran.returncode == 2 and peak and 100 < int(peak[1].replace(",", "")) < 4096, ran.stderr
    assert (
        all(line.startswith("student ") for line in lines)
        and "going on at 50 %" in lines[-1]
        and not ran.stdout
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {"student-full-seed0.resume", "student-full-seed1.safetensors"} <= before.keys() and len(
        results.read(out)[0]
    ) == 1
