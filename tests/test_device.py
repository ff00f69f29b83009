"""What a run sets up on its device. What concerns a whole process, and would outlast a test, is measured in processes of their own."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastvid import device as devices
from fastvid.device import autocast, peak_memory, reset_peak_memory

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_computes_in_the_type_of_the_precision_and_leaves_parameters_in_theirs(
    device, precision, dtype
):
    weight, images = torch.randn(4, 4, device=device, requires_grad=True), torch.randn(2, 4, device=device)
    with autocast(torch.device(device), precision):
        assert F.linear(images, weight).dtype == dtype
    assert weight.dtype == F.linear(images, weight).dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_weight_that_changes_under_autocast_is_read_anew(device, precision):
    """torch's own autocast would go on with its first copy."""
    weight, images = torch.ones(4, 4, device=device, requires_grad=True), torch.ones(2, 4, device=device)
    with autocast(torch.device(device), precision):
        before = F.linear(images, weight)
        with torch.no_grad():
            weight.fill_(2.0)
        assert torch.equal(F.linear(images, weight), 2 * before)


@pytest.fixture
def threads(monkeypatch):
    """threads(processes, variable): how many this process has after tune, on 12 cores, when it had 7."""
    before = torch.get_num_threads()

    def tuned(processes, variable):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        torch.set_num_threads(7)
        devices.tune.__wrapped__(CPU, processes)
        return torch.get_num_threads()

    yield tuned
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "processes, variable, expected",
    [
        pytest.param(3, "1", 4, id="as-torchrun-starts-them"),
        pytest.param(3, None, 4, id="nothing-said"),
        pytest.param(5, "1", 2, id="cores-that-do-not-divide"),
        pytest.param(20, "1", 1, id="more-processes-than-cores"),
        pytest.param(3, "2", 7, id="as-the-user-says"),
        pytest.param(1, "1", 7, id="alone"),
        pytest.param(1, None, 7, id="alone-and-nothing-said"),
    ],
)
def test_processes_on_one_machine_share_its_cores_unless_the_user_says_how_many_threads(
    threads, processes, variable, expected
):
    interop = torch.get_num_interop_threads()
    assert threads(processes, variable) == expected
    assert torch.get_num_interop_threads() == interop


MAPS = """
import json, resource, sys, torch
from fastvid.device import peak_memory, tune
device = torch.device("cpu")
if sys.argv[1] == "tuned":
    tune(device)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def make_maps(count):
    for _ in range(count):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)

make_maps(12)  # aligned memory comes to rest only after some
before = faults()
make_maps(4)
taken_anew = faults() - before
first = torch.ones(256 * 2**20, dtype=torch.uint8)  # now as much is held as ever was
before = peak_memory(device)
second = torch.ones(256 * 2**20, dtype=torch.uint8)
print(json.dumps({"faults": taken_anew, "peak": before, "grown": peak_memory(device) - before}))
"""


@pytest.fixture(scope="module")
def maps():
    """By "tuned" and "plain": page faults of four maps of 64 MiB, made and dropped one after the other, then the peak of memory with
    256 MiB held, and by how much it grew with as much again. The process that starts them is larger than they are."""
    measured, ballast = {}, torch.ones(1280 * MIB, dtype=torch.uint8)
    for name in ("tuned", "plain"):
        ran = subprocess.run([sys.executable, "-c", MAPS, name], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        measured[name] = json.loads(ran.stdout)
    del ballast
    return measured


def test_memory_of_a_dropped_map_is_kept_for_the_next_one(maps):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the memory allocator of this system is not glibc's")
    assert maps["plain"]["faults"] >= 4 * 64 // 2, "a fault for each page, of 2 MiB at most"
    assert maps["tuned"]["faults"] < maps["plain"]["faults"] / 10


def test_the_peak_of_a_process_is_its_own_in_bytes_and_grows_by_what_it_takes(maps):
    for one in maps.values():
        assert 256 * MIB < one["peak"] < 4096 * MIB, "torch and one tensor"
        assert 0.75 < one["grown"] / (256 * MIB) < 1.05, "less where the system took back what lay idle"


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_that_of_its_tensors_since_the_last_reset():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    gpu = torch.device("cuda", 0)
    held = torch.ones(MIB, dtype=torch.uint8, device=gpu)
    reset_peak_memory(gpu)
    start = peak_memory(gpu)
    more = torch.ones(64 * MIB, dtype=torch.uint8, device=gpu)
    assert len(held) and peak_memory(gpu) - start == 64 * MIB
    del more
    assert peak_memory(gpu) - start == 64 * MIB
    reset_peak_memory(gpu)
    assert peak_memory(gpu) == start
