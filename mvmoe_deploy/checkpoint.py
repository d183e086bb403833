"""The checkpoint format: ``.pt`` and ``.safetensors``, read without running anything from the file.

A checkpoint consists of a flat header (format version, model config, class names, super-classes, preprocessing,
training summary) and named weights. In a ``.pt`` file the header's fields stand beside ``weights``; in a
``.safetensors`` file the header is JSON under the metadata key ``mvmoe``. Torch is imported only when a file is read
or written.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec

from mvmoe_deploy.errors import CheckpointError, first_line
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.tensor_files import PLACEHOLDER, Contents, Foreign, open_file, plain, seal

FORMAT = "mvmoe-checkpoint"
VERSION = 2
READABLE = (1, 2)
"""Format versions that this release reads. Version 2 added the sha256 of a ``.safetensors`` file to its header."""


class Superclasses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The E groups of classes that the experts stand for.

    Attributes:
        names: one name per super-class, in expert order.
        of_class: index of each class's super-class, in class order.
    """

    names: list[str]
    of_class: list[int]


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """Everything in a checkpoint except its weights.

    Attributes:
        format: always ``mvmoe-checkpoint``.
        version: format version.
        model: the model config as plain values, with its ``architecture``.
        class_ids: folder name of each class, in the order of the logits.
        class_names: readable name of each class, in the order of the logits.
        preprocessing: how images become the model's input.
        superclasses: the groups that the router was trained on; None for a dense model.
        training: what the model was trained on and how well it did; free-form.
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
    return Header(
        FORMAT,
        VERSION,
        model=model,
        class_ids=class_ids,
        class_names=class_names,
        preprocessing=preprocessing,
        superclasses=superclasses,
        training=training or {},
    )


def save(path: str | Path, checkpoint: Checkpoint, dtype: str = "float32") -> None:
    """Writes a checkpoint; the file appears whole or not at all.

    Args:
        path: file to write, with the suffix ``.pt`` or ``.safetensors``.
        checkpoint: the checkpoint to write.
        dtype: ``float32``, or ``float16`` to halve the file; weights are read back as float32.

    Raises:
        CheckpointError: the file name has another suffix, or the header contradicts itself.
    """
    import torch

    path = Path(path)
    check_header(checkpoint.header, str(path))
    _check_config(checkpoint.header, str(path))
    stored = getattr(torch, dtype)
    weights = {n: t.detach().to("cpu", stored).clone().contiguous() for n, t in checkpoint.weights.items()}
    if path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save({**msgspec.to_builtins(checkpoint.header), "weights": weights}, buffer)
        data = buffer.getvalue()
    elif path.suffix == ".safetensors":
        from safetensors.torch import save as save_safetensors

        header = msgspec.json.encode(checkpoint.header).decode()
        data = seal(save_safetensors(weights, {"mvmoe": header, "sha256": PLACEHOLDER}))
    else:
        raise CheckpointError(f"{path}: a checkpoint's name ends in .pt or .safetensors")
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint without running anything from it; the weights are returned as float32.

    The weights' names and shapes are checked against the config when the model is built
    (:func:`mvmoe_deploy.models.load_model`).

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, is damaged, has another version, or lacks a field.
    """
    import torch

    path = Path(path)
    with open_file(path) as contents:
        raw, weights = _parts(contents)
        version = _check_version(raw.get("version"), str(path))
        if version > 1 and path.suffix == ".safetensors" and "sha256" not in contents.metadata:
            raise CheckpointError(f"{path}: damaged: its header lacks its sha256")
        try:
            header = msgspec.convert(raw, Header)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{path}: {first_line(error)}") from None
        _check_config(header, str(path))
        _check_groups(header, str(path))
        return Checkpoint(header, {n: torch.from_numpy(array) for n, array in contents.arrays(weights).items()})


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file says that it is a checkpoint of this project; it may still be damaged.

    Raises:
        CheckpointError: the file is missing, or neither a ``.pt`` nor a ``.safetensors`` file.
    """
    with open_file(Path(path)) as contents:
        if Path(path).suffix == ".safetensors":
            return "mvmoe" in contents.metadata
        return isinstance(contents.values, dict) and contents.values.get("format") == FORMAT


def _parts(contents: Contents) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header's fields, which are all plain values, and the descriptions of the weights."""
    path, raw = contents.path, contents.values
    weights: Any = None
    foreign = CheckpointError(
        f"{path}: not a checkpoint of this project (no format: {FORMAT!r}); write one with mvmoe_deploy.checkpoint.save"
    )
    if path.suffix == ".safetensors":
        weights = raw
        try:
            raw = msgspec.json.decode(contents.metadata.get("mvmoe", "{}"))
        except (msgspec.DecodeError, RecursionError) as error:
            raise CheckpointError(f"{path}: damaged: its header cannot be read ({first_line(error)})") from None
    elif isinstance(raw, dict):
        weights = raw.pop("weights", None)
    if not isinstance(raw, Foreign) and not (isinstance(raw, dict) and raw.get("format") == FORMAT):
        raise foreign
    problem = plain(raw)
    if problem:
        raise CheckpointError(f"{path}: refused, it holds more than plain tensors and values ({problem})")
    if not isinstance(raw, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path}: lacks 'weights'")
    if not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: weights has a name that is not a string")
    return raw, weights


def check_header(header: Header, where: str = "header") -> None:
    """Checks a header that was made in memory, whose fields nothing has looked at.

    ``header.model`` may be anything that JSON can hold: a foreign model says there what it likes.

    Args:
        header: as for :func:`save`, or of a model to be exported.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is of the wrong type, or fields contradict each other.
    """
    try:
        msgspec.convert(msgspec.to_builtins(header), Header)
    except (msgspec.ValidationError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: {first_line(error)}") from None
    if header.format != FORMAT:
        raise CheckpointError(f"{where}: format is {header.format[:60]!r}, expected {FORMAT!r}; use new_header")
    _check_version(header.version, where)
    _check_groups(header, where)


def _check_version(version: object, where: str) -> int:
    if type(version) is not int or version not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise CheckpointError(f"{where}: format version {str(version)[:20]!r}, this release reads {readable}")
    return version


def _check_groups(header: Header, where: str) -> None:
    """Classes and super-classes belong together."""
    classes = len(header.class_names)
    if len(header.class_ids) != classes:
        raise CheckpointError(f"{where}: {len(header.class_ids)} class_ids but {classes} class_names")
    if header.superclasses is not None:
        names, of_class = header.superclasses.names, header.superclasses.of_class
        if len(of_class) != classes or not all(0 <= s < len(names) for s in of_class):
            raise CheckpointError(f"{where}: superclasses.of_class does not give one super-class per class")


def _check_config(header: Header, where: str) -> None:
    """The model's config, which must be one of this project's, belongs to the rest."""
    classes = len(header.class_names)
    if not isinstance(header.model.get("architecture"), str):
        raise CheckpointError(f"{where}: model.architecture is not a string")
    for name in ("classes", "image_size"):
        if type(header.model.get(name)) is not int:
            raise CheckpointError(f"{where}: model.{name} is not an integer")
    if header.model["classes"] != classes:
        raise CheckpointError(f"{where}: the model has {header.model['classes']} classes, but {classes} are named")
    if header.model["image_size"] != header.preprocessing.size:
        raise CheckpointError(
            f"{where}: the model takes images of size {header.model.get('image_size')}, "
            f"preprocessing gives {header.preprocessing.size}"
        )
