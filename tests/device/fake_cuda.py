"""A GPU's runtime in host memory: copies happen as late as they may, and what a driver would refuse is an error."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

from torch import Tensor

from mball.device.cuda import Mark, Stream
from mball.errors import RegistrationFailed


class FakeRuntime:
    """`refuses` says which registrations fail. `at_copy` is called before each copy is begun."""

    def __init__(
        self,
        refuses: Callable[[int, bool], bool] = lambda nbytes, read_only: False,
        at_copy: Callable[[], None] = lambda: None,
    ) -> None:
        self.registered: dict[int, int] = {}
        self.registrations: list[tuple[int, int, bool]] = []
        self.most_registered_bytes = 0
        self.pageable_copies = 0
        self.lock = threading.Lock()
        self.streams: list[FakeStream] = []
        self.at_copy = at_copy
        self._refuses = refuses

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        assert address % 4096 == 0
        assert nbytes % 4096 == 0
        if self._refuses(nbytes, read_only):
            raise RegistrationFailed("the driver refuses")
        with self.lock:
            overlaps = [at for at, size in self.registered.items() if at < address + nbytes and address < at + size]
            if overlaps:
                raise RegistrationFailed("already registered")
            self.registered[address] = nbytes
            self.registrations.append((address, nbytes, read_only))
            self.most_registered_bytes = max(self.most_registered_bytes, sum(self.registered.values()))

    def unregister(self, address: int) -> None:
        with self.lock:
            nbytes = self.registered.pop(address)
        for stream in self.streams:
            for _, source in stream.pending:
                assert not address <= source < address + nbytes, "unregistered under a copy"

    def stream(self) -> Stream:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def cpus(self) -> frozenset[int]:
        return frozenset()

    def reachable(self, address: int, nbytes: int) -> bool:
        with self.lock:
            return any(at <= address and address + nbytes <= at + size for at, size in self.registered.items())


class FakeStream:
    def __init__(self, runtime: FakeRuntime) -> None:
        self.pending: list[tuple[Callable[[], object], int]] = []
        self.done = 0
        self._runtime = runtime
        self._lock = threading.RLock()
        self._entered = threading.local()

    def enter(self) -> None:
        self._entered.yes = True

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._begin(lambda: ctypes.memmove(target, source, nbytes), source, nbytes)

    def cast(self, target: Tensor, source: Tensor) -> None:
        self._begin(lambda: target.copy_(source), source.data_ptr(), source.nbytes)

    def _begin(self, work: Callable[[], object], source: int, nbytes: int) -> None:
        assert self._entered.yes
        self._runtime.at_copy()
        if self._runtime.reachable(source, nbytes):
            with self._lock:
                self.pending.append((work, source))
        else:
            self._runtime.pageable_copies += 1
            work()

    def mark(self, again: Mark | None = None) -> Mark:
        with self._lock:
            return FakeMark(self, self.done + len(self.pending))

    def finish(self) -> None:
        with self._lock:
            self.run(self.done + len(self.pending))

    def run(self, upto: int) -> None:
        with self._lock:
            while self.done < upto:
                self.pending.pop(0)[0]()
                self.done += 1


class FakeMark:
    def __init__(self, stream: FakeStream, upto: int) -> None:
        self._stream = stream
        self._upto = upto

    def wait(self) -> None:
        self._stream.run(self._upto)
