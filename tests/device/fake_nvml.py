"""NVML as pynvml gives it, over GPUs that a test describes: it is put in the place of that module."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

GiB = 1 << 30
NVML_DEVICE_MIG_ENABLE = 1
nvmlMemory_v2 = 2


class NVMLError(Exception):
    pass


@dataclass
class Card:
    """A GPU or a MIG instance. `processes`: bytes by pid, None where they are not told. `mig`: None where it can't be
    divided. `lost`: it fell off the bus."""

    uuid: str
    total_bytes: int = 80 * GiB
    reserved_bytes: int = GiB
    used_bytes: int = 0
    processes: dict[int, int | None] = field(default_factory=dict)
    drawing: dict[int, int | None] = field(default_factory=dict)
    mig: bool | None = None
    instances: list[Card | None] = field(default_factory=list)
    old_driver: bool = False
    lost: bool = False


class FakeNvml:
    """The functions of pynvml that are asked, for these GPUs; `driver`: whether there is one."""

    NVMLError = NVMLError
    NVML_DEVICE_MIG_ENABLE = NVML_DEVICE_MIG_ENABLE
    nvmlMemory_v2 = nvmlMemory_v2

    def __init__(self, *cards: Card, driver: bool = True) -> None:
        self.cards = list(cards)
        self.driver = driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        instances = [card for gpu in self.cards for card in gpu.instances if card is not None]
        for card in (*self.cards, *instances):
            if card.uuid == uuid:
                return card
        raise NVMLError("Not Found")

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> str:
        return "NVIDIA Pretended"

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> SimpleNamespace:
        if card.lost:
            raise NVMLError("GPU is lost")
        free = card.total_bytes - card.reserved_bytes - card.used_bytes
        if version is None:
            return SimpleNamespace(total=card.total_bytes, free=free, used=card.reserved_bytes + card.used_bytes)
        if card.old_driver:
            raise NVMLError("Function Not Found")
        return SimpleNamespace(total=card.total_bytes, reserved=card.reserved_bytes, free=free, used=card.used_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[SimpleNamespace]:
        return _told(card.processes)

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> list[SimpleNamespace]:
        if card.uuid.startswith("MIG-"):
            raise NVMLError("Not Supported")
        return _told(card.drawing)

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if card.mig is None:
            raise NVMLError("Not Supported")
        return [int(card.mig), int(card.mig)]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        found = card.instances[index] if index < len(card.instances) else None
        if found is None:
            raise NVMLError("Not Found")
        return found


def _told(processes: dict[int, int | None]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in processes.items()]
