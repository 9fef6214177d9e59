"""The worker's side of device memory: take before it is touched, give after it is released."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from mball.device.device import members
from mball.device.simulated import SimulatedDevice
from mball.errors import ConfigError


class Account(Protocol):
    """One process's account with its device."""

    def take(self, nbytes: int) -> None:
        """Raises DeviceOutOfMemory where the device has not so much free; then nothing is taken."""

    def give(self, nbytes: int) -> None:
        """Gives back what was taken."""


class OpenAccount:
    """Enforces nothing: the CPU's budget is the manager's to keep, a GPU's capacity the driver's."""

    def take(self, nbytes: int) -> None:
        pass

    def give(self, nbytes: int) -> None:
        pass


class SimulatedAccount:
    """This process on a simulated device; opening it charges the context."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._pid = os.getpid()
        device.attach(self._pid)

    def take(self, nbytes: int) -> None:
        self._device.take(self._pid, nbytes)

    def give(self, nbytes: int) -> None:
        self._device.give(self._pid, nbytes)


class GroupAccount:
    """With every member of a group: the same bytes of each, or none."""

    def __init__(self, accounts: Sequence[Account]) -> None:
        self._accounts = accounts

    def take(self, nbytes: int) -> None:
        with ExitStack() as undo:
            for account in self._accounts:
                account.take(nbytes)
                undo.callback(account.give, nbytes)
            undo.pop_all()

    def give(self, nbytes: int) -> None:
        for account in self._accounts:
            account.give(nbytes)


def open_account(device: str) -> Account:
    """The account of this process for `cpu`, `cuda:…` or `simulated:PATH`, or for a group of the latter.

    Raises ConfigError for another name; on a simulated device DeviceError, and DeviceOutOfMemory where there is no
    room for a context.
    """
    if len(parts := members(device)) > 1:
        return GroupAccount([open_account(part) for part in parts])
    kind, _, path = device.partition(":")
    if kind == "simulated" and path:
        return SimulatedAccount(SimulatedDevice.open(path))
    if kind in ("cpu", "cuda"):
        return OpenAccount()
    raise ConfigError(f"no such device: {device!r} (cpu, cuda:GPU-uuid or simulated:PATH)")
