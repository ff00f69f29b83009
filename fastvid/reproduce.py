"""The whole table: a teacher, then every method on every fraction with every seed.

Finished runs are skipped, so it can be stopped and started again. torchrun shares the grid out over its processes.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

from fastvid import distributed, results
from fastvid.checkpoint import sha256_of
from fastvid.config import Grid, TrainConfig, method_parts
from fastvid.distributed import Ranks
from fastvid.errors import InputError
from fastvid.progress import say
from fastvid.run import resume_file
from fastvid.train import load_data, load_split, train_group


def reproduce(grid: Grid, config: TrainConfig) -> bool:
    """Train the grid into config.out; `config` holds what all its runs share. Returns whether this process speaks for the job.

    Where a method wants a teacher and config.teacher gives none, one is trained first, on the full training split with seed 0.
    Under torchrun each process trains whole groups of its own, the first one the teacher. Raises as train does.
    """
    if config.teacher is not None and "teacher" in grid.methods:
        raise InputError("--teacher gives a teacher and --methods asks to train one: leave one of them out")
    students = tuple(method for method in grid.methods if method != "teacher")
    class_size = int(
        load_split(config.dataset, config.data, "train", download=config.download).class_sizes().min()
    )
    subsets = [images_per_class(fraction, class_size) for fraction in grid.fractions_of(config.dataset)]
    for per_class in subsets:  # what cannot be trained is said now, not after the hours of the teacher
        load_data(dataclasses.replace(config, per_class=per_class).resolved())

    ranks = distributed.join()
    config = dataclasses.replace(config, device=ranks.device(config.device))
    with (
        results.exclusive(results.open_folder(Path(config.out))) if ranks.first else nullcontext()
    ):  # for the whole grid
        if config.teacher is None and (any(map(method_parts, students)) or "teacher" in grid.methods):
            path = ranks.from_first(train_teacher(config, ranks) if ranks.first else None)
            config = dataclasses.replace(config, teacher=path)
        groups = [
            dataclasses.replace(
                config, method=students, per_class=per_class, seed=seed
            )  # seeds outermost: one whole table
            for seed in range(grid.seeds)
            for per_class in (subsets if students else ())
        ]  # early, the spread later
        for group in ranks.from_first(shares(groups, ranks.world_size, class_size))[ranks.rank]:
            train_group(group, ranks.alone())
        ranks.barrier()
    return ranks.first


def train_teacher(config: TrainConfig, ranks: Ranks) -> str:
    """Path of the teacher of this grid, trained unless it is there. Raises InputError when its weights are gone."""
    config = dataclasses.replace(config, method=("teacher",), per_class=None, seed=0)
    path, (found, _) = resume_file(config).with_suffix(".safetensors"), results.read(Path(config.out))
    taught_by = {run.teacher_sha256 for run in found} - {None}
    if (
        path.is_file()
        and taught_by == {sha256_of(path)}
        and not any(run.method == "teacher" for run in found)
    ):
        say(f"{path} taught the students of {results.FILE}, which has lost the result of it: taken as it is")
        return str(path)
    (teacher,) = train_group(config, ranks.alone())
    path = Path(config.out) / teacher.weights
    if not path.exists():
        raise InputError(
            f"{path} is gone, though {results.FILE} has its result: put it back, or take another --out"
        )
    return str(path)


def shares(groups: list[TrainConfig], count: int, class_size: int) -> list[list[TrainConfig]]:
    """The groups dealt to `count` ranks, so that each has about the same number of images to train on: the longest first, always to the
    rank that has least. What is finished counts nothing. Within a rank the order stays."""
    found, _ = results.read(Path(groups[0].out)) if groups else ([], None)
    finished = {(run.method, run.per_class, run.seed) for run in found}
    cost = {}
    for number, group in enumerate(groups):
        missing = sum((method, group.per_class, group.seed) not in finished for method in group.method)
        cost[number] = missing * group.resolved().epochs * (group.per_class or class_size)
    loads, dealt = [0] * count, [[] for _ in range(count)]
    for number in sorted(cost, key=lambda number: -cost[number]):
        rank = loads.index(min(loads))
        loads[rank] += cost[number]
        dealt[rank].append(number)
    return [[groups[number] for number in sorted(numbers)] for numbers in dealt]


def images_per_class(fraction: str, class_size: int) -> int | None:
    """Images of each class in a fraction: None for "full", else that percent of the smallest class, rounded. InputError below one."""
    if fraction == "full":
        return None
    count = round(class_size * float(fraction) / 100)
    if count < 1:
        raise InputError(
            f"--fractions {fraction}: {fraction} % of {class_size} images per class is less than one image: take more"
        )
    return count
