package mvmoe.checks

import java.io.File
import java.util.concurrent.Executors
import java.util.concurrent.Future
import java.util.concurrent.atomic.AtomicInteger
import java.util.concurrent.atomic.AtomicLong
import mvmoe.Backend
import mvmoe.Bundle
import mvmoe.FloatTensor
import mvmoe.LoadedPiece
import mvmoe.Piece
import mvmoe.Runtime

private const val THREADS = 8
private const val PREDICTIONS = 1000

/** A backend that counts what is really loaded, so that the runtime's own ledger is not asked about itself. */
class Counting(private val backend: Backend) : Backend by backend {
    val loads = AtomicInteger()
    private val bytes = AtomicLong()
    private val pieces = AtomicInteger()
    val mostBytes = AtomicLong()
    val mostPieces = AtomicInteger()
    val now get() = bytes.get()

    override fun load(piece: Piece): LoadedPiece {
        if (piece.expert == null) return backend.load(piece)
        loads.incrementAndGet()
        mostBytes.accumulateAndGet(bytes.addAndGet(piece.weightBytes), ::maxOf)
        mostPieces.accumulateAndGet(pieces.incrementAndGet(), ::maxOf)
        val loaded = backend.load(piece)
        return object : LoadedPiece by loaded {
            private var closed = false

            override fun run(inputs: List<FloatTensor>) = check(!closed) { "an expert left while it was in use" }.let { loaded.run(inputs) }

            override fun close() {
                check(!closed) { "closed twice" }
                closed = true
                loaded.close()
                bytes.addAndGet(-piece.weightBytes)
                pieces.decrementAndGet()
            }
        }
    }
}

/**
 * Tasks: bundle, a raw file; all of one bundle. Many threads predict at once with room for one expert. Answers: whether
 * each answer equals the serial one, and the most that was loaded at a time.
 */
internal fun threads(tasks: List<List<String>>) {
    val folder = File(tasks[0][0])
    val inputs = Bundle.open(folder).manifest.preprocessing.let { preprocessing -> tasks.map { preprocessing.preprocess(raw(it[1])) } }
    val expected = Runtime.load(folder, ::backend, trust = true).use { runtime -> inputs.map { runtime.run(it) } }
    val routes = expected.map { it.experts }.distinct().size
    val ofExpert = Bundle.open(folder).manifest.pieces.filter { it.expert != null }.groupBy { it.expert }
    val budget = ofExpert.values.maxOf { pieces -> pieces.sumOf { it.weightBytes } }
    lateinit var counting: Counting
    val counted = { bundle: Bundle -> Counting(backend(bundle)).also { counting = it } }
    Runtime.load(folder, counted, memoryBudget = budget.toString(), trust = true).use { runtime ->
        val wrong = AtomicInteger()
        val pool = Executors.newFixedThreadPool(THREADS)
        val runs: List<Future<*>> = (0 until THREADS).map { thread ->
            pool.submit {
                for (round in 0 until PREDICTIONS) {
                    // runs of the same image, so that hits, waits and switches all occur
                    val index = (round / 20 + 3 * thread) % inputs.size
                    val output = runtime.run(inputs[index])
                    val same = output.experts == expected[index].experts && output.logits.contentEquals(expected[index].logits)
                    if (!same) wrong.incrementAndGet()
                }
            }
        }
        runs.forEach { it.get() }
        pool.shutdown()
        val stats = runtime.stats()
        line("wrong", wrong)
        line("routes", routes)
        line("uses", stats.hits + stats.misses)
        line("loads", counting.loads)
        line("misses", stats.misses)
        line("budget", budget)
        line("most bytes", counting.mostBytes)
        line("most pieces", counting.mostPieces)
    }
    line("bytes after closing", counting.now)
}
