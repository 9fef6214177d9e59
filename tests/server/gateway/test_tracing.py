"""Spans as a collector gets them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from mball.errors import ConfigError
from mball.server.gateway.tracing import Tracing
from tests.fake_worker import Knobs
from tests.memory.conftest import model
from tests.server.gateway.conftest import Start
from tests.server.gateway.test_app import CHAT, body

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Span]]:
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                assert names["service.name"] == "mball"
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield spans
        server.shutdown()
        thread.join(30)


async def test_a_request_is_a_span_of_its_client_s_trace(gateway: Start, collected: list[Span]) -> None:
    running = await gateway(model("a", Knobs(tokens=2)), traces=True)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "one"}
    async with running.http.post(running.url + CHAT, data=body("a"), headers=headers) as response:
        assert response.status == 200
    async with running.http.post(running.url + CHAT, data=body("b"), headers={"traceparent": "bad"}) as response:
        assert response.status == 404
    await running.until(lambda: len(collected) == 2)
    first, second = collected
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert (second.parent_span_id, second.trace_id.hex() == TRACE) == (b"", False)
    said = {a.key: a.value.string_value or a.value.int_value for a in first.attributes}
    assert said["url.path"] == CHAT
    assert (said["gen_ai.request.model"], said["mball.request_id"]) == ("a", "one")
    assert (said["http.response.status_code"], said["mball.tokens"]) == (200, 3)
    assert [event.name for event in first.events] == ["admitted", "first bytes"]
    assert first.start_time_unix_nano <= first.events[0].time_unix_nano <= first.end_time_unix_nano
    status = await running.manager.engine_status("a")
    assert status is not None
    assert status["asked"]["traceparent"] == f"00-{TRACE}-{first.span_id.hex()}-01"


def test_where_the_packages_are_not_there_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="pip install 'mball"):
        Tracing()
