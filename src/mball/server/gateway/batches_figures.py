"""What batches come to: tokens of each, and how many there are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mball.server.gateway.batches_store import STATUSES, Batches
from mball.server.gateway.metrics import tokens_of


def usage_in(path: Path) -> dict[str, Any]:
    """Of all answers in a file of them, as OpenAI's batch object has it. Blocks. Raises OSError."""
    prompt = generated = cached = 0
    with path.open("rb") as file:
        for line in file:
            usage = _usage(line)
            if usage is not None:
                tokens = tokens_of(usage)
                prompt, generated, cached = prompt + tokens[0], generated + tokens[1], cached + tokens[2]
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
    }


def _usage(line: bytes) -> dict[str, Any] | None:
    try:
        usage = json.loads(line)["response"]["body"]["usage"]
    except (ValueError, LookupError, TypeError):
        return None
    return usage if isinstance(usage, dict) else None


class BatchFigures(Collector):
    """For `/metrics`, in the loop's thread."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def collect(self) -> Iterator[Metric]:
        found = list(self._batches.every())
        statuses = Counter(batch.status for batch in found)
        batches = GaugeMetricFamily("mball:batches", "Batches that are kept, by status.", labels=["status"])
        for status in STATUSES:
            batches.add_metric([status], statuses[status])
        yield batches
        running = [batch for batch in found if not batch.ended]
        requests = GaugeMetricFamily(
            "mball:batch_requests", "Requests of batches under way, by what became of them.", labels=["state"]
        )
        for state in ("total", "completed", "failed"):
            requests.add_metric([state], sum(getattr(batch, state) for batch in running))
        yield requests
