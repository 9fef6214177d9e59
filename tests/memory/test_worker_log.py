"""A worker's log, and what becomes of it where the disk takes none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mball.memory.worker_log import log_path, log_tail, open_log


def write(path: Path, text: str, limit_bytes: int = 0) -> None:
    fd = open_log(path, limit_bytes=limit_bytes)
    os.write(fd, text.encode())
    os.close(fd)


def test_a_log_is_appended_to_and_turned_over(tmp_path: Path) -> None:
    path = log_path(tmp_path, "org/model:a b")
    assert path.parent == tmp_path
    write(path, "one\n")
    write(path, "two\n", limit_bytes=8)
    assert log_tail(path) == "one\ntwo"
    write(path, "three\n")
    write(path, "four\n", limit_bytes=8)
    assert log_tail(path) == "four"
    assert path.with_name(path.name + ".1").read_text() == "one\ntwo\nthree\n"
    assert path.stat().st_mode & 0o077 == 0


def test_a_place_that_takes_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "not" / "there.log", "lost")
    assert "no log" in capsys.readouterr().out
    assert "No such file" in log_tail(tmp_path / "not" / "there.log")


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "long.log"
    write(path, "".join(f"line {n}\n" for n in range(10_000)))
    assert log_tail(path).splitlines() == [f"line {n}" for n in range(9_980, 10_000)]
