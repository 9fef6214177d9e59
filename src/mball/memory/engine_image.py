"""What an engine's weights are while their memory is gone: an image of them, and what has changed since it was made.

Runs in the engine's process. The image is the engine's own memory, segment by segment, as it was right after loading;
so nothing has to be copied when that memory is given up, and it comes back by copying alone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from mball.device import mapping
from mball.device.cuda import Registrar
from mball.device.host import host_threads
from mball.errors import Cancelled, MballError, SwapMiss, TransitionError
from mball.loader.registered import PIECE_BYTES, RegisteredImage
from mball.memory.engine_stored import Stored, bring
from mball.memory.pace import Pace
from mball.swap.place import digest
from mball.units import format_bytes

_SETTLE_S = 120.0
_ASIDE_SHARE = 1 / 16
"""Of weights that are forgotten: what is kept of them beside an image, as they were changed."""


class EngineMemory(Protocol):
    """Where an engine's weights lie. Addresses stay the same while there is no memory behind them."""

    @property
    def runtime(self) -> Registrar:
        """Registers host memory that is copied to and from."""

    def entered(self) -> AbstractContextManager[None]:
        """Inside, the calling thread uses it."""

    def computes(self) -> bool:
        """It has begun a step within the last moments."""

    def segments(self) -> Mapping[int, int]:
        """Bytes of the weights by address, whole pages, as far as there is memory behind them."""

    def fingerprints(self, segments: Mapping[int, int]) -> dict[int, int]:
        """By address (mball.memory.fingerprint)."""

    def save(self, target: int, address: int, nbytes: int) -> None:
        """Begin to copy from an address of the engine's to one of the host's."""

    def load(self, address: int, source: int, nbytes: int) -> None:
        """Begin to copy back."""

    def finish(self) -> None:
        """Until every copy has arrived."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A segment as the image has it, from byte `position` on."""

    nbytes: int
    position: int
    fingerprint: int


class EngineImage:
    """One process's part of an image: the memfd's bytes from `offset` on. Made by `fill`."""

    def __init__(self, pages: RegisteredImage, segments: Mapping[int, Kept]) -> None:
        self._pages = pages
        self.segments = segments

    @classmethod
    def fill(cls, memory: EngineMemory, fd: int, offset: int, cancel: threading.Event, pace: Pace) -> EngineImage:
        """Beside an engine that may compute: what registers a piece holds up all that is asked of the driver.

        Raises Cancelled, TransitionError, RegistrationFailed, DeviceError, OSError.
        """
        there = dict(memory.segments())
        # Before they are copied: what changes meanwhile has another fingerprint when it is compared.
        with memory.entered():
            prints = memory.fingerprints(there)
        segments: dict[int, Kept] = {}
        for address, nbytes in there.items():
            segments[address] = Kept(nbytes, offset, prints[address])
            offset += nbytes
        if offset > (size := os.fstat(fd).st_size):
            raise TransitionError(f"{format_bytes(offset)} of weights for an image of {format_bytes(size)}")
        pages = RegisteredImage(fd, memory.runtime, writable=True)
        with ExitStack() as undo:
            undo.callback(pages.close)
            undo.callback(memory.finish)

            def save(piece: tuple[int, int, int]) -> None:
                with pace.turn(), memory.entered():
                    if cancel.is_set():
                        raise Cancelled("the image is not wanted any more")
                    address, position, nbytes = piece
                    memory.save(pages.pin(position), address, nbytes)

            with ThreadPoolExecutor(host_threads(), thread_name_prefix="mball-image") as pool:
                for done in [pool.submit(save, piece) for piece in _pieces(segments)]:
                    done.result()
            memory.finish()
            undo.pop_all()
        return cls(pages, segments)

    def restore(self, memory: EngineMemory, address: int) -> None:
        """Begin to copy a segment back. Raises RegistrationFailed, DeviceError, OSError."""
        for at, position, nbytes in _pieces({address: self.segments[address]}):
            memory.load(at, self._pages.pin(position), nbytes)

    def read(self, address: int, target: int) -> None:
        """Copy a segment to other memory of the host. Raises OSError."""
        for at, position, nbytes in _pieces({address: self.segments[address]}):
            ctypes.memmove(target + at - address, self._pages.pin(position), nbytes)

    def close(self) -> None:
        """No copy is under way. Idempotent."""
        self._pages.close()


class Filling:
    """An image being filled, in a thread of its own, beside an engine that computes. Closes the descriptor.

    `state`: filling, ready, or failed with an `error`.
    """

    def __init__(self, memory: EngineMemory, fd: int, offset: int) -> None:
        self.image: EngineImage | None = None
        self.state = "filling"
        self.error: str | None = None
        self.cancel = threading.Event()
        self._pace = Pace(memory.computes)
        self._thread = threading.Thread(target=self._run, args=(memory, fd, offset), name="mball-fill", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Until it has ended, as fast as it can. Raises TransitionError where that takes too long."""
        self._pace.hurry()
        self._thread.join(_SETTLE_S)
        if self._thread.is_alive():
            raise TransitionError(f"the image is still being filled after {_SETTLE_S:.0f} s")

    def _run(self, memory: EngineMemory, fd: int, offset: int) -> None:
        try:
            self.image = EngineImage.fill(memory, fd, offset, self.cancel, self._pace)
            self.state = "ready"
        except (MballError, OSError, RuntimeError) as error:
            self.error = f"{type(error).__name__}: {error}"
            self.state = "failed"
        finally:
            os.close(fd)


class Vault:
    """Keeps the weights of one process of an engine while their memory is gone. Used by one thread.

    `put_away` before it goes, `bring_back` and `finish` once it is there again. What the image was filled with is known
    for good: it may leave, and come back by `take`, or be read from the swap store by `restore`.
    """

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._filling: Filling | None = None
        self._again: EngineImage | None = None
        self._known: Mapping[int, Kept] = {}
        self._aside: dict[int, mapping.Mapping] = {}
        self._from_image: set[int] = set()
        self._lost: set[int] | None = None

    def fill(self, fd: int, offset: int) -> None:
        """Begins to make the image. Raises TransitionError where there is one."""
        self._none_yet()
        self._filling = Filling(self._memory, os.dup(fd), offset)

    @property
    def aside_bytes(self) -> int:
        """Of host memory, for what was copied out."""
        return sum(aside.nbytes for aside in self._aside.values())

    def name(self) -> str | None:
        """SHA-256, in hexadecimal, of what is in this process's part of the image that was filled last, and where; None
        where none was."""
        known = self._manifest()
        if not known:
            return None
        begin = min(kept.position for kept in known.values())
        return digest(*(f"{k.position - begin} {k.nbytes} {k.fingerprint:016x}" for k in known.values())).hex()

    def take(self, fd: int, *, lost: bool) -> bool:
        """The image that was filled here once, as it comes back. `lost`: the weights are away, and are in it; whether
        they can be had from it. Raises TransitionError where there is another, or none was filled; OSError."""
        self._none_yet()
        if not self._known:
            raise TransitionError("no image was filled here, so this one is of another process's memory")
        self._again = EngineImage(RegisteredImage(fd, self._memory.runtime), self._known)
        if lost and self._lost is not None:
            self._from_image, self._lost = self._lost, None
        return not lost or bool(self._from_image)

    def _none_yet(self) -> None:
        if self._filling is not None or self._again is not None:
            raise TransitionError("there is an image already, or one is being filled")

    def forget(self, segments: Mapping[int, int]) -> None:
        """These go. What is as it was when the image was filled can be had from the swap store, should it have that;
        where little is not (what an engine computes in lies among its weights), that is copied out."""
        same = self._unchanged(segments, self._manifest())
        changed = {address: nbytes for address, nbytes in segments.items() if address not in same}
        self._lost = None
        if same and sum(changed.values()) <= _ASIDE_SHARE * sum(segments.values()):
            self._copy_out(changed)
            self._lost = same

    def restore(self, stored: Stored) -> None:
        """What was forgotten, or lost with the image, from the swap store; its memory is there again.

        Raises SwapMiss; then it is still to be had from elsewhere.
        """
        if self._lost is None:
            raise SwapMiss("changed", "the weights were others than those in the image")
        bring(self._memory, {address: self._known[address] for address in self._lost}, stored)
        self._lost = None

    @property
    def filling(self) -> Filling | None:
        return self._filling

    def drop(self, still_wanted: Collection[int] = ()) -> bool:
        """Ends a filling, and lets go of the image. Whether weights are lost by it: those that are in it alone, but for
        the segments that addresses of `still_wanted` lie in. Raises TransitionError, also while weights are away that
        were changed since, and not in a few places alone: to load them again would undo that.
        """
        if self._filling is not None:
            self._filling.cancel.set()
        image = self._settled_image()
        if image is not None:
            changed = sum(image.segments[a].nbytes for a in self._aside.keys() & image.segments.keys())
            if changed > _ASIDE_SHARE * sum(kept.nbytes for kept in image.segments.values()):
                raise TransitionError(f"{format_bytes(changed)} of the weights were changed since they were loaded")
        self._filling = self._again = None
        if image is None:
            return False
        self._known = image.segments
        for address in self._from_image:
            nbytes = image.segments[address].nbytes
            if any(address <= wanted < address + nbytes for wanted in still_wanted):
                self._aside[address] = mapping.Mapping(nbytes)
                image.read(address, self._aside[address].address)
        lost = bool(self._from_image)
        if lost:
            self._lost = self._from_image - self._aside.keys()
        self._from_image = set()
        image.close()
        return lost

    def put_away(self, segments: Mapping[int, int]) -> int:
        """What is not in the image, or was changed since it was made, is copied out: so many bytes."""
        image = self._settled_image()
        self._from_image |= self._unchanged(segments, image.segments if image is not None else {})
        changed = {address: nbytes for address, nbytes in segments.items() if address not in self._from_image}
        self._copy_out(changed)
        return sum(changed.values())

    def bring_back(self, address: int) -> None:
        """Begins to fill a segment whose memory is there again; one that was not put away stays as it is."""
        memory, image = self._memory, self._settled_image()
        if (aside := self._aside.get(address)) is not None:
            memory.load(address, aside.address, aside.nbytes)
        elif address in self._from_image and image is not None:
            image.restore(memory, address)

    def finish(self, addresses: set[int]) -> None:
        """Until those are back."""
        self._memory.finish()
        for address in addresses:
            if (aside := self._aside.pop(address, None)) is not None:
                aside.close()
        self._from_image -= addresses

    def _unchanged(self, segments: Mapping[int, int], known: Mapping[int, Kept]) -> set[int]:
        there = {a: n for a, n in segments.items() if (kept := known.get(a)) is not None and kept.nbytes == n}
        with self._memory.entered():
            prints = self._memory.fingerprints(there)
        return {address for address, found in prints.items() if found == known[address].fingerprint}

    def _copy_out(self, segments: Mapping[int, int]) -> None:
        with self._memory.entered():
            for address, nbytes in segments.items():
                self._aside[address] = mapping.Mapping(nbytes)
                self._memory.save(self._aside[address].address, address, nbytes)
            self._memory.finish()

    def _settled_image(self) -> EngineImage | None:
        if self._filling is None:
            return self._again
        self._filling.settle()
        return self._filling.image

    def _manifest(self) -> Mapping[int, Kept]:
        image = self._settled_image()
        return self._known if image is None else image.segments


def _pieces(segments: Mapping[int, Kept]) -> Iterator[tuple[int, int, int]]:
    """(address, position, bytes), none across pages that are registered apart."""
    for address, kept in segments.items():
        at = 0
        while at < kept.nbytes:
            position = kept.position + at
            nbytes = min(kept.nbytes - at, PIECE_BYTES - position % PIECE_BYTES)
            yield address + at, position, nbytes
            at += nbytes
