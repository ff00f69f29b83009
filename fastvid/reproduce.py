"""The grid: a teacher, then every method on every fraction of the data with every seed.

Finished runs are skipped, so the same command resumes. Several processes, on one machine or many (torchrun,
Slurm), share the grid: each process claims the next free group in the same output folder.
"""

from __future__ import annotations

import dataclasses

from fastvid import datasets, results
from fastvid.checkpoint import sha256_of
from fastvid.config import Grid, TrainConfig, method_parts
from fastvid.errors import InputError
from fastvid.folder import OutputFolder, weights_name
from fastvid.progress import say
from fastvid.results import RunResult
from fastvid.train import load_data, train_group


def reproduce(grid: Grid, config: TrainConfig) -> list[RunResult] | None:
    """Train the grid into config.out. `config` holds the settings that all runs share.

    Without config.teacher, and if a method needs a teacher, a teacher is trained first, on the full training
    split with seed 0. Returns all results in the folder, or None if other processes still train a part of
    the grid. Raises the errors of `train`.
    """
    if config.teacher is not None and "teacher" in grid.methods:
        raise InputError("--teacher gives a teacher and --methods asks to train one: leave one of them out")
    students = tuple(method for method in grid.methods if method != "teacher")
    whole = datasets.load_once(config.dataset, config.data, "train", download=config.download)
    class_size = int(whole.class_sizes().min())
    subsets = [images_per_class(fraction, class_size) for fraction in grid.fractions_of(config.dataset)]
    for per_class in subsets:  # finds errors now, not after hours of training the teacher
        load_data(dataclasses.replace(config, per_class=per_class).resolved())
    folder = OutputFolder(config.out)
    if config.teacher is None and (any(map(method_parts, students)) or "teacher" in grid.methods):
        config = dataclasses.replace(config, teacher=train_teacher(config, folder))
    groups = [  # seeds in the outer loop: the whole table with one seed comes first
        dataclasses.replace(config, method=students, per_class=per_class, seed=seed)
        for seed in range(grid.seeds)
        for per_class in (subsets if students else ())
    ]
    for group in groups:
        with folder.claim(group) as free:
            if free:
                train_group(group, folder)
    # A student that diverged and was trained again with other settings has two lines: the last one counts.
    found = list({run.key(): run for run in results.read(folder.path)[0]}.values())
    wanted = {(method, group.per_class, group.seed) for group in groups for method in students}
    missing = wanted - {(run.method, run.per_class, run.seed) for run in found}
    if missing:
        say(f"other processes still train {len(missing)} runs: the last process prints the table")
        return None
    return found


def train_teacher(config: TrainConfig, folder: OutputFolder) -> str:
    """Path of the teacher of this grid, trained here if necessary. Raises InputError if the file is lost."""
    config = dataclasses.replace(config, method=("teacher",), per_class=None, seed=0)
    path = folder.path / weights_name(config, "teacher")
    with folder.claim(config, wait=True):  # the other processes wait until one process has trained it
        found, _ = results.read(folder.path)
        used = {run.teacher_sha256 for run in found} - {None}
        if path.is_file() and used == {sha256_of(path)} and not any(run.method == "teacher" for run in found):
            say(f"using {path}: the teacher of the results here, although its result line is missing")
            return str(path)
        (teacher,) = train_group(config, folder)
    if teacher.diverged:
        raise InputError(
            f"the teacher diverged in {teacher.diverged}: lower --learning-rate, or give --teacher FILE"
        )
    if not path.exists():
        raise InputError(
            f"{path} is gone, but {results.FILE} has its result: put the file back, or give another --out"
        )
    return str(path)


def images_per_class(fraction: str, class_size: int) -> int | None:
    """Images of each class in a fraction: None for "full", else that percent of the smallest class, rounded.

    Raises InputError if the result is less than one image.
    """
    if fraction == "full":
        return None
    count = round(class_size * float(fraction) / 100)
    if count < 1:
        raise InputError(
            f"--fractions {fraction}: {fraction} % of {class_size} images per class is less than one image: "
            "take more"
        )
    return count
