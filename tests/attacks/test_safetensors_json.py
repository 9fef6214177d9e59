"""Headers that are not the JSON the format wants."""

import pytest

from mball.errors import BadMetadata, DuplicateName, HeaderError, HeaderJson, HeaderStart, UnknownField
from mball.loader import header
from tests.loader.files import file_bytes, library_accepts

A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def parse(text: str | bytes) -> header.Header:
    raw = text if isinstance(text, bytes) else text.encode()
    return header.parse(raw, 8 + len(raw) + 4, "m")


@pytest.mark.parametrize("text", [" {%s}", "\n{%s}", "\ufeff{%s}", "[{%s}]", '"{%s}"', "x{%s}", "null"])
def test_another_first_byte(text: str) -> None:
    with pytest.raises(HeaderStart):
        parse(text.replace("%s", A))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}}",
        "{%s,}",
        "{%s}\0",
        "{'a':1}",
        '{"a":1}',
        '{"a":"x"}',
        '{"a":null}',
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__":{"k":"\\udfff"},%s}',
        '{"__metadata__":{"\\udfff":"v"},%s}',
        '{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":' * 100_000,
        '{"a":' + "[" * 100_000,
        '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}',
    ],
)
def test_not_json(text: str) -> None:
    text = text.replace("%s", A)
    assert not library_accepts(file_bytes(text, bytes(4)))
    with pytest.raises(HeaderJson):
        parse(text)


@pytest.mark.parametrize("raw", [b'{"\xff":1}', b'{"\xed\xa0\x80":1}', b'{"\xc0\xaf":1}'])
def test_not_utf8(raw: bytes) -> None:
    assert not library_accepts(file_bytes(raw, bytes(4)))
    with pytest.raises(HeaderJson, match="UTF-8"):
        parse(raw)


@pytest.mark.parametrize(
    "text",
    [
        "{%s,%s}",
        '{%s,"\\u0061":{}}',
        '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"__metadata__":{"k":"1","k":"2"},%s}',
        '{"__metadata__":{},"__metadata__":{},%s}',
    ],
)
def test_a_name_that_stands_twice(text: str) -> None:
    with pytest.raises(DuplicateName, match="stands twice"):
        parse(text.replace("%s", A))


@pytest.mark.parametrize(
    "metadata", ["1", '"x"', "[]", "true", '{"k":1}', '{"k":null}', '{"k":{"x":"y"}}', '{"k":["x"]}']
)
def test_metadata_other_than_text(metadata: str) -> None:
    text = f'{{"__metadata__":{metadata},{A}}}'
    assert not library_accepts(file_bytes(text, bytes(4)))
    with pytest.raises(BadMetadata):
        parse(text)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F32","shape":[1],"data_offsets":[0,4],"strides":[1]}',
        '{"dtype":"F32","shape":[1]}',
        '{"dtype":"F32","data_offsets":[0,4]}',
        '{"Dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        "{}",
        '["F32",[1],[0,4]]',
        '{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}',
    ],
)
def test_fields_other_than_the_three(entry: str) -> None:
    with pytest.raises(UnknownField, match="'a'"):
        parse(f'{{"a":{entry}}}')


def test_what_is_odd_but_right_is_accepted() -> None:
    for text in (
        '{"__metadata__":null,%s}   \n',
        '{"__metadata__":{},%s}',
        "{ \t\r\n%s }",
        '{"\\ud83d\\ude00":{}, %s}',
    ):
        text = text.replace('"\\ud83d\\ude00":{}', '"\\ud83d\\ude00":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}')
        text = text.replace("%s", A)
        assert library_accepts(file_bytes(text, bytes(4)))
        assert parse(text).tensors["a"].shape == (1,)


def test_every_defect_is_one_of_the_header_errors() -> None:
    for error in (HeaderStart, HeaderJson, DuplicateName, BadMetadata, UnknownField):
        assert issubclass(error, HeaderError)
