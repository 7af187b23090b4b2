"""Matrices as products of two thin ones, chosen so that what comes out on a text changes least.

A matrix times the Cholesky factor of its inputs' products, cut to its largest singular values, loses exactly the
squares of the others on that text (SVD-LLM, arXiv:2403.07378). Ranks are allotted by what they are seen to be worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from danlu.artifact import Figures, figure
from danlu.compress.compensate import DAMPING
from danlu.compress.product import Making, Product, Shelf, Source, start_walk, workplace
from danlu.compress.pruning.sparse import ROUTERS
from danlu.compress.quantizing.quantizer import calibration_rows
from danlu.console import progress
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint, save_checkpoint
from danlu.model.module import load_weights, save_weights
from danlu.model.stored import without_memory
from danlu.model.transformer import Decoder
from danlu.train.precision import choose_precision

FACTORED = "factored.safetensors"
SAMPLE = 512  # tokens on which a matrix's worth is measured


class Factored(nn.Module):
    """A linear layer of low rank: [..., inputs] -> [..., rank] -> [..., outputs]."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True)
class Spectrum:
    """A matrix taken apart: left @ right is the matrix, and its first columns and rows are its best answers.

    Attributes:
        left: fp32 [outputs, n], n the smaller of outputs and inputs.
        right: fp32 [n, inputs].
        lost: fp32 [n], what the squared outputs on the text lose without each rank; descending.
    """

    left: Tensor
    right: Tensor
    lost: Tensor

    def cut(self, rank: int) -> Tensor:
        """The nearest matrix of a rank, fp32 [outputs, inputs]."""
        return self.left[:, :rank] @ self.right[:rank]


def spectrum(weight: Tensor, products: Tensor) -> Spectrum:
    """Take a matrix apart by what its inputs show.

    Args: weight: fp32 [outputs, inputs]; products: fp32 [inputs, inputs], the sum of the inputs' products.
    """
    damping = DAMPING * products.diagonal().mean().clamp(min=1e-12)
    lower = torch.linalg.cholesky(products + damping * torch.eye(len(products)))
    seen = weight @ lower
    if weight.shape[0] <= weight.shape[1]:
        lost, basis = _squares(seen @ seen.T)
        return Spectrum(basis, basis.T @ weight, lost)
    lost, basis = _squares(seen.T @ seen)
    return Spectrum(seen @ basis, torch.linalg.solve_triangular(lower, basis.T, upper=False, left=False), lost)


def _squares(product: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the singular values, descending, and the vectors of the smaller side: several times as fast as a SVD.

    Args: product: fp32 [n, n], of a matrix with itself.
    """
    values, vectors = torch.linalg.eigh(product.double())
    return values.flip(0).clamp(min=0).float(), vectors.flip(1).float()


def allot(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], worth: Mapping[str, float], share: float
) -> dict[str, int]:
    """The rank of each matrix, so that together they have at most `share` of the numbers; 0 for one that stays whole.

    The share must be one that can be had; see `check_share`. Every rank that is kept brings more loss a number than
    every one that is not, as far as that is known.

    Args:
        spectra: fp32 [n], what is lost without each rank, descending.
        shapes: outputs and inputs.
        worth: what a unit of `spectra` is in loss.
    """

    def ranks(price: float) -> dict[str, int]:
        made = {}
        for name, lost in spectra.items():
            outputs, inputs = shapes[name]
            rank = max(1, int((worth[name] * lost >= price * (outputs + inputs)).sum()))
            made[name] = rank if rank * (outputs + inputs) < outputs * inputs else 0
        return made

    budget = share * sum(outputs * inputs for outputs, inputs in shapes.values())
    low, high = 0.0, max(float(worth[name] * lost.max()) for name, lost in spectra.items())
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 1e6
        low, high = (low, middle) if numbers(ranks(middle), shapes) <= budget else (middle, high)
    return ranks(high)


def check_share(share: float, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise DanluError where matrices of these outputs and inputs have more than a share of their numbers at rank 1."""
    thinnest = {name: int(sum(shape) < shape[0] * shape[1]) for name, shape in shapes.items()}
    least = numbers(thinnest, shapes) / numbers(dict.fromkeys(shapes, 0), shapes)
    if share < least:
        what = f"a share of {share:.4g} is too little: matrices of rank 1 have {least:.4g} of the numbers"
        raise DanluError(what, where="--share", fix=f"ask for more than {least:.2%}, say 80%")


def numbers(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """How many numbers matrices of these ranks have."""
    return sum(rank * sum(shapes[name]) if rank else shapes[name][0] * shapes[name][1] for name, rank in ranks.items())


def lower_rank(
    checkpoint: Checkpoint,
    share: float,
    calibration: str,
    out: Path,
    tokens: int = 16_384,
    dtype: torch.dtype = torch.float32,
) -> Product:
    """Give a decoder's matrices low ranks, by a budget.

    Writes OUT/factored.safetensors, the whole model with thin matrices, which `load_factored` reads; and OUT/model, an
    ordinary Hugging Face directory with the thin matrices multiplied out, as large as before: transformers and GGUF
    have no word for two matrices in the place of one.

    Args:
        checkpoint: any decoder without experts.
        share: of the numbers in the matrices of attention and feed-forward, what is to be left.
        calibration: a text like what the model is for.
        out: the directory.
        tokens: of the text, at most.
        dtype: of the stored weights.

    Raises DanluError where the share cannot be had, the model is a mixture, or the text is too short.
    """
    if not 0 < share < 1:
        raise DanluError(f"a share of {share:g} of the numbers cannot be kept", where="--share", fix="say 0.8, or 80%")
    if checkpoint.config.experts is not None:
        raise DanluError("experts see different tokens, and are no matrices of their own", where=checkpoint.path)
    source = Source.of(checkpoint)
    shapes = _shapes(source)
    check_share(share, shapes)
    rows = calibration_rows(checkpoint, calibration, tokens)
    making = Making("lowrank", "compress/low_rank/matrices", {"share": share, "tokens": tokens}, checkpoint)
    with workplace(out) as folder, torch.inference_mode():
        spectra, cut = _spectra(source, rows, Shelf.at(folder / "cut"))
        worth = _worth(checkpoint, rows, spectra, cut)
        ranks = allot(spectra, shapes, worth, share)
        model = _factored(checkpoint, rows, ranks)
        out.mkdir(exist_ok=True)
        save_weights(model.to(dtype), out / FACTORED)
        save_checkpoint(multiplied_out(model), checkpoint.tokenizer, out / "model", dtype)
    return making.sign(out, _figures(source, ranks, shapes))


def load_factored(path: Path) -> Decoder:
    """The model that `lower_rank` wrote, with thin matrices: it computes, and learns, as they do.

    Raises DanluError where it is none.
    """
    file = path / FACTORED
    if not file.is_file():
        raise DanluError("holds no model of low rank", where=path, fix="name what `danlu compress lowrank` wrote")
    model = without_memory(Checkpoint.open(path / "model").config)
    assert isinstance(model, Decoder)
    with safe_open(file, framework="pt") as held:
        names = set(held.keys())
        for layer in _linear(model):
            if f"{layer}.down.weight" in names:
                _replace(model, layer, held.get_slice(f"{layer}.down.weight").get_shape()[0])
    load_weights(model.to_empty(device="cpu"), file)
    return model.eval()


def multiplied_out(model: Decoder) -> Decoder:
    """The same model with ordinary matrices."""
    made = without_memory(model.config)
    assert isinstance(made, Decoder)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, Factored):
            down, up = (weights.pop(f"{path}.{part}.weight") for part in ("down", "up"))
            weights[f"{path}.weight"] = (up.float() @ down.float()).to(up.dtype)
            if module.up.bias is not None:
                weights[f"{path}.bias"] = weights.pop(f"{path}.up.bias")
    made.load_state_dict(weights, assign=True)
    return made.eval()


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices that get low ranks, by the path of their layer."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path.startswith("blocks.") and not path.endswith(ROUTERS)
    }


def _shapes(source: Source) -> dict[str, tuple[int, int]]:
    layers = _linear(without_memory(source.config))
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def _replace(model: nn.Module, path: str, rank: int) -> Factored:
    """Put a layer of a rank where another one is."""
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    assert isinstance(old, nn.Linear)
    with old.weight.device:
        made = Factored(old.in_features, rank, old.out_features, old.bias is not None)
    setattr(model.get_submodule(parent), name, made)
    return made


def _spectra(source: Source, rows: Tensor, shelf: Shelf) -> tuple[dict[str, Tensor], Shelf]:
    """What each matrix loses without each of its ranks, and on disk each matrix without half of what they take."""
    walk, found = start_walk(source, rows), dict[str, Tensor]()
    walk.embed()
    with progress("low rank, spectra", source.config.layers, "blocks") as tick:
        for prefix, block, products in walk.blocks():
            for name, layer in _linear(nn.ModuleDict({"blocks": block})).items():
                path = prefix + name.removeprefix("blocks.")
                made = spectrum(layer.weight.data, products.found[name.removeprefix("blocks.")])
                found[path] = made.lost
                shelf.keep(path, made.cut(_probe(layer)))
            tick.advance(1)
    return found, shelf


def _probe(layer: nn.Linear) -> int:
    """The rank at which a matrix's worth is measured: with half of its numbers."""
    return max(1, layer.out_features * layer.in_features // (2 * (layer.out_features + layer.in_features)))


def _worth(checkpoint: Checkpoint, rows: Tensor, spectra: Mapping[str, Tensor], cut: Shelf) -> dict[str, float]:
    """What a unit of a matrix's spectrum is in loss: the model's divergence from itself with this matrix cut alone."""
    model, worth = checkpoint.load(), {}
    sample = rows[:: max(1, rows.numel() // SAMPLE)]
    layers, dtype = _linear(model), choose_precision("auto")[0]

    def said() -> Tensor:
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            return model.logits(model(sample)).float().log_softmax(-1)

    known = said()
    with progress("low rank, worth", len(spectra), "matrices") as tick:
        for path, lost in spectra.items():
            layer = layers[path]
            whole, layer.weight.data = layer.weight.data, cut.weights[path]
            divergence = float(F.kl_div(said(), known, reduction="batchmean", log_target=True))
            layer.weight.data = whole
            worth[path] = max(divergence, 1e-9) / float(lost[_probe(layer) :].sum().clamp(min=1e-12))
            tick.advance(1)
    return worth


def _factored(checkpoint: Checkpoint, rows: Tensor, ranks: Mapping[str, int]) -> Decoder:
    """The model with thin matrices, each fitted to the inputs that the ones before it give."""
    source, model = Source.of(checkpoint), checkpoint.load()
    walk = start_walk(source, rows)
    walk.embed()
    with progress("low rank, cut", source.config.layers, "blocks") as tick:
        for prefix, block, products in walk.blocks():
            for name, layer in _linear(nn.ModuleDict({"blocks": block})).items():
                own = name.removeprefix("blocks.")
                rank = ranks[prefix + own]
                if rank:
                    made = spectrum(layer.weight.data, products.found[own])
                    thin = _replace(model, prefix + own, rank)
                    thin.down.weight.data = made.right[:rank].contiguous()
                    thin.up.weight.data = made.left[:, :rank].contiguous()
                    if layer.bias is not None:
                        thin.up.bias.data = layer.bias.data.clone()
                    layer.weight.data = made.cut(rank)
            tick.advance(1)
    return model


def _figures(source: Source, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> Figures:
    before, after = numbers(dict.fromkeys(ranks, 0), shapes), numbers(ranks, shapes)
    return {
        "parameters_before": figure(source.parameters, "parameters"),
        "parameters": figure(source.parameters - before + after, "parameters", by="with thin matrices"),
        "share": figure(after / before, "share", by="of the numbers of matrices in blocks"),
        "whole": figure(sum(rank == 0 for rank in ranks.values()), "matrices", by="worth more than they would save"),
        "ranks": dict(ranks),
    }
