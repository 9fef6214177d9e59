"""One loader in a process of its own: `python -m mball.bench.contenders SPEC`, a JSON object; prints one."""

from __future__ import annotations

import gc
import json
import mmap
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from mball.loader import Checkpoint, load

Loader = Callable[[], Mapping[str, Tensor]]


class Cannot(Exception):
    """The contender can't load this model, or isn't installed."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What one process does. `contender` is a name in LOADERS."""

    contender: str
    path: str
    mode: Literal["check", "time"]
    threads: int = 2

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mball.bench.contenders", json.dumps(asdict(self))]


def _mball(spec: Spec) -> Loader:
    return lambda: load(spec.path, threads=spec.threads)


def _safetensors(spec: Spec) -> Loader:
    """`load_file` gives tensors that are pages of the file; the clone makes them the caller's own."""
    from safetensors.torch import load_file

    files = [shard.path for shard in Checkpoint.open(spec.path).shards]
    return lambda: {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def _transformers(spec: Spec) -> Loader:
    """`from_pretrained`, which builds the module too and leaves its tensors pages of the file; and the clone."""
    import transformers

    if not (Path(spec.path) / "config.json").is_file():
        raise Cannot("the model has no config.json")
    architectures = transformers.AutoConfig.from_pretrained(spec.path).architectures
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    if model_class is None:
        raise Cannot(f"transformers has no model class {architectures}")

    def loader() -> dict[str, Tensor]:
        module = model_class.from_pretrained(spec.path, dtype="auto")
        return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}

    return loader


LOADERS: dict[str, Callable[[Spec], Loader]] = {
    "safetensors": _safetensors,
    "mball": _mball,
    "transformers": _transformers,
}
"""By name. The first is the reference that the others' results are compared with."""


def check(loader: Loader) -> dict[str, Any]:
    """A digest of every tensor, and how many bytes of them are still pages of a file."""
    tensors = loader()
    digests = {name: f"{tensor.dtype} {list(tensor.shape)} {_digest(tensor)}" for name, tensor in tensors.items()}
    return {"digests": digests, "facts": {"file_backed_bytes": file_backed_bytes(tensors)}}


def measure(loader: Loader, nbytes: int) -> dict[str, float]:
    """Seconds of the first call in this process and of the second, and the peak of memory above the start in bytes."""
    touch(nbytes)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    first_s = _timed(loader)
    peak_bytes = _status_bytes("VmHWM") - before
    gc.collect()
    return {"first_s": first_s, "steady_s": _timed(loader), "peak_bytes": peak_bytes}


def touch(nbytes: int) -> None:
    """Write to so much new memory and free it: in a virtual machine the first touch of a page is the host's time."""
    with mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, nbytes, mmap.PAGESIZE):
            memory[at] = 1


def file_backed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors that lie in mappings of files: they change or vanish with the file."""
    begins, ends, named = [], [], []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, _, end = fields[0].partition("-")
        begins.append(int(begin, 16))
        ends.append(int(end, 16))
        named.append(len(fields) > 5 and fields[5].startswith("/"))
    total = 0
    for tensor in tensors.values():
        at = bisect_right(begins, tensor.data_ptr()) - 1
        if tensor.numel() and at >= 0 and tensor.data_ptr() < ends[at] and named[at]:
            total += tensor.nbytes
    return total


def _timed(loader: Loader) -> float:
    begin = time.perf_counter()
    tensors = loader()
    seconds = time.perf_counter() - begin
    del tensors
    return seconds


def _digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise Cannot(f"/proc/self/status has no {field}")


def main(argument: str) -> dict[str, Any]:
    spec = Spec(**json.loads(argument))
    try:
        loader = LOADERS[spec.contender](spec)
        if spec.mode == "check":
            return check(loader)
        return measure(loader, 2 * Checkpoint.open(spec.path).nbytes)
    except (Cannot, ImportError) as error:
        return {"cannot": str(error)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])) + "\n")
