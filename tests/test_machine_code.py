"""The machine code of the kernels that a training step launches: spills, registers, accesses. Needs no
GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "machine_code.py"
# KB of shared memory that one program may have (CUDA programming guide)
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}
# Registers of a thread. A multiprocessor has 65,536: residual and rescale need room for four programs of 128
# threads, attention for one of 512. The projection may take all 255 that a thread can have without a spill.
BUDGET = {
    "residual_kernel": 128,
    "rescale_kernel": 128,
    "attention_kernel": 128,
    "tiled_attention_kernel": 128,
    "softened_kl_kernel": 128,
    "finish_kernel": 128,
    "projection_kernel": 255,
}
MAPS = {"mean", "target", "hidden", "student", "teacher", "gradient", "hidden_gradient"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One per kernel variant and architecture."""
    file = tmp_path_factory.mktemp("machine_code") / "rows.jsonl"
    natively = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", file], env=natively, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in file.read_text().splitlines()]


# Bytes, with Triton 3.8: the loss alone of images beyond 32,768 elements; no network of the table has them.
KNOWN_SPILLS = {("attention_transfer wide fp16", "sm_100"): 4}


def name(row):
    return f"{row['op']} {row['kernel']} {row['arch']} {row['constants']}"


def test_every_kernel_compiles_for_every_architecture_in_every_precision_of_a_step(rows):
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in BUDGET for arch in SHARED
    }
    for op, taps in [("vid_nll", 4), ("attention_transfer", 5), ("projected_vid_nll", 8)]:
        assert len({row["op"] for row in rows if row["op"].split()[0] == op and "bf16" in row["op"]}) == taps


def test_no_register_is_spilled_and_each_kernel_keeps_to_its_budget(rows):
    spilled = [name(row) for row in rows if row["spills"] > KNOWN_SPILLS.get((row["op"], row["arch"]), 0)]
    assert not spilled
    assert not [(name(row), row["registers"]) for row in rows if row["registers"] > BUDGET[row["kernel"]]]
    assert not [name(row) for row in rows if row["registers"] * row["warps"] * 32 > 65536], (
        "would not even start"
    )


def test_no_program_wants_more_shared_memory_than_its_architecture_has(rows):
    assert not [
        (name(row), row["shared_bytes"]) for row in rows if row["shared_bytes"] > SHARED[row["arch"]] * 1024
    ]


def test_every_access_to_a_map_is_16_bytes_wide(rows):
    checked = 0
    for row in rows:
        assert "unknown" not in row["bytes_per_access"], name(row)
        if row["kernel"] == "softened_kl_kernel":  # rows of 10 logits, not maps
            continue
        for pointer in MAPS & set(row["pointers"]):
            assert row["bytes_per_access"][pointer] == [16], f"{name(row)}: {pointer}"
            checked += 1
        if MAPS & set(row["pointers"]):
            assert row["wide_accesses"], f"{name(row)}: in PTX, but not in the machine code"
    assert checked > 300


def test_the_projection_runs_on_tensor_cores(rows):
    for row in rows:
        assert (row["tensor_core_instructions"] > 0) == (row["kernel"] == "projection_kernel"), name(row)


def test_channels_up_to_128_are_projected_in_one_kernel_where_the_registers_suffice(rows):
    fused = {
        arch: {
            row["constants"]["CHANNELS"]
            for row in rows
            if row["kernel"] == "projection_kernel" and row["arch"] == arch
        }
        for arch in SHARED
    }
    assert fused == {
        "sm_80": {16, 32, 64},
        "sm_90": {16, 32, 64, 128},
        "sm_100": {16, 32, 64, 128},
        "sm_120": {16, 32, 64},
    }
