"""The product of csrc/cpu/int8_linear.cpp on every instruction set this CPU runs: its integers are exact."""

from __future__ import annotations

import pytest
import torch
from csrc_checks import HALVES, C, on_each
from tolerances import assert_close_to_truth
from torch import Tensor

from vitfast.ops.arguments import POINTWISE
from vitfast.ops.int8_linear import int8_linear_ref
from vitfast.ops.quantize import pack_weight, pack_weight_for_tiles, quantize_rows

# Rows, inputs, outputs. Tiles have 4 or 6 rows and 16 to 64 columns; 4 inputs share a word.
SHAPES = [(197, 64, 192), (430, 20, 100), (5, 33, 70), (1, 16, 16), (211, 48, 130), (7, 3101, 20), (9, 2, 113)]

capability = on_each(["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"])


def packed_for_this_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pack_weight_for_tiles(weight) if C.cpu_capability() == "amx" else pack_weight(weight)


def product(x: Tensor, weight: Tensor, **options) -> Tensor:
    residual = options.get("residual")
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=options.get("dtype", dtype))
    norm = options.get("norm_weight"), options.get("norm_bias"), 1e-6
    packed = options.get("packed") or packed_for_this_cpu(weight)
    rest = options.get("bias"), options.get("activation", "none"), residual, options.get("scale")
    C.int8_linear(x, *norm, *packed, *rest, out)
    return out


def integers(rows: int, columns: int) -> Tensor:
    """Integers of -127..127 with 127 in every row: their own levels, at scale 1."""
    x = torch.randint(-127, 128, (rows, columns))
    x[:, columns // 2] = 127
    return x


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return (x.long() @ weight.long().t()).float()  # rounded once, where a sum has more than 24 bits


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_integers_are_exact(rows: int, inputs: int, outputs: int) -> None:
    x, weight = integers(rows, inputs), integers(outputs, inputs)
    assert torch.equal(product(x.float(), weight.float()), exact(x, weight))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_no_saturation(signs: tuple[int, int]) -> None:
    """Products of 16 bits and sums of pairs of them reach their largest; so do the 32-bit sums."""
    for inputs in (64, 8190):
        x, weight = torch.full((7, inputs), 127 * signs[0]), torch.full((80, inputs), 127 * signs[1])
        assert torch.equal(product(x.float(), weight.float()), exact(x, weight))


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_get_their_nearest_levels(dtype: torch.dtype) -> None:
    """Times the identity, the product shows the quantised rows themselves: the same integers as quantize_rows."""
    for width in (5, 48, 131):
        x = (torch.randn(40, width) * torch.logspace(-20, 20, 40).unsqueeze(1)).to(dtype)
        x[3] = 0
        x[4] = torch.arange(width) - width // 2 + 0.5  # ties
        x[5] *= 1e-38  # below what is told from 0
        quantized, scale = quantize_rows(x)
        packed, start, _ = packed_for_this_cpu(torch.eye(width) * 127)
        shown = product(x, torch.eye(width), packed=(packed, start, torch.ones(width)), dtype=torch.float32)
        assert torch.equal(shown, quantized * 127 * scale)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ["none", *POINTWISE])
def test_bias_and_activation(dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = torch.randn(67, 40).to(dtype), torch.randn(90, 40).to(dtype) / 6, torch.randn(90).to(dtype)
    plain = int8_linear_ref(x, weight, bias, activation=activation)
    truth = int8_linear_ref(x.double(), weight.double(), bias.double(), activation=activation)
    ours = product(x, weight, bias=bias, activation=activation)
    assert_close_to_truth(activation, ours, plain, truth, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_scale", [False, True])
def test_residual(dtype: torch.dtype, with_scale: bool) -> None:
    x, weight, bias = torch.randn(66, 35).bfloat16(), torch.randn(75, 35) / 6, torch.randn(75).bfloat16()
    residual, scale = torch.randn(66, 75).to(dtype), torch.randn(75) if with_scale else None
    options = {"residual": residual, "scale": scale}
    plain = int8_linear_ref(x, weight, bias, **options)
    wide = {name: None if t is None else t.double() for name, t in options.items()}
    truth = int8_linear_ref(x.double(), weight.double(), bias.double(), **wide)
    assert_close_to_truth("residual", product(x, weight, bias=bias, **options), plain, truth, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_first(dtype: torch.dtype) -> None:
    """LayerNorm's own rounding moves a number of a million from one level to the next: hence the tolerance."""
    for width in (48, 131):
        x, weight = (torch.randn(50, width) * 3 + 1).to(dtype), torch.randn(70, width) / 8
        norm = {"norm_weight": torch.randn(width) + 1, "norm_bias": torch.randn(width)}
        ours = product(x, weight, **norm, dtype=torch.float32)
        wide = {name: t.double() for name, t in norm.items()}
        truth = int8_linear_ref(x.double(), weight.double(), **wide)
        assert float((ours - truth).norm() / truth.norm()) < 5e-4
        unquantized = torch.nn.functional.layer_norm(x.double(), (width,), *wide.values(), 1e-6) @ weight.double().t()
        assert 1e-3 < float((ours - unquantized).norm() / unquantized.norm()) < 2e-2


def test_same_bits_for_any_thread_count() -> None:
    x, weight = torch.randn(430, 100), torch.randn(200, 100)
    norm = {"norm_weight": torch.ones(100), "norm_bias": torch.zeros(100)}
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 40):
        torch.set_num_threads(threads)
        results.append(product(x, weight, activation="gelu", **norm))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x, weight = torch.randn(20, 33), torch.randn(24, 33)
    clean = product(x, weight)
    x[4, 0], x[9, 32] = float("nan"), float("inf")
    dirty = product(x, weight)
    keep = [i for i in range(20) if i not in (4, 9)]
    assert torch.equal(clean[keep], dirty[keep])
    assert dirty[[4, 9]].isnan().all()
    assert torch.equal(product(x[5:7].contiguous(), weight), clean[5:7])


def test_nothing_to_do() -> None:
    assert product(torch.zeros(0, 8), torch.zeros(16, 8)).shape == (0, 16)
    assert torch.equal(product(torch.zeros(3, 0), torch.zeros(16, 0), bias=torch.ones(16)), torch.ones(3, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 70)}, "packed has shape"),
        ({"x": torch.zeros(6, 8).double()}, "x has dtype"),
        ({"x": torch.zeros(1, 65540), "weight": torch.zeros(1, 65540)}, "x has 65540 columns"),
        ({"x": torch.zeros(8, 6).t()}, "x must be contiguous"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"activation": "relu"}, "activation is"),
        ({"scale": torch.ones(24)}, "scale goes with a residual"),
        ({"residual": torch.zeros(6, 24), "activation": "gelu"}, "residual goes with"),
        ({"residual": torch.zeros(6, 24), "dtype": torch.bfloat16}, "residual has dtype"),
        ({"norm_weight": torch.ones(8)}, "norm_weight is given but norm_bias is None"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        product(**{"x": torch.zeros(6, 8), "weight": torch.zeros(24, 8)} | change)
