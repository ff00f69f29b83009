"""Options of the benchmarks, and what becomes of their rows: JSON lines with --rows FILE, a table at the end without.

python bench/conftest.py FILE.jsonl     the table of rows that were written
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fastvid.kernels.triton_support import triton

from fastvid.environment import environment

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fastvid benchmarks")
    group.addoption(
        "--rows",
        type=Path,
        metavar="FILE",
        help="append every row to this file, one JSON object a line; no table",
    )
    group.addoption(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the feature maps and logits"
    )
    group.addoption(
        "--quick",
        action="store_true",
        help="small batch, one tap, few rounds: shows that everything runs, measures little",
    )
    group.addoption("--data", metavar="DIR", help="folder that holds cifar-10-batches-py, for the loader")
    group.addoption("--commit", help="of this code, where the folder is no checkout that could tell")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = (
        True  # pytest-benchmark's own table knows neither bytes nor the GPU's clock
    )
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def record(pytestconfig):
    """record(row): completes a row by what it was measured on, and writes it at once: a killed session loses nothing."""
    options = pytestconfig.option
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    origin = {name: facts[name] for name in ("device", "threads", "torch", "commit")}
    origin |= {
        "triton": triton and triton.__version__,
        "commit": options.commit or facts["commit"],
        "quick": options.quick,
    }

    def add(row: dict) -> None:
        pytestconfig.stash[ROWS].append(row | origin)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(row | origin) + "\n")

    return add


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[ROWS]:
        return
    terminalreporter.section("benchmarks")
    if path := config.option.rows:
        lines = [f"{len(config.stash[ROWS])} rows appended to {path}"]
    else:
        lines = table(config.stash[ROWS])
    for line in lines:
        terminalreporter.write_line(line)


def table(rows: list[dict]) -> list[str]:
    """What a person wants to see of the rows. speed-up: of an implementation over the reference launched the same way."""

    def same(row):
        return tuple(row[name] for name in ("op", "tap", "pass", "launch"))

    def middle(row):
        return (row["gpu_us"] or row["wall_us"])[0]

    first = rows[0]
    lines = [
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, triton {first['triton']}, commit {first['commit']}",
        f"{'op':19}{'tap':8}{'pass':17}{'launch':11}{'impl':18}{'us p50':>10}  {'p20':>9} {'p80':>9} {'wall us':>9}"
        f"{'GB/s':>7}{'of copy':>9}{'speed-up':>10}",
    ]
    references = {same(row): middle(row) for row in rows if row["impl"] == "reference"}
    for row in rows:
        time, low, high = row["gpu_us"] or row["wall_us"]
        line = (
            f"{row['op']:19}{row['tap']:8}{row['pass']:17}{row['launch']:11}{row['impl']:18}{time:10.1f} [{low:9.1f},{high:9.1f}]"
            f"{row['wall_us'][0]:9.1f}"
        )
        if "of_copy" in row:
            line += f"{row['gb_per_s']:7.0f}{row['of_copy']:9.1%}"
        if same(row) in references:
            line += f"{references[same(row)] / time:9.2f}x"
        if "of_torchvision" in row:
            line += f" {row['images_per_s']:,} images/s, {row['of_torchvision']:.1f}x torchvision"
        if "last_of_first" in row:
            line += f" {row['last_of_first']:.2f}x the first epochs of {row['epochs']}"
        if "load_us" in row:
            line += f" {row['load_us'][0]:.0f} us of it to read the arrays, after {row['import_us'][0]:.0f} us of imports"
        if "exposed" in row:
            line += f" {row['exposed']:+.1%} beside a static batch"
        if "losses_share" in row:
            line += f" {row['losses_us'][0]:.0f} us of it in the four vid_nll: {row['losses_share']:.1%}"
        if "speed_up" in row:
            line += f" {row['images_per_s']:,} images/s, {row['speed_up']:.2f}x the first row of its kind"
        lines.append(line)
    return lines


if __name__ == "__main__":
    print(*table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]), sep="\n")
