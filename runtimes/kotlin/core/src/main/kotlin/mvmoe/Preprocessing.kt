package mvmoe

import kotlin.math.abs

/**
 * How an image becomes the model's input: exactly as docs/bundle-format.md says, since single grey levels decide routes.
 *
 * @property size side of the model's input S, in pixels.
 * @property crop share of the shorter side that is kept.
 */
class Preprocessing internal constructor(
    val size: Int,
    val crop: Double,
    val interpolation: String,
    mean: List<Double>,
    std: List<Double>,
) {
    private val scale = FloatArray(3) { (1 / (255 * std[it])).toFloat() }
    private val bias = FloatArray(3) { (-mean[it] / std[it]).toFloat() }

    /** The model's input `[3, S, S]`. */
    fun preprocess(image: Image): FloatArray = normalise(toPixels(image))

    /** The largest centred square times [crop], resampled to S × S: red, green and blue of each pixel. */
    fun toPixels(image: Image): ByteArray {
        val side = minOf(image.width, image.height) * crop
        if (image.width == size && image.height == size && side == size.toDouble()) return image.pixels
        val left = (image.width - side) / 2
        val top = (image.height - side) / 2
        val columns = taps(image.width, left, left + side)
        val rows = taps(image.height, top, top + side)
        return down(across(image, columns, rows), columns.size, rows)
    }

    /** Pixels `[S, S, 3]` of 0 to 255 to the model's input `[3, S, S]`, red first. */
    fun normalise(pixels: ByteArray): FloatArray {
        val plane = size * size
        val result = FloatArray(3 * plane)
        for (channel in 0..2) {
            val (factor, offset) = scale[channel] to bias[channel]
            for (index in 0 until plane) {
                // Rounded after each step: a fused multiply-add would differ in the last bit, and the JVM makes none.
                result[channel * plane + index] = (pixels[3 * index + channel].toInt() and 255) * factor + offset
            }
        }
        return result
    }

    /** For one output pixel: the first input pixel that it reads, and the integer weights of it and its successors. */
    private class Taps(val first: Int, val weights: IntArray)

    private fun taps(length: Int, start: Double, end: Double): List<Taps> {
        val from = start.toFloat()
        val scale = (end.toFloat() - from).toDouble() / size // the difference is a float32; what follows is float64
        val wide = maxOf(scale, 1.0) // antialiasing: the kernel is stretched where the image shrinks
        val reach = (if (interpolation == "bicubic") 2.0 else 1.0) * wide
        return List(size) { x ->
            val centre = from.toDouble() + (x + 0.5) * scale
            val first = maxOf((centre - reach + 0.5).toInt(), 0) // toInt drops the fraction
            val last = minOf((centre + reach + 0.5).toInt(), length)
            val weights = DoubleArray(last - first) { kernel((first + it - centre + 0.5) * (1.0 / wide)) }
            var total = 0.0
            for (weight in weights) total += weight
            Taps(first, IntArray(weights.size) { rounded(weights[it] / total * ONE) })
        }
    }

    private fun kernel(signed: Double): Double {
        val x = abs(signed)
        return when {
            interpolation == "bilinear" -> if (x < 1) 1 - x else 0.0
            x < 1 -> (1.5 * x - 2.5) * x * x + 1
            x < 2 -> (((x - 5) * x + 8) * x - 4) * -0.5
            else -> 0.0
        }
    }

    private fun rounded(weight: Double): Int = if (weight >= 0) (weight + 0.5).toInt() else (weight - 0.5).toInt()

    /** Resamples each row that the second pass reads; the result starts with the first of them. */
    private fun across(image: Image, columns: List<Taps>, rows: List<Taps>): Rows {
        val first = rows.minOf { it.first }
        val count = rows.maxOf { it.first + it.weights.size } - first
        val result = ByteArray(count * columns.size * 3)
        for (y in 0 until count) {
            val line = (first + y) * image.width
            for ((x, tap) in columns.withIndex()) {
                weigh(image.pixels, 3 * (line + tap.first), 3, tap.weights, result, 3 * (y * columns.size + x))
            }
        }
        return Rows(first, result)
    }

    private class Rows(val first: Int, val pixels: ByteArray)

    private fun down(source: Rows, width: Int, rows: List<Taps>): ByteArray {
        val result = ByteArray(rows.size * width * 3)
        for ((y, tap) in rows.withIndex()) {
            for (x in 0 until width) {
                val start = 3 * ((tap.first - source.first) * width + x)
                weigh(source.pixels, start, 3 * width, tap.weights, result, 3 * (y * width + x))
            }
        }
        return result
    }

    /** One output pixel: the weighted sum of input pixels that lie [step] bytes apart, rounded to bytes. */
    private fun weigh(source: ByteArray, start: Int, step: Int, weights: IntArray, result: ByteArray, place: Int) {
        for (channel in 0..2) {
            var sum = HALF
            var at = start + channel
            for (weight in weights) {
                sum += weight.toLong() * (source[at].toInt() and 255)
                at += step
            }
            result[place + channel] = (sum shr BITS).coerceIn(0, 255).toByte()
        }
    }

    private companion object {
        const val BITS = 22
        const val ONE = (1 shl BITS).toDouble()
        const val HALF = 1L shl (BITS - 1)
    }
}
