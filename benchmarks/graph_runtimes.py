"""ONNX Runtime and OpenVINO on timm's model, as their own documentation sets them up for one request at a time on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .harness import Provider
from .peers import attempt, installed

if TYPE_CHECKING:
    from .bench_model import Models

_QUIET = ("torch.onnx", "onnxscript", "transformers", "openvino")
_OPSET = 17  # the first with LayerNormalization as one node
_FORWARD = ("forward",)


def graph_runtimes(models: Models, int8: bool = False) -> list[Provider]:
    """ONNX Runtime (fp32 only) and OpenVINO (fp32, bf16), each with as many threads as PyTorch has now.

    int8: ONNX Runtime multiplies 8-bit integers, with numbers in fp32 around them.
    """
    low_bits = models.kind != torch.float32
    wanted: dict[str, Callable[[bytes, bool], Provider]] = {}
    if installed("onnxruntime") and int8:
        wanted["ONNX Runtime int8"] = _onnx_runtime_int8
    elif installed("onnxruntime") and not low_bits:
        wanted["ONNX Runtime"] = _onnx_runtime
    if installed("openvino"):
        wanted["OpenVINO"] = _openvino
    if not wanted:
        return []
    exported = functools.partial(_exported, models)
    return [
        attempt(name, functools.partial(_made, make, exported, low_bits), directions=_FORWARD)
        for name, make in wanted.items()
    ]


def _made(make: Callable[[bytes, bool], Provider], exported: Callable[[], bytes], low_bits: bool) -> Provider:
    with _quiet():
        return make(exported(), low_bits)


_LAST: dict[tuple[Any, ...], bytes] = {}  # the last exported model: the same case comes again in the next dtype


def _exported(models: Models) -> bytes:
    """timm's model as ONNX with fixed sizes, in fp32: what the runtimes start from in every precision."""
    import timm

    key = (models.name, models.batch, tuple(sorted(models.overrides.items())))
    if key not in _LAST:
        _LAST.clear()
        model = timm.create_model(models.name, **models.overrides).eval()
        model.load_state_dict(models.weights)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, (models.images().float(),), str(path), dynamo=False, opset_version=_OPSET)
            _LAST[key] = path.read_bytes()
    return _LAST[key]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' chatter, which would break the progress bar."""
    levels = {name: logging.getLogger(name).level for name in _QUIET}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _onnx_runtime(model: bytes, low_bits: bool) -> Provider:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL

    def fresh() -> Callable[..., Tensor]:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return _single(lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]))

    return Provider("ONNX Runtime", fresh(), directions=_FORWARD, fresh=fresh)


def _onnx_runtime_int8(model: bytes, low_bits: bool) -> Provider:
    """ONNX Runtime's dynamic quantisation of linear layers; with a scale for each output it takes the same time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, rounded = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        plain.write_bytes(model)
        types = ["MatMul", "Gemm"]
        quantize_dynamic(plain, rounded, op_types_to_quantize=types, per_channel=True, weight_type=QuantType.QInt8)
        made = _onnx_runtime(rounded.read_bytes(), low_bits)
    return dataclasses.replace(made, name="ONNX Runtime int8", note="fp32 around the integers")


def _openvino(model: bytes, low_bits: bool) -> Provider:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if low_bits else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)

    def run(request: Any, images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.numpy()])[0].copy())

    def fresh() -> Callable[..., Tensor]:
        """The request is made in the call: it holds the memory of what is computed."""
        return _single(lambda images: run(compiled.create_infer_request(), images))

    request = compiled.create_infer_request()
    note = "fp32 images in, bf16 inside" if low_bits else ""
    return Provider("OpenVINO", _single(functools.partial(run, request)), directions=_FORWARD, fresh=fresh, note=note)


def _single(run: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """These runtimes take fp32 images; the exported graph is of one batch size."""
    return lambda images: run(images.detach().float().contiguous())
