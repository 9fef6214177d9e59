"""One request inside the generating engine: what it may still draw, and what its client is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from mball.server.engine.api import Emit, FinishReason, GenerateRequest, Logprob, Output, SamplingParams
from mball.server.engine.grammar import Grammar
from mball.server.engine.sampler import Drawn, Row

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Request:
    """`max_length` bounds prompt and output together. `counts` says how often each token stands in the output.

    `prompt_logprobs` grows as the prompt is computed; None where they are not wanted or were delivered. A `probe` is
    nobody's.
    """

    sampling: SamplingParams
    emit: Emit
    num_prompt: int
    max_length: int
    counts: dict[int, int] = field(default_factory=dict)
    prompt_logprobs: list[Logprob | None] | None = None
    probe: bool = False
    grammar: Grammar | None = None
    finished: bool = False

    @classmethod
    def of(cls, request: GenerateRequest, emit: Emit, max_model_len: int) -> Request:
        num_prompt = len(request.prompt)
        max_length = min(num_prompt + request.sampling.max_tokens, max_model_len)
        wanted: list[Logprob | None] | None = [None] if request.sampling.prompt_logprobs else None
        return cls(
            request.sampling,
            emit,
            num_prompt,
            max_length,
            prompt_logprobs=wanted,
            probe=request.probe,
            grammar=request.grammar,
        )

    @property
    def counts_matter(self) -> bool:
        return self.sampling.presence_penalty != 0 or self.sampling.frequency_penalty != 0

    def row(self, length: int) -> Row:
        """What the sampler needs to draw the token at index `length`."""
        return Row(self.sampling, length, length - self.num_prompt, self.counts, self.grammar)

    def accept(self, drawn: Drawn, length: int, num_cached: int = 0) -> Output:
        """The output for a drawn token that makes the sequence `length` tokens long; of its prompt so many tokens were
        not computed."""
        token = drawn.token_id
        if token is None:
            return Output(None, finish_reason="error", error="the model's logits are not finite")
        if self.grammar is not None and not self.grammar.accept(token):
            return Output(None, finish_reason="error", error=f"its grammar: {self.grammar.error}")
        if self.counts_matter:
            self.counts[token] = self.counts.get(token, 0) + 1
        reason: FinishReason | None = None
        if token in self.sampling.stop_token_ids:
            reason = "stop"
        elif length >= self.max_length:
            reason = "length"
        cached = num_cached if length == self.num_prompt + 1 else 0
        found = self._take_prompt_logprobs()
        return Output(token, drawn.logprob, drawn.top_logprobs, found, reason, cached_tokens=cached)

    def ends_with_prompt(self) -> Output | None:
        """The only output of a request that wants no new token, as an echo with logprobs does."""
        if self.max_length > self.num_prompt:
            return None
        return Output(None, prompt_logprobs=self._take_prompt_logprobs(), finish_reason="length")

    def deliver(self, output: Output) -> bool:
        """Hand an output over; whether the request ends with it. Nothing is handed over after the end."""
        if self.finished:
            return False
        self.finished = output.finish_reason is not None
        try:
            self.emit(output)
        except RuntimeError as error:  # e.g. the event loop it calls into is closed
            log.warning("an output was not taken: %s", error)
            self.finished = True
        return self.finished

    def _take_prompt_logprobs(self) -> tuple[Logprob | None, ...] | None:
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        return None if taken is None else tuple(taken)


def problem(request: GenerateRequest, *, max_model_len: int, vocab_size: int, max_logprobs: int) -> str | None:
    """Why a request can never be served, or None."""
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        return "the prompt has no tokens"
    if len(prompt) + min(sampling.max_tokens, 1) > max_model_len:
        return f"a prompt of {len(prompt)} tokens leaves no room in max_model_len {max_model_len}"
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        return f"the prompt has token ids outside the vocabulary of {vocab_size}"
    if any(not 0 <= token < vocab_size for token in (*sampling.logit_bias, *sampling.stop_token_ids)):
        return f"logit_bias or stop_token_ids has token ids outside the vocabulary of {vocab_size}"
    if sampling.logprobs is not None and sampling.logprobs > max_logprobs:
        return f"{sampling.logprobs} logprobs wanted, {max_logprobs} is the most"
    return None
