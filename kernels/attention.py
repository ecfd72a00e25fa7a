"""Attention's two launchers under one name; the kernels are in attention_forward.py, attention_backward.py,
attention_bias.py."""

from .attention_backward import attention_backward
from .attention_forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
