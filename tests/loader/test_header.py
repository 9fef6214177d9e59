from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mball.errors import ReadError
from mball.loader import header
from mball.loader.dtypes import SAFETENSORS
from tests.loader.files import entry, file_bytes

_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_what_the_library_writes_is_read(
    tensors: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str] | None
) -> None:
    content = save({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}, metadata)
    length = header.header_length(content[:8], len(content), "m")
    parsed = header.parse(content[8 : 8 + length], len(content), "m")
    assert parsed.data_start == 8 + length
    assert dict(parsed.metadata) == (metadata or {})
    assert {name: (found.dtype, found.shape) for name, found in parsed.tensors.items()} == {
        name: (SAFETENSORS[dtype], tuple(shape)) for name, (dtype, shape) in tensors.items()
    }


def test_offsets_are_from_the_start_of_the_file(tmp_path: Path) -> None:
    tensor = torch.arange(1000, dtype=torch.int32)
    save_file({"a": tensor, "b": tensor + 1}, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    found = header.read(tmp_path / "m").tensors["b"]
    assert content[found.start : found.end] == (tensor + 1).numpy().tobytes()


def test_tensors_come_in_the_order_of_their_data() -> None:
    raw = file_bytes({"b": entry("U8", [2], 2, 4), "c": entry("U8", [0], 2, 2), "a": entry("U8", [2], 0, 2)})[8:]
    assert list(header.parse(raw, 8 + len(raw) + 4, "m").tensors) == ["a", "c", "b"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="No such file"):
        header.read(tmp_path / "none")
    with pytest.raises(ReadError, match="directory"):
        header.read(tmp_path)
