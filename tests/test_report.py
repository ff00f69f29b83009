"""Tables, CSV and plots come from JSON lines alone: every test writes lines and reads what was rendered."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from fastvid import report as report_package
from fastvid import results
from fastvid.config import ATOptions, FitNetOptions, KDOptions, TrainConfig, VIDOptions
from fastvid.errors import InputError
from fastvid.report import report, table
from fastvid.report.section import sections
from fastvid.results import Evaluation, RunResult

CLASS_SIZE = {"cifar10": 5000, "cifar100": 500, "digits": 140}
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}
MEASURED = Path(__file__).resolve().parents[1] / "bench" / "results"
PLOTS = {f"{name}.{kind}" for name in ("curves", "accuracy") for kind in ("png", "svg", "pdf")}
TABLES = {"table.md", "table.csv", "runs.csv"}


def run(
    method: str,
    accuracy: float,
    *,
    per_class: int | None = None,
    dataset: str = "digits",
    seed: int = 0,
    best: float | None = None,
    held_out: int = 0,
    seconds: float = 10.0,
    group: list[str] | None = None,
    teacher: float | None = None,
    **settings,
) -> RunResult:
    """A finished run. `teacher`: accuracy of a given teacher; `held_out`: images per class for validation."""
    settings = {"protocol": "seed", "epochs": 4, "batch_size": 128} | settings
    settings |= {"per_class": per_class, "seed": seed, "validation_per_class": held_out}
    config = TrainConfig(dataset=dataset, method=(method,), **settings).resolved()
    size, epochs = per_class or CLASS_SIZE[dataset], config.epochs
    return RunResult(
        dataset=dataset,
        method=method,
        percent=100 * size / CLASS_SIZE[dataset],
        per_class=per_class,
        seed=seed,
        accuracy=accuracy,
        best_accuracy=accuracy if best is None else best,
        evaluated_on="validation" if held_out else "test",
        train_images=(size - held_out) * CLASSES[dataset],
        steps=40,
        seconds=seconds,
        images_per_second=100.0,
        group=group or [method],
        history=[Evaluation(e, accuracy * e / epochs, 1.0, 0.5, {}) for e in range(1, epochs + 1)],
        weights=f"{method}.safetensors",
        weights_sha256="1" * 64,
        data_sha256="d" * 64,
        teacher_sha256=None if teacher is None else "1" * 64,
        teacher_accuracy=teacher,
        config=json.loads(json.dumps(dataclasses.asdict(config))),
        environment={"torch": "2.10.0", "device": "a processor"},
    )


def diverged(method: str, **settings) -> RunResult:
    lost = {"accuracy": None, "best_accuracy": None, "weights": "", "weights_sha256": ""}
    return dataclasses.replace(run(method, 50.0, **settings), **lost, diverged="epoch 3: transfer loss inf")


def written(folder: Path, *runs: RunResult) -> Path:
    folder.mkdir(exist_ok=True)
    for one in runs:
        results.append(folder, one)
    return folder


def rendered(folder: Path, *runs: RunResult) -> str:
    """table.md of these runs, with the CSV files beside; without the plots, which take a second."""
    parts = sections(results.read(written(folder, *runs))[0])
    (folder / "table.csv").write_text(table.as_csv(parts))
    (folder / "runs.csv").write_text(table.runs_csv(parts))
    return "\n".join(map(table.markdown, parts))


def rows_of(markdown: str, table: int = 0) -> dict[str, list[str]]:
    """{first cell: other cells} of one of the tables, without the bold face."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown.replace("**", ""), flags=re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[table].splitlines()]
    return {line[0]: line[1:] for line in lines if not line[0].startswith("--")}


def csv_rows(folder: Path, name: str = "table.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_small_table_is_rendered_to_the_byte(tmp_path):
    settings = {"dataset": "cifar10", "per_class": 100, "epochs": 1000, "teacher": 92.47}
    settings |= {"group": ["student", "vid"], "vid": VIDOptions(variant="paper", weight=10.0)}
    markdown = rendered(
        tmp_path,
        run("student", 57.0, **settings),
        run("vid", 72.0, best=73.5, **settings),
        run("student", 58.0, seed=1, **settings),
        run("vid", 74.0, best=74.25, seed=1, **settings),
    )
    assert (
        markdown
        == """\
# CIFAR-10: accuracy on the test split, in percent

Last epoch: mean ± sample standard deviation over seeds (number of seeds)

| Method           |  2 % (100 per class) | paper | seed repo |
|------------------|---------------------:|------:|----------:|
| Student WRN-16-1 |     57.50 ± 0.71 (2) | 58.84 |     58.11 |
| VID              | **73.00 ± 1.41 (2)** | 81.59 |         – |

Best epoch, mean over seeds: chosen on the test split, therefore not a result

| Method           | 2 % (100 per class) |
|------------------|--------------------:|
| Student WRN-16-1 |               57.50 |
| VID              |               73.88 |

Paired difference on the same batches: mean ± sample standard deviation (number of seeds)

| Method | 2 % (100 per class), minus Student |
|--------|-----------------------------------:|
| VID    |                  +15.50 ± 0.71 (2) |

- Data set CIFAR-10, test split, 2 seeds (0, 1). The last epoch is the headline. –: not run here, or never \
published.
- Protocol `seed`: 1000 epochs on 2 %; batch size 128; bf16.
- Teacher WRN-40-2 was given, not trained here: 92.47 on the test split.
- VID: variant paper, weight 10.0.
- paper: Ahn et al., CVPR 2019, number of epochs unknown. seed repo: its newest README, mean of 3 runs, \
protocol `seed`: 200 epochs on 100 %, 1000 on less, batch size 128. Ours have the epochs and the batch size \
of the seed repository; the paper's may differ.
- Trained on a processor, torch 2.10.0: 20 s of training, without start-up and evaluation.
"""
    )


def test_the_csv_files_are_rendered_to_the_byte(tmp_path):
    settings = {"dataset": "cifar10", "per_class": 100, "epochs": 1000, "seconds": 12.5}
    first = dataclasses.replace(
        run("vid", 72.0, best=73.0, **settings), date="2026-01-02", command="fastvid train"
    )
    lines = (
        first,
        run("vid", 73.0, best=74.0, seed=1, **settings),
        diverged("kd+at"),
        diverged("vid", seed=2, **settings),
    )
    rendered(tmp_path, *lines)
    assert (tmp_path / "table.csv").read_text() == (
        "dataset,evaluated_on,method,settings,per_class,percent,n,mean,sd,best_mean,diverged,paper,seed_repository,"
        "epochs,seconds,minus_student,minus_student_sd,minus_at,minus_at_sd\n"
        "cifar10,test,vid,,100,2,2,72.5000,0.7071,73.5000,1,81.59,,1000,37.5,,,,\n"
        "digits,test,kd+at,,,100,0,,,,1,,,4,10.0,,,,\n"
    )
    assert (tmp_path / "runs.csv").read_text().splitlines()[:2] == [
        "dataset,method,percent,per_class,seed,accuracy,best_accuracy,evaluated_on,train_images,steps,seconds,"
        "images_per_second,weights,weights_sha256,data_sha256,teacher_sha256,teacher_accuracy,preparation_seconds,"
        "evaluation_seconds,checkpoint_seconds,peak_memory,diverged,title,colour,date,command,settings,epochs,"
        "device,commit",
        f"cifar10,vid,2.0,100,0,72.0,73.0,test,1000,40,12.5,100.0,vid.safetensors,{'1' * 64},{'d' * 64},"
        ",,,,,,,,,2026-01-02,fastvid train,,1000,a processor,",
    ]
    assert [row["diverged"] for row in csv_rows(tmp_path, "runs.csv")][2:] == [
        "epoch 3: transfer loss inf"
    ] * 2


def test_methods_are_compared_seed_by_seed(tmp_path):
    accuracies = {"student": (50.0, 60.0, 55.0), "at": (61.0, 72.0), "vid": (71.0, 84.0, 75.0, 99.0)}
    every = [
        (method, seed, value) for method, found in accuracies.items() for seed, value in enumerate(found)
    ]
    markdown = rendered(tmp_path, *(run(method, value, seed=seed) for method, seed, value in every))
    at, vid, both = map(statistics.stdev, ((11, 12), (21, 24, 20), (10, 12)))
    assert rows_of(markdown, table=2) == {
        "Method": ["100 % (140 per class), minus Student", "100 % (140 per class), minus AT"],
        "AT": [f"+11.50 ± {at:.2f} (2)", "–"],
        "VID": [f"+21.67 ± {vid:.2f} (3)", f"+11.00 ± {both:.2f} (2)"],
    }
    row = next(row for row in csv_rows(tmp_path) if row["method"] == "vid")
    assert (row["minus_student"], row["minus_at"], row["minus_at_sd"]) == (
        "21.6667",
        "11.0000",
        f"{both:.4f}",
    )


def test_a_cell_holds_mean_and_sample_standard_deviation_and_a_single_seed_has_no_spread(tmp_path):
    kd = [run("kd", accuracy, seed=seed) for seed, accuracy in enumerate((70.0, 71.0, 75.0))]
    markdown = rendered(tmp_path, *kd, run("student", 50.0))
    # mean 216 / 3; deviations -2, -1, 3: sqrt(14 / 2) = 2.6458; the population's is sqrt(14 / 3) = 2.1602
    assert rows_of(markdown)["KD"] == ["72.00 ± 2.65 (3)"]
    assert rows_of(markdown)["Student WRN-16-1"] == ["50.00 (1)"]
    assert rows_of(markdown, table=2)["KD"] == ["+20.00 (1)"]
    assert [row["sd"] for row in csv_rows(tmp_path)] == ["", "2.6458"]


def test_a_missing_run_is_a_dash_in_both_tables(tmp_path):
    markdown = rendered(tmp_path, run("student", 90.0), run("kd", 60.0, per_class=7))
    for number in (0, 1):
        assert rows_of(markdown, number)["Student WRN-16-1"][1] == "–"
        assert rows_of(markdown, number)["KD"][0] == "–"


def test_the_best_student_of_a_column_is_bold_and_the_teacher_never(tmp_path):
    settings = {"dataset": "digits", "teacher": 99.0}
    markdown = rendered(
        tmp_path, run("teacher", 99.0), run("kd", 80.0, **settings), run("vid", 81.0, **settings)
    )
    assert re.findall(r"\*\*(.*?)\*\*", markdown.partition("Best epoch")[0]) == ["81.00 (1)"]


def test_a_diverged_run_costs_its_own_cell_and_nothing_else(tmp_path):
    markdown = rendered(
        tmp_path,
        *(run("student", 50.0 + seed, seed=seed) for seed in range(3)),
        *(run("vid", 90.9 + 0.6 * seed, seed=seed) for seed in range(2)),
        diverged("vid", seed=2),
        *(diverged("kd", seed=seed) for seed in range(3)),
    )
    assert rows_of(markdown)["VID"] == ["91.20 ± 0.42 (2), diverged (1 of 3)"]
    assert rows_of(markdown)["KD"] == ["diverged (3 of 3)"]
    assert rows_of(markdown, 1)["KD"] == ["–"] and rows_of(markdown, 1)["VID"] == ["91.20"]
    assert rows_of(markdown, 2)["VID"] == ["+40.70 ± 0.28 (2)"] and "KD" not in rows_of(markdown, 2)
    assert "VID, 100 %, seed 2 (epoch 3: transfer loss inf)" in markdown
    assert [(row["n"], row["diverged"]) for row in csv_rows(tmp_path)] == [("3", "0"), ("0", "3"), ("2", "1")]


def test_a_finished_run_replaces_an_earlier_attempt_that_diverged(tmp_path):
    assert rows_of(rendered(tmp_path, diverged("vid"), run("vid", 70.0)))["VID"] == ["70.00 (1)"]


def test_a_method_that_fastvid_does_not_know_is_reported_like_any_other(tmp_path):
    vid = run("vid", 70.0, teacher=90.0)
    config = vid.config | {"crd": {"weight": 0.8}}
    runs = [dataclasses.replace(vid, method=name, config=config) for name in ("crd", "kd+crd", "mine")]
    runs[0] = dataclasses.replace(runs[0], title="CRD*", colour="#123456", accuracy=75.0)
    markdown = rendered(tmp_path, vid, *runs)
    assert list(rows_of(markdown)) == ["Method", "Teacher WRN-40-2", "VID", "CRD*", "MINE", "KD+CRD"]
    assert "CRD*: weight 0.8" in markdown and "**75.00 (1)**" in markdown
    report(tmp_path)
    assert PLOTS <= files_in(tmp_path) and "#123456" in (tmp_path / "curves.svg").read_text()


def test_columns_go_from_the_whole_set_to_the_smallest_and_name_images_per_class(tmp_path):
    runs = [run("student", 3.0 - n, per_class=size) for n, size in enumerate((None, 28, 7))]
    table = rows_of(rendered(tmp_path, *runs[::-1]))
    assert table["Method"] == ["100 % (140 per class)", "20 % (28 per class)", "5 % (7 per class)"]
    assert table["Student WRN-16-1"] == ["3.00 (1)", "2.00 (1)", "1.00 (1)"]


def test_a_set_with_unequal_classes_has_no_images_per_class(tmp_path):
    whole = dataclasses.replace(run("student", 1.0), dataset="folder", train_images=1234)
    assert rows_of(rendered(tmp_path, whole))["Method"] == ["100 % (all images)"]


def test_rows_keep_the_order_of_the_paper_with_sums_last_and_name_the_networks(tmp_path):
    shuffled = ("at+vid", "kd+vid", "vid", "kd+at", "at", "fitnet", "kd", "student", "teacher")
    networks = {"teacher_depth": 28, "teacher_width": 10, "student_depth": 22, "student_width": 4}
    markdown = rendered(tmp_path, *(run(name, 1.0, **networks) for name in shuffled))
    order = "Method, Teacher WRN-28-10, Student WRN-22-4, KD, FitNet, AT, VID, KD+AT, KD+VID, AT+VID"
    assert ", ".join(rows_of(markdown)) == order


def test_a_teacher_trained_here_is_a_row_and_a_given_teacher_is_marked(tmp_path):
    trained = rendered(tmp_path / "a", run("teacher", 94.0), run("kd", 80.0, teacher=94.0))
    assert rows_of(trained)["Teacher WRN-40-2"] == ["94.00 (1)"] and "was given" not in trained
    small = run("kd", 60.0, per_class=7, teacher=92.47)
    given = rendered(tmp_path / "b", run("kd", 80.0, teacher=92.47), small)
    assert rows_of(given)["Teacher WRN-40-2"] == ["92.47 (given)", "–"]
    assert "Teacher WRN-40-2" not in rows_of(given, 1)
    assert [row["method"] for row in csv_rows(tmp_path / "b")] == ["kd", "kd"]
    elsewhere = rendered(
        tmp_path / "c", small
    )  # no column of the whole set, in which the teacher was trained
    assert "Teacher WRN-40-2" not in rows_of(elsewhere)
    for markdown in (given, elsewhere):
        assert "Teacher WRN-40-2 was given, not trained here: 92.47 on the test split" in markdown


def test_validation_numbers_never_mix_with_test_numbers(tmp_path):
    held_out = [run("kd", 70.0 + 10 * seed, seed=seed, held_out=20) for seed in (1, 2)]
    report(written(tmp_path, run("kd", 60.0), *held_out))
    markdown = (tmp_path / "table.md").read_text()
    test_part, validation_part = markdown.split("# digits: accuracy on the validation split, in percent")
    assert rows_of(test_part)["KD"] == ["60.00 (1)"] and "VALIDATION" not in test_part
    assert rows_of(validation_part) == {"Method": ["100 % (140 per class)"], "KD": ["85.00 ± 7.07 (2)"]}
    assert "VALIDATION numbers, NOT test numbers:** measured on the last 20 images" in validation_part
    cells = [(row["evaluated_on"], row["n"]) for row in csv_rows(tmp_path)]
    assert cells == [("test", "1"), ("validation", "2")]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{plot}-digits-{split}.png" for plot in ("curves", "accuracy") for split in ("test", "validation")
    }


def test_data_sets_never_mix(tmp_path):
    markdown = rendered(tmp_path, run("kd", 60.0), run("kd", 80.0, dataset="cifar100"))
    assert [rows_of(markdown, table)["KD"] for table in (0, 2)] == [["80.00 (1)"], ["60.00 (1)"]]
    assert "# CIFAR-100:" in markdown


SOURCES = """
teacher 94.98/94.26
student 91.22/90.72 84.85/84.67 80.29/79.63 58.11/58.84
kd      90.60/91.27 84.13/86.11 78.57/82.23 59.63/64.24
fitnet  91.61/90.64 86.24/84.78 82.74/80.73 56.69/68.90
at      91.85/91.60 87.60/87.26 84.70/84.94 74.57/73.40
vid     –/91.85     –/89.73     –/88.09     –/81.59
kd+vid  –/–         –/–         –/–         –/–
"""  # seed repository / paper at 100, 20, 10, 2 %


@pytest.mark.parametrize("line", SOURCES.strip().splitlines(), ids=lambda line: line.split()[0])
def test_published_numbers_are_those_of_their_sources(tmp_path, line):
    method, *pairs = line.split()
    subsets = [None, 1000, 500, 100][: len(pairs)]
    runs = [run(method, 70.0, dataset="cifar10", per_class=per_class) for per_class in subsets]
    header, cells = rows_of(rendered(tmp_path, *runs)).values()
    assert [name for name in header if "%" not in name] == ["paper", "seed repo"] * len(pairs)
    assert [f"{seed}/{paper}" for paper, seed in zip(cells[1::3], cells[2::3])] == pairs
    papers = [pair.partition("/")[2].strip("–") for pair in pairs]
    assert [row["paper"] for row in csv_rows(tmp_path)] == [paper and str(float(paper)) for paper in papers]


UNPUBLISHED = [
    pytest.param({"dataset": "digits", "per_class": 28}, id="another-data-set"),
    pytest.param({"dataset": "cifar10", "per_class": 250}, id="another-fraction"),
    pytest.param({"dataset": "cifar10", "per_class": 100, "held_out": 10}, id="validation-split"),
    pytest.param({"dataset": "cifar10", "per_class": 100, "student_width": 2}, id="another-student"),
]


@pytest.mark.parametrize("settings", UNPUBLISHED)
def test_published_columns_are_left_out_where_they_do_not_belong(tmp_path, settings):
    markdown = rendered(tmp_path, run("vid", 70.0, **settings))
    assert len(rows_of(markdown)["Method"]) == 1 and "CVPR" not in markdown
    assert csv_rows(tmp_path)[0]["paper"] == ""


def test_deviations_from_protocol_and_recipe_are_named(tmp_path):
    settings = {"dataset": "cifar10", "per_class": 100, "epochs": 5, "clip_norm": 2.0, "milestones": (0.5,)}
    markdown = rendered(tmp_path, run("vid", 70.0, **settings))
    assert (
        "**Deviation from protocol `seed`: 5 epochs instead of 1000 on 2 %; milestones 0.5 instead of "
        "0.3/0.6/0.8; clip norm 2.0 instead of 0.0.**" in markdown
    )
    assert "**Our numbers are not comparable with either: 5 epochs instead of 1000 on 2 %.**" in markdown


def test_options_of_the_methods_in_the_table_are_listed_and_no_others(tmp_path):
    options = {
        "kd": KDOptions(0.5, 2.0),
        "fitnet": FitNetOptions(3.0, "group1", "joint"),
        "at": ATOptions(7.0),
    }
    markdown = rendered(tmp_path, run("kd+at", 70.0, **options), run("fitnet", 70.0, **options))
    note = "KD: alpha 0.5, temperature 2.0; FitNet: weight 3.0, tap group1, schedule joint; AT: weight 7.0."
    assert f"- {note}\n" in markdown
    markdown = rendered(tmp_path / "b", run("vid", 70.0, vid=VIDOptions("repdistiller")))
    assert "- VID: variant repdistiller, weight 1.0.\n" in markdown  # the weight that the variant brings


def test_seconds_of_a_group_count_once_in_each_folder(tmp_path):
    group = ["student", "kd"]
    runs = [
        run("teacher", 94.0, seconds=1000.0),
        *(run(name, 70.0, seconds=200.0, group=group, seed=seed) for name in group for seed in (0, 1)),
        run("kd", 50.0, seconds=30.0, per_class=7),
    ]
    assert ": 1,430 s of training" in rendered(tmp_path / "a", *runs)
    assert [row["seconds"] for row in csv_rows(tmp_path / "a")] == ["1000.0", "400.0", "400.0", "30.0"]
    again = run("kd", 50.0, seconds=30.0, per_class=7, kd=KDOptions(0.5), out="b")
    written(tmp_path / "b", again)
    assert ": 1,460 s of training" in report([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_a_repeated_line_counts_once_and_is_noted(tmp_path):
    markdown = rendered(tmp_path, run("kd", 70.0), run("kd", 80.0))
    assert rows_of(markdown)["KD"] == ["70.00 (1)"] and "1 line(s) of results.jsonl repeat" in markdown


# --- several folders


def test_folders_share_one_table_with_the_settings_in_which_they_differ_as_row_names(tmp_path):
    weights = {"a": 4.0, "b": 30.0}
    for name, weight in weights.items():
        vid = {"vid": VIDOptions("paper", weight), "out": name, "data": name}
        students = [run("student", 50.0, seed=seed, **vid) for seed in (0, 1)]
        written(tmp_path / name, *students, *(run("vid", 60.0 + weight, seed=seed, **vid) for seed in (0, 1)))
    text = report([tmp_path / "a", tmp_path / "b"], out=tmp_path / "c")
    table = rows_of(text)
    assert list(table) == ["Method", "Student WRN-16-1", "VID, weight 4.0", "VID, weight 30.0"]
    assert table["VID, weight 30.0"] == ["90.00 ± 0.00 (2)"]
    assert rows_of(text, 2)["VID, weight 4.0"] == ["+14.00 ± 0.00 (2)"]
    assert files_in(tmp_path / "c") == TABLES | PLOTS and files_in(tmp_path / "a") == {results.FILE}
    assert {row["settings"] for row in csv_rows(tmp_path / "c", "runs.csv")} == {
        "",
        "weight 4.0",
        "weight 30.0",
    }


def test_a_common_setting_is_in_every_row_name_and_methods_are_compared_at_equal_settings_only(tmp_path):
    written(tmp_path / "a", run("student", 50.0), run("kd", 55.0))
    written(tmp_path / "b", run("kd", 57.0, learning_rate=0.05))
    text = report([tmp_path / "a", tmp_path / "b"], out=tmp_path / "c")
    rates = ["Student WRN-16-1, learning rate 0.1", "KD, learning rate 0.05", "KD, learning rate 0.1"]
    assert list(rows_of(text)) == ["Method", *rates] and list(rows_of(text, 2)) == ["Method", rates[2]]


def test_folders_with_equal_settings_add_their_seeds(tmp_path):
    written(tmp_path / "a", run("kd", 50.0))
    written(tmp_path / "b", run("kd", 52.0, seed=1))
    assert rows_of(report([tmp_path / "a", tmp_path / "b"], tmp_path / "c"))["KD"] == ["51.00 ± 1.41 (2)"]


def test_several_folders_need_a_folder_for_the_report_and_the_same_data(tmp_path):
    written(tmp_path / "a", run("kd", 50.0))
    written(tmp_path / "b", dataclasses.replace(run("kd", 50.0), data_sha256="e" * 64))
    with pytest.raises(InputError, match="a report of several folders needs a folder of its own: give --out"):
        report([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match=f"{tmp_path}/a, {tmp_path}/b: results of 2 versions of digits"):
        report([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


# --- files


def test_the_text_holds_the_table_then_the_paths_then_unreadable_lines(tmp_path):
    written(tmp_path, run("kd", 70.0))
    with open(tmp_path / results.FILE, "a") as file:
        file.write('{"dataset": "digits", "meth')
    text = report(tmp_path)
    names = ("table.md", "table.csv", "runs.csv", "curves.png, .svg, .pdf", "accuracy.png, .svg, .pdf")
    remark = (
        f"{tmp_path / results.FILE}, line 2: not a complete result, skipped; its run will be trained again"
    )
    tail = [*(f"wrote {tmp_path / name}" for name in names), remark]
    assert text == "\n".join([(tmp_path / "table.md").read_text(), *tail])


NOTHING = [
    pytest.param(None, "no folder .*: give the --out folder", id="no-folder"),
    pytest.param({}, r"holds no results\.jsonl, so it is no output folder of fastvid", id="empty-folder"),
    pytest.param(
        {results.FILE: ""}, r"results\.jsonl holds no finished result yet: let", id="no-run-finished"
    ),
    pytest.param({results.FILE: "{torn"}, r"no finished result yet, only 1 unreadable line\(s\)", id="torn"),
]


@pytest.mark.parametrize("files, message", NOTHING)
def test_a_folder_without_results_is_refused_in_one_line(tmp_path, files, message):
    folder = tmp_path / "out"
    for name, content in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    if files == {}:
        folder.mkdir()
    with pytest.raises(InputError, match=message) as caught:
        report(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not list(tmp_path.glob("**/table.*"))


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "changed, what",
    [
        (
            {"method": "teacher", "teacher_sha256": None, "weights_sha256": "3" * 64},
            "2 teachers (1{12}, 3{12})",
        ),
        ({"teacher_sha256": "2" * 64}, "2 teachers (1{12}, 2{12})"),
        ({"data_sha256": "e" * 64}, "2 versions of digits (d{12}, e{12})"),
        ({"environment": {"fastvid": "0.0.9"}}, "2 versions of fastvid (0.0.9, None)"),
    ],
)
def test_results_that_cannot_share_a_table_are_refused(tmp_path, changed, what):
    written(tmp_path, run("vid", 70.0, teacher=90.0))
    written(tmp_path, dataclasses.replace(run("vid", 60.0, seed=1, teacher=90.0), **changed))
    found = what.replace("(", r"\(").replace(")", r"\)")
    message = (
        f"results.jsonl: results of {found}; these cannot share one table; keep each in its own output folder"
    )
    with pytest.raises(InputError, match=message):
        report(tmp_path)
    assert files_in(tmp_path) == {results.FILE}


def test_the_same_results_give_the_same_bytes_in_any_order(tmp_path):
    cells = [(method, size, seed) for method in ("kd", "vid") for size in (None, 7) for seed in (0, 1, 2)]
    runs = [
        run(method, 70.1 + seed, per_class=size, seed=seed, group=["kd", "vid"])
        for method, size, seed in cells
    ]
    for name, lines in (("once", runs), ("again", runs), ("backwards", runs[::-1])):
        report(written(tmp_path / name, *lines))
    for file in sorted(files_in(tmp_path / "once") - {results.FILE}):
        first, *others = ((tmp_path / name / file).read_bytes() for name in ("once", "again", "backwards"))
        assert others == [first, first], file


def test_rendering_again_replaces_the_files_and_leaves_no_others(tmp_path):
    report(written(tmp_path, run("kd", 70.0)))
    assert "80.00 (1)" in report(written(tmp_path, run("vid", 80.0)))
    assert files_in(tmp_path) == {results.FILE} | TABLES | PLOTS


def test_a_place_that_is_no_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path}/file: cannot write there: File exists; choose another"):
        report(written(tmp_path / "a", run("kd", 70.0)), tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_written_still_gives_the_table(tmp_path, monkeypatch, number):
    def refuse(path, content):
        raise InputError("cannot write") from OSError(number, os.strerror(number))

    written(tmp_path, run("kd", 70.0))
    monkeypatch.setattr(report_package, "write_atomic", refuse)
    text = report(tmp_path)
    assert "| KD     |" in text and text.endswith(
        f"{tmp_path} is read-only ({os.strerror(number)}): nothing was written there"
    )


# --- plots: whatever happens to them, the tables are complete

FOUR_COLUMNS = [
    (method, size)
    for method in ("student", "kd", "fitnet", "at", "vid", "kd+at", "kd+vid", "at+vid")
    for size in (None, 1000, 500, 100)
]
PLOTTED = [
    pytest.param([("student", 100), ("vid", 100)], {"teacher": 92.47}, set(), id="one-column-given-teacher"),
    pytest.param([*FOUR_COLUMNS, ("teacher", None)], {}, {"labels"}, id="eight-methods-on-four-columns"),
    pytest.param([("teacher", None)], {"epochs": 1}, set(), id="one-point"),
]


@pytest.mark.parametrize("cells, settings, more", PLOTTED)
def test_plots_are_readable_pictures_with_something_on_them(tmp_path, cells, settings, more):
    image = pytest.importorskip("matplotlib.image", reason="plots need matplotlib")
    cells = [(*cell, seed) for cell in cells for seed in (0, 1)]
    settings = {"dataset": "cifar10"} | settings
    report(
        written(tmp_path, *(run(m, 70.0 + seed, per_class=n, seed=seed, **settings) for m, n, seed in cells))
    )
    names = {"curves", "accuracy"} | more
    assert (
        {path.stem for path in tmp_path.glob("*.svg")}
        == {path.stem for path in tmp_path.glob("*.pdf")}
        == names
    )
    for name in names:
        height, width, _ = (pixels := image.imread(tmp_path / f"{name}.png")).shape
        assert 250 < height < 2000 and 500 < width < 2500
        assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.6  # neither blank nor filled


def test_information_of_the_regressors_is_plotted_where_results_carry_it(tmp_path):
    point = Evaluation(1, 50.0, 1.0, 0.5, {}, {"vid at stem": [0.4, 0.3], "vid at group1": [-0.1, -0.05]})
    vid = dataclasses.replace(run("vid", 50.0), history=[point, dataclasses.replace(point, epoch=2)])
    report(written(tmp_path, run("student", 40.0), vid))
    assert {f"information.{kind}" for kind in ("png", "svg", "pdf")} <= files_in(tmp_path)


def test_runs_that_all_diverged_or_have_no_history_are_plotted_too(tmp_path):
    lost = dataclasses.replace(diverged("kd"), history=[])
    vid = dataclasses.replace(
        diverged("vid"), history=[Evaluation(1, 9.0, 1.0, 0.5, {}, {"vid at stem": [0, 0]})]
    )
    text = report(written(tmp_path, vid, lost))
    assert PLOTS <= files_in(tmp_path) and "plots are missing" not in text


def test_labels_at_line_ends_do_not_collide():
    plots = pytest.importorskip("fastvid.report.plots", reason="plots need matplotlib")
    heights = [58.0, 90.9, 91.0, 91.0, 91.2, 94.3]
    placed = plots._spread(heights, gap=2.0, top=95.0)
    assert all(b - a >= 2.0 - 1e-9 for a, b in zip(placed, placed[1:])) and placed[0] == 58.0
    assert max(placed) <= 95.0


def test_without_matplotlib_tables_are_written_and_the_remedy_named(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastvid.report.plots", raising=False)
    monkeypatch.delattr(report_package, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written(tmp_path, run("kd", 70.0))
    assert report(tmp_path).endswith("runs.csv\nno plots: pip install 'fastvid-distill[plot]'")
    assert files_in(tmp_path) == {results.FILE} | TABLES


def test_a_plot_that_fails_is_a_remark_with_its_cause(tmp_path, monkeypatch):
    plots = pytest.importorskip("fastvid.report.plots", reason="plots need matplotlib")
    monkeypatch.setattr(plots, "_accuracy", lambda figure, section: 1 / 0)
    text = report(written(tmp_path, run("kd", 70.0)))
    assert text.endswith("plots are missing, the tables are complete: ZeroDivisionError: division by zero")
    assert TABLES <= files_in(tmp_path) and "curves.png" in files_in(tmp_path)


HOSTILE = [
    pytest.param({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, id="notebook"),
    pytest.param({"MPLBACKEND": "nonsense"}, id="unknown-backend"),
    pytest.param({"MATPLOTLIBRC": "matplotlibrc"}, id="usetex"),
]


@pytest.mark.parametrize("environment", HOSTILE)
def test_backend_and_style_of_the_environment_change_no_plot(tmp_path, environment):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    shutil.copy(MEASURED / "digits" / results.FILE, tmp_path)
    report(tmp_path)
    plain = (tmp_path / "accuracy.png").read_bytes()
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nlines.linewidth: 9\n")
    program = "from fastvid.report import report; print(report('.'))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and "plots are missing" not in ran.stdout, ran.stdout + ran.stderr
    assert (tmp_path / "accuracy.png").read_bytes() == plain
