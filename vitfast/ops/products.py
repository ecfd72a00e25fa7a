"""Matrix products of linear layers, through the library that measures fastest on each device.

On the CPU in fp32 oneDNN is called by name, since PyTorch goes to its BLAS there, which is slower on the chips we have
measured; elsewhere ``F.linear`` and ``@`` already reach cuBLAS or oneDNN. Measurements: docs/decisions.md.

Legend: T rows, I inputs, O outputs, B samples; ``X`` dtype of the residual stream, ``Y`` of the products.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from .arguments import nothing

_ONEDNN_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # activation -> what oneDNN calls the way it is computed


def _through_onednn(x: Tensor, *dtypes: torch.dtype) -> bool:
    return x.device.type == "cpu" and x.dtype in dtypes and x.numel() > 0 and _onednn_has(x.dtype)


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """bf16 needs AVX-512 or a newer Arm core; where there is none, PyTorch's own products still run."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class LibraryProducts:
    """The products among a backend's primitives; its kernels add ``activation_forward``, ``activation_backward`` and ``scale_add``.

    H = F, or 2F for "swiglu".
    """

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + b -> [T, O]; one dtype throughout."""
        if _through_onednn(x_TI, torch.float32, torch.bfloat16):
            return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
        return torch_linear(x_TI, weight_OI, bias_O)

    def linear_activation(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kind: str, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """(act(x W^T + b) [T, O], for "swiglu" [T, O / 2], and the sum before it [T, O], which is empty unless ``keep``)."""
        if not keep and kind in _ONEDNN_GELU and _through_onednn(x_TI, torch.float32, torch.bfloat16):
            how = _ONEDNN_GELU[kind]
            act = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "gelu", [], how)
            return act, nothing(x_TI)
        h_TO = self.linear(x_TI, weight_OI, bias_O)
        return self.activation_forward(h_TO, kind), h_TO if keep else nothing(h_TO)  # type: ignore[attr-defined]

    def linear_again(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kind: str
    ) -> tuple[Tensor, Tensor | None]:
        """The sum that ``linear_activation`` keeps, made again with its bits, and act of it where that comes for free."""
        return self.linear(x_TI, weight_OI, bias_O), None

    def linear_residual(
        self,
        residual_TO: Tensor,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scale_O: Tensor | None,
        drop_path_B: Tensor | None,
    ) -> Tensor:
        """residual + drop_path * scale * (x W^T + b) -> [T, O] in X."""
        bare = scale_O is None and drop_path_B is None and residual_TO.dtype == x_TI.dtype
        if bare and _through_onednn(x_TI, torch.float32, torch.bfloat16):
            return torch.ops.mkldnn._linear_pointwise.binary(x_TI, residual_TO, weight_OI, bias_O, "add")
        branch_TO = self.linear(x_TI, weight_OI, bias_O)
        return self.scale_add(residual_TO, branch_TO, scale_O, drop_path_B)  # type: ignore[attr-defined]

    def hidden_backward(
        self, d_out_TO: Tensor, weight_OF: Tensor, h_TH: Tensor, kind: str, want_act: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradient of h where out = act(h) W^T: (d_h [T, H], act(h) [T, F] or None, column sums of d_h [H])."""
        return self.activation_backward(h_TH, self.input_grad(d_out_TO, weight_OF), kind, want_act)  # type: ignore[attr-defined]

    def input_grad(self, d_out_TO: Tensor, weight_OI: Tensor) -> Tensor:
        """dY W -> [T, I]."""
        if _through_onednn(d_out_TO, torch.float32):
            return torch.ops.mkldnn._linear_pointwise(d_out_TO, weight_OI.t(), None, "none", [], "")
        return d_out_TO @ weight_OI

    def weight_grad(self, d_out_TO: Tensor, x_TI: Tensor) -> Tensor:
        """dY^T X -> [O, I]. Both operands are transposed for oneDNN, which makes it the slower one here."""
        return d_out_TO.t() @ x_TI
