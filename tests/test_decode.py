"""Files of images to pixels: a damaged file is named."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from fastvid import decode
from fastvid.errors import InputError

GREEN = (10, 200, 30)


def noise(height=32, width=32, seed=0):
    """Smooth colours with detail, as a photograph has."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.fromarray(
        (np.asarray(coarse).astype(int) + random.integers(-20, 20, (height, width, 3)))
        .clip(0, 255)
        .astype(np.uint8)
    )


def save(folder, name, image, options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "image, expected",
    [
        pytest.param(Image.new("L", (32, 32), 100), (100, 100, 100), id="greyscale"),
        pytest.param(Image.new("RGBA", (32, 32), (*GREEN, 128)), GREEN, id="alpha-is-dropped"),
        pytest.param(
            Image.fromarray(np.full((32, 32), 100 * 257, np.uint16)),
            (100, 100, 100),
            id="sixteen-bit-greyscale",
        ),
    ],
)
def test_other_pixel_formats_become_rgb(image, expected, tmp_path):
    assert (decode.images([save(tmp_path, "a.png", image, {})]) == expected).all()


def test_an_image_of_another_size_is_cropped_at_its_centre_and_scaled_upright(tmp_path):
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[..., 0] = 255
    pixels[:32, 16:80] = (0, 50, 0)  # the central square: dark above, bright below
    pixels[32:, 16:80] = (0, 250, 0)
    (image,) = decode.images([save(tmp_path, "a.png", Image.fromarray(pixels), {})])
    # the bicubic kernel, scaled by 2, reaches 4 pixels of the source: 2 of the result
    assert image[:, 2:-2, 0].max() == 0  # the red sides are gone
    assert (image[:14, 2:-2, 1] == 50).all() and (image[18:, 2:-2, 1] == 250).all()


def test_images_come_in_the_order_of_their_files(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (150, 3), dtype=np.uint8)
    plain = [Image.new("RGB", (32, 32), tuple(colour)) for colour in colours.tolist()]
    paths = [save(tmp_path, f"{index}.png", image, {}) for index, image in enumerate(plain)]
    assert np.array_equal(decode.images(paths), np.broadcast_to(colours[:, None, None], (150, 32, 32, 3)))


def encoded(format):
    memory = io.BytesIO()
    noise(60, 60).save(memory, format)
    return memory.getvalue()


def with_components(count):
    """A JPEG file whose frame header (SOF0) tells a wrong number of components."""
    content = bytearray(encoded("JPEG"))
    content[content.index(b"\xff\xc0") + 9] = count
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded("PNG")[:1000], id="cut-png"),
        pytest.param(encoded("JPEG")[:1000], id="cut-jpg"),
        pytest.param(encoded("PNG")[:60] + bytes(60) + encoded("PNG")[120:], id="zeroed-block"),
        pytest.param(b"<html>", id="another-file"),
        pytest.param(with_components(200), id="jpeg-of-200-components"),
        pytest.param(with_components(2), id="jpeg-of-2-components"),
        pytest.param(encoded("GIF"), id="gif"),
        pytest.param(encoded("BMP"), id="bmp"),
        pytest.param(b"", id="empty"),
    ],
)
@pytest.mark.parametrize("position", [0, 70])  # alone, and among many
def test_a_damaged_image_is_named_with_the_remedy_and_nothing_else_is_printed(
    content, position, tmp_path, capfd
):
    paths = [save(tmp_path, f"{index}.png", noise(), {}) for index in range(position + 2)]
    paths[position].write_bytes(content)
    with pytest.raises(
        InputError, match=rf"/{position}.png: not a readable PNG or JPEG image: replace or remove it"
    ):
        decode.images(paths)
    assert capfd.readouterr() == ("", "")


def test_decoding_shows_its_progress_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    decode.images([save(tmp_path, "a.png", noise(), {})])
    assert "decoding" in capsys.readouterr().err


def test_whatever_a_damaged_file_holds_it_is_read_or_named(tmp_path):
    random, read, named = np.random.default_rng(0), 0, 0
    paths = [save(tmp_path, f"{index}.png", noise(), {}) for index in range(64)]
    for _ in range(150):
        content = bytearray(encoded(random.choice(["PNG", "JPEG"])))
        spot = random.integers(len(content) if random.random() < 0.5 else 700)
        damage = random.choice(["flip", "cut", "zero"])
        content[spot:] = {
            "flip": bytes([content[spot] ^ 1 << random.integers(8)]) + content[spot + 1 :],
            "cut": b"",
            "zero": bytes(min(64, len(content) - spot)) + content[spot + 64 :],
        }[damage]
        paths[7].write_bytes(content)
        try:
            assert decode.images(paths).shape == (64, 32, 32, 3)
            read += 1
        except InputError as error:
            assert f"{paths[7]}: not a readable PNG or JPEG image" in str(error)
            named += 1
    assert read > 10 and named > 50  # a JPEG file has no checksums: pixels may change
