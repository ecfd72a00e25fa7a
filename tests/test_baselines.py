"""The convolutional baselines: torchvision's networks with a new head, and the small ResNets."""

import pytest
import torch
import torchvision

import vitfast


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_torchvision_state_dict_loads_and_gives_its_numbers(name):
    torch.manual_seed(0)
    source = getattr(torchvision.models, name)(num_classes=10).eval()
    model = vitfast.create_model(name, num_classes=10).eval()
    model.load_state_dict(source.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(images), source(images))
    assert model.config.img_size == 224
    assert model.config.mean == (0.5, 0.5, 0.5)  # as the project's source normalises


# Parameters in thousands as He et al. 2016 give them in table 6 (0.27, 0.46 and 0.85 million)
@pytest.mark.parametrize(("name", "thousands"), [("resnet20", 270), ("resnet32", 464), ("resnet56", 853)])
def test_small_resnets_have_the_papers_layers_and_parameters(name, thousands):
    model = vitfast.create_model(name, num_classes=10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e3) == thousands
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(("in_chans", "size"), [(1, 4), (1, 28), (3, 32), (5, 33)])
def test_small_resnet_takes_small_images(in_chans, size):
    model = vitfast.create_model("resnet20", num_classes=4, in_chans=in_chans)
    logits = model(torch.randn(2, in_chans, size, size))
    assert logits.shape == (2, 4)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_small_resnet_learns_the_digits_size():
    torch.manual_seed(0)
    model = vitfast.create_model("resnet20", num_classes=4, in_chans=1)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_shortcut_is_the_identity_on_the_old_channels():
    block = vitfast.create_model("resnet20", num_classes=2).blocks[3].eval()  # 16 -> 32 channels, stride 2
    torch.nn.init.zeros_(block.bn2.weight)
    torch.nn.init.zeros_(block.bn2.bias)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(x)[:, :16], x[:, :, ::2, ::2])
    assert not block(x)[:, 16:].any()


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_other_channel_counts(name):
    model = vitfast.create_model(name, num_classes=3, in_chans=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 224, 224)).shape == (1, 3)
    with pytest.raises(ValueError, match="takes 3 channels, got in_chans=1"):
        vitfast.create_model(name, in_chans=1, weights="IMAGENET1K_V1")


def test_bad_settings_are_named():
    with pytest.raises(TypeError, match="resnet20 takes no override named depth; allowed: no overrides"):
        vitfast.create_model("resnet20", depth=3)
    with pytest.raises(TypeError, match="alexnet takes no override named depth; allowed: weights"):
        vitfast.create_model("alexnet", depth=3)
    with pytest.raises(ValueError, match="resnet18's backend must be one of 'auto', 'torch', got 'triton'"):
        vitfast.create_model("resnet18", backend="triton")
    with pytest.raises(ValueError, match="has no recompute settings"):
        vitfast.create_model("resnet18", recompute="block")
    with pytest.raises(ValueError, match="recompute must be one of"):
        vitfast.create_model("resnet18", recompute="everything")
    with pytest.raises(ValueError, match="at least one class"):
        vitfast.create_model("resnet20", num_classes=0)
    with pytest.raises(ValueError, match=r"unknown model name 'resnet19'; nearest: .*resnet18"):
        vitfast.create_model("resnet19")
