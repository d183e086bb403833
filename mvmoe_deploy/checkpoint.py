"""The checkpoint format: ``.pt`` and ``.safetensors``, read without running anything from the file.

A checkpoint is a flat header (format version, model config, class names, super-classes, preprocessing, training
summary) and named weights. In a ``.pt`` file the header's fields stand beside ``weights``; in ``.safetensors``
the header is JSON under the metadata key ``mvmoe``. Torch is imported only when a file is read or written.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mvmoe_deploy.errors import CheckpointError, first_line
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.images import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "mvmoe-checkpoint"
VERSION = 1


class Superclasses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The E groups of classes that the experts stand for.

    Attributes:
        names: one name per super-class, in expert order.
        of_class: index of each class's super-class, in class order.
    """

    names: list[str]
    of_class: list[int]


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """Everything in a checkpoint but its weights.

    Attributes:
        format: always ``mvmoe-checkpoint``.
        version: format version.
        model: the model config as plain values, with its ``architecture``.
        class_ids: folder name of each class, in the order of the logits.
        class_names: readable name of each class, likewise.
        preprocessing: how images become the model's input.
        superclasses: the groups the router was trained on; None for a dense model.
        training: what it was trained on and how well it did; free form.
    """

    format: str
    version: int
    model: dict[str, Any]
    class_ids: list[str]
    class_names: list[str]
    preprocessing: Preprocessing
    superclasses: Superclasses | None = None
    training: dict[str, Any] = {}


class Checkpoint(msgspec.Struct):
    """A header and the weights, as float32 torch tensors by parameter name."""

    header: Header
    weights: dict[str, Any]


def new_header(
    model: dict[str, Any],
    class_ids: list[str],
    class_names: list[str],
    preprocessing: Preprocessing,
    superclasses: Superclasses | None = None,
    training: dict[str, Any] | None = None,
) -> Header:
    """A header of the current format version."""
    return Header(FORMAT, VERSION, model, class_ids, class_names, preprocessing, superclasses, training or {})


def save(path: str | Path, checkpoint: Checkpoint, dtype: str = "float32") -> None:
    """Writes a checkpoint; the file appears whole or not at all.

    Args:
        path: ``.pt`` or ``.safetensors``.
        checkpoint: what to write.
        dtype: ``float32``, or ``float16`` to halve the file; it is read back as float32.

    Raises:
        CheckpointError: the file name ends otherwise.
    """
    import torch

    path = Path(path)
    stored = getattr(torch, dtype)
    weights = {n: t.detach().to("cpu", stored).clone().contiguous() for n, t in checkpoint.weights.items()}
    if path.suffix == ".pt":
        with atomic_file(path) as temporary:
            torch.save({**msgspec.to_builtins(checkpoint.header), "weights": weights}, temporary)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        with atomic_file(path) as temporary:
            save_file(weights, temporary, metadata={"mvmoe": msgspec.json.encode(checkpoint.header).decode()})
    else:
        raise CheckpointError(f"{path}: a checkpoint's name ends in .pt or .safetensors")


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint without running anything from it; the weights come back as float32.

    The weights' names and shapes are checked against the config when the model is built
    (:func:`mvmoe_deploy.models.load_model`).

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, of another version, or lacking a field.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, expected a .pt or .safetensors checkpoint")
    raw, weights = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    if raw.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this project (no format: {FORMAT!r}); "
            "write one with mvmoe_deploy.checkpoint.save"
        )
    if raw.get("version") != VERSION:
        raise CheckpointError(f"{path}: format version {raw.get('version')!r}, this release reads {VERSION}")
    try:
        header = msgspec.convert(raw, Header)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_header(header, path)
    return Checkpoint(header, {name: tensor.float() for name, tensor in weights.items()})


def _read_pt(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import torch

    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one (torch.save writes a zip archive)")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: refused, it holds more than plain tensors and values ({reason})") from None
    except Exception as error:  # torch raises whatever its reader stumbles over
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {first_line(error)})") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise CheckpointError(f"{path}: not a checkpoint of this project (holds a {type(raw).__name__})")
    weights = raw.pop("weights", None)
    if raw.get("format") == FORMAT:
        if not isinstance(weights, dict):
            raise CheckpointError(f"{path}: lacks 'weights'")
        bad = [n for n, t in weights.items() if not isinstance(n, str) or not isinstance(t, torch.Tensor)]
        if bad:
            raise CheckpointError(f"{path}: weights[{bad[0]!r}] is not a tensor")
    return raw, weights or {}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        raw = msgspec.json.decode(metadata.get("mvmoe", "{}"))
    except (SafetensorError, msgspec.DecodeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error})") from None
    return raw if isinstance(raw, dict) else {}, weights


def _check_header(header: Header, path: Path) -> None:
    classes = len(header.class_names)
    if len(header.class_ids) != classes:
        raise CheckpointError(f"{path}: {len(header.class_ids)} class_ids but {classes} class_names")
    if header.model.get("classes") != classes:
        raise CheckpointError(f"{path}: the model has {header.model.get('classes')} classes, {classes} are named")
    if header.model.get("image_size") != header.preprocessing.size:
        raise CheckpointError(
            f"{path}: the model takes images of size {header.model.get('image_size')}, "
            f"preprocessing gives {header.preprocessing.size}"
        )
    if header.superclasses is not None:
        names, of_class = header.superclasses.names, header.superclasses.of_class
        if len(of_class) != classes or not all(0 <= s < len(names) for s in of_class):
            raise CheckpointError(f"{path}: superclasses.of_class does not give one super-class per class")
