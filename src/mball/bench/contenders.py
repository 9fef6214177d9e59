"""One loader in a process of its own: `python -m mball.bench.contenders SPEC`, a JSON object.

It imports what it needs, prints READY, waits for a line (`{"digest": BOOL}`), and prints its result as a JSON object:
measures by name, `facts`, and `digests` where they were asked for; or `{"cannot": REASON}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mball.errors import MballError
from mball.loader import Checkpoint, image, load

READY = "ready"


class Cannot(Exception):
    """The contender can't load this model, or isn't installed."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What one process does. `contender` is a name in CONTENDERS; `threads` None leaves MBALL's own choice.

    `cold`: the files are not in the page cache, so that there is one call to time. `image_fd`: the source image,
    inherited. `verify`: MBALL checks every byte against the manifest beside the model. A first call that takes more
    than `limit_s` is the only one.
    """

    contender: str
    path: str
    device: str = "cpu"
    threads: int | None = None
    cold: bool = False
    verify: bool = False
    image_fd: int | None = None
    limit_s: float | None = None

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mball.bench.contenders", json.dumps(asdict(self))]

    def options(self) -> dict[str, Any]:
        """MBALL's loader's arguments."""
        from mball.loader.manifest import Manifest

        chosen: dict[str, Any] = {} if self.threads is None else {"threads": self.threads}
        return chosen | ({"verify": Manifest.open(Checkpoint.open(self.path))} if self.verify else {})


@dataclass(frozen=True, slots=True)
class Loader:
    """`load` is what is timed: it returns once every byte is issued, on a GPU perhaps not yet there. `release` gives
    back, between two calls, what dropping the tensors does not."""

    load: Callable[[], Mapping[str, Tensor]]
    release: Callable[[], object] = field(default=lambda: None)


def _mball(spec: Spec) -> Loader:
    options = spec.options()
    return Loader(lambda: load(spec.path, spec.device, **options))


def _mball_module(spec: Spec) -> Loader:
    """The module that MBALL's engine serves, built and filled anew by every call, as from_pretrained does."""
    from mball.bench.module import build

    model_class(spec)
    options = spec.options()

    def loader() -> Mapping[str, Tensor]:
        module, weights = build(spec.path, spec.device)
        weights.load(**options)
        return dict(module.named_parameters())

    return Loader(loader)


def _mball_image(spec: Spec) -> Loader:
    """A module that is there already, filled from the DRAM image, as when a model comes back to the device."""
    from mball.bench.module import build

    options = spec.options()
    module, weights = build(spec.path, spec.device)

    def loader() -> Mapping[str, Tensor]:
        weights.load(spec.image_fd, **options)
        return dict(module.named_parameters())

    return Loader(loader, release=weights.release)


def _mball_filling(spec: Spec) -> Loader:
    """From the disk into a new DRAM image and on to the device, so that the model can come back from there."""
    from mball.bench.module import build

    options = spec.options()
    module, weights = build(spec.path, spec.device)
    checkpoint = Checkpoint.open(spec.path)

    def loader() -> Mapping[str, Tensor]:
        # It stays, as a worker's does; a process has one such call, as cold files are read once.
        weights.load(fill_image_fd=image.create("mball-bench", checkpoint.image_bytes), **options)
        return dict(module.named_parameters())

    return Loader(loader, release=weights.release)


def _safetensors(spec: Spec) -> Loader:
    """`load_file`. On the CPU it gives tensors that are pages of the file; the clone makes them the caller's own."""
    from safetensors.torch import load_file

    found = files(spec)
    if spec.device == "cpu":
        return Loader(lambda: {name: tensor.clone() for file in found for name, tensor in load_file(file).items()})
    return Loader(
        lambda: {name: tensor for file in found for name, tensor in load_file(file, device=spec.device).items()}
    )


def _transformers(spec: Spec) -> Loader:
    """`from_pretrained`, which builds the module too. On the CPU its tensors are pages of the file: with the clone."""
    found = model_class(spec)

    def loader() -> Mapping[str, Tensor]:
        if spec.device == "cpu":
            module = found.from_pretrained(spec.path, dtype="auto")
            return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
        return dict(found.from_pretrained(spec.path, dtype="auto", device_map=spec.device).named_parameters())

    return Loader(loader)


def files(spec: Spec) -> list[str]:
    return [str(shard.path) for shard in Checkpoint.open(spec.path).shards]


def model_class(spec: Spec) -> Any:
    """The class that config.json names, imported."""
    import transformers

    if not (Path(spec.path) / "config.json").is_file():
        raise Cannot("the model has no config.json")
    architectures = transformers.AutoConfig.from_pretrained(spec.path).architectures
    found = getattr(transformers, architectures[0], None) if architectures else None
    if found is None:
        raise Cannot(f"transformers has no model class {architectures}")
    return found


def _peer(name: str) -> Callable[[Spec], Loader]:
    def loader(spec: Spec) -> Loader:
        from mball.bench import peers

        if spec.device == "cpu":
            raise Cannot("it is measured on GPUs alone")
        return peers.LOADERS[name](spec)

    return loader


CONTENDERS: dict[str, Callable[[Spec], Loader]] = {
    "safetensors": _safetensors,
    "mball": _mball,
    "mball, module": _mball_module,
    "mball, image": _mball_image,
    "mball, filling its image": _mball_filling,
    "transformers": _transformers,
    "fastsafetensors": _peer("fastsafetensors"),
    "runai": _peer("runai"),
    "instanttensor": _peer("instanttensor"),
}

PEERS = ("safetensors", "transformers", "fastsafetensors", "runai", "instanttensor")


def prepare(spec: Spec) -> Callable[[bool], dict[str, Any]]:
    """Imports what the contender wants; the measurement, to be called once. Raises Cannot, ImportError, MballError."""
    from mball.bench import baselines, measure

    if spec.contender in baselines.BASELINES:
        baseline = baselines.BASELINES[spec.contender]
        return lambda digest: baseline(spec)
    loader = CONTENDERS[spec.contender](spec)
    nbytes = Checkpoint.open(spec.path).nbytes
    limit_s = 0.0 if spec.cold else spec.limit_s
    if spec.device == "cpu":
        return lambda digest: measure.on_cpu(loader, nbytes, digest=digest, limit_s=limit_s)
    return lambda digest: measure.on_gpu(loader, nbytes, spec.device, digest=digest, limit_s=limit_s)


def in_turn(measure: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
    """Says READY, and measures once its turn has come, given whether digests are wanted; what fails is the result, with
    the reason."""
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    said = sys.stdin.readline()
    if not said:
        return {"cannot": "it was not wanted any more"}
    try:
        return measure(json.loads(said)["digest"])
    except (Cannot, MballError, OSError, RuntimeError, ValueError) as error:
        return {"cannot": f"{type(error).__name__}: {error}"}


def main(argument: str) -> dict[str, Any]:
    try:
        run = prepare(Spec(**json.loads(argument)))
    except ModuleNotFoundError as error:
        return {"cannot": f"not installed ({error})"}
    except (Cannot, ImportError, MballError) as error:
        return {"cannot": str(error)}
    return in_turn(run)


if __name__ == "__main__":
    # This file as a module, too: its exceptions must be those that the other modules raise.
    from mball.bench import contenders

    sys.stdout.write(json.dumps(contenders.main(sys.argv[1])) + "\n")
    sys.stdout.flush()
    # There is nothing to be kept, and taking a large process apart in good order takes long.
    os._exit(0)
