"""Variants of the methods side by side, from one teacher forward: the search for weights, and what VID is made of.

    python bench/variants.py search --data DIR --teacher FILE --out DIR       on held-out training images
    python bench/variants.py ablations --data DIR --teacher FILE --out DIR    on the test split: nothing is chosen by it
    python bench/variants.py show DIR...                                      what has been measured, as a table

The first 100 images of each class of CIFAR-10, 200 epochs. The search evaluates on the next 400 images of each class of the training split.
Each variant is a run of fastvid's in a folder of its own, OUT/NAME, with its results.jsonl; where a loss was not finite any more, a file
OUT/NAME.diverged-seedN says so. The same command goes on where it was stopped.
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
from fastvid.device import choose_device, tune
from fastvid.distributed import ALONE
from fastvid.engine import choose_engine
from fastvid.errors import InputError, Interrupted
from fastvid.methods import vid
from fastvid.plan import BatchPlan
from fastvid.run import Run, find_finished
from fastvid.train import load_data, load_teacher, summary, train_side_by_side
from fastvid.wresnet import TAPS

PAPER = vid.VARIANTS["paper"]
CHANGED = {  # what an ablation changes of the variant "paper"
    **{f"only-{tap}": {"taps": (tap,)} for tap in TAPS},
    "no-stem": {"taps": TAPS[1:]},
    "residual-sums": {"activated": False},
    "no-batch-norm": {"batch_norm": False},
    "narrow": {"hidden_multiples": (1, 1)},
    "one-hidden-layer": {"hidden_multiples": (2,)},
    "linear": {"hidden_multiples": ()},
    "decayed-variance": {"decayed_scale": True},
    **{f"fixed-variance-{value}": {"initial_variance": value} for value in (1, 0.3, 0.1)},
    "fixed-variance-twice-least": {"initial_variance": 0},
    "initial-variance-5": {"initial_variance": 5},
    "no-floor": {"floor": 0.0},
}
# what the search tried before it had a floor
SEARCHED = {f"no-floor-from-{value}": {"floor": 0.0, "initial_variance": value} for value in (5, 1, 0.3)}


def choices(method: str, *settings: dict) -> dict[str, TrainConfig]:
    """A configuration of `method` for each of these settings of its options, named after them."""
    kind = type(getattr(TrainConfig(), method))
    return {
        "-".join(
            (
                method,
                *(value if option == "variant" else f"{option}-{value}" for option, value in chosen.items()),
            )
        ): TrainConfig(method=(method,), **{method: kind(**chosen)})
        for chosen in settings
    }


EXPERIMENTS = {
    # Ten choices for each method: a coarse grid, then twice what looked promising after it.
    "search": {
        **choices(
            "kd",
            *({"alpha": value} for value in (0.5, 0.7, 0.9, 0.97, 1)),
            *({"temperature": value} for value in (2, 3, 6, 8)),
            {"alpha": 1, "temperature": 6},
        ),
        **choices(
            "fitnet",
            *({"weight": value} for value in (0.3, 1, 3, 10, 100, 1000)),
            {"tap": "group1", "weight": 1},
            *({"tap": "group3", "weight": value} for value in (1, 3)),
            {"schedule": "two-stage", "weight": 1},
        ),
        **choices(
            "at",
            *({"weight": value} for value in (100, 300, 500, 700, 1000, 1500, 2000, 3000, 10000, 100000)),
        ),
        **choices(
            "vid",
            *({"variant": "no-floor-from-5", "weight": value} for value in (1, 3, 10, 30)),
            *({"variant": "no-floor-from-1", "weight": value} for value in (3, 10)),
            *({"variant": "no-floor-from-0.3", "weight": value} for value in (3, 10)),
            *({"variant": "paper", "weight": value} for value in (10, 30)),
        ),
    },
    "ablations": choices(
        "vid",
        *({"variant": name} for name in ("paper", "repdistiller")),
        *({"weight": value} for value in (1, 3)),
        *({"variant": name, "weight": 10} for name in CHANGED),
    ),
}


def train(experiment: str, out: Path, only: tuple[str, ...] = (), **shared) -> None:
    """All variants of an experiment, or only those whose names begin so, in one group. shared: settings of all of them, such as seed."""
    if unknown := [
        start for start in only if not any(name.startswith(start) for name in EXPERIMENTS[experiment])
    ]:
        raise InputError(
            f"{experiment} has no variant {unknown[0]}...: choose from {', '.join(EXPERIMENTS[experiment])}"
        )
    vid.VARIANTS.update(
        {name: dataclasses.replace(PAPER, **changes) for name, changes in (CHANGED | SEARCHED).items()}
    )
    held_out = (
        {"per_class": 500, "validation_per_class": 400} if experiment == "search" else {"per_class": 100}
    )
    shared = {"epochs": 200, "evaluations": 4, **held_out, **shared}
    base = TrainConfig(**shared).resolved()
    configs = {
        name: dataclasses.replace(config, **shared, out=str(out / name)).resolved()
        for name, config in EXPERIMENTS[experiment].items()
        if name.startswith(only or "")
    }
    device = choose_device(base.device)
    tune(device)
    data = load_data(base)
    teacher, sha256 = load_teacher(dataclasses.replace(base, method=("vid",)), data.train)
    steps = base.epochs * BatchPlan(len(data.train), base.batch_size, seed=base.seed).steps_per_epoch
    engine = choose_engine(base.engine, device, steps)

    def waits(name: str) -> bool:
        """Neither finished nor diverged."""
        folder = results.open_folder(out / name)
        return not diverged(folder, base.seed).exists() and not find_finished(
            configs[name], data, sha256, results.read(folder)[0]
        )

    while waiting := [name for name in configs if waits(name)]:
        runs = {name: Run(configs[name], data, teacher, sha256, device, engine) for name in waiting}
        for name, run in runs.items():
            if "fixed-variance" in name:
                run.learner.method.transfers["vid"].loss.raw_scales.requires_grad_(False)
        position = min(run.position for run in runs.values())
        group = {name: run for name, run in runs.items() if run.position == position}
        try:
            train_side_by_side(list(group.values()), base, data, teacher, device, engine, ALONE)
        except InputError as error:
            lost = [name for name, run in group.items() if run.learner.has_failed()]
            if not lost:
                raise
            for name in lost:
                diverged(out / name, base.seed).write_text(f"{error}\n")
            continue
        for name, run in group.items():
            print(f"{name}: {summary(run.finish(None))}", flush=True)


def diverged(folder: Path, seed: int) -> Path:
    """The file beside its folder that says that this variant did not get to its end."""
    return folder.with_name(f"{folder.name}.diverged-seed{seed}")


def show(folders: list[Path]) -> str:
    """A table in the order of EXPERIMENTS: name, accuracy after the last epoch, mean ± standard deviation and number of runs."""
    accuracies = defaultdict(list)
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.is_dir():
            accuracies[path.name] += [run.accuracy for run in results.read(path)[0]]
        elif ".diverged-seed" in path.name:
            accuracies[path.name.partition(".diverged-seed")[0]].append(None)
    order = [name for configs in EXPERIMENTS.values() for name in configs]
    rows = ["| variant | accuracy % |", "|---|---:|"]
    for name in sorted(accuracies, key=lambda name: order.index(name) if name in order else len(order)):
        values = accuracies[name]
        reached = [value for value in values if value is not None]
        spread = f" ± {statistics.stdev(reached):.2f}" if len(reached) > 1 else ""
        told = [f"{statistics.mean(reached):.2f}{spread} ({len(reached)})"] if reached else []
        told += [f"diverged ({len(values) - len(reached)})"] if len(reached) < len(values) else []
        rows.append(f"| {name} | {', '.join(told) or 'not finished'} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for experiment in EXPERIMENTS:
        command = commands.add_parser(experiment)
        for option in ("--data", "--teacher", "--out"):
            command.add_argument(option, required=True)
        command.add_argument("--seeds", type=int, default=1)
        command.add_argument(
            "--only", nargs="+", default=(), metavar="NAME", help="variants whose names begin so"
        )
    commands.add_parser("show").add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "show":
        print(show(given.folders))
        return
    try:
        for seed in range(given.seeds):
            train(
                given.command,
                Path(given.out),
                tuple(given.only),
                data=given.data,
                teacher=given.teacher,
                seed=seed,
            )
    except (InputError, Interrupted) as stopped:
        sys.exit(str(stopped))


if __name__ == "__main__":
    main()
