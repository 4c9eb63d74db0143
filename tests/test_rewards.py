"The protocol of rewards, and the embedded ones."
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from draft_nb.models import asset
from draft_nb.rewards import KNOWN, Reward, clip_preprocess, load_reward, weighted

PROMPTS = ["an emoji of a fox", "an emoji of a rose on a blue background", "a pizza"]


def pictures(n=3, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(KNOWN))
def reward(request):
    return load_reward(request.param)


def test_equals_open_clip_itself(reward):
    clip = open_clip.create_model(f"local-dir:{asset('rewards')/reward.name}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{asset('rewards')/reward.name}")(PROMPTS)
    with torch.no_grad():
        image, text = clip.encode_image(pictures() * 2 - 1, normalize=True), clip.encode_text(ids, normalize=True)
        expected = clip.logit_scale.exp() * (image * text).sum(1)
        assert torch.allclose(reward(pictures(), PROMPTS), expected, atol=1e-4)


def test_deterministic_and_per_image(reward):
    with torch.no_grad():
        scores = reward(pictures(), PROMPTS)
        assert scores.dtype == torch.float32 and torch.equal(scores, reward(pictures(), PROMPTS))
        order = [2, 0, 1]
        assert torch.allclose(reward(pictures()[order], [PROMPTS[k] for k in order]), scores[order], atol=1e-4)
        alone = torch.cat([reward(pictures()[k:k + 1], PROMPTS[k:k + 1]) for k in range(3)])
        assert torch.allclose(alone, scores, atol=1e-4)


def test_gradient_against_a_difference_quotient(reward):
    x = pictures(1).requires_grad_()
    slope, = torch.autograd.grad(reward(x, PROMPTS[:1]).sum(), x)
    direction = slope / slope.norm()
    with torch.no_grad():
        h = 1e-2
        quotient = (reward((x + h * direction).clamp(0, 1), PROMPTS[:1]) - reward((x - h * direction).clamp(0, 1), PROMPTS[:1])) / (2 * h)
    assert quotient.item() == pytest.approx(slope.norm().item(), rel=.1)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 80), (33, 70)])
def test_any_size(reward, size):
    x = torch.rand(2, 3, *size).requires_grad_()
    score = reward(x, PROMPTS[:2])
    score.sum().backward()
    assert score.shape == (2,) and x.grad.isfinite().all()


def test_parameters_are_frozen(reward):
    x = pictures(2).requires_grad_()
    reward(x, PROMPTS[:2]).sum().backward()
    assert x.grad is not None and not any(t.requires_grad for t in (reward(pictures(2), PROMPTS[:2]),))


def test_the_judge_is_another_network():
    a, b = load_reward("tiny"), load_reward("tiny-judge")
    assert a.features(pictures()).shape == b.features(pictures()).shape
    assert not torch.allclose(a.features(pictures()), b.features(pictures()), atol=.1)


def test_preprocess_against_pil():
    import numpy as np
    rng = np.random.default_rng(0)
    coarse = Image.fromarray((rng.random((12, 16, 3)) * 255).astype("uint8")).resize((640, 480), Image.BICUBIC)
    theirs = coarse.resize((298, 224), Image.BICUBIC).crop((37, 0, 261, 224))
    x = torch.tensor(np.asarray(coarse)).permute(2, 0, 1)[None] / 255
    mine = clip_preprocess(x, 224, mean=(0, 0, 0), std=(1, 1, 1))[0].permute(1, 2, 0)
    assert (mine - torch.tensor(np.asarray(theirs)) / 255).abs().mean() < .0015


@given(a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_weighted_is_linear_and_keeps_its_parts(a, b):
    one, two = Reward("one", lambda i, p: i.mean((1, 2, 3))), Reward("two", lambda i, p: i[:, 0].mean((1, 2)))
    x, both = pictures(), weighted([(a, one), (b, two)])
    assert torch.allclose(both(x, PROMPTS), a * one(x, PROMPTS) + b * two(x, PROMPTS), atol=1e-5)
    assert set(both.each(x, PROMPTS)) == {"one", "two"}


def test_combination_by_name():
    both = load_reward("0.7*tiny + 0.3*tiny-judge")
    expected = .7 * load_reward("tiny")(pictures(), PROMPTS) + .3 * load_reward("tiny-judge")(pictures(), PROMPTS)
    with torch.no_grad():
        assert torch.allclose(both(pictures(), PROMPTS), expected, atol=1e-4)
    assert [(w, r.name) for w, r in both.parts] == [(.7, "tiny"), (.3, "tiny-judge")]


@pytest.mark.parametrize("spec, message", [
    ("beauty", "unknown reward 'beauty'; known: tiny, tiny-judge"),
    ("half*tiny", "must be a number; got 'half'"),
    ("tiny + ", "unknown reward ''"),
])
def test_unknown_names(spec, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        load_reward(spec)


@pytest.mark.parametrize("images, prompts, message", [
    (torch.rand(3, 64, 64), ["a"], "images must be"),
    (torch.rand(1, 1, 64, 64), ["a"], "images must be"),
    (torch.rand(2, 3, 64, 64), ["a"], "one text an image; got 1 for 2"),
    (torch.rand(1, 3, 64, 64), "a", "one text an image"),
    (torch.rand(1, 3, 64, 64) * 2, ["a"], r"lie in \[0,1\]"),
    (torch.rand(1, 3, 64, 64) - .5, ["a"], r"lie in \[0,1\]"),
    (torch.full((1, 3, 64, 64), float("nan")), ["a"], "got nan"),
])
def test_bad_pictures(reward, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        reward(images, prompts)


def test_bad_callables():
    x = pictures(2).requires_grad_()
    with pytest.raises(ValueError, match="one score an image"):
        load_reward(lambda images, prompts: images.mean())(x, ["a", "b"])
    with pytest.raises(ValueError, match="must carry a gradient"):
        load_reward(lambda images, prompts: images.detach().mean((1, 2, 3)))(x, ["a", "b"])
