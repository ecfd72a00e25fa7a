"""AlexNet as a baseline: torchvision's features with a new classifier.

B images, C channels, K classes.
"""

from torch import nn


def alexnet(num_classes: int, in_chans: int = 3, *, weights: str | None = None) -> nn.Module:
    """torchvision's AlexNet with a new last layer; images [B, C, 224, 224] to logits [B, K].

    ``weights`` names torchvision weights for all but that layer (3 channels only), e.g. "IMAGENET1K_V1"; None starts
    at random.
    """
    if weights is not None and in_chans != 3:
        raise ValueError(f"weights={weights!r} takes 3 channels, got in_chans={in_chans}")
    import torchvision  # here, because it takes longer to import than the rest of the package

    model = torchvision.models.alexnet(weights=weights)
    model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, num_classes)
    if in_chans != 3:
        model.features[0] = nn.Conv2d(in_chans, 64, kernel_size=11, stride=4, padding=2)
    return model
