"""bench/variants.py: variants of one method share a group, one that diverges leaves the others alone."""

import pytest
import torch
import variants

from fastvid import checkpoint, results
from fastvid.config import TrainConfig, VIDOptions
from fastvid.errors import InputError
from fastvid.train import train

pytestmark = pytest.mark.slow
SHARED = {
    "device": "cpu",
    "dataset": "digits",
    "per_class": 6,
    "validation_per_class": 1,
    "batch_size": 25,
    "epochs": 2,
    "evaluations": 2,
    "teacher_depth": 10,
    "student_depth": 10,
}


def test_variants_are_trained_together_and_one_that_diverges_costs_its_own_row(
    teacher, tmp_path, monkeypatch
):
    weights = {"low": 0.1, "lost": 1e39, "high": 1.0}
    configs = {
        name: TrainConfig(method=("vid",), vid=VIDOptions(weight=weight)) for name, weight in weights.items()
    }
    monkeypatch.setitem(variants.EXPERIMENTS, "search", configs)
    for seed in (0, 1):
        variants.train("search", tmp_path / "out", teacher=teacher, seed=seed, **SHARED)
    found = {name: results.read(tmp_path / "out" / name)[0] for name in weights}
    assert [[run.seed for run in runs] for runs in found.values()] == [[0, 1]] * 3
    assert [run.diverged is not None for runs in found.values() for run in runs] == [False] * 2 + [
        True
    ] * 2 + [False] * 2
    assert found["low"][0].weights_sha256 != found["high"][0].weights_sha256
    rows = variants.show([tmp_path / "out"]).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["low", "lost", "high"]
    assert rows[1] == "| lost | diverged (2) |" and rows[0].endswith(" (2) |")
    monkeypatch.setattr(variants, "fit", lambda *_, **__: pytest.fail("all of it is finished"))
    variants.train("search", tmp_path / "out", teacher=teacher, seed=0, **SHARED)


def test_a_variant_has_the_bits_of_the_same_run_by_the_command(teacher, tmp_path):
    variants.train("ablations", tmp_path / "a", ("vid-weight-30",), teacher=teacher, **SHARED)
    (alone,) = train(TrainConfig(**SHARED, method=("vid",), teacher=teacher, out=str(tmp_path / "b")))
    (beside,), _ = results.read(tmp_path / "a" / "vid-weight-30")
    assert beside.weights_sha256 == alone.weights_sha256 and beside.history == alone.history


def test_an_ablation_changes_what_its_name_says(teacher, tmp_path):
    names = ("only-stem", "no-batch-norm", "narrow", "two-hidden-layers", "linear")
    chosen = tuple(f"vid-{name}-weight-30" for name in names)
    variants.train("ablations", tmp_path / "out", chosen, teacher=teacher, **SHARED)
    variants.train("vid-or-fitnet", tmp_path / "out", ("vid-fixed-0.3-",), teacher=teacher, **SHARED)
    found, prefix = {}, "method.transfers.vid.loss."
    for name in (*names, "fixed-0.3"):
        (path,) = (tmp_path / "out" / f"vid-{name}-weight-30").glob("*.safetensors")
        tensors = checkpoint.load_weights(path).tensors
        found[name] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
    assert {key.split(".")[1] for key in found["only-stem"]} == {"0"}
    assert not any("running_mean" in key for key in found["no-batch-norm"])
    assert found["narrow"]["regressors.1.hidden.0.weight"].shape[0] == 32
    assert "regressors.1.hidden.3.weight" in found["two-hidden-layers"]
    assert {key for key in found["linear"] if ".1." in key} == {
        "regressors.1.last.weight",
        "regressors.1.last.bias",
    }
    fixed = torch.nn.functional.softplus(found["fixed-0.3"]["raw_scales.0"])
    torch.testing.assert_close(fixed, torch.full((16,), 0.3))


def test_an_unknown_variant_is_named_with_the_choices(tmp_path):
    with pytest.raises(InputError, match="search has no variant vid-papre...: choose from kd-alpha-0.5, "):
        variants.train("search", tmp_path / "out", ("kd", "vid-papre"), **SHARED)
