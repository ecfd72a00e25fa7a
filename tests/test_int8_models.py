"""precision="int8": when it is used, how far it is off, and that the parameters stay the truth."""

from __future__ import annotations

import copy

import pytest
import torch
from model_checks import batch, rel, shake, small
from torch import Tensor, nn

import vitfast
from vitfast import ops
from vitfast.layers.stack import BlockStack
from vitfast.models.reference import reference_forward
from vitfast.ops import weight_cache

NAMES = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",  # norm_pre
    "deit3_small_patch16_224",  # LayerScale
    "vit_base_patch16_dinov3",  # rope, register tokens
    "vit_giant_patch14_dinov2",  # gated perceptron in one weight
    "eva02_base_patch14_224",  # q, k, v and the gate apart: joined at each call, so these stay floats
)
PRODUCTS = {"vit_tiny_patch16_224": 4, "eva02_base_patch14_224": 2}


def model(name: str = NAMES[0], **overrides) -> nn.Module:
    torch.manual_seed(0)
    return shake(vitfast.create_model(name, **small(name), **overrides)).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each result of ops.int8_linear, which blocks call one by one (tests/test_block_stack.py has them together)."""
    seen: list[torch.dtype] = []
    run = ops.int8_linear

    def counted(*args, **options) -> Tensor:
        out = run(*args, **options)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(ops, "int8_linear", counted)
    monkeypatch.setattr(BlockStack, "run", lambda *_, **__: None)
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_floats(name: str, dtype: torch.dtype) -> None:
    ours = model(name, precision="int8")
    images, _ = batch(ours)
    with torch.no_grad():
        truth = reference_forward(copy.deepcopy(ours).double(), images.double())
        logits = ours.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    assert 1e-4 < rel(logits, truth) < 5e-2


@pytest.mark.parametrize("name", NAMES)
def test_how_many_products(name: str, calls: list[torch.dtype]) -> None:
    ours = model(name, precision="int8")
    with torch.no_grad():
        ours(batch(ours)[0])
    assert len(calls) >= 2 * PRODUCTS.get(name, 3)  # of two blocks


def test_when_it_is_used(calls: list[torch.dtype]) -> None:
    ours = model(precision="int8")
    plain = model()
    images, _ = batch(ours)

    def used() -> bool:
        calls.clear()
        ours(images)
        return bool(calls)

    assert not used()  # gradients are wanted
    assert torch.equal(ours(images), plain(images))
    with torch.inference_mode():
        assert used()
    with torch.no_grad():
        assert used()
        assert not torch.equal(ours(images), plain(images))
        ours.train()
        assert not used()
    ours.eval().requires_grad_(False)
    assert used()  # nothing to differentiate
    calls.clear()
    ours(images.clone().requires_grad_()).sum().backward()
    assert not calls
    ours.set_precision("float")
    assert not used()
    ours.set_precision("int8")
    assert used()
    assert ours.config.precision == "int8"
    ours.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    ours.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    assert not used()  # blocks whose parts are watched call them
    with pytest.raises(ValueError, match="precision must be one of 'float', 'int8', got 'int4'"):
        ours.set_precision("int4")
    with pytest.raises(ValueError, match="backend for precision 'int8'"):
        vitfast.create_model(NAMES[0], precision="int8", backend="triton")


@torch.no_grad()
def test_backends_agree() -> None:
    if ops.extension_status()["_C"]["error"]:
        pytest.skip("the extension is not built")
    images, _ = batch(model())
    ours, plain = (model(precision="int8", backend=backend)(images) for backend in ("cpu", "torch"))
    assert rel(ours, plain) < 1e-2  # numbers that the rounding of LayerNorm and of q, k and v moves to the next level


@torch.no_grad()
def test_parameters_stay_the_truth() -> None:
    ours = model(precision="int8")
    images, _ = batch(ours)
    before = copy.deepcopy(ours.state_dict())
    weight_cache.clear()
    first = ours(images)
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if ops.extension_status()["_C"]["loaded"]:
        # the last block's qkv is there twice: in one for the model that returns all tokens, in parts for the class token
        patches = 6 * ours.patch_embed.proj.weight.numel()  # stays fp32: up to three parts of two bytes
        assert 0 < weight_cache.size_bytes() < patches + 1.3 * sum(p.numel() for p in ours.blocks.parameters())
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(images), first)
    for name, parameter in twin.named_parameters():
        if name.startswith("blocks"):
            parameter.mul_(0.9)
    assert not torch.equal(twin(images), first)
    twin.load_state_dict(before)
    assert torch.equal(twin(images), first)
    assert torch.equal(ours(images), first)


@torch.no_grad()
def test_compiles() -> None:
    ours = model(precision="int8")
    images, _ = batch(ours)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert rel(compiled(images), ours(images)) < 5e-3
    ours.blocks[0].mlp.fc1.weight.mul_(2.0)
    assert rel(compiled(images), ours(images)) < 5e-3


def test_autocast(calls: list[torch.dtype]) -> None:
    ours = model(precision="int8")
    images, _ = batch(ours)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = ours(images)
    assert calls[0] == torch.bfloat16  # q, k and v; the residual stream stays as it is
    assert calls[1] == torch.float32
    calls.clear()
    with torch.no_grad():
        assert rel(logits, ours(images)) < 5e-2
    assert calls[:2] == [torch.bfloat16, torch.float32]  # the same without it: the next product rounds to 8 bits


def test_verify_reports_it() -> None:
    ours = model(precision="int8")
    images, _ = batch(ours, size=8)
    report = vitfast.verify(ours, dtypes=[torch.float32])
    assert report.passed, str(report)
    assert 1e-4 < report.error("int8") < 5e-2
    assert report.error("float32") < 1e-5  # with gradients it is the same model as ever
    assert [row.what for row in report.rows if row.dtype == "int8"] == ["logits"]

    spread = model()
    with torch.no_grad():
        spread.head.weight.mul_(0.01)
        spread.head.bias.copy_(torch.arange(10.0))
    spread.set_precision("int8")
    assert vitfast.verify(spread, images=images, dtypes=[]).error("int8", "top-1 changed") == 0.0
    other = copy.deepcopy(spread)
    with torch.no_grad():
        other.head.bias.copy_(-torch.arange(10.0))
    report = vitfast.verify(spread, other, images=images, dtypes=[])
    assert report.error("int8", "top-1 changed") == 1.0
    assert not report.passed
