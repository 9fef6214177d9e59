"""Where workers come from: forked from a zygote where there is one, else started afresh. All that live are recorded."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from mball.device import prctl
from mball.memory import orphans
from mball.memory.child import Child
from mball.memory.launch import Birth, base_environment, fresh
from mball.memory.settings import Settings
from mball.memory.zygote import NotForked, Zygote

_log = structlog.get_logger(__name__)
_PATH = "PYTHONPATH"
_READS_ONLY = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""For a zygote: whether there is a GPU is found out without beginning CUDA, which no fork survives."""


class Nursery:
    """Makes this process a child subreaper: what a worker leaves behind becomes its child, and is ended.

    `zygotes`: by the command that starts a worker afresh, the command of the zygote that can fork it, and `paths` the
    PYTHONPATH of those that have one of their own. `runs_dir` holds the records of this user's runs (None: where they
    belong). `workers`: the models of those that live, by pid.
    """

    def __init__(
        self,
        zygotes: Mapping[tuple[str, ...], Sequence[str]],
        settings: Settings,
        runs_dir: Path | None,
        log_dir: Path,
        paths: Mapping[tuple[str, ...], str] | None = None,
    ) -> None:
        self._commands = zygotes if settings.zygote else {}
        self._paths = paths or {}
        self._settings = settings
        self._runs_dir = runs_dir
        self._log_dir = log_dir
        self._zygotes: dict[tuple[str, ...], Zygote] = {}
        self._children: dict[int, Child] = {}
        self.workers: dict[int, str] = {}
        self._births = asyncio.Lock()
        self._record: orphans.Record | None = None
        self._keeper: Child | None = None
        self._told: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: set[Zygote] = set()

    async def open(self) -> None:
        """Ends what crashed runs left, then begins the zygotes' imports. Raises OSError, ConfigError."""
        prctl.become_subreaper()
        settings = self._settings
        folder = self._runs_dir if self._runs_dir is not None else await asyncio.to_thread(orphans.runs_dir)
        ended = await asyncio.to_thread(orphans.reap_crashed, folder, term_s=settings.term_s, kill_s=settings.kill_s)
        if ended:
            _log.warning("ended what a crashed run had left", pids=ended)
        record = await asyncio.to_thread(orphans.Record, folder)
        self._record = record
        self._begin_keeper(record.path)
        mark = {orphans.MARK: record.run}
        for number, (command, line) in enumerate(self._commands.items()):
            self._zygotes[command] = Zygote(
                line,
                {**base_environment(1), **_READS_ONLY, **mark, **self._path(command)},
                self._log_dir / f"zygote-{number}.log",
                settings,
                self._know,
                self._adopt,
            )

    async def launch(self, birth: Birth) -> Child:
        """A worker, this process's child, with its place in the record. Raises OSError."""
        record = self._record
        if record is None:
            raise OSError("the nursery is closed")
        birth = replace(birth, environment={**birth.environment, orphans.MARK: record.run})
        # A child that is not yet known would be taken for a stray.
        async with self._births:
            child = await self._fork(birth) or await fresh(birth)
            self._know(child)
            self.workers[child.pid] = birth.spec.model
        try:
            await asyncio.to_thread(record.add, child.pid)
        except BaseException:
            child.signal(signal.SIGKILL)
            raise
        return child

    async def close(self) -> None:
        """After the workers have ended. Idempotent."""
        for zygote in self._zygotes.values():
            await zygote.close()
        self._zygotes.clear()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.kill_s)
        if self._record is not None:
            await asyncio.to_thread(self._record.close)
            self._record = None
        if self._keeper is not None and self._told is not None:
            # It finds no record any more.
            os.close(self._told)
            self._told = None
            await self._keeper.wait(self._settings.verb_s)
            await self._keeper.end(0.0, self._settings.kill_s)

    def pids(self) -> Iterable[int]:
        """Workers and zygotes that live."""
        return list(self._children)

    async def _fork(self, birth: Birth) -> Child | None:
        zygote = self._zygotes.get(tuple(birth.command))
        # Much of an environment is read while modules are imported, which a fork has behind it.
        if zygote is None or birth.spec.environment_digest:
            return None
        try:
            pid = await zygote.fork(birth.spec, birth.environment, birth.channel, birth.log)
        except NotForked as error:
            if zygote not in self._warned:
                self._warned.add(zygote)
                _log.warning(
                    "worker started afresh, not forked: it takes seconds longer, and memory of its own for what it "
                    "imports",
                    model=birth.spec.model,
                    reason=str(error),
                )
            return None
        self._warned.discard(zygote)
        return Child.adopted(pid, sweep_s=self._settings.kill_s)

    def _path(self, command: tuple[str, ...]) -> dict[str, str]:
        return {_PATH: self._paths[command]} if command in self._paths else {}

    def _know(self, child: Child) -> None:
        self._children[child.pid] = child
        child.on_exit(lambda: self._ended(child))

    def _ended(self, child: Child) -> None:
        self._children.pop(child.pid, None)
        self.workers.pop(child.pid, None)
        if self._record is not None:
            task = asyncio.create_task(self._sweep(self._record.run), name="strays")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _sweep(self, run: str) -> None:
        """Ends what a worker had forked that left its group: it is this process's child now."""
        async with self._births:
            strays = await asyncio.to_thread(orphans.strays, run, self.pids())
            for stray in strays:
                if self._adopt(stray.pid):
                    _log.warning("ended what a worker had left", pid=stray.pid)

    def _adopt(self, pid: int) -> bool:
        """Ends a child of this process that is nobody's; another's, or one that is gone, is left alone."""
        # It may have come to be known, or gone, since it was looked for.
        if pid in self._children or orphans.parent(pid) != os.getpid():
            return False
        os.kill(pid, signal.SIGKILL)
        self._know(Child.adopted(pid, sweep_s=self._settings.kill_s))
        return True

    def _begin_keeper(self, record: Path) -> None:
        told, self._told = os.pipe()
        try:
            popen = subprocess.Popen(
                [sys.executable, "-m", "mball.memory.keeper", str(record)],
                stdin=told,
                stdout=subprocess.DEVNULL,
                env=base_environment(1),
                start_new_session=True,
            )
        finally:
            os.close(told)
        self._keeper = Child(popen.pid, popen.wait, sweep_s=0.0)
