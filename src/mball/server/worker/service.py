"""One model as this process serves it, and whether it may be served now."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from mball import __version__
from mball.errors import Draining, InvalidRequest, MballError, UnknownModel
from mball.memory.spec import WorkerSpec
from mball.server.engine.api import Embedder, Generator
from mball.server.engine.grammar import Grammar
from mball.server.worker.generation import Generation, Job, NotResident
from mball.server.worker.protocol import TokenIds
from mball.server.worker.sampling import model_defaults
from mball.server.worker.structured import Grammars
from mball.server.worker.tokenizer import Tokenizer

_T = TypeVar("_T")


class Service:
    """`open` is the gate: the manager's verbs open it after a promotion and close it before a demotion."""

    def __init__(self, spec: WorkerSpec, engine: Generator | Embedder, tokenizer: Tokenizer) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.in_flight = 0
        self.fingerprint = f"fp_{hashlib.sha256(f'{__version__} {spec.path} {spec.dtype}'.encode()).hexdigest()[:10]}"
        self.engine = engine
        self.sampling_defaults = model_defaults(spec.path)
        self.embedding = asyncio.Lock()
        self._open = False
        self._closed = False
        self._live: set[Generation] = set()
        # Long texts take long to tokenise; the loop has streams to feed meanwhile.
        self._text_threads = ThreadPoolExecutor(2, thread_name_prefix="text")
        # Schemas take longest; one at a time, and texts do not wait for them.
        self._schema_thread = ThreadPoolExecutor(1, thread_name_prefix="schema")
        self._grammars: Grammars | None = None

    def generator(self, path: str) -> Generator:
        """Raises InvalidRequest where the model embeds."""
        if self.spec.task != "generate":
            raise InvalidRequest(f"{self.spec.model} is an embedding model: use /v1/embeddings, not {path}")
        return cast(Generator, self.engine)

    def embedder(self, path: str) -> Embedder:
        """Raises InvalidRequest where the model generates."""
        if self.spec.task != "embed":
            raise InvalidRequest(f"{self.spec.model} generates text: use /v1/chat/completions, not {path}")
        return cast(Embedder, self.engine)

    def check_model(self, name: str) -> None:
        if name != self.spec.model:
            raise UnknownModel(f"this worker serves {self.spec.model!r}, not {name!r}", param="model")

    @property
    def is_open(self) -> bool:
        return self._open

    def check_open(self) -> None:
        """Raises Draining, NotResident."""
        self._check_not_stopping()
        if not self._open:
            raise NotResident(f"{self.spec.model} is not on the device now")

    def _check_not_stopping(self) -> None:
        if self._closed:
            raise Draining(f"{self.spec.model}: its worker is stopping", retry_after_s=1.0)

    def open_gate(self) -> None:
        self._open = True

    def close_gate(self) -> None:
        """New requests are refused, and those under way end."""
        self._open = False
        self._interrupt(NotResident(f"{self.spec.model} left the device while it answered"))

    def close(self) -> None:
        """The process ends: so does every request."""
        self._closed = True
        self._interrupt(Draining(f"{self.spec.model}: its worker is stopping", retry_after_s=1.0))
        for threads in (self._text_threads, self._schema_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    def _interrupt(self, error: MballError) -> None:
        for generation in self._live:
            generation.fail(error)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """One HTTP request under way."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextlib.asynccontextmanager
    async def generation(self, jobs: Sequence[Job], stops: Sequence[str]) -> AsyncIterator[Generation]:
        """The sequences, running. Raises NotResident, Draining."""
        self.check_open()
        generation = Generation(cast(Generator, self.engine), self.tokenizer, jobs, stops)
        self._live.add(generation)
        try:
            async with generation:
                yield generation
        finally:
            self._live.discard(generation)

    async def token_ids(
        self, inputs: Sequence[str | TokenIds], engine: Generator | Embedder, param: str
    ) -> list[TokenIds]:
        """One list for each input. Raises InvalidRequest for one that is empty, too long or outside the vocabulary."""

        def encode() -> list[TokenIds]:
            lists = []
            for index, entry in enumerate(inputs):
                try:
                    lists.append(self._token_ids(entry, engine))
                except InvalidRequest as error:
                    error.param = param if len(inputs) == 1 else f"{param}[{index}]"
                    raise
            return lists

        return await self.in_text_thread(encode)

    def _token_ids(self, entry: str | TokenIds, engine: Generator | Embedder) -> TokenIds:
        limit = engine.max_model_len
        ids = self.tokenizer.encode(entry, limit) if isinstance(entry, str) else entry
        if not ids:
            raise InvalidRequest("the input is empty")
        if len(ids) > limit:
            raise InvalidRequest(
                f"the context is {limit} tokens; {len(ids)} do not fit", code="context_length_exceeded"
            )
        if max(ids) >= engine.vocab_size:
            raise InvalidRequest(f"{max(ids)} is no token id: the vocabulary has {engine.vocab_size} tokens")
        return ids

    async def grammar(self, compiled: Callable[[Grammars], Grammar]) -> Grammar:
        """Raises what `compiled` raises, and Draining."""
        engine = self.generator("structured output")

        def compile_it() -> Grammar:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, engine.vocab_size, engine.eos_token_ids)
            return compiled(self._grammars)

        self._check_not_stopping()
        return await asyncio.get_running_loop().run_in_executor(self._schema_thread, compile_it)

    async def in_text_thread(self, function: Callable[[], _T]) -> _T:
        """Raises what the function raises, and Draining."""
        self._check_not_stopping()
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, function)

    def status(self) -> dict[str, Any]:
        """The engine's numbers, and the requests under way."""
        status = self.engine.status()
        fields = {name: getattr(status, name) for name in status.__slots__}
        return {**fields, "in_flight": self.in_flight}
