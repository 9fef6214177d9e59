"""Images registered with a GPU's driver: once per process, piece by piece, and kept until they are let go of."""

from __future__ import annotations

import os
import threading

from mball.device.cuda import Registrar
from mball.device.mapping import Mapping
from mball.errors import RegistrationFailed
from mball.units import MiB

PIECE_BYTES = 64 * MiB
"""Of an image, registered together. No copy may cross from one to the next."""


class RegisteredImage:
    """An image's pages, read-only or to be filled (`writable`). Used by many threads."""

    def __init__(self, image_fd: int, runtime: Registrar, *, writable: bool = False) -> None:
        """Raises OSError."""
        self._runtime = runtime
        self._read_only = not writable
        self._mapping = Mapping(os.fstat(image_fd).st_size, image_fd, writable=writable)
        pieces = -(-self._mapping.nbytes // PIECE_BYTES)
        self._locks = [threading.Lock() for _ in range(pieces)]
        self._registered = [False] * pieces
        self._refused: RegistrationFailed | None = None
        self._closed = False

    def register(self) -> None:
        """All of it, ahead of need and beside copies from it; ends early where it is closed meanwhile.

        Raises OSError, RegistrationFailed.
        """
        for piece, lock in enumerate(self._locks):
            with lock:
                if self._closed:
                    return
                if not self._registered[piece]:
                    self._register(piece)

    def pin(self, position: int) -> int:
        """The address of a byte of the image, whose piece is registered. Raises OSError, RegistrationFailed."""
        piece = position // PIECE_BYTES
        if not self._registered[piece]:
            with self._locks[piece]:
                if not self._registered[piece]:
                    self._register(piece)
        return self._mapping.address + position

    @property
    def registered(self) -> bool:
        """All of it."""
        return all(self._registered)

    def close(self) -> None:
        """Let go of the pages; no copy may be under way. Idempotent."""
        self._closed = True
        for piece, lock in enumerate(self._locks):
            with lock:
                if self._registered[piece]:
                    self._runtime.unregister(self._mapping.address + piece * PIECE_BYTES)
                self._registered[piece] = False
        self._mapping.close()

    def _register(self, piece: int) -> None:
        if self._refused is not None:
            raise self._refused
        begin = piece * PIECE_BYTES
        nbytes = min(PIECE_BYTES, self._mapping.nbytes - begin)
        self._mapping.populate(begin, nbytes)
        try:
            self._runtime.register(self._mapping.address + begin, nbytes, read_only=self._read_only)
        except RegistrationFailed as error:
            self._refused = error
            raise
        self._registered[piece] = True


class Images:
    """The registered images of a process, by the file they are: descriptors of one image are one entry."""

    def __init__(self) -> None:
        self._images: dict[tuple[int, int], RegisteredImage] = {}
        self._lock = threading.Lock()

    def attach(self, image_fd: int, runtime: Registrar) -> RegisteredImage:
        """Raises OSError where it can't be mapped."""
        with self._lock:
            key = _key(image_fd)
            if key not in self._images:
                self._images[key] = RegisteredImage(image_fd, runtime)
            return self._images[key]

    def detach(self, image_fd: int) -> None:
        """Let go of an image before its descriptor is closed; nothing where it was never attached."""
        with self._lock:
            image = self._images.pop(_key(image_fd), None)
        if image is not None:
            image.close()


def _key(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


IMAGES = Images()
"""This process's."""
