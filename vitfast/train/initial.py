"""How weights start: at random for narrow models, or from weights trained on something else."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vitfast.models.checkpoints import read_npz, read_state_dict
from vitfast.models.layouts import from_google
from vitfast.models.weights import load_state_dict
from vitfast.train.checkpoint import FORMAT, load_checkpoint, read_tensors


@torch.no_grad()
def lecun_init(model: nn.Module) -> None:
    """Start a narrow ViT so that it learns within a few hundred steps.

    Linear weights in the blocks from N(0, 1 / inputs) (LeCun et al. 1998), zero biases, position embeddings from
    N(0, 1/4), about the size of the patch embeddings. create_model's start is timm's, with 0.02 for all of these: right
    for widths near 768 and long runs, but a narrow model spends its first hundreds of steps with almost uniform
    attention and without seeing where a patch is. Raises ValueError for a model that is no ViT.
    """
    blocks, pos_embed = getattr(model, "blocks", None), getattr(model, "pos_embed", None)
    if not isinstance(blocks, nn.Module) or not isinstance(pos_embed, Tensor):
        raise ValueError(
            f"weight_init must be 'model' for {type(model).__name__}, which is no Vision Transformer; got 'lecun'"
        )
    nn.init.normal_(pos_embed, std=0.5)
    for name, parameter in blocks.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


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
    load_state_dict(model, weights)
    if before != after:
        adapted.append(f"position embeddings interpolated from {before} to {after} tokens")
    return adapted


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        return from_google(read_npz(path))
    content = read_tensors(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        checkpoint = load_checkpoint(path)
        return checkpoint["ema"]["weights"] if checkpoint["ema"] else checkpoint["weights"]
    return read_state_dict(path)


def head_name(model: nn.Module, num_classes: int) -> str:
    """The name of the last linear layer with num_classes outputs: "head", "fc", "classifier.6"."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear head of {num_classes} classes to start afresh")
    return names[-1]
