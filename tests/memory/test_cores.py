"""Cores: nobody fights, nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mball.memory.cores import Cores, Resident, Topology, share

TWO = Topology(((0, 1),))
TWO_NODES = Topology(((0, 1, 2, 3), (4, 5, 6, 7)))


def active(name: str, threads: int = 2) -> Resident:
    return Resident(name, threads, True)


def idle(name: str, threads: int = 2) -> Resident:
    return Resident(name, threads, False)


def test_alone_it_has_all_and_two_have_one_each() -> None:
    assert share(TWO, [active("a")]) == {"a": Cores((0, 1), 2)}
    assert share(TWO, [active("a"), active("b")]) == {"a": Cores((0,), 1), "b": Cores((1,), 1)}


def test_one_at_rest_takes_nothing_and_may_begin_anywhere() -> None:
    assert share(TWO, [active("a"), idle("b")]) == {"a": Cores((0, 1), 2), "b": Cores((0, 1), 2)}


def test_more_than_there_are_cores_take_turns() -> None:
    found = share(TWO, [active(name) for name in "abc"])
    assert found == {"a": Cores((0,), 1), "b": Cores((1,), 1), "c": Cores((0,), 1)}


def test_a_model_stays_on_one_node_where_one_has_room() -> None:
    found = share(TWO_NODES, [active("a", 3), active("b", 3)])
    assert set(found["a"].cpus) == {0, 1, 2, 3}
    assert set(found["b"].cpus) == {4, 5, 6, 7}
    assert found["a"].threads == found["b"].threads == 3
    wide = share(TWO_NODES, [active("a", 6)])["a"]
    assert (len(wide.cpus), wide.threads) == (8, 6)


def test_a_quota_bounds_the_threads() -> None:
    assert share(Topology((tuple(range(64)),), limit=2), [active("a", 16)])["a"].threads == 2
    found = share(Topology((tuple(range(64)),), limit=2), [active("a", 16), active("b", 16)])
    assert [cores.threads for cores in found.values()] == [1, 1]


topologies = st.builds(
    lambda sizes, limit: Topology(
        tuple(tuple(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))), limit
    ),
    st.lists(st.integers(1, 16), min_size=1, max_size=4),
    st.none() | st.integers(1, 70),
)
residents = st.lists(
    st.builds(Resident, st.text("abcdefgh", min_size=1, max_size=2), st.integers(1, 20), st.booleans()),
    max_size=10,
    unique_by=lambda r: r.name,
)


@given(topologies, residents)
def test_cores_are_nobody_elses_as_long_as_there_are_enough(topology: Topology, models: list[Resident]) -> None:
    found = share(topology, models)
    busy = min(len(topology.cpus), topology.limit or len(topology.cpus))
    assert found.keys() == {model.name for model in models}
    assert all(set(cores.cpus) <= set(topology.cpus) for cores in found.values())
    computing = [model for model in models if model.active]
    for model in models:
        assert 1 <= found[model.name].threads <= max(1, min(model.threads, busy))
    if len(computing) <= busy:
        owned = [cpu for model in computing for cpu in found[model.name].cpus]
        assert len(owned) == len(set(owned))
        assert sum(found[model.name].threads for model in computing) <= busy
        threads = {model.name: found[model.name].threads for model in computing}
        for model in computing:
            assert len(found[model.name].cpus) >= threads[model.name]
            wanting = threads[model.name] < model.threads
            assert not wanting or all(threads[model.name] + 1 >= other for other in threads.values())
    assert share(topology, list(reversed(models))) == found, "the order says nothing"
