package mvmoe

import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.withLock

/**
 * Keeps experts resident within a budget; safe from several threads.
 *
 * A thread uses one expert at a time, so waiting for room always ends: every thread that holds an expert releases it
 * without needing another.
 *
 * @param load makes an expert's pieces ready to run; called outside the lock, once per miss.
 * @param sizes bytes of each expert.
 * @param memoryBudget largest total size of the resident experts, in bytes.
 * @param maxResident largest number of resident experts.
 * @throws BudgetException the bounds cannot hold the pinned experts and any one other expert.
 */
internal class Residency(
    private val load: (Int) -> List<Loaded>,
    private val sizes: List<Long>,
    private val memoryBudget: Long?,
    private val maxResident: Int?,
    private val pinned: Set<Int>,
) {
    /** An expert that is resident or, while [pieces] is null, being loaded. */
    private class Slot {
        var pieces: List<Loaded>? = null
        var users = 1
    }

    private val slots = LinkedHashMap<Int, Slot>() // least recently used first
    private val lock = ReentrantLock()
    private val changed = lock.newCondition()
    private var closed = false
    private var hits = 0L
    private var misses = 0L
    private var evictions = 0L

    init {
        val others = sizes.indices - pinned
        val largest = others.maxByOrNull { sizes[it] }
        val pinnedBytes = pinned.sumOf { sizes[it] }
        val bytes = pinnedBytes + (largest?.let { sizes[it] } ?: 0)
        val beside = if (pinned.isEmpty()) "" else " beside ${pinned.size} pinned ($pinnedBytes bytes)"
        if (memoryBudget != null && bytes > memoryBudget) {
            val what = if (largest == null) "the pinned experts" else pieceName("tail", largest, null) + beside
            throw BudgetException("memoryBudget of $memoryBudget bytes cannot hold $what: needs at least $bytes bytes")
        }
        val count = pinned.size + (if (largest == null) 0 else 1)
        if (maxResident != null && count > maxResident) {
            throw BudgetException("maxResident=$maxResident cannot hold an expert$beside: needs at least $count")
        }
    }

    /**
     * Calls [run] with an expert's pieces, loading them first if needed; they stay resident until it returns.
     *
     * However many threads ask for an absent expert, one loads it and the others wait. If no room can be made because
     * every other resident expert is in use, the call waits for one to be released.
     */
    inline fun <T> use(expert: Int, run: (List<Loaded>) -> T): T {
        val pieces = acquire(expert)
        try {
            return run(pieces)
        } finally {
            release(expert)
        }
    }

    fun acquire(expert: Int): List<Loaded> {
        val leaving = claim(expert) ?: return lock.withLock { slots.getValue(expert).pieces!! }
        var loaded: List<Loaded>? = null
        try {
            leaving.closeAll() // before the new one takes its memory
            loaded = load(expert)
            return loaded
        } finally { // a load that fails leaves no trace
            lock.withLock {
                if (loaded == null) slots.remove(expert) else slots.getValue(expert).pieces = loaded
                changed.signalAll()
            }
        }
    }

    /** Begins a use. Returns null if the expert is resident, else what has to leave before the caller loads it. */
    private fun claim(expert: Int): List<Slot>? = lock.withLock {
        var counted = false
        while (true) {
            val slot = slots[expert]
            if (slot == null) {
                val leaving = makeRoom(sizes[expert])
                if (leaving != null) {
                    if (counted) hits-- // the load that this thread waited for failed, so this was no hit
                    misses++
                    slots[expert] = Slot()
                    return leaving
                }
            } else {
                if (!counted) hits++
                counted = true
                if (slot.pieces != null) {
                    slot.users++
                    slots.remove(expert)
                    slots[expert] = slot // the most recently used is the last
                    return null
                }
            }
            changed.await()
        }
        @Suppress("UNREACHABLE_CODE")
        null
    }

    fun release(expert: Int) {
        val dropped = lock.withLock {
            val slot = slots.getValue(expert) // it cannot leave while it has a user
            slot.users--
            changed.signalAll()
            if (closed && slot.users == 0) slots.remove(expert) else null
        }
        listOfNotNull(dropped).closeAll()
    }

    /** Evicts the least recently used idle experts until [size] more bytes fit; null, and no change, if they cannot. */
    private fun makeRoom(size: Long): List<Slot>? {
        var count = slots.size + 1
        var total = slots.keys.sumOf { sizes[it] } + size
        val leaving = ArrayList<Int>()
        val idle = idle().iterator()
        while ((maxResident != null && count > maxResident) || (memoryBudget != null && total > memoryBudget)) {
            if (!idle.hasNext()) return null
            val expert = idle.next()
            leaving.add(expert)
            count--
            total -= sizes[expert]
        }
        return evict(leaving)
    }

    private fun idle(): List<Int> = slots.filter { (expert, slot) -> slot.users == 0 && expert !in pinned }.keys.toList()

    private fun evict(experts: List<Int>): List<Slot> {
        evictions += experts.size
        return experts.map { slots.remove(it)!! }
    }

    /** Evicts every expert that is neither in use nor pinned. */
    fun trim() = lock.withLock {
        evict(idle()).also { changed.signalAll() }
    }.closeAll()

    /** Whether the expert is ready to run now. */
    fun resident(expert: Int): Boolean = lock.withLock { slots[expert]?.pieces != null }

    /** Counts and resident experts, all taken at the same moment. */
    fun stats(fixedBytes: Long): Stats = lock.withLock {
        Stats(hits, misses, evictions, slots.keys.toList(), slots.keys.sumOf { sizes[it] }, fixedBytes)
    }

    /** Drops every expert, one in use once it is released; from now on no expert stays resident. */
    fun close() = lock.withLock {
        closed = true
        slots.filter { it.value.users == 0 }.keys.toList().map { slots.remove(it)!! }
    }.closeAll()

    private fun List<Slot>.closeAll() = forEach { slot -> slot.pieces?.forEach(Loaded::close) }
}

/**
 * What a runtime has done and holds.
 *
 * @property hits uses of an expert that was resident, or being loaded by another thread.
 * @property misses uses that loaded an expert.
 * @property evictions experts dropped to make room.
 * @property resident the resident experts, least recently used first.
 * @property residentBytes weights of the resident experts: what the memory budget bounds.
 * @property fixedBytes weights that are always loaded.
 */
class Stats internal constructor(
    val hits: Long,
    val misses: Long,
    val evictions: Long,
    val resident: List<Int>,
    val residentBytes: Long,
    val fixedBytes: Long,
)

private val SIZE = Regex("\\s*(\\d+(?:\\.\\d+)?)\\s*([kMG])?(i)?B?\\s*", RegexOption.IGNORE_CASE)

/** `8MB`, `8 MiB`, `512kB` or a number of bytes, in bytes (MB is 10⁶, MiB 2²⁰). */
internal fun parseBytes(text: String): Long {
    val match = SIZE.matchEntire(text)
        ?: throw BudgetException("memoryBudget '$text': expected a size such as '8MB', '8MiB' or a number of bytes")
    val (number, unit, binary) = match.destructured
    var bytes = number.toDouble()
    repeat(" kmg".indexOf(unit.lowercase().ifEmpty { " " })) { bytes *= if (binary.isEmpty()) 1000 else 1024 }
    if (bytes < 1) throw BudgetException("memoryBudget '$text': must be above zero")
    return bytes.toLong()
}
