"""fastvid: Variational Information Distillation and the methods it is compared with, fast.

The names below are imported on first use, so that `import fastvid` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "VIDLoss": "fastvid.methods.vid",
    "ATLoss": "fastvid.methods.at",
    "KDLoss": "fastvid.methods.kd",
    "FitNetLoss": "fastvid.methods.fitnet",
    "WideResNet": "fastvid.wresnet",
    "InputError": "fastvid.errors",
}
_MODULES = ("datasets", "kernels", "loader", "plan", "train")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"fastvid.{name}")
    raise AttributeError(f"module 'fastvid' has no attribute {name!r}")
