"""The server's certificate: checked before it is used, and renewed while it serves."""

from __future__ import annotations

import ssl
from typing import Any

from mball.errors import ConfigError
from mball.server.config import TlsConfig


def options(tls: TlsConfig | None) -> dict[str, Any]:
    """For uvicorn. Blocks. Raises ConfigError where the files are not what they should be."""
    if tls is None:
        return {}
    try:
        _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"tls: {tls.certfile}, {tls.keyfile}: {error}") from None
    return {"ssl_certfile": str(tls.certfile), "ssl_keyfile": str(tls.keyfile)}


def renew(context: ssl.SSLContext, tls: TlsConfig) -> None:
    """For connections that come from now on. The files were checked just before by `options`, so this finds them in
    memory; it is for the loop's own thread, which shakes hands by that context. Raises ConfigError."""
    try:
        _load(context, tls)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"tls: {tls.certfile}, {tls.keyfile}: {error}") from None


def _load(context: ssl.SSLContext, tls: TlsConfig) -> None:
    # Who is asked for a password here would wait for ever.
    context.load_cert_chain(str(tls.certfile), str(tls.keyfile), password=lambda: b"")
