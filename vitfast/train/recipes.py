"""Named recipes: the settings that differ from TrainConfig's defaults, and where they come from."""

from dataclasses import dataclass
from typing import Any

from vitfast.train.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    summary: str
    settings: dict[str, Any]


# The project's source: AlexNet and ResNet-18 from scratch on CIFAR-10 at 224 px. It reports 76.56 % and 80.16 %.
_SOURCE = {
    "dataset": "cifar10",
    "img_size": 224,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "batch_size": 4,
    "epochs": 5,
    "optimizer": "sgd",
    "lr": 0.001,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "schedule": "constant",
    "log_every": 500,
}

RECIPES = {
    # The digits fill their 8 x 8 pixels: shifting them cuts strokes off and costs accuracy, small rotations do not.
    # weight_init "lecun" matters: seed 0 ends at 98.3 % with it and at 88.6 % without.
    "digits-vit": Recipe(
        "a small ViT on scikit-learn's 8x8 digits: over 97 % in half a minute on two cores",
        {
            "model": "vit_tiny_patch2_8",
            "model_args": {"depth": 4, "mlp_ratio": 2.0},
            "weight_init": "lecun",
            "dataset": "digits",
            "epochs": 15,
            "batch_size": 64,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "warmup_steps": 60,
            "clip_grad": 1.0,
            "rotate": 10.0,
        },
    ),
    "digits-resnet": Recipe(
        "ResNet-20 on scikit-learn's 8x8 digits: over 97 % in half a minute on two cores",
        {
            "model": "resnet20",
            "dataset": "digits",
            "epochs": 16,
            "batch_size": 64,
            "lr": 3e-3,
            "weight_decay": 0.05,
            "warmup_steps": 30,
            "rotate": 15.0,
            "crop_scale": 0.8,
            "ema": 0.98,
        },
    ),
    "fashion-vit": Recipe(
        "a small ViT on Fashion-MNIST's 28x28 images",
        {
            "model": "vit_tiny_patch4_28",
            "weight_init": "lecun",
            "dataset": "fashion-mnist",
            "epochs": 20,
            "batch_size": 128,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "warmup_steps": 500,
            "clip_grad": 1.0,
            "crop_padding": 2,
            "flip": True,
        },
    ),
    "cifar10-alexnet-source": Recipe(
        "the project's source: AlexNet from scratch at 224 px (it reports 76.56 %)", {"model": "alexnet", **_SOURCE}
    ),
    "cifar10-resnet18-source": Recipe(
        "the project's source: ResNet-18 from scratch at 224 px (it reports 80.16 %)", {"model": "resnet18", **_SOURCE}
    ),
    # Dosovitskiy et al. 2021, Table 4, the CIFAR-10/100 rows; needs --init WEIGHTS to fine-tune from.
    "vit-finetune-paper": Recipe(
        "the ViT paper's fine-tuning (Table 4) on CIFAR-10: SGD, batch 512, 10,000 steps, 384 px; needs --init WEIGHTS",
        {
            "model": "vit_base_patch16_384",
            "dataset": "cifar10",
            "img_size": 384,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "steps": 10_000,
            "batch_size": 32,
            "accumulate": 16,
            "optimizer": "sgd",
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "schedule": "cosine",
            "warmup_steps": 500,
            "clip_grad": 1.0,
            "flip": True,
            "precision": "bf16",
        },
    ),
    # The same paper, Table 3, last row, and its text: dropout 0.1, clipping at 1, a tanh layer before the head.
    # Batch 4096 = 256 x 16.
    "vit-imagenet-paper": Recipe(
        "the ViT paper's training on ImageNet from scratch (Table 3): AdamW, batch 4096, 300 epochs; needs --data FOLDER",
        {
            "model": "vit_base_patch16_224",
            "model_args": {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "representation_size": 768},
            "dataset": "folder",
            "img_size": 224,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "epochs": 300,
            "batch_size": 256,
            "accumulate": 16,
            "optimizer": "adamw",
            "lr": 3e-3,
            "momentum": 0.9,
            "beta2": 0.999,
            "weight_decay": 0.3,
            "schedule": "cosine",
            "warmup_steps": 10_000,
            "clip_grad": 1.0,
            "crop_scale": 0.05,
            "flip": True,
            "precision": "bf16",
            "workers": 8,
        },
    ),
}


def recipe_config(name: str | None, overrides: dict[str, Any]) -> TrainConfig:
    """A recipe's settings with overrides on top; None is TrainConfig's defaults. ValueError for an unknown name."""
    if name is not None and name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}")
    settings = RECIPES[name].settings if name is not None else {}
    return TrainConfig.from_dict(settings | overrides)
