"""Blocks in rows of an engine's own memory, that go to a store and come back by threads: for an engine which manages
its blocks itself, and asks now and then what is done.

Nothing that the engine's thread calls waits, but `drain` and `close`, which end. What is late, damaged or too much is
not there: the engine computes it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mball.errors import Cancelled, MballError, SwapRefused
from mball.swap.block_store import BlockStore
from mball.swap.book import Want
from mball.swap.counters import Counters
from mball.swap.disk import aligned
from mball.swap.index import Kind
from mball.swap.kv_io import read_blocks, write_blocks
from mball.swap.kv_lane import Lane
from mball.swap.place import Place, digest
from mball.swap.policy import Worth
from mball.swap.threads import Call, Threads
from mball.units import MiB

LOOKUP_S = 2.0
"""An answer that takes longer is none."""
JOB_S = 10.0
"""After so long nothing more of a job is read or written."""
HANG_S = 30.0
"""A piece that takes so long will not end: the store is used no more."""
_THREADS = 8
_PIECE_BYTES = 32 * MiB
_LEAST_PIECE = 8


@dataclass(frozen=True, slots=True)
class Done:
    """A job that has ended: `good` are those of its keys that are where they should be, `whole` where all are."""

    number: int
    whole: bool
    good: tuple[bytes, ...]


@dataclass(eq=False, slots=True)
class _Looked:
    """What is known of a key: `place` once it was found, nothing before `answered`. `users` ask for it."""

    asked_s: float
    users: set[Hashable]
    answered: bool = False
    place: Place | None = None


@dataclass(eq=False, slots=True)
class _Job:
    """`live` until it is told as done: its rows are the engine's again from then on. Nothing more is begun after
    `ends_s`. `parents`: which keys continue which."""

    number: int
    keys: Sequence[bytes]
    rows: Sequence[int]
    ends_s: float
    parents: Mapping[bytes, bytes] = field(default_factory=dict)
    live: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)


class RowTier:
    """`model` is a SHA-256 over all that the blocks' bytes depend on beside their keys; `saved_s` what bringing one
    back is thought to save. At most `queue_bytes` wait to be written, or one job. One thread calls; `use_store` and
    `counts` are anyone's."""

    def __init__(
        self,
        row: Callable[[int], memoryview],
        model: bytes,
        *,
        row_bytes: int,
        queue_bytes: int,
        saved_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`row(n)` is row n's bytes, all of the same number."""
        self._row = row
        self._model = model
        self._row_bytes = row_bytes
        self._most_waiting = queue_bytes // row_bytes
        self._piece = max(_LEAST_PIECE, _PIECE_BYTES // row_bytes)
        self._saved_s = saved_s
        self._clock = clock
        self._store: BlockStore | None = None
        self._counters = Counters()
        self._looked: dict[bytes, _Looked] = {}
        self._by_user: dict[Hashable, dict[bytes, None]] = {}
        """In the order in which it asked."""
        self._to_find: dict[Hashable, list[bytes]] = {}
        self._changed = threading.Condition()
        """Of the store, what was looked for, and the jobs."""
        self._jobs: set[_Job] = set()
        self._done: list[Done] = []
        self._waiting = 0
        self._scratch = threading.local()
        self._threads = Threads(_THREADS)
        self._finds, self._reads, self._writes = Lane("kv-find"), Lane("kv-read"), Lane("kv-write")

    def use_store(self, store: BlockStore | None) -> None:
        """Read and write there from now on, or nowhere."""
        with self._changed:
            self._store = store

    def counts(self) -> dict[str, int]:
        return self._counters.all()

    def lookup(self, key: bytes, user: Hashable, group: Hashable = None) -> bool | None:
        """Whether the store has a block; None while that is not known: it is looked for at the next `flush`. Keys of
        one user and group are taken for a chain, asked for from its beginning or its end: beside what is there from
        the first on, and from the last on, nothing is looked for."""
        with self._changed:
            looked = self._looked.get(key)
            if looked is None:
                if self._store is None:
                    return False
                looked = self._looked[key] = _Looked(self._clock(), set())
                self._to_find.setdefault((user, group), []).append(key)
            looked.users.add(user)
            self._by_user.setdefault(user, {})[key] = None
            if not looked.answered and self._clock() - looked.asked_s > LOOKUP_S:
                looked.answered = True
                self._counters.add("late_lookups")
            return looked.place is not None if looked.answered else None

    def flush(self) -> None:
        """Begins to look for what was asked for since."""
        with self._changed:
            chains, store = list(self._to_find.values()), self._store
            self._to_find.clear()
        if chains:
            self._finds.put(functools.partial(self._find, store, chains))

    def forget(self, user: Hashable) -> None:
        """It asks no more."""
        with self._changed:
            for key in self._by_user.pop(user, {}):
                looked = self._looked[key]
                looked.users.discard(user)
                if not looked.users:
                    del self._looked[key]

    def load(self, number: int, keys: Sequence[bytes], rows: Sequence[int]) -> None:
        """Blocks that were found, into these rows, which are this job's until it is done."""
        self._begin(self._reads, self._load, _Job(number, keys, rows, self._clock() + JOB_S))

    def store(self, number: int, keys: Sequence[bytes], rows: Sequence[int], user: Hashable = None) -> None:
        """These rows' blocks are to be kept. They don't change until the job is done; where too much waits already it
        is done at once, and nothing kept. In the order in which `user` asked for them each continues the one before."""
        with self._changed:
            order = {key: place for place, key in enumerate(self._by_user.get(user, {}))}
            takes = self._store is not None and (not self._waiting or self._waiting + len(keys) <= self._most_waiting)
            if takes:
                self._waiting += len(keys)
        pairs = sorted(zip(keys, rows, strict=True), key=lambda pair: order.get(pair[0], len(order)))
        asked = list(order)
        parents = {key: asked[place - 1] for key, place in order.items() if place}
        job = _Job(number, [key for key, _ in pairs], [row for _, row in pairs], self._clock() + JOB_S, parents)
        if takes:
            self._begin(self._writes, self._write, job)
            return
        self._counters.add("dropped_blocks", len(keys))
        with self._changed:
            self._jobs.add(job)
        self._end(job, ())

    def finished(self) -> list[Done]:
        """Jobs that ended since."""
        with self._changed:
            done, self._done = self._done, []
        return done

    def drain(self, deadline_s: float) -> None:
        """Every job is done, and no row is touched any more: in time, or given up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs, deadline_s)
            left = list(self._jobs)
        for job in left:
            self._end(job, ())

    def close(self, deadline_s: float) -> bool:
        """Gives up what was begun; False where a thread hangs. Idempotent."""
        self.use_store(None)
        ends = time.monotonic() + deadline_s
        self.drain(deadline_s / 2)
        parts = (self._finds, self._reads, self._writes, self._threads)
        ended = [part.close(max(0.1, ends - time.monotonic())) for part in parts]
        return all(ended)

    def _find(self, store: BlockStore | None, chains: Sequence[Sequence[bytes]]) -> None:
        for chain in chains:
            places: list[Place | None] = []
            try:
                if store is not None:
                    places = self._both_ends(store, [digest(key) for key in chain])
            except (MballError, OSError):
                self._counters.add("failed_lookups")
            there = sum(place is not None for place in places)
            self._counters.add("found_blocks", there)
            self._counters.add("missing_blocks", len(chain) - there)
            with self._changed:
                for number, key in enumerate(chain):
                    looked = self._looked.get(key)
                    if looked is not None and not looked.answered:
                        looked.answered = True
                        looked.place = places[number] if number < len(places) else None

    def _both_ends(self, store: BlockStore, names: Sequence[bytes]) -> list[Place | None]:
        first: list[Place | None] = [*store.find(names, self._model)]
        rest = names[len(first) + 1 :]
        last = store.find(rest[::-1], self._model) if rest else []
        return [*first, *[None] * (len(names) - len(first) - len(last)), *reversed(last)]

    def _begin(self, lane: Lane, act: Callable[[_Job], None], job: _Job) -> None:
        with self._changed:
            self._jobs.add(job)
        if not lane.put(functools.partial(act, job)):
            self._end(job, ())

    def _end(self, job: _Job, good: Sequence[bytes]) -> None:
        """Told once, whoever comes first."""
        with job.lock:
            was, job.live = job.live, False
        with self._changed:
            if was:
                self._jobs.discard(job)
                self._done.append(Done(job.number, len(good) == len(job.keys), tuple(good)))
            self._changed.notify_all()

    def _load(self, job: _Job) -> None:
        good: list[bytes] = []
        try:
            self._read(job, good)
        except (MballError, OSError) as error:
            self._failed(error)
        finally:
            self._unfind(set(job.keys).difference(good))
            self._end(job, good)

    def _unfind(self, keys: Iterable[bytes]) -> None:
        """They were found and could not be had: whoever asks again is told that they are not there."""
        with self._changed:
            for key in keys:
                if (looked := self._looked.get(key)) is not None:
                    looked.answered, looked.place = True, None

    def _read(self, job: _Job, good: list[bytes]) -> None:
        with self._changed:
            store = self._store
            found = [self._looked.get(key) for key in job.keys]
            places = [None if looked is None else looked.place for looked in found]
        there = [(place, at) for at, place in enumerate(places) if place is not None]
        for first in range(0, len(there), self._piece):
            if store is None or not self._goes_on(job):
                self._counters.add("late_blocks", len(there) - first)
                return
            part = there[first : first + self._piece]

            def read(number: int, store: BlockStore = store, part: list[tuple[Place, int]] = part) -> int:
                place, at = part[number]
                scratch = self._memory()
                count = store.slots.read(place, scratch)
                with job.lock:
                    if not job.live:
                        raise OSError("given up")
                    # Without the interpreter's lock, as a slice would not be: the engine goes on.
                    np.copyto(np.frombuffer(self._row(job.rows[at]), np.uint8), np.frombuffer(scratch, np.uint8))
                return count

            misses = read_blocks(store, [place for place, _ in part], self._row_bytes, read, self._run)
            self._counters.add("failed_loads", len(misses))
            self._counters.add("loaded_blocks", len(part) - len(misses))
            good += [job.keys[at] for number, (_, at) in enumerate(part) if number not in misses]

    def _write(self, job: _Job) -> None:
        good: list[bytes] = []
        at, count, store = 0, len(job.keys), self._store
        try:
            while at < count and store is not None and self._goes_on(job):
                numbers = range(at, min(at + self._piece, count))
                good += self._write_piece(store, job, numbers)
                at = numbers.stop
            self._counters.add("dropped_blocks", count - at)
        except SwapRefused:
            self._counters.add("refused_blocks", count - at)
        except (MballError, OSError) as error:
            self._failed(error)
        finally:
            with self._changed:
                self._waiting -= count
            self._end(job, good)

    def _write_piece(self, store: BlockStore, job: _Job, numbers: range) -> list[bytes]:
        """Those that are there now. Raises SwapRefused where none may be."""
        wants = [self._want(job, number) for number in numbers]
        written = write_blocks(store, wants, lambda at: self._row(job.rows[numbers[at]]), self._run)
        self._counters.add("stored_blocks", written.entries)
        self._counters.add("refused_blocks", written.refused)
        return [job.keys[number] for at, number in enumerate(numbers) if at not in written.lost]

    def _goes_on(self, job: _Job) -> bool:
        return job.live and self._clock() < job.ends_s

    def _want(self, job: _Job, number: int) -> Want:
        now_s = time.time()
        rate = Worth(self._saved_s, 1.0, now_s).rate(now_s)
        key = job.keys[number]
        parent = job.parents.get(key)
        above = None if parent is None else digest(parent)
        return Want(Kind.BLOCK, digest(key), self._model, self._row_bytes, self._saved_s, rate, above)

    def _memory(self) -> memoryview:
        """This thread's own. Not the row: a read that hangs may still write there when the row is another's."""
        kept: memoryview | None = getattr(self._scratch, "memory", None)
        if kept is None:
            kept = self._scratch.memory = aligned(self._row_bytes)
        return kept

    def _run(self, calls: Sequence[Call], *, reading: bool) -> None:
        self._threads.run(calls, reading=reading, deadline_s=HANG_S)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            self.use_store(None)
            self._counters.add("hangs")
        if not isinstance(error, Cancelled):
            self._counters.add("failed_jobs")
