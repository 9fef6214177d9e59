"""Tensors that are read when they are used, as far as they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mball.loader.selection import Part

Fetch = Callable[[Part | None], Tensor]


class LazyTensor(Tensor):
    """One that is read when it is first used, as a whole or a part along one dimension. Then it is as any other.

    `axes`: which of the stored dimensions each of its own is (None: one of size 1, which is not stored). A stored one
    that is in none of them was picked out by an index.
    """

    fetch: Fetch
    stored: tuple[int, ...]
    part: Part | None
    axes: tuple[int | None, ...]
    held: Tensor | None

    def __new__(
        cls,
        fetch: Fetch,
        stored: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        part: Part | None = None,
        axes: tuple[int | None, ...] | None = None,
    ) -> Self:
        """`stored`: the whole's shape."""
        axes = tuple(range(len(stored))) if axes is None else axes
        sizes = list(stored)
        if part is not None:
            sizes[part.dim] = part.end - part.begin
        like = _viewed(torch.empty(sizes, dtype=dtype, device="meta"), axes)
        made: Self = Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=dtype, device=device)
        made.fetch, made.stored, made.part, made.axes, made.held = fetch, stored, part, axes, None
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, read={self.held is not None})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        look = None if kwargs else _LOOKS.get(func)
        if look is not None and args[0].held is None and (seen := look(*args)) is not None:
            return seen
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """The same memory every time: what is written to it stays."""
        if self.held is None:
            self.held = _viewed(self.fetch(self.part), self.axes)
        return self.held

    def seen(self, part: Part | None, axes: tuple[int | None, ...]) -> LazyTensor:
        return LazyTensor(self.fetch, self.stored, self.dtype, self.device, part, axes)


def _viewed(tensor: Tensor, axes: tuple[int | None, ...]) -> Tensor:
    there = [dim for dim in axes if dim is not None]
    picked = [dim for dim in range(tensor.dim()) if dim not in there]
    tensor = tensor.permute(*picked, *there)
    for _ in picked:
        tensor = tensor[0]
    for at, dim in enumerate(axes):
        tensor = tensor.unsqueeze(at) if dim is None else tensor
    return tensor


def _cut(
    tensor: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor | None:
    """None where what is wanted is not a part along one stored dimension."""
    dim %= tensor.dim()
    begin, end, _ = slice(start, end).indices(tensor.shape[dim])
    if step != 1:
        return None
    if (begin, end) == (0, tensor.shape[dim]):
        return tensor.seen(tensor.part, tensor.axes)
    stored, part = tensor.axes[dim], tensor.part
    if stored is None or (part is not None and part.dim != stored):
        return None
    first = 0 if part is None else part.begin
    return tensor.seen(Part(stored, first + begin, first + max(begin, end)), tensor.axes)


def _pick(tensor: LazyTensor, dim: int, index: int) -> LazyTensor | None:
    dim %= tensor.dim()
    one = tensor if tensor.axes[dim] is None else _cut(tensor, dim, index, index + 1 or None)
    if one is None or not -tensor.shape[dim] <= index < tensor.shape[dim]:
        return None
    return one.seen(one.part, one.axes[:dim] + one.axes[dim + 1 :])


def _swap(tensor: LazyTensor, one: int = 0, other: int = 1) -> LazyTensor | None:
    if tensor.dim() < 2:
        return None
    axes = list(tensor.axes)
    axes[one], axes[other] = axes[other], axes[one]
    return tensor.seen(tensor.part, tuple(axes))


def _widen(tensor: LazyTensor, dim: int) -> LazyTensor:
    at = dim % (tensor.dim() + 1)
    return tensor.seen(tensor.part, (*tensor.axes[:at], None, *tensor.axes[at:]))


def _unbind(tensor: LazyTensor, dim: int = 0) -> list[LazyTensor] | None:
    return _all(_pick(tensor, dim, index) for index in range(tensor.shape[dim]))


def _split(tensor: LazyTensor, sizes: int | Sequence[int], dim: int = 0) -> list[LazyTensor] | None:
    whole = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - begin) for begin in range(0, whole, max(1, sizes))]
    if sum(sizes) != whole:
        return None
    ends = list(accumulate(sizes))
    return _all(_cut(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True))


def _all(found: Iterable[LazyTensor | None]) -> list[LazyTensor] | None:
    there = list(found)
    whole = [tensor for tensor in there if tensor is not None]
    return whole if len(whole) == len(there) else None


_LOOKS: dict[Any, Callable[..., LazyTensor | list[LazyTensor] | None]] = {
    torch.ops.aten.slice.Tensor: _cut,
    torch.ops.aten.select.int: _pick,
    torch.ops.aten.unbind.int: _unbind,
    torch.ops.aten.split.Tensor: _split,
    torch.ops.aten.split_with_sizes.default: _split,
    torch.ops.aten.t.default: _swap,
    torch.ops.aten.transpose.int: _swap,
    torch.ops.aten.unsqueeze.default: _widen,
    torch.ops.aten.detach.default: lambda tensor: tensor.seen(tensor.part, tensor.axes),
}
"""What only looks at a part of a tensor, or at it from elsewhere, reads nothing."""
