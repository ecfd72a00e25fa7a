"""The training loop.

A step is one optimizer step: `accumulate` batches of `batch_size` images. Everything a step depends on is either in the
checkpoint or follows from (seed, epoch, step), so a resumed run takes the same steps, bit for bit.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import vitfast
from vitfast.train import checkpoint as ckpt
from vitfast.train import run_folder
from vitfast.train.config import TrainConfig
from vitfast.train.data import Dataset, DatasetInfo, TensorSplit, load_dataset
from vitfast.train.evaluate import autocast, evaluate
from vitfast.train.initial import lecun_init, load_initial
from vitfast.train.loader import eval_batches, train_batches
from vitfast.train.metrics import Meter, MetricsLog
from vitfast.train.optim import build_optimizer, lr_factor, set_lr
from vitfast.train.progress import Reporter, Status, clock
from vitfast.train.signals import Interrupted, StopRequest

_CURVES_EVERY = 60.0  # seconds; drawing takes half a second


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the weights are no longer finite."""


@dataclass
class Progress:
    """Where a run is; saved in every checkpoint. epoch: finished ones; window, running: Meter sums."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    test_accuracy: float = 0.0
    test_loss: float = 0.0
    seconds: float = 0.0
    metrics_lines: int = 0
    threads: int = 0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    running: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


@dataclass(frozen=True)
class FitResult:
    """How a run ended. Accuracies are shares in 0..1 on the test split; checkpoint is the best epoch's file."""

    test_accuracy: float
    test_loss: float
    best_accuracy: float
    best_epoch: int
    epochs: int
    steps: int
    seconds: float
    folder: Path
    checkpoint: Path


class Trainer:
    """One run: model, optimizer, data and where it is."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        saved: dict[str, Any] | None,
        download: bool,
        stop: StopRequest,
        reporter: Reporter,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self.config, self.stop, self.reporter, self.on_step = config, stop, reporter, on_step
        self.folder = config.run_folder
        self.device = device
        self.dataset = self._load_data(download)
        self.info = self.dataset.info
        self.model_kwargs: dict[str, Any] = {
            "num_classes": len(self.info.class_names),
            "img_size": self.info.image_size,
            "in_chans": self.info.channels,
            "recompute": config.recompute,
            **config.model_args,
        }
        torch.manual_seed(config.seed)
        self.model = vitfast.create_model(config.model, backend=config.backend, **self.model_kwargs)
        if config.weight_init == "lecun":
            lecun_init(self.model)
        if config.init and saved is None:
            for line in load_initial(self.model, Path(config.init), len(self.info.class_names)):
                reporter.message(f"{config.init}: {line}")
        self.model.to(self.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.ema = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema
            else None
        )
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.mix = self._mixing()
        self.steps_per_epoch = len(self.dataset.train) // (config.batch_size * config.accumulate)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size x accumulate must be at most the {len(self.dataset.train)} training images; "
                f"got {config.batch_size} x {config.accumulate}"
            )
        self.total_steps = config.steps or config.epochs * self.steps_per_epoch
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        if config.warmup_steps >= self.total_steps and config.warmup_steps > 0:
            raise ValueError(
                f"warmup_steps must be below the run's {self.total_steps} steps; got {config.warmup_steps}"
            )
        self.progress = Progress()
        if saved is not None:
            self._restore(saved)
        self.window = Meter(self.device, self.progress.window)
        self.running = Meter(self.device, self.progress.running)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.curves_drawn = time.perf_counter()
        self.clock_started = time.perf_counter() - self.progress.seconds
        if saved is None:
            run_folder.clear(self.folder)  # not before: a mistake in the settings must not cost an earlier run
        self.metrics = MetricsLog(self.folder / run_folder.METRICS, self.progress.metrics_lines)
        config.save(self.folder / run_folder.CONFIG)

    def _load_data(self, download: bool) -> Dataset:
        config = self.config
        dataset = load_dataset(config.dataset, config.data, download=download)
        own = dataset.info
        info = replace(
            own, image_size=config.img_size or own.image_size, mean=config.mean or own.mean, std=config.std or own.std
        )
        train, test = (s.to(self.device) if isinstance(s, TensorSplit) else s for s in (dataset.train, dataset.test))
        return Dataset(info, train, test)

    def _mixing(self) -> nn.Module | None:
        """mixup, CutMix, or one of both by a coin; they draw from torch's global generator, which checkpoints hold."""
        classes = len(self.info.class_names)
        transforms: list[nn.Module] = []
        if self.config.mixup:
            transforms.append(v2.MixUp(alpha=self.config.mixup, num_classes=classes))
        if self.config.cutmix:
            transforms.append(v2.CutMix(alpha=self.config.cutmix, num_classes=classes))
        return v2.RandomChoice(transforms) if transforms else None

    def run(self) -> FitResult:
        self._announce()
        progress = self.progress
        try:
            while progress.step < self.total_steps or progress.step_in_epoch > 0:
                self._train_epoch()
                self._finish_epoch()
        except Interrupted as stopped:
            self._save_last()
            self._draw_curves()
            stopped.checkpoint = str(self.folder / run_folder.LAST)
            raise
        except TrainingError:
            self._draw_curves()
            raise
        finally:
            self.metrics.close()
        self._draw_curves()
        return FitResult(
            progress.test_accuracy,
            progress.test_loss,
            progress.best_accuracy,
            progress.best_epoch,
            progress.epoch,
            progress.step,
            progress.seconds,
            self.folder,
            self.folder / run_folder.BEST,
        )

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        c, say = self.config, self.reporter.message
        say(
            f"{c.model} ({parameters / 1e6:.2f} M parameters) on {c.dataset}: {len(self.dataset.train)} training and "
            f"{len(self.dataset.test)} test images, {len(self.info.class_names)} classes, {self.info.image_size} px; "
            f"{self.total_steps} steps of {c.batch_size * c.accumulate} images in {c.precision} on {self.device}"
        )
        threads = torch.get_num_threads()
        if self.progress.step:
            say(f"resumed at step {self.progress.step} of {self.total_steps}")
            if self.device.type == "cpu" and self.progress.threads != threads:
                say(
                    f"note: saved with {self.progress.threads} CPU threads, now {threads}: sums may differ in the last bit"
                )

    def _micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first = self.progress.step_in_epoch * self.config.accumulate
        return train_batches(
            self.dataset.train, self.info, self.config, epoch=self.progress.epoch, first=first, device=self.device
        )

    def _train_epoch(self) -> None:
        """The rest of the current epoch, or of the run."""
        progress = self.progress
        batches = self._micro_batches()
        self.model.train()
        window_started, window_images = time.perf_counter(), 0
        while progress.step_in_epoch < self.steps_per_epoch and progress.step < self.total_steps:
            self.stop.check()
            lr = self.config.lr * lr_factor(
                progress.step, self.total_steps, self.config.warmup_steps, self.config.schedule
            )
            set_lr(self.optimizer, lr)
            norm = self._step(islice(batches, self.config.accumulate))
            progress.step += 1
            progress.step_in_epoch += 1
            window_images += self.config.batch_size * self.config.accumulate
            status = Status(progress.step, self.total_steps, progress.epoch + 1, self.epochs, lr)
            if progress.step % self.config.log_every == 0 or self.device.type == "cpu":
                self._require_finite_loss()
            if progress.step % self.config.log_every == 0:
                rate = window_images / (time.perf_counter() - window_started)
                window_started, window_images = time.perf_counter(), 0
                status = self._log_step(status, rate, norm)
            self.reporter.step(status)
            if self.config.save_every and progress.step % self.config.save_every == 0:
                self._save_last()
            if self.on_step is not None:
                self.on_step(progress.step)

    def _step(self, micro_batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """One optimizer step; returns the gradient's norm before clipping, None without clipping."""
        for images, labels in micro_batches:
            target = labels
            if self.mix is not None:
                images, target = self.mix(images, labels)
            with autocast(self.device, self.config.precision):
                logits_BK = self.forward(images)
            logits_BK = logits_BK.float()
            loss = F.cross_entropy(logits_BK, target, label_smoothing=self.config.label_smoothing)
            bad = (self.first_bad_step < 0) & ~torch.isfinite(loss.detach())
            self.first_bad_step.masked_fill_(bad, self.progress.step + 1)
            for meter in (self.window, self.running):
                meter.add(loss, logits_BK.detach(), labels)
            self.scaler.scale(loss / self.config.accumulate).backward()
        norm = None
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return norm

    def _log_step(self, status: Status, rate: float, norm: torch.Tensor | None) -> Status:
        progress = self.progress
        loss, accuracy = self.window.means()
        self.window.reset()
        record = {
            "kind": "step",
            "step": status.step,
            "epoch": status.epoch,
            "epoch_position": status.step / self.steps_per_epoch,
            "loss": loss,
            "accuracy": accuracy,
            "lr": status.lr,
            "images_per_second": rate,
        }
        if norm is not None and torch.isfinite(norm):  # fp16's first steps may overflow; JSON has no infinity
            record["grad_norm"] = norm.item()
        self.metrics.write(record)
        left = (self.total_steps - progress.step) * self.config.batch_size * self.config.accumulate / rate
        return replace(status, loss=loss, accuracy=accuracy, images_per_second=rate, seconds_left=left)

    def _finish_epoch(self) -> None:
        """Evaluate, log, and save best.pt and last.pt."""
        self._require_finite_loss()
        progress, config = self.progress, self.config
        batches = eval_batches(
            self.dataset.test,
            self.info,
            batch_size=min(256, 4 * config.batch_size),
            workers=config.workers,
            device=self.device,
        )
        model = self.ema.module if self.ema is not None else self.model
        classes = len(self.info.class_names)
        result = evaluate(model, batches, classes, precision=config.precision, check=self.stop.check)
        train_loss, train_accuracy = self.running.means()
        self.running.reset()
        progress.epoch += 1
        progress.step_in_epoch = 0
        progress.test_accuracy, progress.test_loss = result.accuracy, result.loss
        progress.seconds = time.perf_counter() - self.clock_started
        self.metrics.write(
            {
                "kind": "epoch",
                "step": progress.step,
                "epoch": progress.epoch,
                "epoch_position": progress.step / self.steps_per_epoch,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": result.loss,
                "test_accuracy": result.accuracy,
                "test_top5": result.top5,
                "seconds": progress.seconds,
            }
        )
        better = result.accuracy > progress.best_accuracy
        if better:
            progress.best_accuracy, progress.best_epoch = result.accuracy, progress.epoch
            self._save(run_folder.BEST, with_training=False)
        self._save_last()
        if time.perf_counter() - self.curves_drawn > _CURVES_EVERY:
            self._draw_curves()
        self.reporter.message(
            f"epoch {progress.epoch}/{self.epochs}  train loss {train_loss:.3f}  accuracy {train_accuracy:.1%}  |  "
            f"test loss {result.loss:.3f}  accuracy {result.accuracy:.2%}{' (best)' if better else ''}  "
            f"{clock(progress.seconds)}"
        )

    def _require_finite_loss(self) -> None:
        step = int(self.first_bad_step)
        if step >= 0:
            raise TrainingError(f"the loss is not finite at step {step}; {self._last_good()}")

    def _last_good(self) -> str:
        last = self.folder / run_folder.LAST
        advice = "try a lower --lr, a longer --warmup-steps or --clip-grad 1"
        if not last.exists():
            return f"no checkpoint had been saved yet; {advice}"
        step = ckpt.load_checkpoint(last)["progress"]["step"]
        return f"the last good checkpoint, {last} of step {step}, is kept; {advice}"

    def _save_last(self) -> None:
        self._save(run_folder.LAST, with_training=True)

    def _save(self, name: str, *, with_training: bool) -> None:
        """Refuses weights that are not finite: they would replace the last good checkpoint."""
        self._require_finite_loss()
        finite = torch.stack([torch.isfinite(p).all() for p in self.model.parameters()]).all()
        if not finite:
            raise TrainingError(f"the weights are not finite after step {self.progress.step}; {self._last_good()}")
        self.progress.window, self.progress.running = self.window.sums(), self.running.sums()
        self.progress.metrics_lines, self.progress.threads = self.metrics.lines, torch.get_num_threads()
        self.progress.seconds = time.perf_counter() - self.clock_started
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": ckpt.random_state(),
        }
        ema = None
        if self.ema is not None:
            ema = {"weights": self.ema.module.state_dict(), "updates": int(self.ema.n_averaged)}
        ckpt.save_checkpoint(
            self.folder / name,
            {
                "model": {"name": self.config.model, "kwargs": self.model_kwargs},
                "data": self.info.to_dict(),
                "config": self.config.to_dict(),
                "progress": asdict(self.progress),
                "weights": self.model.state_dict(),
                "ema": ema,
                "training": training if with_training else None,
            },
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        origin = "the checkpoint to resume"
        if DatasetInfo.from_dict(saved["data"]) != self.info:
            raise ckpt.CheckpointError(
                f"{origin} was trained on other classes or another normalisation of {self.info.name}"
            )
        ckpt.load_weights(self.model, saved["weights"], origin)
        training = saved["training"]
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        if self.ema is not None:
            ckpt.load_weights(self.ema.module, saved["ema"]["weights"], origin)
            self.ema.n_averaged.fill_(saved["ema"]["updates"])
        self.progress = Progress(**saved["progress"])
        ckpt.set_random_state(training["random"])

    def _draw_curves(self) -> None:
        if self.progress.step:
            from vitfast.train.plots import curves

            title = f"{self.config.model} on {self.config.dataset}"
            curves(self.folder / run_folder.METRICS, self.folder / run_folder.CURVES, title)
            self.curves_drawn = time.perf_counter()
