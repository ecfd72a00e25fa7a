"""Optimizers, which parameters decay, and the learning rate of every step."""

import math
import re
from typing import Any

import torch
from torch import nn

from vitfast.train.config import TrainConfig

# Position embeddings and prefix tokens: no weight decay, like norms and biases (which are vectors).
_NEVER_DECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token")


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Optimizer groups, each with its weight_decay and `lr_scale` = layer_decay ** (layers above it) (BEiT, Bao et al. 2022).

    Vectors, model.no_weight_decay() and position embeddings or tokens do not decay. layer_decay below 1 needs a model
    with `blocks`, else ValueError.
    """
    blocks = getattr(model, "blocks", None)
    if layer_decay < 1 and blocks is None:
        raise ValueError(f"layer_decay must be 1 for {type(model).__name__}, which has no `blocks`; got {layer_decay}")
    depth = len(blocks) if blocks is not None else 0
    no_weight_decay: Any = getattr(model, "no_weight_decay", set)
    skip = set(no_weight_decay())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    layer = 0  # 0 the embedding, 1..depth the blocks, depth + 1 what comes after; parameters come in that order
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            layer = int(block.group(1)) + 1
        elif layer:
            layer = depth + 1
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and name not in skip and name.rpartition(".")[2] not in _NEVER_DECAYED
        decay = weight_decay if decays else 0.0
        scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over parameter_groups, in PyTorch's fused implementation."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2), fused=True)


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """The share of the peak learning rate that step `step` of `total` (counted from 0) uses.

    Linear warm-up: the k-th warm-up step uses k / warmup. Then cosine or linear to 0 just after the last step, or constant.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
