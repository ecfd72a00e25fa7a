"""Whole models, forward pass: ours beside everyone who runs the same architecture on the same weights and images.

The weights start in the largest common ground (transformers' model where it is installed and has the architecture) and are
copied into all others; vectors that would start at zero get random values, so that every term counts.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.models.layouts import from_hugging_face, from_torchvision
from vitfast.models.reference import reference_forward
from vitfast.models.registry import create_model
from vitfast.models.table import CONFIGS
from vitfast.models.vit import VisionTransformer

from .graph_runtimes import graph_runtimes
from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import attempt, compiled, installed
from .presets import along, distinct

OPS = ("model",)
PEERS = ("timm", "torchvision", "transformers", "onnxruntime", "openvino")
DEFAULTS: dict[str, int | str] = {"model": "vit_base_patch16_224", "B": 8}
# Axes that replace the named model's own: tokens (so the image's side), width (heads of 64), number of blocks.
OPTIONAL: dict[str, int | str] = {"L": 197, "D": 768, "depth": 12}
_HEAD_DIM = 64
_TOKENS = (197, 577, 1025, 2305, 4097)  # images of 224, 384, 512, 768 and 1024 pixels in patches of 16
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{"model": "vit_tiny_patch16_224", "B": 4}],
    "overview cuda": [{"B": 64}],
    "cpu": [
        {"model": "vit_small_patch16_224"},
        {"B": 8},
        {"model": "vit_tiny_patch16_224", "B": 1},
        {"model": "vit_small_patch16_224", "B": 1},
    ],
    "cuda": [
        {"B": 256},
        {"B": 1},
        {"model": "vit_small_patch16_224", "B": 512},
        {"model": "vit_large_patch16_224", "B": 64},
    ],
    "growth": distinct(
        along("L", _TOKENS, {"model": "vit_tiny_patch16_224", "B": 1}),
        along("B", (1, 4, 16, 64), {"model": "vit_tiny_patch16_224"}),
        along("D", (192, 384, 768), {"model": "vit_tiny_patch16_224", "B": 1}),
        along("depth", (3, 12, 24), {"model": "vit_tiny_patch16_224", "B": 1}),
    ),
    "growth cuda": distinct(
        along("L", _TOKENS, {"model": "vit_base_patch16_224", "B": 8}),
        along("B", (1, 8, 64, 256, 512), {"model": "vit_base_patch16_224"}),
        along("D", (192, 384, 768, 1024, 1280), {"model": "vit_base_patch16_224", "B": 64}),
        along("depth", (3, 6, 12, 24, 48), {"model": "vit_base_patch16_224", "B": 64}),
    ),
    "dry": [{"model": "vit_tiny_patch16_224", "B": 1, "depth": 1}],
}
_GATE_SAMPLES = 2


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    return forward_case(op, shape, dtype, device, _providers, gate_samples=min(_GATE_SAMPLES, int(shape["B"])))


def forward_case(
    op: str,
    shape: dict[str, int | str],
    dtype: str,
    device: str,
    providers: Callable[[Models], list[Provider]],
    **gate: Any,
) -> Case:
    """A forward pass of one architecture by ``providers``; ``gate``: what Case takes beside."""
    models = Models(shape, dtype, device)
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=lambda: {"images": models.images()},
        grads=(),
        reference=models.reference,
        truth_of=models.reference,
        providers=functools.partial(providers, models),
        work={"forward": forward_work(models.ours.config, models.batch, TORCH_DTYPE[dtype].itemsize)},
        batched=("images",),
        timing="host",
        **gate,
    )


class Models:
    """One architecture's weights in every library's model, made when first asked for.

    Attributes:
        ours: vitfast's model in the case's dtype, in eval mode.
        exact: a copy in fp64, for the truth.
    """

    def __init__(self, shape: dict[str, int | str], dtype: str, device: str) -> None:
        self.name, self.batch = str(shape["model"]), int(shape["B"])
        self.overrides = overrides_of(shape)
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

        # DINOv3's and SigLIP's names have no head in timm; ours has one
        model = timm.create_model(self.name, num_classes=self.ours.config.num_classes, **self.overrides)
        model.load_state_dict(self.weights)
        return self.place(model)

    def torchvision(self) -> nn.Module:
        """For architectures that ``plain_vit`` knows; torchvision has no others."""
        from torchvision.models import VisionTransformer as Theirs

        config = self.ours.config
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


def check(shape: Mapping[str, int | str]) -> None:
    """Raise ValueError for a case that ``case`` would only refuse once it has made a model."""
    name = str(shape["model"])
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=1)
        raise ValueError(f"model is {name!r}; allowed: a Vision Transformer's" + (f", as {near[0]!r}" if near else ""))
    overrides_of(shape)


def overrides_of(shape: Mapping[str, int | str]) -> dict[str, Any]:
    """What L, D and depth mean for ``create_model``. Raises ValueError where no model has that size."""
    found: dict[str, Any] = {}
    if "depth" in shape:
        found["depth"] = int(shape["depth"])
    if "D" in shape:
        D = int(shape["D"])
        if D % _HEAD_DIM:
            raise ValueError(f"D is {D}; allowed: multiples of {_HEAD_DIM}, the width of a head")
        found |= {"embed_dim": D, "num_heads": D // _HEAD_DIM}
    if "L" in shape:
        config = CONFIGS.get(str(shape["model"]))
        prefix, patch = (config.num_prefix_tokens, config.patch_size) if config is not None else (1, 16)
        L = int(shape["L"])
        grid = math.isqrt(max(L - prefix, 0))
        if not grid or grid * grid + prefix != L:
            raise ValueError(f"L is {L}; allowed: {prefix} more than a square, as {prefix + 14**2} or {prefix + 24**2}")
        found["img_size"] = grid * patch
    return found


def plain_vit(config: Any) -> bool:
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
    if not installed("transformers") or not plain_vit(ours.config):
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
    found = [
        Provider("vitfast", of_model(models.ours), ours=True, directions=forward),
        Provider("vitfast torch.compile", compiled(of_model(models.ours)), ours=True, directions=forward, slow=True),
        Provider("pytorch eager", models.reference, directions=forward),
    ]
    label = "torch.compile freezing" if models.device == "cpu" else "torch.compile"
    source: Callable[..., Tensor] = models.reference
    if installed("timm"):
        timm = attempt("timm", lambda: Provider("timm", of_model(models.timm()), directions=forward))
        found.append(timm)
        source, label = timm.run, f"timm {label}"
    # freezing folds and packs the weights; without it the CPU's compiled model is slower than it has to be
    ways: dict[str, bool | str] = {"freezing": True} if models.device == "cpu" else {}
    searched = torch._inductor.list_mode_options("max-autotune")  # type: ignore[attr-defined]
    found.append(Provider(label, compiled(source, options=ways), directions=forward))
    best = compiled(source, options=searched | ways)
    found.append(Provider(f"{label} max-autotune", best, directions=forward, slow=True))
    if installed("torchvision") and plain_vit(models.ours.config):
        found.append(
            attempt("torchvision", lambda: Provider("torchvision", of_model(models.torchvision()), directions=forward))
        )
    if models.hugging_face is not None:
        hugging_face = models.place(models.hugging_face)
        found.append(Provider("transformers", lambda images: hugging_face(images).logits, directions=forward))
    if models.device == "cpu" and installed("timm") and installed("onnx"):
        found += graph_runtimes(models)
    return found


def of_model(model: nn.Module) -> Callable[..., Tensor]:
    """A provider's call of a model."""
    return lambda images: model(images)
