package mvmoe.checks

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Base64
import java.util.Locale
import mvmoe.Backend
import mvmoe.Bundle
import mvmoe.Check
import mvmoe.Image
import mvmoe.MvmoeException
import mvmoe.Output
import mvmoe.Runtime
import mvmoe.executorch.ExecuTorchBackend
import mvmoe.onnxruntime.OnnxRuntimeBackend
import mvmoe.sha256

/** What the tests in Python ask for: a command, and a file of tasks, a line each, with fields between tabs. */
fun main(arguments: Array<String>) {
    Locale.setDefault(Locale.ROOT)
    val tasks = File(arguments[1]).readLines().map { it.split("\t") }
    when (arguments[0]) {
        "answers" -> answers(tasks)
        "refusals" -> refusals(tasks)
        "selftests" -> selftests(tasks)
        "threads" -> threads(tasks)
        "checks" -> checks(File(arguments[1]))
        else -> error("unknown command ${arguments[0]}")
    }
}

fun line(vararg fields: Any?) = println(fields.joinToString("\t") { it.toString().replace(Regex("\\s"), " ") })

/** A file of width, height (32-bit, little-endian) and RGB pixels, which Python has decoded. */
fun raw(path: String): Image = raw(File(path).readBytes())

fun raw(bytes: ByteArray): Image {
    val header = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN)
    return Image(header.getInt(0), header.getInt(4), bytes.copyOfRange(8, bytes.size))
}

fun backend(bundle: Bundle): Backend =
    if (bundle.manifest.target == "executorch") ExecuTorchBackend(bundle) else OnnxRuntimeBackend(bundle)

fun answer(runtime: Runtime, image: Image): Pair<String, Output> {
    val pixels = runtime.bundle.manifest.preprocessing.toPixels(image)
    return sha256(pixels.inputStream()) to runtime.run(runtime.bundle.manifest.preprocessing.normalise(pixels))
}

/** Tasks: bundle, image's name, its raw file. Answers: bundle, image, sha256 of the pixels, experts, gates, logits. */
private fun answers(tasks: List<List<String>>) {
    for ((bundle, ofBundle) in tasks.groupBy { it[0] }) {
        Runtime.load(File(bundle), ::backend, maxResident = 2, trust = true).use { runtime ->
            for ((_, name, file) in ofBundle) {
                val (pixels, output) = answer(runtime, raw(file))
                val logits = ByteBuffer.allocate(4 * output.logits.size).order(ByteOrder.LITTLE_ENDIAN)
                output.logits.forEach(logits::putFloat)
                val gates = output.gates.joinToString(",")
                line(bundle, name, pixels, output.experts.joinToString(","), gates, Base64.getEncoder().encodeToString(logits.array()))
            }
        }
    }
}

/** Tasks: bundle, a raw file. Answers: bundle, when it was refused (open, load, predict, never), and the message. */
private fun refusals(tasks: List<List<String>>) {
    for ((bundle, image) in tasks) {
        var stage = "open"
        try {
            Bundle.open(File(bundle))
            stage = "load"
            Runtime.load(File(bundle), ::backend, check = Check.LAZY, trust = true).use { runtime ->
                stage = "predict"
                runtime.predict(raw(image))
            }
            line(bundle, "never", "")
        } catch (error: MvmoeException) {
            line(bundle, stage, error.message)
        }
    }
}

/** Tasks: bundle, folder of raw files named as the self-test's images. Answers: bundle, the stage that failed, the verdict, and by stage. */
private fun selftests(tasks: List<List<String>>) {
    for ((bundle, folder) in tasks) {
        Runtime.load(File(bundle), ::backend, check = Check.LAZY, trust = true).use { runtime ->
            // stands for the platform's decoder: finds what Python decoded by the PNG's sha256
            try {
                val verdict = runtime.selftest { png -> raw("$folder/${sha256(png.inputStream())}.raw") }
                line(bundle, verdict.failed, verdict, verdict.stages.joinToString { it.stage.name.lowercase() + " ${it.passed}/${it.cases}" })
            } catch (error: MvmoeException) {
                line(bundle, "refused", error.message, "")
            }
        }
    }
}
