package mvmoe.onnxruntime

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OnnxTensorLike
import ai.onnxruntime.OnnxValue
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.MappedByteBuffer
import java.nio.channels.FileChannel
import mvmoe.Backend
import mvmoe.BackendException
import mvmoe.Bundle
import mvmoe.FloatTensor
import mvmoe.LoadedPiece
import mvmoe.LongTensor
import mvmoe.Piece
import mvmoe.Tensor

/**
 * Runs `onnx` bundles on the CPU with ONNX Runtime: a session per piece, or one for all experts of a `swappable` bundle.
 *
 * @param threads threads of each session. With more than one, every session has a pool of its own, and the idle threads
 *   of one spin while another computes.
 */
class OnnxRuntimeBackend(private val bundle: Bundle, threads: Int = 1) : Backend {
    override val name = "onnxruntime"
    override val target = "onnx"
    private val environment = OrtEnvironment.getEnvironment()
    private val optimising = options(threads, OrtSession.SessionOptions.OptLevel.ALL_OPT)
    private val ready = options(threads, OrtSession.SessionOptions.OptLevel.NO_OPT)
    private val swapping = HashMap<String, OrtSession>() // graphs that take weights as inputs, each loaded once

    private fun options(threads: Int, level: OrtSession.SessionOptions.OptLevel) = OrtSession.SessionOptions().apply {
        setIntraOpNumThreads(threads)
        setInterOpNumThreads(1)
        setOptimizationLevel(level)
        setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR) // it warns of every weight that a graph lists as an input
    }

    override fun load(piece: Piece): LoadedPiece {
        if (piece.weights.isEmpty()) {
            val session = open(piece)
            return Loaded(piece, session, emptyMap()) { session.close() }
        }
        val session = synchronized(swapping) { swapping.getOrPut(piece.graph) { open(piece) } }
        checkNames(piece, session)
        val weights = weights(piece)
        return Loaded(piece, session, weights) { weights.values.forEach(OnnxTensor::close) }
    }

    private fun open(piece: Piece): OrtSession {
        val options = if (piece.optimised) ready else optimising
        val session = environment.createSession(bundle.file(piece.graph).path, options)
        try {
            checkNames(piece, session)
        } catch (error: BackendException) {
            session.close()
            throw error
        }
        return session
    }

    private fun checkNames(piece: Piece, session: OrtSession) {
        val inputs = piece.inputs.map { it.name } + piece.weights.map { it.name }
        val outputs = piece.outputs.map { it.name }
        val (found, wanted) = when {
            session.inputNames.toList() != inputs -> session.inputNames.toList() to inputs
            session.outputNames.toList() != outputs -> session.outputNames.toList() to outputs
            else -> return
        }
        throw BackendException("${bundle.file(piece.graph)}: takes or returns $found, manifest.json says $wanted; export again")
    }

    /** The piece's weights, mapped: the system reads them when they are used, and may drop them when memory is short. */
    private fun weights(piece: Piece): Map<String, OnnxTensor> {
        val maps = HashMap<String, MappedByteBuffer>()
        val result = LinkedHashMap<String, OnnxTensor>()
        try {
            for (weight in piece.weights) {
                val map = maps.getOrPut(weight.file) {
                    bundle.file(weight.file).inputStream().channel.use { it.map(FileChannel.MapMode.READ_ONLY, 0, it.size()) }
                }
                val part = map.duplicate()
                part.position(Math.toIntExact(weight.offset))
                part.limit(Math.toIntExact(weight.offset + weight.bytes))
                val bytes = part.slice().order(ByteOrder.LITTLE_ENDIAN)
                val shape = weight.shape.toLongArray()
                result[weight.name] = when (weight.dtype) {
                    "int8" -> OnnxTensor.createTensor(environment, bytes, shape, OnnxJavaType.INT8)
                    "uint8" -> OnnxTensor.createTensor(environment, bytes, shape, OnnxJavaType.UINT8)
                    else -> OnnxTensor.createTensor(environment, bytes.asFloatBuffer(), shape)
                }
            }
        } catch (error: Exception) {
            result.values.forEach(OnnxTensor::close)
            throw error
        }
        return result
    }

    private inner class Loaded(
        piece: Piece,
        private val session: OrtSession,
        private val weights: Map<String, OnnxTensor>,
        private val free: () -> Unit,
    ) : LoadedPiece {
        private val inputs = piece.inputs.map { it.name }
        private val outputs = piece.outputs.mapTo(LinkedHashSet()) { it.name }

        override fun run(inputs: List<FloatTensor>): List<Tensor> {
            val given = LinkedHashMap<String, OnnxTensorLike>(weights)
            val own = ArrayList<OnnxTensor>()
            try {
                for ((name, input) in this.inputs.zip(inputs)) {
                    val buffer = FloatBuffer.wrap(input.values)
                    own.add(OnnxTensor.createTensor(environment, buffer, input.shape.toLongArray()))
                    given[name] = own.last()
                }
                return session.run(given, outputs).use { result -> result.map { (_, value) -> copied(value) } }
            } finally {
                own.forEach(OnnxTensor::close)
            }
        }

        override fun close() = free()
    }

    /** The engine's memory is given back after the run. */
    private fun copied(value: OnnxValue): Tensor {
        val tensor = value as OnnxTensor
        val shape = tensor.info.shape.toList()
        val floats = tensor.floatBuffer ?: return tensor.longBuffer.let { longs ->
            LongTensor(shape, LongArray(longs.remaining()).also(longs::get))
        }
        return FloatTensor(shape, FloatArray(floats.remaining()).also(floats::get))
    }

    override fun close() {
        swapping.values.forEach(OrtSession::close)
        swapping.clear()
        optimising.close()
        ready.close()
    }
}
