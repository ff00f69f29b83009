"""What fastvid needs, and that it fetches nothing by itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.survival("supply chain")

ROOT = Path(__file__).resolve().parents[1]

OFFLINE = """
import sys

def on_event(name, arguments):
    if name in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        print(name, arguments)
        sys.stdout.flush()
        import os
        os._exit(9)

sys.addaudithook(on_event)
from fastvid import cli
code = cli.main(sys.argv[1:])
sys.exit(code)
"""


def test_every_dependency_and_every_extra_says_what_it_is_for(figure):
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[\n(.*?)^\]$", text, re.DOTALL | re.MULTILINE)[1].splitlines()
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)[
        1
    ].splitlines()
    assert len(needed) <= 6
    said = [line for line in needed + extras if line.strip()]
    assert [line for line in said if not re.search(r"[,\]]\s+# \S", line)] == []
    figure(
        "dependencies",
        f"{len(needed)} needed, {len(said) - len(needed)} sets of optional ones, each with its reason",
    )


def test_nothing_is_fetched_unless_asked_for(tmp_path, figure):
    train = [
        "train",
        "--dataset",
        "digits",
        "--per-class",
        "5",
        "--batch-size",
        "50",
        "--epochs",
        "1",
        "--student-depth",
        "10",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    commands = (
        (train, 0),
        (["report", str(tmp_path / "out")], 0),
        (["doctor"], 0),
        (["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "b")], 2),
    )
    for command, code in commands:
        ran = subprocess.run(
            [sys.executable, "-c", OFFLINE, *command], capture_output=True, text=True, check=False
        )
        assert ran.returncode == code, (ran.stdout[-300:], ran.stderr[-300:])
    figure("connections", f"0 opened by {len(commands)} commands")
