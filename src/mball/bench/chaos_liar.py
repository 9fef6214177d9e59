"""`python -m mball.bench.chaos_liar …`: a real worker that says it gave its memory back, and has not."""

from __future__ import annotations

import sys

from mball.memory.control import Message
from mball.server.worker import __main__ as worker
from mball.server.worker import process
from mball.server.worker.verbs import Verbs


class _Lying(Verbs):
    async def _demote(self, message: Message, fd: int | None) -> Message:
        return {"released_bytes": 1 << 40, "private_bytes": 0, "total_s": 0.0}


if __name__ == "__main__":
    process.Verbs = _Lying  # type: ignore[misc]
    sys.exit(worker.main())
