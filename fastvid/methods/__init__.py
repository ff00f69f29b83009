"""The transfer terms by name.

A new transfer term needs a file with its class, its options in TrainConfig, and one line here.
"""

from fastvid.config import TrainConfig, method_parts
from fastvid.methods.at import AttentionTransfer
from fastvid.methods.base import Method, Terms, Transfer
from fastvid.methods.fitnet import Hint
from fastvid.methods.kd import SoftenedLogits
from fastvid.methods.vid import VariationalInformation
from fastvid.wresnet import WideResNet

__all__ = ["METHODS", "Method", "Terms", "Transfer", "build"]

METHODS: dict[str, type[Transfer]] = {
    "kd": SoftenedLogits,
    "fitnet": Hint,
    "at": AttentionTransfer,
    "vid": VariationalInformation,
}


def build(name: str, config: TrainConfig, student: WideResNet, teacher: WideResNet | None) -> Method:
    """The method `name`: student, teacher, a key of METHODS, or a sum such as kd+vid. Raises InputError."""
    parts = method_parts(name)
    return Method({part: METHODS[part](getattr(config, part), student, teacher) for part in parts})
