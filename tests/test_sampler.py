"""The one loop: reference numbers, gradients, identities with the schedulers' own, and what is refused."""
import gc
import weakref
from copy import deepcopy
from dataclasses import FrozenInstanceError, dataclass, field
from io import BytesIO

import diffusers
import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler, TCDScheduler, UniPCMultistepScheduler)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from draft_nb.anneal import blend, blended, power, weights_at
from draft_nb.kl import gaussian_kl
from draft_nb.sampler import denoise, drawable_eta, noise_level, prediction_kind, sample, single_step
from draft_nb.toy import Mixture, denoiser, flow_level, ring, scalar, vp_level

pytestmark = pytest.mark.numeric

sd = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
ddim = DDIMScheduler(**sd, clip_sample=False, set_alpha_to_one=False)
euler, flow = EulerDiscreteScheduler(**sd), FlowMatchEulerDiscreteScheduler(shift=3.)
level = vp_level(ddim.alphas_cumprod)
one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
toy = blended(scalar(.3), scalar(.5))


def last(*args, **kwargs): return list(denoise(*args, **kwargs))[-1]
def noise(n=4, shape=(2, 1, 1), seed=0, dtype=torch.float32): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def perfect(scheduler, mixture=None):
    "The perfect model of a ring for this scheduler."
    kind = prediction_kind(scheduler)
    model = denoiser(mixture or ring(), flow_level if kind == "flow" else vp_level(scheduler.alphas_cumprod), kind)
    return blended(model, model)


# reference numbers

class Skipped(DDIMScheduler):
    "DDIM that starts at its step `first`."
    def __init__(self, first=0):
        super().__init__(**sd, clip_sample=False, set_alpha_to_one=False)
        self.first = first
    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps[self.first:]


@pytest.mark.parametrize("i, t, x0, prev", [(0, 981, 9.859335, .592239), (25, 481, 1.289202, .537034)])
def test_reference_ddim_step(i, t, x0, prev):
    "Step i of 50, from x = .5 with eps = -.25."
    s = next(denoise(lambda x, t, w: torch.full_like(x, -.25), .5*one, Skipped(i), steps=50))
    assert int(s.t) == t and s.x0.item() == pytest.approx(x0, abs=5e-6) and s.prev.item() == pytest.approx(prev, abs=1e-6)


@pytest.mark.parametrize("weight, x0", [("base", 2.848916), ("draft", 1.794678), ("linear", 2.502034), ("power_2", 2.674975)])
def test_reference_annealing(weight, x0):
    assert last(toy, one, ddim, steps=5, weight=weight).x0.item() == pytest.approx(x0, abs=2e-6)


def slope(K, theta0=.5, steps=5):
    theta = torch.tensor(theta0, dtype=torch.float64, requires_grad=True)
    r = -(last(blended(scalar(.3), scalar(theta)), one, ddim, steps=steps, grad_steps=K).x0-1).square().sum()
    return torch.autograd.grad(r, theta)[0].item()


@pytest.mark.parametrize("K, expected", [(1, .120225), (3, 3.199994), (5, 6.981603)])
def test_reference_truncated_gradient(K, expected):
    assert slope(K) == pytest.approx(expected, abs=1e-5)


def test_sd_timesteps():
    steps = [int(s.t) for s in denoise(toy, one, ddim, steps=25)]
    assert steps == list(range(961, 0, -40))


# gradients

@given(K=st.integers(1, 8), theta=st.floats(.1, .9))
@settings(deadline=None, max_examples=25)
def test_truncated_gradient_is_the_difference_quotient_of_the_last_steps(K, theta):
    def r(h):
        w = [0.]*(8-K) + [1.]*K
        return -(last(blended(scalar(theta), scalar(theta+h)), one, ddim, steps=8, weight=w).x0.item()-1)**2
    assert slope(K, theta, 8) == pytest.approx((r(1e-5)-r(-1e-5))/2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("scheduler, h, rel", [(ddim, 1e-5, 1e-5), (euler, 1e-2, .02), (flow, 1e-2, .02)], ids=["ddim", "euler", "flow"])
@pytest.mark.parametrize("K", [1, 2, 6])
def test_gradient_through_a_mixture(scheduler, h, rel, K):
    "The modes move by theta, in the last K steps only. Euler and flow step in float32, hence the coarser quotient."
    base = ring(3, std=.5)
    def model(theta):
        means = base.means.double() + theta*torch.tensor([1., .5], dtype=torch.float64)[:, None, None]
        return lambda x, t: denoiser(Mixture(means, base.weights, base.std), flow_level if scheduler is flow else level, prediction_kind(scheduler))(x, t)
    def r(tuned, **kwargs): return last(blended(model(0.), tuned), noise(dtype=torch.float64), scheduler, steps=6, **kwargs).prev.sum()
    theta = torch.tensor(0., dtype=torch.float64, requires_grad=True)
    got, = torch.autograd.grad(r(model(theta), grad_steps=K), theta)
    w = [0.]*(6-K) + [1.]*K
    assert got.item() == pytest.approx(((r(model(h), weight=w)-r(model(-h), weight=w))/(2*h)).item(), rel=rel)


@given(K=st.integers(0, 7), weight=st.sampled_from(["base", "draft", "linear", "power_3", "step_0.5", .3, 1.5]))
@settings(deadline=None, max_examples=30)
def test_forward_is_the_same_for_every_K(K, weight):
    theta = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
    predict = blended(scalar(.3), scalar(theta))
    for a, b in zip(denoise(predict, one, ddim, steps=7, weight=weight), denoise(predict, one, ddim, steps=7, weight=weight, grad_steps=K, with_base=True)):
        assert torch.equal(a.prev, b.prev.detach()) and torch.equal(a.x0, b.x0.detach())


def saved(T, K):
    "How many tensors the graph of a run keeps for backward."
    theta, count = torch.tensor(.5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: count.append(1) or x, lambda x: x):
        last(blended(scalar(.3), scalar(theta)), one.float(), ddim, steps=T, grad_steps=K)
    return len(count)


def test_prefix_holds_no_graph():
    assert saved(5, 0) == saved(50, 0) == 0
    assert saved(5, 1) == saved(50, 1) < saved(5, 2) == saved(50, 2)
    theta = torch.tensor(.5, requires_grad=True)
    for K in range(6):
        states = list(denoise(blended(scalar(.3), scalar(theta)), one.float(), ddim, steps=5, grad_steps=K))
        for f in ("prediction", "prev", "x0", "epsilon"): assert [getattr(s, f).requires_grad for s in states] == [False]*(5-K) + [True]*K
        if K: assert not states[5-K].latents.requires_grad


def test_noise_that_requires_grad_is_detached():
    x = one.clone().requires_grad_()
    assert not last(toy, x, ddim, steps=3, grad_steps=3).prev.requires_grad


def test_dropped_states_are_freed():
    "A loop that keeps nothing holds the latents of one step, not of all."
    refs = []
    for s in denoise(toy, one, ddim, steps=20): refs.append(weakref.ref(s.prev))
    gc.collect()
    assert sum(o() is not None for o in refs[:-2]) == 0


# grad mode

@pytest.mark.parametrize("K", [0, 2, 5])
def test_never_yields_inside_its_grad_mode(K):
    for outer in (True, False):
        with torch.set_grad_enabled(outer):
            for s in denoise(toy, one, ddim, steps=5, grad_steps=K): assert torch.is_grad_enabled() == outer
            assert torch.is_grad_enabled() == outer


def test_break_and_close_leave_grad_mode_alone():
    for stop in range(5):
        for s in denoise(toy, one, ddim, steps=5, grad_steps=2):
            if s.i == stop: break
        assert torch.is_grad_enabled()
    kept = denoise(toy, one, ddim, steps=5)
    next(kept)
    with torch.no_grad(): next(kept)
    assert torch.is_grad_enabled()
    kept.close()
    assert torch.is_grad_enabled()


def test_error_in_the_model_leaves_grad_mode_alone():
    def broken(x, t, w): raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"): last(broken, one, ddim, steps=3)
    assert torch.is_grad_enabled()


def test_outer_no_grad_wins():
    theta = torch.tensor(.5, requires_grad=True)
    with torch.no_grad(): s = last(blended(scalar(.3), scalar(theta)), one.float(), ddim, steps=4, grad_steps=4, with_base=True)
    assert not s.prev.requires_grad and s.epsilon_base is not None
    with torch.inference_mode(): assert last(toy, one, ddim, steps=3).prev.is_inference()


# the base beside the tuned

def test_base_is_asked_first_without_graph_at_the_same_latents():
    theta, calls = torch.tensor(.5, dtype=torch.float64, requires_grad=True), []
    def predict(x, t, w):
        calls.append((int(t), w, torch.is_grad_enabled(), x.detach().clone()))
        return (theta if w else .3)*x
    states = list(denoise(predict, one, ddim, steps=5, grad_steps=2, with_base=True))
    assert [(w, g) for _, w, g, _ in calls] == [(1., False)]*3 + [(0., False), (1., True)]*2
    for base, tuned in ((3, 4), (5, 6)): assert calls[base][0] == calls[tuned][0] and torch.equal(calls[base][3], calls[tuned][3])
    for s in states[3:]:
        assert s.epsilon.requires_grad and not s.epsilon_base.requires_grad
        torch.testing.assert_close(s.epsilon_base, .3*s.latents.detach())
    with pytest.raises(ValueError, match="gradient steps.*step 2 of 5"): states[2].epsilon_base
    with pytest.raises(ValueError, match="with_base"): next(denoise(toy, one, ddim, steps=5, grad_steps=5)).epsilon_base


def test_kl_gradient_flows_through_the_latents_of_the_tuned_model_only():
    "The gap of theta·x_t(theta) to the base's answer, which stays what it was."
    def states(theta, **kwargs): return list(denoise(blended(scalar(.3), scalar(theta)), one, ddim, steps=3, **kwargs))
    frozen = [.3*s.latents for s in states(.5)]
    def gap(theta): return sum((s.prediction-b).square().mean() for s, b in zip(states(theta), frozen)).item()
    theta = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
    run = states(theta, grad_steps=3, with_base=True)
    kl = gaussian_kl(torch.stack([s.epsilon for s in run]), torch.stack([s.epsilon_base for s in run]))
    assert kl.item() == pytest.approx(gap(.5), rel=1e-6)
    assert torch.autograd.grad(kl, theta)[0].item() == pytest.approx((gap(.5+1e-5)-gap(.5-1e-5))/2e-5, rel=1e-5)


def test_kl_and_its_gradient_do_not_depend_on_what_the_model_predicts():
    "One model, once as eps and once as v: the base stays without graph although the conversion adds x_t."
    def v_of(theta):
        def model(x, t):
            alpha, sigma = level(t)
            return (theta*x - sigma*x)/alpha
        return model
    results = []
    for scheduler, make in ((ddim, scalar), (DDIMScheduler(**sd, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"), v_of)):
        theta = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
        run = list(denoise(blended(make(.3), make(theta)), one, scheduler, steps=4, grad_steps=3, with_base=True))[1:]
        assert not any(s.epsilon_base.requires_grad for s in run)
        kl = gaussian_kl(torch.stack([s.epsilon for s in run]), torch.stack([s.epsilon_base for s in run]))
        results += [(kl.item(), torch.autograd.grad(kl, theta)[0].item())]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_epsilon_asked_later_still_has_its_graph():
    theta = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
    s = last(blended(scalar(.3), scalar(theta)), one, ddim, steps=2, grad_steps=1)
    with torch.no_grad(): assert not s.x0.requires_grad
    assert s.x0.requires_grad


class Guided:
    "A guided model that shows its conditional part."
    calls = 0
    def parts(self, x, t, w=1.):
        self.calls += 1
        uncond, cond = blend(.1*x, .12*x, w), blend(.2*x, .25*x, w)
        return uncond + 7.5*(cond-uncond), cond
    def __call__(self, x, t, w=1.): return self.parts(x, t, w)[0]


def test_kl_on_the_conditional_part():
    kls = {}
    for kl_on in ("guided", "conditional"):
        model = Guided()
        s = list(denoise(model, one, ddim, steps=4, grad_steps=4, with_base=True, kl_on=kl_on))
        assert model.calls == 8
        kls[kl_on] = gaussian_kl(s[0].epsilon[None], s[0].epsilon_base[None]).item(), s[-1].prev
    assert kls["guided"][0] == pytest.approx(.060025, abs=1e-6) and kls["conditional"][0] == pytest.approx(.0025, abs=1e-6)
    assert torch.equal(kls["guided"][1], kls["conditional"][1])


# schedulers

@pytest.mark.parametrize("scheduler", [
    ddim, DDIMScheduler(**sd, clip_sample=False, prediction_type="v_prediction"), DDIMScheduler(**sd, clip_sample=False, prediction_type="sample"),
    DDPMScheduler(**sd, clip_sample=False), euler, EulerDiscreteScheduler(**sd, prediction_type="v_prediction"),
    EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True), EulerAncestralDiscreteScheduler(**sd)],
    ids=lambda o: f"{type(o).__name__}-{o.config.prediction_type}")
def test_x0_and_epsilon_are_the_scheduler_s_own(scheduler):
    states = list(denoise(perfect(scheduler), noise(), scheduler, steps=10, generator=torch.Generator().manual_seed(0)))
    for s in states:
        own = deepcopy(s.scheduler)
        own._step_index, own._begin_index = None, s.i
        theirs = own.step(s.prediction, s.t, s.latents, generator=torch.Generator()).pred_original_sample
        torch.testing.assert_close(s.x0, theirs, rtol=1e-3, atol=1e-4)
        alpha, sigma = noise_level(s.scheduler, s.i)
        torch.testing.assert_close(alpha*s.x0 + sigma*s.epsilon, s.model_input, rtol=1e-4, atol=1e-4)


def test_flow_identities():
    for s in denoise(perfect(flow), noise(), flow, steps=10):
        alpha, sigma = noise_level(s.scheduler, s.i)
        assert alpha+sigma == 1 and sigma == pytest.approx(float(s.t)/1000, rel=1e-5)
        torch.testing.assert_close(s.epsilon-s.x0, s.prediction)
        torch.testing.assert_close(alpha*s.x0 + sigma*s.epsilon, s.latents)
    assert sigma > 0
    torch.testing.assert_close(s.prev, s.x0)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_levels_are_what_the_model_input_is_scaled_by(name):
    "Scaling by alpha is what these schedulers do to the latents, so it tells their level at every step."
    scheduler = getattr(diffusers.schedulers, name)(**sd)
    for s in denoise(perfect(scheduler), noise(), scheduler, steps=6, generator=torch.Generator().manual_seed(0)):
        torch.testing.assert_close(s.model_input, noise_level(s.scheduler, s.i)[0]*s.latents, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(**sd), PNDMScheduler(**sd, skip_prk_steps=True), PNDMScheduler(**sd), DPMSolverMultistepScheduler(**sd),
                                       UniPCMultistepScheduler(**sd), LCMScheduler(**sd), TCDScheduler(**sd), DDPMScheduler(**sd, clip_sample=False),
                                       EulerAncestralDiscreteScheduler(**sd), ddim, euler, flow], ids=lambda o: type(o).__name__)
def test_every_scheduler_samples_with_T_as_many_as_its_timesteps(scheduler):
    own = deepcopy(scheduler)
    own.set_timesteps(12)
    states = list(denoise(perfect(scheduler), noise(64), scheduler, steps=12, weight="linear", generator=torch.Generator().manual_seed(0)))
    assert len(states) == states[0].T == len(own.timesteps)
    assert [s.w for s in states] == weights_at("linear", len(own.timesteps))
    assert states[-1].prev.flatten(1).norm(dim=1).mean().item() == pytest.approx(1, abs=.35)


def test_heun_and_pndm_run_more_steps_than_asked_for():
    assert next(denoise(toy, one, HeunDiscreteScheduler(**sd), steps=10)).T == 19
    assert next(denoise(toy, one, PNDMScheduler(**sd, skip_prk_steps=True), steps=10)).T == 11


@pytest.mark.parametrize("scheduler", [ddim, euler, flow, HeunDiscreteScheduler(**sd), UniPCMultistepScheduler(**sd)], ids=lambda o: type(o).__name__)
def test_same_as_the_loop_of_a_pipeline(scheduler):
    "What a diffusers pipeline does with its scheduler, written out."
    predict, theirs = perfect(scheduler), deepcopy(scheduler)
    theirs.set_timesteps(9)
    x = noise()*getattr(theirs, "init_noise_sigma", 1.)
    for t in theirs.timesteps:
        seen = theirs.scale_model_input(x, t) if hasattr(theirs, "scale_model_input") else x
        x = theirs.step(predict(seen, t), t, x, return_dict=False)[0]
    assert torch.equal(last(predict, noise(), scheduler, steps=9).prev, x)


@pytest.mark.parametrize("scheduler", [ddim, euler, flow, PNDMScheduler(**sd, skip_prk_steps=True)], ids=lambda o: type(o).__name__)
def test_the_caller_s_scheduler_is_untouched(scheduler):
    theirs = deepcopy(scheduler)
    theirs.set_timesteps(3)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else deepcopy(v) for k, v in vars(theirs).items()}
    last(perfect(theirs), noise(), theirs, steps=7)
    assert vars(theirs).keys() == before.keys()
    for k, v in before.items():
        same = vars(theirs)[k] == v
        assert same if isinstance(same, bool) else same.all(), k


def test_timesteps_kwargs_reach_the_scheduler():
    states = list(denoise(perfect(flow), noise(), flow, sigmas=[1., .6, .2]))
    assert states[0].T == 3
    assert [int(s.t) for s in denoise(toy, one, euler, timesteps=[900, 500, 100])] == [900, 500, 100]
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu"): denoise(perfect(dynamic), noise(), dynamic, steps=4)
    assert next(denoise(perfect(dynamic), noise(), dynamic, steps=4, mu=1.)).T == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheduler", [ddim, euler, flow], ids=lambda o: type(o).__name__)
def test_dtype_follows_the_latents(dtype, scheduler):
    s = last(toy, one.to(dtype), scheduler, steps=3)
    assert s.prev.dtype == s.x0.dtype == dtype and s.epsilon.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_unknown_schedulers_sample_but_have_no_level():
    class Cfg(dict): __getattr__ = dict.get
    class Other:
        config, timesteps, prediction_type = Cfg(prediction_type="score"), torch.arange(3), None
        def set_timesteps(self, num_inference_steps, device=None): pass
        def step(self, model_output, timestep, sample, return_dict=True): return (sample-model_output/4,)
    s = last(toy, one, Other(), steps=3)
    assert s.prev.item() == pytest.approx((1-.5/4)**3)
    with pytest.raises(ValueError, match="prediction_type of Other.*'score'"): s.x0
    for name in ("EDMEulerScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        scheduler = getattr(diffusers.schedulers, name)()
        scheduler.set_timesteps(3)
        with pytest.raises(ValueError, match=f"noise levels of {name} are not known"): noise_level(scheduler, 0)


# annealing

def test_step_switches_at_15_of_25():
    asked = []
    predict = blended(lambda x, t: asked.append("base") or .3*x, lambda x, t: asked.append("tuned") or .5*x)
    last(predict, one, ddim, steps=25, weight="step_0.6")
    assert asked == ["base"]*15 + ["tuned"]*10


def test_whole_weights_are_plain_floats():
    seen = []
    def predict(x, t, w): seen.append(w); return .3*x
    for weight in (1, 0, torch.tensor(1), "draft", [0, 1, 1], lambda i, T: torch.ones(1), lambda i, T: torch.zeros(1)): last(predict, one, ddim, steps=3, weight=weight)
    assert all(type(w) is float and w in (0., 1.) for w in seen)


@given(ws=st.lists(st.floats(-1, 2), min_size=2, max_size=5))
@settings(deadline=None, max_examples=25)
def test_per_image_weights_equal_one_by_one(ws):
    x, w = noise(len(ws), dtype=torch.float64), torch.tensor(ws, dtype=torch.float64)
    together = last(toy, x, ddim, steps=6, weight=lambda i, T: w*i/T).prev
    for j, v in enumerate(ws): torch.testing.assert_close(together[j:j+1], last(toy, x[j:j+1], ddim, steps=6, weight=lambda i, T: v*i/T).prev)


def test_permuting_the_batch_permutes_the_result():
    x, order = noise(6), torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(last(perfect(ddim), x[order], ddim, steps=9).prev, last(perfect(ddim), x, ddim, steps=9).prev[order])


def test_shared_prefix_of_a_step_weight():
    base, late = (list(denoise(toy, one, ddim, steps=10, weight=w)) for w in ("base", "step_0.6"))
    assert all(torch.equal(a.prev, b.prev) for a, b in zip(base[:6], late[:6])) and not torch.equal(base[6].prev, late[6].prev)


# randomness

@pytest.mark.parametrize("scheduler, eta", [(ddim, 0.), (ddim, 1.), (EulerAncestralDiscreteScheduler(**sd), 0.), (DDPMScheduler(**sd), 0.), (TCDScheduler(**sd), .3), (euler, 0.)],
                         ids=["ddim", "ddim eta 1", "ancestral", "ddpm", "tcd", "euler"])
def test_global_random_state_is_untouched(scheduler, eta):
    before = torch.get_rng_state()
    run = lambda seed: last(toy, one.float(), scheduler, steps=6, eta=eta, generator=torch.Generator().manual_seed(seed)).prev
    a, b, c = run(0), run(0), run(1)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(a, b)
    assert torch.equal(a, c) == (scheduler in (ddim, euler) and eta == 0)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler(**sd), DDPMScheduler(**sd), LCMScheduler(**sd), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
                                       DPMSolverMultistepScheduler(**sd, algorithm_type="sde-dpmsolver++")], ids=lambda o: type(o).__name__)
def test_noisy_schedulers_need_a_generator(scheduler):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"generator must be given for {type(scheduler).__name__}"): denoise(toy, one.float(), scheduler, steps=4)
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_for_each_image():
    g = lambda *seeds: [torch.Generator().manual_seed(o) for o in seeds]
    x = noise(3)
    together = last(toy, x, ddim, steps=6, eta=1., generator=g(1, 2, 3)).prev
    torch.testing.assert_close(together[1:2], last(toy, x[1:2], ddim, steps=6, eta=1., generator=g(2)).prev)


# what is refused, at the call

@pytest.mark.parametrize("kwargs, says", [
    (dict(grad_steps=6), r"grad_steps must lie in 0..5 .*; got 6"), (dict(grad_steps=-1), "0..5.*got -1"), (dict(grad_steps=1.5), "0..5.*got 1.5"),
    (dict(steps=0), "steps must be .*at least 1; got 0"), (dict(steps=2.5), "got 2.5"), (dict(kl_on="both"), "kl_on must be one of guided, conditional; got 'both'"),
    (dict(kl_on="conditional"), "predict must have parts"), (dict(eta=1.), "generator must be given if eta > 0"), (dict(eta=-1.), r"eta must lie in \[0,1\], .* got -1"), (dict(eta=1.5), r"eta must lie in \[0,1\], .* got 1.5"),
    (dict(weight="cubic"), "unknown weight 'cubic'; known: base"), (dict(weight=[0, 1]), "T is 5, the table has 2"), (dict(weight=lambda i, T: float("nan")), "step 0 of 5.*nan"),
    (dict(weight=lambda i, T: torch.ones(3)), r"one weight an image, \(1,\); got shape \(3,\)"), (dict(scheduler=euler, eta=1., generator=torch.Generator()), "eta must be 0 for Euler"),
    (dict(grad_steps=1, scheduler=HeunDiscreteScheduler(**sd), steps=3), "single-step"), (dict(steps=2000), "2000")])
def test_refused_at_the_call(kwargs, says):
    def predict(x, t, w): raise AssertionError("the model was run")
    with pytest.raises(ValueError, match=says): denoise(predict, one, **{"scheduler": ddim, "steps": 5, **kwargs})


def test_heun_s_K_is_counted_in_its_own_steps():
    with pytest.raises(ValueError, match=r"0..19"): denoise(toy, one, HeunDiscreteScheduler(**sd), steps=10, grad_steps=20)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "DEISMultistepScheduler",
                                  "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_training_refuses_solvers_with_a_history(name):
    scheduler = getattr(diffusers.schedulers, name)(**{k: v for k, v in sd.items() if k.startswith("beta")})
    with pytest.raises(ValueError, match=f"DDIMScheduler.*FlowMatchEulerDiscreteScheduler.*got {name}"): denoise(toy, one, scheduler, steps=6, grad_steps=1)


@pytest.mark.parametrize("name", single_step)
def test_single_step_schedulers_train(name):
    scheduler = getattr(diffusers.schedulers, name)()
    theta = torch.tensor(.5, requires_grad=True)
    last(blended(scalar(.3), scalar(theta)), one.float()/10, scheduler, steps=4, grad_steps=2, generator=torch.Generator().manual_seed(0)).prev.sum().backward()
    assert theta.grad.isfinite() and theta.grad != 0


def test_a_subclass_of_a_single_step_scheduler_trains():
    assert next(denoise(toy, one, Skipped(0), steps=4, grad_steps=1)).T == 4


def test_state_reads_well_and_is_frozen():
    s = next(denoise(toy, one, ddim, steps=50, weight="constant_0.5"))
    assert repr(s) == "State(i=0, T=50, t=981, w=0.5, latents (1, 1, 1, 1))"
    with pytest.raises(FrozenInstanceError): s.i = 3


# sample

pictures = torch.stack([torch.full((3, 4, 6), -1.), torch.full((3, 4, 6), 1.)])*torch.tensor([1., .5, .2])[:, None, None]


@dataclass
class TwoPictures:
    "A dark and a light picture, exactly denoised, behind the interface of a text-to-image model."
    scheduler: object = field(default_factory=lambda: deepcopy(ddim))
    steps: int = 8
    guidance_scale: float = 1.
    asked: list = field(default_factory=list)
    def encode(self, prompts): self.asked.append(("encode", list(prompts))); return prompts
    def timesteps_kwargs(self, latents, steps): return {}
    def latents(self, n, generator, **size): self.asked.append(("latents", n, size)); return torch.randn(n, 3, 4, 6, generator=generator)
    def decode(self, latents): return (latents/2+.5).clamp(0, 1)
    def denoiser(self, cond, guidance_scale):
        self.asked.append(("guidance", guidance_scale))
        even, light = (denoiser(Mixture(pictures, torch.tensor(w), .1), level) for w in ([.5, .5], [.01, .99]))
        return blended(even, light)


def test_sample_makes_pictures():
    before, model = torch.get_rng_state(), TwoPictures()
    s = sample(model, ["a", "b"], num_images=3, seed=1)
    assert s.images.shape == (6, 3, 4, 6) and s.latents.shape == (6, 3, 4, 6) and 0 <= s.images.min() and s.images.max() <= 1
    assert s.prompts == ["a"]*3+["b"]*3 and s.weight == "draft" and s.seed == 1 and not s.images.requires_grad
    assert model.asked == [("latents", 6, {}), ("encode", s.prompts), ("guidance", 1.)] and torch.equal(before, torch.get_rng_state())
    assert torch.equal(s.images, sample(model, ["a", "b"], num_images=3, seed=1).images)
    assert not torch.equal(s.images, sample(model, ["a", "b"], num_images=3, seed=2).images)


def test_sample_is_denoise():
    model = TwoPictures()
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    for weight in ("base", "linear", power(3), .5, [0, .1, .5, .9, 1]):
        s = sample(model, ["a", "b"], weight=weight, steps=5, seed=3)
        assert torch.equal(s.latents, last(model.denoiser(None, 1.), x, ddim, steps=5, weight=weight).prev)


def test_sample_passes_what_was_asked_for():
    model = TwoPictures()
    sample(model, "a", guidance_scale=5., height=4, width=6)
    assert ("guidance", 5.) in model.asked and ("latents", 1, dict(height=4, width=6)) in model.asked
    assert sample(model, "a", weight="power_2.0").weight == "power_2" and sample(model, ("a",), steps=2).prompts == ["a"]


@pytest.mark.parametrize("eta", [0., 1.])
def test_a_seed_for_each_picture_is_independent_of_the_batch(eta):
    model = TwoPictures()
    four = sample(model, ["a", "b"], num_images=2, seed=[5, 6, 7, 8], eta=eta)
    for j, seed in enumerate((5, 6, 7, 8)): torch.testing.assert_close(four.latents[j:j+1], sample(model, "a", seed=[seed], eta=eta).latents)
    assert four.seed == (5, 6, 7, 8)


@pytest.mark.parametrize("args, says", [
    (dict(prompts=[]), "at least one prompt; got none"), (dict(prompts=["a", 3]), "prompts must be strings; got 3"), (dict(prompts=["a", None]), "got None"),
    (dict(num_images=0), "num_images.*at least 1; got 0"), (dict(seed=[1, 2]), r"one a picture, 1 \(prompts x num_images\); got 2"), (dict(weight="cubic"), "unknown weight"),
    (dict(steps=0), "steps must be"), (dict(eta=-1), "eta must lie")])
def test_sample_refuses(args, says):
    with pytest.raises(ValueError, match=says): sample(TwoPictures(), **{"prompts": ["a"], **args})


def test_samples_show_and_save(tmp_path):
    s = sample(TwoPictures(), ["a", "b"], num_images=3, seed=0)
    assert repr(s) == "Samples(6 of (3, 4, 6), weight='draft', seed=0)"
    assert [o.size for o in s.pil()] == [(6, 4)]*6
    assert s.grid().size == (3*8-2, 2*6-2) and s.grid(columns=6).size == (6*8-2, 4) and s.grid(2, cell=12).size == (26, 3*10-2)
    assert s.grid(4).getpixel((25, 9)) == (255, 255, 255) # an empty place
    shown = Image.open(BytesIO(s._repr_png_()))
    assert shown.format == "PNG" and shown.size == (3*66-2, 2*45-2)
    paths = s.save(tmp_path/"new"/"folder")
    assert [o.name for o in paths] == [f"{j:03d}.png" for j in range(6)]
    for path, pic in zip(paths, s.pil()): assert Image.open(path).tobytes() == pic.tobytes()


def test_progress_shows_all_steps(capsys):
    sample(TwoPictures(), "a", steps=6, progress=True)
    assert "6/6" in capsys.readouterr().err


schedules = [dict(beta_schedule=b, timestep_spacing=s, rescale_betas_zero_snr=z, set_alpha_to_one=o) for b in ("linear", "scaled_linear", "squaredcos_cap_v2")
             for s in ("leading", "trailing", "linspace") for z in (False, True) for o in (False, True)]


@pytest.mark.parametrize("options", schedules, ids=lambda o: "-".join(map(str, o.values())))
def test_every_ddim_schedule_draws_with_all_of_its_noise(options):
    "Of these schedules diffusers draws about one in ten as NaN, which ones depends on the CPU."
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1, **options)
    for steps in (1, 2, 3, 5, 7, 10, 20, 25, 50):
        for s in denoise(lambda x, t, w: x, torch.ones(1, 1, 1, 1), scheduler, steps=steps, eta=1., generator=torch.Generator().manual_seed(0)):
            assert s.prev.isfinite().all()


def test_less_noise_is_the_exception():
    "A millionth less where the bracket vanishes, the very number elsewhere."
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    assert [drawable_eta(scheduler, t, 1.) for t in scheduler.timesteps] == [1-1e-6, 1., 1., 1., 1.]
    assert [drawable_eta(scheduler, t, .5) for t in scheduler.timesteps] == [.5]*5


def test_predicted_noise_needs_a_signal():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="scheduler must leave some signal .*rescale_betas_zero_snr.* timestep 999"):
        denoise(lambda x, t, w: x, torch.ones(1, 1, 1, 1), scheduler, steps=5)
