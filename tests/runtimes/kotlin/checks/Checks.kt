package mvmoe.checks

import java.io.ByteArrayInputStream
import java.io.File
import java.io.IOException
import java.util.concurrent.Callable
import java.util.concurrent.CountDownLatch
import java.util.concurrent.Executors
import java.util.concurrent.TimeUnit
import mvmoe.BackendException
import mvmoe.BudgetException
import mvmoe.Bundle
import mvmoe.BundleException
import mvmoe.Image
import mvmoe.ImageException
import mvmoe.Json
import mvmoe.JsonException
import mvmoe.MvmoeException
import mvmoe.Runtime
import mvmoe.Source
import mvmoe.onnxruntime.OnnxRuntimeBackend
import mvmoe.parseBytes
import mvmoe.sample.model.CameraModel
import mvmoe.sample.model.Screen
import mvmoe.topK

/** Where the checks find a bundle with three experts or more, a raw image for each of them, and an empty folder. */
class Given(val bundle: File, val images: List<Image>, val empty: File) {
    val digest = Bundle.open(bundle).digest
}

private inline fun <reified T : MvmoeException> refuses(part: String, run: () -> Unit) {
    val message = try {
        run()
        error("was not refused, expected: $part")
    } catch (error: MvmoeException) {
        check(error is T) { "refused with $error" }
        error.message!!
    }
    check(part in message) { "the message lacks '$part': $message" }
    check('\n' !in message) { "the message has several lines: $message" }
}

private fun load(given: Given, memoryBudget: String? = null, maxResident: Int? = null, pin: List<Int> = emptyList()) =
    Runtime.load(given.bundle, ::OnnxRuntimeBackend, memoryBudget, maxResident, pin = pin, digest = given.digest)

private val CHECKS: Map<String, (Given) -> Unit> = mapOf(
    "equal probabilities go to the lower index" to {
        check(topK(floatArrayOf(0.2f, 0.3f, 0.3f, 0.2f), 3) == listOf(1, 2, 0))
        check(topK(floatArrayOf(-0f, 0f), 1) == listOf(0))
    },
    "sizes are read as everywhere" to {
        check(parseBytes("8MB") == 8_000_000L && parseBytes("8 MiB") == 8L shl 20 && parseBytes("1.5kB") == 1500L)
        check(parseBytes("700") == 700L)
        for (text in listOf("0", "-1MB", "MB", "8XB", "1e9")) refuses<BudgetException>(text) { parseBytes(text) }
    },
    "JSON is read strictly" to {
        check(Json.parse("""{"a":[1,-2.5e1,"\u00e9\n😀",null,true]}""".toByteArray()) == mapOf("a" to listOf(1L, -25.0, "é\n😀", null, true)))
        val wrong = listOf(
            "", "{", "[1,]", "{\"a\":1,}", "{a:1}", "01", "+1", "1.", ".5", "1e", "NaN", "1e999", "\"\\x\"", "\"\\u12\"",
            "\"\\ud800\"", "\"a\nb\"", "'a'", "[1] 2", "tru", "[".repeat(5000), "\"", "// a\n1", "\ufeff1", "1,", "{\"a\" 1}",
        )
        for (text in wrong) {
            val read = try {
                Json.parse(text.toByteArray())
            } catch (_: JsonException) {
                continue
            }
            error("'${text.take(20)}' was read as $read")
        }
        check(runCatching { Json.parse(byteArrayOf('"'.code.toByte(), -1, '"'.code.toByte())) }.isFailure) { "not UTF-8" }
    },
    "an image is turned upright" to {
        val image = Image(2, 3, ByteArray(18) { (it / 3).toByte() }) // 0 1 / 2 3 / 4 5
        val turned = mapOf(
            1 to listOf(0, 1, 2, 3, 4, 5), 2 to listOf(1, 0, 3, 2, 5, 4), 3 to listOf(5, 4, 3, 2, 1, 0), 4 to listOf(4, 5, 2, 3, 0, 1),
            5 to listOf(0, 2, 4, 1, 3, 5), 6 to listOf(4, 2, 0, 5, 3, 1), 7 to listOf(5, 3, 1, 4, 2, 0), 8 to listOf(1, 3, 5, 0, 2, 4),
            9 to listOf(0, 1, 2, 3, 4, 5),
        )
        for ((orientation, wanted) in turned) {
            val found = image.upright(orientation)
            check(found.pixels.toList().chunked(3).map { it[0].toInt() } == wanted) { "orientation $orientation" }
            check((found.width == 3) == (orientation in 5..8))
        }
    },
    "transparency is laid over white" to {
        val argb = intArrayOf(0x00123456, 0x80FF0001.toInt(), 0xFF010203.toInt())
        val wanted = listOf(255, 255, 255, 255, 127, 128, 1, 2, 3)
        check(Image.fromArgb(3, 1, argb).pixels.map { it.toInt() and 255 } == wanted)
        val rgba = ByteArray(12) { (argb[it / 4] ushr listOf(16, 8, 0, 24)[it % 4]).toByte() }
        check(Image.fromRgba(3, 1, rgba).pixels.map { it.toInt() and 255 } == wanted)
    },
    "impossible images are refused" to {
        refuses<ImageException>("million pixels") { Image.checkSize(60_000, 60_000) }
        refuses<ImageException>("side") { Image.checkSize(65_536, 1) }
        refuses<ImageException>("empty") { Image.checkSize(0, 5) }
        refuses<ImageException>("needs 12 bytes") { Image(2, 2, ByteArray(11)) }
    },
    "a bundle is neither pinned nor trusted by default" to { given ->
        refuses<BundleException>("is not pinned") { Runtime.load(given.bundle, ::OnnxRuntimeBackend) }
        refuses<BundleException>("another bundle") { Runtime.load(given.bundle, ::OnnxRuntimeBackend, digest = "0".repeat(64)) }
        load(given).close()
    },
    "predictions name class, expert and steps" to { given ->
        load(given).use { runtime ->
            val prediction = runtime.predict(given.images[0], top = 3)
            check(prediction.top.size == 3 && prediction.top.zipWithNext().all { (one, next) -> one.probability >= next.probability })
            check(prediction.label == prediction.top[0].label && prediction.expert == prediction.experts.single())
            check(prediction.timings.keys == setOf("preprocess", "trunk", "load", "tail"))
            val all = runtime.predict(given.images[0], top = 1000).top
            check(all.size == runtime.bundle.manifest.classNames.size && kotlin.math.abs(all.sumOf { it.probability } - 1) < 1e-6)
        }
    },
    "the least recently used expert leaves, a pinned one never does" to { given ->
        load(given, maxResident = 2, pin = listOf(1)).use { runtime ->
            check(runtime.stats().resident == listOf(1))
            runtime.predict(given.images[0])
            runtime.predict(given.images[2])
            check(runtime.stats().resident == listOf(1, 2))
            runtime.predict(given.images[1])
            check(runtime.stats().let { it.resident == listOf(2, 1) && it.evictions == 1L && it.misses == 3L && it.hits == 1L })
            runtime.trim()
            check(runtime.stats().let { it.resident == listOf(1) && it.evictions == 2L })
        }
    },
    "bounds that cannot work are refused" to { given ->
        refuses<BudgetException>("needs at least") { load(given, memoryBudget = "10kB") }
        refuses<BudgetException>("needs at least 2") { load(given, maxResident = 1, pin = listOf(0)) }
        refuses<BudgetException>("expert 99") { load(given, pin = listOf(99)) }
    },
    "an expert is loaded once, however many ask" to { given ->
        lateinit var counting: Counting
        val slow = { bundle: Bundle -> Counting(OnnxRuntimeBackend(bundle)).also { counting = it } }
        Runtime.load(given.bundle, slow, trust = true).use { runtime ->
            val pool = Executors.newFixedThreadPool(8)
            val start = CountDownLatch(1)
            val answers = List(8) { pool.submit(Callable { start.await().let { runtime.predict(given.images[0]).label } }) }
            start.countDown()
            check(answers.map { it.get() }.distinct().size == 1)
            pool.shutdown()
            check(counting.loads.get() == 1 && runtime.stats().let { it.misses == 1L && it.hits == 7L })
        }
    },
    "forced experts keep the router's gates" to { given ->
        load(given).use { runtime ->
            val input = runtime.bundle.manifest.preprocessing.preprocess(given.images[0])
            val routed = runtime.run(input)
            val forced = runtime.run(input, listOf(1))
            check(forced.experts == listOf(1) && forced.gates[0] < routed.gates[0] && !forced.logits.contentEquals(routed.logits))
            refuses<ImageException>("expected 1") { runtime.run(input, listOf(1, 2)) }
            refuses<ImageException>("NaN") { runtime.run(FloatArray(input.size) { Float.NaN }) }
            refuses<ImageException>("numbers, got") { runtime.run(FloatArray(5)) }
        }
    },
    "a closed runtime says so" to { given ->
        val runtime = load(given)
        runtime.close()
        runtime.close()
        refuses<BackendException>("closed") { runtime.predict(given.images[0]) }
    },
    "another engine's bundle is refused" to { given ->
        val other = { bundle: Bundle -> object : mvmoe.Backend by OnnxRuntimeBackend(bundle) { override val target = "executorch" } }
        refuses<BackendException>("of target onnx") { Runtime.load(given.bundle, other, trust = true) }
    },
    "files are fetched when they are first needed, whole or not at all" to { given ->
        val folder = File(given.empty, "fetched")
        val asked = ArrayList<String>()
        var broken = true
        val source = Source { path ->
            asked.add(path)
            val data = File(given.bundle, path).readBytes()
            if (broken && path.startsWith("expert_")) throw IOException("no connection")
            ByteArrayInputStream(data)
        }
        Runtime.load(folder, ::OnnxRuntimeBackend, source = source, digest = given.digest).use { runtime ->
            check(asked.none { it.startsWith("expert_") }) { "experts were fetched at the start: $asked" }
            refuses<BundleException>("could not be fetched (no connection)") { runtime.predict(given.images[0]) }
            broken = false
            runtime.predict(given.images[0])
            check(asked.filter { it.startsWith("expert_") }.all { it.startsWith("expert_00") })
        }
        check(folder.list()!!.none { it.endsWith(".part") })
        val count = asked.size
        Runtime.load(folder, ::OnnxRuntimeBackend, source = source, digest = given.digest).use { it.predict(given.images[0]) }
        check(asked.size == count) { "was fetched again: ${asked.drop(count)}" }
        val wrong = Source { path -> ByteArrayInputStream(File(given.bundle, path).readBytes().also { it[it.size / 2] = (it[it.size / 2] + 1).toByte() }) }
        val other = File(given.empty, "wrong")
        refuses<BundleException>("manifest.json") { Runtime.load(other, ::OnnxRuntimeBackend, source = wrong, digest = given.digest) }
        check(other.list()!!.isEmpty()) { "a manifest that is none was kept" }
        for (name in listOf("manifest.json", "manifest.sha256")) File(given.bundle, name).copyTo(File(other, name), overwrite = true)
        refuses<BundleException>("is not what manifest.json says") {
            Runtime.load(other, ::OnnxRuntimeBackend, source = wrong, digest = given.digest)
        }
    },
    "a folder that leads out of the bundle is refused" to { given ->
        val folder = File(given.empty, "linked").apply { mkdirs() }
        val manifest = File(given.bundle, "manifest.json").readText()
        val moved = manifest.replace("\"trunk.onnx\"", "\"out/trunk.onnx\"")
        File(folder, "manifest.json").writeText(moved)
        File(folder, "manifest.sha256").writeText(mvmoe.sha256(moved.byteInputStream()) + "  manifest.json\n")
        java.nio.file.Files.createSymbolicLink(File(folder, "out").toPath(), given.bundle.toPath())
        refuses<BundleException>("link out of the bundle") { Bundle.open(folder).check(listOf("out/trunk.onnx")) }
    },
    "the sample's model shows what it sees" to { given ->
        val screens = java.util.Collections.synchronizedList(ArrayList<Screen>())
        val worker = Executors.newSingleThreadExecutor()
        val model = CameraModel({ load(given) }, { screens.add(it) }, worker)
        model.onFrame { given.images[1] }
        worker.submit {}.get()
        val seen = screens.last()
        check(seen.problem == null && seen.label.endsWith("%)") && seen.expert.startsWith("expert 1,") && "trunk" in seen.timings) { "$seen" }
        check(seen.resident.startsWith("[1] resident")) { seen.resident }
        model.onTrimMemory()
        worker.submit {}.get()
        check(screens.last().resident.startsWith("[] resident")) { screens.last().resident }
        model.onFrame { throw ImageException("image: too large") }
        worker.submit {}.get()
        check(screens.last().problem == "image: too large")
        model.onSelfTest { throw ImageException("image: not a PNG") }
        worker.submit {}.get()
        check(screens.last().problem != null)
        model.close()
        check(worker.awaitTermination(10, TimeUnit.SECONDS))
    },
    "the sample's model says why a bundle cannot be opened" to { given ->
        val screens = java.util.Collections.synchronizedList(ArrayList<Screen>())
        val worker = Executors.newSingleThreadExecutor()
        CameraModel({ Runtime.load(given.empty, ::OnnxRuntimeBackend, trust = true) }, { screens.add(it) }, worker).close()
        check(worker.awaitTermination(10, TimeUnit.SECONDS))
        check("not a bundle" in screens.single().problem!!)
    },
)

/** The file: a bundle, an empty folder, and raw images that are routed to experts 0, 1 and 2. Answers: name, result. */
internal fun checks(file: File) {
    val (bundle, empty, images) = file.readLines().let { Triple(File(it[0]), File(it[1]), it.drop(2).map(::raw)) }
    val given = Given(bundle, images, empty)
    for ((name, run) in CHECKS) {
        val problem = try {
            run(given)
            "ok"
        } catch (error: Throwable) {
            "$error at ${error.stackTrace.firstOrNull { "checks" in it.className }}"
        }
        line(name, problem)
    }
}
