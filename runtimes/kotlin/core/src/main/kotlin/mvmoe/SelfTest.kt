package mvmoe

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Base64
import kotlin.math.abs
import kotlin.math.sqrt

/** What a device can get wrong, in the order in which one follows from another. */
enum class Stage { PIXELS, ROUTE, GATE, LOGITS }

/**
 * What one stage says of all cases.
 *
 * @property departure the largest departure, and [tolerance], the largest allowed; null for stages that ask for equality.
 */
class StageResult internal constructor(
    val stage: Stage,
    val cases: Int,
    val passed: Int,
    val departure: Double?,
    val tolerance: Double?,
)

/**
 * Whether this device answers as the bundle did where it was exported.
 *
 * @property stages each stage; a dense model has no `ROUTE` and no `GATE`.
 * @property failed the first stage at which a case failed: what follows from it fails as well, so this is where to look.
 */
class SelfTest internal constructor(val stages: List<StageResult>) {
    val failed: Stage? = stages.firstOrNull { it.passed < it.cases }?.stage
    val passed: Boolean get() = failed == null

    /** One line: what passed, or where and by how much the device departs. */
    override fun toString(): String = if (passed) {
        "self-test passed: " + stages.joinToString { result ->
            "${result.stage.name.lowercase()} ${result.passed}/${result.cases}" + (result.departure?.let { " (%.2g)".format(it) } ?: "")
        }
    } else {
        stages.first { it.stage == failed }.let { result ->
            val by = result.departure?.let { ", by up to %.2g, allowed are %.2g".format(it, result.tolerance) } ?: ""
            "self-test failed at ${result.stage.name.lowercase()}: ${result.cases - result.passed} of ${result.cases} cases$by"
        }
    }

    internal companion object {
        private const val MAX_BYTES = 32L shl 20

        /** Classes that lie further below the best are not compared: their probability is 0 in float32. */
        private const val FAR_BELOW = 100f

        fun run(runtime: Runtime, decode: (ByteArray) -> Image): SelfTest {
            val bundle = runtime.bundle
            val name = bundle.manifest.selftest ?: throw BundleException("${bundle.folder}: has no self-test; export again")
            if (bundle.manifest.files.first { it.path == name }.bytes > MAX_BYTES) {
                throw BundleException("${bundle.file(name)}: is larger than ${MAX_BYTES shr 20} MiB; not a self-test")
            }
            bundle.check(listOf(name))
            val file = try {
                Fields(Json.parse(bundle.file(name).readBytes()), "selftest").all { read(bundle) }
            } catch (error: JsonException) {
                throw BundleException("${bundle.file(name)}: ${error.message}; export again")
            }
            return judge(file, file.cases.map { case -> departures(runtime, case, decode) })
        }

        private fun Fields.read(bundle: Bundle): Cases {
            val (gate, logits) = inner("tolerance").all { bound("gate") to bound("logits") }
            val cases = objects("cases") { it.all { readCase() } }
            if (cases.isEmpty()) throw JsonException("has no cases")
            cases.forEachIndexed { number, case ->
                problem(case, bundle.manifest)?.let { throw JsonException("case $number: $it") }
            }
            return Cases(mapOf(Stage.GATE to gate, Stage.LOGITS to logits), cases)
        }

        private fun Fields.bound(name: String): Double {
            val bound = number(name)
            return if (bound > 0 && bound <= 10) bound else throw JsonException("tolerance.$name: expected above 0, at most 10")
        }

        private fun Fields.readCase(): Case {
            val logits = try {
                Base64.getDecoder().decode(text("logits"))
            } catch (_: IllegalArgumentException) {
                throw JsonException("logits: expected base64")
            }
            if (logits.size % 4 != 0) throw JsonException("logits: expected four bytes each")
            val values = ByteBuffer.wrap(logits).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
            val pixels = text("pixels")
            if (!Regex("[0-9a-f]{64}").matches(pixels)) throw JsonException("pixels: expected 64 hexadecimal digits")
            return Case(
                text("image"),
                pixels,
                integers("experts", 0..65535L),
                numbers("gates"),
                FloatArray(values.remaining()) { values[it] },
            )
        }

        private fun problem(case: Case, manifest: Manifest): String? {
            val experts = manifest.routing?.experts ?: 0
            val k = manifest.routing?.k ?: 0
            return when {
                manifest.files.none { it.path == case.image } -> "its image '${case.image.take(200)}' is not among the bundle's files"
                case.experts.size != k || case.gates.size != k || case.experts.any { it >= experts } ->
                    "it names experts ${case.experts.take(8)} with ${case.gates.size} gates; an image has $k of $experts"
                case.logits.size != manifest.classNames.size ->
                    "it has ${case.logits.size} logits for ${manifest.classNames.size} classes"
                case.gates.any { it !in 0.0..1.001 } || !case.logits.max().isFinite() -> // NaN is the largest of all
                    "a gate or a logit in it is not a number that a model can answer"
                else -> null
            }
        }

        /** How far the device departs at each stage; 0 or 1 for the stages that ask for equality. */
        private fun departures(runtime: Runtime, case: Case, decode: (ByteArray) -> Image): Map<Stage, Double> {
            val bundle = runtime.bundle
            bundle.check(listOf(case.image))
            val preprocessing = bundle.manifest.preprocessing
            val pixels = preprocessing.toPixels(decode(bundle.file(case.image).readBytes()))
            val output = try {
                runtime.run(preprocessing.normalise(pixels))
            } catch (error: AnswerException) {
                Output(FloatArray(case.logits.size) { Float.NaN }, error.experts, error.gates, emptyList(), emptyMap())
            }
            val equal = mapOf(
                Stage.PIXELS to (sha256(pixels.inputStream()) == case.pixels),
                Stage.ROUTE to (output.experts == case.experts),
            )
            val gates = output.gates.zip(case.gates) { found, wanted -> abs(found - wanted) }
            val measured = mapOf(
                Stage.GATE to if (output.gates.size < case.gates.size) Double.POSITIVE_INFINITY else gates.maxOrNull() ?: 0.0,
                Stage.LOGITS to logitsDeparture(output.logits, case.logits),
            )
            return equal.mapValues { if (it.value) 0.0 else 1.0 } + measured
        }

        private fun judge(file: Cases, cases: List<Map<Stage, Double>>): SelfTest {
            val routed = file.cases.any { it.experts.isNotEmpty() }
            return SelfTest(
                Stage.entries.filter { routed || it == Stage.PIXELS || it == Stage.LOGITS }.map { stage ->
                    val departures = cases.map { it.getValue(stage) }
                    val tolerance = file.tolerances[stage]
                    StageResult(
                        stage,
                        cases.size,
                        departures.count { it <= (tolerance ?: 0.0) }, // NaN fails too
                        if (tolerance == null) null else departures.max(),
                        tolerance,
                    )
                },
            )
        }

        /**
         * The largest departure of a logit, in standard deviations of the expected logits, after the mean is taken from
         * both sides, since a shift of all logits changes no answer; infinity if it cannot be told.
         */
        private fun logitsDeparture(found: FloatArray, expected: FloatArray): Double {
            val best = expected.max()
            val near = expected.indices.filter { expected[it] >= best - FAR_BELOW }
            val compared = if (near.size < 2) expected.indices.filter { expected[it].isFinite() } else near
            if (compared.any { !found[it].isFinite() }) return Double.POSITIVE_INFINITY
            val wanted = centred(compared.map { expected[it].toDouble() })
            val got = centred(compared.map { found[it].toDouble() })
            val largest = wanted.zip(got) { one, other -> abs(one - other) }.max()
            val spread = sqrt(wanted.sumOf { it * it } / wanted.size)
            return if (spread > 0) largest / spread else if (largest > 0) Double.POSITIVE_INFINITY else 0.0
        }

        private fun centred(values: List<Double>): List<Double> = values.average().let { mean -> values.map { it - mean } }
    }

    private class Cases(val tolerances: Map<Stage, Double>, val cases: List<Case>)

    private class Case(
        val image: String,
        val pixels: String,
        val experts: List<Int>,
        val gates: List<Double>,
        val logits: FloatArray,
    )
}
