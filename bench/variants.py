"""Train variants of the methods together, with one teacher forward: search for weights, ablations of VID.

    python bench/variants.py EXPERIMENT --data DIR --teacher FILE --out DIR
    python bench/variants.py show DIR...        prints the results as a table

    search           settings of kd, fitnet and at, evaluated on held-out training images
    vid-or-fitnet    VID against FitNet on the same taps, evaluated on the same images, with fewer epochs
    ablations        parts of VID, evaluated on the test split; no setting is chosen by this experiment

All experiments train on the first 100 images of each class of CIFAR-10. The held-out images are the next 400
images of each class of the training split. Each variant has its own output folder, OUT/NAME. The same command
resumes an interrupted experiment.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from fastvid import results
from fastvid.config import TrainConfig
from fastvid.errors import InputError, Interrupted
from fastvid.folder import OutputFolder, find_finished
from fastvid.group import Group, Setup
from fastvid.methods import Method, build
from fastvid.methods.vid import VARIANTS, VariationalInformation
from fastvid.student import Student, new_student
from fastvid.train import fit, set_up, summary
from fastvid.wresnet import TAPS

CHANGES = {  # name: changes to the variant "paper"
    **{f"only-{tap}": {"taps": (tap,)} for tap in TAPS},
    "no-stem": {"taps": TAPS[1:]},
    "activated": {"activated": True},
    "no-batch-norm": {"batch_norm": False},
    "linear": {"hidden_widths": lambda s, t: ()},
    "narrow": {"hidden_widths": lambda s, t: (t,)},
    "two-hidden-layers": {"hidden_widths": lambda s, t: (2 * t, 2 * t)},
    "decayed-variance": {"decayed_scale": True},
    "from-1": {"initial_variance": 1.0},
    "from-5": {"initial_variance": 5.0},
    # fixed variances: FitNet on the same four taps, with the same regressors and optimizer
    **{
        f"fixed-{value}": {"initial_variance": value, "learned": False}
        for value in (3, 1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
    },
}


def choices(method: str, *settings: dict) -> dict[str, TrainConfig]:
    """A configuration of `method` for each of these settings of its options, named after the settings."""
    kind = type(getattr(TrainConfig(), method))
    found = {}
    for chosen in settings:
        parts = (
            f"{option}-{'+'.join(value) if isinstance(value, tuple) else value}"
            for option, value in chosen.items()
        )
        found["-".join((method, *parts))] = TrainConfig(method=(method,), **{method: kind(**chosen)})
    return found


def variants_of_vid(weight: float, *names: str) -> dict[str, TrainConfig]:
    """VID with this weight and each of these entries of CHANGES; "" means no change."""
    (config,) = choices("vid", {"weight": float(weight)}).values()
    return {f"vid-{name}-weight-{weight:g}".replace("--", "-"): config for name in names}


FIXED = tuple(name for name in CHANGES if name.startswith("fixed-"))
EXPERIMENTS = {
    # Ten choices for each method: first a coarse grid, then finer values around the best choices.
    "search": choices("kd", *({"alpha": value} for value in (0.5, 0.7, 0.9, 0.97, 1)))
    | choices("kd", *({"temperature": value} for value in (2, 3, 6, 8)), {"alpha": 1, "temperature": 6})
    | choices("fitnet", *({"weight": value} for value in (0.3, 1, 3, 10, 100, 1000)))
    | choices(
        "fitnet", *({"tap": (f"group{tap}",), "weight": value} for tap, value in ((1, 1), (3, 1), (3, 3)))
    )
    | choices("fitnet", {"schedule": "two-stage", "weight": 1})
    | choices("at", *({"weight": value} for value in (100, 300, 500, 700, 1000)))
    | choices("at", *({"weight": value} for value in (1500, 2000, 3000, 10000, 100000))),
    # VID against FitNet on the same taps: ten choices each
    "vid-or-fitnet": variants_of_vid(1, "")
    | variants_of_vid(3, "")
    | variants_of_vid(10, "", "activated", "from-1")
    | variants_of_vid(30, "", "activated", "from-1")
    | variants_of_vid(100, "", "activated")
    | variants_of_vid(30, *FIXED),
    "ablations": variants_of_vid(30, "", *(name for name in CHANGES if name not in FIXED))
    | variants_of_vid(1, "")
    | variants_of_vid(10, "")
    | variants_of_vid(100, ""),
}
SETTINGS = {
    "search": {"per_class": 500, "validation_per_class": 400, "epochs": 200, "evaluations": 4},
    "vid-or-fitnet": {"per_class": 500, "validation_per_class": 400, "epochs": 50, "evaluations": 4},
    "ablations": {"per_class": 100, "epochs": 200, "evaluations": 4},
}


def student_of(name: str, config: TrainConfig, setup: Setup) -> Student:
    """The student of one variant. Its name selects an entry of CHANGES."""
    changes = CHANGES.get(name.removeprefix("vid-").rpartition("-weight-")[0])

    def build_variant(method: str, settings: TrainConfig, student, teacher) -> Method:
        if changes is None:
            return build(method, settings, student, teacher)
        variant = dataclasses.replace(VARIANTS["paper"], **changes)
        return Method({"vid": VariationalInformation(settings.vid, student, teacher, variant)})

    num_classes = len(setup.data.train.class_names)
    return new_student(name, config, num_classes, setup.teacher, setup.device, build_variant)


def train(experiment: str, out: Path, only: tuple[str, ...] = (), **shared) -> None:
    """Train the variants of an experiment in one group.

    only: if given, only variants whose names begin with one of these texts.
    shared: settings of all variants, such as the seed.
    """
    names = EXPERIMENTS[experiment]
    if unknown := [start for start in only if not any(name.startswith(start) for name in names)]:
        raise InputError(f"{experiment} has no variant {unknown[0]}...: choose from {', '.join(names)}")
    shared = {**SETTINGS[experiment], **shared}
    folder = OutputFolder(out / ".resume")
    setup = set_up(TrainConfig(**shared, method=("vid",), out=str(out / ".resume")), folder)
    folders, configs = {}, {}
    for name, config in names.items():
        if not name.startswith(only or ""):
            continue
        config = dataclasses.replace(config, **shared, out=str(out / name)).resolved()
        folders[name] = OutputFolder(out / name)
        if not find_finished(
            setup._replace(request=config, settings=config), results.read(folders[name].path)[0]
        ):
            configs[name] = config
    waiting = list(configs)
    begun = [name for name in folder.saved_students(setup.settings) if name in waiting]
    for together in filter(None, (begun, [name for name in waiting if name not in begun])):
        group = Group(setup, [student_of(name, configs[name], setup) for name in together])
        folder.load(group)
        fit(group, folder, record_divergence=lambda *found: folders[found[1].name].record_divergence(*found))
        for student in group.students:
            result = folders[student.name].finish_student(group, student)
            print(f"{student.name}: {summary(result)}", flush=True)
        folder.resume_path(setup.settings).unlink(missing_ok=True)


def show(folders: list[Path]) -> str:
    """A table in the order of EXPERIMENTS: name, and mean ± standard deviation of the last epoch's accuracy.

    The number of runs stands in parentheses.
    """
    found = defaultdict(list)
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.is_dir() and not path.name.startswith("."):
            found[path.name] += results.read(path)[0]
    order = [name for configs in EXPERIMENTS.values() for name in configs]
    rows = ["| variant | accuracy % |", "|---|---:|"]
    for name in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
        reached = [run.accuracy for run in found[name] if not run.diverged]
        lost = len(found[name]) - len(reached)
        spread = f" ± {statistics.stdev(reached):.2f}" if len(reached) > 1 else ""
        told = [f"{statistics.mean(reached):.2f}{spread} ({len(reached)})"] if reached else []
        told += [f"diverged ({lost})"] if lost else []
        rows.append(f"| {name} | {', '.join(told) or 'not finished'} |")
    return "\n".join(rows)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for experiment in EXPERIMENTS:
        command = commands.add_parser(experiment)
        for option in ("--data", "--teacher", "--out"):
            command.add_argument(option, required=True)
        command.add_argument("--seeds", type=int, default=1)
        command.add_argument("--epochs", type=int)
        meaning = "only variants whose names begin with NAME"
        command.add_argument("--only", nargs="+", default=(), metavar="NAME", help=meaning)
    commands.add_parser("show").add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "show":
        print(show(given.folders))
        return
    shared = {"data": given.data, "teacher": given.teacher}
    shared |= {"epochs": given.epochs} if given.epochs else {}
    try:
        for seed in range(given.seeds):
            train(given.command, Path(given.out), tuple(given.only), seed=seed, **shared)
    except (InputError, Interrupted) as stopped:
        sys.exit(str(stopped))


if __name__ == "__main__":
    main()
