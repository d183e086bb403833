"""The Core ML backend: predicts with Core ML itself, which runs on Apple devices only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvmoe_deploy.backends import LoadedPiece, OutputCheck, native_path
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import BackendError, first_line
from mvmoe_deploy.images import denormalise

Predict = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Maps the inputs of one image by name to the outputs by name."""


class CoreMLBackend:
    """Runs ``coreml`` bundles on macOS; Core ML chooses among CPU, GPU and Neural Engine."""

    name = "coreml"
    unloads = True

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def load(self, piece: Piece) -> LoadedPiece:
        import coremltools

        path = self._bundle.path / piece.graph
        try:
            model = coremltools.models.MLModel(native_path(path), function_name=piece.function)
        except Exception as error:  # Core ML's own errors arrive as RuntimeError, coremltools' as anything
            raise BackendError(f"{path}: Core ML cannot load it ({first_line(error)})") from None
        features = _input_features(model.get_spec(), piece.function)
        images = frozenset(name for name, feature in features.items() if feature.type.WhichOneof("Type") == "imageType")

        def predict(inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
            given = {name: _to_image(each) if name in images else each for name, each in inputs.items()}
            try:
                predicted: Mapping[str, Any] = model.predict(given)
                return predicted
            except Exception as error:
                raise BackendError(f"{path}: Core ML failed ({first_line(error)})") from None

        if set(features) != {spec.name for spec in piece.inputs}:
            raise BackendError(
                f"{path}: takes inputs {sorted(features)}, manifest.json says {[spec.name for spec in piece.inputs]}"
            )
        return one_image_at_a_time(predict=predict, piece=piece, images=images, bundle=self._bundle, where=str(path))


def open_backend(bundle: Bundle, threads: int | None = 1) -> CoreMLBackend:
    """See :func:`mvmoe_deploy.backends.open_backend`; Core ML chooses the number of threads itself."""
    if sys.platform != "darwin":
        raise BackendError(
            f"{bundle.path}: Core ML runs on Apple devices only; use --backend reference (the interpreter)"
        )
    return CoreMLBackend(bundle)


def one_image_at_a_time(
    predict: Predict, piece: Piece, images: frozenset[str], bundle: Bundle, where: str
) -> LoadedPiece:
    """Wraps a package, which takes one image at a time, as a piece that runs a batch.

    Args:
        predict: runs the package.
        piece: the package's manifest entry.
        images: inputs that the package takes as pixels 0…255, normalising them itself. The caller passes
            normalised images to every piece, so these are turned back into pixels.
        bundle: the bundle, which has the preprocessing.
        where: what to call the package in errors.
    """
    names, check = [spec.name for spec in piece.inputs], OutputCheck(piece, where)

    def run(*inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        given = [
            denormalise(each, bundle.manifest.preprocessing) if name in images else each
            for name, each in zip(names, inputs, strict=True)
        ]
        results = [
            predict({name: np.asarray(each[i : i + 1], np.float32) for name, each in zip(names, given, strict=True)})
            for i in range(len(given[0]))
        ]
        missing = [spec.name for spec in piece.outputs if results and spec.name not in results[0]]
        if missing:
            raise BackendError(f"{where}: returns no {missing[0]!r}, only {sorted(results[0])}")
        try:
            outputs = [
                np.concatenate([np.asarray(result[spec.name], np.float32) for result in results])
                for spec in piece.outputs
            ]
        except (ValueError, TypeError) as error:  # the results are not arrays of one shape
            raise BackendError(f"{where}: returned no tensors of numbers ({first_line(error)}); export again") from None
        check(outputs, len(given[0]))
        return outputs

    return run


def _input_features(spec: Any, function: str | None) -> dict[str, Any]:
    """The inputs that a package's description lists for it, or for one of its functions."""
    described = [each for each in spec.description.functions if each.name == function]
    return {feature.name: feature for feature in (described[0] if described else spec.description).input}


def _to_image(pixels: NDArray[np.float32]) -> Image.Image:
    """Converts values 0…255 of shape ``[1, 3, S, S]`` to an RGB image."""
    return Image.fromarray(pixels[0].transpose(1, 2, 0).astype(np.uint8))
