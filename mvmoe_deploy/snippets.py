"""How to run a bundle from an app: a class in Swift, made from its manifest, and the use of the package in Kotlin."""

from __future__ import annotations

import re
from collections.abc import Callable

from mvmoe_deploy import targets
from mvmoe_deploy.bundle import Bundle, Manifest, Piece
from mvmoe_deploy.errors import BundleError


def snippet(bundle: Bundle, language: str) -> str:
    """Source code that routes an image and runs one expert.

    Args:
        bundle: the bundle to run.
        language: a language for which the bundle's target has a snippet, such as ``swift``.

    Raises:
        BundleError: there is no snippet for this language and target, or for models of this kind.
    """
    target = targets.get(bundle.manifest.target)
    if language not in target.snippets:
        others = f", there is one in {', '.join(target.snippets)}" if target.snippets else ""
        raise BundleError(f"{bundle.path}: no {language} snippet for {target.name} bundles{others}")
    write: Callable[[Bundle], str]
    write = targets.resolve(target.snippets[language], f"the {language} snippet", target.requirement, BundleError)
    return write(bundle)


def languages() -> list[str]:
    """All languages for which some target has a snippet."""
    return sorted({language for target in targets.known().values() for language in target.snippets})


def _pieces(bundle: Bundle) -> tuple[Piece, Piece]:
    """The trunk and the first tail, whose names are safe to write into a program."""
    m = bundle.manifest
    if m.routing is None or m.routing.k != 1 or m.routing.router != "fused":
        raise BundleError(f"{bundle.path}: Swift snippets are for models with one expert per image and a fused router")
    trunk, tail = bundle.piece("trunk"), bundle.piece("tail", 0)
    specs = [*trunk.inputs, *trunk.outputs, *tail.inputs, *tail.outputs]
    for name in [m.source.checkpoint, trunk.graph, trunk.function or "", *(spec.name for spec in specs)]:
        if not re.fullmatch(r"[\w./ -]*", name):  # the name would become part of a program
            raise BundleError(f"{bundle.path}: the manifest's name {name!r} cannot stand in source code")
    return trunk, tail


def _facts(m: Manifest) -> str:
    """The comment that Swift's snippets start with: how an image becomes the model's input."""
    p = m.preprocessing
    assert m.routing is not None
    lines = [
        f"Made by mvmoe-inspect --snippet from a bundle of {m.source.checkpoint or 'a model'} ({m.precision}).",
        f"Preprocessing: the largest centred square, times {p.crop:g}, {p.interpolation} to {p.size} × {p.size}, RGB;",
        "channel c of a pixel v in 0…255 becomes v * scale[c] + bias[c].",
        f"{m.routing.experts} experts; the gate is the router's probability of the chosen one, not renormalised.",
    ]
    return "\n".join(f"// {line}" for line in lines)


def _numbers(values: object) -> str:
    return ", ".join(f"{float(value):.9g}" for value in values)  # type: ignore[attr-defined]


def _shape(piece: Piece, index: int, inputs: bool = True) -> list[int]:
    """A tensor's shape for one image."""
    spec = (piece.inputs if inputs else piece.outputs)[index]
    return [extent if isinstance(extent, int) else 1 for extent in spec.shape]


def swift_coreml(bundle: Bundle) -> str:
    """The class in Swift for Core ML."""
    m, (trunk, tail) = bundle.manifest, _pieces(bundle)
    packed = trunk.function is not None
    size = m.preprocessing.size
    configure = "\n        configuration.functionName = name  // iOS 18" if packed else ""
    resource = f'"{trunk.graph.removesuffix(".mlpackage")}"' if packed else "name"
    takes_image = m.options.get("image_input", False)
    if takes_image:
        feature = "MLFeatureValue(pixelBuffer: image)"
        argument, note = "CVPixelBuffer", f"{size} × {size}; the preprocessing is part of the trunk"
    else:
        feature = "MLFeatureValue(multiArray: image)"
        argument, note = "MLMultiArray", f"{_shape(trunk, 0)} Float32, preprocessed as above"
    return f"""{_facts(m)}
// scale = [{_numbers(m.preprocessing.scale)}], bias = [{_numbers(m.preprocessing.bias)}]
import CoreML

final class RoutedModel {{
    private let trunk: MLModel
    private var tails: [Int: MLModel] = [:]  // resident tails; drop entries on a memory warning

    init() throws {{ trunk = try RoutedModel.load("{trunk.name}") }}

    private static func load(_ name: String) throws -> MLModel {{
        let configuration = MLModelConfiguration(){configure}
        guard let url = Bundle.main.url(forResource: {resource}, withExtension: "mlmodelc") else {{
            throw CocoaError(.fileNoSuchFile)
        }}
        return try MLModel(contentsOf: url, configuration: configuration)
    }}

    /// image: {note}. Returns {len(m.class_names)} logits and the expert that was used.
    func logits(_ image: {argument}) throws -> (MLMultiArray, Int) {{
        let input = try MLDictionaryFeatureProvider(dictionary: ["{trunk.inputs[0].name}": {feature}])
        let routed = try trunk.prediction(from: input)
        let tokens = routed.featureValue(for: "{trunk.outputs[0].name}")!
        let probabilities = routed.featureValue(for: "{trunk.outputs[1].name}")!.multiArrayValue!
        let expert = (0..<probabilities.count).max {{ probabilities[$0].floatValue < probabilities[$1].floatValue }}!
        let tail = try tails[expert] ?? RoutedModel.load(String(format: "expert_%02d", expert))
        tails[expert] = tail
        let gate = try MLMultiArray(shape: [1], dataType: .float32)
        gate[0] = probabilities[expert]
        let output = try tail.prediction(from: MLDictionaryFeatureProvider(dictionary: [
            "{tail.inputs[0].name}": tokens, "{tail.inputs[1].name}": MLFeatureValue(multiArray: gate),
        ]))
        return (output.featureValue(for: "{tail.outputs[0].name}")!.multiArrayValue!, expert)
    }}
}}
"""


def swift_executorch(bundle: Bundle) -> str:
    """The class in Swift for ExecuTorch."""
    m, (trunk, _) = bundle.manifest, _pieces(bundle)
    packed = m.layout == "packed"
    opened = (
        f'Module(filePath: folder + "/{trunk.graph}", loadMode: .mmap)'
        if packed
        else 'Module(filePath: folder + "/\\(name).pte", loadMode: .mmap)'
    )
    method = "name" if packed else f'"{trunk.function or "forward"}"'
    return f"""{_facts(m)}
import ExecuTorch  // link backend_xnnpack and kernels_quantized as well

final class RoutedModel {{
    static let scale: [Float] = [{_numbers(m.preprocessing.scale)}]
    static let bias: [Float] = [{_numbers(m.preprocessing.bias)}]
    private let folder: String
    private var modules: [String: Module] = [:]  // resident pieces; drop tails on a memory warning

    init(folder: String) {{ self.folder = folder }}

    private func run(_ name: String, _ inputs: [Tensor<Float>]) throws -> [Value] {{
        let module = modules[name] ?? {opened}
        modules[name] = module
        return try module.execute({method}, inputs.map {{ Value($0) }})
    }}

    /// image: {_shape(trunk, 0)} floats, channels first, preprocessed. Returns logits and the expert.
    func logits(_ image: [Float]) throws -> ([Float], Int) {{
        let routed = try run("{trunk.name}", [Tensor<Float>(image, shape: {_shape(trunk, 0)})])
        let tokens: Tensor<Float> = routed[0].tensor()!
        let probabilities = (routed[1].tensor()! as Tensor<Float>).scalars()
        let expert = probabilities.indices.max {{ probabilities[$0] < probabilities[$1] }}!
        let gate = Tensor<Float>([probabilities[expert]], shape: [1])
        let output = try run(String(format: "expert_%02d", expert), [tokens, gate])
        return ((output[0].tensor()! as Tensor<Float>).scalars(), expert)
    }}
}}
"""


def kotlin_onnx(bundle: Bundle) -> str:
    """The use of runtimes/kotlin with ONNX Runtime."""
    return _kotlin(bundle, "mvmoe.onnxruntime.OnnxRuntimeBackend")


def kotlin_executorch(bundle: Bundle) -> str:
    """The use of runtimes/kotlin with ExecuTorch."""
    return _kotlin(bundle, "mvmoe.executorch.ExecuTorchBackend")


def _kotlin(bundle: Bundle, backend: str) -> str:
    return f"""// Made by mvmoe-inspect --snippet, for the package in runtimes/kotlin.
import java.io.File
import mvmoe.Image
import mvmoe.Runtime
import {backend}

// The folder holds the bundle, which the digest pins: a file that differs from what was exported is refused.
fun openModel(folder: File) = Runtime.load(
    folder, ::{backend.rpartition(".")[2]}, maxResident = 1, digest = "{bundle.digest}",
)

// The pixels are those of Bitmap.getPixels.
fun describe(model: Runtime, width: Int, height: Int, argb: IntArray): String {{
    val seen = model.predict(Image.fromArgb(width, height, argb))
    return "${{seen.label}} (${{seen.probability}}), by expert ${{seen.expert}} in ${{seen.timings}} ms"
}}
"""
