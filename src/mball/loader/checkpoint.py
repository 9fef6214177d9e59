"""A model's weight files on disk: one safetensors file, or the shards that an index names."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mball.errors import BadIndex, MissingShard, ReadError, UnsupportedCheckpoint
from mball.loader import header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPUTED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Dtypes of weights that are computed with as they are, and may be cast, with torch's names. Quantised ones are in
others."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file. Its data section is stored in the source image at `image_offset`, a multiple of a page."""

    path: Path
    size_bytes: int
    data_start: int
    image_offset: int

    @property
    def data_bytes(self) -> int:
        return self.size_bytes - self.data_start


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: `dtype` is safetensors' name; bytes [start, end) of file `shards[shard]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def bytes_as(self, item_bytes: int) -> int:
        """Where what is computed with takes so many bytes a number. What is quantised stays as it is stored."""
        return math.prod(self.shape) * item_bytes if self.dtype in COMPUTED else self.nbytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is to be read. `tensors` are in the order of the files and of the data in them.

    `nbytes` is the sum of the tensors; `image_bytes` the size of the source image: every shard's data section as
    stored, each at the next multiple of a page.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    nbytes: int
    image_bytes: int

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read and check the headers of a safetensors file, or of a folder's `model.safetensors` or shards.

        Raises UnsupportedCheckpoint, BadIndex, MissingShard, ReadError, or a HeaderError.
        """
        path = Path(path)
        return cls._of(path, *_files(path))

    @classmethod
    def of_files(cls, path: Path, files: Sequence[Path]) -> Checkpoint:
        """The same of these safetensors files, whatever an index says; `path` names the whole. Raises as `open`."""
        return cls._of(path, list(files), None)

    @classmethod
    def _of(cls, path: Path, files: list[Path], weight_map: dict[str, str] | None) -> Checkpoint:
        shards: list[Shard] = []
        tensors: dict[str, TensorInfo] = {}
        image_bytes = 0
        for number, file in enumerate(files):
            head = header.read(file)
            shard = Shard(file, head.size_bytes, head.data_start, image_bytes)
            shards.append(shard)
            image_bytes += -(-shard.data_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            for name, found in head.tensors.items():
                # A shard may hold what the index places elsewhere: the index decides.
                if weight_map is None or weight_map.get(name) == file.name:
                    tensors[name] = TensorInfo(name, found.dtype, found.shape, number, found.start, found.end)
        for name, file_name in (weight_map or {}).items():
            if name not in tensors:
                raise BadIndex(f"places it in {file_name}, which lacks it", file=str(path / INDEX_FILE), tensor=name)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return cls(path, tuple(shards), tensors, nbytes, image_bytes)

    @property
    def image_shifts(self) -> list[int]:
        """By shard: what to add to a byte of its file to have the byte of the image."""
        return [shard.image_offset - shard.data_start for shard in self.shards]

    def tensor_at(self, shard: int, at: int) -> str | None:
        """The tensor that byte `at` of a shard's file belongs to."""
        return next(
            (info.name for info in self.tensors.values() if info.shard == shard and info.start <= at < info.end), None
        )


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise UnsupportedCheckpoint("there is no such file or folder", file=str(path))
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE], None
    if (path / INDEX_FILE).is_file():
        weight_map = _weight_map(path / INDEX_FILE)
        names = sorted(set(weight_map.values()))
        for name in names:
            if not (path / name).is_file():
                raise MissingShard(
                    f"named by {INDEX_FILE}, but not there; the download may be incomplete", file=str(path / name)
                )
        return [path / name for name in names], weight_map
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise UnsupportedCheckpoint(
            f"holds pickled weights alone ({', '.join(pickled[:3])}), which can run code when they are read; convert "
            "them with transformers: from_pretrained(DIR), then save_pretrained(NEW_DIR)",
            file=str(path),
        )
    raise UnsupportedCheckpoint(f"holds neither {SINGLE_FILE} nor {INDEX_FILE}", file=str(path))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        parsed = json.loads(index.read_bytes(), object_pairs_hook=header.unique_object(str(index)))
    except OSError as error:
        raise ReadError(f"cannot be read: {error.strerror}", file=str(index)) from error
    except (ValueError, RecursionError) as error:
        raise BadIndex(f"is not JSON: {error}", file=str(index)) from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadIndex("has no weight_map of tensor names to files", file=str(index))
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or PurePosixPath(file_name).parts != (file_name,) or file_name == "..":
            raise BadIndex(f"places it in {file_name!r}, not a file of this folder", file=str(index), tensor=name)
    return weight_map
