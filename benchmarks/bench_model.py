"""Whole models, forward pass: ours beside everyone who runs the same architecture on the same weights and images.

The weights start in the largest common ground (transformers' model where it is installed and has the architecture) and are
copied into all others; vectors that would start at zero get random values, so that every term counts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models.layouts import from_hugging_face, from_torchvision
from vitfast.models.reference import reference_forward
from vitfast.models.registry import create_model
from vitfast.models.vit import VisionTransformer

from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import compiled, installed

OPS = ("model",)
PEERS = ("timm", "torchvision", "transformers", "onnxruntime", "openvino")
DEFAULTS: dict[str, int | str] = {"model": "vit_base_patch16_224", "B": 8}
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{"model": "vit_tiny_patch16_224", "B": 4}],
    "overview cuda": [{"B": 64}],
    "cpu": [{"model": "vit_small_patch16_224"}, {"B": 8}],
    "cuda": [
        {"B": 256},
        {"B": 1},
        {"model": "vit_small_patch16_224", "B": 512},
        {"model": "vit_large_patch16_224", "B": 64},
    ],
    "growth": [{"model": "vit_tiny_patch16_224", "B": batch} for batch in (1, 2, 4, 8, 16)],
    "growth cuda": [{"B": batch} for batch in (1, 8, 64, 256, 512)],
    "dry": [{"model": "vit_tiny_patch16_224", "B": 1, "depth": 1}],
}
_GATE_SAMPLES = 2
_QUIET = ("torch.onnx", "onnxscript", "transformers", "openvino")


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    models = Models(shape, dtype, device)
    kind = TORCH_DTYPE[dtype]
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=lambda: {"images": models.images()},
        grads=(),
        reference=models.reference,
        truth_of=models.reference,
        providers=functools.partial(_providers, models),
        work={"forward": forward_work(models.ours.config, models.batch, kind.itemsize)},
        batched=("images",),
        gate_samples=min(_GATE_SAMPLES, models.batch),
        timing="host",
    )


class Models:
    """One architecture's weights in every library's model, made when first asked for.

    Attributes:
        ours: vitfast's model in the case's dtype, in eval mode.
        exact: a copy in fp64, for the truth.
    """

    def __init__(self, shape: dict[str, int | str], dtype: str, device: str) -> None:
        self.name, self.batch = str(shape["model"]), int(shape["B"])
        self.overrides: dict[str, Any] = {"depth": int(shape["depth"])} if "depth" in shape else {}
        self.device, self.kind = device, TORCH_DTYPE[dtype] if dtype != "autocast" else torch.float32
        torch.manual_seed(0)
        ours = create_model(self.name, **self.overrides)
        if not isinstance(ours, VisionTransformer):
            raise ValueError(f"model is {self.name!r}; the benchmarks run Vision Transformers only")
        self.ours: VisionTransformer = ours
        self.hugging_face = _hugging_face(self.ours)
        if self.hugging_face is not None:
            self.ours.load_state_dict(from_hugging_face(self.hugging_face.state_dict()))
        else:
            _fill(self.ours)
        self.weights = {n: t.clone() for n, t in self.ours.state_dict().items()}
        self.ours = self.place(self.ours)
        self.exact: VisionTransformer = copy.deepcopy(self.ours).double()  # of the rounded weights

    def place(self, model: nn.Module) -> Any:
        """To the device, in the case's dtype, in eval mode."""
        return model.to(self.device, self.kind).eval()

    def images(self) -> Tensor:
        """[B, C, height, width], normalised floats."""
        height, width = self.ours.config.image_hw
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, self.ours.config.in_chans, height, width, generator=generator)
        return images.to(self.device, self.kind)

    def reference(self, images: Tensor) -> Tensor:
        """Plain PyTorch on our parameters; in fp64 on the exact copy."""
        return reference_forward(self.exact if images.dtype == torch.float64 else self.ours, images)

    def fresh(self, recompute: str = "fused") -> VisionTransformer:
        """Another vitfast model with the same weights."""
        model = create_model(self.name, recompute=recompute, **self.overrides)
        model.load_state_dict(self.weights)
        return self.place(model)

    def timm(self) -> nn.Module:
        import timm

        model = timm.create_model(self.name, **self.overrides)
        model.load_state_dict(self.weights)
        return self.place(model)

    def torchvision(self) -> nn.Module | None:
        """None where torchvision has no such architecture."""
        from torchvision.models import VisionTransformer as Theirs

        config = self.ours.config
        if not _plain_vit(config):
            return None
        model = Theirs(
            image_size=config.image_hw[0],
            patch_size=config.patch_size,
            num_layers=config.depth,
            num_heads=config.num_heads,
            hidden_dim=config.embed_dim,
            mlp_dim=config.mlp_hidden,
            num_classes=config.num_classes,
        )
        for name, tensor in from_torchvision(model.state_dict()).items():  # the same storages under our names
            tensor.copy_(self.weights[name])
        return self.place(model)


def _plain_vit(config: Any) -> bool:
    """The paper's own architecture: what torchvision and transformers call ViT."""
    return (
        config.class_token
        and config.global_pool == "token"
        and config.reg_tokens == 0
        and not config.no_embed_class
        and not config.pre_norm
        and config.init_values is None
        and config.qkv_bias
        and config.activation == "gelu"
        and config.representation_size is None
        and config.image_hw[0] == config.image_hw[1]
    )


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random values where a vector starts at a constant: biases, tokens, LayerScale."""
    for parameter in model.parameters():
        if parameter.dim() <= 1 or float(parameter.std()) < 1e-4:
            parameter.add_(torch.randn_like(parameter) * 0.02)


def _hugging_face(ours: VisionTransformer) -> Any:
    """transformers' model of this architecture, random weights; None where it is not installed or has no such model."""
    if not installed("transformers") or not _plain_vit(ours.config):
        return None
    from transformers import ViTConfig, ViTForImageClassification

    config = ours.config
    settings: dict[str, Any] = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_hidden,
        "image_size": config.image_hw[0],
        "patch_size": config.patch_size,
        "num_labels": config.num_classes,
        "layer_norm_eps": config.norm_eps,
    }
    model = ViTForImageClassification(ViTConfig(**settings))
    _fill(model)
    return model


def forward_work(config: Any, B: int, element: int) -> list[Work]:
    """The parts of one forward pass, each with its own floor: nothing overlaps across a matrix product's border.

    Per block: qkv (norm in front), attention, projection + residual, fc1 (norm in front, GELU behind), fc2 + residual.
    Token tensors move once in and once out; LayerNorm reads what the product's epilogue cannot hold once more.
    """
    D, F = config.embed_dim, config.mlp_hidden
    height, width = (side // config.patch_size for side in config.image_hw)
    N = height * width
    L = N + config.num_prefix_tokens
    token, K = B * L * D * element, config.in_chans * config.patch_size**2

    def product(inner: int, outer: int, extra: int = 0) -> Work:
        T = B * L
        return Work((T * inner + T * outer + inner * outer) * element + extra, 2 * T * inner * outer)

    norm = Work(2 * token, 8 * B * L * D)
    block = [
        norm,
        product(D, 3 * D),
        Work(4 * token, 4 * B * L * L * D),
        product(D, D, extra=token),
        norm,
        product(D, F),
        product(F, D, extra=token),
    ]
    embed = Work(B * N * K * element + token + K * D * element, 2 * B * N * K * D)
    head = Work((D * config.num_classes + B * (D + config.num_classes)) * element, 2 * B * D * config.num_classes)
    return [embed, *block * config.depth, norm, head]


def _providers(models: Models) -> list[Provider]:
    forward = ("forward",)
    low_bits = models.kind != torch.float32
    found = [
        Provider("vitfast", _of(models.ours), ours=True, directions=forward),
        Provider("vitfast torch.compile", compiled(_of(models.ours)), ours=True, directions=forward, slow=True),
        Provider("pytorch eager", models.reference, directions=forward),
    ]
    compile_options = {"options": {"freezing": True}} if models.device == "cpu" else {}
    label = "torch.compile freezing" if models.device == "cpu" else "torch.compile"
    source: Callable[..., Tensor] = models.reference
    if installed("timm"):
        timm_model = models.timm()
        found.append(Provider("timm", _of(timm_model), directions=forward))
        source, label = _of(timm_model), f"timm {label}"
    found.append(Provider(label, compiled(source, **compile_options), directions=forward))
    found.append(
        Provider(f"{label} max-autotune", compiled(source, mode="max-autotune"), directions=forward, slow=True)
    )
    if installed("torchvision") and (theirs := models.torchvision()) is not None:
        found.append(Provider("torchvision", _of(theirs), directions=forward))
    if models.hugging_face is not None:
        hugging_face = models.place(models.hugging_face)
        found.append(Provider("transformers", lambda images: hugging_face(images).logits, directions=forward))
    if models.device == "cpu" and installed("timm") and installed("onnx"):
        found += _graph_runtimes(models, low_bits)
    return found


def _of(model: nn.Module) -> Callable[..., Tensor]:
    return lambda images: model(images)


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


def _graph_runtimes(models: Models, low_bits: bool) -> list[Provider]:
    """ONNX Runtime (fp32) and OpenVINO (fp32, bf16) on timm's model, with as many threads as PyTorch."""
    import timm

    exported = timm.create_model(models.name, **models.overrides).eval()
    exported.load_state_dict(models.weights)
    images = models.images().float()
    found = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(exported, (images,), path, dynamo=False, opset_version=17)
        if installed("onnxruntime") and not low_bits:
            found.append(_onnx_runtime(path))
        if installed("openvino"):
            found.append(_openvino(path, low_bits))
    return found


def _onnx_runtime(path: str) -> Provider:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Provider("ONNX Runtime", _single(run), directions=("forward",), memory=False)


def _openvino(path: str, low_bits: bool) -> Provider:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if low_bits else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.numpy()])[0].copy())

    note = "fp32 images in, bf16 inside" if low_bits else ""
    return Provider("OpenVINO", _single(run), directions=("forward",), memory=False, note=note)


def _single(run: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """These runtimes take fp32 images; the exported graph is of one batch size."""
    return lambda images: run(images.detach().float().contiguous())
