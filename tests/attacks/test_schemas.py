"""A flood of schemas, no two alike (fault 10)."""

from __future__ import annotations

import gc
import json
import os
from typing import Any

from mball.device.proc import private_bytes
from mball.server.worker.structured import Grammars
from mball.server.worker.tokenizer import Tokenizer
from mball.units import KiB, MiB
from tests.server.worker.conftest import tokenizer_dir

__all__ = ["tokenizer_dir"]


def test_none_is_kept(tokenizer_dir: Any) -> None:
    """A hundred and twenty schemas of sixty fields leave next to nothing."""
    grammars = Grammars(Tokenizer(str(tokenizer_dir("byte_level"))), 512, frozenset({2}))

    def compiled(first: int, count: int) -> int:
        for number in range(first, first + count):
            fields = {f"field_{number}_{n}": {"type": "string"} for n in range(60)}
            grammars.of_schema(json.dumps({"type": "object", "properties": fields}), "x")
        gc.collect()
        return private_bytes(os.getpid()) or 0

    before = compiled(0, 30)
    grown = compiled(30, 120) - before
    assert grown < 8 * MiB, f"{grown / KiB / 120:.0f} KiB a schema"
