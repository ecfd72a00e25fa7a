"""Accelerated models inside PyTorch: transforms, compile, export, DDP and FSDP."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_checks import DINOV3, HF, HF_DINOV3, TORCHVISION, VIT, Calls, assert_same_step, error, pair, run, step
from torch import nn

import vitfast
from vitfast.benchmarks.architectures import NAMES


def test_functional_call_grad_vmap_and_forward_mode() -> None:
    original, model, inputs = pair(VIT)
    parameters = dict(original.named_parameters())

    def loss(p: dict[str, torch.Tensor], m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(m, p, (x,)).square().mean()

    ours = torch.func.grad(loss)(parameters, model, inputs["x"])
    theirs = torch.func.grad(loss)(parameters, original, inputs["x"])
    assert_same_step(ours, theirs)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))
    images = inputs["x"][:, None]
    for name, value in per_sample(parameters, original, images).items():
        torch.testing.assert_close(per_sample(parameters, model, images)[name], value)
        break
    tangent = torch.randn_like(inputs["x"])
    for block in (*model.blocks, *original.blocks):
        block.attn.fused_attn = False  # timm's other path: PyTorch's attention on the CPU has no forward mode
    with torch.autograd.forward_ad.dual_level():
        slopes = [
            torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(inputs["x"], tangent))).tangent
            for m in (model, original)
        ]
    assert error(slopes[0], slopes[1]) <= 1e-5


@pytest.mark.parametrize("name", [DINOV3, TORCHVISION, HF_DINOV3])
def test_compiles_to_one_graph(name: str) -> None:
    _, model, inputs = pair(name)
    torch.compiler.reset()
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ours = step(compiled, inputs)
    assert sum("vitfast.attention" in target for target in targets) == 2
    theirs = step(model, inputs)
    assert_same_step({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if "mae" not in n])
def test_every_architecture_compiles(name: str) -> None:
    _, model, inputs = pair(name)
    torch.compiler.reset()
    if "naflex" in name:
        pytest.skip("transformers reads the images' shapes out of a tensor")
    ours = run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert error(ours, run(model, inputs)) <= 1e-6


@pytest.mark.parametrize("name", [VIT, HF])
def test_exports_with_a_dynamic_batch(name: str) -> None:
    _, model, inputs = pair(name)
    (key, images), batch = next(iter(inputs.items())), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), inputs, dynamic_shapes={key: {0: batch}} if name == VIT else None)
    graph = program.module()
    assert any("vitfast" in str(node.target) for node in program.graph.nodes)
    sizes = (2, 5, 40) if name == VIT else (2,)
    for size in sizes:
        more = {key: torch.randn(size, *images.shape[1:])}
        assert error(run(graph, more), run(model, more)) <= 1e-5


def test_ddp_and_fsdp(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    original, model, inputs = pair(VIT)
    wanted = step(original, inputs)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        with Calls() as calls:
            ours = step(replicated, inputs)
        assert calls["attention"] == 2
        assert_same_step({name.removeprefix("module."): value for name, value in ours.items()}, wanted)

        mesh = distributed.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with Calls() as calls:
            sharded = step(model, inputs)
        assert calls["attention"] + calls["norm_mlp"] == 4
        full = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in sharded.items()}
        assert_same_step(full, wanted)
        with pytest.raises(ValueError, match=r"model was wrapped as FSDPVisionTransformer after accelerate"):
            vitfast.restore(model)
    finally:
        distributed.destroy_process_group()
