"What would bore a reader of the page on adapters."
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from draft_nb.adapters import add_lora, base_of, lora_layers, trainable, unfreeze

pytestmark = pytest.mark.numeric


def small(seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2)


X, T, TEXT = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 3, 8)


def run(net):
    return net(X, T, TEXT, return_dict=False)[0]


def moved(net):
    for p in trainable(net):
        torch.nn.init.normal_(p, std=.3)
    return net


def test_new_lora_is_the_base_and_the_same_for_the_same_seed():
    a, b, c = small(), small(), small()
    before = run(a)
    add_lora(a, 4, seed=1), add_lora(b, 4, seed=1), add_lora(c, 4, seed=2)
    assert torch.equal(run(a), before)
    assert all(torch.equal(p, q) for p, q in zip(trainable(a), trainable(b)))
    assert not all(torch.equal(p, q) for p, q in zip(trainable(a), trainable(c)))


def test_alpha_scales_the_branch():
    a, b = small(), small()
    add_lora(a, 4, alpha=4), add_lora(b, 4, alpha=8)
    moved(a)
    for p, q in zip(trainable(a), trainable(b)):
        q.data.copy_(p.data)
    with torch.no_grad():
        base, one, two = run(small()), run(a), run(b)
    assert not torch.allclose(one, base, atol=1e-4) and not torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_the_switch_is_back_after_any_exception(error):
    net = small()
    add_lora(net, 4)
    moved(net)
    tuned = run(net)
    with pytest.raises(error):
        with base_of(net):
            raise error
    assert torch.equal(run(net), tuned)


def test_the_switch_keeps_requires_grad_as_it_was():
    net = small()
    add_lora(net, 4)
    names = {n for n, p in net.named_parameters() if p.requires_grad}
    with base_of(net):
        assert {n for n, p in net.named_parameters() if p.requires_grad} == names
    for p in trainable(net):
        p.requires_grad_(False)
    with base_of(net):
        pass
    assert not trainable(net)


def test_trainable_is_a_list_that_can_be_read_twice():
    net = small()
    add_lora(net, 4)
    params = trainable(net)
    assert isinstance(params, list) and len(list(params)) == len(list(params)) > 0
    assert all("lora" in n for n, p in net.named_parameters() if p.requires_grad)


def test_full_fine_tuning_keeps_its_base():
    net = small()
    before = run(net).detach()
    frozen = unfreeze(net)
    assert len(trainable(net)) == len(list(net.parameters())) and not trainable(frozen)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    with base_of(net, frozen) as base:
        assert_close(run(base), before, atol=1e-5, rtol=0)  # a copy
    assert not torch.allclose(run(net), before, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="rank must be at least 1; got -1"):
        add_lora(small(), -1)
    with pytest.raises(ValueError, match="targets must name layers of UNet2DConditionModel"):
        add_lora(small(), 4, targets=["to_nothing"])
    net = small()
    add_lora(net, 4)
    with pytest.raises(ValueError, match="already carries a LoRA"):
        add_lora(net, 4)
    assert len(lora_layers(net)) > 0
