"Numbers that are none, texts that are lists of letters: refused by every public function, by name, before any work."
import math

import numpy as np
import pytest
import torch

from draft_nb.anneal import blend, parse_weight, weights_at
from draft_nb.kl import gaussian_kl, transition_kl
from draft_nb.metrics import drift, interval
from draft_nb.models import load
from draft_nb.rewards import Reward, check_images, jpeg_size, load_reward, standardise, weighted
from draft_nb.sampler import denoise, sample, sample_each
from draft_nb.sweep import lora_scale, recommended_weight, sweep
from draft_nb.train import draft_loss, evaluate
from draft_nb.values import is_number, noise_seed, number, texts, whole_number

NAN, INF = math.nan, math.inf
NO_COUNT = [2.5, 2., True, "3", NAN, INF, -1, 0, [3], 1j]
NO_SEED = [2.5, True, "3", NAN, -1, 2**32, 1j, [1.5], [True], [-1]]
NO_NUMBER = [NAN, INF, -INF, True, "3", 1e300, 1j, [3.]]


@pytest.fixture(scope="module")
def model():
    return load("tiny", rank=2)


def bright(images, prompts):
    return images.mean((1, 2, 3))


def refused(name, f):
    with pytest.raises(ValueError) as e: f()
    said = str(e.value)
    assert said.startswith(name) and "got " in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("value", NO_COUNT)
def test_counts(model, value):
    noise = model.latents(1, generator=torch.Generator().manual_seed(0))
    def predict(x, t, w): return x
    refused("rank must be", lambda: load("tiny", rank=value))
    refused("steps must be", lambda: sample(model, "a fox", steps=value))
    refused("num_images must be", lambda: sample(model, "a fox", steps=2, num_images=value))
    refused("steps must be", lambda: sample_each(model, "a fox", ["base"], steps=value))
    refused("steps must be", lambda: denoise(predict, noise, model.scheduler, steps=value))
    refused("stop must lie", lambda: denoise(predict, noise, model.scheduler, steps=2, stop=value))
    refused("refresh must be", lambda: sample(model, "a fox", steps=2, refresh=value))
    refused("height must be", lambda: sample(model, "a fox", steps=2, height=value))
    refused("steps must be", lambda: drift(model, "a fox", steps=value))
    refused("num_inference_steps must be", lambda: draft_loss(model, bright, ["a fox"], generator=torch.Generator(), num_inference_steps=value))
    refused("seeds must be", lambda: evaluate(model, Reward("bright", bright), ["a fox"], seeds=value, steps=2))
    refused("chunk must be", lambda: load_reward("tiny", "cpu", chunk=value))
    refused("chunk must be", lambda: sweep(model, "tiny", ["a fox"], chunk=value))
    refused("steps must be", lambda: sweep(model, "tiny", ["a fox"], steps=value))
    refused("resamples must be", lambda: interval(torch.rand(3), resamples=value))
    refused("quality must lie", lambda: jpeg_size(torch.rand(1, 3, 16, 16), quality=value))
    refused("T must be", lambda: weights_at("linear", value))


@pytest.mark.parametrize("value", NO_SEED)
def test_seeds(model, value):
    refused("seed must be", lambda: sample(model, "a fox", steps=2, seed=value))
    refused("seed must be", lambda: drift(model, "a fox", steps=2, seed=value))
    refused("seeds must be", lambda: sweep(model, ["tiny", "tiny-judge"], ["a fox"], seeds=[0, *value] if isinstance(value, list) else [0, value]))
    if not isinstance(value, list): refused("seed must be", lambda: load("tiny", seed=value))


@pytest.mark.parametrize("value", NO_NUMBER)
def test_numbers(model, value):
    noise = model.latents(1, generator=torch.Generator().manual_seed(0))
    refused("alpha must be", lambda: load("tiny", alpha=value))
    refused("guidance_scale must be", lambda: sample(model, "a fox", steps=2, guidance_scale=value))
    refused("guidance_scale must be", lambda: model.denoiser({}, guidance_scale=value))
    refused("guidance_scale must be", lambda: sweep(model, "tiny", ["a fox"], guidance_scale=value))
    refused("eta must lie", lambda: denoise(lambda x, t, w: x, noise, model.scheduler, steps=2, eta=value))
    refused("kl_coeff must be", lambda: draft_loss(model, bright, ["a fox"], generator=torch.Generator(), kl_coeff=value))
    refused("guidance_interval must be", lambda: sample(model, "a fox", steps=2, guidance_interval=(0, value)))
    refused("guidance_interval must be", lambda: sample(model, "a fox", steps=2, guidance_interval=value))
    refused("scales must be", lambda: sweep(model, "tiny", ["a fox"], scales=[value]))
    refused("keep must lie", lambda: recommended_weight(None, "judge", keep=value))
    refused("level must lie", lambda: interval(torch.rand(3), level=value))
    with pytest.raises(ValueError, match="scale must be"), lora_scale(model.network, value): pass


@pytest.mark.parametrize("value", [NAN, INF, True, "nan", "inf", "constant_nan", "power_inf", "step_nan", np.float32("nan"), torch.tensor(NAN), [NAN], [True], [None], np.array(.5), b"1", None])
def test_weights(value):
    with pytest.raises(ValueError): parse_weight(value)


def test_weights_that_are_numbers():
    for value in .5, np.float32(.5), np.float64(.5), torch.tensor(.5): assert parse_weight(value)(0, 4) == .5
    assert weights_at(lambda i, T: i / T >= .5, 4) == [0., 0., 1., 1.]
    assert weights_at("linear", np.int64(2)) == [0., .5]
    with pytest.raises(ValueError, match="step 0 of 2 must be a finite number; got nan"): weights_at(lambda i, T: NAN, 2)
    with pytest.raises(ValueError, match="w must be a finite number; got nan"): blend(torch.zeros(1, 1), torch.ones(1, 1), NAN)


def test_a_prediction_is_not_blended_by_nan(model):
    predict = model.denoiser(model.encode(["a fox"]))
    x = model.latents(1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="weight must be a finite number"): predict(x, torch.tensor(1), NAN)


@pytest.mark.parametrize("spec", ["nan*tiny", "inf*tiny", "-inf*tiny", "1e999*tiny", "tiny + nan*tiny-judge"])
def test_combinations(spec):
    with pytest.raises(ValueError, match="a weight of a combination must be a number"): load_reward(spec, "cpu")


@pytest.mark.parametrize("value", [NAN, INF, True, 10**400, None])
def test_weights_of_combinations(value):
    reward = Reward("bright", bright)
    with pytest.raises(ValueError, match="a weight of a combination must be a number"): weighted([(value, reward)])
    if value is NAN or value is INF:
        for mean, std in ((value, 1.), (0., value)):
            with pytest.raises(ValueError, match="of bright must be"): standardise(reward, mean, std)


def test_pictures_that_are_nan_are_called_so():
    images = torch.rand(3, 3, 4, 4)
    images[1, 0, 0, 0] = NAN
    with pytest.raises(ValueError, match="images must be finite, NaN is no colour; got nan in 1 of 3 images"): check_images(images, ["a"] * 3)
    with pytest.raises(ValueError, match=r"images must lie in \[0,1\]; got -?[\d.]+ to inf"): check_images(torch.full((1, 3, 4, 4), INF).index_fill(1, torch.tensor(0), 0.), ["a"])


def test_kl():
    eps = torch.zeros(1, 2, 3)
    refused("eps must be", lambda: gaussian_kl([[0.]], eps))
    refused("eps_base must be", lambda: gaussian_kl(eps, 0.))
    for sigma in NAN, INF, 0., -1.: refused("sigma must be", lambda: transition_kl(eps[0], eps[0], sigma))


def test_one_text_is_one_text(model):
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in load("tiny", rank=2, targets="to_q").network.named_parameters() if "lora_" in n} == {"to_q"}
    assert sample(model, "a fox", steps=2).prompts == ["a fox"]


@pytest.mark.parametrize("options, message", [
    (dict(dora="no"), "dora must be True or False; got 'no'"), (dict(rslora=1), "rslora must be True or False; got 1"), (dict(dtype="float16"), "dtype must be a floating point type of torch; got 'float16'"),
    (dict(dtype=torch.int8), "dtype must be"), (dict(adapter="full", base_dtype="bfloat16"), "base_dtype must be"), (dict(targets=[3]), "targets must be texts; got 3"), (dict(targets=[]), "targets must name layers"),
])
def test_other_options_of_load(options, message):
    with pytest.raises(ValueError, match=message): load("tiny", **options)


def test_numpys_numbers_are_numbers(model):
    ours = sample(model, "a fox", steps=2, seed=3, num_images=1)
    theirs = sample(model, "a fox", steps=np.int64(2), seed=np.uint8(3), num_images=np.int32(1), guidance_scale=np.float32(1))
    assert torch.equal(ours.images, theirs.images) and theirs.seed == 3 and type(theirs.seed) is int
    assert sample(model, "a fox", steps=2, seed=np.array([3])).seed == sample(model, "a fox", steps=2, seed=torch.tensor([3])).seed == (3,)
    assert len(load("tiny", rank=np.int64(2), alpha=np.float32(4)).parameters()) == len(model.parameters())


def test_the_rules_themselves():
    assert [whole_number("n", v) for v in (1, np.int8(7), 2**31 - 1)] == [1, 7, 2**31 - 1]
    assert [number("n", v) for v in (1, -1.5, np.float16(.5))] == [1., -1.5, .5]
    assert [noise_seed("seed", v) for v in (0, 2**32 - 1)] == [0, 2**32 - 1]
    assert texts("t", "a") == ["a"] and texts("t", iter("ab")) == ["a", "b"] and texts("t", np.array(["a"])) == ["a"]
    assert is_number(3.4028234663852886e38) and not is_number(3.41e38) and not is_number(10**39)
    assert torch.equal(*(torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)))  # why seeds end there
