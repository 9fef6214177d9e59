import pytest
from hypothesis import given
from hypothesis import strategies as st

from mball.units import GiB, MiB, format_bytes, format_rate, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("17", 17),
        ("1.5GiB", 3 * GiB // 2),
        ("512 MiB", 512 * MiB),
        ("2gb", 2 * 10**9),
        (" 4kib ", 4096),
        (42, 42),
    ],
)
def test_parse(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.2GiB", "3XB", "GiB", -1, True, None, 1.5, "1e9"])
def test_refused(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.integers(min_value=0, max_value=1 << 60))
def test_bytes_as_text_are_read_back_exactly(count: int) -> None:
    assert parse_bytes(str(count)) == count


@given(st.integers(min_value=0, max_value=1 << 50))
def test_what_is_shown_is_near(count: int) -> None:
    shown = parse_bytes(format_bytes(count).replace(" ", ""))
    assert abs(shown - count) <= max(0.06 * count, 0.5)


def test_rate() -> None:
    assert format_rate(3 * GiB, 2.0) == "1.50 GiB/s"
    assert format_rate(1, 0.0) == "– GiB/s"
