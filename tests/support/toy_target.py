"""A whole target in one file: numpy arrays in .npz files, run by numpy. docs/adding-a-target.md walks through it."""

import json
import math
import operator
from dataclasses import dataclass

import numpy as np

from mvmoe_deploy.exporters.exporter import Exporter, Options
from mvmoe_deploy.exporters.precision import FP16, FP32
from mvmoe_deploy.targets import Engine, Target


@dataclass(frozen=True)
class ToyOptions(Options):
    compress: bool = False


def add_arguments(group):
    group.add_argument("--compress", action="store_true", help="deflate the arrays")


BACKEND = Engine("numpy", opens="toy_target:NumpyBackend", packages=("numpy",))
TARGET = Target("toy", "NumPy", "toy-target", backends=(BACKEND,), exporter="toy_target:EXPORTER")
EXPORTER = Exporter("toy_target:convert", (FP32, FP16), options=ToyOptions, add_arguments=add_arguments)


def convert(job):
    import torch

    from mvmoe_deploy.exporters.job import Converted, describe_piece

    pieces, save = [], np.savez_compressed if job.options.compress else np.savez
    for piece in job.split.pieces:
        program = torch.export.export(piece.module, tuple(example[:1] for example in piece.inputs.values()))
        signature, kind = program.graph_signature, {"fp32": np.float32, "fp16": np.float16}[job.options.precision]
        weights = {n: program.state_dict[w].numpy().astype(kind) for n, w in signature.inputs_to_parameters.items()}
        steps = [[n.name, str(n.target), n.args] for n in program.graph.nodes if n.op == "call_function"]
        graph = {"inputs": signature.user_inputs, "steps": steps, "outputs": signature.user_outputs}
        text, file = json.dumps(graph, default=lambda node: {"value": node.name}), f"{piece.name}.npz"
        save(job.directory / file, graph=text, **weights)
        pieces.append(describe_piece(piece, file, [file], job.piece_flops(piece.role)))
    return Converted(pieces, {"numpy": np.__version__})


class NumpyBackend:
    name, unloads = "numpy", True

    def __init__(self, bundle, threads):
        self.bundle = bundle

    def load(self, piece):
        with np.load(self.bundle.path / piece.graph) as file:
            graph = json.loads(str(file["graph"]))
            weights = {name: file[name].astype(np.float32) for name in file if name != "graph"}

        def one(*image):
            values = weights | dict(zip(graph["inputs"], image, strict=True))
            for name, kind, arguments in graph["steps"]:
                values[name] = OPERATORS[kind](*filled(arguments, values))
            return [values[name] for name in graph["outputs"]]

        def run(*inputs):
            images = [one(*(each[i : i + 1] for each in inputs)) for i in range(len(inputs[0]))]
            return [np.concatenate(parts) for parts in zip(*images, strict=True)]

        return run


def filled(x, values):
    return values[x["value"]] if isinstance(x, dict) else [filled(y, values) for y in x] if isinstance(x, list) else x


def conv2d(x, w, b, stride):  # of patches that do not overlap
    x = x.reshape(*x.shape[:2], -1, stride[0], x.shape[3] // stride[1], stride[1])
    return np.einsum("bcipjq,dcpq->bdij", x, w) + b[:, None, None]


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def norm(x, shape, w, b, eps, *_):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b


erf = np.vectorize(math.erf, otypes=[np.float32])
ATEN = {
    "add.Tensor": np.add, "mul.Tensor": np.multiply, "cat.default": np.concatenate, "view.default": np.reshape,
    "permute.default": np.transpose, "transpose.int": np.swapaxes, "unsqueeze.default": np.expand_dims,
    "alias.default": np.asarray, "conv2d.default": conv2d, "softmax.int": softmax, "layer_norm.default": norm,
    "linear.default": lambda x, w, b: x @ w.T + b, "mean.dim": lambda x, dims: x.mean(tuple(dims)),
    "gelu.default": lambda x: x * (1 + erf(x / 2**0.5)) / 2, "unbind.int": list,
    "scaled_dot_product_attention.default": lambda q, k, v: softmax(q @ k.swapaxes(2, 3) / k.shape[3] ** 0.5) @ v,
    "select.int": lambda x, axis, i: x.take(i, axis), "flatten.using_ints": lambda x, n: x.reshape(*x.shape[:n], -1),
    "slice.Tensor": lambda x, axis, i, j: x.swapaxes(0, axis)[i:j].swapaxes(0, axis),
    "expand.default": lambda x, shape: np.broadcast_to(x, (shape[0], *x.shape[1:])),
}  # fmt: skip
OPERATORS = {f"aten.{name}": run for name, run in ATEN.items()} | {str(operator.getitem): operator.getitem}
