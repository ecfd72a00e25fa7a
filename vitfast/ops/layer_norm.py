"""LayerNorm, alone or fused with the residual addition before it.

Legend: B samples, T = B * L rows, D width. ``X`` is the residual's dtype, ``Y`` that of the branch and of the result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import layer_norm as torch_layer_norm

from .arguments import check_drop_path, check_shape, fake_gradients, fake_statistics, gradients, nothing, rows
from .compose import add_branch_ref
from .dispatch import TABLE, choose, standard_backends, too_wide
from .library import register

TABLE["layer_norm"] = standard_backends("cpu", "triton", "cuda", "torch")


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    return torch_layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_ref(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; the truth in fp64."""
    total = add_branch_ref(residual, branch, scale, drop_path)
    return total, layer_norm_ref(total, weight, bias, eps)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = x.dtype if branch is None else branch.dtype
    kernels = choose("layer_norm", x, backend, dtype, why_not=too_wide(x))
    total, normed, mean, rstd = kernels.layer_norm_forward(
        rows(x), None if branch is None else rows(branch), scale, drop_path, weight, bias, eps, dtype
    )
    total = nothing(x) if branch is None else total.view(x.shape)
    return total, normed.view(x.shape), mean, rstd


def _fake_forward(x: Tensor, branch: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    total = nothing(x) if branch is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape, dtype=x.dtype if branch is None else branch.dtype)
    return total, normed, *fake_statistics(x)


def _backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    drop_path: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = choose("layer_norm", total, backend, d_normed.dtype, why_not=too_wide(total))
    d_x, d_branch, d_scale, d_weight, d_bias = kernels.layer_norm_backward(
        rows(d_normed),
        None if d_total is None else rows(d_total),
        rows(total),
        mean,
        rstd,
        weight,
        None if branch is None else rows(branch),
        scale,
        drop_path,
    )
    grads = (d_x, d_branch, d_scale, d_weight, d_bias)
    likes = (total, branch, scale, weight, weight)
    return gradients(grads, likes, [g is not None for g in grads], total)


def _fake_backward(d_normed: Tensor, d_total: Tensor | None, total: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _mean, _rstd, weight, branch, scale, _drop_path, _backend = rest
    has_branch = branch is not None
    return fake_gradients((total, branch, scale, weight, weight), (True, has_branch, has_branch, True, True), total)


_layer_norm_backward = register(
    "layer_norm_backward(Tensor d_normed, Tensor? d_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor? branch, Tensor? scale, Tensor? drop_path, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, scale, drop_path, weight, _, _, ctx.backend = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    # The branch is needed only for LayerScale's own gradient.
    ctx.has_branch = branch is not None
    kept = branch if scale is not None else None
    ctx.save_for_backward(x if branch is None else total, mean, rstd, weight, kept, scale, drop_path)
    ctx.branch_dtype = None if branch is None else branch.dtype


def _autograd(ctx: Any, d_total: Any, d_normed: Any, *_: Any) -> tuple[Any, ...]:
    total, mean, rstd, weight, branch, scale, drop_path = ctx.saved_tensors
    if d_normed is None:  # only the sum was used
        d_normed = total.new_zeros(total.shape, dtype=ctx.branch_dtype or total.dtype)
    if ctx.has_branch and branch is None:
        branch = d_normed  # stands in for dtype and shape; without a scale its values are not read
    d_x, d_branch, d_scale, d_weight, d_bias = _layer_norm_backward(
        d_normed, d_total if ctx.has_branch else None, total, mean, rstd, weight, branch, scale, drop_path, ctx.backend
    )
    return (
        d_x,
        d_branch if ctx.has_branch else None,
        None if scale is None else d_scale,
        None,
        d_weight,
        d_bias,
        None,
        None,
    )


_layer_norm = register(
    "layer_norm(Tensor x, Tensor? branch, Tensor? scale, Tensor? drop_path, Tensor weight, Tensor bias, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., D], any float dtype; statistics are fp32 (fp64 for fp64).
        weight, bias: [D], any float dtype.
        eps: added to the variance.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [..., D] in x's dtype. Keeps x and two numbers a row for backward. The same bits every run.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    check_shape("weight", weight, x.shape[-1:])
    check_shape("bias", bias, x.shape[-1:])
    return _layer_norm(x, None, None, None, weight, bias, eps, backend)[1]


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum, in one pass over memory.

    Args:
        residual: [B, ..., D] in X (fp32 under autocast, else as the branch).
        branch: [B, ..., D] in Y.
        weight, bias: [D].
        eps: added to the variance.
        scale: LayerScale's factor [D] (Touvron et al. 2021, arXiv:2103.17239, eq. 4), or None.
        drop_path: one factor for each sample [B], mask / keep probability (Huang et al. 2016, arXiv:1603.09382), or None;
            it gets no gradient.
        backend: as for :func:`layer_norm`.

    Returns:
        (residual + drop_path * scale * branch in X, its LayerNorm in Y), each [B, ..., D]. The same bits every run.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: the named backend cannot run.
    """
    check_shape("branch", branch, residual.shape)
    for name, parameter in (("weight", weight), ("bias", bias), ("scale", scale)):
        check_shape(name, parameter, residual.shape[-1:])
    check_drop_path(drop_path, residual)
    return _layer_norm(residual, branch, scale, drop_path, weight, bias, eps, backend)[:2]
