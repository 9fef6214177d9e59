"""`python -m mball.memory.keeper RECORD`: ends what a daemon leaves when it is killed.

A worker dies with the daemon by its parent-death signal; what a worker has forked does not. This process waits for the
end of its standard input, whose other end the daemon alone holds, and then ends the run that RECORD describes. Where
the daemon closed as it should there is no record any more, and nothing is done.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mball.memory import orphans

_TERM_S = 1.0
_KILL_S = 10.0
_LOCK_S = 2.0


def main() -> int:
    while os.read(0, 1):
        pass
    orphans.reap(Path(sys.argv[1]), term_s=_TERM_S, kill_s=_KILL_S, wait_s=_LOCK_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
