"""TrainConfig: everything that decides the outcome of a training run, as one frozen value.

Imports no torch: the command line builds its flags from these fields.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder", "fake")


def _about(group: str, help: str, *, choices: tuple = (), free: bool = False) -> dict[str, Any]:
    """What the command line needs to know of a field; `free` ones may change when a run is resumed."""
    return {"group": group, "help": help, "choices": choices, "free": free}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Invalid values raise ValueError naming the field, what came and what is allowed."""

    model: str = field(default="vit_tiny_patch2_8", metadata=_about("model", "name for vitfast.create_model"))
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata=_about("model", "an override for create_model, KEY=VALUE; may be repeated")
    )
    img_size: int | None = field(
        default=None, metadata=_about("model", "image side in pixels fed to the model (default: the dataset's own)")
    )
    init: str | None = field(
        default=None,
        metadata=_about(
            "model",
            "start from these weights: a vitfast checkpoint, a state dict with timm's names (.pt, .safetensors) or Google's .npz",
        ),
    )
    weight_init: str = field(
        default="model",
        metadata=_about(
            "model",
            "model: as vitfast.create_model starts; lecun (ViT only): for narrow models and short runs",
            choices=("model", "lecun"),
        ),
    )
    backend: str = field(
        default="auto",
        metadata=_about("model", "backend of vitfast's ops", choices=("auto", "torch", "cpu", "triton", "cuda")),
    )
    recompute: str = field(
        default="fused",
        metadata=_about("model", "what the backward pass recomputes", choices=("none", "fused", "mlp", "block")),
    )

    dataset: str = field(default="digits", metadata=_about("data", "which images", choices=DATASETS))
    data: str | None = field(
        default=None, metadata=_about("data", "folder of the dataset (default: ./data)", free=True)
    )
    mean: tuple[float, ...] | None = field(
        default=None, metadata=_about("data", "channel means of pixels in [0, 1] (default: the dataset's own)")
    )
    std: tuple[float, ...] | None = field(
        default=None, metadata=_about("data", "channel standard deviations (default: the dataset's own)")
    )
    workers: int = field(
        default=2, metadata=_about("data", "processes that read image files (dataset folder only)", free=True)
    )
    crop_padding: int = field(
        default=0, metadata=_about("data", "augment: shift by up to this many pixels, black outside")
    )
    crop_scale: float = field(
        default=1.0, metadata=_about("data", "augment: random resized crop of at least this share of the area; 1 = off")
    )
    flip: bool = field(default=False, metadata=_about("data", "augment: mirror left-right half of the time"))
    rotate: float = field(default=0.0, metadata=_about("data", "augment: rotate by up to this many degrees either way"))
    mixup: float = field(default=0.0, metadata=_about("data", "mixup's alpha (Zhang et al. 2018); 0 = off"))
    cutmix: float = field(
        default=0.0,
        metadata=_about("data", "CutMix's alpha (Yun et al. 2019); 0 = off; with mixup, a coin decides per batch"),
    )

    epochs: int = field(default=10, metadata=_about("optimisation", "passes over the training images"))
    steps: int | None = field(
        default=None, metadata=_about("optimisation", "optimizer steps in all, instead of --epochs")
    )
    batch_size: int = field(default=64, metadata=_about("optimisation", "images per forward pass"))
    accumulate: int = field(default=1, metadata=_about("optimisation", "forward passes per optimizer step"))
    optimizer: str = field(default="adamw", metadata=_about("optimisation", "optimizer", choices=("adamw", "sgd")))
    lr: float = field(default=1e-3, metadata=_about("optimisation", "peak learning rate"))
    momentum: float = field(default=0.9, metadata=_about("optimisation", "SGD's momentum; AdamW's beta1"))
    beta2: float = field(default=0.999, metadata=_about("optimisation", "AdamW's beta2; sgd does not use it"))
    weight_decay: float = field(
        default=0.05,
        metadata=_about("optimisation", "weight decay; never on norms, biases, position embeddings and tokens"),
    )
    layer_decay: float = field(
        default=1.0,
        metadata=_about("optimisation", "ViT only: each block's learning rate is this times the next one's"),
    )
    schedule: str = field(
        default="cosine", metadata=_about("optimisation", "after the warm-up", choices=("cosine", "linear", "constant"))
    )
    warmup_steps: int = field(default=0, metadata=_about("optimisation", "steps of linear warm-up"))
    clip_grad: float = field(
        default=0.0, metadata=_about("optimisation", "clip the gradient's global norm to this; 0 = off")
    )
    label_smoothing: float = field(default=0.0, metadata=_about("optimisation", "label smoothing"))
    ema: float = field(
        default=0.0,
        metadata=_about("optimisation", "decay of a moving average of the weights, used to evaluate; 0 = off"),
    )

    precision: str = field(
        default="fp32", metadata=_about("run", "compute precision; weights stay fp32", choices=("fp32", "bf16", "fp16"))
    )
    compile: bool = field(default=False, metadata=_about("run", "train through torch.compile"))
    device: str = field(
        default="auto", metadata=_about("run", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", free=True)
    )
    seed: int = field(default=0, metadata=_about("run", "seed of weights, order, augmentation and dropout"))
    deterministic: bool = field(
        default=False, metadata=_about("run", "only deterministic algorithms (matters on GPUs)")
    )
    out: str | None = field(default=None, metadata=_about("run", "run folder (default: runs/DATASET-MODEL)", free=True))
    log_every: int = field(default=20, metadata=_about("run", "steps between lines of metrics.jsonl"))
    save_every: int = field(
        default=0, metadata=_about("run", "also save last.pt every so many steps, not only after each epoch", free=True)
    )

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name} must be a finite number; got {value}")
        for name in ("epochs", "batch_size", "accumulate", "log_every", "img_size", "steps"):
            self._check(name, lambda v: v >= 1, "at least 1")
        for name in (
            "warmup_steps",
            "save_every",
            "workers",
            "crop_padding",
            "seed",
            "lr",
            "weight_decay",
            "clip_grad",
        ):
            self._check(name, lambda v: v >= 0, "at least 0")
        for name in ("mixup", "cutmix", "rotate"):
            self._check(name, lambda v: v >= 0, "at least 0")
        for name in ("momentum", "beta2", "ema", "label_smoothing"):
            self._check(name, lambda v: 0 <= v < 1, "at least 0 and below 1")
        for name in ("layer_decay", "crop_scale"):
            self._check(name, lambda v: 0 < v <= 1, "above 0 and at most 1")
        self._check("std", lambda v: all(s > 0 for s in v), "above 0 in every channel")

    def _check(self, name: str, ok: Any, allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not ok(value):
            raise ValueError(f"{name} must be {allowed}; got {value}")

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, metrics and curves go."""
        return Path(self.out) if self.out else Path("runs") / f"{self.dataset}-{self.model}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as saved in config.json and in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of to_dict. Unknown names raise ValueError."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"no such training option: {', '.join(unknown)}")
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def locked_differences(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """What may not change when a run is resumed, and would: ["lr: 0.1 -> 0.2", ...]."""
    return [
        f"{f.name}: {getattr(saved, f.name)} -> {getattr(wanted, f.name)}"
        for f in dataclasses.fields(TrainConfig)
        if not f.metadata["free"] and getattr(saved, f.name) != getattr(wanted, f.name)
    ]
