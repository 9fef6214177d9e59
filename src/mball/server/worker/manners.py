"""How every worker behaves towards its manager, whatever its engine. The standard library and MBALL alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator

from mball.errors import TransitionError
from mball.memory.control import Message
from mball.swap.place import Place


class Fence:
    """A verb that carries an epoch below one seen before comes from a lease that has ended, and is refused."""

    def __init__(self) -> None:
        self._epoch = 0

    def check(self, message: Message) -> None:
        """Raises TransitionError."""
        epoch = message.get("epoch", 0)
        if not isinstance(epoch, int) or epoch < self._epoch:
            raise TransitionError(f"the lease of epoch {epoch!r} has ended: epoch {self._epoch} was seen")
        self._epoch = epoch


def no_descriptor(fd: int | None) -> None:
    """Raises TransitionError where one came; it is closed."""
    if fd is not None:
        os.close(fd)
        raise TransitionError("a descriptor came with a verb that takes none")


def place_of(fd: int) -> Place:
    """Where in the swap store an image is, as JSON in a memfd says, which is closed. Raises TransitionError."""
    try:
        return Place.from_wire(json.loads(os.pread(fd, os.fstat(fd).st_size, 0)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TransitionError(f"promote: its descriptor says no place: {error!r}") from None
    finally:
        os.close(fd)


@contextlib.contextmanager
def stopped_by_signals(stopping: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
