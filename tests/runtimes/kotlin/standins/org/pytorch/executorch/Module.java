package org.pytorch.executorch;

import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;

/**
 * The names and signatures of ExecuTorch's Android class, as far as the runtime uses it, over ExecuTorch's Python
 * runtime: one process for all modules, which the property {@code executorch.runner} says how to start. The process is
 * not told when a module is destroyed, but a destroyed module runs no more.
 */
public class Module {
    public static final int LOAD_MODE_FILE = 0;
    public static final int LOAD_MODE_MMAP = 1;

    private static Process process;
    private static DataInputStream answers;
    private static DataOutputStream requests;

    private final String path;
    private final String[] methods;
    private boolean destroyed;

    private Module(String path) {
        this.path = path;
        try {
            if (process == null) start();
            requests.writeUTF(path);
            requests.writeUTF(""); // asks for the names of the methods
            requests.flush();
            methods = answers.readUTF().split(",");
        } catch (IOException error) {
            throw new IllegalStateException("cannot load " + path, error);
        }
    }

    private static void start() throws IOException {
        String[] command = System.getProperty("executorch.runner").split("\t");
        process = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start();
        answers = new DataInputStream(process.getInputStream());
        requests = new DataOutputStream(new java.io.BufferedOutputStream(process.getOutputStream(), 1 << 16));
    }

    public static synchronized Module load(String modelPath, int loadMode, int numThreads) {
        return new Module(modelPath);
    }

    public String[] getMethods() {
        return methods;
    }

    public int loadMethod(String methodName) {
        return 0;
    }

    /** Both ways: the number of tensors, and of each its rank, its extents, and its values. */
    public EValue[] execute(String methodName, EValue... inputs) {
        synchronized (Module.class) {
            return executeAlone(methodName, inputs);
        }
    }

    private EValue[] executeAlone(String methodName, EValue... inputs) {
        if (destroyed) throw new IllegalStateException(path + ": was destroyed");
        try {
            requests.writeUTF(path);
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
            throw new IllegalStateException("the modules' process has ended", error);
        }
    }

    public void destroy() {
        synchronized (Module.class) {
            destroyed = true;
        }
    }
}
