from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from mball.device import nvml, proc
from mball.device.device import Foreign, Stranger, open_device, open_devices
from mball.errors import DeviceError
from mball.units import GiB, MiB
from tests.device.fake_nvml import Card, FakeNvml

Install = Callable[..., FakeNvml]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(card…)`: these are the machine's GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(*cards: Card, driver: bool = True) -> FakeNvml:
        found = FakeNvml(*cards, driver=driver)
        monkeypatch.setitem(sys.modules, "pynvml", found)
        return found

    return put


@pytest.fixture
def other() -> Iterator[int]:
    """The pid of a process in a session of its own."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process.pid
    process.communicate(b"\n")


def names(*wanted: str) -> list[str]:
    return [device.name for device in open_devices(wanted)]


def divided() -> Card:
    """A GPU with two instances, and a free place between them."""
    instances = [Card(f"MIG-{n}", 20 * GiB, 0) for n in range(2)]
    return Card("GPU-b", mig=True, instances=[instances[0], None, instances[1]])


def test_cuda_is_every_gpu_or_those_that_may_be_seen(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Card("GPU-a1"), Card("GPU-a2"), Card("GPU-c", mig=False))
    assert names("cuda") == ["cuda:GPU-a1", "cuda:GPU-a2", "cuda:GPU-c"]
    assert names("cuda:1", "cuda:GPU-c", "cuda:GPU-a2") == ["cuda:GPU-a2", "cuda:GPU-c"]
    assert open_device("cuda").name == "cuda:GPU-a1"
    for visible, found in {"2,0": ["GPU-c", "GPU-a1"], "GPU-c": ["GPU-c"], "1,": ["GPU-a2"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert names("cuda") == [f"cuda:{uuid}" for uuid in found]
    for hidden in ("", "9", "GPU-a"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(DeviceError):
            open_devices(["cuda"])


def test_without_a_driver_or_a_gpu_that_is_said(install: Install) -> None:
    for machine in (FakeNvml(), FakeNvml(driver=False)):
        install(*machine.cards, driver=machine.driver)
        assert nvml.gpus() == []
        with pytest.raises(DeviceError, match="cuda: no GPU here"):
            open_devices(["cuda"])
        with pytest.raises(DeviceError, match="cuda:0: no such GPU; there are none"):
            open_devices(["cuda:0"])


def test_instances_are_named_and_used_and_the_whole_gpu_is_refused(install: Install) -> None:
    install(Card("GPU-a"), divided())
    assert [gpu.uuid for gpu in nvml.gpus()] == ["GPU-a", "GPU-b", "MIG-0", "MIG-1"]
    assert [gpu.index for gpu in nvml.gpus()] == [0, 1, 1, 1]
    for whole in ("cuda:1", "cuda:GPU-b"):
        with pytest.raises(DeviceError, match=r"GPU-b is divided \(MIG\).*name its instances: cuda:MIG-0, cuda:MIG-1"):
            open_devices([whole])
    instance = open_device("cuda:MIG-1")
    assert (instance.name, instance.total_bytes) == ("cuda:MIG-1", 20 * GiB)
    assert names("cuda") == ["cuda:GPU-a", "cuda:MIG-0", "cuda:MIG-1"]


def test_a_divided_gpu_without_instances_is_no_device(install: Install) -> None:
    install(Card("GPU-b", mig=True))
    with pytest.raises(DeviceError, match="it has none yet"):
        open_devices(["cuda:0"])
    with pytest.raises(DeviceError, match="no GPU here"):
        open_devices(["cuda"])


def test_what_an_instance_holds_is_seen(install: Install, other: int) -> None:
    gpu = divided()
    assert gpu.instances[0] is not None
    gpu.instances[0].used_bytes = 3 * GiB
    gpu.instances[0].processes[other] = 3 * GiB
    install(gpu)
    here, there = open_devices(["cuda"])
    assert (here.process_bytes(other), there.process_bytes(other)) == (3 * GiB, None)
    assert (here.free_bytes(), there.free_bytes()) == (17 * GiB, 20 * GiB)
    assert here.foreign({}).nbytes == 3 * GiB
    assert there.foreign({}) == Foreign()


def test_what_the_driver_keeps_is_nobodys(install: Install) -> None:
    card = Card("GPU-a", used_bytes=2 * GiB)
    install(card)
    device = open_device("cuda")
    assert (device.total_bytes, device.free_bytes()) == (79 * GiB, 77 * GiB)
    card.old_driver = True
    assert (open_device("cuda").total_bytes, device.free_bytes()) == (80 * GiB, 77 * GiB)


def test_strangers_are_named_and_what_none_is_seen_to_hold_is_hidden(install: Install, other: int) -> None:
    ours = os.getpid()
    card = Card("GPU-a", used_bytes=10 * GiB, processes={ours: 4 * GiB, other: 1 * GiB}, drawing={other: 1 * GiB})
    install(card)
    device = open_device("cuda")
    [stranger] = device.foreign({ours: 5 * GiB}).strangers
    assert stranger == Stranger(other, proc.command_name(other), 1 * GiB)
    assert "python" in stranger.name
    assert device.foreign({ours: 5 * GiB}).hidden_bytes == 5 * GiB
    card.used_bytes = 5 * GiB + 200 * MiB
    assert device.foreign({ours: 5 * GiB}).hidden_bytes == 0, "the driver's own"
    assert device.foreign({}).nbytes == 5 * GiB, "what is no longer ours"


def test_what_a_worker_has_forked_is_ours(install: Install, other: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    install(Card("GPU-a", used_bytes=4 * GiB, processes={child.pid: 3 * GiB, other: 1 * GiB}))
    leader = os.getsid(child.pid)
    assert open_device("cuda").process_bytes(leader) == 3 * GiB
    assert open_device("cuda").process_bytes(child.pid) == 3 * GiB
    install(Card("GPU-a", used_bytes=3 * GiB, processes={child.pid: 3 * GiB}))
    assert open_device("cuda").foreign({leader: 1 * GiB}) == Foreign()
    assert open_device("cuda").foreign({other: 0}).nbytes == 3 * GiB
    child.communicate(b"\n")


def test_where_processes_are_hidden_the_total_alone_decides(install: Install) -> None:
    card = Card("GPU-a", used_bytes=10 * GiB)
    install(card)
    device = open_device("cuda")
    assert device.process_bytes(os.getpid()) is None
    assert device.foreign({os.getpid(): 8 * GiB}) == Foreign((), 2 * GiB)
    card.processes = {os.getpid(): None}
    assert device.foreign({os.getpid(): 8 * GiB}) == Foreign((), 2 * GiB)
    assert device.foreign({os.getpid(): 10 * GiB}) == Foreign()


def test_a_gpu_that_is_lost_is_an_error(install: Install) -> None:
    machine = install(Card("GPU-a"))
    device = open_device("cuda")
    machine.cards[0].lost = True
    for ask in (device.free_bytes, lambda: device.process_bytes(1), lambda: device.foreign({})):
        with pytest.raises(DeviceError, match="GPU is lost"):
            ask()
    machine.driver = False
    with pytest.raises(DeviceError, match="the NVIDIA driver is gone"):
        device.free_bytes()


def test_an_unknown_gpu_says_which_there_are() -> None:
    with pytest.raises(DeviceError, match="no such GPU"):
        open_device("cuda:GPU-00000000-0000-0000-0000-000000000000")


@pytest.mark.gpu
@pytest.mark.skipif(not nvml.gpus(), reason="no NVIDIA GPU")
def test_nvml_sees_what_a_process_holds() -> None:
    gpu = nvml.gpus()[0]
    device = open_device(f"cuda:{gpu.uuid}")
    assert device.total_bytes == gpu.total_bytes
    before = device.free_bytes()
    code = "import sys, torch; x = torch.zeros(512 << 20, dtype=torch.uint8, device='cuda'); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    taken = before - device.free_bytes()
    held = device.process_bytes(process.pid)
    process.communicate("\n")
    assert taken >= 512 * MiB
    assert held is None or held >= 512 * MiB
    assert before - device.free_bytes() < 64 * MiB
