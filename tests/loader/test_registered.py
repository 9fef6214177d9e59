from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from mball.device.memfd import create
from mball.errors import RegistrationFailed
from mball.loader import registered
from mball.loader.registered import RegisteredImage
from mball.units import KiB
from tests.device.fake_cuda import FakeRuntime

PIECE = 64 * KiB


@pytest.fixture
def image_fd(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of ten pieces and a bit."""
    monkeypatch.setattr(registered, "PIECE_BYTES", PIECE)
    fd = create("test", 10 * PIECE + 4096)
    yield fd
    os.close(fd)


def test_all_of_it_is_registered_ahead_and_never_twice(image_fd: int) -> None:
    runtime = FakeRuntime()
    image = RegisteredImage(image_fd, runtime)
    image.pin(3 * PIECE)
    assert not image.registered
    image.register()
    assert image.registered
    assert len(runtime.registrations) == 11
    address = image.pin(5 * PIECE + 7)
    assert runtime.reachable(address, 1)
    image.close()
    assert runtime.registered == {}


def test_one_that_is_closed_while_it_is_registered_leaves_nothing_registered(image_fd: int) -> None:
    closing = threading.Event()
    runtime = FakeRuntime()
    image = RegisteredImage(image_fd, runtime)
    register = runtime.register

    def registers(address: int, nbytes: int, *, read_only: bool = False) -> None:
        register(address, nbytes, read_only=read_only)
        if len(runtime.registrations) == 3:
            closer.start()
            closing.wait(10)

    def close() -> None:
        closing.set()
        image.close()

    closer = threading.Thread(target=close)
    runtime.register = registers  # type: ignore[method-assign]
    image.register()
    closer.join(10)
    image.register()
    assert not closer.is_alive()
    assert runtime.registered == {}


def test_what_a_driver_refuses_is_told_and_not_tried_again(image_fd: int) -> None:
    image = RegisteredImage(image_fd, FakeRuntime(refuses=lambda nbytes, read_only: True))
    for _ in range(2):
        with pytest.raises(RegistrationFailed, match="refuses"):
            image.register()
    image.close()
