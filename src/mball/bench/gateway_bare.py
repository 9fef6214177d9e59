"""uvicorn with an application that forwards and does nothing else: what is left to a gateway on this machine."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import uvicorn
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from mball.server.gateway.upstream import Workers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    path, workers = str(arguments.folder / "worker.sock"), Workers()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        worker = subprocess.Popen(
            [sys.executable, "-m", "mball.bench.gateway_worker", "--port-fd", str(listening.fileno())],
            pass_fds=[listening.fileno()],
        )

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        async with workers.post("m", path, scope["path"], body, []) as upstream:
            chunk = await upstream.read()
            headers = [head for head in upstream.headers if head[0] in (b"content-type", b"content-length")]
            await send({"type": "http.response.start", "status": upstream.status, "headers": headers})
            while not upstream.ended:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await upstream.read()
            await send({"type": "http.response.body", "body": chunk})

    config = uvicorn.Config(
        forward, log_config=None, access_log=False, loop="uvloop", http="httptools", ws="none", lifespan="off"
    )
    try:
        uvicorn.Server(config).run(sockets=[socket.socket(fileno=arguments.fd)])
    finally:
        workers.close()
        worker.kill()
        worker.wait()


if __name__ == "__main__":
    main()
