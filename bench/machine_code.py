"""Machine code of every kernel that a training step launches: registers, spills, width of memory accesses.

    python bench/machine_code.py [--arch 80 90 100] [--json FILE]

Needs Triton, but no GPU. The losses run on CPU tensors with the shapes of a step, and their launches are
recorded instead of executed. Each distinct variant is then compiled ahead of time, with the alignment that
the launches promise, and disassembled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
from fastvid.kernels import checks, projected_vid
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastvid import kernels

BATCH = 128
# tap: teacher channels, height and width
TAPS = {"stem": (16, 32), "group1": (32, 32), "group2": (64, 16), "group3": (128, 8)}
STUDENT = {"stem": 16, "group1": 16, "group2": 32, "group3": 64}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# names of the pointers to whole maps
MAPS = ("mean", "target", "hidden", "student", "teacher", "gradient", "hidden_gradient")


def step() -> Iterator[tuple[str, object]]:
    """(label, function that computes the loss), for every loss of a step of WRN-40-2 to WRN-16-1."""

    def make(channels, side, grad=False):
        tensor = torch.empty(BATCH, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        return tensor.requires_grad_(grad)

    def loss(op, *inputs):
        return partial(getattr(kernels, op), *inputs, impl="triton")

    for precision, dtype in DTYPES.items():
        for tap, (channels, side) in TAPS.items():
            scale, target = torch.zeros(channels, requires_grad=True), make(channels, side)
            yield f"vid_nll {tap} {precision}", loss("vid_nll", make(channels, side, True), target, scale)
            student = make(STUDENT[tap], side, True)
            yield f"attention_transfer {tap} {precision}", loss("attention_transfer", student, target)
            for multiple in (1, 2) if precision != "fp32" else ():
                weight = torch.zeros(channels, multiple * channels, 1, 1, requires_grad=True)
                # VIDLoss has variants with and without a bias
                bias = torch.zeros(channels, requires_grad=True) if multiple == 2 else None
                inputs = make(multiple * channels, side, True), weight, bias, target, scale
                label = f"projected_vid_nll {tap} x{multiple} {precision}"
                yield label, loss("projected_vid_nll", *inputs)
        # a student map that does not fit into registers
        yield (
            f"attention_transfer wide {precision}",
            loss("attention_transfer", make(64, 32, True), make(64, 32)),
        )
        hint = make(64, 16, True), make(64, 16)
        yield f"mean_squared_error group2 {precision}", loss("mean_squared_error", *hint)
        student, teacher = torch.zeros(2, BATCH, 10, dtype=dtype)
        yield f"softened_kl {precision}", loss("softened_kl", student.clone().requires_grad_(), teacher)


def record(arch: int) -> list[dict]:
    """Every distinct launch in forward and backward of the losses of `step`, on one architecture."""
    launches, label = {}, ""  # the key holds everything but the label

    def run(self, *args, grid, warmup, **kwargs):
        bound = dict(zip(self.arg_names, args)) | kwargs
        signature, constants, aligned = {}, {}, []
        for index, name in enumerate(self.arg_names):
            value = bound.pop(name)
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                aligned.append(index)  # torch allocates with an alignment of at least 64 bytes
            elif name.isupper() or value is None:
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        launch = {
            "module": self.fn.__module__,
            "kernel": self.fn.__name__,
            "signature": signature,
            "constants": constants,
            "aligned": aligned,
            "options": bound,
        }
        launches.setdefault(json.dumps(launch), {**launch, "label": label})

    original = JITFunction.run, checks.INTERPRETED, projected_vid._capability
    JITFunction.run, checks.INTERPRETED, projected_vid._capability = run, True, lambda tensor: arch // 10
    try:
        for label, loss in step():
            loss().backward()
    finally:
        JITFunction.run, checks.INTERPRETED, projected_vid._capability = original
    return list(launches.values())


def examine(launch: dict, arch: int) -> dict:
    """Compile one variant for one architecture, and return the numbers of its machine code."""
    kernel = getattr(sys.modules[launch["module"]], launch["kernel"])
    attributes = {(index,): [["tt.divisibility", 16]] for index in launch["aligned"]}
    constants = {(kernel.arg_names.index(name),): value for name, value in launch["constants"].items()}
    source = ASTSource(kernel, launch["signature"], constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch["options"])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _tool("nvdisasm", "-c", cubin)
        usage = _tool("cuobjdump", "-res-usage", cubin)
    pointers = {name: kind[1:] for name, kind in launch["signature"].items() if kind.startswith("*")}
    return {
        "op": launch["label"],
        "kernel": launch["kernel"].strip("_"),
        "arch": f"sm_{arch}",
        "pointers": {name.removesuffix("_ptr"): kind for name, kind in pointers.items()},
        "constants": {name: value for name, value in launch["constants"].items() if value is not None},
        "warps": compiled.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "tensor_core_instructions": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", sass)),
        "bytes_per_access": accesses(compiled.asm["ptx"], kernel.arg_names, launch["signature"]),
        "wide_accesses": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\.[A-Z0-9.]*128\b", sass)),
    }


def accesses(ptx: str, names: list[str], signature: dict) -> dict[str, list[int]]:
    """{pointer: sizes in bytes of the accesses to global memory}.

    The function follows each address back to the kernel parameter that the address is computed from.
    """
    passed = [name for name in names if signature[name] != "constexpr"]
    origin, sources = {}, {}
    for line in ptx.splitlines():
        if found := re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            index = int(found[2])
            if index < len(passed) and signature[passed[index]].startswith("*"):
                origin[found[1]] = passed[index].removesuffix("_ptr")
        elif found := re.search(r"\b(?:add|sub|mov|cvta|mad|selp)\S*\s+(%rd\d+),(.*)", line):
            sources.setdefault(found[1], set()).update(re.findall(r"%rd\d+", found[2]))
    before = -1
    edges = [(register, source) for register, used in sources.items() for source in used]
    while len(origin) > before:  # repeated, because a block may stand before the definition of its addresses
        before = len(origin)
        origin |= {register: origin[source] for register, source in edges if source in origin}
    widths = {}
    direct = r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)\b[^\[]*\[\s*(%rd\d+)"
    asynchronous = r"cp\.async\.\w+\.shared\.global\S*\s*\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(\w+)"
    for line in ptx.splitlines():
        if found := re.search(direct, line):
            register, size = found[3], int(found[1] or 1) * int(found[2]) // 8
        elif found := re.search(asynchronous, line):
            register, size = found[1], int(found[2], 0)
        else:
            continue
        widths.setdefault(origin.get(register, "unknown"), set()).add(size)
    return {name: sorted(sizes) for name, sizes in widths.items()}


def _tool(name: str, *arguments) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=[80, 90, 100, 120],
        metavar="SM",
        help="compute capabilities, as in sm_90",
    )
    parser.add_argument(
        "--only", default="", metavar="WORD", help="only variants with this word in their label"
    )
    meaning = "also write every row to this file, one line of JSON for each row"
    parser.add_argument("--json", type=Path, metavar="FILE", help=meaning)
    args = parser.parse_args()
    jobs = [(launch, arch) for arch in args.arch for launch in record(arch) if args.only in launch["label"]]
    with ProcessPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(examine, *zip(*jobs)))
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"triton {triton.__version__}: {len(rows)} binaries")
    columns = "op kernel arch warps registers spills shared_bytes tensor_core_instructions".split()
    print(f"| {' | '.join(columns)} | bytes per access |".replace("_", " "))
    print("|---|---|---|---:|---:|---:|---:|---:|---|")
    for row in rows:
        access = (f"{name} {'/'.join(map(str, sizes))}" for name, sizes in row["bytes_per_access"].items())
        print(f"| {' | '.join(str(row[column]) for column in columns)} | {', '.join(access)} |")


if __name__ == "__main__":
    main()
