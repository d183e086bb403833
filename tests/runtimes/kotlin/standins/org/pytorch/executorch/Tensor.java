package org.pytorch.executorch;

public abstract class Tensor {
    private final long[] shape;

    private Tensor(long[] shape) {
        this.shape = shape.clone();
    }

    public static Tensor fromBlob(float[] data, long[] shape) {
        return new Tensor(shape) {
            @Override
            public float[] getDataAsFloatArray() {
                return data.clone();
            }
        };
    }

    public long[] shape() {
        return shape.clone();
    }

    public float[] getDataAsFloatArray() {
        throw new IllegalStateException("Tensor cannot return data as float array.");
    }
}
