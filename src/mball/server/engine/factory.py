"""Opens a model's engine: headers and configuration alone, no weights."""

from __future__ import annotations

from mball.device.account import Account
from mball.errors import ConfigError, UnsupportedCheckpoint
from mball.loader.checkpoint import Checkpoint
from mball.memory.spec import WorkerSpec
from mball.server.engine import transformers_adapter as adapter
from mball.server.engine.embedder import EmbedEngine
from mball.server.engine.engine import GenerateEngine
from mball.server.engine.footprint import kv_blocks, max_model_len, streamed_cells
from mball.server.engine.kv_cache import KVGeometry
from mball.server.engine.pooling import Pooling
from mball.server.engine.prefix import identity
from mball.server.engine.resident import ResidentWeights, torch_device
from mball.server.engine.warmup import warm_up

_ENCODER_HEAD = 64


def open_engine(spec: WorkerSpec, account: Account) -> GenerateEngine | EmbedEngine:
    """An engine whose weights are not on the device yet.

    Raises UnsupportedCheckpoint, TensorMismatch and other CheckpointErrors, ConfigError.
    """
    checkpoint = Checkpoint.open(spec.path)
    config = adapter.read_config(spec)
    dtype = adapter.choose_dtype(spec, config, checkpoint)
    device = torch_device(spec.device)
    text = adapter.text_config(config)
    if spec.task == "embed":
        if spec.streamed:
            raise ConfigError(
                f"{spec.model}: resident_layers and resident_experts are for models that generate; leave them out"
            )
        model = adapter.build_encoder(spec, config, checkpoint, dtype)
        pooling = Pooling.read(spec.path)
        limits = [spec.max_model_len, pooling.max_seq_length, getattr(text, "max_position_embeddings", None)]
        if device.type == "cuda":
            warm_up(device, KVGeometry(1, 1, _ENCODER_HEAD, dtype))
        known = [limit for limit in limits if limit]
        if not known:
            raise UnsupportedCheckpoint("its configuration gives no longest input; set max_model_len", file=spec.path)
        return EmbedEngine(
            spec,
            ResidentWeights(spec, model, checkpoint, account, device),
            pooling,
            device,
            max_model_len=min(known),
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
        )
    geometry = adapter.kv_geometry(spec, config, dtype)
    num_blocks = kv_blocks(spec, text, geometry)
    if num_blocks < 2:
        raise ConfigError(f"{spec.model}: kv_cache_bytes {spec.kv_cache_bytes} hold no block of KV")
    model = adapter.build_generator(spec, config, checkpoint, dtype, geometry)
    if device.type == "cuda":
        warm_up(device, geometry)
    cells = streamed_cells(spec, checkpoint, geometry, num_blocks)
    return GenerateEngine(
        spec,
        ResidentWeights(spec, model, checkpoint, account, device, cells=cells),
        geometry,
        account,
        device,
        num_blocks=num_blocks,
        max_model_len=max_model_len(spec, text, num_blocks),
        vocab_size=text.vocab_size,
        eos_token_ids=adapter.eos_token_ids(spec.path, config),
        model=identity(checkpoint, geometry, spec.block_size, device.type),
    )
