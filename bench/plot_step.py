"""Plot how the cost of a step scales, from rows of test_step.py.

python bench/plot_step.py ROWS.jsonl PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)

STUDENTS = "students in the group (VID, AT, FitNet, KD, plain)"
PANELS = {  # scale: (axis label, unit of the cost, function of a row that gives the divisor of the cost)
    "batch": ("batch size", "ms per image, one VID student", lambda row: int(row["impl"])),
    "students": (STUDENTS, "ms per step of 128 images", lambda row: 1),
    "width": ("width of the VID student, WRN-16", "ms per step of 128 images", lambda row: 1),
}


def main(rows: list[dict], picture: Path) -> None:
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 3.4), layout="constrained", dpi=150)
    for panel, (scale, (label, unit, divisor)) in zip(panels, PANELS.items()):
        points = [row for row in rows if row.get("scale") == scale]
        x = [int(row["impl"]) for row in points]
        middle, low, high = ([row["wall_us"][i] / 1000 / divisor(row) for row in points] for i in range(3))
        panel.plot(x, middle, "o-", color="#D55E00")
        panel.fill_between(x, low, high, color="#D55E00", alpha=0.2, linewidth=0)
        panel.set(xlabel=label, ylabel=unit, ylim=(0, None), xscale="log" if scale == "batch" else "linear")
        panel.set_xticks(x, x, minor=False)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    machine = f"{first['device']}, {first['threads']} threads"
    figure.suptitle(f"Cost of a step: {machine}, bf16 (median, 20-80 % of rounds)")
    figure.savefig(picture)


if __name__ == "__main__":
    main([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()], Path(sys.argv[2]))
