"""Every error that MBALL raises, in one tree.

MballError
├── ConfigError                     the configuration says something that can't be done
├── CheckpointError                 a model's files on disk (names the file, and the tensor where there is one)
│   ├── UnsupportedCheckpoint       no safetensors (.bin only), custom code, an unknown architecture
│   ├── BadIndex                    the index is not a map of tensor names to files of its own folder
│   ├── MissingShard                the index names a file that is not there
│   ├── TensorMismatch              a tensor is missing, unexpected, or of another shape than the module wants
│   ├── ReadError                   a short read, EIO, a file that shrank while it was read
│   ├── BadManifest                 the manifest of digests is not there, not readable, or another model's
│   ├── DigestMismatch              bytes are not those that the manifest was made of
│   └── HeaderError                 a safetensors header breaks the format; one subclass per defect
│       ├── HeaderTooShort  ├── HeaderTooLarge  ├── HeaderStart  ├── HeaderJson  ├── DuplicateName
│       ├── UnknownField  ├── BadMetadata  ├── BadDtype  ├── BadShape  ├── BadOffsets
│       └── SizeMismatch  └── FileTruncated
├── DeviceError                     a device or its memory
│   ├── DeviceInUse                 another daemon has the device
│   ├── RegistrationFailed          host memory can't be registered with a GPU's driver
│   └── DeviceOutOfMemory           more bytes wanted than the device has free
├── TransitionError                 a move between residencies failed
│   ├── IllegalMove                 not in the table of moves
│   ├── VerbFailed                  a worker answered a verb with an error
│   ├── NotReleased                 device bytes were not given back in time
│   ├── WorkerNotStarted            the worker gave no hello
│   └── WorkerDied                  the worker's process ended
├── SwapError                       the swap store
│   ├── SwapInUse                   another manager has it, and says who it is
│   ├── SwapForeign                 what is there is not a store of ours, and is left alone
│   ├── SwapUnavailable             it can't be made or opened
│   ├── SwapRefused                 bytes are not taken: full, over the day's budget, read-only …
│   └── SwapMiss                    bytes are not there, or can't be trusted
├── EngineUnsupported               an engine that isn't there, or of a version that MBALL doesn't know
├── RequestError                    a request can't be served; carries an HTTP status and an OpenAI code
│   ├── InvalidRequest (400)  ├── UnknownModel (404)  ├── PayloadTooLarge (413)
│   ├── Unauthorized (401)  ├── Forbidden (403)  ├── DeadlineExceeded (504)  ├── NotFound (404)
│   ├── StorageLimit (400)
│   └── Unavailable (503, with retry_after_s)
│       ├── ModelDoesNotFit  ├── ModelFailed  ├── QueueFull  ├── QueueTimeout  ├── Draining
│       ├── RateLimited (429)
│       └── StorageFailed
├── SourceUnavailable               a package that ships a model's files can't be had
├── ModelMakingFailed               a model's files could not be made from their source
└── Cancelled                       the caller gave up; nothing was kept
"""

from __future__ import annotations

from typing import ClassVar

from mball.units import format_bytes


class MballError(Exception):
    """Base of every error here. Its text names the thing, the numbers and the way out."""


class ConfigError(MballError):
    """The configuration says something that cannot be done."""


class Cancelled(MballError):
    """The caller gave up; nothing was kept."""


class EngineUnsupported(MballError):
    """An engine's package that is not there, or of a version whose insides MBALL doesn't know."""


class SourceUnavailable(MballError):
    """A package that ships a model's files is neither installed nor downloadable, or holds other files."""


class ModelMakingFailed(MballError):
    """A model's files could not be made from their source."""


class CheckpointError(MballError):
    """A defect in a model's files.

    `file` is the path as given; `tensor` the tensor's name where the defect belongs to one.
    """

    def __init__(self, message: str, *, file: str, tensor: str | None = None) -> None:
        where = f"{file}: tensor {tensor!r}" if tensor is not None else file
        super().__init__(f"{where}: {message}")
        self.file = file
        self.tensor = tensor


class UnsupportedCheckpoint(CheckpointError):
    """The folder holds nothing that is loaded here: pickled weights alone, custom code, an unknown architecture."""


class BadIndex(CheckpointError):
    """The index is not JSON, maps a name to no file of its own folder, or to a shard that lacks the tensor."""


class MissingShard(CheckpointError):
    """The index names a shard that is not in the folder."""


class TensorMismatch(CheckpointError):
    """A tensor is missing, unexpected, or has another shape than the module wants."""


class ReadError(CheckpointError):
    """A short read, an I/O error, or a file that changed its size while it was read."""


class BadManifest(CheckpointError):
    """The manifest of digests is not there, can't be read, or describes other files."""


class DigestMismatch(CheckpointError):
    """Bytes of a shard are not those that the manifest was made of.

    `extent` is the number of the extent in the shard's data section, None for the header.
    """

    def __init__(self, message: str, *, file: str, tensor: str | None = None, extent: int | None = None) -> None:
        super().__init__(message, file=file, tensor=tensor)
        self.extent = extent


class HeaderError(CheckpointError):
    """A safetensors header breaks the format (https://github.com/huggingface/safetensors#format)."""


class HeaderTooShort(HeaderError):
    """The file is smaller than its eight-byte header length, or the header is empty."""


class HeaderTooLarge(HeaderError):
    """The header is over 100 MB, or reaches past the end of the file."""


class HeaderStart(HeaderError):
    """The header's first byte is not `{`."""


class HeaderJson(HeaderError):
    """The header is not UTF-8, not JSON, or not a JSON object of objects."""


class DuplicateName(HeaderError):
    """A name or a field stands twice in one object."""


class UnknownField(HeaderError):
    """A tensor has a field other than dtype, shape and data_offsets, or lacks one of them."""


class BadMetadata(HeaderError):
    """`__metadata__` is not a map of strings to strings."""


class BadDtype(HeaderError):
    """A dtype that safetensors does not define."""


class BadShape(HeaderError):
    """A shape that is not a list of non-negative integers, or whose product overflows."""


class BadOffsets(HeaderError):
    """Offsets that are reversed, overlap, leave a hole, or are not two non-negative integers."""


class SizeMismatch(HeaderError):
    """shape × dtype is not the number of bytes between the offsets."""


class FileTruncated(HeaderError):
    """The file is shorter, or longer, than its header says."""


class DeviceError(MballError):
    """A device, or memory on it, failed."""


class DeviceInUse(DeviceError):
    """Another daemon manages the device, and says who it is."""


class RegistrationFailed(DeviceError):
    """A GPU's driver would not register host memory: a limit on locked memory, or a file system that it can't pin."""


class DeviceOutOfMemory(DeviceError):
    """More bytes were wanted than the device has free."""

    def __init__(self, device: str, wanted_bytes: int, free_bytes: int, total_bytes: int) -> None:
        super().__init__(
            f"{device}: {format_bytes(wanted_bytes)} wanted, {format_bytes(free_bytes)} free "
            f"of {format_bytes(total_bytes)}"
        )
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        self.total_bytes = total_bytes


class TransitionError(MballError):
    """A move of a model between residencies failed."""


class IllegalMove(TransitionError):
    """The move is not in the table of moves."""


class VerbFailed(TransitionError):
    """A worker answered a verb with an error; `kind` is the name of the error's class there."""

    def __init__(self, verb: str, kind: str, message: str) -> None:
        super().__init__(f"{verb}: {kind}: {message}")
        self.kind = kind


class NotReleased(TransitionError):
    """A process still holds device bytes that it was to give back."""


class WorkerNotStarted(TransitionError):
    """The worker gave no hello. `final`: it said itself why, so that trying again will not help."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class WorkerDied(TransitionError):
    """The worker's process ended while it was needed."""


class SwapError(MballError):
    """The swap store can't do what was asked; serving goes on without."""


class SwapInUse(SwapError):
    """Another manager has the store, and says who it is."""


class SwapForeign(SwapError):
    """What is at the path is not a store of ours. It is never overwritten."""


class SwapUnavailable(SwapError):
    """The store can't be made or opened: no space, no right, an I/O error."""


class SwapRefused(SwapError):
    """Bytes are not taken. `reason` names the counter: full, budget, read_only, busy, io, closed."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"swap: not written ({reason}): {message}")
        self.reason = reason
        self.why = message


class SwapMiss(SwapError):
    """Bytes are not there, or can't be trusted. `reason` is its counter: absent, stale, checksum, io, busy, closed."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"swap: miss ({reason}): {message}")
        self.reason = reason
        self.why = message


class RequestError(MballError):
    """A request that cannot be served.

    `status` is the HTTP status; `code` and `param` are the fields of OpenAI's error object of those names.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code if code is not None else type(self).code
        self.param = param


class InvalidRequest(RequestError):
    """The request itself is wrong; trying again will not help."""

    status = 400
    type = "invalid_request_error"


class UnknownModel(InvalidRequest):
    """No model of that name is configured."""

    status = 404
    code = "model_not_found"


class PayloadTooLarge(InvalidRequest):
    """The body is larger than is accepted."""

    status = 413
    code = "payload_too_large"


class Unauthorized(InvalidRequest):
    """No API key came with the request, or one that is not known."""

    status = 401
    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    """The API key is known, and may not do that."""

    status = 403
    code = "forbidden"


class DeadlineExceeded(RequestError):
    """The time that the request itself gave is over; what it held is free again."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class NotFound(InvalidRequest):
    """No file or batch of that id belongs to the API key."""

    status = 404
    code = "not_found"


class StorageLimit(InvalidRequest):
    """The API key has as many files or batches, or bytes of them, as it may."""

    code = "storage_limit_exceeded"


class Unavailable(RequestError):
    """The request is right but cannot be served now. `retry_after_s` is None where trying again will not help."""

    status = 503
    type = "unavailable_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class ModelDoesNotFit(Unavailable):
    """The model alone needs more than the device has in all."""

    code = "model_does_not_fit"


class ModelFailed(Unavailable):
    """The model's worker could not be started or could not load the model."""

    code = "model_failed"


class QueueFull(Unavailable):
    """As many requests wait for their models as may wait."""

    code = "queue_full"


class QueueTimeout(Unavailable):
    """The model could not be brought in before the request's deadline."""

    code = "queue_timeout"


class Draining(Unavailable):
    """The server is shutting down."""

    code = "shutting_down"


class RateLimited(Unavailable):
    """The API key's limits are reached."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class StorageFailed(Unavailable):
    """The disk for files and batches is full, failed, or another server's."""

    code = "storage_failed"
