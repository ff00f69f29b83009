"""Runs are killed and restarted repeatedly: the final weights are equal to those of an undisturbed run.

    python -m pytest -m "" tests/test_kills.py --long      300 kills instead of a dozen

Each start is a process of its own, forked from a server that has imported everything, so that it takes
milliseconds. SIGKILL comes after a random time, or where a random file of the output folder is opened,
renamed or removed, or when a file is written and has not got its name yet. Compiled steps only with --long:
each start compiles.
"""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import command, options

from fastvid import cli, results
from fastvid.config import TrainConfig
from fastvid.folder import OutputFolder

pytestmark = [pytest.mark.slow, pytest.mark.survival("kills and signals")]

SETTINGS = {
    "fp32-dali": {"precision": "fp32", "loader": "dali"},
    "bf16-dali": {"precision": "bf16", "loader": "dali"},
    "fp32-torch": {"precision": "fp32", "loader": "torch"},
    "bf16-torch": {"precision": "bf16", "loader": "torch"},
    "bf16-compile": {"precision": "bf16", "loader": "torch", "engine": "compile"},
}
EVENTS = {"time": (), "file": ("open", "os.rename", "os.remove"), "write": ("os.rename",)}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["fastvid.train", "fastvid.cli", "torch._dynamo", "nvidia.dali", "sklearn.datasets", "test_kills"]
)


def arguments(folder, teacher, name):
    return command(
        *(folder, "student", "fitnet", "vid"),
        **{"teacher": teacher, "epochs": 6, "evaluations": 3, "checkpoint_every": "1epoch"} | SETTINGS[name],
    )


def work(argv, last_event, events, log):
    """Runs the command in its own process, which is killed after `last_event` events in its output folder."""
    sys.stderr = sys.stdout = open(log, "a", buffering=1)
    torch.set_num_threads(1)  # two would wait for each other wherever something else has a core
    if events:
        left, folder = iter(range(last_event)), argv[argv.index("--out") + 1]

        def on_event(name, arguments):
            if name in events and folder in str(arguments[0]) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
    sys.argv = ["fastvid", *argv]
    cli.program()


def start(argv, log, last_event=0, events=()):
    process = SERVER.Process(target=work, args=(argv, last_event, events, str(log)))
    process.start()
    return process


def bits(folder):
    found, notes = results.read(folder)
    assert not notes
    return {run.method: (run.weights_sha256, run.history) for run in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, teacher):
    """undisturbed(name): (what a run of these settings ends with, its seconds)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            awake = SERVER.Process(target=str)  # the server imports everything before its first process
            awake.start()
            awake.join()
            began = time.monotonic()
            process = start(arguments(folder / "out", teacher, name), folder / "log")
            process.join(120)
            assert process.exitcode == 0, (folder / "log").read_text()
            made[name] = bits(folder / "out"), time.monotonic() - began
        return made[name]

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    name, tmp_path, teacher, undisturbed, long, figure
):
    if "dali" in name:
        pytest.importorskip("nvidia.dali")
    if "compile" in name and not long:
        pytest.skip("minutes: --long")
    expected, seconds = undisturbed(name)
    kills, torn, runs, choose = 0, 0, 0, random.Random(name)
    while kills < (4 if not long else 10 if "compile" in name else 75):
        runs += 1
        folder, log = tmp_path / f"{runs}", tmp_path / f"{runs}.log"
        ended = False
        while not ended:
            kind = choose.choice(list(EVENTS))
            last_event = choose.randrange(20 if kind == "write" else 120)
            process = start(arguments(folder, teacher, name), log, last_event, EVENTS[kind])
            process.join(choose.uniform(0, seconds) if kind == "time" else 120)
            process.kill()
            process.join()
            ended = process.exitcode == 0
            kills += not ended
            torn += any(folder.glob(".*.partial"))
            assert ended or process.exitcode == -signal.SIGKILL, log.read_text()
        assert bits(folder) == expected, log.read_text()
        visible = {path.suffix for path in folder.iterdir() if not path.name.startswith(".")}
        assert visible == {".safetensors", ".jsonl"}
    figure(f"SIGKILL, {name}", f"{runs} runs, {kills} kills, {torn} of them in a write")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_signals_at_random_moments_end_within_five_seconds_with_one_line_and_lose_nothing(
    number, tmp_path, teacher, undisturbed, long, figure
):
    expected, seconds = undisturbed("bf16-torch")
    slowest, count, runs, choose = 0.0, 0, 0, random.Random(number)
    while count < (100 if long else 4):
        folder, log = tmp_path / str(runs), tmp_path / f"{runs}.log"
        ended = False
        while not ended:
            process = start(arguments(folder, teacher, "bf16-torch"), log)
            process.join(choose.uniform(0.3, 1) * seconds)
            asked = time.monotonic()
            for _ in range(choose.choice((1, 1, 2, 3))):  # a second one ends the process at once
                if process.exitcode is None:
                    os.kill(process.pid, number)
                time.sleep(choose.uniform(0, choose.choice((0.02, 0.2))))
            process.join(60)
            ended = process.exitcode == 0
            if not ended:
                count, slowest = count + 1, max(slowest, time.monotonic() - asked)
                *_, line = log.read_text().splitlines()
                assert process.exitcode == 128 + number, log.read_text()
                assert re.match("fastvid: (stopped after|interrupted)", line), log.read_text()
            assert "Traceback" not in log.read_text()
        runs += 1
        assert bits(folder) == expected, log.read_text()
    assert slowest < 5
    figure(number.name, f"{runs} runs, {count} stops, the slowest end after {slowest:.1f} s")


def test_a_second_process_that_wants_the_same_group_ends_in_one_line(tmp_path, figure):
    config = TrainConfig(dataset="digits", out=str(tmp_path / "out"))
    with OutputFolder(config.out).claim(config):
        began = time.monotonic()
        argv = ["train", *options(dataset="digits", out=config.out)]
        second = subprocess.run([sys.executable, "-m", "fastvid", *argv], capture_output=True, text=True)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert (
        f"another process trains this group in {config.out}: wait for it, or give another --out"
        in second.stderr
    )
    figure("second process", f"ends after {time.monotonic() - began:.1f} s")
