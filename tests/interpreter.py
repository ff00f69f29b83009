"""Triton's interpreter on CPU tensors, corrected so that it rounds and multiplies bf16 as a GPU does.

Without the corrections it truncates bf16 instead of rounding to nearest even, and reads the bit patterns of
bf16 as numbers in a dot and in a cast to fp16. With them, bf16 is tested with the tolerances of the hardware.
The interpreter cannot see races, misaligned accesses or limits of memory.
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
    """Install the corrections. Call this once, before any kernel runs."""
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

    # Python allocates memory for frames in pieces of 16 KB. At an unlucky depth every call allocates a new
    # piece, which doubles the time of a test. A frame larger than a piece gets a piece of its own, with room
    # for its callees.
    run_with_room.__code__ = run_with_room.__code__.replace(co_stacksize=2**14)
    interpreter.GridExecutor.__call__ = run_with_room
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):  # Triton 3.6 calls int() on an array [1], which NumPy 2.4 refuses
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast_impl, create_dot, create_fp_to_fp
    builder.create_fp_trunc = builder.create_fp_ext = lambda self, source, target: self.cast_impl(
        source, target
    )
