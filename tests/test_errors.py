import re

from mball import errors


def every_error(root: type[errors.MballError]) -> set[str]:
    below = {cls for cls in root.__subclasses__() if cls.__module__ == errors.__name__}
    return {root.__name__}.union(*map(every_error, below))


def test_the_drawing_shows_the_whole_tree() -> None:
    drawn = set(re.findall(r"\b[A-Z][A-Za-z]+[a-z]\b(?= |$|\n)", errors.__doc__ or ""))
    classes = every_error(errors.MballError)
    assert classes <= drawn
    assert {name for name in drawn if hasattr(errors, name)} == classes


def test_a_checkpoint_error_names_file_and_tensor() -> None:
    error = errors.SizeMismatch("4 bytes, 8 wanted", file="/m/a.safetensors", tensor="w")
    assert str(error) == "/m/a.safetensors: tensor 'w': 4 bytes, 8 wanted"


def test_out_of_memory_says_the_numbers() -> None:
    error = errors.DeviceOutOfMemory("cuda:0", 3 << 30, 1 << 30, 80 << 30)
    assert str(error) == "cuda:0: 3.0 GiB wanted, 1.0 GiB free of 80.0 GiB"
