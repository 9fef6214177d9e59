"""What those that wait for a model may be told: how far it is, and how long it may take, as measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from mball.memory.model import Model


def ready_in_s(model: Model, beside: Iterable[Model]) -> float:
    """Until one that comes now may well be served: the model's way in, the stays of those beside it that have to end
    before, and the turns of those that wait already. At least 1, and whole."""
    turn_s, now = model.queue.turn_s, time.monotonic()
    if model.queue.is_open:
        return float(math.ceil(max(1.0, turn_s)))
    start_s = (model.figures.start_s.value or 0.0) if model.worker is None else 0.0
    stays = [other.stay_s() - (now - other.opened_s) for other in beside if other.on_device and other is not model]
    way_s = max(start_s + model.promote_s + max(0.0, *stays, 0.0), model.not_before_s - now)
    return float(math.ceil(max(1.0, way_s + turn_s)))


def progress(model: Model) -> dict[str, Any]:
    worker, needs = model.worker, model.needs
    return {
        "model": model.name,
        "rung": model.state.shown_as,
        "queued": len(model.queue),
        "loaded_bytes": 0 if worker is None else worker.loaded_bytes,
        "weights_bytes": None if needs is None else needs.weights_bytes,
    }
