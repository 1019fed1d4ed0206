"""Calling a C++ kernel with tensors: the signature is declared once, the number type picks the variant."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from lorafit.native.build import library

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "n": ctypes.c_int}


class Kernel:
    """`name` in C is followed by the number type. `signature` has a letter for each argument: p tensor or None, i int64,
    f float; the number of threads comes last of itself."""

    def __init__(self, name: str, signature: str) -> None:
        self.name = name
        self._types = [_KINDS[letter] for letter in signature + "n"]
        self._found: dict[Any, Any] = {}

    def __call__(self, dtype: torch.dtype, *args: Any) -> int:
        """Run the variant for `dtype`. MemoryError where the kernel found no memory for its scratch."""
        function = self._function(dtype)
        values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"lorafit::{self.name}"):
                return self._checked(function(*values, torch.get_num_threads()))
        return self._checked(function(*values, torch.get_num_threads()))

    def _function(self, dtype: torch.dtype) -> Any:
        lib = library()
        assert lib is not None, "asked for a kernel where there are none"
        key = (id(lib), dtype)
        if key not in self._found:
            function = getattr(lib, f"{self.name}_{_SUFFIX[dtype]}")
            function.argtypes, function.restype = self._types, ctypes.c_int
            self._found[key] = function
        return self._found[key]

    def _checked(self, code: int) -> int:
        if code != 0:
            raise MemoryError(f"no memory for the scratch of {self.name}")
        return code


def wide(x: Tensor) -> Tensor:
    """x in fp32 if its type is narrower, else as it is: what sums and exponentials are computed in."""
    return x.float() if x.dtype.itemsize < 4 else x


def usable(*tensors: Tensor) -> bool:
    """There are kernels for these tensors: on the CPU, in bf16 or fp32, all alike."""
    first = tensors[0]
    return gives(first.dtype, *tensors) and all(t.dtype == first.dtype for t in tensors)


def gives(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """There are kernels that make numbers of this type from these tensors, which are on the CPU."""
    return dtype in _SUFFIX and all(t.device.type == "cpu" for t in tensors) and library() is not None
