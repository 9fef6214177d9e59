"""Real workers that say they gave their memory back, and have not.

`python -m mball.bench.chaos_liar worker|zygote …`, and what a worker's or a zygote's command takes.
"""

from __future__ import annotations

import sys

from mball.memory.control import Message
from mball.server.worker import __main__ as worker
from mball.server.worker import process, verbs, zygote


class Lying(verbs.Verbs):
    """Its weights stay where they are."""

    async def _demote(self, message: Message, fd: int | None) -> Message:
        return {"released_bytes": 1 << 40, "private_bytes": 0, "total_s": 0.0}


if __name__ == "__main__":
    setattr(process, "Verbs", Lying)  # noqa: B010 - this is what the module is for
    sys.exit(worker.main() if sys.argv.pop(1) == "worker" else zygote.main())
