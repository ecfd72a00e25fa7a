"""What a Vision Transformer is made of, as data: one frozen record, checked when it is made."""

from dataclasses import dataclass

from vitfast.ops.arguments import POINTWISE, POLICIES
from vitfast.ops.dispatch import NAMES as BACKENDS

POOLINGS = ("token", "avg", "max", "avgmax", "map", "")
RECOMPUTES = (*POLICIES, "block")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer; field names are timm's, so that what is written for timm's ``create_model`` fits here.

    img_size: pixels, one number or (height, width), multiples of patch_size.
    mlp_ratio: hidden width of the perceptron over embed_dim (the product is cut to an integer).
    init_values: start value of LayerScale, None for no LayerScale.
    no_embed_class: position embeddings for the patches only, not for class and register tokens.
    pre_norm: a LayerNorm before the blocks, and no bias in the patch embedding (CLIP).
    global_pool: "token" (class token), "avg", "max", "avgmax" (over patches), "map" (attention pooling) or "" (none).
    fc_norm: the final LayerNorm after pooling instead of before; None: when pooling is avg, max or avgmax.
    representation_size: width of a tanh layer before the head, as in the paper's pre-training; None for none.
    drop_rate, pos_drop_rate, proj_drop_rate: dropout before the head, after the position embedding, and after proj,
        fc1 and fc2; the paper's "dropout 0.1" is pos_drop_rate = proj_drop_rate = 0.1.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
    normalize: take raw pixels (uint8 0..255 or float 0..1) and normalise them by mean and std inside the model.
    mean, std, crop_pct, crop_mode, interpolation: how the published weights were fed, as in timm's default config.
    backend: who runs the ops: "auto", "torch", "cpu", "triton" or "cuda".
    recompute: what backward recomputes instead of keeping: "none", "fused" (LayerNorm and GELU outputs), "mlp" (also
        the first MLP product), "block" (everything inside a block).

    Raises ValueError naming the field, what came and what is allowed.
    """

    name: str = "vit"
    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation: str = "gelu"
    norm_eps: float = 1e-6
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    fc_norm: bool | None = None
    global_pool: str = "token"
    representation_size: int | None = None
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    normalize: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    backend: str = "auto"
    recompute: str = "fused"

    def __post_init__(self) -> None:
        if isinstance(self.img_size, list):  # from a checkpoint's JSON
            object.__setattr__(self, "img_size", tuple(self.img_size))
        for field in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            _check_integer(field, getattr(self, field), 1)
        for field in ("num_classes", "reg_tokens"):
            _check_integer(field, getattr(self, field), 0)
        if isinstance(self.img_size, tuple) and len(self.img_size) != 2:
            raise ValueError(f"img_size must be one number or (height, width), got {self.img_size}")
        for side in self.image_hw:
            _check_integer("img_size", side, 1)
        if any(side % self.patch_size for side in self.image_hw):
            raise ValueError(f"img_size must be a multiple of the patch size {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")
        for field in ("drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        check_choice("global_pool", self.global_pool, POOLINGS)
        check_choice("activation", self.activation, POINTWISE)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("recompute", self.recompute, RECOMPUTES)
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True; without one use 'avg', 'map' or ''")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def block_recompute(self) -> str:
        """What a block recomputes by itself: "block" is done around it, and then "fused" inside while that runs."""
        return "fused" if self.recompute == "block" else self.recompute

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the perceptron."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def norm_after_pool(self) -> bool:
        """Whether the final LayerNorm comes after the pooling (``fc_norm``) instead of before."""
        return self.global_pool in ("avg", "max", "avgmax") if self.fc_norm is None else self.fc_norm


def per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """``values`` for in_chans channels: as they are if their number fits, otherwise their average for every channel."""
    return values if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError naming the field and the choices unless value is one of them."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_integer(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field} must be an integer of at least {least}, got {value!r}")
