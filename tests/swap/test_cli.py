from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mball.errors import SwapForeign, SwapInUse, SwapUnavailable
from mball.server.cli import app
from mball.swap.layout import BLOCK_BYTES
from mball.units import KiB
from tests.swap.stores import MODEL, SLOT, block, content, image, open_at


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["swap", *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_init_status_check(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    assert "slots of 16.0 KiB" in run("init", str(path), "--size", "2MiB", "--slot", "16KiB")
    with pytest.raises(SwapUnavailable, match="--fresh"):
        run("init", str(path), "--size", "2MiB", "--slot", "16KiB")
    store = open_at(path)
    store.put(image("a", 10 * SLOT), content("a", 10 * SLOT))
    store.put(block("b"), content("b", SLOT))
    said = run("status", str(path))
    assert "held by pid" in said
    assert f"images 1, {10 * SLOT // KiB} KiB" in said
    with pytest.raises(SwapInUse):
        run("check", str(path))
    place = store.find(image("a", 1).key, MODEL)
    at = store.layout.slot_at(place.extents[0].first + 4) + BLOCK_BYTES + 3
    store.close()
    assert "11 slots; 2 of 2 entries are good Everything is as it was written." in run("check", str(path))
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    before = path.read_bytes()
    said = run("check", str(path), code=1)
    assert "11 slots; 1 of 2 entries are good" in said
    assert "image " in said
    assert "miss (checksum)" in said
    assert path.read_bytes() == before, "it only looks"
    run("init", str(path), "--size", "2MiB", "--slot", "16KiB", "--fresh")
    assert "0 of 0 entries" in run("check", str(path))


def test_a_file_of_anothers(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    path.write_text("a thesis")
    for arguments in (["init", str(path), "--size", "2MiB"], ["status", str(path)], ["check", str(path)]):
        with pytest.raises(SwapForeign):
            run(*arguments)
    assert path.read_text() == "a thesis"
