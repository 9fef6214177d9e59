"""Which models there are, and which ones come in the place of others that still answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mball.errors import ConfigError, UnknownModel
from mball.memory.model import Model
from mball.memory.spec import ModelSpec
from mball.memory.vllm_options import adapters

_KEPT_BY_A_WORKER = ("pinned", "priority", "preload", "keep_alive_s", "max_queue")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload changes: models by name, as they will be. `altered` go on with their workers."""

    added: dict[str, Model] = field(default_factory=dict)
    replaced: dict[str, Model] = field(default_factory=dict)
    altered: dict[str, ModelSpec] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    @property
    def fresh(self) -> list[Model]:
        return [*self.added.values(), *self.replaced.values()]

    def __str__(self) -> str:
        what = {"added": self.added, "changed": [*self.replaced, *self.altered], "removed": self.removed}
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in what.items() if names) or "no model changed"


class Roster:
    """`models`: by name, those that have a place on a device. One that is no longer configured keeps it until its last
    request is answered and its worker has ended; whoever has its name by then waits for it in `_coming`, requests and
    all, so that no request is asked twice or of the wrong one."""

    def __init__(self, specs: Sequence[ModelSpec], make: Callable[[ModelSpec, int], Model]) -> None:
        """Raises ConfigError for two models of one name."""
        self._make = make
        self._numbers = itertools.count()
        self._coming: dict[str, Model] = {}
        _check_names(specs)
        self.models = {spec.name: make(spec, next(self._numbers)) for spec in specs}
        self.adapters = self._adapters()

    def names(self) -> list[str]:
        return [name for name in {**self.models, **self._coming} if not self._of(name).retired]

    def find(self, name: str) -> Model:
        """Who answers a request that comes now. Raises UnknownModel."""
        if (model := self.answering(name)) is None or model.retired:
            raise UnknownModel(f"the model {name!r} is not served here; these are: {', '.join(self.names())}")
        return model

    def answering(self, name: str) -> Model | None:
        """The same, or who answered the last of that name and is still there."""
        return self._coming.get(name) or self.models.get(name)

    def all(self) -> list[Model]:
        return [*self.models.values(), *self._coming.values()]

    def compare(self, specs: Sequence[ModelSpec]) -> Changes:
        """What these would change. Raises ConfigError for two models of one name."""
        _check_names(specs)
        now, changes = set(self.names()), Changes(removed=tuple(set(self.names()) - {spec.name for spec in specs}))
        for spec in specs:
            if spec.name not in now:
                changes.added[spec.name] = self._make(spec, next(self._numbers))
            elif (known := self._of(spec.name).configured) != spec:
                kept = {name: getattr(known, name) for name in _KEPT_BY_A_WORKER}
                if dataclasses.replace(spec, **kept) == known:
                    changes.altered[spec.name] = spec
                else:
                    changes.replaced[spec.name] = self._make(spec, next(self._numbers))
        return changes

    def change(self, changes: Changes, seat: Callable[[Model], None], unseat: Callable[[Model], None]) -> None:
        """At once, for every request that comes after. `seat` gives a model its place, `unseat` takes it."""

        def over(model: Model) -> None:
            del self.models[model.name]
            unseat(model)
            if (coming := self._coming.pop(model.name, None)) is not None:
                self._seat(coming, seat)

        for name in (*changes.removed, *changes.replaced):
            self._of(name).retire(over)
        for name, spec in changes.altered.items():
            self._of(name).alter(spec)
        for model in changes.fresh:
            if (coming := self._coming.get(model.name)) is not None:
                coming.become(model)
            elif model.name in self.models:
                self._coming[model.name] = model
            else:
                self._seat(model, seat)
        self.adapters = self._adapters()

    def _seat(self, model: Model, seat: Callable[[Model], None]) -> None:
        self.models[model.name] = model
        seat(model)

    def _of(self, name: str) -> Model:
        return self._coming.get(name) or self.models[name]

    def _adapters(self) -> dict[str, str]:
        vllm = [self._of(name) for name in self.names() if self._of(name).spec.worker.engine == "vllm"]
        return {adapter: model.name for model in vllm for adapter in adapters(model.spec.worker.engine_args)}


def _check_names(specs: Sequence[ModelSpec]) -> None:
    if len({spec.name for spec in specs}) != len(specs):
        raise ConfigError("two models have one name")
