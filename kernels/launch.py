"""The old place of `triton`: bench/clock.py and bench/conftest.py still import it from here."""

from fastvid.kernels.triton_support import triton  # noqa: F401
