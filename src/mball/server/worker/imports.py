"""All that a worker imports, whatever its model; what depends on the model it still has to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_UNUSED = "sklearn"
"""transformers takes it, where it is there, for a kind of decoding that no engine here has. It brings pandas and
pyarrow along: seconds, and a thread of jemalloc's that no fork survives."""


def import_all() -> None:
    with _without(_UNUSED):
        import transformers.generation.utils
        import transformers.models.llama.modeling_llama
        import transformers.tokenization_python  # noqa: F401

        import mball.server.worker.process  # noqa: F401


@contextmanager
def _without(name: str) -> Iterator[None]:
    """To everyone who looks, the module is not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
