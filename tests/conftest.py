"""Real inputs that several test files share. A test is skipped when its input is missing."""

import dataclasses
import hashlib
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import interpreter  # first: it decides how Triton defines its kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

from fastvid import checkpoint, datasets
from fastvid.datasets import cifar
from fastvid.loader import EvalLoader
from fastvid.wresnet import WideResNet

interpreter.mend()
functorch_config.enable_autograd_cache = (
    False  # it finds a compiled backward by the operators' names: also that of older code
)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"  # beside the checkout


def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("survival", mark.args[0]) for mark in item.iter_markers("survival")]


def pytest_terminal_summary(terminalreporter, config):
    """Print the last rows of --figures: the cases of each point without its own row, and the total time."""
    if not config.option.figures:
        return
    seconds, cases = 0.0, Counter()
    for report in (
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if hasattr(report, "duration")
    ):
        for point in (value for name, value in report.user_properties if name == "survival"):
            seconds += report.duration
            cases[point] += report.when == "call" and report.passed
    with open(config.option.figures, "a") as file:
        for point in ("wrong but well-formed", "numbers"):
            file.write(f"| {point} | {cases[point]} cases |\n")
        file.write(f"| all of it | {sum(cases.values())} tests in {seconds:,.0f} s |\n")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="300 kills, 200 signals and an hour of soak")
    parser.addoption(
        "--figures", metavar="FILE", help="append what the tests of survival measured, as Markdown rows"
    )


@pytest.fixture(scope="session")
def long(pytestconfig):
    return pytestconfig.option.long


@pytest.fixture
def figure(pytestconfig, record_property):
    """figure(what, measured): a row for the table in tests/README.md."""

    def write(what, measured):
        record_property(what, measured)
        if pytestconfig.option.figures:
            with open(pytestconfig.option.figures, "a") as file:
                file.write(f"| {what} | {measured} |\n")

    return write


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone and in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory):
    """Folder that holds the official CIFAR-10 files, as --data wants it."""
    script = SHARED / "cifar10" / "rebuild.py"
    if not script.is_file():
        pytest.skip("the official CIFAR-10 files are not here: ../shared/cifar10/rebuild.py is missing")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(script), str(root)], check=True, stdout=subprocess.DEVNULL)
    yield root
    shutil.rmtree(root)  # 180 MB, which pytest would keep for three runs


@pytest.fixture(scope="session")
def cifar10_train(cifar10_root):
    return datasets.load("cifar10", cifar10_root, "train")


@pytest.fixture(scope="session")
def cifar10_test(cifar10_root):
    return datasets.load("cifar10", cifar10_root, "test")


@pytest.fixture
def cifar100_root(tmp_path, monkeypatch):
    """Small files in the official CIFAR-100 format, whose md5 stands in for the published ones."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = np.random.default_rng(0)

    def split(images):
        return {
            "data": random.integers(0, 256, (images, 3072)).astype(np.uint8),
            "fine_labels": [i % 3 for i in range(images)],
            "coarse_labels": [7] * images,
            "filenames": ["x.png"] * images,
            "batch_label": "batch",
        }

    content = {
        "train": split(6),
        "test": split(4),
        "meta": {"fine_label_names": ["apple", "fish", "baby"], "coarse_label_names": ["thing"]},
    }
    for file, value in content.items():
        (folder / file).write_bytes(pickle.dumps(value, protocol=2))
    md5 = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in content}
    spec = dataclasses.replace(
        cifar.CIFAR100, train={"train": md5["train"]}, test={"test": md5["test"]}, meta=("meta", md5["meta"])
    )
    monkeypatch.setattr(cifar, "CIFAR100", spec)
    return tmp_path


@pytest.fixture(scope="session")
def teacher_file():
    """A WRN-40-2 trained on the full CIFAR-10 training split, 92.47 % on the test split."""
    path = SHARED / "teacher" / "wrn40_2_cifar10.safetensors"
    if not path.is_file():
        pytest.skip(
            "the trained teacher is not here: ../shared/teacher/wrn40_2_cifar10.safetensors is missing"
        )
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """File of a WRN-10-2 with random weights and a last layer fitted to digits. Students have width 1."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(1)
    network, arrays = WideResNet(10, 2), datasets.load("digits", "", "train").subset(5)
    images, labels = next(iter(EvalLoader(arrays, 50)))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of this one batch
        features = network(images).activated[-1].mean(dim=(2, 3))
        network.fc.weight.copy_(torch.linalg.lstsq(features, 10.0 * F.one_hot(labels).float()).solution.T)
    checkpoint.save_weights(path, network.state_dict(), {})
    return str(path)


class Canary:
    """Unpickling it creates the file `trace`: what an attacker's code would do, harmlessly."""

    def __init__(self, trace):
        self.trace, self.looked_up = trace, False

    def __reduce__(self):
        return Path.touch, (self.trace,)

    @property
    def sang(self):
        """Whether its code ran, or an unpickler went as far as to look for it."""
        return self.trace.exists() or self.looked_up


@pytest.fixture
def canary(tmp_path):
    """An object to pickle into a file. The end of the test checks that the object does detect unpickling."""
    one, watching = Canary(tmp_path / "code-ran"), True

    def hook(event, arguments):  # it cannot be taken away
        if watching and event == "pickle.find_class" and "pathlib" in str(arguments):
            one.looked_up = True

    sys.addaudithook(hook)
    yield one
    one.looked_up = False
    one.trace.unlink(missing_ok=True)
    pickle.loads(pickle.dumps(one))
    assert one.trace.exists() and one.looked_up, "the canary must be alive"
    watching = False


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that a test shall run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param
