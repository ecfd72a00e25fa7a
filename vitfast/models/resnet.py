"""Residual networks as baselines: torchvision's ResNet-18, and He et al.'s small ones for images of 8 to 32 pixels.

B images, C channels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import nn


def resnet18(num_classes: int, in_chans: int = 3, *, weights: str | None = None) -> nn.Module:
    """torchvision's ResNet-18 trunk with a new linear head; images [B, C, 224, 224] to logits [B, K].

    ``weights`` names torchvision weights for the trunk (3 channels only), e.g. "IMAGENET1K_V1"; None starts at random.
    """
    if weights is not None and in_chans != 3:
        raise ValueError(f"weights={weights!r} takes 3 channels, got in_chans={in_chans}")
    import torchvision  # here, because it takes longer to import than the rest of the package

    model = torchvision.models.resnet18(weights=weights)
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    if in_chans != 3:
        model.conv1 = nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (He et al. 2016, section 4.2, option A)."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = width - in_width
        self.conv1 = nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class SmallResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: 6n + 2 layers of width 16, 32 and 64, at any image size.

    Images [B, C, H, W] to logits [B, K]; H and W from 4 pixels up.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16] * blocks_per_stage + [32] * blocks_per_stage + [64] * blocks_per_stage
        pairs = zip([16, *widths[:-1]], widths, strict=True)
        self.blocks = nn.Sequential(*[BasicBlock(before, width, width // before) for before, width in pairs])
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(images_BCHW))))
        return self.fc(x.mean(dim=(2, 3)))
