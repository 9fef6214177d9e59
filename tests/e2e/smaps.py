"""Samples the device bytes of a server's workers from outside: anonymous bytes of smaps_rollup above an idle worker's.

Run as a program of its own: `python smaps.py SERVER_PID BASELINES_JSON`; a line of JSON per sample until stdin closes.
BASELINES_JSON maps a model's name to the anonymous bytes of an idle worker of it.
"""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path

INTERVAL_S = 0.05


def private_bytes(pid: int) -> int | None:
    """None for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Private_Hugetlb:")))


def workers(server: int) -> dict[int, str]:
    """pid → model of the server's living workers, read off their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == server and b"--spec" in arguments:
            found[int(folder.name)] = json.loads(arguments[arguments.index(b"--spec") + 1])["model"]
    return found


def main() -> None:
    server, baselines = int(sys.argv[1]), json.loads(sys.argv[2])
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        sample = {
            model: bytes_ - baselines[model]
            for pid, model in workers(server).items()
            if (bytes_ := private_bytes(pid)) is not None
        }
        sys.stdout.write(json.dumps(sample) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
