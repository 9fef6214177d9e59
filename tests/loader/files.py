"""Safetensors files made by hand, right and wrong ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: bytes | str | Mapping[str, object], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A whole file; `length` overrides the true length of the header."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def library_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Shards by file name, and their index."""
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def mapping_of(address: int) -> tuple[str, dict[str, int]]:
    """The path of the mapping that holds an address (empty where it is anonymous), and its smaps fields in bytes."""
    path, fields, inside = "", {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            if inside:
                break
            begin, _, end = first.partition("-")
            inside = int(begin, 16) <= address < int(end, 16)
            path = rest.split(maxsplit=4)[4] if len(rest.split()) > 4 else ""
        elif inside and rest.endswith("kB"):
            fields[first[:-1]] = int(rest.split()[0]) * 1024
    if not inside:
        raise ValueError(f"nothing is mapped at {address:#x}")
    return path, fields


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}
