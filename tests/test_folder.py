"""Image folders: what is on disk is trained on or named, decoded correctly, and cached until it changes."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fastvid import datasets
from fastvid.datasets import folder as folder_module
from fastvid.datasets.arrays import channel_statistics
from fastvid.errors import InputError

RED, GREEN, BLUE = (220, 20, 40), (30, 200, 60), (10, 60, 180)


def save(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, lossless=True)


@pytest.fixture
def folder(tmp_path):
    """Two classes, made out of order; one colour per image, so that an image can be recognised."""
    save(tmp_path / "train/wasp/0.png", BLUE)
    save(tmp_path / "train/ant/b.JPG", GREEN)
    save(tmp_path / "train/ant/a.png", RED)
    (tmp_path / "train/README").write_text("beside the classes")
    save(tmp_path / "test/wasp/0.jpeg", RED)
    save(tmp_path / "test/ant/0.png", BLUE)
    return tmp_path


def load(folder, split="train"):
    return datasets.load("folder", folder, split)


def assert_colours(images, colours):
    """Within 2 levels: JPEG rounds YCbCr."""
    assert images.shape == (len(colours), 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images.astype(int) - np.array(colours)[:, None, None, :]).max() <= 2


def same(one, other):
    return (
        np.array_equal(one.images, other.images)
        and np.array_equal(one.labels, other.labels)
        and (one.class_names, one.mean, one.std) == (other.class_names, other.mean, other.std)
        and (one.images.dtype, one.labels.dtype) == (other.images.dtype, other.labels.dtype)
    )


# --- what lies in the folder


def test_a_folder_is_read_in_alphabetical_order_and_normalised_by_its_training_images(folder):
    train, test = load(folder), load(folder, "test")
    assert train.class_names == test.class_names == ("ant", "wasp")
    assert_colours(train.images, [RED, GREEN, BLUE])
    assert train.labels.tolist() == [0, 0, 1] and train.labels.dtype == np.int64
    assert_colours(test.images, [BLUE, RED])
    assert test.labels.tolist() == [0, 1]
    assert (train.mean, train.std) == (test.mean, test.std) == channel_statistics(train.images)
    assert channel_statistics(test.images) != (test.mean, test.std)
    assert datasets.located("folder", folder) and not datasets.located("folder", folder / "train")


@pytest.mark.parametrize("suffix", folder_module.SUFFIXES)
def test_every_suffix_is_read_in_either_case(suffix, folder):
    for index, name in enumerate((f"c{suffix}", f"d{suffix.upper()}")):
        save(folder / "train/ant" / name, (40, 40, 40 + 100 * index))
    assert_colours(load(folder).images, [RED, GREEN, (40, 40, 40), (40, 40, 140), BLUE])


def test_what_operating_systems_leave_in_a_folder_is_ignored(folder):
    whole = load(folder)
    for name in ("._a.png", ".DS_Store", ".hidden.png", "Thumbs.db", "desktop.ini"):
        (folder / "train/ant" / name).write_bytes(b"no image")
    for place in ("train/__MACOSX", "train/ant/__MACOSX", "train/.git"):
        save(folder / place / "0.png", RED)
    assert same(load(folder), whole)


REFUSED = {
    "dangling links": lambda path: path.symlink_to("nowhere"),
    "folders inside a class folder": lambda path: save(path / "0.png", RED),
    "files of another type": lambda path: path.with_suffix(".gif").write_bytes(b"GIF89a"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_entries_that_cannot_be_trained_on_are_counted_and_named(kind, folder):
    for index in range(5):
        REFUSED[kind](folder / f"train/ant/x{index}")
    one = r"ant/x\d(\.gif)?"
    expected = (
        rf"train: 5 of 8 entries cannot be trained on: 5 {kind} \({one}, {one}, {one} and 2 more\): repair"
    )
    with pytest.raises(InputError, match=expected):
        load(folder)


def test_all_kinds_of_refused_entries_are_named_at_once(folder):
    for kind, make in REFUSED.items():
        make(folder / "train/wasp" / kind.split()[0])
    save(folder / "train/stray.png", RED)
    (folder / "train/bee").symlink_to("nowhere")
    expected = (
        r"5 of 8 entries.*: 2 dangling links \(bee, wasp/dangling\); 1 images outside a class folder "
        r"\(stray.png\); 1 files of another type \(wasp/files.gif\); 1 folders inside a class folder "
        r"\(wasp/folders\): repair or"
    )
    with pytest.raises(InputError, match=expected):
        load(folder)


LAYOUTS = {
    r"different classes \(bee\)": lambda root: save(root / "test/bee/0.png", RED),
    "train/bee holds no image": lambda root: (root / "train/bee").mkdir(),
    "train holds 1 class folders, wanted two": lambda root: (root / "train/wasp").rename(root / "wasp"),
    "no folder .*test: .*DATA/train/CLASS/IMAGE": lambda root: (root / "test").rename(root / "elsewhere"),
    r"folder name '.*train/\\udcff' is not UTF-8: rename it": lambda root: os.rename(
        root / "train/ant", os.fsencode(root) + b"/train/\xff"
    ),
}


@pytest.mark.parametrize("phrase", LAYOUTS)
def test_another_layout_is_named_with_the_remedy(phrase, folder):
    LAYOUTS[phrase](folder)
    with pytest.raises(InputError, match=phrase):
        load(folder, "test")


def test_an_image_whose_name_is_not_utf8_is_read(folder):
    os.rename(folder / "train/ant/b.JPG", os.fsencode(folder) + b"/train/ant/\xff.jpg")
    assert_colours(load(folder).images, [RED, GREEN, BLUE])


# --- from files to pixels


def noise(height=32, width=32, seed=0):
    """Smooth colours with detail, as a photograph has."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(
        (smooth + random.integers(-20, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def encoded(format, image=None, **options):
    memory = io.BytesIO()
    (image or noise(60, 60)).save(memory, format, **options)
    return memory.getvalue()


def decode(path, content):
    path.write_bytes(content)
    return folder_module._decode([path])[0]


@pytest.mark.parametrize(
    "image, expected",
    [
        pytest.param(Image.new("L", (32, 32), 100), (100, 100, 100), id="greyscale"),
        pytest.param(Image.new("RGBA", (32, 32), (*GREEN, 128)), GREEN, id="alpha-is-dropped"),
        pytest.param(Image.new("1", (32, 32), 1), (255, 255, 255), id="black-and-white"),
        pytest.param(
            Image.fromarray(np.full((32, 32), 100 * 257, np.uint16)), (100, 100, 100), id="16-bit-grey"
        ),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_other_pixel_formats_become_rgb(image, expected, format, tmp_path):
    assert (decode(tmp_path / "a", encoded(format, image)) == expected).all()


def test_an_image_of_another_size_is_cropped_at_its_centre_and_scaled_upright(tmp_path):
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[..., 0] = 255
    pixels[:32, 16:80] = (0, 50, 0)  # the central square: dark above, bright below
    pixels[32:, 16:80] = (0, 250, 0)
    image = decode(tmp_path / "a", encoded("PNG", Image.fromarray(pixels)))
    # the bicubic kernel, scaled by 2, reaches 4 pixels of the source: 2 of the result
    assert image[:, 2:-2, 0].max() == 0  # the red sides are gone
    assert (image[:14, 2:-2, 1] == 50).all() and (image[18:, 2:-2, 1] == 250).all()


def test_a_photograph_is_decoded_at_a_fraction_of_its_size_to_nearly_the_same_pixels(tmp_path, monkeypatch):
    content = encoded("JPEG", noise(1500, 2000), quality=90)
    sizes, convert = [], Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda self, mode: sizes.append(self.size) or convert(self, mode)
    )
    fast = decode(tmp_path / "a.jpg", content).astype(int)
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    exact = decode(tmp_path / "a.jpg", content)
    assert sizes == [(500, 375), (2000, 1500)]
    assert np.abs(fast - exact).max() <= 3  # another filter or half a pixel's shift is off by 20 and more


def test_memory_does_not_grow_with_the_number_of_photographs(tmp_path):
    files = [tmp_path / f"{index}.bmp" for index in range(12)]
    for path in files:
        Image.new("RGB", (1600, 1200)).save(path)
    program = f"""
import resource
from pathlib import Path
from fastvid.datasets import folder
files = [Path(name) for name in {list(map(str, files))}]
folder._decode(files[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder._decode(files)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 3 * 1600 * 1200 * 3 / 2**20, "more than a few images were in memory"


UNREADABLE = {
    "cut.png": (encoded("PNG")[:1000], "image file is truncated|broken PNG|unrecognized data"),
    "cut.jpg": (encoded("JPEG")[:1000], "image file is truncated"),
    "cut.tif": (encoded("TIFF")[:1000], "."),
    "cut.webp": (encoded("WEBP")[:700], "."),
    "cut.bmp": (encoded("BMP")[:1000], "image file is truncated"),
    "page.png": (b"<html>", "not a png, jpg, webp, bmp or tif image"),
    "gif.jpg": (encoded("GIF"), "not a png, jpg, webp, bmp or tif image"),
    "empty.png": (b"", "not a png, jpg, webp, bmp or tif image"),
    "float.tif": (encoded("TIFF", Image.new("F", (32, 32))), "its pixels are floating-point numbers"),
    "int.tif": (encoded("TIFF", Image.new("I", (32, 32), 70_000)), "its pixels have more than 16 bits"),
}


def test_all_unreadable_images_are_named_at_once_with_their_reasons_and_nothing_else_is_printed(
    folder, capfd
):
    for name, (content, _) in UNREADABLE.items():
        (folder / "train/ant" / name).write_bytes(content)
    with pytest.raises(
        InputError, match="^10 of 13 images cannot be read: .*: replace or remove them$"
    ) as caught:
        load(folder)
    for name, (_, reason) in UNREADABLE.items():
        pytest.raises(InputError, load, folder).match(rf"/train/ant/{name} \(({reason})")
    for index in range(3):
        (folder / f"train/wasp/{index}.png").write_bytes(b"")
    pytest.raises(InputError, load, folder).match(r"13 of 15 images .* and 3 more: replace")
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_whatever_a_damaged_file_holds_it_is_read_or_named(tmp_path, capfd):
    random, read, named = np.random.default_rng(0), 0, 0
    formats = {format: encoded(format) for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF")}
    for number in range(150):
        content = bytearray(formats[list(formats)[number % 5]])
        spot = random.integers(len(content) if random.random() < 0.5 else 200)
        damage = {
            0: bytes([content[spot] ^ 1 << random.integers(8)]) + content[spot + 1 :],
            1: b"",
            2: bytes(min(64, len(content) - spot)) + content[spot + 64 :],
        }
        content[spot:] = damage[number % 3]
        try:
            assert decode(tmp_path / "7.png", bytes(content)).shape == (32, 32, 3)
            read += 1
        except InputError as error:
            assert str(tmp_path / "7.png") in str(error) and "\n" not in str(error)
            named += 1
    assert read > 10 and named > 30  # most formats have no checksums, so pixels may change
    assert capfd.readouterr() == ("", "")


def test_decoding_shows_its_progress_on_a_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(folder)
    assert "decoding" in capsys.readouterr().err


# --- the cache on disk, and the copy in memory


def cache_of(folder, split="train"):
    return folder / folder_module.CACHE / f"folder-{split}.rgb"


def test_a_second_start_reads_the_cache_and_gets_the_same(folder, monkeypatch):
    first = [load(folder, split) for split in ("train", "test")]
    monkeypatch.setattr(
        folder_module, "_decode", lambda files: pytest.fail("decoded although there is a cache")
    )
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
        pytest.param(lambda path: save(path, (9, 9, 9)), id="rewritten"),
        pytest.param(rewrite_with_the_old_date, id="rewritten-with-the-old-date"),
        pytest.param(lambda path: path.rename(path.with_name("z.png")), id="renamed"),
        pytest.param(lambda path: path.unlink(), id="removed"),
        pytest.param(lambda path: save(path.with_name("9.png"), (9, 9, 9)), id="added"),
        pytest.param(lambda path: path.rename(path.parents[1] / "wasp/9.png"), id="moved-to-another-class"),
    ],
)
@pytest.mark.parametrize("loader", [datasets.load, datasets.load_once], ids=["disk", "memory"])
def test_a_changed_folder_is_decoded_again(loader, folder, change):
    before = loader("folder", folder, "train")
    change(folder / "train/ant/a.png")
    after = loader("folder", folder, "train")
    assert not np.array_equal(after.images, before.images) or after.labels.tolist() != before.labels.tolist()
    assert same(load(folder), after)


def test_the_copy_in_memory_is_not_that_of_another_folder_of_the_same_relative_name(folder, monkeypatch):
    save(folder / "other/data/train/ant/a.png", GREEN)
    save(folder / "other/data/train/wasp/a.png", RED)
    (folder / "data").mkdir()
    (folder / "train").rename(folder / "data/train")
    monkeypatch.chdir(folder)
    first = datasets.load_once("folder", "data", "train")
    assert datasets.load_once("folder", "data", "train") is first
    monkeypatch.chdir(folder / "other")
    assert_colours(datasets.load_once("folder", "data", "train").images, [GREEN, RED])


def test_a_damaged_cache_is_reported_and_made_again(folder, capsys):
    """tests/test_damage.py tries hundreds of damages; here, one of each kind."""
    made, path = load(folder), cache_of(folder)
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x", whole[:64], whole[:500] + b"x" + whole[501:]):
        path.write_bytes(content)
        assert same(load(folder), made) and path.read_bytes() == whole
        assert capsys.readouterr().err == f"{path}: this cache is damaged; the images are decoded again\n"
    for content in (b"", b"of other files".ljust(32) + whole[32:]):
        path.write_bytes(content)
        assert same(load(folder), made) and path.read_bytes() == whole and not capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_decoded_again_with_a_note(folder, capsys):
    (folder / folder_module.CACHE).write_text("a file is in the way")
    first = load(folder)
    assert "folder-train.rgb cannot be written (File exists): the images are dec" in capsys.readouterr().err
    assert same(load(folder), first)


def test_digits_and_cifar_write_no_cache(cifar100_root):
    for name in ("digits", "cifar100"):
        datasets.load(name, cifar100_root, "train")
    assert not (cifar100_root / folder_module.CACHE).exists()


def test_data_sets_and_plan_work_without_importing_torch(folder):
    program = (
        "import sys; from fastvid import datasets, plan; "
        f"datasets.load('folder', {str(folder)!r}, 'train').subset(1); "
        "plan.BatchPlan(5, 2, seed=0).batch(0, 0); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
