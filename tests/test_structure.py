"""The shape of the project: imports, public names, what is installed, and that README.md tells the truth."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import fastvid

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = (
    "config",
    "datasets",
    "plan",
    "results",
    "report",
    "cli",
    "errors",
    "files",
    "signals",
    "progress",
)
LIGHT = ("config", "results", "report", "cli", "errors", "files", "signals")  # and without NumPy


def _sources():
    """{absolute name of a module: its file}."""
    found = {}
    for folder, prefix in ((ROOT / "fastvid", ("fastvid",)), (ROOT / "kernels", ("fastvid", "kernels"))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = _sources()


def imported(nodes):
    """Absolute names of the modules that these statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in SOURCES else node.module


@cache
def imports_of(module):
    """Modules of this project that a module imports, at any depth of its code."""
    return {name for name in imported(ast.walk(ast.parse(SOURCES[module].read_text()))) if name in SOURCES}


def test_no_module_imports_itself_through_others():
    # `import fastvid` is no edge: the package imports its modules on first use only.
    graph = {module: imports_of(module) - {"fastvid"} for module in SOURCES if module != "fastvid"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert len(order) > 20


def test_kernels_import_nothing_of_fastvid_but_kernels():
    kernels = [module for module in SOURCES if module.startswith("fastvid.kernels")]
    assert len(kernels) >= 6
    assert not [name for module in kernels for name in imports_of(module) if name not in kernels]


def test_no_file_is_called_utils_and_no_file_imports_the_source_folder_of_the_kernels():
    for folder in ("fastvid", "kernels", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {name.split(".")[0] for name in imported(ast.walk(ast.parse(path.read_text())))}
            assert path.name != "utils.py" and "kernels" not in names, path


@pytest.mark.parametrize(
    "names, heavy", [(LIGHT, {"torch", "numpy"}), (WITHOUT_TORCH, {"torch"})], ids=["light", "without-torch"]
)
def test_modules_that_must_start_at_once_import_nothing_heavy(names, heavy):
    modules = ", ".join(f"fastvid.{name}" for name in names)
    assert heavy.isdisjoint(packages_after(f"import {modules}"))


@pytest.mark.parametrize(
    "argv", [["train", "--help"], ["--version"], ["train", "--epochs", "0"]], ids=" ".join
)
def test_help_version_and_a_typing_error_are_answered_without_torch_and_numpy(argv):
    loaded = packages_after(f"import fastvid.cli\ntry: fastvid.cli.main({argv})\nexcept SystemExit: pass")
    assert "fastvid" in loaded and {"torch", "numpy"}.isdisjoint(loaded)


def packages_after(code):
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


@pytest.mark.slow
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


def block(marker, language, page="README.md"):
    """The fenced block of a page under an HTML comment."""
    pattern = rf"^<!-- {marker} -->\n```{language}\n(.*?)^```$"
    match = re.search(pattern, (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert match, f"{page} has no {language} block under <!-- {marker} -->"
    return match[1].strip()


def test_ci_runs_both_commands_of_the_readme_and_the_slow_tests():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("printed()"))
    printed = "\n".join(lines[start : start + 3])
    for name in ("demo", "tests"):
        assert f'bash -euc "$(printed {name})"' in lines
        command = subprocess.run(
            ["bash", "-euc", f"{printed}\nprinted {name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert command.stdout.strip() == block(name, "sh")
    assert ".venv/bin/python -m pytest -m slow" in lines


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
    untrained = fastvid.VIDLoss([16, 32, 64], [32, 64, 128], factor=30).variances()
    assert not any(
        torch.equal(now, start) for now, start in zip(names["vid"].variances(), untrained, strict=True)
    )


def test_the_batch_example_of_the_readme_shows_every_image_of_the_subset_twice(cifar10_root, monkeypatch):
    monkeypatch.chdir(cifar10_root)
    monkeypatch.setattr(
        fastvid.datasets, "load", lambda name, root, split, load=fastvid.datasets.load: load(name, ".", split)
    )
    code, names = block("batches", "python", "fastvid/README.md"), {"seen": []}
    exec(code.replace("...", "seen.extend(labels.tolist())"), names)
    assert sum(line != "" for line in code.splitlines()) <= 10
    assert sorted(names["seen"]) == sorted(2 * names["subset"].labels.tolist())
    assert names["images"].shape[1:] == (3, 32, 32) and names["images"].is_contiguous(
        memory_format=torch.channels_last
    )
