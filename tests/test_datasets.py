"""Arrays, the official CIFAR files, digits, the table of data sets. For image folders see test_folder.py."""

import pickle
import sys
import textwrap

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from fastvid import datasets
from fastvid.config import PROTOCOLS, Grid, TrainConfig
from fastvid.datasets import DATASETS, Arrays, Dataset, cifar
from fastvid.datasets.arrays import channel_statistics
from fastvid.errors import InputError

# --- official CIFAR files


@pytest.mark.parametrize(
    "spec, official",
    [(cifar.CIFAR10, torchvision.datasets.CIFAR10), (cifar.CIFAR100, torchvision.datasets.CIFAR100)],
    ids=["cifar10", "cifar100"],
)
def test_md5_lists_are_those_of_torchvision(spec, official):
    assert [list(entry) for entry in spec.train.items()] == official.train_list
    assert [list(entry) for entry in spec.test.items()] == official.test_list
    assert spec.meta == (official.meta["filename"], official.meta["md5"])
    assert (spec.folder, spec.names_key) == (official.base_folder, official.meta["key"])
    assert getattr(torchvision.datasets, spec.torchvision_class) is official


@pytest.mark.parametrize("split", ["train", "test"])
def test_official_cifar10_gives_the_images_labels_and_names_of_torchvision_in_the_same_order(
    split, cifar10_root, request
):
    ours = request.getfixturevalue(f"cifar10_{split}")
    theirs = torchvision.datasets.CIFAR10(cifar10_root, train=split == "train", download=False)
    assert ours.images.dtype == np.uint8 and ours.images.flags.c_contiguous and ours.labels.dtype == np.int64
    assert np.array_equal(ours.images, theirs.data) and len(ours) == len(theirs)
    assert ours.labels.tolist() == theirs.targets and list(ours.class_names) == theirs.classes


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_layout_gives_fine_labels_and_rgb_planes_as_pixels(split, cifar100_root):
    arrays = datasets.load("cifar100", str(cifar100_root), split)
    content = pickle.loads((cifar100_root / "cifar-100-python" / split).read_bytes())
    assert arrays.class_names == ("apple", "fish", "baby")
    assert arrays.labels.tolist() == content["fine_labels"]
    planes = content["data"].reshape(-1, 3, 32, 32)
    assert all(np.array_equal(arrays.images[..., channel], planes[:, channel]) for channel in range(3))


@pytest.mark.parametrize(
    "name, file",
    [
        pytest.param("cifar10", "data_batch_1", id="first-file-of-images"),
        pytest.param("cifar100", "meta", id="class-names"),
    ],
)
def test_a_file_with_another_md5_is_refused_before_it_is_unpickled(
    name, file, cifar100_root, tmp_path, canary
):
    path = tmp_path / getattr(cifar, name.upper()).folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(canary))
    with pytest.raises(
        InputError, match=rf"{file}: md5 is .* damaged or another file; unpack the official archive again"
    ):
        datasets.load(name, tmp_path, "train")
    assert not canary.sang


@pytest.mark.parametrize("file", ["train", "meta"])
def test_a_missing_cifar_file_or_folder_is_named_with_the_remedy(file, cifar100_root):
    assert datasets.located("cifar100", cifar100_root)
    (cifar100_root / "cifar-100-python" / file).unlink()
    assert not datasets.located("cifar100", cifar100_root)
    with pytest.raises(
        InputError,
        match=rf"{file}: No such file or directory: unpack the official archive again, or add --download",
    ):
        datasets.load("cifar100", cifar100_root, "train")
    with pytest.raises(
        InputError, match="no cifar-10-batches-py in .*: point --data at .* or add --download"
    ):
        datasets.load("cifar10", cifar100_root / "nowhere", "train")


# --- constants


def test_normalising_constants_of_cifar10_are_those_of_its_training_images(cifar10_train):
    assert channel_statistics(cifar10_train.images) == (cifar10_train.mean, cifar10_train.std)


def test_channel_statistics_are_mean_and_standard_deviation_over_all_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2005, 4, 6, 3)).astype(np.uint8) // np.array(
        [1, 2, 8], np.uint8
    )  # channels differ, and the images are counted in three parts
    pixels = images.reshape(-1, 3) / 255
    expected = tuple(pixels.mean(axis=0).round(4)), tuple(pixels.std(axis=0).round(4))
    assert channel_statistics(images) == expected
    assert min(channel_statistics(np.zeros((2, 32, 32, 3), np.uint8))[1]) > 0, "images are divided by it"


# --- digits


@pytest.fixture(scope="module")
def digits():
    return {split: datasets.load("digits", "ignored", split) for split in ("train", "test")}


def test_each_digit_of_scikit_learn_is_in_one_split_enlarged_to_32x32_grey_rgb(digits):
    source = load_digits()
    images = np.concatenate([digits[split].images for split in ("train", "test")])
    labels = np.concatenate([digits[split].labels for split in ("train", "test")])
    assert digits["train"].class_sizes().tolist() == [140] * 10
    assert images.shape == (1797, 32, 32, 3) and images.dtype == np.uint8
    assert images.min() == 0 and images.max() == 255
    small = images[:, ::4, ::4, :1]
    assert (images == small.repeat(4, axis=1).repeat(4, axis=2)).all()  # 4x4 equal pixels, equal channels
    levels = np.round(small / 255 * 16).astype(int).reshape(-1, 64)
    theirs = np.column_stack((source.images.astype(int).reshape(-1, 64), source.target))
    assert sorted(map(tuple, np.column_stack((levels, labels)))) == sorted(map(tuple, theirs))
    assert not {i.tobytes() for i in digits["train"].images} & {i.tobytes() for i in digits["test"].images}
    for arrays in digits.values():
        assert (arrays.mean, arrays.std) == channel_statistics(digits["train"].images)


# --- subsets


@pytest.fixture
def arrays():
    """60 images that hold their own number, in three mixed classes; `rare` has 12 of them."""
    labels = np.array([0, 1, 2, 1, 0] * 12)
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    return Arrays(images, labels, ("common", "usual", "rare"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def numbers(arrays):
    return arrays.images[:, 0, 0, 0].tolist()


def places(arrays, chosen):
    """The numbers of the images that `chosen` takes out of each class's list, in file order."""
    of_class = [[i for i in range(60) if arrays.labels[i] == label] for label in range(3)]
    return sorted(number for images in of_class for number in chosen(images))


@pytest.mark.parametrize("per_class", [1, 5, 12])
def test_a_subset_is_the_first_images_of_each_class_in_file_order(per_class, arrays):
    subset = arrays.subset(per_class)
    assert numbers(subset) == places(arrays, lambda images: images[:per_class])
    assert subset.class_sizes().tolist() == [per_class] * 3
    assert (subset.labels == arrays.labels[numbers(subset)]).all()
    assert (subset.class_names, subset.mean, subset.std) == (arrays.class_names, arrays.mean, arrays.std)
    assert numbers(subset.subset(1)) == numbers(arrays.subset(1)), "smaller subsets lie in larger ones"


def test_a_holdout_is_the_last_images_of_each_class_and_the_rest_are_the_others(arrays):
    rest, last = arrays.holdout(4)
    assert numbers(last) == places(arrays, lambda images: images[-4:])
    assert numbers(rest) == places(arrays, lambda images: images[:-4])


@pytest.mark.parametrize("method, most", [("subset", 12), ("holdout", 11)])
def test_an_impossible_number_of_images_per_class_names_the_class_and_the_limits(method, most, arrays):
    for number in (most + 1, 0, -1):
        with pytest.raises(
            InputError, match=f"{number} .*class 'rare' has 12: .* at most {most}, at least 1$"
        ):
            getattr(arrays, method)(number)
    getattr(arrays, method)(most)


# --- one line per data set


def test_every_data_set_has_a_protocol_and_fractions_that_the_configuration_takes():
    for name, dataset in DATASETS.items():
        assert TrainConfig(dataset=name).resolved().protocol == dataset.protocol in PROTOCOLS
        assert Grid(fractions=dataset.fractions).fractions_of(name) == Grid().fractions_of(name)
        assert dataset.classes is None or dataset.classes >= 2


def test_unknown_names_are_refused_with_the_choices(tmp_path):
    choices = "unknown data set 'mnist': choose from cifar10, cifar100, folder, digits"
    for refused in (
        lambda: datasets.load("mnist", tmp_path, "train"),
        lambda: datasets.fingerprint("mnist", tmp_path, "train"),
        lambda: TrainConfig(dataset="mnist").resolved(),
    ):
        with pytest.raises(InputError, match=choices):
            refused()
    with pytest.raises(InputError, match="unknown split 'validation': choose train or test"):
        datasets.load("digits", tmp_path, "validation")


def test_a_new_data_set_is_one_file_and_one_line(tmp_path, monkeypatch):
    source = """
        import numpy as np
        from fastvid.datasets import Arrays

        def load(root, split):
            images = np.full((6, 32, 32, 3), 7, np.uint8)
            return Arrays(images, np.arange(6) % 2, ("grey", "gray"), (0.5,) * 3, (0.25,) * 3)

        def located(root):
            return True

        def files(root, split):
            return []
    """
    (tmp_path / "grey_images.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(DATASETS, "grey", Dataset("grey_images", classes=2, protocol="quick"))
    assert len(datasets.load_once("grey", tmp_path, "train").subset(1)) == 2
    assert TrainConfig(dataset="grey").resolved().protocol == "quick"


@pytest.mark.parametrize(
    "name, download, modules, package",
    [
        pytest.param("digits", False, ("sklearn", "sklearn.datasets"), "scikit-learn", id="digits"),
        pytest.param("folder", False, ("PIL", "PIL.Image"), "Pillow", id="folder"),
        pytest.param("cifar10", True, ("torchvision",), "torchvision", id="download"),
    ],
)
def test_a_missing_optional_package_is_named_with_the_command_that_installs_it(
    name, download, modules, package, tmp_path, monkeypatch
):
    for place in ("a", "b"):
        (tmp_path / "train" / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "train" / place / "0.png")
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install"):
        datasets.load(name, tmp_path, "train", download=download)


# --- one copy in memory


def test_load_once_returns_the_same_arrays_until_a_file_changes(cifar100_root):
    first = datasets.load_once("cifar100", cifar100_root, "train")
    assert datasets.load_once("cifar100", str(cifar100_root), "train") is first
    path = cifar100_root / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="damaged"):
        datasets.load_once("cifar100", cifar100_root, "train")
