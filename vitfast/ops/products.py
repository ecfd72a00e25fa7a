"""Matrix products of a linear layer, through the library that measures fastest on each device.

On the CPU in fp32 oneDNN is called by name, since PyTorch goes to its BLAS there, which is slower on the chips we have
measured; elsewhere ``F.linear`` and ``@`` already reach cuBLAS or oneDNN. Measurements: docs/decisions.md.

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear


def _through_onednn(x: Tensor, *dtypes: torch.dtype) -> bool:
    return x.device.type == "cpu" and x.dtype in dtypes and x.numel() > 0 and torch.backends.mkldnn.is_available()


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b -> [T, O]; one dtype throughout."""
    if _through_onednn(x_TI, torch.float32, torch.bfloat16):
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return torch_linear(x_TI, weight_OI, bias_O)


def linear_activation(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kind: str) -> Tensor | None:
    """act(x W^T + b) in one pass -> [T, O], or None where no library fuses it. For inference: the sum is not kept."""
    algorithm = {"gelu": "none", "gelu_tanh": "tanh"}.get(kind)
    if algorithm is None or not _through_onednn(x_TI, torch.float32, torch.bfloat16):
        return None
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "gelu", [], algorithm)


def linear_add(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor) -> Tensor | None:
    """residual + x W^T + b in one pass -> [T, O], or None where no library fuses it."""
    if residual_TO.dtype != x_TI.dtype or not _through_onednn(x_TI, torch.float32, torch.bfloat16):
        return None
    return torch.ops.mkldnn._linear_pointwise.binary(x_TI, residual_TO, weight_OI, bias_O, "add")


def input_grad(d_out_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """dY W -> [T, I]."""
    if _through_onednn(d_out_TO, torch.float32):
        return torch.ops.mkldnn._linear_pointwise(d_out_TO, weight_OI.t(), None, "none", [], "")
    return d_out_TO @ weight_OI


def weight_grad(d_out_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dY^T X -> [O, I]. Both operands are transposed for oneDNN, which makes it the slower one here."""
    return d_out_TO.t() @ x_TI
