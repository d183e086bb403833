package ai.onnxruntime;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.AddressLayout;
import java.lang.foreign.Arena;
import java.lang.foreign.FunctionDescriptor;
import java.lang.foreign.Linker;
import java.lang.foreign.MemoryLayout;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.SymbolLookup;
import java.lang.invoke.MethodHandle;
import java.nio.file.Path;
import java.util.concurrent.ConcurrentHashMap;

/**
 * The C API of ONNX Runtime, called through java.lang.foreign.
 *
 * <p>The classes of this folder have the names and signatures of ONNX Runtime's Java API, as far as the runtime uses it,
 * so that the runtime's own engine runs against the library of the Python wheel where the Java package cannot be had.
 * The property {@code onnxruntime.library} says where the library lies.
 */
final class OrtApi {
    static final int CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_OPTIONS = 10, SET_LOG_LEVEL = 22;
    static final int SET_OPTIMISATION = 23, SET_INTRA_THREADS = 24, SET_INTER_THREADS = 25;
    static final int INPUT_COUNT = 30, OUTPUT_COUNT = 31, INPUT_NAME = 36, OUTPUT_NAME = 37;
    static final int CREATE_TENSOR = 49, TENSOR_DATA = 51, ELEMENT_TYPE = 60, DIMENSION_COUNT = 61, DIMENSIONS = 62;
    static final int TYPE_AND_SHAPE = 65, CPU_MEMORY = 69, ALLOCATOR_FREE = 76, DEFAULT_ALLOCATOR = 78;
    static final int RELEASE_SESSION = 95, RELEASE_VALUE = 96, RELEASE_TYPE_AND_SHAPE = 99, RELEASE_OPTIONS = 100;
    private static final int ERROR_MESSAGE = 2, RELEASE_STATUS = 93, ENTRIES = 101;

    private static final AddressLayout TEXT = ADDRESS.withTargetLayout(MemoryLayout.sequenceLayout(1 << 20, java.lang.foreign.ValueLayout.JAVA_BYTE));
    private static final MemorySegment TABLE = table();
    private static final ConcurrentHashMap<Integer, MethodHandle> HANDLES = new ConcurrentHashMap<>();
    static final MemorySegment ENVIRONMENT = environment();
    static final MemorySegment MEMORY = out(Arena.global(), CPU_MEMORY, 0, 0);
    static final MemorySegment ALLOCATOR = out(Arena.global(), DEFAULT_ALLOCATOR);

    private OrtApi() {}

    private static MemorySegment table() {
        Linker linker = Linker.nativeLinker();
        Path library = Path.of(System.getProperty("onnxruntime.library"));
        MemorySegment base = SymbolLookup.libraryLookup(library, Arena.global()).find("OrtGetApiBase").orElseThrow();
        try {
            MemorySegment found = (MemorySegment) linker.downcallHandle(base, FunctionDescriptor.of(ADDRESS)).invoke();
            MemorySegment getApi = found.reinterpret(8).get(ADDRESS, 0);
            FunctionDescriptor type = FunctionDescriptor.of(ADDRESS, JAVA_INT);
            return ((MemorySegment) linker.downcallHandle(getApi, type).invoke(1)).reinterpret(8L * ENTRIES);
        } catch (Throwable error) {
            throw new IllegalStateException(error);
        }
    }

    private static MemorySegment environment() {
        return out(Arena.global(), CREATE_ENV, 3, Arena.global().allocateFrom("tests"));
    }

    /** Calls an entry that returns a status, and throws what it says. */
    static void call(int entry, Object... arguments) throws OrtException {
        MemorySegment status = (MemorySegment) invoke(entry, ADDRESS, arguments);
        if (status.address() != 0) {
            String message = ((MemorySegment) invoke(ERROR_MESSAGE, TEXT, status)).getString(0);
            release(RELEASE_STATUS, status);
            throw new OrtException(message);
        }
    }

    static void release(int entry, MemorySegment what) {
        invoke(entry, null, what);
    }

    /** Calls an entry whose last argument is where it puts a pointer, and returns the pointer. */
    static MemorySegment outChecked(Arena arena, int entry, Object... arguments) throws OrtException {
        MemorySegment place = arena.allocate(ADDRESS);
        Object[] all = java.util.Arrays.copyOf(arguments, arguments.length + 1);
        all[arguments.length] = place;
        call(entry, all);
        return place.get(TEXT, 0);
    }

    static MemorySegment out(Arena arena, int entry, Object... arguments) {
        try {
            return outChecked(arena, entry, arguments);
        } catch (OrtException error) {
            throw new IllegalStateException(error);
        }
    }

    private static Object invoke(int entry, MemoryLayout result, Object... arguments) {
        MemoryLayout[] types = new MemoryLayout[arguments.length];
        for (int i = 0; i < arguments.length; i++) {
            types[i] = arguments[i] instanceof Integer ? JAVA_INT : arguments[i] instanceof Long ? JAVA_LONG : ADDRESS;
        }
        MethodHandle handle = HANDLES.computeIfAbsent(entry, key -> {
            FunctionDescriptor type = result == null ? FunctionDescriptor.ofVoid(types) : FunctionDescriptor.of(result, types);
            MethodHandle direct = Linker.nativeLinker().downcallHandle(TABLE.getAtIndex(ADDRESS, key), type);
            return direct.asSpreader(Object[].class, types.length).asType(java.lang.invoke.MethodType.methodType(Object.class, Object[].class));
        });
        try {
            return handle.invokeExact(arguments);
        } catch (RuntimeException error) {
            throw error;
        } catch (Throwable error) {
            throw new IllegalStateException(error);
        }
    }
}
