"""A model as an ONNX file, which onnxruntime runs: a decoder with its cache, or an encoder with its vectors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from danlu.compress.exports.graph import Graph
from danlu.compress.exports.running import Array, Run
from danlu.errors import DanluError, need_extra

FILE = "model.onnx"
OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LIMIT = 2**31 - 2**20  # bytes of weights that fit into the file itself


def require() -> None:
    """Raise DanluError where a package is missing."""
    for package in NEEDED:
        if find_spec(package) is None:
            raise need_extra(package, "onnx")


def write(graph: Graph, folder: Path, where: object) -> Path:
    """Trace a graph and write it as FILE in a folder; weights of 2 GB and more lie beside it, in FILE.data.

    Raises DanluError where the graph cannot be traced, or ONNX has no word for what it computes.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    weights = sum(weight.nbytes for weight in graph.module.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                graph.module,
                graph.example,
                dynamo=True,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=graph.shapes,
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter has its own error for every step
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DanluError(f"ONNX cannot hold this model: {reason}", where=where, fix="export it as GGUF") from None
    assert program is not None
    program.save(folder / FILE, external_data=weights > LIMIT)
    return folder / FILE


def quantize(file: Path) -> None:
    """Make the weights of products int8, a step for each column, and their inputs while the model runs.

    By onnxruntime's own quantizer, in place of the file.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    aside = file.with_name(f".{file.name}.int8")
    quantize_dynamic(file, aside, weight_type=QuantType.QInt8, per_channel=True)
    aside.replace(file)


def runner(file: Path, threads: int | None = None) -> Run:
    """onnxruntime on this machine's processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(given)), strict=True))

    return run
