package ai.onnxruntime;

import static java.lang.foreign.ValueLayout.ADDRESS;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.Map;
import java.util.Set;

public class OrtSession implements AutoCloseable {
    private final MemorySegment session;
    private final Set<String> inputNames, outputNames;
    private volatile boolean closed;

    OrtSession(String modelPath, SessionOptions options) throws OrtException {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment path = arena.allocateFrom(modelPath);
            session = OrtApi.outChecked(arena, OrtApi.CREATE_SESSION, OrtApi.ENVIRONMENT, path, options.options);
            inputNames = names(arena, OrtApi.INPUT_COUNT, OrtApi.INPUT_NAME);
            outputNames = names(arena, OrtApi.OUTPUT_COUNT, OrtApi.OUTPUT_NAME);
        }
    }

    private Set<String> names(Arena arena, int counter, int entry) throws OrtException {
        MemorySegment count = arena.allocate(JAVA_LONG);
        OrtApi.call(counter, session, count);
        Set<String> names = new LinkedHashSet<>();
        for (long i = 0; i < count.get(JAVA_LONG, 0); i++) {
            MemorySegment name = OrtApi.outChecked(arena, entry, session, i, OrtApi.ALLOCATOR);
            names.add(name.getString(0));
            OrtApi.call(OrtApi.ALLOCATOR_FREE, OrtApi.ALLOCATOR, name);
        }
        return names;
    }

    public Set<String> getInputNames() {
        return inputNames;
    }

    public Set<String> getOutputNames() {
        return outputNames;
    }

    public Result run(Map<String, ? extends OnnxTensorLike> inputs, Set<String> requestedOutputs) throws OrtException {
        if (closed) throw new IllegalStateException("Trying to score a closed OrtSession.");
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment names = arena.allocate(ADDRESS, inputs.size()), values = arena.allocate(ADDRESS, inputs.size());
            int place = 0;
            for (Map.Entry<String, ? extends OnnxTensorLike> input : inputs.entrySet()) {
                names.setAtIndex(ADDRESS, place, arena.allocateFrom(input.getKey()));
                values.setAtIndex(ADDRESS, place++, input.getValue().value);
            }
            MemorySegment wanted = arena.allocate(ADDRESS, requestedOutputs.size());
            MemorySegment found = arena.allocate(ADDRESS, requestedOutputs.size());
            place = 0;
            for (String output : requestedOutputs) wanted.setAtIndex(ADDRESS, place++, arena.allocateFrom(output));
            long given = inputs.size(), asked = requestedOutputs.size();
            OrtApi.call(OrtApi.RUN, session, MemorySegment.NULL, names, values, given, wanted, asked, found);
            java.lang.ref.Reference.reachabilityFence(inputs);
            Map<String, OnnxValue> results = new LinkedHashMap<>();
            place = 0;
            for (String output : requestedOutputs) results.put(output, new OnnxTensor(found.getAtIndex(ADDRESS, place++), null));
            return new Result(results);
        }
    }

    @Override
    public void close() throws OrtException {
        if (closed) throw new IllegalStateException("Trying to close an already closed OrtSession.");
        closed = true;
        OrtApi.release(OrtApi.RELEASE_SESSION, session);
    }

    public static class SessionOptions implements AutoCloseable {
        final MemorySegment options = OrtApi.out(Arena.global(), OrtApi.CREATE_OPTIONS);

        public enum OptLevel {
            NO_OPT(0),
            BASIC_OPT(1),
            EXTENDED_OPT(2),
            ALL_OPT(99);

            private final int id;

            OptLevel(int id) {
                this.id = id;
            }

            public int getID() {
                return id;
            }
        }

        public void setIntraOpNumThreads(int numThreads) throws OrtException {
            OrtApi.call(OrtApi.SET_INTRA_THREADS, options, numThreads);
        }

        public void setInterOpNumThreads(int numThreads) throws OrtException {
            OrtApi.call(OrtApi.SET_INTER_THREADS, options, numThreads);
        }

        public void setOptimizationLevel(OptLevel level) throws OrtException {
            OrtApi.call(OrtApi.SET_OPTIMISATION, options, level.getID());
        }

        public void setSessionLogLevel(OrtLoggingLevel logLevel) throws OrtException {
            OrtApi.call(OrtApi.SET_LOG_LEVEL, options, logLevel.ordinal());
        }

        @Override
        public void close() {
            OrtApi.release(OrtApi.RELEASE_OPTIONS, options);
        }
    }

    public static class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        private final Map<String, OnnxValue> results;

        Result(Map<String, OnnxValue> results) {
            this.results = results;
        }

        @Override
        public Iterator<Map.Entry<String, OnnxValue>> iterator() {
            return results.entrySet().iterator();
        }

        @Override
        public void close() {
            results.values().forEach(OnnxValue::close);
        }
    }
}
