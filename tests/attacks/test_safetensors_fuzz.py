"""Mutated headers, given to us and to the safetensors library: we accept nothing that it refuses, and refuse more
only for the three listed reasons."""

import json
import random
from collections import Counter

import pytest

from mball.errors import DuplicateName, HeaderError, HeaderStart, UnknownField
from mball.loader import header
from tests.loader.files import entry, library_accepts

LISTED = (DuplicateName, HeaderStart, UnknownField)
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"-0", b"1", b"-1", b"4", b"1.0", b"1e3", b"NaN", b"null", b"true",
    b" ", b"\n", b"\x00", b"\xff", b"\\", b"\\u0061", b"\\ud800", b"\xef\xbb\xbf", b"dtype", b"shape", b"data_offsets",
    b"__metadata__", b"F32", b"F4", b"U8", b"18446744073709551615", b"18446744073709551616", b"9223372036854775808",
    b'"a"', b'"b"', b"[0,0]", b"{}", b"[]",
]  # fmt: skip


def seeds(rng: random.Random) -> tuple[bytes, int]:
    """A right header and the bytes of data it describes."""
    dtypes = [("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8), ("F8_E4M3", 1), ("BOOL", 1), ("C64", 8)]
    tensors: dict[str, object] = {}
    if rng.random() < 0.3:
        tensors["__metadata__"] = rng.choice([{"format": "pt"}, {}, None])
    at = 0
    for name in rng.sample(["a", "b", "c.weight", "é", "0"], rng.randrange(4)):
        dtype, size = rng.choice(dtypes)
        shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
        nbytes = size
        for count in shape:
            nbytes *= count
        tensors[name] = entry(dtype, shape, at, at + nbytes)
        at += nbytes
    names = list(tensors)
    rng.shuffle(names)
    text = json.dumps({name: tensors[name] for name in names}, separators=rng.choice([(",", ":"), (", ", ": ")]))
    return text.encode() + b" " * rng.choice([0, 0, 1, 7]), at


def mutate(raw: bytes, rng: random.Random) -> bytes:
    at, upto = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    upto = min(upto, at + rng.choice([1, 1, 1, 4, 40]))
    match rng.randrange(6):
        case 0:
            return raw[:at] + rng.choice(TOKENS) + raw[at:]
        case 1:
            return raw[:at] + raw[upto:]
        case 2:
            return raw[:at] + rng.choice(TOKENS) + raw[upto:]
        case 3:
            return raw[:at] + raw[at:upto] + raw[at:]
        case 4:
            old, new = rng.choice(TOKENS), rng.choice(TOKENS)
            return raw.replace(old, new, 1)
        case _:
            return _mutate_value(raw, rng)


def _mutate_value(raw: bytes, rng: random.Random) -> bytes:
    """Change one value inside valid JSON, so that the deeper checks are reached."""
    try:
        top = json.loads(raw)
    except ValueError:
        return raw
    if not isinstance(top, dict) or not top:
        return raw
    name = rng.choice(list(top))
    values: list[object] = [0, 1, 4, -1, 2**63, 2**64 - 1, 2**64, 1.0, None, True, "F32", "F4", [], {}, [0, 0], [0, 4]]
    if isinstance(top[name], dict) and top[name] and rng.random() < 0.9:
        field = rng.choice(list(top[name]))
        inner = top[name][field]
        if isinstance(inner, list) and inner and rng.random() < 0.7:
            inner[rng.randrange(len(inner))] = rng.choice(values)
        else:
            top[name][field] = rng.choice(values)
    else:
        top[name] = rng.choice(values)
    return json.dumps(top).encode()


def _defect(content: bytes) -> HeaderError | None:
    try:
        length = header.header_length(content[:8], len(content), "fuzz")
        header.parse(content[8 : 8 + length], len(content), "fuzz")
    except HeaderError as error:
        return error
    return None


def compare(count: int, seed: int) -> Counter[str]:
    """What became of `count` mutated headers; fails at the first on which we are wrong."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(count):
        raw, data_bytes = seeds(rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            raw = mutate(raw, rng)
        data_bytes = max(0, data_bytes + rng.choice([0] * 12 + [-1, 1, 4]))
        content = len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)
        theirs, error = library_accepts(content), _defect(content)
        if error is None:
            assert theirs, f"accepted what the library refuses: {content!r}"
            seen["accepted"] += 1
        else:
            assert not theirs or isinstance(error, LISTED), f"refused for an unlisted reason: {error}: {content!r}"
            seen[f"{type(error).__name__}{' (more)' if theirs else ''}"] += 1
    return seen


def test_two_thousand_mutated_headers() -> None:
    seen = compare(2_000, seed=1)
    assert seen["accepted"] > 200, seen
    assert len(seen) > 8, seen


@pytest.mark.benchmark
def test_a_hundred_thousand_mutated_headers() -> None:
    seen = compare(100_000, seed=2)
    assert seen["accepted"] > 10_000, seen
    defects = {error.__name__ for error in HeaderError.__subclasses__()} - {"HeaderTooShort", "HeaderTooLarge"}
    assert defects <= {name.split()[0] for name in seen}, seen
