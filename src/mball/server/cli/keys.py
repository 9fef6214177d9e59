"""`mball keys`: API keys, of which the server keeps the SHA-256 alone."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.callback()
def _keys() -> None:
    pass


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    admin: Annotated[bool, typer.Option("--admin", help="It may move models and see the state.")] = False,
) -> None:
    """Make a key: it is shown once, what goes into the config with it."""
    import yaml

    from mball.server.gateway.access import new_key

    key, sha256 = new_key()
    entry = {"name": name, "sha256": sha256, **({"admin": True} if admin else {})}
    typer.echo(f"# The key, for the client (MBALL_API_KEY, or `Authorization: Bearer`): {key}", err=True)
    typer.echo(yaml.safe_dump({"api_keys": [entry]}, sort_keys=False).rstrip())


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="keys")
