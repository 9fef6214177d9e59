"""vLLM's load format `mball`: its own default loader, with the tensors read by this package.

What a model's weights are, which files hold them and what becomes of each tensor stays vLLM's business. A rank of a
tensor parallel group reads what it cuts out of a tensor alone, where vLLM's own formats read all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mball.errors import MballError
from mball.loader import vllm_compat
from mball.loader.checkpoint import Checkpoint
from mball.loader.lazy_stream import LazyStream
from mball.loader.tensors import STREAM_BYTES, stream
from mball.loader.vllm_names import LOAD_FORMAT
from mball.units import GiB, format_bytes

GROUP_BYTES = 1 * GiB
"""The most that is read into one memory; two such are there at most, beside what the model keeps."""

_log = logging.getLogger(__name__)


@cache
def register() -> None:
    """The entry point in `vllm.general_plugins`: runs in every process of vLLM's. Raises EngineUnsupported."""
    names = vllm_compat.loading()

    class MballModelLoader(names.base):  # type: ignore[name-defined,misc]
        def __init__(self, load_config: Any) -> None:
            # It rejects the names of formats that it does not know.
            super().__init__(dataclasses.replace(load_config, load_format="auto"))

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)
            if torch.cuda.is_available():
                # What the tensors came in is not to be counted as the engine's when KV is sized. A torch that can't
                # give it back while a pool is in use does so when it needs the room.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Tensor]]:
            tensors = self._streamed(source)
            return super()._get_weights_iterator(source) if tensors is None else tensors

        def _streamed(self, source: Any) -> Iterator[tuple[str, Tensor]] | None:
            """None where the default loader has to read the source."""
            files, safe = vllm_compat.weight_files(self, source)
            if not safe or not vllm_compat.plain(self, source):
                _log.info("%s: not read by mball: not plain safetensors", source.model_or_path)
                return None
            vllm_compat.begins(self)
            try:
                paths = sorted(Path(file) for file in files)
                tensors = read(paths, _device()) if vllm_compat.ranks() == 1 else read_part(paths, _device())
                return _named(source.prefix, tensors)
            except (MballError, OSError) as error:
                _log.warning("%s: read by vLLM's own loader: %s", source.model_or_path, error)
                return None

    names.register(LOAD_FORMAT)(MballModelLoader)


def read(files: list[Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, in the order of their names as in vLLM's own loader; the first is read by now.

    They own their memory. On a GPU it is taken by another thread than the caller's, so it belongs to no pool that the
    caller has in use. Raises what `stream` raises.
    """
    checkpoint = Checkpoint.of_files(files[0].parent, files)
    tensors = stream(checkpoint, device, by_name=True, group_bytes=_group_bytes(checkpoint))
    first = list(zip(range(1), tensors, strict=False))
    return chain((pair for _, pair in first), tensors)


def read_part(files: list[Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The same for one of several ranks: of what it does not use nothing will be read. Raises what `stream` raises."""
    checkpoint = Checkpoint.of_files(files[0].parent, files)
    tensors = LazyStream(checkpoint, device, _group_bytes(checkpoint))
    tensors.prove()

    def told() -> Iterator[tuple[str, Tensor]]:
        yield from tensors
        _log.info("%s of %s read", format_bytes(tensors.read_bytes), format_bytes(checkpoint.image_bytes))

    return told()


def _group_bytes(checkpoint: Checkpoint) -> int:
    # Between two groups the bus waits: few large ones, of which two are an eighth of the weights.
    return min(GROUP_BYTES, max(STREAM_BYTES, checkpoint.image_bytes // 16))


def _named(prefix: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + name, tensor) for name, tensor in tensors)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
