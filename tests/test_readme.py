"""The numbers in README.md are those of bench/results, rendered, never typed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import readme

from fastvid import results
from fastvid.report import report

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "bench" / "results"
FOLDERS = sorted(path.parent for path in MEASURED.glob(f"*/{results.FILE}"))


def test_what_the_readmes_say_was_measured_is_what_the_committed_results_give():
    first, whole = (page.read_text() for page in readme.PAGES)
    assert [readme.rendered(text) for text in (first, whole)] == [first, whole], "run python bench/readme.py"
    for name in ("speed", *(folder.name for folder in FOLDERS)):
        assert re.search(f"^<!-- {name}( table)? -->$", first + whole, re.MULTILINE), name
    assert "<!-- search -->\n| variant |" in whole


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_report_of_committed_results_is_the_one_beside_them(folder, tmp_path):
    shutil.copy(folder / results.FILE, tmp_path)
    report(tmp_path)
    for name in ("table.md", "table.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), f"run fastvid report {folder}"


@pytest.mark.parametrize(
    "folder",
    [*FOLDERS, *(path.parent for path in MEASURED.glob(f"*/*/{results.FILE}"))],
    ids=lambda path: path.name,
)
def test_committed_results_name_no_local_path_and_were_made_by_a_commit(folder):
    found, notes = results.read(folder)
    assert found and not notes
    for run in found:
        paths = [run.config["out"], run.config["data"], run.config["teacher"] or ""]
        assert not any(Path(path).is_absolute() for path in paths), run.key()
        assert run.environment["commit"] and not run.environment["commit"].endswith("-dirty"), run.key()


def test_how_fast_the_loaders_are_is_what_the_committed_rows_say():
    rows = [json.loads(line) for line in (MEASURED / "loader-cpu.jsonl").read_text().splitlines()]
    ratio = {row["impl"]: round(row["of_torchvision"]) for row in rows if row["op"] == "loader"}
    text = " ".join((ROOT / "fastvid" / "README.md").read_text().split())
    ratios = f"DALI gave {ratio['dali']} times and PyTorch {ratio['torch']} times"
    assert f"{ratios} the images/s of a torchvision DataLoader" in text
    assert not any(row["quick"] for row in rows) and {row["threads"] for row in rows} == {2}


def test_the_rows_of_the_step_are_one_whole_run():
    rows = [json.loads(line) for line in (MEASURED / "step-cpu.jsonl").read_text().splitlines()]
    assert not any(row["quick"] for row in rows) and {row["threads"] for row in rows} == {2}
    assert len({row["commit"] for row in rows}) == 1
