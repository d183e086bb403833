package ai.onnxruntime;

public abstract class OnnxTensorLike implements OnnxValue {
    final java.lang.foreign.MemorySegment value;

    OnnxTensorLike(java.lang.foreign.MemorySegment value) {
        this.value = value;
    }

    public abstract TensorInfo getInfo();
}
