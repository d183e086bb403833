package mvmoe

/** An input or output of a piece; a dimension is a number or, where it is dynamic, a name (`batch`). */
class TensorSpec internal constructor(val name: String, val shape: List<Any>, val dtype: String)

/** A file of the bundle; its path is relative to the bundle, with forward slashes. */
class FileEntry internal constructor(val path: String, val bytes: Long, val sha256: String)

/**
 * A weight that a graph takes as an input, little-endian and in C order in a file of the bundle.
 *
 * @property dtype `float32`, `int8` or `uint8`.
 */
class Weight internal constructor(
    val name: String,
    val shape: List<Long>,
    val file: String,
    val offset: Long,
    val dtype: String,
) {
    /** Its size in bytes; more than any file has where the shape's product is out of range. */
    val bytes: Long get() = shape.fold(if (dtype == "float32") 4L else 1L) { product, extent ->
        if (product > Fields.MAX_COUNT / extent) return Long.MAX_VALUE / 2 else product * extent
    }
}

/**
 * One exported graph.
 *
 * @property role `model` (a dense model, whole), `trunk`, `router`, `tail`; for k > 1 `attention`, `expert_layer` and
 *   `head` in place of tails.
 * @property graph the file to open, and [function] the method in it where it holds several.
 * @property files every file that loading the piece reads.
 * @property weightBytes size of its weights when loaded: what the memory budget counts.
 * @property optimised whether the engine need not optimise the graph when it loads it.
 * @property weights further inputs of the graph, the same in every call (`swappable` layout).
 * @property sharedBytes size of the weights that stay with the one graph of all swappable pieces.
 */
class Piece internal constructor(
    val role: String,
    val expert: Int?,
    val layer: Int?,
    val graph: String,
    val function: String?,
    val files: List<String>,
    val inputs: List<TensorSpec>,
    val outputs: List<TensorSpec>,
    val weightBytes: Long,
    val optimised: Boolean,
    val weights: List<Weight>,
    val sharedBytes: Long,
) {
    /** Its name in errors, such as `trunk`, `expert_03` or `expert_03_layer_1`. */
    val name: String get() = pieceName(role, expert, layer)
}

/** How images are routed: E [experts], [k] of them per image, in [moeLayers] layers. */
class Routing internal constructor(val experts: Int, val k: Int, val moeLayers: Int, val fusedRouter: Boolean)

/** What an expert is for, for people to read. */
class Expert internal constructor(val name: String, val classes: List<Int>)

/**
 * What running a bundle needs of its `manifest.json`. docs/bundle-format.md describes the fields.
 *
 * @property routing null for a dense model.
 * @property selftest the file with the cases that prove a runtime, if the bundle has one.
 */
class Manifest internal constructor(
    val version: Int,
    val target: String,
    val layout: String,
    val precision: String,
    val routing: Routing?,
    val preprocessing: Preprocessing,
    val classIds: List<String>,
    val classNames: List<String>,
    val experts: List<Expert>,
    val files: List<FileEntry>,
    val pieces: List<Piece>,
    val selftest: String?,
)

internal const val FORMAT = "mvmoe-bundle"
internal val READABLE = 1..5
private val TARGETS = listOf("onnx", "executorch", "coreml")
private val ROLES = listOf("model", "trunk", "router", "tail", "attention", "expert_layer", "head")
private const val MAX_INDEX = 65535L
private const val MAX_EXTENT = 1L shl 32
private const val WEIGHT_ALIGNMENT = 64
private val WEIGHT_TYPES = setOf("float32", "int8", "uint8")
private const val MAX_NAME_BYTES = 255
private const val MAX_RANKED = 64

internal fun pieceName(role: String, expert: Int?, layer: Int?): String {
    val number = expert.toString().padStart(2, '0')
    return when (role) {
        "tail" -> "expert_$number"
        "expert_layer" -> "expert_${number}_layer_$layer"
        "attention" -> "attention_$layer"
        else -> role
    }
}

/**
 * Reads a manifest and refuses what docs/bundle-format.md says is to be refused.
 *
 * @throws JsonException what is wrong with it.
 */
internal fun readManifest(json: Any?): Manifest {
    if ((json as? Map<*, *>)?.get("format") != FORMAT) throw JsonException("not a manifest of this project")
    val version = json["version"] as? Long
    if (version == null || version !in READABLE.first.toLong()..READABLE.last) {
        val found = json["version"].toString().take(20)
        throw JsonException("format version $found, this release reads ${READABLE.first} to ${READABLE.last}; export again")
    }
    val manifest = Fields(json, "manifest").all {
        text("format")
        free("model")
        free("verification")
        free("tools", ofTexts = true)
        if (has("options")) free("options")
        inner("source").all { text("checkpoint") + text("sha256") }
        Manifest(
            version = integer("version").toInt(),
            target = text("target"),
            layout = text("layout"),
            precision = text("precision"),
            routing = if (isNull("routing")) textOrNull("routing").let { null } else inner("routing").all { readRouting() },
            preprocessing = inner("preprocessing").all { readPreprocessing() },
            classIds = texts("class_ids"),
            classNames = texts("class_names"),
            experts = objects("experts") { it.all { Expert(text("name"), integers("classes", 0..MAX_INDEX)) } },
            files = objects("files") { it.all { readFile() } },
            pieces = objects("pieces") { it.all { readPiece() } },
            selftest = textOrNull("selftest"),
        )
    }
    inconsistency(manifest)?.let { throw JsonException(it) }
    return manifest
}

private fun Fields.readRouting(): Routing {
    choice("gate", listOf("softmax"), default = "softmax")
    return Routing(
        integer("experts", 1..MAX_INDEX).toInt(),
        integer("k", 1..MAX_INDEX).toInt(),
        integer("moe_layers", 1..MAX_INDEX).toInt(),
        choice("router", listOf("fused", "separate")) == "fused",
    )
}

private fun Fields.readPreprocessing(): Preprocessing {
    val size = integer("size", 1..4096L).toInt()
    val crop = if (has("crop")) number("crop") else 1.0
    val interpolation = choice("interpolation", listOf("bicubic", "bilinear"), default = "bicubic")
    val mean = if (has("mean")) numbers("mean") else listOf(0.485, 0.456, 0.406)
    val std = if (has("std")) numbers("std") else listOf(0.229, 0.224, 0.225)
    if (!(crop > 0 && crop <= 1)) throw JsonException("preprocessing.crop: expected above 0, at most 1")
    if (mean.size != 3 || !mean.all { it in 0.0..1.0 }) throw JsonException("preprocessing.mean: expected three from 0 to 1")
    if (std.size != 3 || !std.all { it > 0 && it <= 1000 }) throw JsonException("preprocessing.std: expected three above 0")
    return Preprocessing(size, crop, interpolation, mean, std)
}

private val DIGEST = Regex("[0-9a-f]{64}")

private fun Fields.readFile(): FileEntry {
    val digest = text("sha256")
    if (!DIGEST.matches(digest)) throw JsonException("files: a sha256 is not 64 hexadecimal digits")
    return FileEntry(text("path", longest = 1024), integer("bytes"), digest)
}

private fun Fields.readPiece(): Piece {
    integer("parameters")
    if (isNull("flops")) integerOrNull("flops") else integer("flops")
    return Piece(
        role = choice("role", ROLES),
        expert = integerOrNull("expert", 0..MAX_INDEX)?.toInt(),
        layer = integerOrNull("layer", 0..MAX_INDEX)?.toInt(),
        graph = text("graph"),
        function = textOrNull("function"),
        files = texts("files"),
        inputs = objects("inputs") { it.all { readTensor() } },
        outputs = objects("outputs") { it.all { readTensor() } },
        weightBytes = integer("weight_bytes"),
        optimised = flag("optimised", default = false),
        weights = if (has("weights")) objects("weights") { it.all { readWeight() } } else emptyList(),
        sharedBytes = if (has("shared_bytes")) integer("shared_bytes") else 0,
    )
}

private fun Fields.readTensor(): TensorSpec {
    val name = text("name")
    val shape = list("shape", longest = 8).map { extent ->
        val fine = extent is String || (extent is Long && extent in 1..MAX_EXTENT)
        if (fine) extent else throw JsonException("shape of $name: expected names, or numbers from 1 to $MAX_EXTENT")
    }
    return TensorSpec(name, shape, text("dtype"))
}

private fun Fields.readWeight(): Weight {
    val shape = list("shape", longest = 8).map { extent ->
        (extent as? Long)?.takeIf { it in 1..MAX_EXTENT } ?: throw JsonException("shape of a weight: expected numbers")
    }
    val dtype = if (has("dtype")) text("dtype") else "float32"
    if (dtype !in WEIGHT_TYPES) throw JsonException("dtype of a weight: expected ${WEIGHT_TYPES.joinToString()}")
    return Weight(text("name"), shape, text("file"), integer("offset"), dtype)
}

/** What is inconsistent in a manifest whose fields have the right types; null if nothing is. */
private fun inconsistency(manifest: Manifest): String? {
    if (manifest.target !in TARGETS) return "target ${manifest.target.take(50)} is not known"
    val sizes = HashMap<String, Long>()
    for (file in manifest.files) {
        unsafePath(file.path)?.let { return it }
        if (sizes.put(file.path, file.bytes) != null) return "lists a file twice: ${file.path}"
    }
    if (manifest.selftest != null && manifest.selftest !in sizes) {
        return "the self-test is in ${manifest.selftest.take(200)}, which is not among the files"
    }
    for (piece in manifest.pieces) {
        val problem = placeProblem(piece) ?: fileProblem(piece, sizes) ?: weightProblem(piece, sizes)
        (problem ?: signatureProblem(piece, manifest))?.let { return it }
    }
    if (manifest.classIds.size != manifest.classNames.size) {
        return "${manifest.classIds.size} class_ids but ${manifest.classNames.size} class_names"
    }
    return routingProblem(manifest)
}

private fun unsafePath(path: String): String? {
    val parts = path.split("/")
    val unsafe = parts.any { it.isEmpty() || it == "." || it == ".." } || path.any { it == '\\' || it == ':' || it < ' ' }
    return when {
        unsafe -> "path '${path.take(200)}' may lead outside the bundle"
        parts.any { it.toByteArray().size > MAX_NAME_BYTES } -> "path '${path.take(60)}…' is longer than a file's name can be"
        else -> null
    }
}

private fun placeProblem(piece: Piece): String? {
    val ofExpert = piece.role == "tail" || piece.role == "expert_layer"
    val ofLayer = piece.role == "attention" || piece.role == "expert_layer"
    return when {
        (piece.expert != null) != ofExpert -> "a piece of role ${piece.role} names its expert wrongly"
        (piece.layer != null) != ofLayer -> "a piece of role ${piece.role} names its layer wrongly"
        else -> null
    }
}

private fun fileProblem(piece: Piece, sizes: Map<String, Long>): String? {
    unsafePath(piece.graph)?.let { return it }
    val unknown = piece.files.firstOrNull { it !in sizes }
    return when {
        piece.files.isEmpty() -> "piece ${piece.name} uses no file"
        unknown != null -> "piece ${piece.name} uses ${unknown.take(200)}, which is not among the files"
        piece.files.none { it == piece.graph || it.startsWith(piece.graph + "/") } ->
            "piece ${piece.name} does not list its graph ${piece.graph} among its files"
        else -> null
    }
}

private fun weightProblem(piece: Piece, sizes: Map<String, Long>): String? {
    for (weight in piece.weights) {
        if (weight.file !in piece.files) {
            return "piece ${piece.name}: weight ${weight.name} is in ${weight.file.take(200)}, which the piece does not list"
        }
        if (weight.offset % WEIGHT_ALIGNMENT != 0L || weight.offset + weight.bytes > sizes.getValue(weight.file)) {
            return "piece ${piece.name}: weight ${weight.name} lies outside ${weight.file}, or across its alignment"
        }
    }
    val names = piece.inputs.map { it.name } + piece.weights.map { it.name }
    return if (names.toSet().size != names.size) "piece ${piece.name} names an input twice" else null
}

/** What a piece's role does not allow in its inputs and outputs, which the runtime uses by position. */
private fun signatureProblem(piece: Piece, manifest: Manifest): String? {
    val fused = manifest.routing?.fusedRouter ?: false
    val classes = listOf(manifest.classNames.size.toLong())
    val experts = listOf((manifest.routing?.experts ?: 0).toLong())
    val side = manifest.preprocessing.size.toLong()
    val known = mapOf("images" to listOf(3L, side, side), "logits" to classes, "probabilities" to experts)
    for (spec in piece.inputs + piece.outputs) {
        if (spec.shape.isEmpty()) return "piece ${piece.name}: ${spec.name} has no shape"
        val wanted = known[spec.name]
        if (wanted != null && spec.ofOne != wanted) return "piece ${piece.name}: ${spec.name} is ${spec.ofOne}, the rest says $wanted"
    }
    val inputs = if (piece.role == "tail" || piece.role == "expert_layer") 2 else 1
    val outputs = when (piece.role) {
        "trunk" -> if (fused) listOf(2) else listOf(1)
        "attention" -> listOf(2)
        "router", "expert_layer" -> listOf(1)
        else -> listOf(1, 3)
    }
    if (piece.inputs.size != inputs) return "piece ${piece.name} has ${piece.inputs.size} inputs; a ${piece.role} has $inputs"
    if (piece.outputs.size !in outputs) {
        return "piece ${piece.name} has ${piece.outputs.size} outputs; a ${piece.role} has ${outputs.joinToString(" or ")}"
    }
    val types = if (piece.outputs.size == 3) listOf("float32", "float32", "int64") else piece.outputs.map { "float32" }
    if (piece.outputs.map { it.dtype } != types || piece.inputs.any { it.dtype != "float32" }) {
        return "piece ${piece.name}: its types are not ${types.joinToString()}, or an input is not float32"
    }
    if (piece.role == "router" || (piece.role == "trunk" && fused)) {
        val found = piece.outputs.last().ofOne
        if (found != experts) return "piece ${piece.name}: its probabilities are $found, there are ${experts[0]} experts"
    }
    return if (piece.role in listOf("model", "tail", "head")) rankingProblem(piece, classes) else null
}

private fun rankingProblem(piece: Piece, classes: List<Long>): String? {
    val (logits, ranked) = piece.outputs.map { it.ofOne }.let { it.first() to it.drop(1) }
    if (logits != classes) return "piece ${piece.name}: its logits are $logits, there are ${classes[0]} classes"
    if (ranked.isEmpty()) return null
    val count = ranked[0].singleOrNull() as? Long
    val fine = ranked[0] == ranked[1] && count != null && count in 1..minOf(classes[0], MAX_RANKED.toLong())
    return if (fine) null else "piece ${piece.name}: it ranks ${ranked[0]} and ${ranked[1]} of ${classes[0]} classes"
}

/** A tensor's shape for one image: without the batch. */
internal val TensorSpec.ofOne: List<Any> get() = shape.drop(1)

private fun routingProblem(manifest: Manifest): String? {
    val routing = manifest.routing
    val names = manifest.pieces.map { it.name }
    if (routing != null) {
        if (routing.k > routing.experts) return "routing: k is ${routing.k}, but there are only ${routing.experts} experts"
        if (manifest.experts.size != routing.experts) {
            return "describes ${manifest.experts.size} experts, routing has ${routing.experts}"
        }
        if (manifest.experts.any { expert -> expert.classes.any { it >= manifest.classNames.size } }) {
            return "an expert names a class that does not exist"
        }
        // counted first, because a list of all pieces of an absurd routing would not fit in memory
        val fewest = routing.experts.toLong() * (if (routing.k == 1) 1 else routing.moeLayers)
        if (fewest > names.size) return "pieces do not fit the routing: there are ${names.size}, it needs more than $fewest"
    }
    val expected = expectedPieces(routing)
    val present = names.toSet()
    val missing = expected.firstOrNull { it !in present }
    return when {
        missing != null -> "pieces do not fit the routing: lacks $missing"
        names.size != expected.size -> "pieces do not fit the routing: there are too many"
        else -> null
    }
}

private fun expectedPieces(routing: Routing?): List<String> {
    if (routing == null) return listOf("model")
    val fixed = listOf("trunk") + if (routing.fusedRouter) emptyList() else listOf("router")
    val experts = 0 until routing.experts
    if (routing.k == 1) return fixed + experts.map { pieceName("tail", it, null) }
    val layers = (0 until routing.moeLayers).flatMap { layer ->
        listOf(pieceName("attention", null, layer)) + experts.map { pieceName("expert_layer", it, layer) }
    }
    return fixed + layers + "head"
}
