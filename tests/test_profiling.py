"""`fastvid train --profile`: what it writes and says, and that the training does not notice."""

import itertools
import json
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from fastvid.engine import GroupStep

from fastvid import checkpoint, cli, results
from fastvid.profiling import STEPS

REHEARSED = 2 + STEPS  # steps before the training
TINY = [
    "train",
    "--device",
    "cpu",
    "--dataset",
    "digits",
    "--per-class",
    "2",
    "--validation-per-class",
    "1",
    "--batch-size",
    "4",
    "--epochs",
    "2",
    "--evaluations",
    "2",
    "--student-depth",
    "10",
    "--teacher-depth",
    "10",
    "--teacher-width",
    "2",
]  # 4 + 4 + 2 images
PARTS = [
    "loader: batch",
    "teacher: forward",
    *(f"{who}: {what}" for who in ("student", "vid") for what in ("forward", "backward", "update")),
]


@pytest.fixture
def command(tmp_path, teacher):
    """command("a", "--seed", "1"): `fastvid train ... --seed 1`, into tmp_path/a; returns its exit code and its results."""

    def run(out, *options):
        code = cli.main(
            [*TINY, "--method", "student,vid", "--teacher", teacher, "--out", str(tmp_path / out), *options]
        )
        return code, results.read(tmp_path / out)[0]

    return run


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, teacher):
    """The output folder of a command, and the lines that it said."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    options = [
        "--method",
        "student,vid",
        "--teacher",
        teacher,
        "--profile",
        "--batch-size",
        "10",
        "--epochs",
        "1",
        "--out",
        str(out),
    ]
    ran = subprocess.run([sys.executable, "-m", "fastvid", *TINY, *options], capture_output=True, text=True)
    assert ran.returncode == 0 and not ran.stdout, ran.stderr
    return out, ran.stderr.splitlines()


def table(out, title):
    """Rows of a table of profile.txt: (name, milliseconds per step, share in percent, calls per step)."""
    text = (out / "profile.txt").read_text()
    rows = re.search(rf"^{title} +ms per step +share +calls\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)[
        1
    ].splitlines()
    found = [re.fullmatch(r"(\S.*\S) +([\d.]+) +([\d.]+)% +(\d+)", row).groups() for row in rows]
    return [(name, float(time), float(share), int(calls)) for name, time, share, calls in found]


def largest_cost(out):
    """(operator, share in percent, milliseconds of a step, calls) of the last line of profile.txt."""
    line = (out / "profile.txt").read_text().splitlines()[-1]
    name, *numbers = re.fullmatch(
        r"largest cost of a step: (.+), (\d+)% of ([\d.]+) ms in (\d+) calls", line
    ).groups()
    return name, *map(float, numbers)


def self_times(events):
    """Microseconds by name, without those of events inside: the trace, added up independently."""
    times, open_events = defaultdict(float), []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while open_events and event["ts"] >= open_events[-1]["ts"] + open_events[-1]["dur"]:
            open_events.pop()
        if open_events:
            times[open_events[-1]["name"]] -= event["dur"]
        times[event["name"]] += event["dur"]
        open_events.append(event)
    return times


def test_the_largest_cost_is_named_in_one_line_and_nothing_else_is_said(profiled):
    out, lines = profiled
    line = (out / "profile.txt").read_text().splitlines()[-1]
    assert lines.count(f"{line} (more in {out / 'profile.txt'}, trace in {out / 'profile.json'})") == 1
    assert all(re.match(r"(student|vid|student, vid) \| |largest cost", line) for line in lines)


def test_the_trace_is_json_of_a_chrome_trace_with_every_part_of_every_profiled_step(profiled):
    out, _ = profiled
    events = [
        event for event in json.loads((out / "profile.json").read_text())["traceEvents"] if event["ph"] == "X"
    ]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 and event["name"] for event in events)
    counted = Counter(event["name"] for event in events)
    assert {part: counted[part] for part in PARTS} == dict.fromkeys(PARTS, STEPS)


def test_the_largest_cost_is_the_first_operator_of_the_table_and_the_longest_of_the_trace(profiled):
    out, _ = profiled
    name, share, _, calls = largest_cost(out)
    first, *others = table(out, "operator")
    assert first[0] == name and round(first[2]) == pytest.approx(share, abs=1) and first[3] == calls
    assert [row[1] for row in (first, *others)] == sorted((row[1] for row in (first, *others)), reverse=True)
    events = [
        event
        for event in json.loads((out / "profile.json").read_text())["traceEvents"]
        if event.get("cat") == "cpu_op"
    ]
    times = self_times(events)
    assert max(times, key=times.get) == name
    assert times[name] / STEPS / 1000 == pytest.approx(
        first[1], rel=0.01
    )  # the trace has nanoseconds, the table microseconds


def test_the_parts_of_a_step_make_up_the_step(profiled):
    out, _ = profiled
    parts, (_, _, step, _) = table(out, "part"), largest_cost(out)
    assert sorted(part[0] for part in parts) == sorted(PARTS) and {part[3] for part in parts} == {1}
    assert 0.5 * step <= sum(part[1] for part in parts) <= 1.05 * step
    assert all(share == pytest.approx(100 * time / step, abs=0.1) for _, time, share, _ in parts)


SCALED = [
    "--vid-weight",
    "100",
]  # so large that fp16 overflows, and its loss scale falls, in the first steps: also in profiled ones


@pytest.mark.parametrize(
    "options", [["fp32"], ["bf16"], ["fp16", *SCALED]], ids=["fp32", "bf16", "fp16-that-overflows"]
)
def test_a_training_that_is_profiled_ends_with_the_same_bits(command, options):
    plain, profiled = (
        command("plain", "--precision", *options),
        command("profiled", "--precision", *options, "--profile"),
    )
    assert plain[0] == profiled[0] == 0
    for one, other in zip(plain[1], profiled[1], strict=True):
        assert (
            one.weights_sha256 == other.weights_sha256
            and one.history == other.history
            and one.steps == other.steps == 6
        )


@pytest.mark.parametrize("options", [["bf16"], ["fp16", *SCALED]], ids=["bf16", "fp16-that-overflows"])
def test_an_interrupted_training_that_is_profiled_at_both_starts_ends_with_the_same_bits(
    command, monkeypatch, tmp_path, options
):
    steps, real = itertools.count(1), GroupStep.__call__

    def step(self, *batch):
        real(self, *batch)
        if next(steps) == REHEARSED + 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(GroupStep, "__call__", step)
        assert command("broken", "--precision", *options, "--profile") == (130, [])
    state = checkpoint.load_state(tmp_path / "broken" / "vid-2-seed0.resume")
    assert state["position"] == 4 and state["learner"]["loss_sums"].any(), "within the second epoch"
    if options[0] == "fp16":
        assert 1 < state["learner"]["scaler"]["scale"] < 2**16
    (tmp_path / "broken" / "profile.txt").unlink()
    code, resumed = command("broken", "--precision", *options, "--profile")
    assert code == 0 and Path(tmp_path / "broken" / "profile.txt").exists()
    for one, other in zip(resumed, command("whole", "--precision", *options)[1], strict=True):
        assert one.weights_sha256 == other.weights_sha256 and one.history == other.history


def test_what_is_finished_is_not_profiled(command, tmp_path):
    command("a")
    assert command("a", "--profile")[0] == 0
    assert not (tmp_path / "a" / "profile.txt").exists()
