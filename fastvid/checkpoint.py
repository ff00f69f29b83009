"""Files of weights (safetensors) and of resume state (torch).

Loading checks for damage first, and unpickles nothing but tensors and plain values.
"""

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

METADATA_KEY = "fastvid"  # this entry of the safetensors metadata is a JSON object written by fastvid
METHOD_PREFIX = "method."  # prefix of the keys of regressors and variances, beside the keys of the network


class Weights(NamedTuple):
    """The content of a file of weights."""

    tensors: dict[str, Tensor]
    metadata: dict
    """the `metadata` of save_weights plus `tensors_sha256`; {} in files of other programs"""
    sha256: str
    """SHA-256 of the file, in hex"""
    verified: bool
    """whether the file carries checksums of fastvid (which then match)"""
    path: Path


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict) -> str:
    """Write tensors, metadata and checksums of both as .safetensors. Returns the file's SHA-256 in hex."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "tensors_sha256": _checksum(tensors)}
    text = json.dumps({**metadata, "metadata_sha256": _checksum_of(metadata)}, sort_keys=True)
    # a single entry of metadata, because safetensors writes several entries in any order
    content = safetensors_bytes(tensors, {METADATA_KEY: text})
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: str | Path) -> Weights:
    """The weights in a .safetensors file, or in a .pth or .pt file with a state dict.

    A .pth or .pt file holds the state dict directly or under "model" or "state_dict". Such files have no
    metadata. Raises InputError if the file is missing, damaged or something else.
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
            raise InputError(f"{path} does not match its own checksums: the file is damaged, copy it again")
        return Weights(tensors, metadata, sha256, verified=any(checksums), path=path)
    tensors = load_state(path, content)
    for key in ("model", "state_dict"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    named = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )
    if not named or not tensors:
        raise InputError(
            f"{path} holds no state dict, neither directly nor under 'model' or 'state_dict': "
            "save a state dict with torch.save"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Weights(tensors, {}, sha256, verified=False, path=path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_network(path: str | Path, depth: int, width: int, num_classes: int) -> WideResNet:
    """build_network with the weights of a file. Raises InputError as load_weights and build_network do."""
    return build_network(load_weights(path), depth, width, num_classes)


def build_network(weights: Weights, depth: int, width: int, num_classes: int) -> WideResNet:
    """The WideResNet of these sizes with these weights, in eval mode, frozen.

    Raises InputError if the weights belong to another architecture. The message names the keys that differ.
    """
    path = weights.path
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(METHOD_PREFIX)}
    found = _architecture(tensors)
    if found and found != (depth, width, num_classes):
        raise InputError(
            f"{path} holds a WRN-{found[0]}-{found[1]} for {found[2]} classes, but a WRN-{depth}-{width} for "
            f"{num_classes} was asked for: set --teacher-depth and --teacher-width, or take a teacher of "
            "this data set"
        )
    network = WideResNet(depth, width, num_classes)
    own = network.state_dict()
    # older checkpoints lack these counters, and nothing uses them
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing, unexpected = sorted(own.keys() - tensors.keys() - counters), sorted(tensors.keys() - own.keys())
    misshapen = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unexpected or misshapen:
        raise InputError(
            f"{path} does not fit a WRN-{depth}-{width}: missing keys {_some(missing)}; "
            f"unexpected keys {_some(unexpected)}; other shapes {_some(misshapen)}: "
            "take weights with the names of WideResNet-pytorch or RepDistiller"
        )
    odd = {
        name
        for name, tensor in tensors.items()
        if not _is_plain(tensor) or name not in counters and not tensor.is_floating_point()
    }
    if odd - counters:
        raise InputError(
            f"{path} holds weights that are not plain floating-point tensors (sparse, quantized, complex, "
            f"integer, or on no device): {_some(sorted(odd))}: save them as floating-point tensors"
        )
    plain = {name: tensor for name, tensor in tensors.items() if name not in odd}
    network.load_state_dict(plain, strict=False)
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
    """The state that save_state wrote, on the CPU.

    content: the bytes of the file, if the caller has already read them.
    Raises InputError if the file is damaged or holds anything but tensors and plain values.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes() if content is None else content)
        if zipfile.is_zipfile(file):  # files of torch < 1.6 are no archives and have no checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load does not check the CRCs
            if damaged:
                raise ValueError(f"its entry {damaged} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: the InputError below is enough
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to disable weights_only
            reason = "damaged, or with objects that only trusted files may hold"
        message = f"{path}: not a readable torch file of tensors ({reason}): copy or make it again"
        raise InputError(message) from error


def _architecture(tensors: dict[str, Tensor]) -> tuple[int, int, int] | None:
    """(depth, width, classes) according to names and shapes, or None if they do not tell."""
    blocks = {name.split(".")[2] for name in tensors if name.startswith("block1.layer.")}
    first, head = tensors.get("block1.layer.0.conv1.weight"), tensors.get("fc.weight")
    if not blocks or first is None or head is None or first.dim() != 4 or head.dim() != 2:
        return None
    return 6 * len(blocks) + 4, first.shape[0] // 16, head.shape[0]


def _metadata(content: bytes) -> dict:
    """The metadata that save_weights wrote into a safetensors file, or {}. Raises ValueError if malformed."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entries = header.get("__metadata__", {})
    metadata = json.loads(entries.get(METADATA_KEY, "{}"))
    if not isinstance(metadata, dict):
        raise ValueError(f"its metadata {METADATA_KEY!r} is not a JSON object")
    if not metadata and "tensors_sha256" in str(entries):
        raise ValueError(f"the file has checksums of fastvid, but not under {METADATA_KEY!r}")
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
