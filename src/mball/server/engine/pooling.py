"""How an encoder's token vectors become one vector, as sentence-transformers' files in the model's folder say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mball.errors import UnsupportedCheckpoint

Mode = Literal["mean", "cls", "lasttoken", "max"]
_MODES: tuple[Mode, ...] = ("mean", "cls", "lasttoken", "max")
_LEGACY: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """`max_seq_length` is the longest input that the model was made for, where a file says it."""

    mode: Mode = "mean"
    normalize: bool = False
    max_seq_length: int | None = None

    @classmethod
    def read(cls, path: str) -> Pooling:
        """From modules.json and the files it names; without it, the mean, not normalised.

        Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html. Raises UnsupportedCheckpoint
        for a module or a mode that is not done here.
        """
        folder = Path(path)
        modules = _json(folder / "modules.json") or []
        mode: Mode = "mean"
        normalize = False
        for module in modules:
            kind = str(module.get("type", "")).rsplit(".", 1)[-1]
            if kind == "Pooling":
                mode = _mode(folder / str(module.get("path", "")) / "config.json")
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise UnsupportedCheckpoint(f"its module {kind} is not done here", file=str(folder / "modules.json"))
        limit = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
        return cls(mode, normalize, limit if isinstance(limit, int) and limit > 0 else None)

    def apply(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden (batch, tokens, hidden_size), mask (batch, tokens) of 0 and 1, padded on the right → float32
        (batch, hidden_size)."""
        hidden = hidden.float()
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "lasttoken":
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        elif self.mode == "max":
            pooled = hidden.masked_fill(mask[..., None] == 0, float("-inf")).max(1).values
        else:
            weights = mask[..., None].float()
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def _mode(file: Path) -> Mode:
    config = _json(file) or {}
    named = config.get("pooling_mode")
    chosen = [named] if named is not None else [mode for key, mode in _LEGACY.items() if config.get(key)]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value and key not in _LEGACY]
    for mode in _MODES:
        if chosen == [mode] and not others:
            return mode
    raise UnsupportedCheckpoint(f"pooling by {', '.join(map(str, chosen + others)) or 'nothing'}", file=str(file))


def _json(file: Path) -> Any:
    """None where there is no such file."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UnsupportedCheckpoint(f"is not JSON: {error}", file=str(file)) from error
