"""The Core ML target: ML Program packages for iOS 16 and later, converted through torch.export.

Every package takes one image at a time: on a device images come one by one, and the Neural Engine runs fixed shapes.
Layout ``separate`` writes packages that can be shipped and downloaded one expert at a time. Layout ``packed`` writes
one multifunction package (iOS 18) in which the weights that tails share are stored once.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvmoe_deploy.backends import native_path
from mvmoe_deploy.backends.mil import MODEL_FILE, WEIGHTS_FILE, blob_at, read_package
from mvmoe_deploy.bundle import GATE, IMAGES, LOGITS, PROBABILITIES, TOKENS, Bundle, Manifest, Piece
from mvmoe_deploy.errors import BackendError, ExportError, root_cause
from mvmoe_deploy.exporters.biases import correct_biases
from mvmoe_deploy.exporters.coreml.exporter import CoreMLOptions
from mvmoe_deploy.exporters.graph import flatten
from mvmoe_deploy.exporters.job import Converted, Job, describe_piece, refusal
from mvmoe_deploy.exporters.split import PieceModule, shared_weights
from mvmoe_deploy.exporters.weights import StoredWeights
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.quiet import quiet

with quiet():
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight
    from coremltools.proto import MIL_pb2, Model_pb2

PACKED = "model.mlpackage"

CLASS_LABEL, CLASS_PROBABILITIES = "classLabel", "classLabel_probs"
"""The outputs that a classifier has beside the logits, as coremltools names them."""

SOFTMAX = "class_probabilities"
"""The tensor that both outputs are made from."""

THRESHOLDS = {"int8": 2048, "palette6": 10_000, "palette4": 10_000}
"""Weights of at most this many elements keep half precision. For int8 it is what coremltools does by default. It would
cluster smaller weights with scikit-learn, which need not be installed; it clusters larger ones with its own exact
one-dimensional k-means."""

DATE = "com.github.apple.coremltools.conversion_date"


@dataclass
class PackageDraft:
    """A converted piece in memory: the model and its ``weight.bin``."""

    model: Model_pb2.Model
    weights: bytes

    @classmethod
    def read(cls, path: Path) -> PackageDraft:
        """Reads a package that coremltools wrote."""
        read = read_package(path)
        return cls(read.model, read.weights.tobytes())

    def write(self, path: Path) -> list[Path]:
        """Writes the package and returns its files; the bytes are the same every time.

        coremltools itself would add random identifiers and a mapping for ExecuTorch's debugger.
        """
        model_id, weights_id = (str(uuid.uuid5(uuid.NAMESPACE_URL, file)) for file in (MODEL_FILE, WEIGHTS_FILE))
        data = Path("Data")
        items = {
            model_id: {
                "author": "com.apple.CoreML",
                "description": "CoreML Model Specification",
                "name": "model.mlmodel",
                "path": Path(MODEL_FILE).relative_to(data).as_posix(),
            }
        }
        if self.weights:
            items[weights_id] = {
                "author": "com.apple.CoreML",
                "description": "CoreML Model Weights",
                "name": "weights",
                "path": Path(WEIGHTS_FILE).parent.relative_to(data).as_posix(),
            }
        manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": model_id}
        contents = {
            "Manifest.json": json.dumps(manifest, indent=4).encode() + b"\n",
            MODEL_FILE: self.model.SerializeToString(deterministic=True),
            WEIGHTS_FILE: self.weights,
        }
        written = [path / file for file, content in contents.items() if content]
        for file in written:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents[file.relative_to(path).as_posix()])
        return written


class PixelInput(nn.Module):
    """A trunk that takes pixels: it applies the preprocessing's scale and bias per channel, then the trunk.

    ``ct.ImageType`` has one scale for all channels, so it cannot hold a standard deviation per channel.
    """

    def __init__(self, module: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.module = module
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("scale", torch.from_numpy(preprocessing.scale)[:, None, None])
        self.register_buffer("offset", torch.from_numpy(-preprocessing.bias)[:, None, None])

    def forward(self, pixels: Tensor) -> Any:
        # The scale comes before the shift: 0…255 is exact in half precision, 255 times the mean is not. This is not
        # written as mul and add: coremltools would turn these into a batch_norm with an epsilon of 1e-5, which scales
        # by 1 - 5e-6.
        return self.module(pixels * self.scale - self.offset)


class WithProbabilities(nn.Module):
    """Wraps a module that returns logits so that it returns (logits, probabilities)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.module(*inputs)
        return logits, logits.softmax(-1)


def convert(job: Job[CoreMLOptions]) -> Converted:
    """Converts every piece of a split and writes the packages into ``job.directory``.

    Raises:
        ExportError: options contradict each other, or coremltools cannot convert a piece.
    """
    options = job.options
    _check(options, job.manifest)
    pieces = job.split.pieces
    packages: dict[str, PackageDraft] = {}
    with tempfile.TemporaryDirectory(prefix="mvmoe-coreml-") as scratch:
        for family in job.split.families():
            packages |= zip((piece.name for piece in family), _convert_family(family, job), strict=True)
        if options.precision not in ("fp16", "fp32"):
            for name in packages:
                job.progress(f"{name}: compressing to {options.precision}")
                packages[name] = _compress(packages[name], options.precision, Path(scratch))
        if options.layout == "packed":
            job.progress("packing all pieces into one package")
            packed = _pack(packages, pieces[0].name, Path(scratch))
            # This comes after packing: coremltools reads the programs to pack them, and does not know the class op.
            for piece in (piece for piece in pieces if _classifies(piece, options)):
                _add_classifier(packed.model, class_labels(job.manifest), piece.name)
    graphs: dict[str, tuple[str, list[Path], str | None]] = {}
    if options.layout == "packed":
        _describe(packed, None, job)
        written = packed.write(job.directory / PACKED)
        graphs = {piece.name: (PACKED, written, piece.name) for piece in pieces}
    else:
        for piece in pieces:
            if _classifies(piece, options):
                _add_classifier(packages[piece.name].model, class_labels(job.manifest))
            _describe(packages[piece.name], piece, job)
            graph = f"{piece.name}.mlpackage"
            graphs[piece.name] = (graph, packages[piece.name].write(job.directory / graph), None)
    return Converted(
        [_manifest_piece(piece, *graphs[piece.name], job) for piece in pieces],
        {"coremltools": ct.__version__},
        {
            "minimum_deployment_target": options.minimum_deployment_target,
            "image_input": options.image_input,
            "classifier": options.classifier,
        },
        ("reference", "coreml") if sys.platform == "darwin" else ("reference",),
    )


def stored_weights(family: list[PieceModule], bundle: Bundle) -> Iterator[StoredWeights]:
    """Reads pieces' weights back from their programs' constants, decompressed."""
    for piece, module in zip(family, flatten(family, [piece.module for piece in family]), strict=True):
        written = bundle.piece(piece.role, piece.expert, piece.layer)
        constants = read_package(bundle.path / written.graph).program(written.function).constants.values()
        found = [value for value in constants if isinstance(value, np.ndarray) and value.dtype == np.float32]
        yield StoredWeights({name: weight.numpy() for name, weight in module.state_dict().items()}, found)


def _check(options: CoreMLOptions, manifest: Manifest) -> None:
    if options.layout == "packed" and options.minimum_deployment_target != "iOS18":
        raise ExportError(
            "coreml: layout packed is a multifunction package, which needs iOS 18; ask for "
            "--minimum-deployment-target iOS18 or --layout separate"
        )
    if options.classifier and not manifest.class_names:
        raise ExportError("coreml: a classifier needs class names, and the checkpoint has none")


def _convert_family(family: list[PieceModule], job: Job[CoreMLOptions]) -> list[PackageDraft]:
    """Converts pieces that share one graph and differ in their weights.

    One piece is traced with random numbers in place of its own (unshared) weights. These numbers are then located in
    the converted ``weight.bin`` and overwritten with each piece's weights. If a number is not found exactly, because
    the converter changed it, each piece is converted separately.
    """
    modules = flatten(family, [piece.module for piece in family])
    if threshold := THRESHOLDS.get(precision := job.options.precision):
        names = [name for name, weight in modules[0].state_dict().items() if weight.numel() > threshold]
        how = functools.partial(rounded, precision=precision)
        correct_biases(modules, [job.calibration[piece.name] for piece in family], dict.fromkeys(names, how))
    shared = shared_weights(modules)
    own = [name for name in modules[0].state_dict() if name not in shared]
    if own:
        job.progress(f"{family[0].name} and {len(family) - 1} more of the same graph: converting")
        module = copy.deepcopy(modules[0])
        generator = torch.Generator().manual_seed(0)
        state = module.state_dict()
        for name in own:
            # positive, because a variance must be
            state[name].copy_(0.5 + torch.rand(state[name].shape, generator=generator))
        template = _convert_module(family[0], module, job)
        placed = [_put_weights(template, module, module=each, own=own, options=job.options) for each in modules]
        if all(placed):
            return [package for package in placed if package]
    packages = []
    for piece, module in zip(family, modules, strict=True):
        job.progress(f"{piece.name}: converting")
        packages.append(_convert_module(piece, module, job))
    return packages


def rounded(weight: Tensor, precision: str) -> Tensor:
    """A weight as it is stored, widened again.

    Args:
        weight: a weight that is large enough to be compressed.
        precision: ``int8``, with a scale for each output channel, or ``palette6`` or ``palette4``.
    """
    half = weight.half()
    if precision == "int8":
        scale = (half.float().flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        return torch.round(half.float() / scale) * scale
    values, indices = _get_kmeans_lookup_table_and_weight(_bits(precision), half.numpy())
    return torch.from_numpy(values[indices].astype(np.float16).astype(np.float32)).reshape(weight.shape)


def _bits(palette: str) -> int:
    return int(palette.removeprefix("palette"))


def _put_weights(
    template: PackageDraft, traced: nn.Module, module: nn.Module, own: list[str], options: CoreMLOptions
) -> PackageDraft | None:
    """The template with ``module``'s weights in place of ``traced``'s; None if these cannot be found exactly."""
    places = {template.weights[start : start + size]: start for start, size in _blobs(template)}
    weights = bytearray(template.weights)
    for name in own:
        old = _stored(traced.state_dict()[name], options)
        new = _stored(module.state_dict()[name], options)
        # converted separately, a piece would keep a weight beyond half precision's range as float32
        if old.tobytes() not in places or not np.isfinite(new).all():
            return None
        start = places[old.tobytes()]
        weights[start : start + old.nbytes] = new.tobytes()
    return PackageDraft(copy.deepcopy(template.model), bytes(weights))


def _stored(weight: Tensor, options: CoreMLOptions) -> NDArray[Any]:
    """A weight as the converter stores it."""
    with np.errstate(over="ignore"):
        return weight.detach().numpy().astype(np.float32 if options.precision == "fp32" else np.float16)


def _blobs(package: PackageDraft) -> Iterator[tuple[int, int]]:
    """Yields (offset, bytes) of the data of every constant in ``weight.bin``."""
    weights = np.frombuffer(package.weights, np.uint8)
    for function in package.model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                for value in operation.attributes.values():
                    if value.WhichOneof("value") == "blobFileValue":
                        _, size, start, _ = blob_at(weights, value.blobFileValue.offset, operation.type)
                        yield start, size


def _convert_module(piece: PieceModule, module: nn.Module, job: Job[CoreMLOptions]) -> PackageDraft:
    """Traces and converts one module, for one image at a time."""
    options, manifest = job.options, job.manifest
    outputs = piece.outputs
    if _classifies(piece, options):
        module, outputs = WithProbabilities(module), [*outputs, SOFTMAX]
    inputs = [ct.TensorType(name, (1, *example.shape[1:]), np.float32) for name, example in piece.inputs.items()]
    if options.image_input and IMAGES in piece.inputs:
        module = PixelInput(module, manifest.preprocessing)
        inputs = [ct.ImageType(IMAGES, (1, *piece.inputs[IMAGES].shape[1:]), color_layout=ct.colorlayout.RGB)]
    single = options.precision == "fp32"
    try:
        with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix="mvmoe-coreml-") as scratch:
            converted = ct.convert(
                _export(module.eval(), tuple(example[:1] for example in piece.inputs.values())),
                convert_to="mlprogram",
                inputs=inputs,
                outputs=[ct.TensorType(name, dtype=np.float32) for name in outputs],
                minimum_deployment_target=getattr(ct.target, options.minimum_deployment_target),
                compute_precision=ct.precision.FLOAT32 if single else ct.precision.FLOAT16,
                skip_model_load=True,
            )
            converted.save(f"{scratch}/piece.mlpackage")
            return PackageDraft.read(Path(scratch) / "piece.mlpackage")
    except Exception as error:  # the toolchain can raise anything
        raise ExportError(
            f"{piece.name}: coremltools {ct.__version__} cannot convert it ({root_cause(error)})"
        ) from error


def _export(module: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Traces with torch.export, because torch.jit.trace breaks with numpy 2.4.

    https://github.com/apple/coremltools/issues/2633
    """
    program: torch.export.ExportedProgram = torch.export.export(module, example).run_decompositions({})
    for node in list(program.graph.nodes):
        # x[:, :None] becomes aten.alias, the identity, which coremltools 9.0 does not know
        if node.target is torch.ops.aten.alias.default and node.users:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def class_labels(manifest: Manifest) -> list[str]:
    """One label per class, in the order of the logits; if several classes share a name, the class's id follows it.

    Core ML returns probabilities in a dictionary by label, so two classes with the same name (ImageNet's two cranes)
    would be merged.
    """
    count = Counter(manifest.class_names)
    return [
        name if count[name] == 1 else f"{name} ({identifier})"
        for name, identifier in zip(manifest.class_names, manifest.class_ids, strict=True)
    ]


def _classifies(piece: PieceModule, options: CoreMLOptions) -> bool:
    return options.classifier and LOGITS in piece.outputs


def _add_classifier(model: Model_pb2.Model, labels: list[str], function: str | None = None) -> None:
    """Replaces the output :data:`SOFTMAX` by the most probable label and a dictionary of probabilities.

    This changes the named function, or the only one. ``ct.convert(classifier_config=...)`` does the same, but fails if
    the model has another output, which here is the logits.
    """
    string = MIL_pb2.ValueType(tensorType=MIL_pb2.TensorType(dataType=MIL_pb2.STRING))
    double = MIL_pb2.ValueType(tensorType=MIL_pb2.TensorType(dataType=MIL_pb2.FLOAT64))

    def text(value: str) -> MIL_pb2.Value:
        strings = MIL_pb2.TensorValue.RepeatedStrings(values=[value])
        tensor = MIL_pb2.TensorValue(strings=strings)
        return MIL_pb2.Value(type=string, immediateValue=MIL_pb2.Value.ImmediateValue(tensor=tensor))

    length = MIL_pb2.Dimension(constant=MIL_pb2.Dimension.ConstantDimension(size=len(labels)))
    classes = MIL_pb2.Value(
        type=MIL_pb2.ValueType(listType=MIL_pb2.ListType(type=string, length=length)),
        immediateValue=MIL_pb2.Value.ImmediateValue(list=MIL_pb2.ListValue(values=map(text, labels))),
    )
    binding = MIL_pb2.Argument.Binding
    dictionary = MIL_pb2.ValueType(dictionaryType=MIL_pb2.DictionaryType(keyType=string, valueType=double))
    (block,) = model.mlProgram.functions[function or "main"].block_specializations.values()
    block.operations.add(
        type="classify",
        inputs={
            "probabilities": MIL_pb2.Argument(arguments=[binding(name=SOFTMAX)]),
            "classes": MIL_pb2.Argument(arguments=[binding(value=classes)]),
        },
        outputs=[
            MIL_pb2.NamedValueType(name=CLASS_LABEL, type=string),
            MIL_pb2.NamedValueType(name=CLASS_PROBABILITIES, type=dictionary),
        ],
        attributes={"name": text("classify_0")},
    )
    others = [name for name in block.outputs if name != SOFTMAX]
    block.outputs[:] = [CLASS_LABEL, CLASS_PROBABILITIES, *others]
    descriptions = {each.name: each for each in model.description.functions}
    description = descriptions[function] if function else model.description
    kept = [feature for feature in description.output if feature.name != SOFTMAX]
    label = Model_pb2.FeatureDescription(name=CLASS_LABEL)
    label.type.stringType.SetInParent()
    probabilities = Model_pb2.FeatureDescription(name=CLASS_PROBABILITIES)
    probabilities.type.dictionaryType.stringKeyType.SetInParent()
    del description.output[:]
    description.output.extend([label, probabilities, *kept])
    description.predictedFeatureName = CLASS_LABEL
    description.predictedProbabilitiesName = CLASS_PROBABILITIES


def _compress(package: PackageDraft, precision: str, scratch: Path) -> PackageDraft:
    """Quantises weights to 8 bits (symmetrically, per output channel) or clusters them into 2^6 or 2^4 values."""
    before, after = scratch / "before.mlpackage", scratch / "after.mlpackage"
    package.write(before)
    with quiet():
        model = ct.models.MLModel(str(before), skip_model_load=True)
        if precision == "int8":
            quantizer = cto.OpLinearQuantizerConfig(
                mode="linear_symmetric", dtype="int8", weight_threshold=THRESHOLDS[precision]
            )
            model = cto.linear_quantize_weights(model, cto.OptimizationConfig(quantizer))
        else:
            palettizer = cto.OpPalettizerConfig(
                mode="kmeans", nbits=_bits(precision), weight_threshold=THRESHOLDS[precision]
            )
            model = cto.palettize_weights(model, cto.OptimizationConfig(palettizer))
        model.save(str(after))
    compressed = PackageDraft.read(after)
    shutil.rmtree(before)
    shutil.rmtree(after)
    return compressed


def _pack(packages: dict[str, PackageDraft], default: str, scratch: Path) -> PackageDraft:
    """Packs pieces into one multifunction package, a function per piece; equal weights are stored once."""
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, package in packages.items():
        path = scratch / f"{name}.mlpackage"
        package.write(path)
        descriptor.add_function(native_path(path), "main", name)
    descriptor.default_function_name = default
    with quiet():
        ct.utils.save_multifunction(descriptor, str(scratch / PACKED))
    return PackageDraft.read(scratch / PACKED)


def _describe(package: PackageDraft, piece: PieceModule | None, job: Job[CoreMLOptions]) -> None:
    """Writes the metadata that Xcode shows, and drops the date; ``piece`` is None for a packed package."""
    manifest, options, description = job.manifest, job.options, package.model.description
    texts = {
        IMAGES: f"normalised image, {manifest.preprocessing.size} × {manifest.preprocessing.size}",
        TOKENS: "tokens of the image, class token first",
        PROBABILITIES: "router's probability of each expert; the largest one chooses the tail and is its gate",
        GATE: "router's probability of this expert",
        LOGITS: "score of each class, before softmax",
        "residual": "tokens after attention; add the gated experts' outputs to it",
        "expert_input": "normalised tokens for the chosen experts",
        "addend": "what this expert adds to the residual, gate included",
        CLASS_LABEL: "most probable class",
        CLASS_PROBABILITIES: "probability of each class",
    }
    if options.image_input:
        texts[IMAGES] = f"RGB image, {manifest.preprocessing.size} × {manifest.preprocessing.size}; normalised inside"
    for part in (description, *description.functions):
        for feature in (*part.input, *part.output):
            feature.shortDescription = texts.get(feature.name, "")
    metadata = description.metadata
    metadata.author = options.author
    metadata.license = options.licence
    metadata.versionString = manifest.source.sha256[:12]
    purpose = "all pieces, one function each" if piece is None else _purpose(piece, manifest)
    metadata.shortDescription = f"{manifest.model.get('architecture', 'model')}: {purpose}"
    metadata.userDefined.pop(DATE, None)
    user = {
        "mvmoe.piece": "packed" if piece is None else piece.name,
        "mvmoe.checkpoint": manifest.source.checkpoint,
        "mvmoe.checkpoint_sha256": manifest.source.sha256,
        "mvmoe.model": json.dumps(manifest.model),
        "mvmoe.preprocessing": msgspec.json.encode(manifest.preprocessing).decode(),
    }
    if piece is None:
        user |= {each.name: _purpose(each, manifest) for each in job.split.pieces}
    if manifest.class_names and (piece is None or LOGITS in piece.outputs):
        user["classes"] = json.dumps(class_labels(manifest), ensure_ascii=False)
    for key, value in user.items():
        metadata.userDefined[key] = value


def _purpose(piece: PieceModule, manifest: Manifest) -> str:
    """What a piece does and, for an expert, which classes it is for."""
    does = {
        "model": "image to logits",
        "trunk": "image to tokens" + (" and router probabilities" if PROBABILITIES in piece.outputs else ""),
        "router": "tokens to router probabilities",
        "tail": "tokens and gate to logits",
        "attention": "attention of a mixture-of-experts layer",
        "expert_layer": "one expert of a mixture-of-experts layer",
        "head": "tokens to logits",
    }[piece.role]
    if piece.layer is not None:
        does += f", layer {piece.layer}"
    if piece.expert is None or piece.expert >= len(manifest.experts):
        return does
    expert = manifest.experts[piece.expert]
    classes = ", ".join(manifest.class_names[index] for index in expert.classes)
    return f"{does}; expert {piece.expert} {expert.name}".rstrip() + (f", for {classes}" if classes else "")


def _manifest_piece(
    piece: PieceModule, graph: str, files: list[Path], function: str | None, job: Job[CoreMLOptions]
) -> Piece:
    """The manifest entry of a piece: its batch is 1, and its bytes are those that its weights take in the package.

    Raises:
        ExportError: the package holds something that the interpreter does not know, such as an operator.
    """
    described = describe_piece(
        piece,
        graph,
        [file.relative_to(job.directory).as_posix() for file in files],
        job.piece_flops(piece.role),
        function=function,
    )
    one = [
        [msgspec.structs.replace(spec, shape=[1, *spec.shape[1:]]) for spec in specs]
        for specs in (described.inputs, described.outputs)
    ]
    try:
        weight_bytes = read_package(job.directory / graph).program(function).weight_bytes
    except BackendError as error:
        raise refusal(piece.name, "the coreml backend", error) from error
    return msgspec.structs.replace(described, inputs=one[0], outputs=one[1], weight_bytes=weight_bytes)
