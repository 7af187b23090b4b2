"""What rounding a matrix to a format will cost: the divergence from the original that it alone brings, to second order.

With g the gradient at a layer's outputs of the loss on words that the model itself draws, the divergence of a change E
of its weights is half the mean of (g^T E x)^2 (Fisher information, arXiv:1412.1193), taken apart into inputs and
outputs (K-FAC, arXiv:1503.05671) with the outputs' part on its diagonal. What compensation leaves of a column's error
is told by the factor that compensates (danlu/compress/compensate.py). Rows are drawn by how much they count, as few
tell the sum.

llama.cpp also rounds what it multiplies such a matrix with to 8 bits, a step for each of the format's blocks. With u
the gradient at a layer's inputs and e what that changes of them, it brings half the mean of (u^T e)^2, which is told
apart: no better weights would mend it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from danlu.compress.compensate import ROUNDING, Inputs
from danlu.compress.quantizing.formats.grid import inverse
from danlu.compress.quantizing.formats.known import Format, fitting, format_of
from danlu.compress.quantizing.formats.plain import Q4_0
from danlu.compress.quantizing.held import SAME
from danlu.compress.quantizing.mixes import PLAIN, head_of, matrices
from danlu.compress.walk import Walk
from danlu.console import progress
from danlu.errors import DanluError
from danlu.model.checkpoint import Checkpoint
from danlu.model.transformer import Decoder

EMBEDDING = "embedding.tokens.weight"
SAMPLE = 24  # rows of a matrix that are rounded to tell its error
WORDS = 64  # rows of the embedding and head

INPUT_BLOCKS = (32, 256)  # numbers that share a step in inputs: for K-types and TQ2_0 as in weights, else 32
INPUT_LEVELS = 127  # of such a number, on either side of 0

Losses = dict[str, dict[str, float]]  # matrix -> format -> divergence, nat a token


@dataclass(frozen=True)
class Sensitivities:
    """What each format of each matrix will cost.

    Attributes:
        rounding: by rounding its weights. inputs: by rounding what they are multiplied with.
    """

    rounding: Losses
    inputs: Losses


@dataclass
class _Outputs:
    """Sums over tokens of the squared gradients at each layer's outputs, fp32 [outputs], and of what the head's are.

    Attributes:
        squares: by the layer's name; the embedding's are those of what it puts into the stream.
        head: of each word's logit, the mean of p (1 - p), fp32 [vocab].
        inputs: by the layer's name and the block, the sum of squares of what rounding its inputs to 8 bits changes
            of the loss.
        tokens: that were seen.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, dict[int, float]] = field(default_factory=dict)
    head: Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: int = 0

    def note(self, name: str, gradient: Tensor) -> None:
        found = gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)
        self.squares[name] = self.squares[name] + found if name in self.squares else found

    def note_inputs(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """A layer's inputs and the gradient there, both [..., columns]."""
        x, gradient = (each.reshape(-1, each.shape[-1]).float() for each in (x, gradient))
        sums = self.inputs.setdefault(name, {})
        for block in INPUT_BLOCKS:
            if x.shape[1] % block == 0:
                changed = (input_errors(x, block) * gradient).sum(1)
                sums[block] = sums.get(block, 0.0) + float(changed.square().sum())

    def of_inputs(self, name: str, types: Sequence[str], columns: int) -> dict[str, float]:
        """What rounding a layer's inputs costs in each format, nat a token; nothing where rows are only looked up."""
        sums = self.inputs.get(name, dict.fromkeys(INPUT_BLOCKS, 0.0))
        return {
            kind: 0.0 if form is None else 0.5 / self.tokens * sums[input_block(form)]
            for kind, form in formats(types, columns).items()
        }


def input_block(form: Format) -> int:
    """Numbers that share a step in what llama.cpp multiplies such a matrix with."""
    return max(block for block in INPUT_BLOCKS if form.block % block == 0)


def input_errors(x: Tensor, block: int) -> Tensor:
    """What rounding inputs, fp32 [tokens, columns], to 8 bits changes: the same shape.

    Most are far smaller than the largest of their block and become 0, so that the error is not one of even chance.
    """
    parts = x.unflatten(1, (-1, block))
    step = parts.abs().amax(-1, keepdim=True) / INPUT_LEVELS
    return (parts.mul(inverse(step)).round_().mul_(step) - parts).flatten(1)


def sensitivities(checkpoint: Checkpoint, rows: Tensor, types: Sequence[str], seed: int = 0) -> Sensitivities:
    """The divergence that each matrix brings in each format.

    Args:
        checkpoint: a decoder without experts.
        rows: calibration tokens, int64 [rows, T].
        types: formats to try; where rows of a matrix do not fill their blocks, what stands in: see `formats`.
        seed: of the words and rows drawn.

    Returns: both by the matrix's name, then by the format it would really get.

    Raises DanluError where the model has matrices that are no ordinary layers.
    """
    shapes = matrices(checkpoint)
    odd = next((name for name, shape in shapes.items() if len(shape) != 2), None)
    if odd is not None:
        what = f"{odd} is a bank of experts, whose formats are not searched"
        raise DanluError(what, where=checkpoint.path, fix="give all matrices one format: danlu compress quantize")
    generator = torch.Generator().manual_seed(seed)
    outputs = _watch_outputs(checkpoint, rows, generator)
    found: Losses = {}
    with torch.no_grad(), progress("sensitivities", checkpoint.config.layers + 1, "blocks") as tick:
        walk = Walk(checkpoint.config, checkpoint.model.makers(torch.float32), rows)
        words = walk.embed()[EMBEDDING]
        for prefix, block, products in walk.blocks():
            once = {id(each): each for each in products.found.values()}
            made = {key: Inputs(each, damping=ROUNDING) for key, each in once.items()}
            drawn = {
                f"{prefix}{name}.weight": _draw(
                    block.get_parameter(f"{name}.weight").data,
                    made[id(product)].importance,
                    _by_column(made[id(product)]),
                    outputs.squares[prefix + name] * (0.5 / outputs.tokens**2),
                    SAMPLE,
                    generator,
                )
                for name, product in products.found.items()
            }
            found |= _losses(drawn, types)
            tick.advance(1, prefix.rstrip("."))
        ends, given = walk.end()
        found |= _ends(words, ends, Inputs(given, damping=ROUNDING), rows, outputs, types, generator)
        tick.advance(1, "head")
    inputs = {name: outputs.of_inputs(name.removesuffix(".weight"), types, shapes[name][-1]) for name in found}
    return Sensitivities(found, inputs)


def formats(types: Sequence[str], columns: int) -> dict[str, Format | None]:
    """What matrices of so many columns can get of these types, by its name; stand-ins among them (formats/known.py).

    Rows that fill no format's blocks stay as they are: PLAIN, which is None.
    """
    fit = (fitting(format_of(type), columns) for type in types)
    return {form.kind.name.lower(): form for form in fit if form is not None} or {PLAIN: None}


def _by_column(inputs: Inputs) -> Tensor:
    """What a squared error of each column costs once the others have made up for it, fp32 [columns].

    An error e of column c becomes (e / U_cc) U_c. Its square under the damped products is e^2 / U_cc^2; under those
    that the inputs really have it is less by what damping adds.
    """
    seen = 1 - inputs.ridge * inputs.factor.square().sum(1)
    return seen.clamp(min=0) / inputs.factor.diagonal().square()


@dataclass(frozen=True)
class _Drawn:
    """Rows of a matrix that stand for all of it.

    Attributes:
        rows: fp32 [rows, columns], drawn by how much they count.
        importance: fp32 [columns], that steps are fitted with.
        by_column: fp32 [columns], what a squared error costs.
        total: what all rows of the matrix count together.
    """

    rows: Tensor
    importance: Tensor
    by_column: Tensor
    total: float


def _draw(
    weight: Tensor, importance: Tensor, by_column: Tensor, by_row: Tensor, sample: int, generator: torch.Generator
) -> _Drawn:
    chosen = torch.multinomial(by_row.clamp(min=0) + 1e-30, sample, replacement=True, generator=generator)
    return _Drawn(weight[chosen], importance, by_column, float(by_row.sum()))


def _losses(drawn: Mapping[str, _Drawn], types: Sequence[str]) -> Losses:
    """Of each matrix in each format; those with as many columns are rounded together, which takes as long as one."""
    found: Losses = {name: {} for name in drawn}
    for columns in {each.rows.shape[1] for each in drawn.values()}:
        alike = {name: each for name, each in drawn.items() if each.rows.shape[1] == columns}
        for kind, form in formats(types, columns).items():
            lost = [0.0] * len(alike) if form is None else _lost(list(alike.values()), form)
            for name, each in zip(alike, lost, strict=True):
                found[name][kind] = each
    return found


def _lost(drawn: Sequence[_Drawn], form: Format) -> list[float]:
    """The sum over each matrix of row's count x column's cost x squared rounding error."""
    rows = torch.cat([each.rows for each in drawn])
    importance, by_column = (
        torch.cat([getattr(each, name).expand_as(each.rows) for each in drawn]) for name in ("importance", "by_column")
    )
    # Weights may lie on some format's grid, as those of a file of few bits do; what rounding aims at does not, as it
    # makes up for the layers before and for the columns before.
    aims = rows + _neighbours_errors(rows, importance, Q4_0)
    moved = aims + _neighbours_errors(aims, importance, form)
    moved = torch.where(_is_held(rows, _errors(rows, importance, form)), rows, moved)
    errors = _errors(moved, importance, form).square()
    parts = (errors * by_column).sum(1).split([len(each.rows) for each in drawn])
    return [each.total * float(part.mean()) for each, part in zip(drawn, parts, strict=True)]


def _neighbours_errors(rows: Tensor, weights: Tensor, form: Format) -> Tensor:
    """What rounding changes in the column before: about as far as a column has been moved when its turn comes."""
    return _errors(rows, weights, form).unflatten(1, (-1, form.block)).roll(1, -1).flatten(1)


def _is_held(rows: Tensor, errors: Tensor) -> Tensor:
    """Whether a format holds rows as they are, bool [rows, 1]: then nothing needs to be made up for."""
    return errors.square().sum(1, keepdim=True) <= SAME * rows.square().sum(1, keepdim=True)


def _errors(rows: Tensor, weights: Tensor, form: Format) -> Tensor:
    """What rounding changes, fp32 [rows, columns]."""
    blocks = rows.reshape(-1, form.block)  # they are rounded by themselves, so that all can be at once
    grid = form.fit(blocks, weights.reshape(-1, form.block))
    return (grid.values(grid.codes(blocks)) - blocks).view_as(rows)


def _ends(
    words: Tensor,
    ends: Mapping[str, Tensor],
    inputs: Inputs,
    rows: Tensor,
    outputs: _Outputs,
    types: Sequence[str],
    generator: torch.Generator,
) -> Losses:
    """Of the embedding, whose rows count by how often they are looked up, and of the head; of both where it is one."""
    scale = 0.5 / outputs.tokens / rows.numel()
    seen = torch.bincount(rows.flatten(), minlength=len(words)).float() * scale
    into = outputs.squares["embedding"]
    head = outputs.head * scale
    looked = {EMBEDDING: _draw(words, into, into, seen, WORDS, generator)}
    name = "head.weight" if "head.weight" in ends else EMBEDDING
    spoken = {name: _draw(ends.get(name, words), inputs.importance, _by_column(inputs), head, WORDS, generator)}
    before, after = _losses(looked, types), _losses(spoken, types)
    if name != EMBEDDING:
        return before | after
    return {name: {kind: lost + before[name][kind] for kind, lost in after[name].items()}}


def _watch_outputs(checkpoint: Checkpoint, rows: Tensor, generator: torch.Generator) -> _Outputs:
    """One way forward and back for each row, in bf16, for words that the model draws itself."""
    model = checkpoint.load(torch.bfloat16).requires_grad_(False)
    outputs = _Outputs(head=torch.zeros(checkpoint.config.vocab_size))
    handles = list(_hooks(model, outputs))
    head = head_of(matrices(checkpoint)).removesuffix(".weight")
    with progress("gradients", len(rows), "rows") as tick:
        for row in rows:
            hidden = model(row[None])[0]
            guesses = torch.softmax(model.logits(hidden.detach()).float(), -1)
            outputs.head += (guesses * (1 - guesses)).sum(0)
            chosen = torch.multinomial(guesses, 1, generator=generator)
            guesses.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=guesses.dtype))
            outputs.note_inputs(head, hidden.detach(), _backward(model, hidden, guesses))
            outputs.tokens += len(row)
            tick.advance(1)
    for handle in handles:
        handle.remove()
    return outputs


def _backward(model: Decoder, hidden: Tensor, gradient: Tensor) -> Tensor:
    """From the gradient at logits, fp32 [T, vocab], which is softmax - one_hot for a sum of losses. Returns the one at
    what the head is given."""
    leaf = hidden.detach().requires_grad_()
    model.logits(leaf).backward(gradient.to(leaf.dtype))
    assert leaf.grad is not None
    hidden.backward(leaf.grad)
    return leaf.grad


def _hooks(model: Decoder, outputs: _Outputs) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def watch(name: str, module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        x = given[0].detach()

        def note(gradient: Tensor) -> None:
            outputs.note(name, gradient)
            outputs.note_inputs(name, x, gradient @ module.get_parameter("weight"))

        made.register_hook(note)

    def begin(_module: nn.Module, _given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        made = made.detach().requires_grad_()
        made.register_hook(partial(outputs.note, "embedding"))
        return made

    yield model.embedding.register_forward_hook(begin)
    for name, module in model.blocks.named_modules():
        if type(module) is nn.Linear:
            yield module.register_forward_hook(partial(watch, f"blocks.{name}"))
