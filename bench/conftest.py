"""Options and output of the benchmarks: rows as JSON lines with --rows FILE, else a table at the end.

python bench/conftest.py FILE.jsonl     prints the table of the rows in a file
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
    meaning = "append every row to this file as one line of JSON, and print no table"
    group.addoption("--rows", type=Path, metavar="FILE", help=meaning)
    meaning = "type of the feature maps and logits"
    group.addoption("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help=meaning)
    meaning = "small batch, one tap, few rounds: shows that everything runs, but measures little"
    group.addoption("--quick", action="store_true", help=meaning)
    group.addoption("--data", metavar="DIR", help="folder that holds cifar-10-batches-py")
    group.addoption("--commit", help="commit of this code, for a folder that is not a git checkout")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # the table of pytest-benchmark has neither bytes nor GPU times
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def record(pytestconfig):
    """record(row): adds device, versions and commit to a row, and writes the row immediately."""
    options = pytestconfig.option
    facts = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    origin = {name: facts[name] for name in ("device", "threads", "torch", "commit")}
    origin |= {"commit": options.commit or facts["commit"], "quick": options.quick}
    origin |= {"triton": triton and triton.__version__}

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
    """The rows as lines of text. The speed-up is that over the reference, launched in the same way."""

    def same(row):
        return tuple(row[name] for name in ("op", "tap", "pass", "launch"))

    def middle(row):
        return (row["gpu_us"] or row["wall_us"])[0]

    first = rows[0]
    versions = f"torch {first['torch']}, triton {first['triton']}, commit {first['commit']}"
    lines = [
        f"{first['device']}, {first['threads']} threads, {versions}",
        f"{'op':19}{'tap':8}{'pass':17}{'launch':11}{'impl':18}{'us p50':>10}  {'p20':>9} {'p80':>9} "
        f"{'wall us':>9}{'GB/s':>7}{'of copy':>9}{'speed-up':>10}",
    ]
    references = {same(row): middle(row) for row in rows if row["impl"] == "reference"}
    for row in rows:
        time, low, high = row["gpu_us"] or row["wall_us"]
        line = f"{row['op']:19}{row['tap']:8}{row['pass']:17}{row['launch']:11}{row['impl']:18}"
        line += f"{time:10.1f} [{low:9.1f},{high:9.1f}]{row['wall_us'][0]:9.1f}"
        if "of_copy" in row:
            line += f"{row['gb_per_s']:7.0f}{row['of_copy']:9.1%}"
        if same(row) in references:
            line += f"{references[same(row)] / time:9.2f}x"
        if "of_torchvision" in row:
            line += f" {row['images_per_s']:,} images/s, {row['of_torchvision']:.1f}x torchvision"
        if "last_of_first" in row:
            line += f" {row['last_of_first']:.2f}x the first epochs of {row['epochs']}"
        if "load_us" in row:
            line += f" of which {row['load_us'][0]:.0f} us to read the arrays"
            line += f", after {row['import_us'][0]:.0f} us of imports"
        if "exposed" in row:
            line += f" {row['exposed']:+.1%} over a static batch"
        if "losses_share" in row:
            line += f" of which {row['losses_us'][0]:.0f} us in the four vid_nll: {row['losses_share']:.1%}"
        if "speed_up" in row:
            line += (
                f" {row['images_per_s']:,} images/s, {row['speed_up']:.2f}x the first row of this comparison"
            )
        lines.append(line)
    return lines


if __name__ == "__main__":
    print(*table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]), sep="\n")
