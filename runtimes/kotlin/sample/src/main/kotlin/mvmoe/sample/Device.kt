package mvmoe.sample

import android.content.Context
import android.graphics.BitmapFactory
import androidx.camera.core.ImageProxy
import java.io.File
import java.io.FileNotFoundException
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URL
import mvmoe.Image
import mvmoe.ImageException
import mvmoe.Runtime
import mvmoe.Source
import mvmoe.onnxruntime.OnnxRuntimeBackend

private const val ASSET = "bundle.mvmoe"
private const val TIMEOUT_MS = 20_000

/**
 * Opens the app's bundle. Its files come from the assets or, where they are not there, from [address]; they are kept in
 * the app's own folder, since an engine opens files and assets are none. An expert comes when it is first needed.
 *
 * @param digest sha256 of the bundle's `manifest.json`; empty for whatever bundle the developer put among the assets.
 */
fun openBundle(context: Context, digest: String, address: String): Runtime {
    val source = Source { path ->
        try {
            context.assets.open("$ASSET/$path")
        } catch (missing: FileNotFoundException) {
            if (address.isEmpty()) throw missing
            val connection = URL("$address/$path").openConnection() as HttpURLConnection
            connection.connectTimeout = TIMEOUT_MS
            connection.readTimeout = TIMEOUT_MS
            if (connection.responseCode != HttpURLConnection.HTTP_OK) throw IOException("HTTP ${connection.responseCode}")
            connection.inputStream
        }
    }
    // A folder for each bundle and each update of the app, so that files of an older bundle are never mixed with these.
    val version = context.packageManager.getPackageInfo(context.packageName, 0).lastUpdateTime
    return Runtime.load(
        File(context.filesDir, digest.ifEmpty { "bundle-$version" }),
        ::OnnxRuntimeBackend,
        maxResident = 2,
        source = source,
        digest = digest.ifEmpty { null },
        trust = digest.isEmpty(),
    )
}

/** A frame of the camera in RGBA, turned upright. Rows may be longer in memory than the image is wide. */
fun imageOf(frame: ImageProxy): Image {
    val plane = frame.planes[0]
    val rgba = ByteArray(4 * frame.width * frame.height)
    for (row in 0 until frame.height) {
        plane.buffer.position(row * plane.rowStride)
        plane.buffer.get(rgba, 4 * row * frame.width, 4 * frame.width)
    }
    val orientation = mapOf(90 to 6, 180 to 3, 270 to 8)[frame.imageInfo.rotationDegrees] ?: 1 // as EXIF counts them
    return Image.fromRgba(frame.width, frame.height, rgba).upright(orientation)
}

/** A PNG, decoded by the platform, without a conversion of colours or a scaling to the screen's density. */
fun decodePng(bytes: ByteArray): Image {
    val size = BitmapFactory.Options().apply { inJustDecodeBounds = true }
    BitmapFactory.decodeByteArray(bytes, 0, bytes.size, size)
    Image.checkSize(size.outWidth, size.outHeight)
    val options = BitmapFactory.Options().apply {
        inScaled = false
        inPremultiplied = false
    }
    val bitmap = BitmapFactory.decodeByteArray(bytes, 0, bytes.size, options) ?: throw ImageException("image: cannot be decoded")
    val argb = IntArray(bitmap.width * bitmap.height)
    bitmap.getPixels(argb, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
    return Image.fromArgb(bitmap.width, bitmap.height, argb)
}
