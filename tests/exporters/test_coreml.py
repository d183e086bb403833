"""The Core ML target: every deployment target and precision, both layouts, and what packages say about themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("coremltools")

from mvmoe_deploy import models
from mvmoe_deploy.backends.mil import Package, ReferenceBackend, read_package
from mvmoe_deploy.bundle import Bundle, Manifest, Source
from mvmoe_deploy.errors import ExportError, ImageError
from mvmoe_deploy.exporters.coreml import convert as coreml
from mvmoe_deploy.exporters.coreml.exporter import CoreMLOptions
from mvmoe_deploy.exporters.graph import flatten
from mvmoe_deploy.exporters.job import Job
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import split_model
from mvmoe_deploy.images import Preprocessing, normalise
from mvmoe_deploy.quiet import quiet

# Wide enough that its matrices pass coremltools' thresholds for compression
CONFIG = tiny.moe_config(width=64, experts=2)
DENSE = tiny.dense_config(width=64, depth=1)

LARGEST_ERROR = {"fp32": 0.3, "fp16": 0.25, "int8": 0.35, "palette6": 0.5, "palette4": 0.8}
"""Largest error of a piece, as a share of what the exporter allows at that precision: about twice the largest share seen
here, which is 0.14, 0.13, 0.17, 0.25 and 0.40. Deeper models, which tolerances were measured on, come nearer to 1."""


def export(path: Path, config: models.ViTConfig = CONFIG, *, source: Source | None = None, **options: Any) -> Bundle:
    """A verified bundle of a tiny model."""
    options = {"precision": "fp16", **options}
    return export_model(
        tiny.lively_model(config),
        tiny.header_for(config),
        "coreml",
        path,
        source=source,
        options=CoreMLOptions(**options),
    )


def worst(bundle: Bundle) -> float:
    """The largest error that verification saw in a piece, as a share of what is allowed."""
    return float(max(piece["tolerances"] for piece in bundle.manifest.verification["pieces"]))


def ops(package: Package) -> set[str]:
    """Kinds of op in a package."""
    functions = package.model.mlProgram.functions.values()
    return {op.type for f in functions for block in f.block_specializations.values() for op in block.operations}


@pytest.mark.parametrize(
    ("target", "precision", "others"),
    [
        ("iOS16", "fp16", {"separate_router": True}),
        ("iOS16", "fp32", {"image_input": True, "classifier": True}),
        ("iOS16", "int8", {"image_input": True}),
        ("iOS16", "palette6", {"classifier": True}),
        ("iOS16", "palette4", {}),
        ("iOS17", "fp16", {"image_input": True, "classifier": True}),
        ("iOS17", "fp32", {}),
        ("iOS17", "int8", {"classifier": True}),
        ("iOS17", "palette6", {}),
        ("iOS17", "palette4", {"image_input": True}),
        ("iOS18", "fp32", {}),
        ("iOS18", "fp16", {"layout": "packed", "image_input": True}),
        ("iOS18", "int8", {"layout": "packed"}),
        ("iOS18", "palette6", {"image_input": True, "classifier": True}),
        ("iOS18", "palette4", {"layout": "packed", "image_input": True}),
    ],
)
def test_what_is_written_computes_what_pytorch_does(
    target: str, precision: str, others: dict[str, Any], tmp_path: Path
) -> None:
    # compressing takes long, so most of it is done on a single piece
    routed = precision in ("fp16", "fp32") or "layout" in others
    bundle = export(
        tmp_path / "b.mvmoe",
        CONFIG if routed else DENSE,
        minimum_deployment_target=target,
        precision=precision,
        **others,
    )
    assert bundle.manifest.verification["backend"] == "reference"
    assert worst(bundle) <= LARGEST_ERROR[precision]
    package = read_package(bundle.path / bundle.manifest.pieces[-1].graph)
    assert package.model.specificationVersion == {"iOS16": 7, "iOS17": 8, "iOS18": 9}[target]
    quantised = "constexpr_blockwise_shift_scale" if target == "iOS18" else "constexpr_affine_dequantize"
    compression = {"int8": {quantised}, "palette6": {"constexpr_lut_to_dense"}, "palette4": {"constexpr_lut_to_dense"}}
    assert {op for op in ops(package) if op.startswith("constexpr")} == compression.get(precision, set())


def test_segments_for_more_than_one_expert_per_image(tmp_path: Path) -> None:
    config = tiny.moe_config(k=2, experts=2, moe_layers=2, depth=3, router_input="mean")
    bundle = export(tmp_path / "b.mvmoe", config, precision="fp32", layout="packed", minimum_deployment_target="iOS18")
    assert worst(bundle) <= LARGEST_ERROR["fp32"]
    assert bundle.piece("expert_layer", 1, 1).function == "expert_01_layer_1"


class CompleteConvRouted(tiny.ConvRouted):
    """A conv model that also has the methods that the protocol needs for k > 1."""

    attention_module = expert_module = head_module = torch.nn.Module.forward


def test_a_model_that_is_no_vit_and_whose_weights_are_folded(tmp_path: Path) -> None:
    """Its BatchNorm is folded into convolutions before the tails are converted."""
    header = msgspec.structs.replace(tiny.header_for(tiny.moe_config(experts=3)), model={"architecture": "conv"})
    bundle = export_model(CompleteConvRouted(), header, "coreml", tmp_path / "b.mvmoe", options=CoreMLOptions("fp32"))
    assert len(bundle.manifest.pieces) == 4
    assert worst(bundle) <= LARGEST_ERROR["fp32"]


# Layouts


def test_separate_packages(tmp_path: Path) -> None:
    bundle = export(tmp_path / "b.mvmoe")
    assert [piece.graph for piece in bundle.manifest.pieces] == [
        "trunk.mlpackage", "expert_00.mlpackage", "expert_01.mlpackage",
    ]  # fmt: skip
    tail = bundle.piece("tail", 1)
    assert tail.function is None
    assert set(tail.files) == {
        "expert_01.mlpackage/Manifest.json",
        "expert_01.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "expert_01.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    }
    assert [spec.shape for spec in tail.inputs] == [[1, 17, 64], [1]]
    assert 2 * tail.parameters * 0.98 <= tail.weight_bytes <= 2 * tail.parameters
    on_disk = {file.relative_to(bundle.path).as_posix() for file in bundle.path.rglob("*") if file.is_file()}
    assert on_disk == {file.path for file in bundle.manifest.files} | {"manifest.json", "manifest.sha256"}


def job(model: models.ViT, folder: Path, **options: Any) -> Job[CoreMLOptions]:
    """What the pipeline would hand to ``convert``; for tests that need no verification."""
    config, header = model.config, tiny.header_for(model.config)
    pieces = split_model(model, config.image_size)
    manifest = Manifest(
        "mvmoe-bundle", 1, "coreml", "separate", "fp16", header.model, pieces.routing, header.preprocessing,
        header.class_ids, header.class_names, [], [], [], {}, Source("", "0" * 64), {},
    )  # fmt: skip
    given = CoreMLOptions(**{"precision": "fp16", **options})
    images = tiny.inputs(2, config.image_size)
    return Job(
        pieces,
        folder,
        options=given,
        manifest=manifest,
        images=images,
        piece_flops=lambda role: 0,
        progress=lambda what: None,
    )


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_packed_package_stores_every_weight_once(tmp_path: Path) -> None:
    """The limit holds at a real model's size, for weights and program together."""
    model = models.build(models.config_from_name("mvmoe_12x192")).eval()
    converted = coreml.convert(job(model, tmp_path, layout="packed", minimum_deployment_target="iOS18"))
    distinct = sum(parameter.numel() for parameter in model.parameters())
    assert bytes_in(tmp_path) <= 1.03 * 2 * distinct
    assert {piece.graph for piece in converted.pieces} == {"model.mlpackage"}
    assert [piece.function for piece in converted.pieces] == ["trunk", *(f"expert_{e:02d}" for e in range(10))]


def test_weights_put_into_a_traced_tail_are_those_that_converting_it_gives(tmp_path: Path) -> None:
    model = tiny.lively_model(CONFIG)
    work = job(model, tmp_path)
    tails = work.split.of("tail")
    for piece, placed in zip(tails, coreml._convert_family(tails, work), strict=True):
        alone = coreml._convert_module(piece, flatten([piece], [piece.module])[0], work)
        assert placed.weights == alone.weights
        assert placed.model.mlProgram == alone.model.mlProgram


def test_exporting_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    """Packages hold no random identifier and no date, and clustering starts from nothing random."""
    for number, (config, options) in enumerate(
        (
            (DENSE, {"precision": "palette6", "image_input": True, "classifier": True}),
            (CONFIG, {"precision": "fp16", "layout": "packed", "minimum_deployment_target": "iOS18"}),
        )
    ):
        hashes = []
        for time in range(2):
            folder = tmp_path / f"{number}-{time}"
            folder.mkdir()
            coreml.convert(job(tiny.lively_model(config), folder, **options))
            hashes.append({
                file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in folder.rglob("*") if file.is_file()
            })  # fmt: skip
        assert hashes[0] == hashes[1]


# Inputs and outputs


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Image input and class labels, for iOS 16, at single precision."""
    return export(
        tmp_path_factory.mktemp("coreml") / "b.mvmoe",
        precision="fp32",
        minimum_deployment_target="iOS16",
        image_input=True,
        classifier=True,
        author="A. N. Other",
        licence="Apache-2.0",
        source=Source("birds.pt", "5a" * 32),
    )


def test_an_image_input_takes_pixels_and_normalises_them_exactly(classifier: Bundle) -> None:
    preprocessing = Preprocessing(size=CONFIG.image_size)
    assert len(set(preprocessing.std)) == 3  # a scale per channel, which ct.ImageType cannot hold
    package = read_package(classifier.path / "trunk.mlpackage")
    feature = package.model.description.input[0].type.imageType
    assert (feature.width, feature.height, feature.colorSpace) == (32, 32, feature.RGB)
    program = package.program()
    assert program.images == {"images"}
    pixels = tiny.images(1)
    tokens = program({"images": pixels.transpose(0, 3, 1, 2).astype(np.float32)})["tokens"]
    with torch.no_grad():
        wanted = tiny.lively_model(CONFIG).trunk(torch.from_numpy(normalise(pixels, preprocessing))).numpy()
    np.testing.assert_allclose(tokens, wanted, atol=3e-6 * np.abs(wanted).max())


def test_an_image_input_refuses_what_is_no_image(classifier: Bundle) -> None:
    trunk = ReferenceBackend(classifier).load(classifier.piece("trunk"))
    with pytest.raises(ImageError, match="not a normalised 8-bit image"):
        trunk(np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32))


def test_a_classifier_names_the_class_and_gives_probabilities(classifier: Bundle) -> None:
    package = read_package(classifier.path / "expert_01.mlpackage")
    description = package.model.description
    assert description.predictedFeatureName == "classLabel"
    assert description.predictedProbabilitiesName == "classLabel_probs"
    assert [feature.name for feature in description.output] == ["classLabel", "classLabel_probs", "logits"]
    tokens = np.random.default_rng(0).standard_normal((1, 17, 64)).astype(np.float32)
    result = package.program()({"tokens": tokens, "gate": np.float32([0.6])})
    logits = result["logits"][0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert result["classLabel"] == f"thing {logits.argmax()}"
    assert list(result["classLabel_probs"]) == classifier.manifest.class_names
    np.testing.assert_allclose(list(result["classLabel_probs"].values()), probabilities, rtol=1e-5)


def test_packed_tails_are_classifiers_too(tmp_path: Path) -> None:
    bundle = export(
        tmp_path / "b.mvmoe", precision="fp32", layout="packed", minimum_deployment_target="iOS18", classifier=True
    )
    package = read_package(bundle.path / "model.mlpackage")
    trunk, *tails = package.model.description.functions
    assert not trunk.predictedFeatureName
    for tail in tails:
        assert (tail.predictedFeatureName, tail.predictedProbabilitiesName) == ("classLabel", "classLabel_probs")
        assert [feature.name for feature in tail.output] == ["classLabel", "classLabel_probs", "logits"]
        tokens = np.random.default_rng(0).standard_normal((1, 17, 64)).astype(np.float32)
        result = package.program(tail.name)({"tokens": tokens, "gate": np.float32([0.6])})
        assert result["classLabel"] == f"thing {result['logits'][0].argmax()}"
        assert sum(result["classLabel_probs"].values()) == pytest.approx(1, rel=1e-5)


def test_the_classifier_is_the_one_coremltools_writes(classifier: Bundle) -> None:
    """Except for the logits, with which coremltools fails."""
    labels = classifier.manifest.class_names
    with quiet():
        program = torch.export.export(torch.nn.Softmax(-1), (torch.zeros(1, len(labels)),)).run_decompositions({})
        theirs = coreml.ct.convert(
            program,
            inputs=[coreml.ct.TensorType("logits", (1, len(labels)), np.float32)],
            outputs=[coreml.ct.TensorType(coreml.SOFTMAX, dtype=np.float32)],
            classifier_config=coreml.ct.ClassifierConfig(labels),
            minimum_deployment_target=coreml.ct.target.iOS16,
            skip_model_load=True,
        ).get_spec()
    ours = read_package(classifier.path / "expert_00.mlpackage").model
    last = [next(iter(m.mlProgram.functions["main"].block_specializations.values())) for m in (ours, theirs)]
    assert last[0].operations[-1] == last[1].operations[-1]
    assert list(last[0].outputs) == [*last[1].outputs, "logits"]
    for mine, other in zip(ours.description.output, theirs.description.output, strict=False):
        assert (mine.name, mine.type) == (other.name, other.type)


def test_classes_of_one_name_keep_their_own_label(tmp_path: Path) -> None:
    manifest = job(tiny.lively_model(CONFIG), tmp_path).manifest
    names = ["crane", "crane", *manifest.class_names[2:]]
    labels = coreml.class_labels(msgspec.structs.replace(manifest, class_names=names))
    assert labels[:3] == ["crane (n0000)", "crane (n0001)", "thing 2"]


# Metadata


def test_metadata_that_xcode_shows(classifier: Bundle) -> None:
    description = read_package(classifier.path / "expert_01.mlpackage").model.description
    metadata = description.metadata
    assert (metadata.author, metadata.license) == ("A. N. Other", "Apache-2.0")
    assert "expert 1 group 1, for thing 1, thing 3, thing 5" in metadata.shortDescription
    user = dict(metadata.userDefined)
    assert user["mvmoe.checkpoint_sha256"] == "5a" * 32
    assert json.loads(user["classes"]) == classifier.manifest.class_names
    assert coreml.DATE not in user
    for feature in (*description.input, *description.output):
        assert feature.shortDescription
    trunk = read_package(classifier.path / "trunk.mlpackage").model.description
    assert "normalised inside" in trunk.input[0].shortDescription
    assert not list(classifier.path.rglob("executorch_debug_handle_mapping.json"))


def test_a_packed_package_says_what_each_function_is_for(tmp_path: Path) -> None:
    bundle = export(tmp_path / "b.mvmoe", layout="packed", minimum_deployment_target="iOS18", author="A. N. Other")
    description = read_package(bundle.path / "model.mlpackage").model.description
    assert description.defaultFunctionName == "trunk"
    assert [function.name for function in description.functions] == ["trunk", "expert_00", "expert_01"]
    assert description.metadata.author == "A. N. Other"
    assert "group 1" in description.metadata.userDefined["expert_01"]
    for function in description.functions:
        for feature in (*function.input, *function.output):
            assert feature.shortDescription


# Options that do not go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "packed", "minimum_deployment_target": "iOS17"}, "needs iOS 18"),
        ({"minimum_deployment_target": "iOS13"}, "'iOS13' is unknown: expected one of iOS16, iOS17, iOS18"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        coreml.convert(job(tiny.lively_model(CONFIG), tmp_path, **options))
    assert not list(tmp_path.iterdir())


def test_a_module_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    class Sorted(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(images[:, 0]).real

    work = job(tiny.lively_model(tiny.dense_config()), tmp_path)
    work.split.pieces[0].module = Sorted()
    with pytest.raises(ExportError, match=r"model: coremltools 9\S* cannot convert it"):
        coreml.convert(work)
