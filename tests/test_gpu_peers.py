"""Callers of libraries that only install beside a GPU, held to stand-ins with the same signatures on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.benchmarks import bench_attention, bench_layer_norm, bench_mlp, gpu_peers, peers
from vitfast.benchmarks.harness import Case, Provider

D, HIDDEN, EPS = 32, 64, 1e-6
torch_sdpa = F.scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All [B, L, H, E], as flash-attn and xFormers have it."""
    return torch_sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        attention_dropout: float,
        attn_mask_type: str,
        qkv_format: str,
    ) -> None:
        super().__init__()
        assert (attention_dropout, attn_mask_type, qkv_format) == (0.0, "no_mask", "bshd")
        self.shape = num_attention_heads, kv_channels

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        assert query_layer.shape[2:] == self.shape
        return attend(query_layer, key_layer, value_layer).flatten(2)


class LayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape: int, *, eps: float, device: str, dtype: torch.dtype) -> None:
        super().__init__(normalized_shape, eps, dtype=dtype)


class LayerNormMLP(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        eps: float,
        bias: bool,
        activation: str,
        params_dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        assert bias
        assert activation == "gelu"
        shapes = {
            "layer_norm_weight": (hidden_size,),
            "layer_norm_bias": (hidden_size,),
            "fc1_weight": (ffn_hidden_size, hidden_size),
            "fc1_bias": (ffn_hidden_size,),
            "fc2_weight": (hidden_size, ffn_hidden_size),
            "fc2_bias": (hidden_size,),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.full(shape, float("nan"), dtype=params_dtype)))
        self.eps = eps

    def forward(self, inp: Tensor) -> Tensor:
        normed = F.layer_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        hidden = F.gelu(F.linear(normed, self.fc1_weight, self.fc1_bias), approximate="tanh")
        return F.linear(hidden, self.fc2_weight, self.fc2_bias)


class LigerLayerNormFunction:
    @staticmethod
    def apply(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
        return F.layer_norm(X, X.shape[-1:], W, B, eps)


def layernorm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    assert x.dim() == 2
    assert bias is not None
    assert weight.dtype == bias.dtype == torch.float32
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn": {"flash_attn_qkvpacked_func": lambda qkv: attend(*qkv.unbind(2))},
    "flash_attn.cute": {"flash_attn_func": lambda q, k, v: (attend(q, k, v), None)},
    "flash_attn_interface": {"flash_attn_qkvpacked_func": lambda qkv: (attend(*qkv.unbind(2)), None)},
    "xformers": {},
    "xformers.ops": {"memory_efficient_attention": attend},
    "liger_kernel": {},
    "liger_kernel.ops": {},
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
    "quack": {},
    "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd},
    "transformer_engine": {},
    "transformer_engine.pytorch": {
        "DotProductAttention": DotProductAttention,
        "LayerNorm": LayerNorm,
        "LayerNormMLP": LayerNormMLP,
    },
}
ATTENTION = {"flash-attn 2", "flash-attn 3", "flash-attn 4", "xFormers", "TransformerEngine"}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, content in STAND_INS.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu_peers, "installed", lambda module: module in STAND_INS)
    monkeypatch.setattr(peers, "installed", lambda module: module in STAND_INS)
    return


def assert_right(case: Case, providers: list[Provider], tolerance: float) -> None:
    """Result and every gradient are those of the case's reference."""
    inputs = case.inputs()
    for provider in providers:
        results = []
        for run in (case.reference, provider.run):
            leaves = {n: t.clone().requires_grad_(n in case.grads) for n, t in inputs.items() if t is not None}
            with torch.set_grad_enabled("both" in provider.directions):
                out = run(**leaves)
            grads = []
            if "both" in provider.directions:
                grads = list(torch.autograd.grad(out.sum(), [leaves[n] for n in case.grads]))
            results.append([out, *grads])
        for expected, found in zip(*results, strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("stand_ins")
def test_attention() -> None:
    case = bench_attention.case("attention", {"B": 2, "L": 5, "H": 3, "E": 8}, "float32", "cpu")
    found = gpu_peers.attention_peers(3, 8)
    assert {provider.name for provider in found} == ATTENTION
    assert_right(case, found, 1e-5)


@pytest.mark.usefixtures("stand_ins")
def test_layer_norm() -> None:
    case = bench_layer_norm.case("layer_norm", {"B": 2, "L": 3, "D": D}, "float32", "cpu")
    found = gpu_peers.layer_norm_peers(D, EPS, torch.float32)
    assert {p.name: p.directions for p in found} == {
        "Liger": ("forward", "backward", "both"),
        "quack": ("forward",),
        "TransformerEngine": ("forward", "backward", "both"),
    }
    assert_right(case, found, 1e-5)


@pytest.mark.usefixtures("stand_ins")
def test_norm_mlp() -> None:
    case = bench_mlp.case("norm_mlp", {"B": 2, "L": 3, "D": D, "F": HIDDEN}, "float32", "cpu")
    found = gpu_peers.norm_mlp_peers(D, HIDDEN, EPS, torch.float32)
    assert [provider.name for provider in found] == ["TransformerEngine"]
    assert_right(case, found, 2e-2)  # the tanh approximation


@pytest.mark.usefixtures("stand_ins")
def test_what_is_installed_is_not_absent() -> None:
    assert peers.absent(bench_attention.PEERS, "cuda") == []
    assert {entry["reason"] for entry in peers.absent(bench_attention.PEERS, "cpu")} == {"needs a CUDA GPU"}


@pytest.mark.usefixtures("stand_ins")
def test_another_version_costs_only_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 alone makes a package `flash_attn` in which version 2's function is missing."""
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func")
    found = {provider.name: provider for provider in gpu_peers.attention_peers(3, 8)}
    assert set(found) == ATTENTION
    with pytest.raises(ImportError, match="flash_attn_qkvpacked_func"):
        found["flash-attn 2"].run(qkv=torch.zeros(1, 2, 3, 3, 8))


def test_nobody_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "installed", lambda module: False)
    assert gpu_peers.attention_peers(3, 8) == []
    assert gpu_peers.layer_norm_peers(D, EPS, torch.float32) == []
    assert gpu_peers.norm_mlp_peers(D, HIDDEN, EPS, torch.float32) == []
