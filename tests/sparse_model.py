"""A model's folder whose tensors are holes: any size in no time, for what reads headers alone."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "max_position_embeddings": 64}


def sparse_model(folder: Path, *, layers: int, layer_bytes: int, rest_bytes: int) -> Path:
    """In bfloat16."""
    folder.mkdir(exist_ok=True)
    sizes = {"model.embed_tokens.weight": rest_bytes}
    sizes |= {f"model.layers.{layer}.mlp.up_proj.weight": layer_bytes for layer in range(layers)}
    header, end = {}, 0
    for name, nbytes in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers, "dtype": "bfloat16"}))
    return folder
