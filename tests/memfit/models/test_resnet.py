import pytest
import torch
from torch import nn

from memfit.errors import ConfigError, DataError
from memfit.models.resnet import BLOCKS, BasicBlock, BatchNorm, PreactBlock, build_resnet
from memfit.models.resnet_settings import ResNetSettings, min_micro_batch_size
from memfit.step import StepLayout, TrainingProgram, TrainingStep


def build(name: str = "resnet_light", size: int = 8, channels: int = 1, **settings):
    torch.manual_seed(0)
    given = {"num_classes": 10, "mean": [5.0] * channels, "std": [6.0] * channels, **settings}
    return build_resnet(name, in_channels=channels, image_size=(size, size), **given)


def tiny(**settings):
    return build(width_multiplier=0.25, **settings)


def images(n: int, size: int = 8, channels: int = 1):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 17, (n, size, size, channels), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # 3 channels, 10 classes, 3 x 3 stem; the wide net's 36.5 M are in table 4 of its paper
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("wide_resnet", 36_479_194),
        ("resnet_light", 308_650),
    ],
)
def test_has_the_parameters_of_the_literature(name, count):
    with torch.device("meta"):
        model = build(name, size=32, channels=3)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(("depth", "factor", "count"), [(16, 8, 10_961_370), (40, 4, 8_949_210)])
def test_wide_nets_have_the_depth_and_width_that_are_asked_for(depth, factor, count):
    with torch.device("meta"):
        model = build("wide_resnet", size=32, channels=3, depth=depth, width_multiplier=factor)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len([each for each in model.modules() if isinstance(each, PreactBlock)]) == (depth - 4) // 2


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet", "resnet_light"])
def test_maps_images_of_any_size_to_logits_and_trains_everything(name, norm):
    settings = {"width_multiplier": 0.125, "norm": norm, "num_classes": 7}
    for size in (8, 28, 33):
        model = build(name, size=size, channels=3, **settings)
        logits = model(images(4, size, 3))
        assert (logits.shape, logits.dtype) == ((4, 7), torch.float32)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_large_images_get_the_large_stem():
    def stride(**changes):
        return build(width_multiplier=0.25, **changes).stem[0].stride

    assert (stride(size=64), stride(size=65)) == ((1, 1), (2, 2))
    assert (stride(size=32, stem="large"), stride(size=96, stem="small")) == ((2, 2), (1, 1))
    assert build(size=96, width_multiplier=0.25)(images(2, 96)).shape == (2, 10)


def test_normalizes_raw_pixels_itself():
    plain, scaled = tiny().eval(), tiny(mean=[10.0], std=[12.0]).eval()
    scaled.load_state_dict({**plain.state_dict(), "mean": scaled.mean, "std": scaled.std})
    raw = images(3)
    torch.testing.assert_close(plain(raw), scaled(raw.float() * 2))
    assert {"mean", "std"} <= set(plain.state_dict())
    torch.testing.assert_close(plain(raw), plain(raw.float()))


def test_a_constant_channel_becomes_zero_not_nan():
    assert torch.isfinite(tiny(std=[0.0]).eval()(images(2))).all()


def test_channels_last_is_the_same_function():
    plain, last = tiny(channels_last=False).eval(), tiny().eval()
    last.load_state_dict(plain.state_dict())
    assert last.stages[0][0].body[0].weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    last.stages[0].register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    torch.testing.assert_close(last(images(4)), plain(images(4)))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_groups_divide_channels_and_have_four_at_least():
    for factor in (0.25, 0.75, 1.0, 2.5):
        for module in build(norm="group", width_multiplier=factor).modules():
            if isinstance(module, nn.GroupNorm):
                assert module.num_channels // module.num_groups >= 4
                assert module.num_groups <= 32


def test_group_normalization_scores_an_image_alone_as_among_others():
    model = tiny(norm="group").train()
    together = model(images(6))
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images(6)]), together)


def trained(checkpointing: str, precision: str = "fp32", **settings):
    """Train three steps, then count what is kept for the backward pass; return everything that could differ."""

    def loss(model, batch):
        return {"class": nn.functional.cross_entropy(model(batch["image"]), batch["label"], reduction="sum")}

    program = TrainingProgram(
        variants={"only": lambda: tiny(**settings)},
        make_batch=lambda n, _: None,
        loss=loss,
        count=lambda batch: {"class": len(batch["label"])},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        blocks=BLOCKS,
    )
    torch.manual_seed(3)
    model = program.build()
    step = TrainingStep(StepLayout(3, precision, checkpointing), program, model, program.optimizer(model))
    batch = {"image": images(20), "label": torch.arange(20) % 10}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        losses = [step(batch).total for _ in range(3)]
    return model.state_dict(), losses, sum(kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_checkpointing_changes_no_bit_of_weights_and_running_statistics(norm, precision):
    plain, plain_losses, plain_kept = trained("none", precision, norm=norm)
    weights, losses, kept = trained("blocks", precision, norm=norm)
    assert losses == plain_losses
    assert weights.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(weights[name], plain[name])] == []
    assert kept < plain_kept / 2


def test_every_micro_batch_is_counted_once_by_running_statistics():
    weights, _, _ = trained("blocks")
    counts = [value.item() for name, value in weights.items() if name.endswith("num_batches_tracked")]
    assert set(counts) == {9}


def test_batch_norm_is_torchs_own():
    own, reference = BatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert torch.equal(own(x), reference(x))
    assert own.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(own.state_dict()[name], value) for name, value in reference.state_dict().items())
    assert torch.equal(own.eval()(x), reference.eval()(x))


def test_a_single_value_per_channel_is_normalized_by_running_statistics():
    norm = BatchNorm(4)
    before = norm.running_mean.clone()
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), x / (1 + norm.eps) ** 0.5)
    assert torch.equal(norm.running_mean, before)


def test_blocks_cover_every_block():
    model = build("resnet18", size=32, channels=3, width_multiplier=0.125)
    assert len([each for each in model.modules() if isinstance(each, BLOCKS)]) == 8
    assert all(isinstance(each, BasicBlock) for stage in model.stages for each in stage)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet19"}, "name: expected one of resnet18"),
        ({"norm": "layer"}, "norm: expected one of batch, group; got 'layer'"),
        ({"stem": "huge"}, "stem: expected"),
        ({"depth": 28}, "depth: expected none: only wide_resnet"),
        ({"name": "wide_resnet", "depth": 27}, "depth: expected 6 n"),
        ({"width_multiplier": 0}, "width_multiplier: expected a number above 0"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and below 1"),
        ({"groups": 0}, "groups: expected a whole number"),
        ({"channels_last": 2}, "channels_last: expected true or false"),
        ({"nrom": "batch"}, "no setting 'nrom'; did you mean norm"),
    ],
)
def test_refuses_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        ResNetSettings.from_dict(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"mean": [1.0, 2.0]}, "one number for each of the 1 channels"),
        ({"std": [-1.0]}, r"std\[0\] must be a finite number"),
    ],
)
def test_refuses_data_that_cannot_be_classified(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_refuses_images_with_channels_first():
    with pytest.raises(DataError, match=r"image must be \[n, 8, 8, 1\]; got \[2, 1, 8, 8\]"):
        tiny()(torch.zeros(2, 1, 8, 8))


def test_batch_normalization_asks_for_enough_samples_and_group_normalization_for_one():
    variants = {"wanted": {"name": "resnet18", "norm": "group"}, "light": {"name": "resnet_light", "norm": "batch"}}
    assert min_micro_batch_size({"variant": "wanted", "variants": variants}) == 16
    assert min_micro_batch_size({"variant": "wanted", "variants": {"wanted": variants["wanted"]}}) == 1
