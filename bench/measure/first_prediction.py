"""A script that ``coldstart.py`` runs: one process from its start to its first prediction, as in an app.

The script is never imported. Before a step's clock starts, it uses only the standard library. Its arguments are
``bundle|pieces|graph|checkpoint``, the backend, the path, a ``.npy`` file of decoded images and the number of threads,
and for bare graphs also mean and standard deviation. It prints five moments.
"""

import time

STARTED = time.monotonic()

import os  # noqa: E402
import sys  # noqa: E402

TYPE_CHECKING = False  # importing typing would be charged to the interpreter
if TYPE_CHECKING:
    from typing import Any


def import_all(backend: str) -> None:
    """Imports what loading and running a bundle uses."""
    from importlib import import_module

    import mvmoe_deploy  # noqa: F401
    from mvmoe_deploy import targets

    engine = targets.of_backend(backend).backend(backend)
    for module in (engine.opens.partition(":")[0], *engine.imports):
        import_module(module)


def bundle(backend: str, path: str, image: str, threads: int) -> list[float]:
    """Runs a bundle; each file is compared with its sha256 when it is loaded."""
    import numpy as np

    import mvmoe_deploy

    import_all(backend)
    pixels = np.load(image)[0]
    imported = time.monotonic()
    runtime = mvmoe_deploy.load(path, threads=threads, backend=backend)
    loaded = time.monotonic()
    runtime.predict(pixels)
    return [imported, loaded, time.monotonic()]


def pieces(backend: str, path: str, image: str, threads: int, mean: str, std: str) -> list[float]:
    """Runs a bundle's trunk and one tail in bare sessions after its imports, without manifest, hashes and checks.

    No runtime that keeps these pieces apart can be quicker.
    """
    import numpy as np
    import onnxruntime as ort

    import_all(backend)
    from mvmoe_deploy.backends.onnxruntime import session_options

    pixels = np.load(image)[0]
    imported = time.monotonic()
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # such graphs are optimised already

    def session(name: str) -> ort.InferenceSession:
        file = os.fsencode(os.path.join(path, name)).decode()
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    trunk = session("trunk.onnx")
    loaded = time.monotonic()
    tokens, probabilities = trunk.run(None, {"images": normalised(pixels, mean, std)})
    expert = int(probabilities.argmax())
    session(f"expert_{expert:02d}.onnx").run(None, {"tokens": tokens, "gate": probabilities[:, expert]})
    return [imported, loaded, time.monotonic()]


def normalised(pixels: "Any", mean: str, std: str) -> "Any":
    """A decoded image as a graph's input ``[1, 3, S, S]``."""
    import numpy as np

    scale = [np.array([float(each) for each in text.split(",")], np.float32) for text in (mean, std)]
    return np.ascontiguousarray(((pixels / np.float32(255) - scale[0]) / scale[1]).transpose(2, 0, 1)[None])


def graph(path: str, image: str, threads: int, mean: str, std: str) -> list[float]:
    """Runs a bare graph with only numpy and onnxruntime, without hashes and manifest."""
    import numpy as np
    import onnxruntime as ort

    pixels = np.load(image)[0]
    imported = time.monotonic()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(os.fsencode(path).decode(), options, providers=["CPUExecutionProvider"])
    loaded = time.monotonic()
    (logits, *_) = session.run(None, {session.get_inputs()[0].name: normalised(pixels, mean, std)})
    logits.argmax()
    return [imported, loaded, time.monotonic()]


def checkpoint(path: str, image: str, threads: int) -> list[float]:
    """PyTorch, eager."""
    import numpy as np
    import torch

    from mvmoe_deploy.images import preprocess
    from mvmoe_deploy.models import load_checkpoint

    torch.set_num_threads(threads)
    pixels = np.load(image)[0]
    imported = time.monotonic()
    model, header = load_checkpoint(path)
    loaded = time.monotonic()
    with torch.inference_mode():
        model(torch.from_numpy(preprocess(pixels, header.preprocessing)[None])).argmax().item()
    return [imported, loaded, time.monotonic()]


def main(how: str, backend: str, path: str, image: str, threads: str, *scale: str) -> None:
    """Prints the moments at which the script had started, imported, loaded and predicted."""
    if how == "bundle":
        moments = bundle(backend, path, image, int(threads))
    elif how == "pieces":
        moments = pieces(backend, path, image, int(threads), *scale)
    elif how == "graph":
        moments = graph(path, image, int(threads), *scale)
    else:
        moments = checkpoint(path, image, int(threads))
    print(STARTED, *moments)


if __name__ == "__main__":
    main(*sys.argv[1:])
