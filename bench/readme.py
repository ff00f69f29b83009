"""Write the measured numbers into README.md and bench/results/README.md.

    python bench/readme.py

Each rendered part of a page lies between `<!-- NAME -->` and `<!-- end -->`. The part `speed` comes from the
rows of test_step.py, `search` comes from the folders of bench/variants.py, and any other part
comes from the folder bench/results/NAME, as `fastvid report` renders it. `<!-- NAME table -->` is the table
without the sentences.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import variants

from fastvid import results
from fastvid.report.section import sections
from fastvid.report.table import markdown

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", MEASURED / "README.md")


def accuracies(name: str, alone: bool) -> str:
    """The table of last epochs of a folder with one data set; unless `alone`, also differences and notes."""
    (section,) = sections(results.read(MEASURED / name)[0])
    blocks = markdown(section).strip().split("\n\n")
    tables = {sentence: rows for sentence, rows in zip(blocks, blocks[1:]) if rows.startswith("|")}
    if alone:
        return next(iter(tables.values()))
    parts = [
        f"{sentence}:\n\n{rows}"
        for sentence, rows in tables.items()
        if sentence.startswith("Last epoch") or (sentence.startswith("Paired difference") and "±" in rows)
    ]
    return "\n\n".join([*parts, blocks[-1]])


def speed() -> str:
    """The speed-up of each optimisation, from the rows of one run."""
    rows = [json.loads(line) for line in (MEASURED / "step-cpu.jsonl").read_text().splitlines()]
    subjects = ("vid", "five methods")
    gain = {(row["tap"], row["impl"]): row["speed_up"] for row in rows}
    rungs = [row["impl"] for row in rows if row["tap"] == subjects[0]]
    best = {
        name: " and ".join(f"{gain[name, rung]:.1f}" for rung in ("tuned", "compile")) for name in subjects
    }
    (device,), (threads,) = {row["device"] for row in rows}, {row["threads"] for row in rows}
    lines = [
        f"On {threads} cores of an {device}, in one run, beside that plain step: one VID student "
        f"{best['vid']} times the images/s, eager and compiled; a group of five methods "
        f"{best['five methods']} times.",
        "",
        "| measure | VID | five methods |",
        "|---|---:|---:|",
    ]
    for rung in rungs:
        lines.append(f"| {rung} | {' | '.join(f'{gain[name, rung]:.2f}x' for name in subjects)} |")
    return "\n".join(lines)


def rendered(text: str) -> str:
    """The text of a page, with its measured parts rendered again."""

    def part(match: re.Match) -> str:
        name, alone = match[1], bool(match[2])
        if name == "speed":
            measured = speed()
        elif name in variants.EXPERIMENTS:
            measured = variants.show([MEASURED / name])
        else:
            measured = accuracies(name, alone)
        return f"<!-- {name}{match[2] or ''} -->\n{measured}\n<!-- end -->"

    block = r"^<!-- ([\w-]+)( table)? -->\n(?:(?!<!-- ).*\n)*?<!-- end -->$"
    return re.sub(block, part, text, flags=re.MULTILINE)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
