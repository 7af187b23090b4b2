"""`danlu export --to`: a model in the form of another program, run there and compared, in a directory with a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from danlu.artifact import Figures, figure, library_version
from danlu.compress.apart import check_apart
from danlu.compress.exports import compressed_tensors, executorch, onnx, openvino
from danlu.compress.exports.compressed_tensors import EMBEDDING
from danlu.compress.exports.graph import graph_of
from danlu.compress.exports.quality import quality
from danlu.compress.exports.running import compare_run
from danlu.compress.product import Making, Product, workplace
from danlu.console import say
from danlu.errors import DanluError
from danlu.model.checkpoint import StoredModel
from danlu.model.compare import compare, load_reference, make_sample
from danlu.model.compressed import PACKED
from danlu.model.config import Head
from danlu.model.directory import tensor_names
from danlu.model.sentence import read_head
from danlu.model.transformer import Decoder, Encoder
from danlu.tokenizer import Tokenizer

Kind = Literal["onnx", "openvino", "executorch", "compressed-tensors"]
TYPES: dict[Kind, tuple[str, ...]] = {
    "onnx": ("f32", "int8"),
    "openvino": ("f32", "f16"),
    "executorch": ("f32",),
    "compressed-tensors": tuple(compressed_tensors.SCHEMES),
}
# Packages that run them here.
ENGINES: dict[Kind, str] = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
    "compressed-tensors": "compressed-tensors",
}
REQUIRE: dict[Kind, Callable[[], None]] = {
    "onnx": onnx.require,
    "openvino": openvino.require,
    "executorch": executorch.require,
}
TOLERANCE = 1e-4  # between Danlu's and transformers' outputs, in fp32; see `danlu.model.compare`


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        ref: the model; see `find_checkpoint`.
        kind: the program it is for.
        type: of its weights, of `TYPES`; by default the first.
        out: the directory.
        calibration: a text like what the model is for, for types of few bits.
        heldout: another one, on which the loss of quality is measured.
        tokens: of the calibration text, at most.
    """

    ref: str | Path
    kind: Kind
    type: str | None
    out: Path
    calibration: str | None = None
    heldout: str | None = None
    tokens: int = 16_384


def export_model(request: Request) -> Product:
    """Write a model in another program's form, run it there, and sign it with what was measured.

    Raises DanluError where a package is missing, the form cannot hold the model, or what comes out is not what the
    original gives; nothing is then left.
    """
    kind = check_type(request)
    if request.out.exists():
        raise DanluError("is there already", where=request.out, fix="choose another --out, or delete it")
    if request.kind in REQUIRE:
        REQUIRE[request.kind]()
    stored = StoredModel.open(request.ref)
    tokenizer = Tokenizer.load(stored.path)
    engine = ENGINES[request.kind]
    settings = {"to": request.kind, "type": kind, "tokens": request.tokens if request.calibration else None}
    settings |= {"engine": f"{engine} {library_version(engine) or 'absent'}"}
    making = Making("export", "compress/exports/export", settings, stored)
    with workplace(request.out) as folder:
        made = folder / "made"
        made.mkdir()
        if request.kind == "compressed-tensors":
            figures = _few_bits(request, stored, tokenizer, kind, made)
        else:
            figures = _traced(request, stored, kind, made)
            tokenizer.save(made)
        made.rename(request.out)
    return making.sign(request.out, figures)


def check_type(request: Request) -> str:
    """The type, in lower case.

    Raises DanluError where the form has none of this name, a text is missing for it or has no effect, or much of the
    held-out text is in the calibration text.
    """
    known = TYPES[request.kind]
    kind = (request.type or known[0]).lower()
    if kind not in known:
        what = f"{request.type} is no type of {request.kind}"
        raise DanluError(what, where="--type", fix=f"known: {', '.join(known)}")
    few = request.kind == "compressed-tensors"
    if few and request.calibration is None:
        raise DanluError("needs a text to round weights by", where=f"--to {request.kind}", fix="--calibration TEXT")
    given = [name for name in ("calibration", "heldout") if getattr(request, name) is not None]
    if not few and given:
        raise DanluError("has no effect here", where=f"--{given[0]}", fix=f"leave it out with --to {request.kind}")
    if request.calibration is not None and request.heldout is not None:
        check_apart(request.calibration, request.heldout)
    return kind


def _traced(request: Request, stored: StoredModel, kind: str, folder: Path) -> Figures:
    """Of the engines that are given a graph."""
    head = sentence_head(stored)
    model = stored.load()
    graph = graph_of(model, head, stored.path)
    assert isinstance(model, Decoder | Encoder)
    if request.kind == "executorch":
        return _sized(folder, executorch.write(model, head, folder, stored.path))
    if request.kind == "onnx":
        file = onnx.write(graph, folder, stored.path)
        exact = compare_run(graph, model, head, onnx.runner(file), exact=True)
        if kind == "f32":
            return _sized(folder, exact)
        onnx.quantize(file)
        run = onnx.runner(file)
    else:
        run = openvino.runner(openvino.write(graph, folder, stored.path, half=kind == "f16"))
    return _sized(folder, compare_run(graph, model, head, run, exact=kind == "f32"))


def _sized(folder: Path, figures: Figures) -> Figures:
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"file_size": figure(size, "byte"), **figures}


def sentence_head(stored: StoredModel) -> Head | None:
    """How a sentence encoder makes one vector of hidden states; None for other models."""
    return read_head(stored.path) if (stored.path / "modules.json").is_file() else None


def _few_bits(request: Request, stored: StoredModel, tokenizer: Tokenizer, kind: str, folder: Path) -> Figures:
    """compressed-tensors: written, read again by Danlu, and by transformers where it is installed."""
    scheme = compressed_tensors.scheme_of(kind)
    assert request.calibration is not None
    figures = compressed_tensors.write(stored, tokenizer, scheme, request.calibration, folder, request.tokens)
    read = StoredModel.open(folder)
    if any(name.endswith(f"{EMBEDDING}{PACKED}") for name in tensor_names(folder)):
        say("export: for Danlu alone: transformers cannot start an embedding that is packed; w8a16's is not")
    elif find_spec("transformers") is None or find_spec("compressed_tensors") is None:
        say("export: not loaded in transformers, which needs the packages transformers and compressed-tensors")
    else:
        figures["difference"] = agreement(read)
    if request.heldout is not None:
        figures |= quality(stored, read, tokenizer, request.heldout, scheme.form if scheme.inputs else None)
    return figures


def agreement(stored: StoredModel) -> dict[str, Any]:
    """How far what transformers computes of a directory of few bits is from what Danlu does, in fp32.

    Inputs are left exact on both sides. Raises TargetMissed where it is above the tolerance.
    """
    reference = load_reference(stored.family, stored.path)
    for module in reference.modules():
        module.quantization_enabled = False  # of inputs; weights are made whole all the same
    found = compare(stored.load(), reference, make_sample(stored.config), TOLERANCE)
    found.raise_if_apart(stored.path)
    return figure(max(each.largest for each in found.differences), "", by="Danlu and transformers, in fp32")
