"""Set-up of the device. Settings that outlast a test (of a whole process) are measured in subprocesses."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastvid import device as devices
from fastvid.device import autocast, choose_device, peak_memory, reset_peak_memory
from fastvid.errors import InputError

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
    """threads(processes, variable): number of threads after tune, on 12 cores, for a process with 7 threads.

    processes: number of processes that torchrun has started.  variable: value of OMP_NUM_THREADS.
    """
    before = torch.get_num_threads()

    def tuned(processes, variable):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
        for name, value in (("LOCAL_WORLD_SIZE", processes), ("OMP_NUM_THREADS", variable)):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        torch.set_num_threads(7)
        devices.tune.__wrapped__(CPU)
        return torch.get_num_threads()

    yield tuned
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "processes, variable, expected",
    [
        pytest.param("3", "1", 4, id="as-torchrun-starts-them"),
        pytest.param("3", None, 4, id="nothing-said"),
        pytest.param("5", "1", 2, id="cores-that-do-not-divide"),
        pytest.param("20", "1", 1, id="more-processes-than-cores"),
        pytest.param("3", "2", 7, id="as-the-user-says"),
        pytest.param("1", "1", 7, id="alone"),
        pytest.param(None, None, 7, id="without-torchrun"),
    ],
)
def test_processes_on_one_machine_share_its_cores_unless_the_user_says_how_many_threads(
    threads, processes, variable, expected
):
    assert threads(processes, variable) == expected


@pytest.mark.parametrize(
    "name, phrase",
    [
        pytest.param("tpu", "unknown device 'tpu': choose auto, cpu, cuda or cuda:N", id="unknown"),
        pytest.param("", "unknown device '': choose", id="empty"),
        pytest.param("cuda:x", "unknown device 'cuda:x'", id="no-number"),
        pytest.param("cuda:-1", "unknown device 'cuda:-1'", id="negative"),
        pytest.param("meta", "fastvid does not run on 'meta'", id="known-to-torch-only"),
        pytest.param(
            "cuda:99",
            r"no GPU for --device cuda:99: torch \S+ sees \d+ GPUs; take --device cpu, or see `fastvid ",
            id="beyond-the-last",
        ),
    ],
)
def test_a_device_that_is_not_here_is_refused_with_the_choices(name, phrase):
    with pytest.raises(InputError, match=phrase):
        choose_device(name)


def test_asking_for_a_gpu_where_there_is_none_is_refused_and_auto_takes_the_cpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match="no GPU for --device cuda: torch .* sees 0 GPUs"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == CPU


@pytest.mark.gpu
def test_auto_takes_the_gpu_where_there_is_one():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    assert choose_device("auto").type == choose_device("cuda:0").type == "cuda"


@pytest.mark.parametrize(
    "variables, name, expected",
    [
        ({"LOCAL_RANK": "1"}, "cuda", "cuda:1"),
        ({"LOCAL_RANK": "5"}, "auto", "cuda:1"),
        ({"SLURM_LOCALID": "3"}, "auto", "cuda:3"),
        ({"LOCAL_RANK": "1"}, "cuda:0", "cuda:0"),
        ({"LOCAL_RANK": "1"}, "cpu", "cpu"),
        ({"LOCAL_RANK": ""}, "cuda", "cuda"),
        ({}, "auto", "cuda"),
    ],
)
def test_each_process_of_torchrun_or_slurm_takes_a_gpu_of_its_own(monkeypatch, variables, name, expected):
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device(name) == torch.device(expected)


MAPS = """
import resource, sys, torch
from fastvid.device import tune
if sys.argv[1] == "tuned":
    tune(torch.device("cpu"))

def make_maps(count):
    for _ in range(count):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)

make_maps(12)  # aligned memory comes to rest only after some
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
make_maps(4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_memory_of_a_dropped_map_is_kept_for_the_next_one():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the memory allocator of this system is not glibc's")
    tuned, plain = (
        int(subprocess.run([sys.executable, "-c", MAPS, name], capture_output=True, check=True).stdout)
        for name in ("tuned", "plain")
    )
    assert plain >= 4 * 64 // 2, "a page fault for each page, of 2 MiB at most"
    assert tuned < plain / 10


def test_memory_is_measured_on_a_gpu_only():
    reset_peak_memory(CPU)
    assert peak_memory(CPU) is None


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
