package mvmoe

import java.io.File
import java.io.IOException
import java.io.InputStream
import java.security.MessageDigest
import java.util.concurrent.ConcurrentHashMap

/**
 * Where files come from that are not in the bundle's folder yet: an app's assets, a server.
 *
 * With assets: `Source { path -> context.assets.open("birds.mvmoe/$path") }`.
 */
fun interface Source {
    /**
     * Opens a file of the bundle, named by its path in it.
     *
     * @throws IOException it cannot be had now.
     */
    @Throws(IOException::class)
    fun open(path: String): InputStream
}

/**
 * An opened bundle: its manifest is valid and consistent; [check] checks its files.
 *
 * @property folder where its files lie. Engines open them there, so it is a real folder even where a [Source] fills it.
 * @property digest sha256 of `manifest.json`. It identifies the whole bundle, since the manifest has the sha256 of every
 *   other file.
 */
class Bundle private constructor(
    val folder: File,
    val manifest: Manifest,
    val digest: String,
    private val source: Source?,
) {
    private val entries = manifest.files.associateBy { it.path }
    private val checked = ConcurrentHashMap<String, Boolean>()

    /** The one piece of that role, expert and layer. */
    fun piece(role: String, expert: Int? = null, layer: Int? = null): Piece =
        manifest.pieces.firstOrNull { it.role == role && it.expert == expert && it.layer == layer }
            ?: throw BundleException("$folder: has no piece ${pieceName(role, expert, layer)}")

    /** Where a file of the bundle lies. */
    fun file(path: String): File = File(folder, path)

    /**
     * Compares files with the manifest's sizes and sha256, each only once; fetches those that are not there.
     *
     * @throws BundleException a file is missing, outside the bundle, of another size, or altered; the message names it.
     */
    fun check(paths: Collection<String> = entries.keys) {
        for (path in paths) {
            checked.computeIfAbsent(path) { // one thread per file, the others wait; an exception leaves no entry
                checkFile(entries.getValue(path))
                true
            }
        }
    }

    private fun checkFile(entry: FileEntry) {
        val file = file(entry.path)
        try {
            if (!file.isFile && source != null) fetch(entry, file, source)
            if (!file.isFile) throw BundleException("$file: missing from the bundle; export again or copy it again")
            // A file that is a link is fine, since its sha256 is checked; a folder that is one leads out of the bundle.
            val parent = file.parentFile!!.canonicalFile
            if (!parent.startsWith(folder.canonicalFile)) {
                throw BundleException("$file: lies in a folder that is a link out of the bundle; copy the bundle")
            }
            if (file.length() != entry.bytes) {
                throw BundleException("$file: has ${file.length()} bytes, $MANIFEST says ${entry.bytes}; $DAMAGED")
            }
            if (file.inputStream().use { sha256(it) } != entry.sha256) {
                throw BundleException("$file: sha256 differs from $MANIFEST; $DAMAGED")
            }
        } catch (error: IOException) {
            throw BundleException("$file: cannot be read (${error.message})", error)
        }
    }

    companion object {
        const val MANIFEST = "manifest.json"
        const val MANIFEST_DIGEST = "manifest.sha256"
        private const val MAX_MANIFEST_BYTES = 32L shl 20
        private const val DAMAGED = "the file is damaged, export again"
        private val DIGEST_LINE = Regex("([0-9a-f]{64}) [ *]manifest\\.json\\r?\\n?")

        /**
         * Reads and checks a bundle's manifest and its sha256; no other file is opened.
         *
         * @param digest sha256 that the manifest must have, where the app knows it.
         * @param source where missing files come from, the manifest included.
         * @throws BundleException there is no bundle, it has another digest, or its manifest is damaged, unsafe or of
         *   another version.
         */
        fun open(folder: File, digest: String? = null, source: Source? = null): Bundle {
            val place = folder.absoluteFile
            val file = File(place, MANIFEST)
            val fetched = ArrayList<File>()
            try {
                for (name in listOf(MANIFEST, MANIFEST_DIGEST)) {
                    if (source != null && fetchUnlisted(File(place, name), name, source)) fetched.add(File(place, name))
                }
                if (!place.exists()) throw BundleException("$folder: no such bundle")
                if (!file.isFile) throw BundleException("$folder: not a bundle (a directory with a $MANIFEST)")
                if (file.length() > MAX_MANIFEST_BYTES) {
                    throw BundleException("$file: is larger than ${MAX_MANIFEST_BYTES shr 20} MB; not a manifest")
                }
                val data = file.readBytes()
                val found = sha256(data.inputStream())
                if (digest != null && found != digest.lowercase()) {
                    throw BundleException("$file: has sha256 $found, but $digest is asked for; it is another bundle, or damaged")
                }
                val recorded = recordedDigest(File(place, MANIFEST_DIGEST))
                if (recorded != null && found != recorded) {
                    throw BundleException("$file: sha256 differs from $MANIFEST_DIGEST; $DAMAGED")
                }
                val manifest = readManifest(Json.parse(data))
                if (recorded == null && manifest.version > 2) {
                    throw BundleException("${File(place, MANIFEST_DIGEST)}: missing from the bundle; copy it again or export again")
                }
                fetched.clear()
                return Bundle(place, manifest, found, source)
            } catch (error: JsonException) {
                throw BundleException("$file: ${error.message}")
            } catch (error: IOException) {
                throw BundleException("$folder: cannot be read (${error.message})", error)
            } finally {
                fetched.forEach { it.delete() } // a page of a hotel's network must not stay in the manifest's place
            }
        }

        /** The digest in `manifest.sha256`; null if there is no such file, empty if its content has another form. */
        private fun recordedDigest(file: File): String? {
            if (!file.exists()) return null
            if (!file.isFile || file.length() > 1024) return ""
            return DIGEST_LINE.matchEntire(file.readText(Charsets.ISO_8859_1))?.groupValues?.get(1) ?: ""
        }

        /** Fetches one of the two files that no hash in the manifest covers; returns whether it did. */
        private fun fetchUnlisted(file: File, name: String, source: Source): Boolean {
            if (file.exists()) return false
            try {
                val data = source.open(name).use { it.readAtMost(MAX_MANIFEST_BYTES) }
                whole(file) { it.writeBytes(data) }
                return true
            } catch (error: IOException) {
                if (name == MANIFEST) {
                    throw BundleException("$file: missing, and could not be fetched (${error.message})", error)
                }
                return false // bundles of versions 1 and 2 may lack the other
            }
        }
    }
}

private fun InputStream.readAtMost(limit: Long): ByteArray {
    val result = java.io.ByteArrayOutputStream()
    val part = ByteArray(1 shl 16)
    while (true) {
        val count = read(part)
        if (count < 0) return result.toByteArray()
        if (result.size() + count > limit) throw IOException("more than $limit bytes")
        result.write(part, 0, count)
    }
}

/** Makes a file beside its place and renames it, so that it is there whole or not at all. */
private fun whole(file: File, write: (File) -> Unit) {
    file.parentFile!!.mkdirs()
    val part = File.createTempFile(file.name.take(100) + ".", ".part", file.parentFile)
    try {
        write(part)
        if (!part.renameTo(file)) throw IOException("cannot be renamed from ${part.name}")
    } finally {
        part.delete() // after the renaming there is none
    }
}

/** Fetches a file, and keeps it only if it is what the manifest says. */
private fun fetch(entry: FileEntry, file: File, source: Source) = whole(file) { part ->
    val digest = MessageDigest.getInstance("SHA-256")
    var count = 0L
    try {
        source.open(entry.path).use { input ->
            part.outputStream().use { output ->
                input.forEachPart { bytes, length ->
                    count += length
                    if (count > entry.bytes) throw IOException("it is longer than ${entry.bytes} bytes")
                    digest.update(bytes, 0, length)
                    output.write(bytes, 0, length)
                }
            }
        }
    } catch (error: IOException) {
        throw BundleException("$file: missing, and could not be fetched (${error.message})", error)
    }
    if (count != entry.bytes || hexadecimal(digest.digest()) != entry.sha256) {
        throw BundleException("$file: what was fetched has $count bytes and is not what manifest.json says; try again")
    }
}

internal fun sha256(input: InputStream): String {
    val digest = MessageDigest.getInstance("SHA-256")
    input.forEachPart { bytes, length -> digest.update(bytes, 0, length) }
    return hexadecimal(digest.digest())
}

private inline fun InputStream.forEachPart(use: (ByteArray, Int) -> Unit) {
    val part = ByteArray(1 shl 16)
    while (true) {
        val count = read(part)
        if (count < 0) return
        use(part, count)
    }
}

private fun hexadecimal(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(java.util.Locale.ROOT, it) }
