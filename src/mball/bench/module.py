"""The module that the embedded engine serves."""

from __future__ import annotations

import torch

from mball.loader import Checkpoint, Weights
from mball.memory.spec import WorkerSpec
from mball.server.engine import transformers_adapter as adapter


def build(path: str, device: str) -> tuple[torch.nn.Module, Weights]:
    """A causal model without weights on `device`, and what fills it. Raises CheckpointErrors."""
    spec = WorkerSpec(model="bench", path=path, device=device)
    checkpoint = Checkpoint.open(path)
    config = adapter.read_config(spec)
    dtype = adapter.choose_dtype(spec, config, checkpoint)
    model = adapter.build_generator(spec, config, checkpoint, dtype, adapter.kv_geometry(spec, config, dtype))
    weights = Weights.bind(
        model.module,
        checkpoint,
        device=torch.device(device),
        sources=model.sources,
        ignore=model.ignored,
    )
    return model.module, weights
