"""Splits kept beside their data: used when they are whole and current, made again when not, never silently different."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from fastvid import cache, datasets, decode


@pytest.fixture
def folder(tmp_path):
    """An image folder of two classes, four images each."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "wasp"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / split / name / f"{index}.png"
                )
    return tmp_path


def load(folder, split="train"):
    return datasets.load("folder", folder, split)


def files(folder):
    return sorted(path.name for path in (folder / datasets.CACHE).iterdir() if not path.name.startswith("."))


def same(one, other):
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.labels, other.labels)
        and (one.class_names, one.mean, one.std) == (other.class_names, other.mean, other.std)
        and (one.images.dtype, one.labels.dtype) == (other.images.dtype, other.labels.dtype)
    )


@pytest.fixture
def no_decoding(monkeypatch):
    """From now on, whoever decodes an image fails."""

    def forbid():
        monkeypatch.setattr(decode, "images", lambda paths: pytest.fail("decoded although there is a cache"))

    return forbid


def test_a_second_start_reads_the_cache_and_gets_the_same(folder, no_decoding):
    first = [load(folder, split) for split in ("train", "test")]
    assert files(folder) == ["folder-test.safetensors", "folder-train.safetensors"]
    no_decoding()
    assert all(same(load(folder, split), made) for split, made in zip(("train", "test"), first))


def rewrite_with_the_old_date(path):
    """As archives are unpacked, and with a file of the same size."""
    before = path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: Image.new("RGB", (32, 32), (9, 9, 9)).save(path), id="rewritten"),
        pytest.param(lambda path: rewrite_with_the_old_date(path), id="rewritten-with-the-old-date"),
        pytest.param(lambda path: path.rename(path.with_name("z.png")), id="renamed"),
        pytest.param(lambda path: path.unlink(), id="removed"),
        pytest.param(lambda path: Image.new("RGB", (32, 32)).save(path.with_name("9.png")), id="added"),
        pytest.param(
            lambda path: path.rename(path.parents[1] / "wasp" / "9.png"), id="moved-to-another-class"
        ),
    ],
)
def test_a_changed_folder_is_decoded_again(folder, change):
    before = load(folder)
    change(folder / "train/ant/0.png")
    after = load(folder)
    assert not np.array_equal(after.images, before.images) and same(load(folder), after)


def test_a_damaged_cache_is_reported_and_made_again_never_silently_different(folder, capsys):
    made, path = load(folder), folder / datasets.CACHE / "folder-train.safetensors"
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for number in range(300):
        content = bytearray(whole)
        spot = int(
            random.integers(len(whole) if number % 2 else 700)
        )  # the header is small: half of the damage is there
        if number % 3 == 0:
            content[spot] ^= 1 << random.integers(8)
        elif number % 3 == 1:
            del content[spot:]
        else:
            content[spot : spot + 64] = bytes(min(64, len(whole) - spot))
        path.write_bytes(content)
        capsys.readouterr()
        assert same(load(folder), made)
        assert content == whole or path.read_bytes() == whole, "the damaged file was left there"
        if content != whole:
            said = capsys.readouterr().err
            assert (
                said == ""
                or f"{path}: this cache is damaged; it is made again" in said
                and said.count("\n") == 1
            )


def test_whole_files_of_another_key_or_without_what_a_split_has_are_not_used(folder):
    made, path = load(folder), folder / datasets.CACHE / "folder-train.safetensors"
    with cache.safe_open(path, framework="np") as file:
        key = json.loads(file.metadata()[cache.METADATA_KEY])["key"]
    images, both = {"images": made.images + 1}, {"images": made.images + 1, "labels": made.labels}
    facts = {"class_names": made.class_names, "mean": made.mean, "std": made.std}
    for written in [
        ("another key", both, facts),
        (key, images, facts),
        (key, both, {}),
        (key, both, facts | {"mean": None}),
        (key, both | {"labels": made.labels[:2]}, facts),
        (key, both | {"labels": made.labels + 9}, facts),
    ]:
        cache.write(path, *written)
        assert same(load(folder), made)


def test_a_folder_that_cannot_be_written_is_read_anew_with_a_note(folder, capsys):
    (folder / datasets.CACHE).write_text("a file is in the way")
    first = load(folder)
    assert (
        "folder-train.safetensors cannot be written: this data set is read anew at each start"
        in capsys.readouterr().err
    )
    assert same(load(folder), first)


def test_digits_and_cifar_write_no_cache(cifar100_root):
    for name in ("digits", "cifar100"):
        datasets.load(name, cifar100_root, "train")
    assert not (cifar100_root / datasets.CACHE).exists()


@pytest.mark.parametrize(
    "constants", [("0.5", 0.5, 0.5), (0.0, 0.5, 0.5), (float("nan"), 0.5, 0.5), (2.0, 0.5, 0.5)], ids=str
)
def test_a_cache_with_constants_that_are_none_is_made_again(folder, constants):
    made, path = load(folder), folder / datasets.CACHE / "folder-train.safetensors"
    with cache.safe_open(path, framework="np") as file:
        key = json.loads(file.metadata()[cache.METADATA_KEY])["key"]
    cache.write(
        path,
        key,
        {"images": made.images, "labels": made.labels},
        {"class_names": made.class_names, "mean": made.mean, "std": constants},
    )
    assert same(load(folder), made)


def test_a_cache_of_a_type_that_numpy_lacks_or_nested_without_end_is_made_again(folder, capsys):
    made, path = load(folder), folder / datasets.CACHE / "folder-train.safetensors"
    for content in (
        save({"images": torch.zeros(4, dtype=torch.float8_e4m3fn)}, {cache.METADATA_KEY: header_of(path)}),
        save({"images": torch.zeros(4)}, {cache.METADATA_KEY: "[" * 100_000}),
    ):
        path.write_bytes(content)
        assert same(load(folder), made)
        assert "this cache is damaged; it is made again" in capsys.readouterr().err


def header_of(path):
    with cache.safe_open(path, framework="np") as file:
        return file.metadata()[cache.METADATA_KEY]
