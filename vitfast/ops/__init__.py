"""The ops: one file each, with its reference, schema, backends, gradient and public function."""

from . import weight_cache
from .attention import attention
from .dispatch import backends
from .heads import HeadNorm, Rope
from .int8_linear import int8_linear
from .layer_norm import add_layer_norm, layer_norm
from .library import extension_status, is_unwatched
from .linear import linear
from .linear_residual import linear_residual
from .mlp import mlp
from .norm_attention import norm_attention
from .norm_linear import norm_linear
from .norm_mlp import norm_mlp
from .patch_embed import patch_embed

__all__ = [
    "HeadNorm",
    "Rope",
    "add_layer_norm",
    "attention",
    "backends",
    "extension_status",
    "int8_linear",
    "is_unwatched",
    "layer_norm",
    "linear",
    "linear_residual",
    "mlp",
    "norm_attention",
    "norm_linear",
    "norm_mlp",
    "patch_embed",
    "weight_cache",
]
