"""Two of vLLM's servers with sleep mode, as somebody uses them who has no MBALL."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mball.bench.runner import Outcome
from mball.bench.served import Served
from mball.bench.vllm_stock import Stock, stock
from mball.device.device import open_device
from mball.errors import MballError

if TYPE_CHECKING:
    from mball.bench.switch import Options

_OPTIONS = ("--enable-sleep-mode",)
_REPEATS = 3


async def by_hand(options: Options, folder: Path, outcome: Outcome, after: Callable[[str], None]) -> None:
    """Raises MballError."""
    if options.vllm is None:
        raise MballError("no interpreter with vLLM is given")
    extra = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CACHE_ROOT": str(folder / "stock")}
    spec = options.spec("a")
    serving = partial(stock, options.vllm, options=_OPTIONS, extra=extra, timeout_s=options.timeout_s)
    device = open_device(options.device)
    free_bytes = device.free_bytes()
    async with serving(spec, folder) as first:
        outcome.facts |= {"ready_s": first.ready_s}
        before = (await first.served.say(8)).text
        after(f"started in {first.ready_s:.1f} s")
        outcome.facts |= await rates(first.served, options)
        outcome.facts["first_sleep_s"] = await _timed(first, "/sleep?level=1")
        outcome.facts["held_bytes"] = free_bytes - device.free_bytes()
        after(f"first sleep in {outcome.facts['first_sleep_s']:.2f} s")
        async with serving(replace(spec, model="b"), folder) as second:
            outcome.facts |= {"ready_again_s": second.ready_s, "same": (await second.served.say(8)).text == before}
            awake, asleep = second, first
            for number in range(options.switches + 1):
                sleep_s = await _timed(awake, "/sleep?level=1")
                wake_s = await _timed(asleep, "/wake_up")
                awake, asleep = asleep, awake
                said = await awake.served.say(8)
                outcome.facts["same"] = bool(outcome.facts["same"]) and said.text == before
                # The second one's first sleep is as long as the first one's.
                if number:
                    took = sleep_s + wake_s + said.first_token_s
                    outcome.rounds.append({"switch_s": took, "sleep_s": sleep_s, "wake_s": wake_s})
            after(f"{options.switches} switches")


async def rates(served: Served, options: Options) -> dict[str, float]:
    """Tokens a second by how many ask at once."""
    found = {}
    for batch in options.batches:
        await served.rate(batch, 16)
        taken = [await served.rate(batch, options.tokens) for _ in range(_REPEATS)]
        found[f"tokens_{batch}"] = statistics.median(taken)
    return found


async def _timed(server: Stock, path: str) -> float:
    began = time.monotonic()
    await server.served.call("POST", path)
    return time.monotonic() - began
