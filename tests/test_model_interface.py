"""What a model offers around its forward, as timm has it; and its plain reference."""

import pytest
from model_checks import DINO, EVA, MIXED, PLAIN, REG, batch, ours, pair, rel, small
from torch import nn

from vitfast.models.reference import reference_forward


def test_prune_intermediate_layers():
    reference, model = pair(PLAIN, **small(PLAIN, depth=3))
    images, _ = batch(model)
    wanted = reference.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == list(reference.prune_intermediate_layers([0, 1]))
    assert len(model.blocks) == model.config.depth == 2
    assert rel(model(images), reference(images)) <= 1e-5
    for got, value in zip(model.forward_intermediates(images, intermediates_only=True), wanted, strict=True):
        assert rel(got, value) <= 1e-5
    model.prune_intermediate_layers(1, prune_norm=True)
    assert isinstance(model.norm, nn.Identity)
    assert type(model)(model.config).load_state_dict(model.state_dict())


def test_intermediates_as_a_dictionary():
    reference, model = pair(REG, **small(REG))
    images, _ = batch(model)
    options = {"output_dict": True, "return_prefix_tokens": True, "indices": 1}
    found, wanted = model.forward_intermediates(images, **options), reference.forward_intermediates(images, **options)
    assert set(found) == set(wanted)
    assert rel(found["image_features"], wanted["image_features"]) <= 1e-5
    for key in ("image_intermediates", "image_intermediates_prefix"):
        assert rel(found[key][0], wanted[key][0]) <= 1e-5


@pytest.mark.parametrize("name", [MIXED, DINO])
def test_optimizer_interface_of_eva_models(name):
    reference, model = pair(name, **small(name))
    assert model.no_weight_decay() == set(reference.no_weight_decay())
    assert model.group_matcher() == reference.group_matcher()


def test_reset_classifier_is_in_the_configuration():
    model = ours(PLAIN, representation_size=24)
    model.reset_classifier(3, "avg")
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    images, _ = batch(model)
    model.head.weight.data.normal_()
    twin.load_state_dict(model.state_dict())
    assert rel(twin(images), model(images)) <= 1e-6


@pytest.mark.parametrize(
    "name",
    [
        PLAIN,
        REG,
        DINO,
        EVA,
        MIXED,
        "vit_giant_patch14_dinov2",
        "beit3_base_patch16_224",
        "vit_pe_core_tiny_patch16_384",
    ],
)
def test_plain_reference_is_the_model(name):
    model = ours(name).eval()
    images, _ = batch(model)
    assert rel(model(images), reference_forward(model, images)) <= 1e-5
