import errno
import os
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from fastvid.errors import InputError
from fastvid.files import locked, write_atomic

FULL_DISK = """
import resource, sys
from pathlib import Path
from fastvid.errors import InputError
from fastvid.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), bytes(5000))
except InputError as error:
    print(error)
"""


def test_a_file_is_replaced_completely_and_no_other_file_remains(tmp_path):
    path = tmp_path / "weights"
    for content in (b"first", b"", b"second, and longer"):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["weights"]


def test_when_the_disk_is_full_the_old_file_stays_and_the_message_names_path_size_and_remedy(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"old")
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith(
        f"{path}: cannot write 5,000 bytes: File too large; make room there or choose another folder"
    )
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["weights"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".weights.partial").write_bytes(b"half of a much longer file")
    write_atomic(tmp_path / "weights", b"new")
    assert (tmp_path / "weights").read_bytes() == b"new" and os.listdir(tmp_path) == ["weights"]


HOLD = """
import sys
from pathlib import Path
from fastvid.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_another_process_out_until_its_holder_ends_or_is_killed(tmp_path):
    path = tmp_path / ".lock"
    for end in (lambda process: process.stdin.close(), lambda process: process.kill()):
        command = [sys.executable, "-c", HOLD, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError), locked(path, wait=False):
                pass
            end(process)
            with locked(path):  # waits until it ends
                pass


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("vanished/weights", id="folder-vanished"),
        pytest.param("file/weights", id="folder-is-a-file"),
        pytest.param("folder", id="a-folder-is-in-the-way"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_input_error_and_leaves_no_file(tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path / path}: cannot write 3 bytes: .*choose another folder"):
        write_atomic(tmp_path / path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)  # Ctrl-C while the disk is busy
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["weights"]


def test_the_content_is_synced_before_the_name_points_to_it(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "weights"
    real = os.fsync

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    write_atomic(path, b"new")
    (file, before), (folder, after) = synced
    assert Path(file).parent == tmp_path and not before
    assert folder == str(tmp_path) and after


@pytest.mark.parametrize(
    "number, accepted", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_file_system_that_cannot_sync_folders_is_accepted_and_a_failing_one_is_reported(
    number, accepted, tmp_path, monkeypatch
):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        nullcontext()
        if accepted
        else pytest.raises(InputError, match=f"weights: cannot write 3 bytes: {os.strerror(number)}")
    ):
        write_atomic(tmp_path / "weights", b"new")
    assert os.listdir(tmp_path) == ["weights"]
