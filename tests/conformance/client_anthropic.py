"""anthropic, on `/v1/messages`."""

from __future__ import annotations

import sys
from typing import Any

import anthropic  # type: ignore[import-not-found,unused-ignore]

url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=300)
ask: dict[str, Any] = {
    "model": model,
    "max_tokens": 8,
    "extra_body": {"temperature": 0},
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "Say hello."}],
}
whole = client.messages.create(**ask)
assert whole.content[0].text
assert whole.usage.output_tokens > 0
with client.messages.stream(**ask) as stream:
    assert "".join(stream.text_stream) == whole.content[0].text
try:
    client.messages.create(**{**ask, "model": "no-such-model"})
except anthropic.NotFoundError:
    sys.exit()
sys.exit("a model that is not there was answered for")
