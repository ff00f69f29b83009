"""Several processes: what their gradients make of a step, and what becomes of torchrun's jobs when they are stopped or lose a rank.

Jobs have two ranks on the CPU. Started as a script, by torchrun, this file is the rank of such a job that a test wants to look into.
"""

import dataclasses
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from fastvid.distributed import ALONE, Ranks, noticing_loss
from fastvid.engine import GroupStep
from fastvid.learner import Learner

from fastvid import checkpoint, cli, datasets, distributed, results
from fastvid.config import FitNetOptions, TrainConfig
from fastvid.device import DTYPES
from fastvid.errors import RankLost
from fastvid.methods import build
from fastvid.plan import BatchPlan
from fastvid.reproduce import shares
from fastvid.results import Evaluation, RunResult
from fastvid.wresnet import WideResNet

CPU = torch.device("cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PATIENCE = 180  # seconds for a job that takes ten on a free core

# 40 images: 13 + 13 + 13 + 1 an epoch, so one rank has 7 images and the other 6, and at the end 1 and none.
TINY = [
    "--device",
    "cpu",
    "--dataset",
    "digits",
    "--batch-size",
    "13",
    "--evaluations",
    "2",
    "--student-depth",
    "10",
    "--teacher-depth",
    "10",
    "--teacher-width",
    "2",
]
GROUP = [
    "train",
    *TINY,
    "--method",
    "student,vid",
    "--per-class",
    "5",
    "--validation-per-class",
    "1",
    "--epochs",
    "16",
]
STEPS = 16 * 4
GRID = [
    "reproduce",
    *TINY,
    "--methods",
    "student,vid",
    "--fractions",
    "5,4,3",
    "--seeds",
    "2",
    "--epochs",
    "1",
    "--batch-size",
    "40",
    "--loader",
    "torch",
]
CELLS = {
    (method, per_class, seed) for method in ("student", "vid") for per_class in (7, 6, 4) for seed in (0, 1)
}


class Job(NamedTuple):
    """A job of two ranks that has ended, and the output folder as it left it."""

    code: int
    out: str
    err: str
    seconds: float
    files: dict[str, bytes]
    """by name"""
    found: list[RunResult]

    def said(self, pattern):
        """The lines of fastvid, not of torchrun, that match."""
        return [line for line in self.err.splitlines() if re.fullmatch(pattern, line)]


def start(out, *arguments, program=("-m", "fastvid")):
    """Two ranks of `fastvid ARGUMENTS --out OUT`."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *program,
        *arguments,
    ]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # as torchrun writes it itself, with a warning


def this_file(folder, *first):
    """The program that runs as main() below."""
    return __file__, str(folder), ",".join(first)


def end(process, out):
    started = time.monotonic()
    with process:
        try:
            printed, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            raise
    files = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}
    return Job(process.returncode, printed, errors, time.monotonic() - started, files, results.read(out)[0])


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            pytest.fail(f"too late: {process.communicate()[1]}")
        time.sleep(0.01)


def kill(rank, folder):
    os.kill(int((folder / f"rank{rank}.pid").read_text()), signal.SIGKILL)


def no_rank_left_a_traceback(job):
    """Of torchrun's own there is one."""
    return job.err.count("Traceback") == 1 and not re.search(
        r'File "[^"]*/fastvid/[^"/]*\.py"|terminate called', job.err
    )


def weights(found):
    return {(run.method, run.per_class, run.seed): run.weights_sha256 for run in found}


# --- a step: two ranks beside one, in float64

METHODS = {
    "student": TrainConfig(),
    "vid": TrainConfig(method=("vid",)),
    "fitnet": TrainConfig(method=("fitnet",), fitnet=FitNetOptions(schedule="two-stage", hint_share=0.5)),
    "kd+at": TrainConfig(method=("kd+at",)),
}
BATCHES = {  # images of the whole batch, of which a rank takes every second, and whether batch norms take statistics of their batch
    "twins": (
        8,
        True,
    ),  # every image twice, once for each rank, so that the statistics of a part are those of the whole
    "halves": (8, False),
    "uneven": (5, False),
    "one-image-for-two-ranks": (1, False),
}
PHASES = (0.0, 0.0, 0.75, 0.75)  # progress at each step; the hint of fitnet ends at 0.5
CASES = [(method, batch) for method in METHODS for batch in BATCHES]


def trained(method, batch, ranks=ALONE):
    """Parameters and means of batch norms before and after four steps on one batch, in float64, and the losses of the last one."""
    config = dataclasses.replace(METHODS[method], precision="fp32", learning_rate=1e-3).resolved()
    count, training = BATCHES[batch]
    torch.manual_seed(0)
    teacher, network = WideResNet(10, 2).double().eval(), WideResNet(10, 1).double()
    learner = Learner(method, network, build(method, config, network, teacher).double(), config, CPU)
    state = {**network.state_dict(prefix="network."), **learner.method.state_dict(prefix="method.")}
    state = {
        name: tensor for name, tensor in state.items() if "running_var" not in name
    }  # unbiased: by the size of the part
    before = {name: tensor.clone() for name, tensor in state.items()}

    images, labels = torch.randn(count, 3, 8, 8, dtype=torch.float64), torch.randint(10, (count,))
    if batch == "twins":
        images = images[[0, 1, 1, 0, 2, 3, 3, 2]]  # other labels, and another order, for each rank
    mine = slice(ranks.rank, None, ranks.world_size)
    images, labels = images[mine].contiguous(memory_format=torch.channels_last), labels[mine]
    step = GroupStep(teacher, [learner], CPU, "fp32", ranks=ranks)
    for progress in PHASES:
        step.begin_epoch(progress)
        for module in learner.forward.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train(training)
        step(images, labels, 1e-3, ranks.world_size * len(labels) / count)
    return before, state | {"loss_sums": learner.loss_sums}


def in_float64(patch):
    """The few places of a step that are in fp32, whatever the images are, let float64 pass."""
    single = torch.Tensor.float
    patch.setattr(
        torch.Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else single(tensor)
    )
    patch.setitem(DTYPES, "fp32", torch.float64)


@pytest.fixture(scope="module")
def looked_into(tmp_path_factory, teacher):
    """The folder of a job that made the steps of CASES, trained GROUP without interruption, and left what each rank has of both."""
    folder = tmp_path_factory.mktemp("looked-into")
    job = end(
        start(folder / "out", *GROUP, "--teacher", teacher, program=this_file(folder, "steps")),
        folder / "out",
    )
    assert job.code == 0, job.err
    return folder, job


@pytest.mark.parametrize("method, batch", CASES, ids=map("-".join, CASES))
def test_two_ranks_step_as_one_does_on_the_whole_batch(looked_into, monkeypatch, method, batch):
    folder, _ = looked_into
    first, second = (torch.load(folder / f"rank{rank}.pt")["steps"][f"{method} {batch}"] for rank in (0, 1))
    with monkeypatch.context() as patch:
        in_float64(patch)
        before, alone = trained(method, batch)
    torch.testing.assert_close(
        first.pop("loss_sums") + second.pop("loss_sums"), alone.pop("loss_sums"), rtol=1e-6, atol=1e-6
    )  # fp32
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if "running" not in name)
    assert all(tensor.dtype == torch.float64 for tensor in alone.values())
    moved = {name for name, tensor in alone.items() if (tensor - before[name]).abs().max() > 1e-6}
    assert len(moved) > len(alone) / 2
    for name, tensor in alone.items():
        # Sums of up to 512 products in another order: 1e-12 of the terms. A weight, a mean or an image that is wrong shows at 1e-6.
        torch.testing.assert_close(
            first[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}"
        )


# --- a job from start to end


def test_after_a_training_in_bf16_all_ranks_hold_the_same_bits_of_network_and_method(looked_into):
    folder, _ = looked_into
    first, second = (torch.load(folder / f"rank{rank}.pt")["parameters"] for rank in (0, 1))
    assert first == second and list(first) == ["student", "vid"]
    assert (
        len(first["vid"]) > len(first["student"])
        and "module.method.transfers.vid.loss.raw_scales.3" in first["vid"]
    )


def test_ranks_share_out_the_batches_of_one_process_and_weigh_their_parts(looked_into):
    folder, _ = looked_into
    taken = [torch.load(folder / f"rank{rank}.pt")["batches"] for rank in (0, 1)]
    labels = torch.from_numpy(datasets.load("digits", "", "train").subset(5).holdout(1)[0].labels)
    plan = BatchPlan(40, 13, seed=0)
    whole = [labels[plan.batch(epoch, step).indices].tolist() for epoch in range(16) for step in range(4)]
    for rank in (0, 1):
        assert [mine for mine, _ in taken[rank]] == [batch[rank::2] for batch in whole]
        assert [weight for _, weight in taken[rank]] == [
            2 * len(batch[rank::2]) / len(batch) for batch in whole
        ]


def test_the_losses_of_a_job_are_means_over_the_images_of_all_ranks(looked_into):
    folder, job = looked_into
    first, second = (torch.load(folder / f"rank{rank}.pt")["loss_sums"] for rank in (0, 1))
    for run in job.found:
        assert first[run.method][0] > 0 and second[run.method][0] > 0
        assert torch.equal(
            (first[run.method] + second[run.method]) / 40,
            torch.tensor([run.history[-1].task_loss, run.history[-1].transfer_loss]),
        )


def test_a_job_leaves_one_result_and_one_file_of_weights_for_each_method_and_says_everything_once(
    looked_into,
):
    _, job = looked_into
    assert [(run.method, run.steps, run.environment["ranks"], run.group) for run in job.found] == [
        (method, STEPS, 2, ["student", "vid"]) for method in ("student", "vid")
    ]
    assert set(job.files) == {"results.jsonl", "student-5-seed0.safetensors", "vid-5-seed0.safetensors"}
    assert all(hashlib.sha256(job.files[run.weights]).hexdigest() == run.weights_sha256 for run in job.found)
    assert not job.out and job.said(r".*: batches by .*, engine eager, 2 ranks")
    assert all(
        job.said(rf"{run.method} \| .*: {run.accuracy:.2f} % on validation after the last epoch .*")
        for run in job.found
    )
    assert set(Counter(job.err.splitlines()).values()) == {1}


def test_a_second_start_trains_nothing_and_says_so_once(looked_into, teacher):
    folder, job = looked_into
    again = end(start(folder / "out", *GROUP, "--teacher", teacher), folder / "out")
    assert again.code == 0, again.err
    assert again.files == job.files
    assert len(again.said(".*; finished before")) == len(again.err.splitlines()) == 2


# --- a job that is stopped, then loses a rank, then goes on to the end


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, teacher):
    """The job after a SIGTERM to torchrun, soon after its first checkpoint."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    process = start(out, *GROUP, "--teacher", teacher, "--checkpoint-every", "1epoch", "--loader", "torch")
    wait_for(lambda: (out / "vid-5-seed0.resume").exists(), process)
    process.send_signal(signal.SIGTERM)
    return out, end(process, out)


@pytest.fixture(scope="module")
def bereft(stopped, teacher):
    """The same job, started again, after one of its ranks was killed, soon after a checkpoint."""
    out, _ = stopped
    resume = out / "vid-5-seed0.resume"
    before = resume.stat().st_mtime_ns
    process = start(
        out,
        *GROUP,
        "--teacher",
        teacher,
        "--checkpoint-every",
        "1epoch",
        "--loader",
        "torch",
        program=this_file(out.parent),
    )
    wait_for(lambda: resume.stat().st_mtime_ns > before, process)
    kill(1, out.parent)
    return out, end(process, out)


@pytest.fixture(scope="module")
def finished(bereft, teacher):
    """The same job, started once more."""
    out, _ = bereft
    return end(start(out, *GROUP, "--teacher", teacher, "--loader", "torch"), out)


def test_sigterm_to_torchrun_stops_all_ranks_when_everything_is_saved(stopped):
    out, job = stopped
    assert job.code != 0 and job.seconds < 30 and not job.found
    assert set(job.files) == {"results.jsonl", "student-5-seed0.resume", "vid-5-seed0.resume"}
    message, *_ = job.said(
        rf"fastvid: stopped after step \d+ of {STEPS}, all is saved in {out}: the same command goes on from there"
    )
    assert checkpoint.load_state(out / "vid-5-seed0.resume")["ranks"] == 2
    step = int(re.search(r"step (\d+)", message)[1])
    assert 4 <= step < STEPS and all(
        torch.load(io.BytesIO(job.files[f"{method}-5-seed0.resume"]))["position"] == step
        for method in ("student", "vid")
    )
    assert no_rank_left_a_traceback(job)


def test_a_killed_rank_ends_the_job_within_30_seconds_in_one_readable_line(bereft):
    _, job = bereft
    assert job.code != 0 and job.seconds < 30 and not job.found
    (line,) = job.said("fastvid: .*")
    assert re.fullmatch(
        r"fastvid: rank 0 of 2 lost another one \([^()]+\): start the same command again, it goes on from the last "
        "checkpoint",
        line,
    )
    assert no_rank_left_a_traceback(job)


def test_one_process_does_not_go_on_with_what_two_have_begun(bereft, teacher, tmp_path, capsys):
    _, job = bereft
    for name, content in job.files.items():
        (tmp_path / name).write_bytes(content)
    assert cli.main([*GROUP, "--teacher", teacher, "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"fastvid: error: {tmp_path}/student-5-seed0.resume was made with ranks = 2, but now it is 1: "
        "give the old settings, another --out, or delete the file"
    )
    assert {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(".")
    } == job.files


def test_what_was_stopped_and_lost_a_rank_ends_with_the_bits_of_a_job_that_ran_through(finished, looked_into):
    _, through = looked_into
    assert finished.code == 0, finished.err
    assert len(finished.said(".*: going on at .*")) == 1
    assert weights(finished.found) == weights(through.found)
    assert set(finished.files) == set(through.files)
    for run, other in zip(finished.found, through.found):
        assert run.history == other.history and run.steps == STEPS


# --- a grid


@pytest.fixture(scope="module")
def bereft_grid(tmp_path_factory):
    """A grid that lost its first rank as soon as two cells were done."""
    out = tmp_path_factory.mktemp("grid") / "out"
    process = start(out, *GRID, program=this_file(out.parent))
    wait_for(
        lambda: (
            out.exists()
            and (out / results.FILE).exists()
            and (out / results.FILE).read_bytes().count(b"\n") >= 3
        ),
        process,
    )
    kill(0, out.parent)
    return out, end(process, out)


@pytest.fixture(scope="module")
def finished_grid(bereft_grid):
    out, _ = bereft_grid
    return end(start(out, *GRID), out)


def test_a_killed_rank_ends_a_grid_within_30_seconds(bereft_grid):
    _, job = bereft_grid
    assert job.code != 0 and job.seconds < 30
    assert 0 < len(weights(job.found).keys() & CELLS) < len(CELLS), "killed in the middle"
    assert no_rank_left_a_traceback(job) and not job.out
    (line,) = job.said("fastvid(, rank 1)?: .*")
    assert re.match(
        r"fastvid(, rank 1)?: (stopped after step .* the same command goes on|rank 1 of 2 lost another one|interrupted)",
        line,
    )


def test_the_next_start_completes_the_grid_and_prints_one_table(bereft_grid, finished_grid):
    _, before = bereft_grid
    assert finished_grid.code == 0, finished_grid.err
    assert Counter((run.method, run.per_class, run.seed) for run in finished_grid.found) == Counter(
        CELLS | {("teacher", None, 0)}
    )
    assert finished_grid.found[: len(before.found)] == before.found
    table = finished_grid.files["table.md"].decode()
    assert finished_grid.out.startswith(table.strip()) and finished_grid.out.count("Last epoch: ") == 1


def test_ranks_train_the_cells_of_a_grid_as_one_process_does(finished_grid, tmp_path):
    command = [sys.executable, "-m", "fastvid", *GRID, "--out", str(tmp_path / "out")]
    threads = str(max(1, CORES // 2))  # as a rank has; how many share a convolution shows in its last bits
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    assert weights(finished_grid.found) == weights(results.read(tmp_path / "out")[0])


# --- who trains what


def test_the_longest_groups_are_dealt_first_and_always_to_the_rank_that_has_least(tmp_path):
    groups = [
        group(tmp_path, per_class, epochs)
        for per_class, epochs in ((10, 1), (10, 5), (20, 2), (None, 1), (10, 2))
    ]
    assert shares(groups, 2, class_size=45) == [
        [groups[0], groups[1], groups[4]],
        [groups[2], groups[3]],
    ]  # 80 and 85 images
    assert shares(groups, 1, class_size=45) == [groups]
    assert shares(groups, 7, class_size=45) == [
        [groups[1]],
        [groups[3]],
        [groups[2]],
        [groups[4]],
        [groups[0]],
        [],
        [],
    ]


def test_a_grid_of_equal_groups_is_dealt_evenly_and_in_order(tmp_path):
    groups = [group(tmp_path, 7, 4, seed=seed) for seed in range(7)]
    assert shares(groups, 3, class_size=140) == [groups[0::3], groups[1::3], groups[2::3]]


def test_what_is_finished_counts_nothing_but_stays_in_the_grid(tmp_path):
    groups = [group(tmp_path, 7, 4, seed=seed) for seed in range(4)]
    for seed, method in ((0, "student"), (0, "vid"), (1, "student")):
        results.append(tmp_path, a_result(method, 7, seed))
    assert shares(groups, 2, class_size=140) == [
        [groups[1], groups[2]],
        [groups[0], groups[3]],
    ]  # 28 + 56 and 0 + 56 images


def test_no_groups_are_shared_out_as_nothing():
    assert shares([], 3, class_size=140) == [[], [], []]


def group(out, per_class, epochs, seed=0):
    return TrainConfig(
        dataset="digits",
        method=("student", "vid"),
        per_class=per_class,
        epochs=epochs,
        seed=seed,
        out=str(out),
    )


def a_result(method, per_class, seed):
    return RunResult(
        dataset="digits",
        method=method,
        percent=5.0,
        per_class=per_class,
        seed=seed,
        accuracy=60.0,
        best_accuracy=60.0,
        evaluated_on="test",
        train_images=70,
        steps=4,
        seconds=1.0,
        images_per_second=280.0,
        group=[method],
        history=[Evaluation(4, 60.0, 2.0, 30.0, {})],
        weights="w.safetensors",
        weights_sha256="ab" * 32,
        data_sha256="da" * 32,
        teacher_sha256=None,
        teacher_accuracy=None,
        config={},
        environment={},
    )


# --- one process


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="plain"),
        pytest.param({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "one"}, id="torchrun-of-one"),
        pytest.param({"WORLD_SIZE": "4", "RANK": "2"}, id="somebody-elses-variables"),
    ],
)
def test_without_other_processes_of_torchrun_a_process_is_alone(monkeypatch, environment):
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.join.__wrapped__() == ALONE and not dist.is_initialized()


def test_alone_every_question_is_answered_without_a_process_group():
    thing, tensor = object(), torch.ones(2)
    assert ALONE.first and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.from_first(thing) is thing and ALONE.sum(tensor) is tensor and ALONE.barrier() is None
    assert not dist.is_initialized() and ALONE.steps_between_questions == 1


def test_a_rank_takes_the_gpu_of_its_number_and_any_other_device_as_it_was_given():
    rank = Ranks(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert not rank.first
    assert [rank.device(name) for name in ("cuda", "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
    assert rank.device("auto") == ("cuda:1" if torch.cuda.is_available() else "auto")
    assert [ALONE.device(name) for name in ("cuda", "auto")] == ["cuda", "auto"]
    alone = rank.alone()
    assert alone.first and (alone.world_size, alone.local_rank, alone.local_world_size) == (1, 1, 4)


RESET = "Read error [127.0.0.1]:3291: Connection reset by peer"


@pytest.mark.parametrize(
    "error, lost",
    [
        pytest.param(
            RuntimeError(f"[/pytorch/third_party/gloo/transport/tcp/pair.cc:525] {RESET}. Look there.\nmore"),
            RESET,
            id="gloo",
        ),
        pytest.param(
            dist.DistNetworkError("The client socket has failed to connect"),
            "The client socket has failed to connect",
            id="network",
        ),
        pytest.param(
            dist.DistBackendError("NCCL communicator was aborted on rank 1"),
            "NCCL communicator was aborted on rank 1",
            id="nccl",
        ),
        pytest.param(RuntimeError("shapes do not fit"), None, id="bug"),
    ],
)
def test_the_error_of_a_broken_connection_becomes_a_lost_rank_and_no_other_error_does(error, lost):
    expected = (
        f"rank 1 of 2 lost another one ({lost}): start the same command again, it goes on from the last checkpoint"
        if lost
        else str(error)
    )
    with pytest.raises(RankLost if lost else RuntimeError) as raised, noticing_loss(Ranks(1, 2)):
        raise error
    assert str(raised.value) == expected
    with pytest.raises(type(error)) as raised, noticing_loss(ALONE):
        raise error
    assert raised.value is error


def main(folder, first, *argv):
    """A rank: its steps of CASES where they come first, then `fastvid ARGV`, then what it has taken and what it holds."""
    ranks = distributed.join()
    (folder / f"rank{ranks.rank}.pid").write_text(str(os.getpid()))
    left, groups, step = {"batches": []}, [], GroupStep.__call__
    with pytest.MonkeyPatch.context() as patch:
        if first == "steps":
            in_float64(patch)
            left["steps"] = {f"{method} {batch}": trained(method, batch, ranks)[1] for method, batch in CASES}

    def observed(group, images, labels, learning_rate, weight):
        groups[:] = [group]
        left["batches"].append((labels.tolist(), weight))
        step(group, images, labels, learning_rate, weight)

    GroupStep.__call__ = observed
    code = cli.main(list(argv))
    for group in groups:
        left["loss_sums"] = {learner.name: learner.loss_sums for learner in group.learners}
        left["parameters"] = {
            learner.name: {
                name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
                for name, parameter in learner.forward.named_parameters()
            }
            for learner in group.learners
        }
    torch.save(left, folder / f"rank{ranks.rank}.pt")
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
