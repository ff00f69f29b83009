"""One network on its way: its learner, what it has reached so far, and its files in the output folder.

OUT/NAME.resume holds everything needed to go on and disappears when the run is done. OUT/NAME.safetensors holds the final
weights, those of the method (regressors, variances) under `method.`
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import subprocess
import time
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastvid
from fastvid import checkpoint, results
from fastvid.config import CIRCUMSTANCES, OPTION_GROUPS, TrainConfig, method_parts
from fastvid.datasets import Data
from fastvid.device import peak_memory
from fastvid.distributed import ALONE, Ranks
from fastvid.engine import GroupStep
from fastvid.errors import InputError
from fastvid.learner import Learner
from fastvid.loader import EvalLoader, describe
from fastvid.methods import build
from fastvid.progress import say
from fastvid.results import Evaluation, RunResult
from fastvid.wresnet import WideResNet

_CLOCKS = ("seconds", "preparation_seconds", "evaluation_seconds", "checkpoint_seconds")


class Run:
    """One method of one group; `config.method` is that method alone.

    position: steps done.  seconds: of training alone.  history: the learning curve so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        teacher: WideResNet | None,
        teacher_sha256: str | None,
        device: torch.device,
        engine: str = "eager",
        ranks: Ranks = ALONE,
    ):
        (self.method,) = config.method
        self.config, self.data, self.device, self.engine, self.ranks = config, data, device, engine, ranks
        self.teacher_sha256 = teacher_sha256 if config.needs_teacher else None
        self.folder, self.resume_path = Path(config.out), resume_file(config)
        self.learner = self._new_learner(teacher)
        self.position, self.history = 0, []
        self.origins = [
            {
                **{name: environment(device)[name] for name in ("commit", "device", "threads")},
                "engine": engine,
            }
        ]
        self.group = [self.method]
        self._floored: set[str] = set()
        self.seconds = self.preparation_seconds = self.evaluation_seconds = self.checkpoint_seconds = 0.0
        if self.resume_path.exists():
            self._load()

    def _new_learner(self, teacher: WideResNet | None) -> Learner:
        """Initial weights depend on the seed alone, and the regressors' on the seed and the method: not on the group."""
        config = self.config
        depth, width = config.student_depth, config.student_width
        if self.method == "teacher":
            depth, width = config.teacher_depth, config.teacher_width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = WideResNet(depth, width, len(self.data.train.class_names))
            torch.manual_seed(config.seed + zlib.crc32(self.method.encode()))
            method = build(self.method, config, network, teacher)
        return Learner(self.method, network, method, config, self.device)

    def evaluate(self, epoch: int, losses: tuple[float, float], step: GroupStep, loader: EvalLoader) -> None:
        """Add a point to the learning curve, unless it is there. `epoch`: epochs completed."""
        if self.history and self.history[-1].epoch == epoch:
            return
        started, prepared = time.perf_counter(), step.preparation_seconds
        accuracy = step.accuracy(self.learner, loader)
        preparing = step.preparation_seconds - prepared
        self.preparation_seconds += preparing
        self.evaluation_seconds += time.perf_counter() - started - preparing
        variances = {
            tap: [float(f"{x:.4g}") for x in (v.min(), v.median(), v.max())]
            for tap, v in self.learner.method.variances().items()
        }
        self.history.append(Evaluation(epoch, accuracy, *losses, variances))
        floored = self.learner.method.variances_at_their_floor()
        if floored.keys() - self._floored:
            counts = ", ".join(
                f"{count} of {len(self.learner.method.variances()[tap])} at {tap}"
                for tap, count in floored.items()
            )
            say(f"{self.method}: variances have come to their floor after epoch {epoch}: {counts}")
        self._floored |= floored.keys()

    def save(self, position: int) -> None:
        """Write the resume state after `position` steps; the first rank does it for all. What it costs is in the next one."""
        started, self.position = time.perf_counter(), position
        loss_sums = self.ranks.sum(self.learner.loss_sums)
        if not self.ranks.first:
            return
        self._require_finite(self.learner.tensors())
        history = [dataclasses.asdict(point) for point in self.history]
        checkpoint.save_state(
            self.resume_path,
            {
                "identity": identity(self.config),
                "data_sha256": self.data.sha256,
                "teacher_sha256": self.teacher_sha256,
                "versions": _versions(self.device),
                "origins": self.origins,
                "group": self.group,
                "ranks": self.ranks.world_size,
                "position": position,
                "history": history,
                "learner": {**self.learner.state(), "loss_sums": loss_sums},
                **{name: getattr(self, name) for name in _CLOCKS},
            },
        )
        self.checkpoint_seconds += time.perf_counter() - started

    def _require_finite(self, tensors: Iterable[Tensor]) -> None:
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(
                f"{self.method} diverged: its weights are not finite after step {self.position:,}; nothing of that was saved: "
                "lower its weight or --learning-rate, set --clip-norm, or leave it out"
            )

    def _load(self) -> None:
        state = checkpoint.load_state(self.resume_path)
        remedy = "give the old settings, another --out, or delete the file"
        try:
            if not isinstance(state, dict):
                raise TypeError(f"a {type(state).__name__}")
            _require_same(state["identity"], identity(self.config), self.resume_path, remedy)
            for what in ("data", "teacher"):
                if (
                    state[f"{what}_sha256"]
                    != {"data": self.data.sha256, "teacher": self.teacher_sha256}[what]
                ):
                    raise InputError(f"{self.resume_path} was made with another {what}: {remedy}")
            _require_same(
                {"ranks": state["ranks"]}, {"ranks": self.ranks.world_size}, self.resume_path, remedy
            )
            _require_same(
                state["versions"],
                _versions(self.device),
                self.resume_path,
                "install that version again, or delete the file",
            )
            (now,), self.origins = self.origins, [dict(origin) for origin in state["origins"]]
            before = self.origins[-1]
            changed = [
                f"{name} was {before[name]} and is {value}"
                for name, value in now.items()
                if before[name] != value
            ]
            if changed:
                self.origins.append(now)
                say(
                    f"{self.method} was begun elsewhere, so other bits may come of it, and its result will say so: {', '.join(changed)}"
                )
            self.learner.load_state(state["learner"])
            if not self.ranks.first:  # the sums are those of all ranks
                self.learner.loss_sums.zero_()
            self.position = state["position"]
            for name in _CLOCKS:
                setattr(self, name, float(state[name]))
            self.group = [str(name) for name in state["group"]]
            self.history = [Evaluation(**point) for point in state["history"]]
            for point in self.history:
                results.check_types(point)
            if not all(0 <= getattr(self, name) < math.inf for name in _CLOCKS):
                raise ValueError("seconds that are none")
            steps = self.config.epochs * -(-len(self.data.train) // self.config.batch_size)
            if type(self.position) is not int or not 0 <= self.position <= steps:
                raise ValueError(f"step {self.position} of {steps}")
        except InputError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            raise InputError(
                f"{self.resume_path} is no resume state of this version ({error}): delete it"
            ) from error

    def finish(self, teacher_accuracy: float | None) -> RunResult:
        """Write the final weights and the result, then drop the resume state."""
        config, data, learner, last = self.config, self.data, self.learner, self.history[-1]
        tensors = dict(learner.network.state_dict())
        tensors |= {
            checkpoint.METHOD_PREFIX + name: tensor for name, tensor in learner.method.state_dict().items()
        }
        self._require_finite(tensors.values())
        weights = self.resume_path.with_suffix(".safetensors")
        weights_sha256 = checkpoint.save_weights(
            weights,
            tensors,
            {
                "architecture": f"WRN-{learner.network.depth}-{learner.network.width}",
                "dataset": config.dataset,
                "normalisation": {"mean": data.train.mean, "std": data.train.std},
                "classes": data.train.class_names,
                "accuracy": last.accuracy,
                "evaluated_on": data.evaluated_on,
                "config": identity(config),
            },
        )
        result = RunResult(
            dataset=config.dataset,
            method=self.method,
            percent=data.percent,
            per_class=config.per_class,
            seed=config.seed,
            accuracy=last.accuracy,
            best_accuracy=max(point.accuracy for point in self.history),
            evaluated_on=data.evaluated_on,
            train_images=len(data.train),
            steps=self.position,
            seconds=self.seconds,
            images_per_second=len(data.train) * config.epochs / self.seconds,
            group=self.group,
            history=self.history,
            weights=weights.name,
            weights_sha256=weights_sha256,
            data_sha256=data.sha256,
            teacher_sha256=self.teacher_sha256,
            teacher_accuracy=teacher_accuracy if self.teacher_sha256 else None,
            config=json.loads(json.dumps(dataclasses.asdict(config))),
            environment={
                **environment(self.device),
                **{name: self._origin(name) for name in self.origins[0]},
                "loader": describe(config.loader),
                "ranks": self.ranks.world_size,
            },
            preparation_seconds=self.preparation_seconds,
            evaluation_seconds=self.evaluation_seconds,
            checkpoint_seconds=self.checkpoint_seconds,
            peak_memory=peak_memory(self.device),
        )
        results.append(self.folder, result)
        self.resume_path.unlink(missing_ok=True)
        return result

    def _origin(self, name: str) -> object:
        """Where this run was made, as its result tells: what it is, or "A, then B" where it changed on the way."""
        values = list(dict.fromkeys(origin[name] for origin in self.origins))
        return values[0] if len(values) == 1 else ", then ".join(map(str, values))


def resume_file(config: TrainConfig) -> Path:
    """Of the run of one method; its final weights lie beside it, as .safetensors."""
    (method,) = config.method
    return Path(config.out) / f"{method}-{config.per_class or 'full'}-seed{config.seed}.resume"


def find_finished(
    config: TrainConfig, data: Data, teacher_sha256: str | None, found: list[RunResult]
) -> dict[str, RunResult]:
    """Those of `found` that are runs of `config`, by method. Raises InputError when any does not belong into one table with them."""
    finished = {}
    teachers = {result.weights_sha256 for result in found if result.method == "teacher"}
    taught_by = {result.teacher_sha256 for result in found} - {None}
    remedy = "give the old teacher or another --out"
    if teacher_sha256 and (taught_by - {teacher_sha256} or teachers and teacher_sha256 not in teachers):
        raise InputError(
            f"{config.out} holds results of another teacher (SHA-256 {min(taught_by or teachers)[:12]}, now "
            f"{teacher_sha256[:12]}): {remedy}"
        )
    if config.method == ("teacher",) and taught_by - teachers:
        raise InputError(
            f"{config.out} holds students of a teacher (SHA-256 {min(taught_by - teachers)[:12]}) whose result is not there, "
            "so none is trained there: give that one as --teacher, or another --out"
        )
    for result in found:
        same_run = dataclasses.replace(
            config, method=(result.method,), per_class=result.per_class, seed=result.seed
        )
        _require_same(
            result.config,
            identity(same_run),
            f"the {result.method} run in {Path(config.out) / results.FILE}",
            "give the old settings or another --out",
        )
        version = result.environment.get("fastvid")
        if version != fastvid.__version__:
            raise InputError(
                f"{config.out} holds results of fastvid {version}, and this is {fastvid.__version__}: "
                "install that version again, or give another --out"
            )
        if result.data_sha256 != data.sha256:
            raise InputError(
                f"{config.out} holds results of another {config.dataset}, now in {config.data} there is different data: "
                "give the old data or another --out"
            )
        if (result.per_class, result.seed) == (config.per_class, config.seed):
            finished.setdefault(result.method, result)
    return finished


def identity(config: TrainConfig) -> dict:
    """The settings that make a run of one method what it is, as JSON gives them back: those of other methods and networks are left out."""
    (method,) = config.method
    idle = {*CIRCUMSTANCES, *OPTION_GROUPS} - {*method_parts(method)}
    idle |= {"student_depth", "student_width"} if method == "teacher" else set()
    idle |= {"teacher_depth", "teacher_width"} if method == "student" else set()
    settings = json.loads(json.dumps(dataclasses.asdict(config.resolved())))
    return {name: value for name, value in settings.items() if name not in idle}


def _require_same(recorded: dict, wanted: dict, what: object, remedy: str) -> None:
    for name, value in wanted.items():
        if recorded.get(name) != value:
            raise InputError(
                f"{what} was made with {name} = {recorded.get(name)}, but now it is {value}: {remedy}"
            )


def _versions(device: torch.device) -> dict:
    """What a run must not change on its way."""
    return {name: value for name, value in environment(device).items() if name in ("fastvid", "torch")}


@cache
def environment(device: torch.device) -> dict:
    """What a number depends on beside the settings."""
    on_gpu = device.type == "cuda"
    return {
        "fastvid": fastvid.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, marked when files differ from it; None outside a checkout."""
    try:
        git = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--match=",
        ]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
