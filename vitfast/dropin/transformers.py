"""transformers' vision encoders: ViT, DeiT, ViTMAE, DINOv2 (with registers), DINOv3-ViT, SigLIP, SigLIP2, CLIP.

The fast classes are made on first use, one for each layer class, and found by their name when a model is unpickled.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitfast.dropin import fast
from vitfast.dropin.adapter import Adapter
from vitfast.dropin.fused import Context
from vitfast.dropin.parts import (
    Mode,
    assemble,
    has_hooks,
    is_training,
    layer_norm,
    linear,
    may_run,
    why_dropout,
    why_hooked,
    why_not_activation,
    why_not_call,
    why_not_identity,
)
from vitfast.layers.halves import AttentionHalf, Draw, MlpHalf
from vitfast.ops import Rope


class Layout(NamedTuple):
    """Where a layer class keeps its parts. ``prefix`` begins the names of the classes beside it in its file."""

    folder: str
    prefix: str
    attention: str
    norms: tuple[str, str]
    out: str = "o_proj"
    mlp: tuple[str, str, str] = ("fc1", "activation_fn", "fc2")
    scales: tuple[str, str] | None = None


_VIT = ("attention", ("layernorm_before", "layernorm_after"))
_DINO = ("attention", ("norm1", "norm2"))
_CLIP = ("self_attn", ("layer_norm1", "layer_norm2"), "out_proj")
_SCALES = ("layer_scale1", "layer_scale2")
LAYOUTS = {
    "ViTLayer": Layout("vit", "ViT", *_VIT),
    "DeiTLayer": Layout("deit", "DeiT", *_VIT),
    "ViTMAELayer": Layout("vit_mae", "ViTMAE", *_VIT),
    "Dinov2Layer": Layout("dinov2", "Dinov2", *_DINO, scales=_SCALES),
    "Dinov2WithRegistersLayer": Layout("dinov2_with_registers", "Dinov2WithRegisters", *_DINO, scales=_SCALES),
    "DINOv3ViTLayer": Layout("dinov3_vit", "DINOv3ViT", *_DINO, mlp=("up_proj", "act_fn", "down_proj"), scales=_SCALES),
    "SiglipEncoderLayer": Layout("siglip", "Siglip", *_CLIP),
    "Siglip2EncoderLayer": Layout("siglip2", "Siglip2", *_CLIP),
    "CLIPEncoderLayer": Layout("clip", "CLIP", *_CLIP),
}
# (folder, class): children that are replaced one by one
CHILDREN = {
    ("vit", "ViTPatchEmbeddings"): ("projection",),
    ("deit", "DeiTPatchEmbeddings"): ("projection",),
    ("vit_mae", "ViTMAEPatchEmbeddings"): ("projection",),
    ("dinov2", "Dinov2PatchEmbeddings"): ("projection",),
    ("dinov2_with_registers", "Dinov2WithRegistersPatchEmbeddings"): ("projection",),
    ("dinov3_vit", "DINOv3ViTEmbeddings"): ("patch_embeddings",),
    ("siglip", "SiglipVisionEmbeddings"): ("patch_embedding",),
    ("clip", "CLIPVisionEmbeddings"): ("patch_embedding",),
    ("vit", "ViTModel"): ("layernorm",),
    ("deit", "DeiTModel"): ("layernorm",),
    ("vit_mae", "ViTMAEModel"): ("layernorm",),
    ("vit_mae", "ViTMAEDecoder"): ("decoder_norm",),
    ("dinov2", "Dinov2Model"): ("layernorm",),
    ("dinov2", "Dinov2Backbone"): ("layernorm",),
    ("dinov2_with_registers", "Dinov2WithRegistersModel"): ("layernorm",),
    ("dinov2_with_registers", "Dinov2WithRegistersBackbone"): ("layernorm",),
    ("dinov3_vit", "DINOv3ViTModel"): ("norm",),
    ("dinov3_vit", "DINOv3ViTBackbone"): ("norm",),
    ("siglip", "SiglipVisionModel"): ("post_layernorm",),
    ("siglip", "SiglipVisionTransformer"): ("post_layernorm",),
    ("siglip2", "Siglip2VisionModel"): ("post_layernorm",),
    ("siglip2", "Siglip2VisionTransformer"): ("post_layernorm",),
    ("clip", "CLIPVisionModel"): ("pre_layrnorm",),
    ("clip", "CLIPVisionTransformer"): ("pre_layrnorm",),
}
LEFT = {
    ("siglip", "SiglipMultiheadAttentionPoolingHead"): "pooling: one query for each image",
    ("siglip2", "Siglip2MultiheadAttentionPoolingHead"): "pooling: one query for each image",
}
# Keywords that a layer passes on and that change nothing in it
HARMLESS = {"output_hidden_states", "return_dict", "num_items_in_batch", "interpolate_pos_encoding"}
# Implementations of attention that compute the same function; others are somebody's own
ATTENTIONS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
# What the layers' forward takes in the versions whose layers return a tensor
ARGUMENTS = {"self", "hidden_states", "attention_mask", "position_embeddings", "kwargs"}
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}


def _neighbour(layer: Any, *names: str) -> tuple[type, ...]:
    """The classes of these names in the file of a layer's original class."""
    kind = layer.original_class() if isinstance(layer, fast.Fast) else type(layer)
    home = sys.modules[kind.__module__]
    return tuple(getattr(home, name) for name in names if hasattr(home, name))


def attention_half(layer: Any, layout: Layout, mode: Mode) -> AttentionHalf | str:
    """The first norm, attention, LayerScale and DropPath of a layer; or why not."""
    attn = getattr(layer, layout.attention)
    reason = _why_not_attention(layout, attn, _neighbour(layer, f"{layout.prefix}Attention"))
    if reason is not None:
        return reason
    p = getattr(attn, "attention_dropout", getattr(attn, "dropout", 0.0))
    if p > 0.0 and is_training(attn, mode):
        return f"{layout.attention} drops with p={p} in training"
    gamma, draw = _branch(layer, layout, 0, mode)
    qkv = tuple(
        linear(f"{layout.attention}.{name}", getattr(attn, name, None)) for name in ("q_proj", "k_proj", "v_proj")
    )
    return assemble(
        AttentionHalf,
        norm=layer_norm(layout.norms[0], getattr(layer, layout.norms[0]), nn.LayerNorm),
        qkv=qkv,
        heads=_heads(attn),
        scale=attn.scaling if hasattr(attn, "scaling") else attn.scale,
        proj=linear(f"{layout.attention}.{layout.out}", getattr(attn, layout.out, None)),
        gamma=gamma,
        draw=draw,
    )


def _heads(attn: Any) -> int:
    return attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads


def mlp_half(layer: Any, layout: Layout, mode: Mode) -> MlpHalf | str:
    """The second norm, MLP, LayerScale and DropPath of a layer; or why not."""
    mlp = layer.mlp
    plain = _neighbour(layer, f"{layout.prefix}MLP")
    gated = _neighbour(layer, f"{layout.prefix}SwiGLUFFN", f"{layout.prefix}GatedMLP")
    reason = why_not_call("mlp", mlp, *plain, *gated)
    if reason is not None:
        return reason
    if type(mlp) in gated:
        names, act, last = ["gate_proj", "up_proj"], "act_fn", "down_proj"
    else:
        names, act, last = [layout.mlp[0]], layout.mlp[1], layout.mlp[2]
    kind = _activation(f"mlp.{act}", getattr(mlp, act, None))
    if kind.startswith("mlp."):
        return kind
    if type(mlp) in gated:
        kind = "swiglu" if kind == "silu" else f"gated {kind}"
    reason = why_not_activation(kind)
    if reason is not None:
        return reason
    gamma, draw = _branch(layer, layout, 1, mode)
    return assemble(
        MlpHalf,
        norm=layer_norm(layout.norms[1], getattr(layer, layout.norms[1]), nn.LayerNorm),
        fc1=tuple(linear(f"mlp.{name}", getattr(mlp, name, None)) for name in names),
        activation=kind,
        fc2=linear(f"mlp.{last}", getattr(mlp, last, None)),
        gamma=gamma,
        draw=draw,
    )


def _why_not_attention(layout: Layout, attn: Any, kinds: tuple[type, ...]) -> str | None:
    if type(attn) not in kinds:
        return f"{layout.attention} is {type(attn).__name__}"
    if "forward" in attn.__dict__ or (has_hooks(attn) and not _only_idle_recorders(attn)):
        return why_hooked(layout.attention, attn)
    return _why_not_implementation(attn)


def _why_not_implementation(attn: Any) -> str | None:
    """Somebody's own attention function; asked in every call, as ``set_attn_implementation`` changes no module."""
    implementation = _implementation(attn) or "eager"
    return None if implementation in ATTENTIONS else f"attn_implementation is {implementation!r}"


def _implementation(attn: Any) -> str | None:
    return getattr(getattr(attn, "config", None), "_attn_implementation", None)


def _only_idle_recorders(attn: nn.Module) -> bool:
    """Whether the only hooks are those that transformers leaves behind to collect attentions, and nobody collects now.

    After one call with ``output_hidden_states`` or ``output_attentions`` they stay on every attention module.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None or attn._forward_pre_hooks or attn._backward_hooks or attn._backward_pre_hooks:
        return False
    if any(getattr(hook, "__module__", "") != capturing.__name__ for hook in attn._forward_hooks.values()):  # type: ignore[union-attr]
        return False
    collected = collector.get()
    return collected is None or "attentions" not in collected


def _activation(name: str, module: Any) -> str:
    """The kind, or a text that starts with ``name``."""
    if type(module) is nn.GELU:
        kind = "gelu_tanh" if module.approximate == "tanh" else "gelu"
    elif type(module) is nn.SiLU:
        kind = "silu"
    elif type(module).__module__ == "transformers.activations" and type(module).__name__ in ACTIVATIONS:
        kind = ACTIVATIONS[type(module).__name__]
    else:
        return f"{name} is {type(module).__name__}"
    return why_hooked(name, module) or kind


def _branch(layer: Any, layout: Layout, index: int, mode: Mode) -> tuple[Tensor | str | None, Draw | str | None]:
    """LayerScale's factor and DropPath of a branch; either may be a text why not."""
    dropped = why_dropout("dropout", layer._modules.get("dropout"), mode)
    if dropped is not None or layout.scales is None:
        return dropped, None
    scale, drop = layer._modules.get(layout.scales[index]), layer._modules.get("drop_path")
    kinds = _neighbour(layer, f"{layout.prefix}LayerScale")
    gamma = why_not_call(layout.scales[index], scale, *kinds) or scale.lambda1
    if drop is None or type(drop) is nn.Identity:
        return gamma, why_not_identity("drop_path", drop)
    reason = why_not_call("drop_path", drop, *_neighbour(layer, f"{layout.prefix}DropPath", "Dinov3ViTDropPath"))
    if reason is not None or drop.drop_prob == 0.0 or not is_training(drop, mode):
        return gamma, reason
    return gamma, partial(_draw, keep_prob=1 - drop.drop_prob)


def _draw(x: Tensor, dtype: torch.dtype, keep_prob: float) -> Tensor:
    """transformers' DropPath: the floor of a uniform number; the same call gives the same numbers."""
    uniform = torch.rand((x.shape[0], 1, 1), dtype=dtype, device=x.device)
    return torch.floor(uniform + keep_prob).flatten().div(keep_prob)


class FastLayer(fast.FastBlock):
    """What the fast subclass of every layer class shares."""

    layout: Layout

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_embeddings is not None:
            kwargs["position_embeddings"] = position_embeddings
        if may_run(hidden_states):
            context = self._context(attention_mask, hidden_states)
            stays = _why_not_implementation(getattr(self, self.layout.attention))
            if any(value and name not in HARMLESS for name, value in _rest(kwargs)):
                stays = "a keyword that only the original knows"  # layers pass them to attention alone
            if context is not None:
                if position_embeddings is not None and _table_fits(position_embeddings, hidden_states):
                    context = context._replace(rope=Rope(*position_embeddings))
                elif position_embeddings is not None:
                    stays = "rope differs by sample, or is learned"
                given = {"attention_mask": attention_mask, **kwargs}
                out = self.run_fused(hidden_states, context, partial(self._attention, given=given), stays)
                if out is not None:
                    return out
        return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]

    def _context(self, mask: Any, x: Tensor) -> Context | None:
        """Masks are those of sdpa and eager; other implementations have their own kinds."""
        attn: Any = getattr(self, self.layout.attention)
        implementation = _implementation(attn)
        if mask is not None and (implementation not in (None, "sdpa", "eager") or mask.dim() != 4):
            return None
        return fast.masked(mask, x, _heads(attn)) if isinstance(attn, nn.Module) and mask is not None else Context()

    def _attention(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        normed = getattr(self, self.layout.norms[0])(x)
        return self._add(x, getattr(self, self.layout.attention)(normed, **given)[0], 0)

    def original_mlp(self, x: Tensor) -> Tensor:
        return self._add(x, self.mlp(getattr(self, self.layout.norms[1])(x)), 1)  # type: ignore[attr-defined]

    def _add(self, x: Tensor, branch: Tensor, index: int) -> Tensor:
        if self.layout.scales is not None:
            branch = self.drop_path(getattr(self, self.layout.scales[index])(branch))  # type: ignore[attr-defined]
        elif hasattr(self, "dropout"):
            branch = self.dropout(branch)
        return branch + x


def _rest(kwargs: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return [(name, value) for name, value in kwargs.items() if name != "position_embeddings"]


def _table_fits(rope: tuple[Tensor, Tensor], x: Tensor) -> bool:
    """cos and sin are constant tables [N, E] for the last N tokens."""
    return all(table.dim() == 2 and table.shape[0] <= x.shape[1] and not table.requires_grad for table in rope)


def _parts(module: Any, mode: Mode, layout: Layout) -> dict[str, Any]:
    return {"attention": attention_half(module, layout, mode), "mlp": mlp_half(module, layout, mode)}


def _fast_class(name: str) -> type[nn.Module]:
    """The fast subclass of the layer class ``name``; made once, then an attribute of this module (pickle looks there)."""
    layout = LAYOUTS[name]
    original = getattr(_modeling(layout.folder), name)
    members = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"``{original.__module__}.{name}``.",
        "layout": layout,
        "parts": staticmethod(partial(_parts, layout=layout)),
    }
    made = type(name, (FastLayer, original), members)
    globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    if name in LAYOUTS:
        return _fast_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _modeling(folder: str) -> Any:
    return import_module(f"transformers.models.{folder}.modeling_{folder}")


def _why_stay(layer: Any) -> str | None:
    """Text towers, and layers of transformers versions whose layers take other arguments and return tuples."""
    arguments = set(inspect.signature(type(layer).forward).parameters)
    if not arguments <= ARGUMENTS:
        other = ", ".join(sorted(arguments - ARGUMENTS))
        return f"its forward takes {other}: transformers 5 and later are supported"
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    if "Text" in type(config).__name__:
        return "a text layer"
    return None


def _loaded(names: Iterable[tuple[str, str]]) -> dict[type, tuple[str, str]]:
    """The classes of (folder, class) whose files are imported; others cannot have instances."""
    found = {}
    for folder, name in names:
        home = sys.modules.get(f"transformers.models.{folder}.modeling_{folder}")
        if home is not None and hasattr(home, name):
            found[getattr(home, name)] = (folder, name)
    return found


def adapter() -> Adapter:
    """For the model files that are imported by now."""
    layers = _loaded((layout.folder, name) for name, layout in LAYOUTS.items())
    return Adapter(
        library="transformers",
        blocks={kind: getattr(sys.modules[__name__], name) for kind, (_, name) in layers.items()},
        children={kind: CHILDREN[key] for kind, key in _loaded(CHILDREN).items()},
        left={kind: LEFT[key] for kind, key in _loaded(LEFT).items()},
        why_stay=_why_stay,
    )
