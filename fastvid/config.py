"""Every setting with its default and its meaning, defined only here.

The command line is derived from these fields, and each result records all of them. This module imports
neither torch nor NumPy, so that `fastvid --help` is instant.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fastvid.datasets import DATASETS, find
from fastvid.errors import InputError

if TYPE_CHECKING:
    DatasetName = str
else:
    DatasetName = Literal[tuple(DATASETS)]  # the command line takes its choices from here


@dataclass(frozen=True)
class Protocol:
    """Length of a run in epochs, images per batch, and the largest number of evaluations."""

    teacher_epochs: int
    full_epochs: int
    reduced_epochs: int
    batch_size: int
    evaluations: int


PROTOCOLS = {
    # the protocol of the figure that the seed repository published
    "seed": Protocol(200, full_epochs=200, reduced_epochs=1000, batch_size=128, evaluations=50),
    # Minutes on digits. The teacher's epochs were chosen on a validation split of the training images.
    "quick": Protocol(8, full_epochs=5, reduced_epochs=40, batch_size=32, evaluations=5),
}


TAPS = ("stem", "group1", "group2", "group3")
"""The maps of a Wide ResNet that methods compare."""


@dataclass(frozen=True)
class KDOptions:
    """Softened logits (Hinton et al. 2015)."""

    alpha: float = 0.9
    """weight of the softened KL divergence; the cross entropy has weight 1 - alpha"""
    temperature: float = 4.0
    """temperature of both softmaxes"""


@dataclass(frozen=True)
class FitNetOptions:
    """Hints (Romero et al., ICLR 2015)."""

    weight: float = 100.0
    """weight of the mean squared error at the hint"""
    tap: tuple[str, ...] = ("group2",)
    """teacher maps used as hints: stem, group1, group2, group3, a list with commas, or all"""
    schedule: Literal["joint", "two-stage"] = "joint"
    """joint: hints and cross entropy together; two-stage: first the hints, then the cross entropy"""
    hint_share: float = 0.2
    """two-stage only: share of the epochs that train on the hints alone"""

    def __post_init__(self) -> None:
        if isinstance(self.tap, str):
            object.__setattr__(self, "tap", tuple(self.tap.split(",")))


@dataclass(frozen=True)
class ATOptions:
    """Attention maps (Zagoruyko and Komodakis, ICLR 2017)."""

    weight: float = 1000.0
    """weight of the summed attention-map losses of groups 1, 2, 3"""


_INTERVAL = re.compile(r"(?P<minutes>\d{1,9}(\.\d{1,9})?)min|(?P<epochs>[1-9]\d{0,8})epochs?")

VID_WEIGHTS = {  # λ: weight of the sum over taps; the loss of each tap is a mean over elements
    "paper": 30.0,  # chosen on held-out training images (bench/results): the paper states no weight
    "authors": 30.0,  # chosen in the same way
    "repdistiller": 1.0,  # the value in RepDistiller
}


@dataclass(frozen=True)
class VIDOptions:
    """Variational information (Ahn et al., CVPR 2019)."""

    variant: Literal["paper", "authors", "repdistiller"] = "paper"
    """regressors, taps and constants; fastvid.methods.vid.VARIANTS lists them"""
    weight: float | None = None
    """weight of the negative log-likelihoods (default: 30 for paper and authors, 1 for repdistiller)"""

    def resolved(self) -> VIDOptions:
        """These options with the weight of the variant filled in."""
        if self.weight is not None:
            return self
        return dataclasses.replace(self, weight=VID_WEIGHTS[self.variant])


@dataclass(frozen=True)
class TrainConfig:
    """One group of runs: one teacher, one subset, one seed, and any set of methods."""

    dataset: DatasetName = "cifar10"
    """the data set"""
    data: str = "data"
    """folder that holds the data set (digits needs none)"""
    download: bool = False
    """download missing CIFAR files through torchvision"""
    method: tuple[str, ...] = ("student",)
    """teacher, student, kd, fitnet, at, vid, a sum such as kd+vid, or a list with commas"""
    teacher: str | None = None
    """teacher weights: a .safetensors file, or a .pth file as RepDistiller writes it"""
    teacher_depth: int = 40
    """layers of the teacher's Wide ResNet, 6n+4"""
    teacher_width: int = 2
    """width factor of the teacher"""
    student_depth: int = 16
    """layers of the student's Wide ResNet, 6n+4"""
    student_width: int = 1
    """width factor of the student"""
    per_class: int | None = None
    """train on the first N images of each class (default: on all)"""
    validation_per_class: int = 0
    """hold out the last N images of each class of that subset; evaluate on them, not on the test split"""
    seed: int = 0
    """random seed for weights, batch order and augmentation"""
    protocol: Literal["seed", "quick"] | None = None
    """number of epochs and batch size; seed: 200 epochs for the teacher and on the full data set, 1000 on
    a subset; quick: a few epochs, for digits (default: depends on the data set)"""
    epochs: int | None = None
    """number of epochs (overrides --protocol)"""
    batch_size: int | None = None
    """images per step (overrides --protocol)"""
    learning_rate: float = 0.1
    """learning rate of SGD; multiplied by lr_decay at each milestone"""
    lr_decay: float = 0.2
    """factor on the learning rate at each milestone"""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """shares of the training after which the learning rate drops"""
    momentum: float = 0.9
    """Nesterov momentum"""
    weight_decay: float = 5e-4
    """weight decay of every parameter that the method does not exempt"""
    clip_norm: float = 0.0
    """largest gradient norm of a student and its regressors; 0: no clipping"""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """compute type of autocast; fp16 scales the loss, fp32 does not change torch's TF32 settings"""
    evaluations: int | None = None
    """largest number of evaluations per run, evenly spread and always after the last epoch (default: 50, or
    5 with protocol quick)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """library that executes the batch plan; both give the same batches. auto: dali if it is installed"""
    engine: Literal["auto", "eager", "compile", "graph"] = "auto"
    """execution mode: eager, torch.compile, or one CUDA graph; results agree up to rounding. auto: graph on
    a GPU, compile for long runs on a CPU, else eager"""
    profile: bool = False
    """before training, profile a few steps: OUT/profile.txt is a table, OUT/profile.json is a trace"""
    checkpoint_every: str = "5min"
    """interval between saves of the resume state: minutes, such as 5min, or epochs, such as 10epochs"""
    out: str = "runs"
    """folder for results, weights and resume state"""
    kd: KDOptions = field(default_factory=KDOptions)
    fitnet: FitNetOptions = field(default_factory=FitNetOptions)
    at: ATOptions = field(default_factory=ATOptions)
    vid: VIDOptions = field(default_factory=VIDOptions)

    def __post_init__(self) -> None:
        _require_methods("method", self.method)
        alone = "teacher" not in self.method or len(self.method) == 1
        _require(alone, "method", ",".join(self.method), "the teacher alone")
        at_least = dict.fromkeys(("per_class", "epochs", "batch_size", "evaluations"), 1)
        for name, least in (at_least | {"validation_per_class": 0, "seed": 0}).items():
            value = getattr(self, name)
            _require(value is None or value >= least, name, value, f"{least} or more")
        for network in ("teacher", "student"):
            depth, width = getattr(self, f"{network}_depth"), getattr(self, f"{network}_width")
            valid = depth >= 10 and (depth - 4) % 6 == 0
            _require(valid, f"{network}_depth", depth, "6n + 4, such as 10, 16, 22, 28 or 40")
            _require(width >= 1, f"{network}_width", width, "1 or more")
        _require(self.seed < 2**63, "seed", self.seed, "less than 2**63")
        for prefix, options in (("", self), *((f"{name}_", getattr(self, name)) for name in OPTION_GROUPS)):
            for entry in dataclasses.fields(options):
                value = getattr(options, entry.name)
                valid = not isinstance(value, float) or 0 <= value < float("inf")
                _require(valid, prefix + entry.name, value, "a finite number that is not negative")
        valid = all(0 < milestone < 1 for milestone in self.milestones)
        _require(valid, "milestones", self.milestones, "shares between 0 and 1")
        _require(self.kd.temperature > 0, "kd_temperature", self.kd.temperature, "more than 0")
        _require(self.kd.alpha <= 1, "kd_alpha", self.kd.alpha, "at most 1")
        taps = self.fitnet.tap
        valid = taps == ("all",) or 0 < len(set(taps)) == len(taps) == len(set(taps) & set(TAPS))
        wanted = f"all, or one or more of {', '.join(TAPS)}, each once"
        _require(valid, "fitnet_tap", ",".join(taps), wanted)
        share, interval = self.fitnet.hint_share, self.checkpoint_every
        _require(0 < share < 1, "fitnet_hint_share", share, "a share between 0 and 1")
        wanted = "minutes or epochs, such as 5min or 10epochs"
        _require(_INTERVAL.fullmatch(interval), "checkpoint_every", interval, wanted)

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds after which the resume state is saved again; infinite if checkpoint_every counts epochs."""
        minutes = _INTERVAL.fullmatch(self.checkpoint_every)["minutes"]
        return 60 * float(minutes) if minutes else float("inf")

    @property
    def checkpoint_epochs(self) -> int | None:
        """Epochs after which the resume state is saved again; None if checkpoint_every counts minutes."""
        epochs = _INTERVAL.fullmatch(self.checkpoint_every)["epochs"]
        return int(epochs) if epochs else None

    @property
    def needs_teacher(self) -> bool:
        return any(method not in ("teacher", "student") for method in self.method)

    def resolved(self) -> TrainConfig:
        """This configuration, with every default filled in that depends on other settings."""
        name = self.protocol or find(self.dataset).protocol
        chosen = PROTOCOLS[name]
        epochs = chosen.full_epochs if self.per_class is None else chosen.reduced_epochs
        if self.method == ("teacher",):
            epochs = chosen.teacher_epochs
        epochs = self.epochs or epochs
        two_stage = self.fitnet.schedule == "two-stage"
        if two_stage and any("fitnet" in method_parts(method) for method in self.method):
            share = self.fitnet.hint_share
            wanted = f"a share that leaves one of the {epochs} epochs to the labels"
            _require(share <= (epochs - 1) / epochs, "fitnet_hint_share", share, wanted)
        return dataclasses.replace(
            self,
            protocol=name,
            epochs=epochs,
            batch_size=self.batch_size or chosen.batch_size,
            evaluations=self.evaluations or chosen.evaluations,
            vid=self.vid.resolved(),
        )


@dataclass(frozen=True)
class Grid:
    """The table: methods x fractions x seeds."""

    methods: tuple[str, ...] = ("student", "kd", "fitnet", "at", "vid")
    """rows: teacher, student, kd, fitnet, at, vid, sums such as kd+at; without --teacher, a teacher is
    trained too if a method needs one"""
    fractions: tuple[str, ...] | None = None
    """columns: full, or percent of each class (default: full,20,10,2, and full,5 for digits)"""
    seeds: int = 3
    """runs per cell, with seeds 0 .. N-1"""

    def __post_init__(self) -> None:
        _require_methods("methods", self.methods)
        _require(self.seeds >= 1, "seeds", self.seeds, "1 or more")
        fractions = self.fractions or ()
        valid = all(map(_is_fraction, fractions)) and len(set(fractions)) == len(fractions)
        wanted = "full or percents between 0 and 100, each once, such as full,20,10,2"
        _require(valid, "fractions", ",".join(fractions), wanted)

    def fractions_of(self, dataset: str) -> tuple[str, ...]:
        return self.fractions or find(dataset).fractions


OPTION_GROUPS = tuple(
    f.name for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING
)
"""Names of the transfer terms. Each term has its options in TrainConfig and its class in methods.METHODS."""

CIRCUMSTANCES = ("data", "download", "teacher", "out", "profile", "checkpoint_every")
CIRCUMSTANCES += ("device", "loader", "engine")
"""Settings that do not define a run, only where and how it executes. They may differ within one table."""


def method_parts(name: str) -> tuple[str, ...]:
    """Transfer terms of a method: () for teacher and student, ("kd", "at") for kd+at. Raises InputError."""
    if name in ("teacher", "student"):
        return ()
    parts = tuple(name.split("+"))
    order = [part for part in OPTION_GROUPS if part in parts]
    if list(parts) != order:
        known = ", ".join(("teacher", "student", *OPTION_GROUPS))
        if sorted(parts) == sorted(order):
            raise InputError(f"unknown method {name!r}: write it {'+'.join(order)!r}")
        raise InputError(f"unknown method {name!r}: choose from {known}, or a sum such as kd+at or kd+vid")
    return parts


def _require_methods(name: str, methods: tuple[str, ...]) -> None:
    _require(len(set(methods)) == len(methods) > 0, name, ",".join(methods), "one or more methods, each once")
    for method in methods:
        method_parts(method)


def _is_fraction(text: str) -> bool:
    try:
        return text == "full" or 0 < float(text) < 100
    except ValueError:
        return False


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} is {value}, wanted {wanted}")
