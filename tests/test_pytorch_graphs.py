"""Graphs of a model: torch.compile, torch.export, AOTInductor, ONNX and torch.jit.trace, held to the plain model's numbers."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from pytorch_checks import OURS_FIRST, assert_same_step, images, pair, rel, step
from torch._dynamo.testing import CompileCounterWithBackend

BATCH = torch.export.Dim("batch", min=1, max=64)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()  # otherwise tests share the recompile limit


@pytest.mark.parametrize("kind", OURS_FIRST)
def test_compile_forward_and_training_step(kind: str) -> None:
    model, plain = pair(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the graphs of a real compile, uncompiled
    with torch.no_grad():
        assert rel(compiled(images()), plain(images())) <= 1e-5
    assert_same_step(step(model.train(), images(), compiled), step(plain.train(), images()))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", OURS_FIRST)
def test_one_compilation_serves_every_batch_size(kind: str, training: bool) -> None:
    model, plain = pair(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(training), fullgraph=True, backend=counter)
    with torch.set_grad_enabled(training):
        for batch in (3, 2, 5):
            x = images(batch)
            torch._dynamo.mark_dynamic(x, 0)
            assert rel(compiled(x), plain(x)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.slow
def test_batch_sizes_without_a_hint_compile_twice() -> None:
    model, plain = pair()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (3, 2, 5, 8):
        assert rel(compiled(images(batch)), plain(images(batch))) <= 1e-5
    assert counter.frame_count == 2  # the first size as a number, then any


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS_FIRST)
def test_inductor(kind: str) -> None:
    model, plain = pair(kind)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert rel(compiled(images()), plain(images())) <= 1e-5
    assert_same_step(step(model.train(), images(), compiled), step(plain.train(), images()))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", OURS_FIRST)
def test_export_with_a_dynamic_batch(kind: str, grad: bool) -> None:
    model, plain = pair(kind)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},))
        assert any(str(node.target).startswith("vitfast.") for node in program.graph.nodes)  # our ops are in the graph
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        for batch in (1, 2, 5):
            assert rel(loaded(images(batch)), plain(images(batch))) <= 1e-5


def test_export_with_one_batch_size() -> None:
    model, plain = pair()
    program = torch.export.export(model, (images(),))
    assert rel(program.module()(images(2, seed=3)), plain(images(2, seed=3))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_aot_inductor_package(kind: str, tmp_path: Any) -> None:
    """The package calls our ops by name: whoever loads it in Python has imported vitfast.ops first."""
    model, plain = pair(kind)
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: BATCH},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "vit.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for batch in (1, 2, 5):
            assert rel(run(images(batch)), plain(images(batch))) <= 1e-5


def onnx_result(path: Any, x: torch.Tensor, norms: int) -> torch.Tensor:
    """ONNX Runtime's result, after checking that the file has ONNX's own operators only."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert not graph.functions
    kinds = Counter(node.op_type for node in graph.graph.node)
    # Whole operators, which runtimes have kernels for, not their arithmetic; in our last block one for the class token.
    assert kinds["LayerNormalization"] == norms
    assert kinds["Softmax"] == kinds["Gelu"] == 2
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


@pytest.mark.parametrize(
    ("kind", "dynamo"),
    [
        ("ours", True),
        ("ours", False),  # the exporter over TorchScript; timm's own rotary models do not pass it
        pytest.param("timm", True, marks=pytest.mark.slow),
        pytest.param("transformers", True, marks=pytest.mark.slow),
    ],
)
def test_onnx(kind: str, dynamo: bool, tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    model, plain = pair(kind)
    path = tmp_path / "vit.onnx"
    batch: dict[str, Any]
    if dynamo:
        batch = {"dynamic_shapes": ({0: BATCH},)}
    else:
        batch = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own: deprecations, constants met while tracing
        torch.onnx.export(model, (images(),), str(path), dynamo=dynamo, opset_version=20, verbose=False, **batch)
    for size in (2, 5):
        with torch.no_grad():
            assert rel(onnx_result(str(path), images(size), 6 if kind == "ours" else 5), plain(images(size))) <= 1e-5
    with torch.no_grad():  # and the model runs its own ops again
        assert rel(model(images()), plain(images())) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_records_the_ops_by_name() -> None:
    model, plain = pair()
    with torch.no_grad():
        traced = torch.jit.trace(model, (images(),))
        assert "vitfast::norm_attention" in str(traced.inlined_graph)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        assert rel(torch.jit.load(buffer)(images(2, seed=3)), plain(images(2, seed=3))) <= 1e-5
