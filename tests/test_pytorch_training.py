"""Other people's training loops around the models: checkpointing, DDP, FSDP2, Lightning and transformers' Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate_checks import Calls, blocks
from model_checks import flat
from pytorch_checks import KINDS, assert_same_step, images, pair, rel, step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KINDS_OF_CHECKPOINT = {"reentrant": CheckpointImpl.REENTRANT, "non-reentrant": CheckpointImpl.NO_REENTRANT}


def weights(model: nn.Module) -> Tensor:
    return flat({name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_around_the_model(kind: str, reentrant: bool) -> None:
    model, plain = pair(kind)
    x = images().requires_grad_()  # the reentrant kind wants an input with a gradient
    ours = step(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    slope, x.grad = x.grad, None
    assert_same_step(ours, step(plain, x))
    assert rel(slope, x.grad) <= 1e-5


@pytest.mark.parametrize("how", KINDS_OF_CHECKPOINT)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_wrapper_around_blocks(kind: str, how: str) -> None:
    model, plain = pair(kind)
    chosen = blocks(model)
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=KINDS_OF_CHECKPOINT[how])
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: m in chosen)
    assert sum(isinstance(m, CheckpointWrapper) for m in model.modules()) == 2
    with Calls() as calls:
        ours = step(model.train(), images())
    assert calls["attention"] == 4  # twice for each of two blocks
    ours = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in ours.items()}
    assert_same_step(ours, step(plain.train(), images()))


def test_selective_checkpointing_keeps_the_ops_it_is_told_to_keep() -> None:
    model, plain = pair()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op == torch.ops.vitfast.attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    with Calls() as calls:
        ours = step(model, images(), lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts))
    # The first block's attention is kept and its projection made again; the last block has none of the one and two of the
    # other, for the class token's query and for all keys and values.
    assert (calls["attention"], calls["norm_linear"]) == (1, 6)
    assert_same_step(ours, step(plain, images()))


def train(model: Any, call: Any, part: slice, steps: int = 2) -> list[float]:
    """Loss of each step of SGD on this part of a batch of eight, then the loss without gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    labels = torch.arange(8)[part] % 5
    losses = []
    for number in range(steps + 1):
        with torch.set_grad_enabled(number < steps):
            loss = nn.functional.cross_entropy(call(images(8)[part]), labels)
        losses.append(loss.item())
        if number < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def one_of_two(rank: int, kind: str, strategy: str, folder: str) -> None:
    """A process of the test below; the first saves the mean losses and the whole weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, _ = pair(kind)
    call: Callable[[Tensor], Tensor] = model
    if strategy == "ddp":
        call = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for block in blocks(model):
            dist.fsdp.fully_shard(block, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
        assert all(isinstance(p, dist.tensor.DTensor) for p in model.parameters())
    losses = torch.tensor(train(model, call, slice(4 * rank, 4 * rank + 4)))
    dist.all_reduce(losses)
    if strategy == "fsdp2":
        model.reshard()  # the root keeps its own parameters whole after a forward pass
    found = {n: p.full_tensor() if strategy == "fsdp2" else p for n, p in model.named_parameters()}
    if rank == 0:
        torch.save((losses / 2, {n: p.detach() for n, p in found.items()}), f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind: str, strategy: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (kind, strategy, str(tmp_path)), nprocs=2)
    losses, found = torch.load(tmp_path / "result.pt")
    _, plain = pair(kind)
    wanted = train(plain, plain, slice(0, 8))
    torch.testing.assert_close(losses, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    assert wanted[0] > wanted[-1] + 0.1  # it learned something
    assert found.keys() == dict(plain.named_parameters()).keys()
    assert rel(flat(found), weights(plain)) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    model, plain = pair()
    start = weights(model)
    data = torch.utils.data.TensorDataset(images(6), torch.arange(6) % 5)
    for m in (model, plain):
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
        )
        trainer.fit(Module(m), torch.utils.data.DataLoader(data, batch_size=2))
        assert trainer.global_step == 3
    assert rel(weights(model) - start, weights(plain) - start) <= 1e-2  # Adam divides by gradients that may be rounding
    assert rel(weights(model), weights(plain)) <= 1e-4


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs Hugging Face's accelerate")
    transformers = pytest.importorskip("transformers")
    model, plain = (net.model for net in pair("transformers"))
    start = weights(model)
    data = [{"pixel_values": images(1, seed=i)[0], "labels": i % 5} for i in range(6)]
    losses = []
    for m in (model, plain):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            optim="sgd",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(model=m, args=arguments, train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert rel(weights(model) - start, weights(plain) - start) <= 1e-4
    model.save_pretrained(tmp_path / "saved")
    again = type(plain).from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(plain)
    with torch.no_grad():
        assert rel(again(images()).logits, copy.deepcopy(model).eval()(images()).logits) <= 1e-5
