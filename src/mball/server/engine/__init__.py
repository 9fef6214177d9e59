"""Engines that serve transformers models: continuous batching over a paged KV cache, and embeddings."""

from mball.server.engine.factory import open_engine
from mball.server.engine.footprint import Footprint, footprint

__all__ = ["Footprint", "footprint", "open_engine"]
