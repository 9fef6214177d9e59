"""Which of a checkpoint's bytes fill which of a module's tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mball.errors import TensorMismatch
from mball.loader.checkpoint import Checkpoint, TensorInfo
from mball.loader.dtypes import TORCH, torch_shape
from mball.loader.header import BITS
from mball.loader.plan import Cast, Extent

_NAMED = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A checkpoint tensor, and the byte of the module's tensor where it begins (in the module's dtype)."""

    tensor: str
    offset: int = 0


@dataclass(slots=True)
class Slot:
    """One tensor of the module under all its names: tied ones have several. A `fused` one is checked by its bytes, as
    its pieces have shapes of their own."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    pieces: Sequence[Piece] = ()
    fused: bool = False
    dtype: torch.dtype = torch.uint8
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


def slots_of(
    module: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    sources: Mapping[str, Sequence[Piece]],
    ignore: Collection[str],
    device: torch.device,
) -> list[Slot]:
    """The module's tensors with their pieces, in the order of the files; its other buffers are on `device` from now on.

    Raises TensorMismatch, which lists what does not fit.
    """
    slots, defects = _match(module, checkpoint, dtype, sources, ignore)
    defects += _keep_other_buffers(module, {id(slot.tensor) for slot in slots}, device)
    if defects:
        raise TensorMismatch("; ".join(defects), file=str(checkpoint.path))
    return sorted(slots, key=lambda slot: _first_byte(slot, checkpoint))


def _match(
    module: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    sources: Mapping[str, Sequence[Piece]],
    ignore: Collection[str],
) -> tuple[list[Slot], list[str]]:
    """The slots with their pieces, and what does not fit."""
    matched: list[Slot] = []
    missing: list[str] = []
    wrong: list[str] = []
    used = set(ignore)
    for slot in _slots(module):
        name = next((name for name in slot.names if name in sources), None)
        same = [name for name in slot.names if name in checkpoint.tensors]
        slot.pieces = sources[name] if name is not None else [Piece(same[0])] if same else []
        slot.fused = len(slot.pieces) > 1 or (name is not None and slot.tensor.shape[:1] == (1,))
        used.update(same, (piece.tensor for piece in slot.pieces))
        absent = [piece.tensor for piece in slot.pieces if piece.tensor not in checkpoint.tensors]
        if absent or (not slot.pieces and slot.tensor.is_meta):
            missing.extend(absent or slot.names[:1])
        elif slot.pieces:
            slot.dtype = dtype if dtype is not None and slot.tensor.is_floating_point() else slot.tensor.dtype
            wrong.extend(_wrong(slot, [checkpoint.tensors[piece.tensor] for piece in slot.pieces]))
            matched.append(slot)
    unexpected = [name for name in checkpoint.tensors if name not in used]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong", wrong))
    return matched, [_listed(kind, names) for kind, names in kinds if names]


def _slots(module: nn.Module) -> list[Slot]:
    slots: dict[int, Slot] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        persistent = {
            leaf: buffer for leaf, buffer in child._buffers.items() if leaf not in child._non_persistent_buffers_set
        }
        for leaf, tensor in (*child._parameters.items(), *persistent.items()):
            if tensor is not None:
                slot = slots.setdefault(id(tensor), Slot(tensor))
                slot.names.append(f"{prefix}.{leaf}" if prefix else leaf)
                slot.places.append((child, leaf))
    return list(slots.values())


def _wrong(slot: Slot, infos: list[TensorInfo]) -> Iterator[str]:
    name, shape = slot.names[0], tuple(slot.tensor.shape)
    at = 0
    for piece, info in sorted(zip(slot.pieces, infos, strict=True), key=lambda pair: pair[0].offset):
        stored = TORCH.get(info.dtype)
        if stored is None:
            yield f"{info.name} has dtype {info.dtype}, which torch does not have"
            return
        if not _castable(stored, slot.dtype) or (stored != slot.dtype and BITS[info.dtype] < 8):
            yield f"{info.name} is {info.dtype}, {name} is {slot.dtype}"
        if piece.offset != at:
            yield f"{info.name} begins at byte {piece.offset} of {name}, not at {at}"
        at = piece.offset + Cast(stored, slot.dtype).target_bytes(info.nbytes)
    if not slot.fused and torch_shape(infos[0].dtype, infos[0].shape) != shape:
        yield f"{infos[0].name} has shape {list(infos[0].shape)}, {name} has {list(shape)}"
    elif at != slot.nbytes:
        yield f"the pieces of {name} fill {at} of {slot.nbytes} bytes"


def _castable(stored: torch.dtype, wanted: torch.dtype) -> bool:
    return stored == wanted or (stored.is_floating_point and wanted.is_floating_point)


def _keep_other_buffers(module: nn.Module, matched: set[int], device: torch.device) -> list[str]:
    """Move the buffers that are not loaded to the device; names those that were never given a value."""
    empty: list[str] = []
    for prefix, child in module.named_modules():
        for leaf, buffer in child._buffers.items():
            if buffer is None or id(buffer) in matched:
                continue
            if buffer.is_meta and leaf in child._non_persistent_buffers_set:
                empty.append(f"{prefix}.{leaf}" if prefix else leaf)
            elif not buffer.is_meta:
                child._buffers[leaf] = buffer.to(device)
    return [_listed("buffers without a value", empty)] if empty else []


def _listed(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{kind}: {', '.join(names[:_NAMED])}{more}"


def _first_byte(slot: Slot, checkpoint: Checkpoint) -> tuple[int, int]:
    return min((info.shard, info.start) for info in (checkpoint.tensors[piece.tensor] for piece in slot.pieces))


def extents_of(slot: Slot, checkpoint: Checkpoint) -> Iterator[Extent]:
    for piece in slot.pieces:
        info = checkpoint.tensors[piece.tensor]
        stored = TORCH[info.dtype]
        cast = None if stored == slot.dtype else Cast(stored, slot.dtype)
        yield Extent(info.shard, info.start, info.nbytes, slot.offset + piece.offset, cast)
