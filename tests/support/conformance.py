"""The conformance cases that all languages share: bundles of tiny models, images, and Python's answers.

tests/conformance/README.md says what is written where.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tiny
from exported import kept_conversions
from numpy.typing import NDArray

import mvmoe_deploy
from mvmoe_deploy import bundle as bundles
from mvmoe_deploy import selftest
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.exporters.exporter import Options, exporter_of
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.images import Preprocessing, preprocess
from mvmoe_deploy.models import ViTConfig

ROOT = Path(__file__).parents[2]
IMAGES = Path(__file__).parents[1] / "conformance" / "images"
PHOTOS = ROOT / "docs" / "photos"

LEAST_MARGIN = 2e-3
"""Least margin of a case's route: an engine that sums in another order must not choose another expert."""

DECODERS_DIFFER = {"png_grey16.png", "png_grey12_in_16.png", "png_rgb16.png"}
"""PNG files whose pixels are up to the platform's decoder; so are those of all JPEG files."""

REFUSED = {
    "refused_bomb.png": "pixels",
    "refused_long_side.png": "side",
    "refused_empty.png": "refused_empty.png",
    "refused_text.png": "refused_text.png",
    "refused_truncated.png": "refused_truncated.png",
}
"""Images that have to be refused, and what the error must contain."""

MOE = tiny.moe_config()
K2 = tiny.moe_config(k=2, experts=3, moe_layers=2, depth=3)
BILINEAR = Preprocessing(tiny.SIZE, crop=0.875, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 1.0))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a bundle is made.

    Attributes:
        config: the model's.
        target: export target.
        options: precision, layout, and whether the router is separate.
        preprocessing: if not the usual.
    """

    config: ViTConfig
    target: str = "onnx"
    options: Options | None = None
    preprocessing: Preprocessing = dataclasses.field(default_factory=lambda: Preprocessing(tiny.SIZE))

    @property
    def seed(self) -> int:
        """The seed of weights that send some of the images to every expert, none of them nearly to another."""
        return {MOE: 6, K2: 5}.get(self.config, 0)


BUNDLES = {
    "moe-standalone-fp32": Recipe(MOE),
    "moe-standalone-fp16": Recipe(MOE, options=Options(precision="fp16")),
    "moe-swappable-fp32": Recipe(MOE, options=Options(layout="swappable")),
    "moe-standalone-int8": Recipe(MOE, options=Options(precision="int8")),
    "moe-swappable-int8": Recipe(MOE, options=Options(precision="int8", layout="swappable")),
    "moe-standalone-int4": Recipe(MOE, options=Options(precision="int4")),
    "moe-separate-router-fp32": Recipe(MOE, options=Options(separate_router=True)),
    "moe-bilinear-crop-fp32": Recipe(MOE, preprocessing=BILINEAR),
    "k2-standalone-fp32": Recipe(K2),
    "k2-swappable-int4": Recipe(K2, options=Options(precision="int4", layout="swappable")),
    "k2-swappable-fp32": Recipe(K2, options=Options(layout="swappable")),
    "dense-fp32": Recipe(tiny.dense_config()),
}
EXECUTORCH = {
    "moe-executorch-fp32": Recipe(MOE, target="executorch"),
    "moe-executorch-packed-fp32": Recipe(MOE, target="executorch", options=Options(layout="packed")),
    "k2-executorch-fp32": Recipe(K2, target="executorch"),
}
"""Made only when asked for: each takes half a minute."""


def write(out: Path, *, executorch: bool = False) -> Path:
    """Writes ``conformance.json`` with the folders ``images``, ``bundles`` and ``damaged`` beside it, and returns it."""
    for folder in ("images", "bundles", "damaged"):
        shutil.rmtree(out / folder, ignore_errors=True)
    shutil.copytree(IMAGES, out / "images")
    for photo in PHOTOS.glob("*.jpg"):
        shutil.copy(photo, out / "images")
    recipes = {**BUNDLES, **(EXECUTORCH if executorch else {})}
    with kept_conversions():
        made = {name: _export(recipe, out / "bundles" / f"{name}.mvmoe") for name, recipe in recipes.items()}
    images = sorted(path for path in (out / "images").iterdir() if path.name not in REFUSED)
    assert not {path.name for path in (out / "images").iterdir()} - {path.name for path in images} - set(REFUSED)
    file = out / "conformance.json"
    content = {
        "images": str((out / "images").resolve()),
        "bundles": [_expected(name, bundle, images) for name, bundle in made.items()],
        "refused_images": [{"image": name, "error": error} for name, error in REFUSED.items()],
        "damaged": _damaged(made, out / "damaged", images),
        "selftests": _selftests(made["moe-standalone-fp32"], out / "damaged"),
    }
    file.write_text(json.dumps(content, indent=1))
    return file


def _export(recipe: Recipe, path: Path) -> Bundle:
    model = tiny.lively_model(recipe.config, recipe.seed)
    header = msgspec.structs.replace(tiny.header_for(recipe.config), preprocessing=recipe.preprocessing)
    return export_model(model, header, recipe.target, path, options=recipe.options)


def _expected(name: str, bundle: Bundle, images: list[Path]) -> dict[str, Any]:
    manifest = bundle.manifest
    tolerance = exporter_of(manifest.target).precision(manifest.precision).selftest
    with mvmoe_deploy.load(bundle.path) as runtime:
        cases = []
        for image in images:
            answer = runtime.answer(image)
            if manifest.routing:
                _, routed = runtime.run(preprocess(image, manifest.preprocessing)[None])
                assert routed is not None
                ranked = -np.sort(-routed.probabilities[0])[: manifest.routing.k + 1]
                margin = (-np.diff(ranked)).min()
                if margin < tolerance.gate / 2:  # activations may be rounded otherwise: 8 bits tell less apart
                    continue
                assert margin >= LEAST_MARGIN, f"{name}: {image.name}: {ranked}; take another seed"
            cases.append(
                {
                    "image": image.name,
                    "pixels": answer.pixels,
                    "exact": image.suffix != ".jpg" and image.name not in DECODERS_DIFFER,
                    "experts": answer.experts,
                    "gates": answer.gates,
                    "logits": answer.logits.tolist(),
                }
            )
    assert len(cases) >= 28, f"{name}: few images have a clear route; take another seed"
    return {
        "name": name,
        "path": f"bundles/{bundle.path.name}",
        "target": manifest.target,
        "layout": manifest.layout,
        "precision": manifest.precision,
        "tolerance": {"gate": tolerance.gate, "logits": tolerance.logits},
        "cases": cases,
    }


Edit = Callable[[dict[str, Any]], object]


def put(*keys: str | int, value: Any) -> Edit:
    """Sets ``manifest[key]…[key] = value``."""

    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    """Removes ``manifest[key]…[key]``."""

    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


EDITS: dict[str, Edit] = {
    "another-format": put("format", value="zip"),
    "version-of-the-future": put("version", value=bundles.VERSION + 1),
    "version-as-text": put("version", value="4"),
    "no-version": drop("version"),
    "unknown-target": put("target", value="tflite"),
    "unknown-field": put("colour", value=1),
    "unknown-field-of-a-piece": put("pieces", 0, "colour", value=1),
    "unknown-field-of-routing": put("routing", "colour", value=1),
    "no-pieces": drop("pieces"),
    "no-routing": drop("routing"),
    "pieces-of-another-type": put("pieces", value={}),
    "short-sha256": put("files", 0, "sha256", value="abc"),
    "negative-size": put("files", 0, "bytes", value=-1),
    "size-beyond-any-file": put("files", 0, "bytes", value=1 << 60),
    "negative-weights": put("pieces", 0, "weight_bytes", value=-5),
    "empty-shape": put("pieces", 1, "inputs", 0, "shape", value=[]),
    "shape-of-nine": put("pieces", 0, "inputs", 0, "shape", value=[1] * 9),
    "dimension-of-zero": put("pieces", 0, "inputs", 0, "shape", 1, value=0),
    "absurd-input-size": put("preprocessing", "size", value=10**6),
    "another-input-size": put("preprocessing", "size", value=64),
    "crop-of-zero": put("preprocessing", "crop", value=0),
    "crop-above-one": put("preprocessing", "crop", value=1.5),
    "unknown-interpolation": put("preprocessing", "interpolation", value="nearest"),
    "mean-of-two-channels": put("preprocessing", "mean", value=[0.5, 0.5]),
    "std-of-zero": put("preprocessing", "std", value=[0.5, 0.0, 0.5]),
    "five-experts-routed": put("routing", "experts", value=5),
    "k-of-zero": put("routing", "k", value=0),
    "k-above-experts": put("routing", "k", value=5),
    "k-without-segments": put("routing", "k", value=2),
    "unknown-gate": put("routing", "gate", value="sigmoid"),
    "dense-with-experts": put("routing", value=None),
    "class-that-is-not-there": put("experts", 0, "classes", value=[6]),
    "three-experts-described": drop("experts", 0),
    "fewer-ids-than-names": drop("class_ids", 0),
    "no-second-expert": drop("pieces", 2),
    "expert-twice": put("pieces", 2, "expert", value=0),
    "piece-too-many": lambda manifest: manifest["pieces"].append(manifest["pieces"][2]),
    "piece-without-files": put("pieces", 0, "files", value=[]),
    "piece-with-an-unlisted-file": lambda manifest: manifest["pieces"][0]["files"].append("other.bin"),
    "graph-not-among-its-files": put("pieces", 0, "files", value=["trunk.bin"]),
    "file-twice": lambda manifest: manifest["files"].append(manifest["files"][0]),
    "selftest-not-among-files": put("selftest", value="other.json"),
    "path-to-parent": put("pieces", 0, "graph", value="../trunk.onnx"),
    "path-from-root": put("pieces", 0, "graph", value="/trunk.onnx"),
    "path-with-backslash": put("pieces", 0, "graph", value="..\\trunk.onnx"),
    "path-with-drive": put("pieces", 0, "graph", value="C:trunk.onnx"),
    "path-with-zero-byte": put("files", 0, "path", value="trunk.onnx\0"),
    "path-with-empty-part": put("files", 0, "path", value="a//b"),
    "path-beyond-any-name": put("files", 0, "path", value="ü" * 200),
    "tail-without-expert": put("pieces", 1, "expert", value=None),
    "trunk-with-expert": put("pieces", 0, "expert", value=0),
    "tail-with-layer": put("pieces", 1, "layer", value=0),
    "trunk-without-probabilities": drop("pieces", 0, "outputs", 1),
    "tail-without-gate": drop("pieces", 1, "inputs", 1),
    "tail-that-ranks-once": drop("pieces", 1, "outputs", 1),
    "outputs-in-another-order": lambda manifest: manifest["pieces"][1]["outputs"].reverse(),
    "ranks-more-than-there-are": put("pieces", 1, "outputs", 1, "shape", value=["batch", 7]),
    "ranked-classes-as-floats": put("pieces", 1, "outputs", 2, "dtype", value="float32"),
    "input-of-bytes": put("pieces", 0, "inputs", 0, "dtype", value="uint8"),
}
"""Changes to the manifest of moe-standalone-fp32 after which it has to be refused, without another file being read."""

SWAPPABLE_EDITS: dict[str, Edit] = {
    "weight-in-an-unlisted-file": put("pieces", 1, "weights", 0, "file", value="trunk.bin"),
    "weight-beyond-its-file": put("pieces", 1, "weights", 0, "offset", value=1 << 30),
    "weight-across-its-alignment": put("pieces", 1, "weights", 0, "offset", value=4),
    "weight-of-an-unknown-type": put("pieces", 1, "weights", 0, "dtype", value="float64"),
    "weight-named-as-an-input": put("pieces", 1, "weights", 0, "name", value="tokens"),
}
"""The same, of moe-swappable-fp32."""


def edit_selftest(bundle: Path, edit: Edit) -> None:
    """Changes a bundle's self-test in place, and the manifest with it."""
    file = bundle / selftest.FILE
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    tiny.rehash(bundle)


def of_first(field: str, change: Callable[[Any], Any]) -> Edit:
    """Changes a field of the first case."""

    def edit(content: dict[str, Any]) -> None:
        content["cases"][0][field] = change(content["cases"][0][field])

    return edit


def with_logits(change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Edit:
    """Changes the logits of the first case."""

    def changed(text: str) -> str:
        return base64.b64encode(change(np.frombuffer(base64.b64decode(text), "<f4")).astype("<f4").tobytes()).decode()

    return of_first("logits", changed)


def logits_off_by(share: float) -> Edit:
    """Moves the first case's largest logit so that the answer departs by a share of the tolerance of fp32."""

    def change(right: NDArray[np.float32]) -> NDArray[np.float32]:
        low, high = 0.0, 1.0
        for _ in range(60):  # the spread changes with the logit, so the step is searched for
            middle = (low + high) / 2
            wrong = right.copy()
            wrong[right.argmax()] += middle
            departs = selftest.logits_departure(right, wrong) >= share * 1e-4
            low, high = (low, middle) if departs else (middle, high)
        return wrong

    return with_logits(change)


def swap_experts(content: dict[str, Any]) -> None:
    """Has the first two cases expect each other's experts."""
    one, other = content["cases"][0], content["cases"][1]
    one["experts"], other["experts"] = other["experts"], one["experts"]


DEPARTURES: dict[str, tuple[Edit, str | None]] = {
    "other-pixels": (of_first("pixels", lambda text: f"{int(text[0], 16) ^ 1:x}{text[1:]}"), "pixels"),
    "another-expert": (swap_experts, "route"),
    "a-gate-beyond-the-tolerance": (of_first("gates", lambda gates: [gates[0] - 1.01e-4]), "gate"),
    "a-gate-within": (of_first("gates", lambda gates: [gates[0] - 0.99e-4]), None),
    "a-logit-beyond-the-tolerance": (logits_off_by(1.02), "logits"),
    "a-logit-within": (logits_off_by(0.98), None),
    "a-shift-of-all-logits": (with_logits(lambda logits: logits + 5), None),
    "a-masked-class": (with_logits(lambda logits: np.where(logits == logits.min(), -np.inf, logits)), None),
}
"""Self-tests that expect something else, and the stage at which they fail."""

REFUSED_SELFTESTS: dict[str, tuple[Edit, str]] = {
    "base64-cut-short": (of_first("logits", lambda text: text[:-3]), "base64"),
    "a-logit-too-few": (with_logits(lambda logits: logits[:-1]), "20 bytes of logits for 6 classes"),
    "a-million-logits": (of_first("logits", lambda _: "A" * 4_000_000), "bytes of logits for 6 classes"),
    "logits-of-nan": (with_logits(lambda logits: logits * np.nan), "not a number that a model can answer"),
    "logits-of-infinity": (with_logits(lambda logits: logits + np.inf), "not a number that a model can answer"),
    "a-gate-of-2": (of_first("gates", lambda _: [2.0]), "not a number that a model can answer"),
    "a-gate-of-text": (of_first("gates", lambda _: ["0.5"]), "Expected `float`"),
    "two-experts-for-k-1": (of_first("experts", lambda found: [*found, 0]), "an image has 1 of 4"),
    "an-expert-that-is-not-there": (of_first("experts", lambda _: [4]), "an image has 1 of 4"),
    "a-negative-expert": (of_first("experts", lambda _: [-1]), "Expected `int` >= 0"),
    "a-hash-cut-short": (of_first("pixels", lambda text: text[:-1]), "regex"),
    "a-picture-not-listed": (of_first("image", lambda _: "manifest.json"), "is not among the bundle's files"),
    "a-picture-outside": (of_first("image", lambda _: "../picture.png"), "is not among the bundle's files"),
    "a-field-too-many": (put("colour", value=1), "unknown field `colour`"),
    "a-field-of-a-case-too-many": (put("cases", 0, "colour", value=1), "unknown field `colour`"),
    "a-field-too-few": (drop("cases", 0, "gates"), "required field `gates`"),
    "no-tolerance": (drop("tolerance"), "required field `tolerance`"),
    "a-tolerance-of-0": (put("tolerance", "logits", value=0), "> 0.0"),
    "a-tolerance-of-11": (put("tolerance", "gate", value=11), "<= 10.0"),
    "no-cases": (put("cases", value=[]), "length >= 1"),
}
"""Self-tests that cannot be one, and a part of Python's error."""


def _selftests(bundle: Bundle, out: Path) -> list[dict[str, Any]]:
    """Bundles whose self-test fails at a stage, passes by little, or has to be refused, naming a file."""
    found: list[dict[str, Any]] = []

    def add(name: str, damage: Callable[[Path], object], failed: str | None, error: str | None = None) -> None:
        folder = Path(shutil.copytree(bundle.path, out / f"selftest-{name}.mvmoe"))
        damage(folder)
        found.append({"name": name, "path": f"damaged/{folder.name}", "failed": failed, "error": error})

    for name, (edit, stage) in DEPARTURES.items():
        add(name, functools.partial(edit_selftest, edit=edit), stage)
    for name, (edit, _) in REFUSED_SELFTESTS.items():
        add(name, functools.partial(edit_selftest, edit=edit), None, selftest.FILE)
    for file in (selftest.FILE, "selftest_02.png"):
        add(f"flipped-bit-in-{file}", lambda folder, file=file: flip(folder / file), None, file)
        add(f"no-{file}", lambda folder, file=file: (folder / file).unlink(), None, file)
    add("no-json", lambda folder: replace(folder, selftest.FILE, b"{"), None, selftest.FILE)
    for file, stage in (("trunk.bin", "route"), ("expert_02.bin", "logits")):
        size = (bundle.path / file).stat().st_size
        nan = np.full(size // 4, np.nan, "<f4").tobytes()
        add(f"nan-from-{file}", lambda folder, file=file, nan=nan: replace(folder, file, nan), stage)
    return found


def replace(bundle: Path, file: str, content: bytes) -> None:
    """Replaces a file of a bundle, and its hash in the manifest with it."""
    (bundle / file).write_bytes(content)
    tiny.rehash(bundle)


def _damaged(made: dict[str, Bundle], out: Path, images: list[Path]) -> list[dict[str, Any]]:
    """Bundles that have to be refused; of those that are refused at opening only the manifest is there."""
    found = []

    def add(name: str, when: str, error: str, **more: str) -> None:
        found.append({"name": name, "path": f"damaged/{name}.mvmoe", "when": when, "error": error, **more})

    def manifest_of(bundle: str, name: str) -> Path:
        folder = out / f"{name}.mvmoe"
        folder.mkdir(parents=True)
        for file in (bundles.MANIFEST, bundles.MANIFEST_DIGEST):
            shutil.copy(made[bundle].path / file, folder)
        return folder

    for bundle, edits in (("moe-standalone-fp32", EDITS), ("moe-swappable-fp32", SWAPPABLE_EDITS)):
        for name, edit in edits.items():
            tiny.edit_manifest(manifest_of(bundle, name), edit)
            add(name, "open", bundles.MANIFEST)
    folder = manifest_of("moe-standalone-fp32", "no-manifest-digest")
    (folder / bundles.MANIFEST_DIGEST).unlink()
    add(folder.stem, "open", bundles.MANIFEST_DIGEST)
    folder = manifest_of("moe-standalone-fp32", "edited-manifest")
    text = (folder / bundles.MANIFEST).read_text()
    (folder / bundles.MANIFEST).write_text(text.replace("thing 0", "thong 0"))
    add(folder.stem, "open", bundles.MANIFEST_DIGEST)
    folder = manifest_of("moe-standalone-fp32", "manifest-that-is-no-json")
    (folder / bundles.MANIFEST).write_text(text[:1000])
    tiny.record_digest(folder)
    add(folder.stem, "open", bundles.MANIFEST)
    folder = manifest_of("moe-standalone-fp32", "manifest-of-33-MiB")
    (folder / bundles.MANIFEST).write_bytes(text.encode() + b" " * (33 << 20))
    tiny.record_digest(folder)
    add(folder.stem, "open", bundles.MANIFEST)

    image = _image_for(made["moe-standalone-fp32"], images, expert=2)
    for name, damage, file, when in (
        ("flipped-bit-in-trunk", flip, "trunk.bin", "load"),
        ("trunk-cut-short", cut, "trunk.bin", "load"),
        ("no-trunk", Path.unlink, "trunk.onnx", "load"),
        ("flipped-bit-in-expert", flip, "expert_02.bin", "predict"),
        ("expert-cut-short", cut, "expert_02.bin", "predict"),
        ("no-expert", Path.unlink, "expert_02.onnx", "predict"),
        ("flipped-bit-in-shared-weights", flip, "tail_shared.bin", "predict"),
    ):
        folder = Path(shutil.copytree(made["moe-standalone-fp32"].path, out / f"{name}.mvmoe"))
        damage(folder / file)
        add(name, when, file, **({"image": image} if when == "predict" else {}))
    for name, edit, when in (
        ("graph-with-another-input", put("pieces", 0, "inputs", 0, "name", value="pixels"), "load"),
        ("expert-with-another-input", put("pieces", 3, "inputs", 0, "name", value="features"), "predict"),
    ):
        folder = Path(shutil.copytree(made["moe-standalone-fp32"].path, out / f"{name}.mvmoe"))
        tiny.edit_manifest(folder, edit)
        add(name, when, "trunk.onnx" if when == "load" else "expert_02.onnx", image=image)
    for name, file in (("trunk-of-nan", "trunk"), ("expert-of-nan", "expert_02")):
        folder = Path(shutil.copytree(made["moe-standalone-fp32"].path, out / f"{name}.mvmoe"))
        weights = folder / f"{file}.bin"
        weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, "<f4").tobytes())
        tiny.rehash(folder)
        add(name, "predict", file, image=image)
    return found


def flip(file: Path) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    """Leaves the last byte away."""
    file.write_bytes(file.read_bytes()[:-1])


def _image_for(bundle: Bundle, images: list[Path], expert: int) -> str:
    """The first image that is routed to an expert."""
    with mvmoe_deploy.load(bundle.path) as runtime:
        return next(image.name for image in images if runtime.answer(image).experts == [expert])
