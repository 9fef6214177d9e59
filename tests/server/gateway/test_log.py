from __future__ import annotations

from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Start


async def test_the_end_of_a_models_log(gateway: Start) -> None:
    running = await gateway(model("a", Knobs()))
    async with running.http.post(f"{running.url}/mball/v1/models/a/load") as response:
        assert response.status == 200
    async with running.http.get(f"{running.url}/mball/v1/models/a/log") as response:
        assert response.headers["content-type"].startswith("text/plain")
        assert await response.text() == "fake worker a, started"
    async with running.http.get(f"{running.url}/mball/v1/models/b/log") as response:
        assert response.status == 404
