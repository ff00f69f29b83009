"""Damaged files and malicious files: no file loads with other content unnoticed, and no file runs code."""

import dataclasses
import pickle
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_results import RESULT

from fastvid import checkpoint, cli, datasets, results
from fastvid.datasets.folder import CACHE
from fastvid.errors import InputError
from fastvid.wresnet import WideResNet

pytestmark = pytest.mark.survival("reads")

MUTANTS = 3000  # of each type of file


def network():
    torch.manual_seed(0)
    return WideResNet(10, 1)


def flat(value):
    """A nested value as something that == compares: tensors and arrays by their bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        entries = sorted(value.items(), key=str)  # safetensors does not keep the order
        return [(key, flat(entry)) for key, entry in entries]
    return [flat(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def weights_file(folder, cifar100_root):
    path = folder / "a.safetensors"
    checkpoint.save_weights(
        path, network().state_dict(), {"classes": ["a", "b"], "accuracy": 91.22, "dataset": "digits"}
    )
    return path, lambda: flat(
        [(w := checkpoint.load_weights(path)).tensors, {**w.metadata, "verified": None}]
    )


def torch_file(folder, cifar100_root):
    path = folder / "a.pth"
    torch.save({"state_dict": network().state_dict()}, path)
    return path, lambda: flat(checkpoint.load_weights(path).tensors)


def resume_file(folder, cifar100_root):
    path, state = folder / "a.resume", network().state_dict()
    checkpoint.save_state(
        path,
        {
            "identity": {"method": ["vid"], "learning_rate": 0.1},
            "position": 12,
            "seconds": 3.5,
            "ranks": 1,
            "history": [dataclasses.asdict(point) for point in RESULT.history],
            "learner": {"network": state, "optimizer": {"state": {0: {"momentum_buffer": torch.randn(9)}}}},
        },
    )
    return path, lambda: flat(checkpoint.load_state(path))


def data_file(folder, cifar100_root):
    return cifar100_root / "cifar-100-python" / "train", lambda: read_cifar(cifar100_root)


def image_folder(folder):
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "train" / name / "0.png")


def data_cache(folder, cifar100_root):
    image_folder(folder)

    def load():
        arrays = datasets.load("folder", folder, "train")
        return flat([arrays.images, arrays.labels, arrays.class_names, arrays.mean, arrays.std])

    load()
    return folder / CACHE / "folder-train.rgb", load


def read_cifar(root):
    arrays = datasets.load("cifar100", root, "train")
    return flat([arrays.images, arrays.labels, arrays.class_names, arrays.mean, arrays.std])


def results_file(folder, cifar100_root):
    """Each loaded line is one of the written lines. Each other line has a note, or was cut off completely."""
    for seed in range(4):
        results.append(folder, dataclasses.replace(RESULT, seed=seed, accuracy=60.0 + seed))
    path = folder / results.FILE
    written, _ = results.read(folder)

    def load():
        found, notes = results.read(folder)
        assert all(run in written for run in found)
        lost = sum(run not in found for run in written)
        if lost and not notes:
            assert path.read_bytes() == b"".join(path.read_bytes().splitlines(keepends=True)[: 4 - lost]), (
                "lost without a word"
            )
        return "the written ones"

    return path, load


def mutants(content, count, seed):
    """`count` damaged versions of `content`, each with its kind."""
    choose = random.Random(seed)
    for number in range(count):
        mutant, spot = bytearray(content), choose.randrange(len(content))
        if choose.random() < 0.3:
            spot %= 2048  # headers are small and matter most
        length = min(choose.choice((1, 8, 64, 512, 4096)), len(content) - spot)
        kind = ("bit flipped", "cut", "zeroed", "repeated", "removed", "random")[number % 6]
        if kind == "bit flipped":
            mutant[spot] ^= 1 << choose.randrange(8)
        elif kind == "cut":
            del mutant[spot:]
        elif kind == "zeroed":
            mutant[spot : spot + length] = bytes(length)
        elif kind == "repeated":
            source = choose.randrange(len(content) - length + 1)
            mutant[spot : spot + length] = content[source : source + length]
        elif kind == "removed":
            del mutant[spot : spot + length]
        else:
            mutant[spot : spot + length] = choose.randbytes(length)
        yield kind, bytes(mutant)


FILES = [weights_file, torch_file, resume_file, data_file, data_cache, results_file]


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_no_damaged_file_loads_silently_different(make, tmp_path, cifar100_root, capsys, figure):
    path, load = make(tmp_path, cifar100_root)
    expected, whole = load(), path.read_bytes()
    refused, slowest = 0, 0.0
    count = 600 if make is data_cache else MUTANTS  # every mutant of the cache is decoded and written again
    for kind, mutant in mutants(whole, count, make.__name__):
        path.write_bytes(mutant)
        began = time.monotonic()
        try:
            assert load() == expected, f"a {make.__name__} loads differently, {kind}"
        except InputError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error)
            refused += 1
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 5
    name = make.__name__.replace("_", " ")
    figure(
        f"damaged {name}",
        f"{count:,} mutants: 0 load differently, {refused:,} refused in one line, the others unharmed, "
        f"skipped with a note or made again; the slowest answer took {slowest:.2f} s",
    )


def test_a_cut_of_a_results_file_between_two_lines_is_an_earlier_state_of_it(tmp_path):
    path, load = results_file(tmp_path, None)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert load() and len(results.read(tmp_path)[0]) == 2


# --- whole files, in another's place


def test_swapped_files_of_a_data_set_are_noticed(cifar100_root):
    folder = cifar100_root / "cifar-100-python"
    shutil.copy(folder / "test", folder / "train")
    with pytest.raises(InputError, match="train: md5 is .* damaged or another file"):
        read_cifar(cifar100_root)


# --- code

SLOTS = {  # file that a user may get from others: (path, options of train, whether training works without it)
    "teacher.pth": ("teacher.pth", ("--method", "kd", "--teacher", "teacher.pth"), False),
    "teacher.pt": ("teacher.pt", ("--method", "kd", "--teacher", "teacher.pt"), False),
    "teacher.safetensors": (
        "teacher.safetensors",
        ("--method", "kd", "--teacher", "teacher.safetensors"),
        False,
    ),
    "resume": ("out/7-seed0.resume", (), False),
    "results": ("out/results.jsonl", (), True),
    "data": ("data/cifar-100-python/train", ("--dataset", "cifar100"), False),
    "class names": ("data/cifar-100-python/meta", ("--dataset", "cifar100"), False),
    "cache": ("data/.fastvid-cache/folder-train.rgb", ("--dataset", "folder"), False),
}


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)), id="pickle"),
        pytest.param(
            lambda content, path: torch.save(
                {"state_dict": {"conv1.weight": torch.ones(1), "x": content}}, path
            ),
            id="torch",
        ),
    ],
)
@pytest.mark.parametrize("slot", SLOTS)
def test_code_in_a_file_never_runs(slot, write, tmp_path, monkeypatch, capsys, canary):
    monkeypatch.chdir(tmp_path)
    place, options, goes_on = SLOTS[slot]
    path = Path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parts[0] == "out":
        (path.parent / results.FILE).touch()
    if slot == "cache":
        image_folder(Path("data"))  # the cache of a folder is read only if its images are there
    write(canary, path)
    code = cli.main(
        [
            "train",
            "--dataset",
            "digits",
            "--per-class",
            "7",
            "--batch-size",
            "35",
            "--epochs",
            "1",
            "--student-depth",
            "10",
            "--device",
            "cpu",
            "--data",
            "data",
            "--out",
            "out",
            *options,
        ]
    )
    said = capsys.readouterr().err
    assert not canary.sang and "Traceback" not in said
    assert code == (0 if goes_on and "holds no result" not in said else 2), said
    if code:
        assert said.splitlines()[-1].startswith("fastvid: error: ")
