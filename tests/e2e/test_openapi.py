"""The gateway against its own description: schemathesis with all checks, over a worker of canned answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx

from mball.bench.gateway_servers import mball

EXAMPLES = os.environ.get("MBALL_SCHEMATHESIS_EXAMPLES", "1")
"""Of each operation, beside those that cover its description: `scripts/conformance` takes more."""

WITHOUT_END = "events$|stream$"
WITHOUT_A_BALLOON = "balloon$|unload$"
"""What the canned worker can't do, or what would end its service to the others."""


def _named(spec: dict[str, Any]) -> dict[str, Any]:
    """Requests for a model that is there, else all that is tested is its absence."""
    for operations in spec["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "name":
                    parameter["schema"]["enum"] = ["bench"]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "model" in body.get("properties", {}):
                body["properties"]["model"] = {"enum": ["bench"]}
    return spec


def test_what_it_says_of_itself_holds(tmp_path: Path) -> None:
    with mball() as server:
        url, key = f"http://127.0.0.1:{server.port}", f"Authorization: Bearer {server.key}"
        described = httpx.get(f"{url}/openapi.json", headers=dict([key.split(": ")])).json()
        spec = tmp_path / "openapi.json"
        spec.write_text(json.dumps(_named(described)))
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", str(spec), "--url", url, "-H", key]
        command += ["--checks", "all", "--max-examples", EXAMPLES, "--seed", "1", "--continue-on-failure"]
        command += ["--exclude-path-regex", f"{WITHOUT_END}|{WITHOUT_A_BALLOON}", "--request-timeout", "60"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=500, check=False, text=True)
        assert ran.returncode == 0, ran.stdout[-8000:]
        assert " passed" in ran.stdout
        assert httpx.get(f"{url}/health").status_code == 200
