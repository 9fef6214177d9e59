"""OpenTelemetry traces, where the config asks for them: a span for each request, in the client's trace."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from mball import __version__
from mball.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_PARENT = "traceparent"
_EVENTS = {"queue_s": "admitted", "first_s": "first bytes"}


class Tracing:
    """Spans go out by OTLP over HTTP from a thread. Where to, and all else, is in the environment, by OpenTelemetry's
    own names: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER …"""

    def __init__(self) -> None:
        """Raises ConfigError where the packages are not there."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"traces: {error}: `pip install 'mball[otel]'`") from None
        named = "OTEL_SERVICE_NAME" in os.environ
        self._provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "mball"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("mball", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Headers, path: str, request_id: str) -> Span:
        """A child of the client's span, where it names one."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract({_PARENT: headers.get(_PARENT, "")})
        attributes = {"http.request.method": "POST", "url.path": path, "mball.request_id": request_id}
        return self._tracer.start_span(f"POST {path}", context, SpanKind.SERVER, attributes)

    def parent(self, span: Span) -> list[tuple[str, str]]:
        """The header by which a worker's spans are its children."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return [(_PARENT, carrier[_PARENT])] if _PARENT in carrier else []

    def end(self, span: Span, code: int, tokens: int | None, told: dict[str, Any]) -> None:
        """`told`: what the log says of it."""
        from opentelemetry.trace import StatusCode

        now_ns = time.time_ns()
        began_ns = now_ns - int(told["took_s"] * 1e9)
        for name, event in _EVENTS.items():
            if name in told:
                span.add_event(event, timestamp=began_ns + int(told[name] * 1e9))
        known = {"gen_ai.request.model": told["model"], "mball.tokens": tokens, "http.response.status_code": code}
        span.set_attributes({name: value for name, value in known.items() if value is not None})
        if code >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(now_ns)

    def close(self) -> None:
        """Sends what is left. Blocks, for as long as OTEL_EXPORTER_OTLP_TIMEOUT says (10 s)."""
        self._provider.shutdown()
