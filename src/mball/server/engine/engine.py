"""The generating engine: one thread that steps through scheduler, model and sampler while the weights are there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mball.device.account import Account
from mball.errors import MballError, TransitionError
from mball.loader.source import ImageReader
from mball.memory.spec import WorkerSpec
from mball.server.engine import request as requests
from mball.server.engine import runner, sampler, tiers
from mball.server.engine.api import Ballooned, Demoted, Emit, EngineStatus, GenerateRequest, Output, Promoted
from mball.server.engine.blocks import BlockAllocator
from mball.server.engine.kv_cache import KVGeometry
from mball.server.engine.pool import Pool
from mball.server.engine.prefix import Chain, root
from mball.server.engine.prefixes import Prefixes
from mball.server.engine.request import Request
from mball.server.engine.resident import Progress, ResidentWeights
from mball.server.engine.scheduler import Chunk, Scheduler, Sequence
from mball.swap.block_store import BlockStore

log = logging.getLogger(__name__)

STEP_DEADLINE_S = 120.0
"""The longest that demote and close wait for the step under way."""

CLOSE_S = 5.0
"""The longest that KV blocks are written to their store at the end."""

_PROMPT_LOGPROBS_CHUNK = 64
"""Prompt tokens a step whose logits are all kept; it bounds the memory they take, a vocabulary of floats each."""

_MEASURED_SHARE = 0.75
"""Of a step's tokens so many belong to one prompt where its time says what computing them costs."""

_STEP_FAILURES = (
    MballError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    OSError,
)


@dataclass(eq=False)
class Change:
    """Something that the engine's thread is to do between two steps."""

    act: Callable[[], None]
    done: bool = False
    error: MballError | None = None

    def fail(self, error: MballError) -> None:
        self.done, self.error = True, error


class GenerateEngine:
    """A `Generator` over one transformers model (mball.server.engine.api says what each method does).

    `submit` refuses while the weights are away; a failed step ends the sequences in it and the engine goes on, with
    the failure in its status until a step succeeds.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        weights: ResidentWeights,
        geometry: KVGeometry,
        account: Account,
        device: torch.device,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        model: bytes,
    ) -> None:
        """`model` names its content and how its KV is computed and laid out (`prefix.identity`)."""
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._spec = spec
        self._weights = weights
        self._device = device
        self._model = model
        self._tier = tiers.open_tier(spec, geometry, model, device, self._loaded)
        allocator = BlockAllocator(num_blocks)
        self._scheduler: Scheduler[Request] = Scheduler(
            allocator,
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            prefixes=Prefixes(allocator, self._tier),
        )
        self._pool = Pool(spec, geometry, account, device, weights, self._scheduler, max_model_len)
        self._threads = self._threads_set = spec.threads
        # Guards what stands below. The scheduler is the thread's alone.
        self._changed = threading.Condition()
        self._arrived: list[Sequence[Request]] = []
        self._aborted: set[str] = set()
        self._resident = False
        self._change: Change | None = None
        self._parked = False
        self._closing = False
        self._ended = False
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"engine-{spec.model}", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, emit: Emit) -> None:
        problem = requests.problem(
            request,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            max_logprobs=self._spec.max_logprobs,
        )
        if problem is None:
            owner = Request.of(request, emit, self.max_model_len)
            limit = _PROMPT_LOGPROBS_CHUNK if request.sampling.prompt_logprobs else None
            chain = None
            if self._spec.enable_prefix_caching and not request.sampling.prompt_logprobs:
                chain = Chain(root(self._model, request.cache_salt), self._spec.block_size)
            sequence = Sequence(request.request_id, list(request.prompt), owner, limit, chain)
            with self._changed:
                if self._resident:
                    self._arrived.append(sequence)
                    self._changed.notify_all()
                    return
            problem = f"{self._spec.model} is not on its device"
        emit(Output(None, finish_reason="error", error=problem))

    def abort(self, request_id: str) -> None:
        with self._changed:
            self._aborted.add(request_id)
            self._changed.notify_all()

    def status(self) -> EngineStatus:
        allocator, cache, prefixes = self._scheduler.allocator, self._pool.cache, self._scheduler.prefixes
        size, counts = self._spec.block_size, {} if self._tier is None else self._tier.counts()
        layer_bytes, layer_s = self._weights.layer_offer
        with self._changed:
            return EngineStatus(
                resident=self._resident,
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting) + len(self._arrived),
                kv_blocks_total=allocator.num_blocks - 1,
                kv_blocks_free=allocator.num_free,
                weights_bytes=self._weights.nbytes,
                kv_bytes=0 if cache is None else cache.nbytes,
                error=self._error,
                ballooned_bytes=self._pool.ballooned_bytes,
                spare_bytes=self._pool.spare_bytes,
                num_layers=self._weights.num_layers,
                resident_layers=self._weights.resident_layers,
                num_experts=self._weights.num_experts,
                resident_experts=self._weights.resident_experts,
                layer_bytes=layer_bytes,
                layer_s=layer_s,
                prefix_hit_tokens=prefixes.hit_blocks * size,
                kv_restored_tokens=prefixes.restored_blocks * size,
                kv_stored_blocks=counts.get("stored_blocks", 0),
                kv_refusals=counts.get("dram:refused", 0) + counts.get("store:refused", 0),
                kv_failures=counts.get("failed_loads", 0) + counts.get("late_loads", 0),
                host_bytes=0 if self._tier is None or self._device.type == "cpu" else self._tier.arena_bytes,
            )

    def use_block_store(self, store: BlockStore | None) -> None:
        if self._tier is not None and not self._tier.use_store(store):
            raise TransitionError(f"{self._spec.model}: what it reads from its store of KV blocks does not end")

    @property
    def image_bytes(self) -> int:
        return self._weights.image_bytes

    def image_key(self) -> bytes | None:
        return self._weights.image_key()

    def fill_image(self, image_fd: int, cancel: threading.Event | None = None) -> int:
        return self._weights.fill_image(image_fd, cancel)

    def promote(
        self, image_fd: int | None, progress: Progress | None = None, stored: ImageReader | None = None
    ) -> Promoted:
        began = time.perf_counter()
        if self._resident or self._ended:
            state = "on the device already" if self._resident else f"broken ({self._error}): restart its worker"
            raise TransitionError(f"{self._spec.model} is {state}")
        load_s = self._weights.load(image_fd, progress, stored)
        try:
            cache = self._pool.open()
        except (MballError, OSError, RuntimeError):
            self._weights.release()
            raise
        with self._changed:
            self._resident = True
            self._parked = False
            self._changed.notify_all()
        return Promoted(self._weights.nbytes, cache.nbytes, load_s, time.perf_counter() - began)

    def demote(self) -> Demoted:
        began = time.perf_counter()
        with self._changed:
            self._resident = False
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._parked, STEP_DEADLINE_S):
                raise TransitionError(f"{self._spec.model}: its step did not end within {STEP_DEADLINE_S:.0f} s")
        return Demoted(self._release(), time.perf_counter() - began)

    def balloon(self, nbytes: int, *, gently: bool = False) -> Ballooned:
        began = time.perf_counter()
        blocks, cells = self._pool.give(nbytes)
        self._between_steps(lambda: self._pool.squeeze(blocks, cells, gently=gently))
        return Ballooned(self._pool.ballooned_bytes, self._pool.held_bytes, time.perf_counter() - began)

    def use_image(self, image_fd: int | None) -> None:
        if self._weights.streamed is not None and not self._ended and not self._closing:
            self._between_steps(lambda: self._weights.use_image(image_fd))

    def _between_steps(self, act: Callable[[], None]) -> None:
        """Have the engine's thread do it. Raises what it raises, and TransitionError."""
        change = Change(act)
        with self._changed:
            if self._ended or self._closing:
                raise TransitionError(f"{self._spec.model}: its engine has ended")
            self._change = change
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: change.done, STEP_DEADLINE_S):
                self._change = None
                raise TransitionError(f"{self._spec.model}: its step did not end within {STEP_DEADLINE_S:.0f} s")
        if change.error is not None:
            raise change.error

    def set_threads(self, threads: int) -> None:
        self._threads = threads

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._resident = False
            self._changed.notify_all()
        self._weights.cancel()
        self._thread.join(STEP_DEADLINE_S)
        if self._thread.is_alive():
            raise TransitionError(f"{self._spec.model}: its step did not end within {STEP_DEADLINE_S:.0f} s")
        self._release()
        if self._tier is not None and not self._tier.close(CLOSE_S):
            log.warning("%s: a read or write of KV blocks hangs", self._spec.model)
        self._weights.close()

    def _release(self) -> int:
        return self._pool.release() + self._weights.release()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        torch.set_num_threads(self._spec.threads)
        try:
            with torch.inference_mode():
                while self._next():
                    self._step()
        finally:
            with self._changed:
                self._resident = False
                left, self._arrived = [*self._scheduler.sequences(), *self._arrived], []
                if not self._closing:
                    self._error = "the engine's thread ended"
                self._ended = self._parked = True
                if self._change is not None:
                    self._change.fail(TransitionError(f"{self._spec.model}: its engine has ended"))
                self._changed.notify_all()
            for sequence in left:
                sequence.owner.deliver(Output(None, finish_reason="error", error=self._error))

    def _next(self) -> bool:
        """Wait for work; apply arrivals and aborts. True: step. False: closing."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                self._changed.wait_for(self._has_news, self._until_late())
                arrived, self._arrived = self._arrived, []
                aborted, self._aborted = self._aborted, set()
                resident, closing, change = self._resident, self._closing, self._change
            for sequence in arrived:
                scheduler.add(sequence)
                self._load(sequence)
            self._settle_loads()
            if aborted or not resident:
                for sequence in list(scheduler.sequences()):
                    if not resident or sequence.request_id in aborted:
                        self._deliver(sequence, Output(None, finish_reason="abort"))
            if closing:
                return False
            if change is not None:
                self._carry_out(change)
            if resident:
                if scheduler.busy:
                    return True
            else:
                with self._changed:
                    self._parked = not self._resident
                    self._changed.notify_all()

    def _has_news(self) -> bool:
        if self._closing or self._arrived or self._aborted or self._change is not None:
            return True
        if self._resident:
            return self._scheduler.busy or any(s.loading.done for s in self._scheduler.waiting if s.loading)
        return not self._parked

    def _load(self, sequence: Sequence[Request]) -> None:
        """Blocks that a store may have begin to come; the others are stepped meanwhile."""
        if self._tier is not None and self._resident:
            keys = self._scheduler.reusable(sequence)
            first = self._scheduler.prefixes.count(keys)
            sequence.loading = self._tier.begin(keys[first:], keys[first - 1] if first else None, first)

    def _settle_loads(self) -> None:
        """Whose blocks have come, or are late, runs as soon as there is room: what is not there is computed."""
        now = time.monotonic()
        for sequence in self._scheduler.waiting:
            loading = sequence.loading
            if loading is not None and (loading.done or now >= loading.deadline):
                if self._tier is not None and not loading.done:
                    self._tier.late(loading)
                sequence.loading = None

    def _until_late(self) -> float | None:
        """Seconds until the first load is; None where nobody waits for one."""
        ends = [sequence.loading.deadline for sequence in self._scheduler.waiting if sequence.loading is not None]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _loaded(self) -> None:
        """Called by the tier's thread."""
        with self._changed:
            self._changed.notify_all()

    def _carry_out(self, change: Change) -> None:
        """Between two steps: no kernel reads what moves."""
        error: MballError | None = None
        try:
            change.act()
        except MballError as failure:
            error = failure
        except (RuntimeError, OSError) as failure:
            error = TransitionError(f"{self._spec.model}: {failure}")
        with self._changed:
            change.done, change.error = True, error
            if self._change is change:
                self._change = None
            self._changed.notify_all()

    def _step(self) -> None:
        if self._threads != self._threads_set:
            self._threads_set = self._threads
            torch.set_num_threads(self._threads_set)
        for sequence in self._scheduler.misfits():
            tokens = (self._scheduler.allocator.num_blocks - 1) * self._spec.block_size
            error = (
                f"{self._spec.model}: a sequence of {len(sequence.tokens)} tokens does not fit into its KV pool, "
                f"ballooned to {tokens}: give it memory back with `mball balloon {self._spec.model} 0`"
            )
            self._deliver(sequence, Output(None, finish_reason="error", error=error))
        chunks = self._scheduler.schedule()
        if not chunks:
            return
        try:
            self._compute(chunks)
            self._error = None
        except _STEP_FAILURES as error:
            log.exception("%s: a step of %d sequences failed", self._spec.model, len(chunks))
            self._error = f"a step failed: {type(error).__name__}: {error}"
            for chunk in chunks:
                self._deliver(chunk.sequence, Output(None, finish_reason="error", error=self._error))

    def _compute(self, chunks: list[Chunk[Request]]) -> None:
        cache, tier = self._pool.cache, self._tier
        if cache is None or not chunks:
            raise TransitionError(f"{self._spec.model}: a step with nothing to compute")
        rows: list[int] = []
        drawing: list[Chunk[Request]] = []
        draw_at: list[int] = []
        prompts: list[tuple[Chunk[Request], int]] = []
        row = 0
        for chunk in chunks:
            if self._keeps_prompt_logits(chunk):
                prompts.append((chunk, len(rows)))
                rows += range(row, row + chunk.count)
            elif chunk.samples:
                rows.append(row + chunk.count - 1)
            row += chunk.count
            if chunk.samples:
                drawing.append(chunk)
                draw_at.append(len(rows) - 1)
        began = None
        if tier is not None:
            tier.order(block for chunk in chunks for block in chunk.new_blocks)
            began = tier.stamp()
        logits = runner.forward(self._weights.module, cache, chunks, rows, self._device)
        if tier is not None and chunks[-1].count >= _MEASURED_SHARE * row:
            tier.computed(began, chunks[-1].start, chunks[-1].count)
        self._scheduler.advance(chunks)
        for chunk, first in prompts:
            self._add_prompt_logprobs(chunk, logits[first : first + chunk.count])
        if drawing:
            self._draw(drawing, logits if len(draw_at) == len(rows) else logits[draw_at])
        if tier is not None:
            tier.measure()

    def _draw(self, chunks: list[Chunk[Request]], logits: torch.Tensor) -> None:
        sequences = [chunk.sequence for chunk in chunks]
        drawn = sampler.sample(logits, [sequence.owner.row(len(sequence.tokens)) for sequence in sequences])
        for sequence, draw in zip(sequences, drawn, strict=True):
            output = sequence.owner.ends_with_prompt()
            if output is None:
                if draw.token_id is not None:
                    sequence.tokens.append(draw.token_id)
                output = sequence.owner.accept(draw, len(sequence.tokens), sequence.num_cached or 0)
            self._deliver(sequence, output)

    def _deliver(self, sequence: Sequence[Request], output: Output) -> None:
        if sequence.owner.deliver(output):
            if output.finish_reason in ("stop", "length") and not sequence.owner.probe:
                self._weights.request_took(len(sequence.tokens) - sequence.owner.num_prompt)
            self._scheduler.finish(sequence, keep=output.finish_reason != "error")

    def _keeps_prompt_logits(self, chunk: Chunk[Request]) -> bool:
        wanted = chunk.sequence.owner.prompt_logprobs
        return wanted is not None and len(wanted) < chunk.sequence.owner.num_prompt

    def _add_prompt_logprobs(self, chunk: Chunk[Request], logits: torch.Tensor) -> None:
        """Row i of the logits tells of the token after the chunk's i-th."""
        found = chunk.sequence.owner.prompt_logprobs
        if found is None:
            return
        # A chunk that is computed again after a preemption may overlap what is known.
        known = len(found)
        targets = chunk.sequence.tokens[known : min(chunk.start + chunk.count + 1, chunk.sequence.owner.num_prompt)]
        if targets:
            first = known - 1 - chunk.start
            scored = sampler.logprobs(logits[first : first + len(targets)], targets, [0] * len(targets))
            found += [own for own, _ in scored]
