"""The command line: its options, and one line with the remedy for every error that the user can correct."""

import dataclasses
import os
import pickle
import re
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
from tiny import command, options

import fastvid
from fastvid import checkpoint, cli, datasets, results, signals
from fastvid.config import OPTION_GROUPS, Grid, TrainConfig
from fastvid.plan import BatchPlan
from fastvid.progress import Progress
from fastvid.wresnet import WideResNet

ONE_EPOCH = {"epochs": 1, "teacher_width": 1}


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(*argv): the single line on stderr of a command that ends with exit code 2.

    `train` gets the options of TINY and an output folder.
    """

    def run(name, *more):
        capsys.readouterr()
        argv = command(tmp_path / "out", **ONE_EPOCH) if name == "train" else [name]
        with warnings.catch_warnings(record=True) as shown:  # Python would print them as more lines
            assert cli.main([*argv, *map(str, more)]) == 2
        assert not [warning for warning in shown if issubclass(warning.category, UserWarning)]
        printed = capsys.readouterr()
        *told, line = printed.err.splitlines()
        assert line.startswith("fastvid: error: ") and not printed.out
        assert all(re.match("teacher |warning: the teacher ", other) for other in told), "measured before"
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
    "typed, phrase",
    [
        ("--method dkd", "unknown method 'dkd': choose from teacher, student, kd, fitnet, at, vid, or a sum"),
        ("--method student,at+kd", "unknown method 'at+kd': write it 'kd+at'"),
        ("--method student,student", "--method is student,student, wanted one or more methods, each once"),
        (
            "--method vid",
            "--method vid needs a teacher: add --teacher FILE, or train a teacher with --method teacher",
        ),
        ("--method vid --teacher no/such.pth", "no weights at no/such.pth: check the path"),
        ("--vid-variant mine", "invalid choice: 'mine' (choose from paper, authors, repdistiller)"),
        ("--dataset mnist", "invalid choice: 'mnist' (choose from cifar10, cifar100, folder, digits)"),
        ("--precision int8", "--precision: invalid choice: 'int8' (choose from fp32, bf16, fp16)"),
        ("--frobnicate", "unrecognized arguments: --frobnicate (see fastvid train --help)"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--epochs", "--epochs: expected one argument"),
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--milestones 0.3,x", "--milestones: invalid list of float value: '0.3,x'"),
        ("--epochs 0", "--epochs is 0, wanted 1 or more"),
        (f"--seed {2**63}", f"--seed is {2**63}, wanted"),
        ("--learning-rate nan", "--learning-rate is nan, wanted a finite number"),
        ("--student-depth 17", "--student-depth is 17, wanted 6n + 4, such as 10, 16, 22, 28 or 40"),
        ("--method teacher --teacher-depth 4", "--teacher-depth is 4, wanted 6n + 4"),
        ("--student-width 0", "--student-width is 0, wanted 1 or more"),
        ("--fitnet-tap group9", "--fitnet-tap is group9, wanted"),
        ("--fitnet-tap group1,all", "--fitnet-tap is group1,all, wanted"),
        ("--per-class 141", "141 images per class were asked for, but class '0' has 140: take at most 140"),
        ("--per-class 140", "--per-class 140 is the whole training split of digits: leave out this option"),
        ("--validation-per-class 5", "validation"),
        (
            "--batch-size 41",
            "a batch of 41 is larger than the training subset of 40 images: set --batch-size 40",
        ),
        ("--device tpu", "unknown device 'tpu': choose auto, cpu, cuda or cuda:N"),
        ("--device cuda:99", "take --device cpu, or see `fastvid doctor`"),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_is_made(refused, tmp_path, typed, phrase):
    choices = re.compile(r"\(choose from .*?\)")  # Python quotes them up to 3.11
    line = choices.sub(lambda found: found[0].replace("'", ""), refused("train", *typed.split()))
    assert phrase in line
    assert not list(tmp_path.glob("out/*.safetensors")) + list(tmp_path.glob("out/*.resume"))


@pytest.mark.parametrize(
    "typed, phrase",
    [
        ("frob", "invalid choice: 'frob'"),
        ("--frobnicate", "the following arguments are required: COMMAND (see fastvid --help)"),
        (
            "reproduce --fractions full,half",
            "--fractions is full,half, wanted full or percents between 0 and 100",
        ),
        ("reproduce --methods dkd", "unknown method 'dkd'"),
        ("reproduce --per-class 5", "unrecognized arguments: --per-class 5"),
        ("report", "the following arguments are required: DIR (see fastvid report --help)"),
        ("report no/such/folder", "no folder no/such/folder: give the --out folder of"),
    ],
)
def test_another_impossible_command_line_is_refused(refused, monkeypatch, tmp_path, typed, phrase):
    monkeypatch.chdir(tmp_path)
    assert phrase in refused(*typed.split())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("option", ["--teacher", "--data"])
def test_a_path_that_the_system_refuses_is_named(refused, option):
    dataset = ["--dataset", "cifar10"] if option == "--data" else []
    assert "x" * 300 in refused("train", "--method", "kd", option, "x" * 300, *dataset)


# --- data sets


def test_a_missing_data_set_is_named_with_the_folder_it_was_looked_for_in(refused, tmp_path):
    line = refused("train", "--dataset", "cifar10", "--data", tmp_path)
    assert f"no cifar-10-batches-py in {tmp_path}: point --data at the folder that holds it, or add" in line


def test_the_folder_of_the_batches_itself_is_one_level_too_deep(refused, cifar10_root):
    line = refused("train", "--dataset", "cifar10", "--data", cifar10_root / "cifar-10-batches-py")
    assert "point --data at the folder that holds it" in line


def flip_a_bit(content):
    return content[:9] + bytes([content[9] ^ 1]) + content[10:]


@pytest.mark.parametrize(
    "damage, phrase",
    [
        pytest.param(
            flip_a_bit, "it is damaged or another file; unpack the official archive", id="flipped-bit"
        ),
        pytest.param(lambda content: content[:-1], "it is damaged or another file", id="cut"),
        pytest.param(None, "No such file or directory: unpack the official archive again, or", id="missing"),
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
        pytest.param("", None, "train: --dataset folder wants DATA/train/CLASS/", id="no-train"),
        pytest.param("train/cat train/dog", None, "test: --dataset folder wants", id="no-test"),
        pytest.param("train/cat test/cat", None, "train holds 1 class folders, wanted two", id="one-class"),
        pytest.param(
            "train/cat train/dog test/cat test/cow",
            None,
            "train and test hold different classes (cow, dog)",
            id="other-classes",
        ),
        pytest.param("train/cat train/dog test/cat test/dog", "train/dog/0.png", "0.png", id="damaged-image"),
    ],
)
def test_a_wrong_folder_layout_is_told_with_the_right_one(refused, tmp_path, present, broken, phrase):
    root = tmp_path / "data"
    for name in present.split():
        (root / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (32, 32)).save(root / name / f"{number}.png")
    if broken:
        (root / broken).write_bytes(b"no image")
    settings = options(dataset="folder", data=root, per_class=20, validation_per_class=0)
    line = refused("train", *settings)
    assert phrase in line and str(root) in line


# --- teachers


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "sizes, found",
    [
        pytest.param((10, 2, 10), "WRN-10-2 for 10 classes", id="width"),
        pytest.param((16, 1, 10), "WRN-16-1 for 10 classes", id="depth"),
        pytest.param((10, 1, 100), "WRN-10-1 for 100 classes", id="classes"),
    ],
)
def test_a_teacher_of_other_sizes_is_named_with_its_own(refused, tmp_path, sizes, found):
    path = save_network(tmp_path / "t.safetensors", *sizes)
    assert (
        f"{path} holds a {found}, but a WRN-10-1 for 10 was asked for: set --teacher-depth and "
        "--teacher-width, or take a teacher of this data set"
    ) in refused("train", "--method", "vid", "--teacher", path)


def test_missing_and_unexpected_keys_of_a_teacher_are_named(refused, tmp_path):
    def rename(state):
        state["extra"] = state.pop("bn1.bias")

    path = save_network(tmp_path / "t.safetensors", 10, 1, change=rename)
    assert (
        f"{path} does not fit a WRN-10-1: missing keys bn1.bias; unexpected keys extra; other shapes none: "
    ) in refused("train", "--method", "kd", "--teacher", path)


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
def test_code_in_the_pickle_of_a_teacher_is_refused_and_does_not_run(refused, tmp_path, zipped, canary):
    path, content = tmp_path / "t.pth", {"model": WideResNet(10, 1).state_dict(), "optimizer": canary}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    line = refused("train", "--method", "vid", "--teacher", path)
    assert "t.pth: not a readable torch file of tensors" in line and not canary.sang


# --- output folders


def test_a_foreign_folder_is_left_alone(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert (
        f"{tmp_path / 'out'} holds files but no results.jsonl, so it is no output folder of fastvid: "
    ) in refused("train")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nope"])
def test_a_folder_that_cannot_be_written_is_named(refused, tmp_path, out):
    (tmp_path / "file").touch()
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    line = refused("train", "--out", tmp_path / out)
    assert f"{tmp_path / out}: " in line and "choose another --out" in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output folder with a finished student and kd run, their teacher, their command)."""
    folder = tmp_path_factory.mktemp("finished")
    teacher = save_network(folder / "teacher.safetensors", 10, 1)
    argv = command(folder / "out", "student", "kd", teacher=teacher, **ONE_EPOCH)
    assert cli.main(argv) == 0
    return folder / "out", teacher, argv


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "typed, phrase",
    [
        (
            "--learning-rate 0.05",
            "learning_rate = 0.1, but now the value is 0.05: give the old settings or another --out",
        ),
        ("--epochs 2", "epochs = 1, but now the value is 2"),
        ("--precision bf16", "precision = fp32, but now the value is bf16"),
        ("--kd-alpha 0.5", "kd = {'alpha': 0.9, 'temperature': 4.0}, but now the value is {'alpha': 0.5, "),
        ("--per-class 6 --validation-per-class 2", "validation_per_class = 1, but now the value is 2"),
    ],
)
def test_results_of_another_configuration_are_not_mixed_with_this_one(refused, finished, typed, phrase):
    out, teacher, _ = finished
    before = sorted(out.glob("[!.]*")), (out / "results.jsonl").read_bytes()
    line = refused("train", "--out", out, "--teacher", teacher, *typed.split())
    assert f"{out / 'results.jsonl'} was made with {phrase}" in line
    assert before == (sorted(out.glob("[!.]*")), (out / "results.jsonl").read_bytes())


@pytest.mark.survival("wrong but well-formed")
def test_results_of_another_teacher_are_not_mixed_with_this_one(refused, finished, tmp_path):
    out, *_ = finished
    other = save_network(tmp_path / "other.safetensors", 10, 1, change=lambda state: state["fc.bias"].add_(1))
    line = refused("train", "--out", out, "--method", "kd,vid", "--teacher", other)
    assert re.search(
        rf"{out} holds results of another teacher \(SHA-256 \w{{12}}, now \w{{12}}\): give", line
    )


def test_a_finished_command_started_again_succeeds_and_says_so(finished, capsys):
    assert cli.main(finished[2]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[0] for line in said if line.endswith("finished before")] == ["student", "kd"]
    assert not [line for line in said if "from the start" in line]


@pytest.mark.slow
def test_a_table_can_be_piped_into_a_command_that_stops_reading(finished):
    shell = f"{sys.executable} -m fastvid report {finished[0]} | true"
    assert subprocess.run(shell, shell=True, capture_output=True, check=True).stderr == b""


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads_its_progress(tmp_path):
    argv = " ".join([sys.executable, "-m", "fastvid", *map(str, command(tmp_path, **ONE_EPOCH))])
    subprocess.run(f"{argv} 2>&1 | true", shell=True, check=True)
    (result,), _ = results.read(tmp_path)
    assert result.method == "student"


@pytest.mark.slow
def test_a_terminal_without_the_plus_minus_sign_still_gets_the_table(finished):
    argv = [sys.executable, "-m", "fastvid", "report", str(finished[0])]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    assert "| Student" in ran.stdout and "?" in ran.stdout


def image_folder(root, grey, classes=("cat", "dog")):
    for split in ("train", "test"):
        for index, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                image = Image.new("RGB", (32, 32), (grey, 20 * index, 20 * number))
                image.save(root / split / name / f"{number}.png")
    return root


@pytest.mark.survival("wrong but well-formed")
def test_other_images_under_the_same_name_do_not_continue_a_folder_of_results(refused, tmp_path):
    settings = options(dataset="folder", per_class=7, batch_size=8)
    argv = command(tmp_path / "out", **ONE_EPOCH)
    assert cli.main([*argv, *settings, "--data", str(image_folder(tmp_path / "one", 10))]) == 0
    line = refused("train", *settings, "--data", image_folder(tmp_path / "other", 11), "--seed", "1")
    assert "holds results of another folder" in line and "give the old data or another --out" in line


@pytest.mark.survival("wrong but well-formed")
def test_a_teacher_that_was_trained_with_other_normalisation_is_refused(refused, finished, tmp_path):
    teacher = next(finished[0].glob("student-*.safetensors"))
    data = image_folder(tmp_path / "data", 10, classes="abcdefghij")  # ten classes, as digits has
    line = refused("train", *options(dataset="folder", data=data, method="kd", teacher=teacher))
    assert "was trained with other normalisation" in line and "take a teacher of this data set" in line


# --- optional packages


@pytest.mark.parametrize(
    "modules, typed, phrase",
    [
        (
            ["sklearn", "sklearn.datasets"],
            "",
            "--dataset digits needs scikit-learn: pip install scikit-learn",
        ),
        (
            ["torchvision"],
            "--dataset cifar10 --download",
            "--download needs torchvision: pip install torchvision",
        ),
        (["PIL", "nvidia.dali"], "--dataset folder", "--dataset folder needs Pillow: pip install pillow"),
    ],
    ids=["scikit-learn", "torchvision", "pillow"],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    refused, monkeypatch, tmp_path, modules, typed, phrase
):
    image_folder(tmp_path, 10)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    datasets._load_once.cache_clear()  # digits of an earlier test
    assert phrase in refused("train", "--data", tmp_path, *typed.split())


# --- what is offered


def flat_fields(kind, prefix=""):
    """(option, type, field, the dataclass it stands in) of every setting, groups opened."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in OPTION_GROUPS:
            yield from flat_fields(hints[field.name], f"{field.name}_")
        else:
            flag = f"--{(prefix + field.name).replace('_', '-')}"
            yield flag, cli._without_none(hints[field.name]), field, kind


@pytest.mark.parametrize(
    "name, kind, left_out",
    [
        ("train", TrainConfig, set()),
        ("reproduce", Grid, set()),
        ("reproduce", TrainConfig, {"--method", "--per-class", "--seed", "--profile"}),
    ],
)
def test_help_shows_every_setting_with_its_meaning_and_default(name, kind, left_out, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    assert ended.value.code == 0
    for flag, _, field, owner in flat_fields(kind):
        shown = re.search(rf"(?<!\[){flag}[ ,]", text)
        assert bool(shown) != (flag in left_out), flag
        if shown:
            meaning = cli._field_docs(owner)[field.name].replace("- ", "-")
            assert meaning in text, flag
            if isinstance(field.default, (int, float, str)) and field.type != "bool":
                assert f"{meaning} (default: {field.default})" in text, flag


def test_without_options_the_command_line_is_the_default_configuration():
    assert cli._from_args(TrainConfig, cli._parser().parse_args(["train"])) == TrainConfig()
    assert cli._from_args(Grid, cli._parser().parse_args(["reproduce"])) == Grid()


@pytest.mark.parametrize(
    "flag, kind, field, owner",
    list(flat_fields(TrainConfig)),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_reaches_its_field_and_no_other(flag, kind, field, owner):
    special = {"checkpoint_every": "2epochs", "method": ("at", "kd+vid"), "tap": ("stem", "group3")}
    if get_origin(kind) is Literal:
        value = get_args(kind)[-1]
    else:  # 22 is a legal depth, too
        value = special.get(field.name, {bool: True, int: 22, float: 0.25, str: "x"}.get(kind, (0.25, 0.5)))
    text = [] if kind is bool else [",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    given = cli._from_args(TrainConfig, cli._parser().parse_args(["train", flag, *text]))
    default, expected = TrainConfig(), {field.name: value}
    if owner is not TrainConfig:
        group = next(name for name in OPTION_GROUPS if isinstance(getattr(default, name), owner))
        expected = {group: dataclasses.replace(getattr(default, group), **expected)}
    assert given == dataclasses.replace(default, **expected) != default


@pytest.mark.slow
def test_the_exit_code_reaches_the_shell_and_a_bad_input_has_no_traceback(tmp_path):
    version = [sys.executable, "-m", "fastvid", "--version"]
    ran = subprocess.run(version, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"fastvid {fastvid.__version__}\n", "")
    argv = ["train", *options(dataset="cifar10", data=tmp_path, out=tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-m", "fastvid", *argv], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert re.fullmatch(rf"fastvid: error: no cifar-10-batches-py in {tmp_path}: .*\n", ran.stderr)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_outside_of_training_is_one_line_too_and_has_the_conventional_code(
    monkeypatch, capsys, number
):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(cli, "_doctor", lambda args: signal.raise_signal(number))
    try:
        assert cli.main(["doctor"]) == 128 + number
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    told = "fastvid: interrupted: the same command resumes from the last saved state\n"
    assert capsys.readouterr().err == told


def test_a_hangup_that_nohup_ignores_is_ignored_in_training_and_outside(tmp_path, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "_doctor", lambda args: signal.raise_signal(signal.SIGHUP))
        assert cli.main(["doctor"]) == 0
        with signals.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_rate_does_not_count_the_wait_for_a_compiler(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("fastvid.progress.time.monotonic", lambda: now)
    bar = Progress("a run", BatchPlan(1000, 100, seed=0), epochs=1, least_seconds=2.0)
    for now in (300.0, 320.0):  # five minutes of preparation
        bar.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "a run: from the start",
        "a run:  10 %",
        "a run:  20 %  5 images/s  ETA 02:40",
    ]


def test_a_training_that_resumes_says_how_far_it_is(capsys):
    Progress("a run", BatchPlan(40, 16, seed=0), epochs=2, step=4)  # the last of 3 batches is short
    assert capsys.readouterr().err == "a run: resumes at 70 %\n"


# --- doctor


def test_doctor_says_versions_device_loader_losses_packages_and_data(tmp_path, capsys):
    assert cli.main(["doctor", "--data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for pattern in (
        rf"^fastvid {fastvid.__version__}, Python {sys.version_info.major}\.{sys.version_info.minor}\.",
        r"^device +\S",
        r"^loader +(dali \d+\.\d+|torch)",
        r"^engine +(graph|eager)",
        r"^losses +(PyTorch|Triton kernels)",
        rf"^  torch +{re.escape(metadata.version('torch'))} +training$",
        rf"^  numpy +{re.escape(np.__version__)} ",
        rf"^data under {tmp_path}$",
        r"^  cifar10 +not found$",
        r"^  folder +not found$",
        r"^  digits +1,400 training and 397 test images$",
    ):
        assert re.search(pattern, text, re.MULTILINE), pattern


def test_doctor_finds_real_cifar10(cifar10_root, capsys):
    assert cli.main(["doctor", "--data", str(cifar10_root)]) == 0
    assert re.search(r"^  cifar10 +50,000 training and 10,000 test images$", capsys.readouterr().out, re.M)


def test_doctor_tells_damage_and_missing_packages_and_still_succeeds(
    tmp_path, cifar10_root, monkeypatch, capsys
):
    (tmp_path / "cifar-10-batches-py").mkdir()
    for path in (cifar10_root / "cifar-10-batches-py").glob("[!.]*"):
        (tmp_path / "cifar-10-batches-py" / path.name).write_bytes(b"cut off")
    for module in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["doctor", "--data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  cifar10 +.*data_batch_1: md5 is .*damaged or another file", text, re.MULTILINE)
    assert re.search(r"^  digits +.*pip install scikit-learn$", text, re.MULTILINE)
