package mvmoe

/**
 * An upright image of 8-bit RGB pixels.
 *
 * @property pixels red, green and blue of each pixel, row by row.
 * @throws ImageException the image is empty, too large, or has another number of bytes.
 */
class Image(val width: Int, val height: Int, val pixels: ByteArray) {
    init {
        checkSize(width, height)
        if (pixels.size.toLong() != 3L * width * height) {
            throw ImageException("image: $width × $height needs ${3L * width * height} bytes, there are ${pixels.size}")
        }
    }

    /** This image after the EXIF [orientation] (tag 0x0112) is applied; other values than 2 to 8 leave it as it is. */
    fun upright(orientation: Int): Image {
        if (orientation !in 2..8) return this
        val turned = orientation >= 5 // rows become columns
        val (newWidth, newHeight) = if (turned) height to width else width to height
        val result = ByteArray(pixels.size)
        for (y in 0 until newHeight) for (x in 0 until newWidth) {
            val across = if (turned) y else x
            val down = if (turned) x else y
            val column = if (orientation in listOf(2, 3, 7, 8)) width - 1 - across else across
            val row = if (orientation in listOf(3, 4, 6, 7)) height - 1 - down else down
            pixels.copyInto(result, 3 * (y * newWidth + x), 3 * (row * width + column), 3 * (row * width + column) + 3)
        }
        return Image(newWidth, newHeight, result)
    }

    companion object {
        const val MAX_PIXELS = 100_000_000L
        const val MAX_SIDE = 65_535

        /**
         * Refuses a size before pixels are decoded, since decoding could exhaust memory.
         *
         * @throws ImageException the image is empty or too large.
         */
        fun checkSize(width: Int, height: Int) {
            val size = "image: $width × $height"
            if (width <= 0 || height <= 0) throw ImageException("image: the image is empty ($width × $height)")
            if (width.toLong() * height > MAX_PIXELS) {
                throw ImageException("$size is more than ${MAX_PIXELS / 1_000_000} million pixels; make it smaller first")
            }
            if (maxOf(width, height) > MAX_SIDE) throw ImageException("$size has a side above $MAX_SIDE pixels; make it smaller first")
        }

        /** From pixels of `0xAARRGGBB`, not premultiplied, as Android's `Bitmap.getPixels` gives; laid over white. */
        fun fromArgb(width: Int, height: Int, argb: IntArray): Image {
            checkSize(width, height)
            if (argb.size < width * height) throw ImageException("image: $width × $height has only ${argb.size} pixels")
            val pixels = ByteArray(3 * width * height)
            for (index in 0 until width * height) {
                val colour = argb[index]
                val alpha = colour ushr 24
                for (channel in 0..2) {
                    val value = colour ushr (16 - 8 * channel) and 255
                    pixels[3 * index + channel] = overWhite(value, alpha)
                }
            }
            return Image(width, height, pixels)
        }

        /** From bytes of red, green, blue and alpha, not premultiplied; laid over white. */
        fun fromRgba(width: Int, height: Int, rgba: ByteArray): Image {
            checkSize(width, height)
            if (rgba.size.toLong() != 4L * width * height) throw ImageException("image: $width × $height has ${rgba.size} bytes")
            val pixels = ByteArray(3 * width * height)
            for (index in 0 until width * height) {
                val alpha = rgba[4 * index + 3].toInt() and 255
                for (channel in 0..2) {
                    pixels[3 * index + channel] = overWhite(rgba[4 * index + channel].toInt() and 255, alpha)
                }
            }
            return Image(width, height, pixels)
        }

        private fun overWhite(value: Int, alpha: Int): Byte =
            if (alpha == 255) value.toByte() else ((value * alpha + 255 * (255 - alpha) + 127) / 255).toByte()
    }
}
