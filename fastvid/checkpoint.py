"""Weights (safetensors) and resume state (torch). Reading verifies first, and unpickles nothing but tensors and plain values."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_from
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fastvid.errors import InputError
from fastvid.files import write_atomic
from fastvid.wresnet import WideResNet

METADATA_KEY = "fastvid"  # of the one entry of safetensors metadata that is ours, a JSON object
METHOD_PREFIX = "method."  # regressors and variances lie beside the network's own keys under this name


class Weights(NamedTuple):
    """The content of a file of weights."""

    tensors: dict[str, Tensor]
    metadata: dict
    """what save_weights was given, and `tensors_sha256`; {} in files of other programs"""
    sha256: str
    """of the file"""
    verified: bool
    """whether the file carries our checksums, and they match"""
    path: Path


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict) -> str:
    """Write a .safetensors file with `metadata`, checksums of both inside. Returns the SHA-256 of the file, in hex."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "tensors_sha256": _checksum(tensors)}
    text = json.dumps({**metadata, "metadata_sha256": _checksum_of(metadata)}, sort_keys=True)
    content = safetensors_bytes(
        tensors, {METADATA_KEY: text}
    )  # one entry: safetensors writes several in any order
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: str | Path) -> Weights:
    """The weights in a .safetensors file, or in a .pth or .pt with a state dict.

    A .pth or .pt holds the state dict alone or under "model" or "state_dict", and no metadata; nor do files of other programs.
    Raises InputError for a file that is missing, damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weights at {path}: check the path")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if path.suffix == ".safetensors":
        try:
            tensors, metadata = safetensors_from(content), _metadata(content)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}): copy it again") from error
        checksums = metadata.pop("metadata_sha256", None), metadata.get("tensors_sha256")
        if any(checksums) and checksums != (_checksum_of(metadata), _checksum(tensors)):
            raise InputError(
                f"{path}: it does not match the checksums that it carries: it is damaged, copy it again"
            )
        return Weights(tensors, metadata, sha256, verified=any(checksums), path=path)
    tensors = load_state(path, content)
    for key in ("model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())
    ):
        raise InputError(
            f"{path}: holds no state dict, neither alone nor under 'model' or 'state_dict': save one with torch.save"
        )
    return Weights(
        {name.removeprefix("module."): tensor for name, tensor in tensors.items()},
        {},
        sha256,
        verified=False,
        path=path,
    )


def sha256_of(path: Path) -> str:
    """Of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_network(path: str | Path, depth: int, width: int, num_classes: int) -> WideResNet:
    """The WideResNet of these sizes with the weights of a file. Raises InputError as load_weights and build_network do."""
    return build_network(load_weights(path), depth, width, num_classes)


def build_network(weights: Weights, depth: int, width: int, num_classes: int) -> WideResNet:
    """The WideResNet of these sizes with these weights, in eval mode, frozen.

    Raises InputError when they are of another architecture, or keys are missing or left over: all are named.
    """
    path = weights.path
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(METHOD_PREFIX)}
    found = _architecture(tensors)
    if found and found != (depth, width, num_classes):
        raise InputError(
            f"{path} holds a WRN-{found[0]}-{found[1]} for {found[2]} classes, but a WRN-{depth}-{width} for {num_classes} "
            "was asked for: set --teacher-depth and --teacher-width, or take a teacher of this data set"
        )
    network = WideResNet(depth, width, num_classes)
    own = network.state_dict()
    counters = {
        name for name in own if name.endswith("num_batches_tracked")
    }  # of no use, and left out by older checkpoints
    missing, unexpected = sorted(own.keys() - tensors.keys() - counters), sorted(tensors.keys() - own.keys())
    misshapen = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unexpected or misshapen:
        raise InputError(
            f"{path} does not fit a WRN-{depth}-{width}: missing keys {_some(missing)}; unexpected keys {_some(unexpected)}; "
            f"other shapes {_some(misshapen)}: take weights with the names of WideResNet-pytorch or RepDistiller"
        )
    odd = {
        name
        for name, tensor in tensors.items()
        if not _is_plain(tensor) or name not in counters and not tensor.is_floating_point()
    }
    if odd - counters:
        raise InputError(
            f"{path} holds weights that are no plain numbers (sparse, quantized, complex, integer or on no device): "
            f"{_some(sorted(odd))}: save them as floating-point tensors"
        )
    network.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in odd}, strict=False
    )
    return network.eval().requires_grad_(False)


def _is_plain(tensor: Tensor) -> bool:
    known = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return known and tensor.device.type == "cpu" and not tensor.is_quantized


def save_state(path: Path, state: dict) -> None:
    """Write tensors and plain values, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: str | Path, content: bytes | None = None) -> dict:
    """What save_state wrote, on the CPU. Raises InputError when the file is damaged or holds more than tensors and plain values.

    content: of the file, where it was read before.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes() if content is None else content)
        if zipfile.is_zipfile(file):  # else the format of torch < 1.6, which has no checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load itself does not look at the CRCs
            if damaged:
                raise ValueError(f"its entry {damaged} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what follows says it in one line
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to load it anyway
            reason = "damaged, or with objects that only trusted files may hold"
        raise InputError(
            f"{path}: not a readable torch file of tensors ({reason}): copy or make it again"
        ) from error


def _architecture(tensors: dict[str, Tensor]) -> tuple[int, int, int] | None:
    """(depth, width, classes) that the names and shapes speak of, or None."""
    blocks = {name.split(".")[2] for name in tensors if name.startswith("block1.layer.")}
    first, head = tensors.get("block1.layer.0.conv1.weight"), tensors.get("fc.weight")
    if not blocks or first is None or head is None or first.dim() != 4 or head.dim() != 2:
        return None
    return 6 * len(blocks) + 4, first.shape[0] // 16, head.shape[0]


def _metadata(content: bytes) -> dict:
    """Ours in a safetensors file: {} where there is none. Raises ValueError when it is no JSON object."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entries = header.get("__metadata__", {})
    metadata = json.loads(entries.get(METADATA_KEY, "{}"))
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata {METADATA_KEY!r} is no JSON object")
    if not metadata and "tensors_sha256" in str(entries):
        raise ValueError(f"our checksums are there, but not under {METADATA_KEY!r}")
    return metadata


def _checksum_of(metadata: dict) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
