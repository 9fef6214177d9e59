"""A file that arrives as multipart/form-data (RFC 7578), straight to the disk and counted as it comes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from mball.errors import InvalidRequest, PayloadTooLarge
from mball.server.gateway import files_records as records
from mball.server.gateway.files_store import Incoming
from mball.server.threads import whole
from mball.units import KiB, MiB, format_bytes

_PIECE_BYTES = MiB
_MOST_FIELDS = 16
_MOST_OF_A_FIELD = 4 * KiB


@dataclass(slots=True)
class Form:
    """The fields, and the name of the file; its data is elsewhere."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def receive(
    request: Request,
    target: Path,
    *,
    max_bytes: int,
    incoming: Incoming,
    check: Callable[[], None],
    deadline_s: float,
) -> Form:
    """The form, whose field `file` is in `target` and on the disk. `incoming` grows with it; `check` may refuse that.

    Raises InvalidRequest, PayloadTooLarge as soon as the file is over the limit, StorageFailed, what `check` raises.
    """
    form = _Parser(_boundary(request))
    try:
        descriptor = await whole(os.open, target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise records.failed(target, error) from None
    try:
        async with asyncio.timeout(deadline_s):
            async for chunk in request.stream():
                form.feed(chunk)
                if form.nbytes > max_bytes:
                    raise PayloadTooLarge(f"the file is over {format_bytes(max_bytes)} (files: max_file_bytes)")
                if len(form.data) >= _PIECE_BYTES:
                    incoming.nbytes = form.nbytes
                    check()
                    await _write(descriptor, target, form.take())
        form.close()
        incoming.nbytes = form.nbytes
        check()
        await _write(descriptor, target, form.take(), sync=True)
    except ClientDisconnect:
        raise InvalidRequest("the client left before its file was whole") from None
    except TimeoutError:
        raise InvalidRequest(f"the file was not whole within {deadline_s:.0f} s") from None
    finally:
        os.close(descriptor)
    return form.form


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("a file is sent as multipart/form-data, with a boundary")
    return options[b"boundary"]


async def _write(descriptor: int, target: Path, data: bytes, *, sync: bool = False) -> None:
    def write() -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if sync:
            os.fsync(descriptor)

    try:
        await whole(write)
    except OSError as error:
        raise records.failed(target, error) from None


class _Parser:
    """Collects the fields of a form, and of its file what `take` has not taken. Raises InvalidRequest."""

    def __init__(self, boundary: bytes) -> None:
        self.form = Form()
        self.nbytes = 0
        self.data = bytearray()
        self._header = self._value = b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._field = bytearray()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._headers,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._all,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest(f"the form is broken: {error}") from None

    def close(self) -> None:
        if not self._ended:
            raise InvalidRequest("the form is broken: it ends before its last boundary")

    def take(self) -> bytes:
        data, self.data = bytes(self.data), bytearray()
        return data

    def _begin(self) -> None:
        self._disposition = b""
        self._field = bytearray()

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == "file"
        if self._name in self.form.fields or (self._is_file and self.form.filename is not None):
            raise InvalidRequest(f"the field {self._name!r} is there twice", param=self._name)
        if self._is_file:
            self.form.filename = options.get(b"filename", b"").decode(errors="replace")
        elif len(self.form.fields) == _MOST_FIELDS:
            raise InvalidRequest(f"a form of more than {_MOST_FIELDS} fields")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.nbytes += end - start
            self.data += data[start:end]
            return
        self._field += data[start:end]
        if len(self._field) > _MOST_OF_A_FIELD:
            raise InvalidRequest(f"the field {self._name!r} is over {_MOST_OF_A_FIELD} bytes", param=self._name)

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._field.decode(errors="replace")

    def _all(self) -> None:
        self._ended = True
