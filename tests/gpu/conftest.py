from tests.server.engine.conftest import engine_for, model_dir, oracle

__all__ = ["engine_for", "model_dir", "oracle"]
