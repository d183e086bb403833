package mvmoe

import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException

/** Why a text is not JSON, or not the JSON that was expected. */
internal class JsonException(message: String) : Exception(message)

/**
 * Reads JSON (RFC 8259) and nothing else, so that every reader of a bundle agrees on what a file says.
 *
 * `org.json`, which Android has, accepts trailing commas, missing quotes and more; Gson does so as well, in releases
 * before 2.11. kotlinx-serialization needs a plug-in in the compiler of every app.
 *
 * Objects become maps, in which the last of equal names counts, arrays become lists, numbers without fraction and
 * exponent become `Long` (`Double` beyond its range), and all other numbers become `Double`.
 */
internal class Json private constructor(private val text: String) {
    private var at = 0

    private fun value(depth: Int): Any? {
        if (depth > MAX_DEPTH) fail("is nested more than $MAX_DEPTH deep")
        return when (peek()) {
            '{' -> entries(depth)
            '[' -> elements(depth)
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> number()
        }
    }

    private fun entries(depth: Int): Map<String, Any?> {
        val result = LinkedHashMap<String, Any?>()
        expect('{')
        if (found('}')) return result
        do {
            if (peek() != '"') fail("expected a name in quotes")
            val name = string()
            expect(':')
            result[name] = value(depth + 1)
        } while (found(','))
        expect('}')
        return result
    }

    private fun elements(depth: Int): List<Any?> {
        val result = ArrayList<Any?>()
        expect('[')
        if (found(']')) return result
        do result.add(value(depth + 1)) while (found(','))
        expect(']')
        return result
    }

    private fun string(): String {
        expect('"')
        val result = StringBuilder()
        while (true) {
            val start = at
            while (at < text.length && text[at] != '"' && text[at] != '\\' && text[at] >= ' ') at++
            result.append(text, start, at)
            if (at == text.length || text[at] < ' ') fail("a string does not end, or has a control character")
            if (text[at++] == '"') break
            result.append(escaped())
        }
        var place = 0
        while (place < result.length) { // half of a surrogate pair is no character
            val paired = place + 1 < result.length && Character.isSurrogatePair(result[place], result[place + 1])
            if (Character.isSurrogate(result[place]) && !paired) fail("a string has half a character")
            place += if (paired) 2 else 1
        }
        return result.toString()
    }

    private fun escaped(): Char {
        val letter = text.getOrNull(at++) ?: fail("a string does not end")
        if (letter == 'u') {
            val digits = text.substring(at, minOf(at + 4, text.length))
            if (digits.length < 4 || !digits.all { it in '0'..'9' || it in 'a'..'f' || it in 'A'..'F' }) {
                fail("\\u needs four hexadecimal digits")
            }
            at += 4
            return digits.toInt(16).toChar()
        }
        val place = "\"\\/bfnrt".indexOf(letter)
        return if (place < 0) fail("there is no escape \\$letter") else "\"\\/\b\u000c\n\r\t"[place]
    }

    private fun number(): Any {
        val start = at
        if (text.getOrNull(at) == '-') at++
        if (text.getOrNull(at) == '0') at++ else digits()
        val whole = text.getOrNull(at) !in listOf('.', 'e', 'E')
        if (text.getOrNull(at) == '.') {
            at++
            digits()
        }
        if (text.getOrNull(at) in listOf('e', 'E')) {
            at++
            if (text.getOrNull(at) in listOf('+', '-')) at++
            digits()
        }
        val found = text.substring(start, at)
        val number: Any = (if (whole) found.toLongOrNull() else null) ?: found.toDouble()
        return if (number is Double && number.isInfinite()) fail("a number is out of range") else number
    }

    private fun digits() {
        val start = at
        while (text.getOrNull(at) in '0'..'9') at++
        if (at == start) fail("expected a value")
    }

    private operator fun CharRange.contains(letter: Char?): Boolean = letter != null && letter >= first && letter <= last

    private fun <T> word(word: String, meaning: T): T {
        if (!text.startsWith(word, at)) fail("expected a value")
        at += word.length
        return meaning
    }

    /** The next character that is not white space. */
    private fun peek(): Char {
        while (at < text.length && text[at] in " \t\r\n") at++
        return text.getOrNull(at) ?: fail("ends too early")
    }

    private fun found(letter: Char): Boolean = (peek() == letter).also { if (it) at++ }

    private fun expect(letter: Char) {
        if (!found(letter)) fail("expected $letter")
    }

    private fun fail(problem: String): Nothing = throw JsonException("not JSON: $problem (character $at)")

    companion object {
        private const val MAX_DEPTH = 100

        /**
         * The value of a text in UTF-8.
         *
         * @throws JsonException it is not JSON.
         */
        fun parse(bytes: ByteArray): Any? {
            val text = try {
                Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString() // a new decoder reports errors
            } catch (_: CharacterCodingException) {
                throw JsonException("not JSON: it is not in UTF-8")
            }
            val json = Json(text)
            val value = json.value(0)
            if (text.substring(json.at).any { it !in " \t\r\n" }) json.fail("something follows its end")
            return value
        }
    }
}

/**
 * Reads an object whose fields are known: each has a type and bounds, and others are refused.
 *
 * @param where where the object stands in the file, for errors.
 */
internal class Fields(value: Any?, private val where: String) {
    private val fields: Map<*, *> = value as? Map<*, *> ?: throw JsonException("$where: expected an object")
    private val left = fields.keys.toMutableSet()

    private fun take(name: String): Any? {
        if (name !in fields) throw JsonException("$where: lacks the field $name")
        left.remove(name)
        return fields[name]
    }

    private fun fail(name: String, expected: String): Nothing = throw JsonException("$where.$name: expected $expected")

    fun has(name: String): Boolean = name in fields

    fun isNull(name: String): Boolean = name in fields && fields[name] == null

    fun text(name: String, longest: Int = Int.MAX_VALUE): String {
        val text = take(name) as? String ?: fail(name, "a text")
        return if (text.codePointCount(0, text.length) > longest) fail(name, "at most $longest characters") else text
    }

    fun textOrNull(name: String): String? = if (absent(name)) null else text(name)

    fun choice(name: String, choices: List<String>, default: String? = null): String {
        if (default != null && !has(name)) return default
        val text = text(name)
        return if (text in choices) text else fail(name, choices.joinToString(" or "))
    }

    fun integer(name: String, range: LongRange = 0..MAX_COUNT): Long {
        val number = take(name) as? Long
        return if (number != null && number in range) number else fail(name, "an integer from ${range.first} to ${range.last}")
    }

    fun integerOrNull(name: String, range: LongRange = 0..MAX_COUNT): Long? =
        if (absent(name)) null else integer(name, range)

    fun number(name: String): Double = (take(name) as? Number)?.toDouble() ?: fail(name, "a number")

    fun flag(name: String, default: Boolean): Boolean =
        if (!has(name)) default else take(name) as? Boolean ?: fail(name, "true or false")

    fun list(name: String, longest: Int = Int.MAX_VALUE): List<Any?> {
        val list = take(name) as? List<*> ?: fail(name, "a list")
        return if (list.size > longest) fail(name, "at most $longest entries") else list
    }

    fun texts(name: String): List<String> = list(name).map { it as? String ?: fail(name, "a list of texts") }

    fun numbers(name: String): List<Double> =
        list(name).map { (it as? Number)?.toDouble() ?: fail(name, "a list of numbers") }

    fun integers(name: String, range: LongRange): List<Int> = list(name).map { entry ->
        (entry as? Long)?.takeIf { it in range }?.toInt() ?: fail(name, "integers from ${range.first} to ${range.last}")
    }

    fun <T> objects(name: String, read: (Fields) -> T): List<T> =
        list(name).mapIndexed { index, value -> read(Fields(value, "$where.$name[$index]")) }

    fun inner(name: String): Fields = Fields(take(name), "$where.$name")

    /** An object that nothing is read from; its values are checked to be texts where [ofTexts]. */
    fun free(name: String, ofTexts: Boolean = false) {
        val values = (take(name) as? Map<*, *> ?: fail(name, "an object")).values
        if (ofTexts && !values.all { it is String }) fail(name, "an object of texts")
    }

    /** Whether an optional field is null or not there. */
    private fun absent(name: String): Boolean {
        if (has(name) && fields[name] == null) left.remove(name)
        return fields[name] == null
    }

    /** Ends reading: refuses fields that were not asked for. */
    fun close() {
        if (left.isNotEmpty()) throw JsonException("$where: has a field that is not known: ${left.first().toString().take(100)}")
    }

    companion object {
        const val MAX_COUNT = 1L shl 50
    }
}

/** Reads an object's fields and refuses all others. */
internal inline fun <T> Fields.all(read: Fields.() -> T): T = read().also { close() }
