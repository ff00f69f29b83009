"""bench/variants.py: shared groups, variants that diverge without effect on the others, fixed variances."""

import dataclasses

import pytest
import torch
import variants as variants_module

from fastvid import checkpoint, results
from fastvid.config import TrainConfig, VIDOptions
from fastvid.errors import InputError
from fastvid.methods import vid
from fastvid.train import train

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


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.setattr(vid, "VARIANTS", dict(vid.VARIANTS))
    return variants_module


def test_variants_are_trained_side_by_side_and_one_that_diverges_is_left_out(
    variants, teacher, tmp_path, monkeypatch
):
    weights = {"low": 0.1, "lost": 1e39, "high": 1.0}
    configs = {
        name: TrainConfig(method=("vid",), vid=VIDOptions(weight=weight)) for name, weight in weights.items()
    }
    monkeypatch.setitem(variants.EXPERIMENTS, "search", configs)
    for seed in (0, 1):
        variants.train("search", tmp_path / "out", teacher=teacher, seed=seed, **SHARED)
    found = {name: results.read(tmp_path / "out" / name)[0] for name in ("low", "high")}
    assert [[run.seed for run in runs] for runs in found.values()] == [[0, 1], [0, 1]]
    assert found["low"][0].weights_sha256 != found["high"][0].weights_sha256
    assert "vid diverged in step 1" in (tmp_path / "out" / "lost.diverged-seed1").read_text()
    rows = variants.show([tmp_path / "out"]).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["low", "lost", "high"]
    assert rows[1] == "| lost | diverged (2) |" and rows[0].endswith(" (2) |")
    monkeypatch.setattr(variants, "train_side_by_side", lambda *_: pytest.fail("all of it is finished"))
    variants.train("search", tmp_path / "out", teacher=teacher, seed=0, **SHARED)


def test_a_variant_has_the_bits_of_the_same_run_by_the_command(variants, teacher, tmp_path):
    variants.train("ablations", tmp_path / "a", ("vid-paper", "vid-repd"), teacher=teacher, **SHARED)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"vid-paper", "vid-repdistiller"}
    (alone,) = train(TrainConfig(**SHARED, method=("vid",), teacher=teacher, out=str(tmp_path / "b")))
    (beside,), _ = results.read(tmp_path / "a" / "vid-paper")
    assert beside.weights_sha256 == alone.weights_sha256 and beside.history == alone.history


def test_an_ablation_changes_what_its_name_says(variants, teacher, tmp_path):
    names = ("only-stem", "no-batch-norm", "narrow", "one-hidden-layer", "linear", "fixed-variance-1")
    chosen = tuple(f"vid-{name}-weight-10" for name in names)
    variants.train("ablations", tmp_path / "out", chosen, teacher=teacher, **SHARED)
    shapes, prefix = {}, "method.transfers.vid.loss."
    for name in chosen:
        (path,) = (tmp_path / "out" / name).glob("*.safetensors")
        tensors = checkpoint.load_weights(path).tensors
        shapes[name] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
    assert {key.split(".")[1] for key in shapes["vid-only-stem-weight-10"]} == {"0"}
    assert not any("running_mean" in key for key in shapes["vid-no-batch-norm-weight-10"])
    assert shapes["vid-narrow-weight-10"]["regressors.1.hidden.0.weight"].shape[0] == 32
    assert "regressors.1.hidden.3.weight" not in shapes["vid-one-hidden-layer-weight-10"]
    assert {key for key in shapes["vid-linear-weight-10"] if ".1." in key} == {
        "regressors.1.last.weight",
        "regressors.1.last.bias",
    }
    fixed = torch.nn.functional.softplus(shapes["vid-fixed-variance-1-weight-10"]["raw_scales.0"]) + 1 / 16
    torch.testing.assert_close(fixed, torch.ones(16))


def test_a_variant_that_is_none_is_named_with_the_choice(variants, tmp_path):
    with pytest.raises(InputError, match="search has no variant vid-papre...: choose from kd-alpha-0.5, "):
        variants.train("search", tmp_path / "out", ("kd", "vid-papre"), **SHARED)


def test_every_ablation_changes_one_thing_of_the_paper_s_variant(variants):
    for name, changes in variants.CHANGED.items():
        changed = dataclasses.replace(variants.PAPER, **changes)
        assert len(changes) == 1 and changed != variants.PAPER or name == "fixed-variance-0.3", name
