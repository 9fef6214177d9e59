"""However a daemon ends, nothing of its run stays, and nobody else is touched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mball.device.proc import start_ticks
from mball.memory import orphans
from mball.memory.orphans import MARK, Born, Record, boot_id, family, reap
from tests.fake_worker import Knobs

DAEMON = """
import asyncio, os, sys
from pathlib import Path
from mball.memory.nursery import Nursery
from mball.memory.process import WorkerProcess
from mball.memory.spec import WorkerSpec
from tests import fake_worker, fake_zygote
from tests.memory.conftest import QUICK

async def main():
    folder, knobs, forked = Path(sys.argv[1]), eval(sys.argv[2], vars(fake_worker)), sys.argv[3] == "forked"
    line = tuple(fake_worker.command())
    nursery = Nursery({line: fake_zygote.command()} if forked else {}, QUICK, folder, folder)
    await nursery.open()
    spec = WorkerSpec(model="m", path="/m", socket_path=str(folder / "s"))
    worker, _ = await WorkerProcess.start(line, spec, extra_environment=knobs.environment(), log=folder / "m.log",
                                          settings=QUICK, launch=nursery.launch)
    print("ready", worker.pid, nursery._keeper.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@contextlib.contextmanager
def daemon(folder: Path, knobs: Knobs, how: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """(the daemon, its worker's pid, its keeper's)."""
    line = [sys.executable, "-c", DAEMON, str(folder), repr(knobs), how]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            # Logs go the same way.
            ready = next(words for line in process.stdout if (words := line.split())[:1] == [b"ready"])
            worker, keeper = int(ready[1]), int(ready[2])
            yield process, worker, keeper
        finally:
            process.kill()


@contextlib.contextmanager
def sleeper(**environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def gone(pid: int) -> bool:
    return start_ticks(pid) is None


def until(condition: Callable[[], bool], deadline_s: float = 120.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_of(folder: Path) -> str:
    (path,) = folder.glob("*.run")
    return path.stem


@pytest.mark.parametrize("how", ["fresh", "forked"])
def test_a_killed_daemon_takes_its_worker_with_it_and_what_that_had_forked(runtime_dir: Path, how: str) -> None:
    with daemon(runtime_dir, Knobs(orphan=True, leaves_group=True), how) as (process, worker, keeper):
        run = run_of(runtime_dir)
        assert len(family(run)) == (3 if how == "forked" else 2)
        process.kill()
        until(lambda: gone(keeper))
        assert gone(worker)
        assert not family(run)
        assert not list(runtime_dir.glob("*.run"))


@pytest.mark.parametrize("how", ["fresh", "forked"])
def test_the_kernel_ends_a_worker_with_its_daemon_whatever_it_does(runtime_dir: Path, how: str) -> None:
    with daemon(runtime_dir, Knobs(), how) as (process, worker, keeper):
        # Stopped, it sees no channel close; and no keeper is there to end it.
        os.kill(worker, signal.SIGSTOP)
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        until(lambda: gone(worker))


@pytest.mark.parametrize("how", ["fresh", "forked"])
def test_a_worker_that_outlives_its_daemon_and_its_keeper_is_ended_at_the_next_start(
    runtime_dir: Path, how: str
) -> None:
    knobs = Knobs(orphan=True, leaves_group=True, lone=True, deaf=True)
    with daemon(runtime_dir, knobs, how) as (process, worker, keeper):
        run = run_of(runtime_dir)
        assert orphans.reap_crashed(runtime_dir, term_s=0.1, kill_s=5.0) == []  # its daemon lives
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        process.wait()
        assert not gone(worker)
        ended = orphans.reap_crashed(runtime_dir, term_s=0.2, kill_s=10.0)
        assert worker in ended
        assert gone(worker)
        assert not family(run)
        assert not list(runtime_dir.glob("*.run"))
        assert orphans.reap_crashed(runtime_dir, term_s=0.1, kill_s=5.0) == []


async def test_a_manager_reaps_when_it_starts(runtime_dir: Path) -> None:
    from mball.memory.nursery import Nursery
    from tests.memory.conftest import QUICK

    with daemon(runtime_dir, Knobs(lone=True), "fresh") as (process, worker, keeper):
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        await asyncio.to_thread(process.wait)
        nursery = Nursery({}, QUICK, runtime_dir, runtime_dir)
        await nursery.open()
        assert gone(worker)
        await nursery.close()


def write(folder: Path, run: str, born: list[Born], boot: str | None = None) -> Path:
    path = folder / f"{run}.run"
    lines = [{"run": run, "boot_id": boot or boot_id()}, *({"pid": b.pid, "start_ticks": b.start_ticks} for b in born)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ticks(pid: int) -> int:
    found = start_ticks(pid)
    assert found is not None
    return found


def test_strangers_are_left_alone(tmp_path: Path) -> None:
    """A pid that is another's now: no mark; another run's mark; the run's mark in no variable of its own."""
    with sleeper() as bare, sleeper(**{MARK: "another"}) as other, sleeper(X=f"{MARK}=mine") as odd:
        born = [Born(p.pid, ticks(p.pid)) for p in (bare, other, odd)]
        # Looked at first: were it wrong, what follows would end everything of this user's.
        assert family("mine") == []
        path = write(tmp_path, "mine", [*born, Born(bare.pid, born[0].start_ticks - 5)])
        assert reap(path, term_s=0.1, kill_s=0.1) == []
        assert not any(gone(p.pid) for p in (bare, other, odd))
        assert not path.exists()


def test_a_record_of_another_boot_says_nothing(tmp_path: Path) -> None:
    with sleeper(**{MARK: "mine"}) as process:
        path = write(tmp_path, "mine", [Born(process.pid, ticks(process.pid))], boot="before")
        assert reap(path, term_s=0.1, kill_s=0.1) == []
        assert not gone(process.pid)
        assert not path.exists()


def test_one_that_was_not_recorded_is_found_by_its_mark_and_a_cut_record_will_do(tmp_path: Path) -> None:
    with sleeper(**{MARK: "mine"}) as process:
        path = write(tmp_path, "mine", [])
        path.write_text(path.read_text() + '{"pid": 1, "sta')
        assert reap(path, term_s=5.0, kill_s=5.0) == [process.pid]
        assert process.wait() == -signal.SIGTERM


def test_the_whole_group_of_a_recorded_worker_ends(tmp_path: Path) -> None:
    """Even one of it that has dropped its environment."""
    line = f"{sys.executable} -c 'import time; time.sleep(600)'"
    script = f"env -i {line} & echo $!; wait"
    with subprocess.Popen(
        ["bash", "-c", script], env={MARK: "mine", **os.environ}, stdout=subprocess.PIPE, start_new_session=True
    ) as leader:
        assert leader.stdout is not None
        bare = int(leader.stdout.readline())
        path = write(tmp_path, "mine", [Born(leader.pid, ticks(leader.pid))])
        assert leader.pid in reap(path, term_s=5.0, kill_s=5.0)
        until(lambda: gone(bare))


def test_a_record_stays_small(tmp_path: Path) -> None:
    record = Record(tmp_path)
    with sleeper() as process:
        record.add(process.pid)
        for _ in range(300):
            with sleeper() as brief:
                record.add(brief.pid)
        lines = record.path.read_text().splitlines()
        assert len(lines) < 100
        assert json.loads(lines[0])["pid"] == os.getpid()
        assert {"pid": process.pid, "start_ticks": ticks(process.pid)} in map(json.loads, lines)
    assert reap(record.path, term_s=0.1, kill_s=0.1) == []
    assert record.path.exists()  # this run lives
    record.close()
    assert not list(tmp_path.iterdir())


def test_the_place_of_records_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = orphans.runs_dir()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(orphans.ConfigError, match="not a folder of this user"):
        orphans.runs_dir()
