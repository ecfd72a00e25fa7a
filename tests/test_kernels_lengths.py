"""The Triton kernels around attention at a ViT's lengths and widths.

A few lengths, one for each way a tile can end, run by default; every length and every remainder of 16 with --slow.
"""

from __future__ import annotations

import pytest
import torch
from op_checks import LENGTHS, Case, check_parity
from test_units import linear_residual_case, mlp_case, norm_linear_case, norm_mlp_case

pytest.importorskip("triton")

from vitfast import ops
from vitfast.ops.layer_norm import add_layer_norm_ref
from vitfast.ops.patch_embed import patch_embed_ref

REMAINDERS = tuple(range(32, 48))
QUICK = (1, 16, 65, 197)
MANY = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted({*LENGTHS, *REMAINDERS})]
# No power of two, and what a ViT's widths leave over in a tile of 64, 128 or 256; the widest takes 16 warps.
WIDTHS = [72, 200, *(pytest.param(n, marks=pytest.mark.slow) for n in (320, 1000, 1152, 1664, 3072, 6144, 8190))]
BACKENDS = ("triton", "triton_fused")


@pytest.mark.parametrize("L", MANY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mlp_at_lengths(backend, L):
    check_parity(mlp_case((1, L, 16), "swiglu" if L % 2 else "gelu"), "mlp", backend, torch.float16)
    check_parity(norm_mlp_case((1, L, 16)), "norm_mlp", backend, torch.float32)


@pytest.mark.parametrize("L", MANY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_projections_at_lengths(backend, L):
    check_parity(linear_residual_case((2, L, 16)), "linear_residual", backend, torch.float16)
    check_parity(norm_linear_case((1, L, 24)), "norm_linear", backend, torch.float32)


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, D):
    if D <= 1664:  # a product of 8190 columns with itself takes the interpreter minutes
        check_parity(norm_mlp_case((1, 3, D), activation="quick_gelu"), "norm_mlp", backend, torch.float32)
        check_parity(linear_residual_case((2, 2, D)), "linear_residual", backend, torch.float16)
    x, weight = torch.randn(2, 3, D, dtype=torch.double), torch.randn(D, dtype=torch.double)
    case = Case(
        op=ops.add_layer_norm,
        ref=add_layer_norm_ref,
        tensors={"residual": x, "branch": x.flip(0), "weight": weight, "bias": weight.flip(0)},
    )
    check_parity(case, "layer_norm", "triton", torch.float16)


@pytest.mark.parametrize("op", ["mlp", "swiglu", "norm_mlp", "linear_residual"])
def test_batch_0_and_strides_on_the_fused_path(op):
    """No image at all, and slices of larger tensors."""
    make = {
        "mlp": mlp_case,
        "swiglu": lambda shape: mlp_case(shape, "swiglu"),
        "norm_mlp": norm_mlp_case,
        "linear_residual": linear_residual_case,
    }[op]
    name = "mlp" if op == "swiglu" else op
    check_parity(make((0, 4, 16)), name, "triton_fused", torch.float16)
    case = make((2, 5, 24))
    for key, tensor in case.tensors.items():
        if tensor is not None and key not in case.constants:
            wide = torch.cat([tensor, tensor], -1)
            case.tensors[key] = wide[..., : tensor.shape[-1]]  # rows with a gap between them, which clone keeps
    check_parity(case, name, "triton_fused", torch.float32)


# Patches of one image side by side, so that their number is the length.
@pytest.mark.parametrize("N", MANY)
def test_patch_embed_at_lengths(N):
    generator = torch.Generator().manual_seed(N)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.double)

    P, D = 4, 24
    case = Case(
        op=ops.patch_embed,
        ref=patch_embed_ref,
        tensors={
            "images": random(2, 3, P, P * N),
            "weight": random(D, 3, P, P) * (3 * P * P) ** -0.5,
            "bias": random(D),
            "pos_embed": random(1, N + 1, D),
            "prefix": random(1, 1, D),
        },
    )
    check_parity(case, "patch_embed", "triton", torch.float16)
