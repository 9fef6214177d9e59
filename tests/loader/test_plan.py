import torch
from hypothesis import given
from hypothesis import strategies as st

from mball.loader.plan import Cast, Chunk, Extent, Runs, aligned, chunked, grouped, uncovered

CAST = Cast(torch.float32, torch.bfloat16)


@st.composite
def _extents(draw: st.DrawFn) -> list[Extent]:
    """Disjoint extents of several shards, some neighbours, some cast, in any order."""
    extents, offset = [], 0
    for shard in range(draw(st.integers(1, 3))):
        start = draw(st.integers(8, 100))
        for _ in range(draw(st.integers(0, 6))):
            start += draw(st.sampled_from([0, 0, 5]))
            nbytes = 4 * draw(st.integers(0, 60))
            cast = draw(st.sampled_from([None, None, CAST]))
            extents.append(Extent(shard, start, nbytes, offset, cast))
            start += nbytes
            offset += nbytes + draw(st.sampled_from([0, 0, 64]))
    return draw(st.permutations(extents))


def _bytes(extents: list[Extent]) -> dict[tuple[int, int], tuple[float, Cast | None]]:
    """Where each byte goes."""
    return {
        (extent.shard, extent.start + at): (extent.offset + (at / 2 if extent.cast else at), extent.cast)
        for extent in extents
        for at in range(extent.nbytes)
    }


@given(_extents())
def test_every_byte_goes_where_it_was_to_go_in_the_order_of_the_files(extents: list[Extent]) -> None:
    chunks = chunked(extents, chunk_bytes=64)
    assert _bytes(chunks) == _bytes(extents)
    assert sum(chunk.nbytes for chunk in chunks) == sum(extent.nbytes for extent in extents)
    assert all(0 < chunk.nbytes <= 64 for chunk in chunks)
    assert chunks == sorted(chunks, key=lambda chunk: (chunk.shard, chunk.start))


def test_neighbours_in_file_and_memory_are_one_read() -> None:
    extents = [Extent(0, 100 + 10 * number, 10, 10 * number) for number in range(20)]
    assert chunked(extents, chunk_bytes=160) == [Extent(0, 100, 160, 0), Extent(0, 260, 40, 160)]


def test_what_is_not_a_neighbour_is_not_joined() -> None:
    for other in (Extent(1, 110, 10, 10), Extent(0, 111, 10, 10), Extent(0, 110, 10, 11), Extent(0, 110, 8, 10, CAST)):
        assert len(chunked([Extent(0, 100, 10, 0), other])) == 2


def test_a_cast_extent_is_split_in_both_measures() -> None:
    assert chunked([Extent(0, 8, 48, 0, CAST)], chunk_bytes=32) == [
        Extent(0, 8, 32, 0, CAST),
        Extent(0, 40, 16, 16, CAST),
    ]


def test_aligned() -> None:
    assert [aligned(offset) for offset in (0, 1, 64, 65)] == [0, 64, 64, 128]


@given(_extents(), st.lists(st.integers(0, 20_000), min_size=3, max_size=3))
def test_chunks_hold_every_byte_once_and_keep_to_the_grid(extents: list[Extent], shifts: list[int]) -> None:
    chunks = list(grouped(extents, 64, shifts))
    assert _bytes([extent for chunk in chunks for extent in chunk.extents]) == _bytes(extents)
    for chunk in chunks:
        assert chunk.nbytes == sum(extent.nbytes for extent in chunk.extents)
        at = chunk.start
        for extent in chunk.extents:
            assert (extent.shard, extent.start) == (chunk.shard, at)
            at += extent.nbytes
        if chunk.plain:
            position = chunk.start + shifts[chunk.shard]
            assert position // 64 == (position + chunk.nbytes - 1) // 64
        else:
            assert len(chunk.extents) == 1
            assert chunk.nbytes <= 32


def test_neighbours_in_the_file_are_one_read_and_where_they_end_together_one_copy() -> None:
    extents = [Extent(0, 0, 10, 0), Extent(0, 10, 10, 10), Extent(0, 20, 10, 64)]
    assert list(grouped(extents, 8192)) == [Chunk(0, 0, 30, (Extent(0, 0, 20, 0), Extent(0, 20, 10, 64)))]


def test_runs_are_split_between_runs() -> None:
    extent = Extent(0, 100, 60, 1000, runs=Runs(6, 24))
    parts = [chunk.extents[0] for chunk in grouped([extent], 32)]
    assert [(part.start, part.nbytes, part.offset) for part in parts[:2]] == [(100, 12, 1000), (148, 12, 1012)]
    assert sum(part.nbytes for part in parts) == 60


def test_what_is_not_read() -> None:
    extents = [Extent(0, 20, 10, 0), Extent(0, 25, 10, 0), Extent(0, 50, 10, 0)]
    assert uncovered(extents, 10, 70) == [(10, 10), (35, 15), (60, 10)]
    assert uncovered([Extent(0, 10, 60, 0)], 10, 70) == []
    assert uncovered([], 10, 70) == [(10, 60)]
