"""The eight bytes that claim the header's length."""

from pathlib import Path

import pytest

from mball.errors import FileTruncated, HeaderTooLarge, HeaderTooShort
from mball.loader import header
from tests.loader.files import entry, file_bytes, library_accepts

ONE = {"a": entry("F32", [1], 0, 4)}


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_length(tmp_path: Path, size: int) -> None:
    content = file_bytes(ONE)[:size]
    (tmp_path / "m").write_bytes(content)
    assert not library_accepts(content)
    with pytest.raises(HeaderTooShort, match=f"{size} bytes are too few"):
        header.read(tmp_path / "m")


def test_an_empty_header(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(file_bytes(b""))
    with pytest.raises(HeaderTooShort):
        header.read(tmp_path / "m")


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**63, 2**64 - 1])
def test_a_header_over_the_limit_is_never_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "m").write_bytes(file_bytes(ONE, bytes(4), length=length))
    with pytest.raises(HeaderTooLarge, match="at most 100000000 are allowed"):
        header.read(tmp_path / "m")


def test_the_limit_holds_where_the_file_is_large_enough(tmp_path: Path) -> None:
    with (tmp_path / "m").open("wb") as file:
        file.write(file_bytes(b"{}", length=100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(HeaderTooLarge, match="at most"):
        header.read(tmp_path / "m")


def test_a_header_past_the_end_of_the_file(tmp_path: Path) -> None:
    content = file_bytes(ONE, length=1000)
    (tmp_path / "m").write_bytes(content)
    assert not library_accepts(content)
    with pytest.raises(HeaderTooLarge, match=f"the file has {len(content)} in all"):
        header.read(tmp_path / "m")


@pytest.mark.parametrize("change", [-4, -1, 1, 4096])
def test_a_file_of_another_size_than_described(tmp_path: Path, change: int) -> None:
    content = file_bytes(ONE, bytes(4 + change))
    (tmp_path / "m").write_bytes(content)
    assert not library_accepts(content)
    with pytest.raises(FileTruncated, match=f"the file has {len(content)}"):
        header.read(tmp_path / "m")


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(HeaderTooShort, match=r"model-00001-of-00002\.safetensors: "):
        header.read(tmp_path / "model-00001-of-00002.safetensors")
