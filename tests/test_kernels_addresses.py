"""The addresses that the Triton kernels form beyond 2**31 elements: their last program runs with every load and store replaced
by a record of where it would go, so nothing that large is allocated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from op_checks import DEVICE

pytest.importorskip("triton")

from vitfast.kernels import (
    activation,
    attention_backward,
    attention_bias,
    attention_forward,
    layer_norm,
    mlp,
    patch_embed,
    patchify,
)


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


# Attention of one head of 64 columns: sequences of 65 tokens, so many that their rows of 64 numbers pass 2**31, and with a
# bias of its own for each sequence, whose matrices do, too.
L, E = 65, 64
SEQUENCES = -(-FAR // L)
T = SEQUENCES * L
PLAIN = (None, None, (None, None, 0.0), (None, None, 0.0), 0)  # cos, sin, q's and k's norm, prefix
SHAPES = (1, (E, E, 0, 0), (E, E, 0, 0), 0, 0, 0)  # H, QK, VO, COLUMNS, Q_NORM, K_NORM
BIAS = (L * L, 0, L)  # strides over sequences and heads, length
FORWARD = {"one_pass": (16, 64, 16, 0), "looped": (16, 32, 16)}
BACKWARD = {"one_pass": (16, 64, 16, 0), "keys": (16, 32, 16), "queries": (16, 32, 16)}


def attention_tensors() -> tuple[torch.Tensor, ...]:
    qkv, d_qkv, out, d_out, bias = (torch.zeros(1, dtype=torch.float16) for _ in range(5))
    return qkv, d_qkv, out, d_out, bias, torch.zeros(1), torch.zeros(1)


@pytest.mark.parametrize("kernel", FORWARD)
def test_attention_forward_beyond_2_31(last_program, kernel):
    qkv, _, out, _, bias, lse, _ = attention_tensors()
    blocks = -(-L // 16)
    touched = last_program(
        getattr(attention_forward, f"_{kernel}_kernel"), (blocks * SEQUENCES, 1, 1), qkv, bias, None, None, *PLAIN, out,
        lse, 0.1, L, T, blocks, *BIAS, *SHAPES, *FORWARD[kernel], "ieee",
    )  # fmt: skip
    assert_reaches(touched, qkv, T * 3 * E)
    assert_reaches(touched, bias, SEQUENCES * L * L)
    assert_reaches(touched, out, T * E)
    assert_reaches(touched, lse, T)
    assert_nothing_wraps(touched, qkv, bias, out, lse)


@pytest.mark.parametrize("kernel", BACKWARD)
def test_attention_backward_beyond_2_31(last_program, kernel):
    qkv, d_qkv, out, d_out, bias, lse, delta = attention_tensors()
    once = kernel == "one_pass"
    blocks = 1 if once else -(-L // 16)
    own = (out,) if once else ()
    partials = (None, None) if once else (None,)
    touched = last_program(
        getattr(attention_backward, f"_{kernel}_kernel"), (blocks * SEQUENCES, 1, 1), d_out, qkv, *own, bias, None, None,
        *PLAIN, lse, delta, d_qkv, *partials, 0.1, L, T, 1 if once else blocks, *BIAS, *SHAPES, *BACKWARD[kernel], "ieee",
    )  # fmt: skip
    assert_reaches(touched, qkv, T * 3 * E)
    assert_reaches(touched, bias, SEQUENCES * L * L)
    assert_reaches(touched, d_out, T * E)
    assert_reaches(touched, d_qkv, (T - 1) * 3 * E + E if kernel == "queries" else T * 3 * E)
    assert_nothing_wraps(touched, qkv, bias, d_out, d_qkv, lse, delta, *own)


def test_attention_row_sums_beyond_2_31(last_program):
    _, _, out, d_out, _, _, delta = attention_tensors()
    touched = last_program(
        attention_backward._delta_kernel, (-(-T // 32), 1, 1), out, d_out, delta, T, 1, (E, E, 0, 0), 32
    )
    assert_reaches(touched, out, T * E)
    assert_reaches(touched, d_out, T * E)
    assert_reaches(touched, delta, T)


def test_bias_gradient_beyond_2_31(last_program):
    """A shared bias, each sequence in a program of its own: the last one's matrix of partial sums lies past 2**31."""
    qkv, _, _, d_out, bias, lse, delta = attention_tensors()
    partials, blocks = torch.zeros(1), -(-L // 32)
    touched = last_program(
        attention_bias._bias_gradient_kernel, (blocks * blocks, SEQUENCES, 1), d_out, qkv, bias, None, None, *PLAIN, lse,
        delta, partials, 0.1, L, T, SEQUENCES, blocks, 1, 1, 0, 0, L, *SHAPES, 32, "ieee",
    )  # fmt: skip
    assert_reaches(touched, qkv, T * 3 * E)
    assert_reaches(touched, d_out, T * E)
    assert_reaches(touched, partials, SEQUENCES * L * L)
    assert_nothing_wraps(touched, qkv, d_out, bias, lse, delta, partials)


def test_patch_embed_beyond_2_31(last_program):
    """Pixels and tokens of 14 x 14 patches pass 2**31 for so many images; the prefix tokens of the last one as well."""
    images = 2**31 // (3 * 224 * 224) + 1
    N, K, D = 196, 768, 768
    pixels, vector, partials = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    weight, tokens = (torch.zeros(1, dtype=torch.float16) for _ in range(2))
    blocks = -(-images * N // 32)
    strides = (3 * 224 * 224, 224 * 224, 224)
    place = (images, 14, 14, *strides)
    tensors = (pixels, vector, partials, weight, tokens)
    touched = last_program(
        patch_embed._forward_kernel, (blocks * D // 64, 1, 1), pixels, weight, vector, None, None, vector, vector, tokens,
        *place, 1, K, 16, D, 0, False, 32, 64, 64, "ieee",
    )  # fmt: skip
    assert_reaches(touched, pixels, images * 3 * 224 * 224)
    assert_reaches(touched, tokens, images * N * D)
    touched.clear()
    prefixed = (blocks + -(-images // 32)) * D // 64
    last_program(
        patch_embed._forward_kernel, (prefixed, 1, 1), pixels, weight, vector, vector, vector, vector, vector, tokens,
        *place, 1, K, 16, D, 1, True, 32, 64, 64, "ieee",
    )  # fmt: skip
    assert_reaches(touched, tokens, (images - 1) * (1 + N) * D + D)
    touched.clear()
    last_program(
        patch_embed._weight_kernel, (D // 32 * K // 32, blocks, 1), pixels, tokens, vector, vector, partials, *place, 1, K,
        16, D, 0, 32, 32, 32, "ieee", patch_embed.TRITON_TYPE[torch.float16],
    )  # fmt: skip
    assert_reaches(touched, pixels, images * 3 * 224 * 224)
    assert_reaches(touched, tokens, images * N * D)
    assert_reaches(touched, partials, blocks * D * K)
    touched.clear()
    last_program(
        patch_embed._image_kernel, (blocks * K // 64, 1, 1), tokens, weight, vector, pixels, *place, K, 16, D, 0, 32, 64, 64,
        "ieee",
    )  # fmt: skip
    assert_reaches(touched, pixels, images * 3 * 224 * 224)
    assert_reaches(touched, tokens, images * N * D)
    assert_nothing_wraps(touched, *tensors)
