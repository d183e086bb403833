"""Split → convert → verify → write: turns a checkpoint into a bundle, or writes nothing."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mvmoe_deploy
from mvmoe_deploy import bundle as bundles
from mvmoe_deploy.backends import native_path, open_backend
from mvmoe_deploy.bundle import Bundle, Expert, Manifest, Source
from mvmoe_deploy.checkpoint import Header, check_header
from mvmoe_deploy.errors import ConfigError, ExportError, ImageError, as_text
from mvmoe_deploy.exporters.exporter import Options, complete_options, converter_of
from mvmoe_deploy.exporters.job import Job
from mvmoe_deploy.exporters.selftest import Pictures, write_selftest
from mvmoe_deploy.exporters.split import SplitModel, private_copy, split_model
from mvmoe_deploy.exporters.verify import verify
from mvmoe_deploy.files import atomic_directory
from mvmoe_deploy.imagefiles import image_files
from mvmoe_deploy.images import Preprocessing, normalise, preprocess
from mvmoe_deploy.models import config_from_dict, load_checkpoint
from mvmoe_deploy.models.counting import count

MAX_IMAGES = 1000
"""Largest number of images that are taken from a folder for verification; more would add nothing."""

SYNTHETIC_IMAGES = 16


def export_checkpoint(
    checkpoint: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    options: Options | None = None,
    images: str | Path | None = None,
    selftest: Pictures = "drawn",
    force: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Bundle:
    """Exports a checkpoint file.

    Args:
        checkpoint: path of a ``.pt`` or ``.safetensors`` file.
        target: one of :func:`mvmoe_deploy.targets.known`, such as ``onnx``.
        out: the bundle's directory; by default ``CHECKPOINT-TARGET.mvmoe`` in the working directory.
        options: options of the target's own type (such as ``CoreMLOptions``) or only the shared ones.
        images: folder of real images to verify (and calibrate) with; None for synthetic images.
        selftest: the pictures of the self-test, see :func:`export_model`.
        force: replace an existing bundle.
        progress: called with each step.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: there is no such target.
        ExportError: the model cannot be converted, or ``out`` exists.
        VerificationError: the written pieces do not agree with PyTorch; no bundle is written.
    """
    model, header, source = read_checkpoint(checkpoint)
    return export_model(
        model,
        header,
        target,
        out or f"{Path(checkpoint).stem}-{target}.mvmoe",
        source=source,
        options=options,
        images=images,
        selftest=selftest,
        force=force,
        progress=progress,
    )


def read_checkpoint(path: str | Path) -> tuple[nn.Module, Header, Source]:
    """Reads a checkpoint's model and header, and the source entry that names it in a manifest.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    model, header = load_checkpoint(path)
    return model, header, Source(as_text(Path(path).name), bundles.sha256(Path(path)))


def export_model(
    model: nn.Module | SplitModel,
    header: Header,
    target: str,
    out: str | Path,
    *,
    source: Source | None = None,
    options: Options | None = None,
    images: str | Path | Tensor | None = None,
    selftest: Pictures = "drawn",
    force: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Bundle:
    """Exports a model in memory: any :class:`~mvmoe_deploy.exporters.split.PerImageRouted`, or a dense one.

    Args:
        model: the model, whose own forward is the reference. To export a model several times, pass the result of
            :func:`split_model`, which also decides whether the router is fused or separate.
        header: class names, preprocessing, super-classes. ``header.model`` is free-form for foreign models.
        target: one of :func:`mvmoe_deploy.targets.known`, such as ``onnx``.
        out: the bundle's directory.
        source: where the weights came from.
        options: options of the target's own type (such as ``CoreMLOptions``) or only the shared ones.
        images: folder of real images, or preprocessed images ``[n, 3, S, S]`` float32; None for synthetic images.
        selftest: the pictures of the self-test: ``drawn`` patterns; cut from the ``images`` of a folder, parts of which
            then lie in the bundle for all who get it; or ``none``, and the bundle has no self-test.
        force: replace an existing bundle.
        progress: called with each step.

    Raises:
        CheckpointError: the header contradicts itself.
        ConfigError: there is no such target.
        BackendError: ``out`` is not UTF-8.
        ExportError: the model cannot be split or converted, returns another number of logits than the header names
            classes, or ``out`` exists.
        ImageError: the images cannot be used.
        VerificationError: the written pieces do not agree with PyTorch; no bundle is written.
    """
    options = complete_options(options, target)
    convert = converter_of(target)
    out = Path(out)
    native_path(out)  # before the work, because an engine will have to open it
    check_header(header)
    if out.exists():
        if not force:
            raise ExportError(f"{out}: exists already; --force replaces it, --out names another")
        if not bundles.is_bundle(out):
            raise ExportError(f"{out}: exists and is not a bundle, so --force does not replace it")
    with torch.no_grad(), atomic_directory(out, replace=force) as directory:
        tensors, image_source, photos = verification_images(header.preprocessing, images)
        if selftest == "images" and not photos:
            raise ExportError(
                "the self-test's pictures can only be cut from images of a folder; give one (--images PATH)"
            )
        progress("splitting")
        size = header.preprocessing.size
        pieces = model if isinstance(model, SplitModel) else split_model(model, size, options.separate_router)
        _check_classes(pieces, header)
        manifest = _manifest(
            header, target, options=options, routing=pieces.routing, source=source or Source("", "0" * 64)
        )
        converted = convert(
            Job(
                split=pieces,
                directory=directory,
                options=options,
                manifest=manifest,
                images=tensors,
                piece_flops=_flops_of(header.model, pieces),
                progress=progress,
            )
        )
        paths = sorted({path for piece in converted.pieces for path in piece.files})
        manifest = msgspec.structs.replace(
            manifest,
            pieces=converted.pieces,
            files=bundles.describe_files(directory, paths),
            tools={**manifest.tools, **converted.tools},
            options={**manifest.options, **converted.notes},
        )
        draft = Bundle(directory, manifest)
        backends = [open_backend(draft, name, threads=None) for name in converted.backends]
        first, *others = [
            verify(pieces, draft, backend=backend, images=tensors, image_source=image_source, progress=progress)
            for backend in backends
        ]
        verification = {**msgspec.to_builtins(first), "verified_as_well_with": [report.backend for report in others]}
        written: list[str] = []
        if selftest != "none":
            progress("self-test")
            cut = photos if selftest == "images" else []
            written = write_selftest(pieces, draft, backend=backends[0], photos=cut, photo_inputs=tensors)
        manifest = msgspec.structs.replace(
            manifest,
            verification=verification,
            selftest=written[0] if written else None,
            files=[*manifest.files, *bundles.describe_files(directory, written)],
        )
        bundles.write_manifest(directory, manifest)
        progress("writing")
    return bundles.open_bundle(out)


def verification_images(
    preprocessing: Preprocessing, images: str | Path | Tensor | None
) -> tuple[Tensor, str, list[Path]]:
    """Preprocessed images ``[n, 3, S, S]`` float32, a description of their source, and their files if they have any.

    Args:
        preprocessing: the checkpoint's preprocessing.
        images: a folder that is searched for images, sub-folders included; preprocessed images; or None for synthetic
            ones.

    Raises:
        ImageError: the folder does not exist or holds no image, or an image cannot be read.
    """
    if isinstance(images, Tensor):
        expected = [3, preprocessing.size, preprocessing.size]
        if images.dtype != torch.float32 or list(images.shape[1:]) != expected or not len(images):
            kind = f"{str(images.dtype).removeprefix('torch.')} of shape {list(images.shape)}"
            raise ImageError(f"images to verify with are {kind}, expected float32 [n, {', '.join(map(str, expected))}]")
        return images, "given", []
    if images is None:
        pixels = synthetic_pixels(preprocessing.size, SYNTHETIC_IMAGES)
        return torch.from_numpy(normalise(pixels, preprocessing)), "synthetic (seed 0)", []
    folder = Path(images)
    files = image_files(folder)
    if not files:
        raise ImageError(f"{folder}: holds no images")
    # evenly spaced, since the files are sorted by class folder
    files = [files[i * len(files) // MAX_IMAGES] for i in range(MAX_IMAGES)] if len(files) > MAX_IMAGES else files
    return torch.from_numpy(np.stack([preprocess(file, preprocessing) for file in files])), as_text(folder.name), files


def synthetic_pixels(size: int, count: int) -> NDArray[np.uint8]:
    """Smooth random colour fields ``[count, size, size, 3]``, whose spectrum falls like that of photos.

    White noise would be unlike anything that a model was trained on, and would route every image alike.
    """
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    spectrum = (
        np.fft.rfft2(generator.standard_normal((count, size, size, 3)), axes=(1, 2)) / frequency[None, :, :, None]
    )
    fields = np.fft.irfft2(spectrum, s=(size, size), axes=(1, 2))
    fields = fields / fields.std(axis=(1, 2, 3), keepdims=True)
    pixels: NDArray[np.uint8] = (128 + 60 * fields).clip(0, 255).astype(np.uint8)
    return pixels


def _check_classes(split: SplitModel, header: Header) -> None:
    last = split.pieces[-1]
    classes = last(*last.inputs.values())[0].shape[-1]
    if classes != len(header.class_names):
        raise ExportError(f"the model returns {classes} logits, but the header names {len(header.class_names)} classes")


def _manifest(
    header: Header, target: str, options: Options, routing: bundles.Routing | None, source: Source
) -> Manifest:
    experts: list[Expert] = []
    if routing is not None:
        groups = header.superclasses
        for index in range(routing.experts):
            if groups is not None and len(groups.names) == routing.experts:
                members = [c for c, group in enumerate(groups.of_class) if group == index]
                experts.append(Expert(groups.names[index], members))
            else:
                experts.append(Expert(f"expert {index}", []))
    return Manifest(
        format=bundles.FORMAT,
        version=bundles.VERSION,
        target=target,
        layout=options.layout,
        precision=options.precision,
        model=header.model,
        routing=routing,
        preprocessing=header.preprocessing,
        class_ids=header.class_ids,
        class_names=header.class_names,
        experts=experts,
        files=[],
        pieces=[],
        verification={},
        source=source,
        tools={
            "mvmoe-deploy": mvmoe_deploy.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )


def _flops_of(model: dict[str, Any], split: SplitModel) -> Callable[[str], int | None]:
    """FLOPs of a piece by its role: as the model's config says, or else counted on the piece as it is traced."""
    try:
        known = config_from_dict(model).piece_flops
    except ConfigError:  # a foreign model
        known = lambda role: None  # noqa: E731

    @functools.cache
    def flops(role: str) -> int | None:
        found = known(role)
        if found is None and (first := next((piece for piece in split.pieces if piece.role == role), None)):
            work = count(private_copy(first.module), [example[:1] for example in first.inputs.values()])
            found = None if work is None else work.flops
        return found

    return flops
