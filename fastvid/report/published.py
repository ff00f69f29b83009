"""Published accuracies of the same networks on CIFAR-10, to stand beside ours: WRN-40-2 teaches WRN-16-1."""

from __future__ import annotations

import math

from fastvid.report.section import Column, Section

# Top-1 in percent: {method: {percent of the training images: (paper, seed repository)}}.
# Paper: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019. Seed
# repository: the newest README of the public reimplementation that this project started from, mean of 3 runs
# after the last epoch; it reports neither VID nor a spread.
PUBLISHED: dict[str, dict[int, tuple[float | None, float | None]]] = {
    "teacher": {100: (94.26, 94.98)},
    "student": {100: (90.72, 91.22), 20: (84.67, 84.85), 10: (79.63, 80.29), 2: (58.84, 58.11)},
    "kd": {100: (91.27, 90.60), 20: (86.11, 84.13), 10: (82.23, 78.57), 2: (64.24, 59.63)},
    "fitnet": {100: (90.64, 91.61), 20: (84.78, 86.24), 10: (80.73, 82.74), 2: (68.90, 56.69)},
    "at": {100: (91.60, 91.85), 20: (87.26, 87.60), 10: (84.94, 84.70), 2: (73.40, 74.57)},
    "vid": {100: (91.85, None), 20: (89.73, None), 10: (88.09, None), 2: (81.59, None)},
}
NETWORKS = {"teacher_depth": 40, "teacher_width": 2, "student_depth": 16, "student_width": 1}


def is_published(section: Section, column: Column) -> bool:
    """Whether published numbers may stand beside this column: same data, split, subset and networks."""
    same_networks = all(run.config.get(name) == NETWORKS[name] for run in section.runs for name in NETWORKS)
    same_data = (section.dataset, section.evaluated_on) == ("cifar10", "test")
    return same_networks and same_data and _fraction(column) is not None


def published(section: Section, method: str, column: Column) -> tuple[float | None, float | None]:
    """(paper, seed repository); None where nothing was published."""
    if not is_published(section, column):
        return None, None
    return PUBLISHED.get(method, {}).get(_fraction(column) or 0, (None, None))


def _fraction(column: Column) -> int | None:
    fractions = PUBLISHED["student"]
    return next((f for f in fractions if math.isclose(column.percent, f, rel_tol=0.005)), None)
