"""The whole table: a teacher, then every method on every fraction with every seed. Finished runs are skipped, so it can be stopped and started."""
from __future__ import annotations

import dataclasses
from pathlib import Path

from fastvid import datasets
from fastvid.config import Grid, TrainConfig, method_parts
from fastvid.errors import InputError
from fastvid.train import train


def reproduce(grid: Grid, config: TrainConfig) -> None:
    """Train the grid into config.out; `config` holds what all its runs share.

    Without --teacher the teacher is trained first, on the full training split with seed 0. Raises as train does.
    """
    fractions = grid.fractions_of(config.dataset)
    students = tuple(method for method in grid.methods if method != "teacher")
    for method in students:
        method_parts(method)
    sizes = datasets.load(config.dataset, config.data, "train", download=config.download).class_sizes()
    per_class = {fraction: images_per_class(fraction, int(sizes.min())) for fraction in fractions}

    if config.teacher is None:
        (teacher,) = train(dataclasses.replace(config, method=("teacher",), per_class=None, seed=0))
        config = dataclasses.replace(config, teacher=str(Path(config.out) / teacher.weights))
    for seed in range(grid.seeds):  # seeds outermost: one whole table early, the spread later
        for fraction in fractions:
            if students:
                train(dataclasses.replace(config, method=students, per_class=per_class[fraction], seed=seed))


def images_per_class(fraction: str, class_size: int) -> int | None:
    """Images of each class in a fraction: None for "full", else that percent of the smallest class, rounded. Raises InputError below one."""
    if fraction == "full":
        return None
    count = round(class_size * float(fraction) / 100)
    if count < 1:
        raise InputError(f"--fractions {fraction}: {fraction} % of {class_size} images per class is less than one image: take more")
    return count
