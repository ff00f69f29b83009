"""Does VID diverge? Many short trainings with weights from 1 to 100, and other variants for comparison.

    python bench/stability.py OUT.jsonl --data DIR --teacher FILE --dataset digits --seeds 20
    python bench/stability.py OUT.jsonl --data DIR --teacher FILE --dataset cifar10 --seeds 20
    python bench/stability.py show OUT.jsonl...

Each group shares one teacher forward: VID with λ = 1, 3, 10, 30 and 100. Each training writes one row:
settings, reason and epoch of a divergence, accuracy after the last epoch, explained variance per tap, and the
share of hidden units that are zero on a batch of the evaluation split. `--variant fixed-floor` trains the
former variant: variances of at least 1/C at any learning rate, two hidden layers, taps after the activation,
batch norms with scale and shift. Rows that already exist are not computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from fastvid.config import FitNetOptions, TrainConfig, VIDOptions
from fastvid.environment import environment
from fastvid.folder import OutputFolder
from fastvid.group import Group
from fastvid.methods import Method, build, vid
from fastvid.student import Student, new_student
from fastvid.train import fit, set_up
from fastvid.wresnet import TAPS

WEIGHTS = (1, 3, 10, 30, 100)
SETTINGS = {
    "digits": {"epochs": 5, "batch_size": 32},
    "cifar10": {"epochs": 20, "batch_size": 128, "per_class": 100},
}


class FixedFloor(vid.VariationalInformation):
    """The former variant "paper": variances start at 0.3 and stay above 1/C, at any learning rate."""

    def __init__(self, options: VIDOptions, student, teacher):
        former = dataclasses.replace(
            vid.VARIANTS["paper"], taps=TAPS, activated=True, hidden_widths=lambda s, t: (2 * t, 2 * t)
        )
        super().__init__(options, student, teacher, former)
        self.loss._slopes = [1 / channels for channels in teacher.tap_channels]
        self.loss.learning_rate.fill_(1.0)
        self.loss.clip_gradients = lambda: None  # the former variant was not clipped
        for raw_scale, floor in zip(self.loss.raw_scales, self.loss._slopes):
            torch.nn.init.constant_(raw_scale, math.log(math.expm1(0.3 - floor)))
        for module in self.loss.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.affine = True
                module.weight = torch.nn.Parameter(torch.ones(module.num_features))
                module.bias = torch.nn.Parameter(torch.zeros(module.num_features))

    def set_learning_rate(self, value: float) -> None:
        """The floor does not depend on the learning rate."""


def build_fixed_floor(name: str, settings: TrainConfig, student, teacher) -> Method:
    return Method({"vid": FixedFloor(settings.vid, student, teacher)})


def students_of(setup, variant: str) -> list[Student]:
    """One student per weight. The variant `fitnet` multiplies the weights by 10."""
    found = []
    for weight in WEIGHTS:
        changes = {"method": ("vid",), "vid": VIDOptions(weight=float(weight))}
        if variant == "fitnet":
            changes = {"method": ("fitnet",), "fitnet": FitNetOptions(tap=("all",), weight=10.0 * weight)}
        elif variant == "authors":
            changes["vid"] = VIDOptions(variant="authors", weight=float(weight))
        settings = dataclasses.replace(setup.settings, **changes)
        make = build_fixed_floor if variant == "fixed-floor" else build
        name, classes = f"{settings.method[0]}-{weight}", len(setup.data.train.class_names)
        found.append(new_student(name, settings, classes, setup.teacher, setup.device, make))
    return found


@torch.no_grad()
def dead_units(student: Student, images: torch.Tensor) -> dict[str, float]:
    """Share of hidden units of each regressor that are zero at every position of these images."""
    if "vid" not in student.method.transfers:
        return {}
    term = student.method.transfers["vid"]
    student.module.eval()
    with student.module.autocast():
        maps = term._maps(student.network(images))
        hidden = [regressor.hidden(student_map) for regressor, student_map in zip(term.loss.regressors, maps)]
    shares = [round(float((units.amax(dim=(0, 2, 3)) <= 0).float().mean()), 3) for units in hidden]
    return dict(zip(term.variant.taps, shares))


def run(out: Path, config: TrainConfig, variant: str) -> None:
    """Train one group and append its rows."""
    threads = torch.get_num_threads()
    settings = config.resolved()
    base = {"dataset": config.dataset, "variant": variant, "seed": config.seed}
    base |= {"precision": config.precision, "batch_size": settings.batch_size, "threads": threads}
    lines = out.read_text().splitlines() if out.exists() else []
    if any(all(json.loads(line)[name] == value for name, value in base.items()) for line in lines):
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = OutputFolder(temporary)
        setup = set_up(dataclasses.replace(config, out=temporary), folder)
        group = Group(setup, students_of(setup, variant))
        everyone = list(group.students)
        diverged = {id(student): None for student in everyone}
        remove = group.remove_diverged

        def remember():
            found = remove()
            diverged.update({id(student): reason for student, reason in found})
            return found

        group.remove_diverged = remember
        fit(group, folder)
        images, _ = next(iter(group._evaluation))
        rows = []
        for student, weight in zip(everyone, WEIGHTS):
            reason = diverged[id(student)]
            row = base | {"weight": weight, "epochs": settings.epochs, "diverged": reason}
            row |= {"accuracy": None, "explained": None, "dead": None}
            if not reason:
                last = group.curves[student.name][-1]
                explained = {tap: values[0] for tap, values in last.information.items()}
                row |= {
                    "accuracy": last.accuracy,
                    "explained": explained,
                    "dead": dead_units(student, images),
                }
            here = environment(setup.device)
            rows.append(row | {name: here[name] for name in ("commit", "torch", "device")})
    with open(out, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def show(paths: list[Path]) -> str:
    """A Markdown table: number of diverged trainings per weight, for each data set, variant and precision."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    cells = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["dataset"], row["variant"], row["precision"], row["batch_size"], row["threads"])
        cells[key][row["weight"]].append(bool(row["diverged"]))
    table = ["| data set | variant | precision | batch | threads | " + " | ".join(map(str, WEIGHTS)) + " |"]
    table.append("|---|---|---|---:|---:|" + "---:|" * len(WEIGHTS))
    for key, by_weight in cells.items():
        counts = [f"{sum(by_weight[w])} of {len(by_weight[w])}" for w in WEIGHTS]
        table.append(f"| {' | '.join(map(str, key))} | {' | '.join(counts)} |")
    return "\n".join(table)


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        print(show([Path(path) for path in sys.argv[2:]]))
        return
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="data")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", choices=SETTINGS, required=True)
    parser.add_argument("--variant", choices=("paper", "authors", "fixed-floor", "fitnet"), default="paper")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "fp32", "fp16"), default="bf16")
    parser.add_argument("--batch-size", type=int)
    given = parser.parse_args()
    settings = SETTINGS[given.dataset] | ({"batch_size": given.batch_size} if given.batch_size else {})
    settings |= {name: getattr(given, name) for name in ("dataset", "data", "teacher", "precision")}
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        config = TrainConfig(seed=seed, evaluations=1, engine="eager", method=("vid",), **settings)
        run(given.out, config, given.variant)


if __name__ == "__main__":
    main()
