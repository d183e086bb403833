package mvmoe.executorch

import mvmoe.Backend
import mvmoe.BackendException
import mvmoe.Bundle
import mvmoe.FloatTensor
import mvmoe.LoadedPiece
import mvmoe.Piece
import mvmoe.Tensor
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor as ModuleTensor

/**
 * Runs `executorch` bundles: a module per piece, in the packed layout too, since only whole modules can be freed.
 *
 * @param threads threads that a run may use.
 */
class ExecuTorchBackend(private val bundle: Bundle, private val threads: Int = 1) : Backend {
    override val name = "executorch"
    override val target = "executorch"

    override fun load(piece: Piece): LoadedPiece {
        val method = piece.function ?: "forward"
        // The default mode reads the whole file into memory; mapped, the system keeps what is used.
        val module = Module.load(bundle.file(piece.graph).path, Module.LOAD_MODE_MMAP, threads)
        try {
            if (method !in module.getMethods()) {
                throw BackendException("${bundle.file(piece.graph)}: has no method $method, which manifest.json names; export again")
            }
            module.loadMethod(method) // what goes wrong here is said again by the first run
        } catch (error: Exception) {
            module.destroy()
            throw error
        }
        return Loaded(module, method)
    }

    private class Loaded(private val module: Module, private val method: String) : LoadedPiece {
        /** One run at a time: what a run returns lies in memory that the next one uses. */
        @Synchronized
        override fun run(inputs: List<FloatTensor>): List<Tensor> {
            val values = inputs.map { EValue.from(ModuleTensor.fromBlob(it.values, it.shape.toLongArray())) }
            return module.execute(method, *values.toTypedArray()).map { value ->
                val tensor = value.toTensor()
                FloatTensor(tensor.shape().toList(), tensor.dataAsFloatArray)
            }
        }

        override fun close() = module.destroy()
    }

    override fun close() = Unit
}
