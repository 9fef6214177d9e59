"""What torch makes of the dtypes of safetensors."""

from __future__ import annotations

import torch

TORCH: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""What torch can hold; the six-bit floats have no torch dtype."""

SAFETENSORS: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives a tensor of a header: F4 is two elements a byte along the last dimension."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" and shape else shape
