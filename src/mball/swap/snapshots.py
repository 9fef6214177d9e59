"""The index on the disk: two areas, written in turn, so that one is whole at any time."""

from __future__ import annotations

import os

from mball.swap.disk import Disk, aligned
from mball.swap.index import Snapshot, encoded_bytes
from mball.swap.layout import BLOCK_BYTES, Damaged, Superblock

NEVER_WRITTEN = "never written"


class Snapshots:
    """Its owner saves one at a time."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        self._disk = disk
        self._layout = superblock.layout
        self._store_id = superblock.store_id
        self._newest_in = 1

    def load(self) -> tuple[Snapshot | None, list[str]]:
        """The newest, and what was wrong with an area."""
        found: dict[int, Snapshot] = {}
        damaged: list[str] = []
        for area in range(2):
            try:
                found[area] = self.read(area)
            except Damaged as error:
                if str(error) != NEVER_WRITTEN:
                    damaged.append(str(error))
        if not found:
            return None, damaged
        self._newest_in = max(found, key=lambda area: found[area].generation)
        return found[self._newest_in], damaged

    def read(self, area: int) -> Snapshot:
        """Raises Damaged."""
        at = self._layout.index_at(area)
        try:
            head = aligned(BLOCK_BYTES)
            self._disk.read([head], at)
            whole = aligned(encoded_bytes(bytes(head), self._layout, self._store_id))
            self._disk.read([whole], at)
        except OSError as error:
            raise Damaged(f"can't be read: {os.strerror(error.errno or 0)}") from error
        return Snapshot.decode(bytes(whole), self._layout, self._store_id)

    def save(self, snapshot: Snapshot) -> int:
        """What it names is on the disk before it is, and it is when this returns; the bytes written.

        Raises OSError: then the one before is still there, and so may be this one.
        """
        data = snapshot.encode(self._store_id)
        memory = aligned(len(data))
        memory[:] = data
        area = 1 - self._newest_in
        self._disk.sync()
        written = self._disk.write([memory], self._layout.index_at(area))
        self._disk.sync()
        self._newest_in = area
        return written
