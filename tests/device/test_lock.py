from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mball.device import lock
from mball.device.lock import lock_device, lock_within
from mball.errors import DeviceError, DeviceInUse

HOLD = """
import sys, time
from pathlib import Path
from mball.device import lock
lock.FOLDERS = (Path(sys.argv[2]),)
held = lock.lock_device(sys.argv[1], Path(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock, "FOLDERS", (Path("/no/such/folder"), tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["cpu", "cuda:GPU-1234", "simulated:{}/gpu"])
def test_a_second_daemon_is_told_who_holds_it_and_the_lock_dies_with_its_holder(folder: Path, name: str) -> None:
    name = name.format(folder)
    line = [sys.executable, "-c", HOLD, name, str(folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DeviceInUse, match=rf"pid {holder.pid}: -c .*, since \d{{4}}-\d\d-\d\dT"):
            lock_device(name, folder)
        holder.kill()
    lock_device(name, folder).release()


def test_two_gpus_two_simulated_ones_and_two_folders_go_together(folder: Path) -> None:
    (folder / "other").mkdir()
    held = [
        lock_device("cuda:GPU-1", folder),
        lock_device("cuda:GPU-2", folder),
        lock_device(f"simulated:{folder}/a", folder),
        lock_device(f"simulated:{folder}/b", folder),
        lock_device("cpu", folder),
        lock_device("cpu", folder / "other"),
    ]
    for each in held:
        each.release()
        each.release()


def test_within_one_process_two_do_not_have_it_either(folder: Path) -> None:
    held = lock_device("cuda:GPU-1", folder)
    with pytest.raises(DeviceInUse, match="give this one another device"):
        lock_device("cuda:GPU-1", folder)
    held.release()
    lock_device("cuda:GPU-1", folder).release()


def test_a_link_is_not_followed_and_nothing_is_written_through_it(folder: Path) -> None:
    victim = folder / "victim"
    victim.write_text("precious")
    (folder / "mball-GPU-1.lock").symlink_to(victim)
    with pytest.raises(DeviceError, match="remove what is there"):
        lock_device("cuda:GPU-1", folder)
    os.link(victim, folder / "mball-GPU-2.lock")
    with pytest.raises(DeviceError, match="no plain file of one name"):
        lock_device("cuda:GPU-2", folder)
    os.mkfifo(folder / "mball-GPU-3.lock")
    with pytest.raises(DeviceError, match="no plain file"):
        lock_device("cuda:GPU-3", folder)
    (folder / "mball-GPU-4.lock").mkdir()
    with pytest.raises(DeviceError):
        lock_device("cuda:GPU-4", folder)
    assert victim.read_text() == "precious"


def test_a_dangling_link_makes_no_file(folder: Path) -> None:
    (folder / "mball-GPU-1.lock").symlink_to(folder / "made")
    with pytest.raises(DeviceError):
        lock_device("cuda:GPU-1", folder)
    assert not (folder / "made").exists()


def test_the_file_is_everyones_whatever_the_mask_and_one_that_can_only_be_read_is_locked_too(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        lock_device("cuda:GPU-1", folder).release()
    finally:
        os.umask(before)
    path = folder / "mball-GPU-1.lock"
    assert path.stat().st_mode & 0o777 == 0o666
    path.chmod(0o444)
    held = lock_device("cuda:GPU-1", folder)
    with pytest.raises(DeviceInUse):
        lock_device("cuda:GPU-1", folder)
    held.release()


@pytest.mark.parametrize("said", [b"", b"nonsense", b"[]", b'{"pid": "x"}', b"\xff" * 8192])
def test_a_holder_that_says_nothing_useful(folder: Path, said: bytes) -> None:
    held = lock_device("cuda:GPU-1", folder)
    (folder / "mball-GPU-1.lock").write_bytes(said)
    with pytest.raises(DeviceInUse, match="does not say its name"):
        lock_device("cuda:GPU-1", folder)
    (folder / "mball-GPU-1.lock").write_text('{"pid": 7, "command": "a\\u001b[31m\\nb", "since": "then"}')
    with pytest.raises(DeviceInUse, match=r"pid 7: a\?\[31m\?b, since then"):
        lock_device("cuda:GPU-1", folder)
    held.release()


def test_a_lock_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held, other = (os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for _ in range(2))
    assert lock_within(held, 0.0)
    assert not lock_within(other, 0.05)
    threading.Timer(0.1, os.close, [held]).start()
    assert lock_within(other, 30.0)
    os.close(other)
