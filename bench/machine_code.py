"""What the compiler makes of every kernel that a training step launches: registers, spills, width of memory
accesses.

    python bench/machine_code.py [--arch 80 90 100] [--json FILE]

Needs Triton and no GPU: the losses run on CPU tensors of the step's shapes while their launches are recorded
instead of carried out, then each distinct variant is compiled ahead of time, with the alignment that the
launches promise, and read as machine code.
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
from pathlib import Path

import torch
import triton
from fastvid.kernels import checks, projected_vid
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastvid import kernels

BATCH = 128
TAPS = {
    "stem": (16, 32),
    "group1": (32, 32),
    "group2": (64, 16),
    "group3": (128, 8),
}  # teacher channels, height and width
STUDENT = {"stem": 16, "group1": 16, "group2": 32, "group3": 64}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
MAPS = (
    "mean",
    "target",
    "hidden",
    "student",
    "teacher",
    "gradient",
    "hidden_gradient",
)  # pointers to whole maps


def step() -> Iterator[tuple[str, object]]:
    """(label, loss) of every loss that a step of WRN-40-2 to WRN-16-1 may compute, in each precision."""

    def make(channels, side, dtype, grad=False):
        return (
            torch.empty(BATCH, channels, side, side, dtype=dtype)
            .to(memory_format=torch.channels_last)
            .requires_grad_(grad)
        )

    for precision, dtype in DTYPES.items():
        for tap, (channels, side) in TAPS.items():
            scale, target = torch.zeros(channels, requires_grad=True), make(channels, side, dtype)
            yield (
                f"vid_nll {tap} {precision}",
                lambda: kernels.vid_nll(make(channels, side, dtype, True), target, scale, impl="triton"),
            )
            yield (
                f"attention_transfer {tap} {precision}",
                lambda: kernels.attention_transfer(
                    make(STUDENT[tap], side, dtype, True), target, impl="triton"
                ),
            )
            for multiple in (1, 2) if precision != "fp32" else ():
                weight = torch.zeros(channels, multiple * channels, 1, 1, requires_grad=True)
                # The two variants of VIDLoss: with and without a bias.
                bias = torch.zeros(channels, requires_grad=True) if multiple == 2 else None
                hidden = make(multiple * channels, side, dtype, True)
                yield (
                    f"projected_vid_nll {tap} x{multiple} {precision}",
                    lambda: kernels.projected_vid_nll(hidden, weight, bias, target, scale, impl="triton"),
                )
        yield (  # a student map that does not fit into registers
            f"attention_transfer wide {precision}",
            lambda: kernels.attention_transfer(make(64, 32, dtype, True), make(64, 32, dtype), impl="triton"),
        )
        yield (
            f"mean_squared_error group2 {precision}",
            lambda: kernels.mean_squared_error(make(64, 16, dtype, True), make(64, 16, dtype), impl="triton"),
        )
        logits = torch.zeros(2, BATCH, 10, dtype=dtype)
        yield (
            f"softened_kl {precision}",
            lambda: kernels.softened_kl(logits[0].clone().requires_grad_(), logits[1], impl="triton"),
        )


def record(arch: int) -> list[dict]:
    """Every distinct launch of those losses and their backward on one architecture."""
    launches, label = {}, ""  # keyed by everything but the label

    def run(self, *args, grid, warmup, **kwargs):
        bound = dict(zip(self.arg_names, args)) | kwargs
        signature, constants, aligned = {}, {}, []
        for index, name in enumerate(self.arg_names):
            value = bound.pop(name)
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                aligned.append(index)  # torch's allocators align to 64 bytes and more
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
    """Compiles one variant for one architecture and reads the result."""
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
    return {
        "op": launch["label"],
        "kernel": launch["kernel"].strip("_"),
        "arch": f"sm_{arch}",
        "pointers": {
            name.removesuffix("_ptr"): kind[1:]
            for name, kind in launch["signature"].items()
            if kind.startswith("*")
        },
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
    """{pointer: sizes in bytes of its accesses to global memory}, by following each address back to the
    parameter it came from."""
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
    while len(origin) > before:  # a loop's block may stand before the one that defines its addresses
        before = len(origin)
        origin |= {
            register: origin[source]
            for register, used in sources.items()
            for source in used
            if source in origin
        }
    widths = {}
    for line in ptx.splitlines():
        if found := re.search(
            r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)\b[^\[]*\[\s*(%rd\d+)", line
        ):
            register, size = found[3], int(found[1] or 1) * int(found[2]) // 8
        elif found := re.search(
            r"cp\.async\.\w+\.shared\.global\S*\s*\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(\w+)", line
        ):
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
        "--only", default="", metavar="WORD", help="only variants of ops whose label holds this word"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write every row, one JSON object a line"
    )
    args = parser.parse_args()
    jobs = [(launch, arch) for arch in args.arch for launch in record(arch) if args.only in launch["label"]]
    with ProcessPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(examine, *zip(*jobs)))
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"triton {triton.__version__}: {len(rows)} binaries")
    columns = (
        "op",
        "kernel",
        "arch",
        "warps",
        "registers",
        "spills",
        "shared_bytes",
        "tensor_core_instructions",
    )
    print(f"| {' | '.join(columns)} | bytes per access |".replace("_", " "))
    print("|---|---|---|---:|---:|---:|---:|---:|---|")
    for row in rows:
        access = (f"{name} {'/'.join(map(str, sizes))}" for name, sizes in row["bytes_per_access"].items())
        print(f"| {' | '.join(str(row[column]) for column in columns)} | {', '.join(access)} |")


if __name__ == "__main__":
    main()
