#!/usr/bin/env python3
"""Stand-ins for executor_runner and onnxruntime_perf_test on the phone of adbd.py, told apart by the name they run under.

They take the flags that the real ones take, look at the files they are given, and print what the real ones print.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

PHONE = Path(os.environ["PHONE"])
SCENARIO = json.loads((PHONE / "scenario.json").read_text())


def executor_runner() -> int:
    p = argparse.ArgumentParser()
    for flag in ("model_path", "method_name", "inputs", "print_output", "output_file"):
        p.add_argument(f"--{flag}", default="")
    p.add_argument("--num_executions", type=int, default=1)
    p.add_argument("--cpu_threads", type=int, default=-1)
    args = p.parse_args()
    sizes = SCENARIO["inputs"][Path(args.model_path).name]
    given = [Path(name).stat().st_size for name in args.inputs.split(",")]
    log(f"Resetting threadpool with num threads = {args.cpu_threads}")
    if given != sizes:
        log(f"input size ({given}) and tensor size ({sizes}) mismatch!", "E")
        log("Could not prepare inputs: 0x12", "F")
        os.kill(os.getpid(), signal.SIGABRT)
    crash(args.model_path)
    hang()
    log(f"Model file {args.model_path} is loaded.")
    log("Model loaded in 7.251000 ms.")
    times = [milliseconds(args.model_path, number) for number in range(args.num_executions)]
    for number, taken in enumerate(times[: SCENARIO.get("iterations_logged")], 1):
        log(f"Iteration {number} of {args.num_executions}: {taken:.6f} ms")
    log(f"Model executed successfully {args.num_executions} time(s) in {sum(times):.6f} ms.")
    if args.output_file:
        write_outputs(args)
    return 0


def write_outputs(args: argparse.Namespace) -> None:
    """What the graph computes, a file for each output; the tests' graphs are ONNX, whatever they are named."""
    sys.path += SCENARIO["path"]  # this process was started without the installed packages
    import numpy as np
    import onnxruntime

    graph = onnxruntime.InferenceSession(args.model_path)
    given = {
        spec.name: np.fromfile(name, np.float32).reshape([1, *spec.shape[1:]])
        for spec, name in zip(graph.get_inputs(), args.inputs.split(","), strict=True)
    }
    for number, values in enumerate(graph.run(None, given)):
        if values.dtype == np.float32:
            values[..., 0] *= SCENARIO.get("factor", {}).get(Path(args.model_path).stem.split("_")[0], 1)
        values.tofile(f"{args.output_file}-{number}.bin")


def onnxruntime_perf_test() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("-e", choices=["cpu"], required=True)
    p.add_argument("-m", choices=["times"], required=True)
    p.add_argument("-r", type=int, required=True)
    p.add_argument("-x", type=int, required=True)
    p.add_argument("model")
    p.add_argument("result")
    args = p.parse_args()
    assert Path(args.model).is_file()
    files = sorted(Path("test_data_set_0").glob("input_*.pb"), key=lambda file: int(file.stem.split("_")[1]))
    expected = SCENARIO["names"][args.model]
    # a TensorProto holds its name as it is, behind its tag (field 8) and length
    marks = [f"\x42{chr(len(name))}{name}".encode() for name in expected]
    if len(files) != len(marks) or not all(m in file.read_bytes() for m, file in zip(marks, files, strict=True)):
        print(f"there is no test input data for input {expected} and model {args.model}")
        return 1
    crash(args.model)
    hang()
    print(f"Setting intra_op_num_threads to {args.x}")
    with open(args.result, "a", encoding="utf-8") as result:
        for number in range(args.r):
            print(f"bundle,{milliseconds(args.model, number) / 1e3:g},52428800,97,{number}", file=result)
    print(
        "Session creation time cost: 0.0312 s\nFirst inference time cost: 6 ms\nTotal inference requests: "
        + str(args.r)
    )
    print("Avg CPU usage: 97 %\nPeak working set size: 52428800 bytes")
    return 0


def milliseconds(model: str, number: int) -> float:
    """The trunk takes 8 ms, everything else 2; the first three runs twice as long."""
    typical = 8.0 if "trunk" in model or "model" in model else 2.0
    return typical * (2 if number < 3 else 1) + 0.01 * random.random()


def crash(model: str) -> None:
    if SCENARIO.get("crash") and SCENARIO["crash"] in model:
        print("terminating with uncaught exception of type std::bad_alloc")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    if SCENARIO.get("hang"):
        print("loading takes long", flush=True)
        time.sleep(60)


def log(message: str, level: str = "I") -> None:
    with open(PHONE / "logcat", "a", encoding="utf-8") as file:
        print(f"11-23 02:00:00.123 {os.getpid():5} {os.getpid():5} {level} ExecuTorch: {message}", file=file)


if __name__ == "__main__":
    sys.exit(
        {"executor_runner": executor_runner, "onnxruntime_perf_test": onnxruntime_perf_test}[Path(sys.argv[0]).name]()
    )
