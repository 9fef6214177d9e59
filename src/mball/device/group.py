"""Several GPUs as one device, for models that are spread over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mball.device.device import Device, Foreign


class DeviceGroup:
    """A process on it has a part of equal size on every member. All bytes are those of one member: the one that has
    least free, or on which the process or the strangers hold most."""

    def __init__(self, members: Sequence[Device]) -> None:
        self._members = tuple(members)
        self.name = "+".join(member.name for member in members)
        self.total_bytes = min(member.total_bytes for member in members)
        self.context_bytes = max(member.context_bytes for member in members)

    def process_bytes(self, pid: int, baseline_bytes: int = 0) -> int | None:
        held = [member.process_bytes(pid, baseline_bytes) for member in self._members]
        return max((nbytes for nbytes in held if nbytes is not None), default=None)

    def free_bytes(self) -> int:
        # A larger member's surplus is of no use to anybody.
        return min(member.free_bytes() - (member.total_bytes - self.total_bytes) for member in self._members)

    def foreign(self, ours: Mapping[int, int]) -> Foreign:
        return max((member.foreign(ours) for member in self._members), key=lambda found: found.nbytes)
