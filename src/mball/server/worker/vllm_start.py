"""Where a start of vLLM went."""

from __future__ import annotations

from typing import Any

from mball.server.worker.vllm_http import VllmClient

ANSWER_S = 60.0


async def start_stages(client: VllmClient, began: float, healthy: float) -> dict[str, float]:
    """Seconds of each stage of a start that `began` and was `healthy` then, by the monotonic clock. Raises
    TransitionError.

    `import_s`: until the server's process had all that it imports; `engine_s`: until its first engine process was asked
    for something, with that one's imports; `device_s`, `weights_s`; `kv_s`: how much room there is, and taking it;
    `warm_up_s`: compiling, capturing and trying out; `serve_s`: until the server answered.
    """
    [first, *_] = await client.rpc("mball_stages", deadline_s=ANSWER_S)
    return stages_of(first, began, healthy)


def stages_of(said: dict[str, Any], began: float, healthy: float) -> dict[str, float]:
    times: dict[str, list[float]] = said["stages"]
    server_at, called, ended = float(said["server_at"]), times["init_device"][0], max(end for _, end in times.values())

    def took(*names: str) -> float:
        return sum(times[name][1] - times[name][0] for name in names if name in times)

    found = {
        "import_s": server_at - began,
        "engine_s": called - server_at,
        "device_s": took("init_device"),
        "weights_s": took("load_model"),
        "kv_s": took("determine_available_memory", "initialize_from_config"),
        "warm_up_s": took("compile_or_warm_up_model"),
        "serve_s": healthy - ended,
        "ready_s": healthy - began,
    }
    return {name: round(seconds, 3) for name, seconds in found.items()}
