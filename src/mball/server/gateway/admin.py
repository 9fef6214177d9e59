"""MBALL's own routes: the state, and moving models by hand."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from mball.memory.manager import Manager


def router(manager: Manager) -> APIRouter:
    """`/mball/v1/…`. Each move answers with the state of its model after it."""
    routes = APIRouter(prefix="/mball/v1")

    def model_state(name: str) -> dict[str, Any]:
        models: list[dict[str, Any]] = manager.snapshot()["models"]
        return next(state for state in models if state["name"] == name)

    @routes.get("/state")
    async def state() -> dict[str, Any]:
        return manager.snapshot()

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model's state, and under `engine` what its engine says of itself."""
        return {"engine": await manager.engine_status(name), **model_state(name)}

    @routes.post("/models/{name:path}/load")
    async def load(name: str) -> dict[str, Any]:
        await manager.load(name)
        return model_state(name)

    @routes.post("/models/{name:path}/unload")
    async def unload(name: str) -> dict[str, Any]:
        await manager.unload(name)
        return model_state(name)

    @routes.post("/models/{name:path}/pin")
    async def pin(name: str) -> dict[str, Any]:
        await manager.pin(name)
        return model_state(name)

    @routes.post("/models/{name:path}/unpin")
    async def unpin(name: str) -> dict[str, Any]:
        await manager.unpin(name)
        return model_state(name)

    return routes
