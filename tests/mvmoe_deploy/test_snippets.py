"""Source code for apps, generated from a manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmoe_deploy.bundle import Bundle, Piece, TensorSpec, open_bundle
from mvmoe_deploy.errors import BundleError
from mvmoe_deploy.snippets import snippet


def as_target(path: Path, target: str, layout: str = "separate", **options: Any) -> Bundle:
    """The ONNX bundle's manifest as another target's would be: the snippets read nothing but the manifest."""
    bundle = open_bundle(path)
    suffix = {"coreml": "mlpackage", "executorch": "pte", "onnx": "onnx"}[target]
    packed = layout == "packed"

    def piece(p: Piece) -> Piece:
        graph = f"model.{suffix}" if packed else f"{p.name}.{suffix}"
        return msgspec.structs.replace(p, graph=graph, function=p.name if packed else None)

    pieces = [piece(p) for p in bundle.manifest.pieces]
    manifest = msgspec.structs.replace(bundle.manifest, target=target, layout=layout, pieces=pieces, options=options)
    return Bundle(bundle.path, manifest)


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize("target", ["coreml", "executorch"])
def test_a_swift_snippet_names_what_the_bundle_has(bundle_path: Path, target: str, layout: str) -> None:
    bundle = as_target(bundle_path, target, layout)
    code = snippet(bundle, "swift")
    trunk = bundle.piece("trunk")
    assert ("model." if layout == "packed" and target != "coreml" else "trunk") in code
    if target == "coreml":  # which takes inputs by name
        tail = bundle.piece("tail", 0)
        for spec in [*trunk.inputs, *trunk.outputs, *tail.inputs, tail.outputs[0]]:
            assert f'"{spec.name}"' in code
    for value in (*bundle.manifest.preprocessing.scale, *bundle.manifest.preprocessing.bias):
        assert f"{value:.9g}" in code
    assert code.count("{") == code.count("}")
    assert code.count("(") == code.count(")")
    assert not re.search(r"\bself\.manifest|None\b", code)


@pytest.mark.parametrize(("target", "engine"), [("onnx", "OnnxRuntimeBackend"), ("executorch", "ExecuTorchBackend")])
def test_a_kotlin_snippet_pins_its_bundle(bundle_path: Path, target: str, engine: str) -> None:
    """tests/runtimes compiles and runs it."""
    bundle = open_bundle(bundle_path)
    manifest = msgspec.structs.replace(bundle.manifest, target=target)
    code = snippet(Bundle(bundle.path, manifest, bundle.digest), "kotlin")
    assert engine in code and f'digest = "{bundle.digest}"' in code
    assert len([line for line in code.splitlines() if line and not line.startswith(("//", "import"))]) <= 10


def test_an_image_input_needs_no_preprocessing_in_the_app(bundle_path: Path) -> None:
    assert "CVPixelBuffer" in snippet(as_target(bundle_path, "coreml", image_input=True), "swift")
    assert "CVPixelBuffer" not in snippet(as_target(bundle_path, "coreml", image_input=False), "swift")


def test_languages_that_a_target_has_not(bundle_path: Path, dense_path: Path, k2: Any) -> None:
    with pytest.raises(BundleError, match="no swift snippet for onnx bundles, there is one in kotlin"):
        snippet(open_bundle(bundle_path), "swift")
    for path in (dense_path, k2.path):
        with pytest.raises(BundleError, match="one expert per image and a fused router"):
            snippet(as_target(path, "executorch"), "swift")


@pytest.mark.parametrize("name", ['x"); evil(); ("', "a\nb", "${x}"])
def test_names_from_a_manifest_cannot_become_code(bundle_path: Path, name: str) -> None:
    bundle = open_bundle(bundle_path)
    trunk = bundle.piece("trunk")
    bad = msgspec.structs.replace(trunk, inputs=[TensorSpec(name, trunk.inputs[0].shape, "float32")])
    pieces = [bad if piece.role == "trunk" else piece for piece in bundle.manifest.pieces]
    with pytest.raises(BundleError, match="cannot stand in source code"):
        snippet(Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, pieces=pieces, target="coreml")), "swift")
