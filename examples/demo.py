"""The project end to end in a few minutes on a CPU: what is here, is it right, does it learn, how fast is it.

Writes runs/demo/: both training runs, curves.png, predictions.png and summary.json. Run it with `make demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitfast
from vitfast.cli.main import main as command
from vitfast.models.reference import reference_forward
from vitfast.train import fit

SPEED_MODEL = "vit_small_patch16_224"
SPEED_BATCH = 8
ROUNDS = 5
TARGET_ACCURACY = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of everything written")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    headline("What is here: vitfast info")
    command(["info"])

    headline(f"Is it right: {SPEED_MODEL} against plain PyTorch, errors relative to fp64")
    torch.manual_seed(0)
    report = vitfast.verify(vitfast.create_model(SPEED_MODEL, depth=4))
    print(report)

    headline("Does it learn: a ViT and a small ResNet on scikit-learn's handwritten digits")
    vit = fit(recipe="digits-vit", out=str(out / "vit"), overwrite=True)
    resnet = fit(recipe="digits-resnet", out=str(out / "resnet"), overwrite=True)
    both_curves({"ViT": out / "vit", "ResNet-20": out / "resnet"}, out / "curves.png")
    picture(vit.checkpoint, out / "predictions.png")

    headline(f"How fast is it: {SPEED_MODEL}, batch {SPEED_BATCH}, {torch.get_num_threads()} CPU threads")
    speed = measure_speed()
    print(f"{'':22s}{'plain PyTorch':>14s}{'vitfast':>11s}{'speedup':>9s}")
    for label, row in speed.items():
        print(f"{label:22s}{row['plain_ms']:11.0f} ms{row['vitfast_ms']:8.0f} ms{row['speedup']:8.2f}x")

    summary = {
        "accuracy_vit": vit.test_accuracy,
        "accuracy_resnet": resnet.test_accuracy,
        "parity_fp32": report.error("float32"),
        "parity_passed": report.passed,
        "speedup_forward": speed["forward fp32"]["speedup"],
        "speedup_train": speed["training step fp32"]["speedup"],
        "speed": speed,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"vitfast": vitfast.__version__, "torch": torch.__version__},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    headline("Summary")
    print(f"ViT on the digits      {vit.test_accuracy:.2%} of the test images right ({vit.seconds:.0f} s)")
    print(f"ResNet on the digits   {resnet.test_accuracy:.2%} ({resnet.seconds:.0f} s)")
    print(f"fp32 logits            {summary['parity_fp32']:.1e} from fp64 (allowed 1e-5)")
    print(f"forward pass           {summary['speedup_forward']:.2f}x plain PyTorch, fp32")
    print(f"training step          {summary['speedup_train']:.2f}x plain PyTorch, fp32")
    for name in ("curves.png", "predictions.png", "summary.json"):
        print(f"  {out / name}")
    failed = [n for n, a in (("ViT", vit.test_accuracy), ("ResNet", resnet.test_accuracy)) if a < TARGET_ACCURACY]
    if failed or not report.passed:
        raise SystemExit(f"demo: not as it should be: {', '.join(failed) or 'parity'} (see above)")


def headline(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def measure_speed() -> dict[str, dict[str, float]]:
    """Median milliseconds of plain PyTorch and of vitfast on the same weights, taken in turn, round by round."""
    torch.manual_seed(0)
    model = vitfast.create_model(SPEED_MODEL)
    images, labels = torch.randn(SPEED_BATCH, 3, 224, 224), torch.randint(0, 1000, (SPEED_BATCH,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def forward(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[], Any]:
        def inner() -> None:
            with torch.inference_mode():
                run(images.to(dtype))

        return inner

    def step(run: Callable[[Tensor], Tensor], autocast: bool) -> Callable[[], Any]:
        def inner() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = torch.nn.functional.cross_entropy(run(images).float(), labels)
            loss.backward()
            optimizer.step()

        return inner

    def plain(x: Tensor) -> Tensor:
        return reference_forward(model, x)

    results = {
        "forward fp32": compare(forward(plain, torch.float32), forward(model, torch.float32)),
        "training step fp32": compare(step(plain, False), step(model, False)),
        "training step bf16": compare(step(plain, True), step(model, True)),
    }
    model.bfloat16().eval()
    results["forward bf16"] = compare(forward(plain, torch.bfloat16), forward(model, torch.bfloat16))
    return results


def compare(plain: Callable[[], Any], fast: Callable[[], Any]) -> dict[str, float]:
    times: dict[str, list[float]] = {"plain_ms": [], "vitfast_ms": []}
    plain(), fast()  # warm-up
    for _ in range(ROUNDS):
        for name, run in (("plain_ms", plain), ("vitfast_ms", fast)):
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: round(statistics.median(t), 1) for name, t in times.items()}
    return medians | {"speedup": round(medians["plain_ms"] / medians["vitfast_ms"], 3)}


def picture(checkpoint: Path, target: Path, count: int = 24) -> None:
    """Test images with what the model takes them for; `vitfast predict --samples` draws the same."""
    with contextlib.redirect_stdout(io.StringIO()):  # the probabilities of each image
        code = command(["predict", "--checkpoint", str(checkpoint), "--samples", str(count), "--out", str(target)])
    if code:
        raise SystemExit(code)


def both_curves(folders: dict[str, Path], target: Path) -> None:
    """Test accuracy and training loss of both runs over the epochs, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, accuracy) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, folder in folders.items():
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        epochs = [r for r in records if r["kind"] == "epoch"]
        numbers = [r["epoch"] for r in epochs]
        loss.plot(numbers, [r["train_loss"] for r in epochs], label=name)
        accuracy.plot(numbers, [r["test_accuracy"] for r in epochs], label=name)
    loss.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="test accuracy", ylim=(0.8, 1.0))
    accuracy.axhline(TARGET_ACCURACY, color="grey", linewidth=0.8, linestyle="--", label="97 %")
    for axes in (loss, accuracy):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
