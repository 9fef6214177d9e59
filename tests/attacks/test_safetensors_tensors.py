"""Dtypes, shapes and offsets that do not hold together."""

import pytest
from safetensors import SafetensorError, deserialize

from mball.errors import BadDtype, BadOffsets, BadShape, FileTruncated, HeaderError, SizeMismatch
from mball.loader import header
from mball.loader.header import BITS
from tests.loader.files import entry, file_bytes


def refused(tensors: dict[str, object] | str, data_bytes: int, error: type[HeaderError], match: str = ".") -> None:
    """Ours raises `error`; the library refuses too."""
    content = file_bytes(tensors, bytes(data_bytes))
    with pytest.raises(SafetensorError):
        deserialize(content)
    length = int.from_bytes(content[:8], "little")
    with pytest.raises(error, match=match):
        header.parse(content[8 : 8 + length], len(content), "m")


@pytest.mark.parametrize("dtype", ['"f32"', '"F128"', '""', "1", "null", '["F32"]', '"C128"'])
def test_dtypes_that_do_not_exist(dtype: str) -> None:
    refused(f'{{"a":{{"dtype":{dtype},"shape":[1],"data_offsets":[0,4]}}}}', 4, BadDtype)


@pytest.mark.parametrize(
    "shape",
    ["1", "null", '"1"', "[-1]", "[1.0]", "[1e0]", "[true]", "[null]", "[[1]]", "{}", "[-0]", "[18446744073709551616]"],
)
def test_shapes_that_are_no_list_of_sizes(shape: str) -> None:
    refused(f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}', 4, BadShape)


@pytest.mark.parametrize("shape", [[2**62, 4], [2**32, 2**32], [2**63, 2, 0], [2**60, 16], [2**61]])
def test_shapes_that_overflow(shape: list[int]) -> None:
    refused({"a": entry("U8" if shape == [2**61] else "F32", shape, 0, 0)}, 0, BadShape, "overflows")


def test_a_shape_that_wraps_to_the_right_size_is_refused() -> None:
    refused({"a": entry("U8", [2**32, 2**32 + 1], 0, 2**32)}, 0, BadShape, "overflows")


@pytest.mark.parametrize(
    "offsets", ["[0]", "[0,4,8]", "[]", "4", "null", "[0.0,4]", "[-1,3]", "[0,true]", '{"0":0}', "[-0,4]"]
)
def test_offsets_that_are_not_two_numbers(offsets: str) -> None:
    refused(f'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}', 4, BadOffsets)


def test_reversed_offsets() -> None:
    refused({"a": entry("F32", [1], 4, 0)}, 4, BadOffsets, "reversed")


def test_a_hole_at_the_start_and_between() -> None:
    refused({"a": entry("F32", [1], 4, 8)}, 8, BadOffsets, "hole")
    refused({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, BadOffsets, "'b'.*hole")


def test_overlaps() -> None:
    refused({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8, BadOffsets, "'b'.*overlap")
    refused({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, 4, BadOffsets, "overlap")


def test_offsets_past_the_end_of_the_file() -> None:
    refused({"a": entry("F32", [1], 0, 4)}, 3, FileTruncated, "the file has")
    refused({"a": entry("U8", [2**60], 0, 2**60)}, 3, FileTruncated)


@pytest.mark.parametrize(
    ("dtype", "shape", "span"), [("F32", [2], 4), ("F32", [], 8), ("BF16", [0], 2), ("BOOL", [3], 4)]
)
def test_a_span_of_another_size(dtype: str, shape: list[int], span: int) -> None:
    refused({"a": entry(dtype, shape, 0, span)}, span, SizeMismatch, "span")


@pytest.mark.parametrize(("dtype", "count"), [("F4", 1), ("F6_E2M3", 1), ("F6_E3M2", 3)])
def test_elements_that_end_inside_a_byte(dtype: str, count: int) -> None:
    span = BITS[dtype] * count // 8
    refused({"a": entry(dtype, [count], 0, span)}, span, SizeMismatch)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_at_its_size(dtype: str) -> None:
    nbytes = BITS[dtype] * 4 // 8
    content = file_bytes({"z": entry(dtype, [0, 7], 0, 0), "a": entry(dtype, [2, 2], 0, nbytes)}, bytes(nbytes))
    deserialize(content)
    parsed = header.parse(content[8:-nbytes], len(content), "m")
    assert parsed.tensors["a"].end - parsed.tensors["a"].start == nbytes
    assert list(parsed.tensors) == ["z", "a"]
