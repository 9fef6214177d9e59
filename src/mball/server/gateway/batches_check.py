"""Whether a file holds a batch: looked at as a whole, before anything of it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mball.errors import ConfigError, NotFound
from mball.server.batch.lines import BadLine, scan

_MOST_DEFECTS = 100


def defects(
    path: Path, endpoint: str, serves: Callable[[str], bool], max_requests: int
) -> tuple[int, list[dict[str, Any]]]:
    """How many requests are in it, and what is wrong with them, a hundred defects at most, as OpenAI's `errors.data`.

    Blocks. Raises NotFound where the file is gone.
    """
    total, found = 0, list[dict[str, Any]]()

    def tell(code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        found.append({"code": code, "message": message, "param": param, "line": line})

    try:
        for line in scan(path):
            request = line.request
            if isinstance(request, BadLine):
                tell("invalid_line", str(request), line.number)
            elif request.url != endpoint:
                tell("mismatched_url", f"its url is {request.url}, the batch's {endpoint}", line.number, "url")
            elif not serves(request.model):
                tell("model_not_found", f"the model {request.model!r} is not served here", line.number, "body.model")
            total += 1
            if total > max_requests:
                tell("too_many_requests", f"a batch may have {max_requests} requests", line.number)
                break
            if len(found) == _MOST_DEFECTS:
                break
    except ConfigError:
        raise NotFound("the input file is gone", param="input_file_id") from None
    if not total:
        tell("empty_file", "there is no request in the file", param="input_file_id")
    return total, found
