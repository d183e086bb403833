"""How to run a bundle from an app: Swift and Kotlin with the names, shapes and preprocessing of its manifest."""

from __future__ import annotations

import re
from collections.abc import Callable

from mvmoe_deploy import targets
from mvmoe_deploy.bundle import Bundle, Manifest, Piece
from mvmoe_deploy.errors import BundleError


def snippet(bundle: Bundle, language: str) -> str:
    """Source code of a class that routes an image and runs one expert.

    Args:
        bundle: the bundle of a model with one expert per image.
        language: a language for which the bundle's target has a snippet, such as ``swift``.

    Raises:
        BundleError: there is no snippet for this language and target, or the model is of another kind.
    """
    m = bundle.manifest
    target = targets.get(m.target)
    if language not in target.snippets:
        others = f", there is one in {', '.join(target.snippets)}" if target.snippets else ""
        raise BundleError(f"{bundle.path}: no {language} snippet for {m.target} bundles{others}")
    if m.routing is None or m.routing.k != 1 or m.routing.router != "fused":
        raise BundleError(f"{bundle.path}: snippets are for models with one expert per image and a fused router")
    if m.layout == "swappable":
        raise BundleError(f"{bundle.path}: there is no snippet for the swappable layout yet; export --layout separate")
    trunk, tail = bundle.piece("trunk"), bundle.piece("tail", 0)
    specs = [*trunk.inputs, *trunk.outputs, *tail.inputs, *tail.outputs]
    for name in [m.source.checkpoint, trunk.graph, trunk.function or "", *(spec.name for spec in specs)]:
        if not re.fullmatch(r"[\w./ -]*", name):  # the name would become part of a program
            raise BundleError(f"{bundle.path}: the manifest's name {name!r} cannot stand in source code")
    write: Callable[[Manifest, Piece, Piece], str]
    write = targets.resolve(target.snippets[language], f"the {language} snippet", target.requirement, BundleError)
    return write(m, trunk, tail)


def languages() -> list[str]:
    """All languages for which some target has a snippet."""
    return sorted({language for target in targets.known().values() for language in target.snippets})


def _facts(m: Manifest, comment: str = "//") -> str:
    """The comment that every snippet starts with: how an image becomes the model's input."""
    p = m.preprocessing
    assert m.routing is not None
    lines = [
        f"Made by mvmoe-inspect --snippet from a bundle of {m.source.checkpoint or 'a model'} ({m.precision}).",
        f"Preprocessing: the largest centred square, times {p.crop:g}, {p.interpolation} to {p.size} × {p.size}, RGB;",
        "channel c of a pixel v in 0…255 becomes v * scale[c] + bias[c].",
        f"{m.routing.experts} experts; the gate is the router's probability of the chosen one, not renormalised.",
    ]
    return "\n".join(f"{comment} {line}" for line in lines)


def _numbers(values: object, suffix: str = "") -> str:
    return ", ".join(f"{float(value):.9g}{suffix}" for value in values)  # type: ignore[attr-defined]


def _shape(piece: Piece, index: int, inputs: bool = True) -> list[int]:
    """A tensor's shape for one image."""
    spec = (piece.inputs if inputs else piece.outputs)[index]
    return [extent if isinstance(extent, int) else 1 for extent in spec.shape]


def swift_coreml(m: Manifest, trunk: Piece, tail: Piece) -> str:
    """The class in Swift for Core ML."""
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


def swift_executorch(m: Manifest, trunk: Piece, tail: Piece) -> str:
    """The class in Swift for ExecuTorch."""
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


def kotlin_executorch(m: Manifest, trunk: Piece, tail: Piece) -> str:
    """The class in Kotlin for ExecuTorch."""
    packed = m.layout == "packed"
    path = f"$folder/{trunk.graph}" if packed else "$folder/$name.pte"
    method = "name" if packed else f'"{trunk.function or "forward"}"'
    shape = ", ".join(f"{extent}L" for extent in _shape(trunk, 0))
    tokens = ", ".join(f"{extent}L" for extent in _shape(tail, 0))
    return f"""{_facts(m)}
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

class RoutedModel(private val folder: String, private val resident: Int = 1) : AutoCloseable {{
    private val trunk = open("{trunk.name}")
    private val tails = LinkedHashMap<String, Module>(16, 0.75f, true)  // least recently used first

    // The default mode reads the whole file into memory; mapped, the system keeps what is used.
    private fun open(name: String) = Module.load("{path}", Module.LOAD_MODE_MMAP)

    private fun tail(name: String): Module {{
        tails[name]?.let {{ return it }}
        while (tails.size >= resident) {{
            val eldest = tails.keys.first()
            tails.remove(eldest)!!.destroy()
        }}
        return open(name).also {{ tails[name] = it }}
    }}

    private fun run(module: Module, name: String, vararg inputs: Tensor) =
        module.execute({method}, *inputs.map {{ EValue.from(it) }}.toTypedArray())

    /** image: {_shape(trunk, 0)} floats, preprocessed, channels first; gives logits and the expert. */
    fun logits(image: FloatArray): Pair<FloatArray, Int> {{
        val routed = run(trunk, "{trunk.name}", Tensor.fromBlob(image, longArrayOf({shape})))
        val probabilities = routed[1].toTensor().dataAsFloatArray
        val expert = probabilities.indices.maxByOrNull {{ probabilities[it] }}!!
        // Copied out: the trunk's memory is reused by its next run.
        val tokens = Tensor.fromBlob(routed[0].toTensor().dataAsFloatArray, longArrayOf({tokens}))
        val gate = Tensor.fromBlob(floatArrayOf(probabilities[expert]), longArrayOf(1L))
        val name = "expert_%02d".format(expert)
        return run(tail(name), name, tokens, gate)[0].toTensor().dataAsFloatArray to expert
    }}

    override fun close() {{
        trunk.destroy()
        tails.values.forEach {{ it.destroy() }}
    }}

    companion object {{
        val SCALE = floatArrayOf({_numbers(m.preprocessing.scale, "f")})
        val BIAS = floatArrayOf({_numbers(m.preprocessing.bias, "f")})
    }}
}}
"""


def kotlin_onnx(m: Manifest, trunk: Piece, tail: Piece) -> str:
    """The class in Kotlin for ONNX Runtime."""
    shape = ", ".join(f"{extent}L" for extent in _shape(trunk, 0))
    return f"""{_facts(m)}
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.FloatBuffer

// folder: a real directory (not assets): the graphs name their weight files beside them.
class RoutedModel(private val folder: String, private val resident: Int = 1) : AutoCloseable {{
    private val environment = OrtEnvironment.getEnvironment()
    // One thread: each session has a pool of its own, and idle ones would spin against the one that computes.
    private val options = OrtSession.SessionOptions().apply {{ setIntraOpNumThreads(1) }}
    private val trunk = open("{trunk.graph}")
    private val tails = LinkedHashMap<Int, OrtSession>(16, 0.75f, true)  // least recently used first

    private fun open(graph: String) = environment.createSession("$folder/$graph", options)

    private fun tail(expert: Int): OrtSession {{
        tails[expert]?.let {{ return it }}
        while (tails.size >= resident) {{
            val eldest = tails.keys.first()
            tails.remove(eldest)!!.close()
        }}
        return open("expert_%02d.onnx".format(expert)).also {{ tails[expert] = it }}
    }}

    /** image: {_shape(trunk, 0)} floats, preprocessed, channels first; gives logits and the expert. */
    fun logits(image: FloatArray): Pair<FloatArray, Int> =
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(image), longArrayOf({shape})).use {{ input ->
            trunk.run(mapOf("{trunk.inputs[0].name}" to input)).use {{ routed ->
                val probabilities = (routed["{trunk.outputs[1].name}"].get().value as Array<FloatArray>)[0]
                val expert = probabilities.indices.maxByOrNull {{ probabilities[it] }}!!
                OnnxTensor.createTensor(environment, floatArrayOf(probabilities[expert])).use {{ gate ->
                    val tokens = routed["{trunk.outputs[0].name}"].get() as OnnxTensor
                    tail(expert).run(mapOf("{tail.inputs[0].name}" to tokens, "{tail.inputs[1].name}" to gate)).use {{
                        (it["{tail.outputs[0].name}"].get().value as Array<FloatArray>)[0] to expert
                    }}
                }}
            }}
        }}

    override fun close() {{
        trunk.close()
        tails.values.forEach {{ it.close() }}
    }}

    companion object {{
        val SCALE = floatArrayOf({_numbers(m.preprocessing.scale, "f")})
        val BIAS = floatArrayOf({_numbers(m.preprocessing.bias, "f")})
    }}
}}
"""
