"""The committed accuracies can be had again: a recorded run, begun anew on the machine and versions it names, gives its first numbers."""
import dataclasses
from pathlib import Path

import pytest
import torch

from fastvid import results
from fastvid.config import OPTION_GROUPS, TrainConfig
from fastvid.run import Run, environment
from fastvid.train import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100  # at most, until the first evaluation
RECORDED = [run for path in sorted((ROOT / "bench" / "results").glob(f"cifar10-*/{results.FILE}")) for run in results.read(path.parent)[0]
            if run.seed == 0 and run.steps * run.history[0].epoch <= STEPS * run.config["epochs"]]


def config_of(run, **changed):
    """The settings of a result, as train takes them."""
    kinds = {field.name: type(getattr(TrainConfig(), field.name)) for field in dataclasses.fields(TrainConfig)}
    settings = {name: kinds[name](**value) if name in OPTION_GROUPS else tuple(value) if isinstance(value, list) else value
                for name, value in run.config.items()}
    return TrainConfig(**settings | changed)


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: f"{run.method}-{run.per_class}")
def test_the_first_numbers_of_a_recorded_run_come_again(run, cifar10_root, teacher_file, tmp_path, monkeypatch):
    here = environment(torch.device("cpu"))
    differs = [name for name in ("device", "torch", "python", "fastvid") if here[name] != run.environment[name]]
    seen, evaluate = [], Run.evaluate

    class Enough(Exception):
        """The first number is there."""

    def first(self, *arguments):
        evaluate(self, *arguments)
        seen.append(self.history[0])
        raise Enough

    monkeypatch.setattr(Run, "evaluate", first)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.environment["threads"])
    try:
        with pytest.raises(Enough):
            train(config_of(run, data=str(cifar10_root), teacher=str(teacher_file), out=str(tmp_path), engine=run.environment["engine"]))
    finally:
        torch.set_num_threads(threads)
    if differs:  # other bits, but the same training
        assert seen[0].task_loss == pytest.approx(run.history[0].task_loss, rel=0.2)
    else:
        assert seen == [run.history[0]]
