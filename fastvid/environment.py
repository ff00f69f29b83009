"""The environment of a run, which results record beside the settings: versions, commit, device, threads."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import torch

import fastvid


@cache
def environment(device: torch.device) -> dict:
    """The entries that every result records."""
    on_gpu = device.type == "cuda"
    return {
        "fastvid": fastvid.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" if files have changed; None outside a checkout."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    settings = dict(cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    try:
        return subprocess.run(git, **settings).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
