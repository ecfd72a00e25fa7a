"""What a Vision Transformer is made of, as data: one frozen record, checked when it is made."""

from dataclasses import dataclass

from vitfast.layers.attention import QKV_LAYOUTS
from vitfast.layers.block import BLOCKS
from vitfast.layers.rope import ROPE_TYPES
from vitfast.ops.arguments import POINTWISE, POLICIES
from vitfast.ops.dispatch import NAMES as BACKENDS

POOLINGS = ("token", "avg", "max", "avgmax", "map", "")
MLP_LAYERS = ("mlp", "swiglu_packed", "swiglu")
RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "drop_path_rate")
RECOMPUTES = (*POLICIES, "block")
PRECISIONS = ("float", "int8")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer; field names are timm's, so that what is written for timm's ``create_model`` fits here.

    img_size: pixels, one number or (height, width), multiples of patch_size.
    mlp_ratio: hidden width of the perceptron over embed_dim (the product is cut to an integer); of a gated one, the
        width of each half.
    mlp_layer: "mlp"; gated by SiLU: "swiglu_packed" (gate and value in one fc1, DINOv2 giant) or "swiglu" (fc1_g and
        fc1_x, EVA-02, DINOv3). swiglu_align_to: its hidden width rounded up to a multiple of this; 0 for not.
    activation: of "mlp": "gelu", "gelu_tanh" or "quick_gelu".
    block: whose parameter names: "vit" (LayerScale in ls1.gamma) or "eva" (gamma_1; class token and fc_norm as there).
    qkv_layout: "fused" (attn.qkv), "split_bias" (attn.qkv without a bias, attn.q_bias, attn.v_bias) or "separate"
        (attn.q_proj, attn.k_proj without a bias, attn.v_proj).
    qk_norm, scale_attn_norm, scale_mlp_norm: a LayerNorm on each head's q and k, before proj, before fc2.
    init_values: start value of LayerScale, None for no LayerScale.
    pos_embed: "learn" or "none" for absolute position embeddings.
    rope_type: rotary position embeddings: None, "cat" (EVA-02), "dinov3" or "mixed" (learned); see layers.rope for
        rope_temperature, rope_grid_offset, rope_grid_indexing, ref_feat_shape (patches, one number or rows and columns),
        rope_rotate_half, and for what training draws: rope_shift_coords, rope_jitter_coords, rope_rescale_coords.
    dynamic_img_size: take images of any multiple of the patch size, positions resampled; dynamic_img_pad: of any size,
        padded to it.
    no_embed_class: position embeddings for the patches only, not for class and register tokens.
    pre_norm: a LayerNorm before the blocks, and no bias in the patch embedding (CLIP).
    global_pool: "token" (class token), "avg", "max", "avgmax" (over patches), "map" (attention pooling) or "" (none).
    pool_include_prefix: pool class and register tokens too (not for "token").
    attn_pool_num_heads, attn_pool_mlp_ratio: of attention pooling; None: as in the blocks.
    final_norm: whether there is a LayerNorm after the blocks at all.
    fc_norm: the final LayerNorm after pooling instead of before; None: when pooling is avg, max or avgmax (in an "eva"
        block's model: avg).
    representation_size: width of a tanh layer before the head, as in the paper's pre-training; None for none.
    token_merging: how many tokens each block merges away (arXiv:2210.09461); 0 for none.
    patch_drop_rate: share of patches left out in training. attn_drop_rate: dropout on the attention weights.
    drop_rate, pos_drop_rate, proj_drop_rate: dropout before the head, after the position embedding, and after proj,
        fc1 and fc2; the paper's "dropout 0.1" is pos_drop_rate = proj_drop_rate = 0.1.
    drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
    normalize: take raw pixels (uint8 0..255 or float 0..1) and normalise them by mean and std inside the model.
    mean, std, crop_pct, crop_mode, interpolation: how the published weights were fed, as in timm's default config.
    backend: who runs the ops: "auto", "torch", "cpu", "triton" or "cuda".
    recompute: what backward recomputes instead of keeping: "none", "fused" (LayerNorm and GELU outputs), "mlp" (also
        the first MLP product), "block" (everything inside a block).
    precision: "float": products in the parameters' dtype. "int8": in eval mode, while no gradient is wanted, qkv, proj,
        fc1 and fc2 of the blocks in 8-bit integers made from the parameters, which stay what they are and what is
        trained and saved. For CPUs: on other devices it computes the same in floats. Takes a byte for each of these
        weights (85 MB for ViT-B) from the first such forward on.

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
    mlp_layer: str = "mlp"
    swiglu_align_to: int = 0
    block: str = "vit"
    qkv_bias: bool = True
    qkv_layout: str = "fused"
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-6
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    pos_embed: str = "learn"
    no_embed_class: bool = False
    rope_type: str | None = None
    rope_temperature: float = 10000.0
    rope_grid_offset: float = 0.0
    rope_grid_indexing: str = "ij"
    rope_rotate_half: bool = False
    rope_shift_coords: float | None = None
    rope_jitter_coords: float | None = None
    rope_rescale_coords: float | None = None
    ref_feat_shape: int | tuple[int, int] | None = None
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    global_pool: str = "token"
    pool_include_prefix: bool = False
    attn_pool_num_heads: int | None = None
    attn_pool_mlp_ratio: float | None = None
    token_merging: int = 0
    representation_size: int | None = None
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    normalize: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    backend: str = "auto"
    recompute: str = "fused"
    precision: str = "float"

    def __post_init__(self) -> None:
        for field in ("img_size", "ref_feat_shape"):
            if isinstance(getattr(self, field), list):  # from a checkpoint's JSON
                object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            _check_integer(field, getattr(self, field), 1)
        for field in ("num_classes", "reg_tokens", "swiglu_align_to", "token_merging"):
            _check_integer(field, getattr(self, field), 0)
        if isinstance(self.img_size, tuple) and len(self.img_size) != 2:
            raise ValueError(f"img_size must be one number or (height, width), got {self.img_size}")
        for side in self.image_hw:
            _check_integer("img_size", side, 1)
        if any(side % self.patch_size for side in self.image_hw):
            raise ValueError(f"img_size must be a multiple of the patch size {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {self.num_heads} and {self.embed_dim}")
        for field in RATES:
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        check_choice("global_pool", self.global_pool, POOLINGS)
        check_choice("activation", self.activation, POINTWISE)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("recompute", self.recompute, RECOMPUTES)
        check_choice("precision", self.precision, PRECISIONS)
        if self.precision == "int8":
            check_choice("backend for precision 'int8'", self.backend, ("auto", "cpu", "torch"))
        check_choice("mlp_layer", self.mlp_layer, MLP_LAYERS)
        check_choice("block", self.block, tuple(BLOCKS))
        check_choice("qkv_layout", self.qkv_layout, tuple(QKV_LAYOUTS))
        check_choice("pos_embed", self.pos_embed, ("learn", "none"))
        self._check_rope()
        if self.dynamic_img_pad and not self.dynamic_img_size:
            raise ValueError("dynamic_img_pad=True needs dynamic_img_size=True: images of one size need no padding")
        if self.token_merging and self.rope_type is not None:
            raise ValueError("token_merging needs rope_type=None: a merged token has no one position to rotate by")
        heads = self.attn_pool_num_heads
        if heads is not None and (heads < 1 or self.embed_dim % heads):
            raise ValueError(f"attn_pool_num_heads must divide embed_dim, got {heads} and {self.embed_dim}")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True; without one use 'avg', 'map' or ''")

    def _check_rope(self) -> None:
        if self.rope_type is None:
            return
        check_choice("rope_type", self.rope_type, ROPE_TYPES)
        check_choice("rope_grid_indexing", self.rope_grid_indexing, ("ij", "xy"))
        if (self.embed_dim // self.num_heads) % 4:
            raise ValueError(f"rope_type needs heads of a multiple of 4, got {self.embed_dim} / {self.num_heads}")
        if self.rope_temperature <= 0:
            raise ValueError(f"rope_temperature must be above 0, got {self.rope_temperature}")
        for field, least in (("rope_shift_coords", 0), ("rope_jitter_coords", 1), ("rope_rescale_coords", 1)):
            value = getattr(self, field)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{field} must be at least {least} and finite, got {value}")
        if self.rope_type == "mixed" and self.rope_rotate_half:
            raise ValueError("rope_rotate_half=True does not go with rope_type='mixed', whose pairs are interleaved")
        if self.ref_feat_shape is not None and self.rope_type != "cat":
            raise ValueError(f"ref_feat_shape is for rope_type='cat', got {self.rope_type!r}")

    @property
    def ref_grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches that rotary positions are rescaled to."""
        shape = self.ref_feat_shape
        return (shape, shape) if isinstance(shape, int) else shape

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
        hidden = int(self.embed_dim * self.mlp_ratio)
        return hidden + (-hidden % self.swiglu_align_to if self.swiglu_align_to else 0)

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def norm_after_pool(self) -> bool:
        """Whether the final LayerNorm comes after the pooling (``fc_norm``) instead of before."""
        pooled = ("avg",) if self.block == "eva" else ("avg", "max", "avgmax")
        return self.global_pool in pooled if self.fc_norm is None else self.fc_norm


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
