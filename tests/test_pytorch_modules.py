"""What PyTorch does to modules: dtypes, memory formats, devices, copies, saving, profiling, threads and processes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from model_checks import flat, small
from pytorch_checks import KINDS, assert_same_step, images, pair, rel, step
from torch.utils.data import DataLoader, Dataset

import vitfast

HALF = [torch.bfloat16, torch.float16]


def gradients(result: dict[str, torch.Tensor]) -> torch.Tensor:
    return flat({name: value for name, value in result.items() if name})


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_as_near_fp64_as_plain_pytorch(kind: str, dtype: torch.dtype) -> None:
    model, plain = pair(kind)
    x = images(16)

    def under_autocast(m: Any) -> dict[str, torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype):
                return m(x)

        return step(m, x, call)

    ours, theirs = under_autocast(model), under_autocast(plain)
    truth = step(copy.deepcopy(plain).double(), x.double())
    assert ours[""].dtype == theirs[""].dtype == dtype
    assert rel(ours[""], truth[""]) <= 1.5 * rel(theirs[""], truth[""])
    assert rel(gradients(ours), gradients(truth)) <= 1.5 * rel(gradients(theirs), gradients(truth))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights(kind: str, dtype: torch.dtype) -> None:
    model, plain = pair(kind)
    x = images(16)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(x.double())
    model, plain = (m.bfloat16() if dtype == torch.bfloat16 else m.half() for m in (model, plain))
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        ours, theirs = model(x.to(dtype)), plain(x.to(dtype))
    assert ours.dtype == dtype
    assert rel(ours, truth) <= 1.5 * rel(theirs, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler_skips_overflows_and_trains_otherwise(kind: str) -> None:
    model, plain = pair(kind)
    for big in (False, True):
        after = []
        for m in (copy.deepcopy(model), copy.deepcopy(plain)):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120 if big else 2.0**8)
            optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
            with torch.autocast("cpu", torch.float16):
                loss = m(images()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            after.append((scaler.get_scale(), flat({n: p.detach() for n, p in m.named_parameters()})))
        assert after[0][0] == after[1][0] == (2.0**119 if big else 2.0**8)
        before = flat({n: p.detach() for n, p in model.named_parameters()})
        assert torch.equal(after[0][1], before) == torch.equal(after[1][1], before) == big
        assert rel(after[0][1], after[1][1]) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(kind: str) -> None:
    model, plain = pair(kind)
    wanted = step(plain, images())
    model = model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    assert not x.is_contiguous()
    assert_same_step(step(model, x), wanted)


def test_meta_device_then_load() -> None:
    model, plain = pair()
    with torch.device("meta"):
        empty = vitfast.create_model("deit3_small_patch16_224", **small("deit3_small_patch16_224")).eval()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(loaded(images()), model(images()))
    with torch.device("meta"):
        assigned = vitfast.create_model("deit3_small_patch16_224", **small("deit3_small_patch16_224")).eval()
    assigned.load_state_dict(plain.state_dict(), assign=True)
    assert assigned.head.weight.data_ptr() == plain.head.weight.data_ptr()
    assert rel(assigned(images()), plain(images())) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files(kind: str) -> None:
    model, plain = pair(kind)
    model(images())  # whatever a call keeps must not stand in the way
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        assert torch.equal(twin(images()), model(images()))
        next(twin.parameters()).data.zero_()
    assert rel(model(images()), plain(images())) <= 1e-5  # the copies share nothing with it
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_training_after_it(kind: str) -> None:
    model, plain = pair(kind)
    with torch.inference_mode():
        out = model(images())
    assert out.is_inference()
    assert rel(out, plain(images())) <= 1e-5
    assert_same_step(step(model, images()), step(plain, images()))


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, plain = pair()
        assert rel(model(images()), plain(images())) <= 1e-5
    with torch.no_grad():  # PyTorch keeps inference tensors for no gradient
        assert rel(model(images()), plain(images())) <= 1e-5


def test_profiler_names_the_ops() -> None:
    model, _ = pair()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(images())
    counts = {event.key: event.count for event in profile.key_averages()}
    # of the two blocks the last attends from the class token alone
    for op, count in (("patch_embed", 1), ("norm_attention", 1), ("norm_linear", 2), ("norm_mlp", 2)):
        assert counts[f"vitfast::{op}"] == count


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_what_one_thread_gets(kind: str) -> None:
    model, _ = pair(kind)
    batches = [images(2, seed=i) for i in range(6)]
    wanted = [step(copy.deepcopy(model), x) for x in batches]
    wanted_quiet = [result[""] for result in wanted]

    def train(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return step(copy.deepcopy(model), x)

    def predict(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(2) as pool:
        trained, predicted = list(pool.map(train, batches)), list(pool.map(predict, batches))
    for ours, one in zip(trained, wanted, strict=True):
        assert all(torch.equal(ours[name], one[name]) for name in one)
    for ours, one in zip(predicted, wanted_quiet, strict=True):
        assert rel(ours, one) <= 1e-5


def test_number_of_threads_may_change() -> None:
    model, plain = pair()
    before = torch.get_num_threads()
    wanted = step(plain, images())
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            assert_same_step(step(model, images()), wanted)
            with torch.no_grad():
                assert rel(model(images()), wanted[""]) <= 1e-5
    finally:
        torch.set_num_threads(before)


class Features(Dataset):
    """Runs the model in the worker: what forked processes inherit must work there."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(images(1, seed=i))[0]


@pytest.mark.parametrize("kind", ["ours", "timm"])
def test_data_loader_workers_after_a_forward_pass(kind: str) -> None:
    model, plain = pair(kind)
    with torch.no_grad():
        model(images())  # starts the thread pool and fills the caches that a fork copies
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's about forking with threads
        loader = DataLoader(Features(model), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
        found = torch.cat(list(loader))
    with torch.no_grad():
        wanted = torch.cat([plain(images(1, seed=i)) for i in range(4)])
        assert rel(found, wanted) <= 1e-5
        assert rel(model(images()), plain(images())) <= 1e-5  # and the parent goes on
