import peft
import pytest
import torch
from conftest import small_config
from contract import LayerContract, assert_near, hold, layer_of
from torch import nn
from torch.nn import functional

from gralora import get_peft_model

CONVOLVE = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


class ConvContract(LayerContract):
    """The dense update acts on `weight.flatten(1)`, `[out_channels, in_channels · taps of the kernel]`."""

    def output(self, base, x, weight):
        """Pad first, then convolve; torch's own padding of each mode is taken for right."""
        if base.padding_mode == "zeros":
            padding = base.padding
        else:
            padding, mode = 0, base.padding_mode
            x = functional.pad(x, [size for side in reversed(base.padding) for size in (side, side)], mode)
        bias = None if base.bias is None else base.bias.double()
        return CONVOLVE[type(base)](x, weight, bias, base.stride, padding, base.dilation, base.groups)

    def stored(self, base, delta):
        return delta.view(base.weight.shape)


class TestConv1d(ConvContract):
    def make_base(self, dtype):
        return nn.Conv1d(12, 24, 3, dtype=dtype)

    def make_input(self, dtype):
        return torch.randn(2, 12, 7, dtype=dtype)


class TestConv2d(ConvContract):
    def make_base(self, dtype):
        return nn.Conv2d(12, 24, (3, 2), padding=1, bias=False, dtype=dtype)

    def make_input(self, dtype):
        return torch.randn(2, 12, 5, 4, dtype=dtype)


class TestConv3d(ConvContract):
    def make_base(self, dtype):
        return nn.Conv3d(12, 24, (1, 1, 3), stride=(1, 2, 1), dtype=dtype)

    def make_input(self, dtype):
        return torch.randn(2, 12, 2, 3, 4, dtype=dtype)


class TestWithGroups(ConvContract):
    def make_base(self, dtype):
        return nn.Conv2d(24, 12, (3, 2), padding=1, groups=2, dtype=dtype)

    def make_input(self, dtype):
        return torch.randn(2, 24, 5, 4, dtype=dtype)


class TapsBeforeChannels(TestConv2d):
    """A wrong order of the columns of the dense update."""

    def stored(self, base, delta):
        return delta.view(base.out_channels, *base.kernel_size, base.in_channels).movedim(-1, 1)


def test_a_wrong_order_of_channels_and_taps_would_be_seen():
    with pytest.raises(AssertionError):
        TapsBeforeChannels().test_forward_is_that_of_the_dense_update(k=2, hybrid_r=0)


OPTIONS = [
    {"stride": 2},
    {"dilation": 2},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": 2, "padding_mode": "circular", "dilation": 2},
    {"padding": 1, "padding_mode": "circular", "groups": 2, "stride": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", CONVOLVE)
def test_options_of_the_convolution_hold_for_the_update_too(kind, options):
    contract = ConvContract()
    spatial = {nn.Conv1d: (9,), nn.Conv2d: (7, 6), nn.Conv3d: (6, 5, 5)}[kind]
    model = contract.adapt(base=kind(8, 6, 3, dtype=torch.float64, **options), hybrid_r=2)
    x = torch.randn(2, 8, *spatial, dtype=torch.float64)
    expected = contract.expected(layer_of(model), x, "default")
    assert_near(model(x), expected, torch.float64)
    model.merge_adapter()
    assert_near(model(x), expected, torch.float64)


@pytest.mark.parametrize("kind", CONVOLVE)
def test_an_input_without_a_batch_dimension(kind):
    model = ConvContract().adapt(base=kind(4, 6, 3, padding=1, dtype=torch.float64))
    x = torch.randn(4, *(5,) * (len(model.base_model.model.layer.base_layer.kernel_size)), dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[None])[0])


def test_an_empty_batch():
    model = ConvContract().adapt(base=nn.Conv2d(4, 6, 3))
    assert model(torch.randn(0, 4, 5, 5)).shape == (0, 6, 3, 3)


def test_channels_last_holds_for_input_output_and_merged_weight():
    contract = ConvContract()
    base = nn.Conv2d(12, 24, 3, padding=1, dtype=torch.float64).to(memory_format=torch.channels_last)
    model = contract.adapt(base=base, hybrid_r=2)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    before, expected = base.weight.detach().clone(), contract.expected(layer_of(model), x, "default")
    assert_near(model(x), expected, torch.float64)
    model.merge_adapter()
    assert_near(model(x), expected, torch.float64)
    assert base.weight.is_contiguous(memory_format=torch.channels_last)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("base", [nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose3d(4, 4, 3)], ids=str)
def test_transposed_convolutions_are_refused_by_name(base):
    model = hold(base)
    with pytest.raises(TypeError, match="'layer'"):
        get_peft_model(model, ConvContract().config())
    assert model.layer is base


@pytest.mark.parametrize("base", [nn.Conv1d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4)], ids=str)
def test_depthwise_convolutions_are_refused_with_the_way_out(base):
    model = hold(base)
    with pytest.raises(TypeError, match=r"'layer' cannot be adapted: .*a depthwise one.* by `modules_to_save`"):
        get_peft_model(model, ConvContract().config())
    assert model.layer is base


def test_lora_cannot_merge_convolutions_with_groups():
    """Why these are compared with dense weights alone: LoRA's update is none of this weight."""
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        peft.get_peft_model(hold(nn.Conv2d(8, 6, 3, groups=2)), config)


def test_lora_loses_the_padding_mode():
    """Why padding modes are not compared with LoRA's. Where this test fails, PEFT has mended it."""
    base = nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")
    model = peft.get_peft_model(hold(base), peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(2, 8, 7, 6)
    before = model(x)
    model.merge_adapter()
    assert (model(x) - before).norm() > 0.05 * before.norm()


def test_a_block_may_end_inside_a_channel():
    """3 divides in_channels · taps, 4 · 3, and not the channels."""
    contract = ConvContract()
    model = contract.adapt(base=nn.Conv1d(4, 6, 3, dtype=torch.float64), k=3, hybrid_r=2)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    assert_near(model(x), contract.expected(layer_of(model), x, "default"), torch.float64)


def test_blocks_that_do_not_divide_the_output_channels_are_refused():
    with pytest.raises(ValueError, match=r"'layer' cannot be adapted: `gralora_k` must divide `out_"):
        get_peft_model(hold(nn.Conv1d(4, 6, 3)), ConvContract().config(k=4))


def test_a_convolution_of_another_kind_is_refused():
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(2 * x, weight, bias)

    with pytest.raises(TypeError, match="PyTorch's own `forward`; Doubled has another one"):
        get_peft_model(nn.Sequential(Doubled(4, 4, 3)), small_config())


def test_a_lazy_layer_must_be_initialised():
    with pytest.raises(ValueError, match="'0' cannot be adapted: it must be initialised; run one forward pass first"):
        get_peft_model(nn.Sequential(nn.LazyConv2d(4, 3)), small_config())
