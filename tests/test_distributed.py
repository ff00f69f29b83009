"""Several processes: the loss modules under a user's own DDP, and commands that share a grid.

Started by torchrun as a script, this file is one of the two processes of the DDP test.
"""

import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import options

import fastvid
from fastvid import results

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PATIENCE = 300  # seconds for commands that take ten on a free core


# --- losses under DDP


class Losses(torch.nn.Module):
    """A student of one convolution with every loss of fastvid."""

    def __init__(self):
        super().__init__()
        self.student = torch.nn.Conv2d(3, 4, 3)
        self.vid, self.fitnet = fastvid.VIDLoss(4, 6), fastvid.FitNetLoss(4, 6)
        self.at, self.kd = fastvid.ATLoss(), fastvid.KDLoss()

    def forward(self, images, teacher_map, teacher_logits):
        student_map = self.student(images)
        logits = student_map.mean(dim=(2, 3))
        distances = self.vid(student_map, teacher_map), self.fitnet(student_map, teacher_map)
        return sum(distances) + self.at([student_map], [teacher_map]) + self.kd(logits, teacher_logits)


def losses_and_inputs():
    """The same in every process; batch norms use fixed statistics, because those of half a batch differ."""
    torch.manual_seed(0)
    losses = Losses().double()
    for module in losses.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, teacher_map = torch.randn(8, 3, 8, 8), torch.randn(8, 6, 6, 6).relu()
    return losses, [tensor.double() for tensor in (images, teacher_map, torch.randn(8, 4))]


def gradients_of(losses):
    return {
        name.removeprefix("module."): parameter.grad.clone() for name, parameter in losses.named_parameters()
    }


def main(folder):
    """One of two processes: gradients of its half of the batch, averaged by DDP."""
    dist.init_process_group("gloo")
    losses, inputs = losses_and_inputs()
    losses = torch.nn.parallel.DistributedDataParallel(losses)
    losses(*(tensor[dist.get_rank() :: 2] for tensor in inputs)).backward()
    torch.save(gradients_of(losses), Path(folder, f"{dist.get_rank()}.pt"))
    dist.destroy_process_group()


def test_losses_under_ddp_have_the_gradients_of_one_process_with_the_whole_batch(tmp_path):
    subprocess.run([*TORCHRUN, __file__, str(tmp_path)], check=True, capture_output=True, timeout=PATIENCE)
    losses, inputs = losses_and_inputs()
    losses(*inputs).backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, expected in gradients_of(losses).items():
        assert expected.abs().max() > 0 and torch.equal(first[name], second[name]), name
        # The losses round to fp32 at the end, 2^-24; a wrong weight of a term shows at 1e-1.
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-8, msg=name)


# --- processes that share a grid

GRID = {
    "device": "cpu",
    "dataset": "digits",
    "loader": "torch",
    "batch_size": 20,
    "epochs": 4,
    "student_depth": 10,
    "teacher_depth": 10,
    "teacher_width": 1,
    "methods": "student,kd",
    "fractions": "full,7,5",
    "seeds": 1,
}
CELLS = {(method, per_class, 0) for method in ("student", "kd") for per_class in (None, 10, 7)}


def start(command, out, **variables):
    argv = [*command, "-m", "fastvid", "reproduce", *options(**GRID, out=out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("how", ["plain", "variables-of-torchrun", "torchrun"])
def test_two_processes_share_a_grid_train_every_run_once_and_one_of_them_prints_the_table(tmp_path, how):
    out = tmp_path / "out"
    with ExitStack() as stack:
        if how == "torchrun":
            started = [start(TORCHRUN, out)]
        else:
            local = [{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in (0, 1)]
            started = [
                start([sys.executable], out, **(local[n] if "torchrun" in how else {})) for n in (0, 1)
            ]
        processes = [stack.enter_context(process) for process in started]
        printed = [process.communicate(timeout=PATIENCE) for process in processes]
    errors = "\n".join(error for _, error in printed)
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    found, notes = results.read(out)
    trained = Counter((run.method, run.per_class, run.seed) for run in found)
    assert not notes and trained == Counter(CELLS | {("teacher", None, 0)})
    assert len([line for line in errors.splitlines() if line.endswith("from the start")]) == 4, errors
    tables = "".join(output for output, _ in printed)
    assert tables.count(f"wrote {out / 'table.md'}") == 1, tables
    assert errors.count("other processes still train") == 1
    assert not list(out.glob("*.resume"))


if __name__ == "__main__":
    main(sys.argv[1])
