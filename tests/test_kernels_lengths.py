"""The Triton kernels around attention at a ViT's lengths and widths, and the addresses they form beyond 2**31 elements.

A few lengths, one for each way a tile can end, run by default; every length and every remainder of 16 with --slow.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from op_checks import DEVICE, LENGTHS, Case, check_parity
from test_units import linear_residual_case, mlp_case, norm_linear_case, norm_mlp_case

pytest.importorskip("triton")

from vitfast import ops
from vitfast.kernels import activation, layer_norm, mlp, patchify
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


@pytest.fixture
def last_program(monkeypatch):
    """Runs a kernel's last program with its loads and stores replaced by a record of where they would go."""
    if DEVICE == "cuda":
        pytest.skip("the interpreter's addresses are looked at")
    from triton.runtime import interpreter

    touched: list[int] = []

    def record(pointers, mask):
        if mask.any():
            touched.extend((int(pointers[mask].min()), int(pointers[mask].max())))

    def load(pointers, mask, other, _dtype):
        record(pointers, mask)
        return other

    native = interpreter._interpreter
    passed = {name: getattr(native, name) for name in dir(native) if not name.startswith("__")}
    watched = SimpleNamespace(
        **passed | {"load": load, "store": lambda pointers, _values, mask: record(pointers, mask)}
    )

    def run(kernel, grid, *args, **kwargs):
        monkeypatch.setattr(interpreter, "_interpreter", watched)
        builder = interpreter.interpreter_builder
        place = builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", grid))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: place(*(n - 1 for n in grid)))
        kernel[(1, 1, 1)](*args, **kwargs)
        monkeypatch.undo()
        return touched

    return run


FAR = 2**31 // 64 + 5  # rows of 64 numbers: their last element is beyond what 32 bits can count
TINY = {"gelu": 64, "swiglu": 128}


def assert_reaches(touched: list[int], base: torch.Tensor, elements: int) -> None:
    """The last element is touched, and nothing outside [base, end]: a wrapped offset would lie below."""
    last = base.data_ptr() + (elements - 1) * base.element_size()
    assert last in touched, f"the last element is at {last}, touched were {sorted(touched)}"


def assert_nothing_wraps(touched: list[int], *tensors: torch.Tensor) -> None:
    assert min(touched) >= min(t.data_ptr() for t in tensors)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("programs", [False, True], ids=["tiles", "persistent"])
def test_products_beyond_2_31(last_program, kind, programs):
    x, weight, bias, h, out, residual = (torch.zeros(1, dtype=torch.float16) for _ in range(6))
    tiles = -(-FAR // 32)
    H = TINY[kind]
    constants = (64, 64, kind, True, 32, 64, 64, 8, programs, False, False, "ieee")
    touched = last_program(
        mlp._linear_kernel, (tiles, 1, 1), x, weight, bias, residual, None, None, h, out, FAR, 1, *constants
    )
    for tensor, width in ((x, 64), (h, H), (out, 64), (residual, 64)):
        assert_reaches(touched, tensor, FAR * width)
    assert_nothing_wraps(touched, x, weight, bias, h, out, residual)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_hidden_backward_beyond_2_31(last_program, kind):
    d_out, weight, h, d_h, act = (torch.zeros(1, dtype=torch.float16) for _ in range(5))
    partials, tiles, H = torch.zeros(1), -(-FAR // 32), TINY[kind]
    constants = (64, 64, kind, True, 32, 64, 64, 8, False, False, True, "ieee")
    touched = last_program(
        mlp._hidden_backward_kernel, (tiles, 1, 1), d_out, weight, h, d_h, act, partials, FAR, *constants
    )
    for tensor, width in ((d_out, 64), (h, H), (d_h, H), (act, 64)):
        assert_reaches(touched, tensor, FAR * width)
    assert_reaches(touched, partials, tiles * H)
    assert_nothing_wraps(touched, d_out, weight, h, d_h, act, partials)


def test_elementwise_kernels_beyond_2_31(last_program):
    h, d_act, d_h, act, out = (torch.zeros(1, dtype=torch.float16) for _ in range(5))
    touched = last_program(activation._forward_kernel, (-(-FAR * 64 // 256), 1, 1), h, out, FAR * 64, "gelu", True, 256)
    assert_reaches(touched, h, FAR * 64)
    assert_reaches(touched, out, FAR * 64)
    rows = -(-FAR // 8)
    touched = last_program(activation._swiglu_forward_kernel, (1, rows, 1), h, out, FAR, 64, True, 8, 64)
    assert_reaches(touched, h, FAR * 128)
    # the last strip of as many strips as there are blocks of rows takes the last block alone
    for kernel, width, kinds in (
        (activation._backward_kernel, 64, ("gelu",)),
        (activation._swiglu_backward_kernel, 128, ()),
    ):
        touched = last_program(kernel, (1, rows, 1), h, d_act, d_h, act, None, FAR, 64, *kinds, True, 8, 64)
        assert_reaches(touched, d_h, FAR * width)
        assert_reaches(touched, act, FAR * 64)
    assert_nothing_wraps(touched, h, d_act, d_h, act, out)


def test_layer_norm_beyond_2_31(last_program):
    x, branch, total, normed, d_x, d_branch = (torch.zeros(1, dtype=torch.float16) for _ in range(6))
    vector, mean, rstd, partials = (torch.zeros(1) for _ in range(4))
    blocks = -(-FAR // 8)
    touched = last_program(
        layer_norm._forward_kernel, (blocks, 1, 1), x, branch, vector, None, vector, vector, total, normed, mean, rstd,
        FAR, 1, 1e-6, 64, 8, 64,
    )  # fmt: skip
    for tensor in (x, branch, total, normed):
        assert_reaches(touched, tensor, FAR * 64)
    touched = last_program(
        layer_norm._backward_kernel, (blocks, 1, 1), x, branch, total, mean, rstd, vector, branch, vector, None, d_x,
        d_branch, partials, FAR, 1, 64, 8, 64, True,
    )  # fmt: skip
    for tensor in (x, branch, total, d_x, d_branch):
        assert_reaches(touched, tensor, FAR * 64)
    assert_nothing_wraps(touched, x, branch, total, normed, d_x, d_branch, vector, mean, rstd, partials)


def test_patchify_beyond_2_31(last_program):
    """14 x 14 patches of 16 x 16 x 3 from so many images that their pixels pass 2**31, read and written."""
    images = 2**31 // (3 * 224 * 224) + 1
    pixels, rows, vector = torch.zeros(1), torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    patches, columns = images * 196, 3 * 256
    grid = (-(-patches // 32), columns // 64, 1)
    place = (14, 14, 3 * 224 * 224, 224 * 224, 224)
    touched = last_program(
        patchify._patchify_kernel, grid, pixels, vector, vector, rows, patches, *place, 1, columns, 16, 32, 64
    )
    assert_reaches(touched, pixels, images * 3 * 224 * 224)
    assert_reaches(touched, rows, patches * columns)
    touched = last_program(
        patchify._unpatchify_kernel, grid, rows, vector, pixels, patches, *place, columns, 16, 32, 64
    )
    assert_reaches(touched, pixels, images * 3 * 224 * 224)
    assert_nothing_wraps(touched, pixels, rows, vector)
