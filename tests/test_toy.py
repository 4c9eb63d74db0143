"""Closed-form denoisers against autograd, moments and samples."""
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from draft_nb.anneal import blended
from draft_nb.kl import to_epsilon, to_x0
from draft_nb.sampler import denoise
from draft_nb.toy import Mixture, denoise_exactly, denoiser, draw, flow_level, log_density, ring, scalar, tilted, vp_level

pytestmark = pytest.mark.numeric

sd = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
ddim = DDIMScheduler(**sd, clip_sample=False, set_alpha_to_one=False)
seeds = st.integers(0, 10**6)


def mixture(seed=0, M=4, shape=(3, 2, 2), std=.3):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(M, generator=g, dtype=torch.float64)+.1
    return Mixture(torch.randn(M, *shape, generator=g, dtype=torch.float64), weights/weights.sum(), std)


@given(alpha=st.floats(.01, 1), sigma=st.floats(.02, 1), std=st.floats(.1, 1), seed=seeds)
def test_noise_is_the_slope_of_the_density(alpha, sigma, std, seed):
    m = mixture(seed, std=std)
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(log_density(m, x, alpha, sigma).sum(), x)
    eps, x0 = denoise_exactly(m, x, alpha, sigma)
    torch.testing.assert_close(eps, -sigma*slope, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(alpha*x0 + sigma*eps, x, rtol=1e-7, atol=1e-9)


def test_density_is_torch_s():
    m, g = mixture(), torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 2, 2, generator=g, dtype=torch.float64)
    parts = torch.distributions.Independent(torch.distributions.Normal(.6*m.means, ((.6*m.std)**2+.8**2)**.5), 3)
    theirs = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(m.weights), parts).log_prob(x)
    torch.testing.assert_close(log_density(m, x, .6, .8), theirs)


def test_expectations_are_those_of_samples():
    "Of many (x0, x) pairs, those with x near a point average to the denoiser's answer there."
    m, g = ring(4, std=.3), torch.Generator().manual_seed(0)
    x0 = draw(m, 2_000_000, g)
    x = .7*x0 + .7*torch.randn(x0.shape, generator=g)
    here = torch.tensor([.4, .3]).reshape(1, 2, 1, 1)
    near = (x-here).flatten(1).norm(dim=1) < .1
    torch.testing.assert_close(x0[near].mean(0, keepdim=True), denoise_exactly(m, here, .7, .7)[1], atol=.03, rtol=0)


def test_one_gaussian_is_linear():
    m = Mixture(torch.zeros(1, 2, 1, 1), torch.ones(1), 1.)
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    eps, x0 = denoise_exactly(m, x, .6, .8)
    torch.testing.assert_close(eps, .8*x)
    torch.testing.assert_close(x0, .6*x)


def test_draw_has_the_mixture_s_moments():
    m = mixture()
    x = draw(m, 50_000, torch.Generator().manual_seed(0))
    mean = (m.weights[:, None, None, None]*m.means).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=.03, rtol=0)
    var = (m.weights[:, None, None, None]*(m.means-mean)**2).sum(0) + m.std**2
    torch.testing.assert_close(x.var(0), var, atol=.05, rtol=0)


@given(beta=st.floats(.1, 5), seed=seeds)
def test_tilting_multiplies_the_density(beta, seed):
    m, g = mixture(seed), torch.Generator().manual_seed(seed)
    u = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    x = torch.randn(6, 3, 2, 2, generator=g, dtype=torch.float64)
    gap = log_density(tilted(m, u, beta), x, 1., 0.) - log_density(m, x, 1., 0.) - (x*u).flatten(1).sum(1)/beta
    torch.testing.assert_close(gap, gap[:1].expand(6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_all_kinds_say_the_same(kind):
    m = mixture()
    level = flow_level if kind == "flow" else vp_level(ddim.alphas_cumprod)
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = level(401)
    eps, x0 = denoise_exactly(m, x, alpha, sigma)
    made = denoiser(m, level, kind)(x, 401)
    torch.testing.assert_close(to_epsilon(made, x, alpha, sigma, kind), eps)
    torch.testing.assert_close(to_x0(made, x, alpha, sigma, kind), x0)


def test_levels_are_the_schedulers_own():
    level = vp_level(ddim.alphas_cumprod)
    for t in (0, 1, 500, 999, torch.tensor(640)):
        alpha, sigma = level(t)
        assert alpha**2 == pytest.approx(ddim.alphas_cumprod[int(t)].item(), abs=1e-6) and alpha**2+sigma**2 == pytest.approx(1)
    euler = EulerDiscreteScheduler(**{**sd, "timestep_spacing": "linspace"})
    euler.set_timesteps(7)
    for t, ratio in zip(euler.timesteps, euler.sigmas):
        alpha, sigma = level(t)
        assert sigma/alpha == pytest.approx(ratio.item(), rel=1e-4)
    assert flow_level(torch.tensor(250.)) == (.75, .25)


@pytest.mark.parametrize("scheduler, kind", [
    (ddim, "epsilon"), (EulerDiscreteScheduler(**sd), "epsilon"), (EulerDiscreteScheduler(**{**sd, "timestep_spacing": "linspace"}), "epsilon"),
    (FlowMatchEulerDiscreteScheduler(shift=2.), "flow"), (DDIMScheduler(**sd, clip_sample=False, prediction_type="v_prediction"), "v_prediction")])
def test_samples_are_the_data(scheduler, kind):
    "A perfect model and enough steps give the mixture back: weights, means, width."
    data = Mixture(ring(3).means, torch.tensor([.6, .3, .1]), .15)
    model = denoiser(data, flow_level if kind == "flow" else vp_level(scheduler.alphas_cumprod), kind)
    x = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    x = list(denoise(blended(model, model), x, scheduler, steps=100))[-1].prev.flatten(1)
    means = data.means.flatten(1)
    nearest = torch.cdist(x, means).argmin(1)
    torch.testing.assert_close(nearest.bincount(minlength=3)/2000, data.weights, atol=.06, rtol=0)
    for j in range(3): torch.testing.assert_close(x[nearest == j].mean(0), means[j], atol=.06, rtol=0)
    assert (x-means[nearest]).std().item() == pytest.approx(.15, abs=.03)


def test_annealing_trades_reward_for_modes():
    u = torch.tensor([1., 0.])[:, None, None]
    data = ring(std=.25)
    level = vp_level(ddim.alphas_cumprod)
    predict = blended(denoiser(data, level), denoiser(tilted(data, u, .2), level))
    noise = torch.randn(400, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    rewards, modes = [], []
    for weight in ("base", "power_4", "power_2", "linear", "draft"):
        x = list(denoise(predict, noise, ddim, steps=40, weight=weight))[-1].prev
        rewards.append((x*u).flatten(1).sum(1).mean().item())
        share = torch.cdist(x.flatten(1), data.means.flatten(1)).argmin(1).bincount(minlength=8)/400
        modes.append(torch.special.entr(share).sum().item())
    assert rewards == sorted(rewards) and modes == sorted(modes, reverse=True)


def test_parameters_learn():
    "A mixture's means may require gradient."
    means = ring(3).means.clone().requires_grad_()
    model = denoiser(Mixture(means, torch.full((3,), 1/3), .2), vp_level(ddim.alphas_cumprod))
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    list(denoise(blended(model, model), x, ddim, steps=10, grad_steps=1))[-1].prev.sum().backward()
    assert means.grad.isfinite().all() and means.grad.abs().sum() > 0


def test_scalar():
    x = torch.randn(2, 1, 1, 1)
    assert torch.equal(scalar(.3)(x, 5), .3*x)


@pytest.mark.parametrize("make, says", [
    (lambda: Mixture(torch.zeros(2, 1, 1, 1), torch.ones(3)/3, .1), r"\(2,\); got \(3,\)"), (lambda: Mixture(torch.zeros(2, 1, 1, 1), torch.ones(2), .1), "sum to 1"),
    (lambda: Mixture(torch.zeros(2, 1, 1, 1), torch.ones(2)/2, 0.), "std must be positive; got 0.0"), (lambda: tilted(ring(), torch.zeros(2, 1, 1), 0.), "beta must be positive"),
    (lambda: denoiser(ring(), flow_level, "score"), "got 'score'")])
def test_bad_input(make, says):
    with pytest.raises(ValueError, match=says): make()
