"""The `vitfast` command, in process where that is enough and as a child process where it is not."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitfast.cli.info import backend_table
from vitfast.cli.main import COMMANDS, main

TINY = ["--model-arg", "depth=1", "--model-arg", "embed_dim=32", "--model-arg", "num_heads=2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run of a tiny model on the digits."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    flags = ["--out", str(out), "--epochs", "2", "--batch-size", "64", "--lr", "0.01", "--weight-init", "lecun"]
    assert main(["train", *TINY, *flags]) == 0
    return out


def failure(capsys, *argv: str) -> str:
    """Run, expect exit code 2 and one line on standard error; returns the line."""
    try:
        code = main(list(argv))
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("vitfast: error: ")
    assert error.count("\n") == 1
    return error


def test_help_is_quick_and_needs_no_torch():
    program = (
        "import sys; from vitfast.cli.main import main\n"
        "for argv in (['--help'], ['--version'], ['train', '--help'], ['eval', '--help'], ['predict', '-h'], ['info', '-h']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as stopped: assert stopped.code == 0, argv\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")
    for word in (*COMMANDS, "digits-vit", "cifar10-alexnet-source", "--batch-size", "--resume PATH|auto"):
        assert word in done.stdout


def test_wrong_commands_and_flags(capsys):
    assert "no command 'trian', did you mean 'train'?" in failure(capsys, "trian")
    assert "unrecognized arguments: --epoch 3" in failure(capsys, "train", "--epoch", "3")
    assert "invalid choice: 'mnist'" in failure(capsys, "train", "--dataset", "mnist")
    assert "expected KEY=VALUE, got 'depth'" in failure(capsys, "train", "--model-arg", "depth")
    assert "invalid int value: 'two'" in failure(capsys, "train", "--epochs", "two")
    assert "the following arguments are required: --checkpoint" in failure(capsys, "eval")
    assert main([]) == 2


def test_bad_input_is_one_line(capsys, tmp_path):
    missing = str(tmp_path / "none.pt")
    out = ["--out", str(tmp_path / "out")]
    assert f"no checkpoint {missing}" in failure(capsys, "eval", "--checkpoint", missing)
    assert "unknown model name 'vit_bse_patch16_224'; nearest: vit_" in failure(
        capsys, "train", "--model", "vit_bse_patch16_224", *out
    )
    assert "lr must be at least 0; got -1.0" in failure(capsys, "train", "--lr", "-1", *out)
    assert "needs the folder of the images (--data FOLDER)" in failure(capsys, "train", "--dataset", "folder", *out)
    (tmp_path / "empty").mkdir()
    empty = ["--data", str(tmp_path / "empty"), "--overwrite"]
    assert "is no image dataset" in failure(capsys, "train", "--dataset", "folder", *empty, *out)
    assert "no Fashion-MNIST in" in failure(capsys, "train", "--dataset", "fashion-mnist", *empty, *out)
    assert "takes no override named dept" in failure(capsys, "train", "--model-arg", "dept=3", *out, "--overwrite")
    assert "img_size must be a multiple of the patch size 2, got 9" in failure(
        capsys, "train", "--img-size", "9", *out, "--overwrite"
    )


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert main(["eval", "--checkpoint", str(tmp_path / "none.pt"), "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("vitfast: error: no checkpoint")


def test_every_option_of_train_reaches_the_config(tmp_path, monkeypatch):
    """Each flag is read under its own name, so none is decorative by a typo."""
    import dataclasses

    from vitfast.train import TrainConfig
    from vitfast.train import run as fit_module

    seen = {}

    def fake_fit(**kwargs):
        seen.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "fit", fake_fit)
    flags = {
        "model": "resnet20", "img_size": 16, "init": "w.pt", "weight_init": "lecun", "backend": "torch", "recompute": "mlp",
        "dataset": "fake", "data": "d", "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1], "workers": 5, "crop_padding": 3,
        "crop_scale": 0.4, "flip": True, "rotate": 2.0, "mixup": 0.1, "cutmix": 0.2, "epochs": 3, "steps": 4, "batch_size": 5,
        "accumulate": 6, "optimizer": "sgd", "lr": 0.7, "momentum": 0.8, "beta2": 0.98, "weight_decay": 0.09,
        "layer_decay": 0.6, "schedule": "linear", "warmup_steps": 11, "clip_grad": 1.5, "label_smoothing": 0.12, "ema": 0.99,
        "precision": "bf16", "compile": True, "device": "cuda:3", "seed": 13, "deterministic": True, "out": "o",
        "log_every": 14, "save_every": 15,
    }  # fmt: skip
    assert set(flags) | {"model_args"} == {f.name for f in dataclasses.fields(TrainConfig)}
    argv = ["train", "--model-arg", "depth=2", "--model-arg", "activation=gelu_tanh"]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert main(argv) == 130
    assert {name: seen[name] for name in flags} == flags
    assert seen["model_args"] == {"depth": 2, "activation": "gelu_tanh"}
    assert (
        main(["train", "--recipe", "digits-vit", "--no-flip", "--resume", "auto", "--overwrite", "--download"]) == 130
    )
    assert (seen["recipe"], seen["flip"], seen["resume"]) == ("digits-vit", False, "auto")
    assert seen["overwrite"] is seen["download"] is True


def test_train_prints_progress_and_json(capsys, tmp_path):
    assert main(["train", *TINY, "--out", str(tmp_path), "--steps", "4", "--log-every", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("epoch 1/1  step 2/4  loss ") and line.endswith(" left") for line in lines)
    result = json.loads(lines[-1])
    assert result["steps"] == 4
    assert Path(result["checkpoint"]).exists()


def test_eval(capsys, run):
    assert main(["eval", "--checkpoint", str(run / "best.pt"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    best = max(json.loads(line).get("test_accuracy", 0) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert figures["accuracy"] == best > 0.3
    assert figures["top5"] > figures["accuracy"]
    assert [row["images"] for row in figures["classes"]] == [sum(row) for row in figures["confusion"]]
    assert sum(row["recall"] * row["images"] for row in figures["classes"]) == pytest.approx(best * 359)
    assert main(["eval", "--checkpoint", str(run / "best.pt"), "--split", "train", "--batch-size", "100"]) == 0
    text = capsys.readouterr().out
    assert "vit_tiny_patch2_8 on 1438 train images of digits (fp32): accuracy " in text
    assert len(text.splitlines()) == 13


def test_eval_on_a_dataset_of_other_classes(capsys, run):
    error = failure(capsys, "eval", "--checkpoint", str(run / "best.pt"), "--dataset", "fake")
    assert "dataset fake has 10 classes (pattern 0, pattern 1, pattern 2, ...) and 3 channels" in error


def test_predict_files(capsys, run, tmp_path):
    from vitfast.train import load_dataset, load_model
    from vitfast.train.loader import eval_batches

    split = load_dataset("digits").test
    chosen = [i * 359 // 20 for i in range(20)]
    paths = [str(tmp_path / f"{i}.png") for i in chosen[:3]]
    for i, path in zip(chosen[:3], paths, strict=True):
        Image.fromarray(split.images[i, 0].numpy()).save(path)
    Image.new("RGB", (50, 30), (9, 9, 9)).save(tmp_path / "photo.jpg")
    paths.append(str(tmp_path / "photo.jpg"))
    sheet = tmp_path / "sheet.png"
    arguments = ["--checkpoint", str(run / "best.pt"), "--out", str(sheet)]
    assert main(["predict", *paths, *arguments, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["image"] for r in records] == paths
    for record in records:
        probabilities = [entry["probability"] for entry in record["top"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.000001
    with Image.open(sheet) as image:
        assert image.width > image.height > 100
    # the same pixels give the same answer from a file, from the dataset, and in an evaluation's batch
    assert main(["predict", "--samples", "20", *arguments, "--json"]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [s["top"] for s in samples[:3]] == [r["top"] for r in records[:3]]
    model, info, _ = load_model(run / "best.pt")
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in eval_batches(split, info, batch_size=359)])
    assert [int(s["top"][0]["class"]) for s in samples] == logits.argmax(1)[chosen].tolist()
    assert [int(s["true"]) for s in samples] == split.labels[chosen].tolist()
    assert main(["predict", paths[0], *arguments]) == 0
    text = capsys.readouterr().out
    assert text.startswith(paths[0])
    assert f"picture: {sheet}" in text


def test_predict_errors(capsys, run, tmp_path):
    checkpoint = ["--checkpoint", str(run / "best.pt"), "--out", str(tmp_path / "p.png")]
    assert "give either image files or --samples" in failure(capsys, "predict", *checkpoint)
    assert "no image file nowhere.png" in failure(capsys, "predict", "nowhere.png", *checkpoint)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert f"cannot read image {tmp_path / 'bad.png'}" in failure(
        capsys, "predict", str(tmp_path / "bad.png"), *checkpoint
    )
    assert "--samples must be at most the 359 test images" in failure(
        capsys, "predict", "--samples", "360", *checkpoint
    )
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(2)}, foreign)
    assert f"{foreign} is not a vitfast checkpoint" in failure(
        capsys, "predict", "--samples", "1", "--checkpoint", str(foreign)
    )
    assert not (tmp_path / "p.png").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(capsys, tmp_path):
    """As a person does it: a child process, SIGINT, then the command it printed."""
    out = tmp_path / "run"
    vitfast = [sys.executable, "-m", "vitfast.cli.main"]
    command = [*vitfast, "train", *TINY, "--out", str(out), "--epochs", "4", "--log-every", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            for line in child.stdout:
                if "step 3/" in line:
                    break
            child.send_signal(signal.SIGINT)
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Traceback" not in error
    assert error.strip().endswith(f"go on with: vitfast train --resume {out / 'last.pt'}")
    printed = error.strip().split("go on with: vitfast ")[1]
    assert main(printed.split()) == 0
    said = capsys.readouterr().out
    assert "resumed at step " in said
    assert "after 88 steps" in said


def test_disk_full_is_one_line(capsys, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    error = failure(capsys, "train", *TINY, "--out", str(tmp_path / "run"), "--steps", "1")
    assert "best.pt: No space left on device; there was no earlier checkpoint there" in error


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert {"float32", "bfloat16"} <= set(facts["cpu"]["tflops"])
    assert all(0 < rate < 1e4 for rate in facts["cpu"]["tflops"].values())
    assert {"_C", "_C_cuda"} == set(facts["extension"])
    assert any(row["backend"] == "torch" and row["available"] for row in facts["backends"])
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for row in facts["backends"]:
        assert row["op"] in text
        assert row["available"] or " ".join(row["reason"].split()) in text
    for status in facts["extension"].values():
        assert status["loaded"] or " ".join(status["error"].split()) in text
    assert re.search(r"limit, TFLOP/s: float32 [\d.]+, bfloat16 [\d.]+", text)
    assert "measured" not in text
    assert main(["info", "--rates"]) == 0
    assert re.search(
        r"CPU +measured: copy [\d.]+ GB/s, products float32 [\d.]+ TFLOP/s, bfloat16", capsys.readouterr().out
    )


def test_backend_table():
    rows = [
        {"op": "attention", "backend": "cpu", "available": True, "reason": None},
        {"op": "attention", "backend": "cuda", "available": False, "reason": "no GPU\nhere"},
        {"op": "mlp", "backend": "cpu", "available": False, "reason": "not built"},
        {"op": "mlp", "backend": "triton", "available": False, "reason": None},
    ]
    lines = backend_table(rows)
    assert [line.split() for line in lines[:3]] == [
        ["op", "cpu", "cuda", "triton"],
        ["attention", "yes", "no", "-"],
        ["mlp", "no", "-", "no"],
    ]
    assert lines[3:] == ["cuda: no GPU here (attention)", "cpu: not built (mlp)", "triton: no reason given (mlp)"]


def test_a_finished_run_is_not_trained_again(capsys, run):
    before = (run / "last.pt").read_bytes()
    assert main(["train", "--resume", str(run / "last.pt")]) == 0
    assert "resumed at step 44 of 44" in capsys.readouterr().out
    assert (run / "last.pt").read_bytes() == before
