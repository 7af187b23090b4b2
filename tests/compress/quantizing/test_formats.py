"""Our own rounding to GGML's number formats: bytes as the gguf package reads them, and errors made up for."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.compress.compensate import CAUTION, Inputs
from danlu.compress.quantizing.formats.grid import nearest, to_levels
from danlu.compress.quantizing.formats.known import FORMATS, Format, fitting, format_of
from danlu.compress.quantizing.qat import LearnedMatrix
from danlu.compress.quantizing.refining import Block, refine
from danlu.compress.quantizing.rounding import Rounded, round_again, round_compensated, round_plainly
from danlu.device.engine import library
from danlu.errors import DanluError
from danlu.gguf_numbers import dequantize

EVERY = sorted(FORMATS)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """As models have them: rows of different size, a few large numbers, rows and blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator) * 0.1
    made[torch.rand(made.shape, generator=generator) < 0.01] *= 8
    made[0], made[1, :32] = 0, 0
    return made


def same_as_read(rounded: Rounded, form: Format) -> bool:
    packed = np.ascontiguousarray(rounded.packed.numpy())
    read = read_binary(packed) if form is FORMATS["q1_0"] else gguf.dequantize(packed, form.kind)
    return np.array_equal(read, rounded.values.numpy()) and np.array_equal(read, dequantize(packed, form.kind))


def read_binary(packed: np.ndarray) -> np.ndarray:
    """As the engine reads Q1_0, which the gguf package does not."""
    ggml = ctypes.CDLL(str(next((Path(library().__file__).parent / "lib").glob("libggml-base.*"))))
    read = np.zeros((len(packed), packed.shape[1] * 128 // 18), np.float32)
    places = (ctypes.c_void_p(each.ctypes.data) for each in (packed, read))
    ggml.dequantize_row_q1_0(*places, ctypes.c_int64(read.size))
    return read


@pytest.mark.parametrize("name", EVERY)
def test_values_are_those_that_a_reader_of_the_file_gets_to_the_bit(name: str) -> None:
    form = FORMATS[name]
    weight = weights(24, 512)
    products = torch.randn(600, 512, generator=torch.Generator().manual_seed(1))
    for rounded in (round_plainly(weight, form), round_compensated(weight, form, Inputs(products.T @ products))):
        assert rounded.packed.shape == (24, 512 // form.block * gguf.GGML_QUANT_SIZES[form.kind][1])
        assert same_as_read(rounded, form)
        assert not rounded.values[0].any(), "zeros stay zeros"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(EVERY), st.integers(0, 2**31), st.sampled_from([1e-12, 1e-3, 1.0, 1e4]))
def test_any_scale_of_weights_survives(name: str, seed: int, scale: float) -> None:
    form = FORMATS[name]
    weight = weights(4, 256, seed) * scale
    rounded = round_plainly(weight, form)
    assert rounded.values.isfinite().all() and same_as_read(rounded, form)
    if scale > 1e-12:  # below, fp16 holds no step
        most = 0.9 if name in ("tq2_0", "q1_0") else 0.4  # one step for 128 or 256 numbers, of which a few are large
        assert (rounded.values - weight).square().sum() < most * weight.square().sum()


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "tq2_0"])
def test_plain_rounding_loses_less_than_the_gguf_packages(name: str) -> None:
    form, weight = FORMATS[name], weights(64, 512)
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), form.kind), form.kind))
    ours = round_plainly(weight, form).values
    assert (ours - weight).square().sum() < (theirs - weight).square().sum()


def test_more_bits_lose_less() -> None:
    weight = weights(64, 512)
    names = ["q1_0", "tq2_0", "q2_k", "q3_k", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0"]
    lost = [float((round_plainly(weight, FORMATS[name]).values - weight).square().sum()) for name in names]
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q3_k", "q2_k", "iq4_nl"])
def test_making_up_for_errors_keeps_outputs_nearer(name: str) -> None:
    """Inputs that go together, as a model's do: outputs of the compensated matrix are nearer by a quarter at least."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(512, 512, generator=generator) * torch.rand(512, generator=generator)
    inputs = torch.randn(4096, 512, generator=generator) @ mixing
    weight = weights(64, 512)

    def lost(rounded: Rounded) -> float:
        return float(((rounded.values - weight) @ inputs.T).square().sum())

    form, products = FORMATS[name], Inputs(inputs.T @ inputs)
    assert lost(round_compensated(weight, form, products)) < 0.75 * lost(round_plainly(weight, form))
    assert lost(round_plainly(weight, form, products.importance)) < lost(round_plainly(weight, form))


def correlated(columns: int, tokens: int = 4096, seed: int = 2) -> torch.Tensor:
    """Inputs that go together, as a model's do, fp32 [tokens, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q3_k", "iq4_nl"])
def test_refining_never_loses_and_gains(name: str) -> None:
    """Every pass brings outputs nearer, and the file can hold what is made."""
    form, weight, given = FORMATS[name], weights(48, 512), correlated(512)
    inputs = Inputs(given.T @ given)

    def blocks(rounded: Rounded) -> list[Block]:
        parts = zip(rounded.grids, rounded.values.split(form.block, 1), strict=True)
        return [Block(grid, grid.codes(part).T.contiguous()) for grid, part in parts]

    def lost(made: list[Block]) -> float:
        errors = torch.cat([each.values for each in made]).T - weight
        return float(((errors @ inputs.products(0, 512)) * errors).sum())

    plain = round_plainly(weight, form)
    turns = [blocks(plain)]
    for _ in range(3):
        turns.append(refine(turns[-1], weight, form, inputs, 1))
    losses = [lost(turn) for turn in turns]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    assert same_as_read(round_again(weight, form, inputs, plain.values, plain.grids), form)


def test_each_pass_of_refining_brings_what_was_compensated_nearer() -> None:
    form, weight, given = FORMATS["q4_0"], weights(48, 512), correlated(512)
    inputs = Inputs(given.T @ given)

    def lost(passes: int) -> float:
        off = round_compensated(weight, form, inputs, passes).values - inputs.aim(weight)
        return float(((off @ inputs.products(0, 512)) * off).sum())

    assert lost(0) > lost(1) > lost(2)


def test_what_is_rounded_follows_a_change_of_its_weights() -> None:
    """Refined towards weights that a change of rank 1 moved, codes come nearer; without inputs nothing moves."""
    form, weight, given = FORMATS["q3_k"], weights(48, 512), correlated(512)
    inputs = Inputs(given.T @ given)
    first = round_compensated(weight, form, inputs)
    moved = weight + 0.3 * weight.std() * torch.randn(48, 1) @ torch.randn(1, 512)

    def lost(values: torch.Tensor) -> float:
        return float((((values - moved) @ inputs.products(0, 512)) * (values - moved)).sum())

    after = round_again(moved, form, inputs, first.values, first.grids)
    assert lost(after.values) < 0.5 * lost(first.values) and same_as_read(after, form)
    assert torch.equal(round_again(moved, form, None, first.values, first.grids).packed, first.packed)


def test_a_layer_makes_up_for_what_those_before_it_lost() -> None:
    """Of all matrices, the one aimed at gives from changed inputs what comes nearest to the original's outputs."""
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(2048, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    after = before + 0.5 * torch.randn(before.shape, generator=generator) @ torch.rand(64, 64, generator=generator)
    weight = weights(32, 64)
    inputs = Inputs(after.T @ after, [(before - after).T @ after])
    drift, products = (before - after).T @ after, after.T @ after
    damped = products + CAUTION * products.diagonal().mean() * torch.eye(64)
    assert torch.allclose(inputs.aim(weight), weight + weight @ drift @ damped.inverse(), atol=1e-3)

    def lost(found: torch.Tensor) -> float:
        return float((found @ after.T - weight @ before.T).square().sum())

    best = torch.linalg.lstsq(after, before @ weight.T).solution.T
    assert lost(best) < lost(inputs.aim(weight)) < 0.8 * lost(weight)
    form = FORMATS["q5_0"]
    unaimed = round_compensated(weight, form, Inputs(products))
    assert lost(round_compensated(weight, form, inputs).values) < 0.8 * lost(unaimed.values)


@pytest.mark.parametrize("name", EVERY)
def test_a_tuned_matrix_starts_where_it_was_and_ends_as_a_reader_gets_it(name: str) -> None:
    form, weight = FORMATS[name], weights(8, 512)
    rounded = round_plainly(weight, form)
    tuned = LearnedMatrix(form, rounded.grids, rounded.values)
    assert torch.equal(tuned.values(), rounded.values) and torch.equal(tuned.rounded().packed, rounded.packed)
    inputs = torch.randn(2048, 512, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -1, 512)
    products = inputs.T @ inputs

    def lost(found: torch.Tensor) -> float:
        return float(((found - 1.02 * weight) @ products * (found - 1.02 * weight)).sum())

    before = lost(tuned.values())
    for step in range(40):
        tuned.learn((tuned.values() - 1.02 * weight) @ products, 2.5e-3 * (1 - step / 40))
    assert lost(tuned.values()) < before
    ended = tuned.rounded()
    assert same_as_read(ended, form)
    assert (ended.values - tuned.values()).norm() < 2e-3 * weight.norm(), "the same but for what fp16 cannot hold"


def test_inputs_that_never_were_do_not_break_it() -> None:
    inputs = torch.randn(100, 256, generator=torch.Generator().manual_seed(3))
    inputs[:, 7] = 0
    made = round_compensated(weights(8, 256), FORMATS["q4_0"], Inputs(inputs.T @ inputs))
    assert made.values.isfinite().all()


@given(st.lists(st.floats(-130, 130, width=32), min_size=1, max_size=50))
def test_uneven_levels_are_searched_rightly(numbers: list[float]) -> None:
    levels = FORMATS["iq4_nl"].levels
    x = torch.tensor([numbers])
    found = to_levels(x.clone(), levels)
    assert torch.equal(found, levels[nearest(x.clone(), levels).int()])
    assert torch.equal((x - found).abs(), (x[..., None] - levels).abs().amin(-1))


def test_names_and_what_stands_in() -> None:
    assert format_of("Q4_K") is FORMATS["q4_k"]
    with pytest.raises(DanluError, match="q4_z") as problem:
        format_of("q4_z")
    assert "did you mean q4_" in str(problem.value.fix)
    assert fitting(FORMATS["q4_k"], 512) is FORMATS["q4_k"]
    assert fitting(FORMATS["q4_k"], 576) is FORMATS["q5_0"]
    assert fitting(FORMATS["q4_0"], 100) is None
