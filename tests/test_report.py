"""Tables, CSV and plots are rendered from JSON lines alone, so every test writes such lines and reads what came out."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

from fastvid import results
from fastvid.config import ATOptions, FitNetOptions, KDOptions, TrainConfig, VIDOptions
from fastvid.errors import InputError
from fastvid.report import report
from fastvid.results import Evaluation, RunResult

CLASS_SIZE = {"cifar10": 5000, "cifar100": 500, "digits": 140}
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}


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
    """A finished run; `teacher`: accuracy of a teacher that was given, `held_out`: images per class for validation."""
    settings = {"protocol": "seed", "epochs": 4, "batch_size": 128} | settings
    config = TrainConfig(
        dataset=dataset,
        method=(method,),
        per_class=per_class,
        seed=seed,
        validation_per_class=held_out,
        **settings,
    )
    size = per_class or CLASS_SIZE[dataset]
    epochs = config.resolved().epochs
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
        history=[
            Evaluation(epoch, accuracy * epoch / epochs, 1.0, 0.5, {}) for epoch in range(1, epochs + 1)
        ],
        weights=f"{method}.safetensors",
        weights_sha256="1" * 64,
        data_sha256="d" * 64,
        teacher_sha256=None if teacher is None else "1" * 64,
        teacher_accuracy=teacher,
        config=json.loads(json.dumps(dataclasses.asdict(config.resolved()))),
        environment={"torch": "2.10.0", "device": "a processor"},
    )


def rendered(folder: Path, *runs: RunResult) -> str:
    """table.md of these runs."""
    for one in runs:
        results.append(folder, one)
    report(folder)
    return (folder / "table.md").read_text()


def rows_of(markdown: str, table: int = 0) -> dict[str, list[str]]:
    """{first cell: other cells} of one of the tables."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[table].splitlines()]
    return {line[0]: line[1:] for line in lines if not line[0].startswith("--")}


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_small_table_is_rendered_to_the_byte(tmp_path):
    settings = {
        "dataset": "cifar10",
        "per_class": 100,
        "epochs": 1000,
        "teacher": 92.47,
        "group": ["student", "vid"],
        "vid": VIDOptions(variant="paper", weight=10.0),
    }
    markdown = rendered(
        tmp_path,
        run("student", 57.0, **settings),
        run("vid", 72.0, best=73.5, **settings),
        run("student", 58.0, seed=1, **settings),
        run("vid", 73.0, best=74.25, seed=1, **settings),
    )
    assert (
        markdown
        == """\
# cifar10: accuracy on the test split, in percent

Last epoch: mean ± sample standard deviation over seeds (number of seeds)

| Method           | 2 % (100 per class) | paper | seed repo |
|------------------|--------------------:|------:|----------:|
| Student WRN-16-1 |    57.50 ± 0.71 (2) | 58.84 |     58.11 |
| VID              |    72.50 ± 0.71 (2) | 81.59 |         – |

Best epoch, mean over seeds: chosen on the test split, therefore no result

| Method           | 2 % (100 per class) |
|------------------|--------------------:|
| Student WRN-16-1 |               57.50 |
| VID              |               73.88 |

Difference, seed by seed on the same batches: mean ± half of its 95 % interval (number of seeds)

| Method | 2 % (100 per class), minus Student |
|--------|-----------------------------------:|
| VID    |                  +15.00 ± 0.00 (2) |

- Data set cifar10, test split, 2 seeds (0, 1). The last epoch is the headline. –: not run here, or never published.
- Protocol `seed`: 1000 epochs on 2 %; batch 128; bf16.
- Teacher WRN-40-2 was given, not trained here: 92.47 on the test split.
- VID: variant paper, weight 10.0.
- paper: Ahn et al., CVPR 2019, number of epochs unknown. seed repo: its newest README, mean of 3 runs, protocol `seed`: \
200 epochs on 100 %, 1000 on less, batch 128. Ours has the epochs and the batch of the seed repository; the paper's may differ.
- Trained on a processor, torch 2.10.0: 20 s in all, without start-up and evaluation.
"""
    )


def test_the_csv_is_rendered_to_the_byte(tmp_path):
    settings = {"dataset": "cifar10", "per_class": 100, "epochs": 1000, "seconds": 12.5}
    rendered(
        tmp_path,
        run("vid", 72.0, best=73.0, **settings),
        run("vid", 73.0, best=74.0, seed=1, **settings),
        run("kd+at", 60.0),
    )
    assert (tmp_path / "table.csv").read_text() == (
        "dataset,evaluated_on,method,per_class,percent,n,mean,sd,best_mean,paper,seed_repository,epochs,seconds,"
        "minus_student,minus_student_95,minus_at,minus_at_95\n"
        "cifar10,test,vid,100,2,2,72.5000,0.7071,73.5000,81.59,,1000,25.0,,,,\n"
        "digits,test,kd+at,,100,1,60.0000,,60.0000,,,4,10.0,,,,\n"
    )


def test_methods_are_compared_seed_by_seed_with_an_interval(tmp_path):
    accuracies = {
        "student": (50.0, 60.0, 55.0),
        "at": (61.0, 72.0),
        "vid": (71.0, 84.0, 75.0, 99.0),
    }  # by seed
    markdown = rendered(
        tmp_path,
        *(
            run(method, accuracy, seed=seed)
            for method, found in accuracies.items()
            for seed, accuracy in enumerate(found)
        ),
    )
    at, vid, both = map(statistics.stdev, ((11, 12), (21, 24, 20), (10, 12)))
    assert rows_of(markdown, table=2) == {
        "Method": ["100 % (140 per class), minus Student", "100 % (140 per class), minus AT"],
        "AT": [f"+11.50 ± {12.706 * at / 2**0.5:.2f} (2)", "–"],
        "VID": [f"+21.67 ± {4.303 * vid / 3**0.5:.2f} (3)", f"+11.00 ± {12.706 * both / 2**0.5:.2f} (2)"],
    }
    row = next(row for row in csv_rows(tmp_path) if row["method"] == "vid")
    assert (row["minus_student"], row["minus_at"]) == ("21.6667", "11.0000")


def test_one_seed_has_a_difference_and_no_interval(tmp_path):
    markdown = rendered(tmp_path, run("student", 50.0), run("vid", 61.5))
    assert rows_of(markdown, table=2)["VID"] == ["+11.50 (1)"]


def test_the_interval_of_many_seeds_is_that_of_student_s_t(tmp_path):
    accuracies = [60.0 + (seed * 7) % 5 for seed in range(21)]
    markdown = rendered(
        tmp_path,
        *(run("student", 50.0, seed=seed) for seed in range(21)),
        *(run("vid", accuracy, seed=seed) for seed, accuracy in enumerate(accuracies)),
    )
    wanted = 2.086 * statistics.stdev(accuracies) / math.sqrt(21)  # 20 degrees of freedom
    assert rows_of(markdown, table=2)["VID"] == [
        f"+{statistics.mean(accuracies) - 50:.2f} ± {wanted:.2f} (21)"
    ]


def test_the_cell_holds_mean_and_sample_standard_deviation(tmp_path):
    markdown = rendered(
        tmp_path, *(run("kd", accuracy, seed=seed) for seed, accuracy in enumerate((70.0, 71.0, 75.0)))
    )
    # mean 216 / 3; deviations -2, -1, 3: sqrt(14 / 2) = 2.6458; the population's would be sqrt(14 / 3) = 2.1602
    assert rows_of(markdown)["KD"] == ["72.00 ± 2.65 (3)"]
    assert csv_rows(tmp_path)[0]["sd"] == "2.6458"


def test_a_lone_seed_has_no_spread(tmp_path):
    assert rows_of(rendered(tmp_path, run("kd", 70.0)))["KD"] == ["70.00 (1)"]
    assert csv_rows(tmp_path)[0]["sd"] == ""


def test_a_missing_run_is_a_dash_in_both_tables(tmp_path):
    markdown = rendered(tmp_path, run("student", 90.0), run("kd", 60.0, per_class=7))
    for table in (0, 1):
        assert rows_of(markdown, table)["Student WRN-16-1"][1] == "–"
        assert rows_of(markdown, table)["KD"][0] == "–"


def test_the_last_epoch_is_the_headline_and_the_best_stands_apart(tmp_path):
    markdown = rendered(tmp_path, run("at", 70.0, best=75.0))
    assert rows_of(markdown, 0)["AT"] == ["70.00 (1)"]
    assert rows_of(markdown, 1)["AT"] == ["75.00"]
    assert "chosen on the test split, therefore no result" in markdown


def test_columns_go_from_the_whole_set_to_the_smallest_and_name_images_per_class(tmp_path):
    markdown = rendered(
        tmp_path, run("student", 1.0, per_class=7), run("student", 2.0, per_class=28), run("student", 3.0)
    )
    assert rows_of(markdown)["Method"] == [
        "100 % (140 per class)",
        "20 % (28 per class)",
        "5 % (7 per class)",
    ]
    assert rows_of(markdown)["Student WRN-16-1"] == ["3.00 (1)", "2.00 (1)", "1.00 (1)"]


def test_a_set_with_unequal_classes_has_no_images_per_class(tmp_path):
    whole = dataclasses.replace(run("student", 1.0), dataset="folder", train_images=1234)
    assert rows_of(rendered(tmp_path, whole))["Method"] == ["100 % (all images)"]


def test_rows_keep_the_order_of_the_paper_with_sums_last(tmp_path):
    shuffled = ("at+vid", "kd+vid", "vid", "kd+at", "at", "fitnet", "kd", "student", "teacher")
    markdown = rendered(tmp_path, *(run(name, 1.0) for name in shuffled))
    assert list(rows_of(markdown)) == [
        "Method",
        "Teacher WRN-40-2",
        "Student WRN-16-1",
        "KD",
        "FitNet",
        "AT",
        "VID",
        "KD+AT",
        "KD+VID",
        "AT+VID",
    ]


def test_networks_are_named_as_configured(tmp_path):
    networks = {"teacher_depth": 28, "teacher_width": 10, "student_depth": 22, "student_width": 4}
    markdown = rendered(tmp_path, run("teacher", 1.0, **networks), run("student", 1.0, **networks))
    assert {"Teacher WRN-28-10", "Student WRN-22-4"} < set(rows_of(markdown))


def test_a_teacher_trained_here_is_a_result_like_any_other(tmp_path):
    markdown = rendered(tmp_path, run("teacher", 94.0), run("kd", 80.0, teacher=94.0))
    assert rows_of(markdown)["Teacher WRN-40-2"] == ["94.00 (1)"]
    assert "was given" not in markdown


def test_a_given_teacher_is_marked_and_stands_in_the_column_of_the_whole_set(tmp_path):
    markdown = rendered(tmp_path, run("kd", 80.0, teacher=92.47), run("kd", 60.0, per_class=7, teacher=92.47))
    assert rows_of(markdown)["Teacher WRN-40-2"] == ["92.47 (given)", "–"]
    assert "Teacher WRN-40-2 was given, not trained here: 92.47 on the test split" in markdown
    assert "Teacher WRN-40-2" not in rows_of(markdown, 1)
    assert [row["method"] for row in csv_rows(tmp_path)] == ["kd", "kd"]


def test_a_given_teacher_is_no_row_when_no_column_is_of_the_whole_set(tmp_path):
    markdown = rendered(tmp_path, run("kd", 60.0, per_class=7, teacher=92.47))
    assert "Teacher WRN-40-2" not in rows_of(markdown)
    assert "Teacher WRN-40-2 was given, not trained here: 92.47" in markdown


def test_validation_numbers_never_mix_with_test_numbers(tmp_path):
    markdown = rendered(
        tmp_path, run("kd", 60.0), run("kd", 80.0, seed=1, held_out=20), run("kd", 90.0, seed=2, held_out=20)
    )
    test_part, validation_part = markdown.split("# digits: accuracy on the validation split, in percent")
    assert rows_of(test_part)["KD"] == ["60.00 (1)"]
    assert rows_of(validation_part) == {"Method": ["100 % (140 per class)"], "KD": ["85.00 ± 7.07 (2)"]}
    assert (
        "VALIDATION numbers, NOT test numbers:** measured on the last 20 images per class" in validation_part
    )
    assert "VALIDATION" not in test_part
    assert [(row["evaluated_on"], row["n"]) for row in csv_rows(tmp_path)] == [
        ("test", "1"),
        ("validation", "2"),
    ]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "curves-digits-test.png",
        "accuracy-digits-test.png",
        "curves-digits-validation.png",
        "accuracy-digits-validation.png",
    }


def test_validation_alone_is_named_as_loudly(tmp_path):
    assert "**These are VALIDATION numbers, NOT test numbers:**" in rendered(
        tmp_path, run("kd", 60.0, held_out=5)
    )


def test_data_sets_never_mix(tmp_path):
    markdown = rendered(tmp_path, run("kd", 60.0), run("kd", 80.0, dataset="cifar100"))
    assert rows_of(markdown, 0)["KD"] == ["80.00 (1)"]
    assert rows_of(markdown, 2)["KD"] == ["60.00 (1)"]


def test_published_columns_stand_beside_the_fractions_of_cifar10(tmp_path):
    subsets = {None: 100, 1000: 20, 500: 10, 250: None, 100: 2}
    markdown = rendered(
        tmp_path, *(run("at", 70.0, dataset="cifar10", per_class=per_class) for per_class in subsets)
    )
    assert rows_of(markdown)["Method"] == [
        "100 % (5000 per class)",
        "paper",
        "seed repo",
        "20 % (1000 per class)",
        "paper",
        "seed repo",
        "10 % (500 per class)",
        "paper",
        "seed repo",
        "5 % (250 per class)",
        "2 % (100 per class)",
        "paper",
        "seed repo",
    ]
    assert rows_of(markdown)["AT"] == [
        "70.00 (1)",
        "91.60",
        "91.85",
        "70.00 (1)",
        "87.26",
        "87.60",
        "70.00 (1)",
        "84.94",
        "84.70",
        "70.00 (1)",
        "70.00 (1)",
        "73.40",
        "74.57",
    ]


def test_sums_have_no_published_numbers(tmp_path):
    assert rows_of(rendered(tmp_path, run("kd+vid", 70.0, dataset="cifar10", per_class=100)))["KD+VID"] == [
        "70.00 (1)",
        "–",
        "–",
    ]


UNPUBLISHED = [
    pytest.param({"dataset": "digits", "per_class": 28}, id="another-data-set"),
    pytest.param({"dataset": "cifar10", "per_class": 100, "held_out": 10}, id="validation-split"),
    pytest.param({"dataset": "cifar10", "per_class": 100, "student_width": 2}, id="another-student"),
]


@pytest.mark.parametrize("settings", UNPUBLISHED)
def test_published_columns_are_left_out_where_they_do_not_belong(tmp_path, settings):
    markdown = rendered(tmp_path, run("vid", 70.0, **settings))
    assert len(rows_of(markdown)["Method"]) == 1
    assert "CVPR" not in markdown
    assert csv_rows(tmp_path)[0]["paper"] == ""


SOURCES = """
teacher 94.98/94.26
student 91.22/90.72 84.85/84.67 80.29/79.63 58.11/58.84
kd      90.60/91.27 84.13/86.11 78.57/82.23 59.63/64.24
fitnet  91.61/90.64 86.24/84.78 82.74/80.73 56.69/68.90
at      91.85/91.60 87.60/87.26 84.70/84.94 74.57/73.40
vid     –/91.85     –/89.73     –/88.09     –/81.59
"""  # seed repository / paper at 100, 20, 10, 2 %


@pytest.mark.parametrize("line", SOURCES.strip().splitlines(), ids=lambda line: line.split()[0])
def test_published_numbers_are_those_of_their_sources(tmp_path, line):
    method, *pairs = line.split()
    subsets = [None, 1000, 500, 100][: len(pairs)]
    markdown = rendered(
        tmp_path, *(run(method, 70.0, dataset="cifar10", per_class=per_class) for per_class in subsets)
    )
    (cells,) = (cells for name, cells in rows_of(markdown).items() if name != "Method")
    assert [f"{seed}/{paper}" for paper, seed in zip(cells[1::3], cells[2::3])] == pairs
    assert [float(row["paper"]) for row in csv_rows(tmp_path)] == [
        float(pair.split("/")[1]) for pair in pairs
    ]


def test_other_lengths_than_the_seed_repositorys_are_called_not_comparable(tmp_path):
    markdown = rendered(tmp_path, run("vid", 70.0, dataset="cifar10", per_class=100, epochs=5))
    assert "**Not as the protocol and the defaults say: 5 epochs on 2 % (protocol: 1000).**" in markdown
    assert "**Ours is not comparable with either: 5 epochs on 2 %, batch 128.**" in markdown


def test_a_recipe_that_is_not_the_default_is_said(tmp_path):
    markdown = rendered(tmp_path, run("student", 70.0, epochs=200, clip_norm=2.0, milestones=(0.5,)))
    assert "**Not as the protocol and the defaults say: milestones 0.5, clip_norm 2.0.**" in markdown


def test_weights_of_the_methods_in_the_table_are_said_and_no_others(tmp_path):
    weights = {
        "kd": KDOptions(0.5, 2.0),
        "fitnet": FitNetOptions(3.0, "group1", "joint"),
        "at": ATOptions(7.0),
    }
    markdown = rendered(tmp_path, run("kd+at", 70.0, **weights), run("fitnet", 70.0, **weights))
    assert (
        "- KD: alpha 0.5, temperature 2.0; FitNet: weight 3.0, tap group1, schedule joint; AT: weight 7.0.\n"
        in markdown
    )


def test_the_weight_that_a_variant_brings_is_shown(tmp_path):
    markdown = rendered(tmp_path, run("vid", 70.0, vid=VIDOptions("repdistiller")))
    assert "- VID: variant repdistiller, weight 1.0.\n" in markdown


def test_seconds_of_a_group_count_once(tmp_path):
    group = ["student", "kd"]
    markdown = rendered(
        tmp_path,
        run("teacher", 94.0, seconds=1000.0),
        *(run(name, 70.0, seconds=200.0, group=group) for name in group),
        *(run(name, 70.0, seconds=200.0, group=group, seed=1) for name in group),
        run("kd", 50.0, seconds=30.0, per_class=7),
    )
    assert ": 1,430 s in all" in markdown
    assert [row["seconds"] for row in csv_rows(tmp_path)] == ["1000.0", "400.0", "400.0", "30.0"]


def test_a_repeated_line_counts_once_and_is_noted(tmp_path):
    markdown = rendered(tmp_path, run("kd", 70.0), run("kd", 80.0))
    assert rows_of(markdown)["KD"] == ["70.00 (1)"]
    assert "1 line(s) of results.jsonl repeat" in markdown


def test_the_text_holds_the_table_then_the_paths_then_unreadable_lines(tmp_path):
    results.append(tmp_path, run("kd", 70.0))
    with open(tmp_path / results.FILE, "a") as file:
        file.write('{"dataset": "digits", "meth')
    text = report(tmp_path)
    names = ("table.md", "table.csv", "curves.png", "accuracy.png")
    note = f"{tmp_path / results.FILE}, line 2: not a whole result, skipped; its run will be made again"
    tail = [*(f"wrote {tmp_path / name}" for name in names), note]
    assert text == "\n".join([(tmp_path / "table.md").read_text(), *tail])


NOTHING = [
    pytest.param(None, "no folder .*: give the --out folder", id="no-folder"),
    pytest.param(
        {},
        r"holds no results\.jsonl, so it is no output folder of fastvid: give the --out folder",
        id="empty-folder",
    ),
    pytest.param(
        {results.FILE: ""},
        r"results\.jsonl holds no finished result yet: let a run finish",
        id="no-run-has-finished",
    ),
    pytest.param(
        {results.FILE: "{torn"},
        r"no finished result yet, only 1 unreadable line\(s\): let a run finish",
        id="one-torn-line",
    ),
]


@pytest.mark.parametrize("files, message", NOTHING)
def test_a_folder_without_results_is_refused_in_one_line(tmp_path, files, message):
    folder = tmp_path / "out"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        report(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not list(tmp_path.glob("**/table.*"))


ONE_COLUMN = [("student", 100), ("vid", 100)]
SEVEN_METHODS = [
    (method, per_class)
    for method in ("student", "kd", "fitnet", "at", "vid", "kd+at", "kd+vid", "at+vid")
    for per_class in (None, 1000, 500, 100)
]
PLOTTED = [
    pytest.param(ONE_COLUMN, {"teacher": 92.47}, id="one-column-and-a-given-teacher"),
    pytest.param([*SEVEN_METHODS, ("teacher", None)], {}, id="eight-methods-on-four-columns"),
    pytest.param([("teacher", None)], {"epochs": 1}, id="one-point"),
]


@pytest.mark.parametrize("cells, settings", PLOTTED)
def test_plots_are_readable_pictures_with_something_on_them(tmp_path, cells, settings):
    image = pytest.importorskip("matplotlib.image", reason="plots need matplotlib")
    rendered(
        tmp_path,
        *(
            run(method, 70.0 + seed, per_class=per_class, seed=seed, dataset="cifar10", **settings)
            for method, per_class in cells
            for seed in (0, 1)
        ),
    )
    for name in ("curves.png", "accuracy.png"):
        height, width, _ = (pixels := image.imread(tmp_path / name)).shape
        assert 500 < height < 2000 and 500 < width < 2500
        assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.6  # neither blank nor filled


def test_the_same_results_give_the_same_bytes_in_any_order(tmp_path):
    runs = [
        run(method, 70.1 + seed, per_class=per_class, seed=seed, group=["kd", "vid"])
        for method in ("kd", "vid")
        for per_class in (None, 7)
        for seed in (0, 1, 2)
    ]
    written = []
    for name, lines in (("once", runs), ("again", runs), ("backwards", runs[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        rendered(folder, *lines)
        written.append([(folder / file).read_bytes() for file in ("table.md", "table.csv")])
    assert written[0] == written[1] == written[2]


def files_in(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_rendering_again_replaces_the_files_and_leaves_no_others(tmp_path):
    rendered(tmp_path, run("kd", 70.0))
    assert "80.00 (1)" in rendered(tmp_path, run("vid", 80.0))
    assert files_in(tmp_path) == {results.FILE, "table.md", "table.csv", "curves.png", "accuracy.png"}


def test_without_matplotlib_tables_are_written_and_the_remedy_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results.append(tmp_path, run("kd", 70.0))
    assert report(tmp_path).endswith("table.csv\nno plots: pip install 'fastvid-distill[plot]'")
    assert files_in(tmp_path) == {results.FILE, "table.md", "table.csv"}


@pytest.mark.parametrize(
    "settings", [{"milestones": 3}, {"vid": 7}, {"protocol": ["seed"]}, {"learning_rate": {}}], ids=str
)
def test_settings_that_fastvid_never_writes_end_in_one_line_or_in_a_table(settings, tmp_path):
    whole = run("vid", 70.0)
    results.append(tmp_path, dataclasses.replace(whole, config=whole.config | settings))
    try:
        assert "70.00 (1)" in report(tmp_path)
    except InputError as error:
        assert re.match(
            f"{tmp_path}/results.jsonl holds settings that fastvid never writes \\(.*\\): take out the lines",
            str(error),
        )
        assert files_in(tmp_path) == {results.FILE}


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "changed, what",
    [
        (
            {"method": "teacher", "teacher_sha256": None, "weights_sha256": "3" * 64},
            "2 teachers \\(111111111111, 333333333333\\)",
        ),
        ({"teacher_sha256": "2" * 64}, "2 teachers \\(111111111111, 222222222222\\)"),
        ({"data_sha256": "e" * 64}, "2 sets of digits \\("),
        ({"environment": {"fastvid": "0.0.9"}}, "2 versions of fastvid \\(0.0.9, None\\)"),
    ],
)
def test_results_that_belong_into_no_common_table_are_refused(tmp_path, changed, what):
    results.append(tmp_path, run("vid", 70.0, teacher=90.0))
    results.append(tmp_path, dataclasses.replace(run("vid", 60.0, seed=1, teacher=90.0), **changed))
    with pytest.raises(
        InputError, match=f"results.jsonl holds results of {what}.*: report each from a folder of its own"
    ):
        report(tmp_path)
    assert files_in(tmp_path) == {results.FILE}
