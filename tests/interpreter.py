"""Triton's interpreter, on CPU tensors, made to round and multiply bf16 as a GPU does.

As it comes it cuts bf16 off where hardware rounds to nearest even, and multiplies bit patterns in a dot. With both mended, bf16 is
tested with the tolerances of the hardware. It still sees no races, no misalignment and no limits of shared memory.
"""
import os

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton runs: natively, or in the interpreter."""

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it decides when a kernel is defined

from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self, a, b, *rest):
        a, b = (cast(self, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand for operand in (a, b))
        return dot(self, a, b, *rest)

    def create_fp_to_fp(self, source, target, rounding):
        return self.cast_impl(source, target)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):  # Triton 3.6 makes an int of an array [1], which NumPy 2.4 refuses
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast_impl, create_dot, create_fp_to_fp
    builder.create_fp_trunc = builder.create_fp_ext = lambda self, source, target: self.cast_impl(source, target)
