"""Real inputs that several test files share; a test that needs one which is not here is skipped, and says so."""
import shutil
import subprocess
import sys
from pathlib import Path

import interpreter  # first: it decides how Triton defines its kernels
import pytest
import torch
from torch._functorch import config as functorch_config

from fastvid import checkpoint, datasets
from fastvid.wresnet import WideResNet

interpreter.mend()
functorch_config.enable_autograd_cache = False  # it finds a compiled backward by the operators' names: also that of older code

SHARED = Path(__file__).resolve().parents[1].parent / "shared"  # beside the checkout


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="as many kills, mutants and minutes as tests/README.md reports")
    parser.addoption("--figures", metavar="FILE", help="append what the tests of survival measured, as Markdown rows")


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


@pytest.fixture(scope="session")
def teacher_file():
    """A WRN-40-2 trained on the full CIFAR-10 training split, 92.47 % on the test split."""
    path = SHARED / "teacher" / "wrn40_2_cifar10.safetensors"
    if not path.is_file():
        pytest.skip("the trained teacher is not here: ../shared/teacher/wrn40_2_cifar10.safetensors is missing")
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Path of an untrained WRN-10-2, for tests that have no teacher of their own."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(1)
    checkpoint.save_weights(path, WideResNet(10, 2).state_dict(), {})
    return str(path)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that a test shall run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param
