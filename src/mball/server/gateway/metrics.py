"""What Prometheus reads at `/metrics`: names as vLLM's behind `mball:`, and the ladder's own."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mball.memory.events import Event
from mball.memory.manager import Manager

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_LEFT = 499
"""The code of a request whose client did not wait for its answer (nginx's)."""
TAIL_BYTES = 4096
"""Of an answer's end, to find its usage in."""

RUNGS = ("device", "dram", "nvme", "source", "stopped", "starting", "stopping", "failed")
_TRANSITIONS = {
    "started": "start_s",
    "promoted": "promote_s",
    "demoted": "demote_s",
    "image ready": "fill_s",
    "image stored": "store_s",
}
_USAGE = re.compile(rb'"usage":\s*(\{)')
_DECODER = json.JSONDecoder()
_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class Metrics:
    """Of one server. Names of models and adapters are labels; what others ask for counts without one, so that no
    client makes them many."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._registry = CollectorRegistry(auto_describe=False)
        by_model = ["model_name"]
        self.requests = Counter(
            "mball:requests", "Requests that ended, by HTTP status (499: the client left).", [*by_model, "code"],
            registry=self._registry,
        )  # fmt: skip
        self.prompt = self._counter("mball:prompt_tokens", "Prompt tokens of answers that said their usage.")
        self.cached = self._counter("mball:prompt_tokens_cached", "Of these the ones that were not computed.")
        self.generated = self._counter("mball:generation_tokens", "Tokens generated, of answers that said their usage.")
        self.queued = self._histogram("mball:request_queue_time_seconds", "From a request to a worker that takes it.")
        self.first = self._histogram("mball:time_to_first_token_seconds", "From a request to its answer's first bytes.")
        self.whole = self._histogram("mball:e2e_request_latency_seconds", "From a request to its answer's end.")
        self._transitions = Histogram(
            "mball:transition_seconds", "How long starts, promotions, demotions and images took.",
            [*by_model, "transition", "weights_from"], registry=self._registry, buckets=_FAST,
        )  # fmt: skip
        self._registry.register(_Ladder(manager))
        self.of: Callable[..., Any] = functools.cache(lambda metric, *labels: metric.labels(*labels))
        """The series of a metric by its labels, which take as long to find as all that is counted with them."""

    def also(self, figures: Collector) -> None:
        self._registry.register(figures)

    def request(self, model: str) -> Request:
        return Request(self, model if self._manager.serves(model) else "")

    def text(self) -> bytes:
        return generate_latest(self._registry)

    async def follow(self) -> None:
        """Until the server drains. One that could not keep up begins anew: what it missed is missing."""
        while True:
            follower = self._manager.events.follow()
            try:
                async for event in follower:
                    self._learn(event)
            finally:
                self._manager.events.leave(follower)
            if not follower.lost:
                return

    def _learn(self, event: Event) -> None:
        seconds = event.figures.get(_TRANSITIONS.get(event.kind, ""))
        if event.model is not None and seconds is not None:
            came_from = str(event.figures.get("weights_from") or "")
            self._transitions.labels(event.model, event.kind, came_from).observe(float(seconds))

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(name, what, ["model_name"], registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["model_name"], registry=self._registry, buckets=_FAST)


class Request:
    """One request under way. Its marks may be made again, by a worker that takes it after one that was lost: the last
    ones count."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._began = time.perf_counter()
        self._admitted_s: float | None = None
        self._first_s: float | None = None

    def admitted(self) -> None:
        self._admitted_s = time.perf_counter() - self._began

    def first(self) -> None:
        """Of its answer's bytes."""
        self._first_s = time.perf_counter() - self._began

    def told(self) -> dict[str, Any]:
        """Of it, for the log; no model that is not served is named there."""
        times = {"queue_s": self._admitted_s, "first_s": self._first_s, "took_s": time.perf_counter() - self._began}
        rounded = {name: round(seconds, 4) for name, seconds in times.items() if seconds is not None}
        return {"model": self._model or None, **rounded}

    def end(self, code: int, tail: bytes) -> int | None:
        """`tail`: the last bytes of its answer. How many tokens it took, prompt and answer; None where it said none."""
        metrics, model = self._metrics, self._model
        metrics.of(metrics.requests, model, code).inc()
        if self._admitted_s is not None:
            metrics.of(metrics.queued, model).observe(self._admitted_s)
        if not 200 <= code < 300:
            return None
        if self._first_s is not None:
            metrics.of(metrics.first, model).observe(self._first_s)
        metrics.of(metrics.whole, model).observe(time.perf_counter() - self._began)
        if (usage := usage_in(tail)) is None:
            return None
        prompt, generated, cached = tokens_of(usage)
        metrics.of(metrics.prompt, model).inc(prompt)
        metrics.of(metrics.generated, model).inc(generated)
        metrics.of(metrics.cached, model).inc(cached)
        return prompt + generated


def usage_in(tail: bytes) -> dict[str, Any] | None:
    """The usage object, the last that stands whole in the end of an answer."""
    for found in reversed(list(_USAGE.finditer(tail))):
        try:
            usage, _ = _DECODER.raw_decode(tail[found.start(1) :].decode(errors="replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(usage, dict):
            return usage
    return None


def tokens_of(usage: dict[str, Any]) -> tuple[int, int, int]:
    """(of the prompt, generated, of the prompt not computed): as chat completions, responses, or messages say it."""
    if "prompt_tokens" in usage:
        cached = _count(usage.get("prompt_tokens_details"), "cached_tokens")
        return _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), cached
    read = _count(usage, "cache_read_input_tokens")
    prompt = _count(usage, "input_tokens") + read + _count(usage, "cache_creation_input_tokens")
    cached = read + _count(usage.get("input_tokens_details"), "cached_tokens")
    return prompt, _count(usage, "output_tokens"), cached


def _count(fields: object, name: str) -> int:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


class _Ladder(Collector):
    """The state that the manager has when it is asked."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def collect(self) -> Iterator[Metric]:
        state = self._manager.snapshot()
        yield from _of_models(state["models"])
        yield from _of_devices(state["devices"])
        yield from _of_stores(state["dram"], state["swap"])
        yield _gauge("mball:draining", "1 while the server shuts down.", [], [([], state["draining"])])


def _of_models(models: list[dict[str, Any]]) -> Iterator[Metric]:
    def each(name: str, what: str, field: str, kind: type[Metric] = GaugeMetricFamily) -> Metric:
        return _gauge(name, what, ["model_name"], [([m["name"]], m[field]) for m in models], kind)

    yield each("mball:num_requests_running", "Requests that a worker answers.", "in_flight")
    yield each("mball:num_requests_waiting", "Requests that wait for their model.", "queued")
    rungs = [([m["name"], rung], m["shown_as"] == rung) for m in models for rung in RUNGS]
    yield _gauge("mball:model_rung", "1 for the rung that a model is on.", ["model_name", "rung"], rungs)
    yield each("mball:model_device_bytes", "Measured on its device.", "device_bytes")
    yield each("mball:model_promised_bytes", "Promised of its device.", "promised_bytes")
    yield each("mball:model_ballooned_bytes", "That it does without while it serves.", "ballooned_bytes")
    yield each("mball:model_image_bytes", "Of its image in DRAM.", "image_bytes")
    for event in ("starts", "promotions", "demotions", "crashes"):
        yield each(f"mball:model_{event}", f"Of its worker: {event}.", event, CounterMetricFamily)


def _of_devices(devices: list[dict[str, Any]]) -> Iterator[Metric]:
    for field, what in (
        ("total_bytes", "That it has."),
        ("limit_bytes", "That models may hold of it."),
        ("promised_bytes", "Promised to models."),
        ("measured_bytes", "Measured of models."),
        ("foreign_bytes", "Held by other processes."),
    ):
        yield _gauge(f"mball:device_{field}", what, ["device"], [([d["name"]], d[field]) for d in devices])


def _of_stores(dram: dict[str, Any], swap: dict[str, Any] | None) -> Iterator[Metric]:
    for field, what in (
        ("limit_bytes", "That images may hold now."),
        ("image_bytes", "Held by images."),
        ("worker_bytes", "Held by workers for layers and KV blocks."),
    ):
        yield _gauge(f"mball:dram_{field}", what, [], [([], dram[field])])
    if swap is None or swap["state"] != "open":
        return
    for field, what in (
        ("total_bytes", "Of all slots."),
        ("image_bytes", "Of images."),
        ("block_bytes", "Of KV blocks."),
        ("written_today_bytes", "Written since midnight (UTC)."),
    ):
        yield _gauge(f"mball:swap_{field}", what, [], [([], swap[field])])
    yield _gauge("mball:swap_read_only", "1 once nothing is written any more.", [], [([], bool(swap["read_only"]))])
    counters = [([name], count) for name, count in swap["counters"].items()]
    yield _gauge("mball:swap_events", "What the swap store counts.", ["event"], counters, CounterMetricFamily)


def _gauge(
    name: str,
    what: str,
    labels: list[str],
    values: list[tuple[list[str], float | None]],
    kind: type[Metric] = GaugeMetricFamily,
) -> Metric:
    family = kind(name, what, labels=labels)  # type: ignore[call-arg]
    for of, value in values:
        family.add_metric(of, float(value or 0))  # type: ignore[attr-defined]
    return family
