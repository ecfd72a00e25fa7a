"""The training loop: it learns, resumes to the bit, and stops with a usable message."""

import dataclasses
import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from vitfast.train import CheckpointError, Interrupted, TrainConfig, TrainingError, fit, load_checkpoint, load_model
from vitfast.train.config import locked_differences
from vitfast.train.data import load_dataset
from vitfast.train.engine import Trainer
from vitfast.train.evaluate import evaluate
from vitfast.train.loader import eval_batches
from vitfast.train.metrics import Meter, read_metrics
from vitfast.train.optim import build_optimizer, lr_factor, parameter_groups
from vitfast.train.recipes import RECIPES, recipe_config

pytestmark = pytest.mark.usefixtures("one_thread")
TINY_VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2}
FAST = {
    "model": "vit_tiny_patch2_8",
    "model_args": TINY_VIT,
    "epochs": 2,
    "batch_size": 128,
    "log_every": 2,
    "device": "cpu",
}


class Silent:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.statuses: list = []

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def step(self, status) -> None:
        self.statuses.append(status)

    def message(self, text: str) -> None:
        self.messages.append(text)


def train(out: Path, **settings):
    run = {k: settings.pop(k) for k in ("resume", "overwrite", "on_step") if k in settings}
    return fit(out=str(out), reporter=Silent(), **run, **(FAST | settings))


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes half of a tiny run's time; one test is about it."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(Trainer, "_draw_curves", lambda self: None)


@pytest.fixture
def draws():
    """Asked for by the test that wants curves."""


def untimed(folder: Path) -> list[dict]:
    """metrics.jsonl without the figures that depend on the clock."""
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "images_per_second")}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_state(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(straight: Path, resumed: Path) -> None:
    a, b = (load_checkpoint(folder / "last.pt") for folder in (straight, resumed))
    for content in (a, b):
        content["progress"].pop("seconds")
        content["config"].pop("out")
        content["config"].pop("save_every")
    assert_same_state(a, b)
    assert untimed(straight) == untimed(resumed)


def stop_at(step: int, signum: int = signal.SIGINT):
    def on_step(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signum)

    return on_step


VIT = {
    "model_args": TINY_VIT | {"pos_drop_rate": 0.1, "drop_path_rate": 0.1},
    "batch_size": 128,
    "accumulate": 2,
    "ema": 0.9,
    "mixup": 0.2,
    "cutmix": 1.0,
    "clip_grad": 1.0,
    "crop_padding": 1,
    "rotate": 10.0,
    "label_smoothing": 0.1,
    "warmup_steps": 3,
    "layer_decay": 0.8,
}
RESNET = {
    "model": "resnet20",
    "model_args": {},
    "optimizer": "sgd",
    "lr": 0.05,
    "batch_size": 256,
    "schedule": "linear",
}


@pytest.mark.parametrize(
    ("settings", "stops"),
    [(VIT, (2, 5)), (VIT | {"precision": "bf16"}, (8,)), (RESNET, (4,))],
    ids=["vit", "vit-bf16", "resnet-sgd"],
)
def test_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path, settings, stops):
    train(tmp_path / "straight", **settings)
    for step in stops:
        out = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted) as caught:
            train(out, on_step=stop_at(step), **settings)
        assert caught.value.exit_code == 130
        assert caught.value.checkpoint == str(out / "last.pt")
        assert load_checkpoint(out / "last.pt")["progress"]["step"] == step
        torch.manual_seed(12345)  # what happened in between does not matter
        fit(resume=caught.value.checkpoint, reporter=Silent())
        assert_same_run(tmp_path / "straight", out)


def test_resume_after_a_crash_forgets_what_came_after_the_checkpoint(tmp_path):
    class Crash(Exception):
        pass

    def crash(step: int) -> None:
        if step == 9:
            raise Crash

    train(tmp_path / "straight")
    with pytest.raises(Crash):
        train(tmp_path / "crashed", save_every=3, on_step=crash)
    # last.pt is of step 9 (the crash came just after it); make it step 6's by crashing between saves.
    with pytest.raises(Crash):
        train(tmp_path / "crashed", save_every=7, on_step=crash, overwrite=True)
    assert load_checkpoint(tmp_path / "crashed" / "last.pt")["progress"]["step"] == 7
    assert [r["step"] for r in untimed(tmp_path / "crashed")] == [2, 4, 6, 8]
    train(tmp_path / "crashed", resume="auto", save_every=7)
    assert_same_run(tmp_path / "straight", tmp_path / "crashed")


def test_resume_into_another_folder_leaves_the_old_one_alone(tmp_path):
    train(tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(tmp_path / "old", on_step=stop_at(13))
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    result = fit(resume=tmp_path / "old" / "last.pt", out=str(tmp_path / "new"), reporter=Silent())
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert_same_run(tmp_path / "straight", tmp_path / "new")
    assert result.checkpoint.exists()


def test_resume_keeps_settings_and_refuses_others(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", on_step=stop_at(2), lr=3e-4)
    with pytest.raises(ValueError, match=r"a resumed run keeps its settings; .*: lr: 0.0003 -> 0.1"):
        fit(resume=tmp_path / "run" / "last.pt", lr=0.1, reporter=Silent())
    result = fit(resume=tmp_path / "run" / "last.pt", save_every=3, reporter=Silent())
    assert result.steps == 22
    again = fit(resume=tmp_path / "run" / "last.pt", reporter=Silent())
    assert (again.steps, again.test_accuracy) == (22, result.test_accuracy)
    with pytest.raises(CheckpointError, match=r"best.pt holds weights only; resume from .*last.pt"):
        fit(resume=tmp_path / "run" / "best.pt", reporter=Silent())
    assert train(tmp_path / "fresh", resume="auto", epochs=1).steps == 11  # nothing there yet: a new run


def test_sigterm_also_saves(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGTERM") as caught:
        train(tmp_path / "run", on_step=stop_at(2, signal.SIGTERM))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_of_every_step(tmp_path, schedule):
    total, warmup = 10, 4
    rates = [lr_factor(step, total, warmup, schedule) for step in range(total)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    half = {"cosine": 0.5, "linear": 0.5, "constant": 1.0}[schedule]
    assert math.isclose(rates[7], half)
    assert rates[9] > 0
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_weight_decay_spares_vectors_positions_and_tokens():
    import vitfast

    model = vitfast.create_model("vit_small_patch14_reg4_dinov2", num_classes=3, img_size=28, depth=2, embed_dim=48)
    groups = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(names)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    blocks = {f"blocks.{i}.{n}.weight" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert decayed == blocks | {"patch_embed.proj.weight", "head.weight"}


def test_layer_decay_scales_by_depth():
    import vitfast

    model = vitfast.create_model("vit_tiny_patch2_8", num_classes=3, img_size=8, in_chans=1, depth=2)
    scales = {id(p): g["lr_scale"] for g in parameter_groups(model, 0.1, 0.5) for p in g["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert by_name["pos_embed"] == by_name["patch_embed.proj.weight"] == 0.125
    assert by_name["blocks.0.attn.qkv.weight"] == 0.25
    assert by_name["blocks.1.mlp.fc2.bias"] == 0.5
    assert by_name["head.weight"] == 1.0
    with pytest.raises(ValueError, match="layer_decay must be 1 for Linear, which has no `blocks`"):
        parameter_groups(nn.Linear(2, 2), 0.0, 0.5)


def test_accumulation_equals_one_large_batch(tmp_path):
    """Same images per step, so the same gradients up to rounding; SGD keeps the difference small."""
    settings = {"optimizer": "sgd", "lr": 0.1, "steps": 3}
    train(tmp_path / "large", batch_size=128, **settings)
    train(tmp_path / "accumulated", batch_size=32, accumulate=4, **settings)
    large, accumulated = (load_checkpoint(tmp_path / n / "last.pt")["weights"] for n in ("large", "accumulated"))
    for key in large:
        torch.testing.assert_close(large[key], accumulated[key], atol=1e-5, rtol=1e-4)


def test_moving_average_is_evaluated_and_saved(tmp_path):
    settings = {"lr": 3e-3, "epochs": 1}
    result = train(tmp_path / "ema", ema=0.5, **settings)
    content = load_checkpoint(tmp_path / "ema" / "last.pt")
    assert content["ema"]["updates"] == 11
    assert any(not torch.equal(content["ema"]["weights"][k], v) for k, v in content["weights"].items())
    model, info, _ = load_model(result.checkpoint)
    dataset = load_dataset("digits")
    evaluation = evaluate(model, eval_batches(dataset.test, info, batch_size=256), 10)
    assert evaluation.accuracy == result.test_accuracy


def test_moving_average_includes_batch_statistics(tmp_path):
    train(tmp_path, ema=0.5, **(RESNET | {"steps": 3}))
    content = load_checkpoint(tmp_path / "last.pt")
    averaged, last = content["ema"]["weights"], content["weights"]
    assert not torch.equal(averaged["bn1.running_mean"], last["bn1.running_mean"])
    assert not torch.equal(averaged["bn1.running_mean"], torch.zeros(16))


def test_clipping_bounds_the_step(tmp_path):
    """Plain SGD moves the weights by lr x gradient, so clipping at c bounds a step's length by lr x c."""
    import vitfast

    torch.manual_seed(0)
    start = vitfast.create_model("vit_tiny_patch2_8", num_classes=10, img_size=8, in_chans=1, **TINY_VIT).state_dict()
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "steps": 1, "log_every": 1}
    lengths = {}
    for name, clip in (("free", 0.0), ("clipped", 0.01)):
        train(tmp_path / name, clip_grad=clip, **settings)
        end = load_checkpoint(tmp_path / name / "last.pt")["weights"]
        lengths[name] = torch.stack([(end[k] - v).norm() for k, v in start.items()]).norm().item()
    assert lengths["free"] > 0.1
    assert lengths["clipped"] == pytest.approx(0.01, rel=1e-3)
    assert untimed(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(lengths["free"], rel=1e-3)


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    kept = {}

    def spy(step: int) -> None:
        if step == 5:
            kept["bytes"] = (tmp_path / "run" / "last.pt").read_bytes()

    with pytest.raises(
        TrainingError,
        match=r"the loss is not finite at step \d+; the last good checkpoint, .*last.pt of step \d+, is kept",
    ) as caught:
        train(tmp_path / "run", optimizer="sgd", lr=1e25, warmup_steps=21, save_every=1, on_step=spy)
    step = int(str(caught.value).split("step ")[1].split(";")[0])
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    assert content["progress"]["step"] < step
    assert all(torch.isfinite(v).all() for v in content["weights"].values())
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    """The loss can still be finite when the step after it destroyed the weights."""
    with pytest.raises(TrainingError, match=r"weights are not finite after step 1; no checkpoint had been saved yet"):
        train(tmp_path / "run", optimizer="sgd", lr=1e39, save_every=1)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_run_folder_is_not_overwritten_by_accident(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match=r"already holds a run; go on with it \(--resume auto\), replace it"):
        train(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="warmup_steps"):
        train(tmp_path, epochs=1, overwrite=True, warmup_steps=1000)
    assert (tmp_path / "best.pt").exists()  # a mistake in the settings costs nothing
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path, steps=3, overwrite=True).steps == 3
    assert (tmp_path / "notes.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        train(tmp_path / "file")


def test_what_a_run_leaves_behind(tmp_path, draws):
    result = train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt",
        "config.json",
        "curves.png",
        "last.pt",
        "metrics.jsonl",
    ]
    assert TrainConfig.from_dict(json.loads((tmp_path / "config.json").read_text())).epochs == 2
    records = untimed(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(2, 23, 2))
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [1, 2]
    assert epochs[-1]["test_accuracy"] == result.test_accuracy
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(tmp_path / "best.pt")["data"]["class_names"] == list("0123456789")


def test_reported_figures_and_time_left(tmp_path):
    silent = Silent()
    fit(out=str(tmp_path), reporter=silent, **FAST)
    assert [s.step for s in silent.statuses] == list(range(1, 23))
    logged = [s for s in silent.statuses if s.loss is not None]
    assert [s.step for s in logged] == list(range(2, 23, 2))
    assert all(s.images_per_second > 0 and 0 <= s.accuracy <= 1 for s in logged)
    assert logged[-1].seconds_left == 0
    assert "digits: 1438 training and 359 test images, 10 classes, 8 px; 22 steps of 128 images" in silent.messages[0]


def test_learns_the_fake_patterns(tmp_path):
    """Chance is 10 %; the patterns are easy, so even this model finds them."""
    result = train(
        tmp_path,
        model="vit_tiny_patch4_32",
        model_args=TINY_VIT,
        dataset="fake",
        epochs=2,
        batch_size=32,
        lr=3e-3,
        weight_init="lecun",
    )
    assert result.test_accuracy > 0.9
    assert result.best_accuracy >= result.test_accuracy


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_fp32_weights(tmp_path, precision):
    settings = {"steps": 4, "lr": 3e-3}
    loss = {p: train(tmp_path / p, precision=p, **settings).test_loss for p in ("fp32", precision)}
    weights = load_checkpoint(tmp_path / precision / "last.pt")["weights"]
    assert all(v.dtype == torch.float32 for v in weights.values() if v.is_floating_point())
    assert loss[precision] != loss["fp32"]
    assert loss[precision] == pytest.approx(loss["fp32"], rel=0.3)


def test_image_folder_trains_and_resumes_to_the_bit(tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for k, name in enumerate(("dark", "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(k * 128, k * 128 + 128, (20, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / name / f"{i}.png")
    settings = {
        "dataset": "folder",
        "data": str(tmp_path / "data"),
        "img_size": 16,
        "model": "resnet20",
        "model_args": {},
        "batch_size": 4,
        "workers": 1,
        "crop_scale": 0.5,
        "flip": True,
        "lr": 3e-3,
        "epochs": 3,
    }
    result = train(tmp_path / "straight", **settings)
    assert result.test_accuracy == 1.0
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", on_step=stop_at(6), **settings)
    fit(resume=tmp_path / "stopped" / "last.pt", workers=0, reporter=Silent())
    a, b = (load_checkpoint(tmp_path / n / "last.pt")["weights"] for n in ("straight", "stopped"))
    assert_same_state(a, b)


def test_fine_tuning_from_a_checkpoint_of_other_classes_and_size(tmp_path):
    source = train(tmp_path / "source", epochs=1)
    before = load_checkpoint(source.checkpoint)["weights"]
    torch.save(
        before | {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)},
        tmp_path / "w.pt",
    )
    silent = Silent()
    tuned = fit(
        out=str(tmp_path / "tuned"),
        reporter=silent,
        **(FAST | {"init": str(tmp_path / "w.pt"), "img_size": 12, "lr": 0.0, "steps": 1}),
    )
    after = load_checkpoint(tuned.checkpoint)["weights"]
    assert torch.equal(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    assert (after["head.weight"] == 0).all()
    assert after["pos_embed"].shape[1] == 36
    assert any("new zero-initialised head for 10 classes" in m for m in silent.messages)
    assert any("position embeddings interpolated from 16 to 36 tokens" in m for m in silent.messages)
    # a vitfast checkpoint of the same classes keeps its head
    same = train(tmp_path / "same", init=str(source.checkpoint), lr=0.0, steps=1)
    assert_same_state(load_checkpoint(same.checkpoint)["weights"], before)
    with pytest.raises(ValueError, match=r"missing: blocks\.1"):
        train(tmp_path / "deeper", init=str(source.checkpoint), model_args=TINY_VIT | {"depth": 2})


def test_lecun_start_has_its_scales(tmp_path):
    settings = {"weight_init": "lecun", "model_args": {"depth": 1}, "lr": 0.0, "steps": 1}
    weights = load_checkpoint(train(tmp_path, **settings).checkpoint)["weights"]
    expected = {"attn.qkv": 128**-0.5, "attn.proj": 128**-0.5, "mlp.fc1": 128**-0.5, "mlp.fc2": 512**-0.5}
    for name, std in expected.items():
        assert weights[f"blocks.0.{name}.weight"].std().item() == pytest.approx(std, rel=0.03)
    assert weights["pos_embed"].std().item() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="weight_init must be 'model' for SmallResNet"):
        train(tmp_path / "resnet", **(RESNET | {"weight_init": "lecun"}))


def test_source_recipes_take_their_own_normalisation(tmp_path):
    result = train(tmp_path, steps=1, mean=(0.5,), std=(0.5,))
    _, info, _ = load_model(result.checkpoint)
    assert (info.mean, info.std) == ((0.5,), (0.5,))
    with pytest.raises(ValueError, match="mean must have 1 values, one per channel of digits"):
        train(tmp_path / "b", mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0; got -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number; got nan"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, sgd; got 'lion'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"crop_scale": 0.0}, "crop_scale must be above 0 and at most 1"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"batchsize": 3}, "no such training option: batchsize"),
        (
            {"batch_size": 1000, "accumulate": 2},
            "batch_size x accumulate must be at most the 1438 training images; got 1000 x 2",
        ),
        ({"warmup_steps": 22}, "warmup_steps must be below the run's 22 steps; got 22"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"img_size": 9}, "img_size must be a multiple of the patch size 2"),
        ({"model": "vit_tiny_patch2_9"}, "unknown model name 'vit_tiny_patch2_9'; nearest: vit_tiny_patch2_8"),
        ({"recipe": "digits"}, "recipe must be one of digits-vit, .*; got 'digits'"),
        ({"config": TrainConfig()}, "give either a config or a recipe with overrides"),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **settings)


def test_many_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotImplementedError, match="WORLD_SIZE=2"):
        train(tmp_path)


def test_deterministic_flag_is_put_back(tmp_path):
    seen = []
    train(
        tmp_path,
        steps=1,
        deterministic=True,
        on_step=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_config_through_json_and_its_differences():
    config = TrainConfig(mean=(0.5,), std=(0.5,), model_args={"depth": 2})
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    other = dataclasses.replace(config, lr=0.5, workers=7, out="elsewhere")
    assert locked_differences(config, other) == ["lr: 0.001 -> 0.5"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_their_model_and_optimizer(name):
    """On the meta device: sizes and options fit together, without the memory."""
    import vitfast

    config = recipe_config(name, {})
    with torch.device("meta"):
        model = vitfast.create_model(config.model, num_classes=10, img_size=config.img_size, **config.model_args)
    assert build_optimizer(model, config).param_groups


def test_meter_goes_on_where_it_was():
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    first = Meter(torch.device("cpu"))
    first.add(torch.tensor(2.0), logits, labels)
    second = Meter(torch.device("cpu"), first.sums())
    second.add(torch.tensor(1.0), logits[:2], labels[:2])
    assert second.means() == pytest.approx((10 / 6, 5 / 6))
