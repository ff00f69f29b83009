import pickle
import subprocess
import sys

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from fastvid import datasets
from fastvid.datasets import Arrays, channel_statistics
from fastvid.errors import InputError

RED, GREEN, BLUE = (220, 20, 40), (30, 200, 60), (10, 60, 180)


# --- official CIFAR files


@pytest.mark.parametrize(
    "name, official", [("cifar10", torchvision.datasets.CIFAR10), ("cifar100", torchvision.datasets.CIFAR100)]
)
def test_md5_lists_are_those_of_torchvision(name, official):
    spec = datasets._CIFAR[name]
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
    assert ours.images.dtype == np.uint8 and ours.images.flags.c_contiguous
    assert ours.labels.dtype == np.int64
    assert np.array_equal(ours.images, theirs.data) and len(ours) == len(theirs)
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.class_names) == theirs.classes


def test_normalising_constants_of_cifar10_are_those_of_its_training_images(cifar10_train):
    assert channel_statistics(cifar10_train.images) == (cifar10_train.mean, cifar10_train.std)


def test_channel_statistics_are_mean_and_standard_deviation_over_all_pixels():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8) // np.array(
        [1, 2, 8], np.uint8
    )  # channels differ
    mean, std = channel_statistics(images)
    pixels = images.reshape(-1, 3) / 255
    assert mean == tuple(pixels.mean(axis=0).round(4)) and std == tuple(pixels.std(axis=0).round(4))


def test_standard_deviation_of_a_constant_channel_stays_above_zero():
    assert min(channel_statistics(np.zeros((2, 32, 32, 3), np.uint8))[1]) > 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_layout_gives_fine_labels_and_rgb_planes_as_pixels(split, cifar100_root):
    arrays = datasets.load("cifar100", str(cifar100_root), split)
    content = pickle.loads((cifar100_root / "cifar-100-python" / split).read_bytes())
    assert arrays.class_names == ("apple", "fish", "baby")
    assert arrays.labels.tolist() == content["fine_labels"]
    for image, row, column, channel in [(0, 0, 0, 0), (1, 3, 30, 1), (3, 31, 2, 2)]:
        assert (
            arrays.images[image, row, column, channel]
            == content["data"][image, channel * 1024 + row * 32 + column]
        )


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
    path = tmp_path / datasets._CIFAR[name].folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(canary))
    with pytest.raises(
        InputError, match=rf"{file}: md5 is .* damaged or another file; unpack the official archive again"
    ):
        datasets.load(name, tmp_path, "train")
    assert not canary.sang


def test_a_flipped_bit_in_the_images_is_refused(cifar100_root):
    path = cifar100_root / "cifar-100-python" / "train"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        datasets.load("cifar100", cifar100_root, "train")


def test_a_missing_cifar_folder_is_named_with_the_remedy(tmp_path):
    with pytest.raises(
        InputError, match=r"no cifar-10-batches-py in .*: point --data at .* or add --download"
    ):
        datasets.load("cifar10", tmp_path / "nowhere", "train")
    assert not datasets.located("cifar10", tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["train", "meta"])
def test_a_missing_cifar_file_is_named_with_the_remedy(file, cifar100_root):
    assert datasets.located("cifar100", cifar100_root)
    (cifar100_root / "cifar-100-python" / file).unlink()
    assert not datasets.located("cifar100", cifar100_root)
    with pytest.raises(
        InputError,
        match=rf"{file}: No such file or directory: unpack the official archive again, or add --download",
    ):
        datasets.load("cifar100", cifar100_root, "train")


# --- image folders


def save(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, made out of order, as PNG and JPG; one colour per image, so that it can be recognised."""
    save(tmp_path / "train/wasp/0.png", BLUE)
    save(tmp_path / "train/ant/b.JPG", GREEN)
    save(tmp_path / "train/ant/a.png", RED)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/README").write_text("no class")
    save(tmp_path / "test/wasp/0.jpeg", RED)
    save(tmp_path / "test/ant/0.png", BLUE)
    return tmp_path


def assert_colours(images, colours):
    assert images.shape == (len(colours), 32, 32, 3) and images.dtype == np.uint8
    # an even colour survives JPEG but for the rounding of YCbCr, which is at most 2 levels per channel
    assert np.abs(images.astype(int) - np.array(colours)[:, None, None, :]).max() <= 2


def test_a_folder_is_read_in_alphabetical_order_of_classes_and_files(folder):
    train, test = (datasets.load("folder", folder, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "wasp")
    assert_colours(train.images, [RED, GREEN, BLUE])
    assert train.labels.tolist() == [0, 0, 1] and train.labels.dtype == np.int64
    assert_colours(test.images, [BLUE, RED])
    assert test.labels.tolist() == [0, 1]
    assert datasets.located("folder", folder) and not datasets.located("folder", folder / "train")


def test_both_splits_of_a_folder_are_normalised_by_the_training_images(folder):
    train, test = (datasets.load("folder", folder, split) for split in ("train", "test"))
    assert (train.mean, train.std) == (test.mean, test.std) == channel_statistics(train.images)
    assert channel_statistics(test.images) != (test.mean, test.std)


def test_a_class_in_one_split_only_is_named(folder):
    save(folder / "test/bee/0.png", RED)
    with pytest.raises(InputError, match=r"train and test hold different classes \(bee\)"):
        datasets.load("folder", folder, "test")


def test_a_class_without_images_is_named(folder):
    (folder / "train/bee").mkdir()
    with pytest.raises(InputError, match=r"train/bee holds no .png or .jpg file"):
        datasets.load("folder", folder, "train")


def test_a_single_class_is_refused(tmp_path):
    save(tmp_path / "train/ant/0.png", RED)
    with pytest.raises(InputError, match=r"train holds 1 class folder.*wanted two or more"):
        datasets.load("folder", tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_folder_of_a_split_is_named_with_the_layout(split, folder):
    (folder / split).rename(folder / "elsewhere")
    with pytest.raises(InputError, match=rf"no folder .*{split}: .*DATA/train/CLASS/\*.png\|jpg"):
        datasets.load("folder", folder, split)


# --- digits


@pytest.fixture(scope="module")
def digits():
    return {split: datasets.load("digits", "ignored", split) for split in ("train", "test")}


def test_digits_have_140_training_images_per_class_and_397_test_images(digits):
    assert digits["train"].class_sizes().tolist() == [140] * 10
    assert len(digits["train"]) == 1400 and len(digits["test"]) == 397


def test_each_digit_of_scikit_learn_is_in_one_split_enlarged_to_32x32_grey_rgb(digits):
    source = load_digits()
    images = np.concatenate([digits[split].images for split in ("train", "test")])
    labels = np.concatenate([digits[split].labels for split in ("train", "test")])
    assert images.shape == (1797, 32, 32, 3) and images.dtype == np.uint8
    assert images.min() == 0 and images.max() == 255
    assert (
        images == images[:, ::4, ::4, :1].repeat(4, axis=1).repeat(4, axis=2)
    ).all()  # 4x4 equal pixels, three equal channels
    levels = np.round(images[:, ::4, ::4, 0] / 255 * 16).astype(int).reshape(-1, 64)
    ours = sorted(map(tuple, np.column_stack((levels, labels))))
    assert ours == sorted(
        map(tuple, np.column_stack((source.images.astype(int).reshape(-1, 64), source.target)))
    )
    assert not {i.tobytes() for i in digits["train"].images} & {i.tobytes() for i in digits["test"].images}


def test_both_splits_of_digits_are_normalised_by_the_training_images(digits):
    assert (digits["train"].mean, digits["train"].std) == (digits["test"].mean, digits["test"].std)
    assert (digits["train"].mean, digits["train"].std) == channel_statistics(digits["train"].images)


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
    return sorted(
        i for label in range(3) for i in chosen([i for i in range(60) if arrays.labels[i] == label])
    )


@pytest.mark.parametrize("per_class", [1, 5, 12])
def test_a_subset_is_the_first_images_of_each_class_in_file_order(per_class, arrays):
    subset = arrays.subset(per_class)
    assert numbers(subset) == places(arrays, lambda images: images[:per_class])
    assert subset.class_sizes().tolist() == [per_class] * 3
    assert (subset.labels == arrays.labels[numbers(subset)]).all()
    assert (subset.class_names, subset.mean, subset.std) == (arrays.class_names, arrays.mean, arrays.std)


def test_smaller_subsets_are_nested_in_larger_ones(arrays):
    assert numbers(arrays.subset(7).subset(3)) == numbers(arrays.subset(3))


def test_a_subset_larger_than_a_class_names_the_class_and_the_largest_that_works(arrays):
    with pytest.raises(InputError, match=r"13 images per class .* class 'rare' has 12: take at most 12"):
        arrays.subset(13)
    arrays.subset(12)


def test_a_holdout_is_the_last_images_of_each_class_and_what_is_left_the_others(arrays):
    rest, last = arrays.holdout(4)
    assert numbers(last) == places(arrays, lambda images: images[-4:])
    assert numbers(rest) == places(arrays, lambda images: images[:-4])


def test_a_holdout_that_leaves_a_class_empty_names_the_class_and_the_largest_that_works(arrays):
    with pytest.raises(InputError, match="12 .*class 'rare' has 12.*at most 11"):
        arrays.holdout(12)
    arrays.holdout(11)


# --- borders


def test_unknown_names_are_refused_with_the_choices(tmp_path):
    with pytest.raises(
        InputError, match="unknown data set 'mnist': choose from cifar10, cifar100, folder, digits"
    ):
        datasets.load("mnist", tmp_path, "train")
    with pytest.raises(InputError, match="unknown split 'validation': choose train or test"):
        datasets.load("digits", tmp_path, "validation")


@pytest.mark.parametrize(
    "name, download, modules, package",
    [
        pytest.param("digits", False, ("sklearn", "sklearn.datasets"), "scikit-learn", id="digits"),
        pytest.param("folder", False, ("PIL",), "Pillow", id="folder"),
        pytest.param("cifar10", True, ("torchvision",), "torchvision", id="download"),
    ],
)
def test_a_missing_optional_package_is_named_with_the_command_that_brings_it(
    name, download, modules, package, folder, monkeypatch
):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install"):
        datasets.load(name, folder, "train", download=download)


def test_data_sets_and_plan_work_without_importing_torch(folder):
    program = (
        f"import sys; from fastvid import datasets, plan; datasets.load('folder', {str(folder)!r}, 'train').subset(1); "
        "plan.BatchPlan(5, 2, seed=0).batch(0, 0); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
