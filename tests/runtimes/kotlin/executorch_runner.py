"""Runs .pte files for the tests' ``org.pytorch.executorch.Module``, which talks to it over a pipe.

    python executorch_runner.py

Answers requests until the pipe is closed. Each names a file, and a method with its inputs, or no method: then the answer
is the methods' names. Module.java has the format: everything is big-endian, as java.io.DataOutputStream writes it.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray


def main() -> None:
    """Serves the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what executorch prints must not come between the answers
    from executorch.runtime import Runtime

    programs: dict[str, Any] = {}
    methods: dict[tuple[str, str], Any] = {}
    while path := read_text(requests):
        if path not in programs:
            programs[path] = Runtime.get().load_program(path)
        if not (name := read_text(requests)):
            write_text(answers, ",".join(programs[path].method_names))
            answers.flush()
            continue
        (count,) = struct.unpack(">i", requests.read(4))
        inputs = [torch.from_numpy(read_tensor(requests)) for _ in range(count)]
        if (path, name) not in methods:
            methods[path, name] = programs[path].load_method(name)
        outputs = [output.numpy() for output in methods[path, name].execute(inputs)]
        answers.write(struct.pack(">i", len(outputs)))
        for output in outputs:
            write_tensor(answers, output)
        answers.flush()


def read_text(file: BinaryIO) -> str:
    """A text with its length before it; empty at the end."""
    size = file.read(2)
    return file.read(struct.unpack(">H", size)[0]).decode() if size else ""


def write_text(file: BinaryIO, text: str) -> None:
    """The same, written."""
    file.write(struct.pack(">H", len(text)) + text.encode())


def read_tensor(file: BinaryIO) -> NDArray[np.float32]:
    """A tensor: its rank, its extents, its values."""
    (rank,) = struct.unpack(">i", file.read(4))
    shape = struct.unpack(f">{rank}q", file.read(8 * rank))
    values = np.frombuffer(file.read(4 * math.prod(shape)), ">f4")
    return values.reshape(shape).astype(np.float32)


def write_tensor(file: BinaryIO, values: NDArray[np.float32]) -> None:
    """The same, written."""
    file.write(struct.pack(f">i{values.ndim}q", values.ndim, *values.shape) + values.astype(">f4").tobytes())


if __name__ == "__main__":
    main()
