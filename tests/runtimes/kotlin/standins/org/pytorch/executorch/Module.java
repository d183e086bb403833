package org.pytorch.executorch;

import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;

/**
 * The names and signatures of ExecuTorch's Android class, as far as the runtime uses it, over ExecuTorch's Python
 * runtime: a process for each module, which the property {@code executorch.runner} says how to start.
 */
public class Module {
    public static final int LOAD_MODE_FILE = 0;
    public static final int LOAD_MODE_MMAP = 1;

    private final Process process;
    private final DataInputStream answers;
    private final DataOutputStream requests;
    private final String[] methods;

    private Module(String path) {
        try {
            String[] runner = System.getProperty("executorch.runner").split("\t");
            String[] command = java.util.Arrays.copyOf(runner, runner.length + 1);
            command[runner.length] = path;
            process = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start();
            answers = new DataInputStream(process.getInputStream());
            requests = new DataOutputStream(new java.io.BufferedOutputStream(process.getOutputStream(), 1 << 16));
            methods = answers.readUTF().split(",");
        } catch (IOException error) {
            throw new IllegalStateException("cannot load " + path, error);
        }
    }

    public static Module load(String modelPath, int loadMode, int numThreads) {
        return new Module(modelPath);
    }

    public String[] getMethods() {
        return methods;
    }

    public int loadMethod(String methodName) {
        return 0;
    }

    /** Both ways: the number of tensors, and of each its rank, its extents, and its values. */
    public synchronized EValue[] execute(String methodName, EValue... inputs) {
        try {
            requests.writeUTF(methodName);
            requests.writeInt(inputs.length);
            for (EValue input : inputs) {
                long[] shape = input.toTensor().shape();
                requests.writeInt(shape.length);
                for (long extent : shape) requests.writeLong(extent);
                for (float value : input.toTensor().getDataAsFloatArray()) requests.writeFloat(value);
            }
            requests.flush();
            EValue[] outputs = new EValue[answers.readInt()];
            for (int i = 0; i < outputs.length; i++) {
                long[] shape = new long[answers.readInt()];
                int count = 1;
                for (int j = 0; j < shape.length; j++) count *= (int) (shape[j] = answers.readLong());
                float[] values = new float[count];
                for (int j = 0; j < count; j++) values[j] = answers.readFloat();
                outputs[i] = EValue.from(Tensor.fromBlob(values, shape));
            }
            return outputs;
        } catch (IOException error) {
            throw new IllegalStateException("the module's process has ended", error);
        }
    }

    public void destroy() {
        process.destroy();
    }
}
