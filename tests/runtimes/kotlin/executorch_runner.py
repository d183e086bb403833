"""Runs a .pte file for the tests' ``org.pytorch.executorch.Module``, which talks to it over a pipe.

    python executorch_runner.py FILE

Writes the names of the methods, then answers requests until the pipe is closed. Module.java has the format: everything
is big-endian, as java.io.DataOutputStream writes it.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray


def main(path: Path) -> None:
    """Serves one file."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what executorch prints must not come between the answers
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    write_text(answers, ",".join(program.method_names))
    answers.flush()
    methods = {}
    while name := read_text(requests):
        (count,) = struct.unpack(">i", requests.read(4))
        inputs = [torch.from_numpy(read_tensor(requests)) for _ in range(count)]
        if name not in methods:
            methods[name] = program.load_method(name)
        outputs = [output.numpy() for output in methods[name].execute(inputs)]
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
    main(Path(sys.argv[1]))
