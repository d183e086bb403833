package mvmoe

/** Numbers that pass between the runtime and an engine. The first dimension is the batch, which is 1. */
sealed interface Tensor {
    val shape: List<Long>
}

/** float32 numbers, in C order. */
class FloatTensor(override val shape: List<Long>, val values: FloatArray) : Tensor

/** int64 numbers, in C order. */
class LongTensor(override val shape: List<Long>, val values: LongArray) : Tensor

/**
 * The engine that runs the pieces of one bundle. A backend is thin: the runtime has checked the files before it asks for
 * a piece, and checks what the piece returns.
 *
 * @property name what errors call it.
 * @property target the kind of bundles that it runs: `onnx` or `executorch`.
 */
interface Backend : AutoCloseable {
    val name: String
    val target: String

    /**
     * Makes a piece ready to run. Several threads may call it at once.
     *
     * @throws Exception the engine cannot read the piece; the runtime adds which file it was.
     */
    @Throws(Exception::class)
    fun load(piece: Piece): LoadedPiece
}

/** A piece that is ready to run; closing it gives its memory back. */
interface LoadedPiece : AutoCloseable {
    /**
     * Runs it once; several threads may do so at once. Inputs and outputs are in the manifest's order.
     *
     * @throws Exception the engine failed; the runtime adds which file it was.
     */
    @Throws(Exception::class)
    fun run(inputs: List<FloatTensor>): List<Tensor>
}

/** A loaded piece with its manifest entry, by which its outputs are checked. */
internal class Loaded(private val bundle: Bundle, private val backend: Backend, val piece: Piece) : AutoCloseable {
    private val loaded: LoadedPiece
    private val file get() = bundle.file(piece.graph)

    init {
        bundle.check(piece.files)
        loaded = try {
            backend.load(piece)
        } catch (error: MvmoeException) {
            throw error
        } catch (error: Exception) {
            throw BackendException("$file: ${backend.name} cannot load it (${error.firstLine()})", error)
        }
    }

    fun run(vararg inputs: FloatTensor): List<Tensor> {
        val outputs = try {
            loaded.run(inputs.asList())
        } catch (error: Exception) {
            throw BackendException("$file: ${piece.name} failed in ${backend.name} (${error.firstLine()})", error)
        }
        val fits = outputs.size == piece.outputs.size && outputs.zip(piece.outputs).all { (output, spec) ->
            val type = if (output is FloatTensor) "float32" else "int64"
            output.shape.first() == 1L && output.shape.drop(1) == spec.ofOne && type == spec.dtype
        }
        if (!fits) {
            val found = outputs.joinToString { it.shape.toString() }
            val wanted = piece.outputs.joinToString { "${it.shape} of ${it.dtype}" }
            throw BackendException("$file: ${piece.name} returned $found, manifest.json says $wanted; export again")
        }
        return outputs
    }

    override fun close() = loaded.close()
}

internal fun Throwable.firstLine(): String = (message ?: toString()).lineSequence().first().take(300)
