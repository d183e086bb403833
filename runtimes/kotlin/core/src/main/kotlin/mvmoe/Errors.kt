package mvmoe

/** Everything that is thrown on purpose. The message is one line: what was wrong, where, and what to do. */
sealed class MvmoeException(message: String, cause: Throwable? = null) : Exception(oneLine(message), cause)

/** Names from a manifest may hold anything. */
private fun oneLine(message: String): String = message.map { if (it < ' ') ' ' else it }.joinToString("")

/** A bundle is missing, damaged, unsafe, or of another version; the message names the file. */
class BundleException(message: String, cause: Throwable? = null) : MvmoeException(message, cause)

/** An engine cannot load or run a piece, or what the piece returned cannot be an answer. */
open class BackendException(message: String, cause: Throwable? = null) : MvmoeException(message, cause)

/** What a piece returned cannot be an answer; [experts] and [gates] are the route, as far as there was one. */
class AnswerException internal constructor(message: String, val experts: List<Int>, val gates: List<Float>) : BackendException(message)

/** The memory budget or the number of resident experts cannot work. */
class BudgetException(message: String) : MvmoeException(message)

/** An image, or another input of a call, cannot be used. */
class ImageException(message: String) : MvmoeException(message)
