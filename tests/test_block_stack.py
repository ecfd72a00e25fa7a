"""Plain blocks in one call of C++: the same bits as one by one, the class token alone at the end of them, and what sends a
model back to calling its blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from op_checks import skip_unless_available
from torch import Tensor, nn

import vitfast
from vitfast.layers.stack import BlockStack
from vitfast.ops import weight_cache
from vitfast.ops.raw_cpu import CpuKernels

pytest.importorskip("vitfast._C", reason="the extension is not built: python setup.py build_ext --inplace")

DTYPES = [torch.float32, torch.bfloat16]
NO_ROPE = (None, None, False)


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    weight_cache.limit_bytes(None)
    weight_cache.clear()


def small(**options) -> nn.Module:
    sizes = {"img_size": 64, "num_classes": 10, "depth": 3}
    model = vitfast.create_model("vit_tiny_patch16_224", **(sizes | options)).eval()
    for p in model.parameters():  # no zeros, so that every term counts
        nn.init.normal_(p, std=0.05)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 64, 64).to(dtype)


def one_by_one(call: Callable[[Tensor], Tensor], x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(BlockStack, "run", lambda *_, **__: None)
        return call(x)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each later call of a stack ran its blocks together."""
    seen: list[bool] = []
    run = BlockStack.run

    def spy(self: BlockStack, *args, **options) -> Tensor | None:
        out = run(self, *args, **options)
        seen.append(out is not None)
        return out

    monkeypatch.setattr(BlockStack, "run", spy)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qkv_bias": False}, {"global_pool": "avg"}])
def test_same_bits_as_one_by_one(options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(**options).to(dtype), images(dtype)
    expected = one_by_one(model.forward_features, x, monkeypatch)
    seen = calls(monkeypatch)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), expected)
        assert torch.equal(model.forward_features(x), expected)  # by the plan of the first call
    assert seen == [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.1, "qkv_bias": False},
        {"embed_dim": 72, "num_heads": 3},  # q's rows end inside a panel of the packed weight
        {"embed_dim": 66, "num_heads": 3, "reg_tokens": 4},
        {"depth": 1},
        {"rope_type": "cat", "rope_rotate_half": False},
        {"rope_type": "dinov3", "rope_rotate_half": True, "reg_tokens": 4, "embed_dim": 120, "num_heads": 6},
    ],
)
def test_the_last_block_makes_the_class_token_alone(
    options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small(**options).to(dtype), images(dtype)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        truth, every_token = exact(x.double()), model.forward_head(model.forward_features(x)).double()
        seen = calls(monkeypatch)
        alone = model(x).double()
    assert seen == [True]
    assert (alone - truth).norm() <= 2 * (every_token - truth).norm() + 1e-7


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hook": lambda m: m.blocks[1].mlp.register_forward_hook(lambda *_: None),
    "hook of a block": lambda m: m.blocks[0].register_forward_pre_hook(lambda *_: None),
    "layer of another class": lambda m: setattr(m.blocks[0].mlp, "fc1", nn.Sequential(m.blocks[0].mlp.fc1)),
    "forward of its own": lambda m: setattr(m.blocks[0].attn, "forward", m.blocks[0].attn.forward),
    "dropout in training": lambda m: (setattr(m.blocks[0].mlp, "drop", 1e-9), m.blocks[0].train()),
    "two dtypes": lambda m: m.blocks[0].mlp.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_called(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), images()
    with torch.no_grad():
        model(x)
        seen = calls(monkeypatch)
        CHANGES[change](model)
        assert torch.allclose(model(x), one_by_one(model, x, monkeypatch), atol=1e-5)
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_of_plain_pytorch_are_one_by_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    with torch.no_grad():
        assert small().to(dtype)(images(dtype)).dtype == dtype
    assert seen == [False]


def test_frozen_blocks_while_gradients_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear probe: only the head learns."""
    model, x = small(global_pool="avg").train(), images()
    model.requires_grad_(False).head.requires_grad_(True)
    seen = calls(monkeypatch)
    for _ in range(2):
        model(x).sum().backward()
    assert seen == [True, True]
    wanted = model.head.weight.grad.clone() / 2
    model.zero_grad()
    model.blocks[1].mlp.fc1.weight.requires_grad_(True)
    model(x).sum().backward()
    assert seen == [True, True, False]
    assert torch.allclose(model.head.weight.grad, wanted, rtol=1e-4, atol=1e-6)
    assert model.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0
    model.requires_grad_(False)
    x = x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("drop", [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.5}, {"attn_drop_rate": 0.5}])
def test_frozen_blocks_that_drop_are_one_by_one(drop: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(**drop).train().requires_grad_(False), images()
    seen = calls(monkeypatch)
    assert not torch.equal(model(x), model(x))
    assert seen == [False, False]


def test_gradients_and_masks_are_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), images()
    seen = calls(monkeypatch)
    model(x).sum().backward()
    with torch.no_grad():
        model(x, key_padding_mask=torch.zeros(2, 16, dtype=torch.bool))
    assert not any(seen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", ["all tokens", "first token"])
@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.1, "qkv_bias": False},
        {"embed_dim": 66, "num_heads": 3},  # q ends inside a block of packed outputs
        {"mlp_layer": "swiglu_packed", "embed_dim": 128, "num_heads": 2},
        {"rope_type": "dinov3", "rope_rotate_half": True, "reg_tokens": 4},
    ],
)
def test_in_8_bits(options: dict, last: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(precision="int8", **options).to(dtype), images(dtype)
    call = model if last == "first token" else model.forward_features
    exact = copy.deepcopy(model).double()
    exact.set_precision("float")
    with torch.no_grad():
        truth = exact(x.double()) if last == "first token" else exact.forward_features(x.double())
    expected = one_by_one(call, x, monkeypatch)
    seen = calls(monkeypatch)
    with torch.no_grad():
        first = call(x)
        if last == "all tokens":
            assert torch.equal(first, expected)
        assert (first - truth).norm() <= 1.5 * (expected - truth).norm()
        for name in ("attn.proj.weight", "mlp.fc2.bias", "norm1.weight"):
            model.blocks[1].get_parameter(name).mul_(1.5)
            second = call(x)
            assert not torch.equal(second, first)
            if last == "all tokens":
                assert torch.equal(second, one_by_one(call, x, monkeypatch))
            first = second
        model.set_precision("float")
        assert not torch.equal(call(x), first)
        model.set_precision("int8")
        assert torch.equal(call(x), first)
        weight_cache.limit_bytes(0)
        assert (call(x) - first).norm() <= 0.05 * first.norm()
    assert seen.count(False) <= 2
    assert seen[:4] == [True] * 4


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qkv_bias": False}, {"mlp_layer": "swiglu"}])
def test_autocast_keeps_the_weights_in_its_dtype(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as when they are cast at every call; changes of weights and of autocast itself are seen."""
    skip_unless_available("norm_attention", "cpu", torch.bfloat16)
    if torch.bfloat16 not in CpuKernels().own_dtypes:
        pytest.skip("products in bf16 are oneDNN's on this CPU")
    model, x = small(**options), images()
    with torch.no_grad():
        in_fp32 = model.forward_features(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = one_by_one(model.forward_features, x, monkeypatch)
            seen = calls(monkeypatch)
            assert torch.equal(model.forward_features(x), expected)
            kept = weight_cache.size_bytes()
            assert torch.equal(model.forward_features(x), expected)
            assert weight_cache.size_bytes() == kept
            for name in ("attn.proj.weight", "mlp.fc2.bias", "norm1.bias"):
                model.blocks[1].get_parameter(name).mul_(1.5)
                changed = model.forward_features(x)
                assert not torch.equal(changed, expected)
                expected = one_by_one(model.forward_features, x, monkeypatch)
                assert torch.equal(changed, expected)
            weight_cache.limit_bytes(0)
            assert torch.equal(model.forward_features(x), expected)
        assert seen == [True, True, True, True, True, False]
        weight_cache.limit_bytes(None)
        assert not torch.equal(model.forward_features(x), in_fp32)
        assert (model.forward_features(x) - one_by_one(model.forward_features, x, monkeypatch)).abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"mlp_layer": "swiglu_packed"},
        {"mlp_layer": "swiglu"},
        {"qkv_layout": "separate"},
        {"qkv_layout": "separate", "qkv_bias": False, "mlp_layer": "swiglu", "block": "eva"},
        {"qkv_layout": "split_bias", "block": "eva", "init_values": 0.1},
        {"rope_type": "cat", "rope_rotate_half": False},
        {"rope_type": "dinov3", "rope_rotate_half": True, "reg_tokens": 4, "embed_dim": 192, "num_heads": 6},
        {"rope_type": "dinov3", "rope_rotate_half": True, "embed_dim": 120, "num_heads": 6},
    ],
)
def test_gates_projections_and_rotations(options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(**options).to(dtype), images(dtype)
    seen = calls(monkeypatch)
    with torch.no_grad():
        first = model.forward_features(x)
        assert torch.equal(first, one_by_one(model.forward_features, x, monkeypatch))
        for p in model.blocks[2].parameters():  # each is looked at, alone or as a part of a joined one
            p.mul_(2)
            second = model.forward_features(x)
            assert not torch.equal(second, first)
            assert torch.equal(second, one_by_one(model.forward_features, x, monkeypatch))
            first = second
    assert set(seen) == {True}


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m.blocks[1].mlp.fc1.weight.mul_(2),
    "a bias in place": lambda m: m.blocks[0].attn.qkv.bias.add_(1),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "a new parameter": lambda m: setattr(
        m.blocks[0].attn.proj, "weight", nn.Parameter(m.blocks[0].attn.proj.weight * 3)
    ),
    ".data": lambda m: setattr(m.blocks[0].norm1.weight, "data", m.blocks[0].norm1.weight * 2),
    "all of .data": lambda m: m.blocks[1].mlp.fc2.weight.data.mul_(0.5),
    "another dtype and back": lambda m: m.half().float(),
    "another layer scale": lambda m: m.blocks[0].ls1.gamma.mul_(-1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES)
def test_changed_weights_are_seen(write: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(init_values=0.1).to(dtype), images(dtype)
    with torch.no_grad():
        before = model.forward_features(x)
        WRITES[write](model)
        model.to(dtype)
        after = model.forward_features(x)
        assert torch.equal(after, one_by_one(model.forward_features, x, monkeypatch))
    assert write == "another dtype and back" or not torch.equal(before, after)


def test_copies_and_files_leave_the_plan_behind() -> None:
    model, x = small(), images()
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other._stack is not model._stack
            assert torch.equal(other(x), expected)
            other.blocks[0].mlp.fc1.weight.mul_(2)
            assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)
    assert all("stack" not in key for key in model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_follow_the_limit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_available("norm_attention", "cpu", dtype)
    if dtype not in CpuKernels().own_dtypes:
        pytest.skip(f"products in {dtype} are oneDNN's on this CPU, which packs on its own")
    model, x = small().to(dtype), images(dtype)
    with torch.no_grad():
        expected = model(x)
        weights = [b for block in model.blocks for b in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
        assert weight_cache.size_bytes() >= sum(layer.weight.nbytes for layer in weights)
        weight_cache.limit_bytes(0)
        assert weight_cache.size_bytes() == 0
        assert torch.equal(model(x), expected)
        assert weight_cache.size_bytes() == 0
    assert calls(monkeypatch) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_made_in_inference_mode(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are ordinary ones: packed once, followed when they change, and good for training afterwards."""
    skip_unless_available("norm_attention", "cpu", dtype)
    x = images(dtype)
    with torch.inference_mode():
        model = small().to(dtype)
        assert not any(p.is_inference() for p in model.parameters())
        before = model(x)
        packed = weight_cache.size_bytes()
        assert packed > 0 or dtype not in CpuKernels().own_dtypes
        model.blocks[0].mlp.fc1.weight[0, 0] += 3.0
        after = model(x)
        assert weight_cache.size_bytes() == packed
    assert calls(monkeypatch) == []
    assert not torch.equal(before, after)
    model.train()(x.clone()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_number_of_parameters() -> None:
    x = torch.zeros(3, 8)
    with pytest.raises(RuntimeError, match="parameters has 2 tensors; needed: 18 for each block"):
        torch.ops.vitfast_C.blocks_forward(
            x, [x, x], 1, 1.0, 1e-6, "gelu", *NO_ROPE, torch.tensor([0, 3], dtype=torch.int32), 3, False, x.clone()
        )


def test_first_token_needs_images_of_one_length() -> None:
    x, nothing = torch.zeros(5, 8), torch.zeros(0)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="x has 5 rows, cu_seqlens 2 images, max_seqlen is 3"):
        torch.ops.vitfast_C.blocks_forward(
            x, [nothing] * 18, 1, 1.0, 1e-6, "gelu", *NO_ROPE, starts, 3, True, torch.empty(2, 8)
        )
    with pytest.raises(RuntimeError, match="qkv_weight has 0 rows"):
        torch.ops.vitfast_C.blocks_forward(
            x[:4],
            [nothing] * 18,
            1,
            1.0,
            1e-6,
            "gelu",
            *NO_ROPE,
            starts.clamp(max=4)[[0, 0, 2]],
            2,
            True,
            torch.empty(2, 8),
        )
