"""How weights start: at random for short runs, or from weights trained on something else."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from vitfast.models import convert
from vitfast.train.checkpoint import FORMAT, load_checkpoint, read_tensors


@torch.no_grad()
def sincos_init(model: nn.Module) -> None:
    """Start a ViT as "Better plain ViT baselines" does (Beyer et al. 2022; big_vision's code).

    Glorot-uniform query, key, value, projection and MLP weights, N(0, 1e-6) MLP biases, 2-D sine-cosine positions (they
    still train) and a zero head. create_model's start, timm's, has positions of size 0.02 beside patch embeddings of
    size 1 and suits long runs; on a few thousand small images it takes hundreds of steps to see where a patch is.
    Raises ValueError for a model that is no ViT with a square grid.
    """
    blocks, pos_embed, head = (getattr(model, name, None) for name in ("blocks", "pos_embed", "head"))
    if blocks is None or pos_embed is None or not isinstance(head, nn.Linear):
        raise ValueError(
            f"weight_init must be 'model' for {type(model).__name__}, which is no Vision Transformer; got 'sincos'"
        )
    width = pos_embed.shape[-1]
    grid = math.isqrt(pos_embed.shape[1])
    pos_embed.zero_()
    pos_embed[0, -grid * grid :] = sincos_positions(grid, width)
    for name, weight in blocks.named_parameters():
        if name.endswith("attn.qkv.weight"):  # [3D, D]: three products, each with its own fan
            for part in weight.split(width):
                nn.init.xavier_uniform_(part)
        elif name.endswith(("attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")):
            nn.init.xavier_uniform_(weight)
        elif name.endswith(("mlp.fc1.bias", "mlp.fc2.bias")):
            nn.init.normal_(weight, std=1e-6)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


def sincos_positions(grid: int, width: int) -> Tensor:
    """[grid * grid, width]: sine and cosine of column and row at width / 4 frequencies from 1 down to 1/10000."""
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4; got {width}")
    frequencies = 10_000 ** -(torch.arange(width // 4) / max(1, width // 4 - 1))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (column, row)]
    return torch.cat([function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1)


def load_initial(model: nn.Module, path: Path, num_classes: int) -> list[str]:
    """Load pretrained weights into `model` for fine-tuning; returns what was adapted, for the user to read.

    path: a vitfast checkpoint, or a weight file with the model's (timm's) names. A head for other classes is replaced by
    a zero-initialised linear layer, and position embeddings of another grid are interpolated in 2-D
    (Dosovitskiy et al. 2021, section 3.2). Raises CheckpointError or ValueError when anything else does not fit.
    """
    weights, own, adapted = _read(path), model.state_dict(), []
    head = head_name(model, num_classes)
    keys = [key for key in (f"{head}.weight", f"{head}.bias") if key in own]
    if any(key not in weights or weights[key].shape != own[key].shape for key in keys):
        weights |= {key: torch.zeros_like(own[key]) for key in keys}
        weights = {key: value for key, value in weights.items() if not key.startswith("pre_logits.")}
        adapted.append(f"new zero-initialised head for {num_classes} classes")
    before, after = (w["pos_embed"].shape[1] if "pos_embed" in w else 0 for w in (weights, own))
    convert.load_state_dict(model, weights)
    if before != after:
        adapted.append(f"position embeddings interpolated from {before} to {after} tokens")
    return adapted


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        return convert.from_google(convert.read_npz(path))
    content = read_tensors(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        checkpoint = load_checkpoint(path)
        return checkpoint["ema"]["weights"] if checkpoint["ema"] else checkpoint["weights"]
    return convert.read_state_dict(path)


def head_name(model: nn.Module, num_classes: int) -> str:
    """The name of the last linear layer with num_classes outputs: "head", "fc", "classifier.6"."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear head of {num_classes} classes to start afresh")
    return names[-1]
