"""The whole table: a teacher, then every method on every fraction with every seed.

Finished runs are skipped, so it can be stopped and started again.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path

from fastvid import results
from fastvid.config import Grid, TrainConfig, method_parts
from fastvid.errors import InputError
from fastvid.train import load_data, load_split, train


def reproduce(grid: Grid, config: TrainConfig) -> None:
    """Train the grid into config.out; `config` holds what all its runs share.

    Where a method wants a teacher and config.teacher gives none, one is trained first, on the full training split with seed 0.
    Raises as train does.
    """
    if config.teacher is not None and "teacher" in grid.methods:
        raise InputError("--teacher gives a teacher and --methods asks to train one: leave one of them out")
    students = tuple(method for method in grid.methods if method != "teacher")
    class_size = int(load_split(config.dataset, config.data, "train", download=config.download).class_sizes().min())
    subsets = [images_per_class(fraction, class_size) for fraction in grid.fractions_of(config.dataset)]
    for per_class in subsets:  # what cannot be trained is said now, not after the hours of the teacher
        load_data(dataclasses.replace(config, per_class=per_class).resolved())

    with results.exclusive(results.open_folder(Path(config.out))):  # for the whole grid
        if config.teacher is None and (any(map(method_parts, students)) or "teacher" in grid.methods):
            (teacher,) = train(dataclasses.replace(config, method=("teacher",), per_class=None, seed=0))
            path = Path(config.out) / teacher.weights
            if not path.exists():
                raise InputError(f"{path} is gone, though {results.FILE} has its result: put it back, or take another --out")
            config = dataclasses.replace(config, teacher=str(path))
        for seed in range(grid.seeds):  # seeds outermost: one whole table early, the spread later
            for per_class in subsets if students else ():
                train(dataclasses.replace(config, method=students, per_class=per_class, seed=seed))


def images_per_class(fraction: str, class_size: int) -> int | None:
    """Images of each class in a fraction: None for "full", else that percent of the smallest class, rounded. InputError below one."""
    if fraction == "full":
        return None
    count = round(class_size * float(fraction) / 100)
    if count < 1:
        raise InputError(f"--fractions {fraction}: {fraction} % of {class_size} images per class is less than one image: take more")
    return count
