"""What tests of weights share: a tiny model of ours and of timm, images, and files."""

import timm
import torch

import vitfast

TINY = {"depth": 2, "embed_dim": 64, "num_heads": 4, "patch_size": 8, "img_size": 32, "num_classes": 10}
SMALL = {key: value for key, value in TINY.items() if key != "num_classes"}


def tiny(**overrides):
    return vitfast.create_model("vit_tiny_patch16_224", **{**TINY, **overrides}).eval()


def tiny_timm(**overrides):
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **overrides})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model.eval()


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def timm_file(path, model):
    torch.save(model.state_dict(), path)
    return path
