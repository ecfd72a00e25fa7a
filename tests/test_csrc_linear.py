"""The products of csrc/cpu/linear.cpp against fp64, on every instruction set this CPU runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from csrc_checks import CAPABILITIES, HALVES, C, on_each
from tolerances import assert_close_to_truth
from torch import Tensor

from vitfast.ops.arguments import POINTWISE
from vitfast.ops.compose import activation_ref

# Rows, inputs, outputs. Tiles have 4 or 6 rows and 16 to 64 columns; inputs over 1536 (fp32) and 3072 (bf16) come in blocks;
# an odd number of inputs leaves half a word in bf16.
SHAPES = [
    (197, 64, 192),
    (430, 20, 100),
    (5, 33, 70),
    (1, 16, 16),
    (211, 48, 130),
    (7, 3101, 20),
    (50, 1700, 70),
    (0, 8, 16),
    (3, 0, 16),
]

capability = on_each(CAPABILITIES)


def product(x: Tensor, weight: Tensor, **options) -> Tensor:
    transposed, residual = options.get("transposed", False), options.get("residual")
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.full((x.shape[0], weight.shape[1 if transposed else 0]), float("nan"), dtype=dtype)
    rest = [options.get(name) for name in ("scale", "drop_path", "before")]
    C.linear(
        x,
        weight,
        transposed,
        options.get("packed"),
        options.get("bias"),
        options.get("activation", "none"),
        residual,
        *rest,
        out,
    )
    return out


def weight_grad(d_out: Tensor, x: Tensor) -> Tensor:
    d_weight = torch.full((d_out.shape[1], x.shape[1]), float("nan"), dtype=x.dtype)
    C.linear_weight_grad(d_out, x, d_weight)
    return d_weight


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(outputs, inputs) / max(inputs, 1) ** 0.5
    return torch.randn(rows, inputs).to(dtype), weight.to(dtype), torch.randn(outputs).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_products(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    """x W^T + b, and the products of both gradients."""
    x, weight, bias = operands(rows, inputs, outputs, dtype)
    d_out = torch.randn(rows, outputs).to(dtype)
    x64, weight64, d64 = x.double(), weight.double(), d_out.double()
    cases = {
        "forward": (
            product(x, weight, bias=bias),
            F.linear(x, weight, bias),
            F.linear(x64, weight64, bias.double()),
        ),
        "input gradient": (product(d_out, weight, transposed=True), d_out @ weight, d64 @ weight64),
        "weight gradient": (weight_grad(d_out, x), d_out.t() @ x, d64.t() @ x64),
    }
    for name, (ours, plain, truth) in cases.items():
        assert_close_to_truth(name, ours, plain, truth, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", POINTWISE)
def test_activations(dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = operands(67, 40, 90, dtype)
    before = torch.full((67, 90), float("nan"), dtype=dtype)
    ours = product(x, weight, bias=bias, activation=activation, before=before)
    plain_before, truth_before = F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    plain = activation_ref(plain_before, activation)
    assert_close_to_truth("activation", ours, plain, activation_ref(truth_before, activation), dtype)
    assert_close_to_truth("before", before, plain_before, truth_before, dtype)
    again = torch.empty_like(before)
    C.activation_forward(before, activation, again)
    assert torch.equal(ours, again)  # backward makes the activation again from what was kept
    if dtype == torch.float32:
        assert torch.equal(ours, product(x, weight, bias=bias, activation=activation))


@pytest.mark.parametrize(
    ("x_dtype", "y_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_drop_path", [False, True])
def test_residual(x_dtype: torch.dtype, y_dtype: torch.dtype, with_scale: bool, with_drop_path: bool) -> None:
    x, weight, bias = operands(66, 35, 75, y_dtype)
    residual = torch.randn(66, 75).to(x_dtype)
    scale = torch.randn(75).to(x_dtype) if with_scale else None
    drop_path = torch.tensor([0.0, 1.25, 1.25]) if with_drop_path else None

    def plain(compute: torch.dtype, stream: torch.dtype) -> Tensor:
        branch = F.linear(x.to(compute), weight.to(compute), bias.to(compute))
        if scale is not None:
            branch = branch * scale.to(branch.dtype)
        if drop_path is not None:
            branch = branch * drop_path.to(branch.dtype).repeat_interleave(22).unsqueeze(1)
        return residual.to(stream) + branch

    ours = product(x, weight, bias=bias, residual=residual, scale=scale, drop_path=drop_path)
    assert ours.dtype == x_dtype
    assert_close_to_truth("residual", ours, plain(y_dtype, x_dtype), plain(torch.float64, torch.float64), ours.dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_same_bits_for_any_thread_count(dtype: torch.dtype) -> None:
    x, weight, bias = operands(430, 100, 200, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((product(x, weight, bias=bias, activation="gelu"), weight_grad(x, x)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    """A NaN or an infinity stays in its row; so does a row's result, whatever block of rows it is in."""
    x, weight, _ = operands(60, 33, 24, dtype)
    clean = product(x, weight)
    x[4, 0], x[9] = float("nan"), float("inf")
    dirty = product(x, weight)
    keep = [i for i in range(60) if i not in (4, 9)]
    assert torch.equal(clean[keep], dirty[keep])
    assert dirty[4].isnan().all()
    assert not dirty[9].isfinite().any()
    assert torch.equal(product(x[35:42].contiguous(), weight), clean[35:42])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e18])
def test_fp32_at_any_magnitude(magnitude: float) -> None:
    """fp32's accuracy where products are made of bf16 parts: of tiny and huge numbers, and of sums that cancel."""
    x, weight, _ = operands(70, 96, 40, torch.float32)
    x, weight = x * magnitude, weight * torch.logspace(-6, 6, 40)[:, None]
    assert_close_to_truth("scaled", product(x, weight), x @ weight.t(), x.double() @ weight.double().t(), torch.float32)
    x[:, 48:], weight[:, 48:] = x[:, :48], -weight[:, :48] * (1 + 2.0**-12)
    ours, plain, truth = product(x, weight), x @ weight.t(), x.double() @ weight.double().t()
    assert_close_to_truth("cancelling", ours, plain, truth, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(24, 7)}, "weight has shape"),
        ({"weight": torch.zeros(8, 48)[:, ::2], "transposed": True}, "weight must be contiguous"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"activation": "relu"}, "activation is"),
        ({"scale": torch.ones(24)}, "go with a residual"),
        ({"residual": torch.zeros(6, 24), "activation": "gelu"}, "residual goes with"),
        ({"residual": torch.zeros(6, 24), "drop_path": torch.ones(4)}, "drop_path has 4 samples"),
        ({"before": torch.zeros(6, 24)}, "before goes with"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    x, weight, _ = operands(6, 8, 24, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        product(x, **{"weight": weight} | change)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("T", "inputs", "outputs"), SHAPES)
def test_packed_weight_gives_the_same_bits(T: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(T, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    packed = C.pack_linear_weight(weight)
    with_panels, without = product(x, weight, packed=packed), product(x, weight)
    if dtype == torch.float32 and T <= 4:  # so few rows are dot products with the weight as it lies
        torch.testing.assert_close(with_panels, without, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(with_panels, without)


def test_packed_weight_of_another_size(capability: str) -> None:
    x, weight = torch.randn(3, 8), torch.randn(16, 8)
    needed = (
        32 * 3 * 16 if capability == "amx" else 16 * 8
    )  # in three parts, a block of 32 columns and a step of 16 words
    with pytest.raises(RuntimeError, match=rf"packed has shape \[127\]; needed: \[{needed}\]"):
        product(x, weight, packed=torch.zeros(127, dtype=torch.int32))
