import torch
from safetensors.torch import _SIZE, _TYPES

from mball.loader.dtypes import SAFETENSORS, TORCH, torch_shape
from mball.loader.header import BITS


def test_names_and_sizes_are_the_librarys() -> None:
    for name, dtype in _TYPES.items():
        assert TORCH[name] is dtype
        assert BITS[name] == 8 * _SIZE[dtype]


def test_every_torch_dtype_has_one_name_and_its_size() -> None:
    for name, dtype in TORCH.items():
        assert SAFETENSORS[dtype] == name
        assert torch.empty(0, dtype=dtype).element_size() * 8 == max(BITS[name], 8)


def test_four_bit_floats_are_two_a_byte() -> None:
    assert torch_shape("F4", (3, 8)) == (3, 4)
    assert torch_shape("F4", ()) == ()
    assert torch_shape("U8", (3, 8)) == (3, 8)
