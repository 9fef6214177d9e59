"""The safetensors header, every bound checked.

Format: https://github.com/huggingface/safetensors#format. Nothing is accepted here that the safetensors library
refuses. What is refused beyond that: a name or field that stands twice, a first byte other than `{`, and tensor
entries whose fields are not exactly dtype, shape and data_offsets, by name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mball.errors import (
    BadDtype,
    BadMetadata,
    BadOffsets,
    BadShape,
    DuplicateName,
    FileTruncated,
    HeaderJson,
    HeaderStart,
    HeaderTooLarge,
    HeaderTooShort,
    ReadError,
    SizeMismatch,
    UnknownField,
)

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element (https://docs.rs/safetensors/latest/safetensors/tensor/enum.Dtype.html)."""

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
_MAX_UINT = 2**64 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a header. `start` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `data_start` is where the data begin; `tensors` are in the order of their data."""

    data_start: int
    size_bytes: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, HeaderTensor]


def read(path: Path) -> Header:
    """The header of a safetensors file. Raises a HeaderError subclass per defect; ReadError where it can't be read."""
    try:
        with path.open("rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            prefix = os.pread(file.fileno(), LENGTH_BYTES, 0)
            length = header_length(prefix, size_bytes, str(path))
            raw = os.pread(file.fileno(), length, LENGTH_BYTES)
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if len(raw) != length:
        raise ReadError(f"{length} bytes of header wanted, {len(raw)} there", file=str(path))
    return parse(raw, size_bytes, str(path))


def header_length(prefix: bytes, size_bytes: int, file: str) -> int:
    """The header's bytes from the first eight of a file of `size_bytes`."""
    if size_bytes < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise HeaderTooShort(f"{size_bytes} bytes are too few for a safetensors file", file=file)
    length = int.from_bytes(prefix, "little")
    if length == 0:
        raise HeaderTooShort("the header is empty", file=file)
    if length > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed", file=file)
    if length > size_bytes - LENGTH_BYTES:
        raise HeaderTooLarge(f"the header claims {length} bytes; the file has {size_bytes} in all", file=file)
    return length


def parse(raw: bytes, size_bytes: int, file: str) -> Header:
    """Check the header `raw` (without its length) of a file of `size_bytes`, named `file` in errors."""
    top = _json_object(raw, file)
    metadata = _metadata(top.pop(_METADATA, None), file)
    data_start = LENGTH_BYTES + len(raw)
    entries = {name: _entry(name, entry, data_start, file) for name, entry in top.items()}
    tensors = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    at = data_start
    for name, tensor in tensors.items():
        if tensor.start != at:
            defect = "overlap the tensor before" if tensor.start < at else "leave a hole before it"
            raise BadOffsets(
                f"its data {defect}: begins at byte {tensor.start - data_start} of the data, not {at - data_start}",
                file=file,
                tensor=name,
            )
        at = tensor.end
    if at != size_bytes:
        raise FileTruncated(f"the header describes {at} bytes, the file has {size_bytes}", file=file)
    return Header(data_start, size_bytes, metadata, tensors)


def unique_object(file: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` that refuses a key that stands twice."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise DuplicateName(f"{twice!r} stands twice in one object", file=file)
        return built

    return build


def _json_object(raw: bytes, file: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise HeaderStart(f"the header begins with {raw[:1]!r}, not with '{{'", file=file)
    try:
        text = raw.decode("utf-8")
        top = json.loads(
            text, object_pairs_hook=unique_object(file), parse_int=_integer, parse_constant=_refuse_constant
        )
        # An escaped lone surrogate is legal to Python's parser, and to no other.
        json.dumps(top, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise HeaderJson(f"the header is not JSON in UTF-8: {error}", file=file) from None
    return dict(top)


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _metadata(value: Any, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadMetadata(f"{_METADATA} must map strings to strings", file=file)
    return value


def _entry(name: str, entry: Any, data_start: int, file: str) -> HeaderTensor:
    if not isinstance(entry, dict | list):
        raise HeaderJson(f"is {entry!r}, not an object", file=file, tensor=name)
    if isinstance(entry, list) or entry.keys() != _FIELDS:
        fields = "none by name" if isinstance(entry, list) else ", ".join(map(repr, entry)) or "none"
        raise UnknownField(
            f"must have the fields dtype, shape and data_offsets alone; has {fields}", file=file, tensor=name
        )
    dtype = entry["dtype"]
    if isinstance(dtype, dict):
        raise UnknownField(f"its dtype is an object, not a name: {dtype!r}", file=file, tensor=name)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise BadDtype(f"unknown dtype {dtype!r}; safetensors has {', '.join(BITS)}", file=file, tensor=name)
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(_is_uint(size) for size in shape):
        raise BadShape(f"its shape is not a list of sizes: {shape!r}", file=file, tensor=name)
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_uint(offset) for offset in offsets):
        raise BadOffsets(f"its data_offsets are not [begin, end]: {offsets!r}", file=file, tensor=name)
    begin, end = offsets
    if end < begin:
        raise BadOffsets(f"its data_offsets are reversed: {offsets!r}", file=file, tensor=name)
    bits = _bits(name, dtype, shape, file)
    if bits % 8 or bits // 8 != end - begin:
        raise SizeMismatch(
            f"{dtype} of shape {shape} takes {bits / 8:g} bytes, its data_offsets span {end - begin}",
            file=file,
            tensor=name,
        )
    return HeaderTensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _bits(name: str, dtype: str, shape: list[int], file: str) -> int:
    """Multiplied in order with a bound at each step, as the library does: [2**63, 2, 0] overflows there too."""
    count = 1
    for size in (*shape, BITS[dtype]):
        count *= size
        if count > _MAX_UINT:
            raise BadShape(f"{dtype} of shape {shape} overflows 64 bits", file=file, tensor=name)
    return count


def _is_uint(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_UINT
