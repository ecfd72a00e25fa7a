"""Patch embedding from uint8 and float images on every backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_checks import PRODUCT_BACKENDS as BACKENDS
from op_checks import (
    Case,
    check_compiles,
    check_gradients,
    check_parity,
    check_repeatable,
    randn,
    skip_unless_available,
)

from vitfast import ops
from vitfast.ops import dispatch
from vitfast.ops.patch_embed import patch_embed_ref

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def case_of(
    *,
    B: int = 2,
    C: int = 3,
    size: tuple[int, int] = (8, 12),
    P: int = 4,
    D: int = 24,
    prefix: int = 1,
    pos: str = "all",
    uint8: bool = False,
    normalise: bool = True,
) -> Case:
    height, width = size
    N = (height // P) * (width // P)
    images = randn(B, C, height, width)
    if uint8:
        images = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    constants = {"mean": (MEAN * C)[:C], "std": (STD * C)[:C]} if normalise else {}
    return Case(
        op=partial(ops.patch_embed, **constants),
        ref=partial(patch_embed_ref, **constants),
        tensors={
            "images": images,
            "weight": randn(D, C, P, P, seed=1) * (C * P * P) ** -0.5,
            "bias": randn(D, seed=2),
            "pos_embed": {"all": randn(1, prefix + N, D, seed=3), "patches": randn(1, N, D, seed=3), "none": None}[pos],
            "prefix": randn(1, prefix, D, seed=4) if prefix else None,
        },
        constants=("images",) if uint8 else (),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, uint8: bool, dtype: torch.dtype) -> None:
    check_parity(case_of(uint8=uint8), "patch_embed", backend, dtype)


@pytest.mark.parametrize(
    "shape",
    [
        {"pos": "patches", "prefix": 5},
        {"pos": "none", "prefix": 0},
        {"pos": "all", "prefix": 0, "normalise": False},
        {"C": 1, "P": 2, "size": (8, 8), "normalise": False},
        {"C": 5, "P": 4},
        {"P": 14, "size": (28, 42), "D": 40},
        {"P": 16, "size": (32, 32)},
        {"B": 0},
        {"B": 1, "size": (4, 4)},
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend: str, shape: dict[str, object]) -> None:
    check_parity(case_of(**shape), "patch_embed", backend, torch.float32)


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, uint8: bool) -> None:
    """channels_last memory and a cropped view, read in place."""
    case = case_of(uint8=uint8, size=(12, 16))
    images = case.tensors["images"]
    assert images is not None
    case.tensors["images"] = images.contiguous(memory_format=torch.channels_last)[:, :, 2:10, 4:16]
    case.tensors["pos_embed"] = None
    check_parity(case, "patch_embed", backend, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_compiles(backend: str) -> None:
    check_compiles(case_of(uint8=True), "patch_embed", backend)
    check_compiles(case_of(), "patch_embed", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable(backend: str) -> None:
    check_repeatable(case_of(), "patch_embed", backend)


def test_gradcheck() -> None:
    check_gradients(case_of(D=4, P=2, size=(4, 2), prefix=2))
    check_gradients(case_of(D=4, P=2, size=(4, 2), prefix=2, pos="patches", uint8=True))


def test_opcheck() -> None:
    tensors = case_of().inputs(torch.float32, "cpu")
    args = (tensors["images"], tensors["weight"], tensors["bias"], tensors["pos_embed"][0], tensors["prefix"][0])
    f32 = torch.float32
    torch.library.opcheck(torch.ops.vitfast.patch_embed.default, (*args, [1.0] * 3, [0.0] * 3, f32, f32, "torch"))


def test_under_autocast() -> None:
    """The product is bf16, the residual stream as wide as what is added to it: timm's behaviour."""
    tensors = case_of().inputs(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.patch_embed(**tensors).dtype == torch.float32
        assert ops.patch_embed(**(tensors | {"pos_embed": None})).dtype == torch.float32
        assert ops.patch_embed(**(tensors | {"pos_embed": None, "prefix": None})).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.ones(2, 3, 8, 13)}, "images are 8 x 13 pixels; both must be multiples of the patch size 4"),
        ({"images": torch.ones(2, 4, 8, 12)}, r"images have shape \(2, 4, 8, 12\); allowed: \(B, 3, height, width\)"),
        ({"images": torch.ones(2, 3, 8, 12, dtype=torch.int64)}, "images are torch.int64"),
        ({"weight": torch.ones(24, 48)}, "weight has shape"),
        (
            {"pos_embed": torch.ones(1, 4, 24)},
            r"pos_embed has shape \(1, 4, 24\); allowed: \(1, 6, 24\) or \(1, 7, 24\)",
        ),
        ({"mean": (0.5,)}, "mean has 1 values; images have 3 channels"),
        ({"std": None}, "mean and std go together"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    tensors = case_of().inputs(torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        ops.patch_embed(**(tensors | {"mean": MEAN, "std": STD} | change))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 16, "stride": 12},
        {"kernel_size": 7, "stride": 4, "padding": 3},
        {"kernel_size": 4, "stride": 4, "dilation": 2},
        {"kernel_size": 4, "stride": 4, "groups": 3},
        {"kernel_size": (4, 8), "stride": (4, 8)},
    ],
    ids=str,
)
def test_convolutions_that_are_no_patches_side_by_side(options: dict[str, object]) -> None:
    """Overlapping, padded, dilated, grouped or oblong: PyTorch's convolution runs, and the report says why."""
    from vitfast.dropin import fast

    conv = torch.nn.Conv2d(3, 24, **options)
    assert "no square patches side by side" in str(fast.why_not_patches(conv))
    assert str(conv.stride) in str(fast.why_not_patches(conv))
    images = torch.randn(2, 3, 32, 32)
    expected = conv(images)
    conv.__class__ = type("Conv2d", (fast.Conv2d,), {})
    assert torch.equal(conv(images), expected)
    assert fast.why_not_patches(torch.nn.Conv2d(5, 24, kernel_size=4, stride=4)) is None  # any number of channels


def test_fused_products_cut_no_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_available("patch_embed", "triton_fused")
    functions = dispatch._raw_kernels("triton_fused").functions
    for name in ("patchify", "unpatchify", "assemble_tokens"):
        monkeypatch.setattr(functions, name, lambda *_: pytest.fail("patches were cut out"))
    check_parity(case_of(), "patch_embed", "triton_fused", torch.float32)
