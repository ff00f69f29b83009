"""A disk that is full at any byte: the old file stays loadable; the message names path and space needed."""

import contextlib
import dataclasses
import re
import resource

import numpy as np
import pytest
import torch
from test_results import RESULT
from tiny import command

from fastvid import checkpoint, cli, results
from fastvid.datasets import folder as image_folder
from fastvid.errors import InputError
from fastvid.report import report
from fastvid.wresnet import WideResNet

pytestmark = pytest.mark.survival("writes")

POINTS = 60  # of each type of file


@contextlib.contextmanager
def full_after(count):
    """Inside, no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tensors(seed):
    torch.manual_seed(seed)
    return WideResNet(10, 1).state_dict()


def weights(folder):
    path = folder / "a.safetensors"
    return (
        path,
        lambda version: checkpoint.save_weights(path, tensors(version), {}),
        lambda: checkpoint.load_weights(path).sha256,
    )


def resume_state(folder):
    path = folder / "a.resume"
    return (
        path,
        lambda version: checkpoint.save_state(path, {"position": version, "network": tensors(version)}),
        lambda: checkpoint.load_state(path)["position"],
    )


def result_lines(folder):
    def write(version):
        results.append(folder, dataclasses.replace(RESULT, seed=version))

    return folder / results.FILE, write, lambda: results.read(folder)


def table(folder):
    results.append(folder, RESULT)
    path = folder / "table.md"
    return path, lambda version: report(folder), path.read_bytes


def data_cache(folder):
    path, key = folder / "kept" / "a.rgb", bytes(32)

    def write(version):
        image_folder._write_cache(path, key, np.full((5, 32, 32, 3), version, np.uint8))

    return path, write, lambda: image_folder._read_cache(path, key, 5).tobytes()


@pytest.mark.parametrize(
    "make", [weights, resume_state, result_lines, table, data_cache], ids=lambda make: make.__name__
)
def test_a_disk_that_is_full_at_any_byte_leaves_what_was_there(make, tmp_path, capsys, figure):
    path, write, load = make(tmp_path)
    write(1)
    before, size = load(), path.stat().st_size
    needed = size if path.name != results.FILE else 2 * size
    for number in range(POINTS):
        full_at = (
            number if number < 8 else number * (needed - 1) // (POINTS - 1)
        )  # the first bytes, then evenly to the last
        with full_after(full_at):
            if make is data_cache:  # the training does without
                write(2)
                assert (
                    f"{path} cannot be written (File too large): the images are decoded again at each start"
                    in capsys.readouterr().err
                )
            else:
                with pytest.raises(
                    InputError, match=r"cannot write [\d,]+ bytes: File too large; make room there"
                ):
                    write(2)
        assert load() == before
        assert not list(tmp_path.rglob("*.partial")), "a full disk was made fuller"
    write(2)
    name = make.__name__.replace("_", " ")
    figure(
        f"full disk, {name}", f"full at {POINTS} places of {needed:,} bytes: every time the old file is whole"
    )


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_in_one_line_and_resumes_to_the_same_bits_when_there_is_room(
    tmp_path, capsys, figure
):
    def run(name):
        return cli.main(command(tmp_path / name, epochs=3, checkpoint_every="1epoch"))

    assert run("whole") == 0
    (expected,), _ = results.read(tmp_path / "whole")
    largest, ends = (tmp_path / "whole" / expected.weights).stat().st_size, 0
    for share in (0.0, 0.0005, 0.002, 0.5, 0.99, 1.5, 1.9):  # lock, result, weights, resume state
        with full_after(int(share * largest)):
            code = run("full")
        line = capsys.readouterr().err.splitlines()[-1]
        if code:
            ends += 1
            assert code == 2, line
            assert re.fullmatch(r"fastvid: error: .*cannot write.*(make room|choose another).*", line), line
    assert ends >= 5 and run("full") == 0
    (found,), notes = results.read(tmp_path / "full")
    assert found.weights_sha256 == expected.weights_sha256 and found.history == expected.history and not notes
    figure("full disk, a training", f"{ends} starts ended in one line; with room it ends with the same bits")
