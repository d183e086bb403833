package mvmoe.sample.model

import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors
import java.util.concurrent.atomic.AtomicBoolean
import mvmoe.Image
import mvmoe.MvmoeException
import mvmoe.Prediction
import mvmoe.Runtime

/**
 * What the screen shows.
 *
 * @property label the most probable class with its probability, such as `chair (93 %)`.
 * @property expert which expert answered and what it is for.
 * @property timings what each step took.
 * @property resident which experts are in memory, and the bytes that they and the rest take.
 * @property selftest the self-test's verdict, once it was asked for.
 * @property problem what went wrong last; null if nothing did.
 */
data class Screen(
    val label: String = "",
    val expert: String = "",
    val timings: String = "",
    val resident: String = "",
    val selftest: String = "",
    val problem: String? = null,
)

/**
 * The sample's view model. It has no Android in it, so that it is tested on any machine.
 *
 * @param open opens the bundle; called on the model's own thread, since it reads and checks files.
 * @param show shows a new state of the screen; called on the model's own thread.
 */
class CameraModel(
    private val open: () -> Runtime,
    private val show: (Screen) -> Unit,
    private val worker: ExecutorService = Executors.newSingleThreadExecutor(),
) : AutoCloseable {
    private var runtime: Runtime? = null
    private var screen = Screen()
    private val busy = AtomicBoolean()

    init {
        work { update { copy(resident = resident(it)) } }
    }

    /**
     * Classifies a frame, unless one is being classified already: a camera delivers more than a phone can use.
     *
     * @param read makes an image of the frame; called at once, and only if the frame is used.
     */
    fun onFrame(read: () -> Image) {
        if (!busy.compareAndSet(false, true)) return
        try {
            val image = read()
            work({ busy.set(false) }) { runtime ->
                val prediction = runtime.predict(image)
                update {
                    copy(
                        label = "${prediction.label} (${percent(prediction.probability)})",
                        expert = expert(prediction),
                        timings = prediction.timings.entries.joinToString { (step, took) -> "$step %.1f ms".format(took) },
                        resident = resident(runtime),
                        problem = null,
                    )
                }
            }
        } catch (error: MvmoeException) {
            busy.set(false)
            worker.execute { update { copy(problem = error.message) } }
        }
    }

    /** Gives the experts' memory back, as Android's `onTrimMemory` asks; they are loaded again when they are needed. */
    fun onTrimMemory() = work { runtime ->
        runtime.trim()
        update { copy(resident = resident(runtime)) }
    }

    /** Runs the bundle's self-test with the platform's own decoder. */
    fun onSelfTest(decode: (ByteArray) -> Image) = work { runtime ->
        val verdict = runtime.selftest(decode)
        update { copy(selftest = verdict.toString(), resident = resident(runtime)) }
    }

    private fun expert(prediction: Prediction): String {
        val expert = prediction.expert ?: return "no experts"
        return "expert $expert, ${prediction.expertName} (gate ${percent(prediction.gate!!.toDouble())})"
    }

    private fun resident(runtime: Runtime): String = runtime.stats().let { stats ->
        "%s resident, %.2f MB and %.2f MB always".format(stats.resident, stats.residentBytes / 1e6, stats.fixedBytes / 1e6)
    }

    private fun percent(share: Double) = "%.0f %%".format(100 * share)

    private fun work(after: () -> Unit = {}, use: (Runtime) -> Unit) = worker.execute {
        try {
            use(runtime ?: open().also { runtime = it })
        } catch (error: MvmoeException) {
            update { copy(problem = error.message) }
        } finally {
            after()
        }
    }

    private fun update(change: Screen.() -> Screen) {
        screen = screen.change()
        show(screen)
    }

    override fun close() {
        worker.execute { runtime?.close() }
        worker.shutdown()
    }
}
