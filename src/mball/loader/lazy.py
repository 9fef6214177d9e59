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


class Whole:
    """One stored tensor, of which there may be many views. `held`: all of it, once one of them was more than looked at
    and from then on for all, as they are views of one memory."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.held: Tensor | None = None


class LazyTensor(Tensor):
    """One that is read when it is first used, as a whole or the part that was first cut out of it.

    `cuts`: along stored dimensions, one of each at most. `axes`: which of the stored dimensions each of its own is
    (None: one of size 1, which is not stored). A stored one that is in none of them was picked out by an index.
    """

    whole: Whole
    stored: tuple[int, ...]
    cuts: tuple[Part, ...]
    axes: tuple[int | None, ...]
    held: Tensor | None

    def __new__(
        cls,
        whole: Whole,
        stored: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        cuts: tuple[Part, ...] = (),
        axes: tuple[int | None, ...] | None = None,
    ) -> Self:
        """`stored`: its shape."""
        axes = tuple(range(len(stored))) if axes is None else axes
        # As those of a view of the whole: what may be done without a copy is judged by them.
        like = _viewed(_parted(torch.empty(stored, dtype=dtype, device="meta"), cuts), axes)
        made: Self = Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=dtype, device=device)
        made.whole, made.stored, made.cuts, made.axes, made.held = whole, stored, cuts, axes, None
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        read = self.held is not None or self.whole.held is not None
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, read={read})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        look = None if kwargs else _LOOKS.get(func)
        if look is not None and (seen := look(*args)) is not None:
            return seen
        declared = func._schema.arguments
        by_name = {argument.name: argument for argument in declared}
        return func(
            *(_given(argument, each) for argument, each in zip(declared, args, strict=False)),
            **{name: _given(by_name[name], each) for name, each in (kwargs or {}).items()},
        )

    def read(self) -> Tensor:
        """To be read from alone."""
        if self.whole.held is not None:
            return self.share()
        if self.held is None:
            first, others = (self.cuts[0], self.cuts[1:]) if self.cuts else (None, ())
            self.held = _viewed(_parted(self.whole.fetch(first), others), self.axes)
        return self.held

    def share(self) -> Tensor:
        """Of the memory of all its views: to be written to, or looked at by what is no lazy tensor."""
        whole = self.whole
        if whole.held is None:
            whole.held = whole.fetch(None)
        return _viewed(_parted(whole.held, self.cuts), self.axes)

    def seen(self, cuts: tuple[Part, ...], axes: tuple[int | None, ...]) -> LazyTensor:
        return LazyTensor(self.whole, self.stored, self.dtype, self.device, cuts, axes)


def _given(argument: Any, value: Any) -> Any:
    """Where a result may lie in its memory, or it is written to, all its views have to see that."""
    return tree_map_only(LazyTensor, LazyTensor.read if argument.alias_info is None else LazyTensor.share, value)


def _parted(tensor: Tensor, cuts: Iterable[Part]) -> Tensor:
    for cut in cuts:
        tensor = tensor.narrow(cut.dim, cut.begin, cut.end - cut.begin)
    return tensor


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
    """None where what is wanted is not a part along a stored dimension."""
    dim %= tensor.dim()
    begin, end, _ = slice(start, end).indices(tensor.shape[dim])
    if step != 1:
        return None
    if (begin, end) == (0, tensor.shape[dim]):
        return tensor.seen(tensor.cuts, tensor.axes)
    if (stored := tensor.axes[dim]) is None:
        return None
    cuts = {cut.dim: cut for cut in tensor.cuts}
    first = cuts[stored].begin if stored in cuts else 0
    cuts[stored] = Part(stored, first + begin, first + max(begin, end))
    return tensor.seen(tuple(cuts.values()), tensor.axes)


def _pick(tensor: LazyTensor, dim: int, index: int) -> LazyTensor | None:
    dim %= tensor.dim()
    one = tensor if tensor.axes[dim] is None else _cut(tensor, dim, index, index + 1 or None)
    if one is None or not -tensor.shape[dim] <= index < tensor.shape[dim]:
        return None
    return one.seen(one.cuts, one.axes[:dim] + one.axes[dim + 1 :])


def _swap(tensor: LazyTensor, one: int = 0, other: int = 1) -> LazyTensor | None:
    if tensor.dim() < 2:
        return None
    axes = list(tensor.axes)
    axes[one], axes[other] = axes[other], axes[one]
    return tensor.seen(tensor.cuts, tuple(axes))


def _widen(tensor: LazyTensor, dim: int) -> LazyTensor:
    at = dim % (tensor.dim() + 1)
    return tensor.seen(tensor.cuts, (*tensor.axes[:at], None, *tensor.axes[at:]))


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
    torch.ops.aten.detach.default: lambda tensor: tensor.seen(tensor.cuts, tensor.axes),
}
"""What only looks at a part of a tensor, or at it from elsewhere, reads nothing."""
