"""`fastvid train --profile`: what it writes and says, and that the training does not notice."""

import json
from collections import Counter

import pytest
import torch
from tiny import STEPS, command, signal_after

from fastvid import checkpoint, cli, results
from fastvid.profiling import STEPS as PROFILED

REHEARSED = 2 + PROFILED
# The weight of VID is so large that fp16 overflows in the first (profiled) steps: the loss scale falls.
FP16 = pytest.param(
    {"precision": "fp16", "vid_weight": 100}, id="fp16-that-overflows", marks=pytest.mark.slow
)
PRECISIONS = pytest.mark.parametrize("settings", [pytest.param({"precision": "bf16"}, id="bf16"), FP16])
PARTS = [
    "loader: batch",
    "teacher: forward",
    *(f"{who}: {what}" for who in ("student", "vid") for what in ("forward", "backward", "update")),
]


@pytest.fixture
def train(tmp_path, teacher):
    """train("a", seed=1): runs `fastvid train --seed 1` into tmp_path/a. Returns exit code and results."""

    def run(out, *more, **settings):
        argv = command(tmp_path / out, "student", "vid", teacher=teacher, **settings)
        return cli.main([*argv, *more]), results.read(tmp_path / out)[0]

    return run


def test_the_trace_holds_every_part_of_every_profiled_step_and_the_table_the_operators(
    train, tmp_path, capsys
):
    train("a", "--profile")
    trace, text = tmp_path / "a" / "profile.json", tmp_path / "a" / "profile.txt"
    said = f"profile of {PROFILED} steps: {text}, trace: {trace}"
    assert capsys.readouterr().err.splitlines().count(said) == 1
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 and event["name"] for event in events)
    counted = Counter(event["name"] for event in events)
    assert {part: counted[part] for part in PARTS} == dict.fromkeys(PARTS, PROFILED)
    title, *table = text.read_text().splitlines()
    assert title == f"student, vid on cpu, fp32: {PROFILED} steps"
    assert "Self CPU %" in table[1] and any("convolution" in line for line in table)
    assert not list((tmp_path / "a").glob(".profile-*"))


@PRECISIONS
def test_a_training_that_is_profiled_ends_with_the_same_bits(train, settings):
    plain, profiled = train("plain", **settings), train("profiled", "--profile", **settings)
    assert plain[0] == profiled[0] == 0
    for one, other in zip(plain[1], profiled[1], strict=True):
        assert one.weights_sha256 == other.weights_sha256 and one.history == other.history
        assert one.steps == other.steps == 2 * STEPS


@PRECISIONS
def test_an_interrupted_training_that_is_profiled_at_both_starts_ends_with_the_same_bits(
    train, tmp_path, settings
):
    with signal_after(REHEARSED + STEPS + 1):
        assert train("broken", "--profile", **settings) == (130, [])
    state = checkpoint.load_state(tmp_path / "broken" / "5-seed0.resume")
    assert state["step"] == STEPS + 1 and state["students"]["vid"]["loss_sums"].any(), "in the second epoch"
    if settings["precision"] == "fp16":
        assert 1 < state["students"]["vid"]["scaler"]["scale"] < 2**16
    (tmp_path / "broken" / "profile.txt").unlink()
    code, resumed = train("broken", "--profile", **settings)
    assert code == 0 and (tmp_path / "broken" / "profile.txt").exists()
    for one, other in zip(resumed, train("whole", **settings)[1], strict=True):
        assert one.weights_sha256 == other.weights_sha256 and one.history == other.history


def test_a_finished_group_is_not_profiled(train, tmp_path):
    train("a")
    assert train("a", "--profile")[0] == 0
    assert not (tmp_path / "a" / "profile.txt").exists()


def test_a_trace_that_does_not_fit_on_the_disk_is_refused_with_the_remedy(train, capsys, monkeypatch):
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: None)
    assert train("a", "--profile")[0] == 2
    assert "profile.json: cannot write the trace: make room there, or leave out" in capsys.readouterr().err
