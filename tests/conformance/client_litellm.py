"""litellm, as a client of an OpenAI-compatible address."""

from __future__ import annotations

import sys
from typing import Any

import litellm  # type: ignore[import-not-found,unused-ignore]

url, model = sys.argv[1:]
ask: dict[str, Any] = {
    "model": f"openai/{model}",
    "api_base": f"{url}/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": "Say hello."}],
    "max_tokens": 8,
    "temperature": 0,
}
whole = litellm.completion(**ask)
assert whole.choices[0].message.content
assert whole.usage.completion_tokens > 0
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
assert "".join(pieces) == whole.choices[0].message.content
