"""serve, and the configuration's schema."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from mball.errors import ConfigError


def serve(
    models: Annotated[list[Path] | None, typer.Argument(help="Model folders; besides those of --config none.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="A YAML file (`mball config-schema`).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [8000]")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda (every GPU), cuda:INDEX, cuda:GPU-uuid, simulated:PATH; may be repeated. [cpu]"),
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="What models may hold of each device together, as 900MiB.")
    ] = None,
    dram: Annotated[str | None, typer.Option(help="DRAM for images of models off the device, as 60GiB.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads of a worker on the CPU.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Where the models' logs go.")] = None,
    fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve models behind one OpenAI-compatible address."""
    from mball.device import prctl
    from mball.server import run
    from mball.server.config import load_config
    from mball.server.log import configure_logging

    if parent is not None:
        prctl.die_with_parent()
        if os.getppid() != parent:
            raise typer.Exit(1)
    flags = {
        "models": [{"path": path} for path in models] if models else None,
        "host": host,
        "port": port,
        "device": device or None,
        "device_memory_bytes": device_memory,
        "dram_bytes": dram,
        "threads": threads,
        "log_dir": log_dir,
    }
    loaded = load_config(config, flags)
    if not loaded.models:
        raise ConfigError("no model to serve: name model folders, or a --config with `models:`")
    configure_logging()
    sock = socket.socket(fileno=fd) if fd is not None else run.bind(loaded.host, loaded.port)
    address = sock.getsockname()
    names = ", ".join(model.name for model in loaded.models)
    addresses = [(loaded.host, loaded.admin is None)] + ([(loaded.admin.host, True)] if loaded.admin else [])
    for where, moves in addresses:
        if not loaded.api_keys and where not in ("127.0.0.1", "::1", "localhost"):
            may = "may ask, and move models" if moves else "may ask"
            typer.echo(f"mball: whoever reaches {where} {may}: set `api_keys` (`mball keys new NAME`)", file=sys.stderr)
    scheme = "http" if loaded.tls is None else "https"
    typer.echo(f"MBALL serves {names} on {scheme}://{address[0]}:{address[1]}/v1", file=sys.stderr)
    if loaded.admin is not None:
        typer.echo(f"Its operator asks {scheme}://{loaded.admin.host}:{loaded.admin.port}", file=sys.stderr)
    run.serve(loaded, sock, config, flags)


def config_schema() -> None:
    """Print the JSON schema of the YAML configuration."""
    from mball.server.config import json_schema

    typer.echo(json_schema(), nl=False)


def add_to(app: typer.Typer) -> None:
    app.command()(serve)
    app.command("config-schema")(config_schema)
