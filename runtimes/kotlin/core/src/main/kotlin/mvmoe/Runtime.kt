package mvmoe

import java.io.File
import java.util.concurrent.locks.ReentrantReadWriteLock
import kotlin.concurrent.read
import kotlin.concurrent.write
import kotlin.math.exp

/** A class and its probability. */
class Score internal constructor(val label: String, val classId: String, val probability: Double)

/**
 * The model's answer for one image.
 *
 * @property top the most probable classes, best first.
 * @property expert the expert that was used (the best one for k > 1); null for a dense model.
 * @property expertName what this expert is for.
 * @property gate this expert's router probability.
 * @property experts all k experts that were used, best first, and [gates], their router probabilities.
 * @property timings milliseconds of `preprocess`, `trunk` (with the router), `load` (of experts that were not resident)
 *   and `tail`; a dense model has `model` in place of the last three.
 */
class Prediction internal constructor(
    val top: List<Score>,
    val expert: Int?,
    val expertName: String?,
    val gate: Float?,
    val experts: List<Int>,
    val gates: List<Float>,
    val timings: Map<String, Double>,
) {
    val label: String get() = top[0].label
    val probability: Double get() = top[0].probability
}

/** Logits of an image, and the experts that it was routed to, best first, with their gates (none in a dense model). */
class Output internal constructor(
    val logits: FloatArray,
    val experts: List<Int>,
    val gates: List<Float>,
    internal val ranked: List<Tensor>,
    internal val timings: Map<String, Double>,
)

/** When files are compared with their sha256: all of them when the bundle is opened, or each before its first use. */
enum class Check { ALL, LAZY }

/**
 * Runs one bundle: trunk → router → the resident tail of the expert that the router picked. Safe from several threads.
 *
 * Use [load] to make one.
 */
class Runtime private constructor(
    val bundle: Bundle,
    val backend: Backend,
    memoryBudget: String?,
    maxResident: Int?,
    preload: Iterable<Int>,
    pin: Iterable<Int>,
) : AutoCloseable {
    private val manifest = bundle.manifest
    private val routing = manifest.routing
    private val ofExperts = List(routing?.experts ?: 0) { expert -> manifest.pieces.filter { it.expert == expert } }
    private val residency: Residency
    private val fixed = LinkedHashMap<String, Loaded>()
    private val fixedBytes: Long
    private val inUse = ReentrantReadWriteLock()
    private var closed = false

    init {
        val wanted = (pin + preload).distinct()
        for (expert in wanted) {
            if (expert !in ofExperts.indices) {
                throw BudgetException("expert $expert: ${bundle.folder} has ${ofExperts.size} experts, from 0")
            }
        }
        val sizes = ofExperts.map { pieces -> pieces.sumOf { it.weightBytes } }
        residency = Residency(::loadExpert, sizes, memoryBudget?.let(::parseBytes), maxResident, pin.toSet())
        val always = manifest.pieces.filter { it.expert == null }
        // in the swappable layout, what all experts share is loaded with the first expert and then kept
        val shared = ofExperts.flatten().associate { it.graph to it.sharedBytes }
        fixedBytes = always.sumOf { it.weightBytes } + shared.values.sum()
        try {
            for (piece in always) fixed[piece.name] = Loaded(bundle, backend, piece)
            for (expert in wanted) residency.use(expert) {}
        } catch (error: Exception) {
            close()
            throw error
        }
    }

    private fun loadExpert(expert: Int): List<Loaded> {
        val loaded = ArrayList<Loaded>()
        try {
            ofExperts[expert].forEach { loaded.add(Loaded(bundle, backend, it)) }
        } catch (error: Exception) {
            loaded.forEach(Loaded::close)
            throw error
        }
        return loaded
    }

    /**
     * Classifies one image.
     *
     * @param top how many classes to return.
     * @throws BundleException an expert that is needed is missing or damaged.
     * @throws BackendException a piece failed, or its output cannot be an answer.
     */
    fun predict(image: Image, top: Int = 5): Prediction {
        val started = System.nanoTime()
        val input = manifest.preprocessing.preprocess(image)
        val preprocess = since(started)
        val output = run(input)
        val best = best(output, top.coerceAtLeast(1)).map { (index, probability) ->
            Score(manifest.classNames[index], manifest.classIds[index], probability)
        }
        val expert = output.experts.firstOrNull()
        return Prediction(
            best,
            expert,
            expert?.let { manifest.experts[it].name },
            output.gates.firstOrNull(),
            output.experts,
            output.gates,
            mapOf("preprocess" to preprocess) + output.timings,
        )
    }

    /**
     * Runs one preprocessed image.
     *
     * @param input `[3, S, S]`, as [Preprocessing.preprocess] gives.
     * @param experts k experts to use instead of the router's choice; gates stay the router's probabilities of them.
     * @throws ImageException the input has another size, or values that are not finite.
     */
    fun run(input: FloatArray, experts: List<Int>? = null): Output {
        val size = manifest.preprocessing.size
        if (input.size != 3 * size * size) throw ImageException("input: expected 3 × $size × $size numbers, got ${input.size}")
        if (!input.all(Float::isFinite)) throw ImageException("input: has values that are NaN or infinite")
        if (experts != null) checkExperts(experts)
        val images = FloatTensor(listOf(1, 3, size.toLong(), size.toLong()), input)
        return inUse.read {
            if (closed) throw BackendException("${bundle.folder}: this runtime was closed")
            if (routing == null) runDense(images) else runRouted(routing, images, experts)
        }
    }

    private fun runDense(images: FloatTensor): Output {
        val started = System.nanoTime()
        val outputs = fixed.getValue("model").run(images)
        return answer(bundle.piece("model"), outputs, emptyList(), emptyList(), mapOf("model" to since(started)))
    }

    private fun runRouted(routing: Routing, images: FloatTensor, forced: List<Int>?): Output {
        val started = System.nanoTime()
        val outputs = fixed.getValue("trunk").run(images)
        val tokens = outputs[0] as FloatTensor
        val routed = if (routing.fusedRouter) outputs[1] else fixed.getValue("router").run(tokens)[0]
        val probabilities = (routed as FloatTensor).values
        checkProbabilities(routing, probabilities)
        val experts = forced ?: topK(probabilities, routing.k)
        val gates = experts.map { probabilities[it] }
        val timings = linkedMapOf("trunk" to since(started), "load" to 0.0, "tail" to 0.0)
        if (routing.k == 1) {
            val result = use(experts[0], 0, tokens, gates[0], timings)
            return answer(bundle.piece("tail", experts[0]), result, experts, gates, timings)
        }
        val result = runSegments(routing, tokens, experts, gates, timings)
        return answer(bundle.piece("head"), result, experts, gates, timings)
    }

    /** k > 1: the chosen experts' outputs add up within each MoE layer. */
    private fun runSegments(
        routing: Routing,
        trunk: FloatTensor,
        experts: List<Int>,
        gates: List<Float>,
        timings: MutableMap<String, Double>,
    ): List<Tensor> {
        var tokens = trunk
        for (layer in 0 until routing.moeLayers) {
            val (residual, expertInput) = fixed.getValue("attention_$layer").run(tokens)
            val sum = (residual as FloatTensor).values.copyOf()
            // resident ones first, since loading another could evict them
            for (expert in experts.sortedWith(compareBy({ !residency.resident(it) }, { it }))) {
                val gate = gates[experts.indexOf(expert)]
                val addend = use(expert, layer, expertInput as FloatTensor, gate, timings)[0] as FloatTensor
                for (index in sum.indices) sum[index] += addend.values[index]
            }
            tokens = FloatTensor(residual.shape, sum)
        }
        return fixed.getValue("head").run(tokens)
    }

    /** Runs one layer of an expert (a tail is layer 0), loading the expert first if needed. */
    private fun use(
        expert: Int,
        layer: Int,
        input: FloatTensor,
        gate: Float,
        timings: MutableMap<String, Double>,
    ): List<Tensor> {
        val started = System.nanoTime()
        return residency.use(expert) { pieces ->
            val ready = System.nanoTime()
            val piece = pieces.firstOrNull { it.piece.layer == layer } ?: pieces[0]
            val outputs = piece.run(input, FloatTensor(listOf(1), floatArrayOf(gate)))
            timings["load"] = timings.getValue("load") + (ready - started) / 1e6
            timings["tail"] = timings.getValue("tail") + since(ready)
            outputs
        }
    }

    private fun answer(
        piece: Piece,
        outputs: List<Tensor>,
        experts: List<Int>,
        gates: List<Float>,
        timings: Map<String, Double>,
    ): Output {
        val logits = (outputs[0] as FloatTensor).values
        // minus infinity is a class that cannot be, as long as another can
        if (logits.any { it.isNaN() || it == Float.POSITIVE_INFINITY } || logits.none(Float::isFinite)) {
            throw noAnswer(piece, experts, gates)
        }
        return Output(logits, experts, gates, outputs.drop(1), timings)
    }

    private fun noAnswer(piece: Piece, experts: List<Int>, gates: List<Float>) = AnswerException(
        "${bundle.file(piece.graph)}: ${piece.name} returned logits or classes that are NaN, infinite or out of range; export again",
        experts,
        gates,
    )

    private fun checkProbabilities(routing: Routing, probabilities: FloatArray) {
        val sum = probabilities.sumOf { it.toDouble() }
        if (sum > 0.95 && sum < 1.05 && probabilities.all { it >= 0 }) return // NaN fails too
        val piece = bundle.piece(if (routing.fusedRouter) "trunk" else "router")
        throw AnswerException(
            "${bundle.file(piece.graph)}: ${piece.name} does not return probabilities: they are " +
                "${probabilities.min()} to ${probabilities.max()} and sum to $sum; export again",
            emptyList(),
            emptyList(),
        )
    }

    private fun checkExperts(experts: List<Int>) {
        if (routing == null) throw ImageException("${bundle.folder}: a dense model has no experts to choose")
        if (experts.size != routing.k || experts.distinct().size != routing.k || experts.any { it !in ofExperts.indices }) {
            throw ImageException("experts: expected ${routing.k} different ones from 0 to ${routing.experts - 1}, got $experts")
        }
    }

    /** The most probable classes and their probabilities, best first; the lower index wins a tie. */
    private fun best(output: Output, top: Int): List<Pair<Int, Double>> {
        val count = top.coerceAtMost(output.logits.size)
        if (output.ranked.size == 2 && count <= output.ranked[0].shape[1]) {
            val probabilities = (output.ranked[0] as FloatTensor).values.take(count).map { it.toDouble() }
            val indices = (output.ranked[1] as LongTensor).values.take(count)
            val fine = indices.all { it in output.logits.indices } && (listOf(1.001) + probabilities).zipWithNext().all { (before, it) -> it in 0.0..before }
            val last = output.experts.singleOrNull()?.let { bundle.piece("tail", it) }
            if (!fine) throw noAnswer(last ?: bundle.piece(if (routing == null) "model" else "head"), output.experts, output.gates)
            return indices.map { it.toInt() }.zip(probabilities)
        }
        val peak = output.logits.max()
        val total = output.logits.sumOf { exp((it - peak).toDouble()) }
        val order = output.logits.indices.sortedByDescending { output.logits[it] + 0f }.take(count) // a stable sort
        return order.map { it to exp((output.logits[it] - peak).toDouble()) / total }
    }

    /** Counts since the runtime was opened, and what is resident now. */
    fun stats(): Stats = residency.stats(fixedBytes)

    /** Drops every expert that is neither in use nor pinned, as Android's `onTrimMemory` asks; they load again when needed. */
    fun trim() = residency.trim()

    /**
     * Runs the cases that the bundle carries.
     *
     * @param decode the platform's decoder: the bytes of a PNG to its pixels. It is part of what is proven.
     * @throws BundleException the bundle has no self-test, or its file is damaged.
     */
    fun selftest(decode: (ByteArray) -> Image): SelfTest = SelfTest.run(this, decode)

    /** Drops everything that is loaded, after the calls that other threads have begun; then it cannot be used any more. */
    override fun close() = inUse.write {
        if (!closed) {
            closed = true
            residency.close()
            fixed.values.forEach(Loaded::close)
            fixed.clear()
            backend.close()
        }
    }

    companion object {
        /**
         * Opens a bundle and loads what every image needs; experts are loaded when the router first picks them.
         *
         * @param backend opens the engine, such as `::OnnxRuntimeBackend`.
         * @param memoryBudget largest total size of the resident experts (`"8MB"`); the least recently used leave first.
         *   By default an expert stays once it is loaded.
         * @param maxResident largest number of resident experts.
         * @param preload experts to load now.
         * @param pin experts that are loaded now and never leave.
         * @param source where files come from that are not in [folder] yet.
         * @param digest sha256 of `manifest.json` (`mvmoe-inspect` shows it), which pins the whole bundle.
         * @param trust runs a bundle that is not pinned. Engines trust the graphs that they load, and this package does
         *   not read them: a hostile graph can end the process, or do worse.
         * @throws BundleException the bundle is missing, damaged, unsafe, or neither pinned nor trusted.
         * @throws BackendException the engine cannot run it.
         * @throws BudgetException the budget cannot hold one expert.
         */
        fun load(
            folder: File,
            backend: (Bundle) -> Backend,
            memoryBudget: String? = null,
            maxResident: Int? = null,
            preload: Iterable<Int> = emptyList(),
            pin: Iterable<Int> = emptyList(),
            source: Source? = null,
            check: Check = if (source == null) Check.ALL else Check.LAZY,
            digest: String? = null,
            trust: Boolean = false,
        ): Runtime {
            val bundle = Bundle.open(folder, digest, source)
            if (digest == null && !trust) {
                throw BundleException("$folder: is not pinned: pass digest = \"${bundle.digest}\" if this is your bundle, or trust = true")
            }
            if (check == Check.ALL) bundle.check()
            val engine = backend(bundle)
            if (engine.target != bundle.manifest.target) {
                engine.close()
                throw BackendException("$folder: is of target ${bundle.manifest.target}, ${engine.name} runs ${engine.target}")
            }
            return Runtime(bundle, engine, memoryBudget, maxResident, preload, pin)
        }
    }
}

/** Indices of the k largest, best first; the lower index wins a tie. */
internal fun topK(probabilities: FloatArray, k: Int): List<Int> =
    probabilities.indices.sortedByDescending { probabilities[it] + 0f }.take(k) // a stable sort; -0 + 0 is 0

private fun since(started: Long): Double = (System.nanoTime() - started) / 1e6
