package ai.onnxruntime;

import static java.lang.foreign.ValueLayout.JAVA_INT;
import static java.lang.foreign.ValueLayout.JAVA_LONG;

import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.nio.Buffer;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;

public class OnnxTensor extends OnnxTensorLike {
    private static final int FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7;
    private final TensorInfo info;
    private final int type;
    private final Buffer buffer; // stays reachable while the tensor does
    private boolean closed;

    OnnxTensor(MemorySegment value, Buffer buffer) throws OrtException {
        super(value);
        this.buffer = buffer;
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment found = OrtApi.outChecked(arena, OrtApi.TYPE_AND_SHAPE, value);
            MemorySegment number = arena.allocate(JAVA_LONG);
            OrtApi.call(OrtApi.DIMENSION_COUNT, found, number);
            long count = number.get(JAVA_LONG, 0);
            MemorySegment shape = arena.allocate(JAVA_LONG, Math.max(count, 1));
            OrtApi.call(OrtApi.DIMENSIONS, found, shape, count);
            MemorySegment kind = arena.allocate(JAVA_INT);
            OrtApi.call(OrtApi.ELEMENT_TYPE, found, kind);
            OrtApi.release(OrtApi.RELEASE_TYPE_AND_SHAPE, found);
            long[] extents = new long[(int) count];
            for (int i = 0; i < count; i++) extents[i] = shape.getAtIndex(JAVA_LONG, i);
            info = new TensorInfo(extents);
            type = kind.get(JAVA_INT, 0);
        }
    }

    /** The real API copies what is not direct, and uses a direct buffer in place. */
    public static OnnxTensor createTensor(OrtEnvironment env, FloatBuffer data, long[] shape) throws OrtException {
        FloatBuffer direct = data;
        if (!data.isDirect()) {
            direct = ByteBuffer.allocateDirect(4 * data.remaining()).order(ByteOrder.nativeOrder()).asFloatBuffer();
            direct.put(data.duplicate()).rewind();
        }
        if (direct.order() != ByteOrder.nativeOrder()) throw new OrtException("the buffer is not in native order");
        return create(direct, shape, FLOAT);
    }

    /** Of the real API's types, those that the runtime uses. */
    public static OnnxTensor createTensor(OrtEnvironment env, ByteBuffer data, long[] shape, OnnxJavaType type) throws OrtException {
        ByteBuffer direct = data;
        if (!data.isDirect()) direct = ByteBuffer.allocateDirect(data.remaining()).put(data.duplicate()).rewind();
        return create(direct, shape, switch (type) { case INT8 -> INT8; case UINT8 -> UINT8; });
    }

    private static OnnxTensor create(Buffer direct, long[] shape, int type) throws OrtException {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment memory = MemorySegment.ofBuffer(direct);
            MemorySegment extents = arena.allocateFrom(JAVA_LONG, shape);
            MemorySegment bare = MemorySegment.ofAddress(memory.address());
            long bytes = memory.byteSize(), rank = shape.length;
            return new OnnxTensor(OrtApi.outChecked(arena, OrtApi.CREATE_TENSOR, OrtApi.MEMORY, bare, bytes, extents, rank, type), direct);
        }
    }

    private ByteBuffer data(int size) {
        try (Arena arena = Arena.ofConfined()) {
            long count = 1;
            for (long extent : info.getShape()) count *= extent;
            MemorySegment place = OrtApi.out(arena, OrtApi.TENSOR_DATA, value);
            return place.reinterpret(count * size).asByteBuffer().order(ByteOrder.nativeOrder());
        }
    }

    public FloatBuffer getFloatBuffer() {
        if (type != FLOAT) return null;
        FloatBuffer found = data(4).asFloatBuffer();
        return FloatBuffer.allocate(found.remaining()).put(found).rewind();
    }

    public LongBuffer getLongBuffer() {
        if (type != INT64) return null;
        LongBuffer found = data(8).asLongBuffer();
        return LongBuffer.allocate(found.remaining()).put(found).rewind();
    }

    @Override
    public TensorInfo getInfo() {
        return info;
    }

    @Override
    public Object getValue() {
        throw new UnsupportedOperationException("not needed by the runtime");
    }

    @Override
    public void close() {
        if (closed) throw new IllegalStateException("closed twice");
        closed = true;
        OrtApi.release(OrtApi.RELEASE_VALUE, value);
    }
}
