"""Mixtures of experts in transformers (5.17 to 5.23), computed one expert after the other, as they come.

What is relied on: the experts of a layer are one module, made by `integrations.moe.use_experts_implementation`, whose
parameters have the experts as their first dimension and whose `forward` takes (hidden_states, top_k_index,
top_k_weights); tests/server/engine/test_experts.py checks it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

_UP, _GATE_UP, _DOWN = "up_proj", "gate_up_proj", "down_proj"
_KNOWN = {_UP, _GATE_UP, _DOWN, f"{_UP}_bias", f"{_GATE_UP}_bias", f"{_DOWN}_bias"}
_MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


class Chosen(Protocol):
    """An expert and its part of each of the module's tensors (mball.swap.experts.Expert)."""

    @property
    def number(self) -> int: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


Turn = Callable[[int, Mapping[int, float]], Iterator[Chosen]]
"""Of a layer: the experts that were chosen, with the part of the tokens that chose each; gives them as they come."""


def expert_modules(layers: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Of decoder layers, in order: the modules that hold their experts. None where those of one are not understood."""
    found = [module for layer in layers for module in layer.modules() if all(hasattr(module, mark) for mark in _MARKS)]
    return tuple(found) if all(_understood(module) for module in found) else ()


def stream(modules: Sequence[nn.Module], turn: Turn) -> None:
    """Let them compute with what `turn` gives."""
    for layer, module in enumerate(modules):
        module.forward = _forward(module, layer, turn)


def _understood(module: Any) -> bool:
    parameters = dict(module.named_parameters())
    leading = all(tensor.shape[:1] == (module.num_experts,) for tensor in parameters.values())
    # 5.17 knows no norm after an expert.
    norm = getattr(module, "has_post_expert_norm", False)
    return bool(parameters) and leading and parameters.keys() <= _KNOWN and not norm


def _forward(module: Any, layer: int, turn: Turn) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    up = _GATE_UP if module.has_gate else _UP

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), (tokens, k), (tokens, k) → (tokens, hidden): bit by bit what transformers' `grouped_mm`
        makes of it, where a matrix product is the same in a group as alone."""
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1))
        # The only wait for the device: what has to be there depends on what was chosen.
        counts = Counter(experts.tolist())
        ends = dict(zip(counts, accumulate(counts.values()), strict=True))
        rows = hidden_states[order // k]
        computed = torch.empty_like(rows)
        for chosen in turn(layer, {expert: count / tokens for expert, count in counts.items()}):
            at = slice(ends[chosen.number] - counts[chosen.number], ends[chosen.number])
            projected = _linear(module, rows[at], chosen.tensors, up)
            projected = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
            computed[at] = _linear(module, projected, chosen.tensors, _DOWN)
        weighted = computed * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0], device=order.device)
        return weighted[places].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    return forward


def _linear(module: Any, rows: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    weight = tensors[name]
    out = rows @ weight if module.is_transposed else functional.linear(rows, weight)
    return out.add_(tensors[f"{name}_bias"]) if module.has_bias else out
