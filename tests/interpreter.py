"""Triton's interpreter, on CPU tensors, made to round and multiply bf16 as a GPU does.

As it comes it cuts bf16 off where hardware rounds to nearest even, and takes its bit patterns for numbers in a dot and beside fp16.
With that mended, bf16 is tested with the tolerances of the hardware. It still sees no races, no misalignment, no limits of memory.
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
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float16:
            source = cast(self, source, tl.float32)
        if source.dtype.scalar in (tl.float16, tl.float32) and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self, a, b, *rest):
        a, b = (
            cast(self, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand
            for operand in (a, b)
        )
        return dot(self, a, b, *rest)

    def create_fp_to_fp(self, source, target, rounding):
        return self.cast_impl(source, target)

    run = interpreter.GridExecutor.__call__

    def run_with_room(self, *args, **kwargs):
        return run(self, *args, **kwargs)

    # Python takes memory for frames in pieces of 16 KB, and at an unlucky depth of calls a new piece for every one, which costs as much
    # as all the rest. A frame that says it is larger than a piece gets one of its own, with room for those of its callees.
    run_with_room.__code__ = run_with_room.__code__.replace(co_stacksize=2**14)
    interpreter.GridExecutor.__call__ = run_with_room
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):  # Triton 3.6 makes an int of an array [1], which NumPy 2.4 refuses
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast_impl, create_dot, create_fp_to_fp
    builder.create_fp_trunc = builder.create_fp_ext = lambda self, source, target: self.cast_impl(
        source, target
    )
