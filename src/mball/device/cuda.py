"""What the loader wants of a GPU's runtime: registered host memory and copies that are not waited for."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from mball.device.host import node_cpus
from mball.errors import DeviceError, RegistrationFailed
from mball.units import format_bytes

_PORTABLE = 1
_READ_ONLY = 8
_NON_BLOCKING = 1


class Mark(Protocol):
    """A point in a stream of copies."""

    def wait(self) -> None:
        """Until every copy before it has arrived."""


class Stream(Protocol):
    """Copies to one device in order. Used by many threads, each of which calls `enter` first."""

    def enter(self) -> None: ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Begin to copy from an address of the host to one of the device; the source must stay as it is until a later
        mark is past. Raises DeviceError."""

    def cast(self, target: Tensor, source: Tensor) -> None:
        """The same of tensors whose dtypes differ."""

    def mark(self, again: Mark | None = None) -> Mark:
        """A mark behind every copy so far; `again`, one of this runtime's that is past, is used again."""

    def finish(self) -> None:
        """Until every copy has arrived."""


class Registrar(Protocol):
    """Makes host memory known to a device."""

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Let the device read host memory directly; whole pages. Raises RegistrationFailed."""

    def unregister(self, address: int) -> None:
        """Of memory registered at this address, that no copy reads any more."""


class Runtime(Registrar, Protocol):
    def stream(self) -> Stream: ...

    def cpus(self) -> frozenset[int]:
        """The cores on the device's NUMA node; none where it does not matter."""


class CudaRuntime:
    """Of one GPU, through torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        failed = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, flags))  # type: ignore[no-untyped-call]
        if failed:
            self._forget_error()
            raise RegistrationFailed(
                f"{self._device}: {format_bytes(nbytes)} of host memory can't be registered (CUDA error {failed})"
            )

    def unregister(self, address: int) -> None:
        if int(torch.cuda.cudart().cudaHostUnregister(address)):  # type: ignore[no-untyped-call]
            self._forget_error()

    def stream(self) -> Stream:
        return CudaStream(self._device)

    def cpus(self) -> frozenset[int]:
        found: Any = torch.cuda.get_device_properties(self._device)
        try:
            address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        except AttributeError:
            # A torch that does not tell.
            return frozenset()
        return node_cpus(address)

    def _forget_error(self) -> None:
        # The runtime keeps a failed call's error for the thread, and the next kernel launch would report it.
        try:
            torch.zeros(1, device=self._device)
        except RuntimeError:
            return


class CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_of(device)
        # The destination's memory may still be in use by work queued before.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._handle = self._stream.cuda_stream
        self._driver = driver()
        self._context = ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).query()
            _check("cuCtxGetCurrent", self._driver.cuCtxGetCurrent(ctypes.byref(self._context)))

    def enter(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._stream)
        _check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(self._context))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        _check("cuMemcpyHtoDAsync", self._driver.cuMemcpyHtoDAsync_v2(target, source, nbytes, self._handle))

    def fetch(self, target: int, source: int, nbytes: int) -> None:
        """As `copy`, from the device to the host."""
        _check("cuMemcpyDtoHAsync", self._driver.cuMemcpyDtoHAsync_v2(target, source, nbytes, self._handle))

    def cast(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self, again: Mark | None = None) -> Mark:
        mark = again if isinstance(again, CudaMark) else CudaMark()
        mark.event.record(self._stream)
        return mark

    def stamp(self, event: torch.cuda.Event) -> None:
        """An event of the caller's behind every copy so far."""
        event.record(self._stream)

    def follow(self, event: torch.cuda.Event) -> None:
        """The copies that come next begin after the event."""
        self._stream.wait_event(event)

    def finish(self) -> None:
        # Not by the stream: that would spin on a core.
        self.mark().wait()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream for all loads to a device."""
    return new_stream(device)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Beside what is computed, for good. Not of torch's pool: its first stream makes 32, which cost 64 MiB there.

    Raises DeviceError.
    """
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).query()
        _check("cuStreamCreate", driver().cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING))
    return torch.cuda.ExternalStream(handle.value, device=device)  # type: ignore[no-untyped-call]


class CudaMark:
    def __init__(self) -> None:
        # Blocking: a thread that waits leaves its core to those that read.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        # A look does not give up the GIL, which a busy process takes long to give back.
        if not self.event.query():  # type: ignore[no-untyped-call]
            self.event.synchronize()


@cache
def driver() -> ctypes.PyDLL:
    """The driver's library, called with the GIL held: these calls return at once, and a thread that gives the GIL up
    for one waits longer to have it back. Raises DeviceError."""
    try:
        library = ctypes.PyDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"the CUDA driver's library can't be loaded: {error}") from error
    library.cuStreamCreate.argtypes = (ctypes.c_void_p, ctypes.c_uint)
    library.cuCtxGetCurrent.argtypes = (ctypes.c_void_p,)
    library.cuCtxSetCurrent.argtypes = (ctypes.c_void_p,)
    library.cuMemcpyHtoDAsync_v2.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    library.cuMemcpyDtoHAsync_v2.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
    return library


def _check(call: str, result: int) -> None:
    if result:
        raise DeviceError(f"{call} failed: CUDA error {result}")
