"""A model in OpenVINO's form, which its runtime runs on Intel's processors: converted from ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from danlu.compress.exports import onnx
from danlu.compress.exports.graph import Graph
from danlu.compress.exports.running import Array, Run
from danlu.errors import DanluError, need_extra

FILE = "model.xml"  # its weights lie beside it, in model.bin


def require() -> None:
    """Raise DanluError where a package is missing."""
    if find_spec("openvino") is None:
        raise need_extra("openvino", "openvino")
    onnx.require()


def write(graph: Graph, folder: Path, where: object, half: bool) -> Path:
    """Convert a graph and write it as FILE in a folder. Args: half: weights in fp16.

    Raises DanluError where ONNX or OpenVINO cannot hold it.
    """
    import openvino

    source = onnx.write(graph, folder, where)
    try:
        openvino.save_model(openvino.convert_model(source), folder / FILE, compress_to_fp16=half)
    except Exception as error:  # its frontends have their own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DanluError(f"OpenVINO cannot hold this model: {reason}", where=where, fix="export it as ONNX") from None
    finally:
        for file in folder.glob(f"{onnx.FILE}*"):
            file.unlink()
    return folder / FILE


def runner(file: Path) -> Run:
    """OpenVINO's runtime on this machine's processor, computing in fp32."""
    import openvino

    model = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        made = model(dict(given))
        return {output.get_any_name(): values for output, values in made.items()}

    return run
