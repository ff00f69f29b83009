"""Report about this machine: versions, device, default loader, engine and losses, available data."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import fastvid
from fastvid import datasets, loader
from fastvid.device import choose_device
from fastvid.errors import InputError
from fastvid.kernels import checks
from fastvid.step import LONG, choose_engine

PACKAGES = {  # package: its purpose
    "torch": "training",
    "triton": "losses on a GPU",
    "numpy": "data",
    "safetensors": "weights",
    "tqdm": "progress",
    "torchvision": "--download",
    "pillow": "--dataset folder",
    "scikit-learn": "--dataset digits",
    "matplotlib": "plots of report",
}


def doctor(data: str) -> str:
    """The report as lines of text. data: folder that may hold data sets."""
    device = choose_device("auto")
    name = f"{torch.get_num_threads()} CPU threads, no GPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    system = f"{platform.system()} {platform.machine()}"
    lines = [
        f"fastvid {fastvid.__version__}, Python {platform.python_version()}, {system}",
        f"device    {name}",
        f"loader    {loader.describe('auto')}",
        f"engine    {_engine(device)}",
        f"losses    {_losses(device)}",
        "",
        "packages",
    ]
    lines += [f"  {package:20} {_version(package):14} {purpose}" for package, purpose in PACKAGES.items()]
    lines += ["", f"data under {data}"]
    lines += [f"  {dataset:20} {_state(dataset, data)}" for dataset in datasets.NAMES]
    return "\n".join(lines)


def _engine(device: torch.device) -> str:
    short, long = (choose_engine("auto", device, steps) for steps in (1, LONG))
    return short if short == long else f"{short}, and {long} for trainings of {LONG} steps and more"


def _losses(device: torch.device) -> str:
    if device.type != "cuda":
        return "PyTorch (Triton's kernels run on CUDA tensors)"
    return "Triton kernels" if checks.triton else "none on this GPU: pip install triton"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _state(dataset: str, data: str) -> str:
    """State of the data set. Loads the data set to detect damage, unless loading can take minutes."""
    if not datasets.located(dataset, data):
        return "not found"
    try:
        if datasets.DATASETS[dataset].slow:
            for split in ("train", "test"):
                datasets.fingerprint(dataset, data, split)  # checks the layout without decoding images
            return "train/ and test/ found"
        train, test = (datasets.load(dataset, data, split) for split in ("train", "test"))
        return f"{len(train):,} training and {len(test):,} test images"
    except InputError as error:
        return str(error)
