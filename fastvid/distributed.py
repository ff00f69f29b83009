"""Several processes started by torchrun: which of them this one is, and what they agree on.

They talk through gloo, on the host; gradients on GPUs travel through NCCL.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvid.errors import RankLost

PATIENCE = timedelta(
    days=7
)  # for a rank that trains while the others wait; one that is lost is noticed at once all the same


@dataclass(frozen=True)
class Ranks:
    """The processes of one job, as this one sees them. Alone, every question has its answer without a word."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """rank among those of this machine"""
    local_world_size: int = 1
    group: Any = None
    """process group for gradients on GPUs"""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    @property
    def steps_between_questions(self) -> int:
        """How many steps a rank makes before it asks the others whether to stop."""
        return 1 if self.world_size == 1 else 10

    def device(self, name: str) -> str:
        """Of this rank, for the --device of the job: its own GPU, or the CPU that it shares."""
        if self.world_size > 1 and (name == "cuda" or name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.local_rank}"
        return name

    def alone(self) -> Ranks:
        """This process for work that it does without the others."""
        return Ranks(local_rank=self.local_rank, local_world_size=self.local_world_size)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all must ask."""
        return bool(self.sum(torch.tensor(int(flag))))

    def sum(self, tensor: Tensor) -> Tensor:
        """Of this tensor over all ranks; all must ask."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().cpu().clone()
        with noticing_loss(self):
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)

    def from_first(self, value: Any) -> Any:
        """What the first rank passes here."""
        if self.world_size == 1:
            return value
        box = [value]
        with noticing_loss(self):
            dist.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()


@cache
def join() -> Ranks:
    """This process among those that torchrun started with it, connected to them; ALONE without torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1 or not dist.is_torchelastic_launched():
        return ALONE
    dist.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)  # or gloo's threads may abort a process that ends
    local_rank = int(os.environ["LOCAL_RANK"])
    group = None
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        group = dist.new_group(backend="nccl")
    return Ranks(dist.get_rank(), world_size, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]), group)


@contextmanager
def noticing_loss(ranks: Ranks) -> Iterator[None]:
    """Turn the error that a broken connection to another rank raises into RankLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if ranks.world_size == 1 or not (
            isinstance(error, dist.DistError) or "gloo" in text.lower() or "nccl" in text.lower()
        ):
            raise
        reason = (
            re.sub(r"^\[\S*\] ", "", text.strip()).partition("\n")[0].partition(". ")[0]
        )  # without gloo's file name and advice
        raise RankLost(
            f"rank {ranks.rank} of {ranks.world_size} lost another one ({reason}): start the same command again, it goes on "
            "from the last checkpoint"
        ) from error
