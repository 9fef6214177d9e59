"""What is kept and who goes: the least valuable first, and never what another continues."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mball.swap.kv_shelf import Held, Shelf
from mball.swap.policy import Worth

NOW = 1_000_000.0


def held(name: str, parent: str | None = None, heat: float = 1.0, pins: int = 0, place: int = 0) -> Held:
    above = None if parent is None else parent.encode()
    return Held(name.encode(), place, above, 0 if parent is None else 1, Worth(1.0, heat, NOW), pins=pins)


def popped(shelf: Shelf) -> list[str]:
    found = []
    while (gone := shelf.pop()) is not None:
        found.append(gone.key.decode())
    return found


def test_the_least_valuable_goes_first_but_a_suffix_before_its_prefix() -> None:
    shelf = Shelf()
    for entry in (held("a", heat=0.1), held("b", "a", heat=3.0), held("c", "b", heat=2.0), held("x", heat=2.5)):
        shelf.add(entry)
    assert popped(shelf) == ["c", "x", "b", "a"]
    assert len(shelf) == shelf.num_unpinned == 0


def test_a_use_and_a_pin_keep_one() -> None:
    shelf = Shelf()
    first, second, third = held("a"), held("b"), held("c")
    for entry in (first, second, third):
        shelf.add(entry)
    shelf.use(first, NOW + 1)
    shelf.pin(second)
    assert shelf.num_unpinned == 2
    assert popped(shelf) == ["c", "a"]
    shelf.unpin(second)
    assert popped(shelf) == ["b"]


def test_only_what_is_worth_less_goes_for_another() -> None:
    shelf = Shelf()
    shelf.add(held("a", heat=2.0))
    assert shelf.pop(below=held("new", heat=2.0).score) is None
    gone = shelf.pop(below=held("new", heat=2.1).score)
    assert gone is not None
    assert gone.key == b"a"


def test_a_chain_ends_where_one_is_missing() -> None:
    shelf = Shelf()
    for entry in (held("a"), held("b", "a"), held("d", "c")):
        shelf.add(entry)
    assert [entry.key for entry in shelf.chain([b"a", b"b", b"c", b"d"])] == [b"a", b"b"]
    with pytest.raises(ValueError, match="there already"):
        shelf.add(held("a"))


class ShelfMachine(RuleBasedStateMachine):
    """Against a plain dict that is searched in full."""

    @initialize()
    def begin(self) -> None:
        self.shelf = Shelf()
        self.model: dict[bytes, Held] = {}
        self.count = 0

    @rule(data=st.data(), heat=st.floats(0.01, 10.0))
    def add(self, data: st.DataObject, heat: float) -> None:
        parent = data.draw(st.sampled_from([None, *self.model]))
        self.count += 1
        entry = Held(str(self.count).encode(), self.count, parent, 0, Worth(1.0, heat, NOW))
        self.shelf.add(entry)
        self.model[entry.key] = entry

    @rule(data=st.data(), change=st.sampled_from(["pin", "unpin", "use", "remove"]))
    def change(self, data: st.DataObject, change: str) -> None:
        if not self.model:
            return
        entry = data.draw(st.sampled_from(list(self.model.values())))
        if change == "pin":
            self.shelf.pin(entry)
        elif change == "unpin" and entry.pins:
            self.shelf.unpin(entry)
        elif change == "use":
            self.shelf.use(entry, NOW + self.count)
        elif change == "remove":
            self.shelf.remove(entry)
            del self.model[entry.key]

    @rule()
    def pop(self) -> None:
        parents = {entry.parent for entry in self.model.values()}
        may_go = [e for e in self.model.values() if e.pins == 0 and e.key not in parents]
        gone = self.shelf.pop()
        if not may_go:
            assert gone is None
            return
        assert gone is not None
        assert gone in may_go
        assert gone.score == min(entry.score for entry in may_go)
        del self.model[gone.key]

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "shelf"):
            return
        assert {entry.key for entry in self.shelf} == set(self.model)
        assert self.shelf.num_unpinned == sum(entry.pins == 0 for entry in self.model.values())
        assert len(self.shelf._leaves) <= 2 * len(self.model) + 65


TestShelfMachine = ShelfMachine.TestCase
