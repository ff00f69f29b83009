"""The command line from outside: what it offers, and one line with what, where and the remedy for everything that can be mended."""

import dataclasses
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

import fastvid
from fastvid import checkpoint, cli, results, train
from fastvid.config import OPTION_GROUPS, Grid, TrainConfig
from fastvid.datasets.cifar import CIFAR10
from fastvid.progress import Progress
from fastvid.wresnet import WideResNet

TINY = [
    "--device",
    "cpu",
    "--dataset",
    "digits",
    "--per-class",
    "5",
    "--validation-per-class",
    "1",
    "--batch-size",
    "16",
    "--epochs",
    "1",
    "--student-depth",
    "10",
    "--teacher-depth",
    "10",
    "--teacher-width",
    "1",
    "--precision",
    "fp32",
]


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(*argv): the one line on stderr of a command that ends with exit code 2; `train` gets TINY and an output folder."""

    def run(command, *options):
        capsys.readouterr()
        argv = (
            [command, *TINY, "--out", str(tmp_path / "out"), *map(str, options)]
            if command == "train"
            else [command, *map(str, options)]
        )
        with warnings.catch_warnings(record=True) as shown:  # by Python, as more lines on stderr
            assert cli.main(argv) == 2
        assert not [warning for warning in shown if issubclass(warning.category, UserWarning)]
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith("fastvid: error: ") and not printed.out
        return line

    return run


def save_network(path, *sizes, change=lambda state: None):
    torch.manual_seed(0)
    state = WideResNet(*sizes).state_dict()
    change(state)
    checkpoint.save_weights(path, state, {})
    return path


# --- what can be typed wrong


@pytest.mark.parametrize(
    "options, phrase",
    [
        pytest.param(
            ["--method", "dkd"],
            "unknown method 'dkd': choose from teacher, student, kd, fitnet, at, vid, or a sum such as kd+at",
            id="method",
        ),
        pytest.param(
            ["--method", "student,at+kd"], "unknown method 'at+kd': write it 'kd+at'", id="order-of-a-sum"
        ),
        pytest.param(
            ["--method", "student,student"],
            "--method is student,student, wanted one or more methods, each once",
            id="method-twice",
        ),
        pytest.param(
            ["--vid-variant", "mine"],
            "--vid-variant: invalid choice: 'mine' (choose from paper, repdistiller) (see fastvid train --help)",
            id="variant",
        ),
        pytest.param(
            ["--dataset", "mnist"],
            "--dataset: invalid choice: 'mnist' (choose from cifar10, cifar100, folder, digits)",
            id="data-set",
        ),
        pytest.param(
            ["--precision", "int8"],
            "--precision: invalid choice: 'int8' (choose from fp32, bf16, fp16)",
            id="precision",
        ),
        pytest.param(
            ["--frobnicate"], "unrecognized arguments: --frobnicate (see fastvid train --help)", id="option"
        ),
        pytest.param(["--epoch", "3"], "unrecognized arguments: --epoch 3", id="abbreviated-option"),
        pytest.param(["--epochs"], "--epochs: expected one argument", id="value-missing"),
        pytest.param(["--epochs", "many"], "--epochs: invalid int value: 'many'", id="no-number"),
        pytest.param(
            ["--milestones", "0.3,x"],
            "--milestones: invalid list of float value: '0.3,x'",
            id="no-list-of-numbers",
        ),
        pytest.param(["--epochs", "0"], "--epochs is 0, wanted 1 or more", id="number-too-small"),
        pytest.param(["--seed", str(2**64)], f"--seed is {2**64}, wanted", id="seed-too-large"),
        pytest.param(
            ["--seed", str(2**64 - 1), "--method", "student"],
            f"--seed is {2**64 - 1}, wanted",
            id="seed-beyond-the-sum-with-a-name",
        ),
        pytest.param(["--learning-rate", "nan"], "--learning-rate is nan, wanted a finite number", id="nan"),
        pytest.param(
            ["--student-depth", "17"],
            "--student-depth is 17, wanted 6n + 4, such as 10, 16, 22, 28 or 40",
            id="depth-of-the-student",
        ),
        pytest.param(
            ["--method", "teacher", "--teacher-depth", "4"],
            "--teacher-depth is 4, wanted 6n + 4",
            id="depth-of-the-teacher",
        ),
        pytest.param(["--student-width", "0"], "--student-width is 0, wanted 1 or more", id="width"),
        pytest.param(
            ["--per-class", "141"],
            "141 images per class were asked for, but class '0' has 140: take at most 140",
            id="subset-larger-than-the-class",
        ),
        pytest.param(["--validation-per-class", "5"], "validation", id="nothing-left-to-train-on"),
        pytest.param(
            ["--batch-size", "41"],
            "a batch of 41 is larger than the training subset of 40 images: set --batch-size 40 or less",
            id="batch-larger-than-the-subset",
        ),
        pytest.param(
            ["--method", "vid"],
            "--method vid needs a teacher: add --teacher FILE, or make one with --method teacher",
            id="no-teacher",
        ),
        pytest.param(
            ["--method", "vid", "--teacher", "no/such.pth"],
            "no weights at no/such.pth: check the path",
            id="teacher-missing",
        ),
        pytest.param(
            ["--device", "tpu"], "unknown device 'tpu': choose auto, cpu, cuda or cuda:N", id="device"
        ),
        pytest.param(
            ["--device", "cuda:99"], "take --device cpu, or see `fastvid doctor`", id="gpu-beyond-the-last"
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(refused, tmp_path, options, phrase):
    line = refused("train", *options)
    assert phrase in re.sub(
        r"\(choose from .*?\)", lambda choices: choices[0].replace("'", ""), line
    )  # Python quotes them up to 3.11
    assert not list(tmp_path.glob("out/*.safetensors")) + list(tmp_path.glob("out/*.resume"))


@pytest.mark.parametrize(
    "argv, phrase",
    [
        pytest.param(["frob"], "invalid choice: 'frob'", id="command"),
        pytest.param(
            ["--frobnicate"],
            "the following arguments are required: COMMAND (see fastvid --help)",
            id="no-command",
        ),
        pytest.param(
            ["reproduce", "--fractions", "full,half"],
            "--fractions is full,half, wanted full or percents between 0 and 100",
            id="fraction",
        ),
        pytest.param(
            ["reproduce", "--fractions", "120"],
            "--fractions is 120, wanted full or percents",
            id="fraction-above-100",
        ),
        pytest.param(
            ["reproduce", "--dataset", "digits", "--fractions", "0.1"],
            "0.1 % of 140 images per class is less than one image",
            id="fraction-of-no-image",
        ),
        pytest.param(["reproduce", "--methods", "dkd"], "unknown method 'dkd'", id="method-of-the-grid"),
        pytest.param(
            ["reproduce", "--per-class", "5"],
            "unrecognized arguments: --per-class 5",
            id="option-of-train-only",
        ),
        pytest.param(
            ["report"],
            "the following arguments are required: DIR (see fastvid report --help)",
            id="report-of-nothing",
        ),
        pytest.param(
            ["report", "no/such/folder"],
            "no folder no/such/folder: give the --out folder of `fastvid train` or `fastvid reproduce`",
            id="report-missing",
        ),
    ],
)
def test_another_command_line_that_cannot_be_is_refused(refused, monkeypatch, tmp_path, argv, phrase):
    monkeypatch.chdir(tmp_path)
    assert phrase in refused(*argv)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_gpu_is_refused_where_there_is_none(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "no GPU for --device cuda: torch" in refused("train", "--device", "cuda")


# --- data sets


def test_a_missing_data_set_is_named_with_the_folder_it_was_looked_for_in(refused, tmp_path):
    line = refused("train", "--dataset", "cifar10", "--data", tmp_path)
    assert (
        f"no cifar-10-batches-py in {tmp_path}: point --data at the folder that holds it, or add --download"
        in line
    )


def test_the_folder_of_the_batches_itself_is_one_level_too_deep(refused, cifar10_root):
    line = refused("train", "--dataset", "cifar10", "--data", cifar10_root / "cifar-10-batches-py")
    assert "point --data at the folder that holds it" in line


@pytest.mark.parametrize(
    "damage, phrase",
    [
        pytest.param(
            lambda content: content[:9] + bytes([content[9] ^ 1]) + content[10:],
            "it is damaged or another file; unpack the official archive again",
            id="flipped-bit",
        ),
        pytest.param(lambda content: content[:-1], "it is damaged or another file", id="cut"),
        pytest.param(
            None,
            "No such file or directory: unpack the official archive again, or add --download",
            id="missing",
        ),
    ],
)
def test_a_damaged_cifar_file_is_named(refused, cifar10_root, tmp_path, damage, phrase):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar10_root / folder.name).iterdir():
        (folder / path.name).symlink_to(path)
    file = folder / "data_batch_2"
    content = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(content))
    line = refused("train", "--dataset", "cifar10", "--data", tmp_path)
    assert str(file) in line and phrase in line


@pytest.mark.parametrize(
    "present, broken, phrase",
    [
        pytest.param(
            [],
            None,
            "train: --dataset folder wants DATA/train/CLASS/IMAGE and DATA/test/CLASS/IMAGE",
            id="no-train",
        ),
        pytest.param(["train/cat", "train/dog"], None, "test: --dataset folder wants", id="no-test"),
        pytest.param(
            ["train/cat", "test/cat"], None, "train holds 1 class folders, wanted two or more", id="one-class"
        ),
        pytest.param(
            ["train/cat", "train/dog", "test/cat", "test/cow"],
            None,
            "train and test hold different classes (cow, dog)",
            id="other-classes",
        ),
        pytest.param(
            ["train/cat", "train/dog", "test/cat", "test/dog"],
            "train/dog/0.png",
            "0.png (not a png, jpg, webp, bmp or tif image): replace or remove",
            id="damaged-image",
        ),
    ],
)
def test_a_wrong_folder_layout_is_told_with_the_right_one(refused, tmp_path, present, broken, phrase):
    root = tmp_path / "data"
    for name in present:
        (root / name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(np.full((32, 32, 3), 40, np.uint8)).save(root / name / f"{number}.png")
    if broken:
        (root / broken).write_bytes(b"no image")
    line = refused(
        "train", "--dataset", "folder", "--data", root, "--per-class", 20, "--validation-per-class", 0
    )
    assert phrase in line and str(root) in line


# --- teachers


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "sizes, phrase",
    [
        pytest.param(
            (10, 2, 10),
            "holds a WRN-10-2 for 10 classes, but a WRN-10-1 for 10 was asked for: set --teacher-depth and --teacher-width",
            id="width",
        ),
        pytest.param(
            (16, 1, 10), "holds a WRN-16-1 for 10 classes, but a WRN-10-1 for 10 was asked for", id="depth"
        ),
        pytest.param(
            (10, 1, 100),
            "holds a WRN-10-1 for 100 classes, but a WRN-10-1 for 10 was asked for: set --teacher-depth and "
            "--teacher-width, or take a teacher of this data set",
            id="classes",
        ),
    ],
)
def test_a_teacher_of_other_sizes_is_named_with_its_own(refused, tmp_path, sizes, phrase):
    path = save_network(tmp_path / "t.safetensors", *sizes)
    assert f"{path} {phrase}" in refused("train", "--method", "vid", "--teacher", path)


def test_missing_and_unexpected_keys_of_a_teacher_are_named(refused, tmp_path):
    path = save_network(
        tmp_path / "t.safetensors", 10, 1, change=lambda state: state.update(extra=state.pop("bn1.bias"))
    )
    line = refused("train", "--method", "kd", "--teacher", path)
    assert (
        f"{path} does not fit a WRN-10-1: missing keys bn1.bias; unexpected keys extra; other shapes none: take weights with"
        in line
    )


@pytest.mark.parametrize(
    "suffix, phrase",
    [(".pth", "not a readable torch file of tensors"), (".safetensors", "not a readable safetensors file")],
)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x02", id="pickle-header"),
        pytest.param(b"not weights at all\n" * 40, id="text"),
        pytest.param(b"PK\x03\x04 but no archive", id="zip-header"),
        pytest.param(pickle.dumps({1, 2}, protocol=4), id="newer-pickle"),
    ],
)
def test_a_teacher_of_garbage_is_refused(refused, tmp_path, suffix, phrase, content):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    line = refused("train", "--method", "at", "--teacher", path)
    assert str(path) in line and phrase in line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_teacher_with_code_in_its_pickle_is_refused_and_the_code_does_not_run(
    refused, tmp_path, zipped, canary
):
    content = {"model": WideResNet(10, 1).state_dict(), "optimizer": canary}
    torch.save(content, tmp_path / "t.pth", _use_new_zipfile_serialization=zipped)
    assert "t.pth: not a readable torch file of tensors" in refused(
        "train", "--method", "vid", "--teacher", tmp_path / "t.pth"
    )
    assert not canary.sang


# --- output folders


def test_a_foreign_folder_is_left_alone(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    line = refused("train")
    assert (
        f"{tmp_path / 'out'} holds files but no results.jsonl, so it is no output folder of fastvid: give --out a new"
        in line
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nope"])
def test_a_folder_that_cannot_be_written_is_named(refused, tmp_path, out):
    (tmp_path / "file").touch()
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    line = refused("train", "--out", tmp_path / out)
    assert re.search(rf"{tmp_path / out}: cannot write there: .+; choose another --out", line)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output folder with a finished student and kd run, their teacher)."""
    folder = tmp_path_factory.mktemp("finished")
    teacher = save_network(folder / "teacher.safetensors", 10, 1)
    assert (
        cli.main(
            [
                "train",
                *TINY,
                "--method",
                "student,kd",
                "--teacher",
                str(teacher),
                "--out",
                str(folder / "out"),
            ]
        )
        == 0
    )
    return folder / "out", teacher


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "options, phrase",
    [
        pytest.param(
            ["--learning-rate", "0.05"],
            "learning_rate = 0.1, but now it is 0.05: give the old settings or another --out",
            id="number",
        ),
        pytest.param(["--epochs", "2"], "epochs = 1, but now it is 2", id="length"),
        pytest.param(["--precision", "bf16"], "precision = fp32, but now it is bf16", id="choice"),
        pytest.param(
            ["--kd-alpha", "0.5"],
            "kd = {'alpha': 0.9, 'temperature': 4.0}, but now it is {'alpha': 0.5, 'temperature': 4.0}",
            id="option-of-a-method",
        ),
        pytest.param(
            ["--per-class", "6", "--validation-per-class", "2"],
            "validation_per_class = 1, but now it is 2",
            id="other-split",
        ),
    ],
)
def test_results_of_another_configuration_are_not_mixed_with_this_one(refused, finished, options, phrase):
    out, teacher = finished
    before = sorted(path.name for path in out.iterdir()), (out / "results.jsonl").read_bytes()
    assert f"{out / 'results.jsonl'} was made with {phrase}" in refused(
        "train", "--out", out, "--teacher", teacher, *options
    )
    assert before == (sorted(path.name for path in out.iterdir()), (out / "results.jsonl").read_bytes())


@pytest.mark.survival("wrong but well-formed")
def test_results_of_another_teacher_are_not_mixed_with_this_one(refused, finished, tmp_path):
    out, _ = finished
    other = save_network(tmp_path / "other.safetensors", 10, 1, change=lambda state: state["fc.bias"].add_(1))
    line = refused("train", "--out", out, "--method", "kd,vid", "--teacher", other)
    assert re.search(
        rf"{out} holds results of another teacher \(SHA-256 \w{{12}}, now \w{{12}}\): give the old teacher or another",
        line,
    )


def test_a_finished_command_started_again_succeeds_and_says_so(finished, capsys):
    out, teacher = finished
    assert (
        cli.main(["train", *TINY, "--method", "student,kd", "--teacher", str(teacher), "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().err
    assert not said.count("from the start")
    assert [line.split(" | ")[0] for line in said.splitlines() if line.endswith("finished before")] == [
        "student",
        "kd",
    ]


def test_a_table_can_be_piped_into_a_command_that_stops_reading(finished):
    out, _ = finished
    ran = subprocess.run(
        f"{sys.executable} -m fastvid report {out} | true",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stderr == ""


def test_training_goes_on_when_nobody_reads_its_progress(tmp_path):
    command = " ".join(
        [sys.executable, "-m", "fastvid", "train", *TINY, "--method", "student", "--out", str(tmp_path)]
    )
    subprocess.run(f"{command} 2>&1 | true", shell=True, check=True)
    (result,), _ = results.read(tmp_path)
    assert result.method == "student"


def test_a_terminal_without_the_plus_minus_sign_still_gets_the_table(finished):
    out, _ = finished
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(
        [sys.executable, "-m", "fastvid", "report", str(out)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "? sample standard deviation" in ran.stdout


@pytest.mark.parametrize("option", ["--teacher", "--data"])
def test_a_path_that_the_system_refuses_is_named(refused, option):
    path = "x" * 300
    dataset = ["--dataset", "cifar10"] if option == "--data" else []
    assert path in refused("train", "--method", "kd", option, path, *dataset)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
    ],
    ids=["cpu", "gpu", "python"],
)
def test_what_does_not_fit_into_memory_is_refused_in_one_line(refused, monkeypatch, error):
    def exhausted(config):
        raise error

    monkeypatch.setattr("fastvid.train.train", exhausted)
    assert "out of memory: set a smaller --batch-size" in refused("train", "--method", "student")


def test_the_whole_split_is_not_given_as_a_subset(refused):
    message = refused("train", "--method", "student", "--per-class", "140")
    assert "--per-class 140 is the whole training split of digits: leave it out" in message


def test_a_teacher_is_given_or_trained_but_not_both(refused, tmp_path):
    message = refused(
        "reproduce",
        "--dataset",
        "digits",
        "--methods",
        "teacher,vid",
        "--teacher",
        "FILE",
        "--out",
        tmp_path / "out",
    )
    assert "--teacher gives a teacher and --methods asks to train one: leave one of them out" in message


def image_folder(root, grey):
    for split in ("train", "test"):
        for index, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (32, 32), (grey, 40 * index, 20 * number)).save(
                    root / split / name / f"{number}.png"
                )
    return str(root)


@pytest.mark.survival("wrong but well-formed")
def test_other_images_under_the_same_name_do_not_continue_a_folder_of_results(refused, tmp_path):
    one, other = image_folder(tmp_path / "one", 10), image_folder(tmp_path / "other", 11)
    options = ["--dataset", "folder", "--method", "student", "--per-class", "7", "--batch-size", "8"]
    assert cli.main(["train", *TINY, *options, "--data", one, "--out", str(tmp_path / "out")]) == 0
    message = refused("train", *options, "--data", other, "--seed", "1")
    assert "holds results of another folder" in message and "give the old data or another --out" in message


@pytest.mark.survival("wrong but well-formed")
def test_a_teacher_that_says_it_was_trained_on_other_classes_or_constants_is_refused(
    refused, finished, tmp_path
):
    out, _ = finished
    data = image_folder(tmp_path / "data", 10)
    for name in "abcdefgh":  # ten classes, as digits has
        for split in ("train", "test"):
            shutil.copytree(tmp_path / "data" / split / "cat", tmp_path / "data" / split / name)
    teacher = next(out.glob("student-*.safetensors"))
    message = refused(
        "train",
        "--dataset",
        "folder",
        "--data",
        data,
        "--method",
        "kd",
        "--teacher",
        teacher,
        "--teacher-width",
        "1",
    )
    assert "was trained with other normalisation" in message and "take a teacher of this data set" in message


# --- optional packages


@pytest.mark.parametrize(
    "modules, options, phrase",
    [
        pytest.param(
            ["sklearn", "sklearn.datasets"],
            [],
            "--dataset digits needs scikit-learn: pip install scikit-learn",
            id="scikit-learn",
        ),
        pytest.param(
            ["torchvision"],
            ["--dataset", "cifar10", "--download"],
            "--download needs torchvision: pip install torchvision",
            id="torchvision",
        ),
        pytest.param(
            ["PIL", "nvidia.dali"],
            ["--dataset", "folder"],
            "--dataset folder needs Pillow: pip install pillow",
            id="pillow",
        ),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    refused, monkeypatch, tmp_path, modules, options, phrase
):
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    train.load_split.cache_clear()  # digits of an earlier test
    assert phrase in refused("train", "--data", tmp_path, *options)


# --- what is offered


def flat_fields(options, prefix=""):
    """(option, type, field, the dataclass it stands in) of every setting, groups opened."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in OPTION_GROUPS:
            yield from flat_fields(hints[field.name], f"{field.name}_")
        else:
            yield (
                f"--{(prefix + field.name).replace('_', '-')}",
                cli._without_none(hints[field.name]),
                field,
                options,
            )


@pytest.mark.parametrize(
    "command, options, left_out",
    [
        ("train", TrainConfig, set()),
        ("reproduce", Grid, set()),
        ("reproduce", TrainConfig, {"--method", "--per-class", "--seed", "--profile"}),
    ],
)
def test_help_shows_every_setting_with_its_meaning_and_default(command, options, left_out, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert ended.value.code == 0
    for flag, _, field, owner in flat_fields(options):
        shown = re.search(rf"(?<!\[){flag}[ ,]", text)
        assert bool(shown) != (flag in left_out), flag
        if shown:
            meaning = cli._field_docs(owner)[field.name]
            assert meaning.replace("- ", "-") in text, flag
            if isinstance(field.default, (int, float, str)) and field.type != "bool":
                assert re.search(
                    rf"{re.escape(meaning.replace('- ', '-'))} \(default: {re.escape(str(field.default))}\)",
                    text,
                ), flag


def test_without_options_the_command_line_is_the_default_configuration():
    assert cli._from_args(TrainConfig, cli._parser().parse_args(["train"])) == TrainConfig()
    assert cli._from_args(Grid, cli._parser().parse_args(["reproduce"])) == Grid()


@pytest.mark.parametrize(
    "flag, kind, field, owner",
    list(flat_fields(TrainConfig)),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_reaches_its_field_and_no_other(flag, kind, field, owner):
    if kind is bool:
        argv, value = [flag], True
    elif get_origin(kind) is Literal:
        value = get_args(kind)[-1]
        argv = [flag, value]
    elif get_origin(kind) is tuple:
        value = ("at", "kd+vid") if get_args(kind)[0] is str else (0.25, 0.5)
        argv = [flag, ",".join(map(str, value))]
    else:
        value = (
            "2epochs" if field.name == "checkpoint_every" else {int: 22, float: 0.25, str: "x"}[kind]
        )  # 22 is a legal depth, too
        argv = [flag, str(value)]
    given, default = cli._from_args(TrainConfig, cli._parser().parse_args(["train", *argv])), TrainConfig()
    if owner is TrainConfig:
        assert given == dataclasses.replace(default, **{field.name: value})
    else:
        group = next(name for name in OPTION_GROUPS if isinstance(getattr(default, name), owner))
        assert given == dataclasses.replace(
            default, **{group: dataclasses.replace(getattr(default, group), **{field.name: value})}
        )
    assert given != default


def test_the_module_runs_and_prints_its_version():
    ran = subprocess.run([sys.executable, "-m", "fastvid", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"fastvid {fastvid.__version__}\n", "")


def test_the_exit_code_reaches_the_shell_and_a_bad_input_has_no_traceback(tmp_path):
    argv = ["train", "--dataset", "cifar10", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-m", "fastvid", *argv], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    message = (
        f"no cifar-10-batches-py in {tmp_path}: point --data at the folder that holds it, or add --download"
    )
    assert ran.stderr == f"fastvid: error: {message}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_outside_of_training_is_one_line_too_and_has_the_conventional_code(
    monkeypatch, capsys, number
):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_doctor", lambda args: signal.raise_signal(number))
    try:
        assert cli.main(["doctor"]) == 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "fastvid: interrupted: the same command starts again where it was\n"


# --- doctor


def test_doctor_says_versions_device_loader_losses_packages_and_data(tmp_path, capsys):
    assert cli.main(["doctor", "--data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for pattern in (
        rf"^fastvid {fastvid.__version__}, Python {sys.version_info.major}\.{sys.version_info.minor}\.",
        r"^device +\S",
        r"^loader +(dali \d+\.\d+|torch)",
        r"^engine +(graph|eager)",
        r"^losses +(PyTorch, in blocks|Triton kernels)",
        rf"^  torch +{re.escape(metadata.version('torch'))} +training$",
        rf"^  numpy +{re.escape(np.__version__)} ",
        rf"^data under {tmp_path}$",
        r"^  cifar10 +not found$",
        r"^  folder +not found$",
        r"^  digits +1,400 training and 397 test images$",
    ):
        assert re.search(pattern, text, re.MULTILINE), pattern


def test_the_rate_does_not_count_the_wait_for_a_compiler(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("fastvid.progress.time.monotonic", lambda: now)
    bar = Progress("a run", total=1000, least_seconds=2.0)
    for now in (300.0, 320.0):  # five minutes of preparation
        bar.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "a run: from the start",
        "a run:  10 %",
        "a run:  20 %  5 images/s  ETA 02:40",
    ]


def test_doctor_finds_real_cifar10(cifar10_root, capsys):
    assert cli.main(["doctor", "--data", str(cifar10_root)]) == 0
    assert re.search(
        r"^  cifar10 +50,000 training and 10,000 test images$", capsys.readouterr().out, re.MULTILINE
    )


def test_doctor_tells_damage_and_missing_packages_and_still_succeeds(tmp_path, monkeypatch, capsys):
    spec = CIFAR10
    for file in (*spec.train, *spec.test, spec.meta[0]):
        (tmp_path / spec.folder).mkdir(exist_ok=True)
        (tmp_path / spec.folder / file).write_bytes(b"cut off")
    for module in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["doctor", "--data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  cifar10 +.*data_batch_1: md5 is .*damaged or another file", text, re.MULTILINE)
    assert re.search(r"^  digits +.*pip install scikit-learn$", text, re.MULTILINE)
