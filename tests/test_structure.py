"""Structure of the project: allowed imports, public names, installed files, and the commands in README.md."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import fastvid

ROOT = Path(__file__).resolve().parents[1]

# modules that import neither torch nor NumPy
LIGHT = ("config", "datasets", "errors", "results", "files", "signals", "report", "report.table", "cli", "")
DATASETS = ("datasets.arrays", "datasets.cifar", "datasets.digits", "datasets.folder")
WITHOUT_TORCH = (*LIGHT, *DATASETS, "plan", "progress", "__main__")


def _sources():
    """{module name without `fastvid.`, "" for the package itself: its file}."""
    found = {}
    for folder, prefix in ((ROOT / "fastvid", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = _sources()


def imported(tree):
    """Absolute names of the modules that the statements of `tree` import, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name.removeprefix("fastvid.") in SOURCES else node.module


def imports_of(module):
    return list(imported(ast.parse(SOURCES[module].read_text())))


def own_imports_of(module):
    return [
        name.removeprefix("fastvid").removeprefix(".")
        for name in imports_of(module)
        if name.split(".")[0] == "fastvid"
    ]


def test_imports_have_no_cycle():
    TopologicalSorter({module: own_imports_of(module) for module in SOURCES}).prepare()


def test_kernels_import_nothing_of_fastvid_but_kernels():
    kernels = [module for module in SOURCES if module.split(".")[0] == "kernels"]
    assert len(kernels) >= 6
    assert not [
        name for module in kernels for name in own_imports_of(module) if name.split(".")[0] != "kernels"
    ]


def test_no_file_is_called_utils_and_no_file_of_the_project_imports_the_source_folder_of_the_kernels():
    everything = [
        path for folder in ("fastvid", "kernels", "tests", "bench") for path in (ROOT / folder).rglob("*.py")
    ]
    assert not [path for path in everything if path.name == "utils.py"]
    assert not [
        path
        for path in everything
        if "kernels" in [name.split(".")[0] for name in imported(ast.parse(path.read_text()))]
    ]


@pytest.mark.parametrize(
    "names, heavy", [(LIGHT, {"torch", "numpy"}), (WITHOUT_TORCH, {"torch"})], ids=["light", "without-torch"]
)
def test_modules_that_must_start_at_once_import_nothing_heavy_when_they_are_loaded(names, heavy):
    modules = [f"fastvid.{name}".rstrip(".") for name in names if name != "__main__"]
    assert heavy.isdisjoint(top_level_modules_after(f"import {', '.join(modules)}"))


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["--version"], ["train", "--epochs", "0"]], ids=" ".join
)
def test_help_version_and_a_typing_error_are_answered_without_torch_and_numpy(argv):
    loaded = top_level_modules_after(
        f"import fastvid.cli\ntry: fastvid.cli.main({argv})\nexcept SystemExit: pass"
    )
    assert "fastvid" in loaded and {"torch", "numpy"}.isdisjoint(loaded)


def top_level_modules_after(code):
    """Top-level packages in sys.modules of a fresh interpreter that ran `code`."""
    program = f"{code}\nimport sys; print('loaded', *sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in ran.stdout.splitlines()[-1].split()[1:]}


SIGNATURES = {  # of design.md; the default of impl chooses by device
    "vid_nll": "(mean, target, raw_scale, *, eps=1e-05, factor=1.0, impl='auto')",
    "projected_vid_nll": "(hidden, weight, bias, target, raw_scale, *, eps=1e-05, factor=1.0, impl='auto')",
    "attention_transfer": "(student, teacher, *, factor=1.0, impl='auto')",
    "mean_squared_error": "(prediction, target, *, factor=1.0, impl='auto')",
    "softened_kl": "(student_logits, teacher_logits, *, temperature=4.0, factor=1.0, impl='auto')",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_loss_functions_have_the_fixed_signature_and_a_reference_without_impl(name):
    assert bare_signature(getattr(fastvid.kernels, name)) == SIGNATURES[name]
    reference = SIGNATURES[name].replace(", factor=1.0, impl='auto'", "").replace(", *)", ")")
    assert bare_signature(getattr(fastvid.kernels.reference, name)) == reference


@pytest.mark.parametrize(
    "name, signature",
    [
        ("WideResNet", "(depth, width, num_classes=10)"),
        ("datasets.load", "(name, root, split, *, download=False)"),
        ("plan.BatchPlan", "(num_images, batch_size, *, seed, rank=0, world_size=1)"),
        ("loader.train_loader", "(arrays, plan, *, backend='auto', device='cpu', dtype=None)"),
        ("train.train", "(config)"),
        (
            "VIDLoss",
            "(student_channels, teacher_channels, *, variant='paper', "
            "factor=1.0, learning_rate=0.1, impl='auto')",
        ),
        ("ATLoss", "(*, factor=1.0, impl='auto')"),
        ("KDLoss", "(temperature=4.0, *, factor=1.0, impl='auto')"),
        ("FitNetLoss", "(student_channels, teacher_channels, *, factor=1.0, impl='auto')"),
    ],
)
def test_public_names_have_the_fixed_signature(name, signature):
    assert bare_signature(public(name)) == signature


def test_losses_are_modules_and_the_configuration_and_result_are_where_design_says():
    assert all(
        issubclass(public(name), torch.nn.Module)
        for name in ("VIDLoss", "ATLoss", "KDLoss", "FitNetLoss", "WideResNet")
    )
    assert public("train.TrainConfig")().method == ("student",)
    assert {"steps_per_epoch", "batch"} <= set(dir(public("plan.BatchPlan")))


def test_every_name_that_fastvid_lists_exists_and_another_is_an_attribute_error():
    assert all(getattr(fastvid, name) for name in fastvid.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastvid.nothing


def public(dotted):
    target = fastvid
    for part in dotted.split("."):
        target = getattr(target, part)
    return target


def bare_signature(function):
    """(a, *, b=1), without annotations."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_distribution_has_its_name_extras_command_and_version():
    distribution = metadata.distribution("fastvid-distill")
    assert distribution.version == fastvid.__version__
    assert {"cuda13", "cuda12", "demo", "plot", "test"} <= set(
        distribution.metadata.get_all("Provides-Extra")
    )
    assert distribution.metadata["License-Expression"] == "MIT"
    commands = {
        entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"
    }
    assert commands == {"fastvid": "fastvid.cli:program"}
    assert callable(importlib.import_module("fastvid.cli").main)


def test_a_wheel_holds_every_module_and_the_marker_of_types(tmp_path):
    found = [path for pattern in ("fastvid/**/*", "kernels/*") for path in ROOT.glob(pattern)]
    sources_and_data = [path for path in found if path.is_file() and path.suffix not in (".pyc", ".md")]
    others = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for path in [*sources_and_data, *others]:  # builds from a copy, so that no build/ is left in the checkout
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("fastvid_distill-*.whl")
    wanted = {
        str(
            Path(
                "fastvid",
                path.relative_to(ROOT / "fastvid")
                if path.is_relative_to(ROOT / "fastvid")
                else path.relative_to(ROOT),
            )
        )
        for path in sources_and_data
    }
    assert "fastvid/py.typed" in wanted and "fastvid/kernels/vid.py" in wanted
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_marker_of_types_lies_in_the_installed_package():
    assert files("fastvid").joinpath("py.typed").is_file()


def block(marker, language):
    """The fenced block of README.md under an HTML comment."""
    match = re.search(
        rf"^<!-- {marker} -->\n```{language}\n(.*?)^```$",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert match, f"README.md has no {language} block under <!-- {marker} -->"
    return match[1].strip()


def test_ci_runs_exactly_the_test_command_of_the_readme():
    command = block("tests", "sh")
    assert "\n" not in command and "pytest" in command
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert command in lines
    assert sum("pytest" in line for line in lines) == 1


def test_the_demo_command_of_the_readme_uses_options_that_exist():
    command = block("demo", "sh")
    arguments = re.search(r"\bfastvid (reproduce .*)$", command)[1].split()
    parsed = importlib.import_module("fastvid.cli")._parser().parse_args(arguments)
    assert parsed.dataset == "digits"


def test_the_loss_example_of_the_readme_trains_student_and_regressors():
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([1, 7]))] * 2
    names = {"batches": batches}
    exec(block("example", "python"), names)
    assert torch.isfinite(names["loss"]) and names["loss"].requires_grad
    assert {id(p) for p in names["vid"].parameters()} <= set(
        map(id, names["optimizer"].param_groups[0]["params"])
    )
    untrained = fastvid.VIDLoss([16, 32, 64], [32, 64, 128]).variances()
    assert not any(
        torch.equal(now, start) for now, start in zip(names["vid"].variances(), untrained, strict=True)
    )


def test_the_batch_example_of_the_readme_shows_every_image_of_the_subset_twice(cifar10_root, monkeypatch):
    monkeypatch.chdir(cifar10_root)
    monkeypatch.setattr(
        fastvid.datasets, "load", lambda name, root, split, load=fastvid.datasets.load: load(name, ".", split)
    )
    code, names = block("batches", "python"), {"seen": []}
    exec(code.replace("...", "seen.extend(labels.tolist())"), names)
    assert sum(line != "" for line in code.splitlines()) <= 10
    assert sorted(names["seen"]) == sorted(2 * names["subset"].labels.tolist())
    assert names["images"].shape[1:] == (3, 32, 32) and names["images"].is_contiguous(
        memory_format=torch.channels_last
    )
