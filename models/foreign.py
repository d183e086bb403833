"""State dicts that other programs saved: timm's and DeiT's training checkpoints, and what wraps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.tensor_files import Stored, open_file

ENTRIES = ("state_dict", "model", "model_state_dict")
"""Entries in which training scripts (timm's, DeiT's, those of PyTorch's tutorials) store a model's weights."""

EMA_ENTRIES = ("state_dict_ema", "model_ema")
"""Entries in which timm and DeiT store the moving average of the weights."""

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every name."""

COUNTER = "num_batches_tracked"
"""Last part of the names under which batch norms count training steps: integers, which nothing computes with."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_weights(saved: Mapping[str, Any] | str | Path, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """Finds the weights in what a training script saved.

    Args:
        saved: the object that the script gave to ``torch.save``, or a file that holds it (``.pt``, ``.pth``,
            ``.safetensors``). No code in a file is run, and everything in it that is not a tensor is ignored.
        ema: take the moving average of the weights. Without ``ema``, it is taken only if there is nothing else.

    Returns:
        The weights by name, without the prefixes of wrappers, and the entry that they come from (empty if they are the
        object itself).

    Raises:
        ConfigError: no weights can be recognised, or they are not finite floating-point numbers; the message says what
            is there instead.
        CheckpointError: the file cannot be read.
    """
    if isinstance(saved, (str, Path)):
        with open_file(Path(saved)) as contents:
            found, entry = _find(contents.values, ema, str(saved))
            arrays = contents.arrays(_without_prefixes(found), entry or "weights")
        weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    else:
        found, entry = _find(saved, ema, "state dict")
        weights = _without_prefixes(found)
    for name, tensor in weights.items():
        problem = _problem(tensor)
        if problem:
            raise ConfigError(f"{entry or 'state dict'}: {name!r} {problem}")
    return weights, entry


def _find(saved: Any, ema: bool, where: str) -> tuple[Mapping[str, Any], str]:
    """The mapping that holds the weights, and its name."""
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{where}: is a {type(saved).__name__}, expected a state dict or a training checkpoint")
    entries = {name: _state_dict(saved[name]) for name in (*ENTRIES, *EMA_ENTRIES) if name in saved}
    usable = {name: entry for name, entry in entries.items() if entry}
    order = EMA_ENTRIES if ema else (*ENTRIES, *EMA_ENTRIES)
    for name in order:
        if name in usable:
            return usable[name], name
    if ema:
        raise ConfigError(f"{where}: has no moving average of weights ({' or '.join(EMA_ENTRIES)}), {_has(saved)}")
    if _state_dict(saved):
        return saved, ""
    raise ConfigError(f"{where}: no weights recognised, {_has(saved)}")


def _state_dict(entry: Any) -> Mapping[str, Any] | None:
    """The entry if it maps names to weights, at least some of them tensors; None otherwise."""
    if isinstance(entry, nn.Module):
        entry = entry.state_dict()
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
        return None
    return entry if any(isinstance(value, (Tensor, Stored)) for value in entry.values()) else None


def _has(saved: Mapping[Any, Any]) -> str:
    names = [str(name)[:60] for name in saved]
    return f"only {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "it is empty"


def _without_prefixes(weights: Mapping[str, Any]) -> dict[str, Any]:
    result = {name: value for name, value in weights.items() if not name.endswith(COUNTER)}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in result)), None):
        result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def _problem(tensor: Any) -> str | None:
    """What is wrong with a weight; None if nothing is."""
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.is_quantized:
        return "is quantised, and float weights are needed: dequantize() it"
    if tensor.layout != torch.strided:
        return "is sparse, and dense weights are needed: to_dense() it"
    if tensor.dtype not in DTYPES:
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, which means nothing without its scale"
    if tensor.device.type == "meta":
        return "has no values (it is on the meta device)"
    return None if bool(torch.isfinite(tensor).all()) else "has values that are NaN or infinite"
