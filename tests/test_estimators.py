"""Which part of a rollout carries the gradient: each estimator against a chain written down by hand, and against difference quotients."""
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import draft_nb.train as train
from draft_nb.anneal import blended
from draft_nb.estimators import Plan, draft_lv, drtune, estimators, last_k, parse_estimator, random_k, refl
from draft_nb.models import load
from draft_nb.rewards import Reward
from draft_nb.sampler import count_steps, denoise, noise_level
from draft_nb.toy import Mixture, denoiser, flow_level, ring, scalar, vp_level
from draft_nb.train import DRaFTConfig, check_run, draft_loss, fit, resolve

sd = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
ddim = DDIMScheduler(**sd, clip_sample=False, set_alpha_to_one=False)
euler, flow = EulerDiscreteScheduler(**sd), FlowMatchEulerDiscreteScheduler(shift=3.)
level = vp_level(ddim.alphas_cumprod)
T = 8
BASE = ring(3, std=.5)
TARGET = torch.tensor([.7, -.2], dtype=torch.float64)[:, None, None]


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def mixture(theta):
    "A ring whose modes have moved by theta."
    return Mixture(BASE.means.double() + theta[:, None, None], BASE.weights, BASE.std)


def parameter(): return torch.tensor([.3, -.1], dtype=torch.float64, requires_grad=True)


@dataclass
class Toy:
    "The ring behind the interface that `draft_loss` knows: two parameters, no text, latents are pictures."
    theta: torch.Tensor
    scheduler: object = field(default_factory=lambda: ddim)
    steps: int = T
    calls: list = field(default_factory=list) # whether each pass of the tuned model carried gradient
    def encode(self, prompts): return None
    def latents(self, n, generator): return torch.randn(n, 2, 1, 1, generator=generator, dtype=torch.float64)
    def timesteps_kwargs(self, latents, steps): return {}
    def decode(self, latents): return latents
    def denoiser(self, cond, guidance_scale):
        def tuned(x, t):
            self.calls.append(torch.is_grad_enabled())
            return denoiser(mixture(self.theta), level)(x, t)
        return blended(denoiser(BASE, level), tuned)


def reward(images, prompts=None): return -(images-TARGET).square().flatten(1).sum(1)


def ours(estimator, seed=0, kl_coeff=0., **options):
    "Loss and gradient by `draft_loss`."
    model = Toy(parameter())
    loss, _ = draft_loss(model, reward, ["", "", ""], estimator=estimator, generator=seeded(seed), draws=seeded(seed+1000), kl_coeff=kl_coeff, **options)
    return loss.item(), torch.autograd.grad(loss, model.theta)[0]


# the same by hand: DDIM's arithmetic, explicit loops, a detach where the paper has one

TIMES = list(range(1+125*7, 0, -125)) # leading spacing, an offset of 1
ALPHA, SIGMA = zip(*[level(t) for t in TIMES], level(0)) # what the last step leads to: no set_alpha_to_one


def network(theta, x, i):
    "The noise that the mixture's responsibilities give, without the library's denoiser."
    means = BASE.means.double()[None, :, :, 0, 0] + theta
    gap = x[:, None, :, 0, 0] - ALPHA[i]*means
    var = (ALPHA[i]*BASE.std)**2 + SIGMA[i]**2
    r = (-gap.square().sum(-1)/(2*var)).softmax(1)
    return (SIGMA[i]/var*(r[..., None]*gap).sum(1))[..., None, None]


def clean(x, eps, i): return (x-SIGMA[i]*eps)/ALPHA[i]
def step(x, eps, i): return ALPHA[i+1]*clean(x, eps, i) + SIGMA[i+1]*eps
def start(seed=0): return torch.randn(3, 2, 1, 1, generator=seeded(seed), dtype=torch.float64)


def by_hand_last_k(theta, x, k):
    for i in range(T-k):
        with torch.no_grad(): x = step(x, network(theta, x, i), i)
    for i in range(T-k, T): x = step(x, network(theta, x, i), i)
    return reward(x)


def by_hand_draft_lv(theta, x, n, generator):
    for i in range(T-1):
        with torch.no_grad(): x = step(x, network(theta, x, i), i)
    eps = network(theta, x, T-1)
    rewards, x0 = [reward(step(x, eps, T-1))], clean(x, eps, T-1).detach()
    for _ in range(n):
        again = ALPHA[T-1]*x0 + SIGMA[T-1]*torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        rewards.append(reward(step(again, network(theta, again, T-1), T-1)))
    return sum(rewards)/(n+1)


def by_hand_refl(theta, x, m):
    for i in range(m):
        with torch.no_grad(): x = step(x, network(theta, x, i), i)
    return reward(clean(x, network(theta, x, m), m))


def by_hand_drtune(theta, x, train_steps, m):
    for i in range(m+1):
        eps = network(theta, x.detach(), i)
        if i not in train_steps: eps = eps.detach()
        if i == m: return reward(clean(x, eps, i))
        x = step(x, eps, i)


def agrees(rewards, theta, estimator, seed=0, **options):
    loss, gradient = ours(estimator, seed, **options)
    assert loss == pytest.approx(-rewards.mean().item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(-rewards.mean(), theta)[0], rtol=1e-4, atol=1e-7)
    assert gradient.abs().min() > 1e-4


def test_the_hand_has_the_scheduler_s_steps():
    assert [int(s.t) for s in denoise(Toy(parameter()).denoiser(None, 1.), start(), ddim, steps=T)] == TIMES


@pytest.mark.parametrize("k", [1, 2, 5, T])
def test_last_k(k):
    theta = parameter()
    agrees(by_hand_last_k(theta, start(), k), theta, "last_k", grad_steps=k)


@pytest.mark.parametrize("seed", range(4))
def test_random_k(seed):
    theta = parameter()
    k = torch.randint(1, T+1, (), generator=seeded(seed+1000)).item()
    agrees(by_hand_last_k(theta, start(seed), k), theta, "random_k", seed, grad_steps=T)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_draft_lv(n):
    theta, g = parameter(), seeded()
    x = torch.randn(3, 2, 1, 1, generator=g, dtype=torch.float64)
    agrees(by_hand_draft_lv(theta, x, n, g), theta, "draft_lv", lv_samples=n)


@pytest.mark.parametrize("seed", range(4))
def test_refl(seed):
    theta = parameter()
    m = torch.randint(4, T, (), generator=seeded(seed+1000)).item() # the last half
    agrees(by_hand_refl(theta, start(seed), m), theta, "refl", seed, stop_within=.5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_drtune(k, seed):
    theta = parameter()
    plan = drtune(k)(T, seeded(seed+1000))
    agrees(by_hand_drtune(theta, start(seed), plan.grad_steps, plan.stop-1), theta, "drtune", seed, grad_steps=k)


def test_on_one_number_without_autograd():
    "eps = theta·x: products of the steps' own multipliers and their slopes. The input cut, the sum of direct parts remains."
    th, x = .5, [1.]
    a = [ALPHA[i+1]/ALPHA[i] for i in range(T)]
    b = [SIGMA[i+1]-ALPHA[i+1]*SIGMA[i]/ALPHA[i] for i in range(T)]
    for i in range(T): x.append((a[i]+th*b[i])*x[-1])
    def slope(**options):
        theta = torch.tensor(th, dtype=torch.float64, requires_grad=True)
        s = list(denoise(blended(scalar(.3), scalar(theta)), torch.ones(1, 1, 1, 1, dtype=torch.float64), ddim, steps=T, **options))[-1]
        return torch.autograd.grad((s.x0 if "stop" in options else s.prev).sum(), theta)[0].item()
    def product(values):
        result = 1.
        for v in values: result *= v
        return result
    m = [p+th*q for p, q in zip(a, b)]
    for k in (1, 3, T):
        assert slope(grad_steps=k) == pytest.approx(sum(b[i]*x[i]*product(m[i+1:]) for i in range(T-k, T)), rel=1e-5)
    chosen = (1, 4, 6)
    attached = sum(b[i]*x[i]*product(m[j] if j in chosen else a[j] for j in range(i+1, T)) for i in chosen)
    cut = sum(b[i]*x[i]*product(a[i+1:]) for i in chosen)
    assert slope(grad_steps=chosen) == pytest.approx(attached, rel=1e-5)
    assert slope(grad_steps=chosen, detach_input=True) == pytest.approx(cut, rel=1e-5)
    assert slope(grad_steps=(5,), stop=6) == pytest.approx(-SIGMA[5]*x[5]/ALPHA[5], rel=1e-5)
    stopped = sum(b[i]*x[i]*product(a[i+1:6])/ALPHA[6] for i in (1, 4)) - SIGMA[6]*x[6]/ALPHA[6]
    assert slope(grad_steps=chosen, detach_input=True, stop=7) == pytest.approx(stopped, rel=1e-5)


# difference quotients: what carries no gradient is replayed as it was, the rest sees theta + h

def replayed(plan, theta, seed=0):
    "A loss whose slope at `theta` is what the plan estimates: constants are recorded once, in a rollout at `theta`."
    run = list(denoise(Toy(theta).denoiser(None, 1.), start(seed), ddim, steps=T, **vars(plan), generator=seeded(7)))
    last = (plan.stop or T)-1
    chosen = range(last+1-plan.grad_steps, last+1) if isinstance(plan.grad_steps, int) else plan.grad_steps
    def loss(moved):
        x, rewards = start(seed), []
        for j, s in enumerate(run):
            if j > last: x = s.latents.detach() # the end, noised again
            seen = s.model_input.detach() if plan.detach_input else x
            eps = network(moved, seen, s.i) if s.i in chosen else s.prediction.detach()
            if s.i == last: rewards.append(reward(clean(x, eps, s.i) if plan.stop else step(x, eps, s.i)))
            x = step(x, eps, s.i)
        return -sum(rewards).mean().item()/len(rewards)
    return loss, run


@given(spec=st.sampled_from([("last_k", 1), ("last_k", 3), ("random_k", T), ("draft_lv", 1), ("refl", 1), ("drtune", 1), ("drtune", 3)]), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_difference_quotient(spec, seed):
    plan = parse_estimator(*spec)(T, seeded(seed))
    theta, h = parameter(), 1e-5
    loss, run = replayed(plan, theta.detach(), seed)
    model = Toy(theta)
    noise = iter([start(seed)])
    model.latents = lambda n, generator: next(noise)
    mine, _ = draft_loss(model, reward, ["", "", ""], estimator=lambda T, g: plan, generator=seeded(7), kl_coeff=0.)
    assert mine.item() == pytest.approx(loss(theta.detach()), rel=1e-5)
    for j, got in enumerate(torch.autograd.grad(mine, theta)[0].tolist()):
        e = torch.eye(2, dtype=torch.float64)[j]*h
        assert got == pytest.approx((loss(theta.detach()+e)-loss(theta.detach()-e))/(2*h), rel=1e-4, abs=1e-7)


# the KL, over the gradient steps

@pytest.mark.parametrize("estimator, k", [("last_k", 3), ("random_k", T), ("draft_lv", 1), ("refl", 1), ("drtune", 3)])
def test_kl_by_hand(estimator, k):
    theta, zero = parameter(), torch.zeros(2, dtype=torch.float64)
    plan = parse_estimator(estimator, k)(T, seeded(1000))
    run = plan.stop or T
    chosen = range(run-plan.grad_steps, run) if isinstance(plan.grad_steps, int) else plan.grad_steps
    x, kl = start(), 0.
    for i in range(run):
        seen = x.detach() if plan.detach_input else x
        eps = network(theta, seen, i)
        if i in chosen: kl = kl + (eps-network(zero, seen.detach(), i).detach()).square().mean()
        else: eps = eps.detach()
        x = step(x, eps, i)
    nothing = lambda images, prompts: images.flatten(1).sum(1)*0
    model = Toy(parameter())
    loss, parts = draft_loss(model, nothing, ["", "", ""], estimator=estimator, grad_steps=k, generator=seeded(), draws=seeded(1000), kl_coeff=1.)
    assert parts["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    # the KL is in float32
    torch.testing.assert_close(torch.autograd.grad(loss, model.theta)[0], torch.autograd.grad(kl, theta)[0], rtol=1e-4, atol=1e-6)
    assert sum(model.calls) == len(chosen)+plan.renoise


def test_cut_input_cuts_the_kl_too_whatever_the_model_predicts():
    "Flow velocity turns into noise by adding x_t, which must not carry gradient then."
    theta = torch.tensor([.3, -.1], dtype=torch.float64, requires_grad=True)
    predict = blended(denoiser(BASE, flow_level, "flow"), lambda x, t: denoiser(mixture(theta), flow_level, "flow")(x, t))
    states = list(denoise(predict, start(), flow, steps=5, grad_steps=(1, 3), detach_input=True, with_base=True))
    s = states[3]
    assert s.latents.requires_grad and s.scaled.requires_grad and not s.model_input.requires_grad
    direct = torch.autograd.grad(denoiser(mixture(theta), flow_level, "flow")(s.latents.detach(), s.t).sum()*noise_level(s.scheduler, 3)[0], theta)[0]
    torch.testing.assert_close(torch.autograd.grad(s.epsilon.sum(), theta)[0], direct, rtol=1e-5, atol=1e-8)


def test_drtune_on_flow_by_hand():
    "x0 = x - sigma·v: the latents keep their graph, the network's input does not."
    theta = parameter()
    predict = blended(denoiser(BASE, flow_level, "flow"), lambda x, t: denoiser(mixture(theta), flow_level, "flow")(x, t))
    states = list(denoise(predict, start(), flow, steps=6, grad_steps=(0, 2, 4), detach_input=True, stop=5))
    got, = torch.autograd.grad(reward(states[-1].x0).mean(), theta)
    sigma, x = states[0].scheduler.sigmas.double(), start()
    for i in range(5):
        v = denoiser(mixture(theta), flow_level, "flow")(x.detach(), states[i].t)
        if i not in (0, 2, 4): v = v.detach()
        end, x = x-sigma[i]*v, x+(sigma[i+1]-sigma[i])*v
    torch.testing.assert_close(got, torch.autograd.grad(reward(end).mean(), theta)[0], rtol=1e-4, atol=1e-6)


# the loop's part

@pytest.mark.parametrize("scheduler", [ddim, euler, flow], ids=["ddim", "euler", "flow"])
def test_the_end_is_noised_to_the_level_of_the_last_step(scheduler):
    x = torch.randn(2, 2, 1, 1, generator=seeded(5))
    model = denoiser(ring(), flow_level if scheduler is flow else level, "flow" if scheduler is flow else "epsilon")
    states = list(denoise(blended(model, model), x, scheduler, steps=6, renoise=3, generator=seeded(1)))
    assert [s.i for s in states] == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    g, end = seeded(1), states[5]
    alpha, sigma = noise_level(end.scheduler, 5)
    for s in states[6:]:
        seen = alpha*end.x0 + sigma*torch.randn(x.shape, generator=g)
        torch.testing.assert_close(s.model_input, seen, rtol=1e-4, atol=1e-6)
        assert s.t == end.t and not torch.allclose(s.prev, end.prev, atol=1e-3)
        torch.testing.assert_close(s.x0, (seen-sigma*model(seen, s.t))/alpha if scheduler is not flow else seen-sigma*model(seen, s.t), rtol=1e-4, atol=1e-5)
        if scheduler is not ddim: torch.testing.assert_close(s.prev, s.x0, rtol=1e-4, atol=1e-5)


def test_a_repeated_end_has_a_generator_for_each_image():
    x, model = torch.randn(2, 2, 1, 1, generator=seeded(5)), denoiser(ring(), level)
    both = list(denoise(blended(model, model), x, ddim, steps=4, renoise=1, generator=[seeded(1), seeded(2)]))[-1]
    alone = list(denoise(blended(model, model), x[1:], ddim, steps=4, renoise=1, generator=[seeded(2)]))[-1]
    torch.testing.assert_close(both.prev[1:], alone.prev)


def test_a_stop_changes_nothing_before_it():
    x, predict = torch.randn(2, 2, 1, 1, generator=seeded(5)), blended(denoiser(ring(3), level), denoiser(ring(), level))
    whole, part = (list(denoise(predict, x, ddim, steps=9, weight="linear", stop=stop)) for stop in (None, 4))
    assert len(part) == 4 and part[0].T == 9 and all(torch.equal(a.prev, b.prev) and a.w == b.w for a, b in zip(whole, part))
    assert count_steps(ddim, 9) == 9 and count_steps(flow, sigmas=[1., .5]) == 2


@pytest.mark.parametrize("estimator, k", [("last_k", 1), ("last_k", 4), ("random_k", 4), ("draft_lv", 1), ("refl", 1), ("drtune", 4)])
def test_the_network_keeps_what_it_needs_for_its_gradient_steps_only(estimator, k):
    "Graphs grow with the passes that carry gradient, not with T; between them the latents' arithmetic keeps no tensor of their size."
    def kept(T, plan):
        sizes = []
        theta = torch.tensor(.5, requires_grad=True)
        x = torch.ones(7, 1, 1, 1)
        with torch.autograd.graph.saved_tensors_hooks(lambda o: sizes.append(o.numel()) or o, lambda o: o):
            list(denoise(blended(scalar(.3), scalar(theta)), x, ddim, steps=T, **vars(plan), generator=seeded()))
        return sum(n >= 7 for n in sizes)
    for T in (10, 40):
        plan = parse_estimator(estimator, k)(T, seeded(3))
        passes = (plan.grad_steps if isinstance(plan.grad_steps, int) else len(plan.grad_steps))+plan.renoise
        assert kept(T, plan) == passes


def test_states_before_the_first_gradient_step_hold_no_graph():
    theta = torch.tensor(.5, requires_grad=True)
    for detach in (False, True):
        states = list(denoise(blended(scalar(.3), scalar(theta)), torch.ones(1, 1, 1, 1), ddim, steps=9, grad_steps=(3, 6), detach_input=detach))
        assert [s.prediction.requires_grad for s in states] == [i in (3, 6) for i in range(9)]
        assert [s.prev.requires_grad for s in states] == [i >= 3 for i in range(9)]
        assert [s.model_input.requires_grad for s in states] == [i > 3 and not detach for i in range(9)]
        with torch.no_grad(): assert not any(s.prev.requires_grad for s in denoise(blended(scalar(.3), scalar(theta)), torch.ones(1, 1, 1, 1), ddim, steps=9, grad_steps=(3, 6)))


def test_an_int_is_the_last_k_of_the_steps_that_are_run():
    theta = torch.tensor(.5, requires_grad=True)
    def chosen(**options): return [s.i for s in denoise(blended(scalar(.3), scalar(theta)), torch.ones(1, 1, 1, 1), ddim, steps=9, **options) if s.prediction.requires_grad]
    assert chosen(grad_steps=2) == [7, 8] and chosen(grad_steps=2, stop=5) == [3, 4] and chosen(grad_steps={8, 1}) == [1, 8] and chosen(grad_steps=[]) == []


@pytest.mark.parametrize("options, says", [
    (dict(stop=0), r"stop must lie in 1..9 .*; got 0"), (dict(stop=10), "got 10"), (dict(stop=2.5), "got 2.5"), (dict(grad_steps=5, stop=4), "grad_steps must lie in 0..4.*got 5"),
    (dict(grad_steps=(3, 9)), r"grad_steps must hold steps in 0..8.*\(3, 9\)"), (dict(grad_steps=[-1]), r"0..8.*\[-1\]"), (dict(grad_steps=(4,), stop=4), r"0..3.*\(4,\)"),
    (dict(grad_steps="23"), "got '23'"), (dict(renoise=-1), "renoise must be a whole number, at least 0; got -1"), (dict(renoise=1), "generator must be given if renoise > 0"),
    (dict(grad_steps=(1,), scheduler=UniPCMultistepScheduler(beta_schedule="scaled_linear")), "single-step")])
def test_refused_at_the_call(options, says):
    def predict(x, t, w): raise AssertionError("the model was run")
    with pytest.raises(ValueError, match=says): denoise(predict, torch.ones(1, 1, 1, 1), **{"scheduler": ddim, "steps": 9, **options})


# what is drawn

@given(T=st.integers(2, 60), seed=st.integers(0, 10**6), data=st.data())
@settings(deadline=None, max_examples=80)
def test_every_plan_can_be_carried_out(T, seed, data):
    name = data.draw(st.sampled_from(estimators))
    most = {"last_k": T, "random_k": T, "drtune": T+1-max(1, round(.4*T))}.get(name, 1)
    k = data.draw(st.integers(2 if name == "random_k" else 1, most)) if most > 1 else 1
    plan = parse_estimator(name, k)(T, seeded(seed))
    assert plan == parse_estimator(name, k)(T, seeded(seed))
    theta = torch.tensor(.5, requires_grad=True)
    passes = [s.prediction.requires_grad for s in denoise(blended(scalar(.3), scalar(theta)), torch.ones(1, 1, 1, 1), ddim, steps=T, **vars(plan), generator=seeded())]
    assert len(passes) == (plan.stop or T)+plan.renoise and any(passes)
    if name in ("last_k", "drtune"): assert sum(passes) == k
    if name == "drtune": assert len({b-a for a, b in zip(plan.grad_steps, plan.grad_steps[1:])}) <= 1


def test_draws_are_spread_as_the_papers_say():
    g = seeded()
    assert {random_k(5)(50, g).grad_steps for _ in range(300)} == set(range(1, 6))
    assert {refl()(40, g).stop for _ in range(400)} == set(range(31, 41))
    plans = [drtune(5)(50, g) for _ in range(2000)]
    assert {p.stop for p in plans} == set(range(31, 51)) and all(p.detach_input for p in plans)
    assert {i for p in plans for i in p.grad_steps} == set(range(50))
    assert all(a[0] < a[-1] and a[-1]-a[0] == 4*(p.stop//5) for p in plans for a in [p.grad_steps])
    state = g.get_state()
    last_k(3)(50, g), draft_lv(4)(50, g)
    assert torch.equal(g.get_state(), state) and draft_lv(4)(50, g) == Plan(1, renoise=4)


@pytest.mark.parametrize("args, says", [
    (("draft",), "estimator must be one of last_k, random_k, draft_lv, refl, drtune, or a callable; got 'draft'"), ((None,), "got None"), (("last_k", 0), "at least 1; got 0"),
    (("random_k",), "grad_steps of random_k must be a whole number, at least 2; got 1"), (("refl", 2), "grad_steps must be 1 for refl"), (("draft_lv", 3), "grad_steps must be 1 for draft_lv"),
    (("draft_lv", 1, 0), "lv_samples must be a whole number, at least 1; got 0"), (("last_k", 1, 2, .3), "left open for last_k"), (("drtune", 1, 2, 0.), r"stop_within must lie in \(0,1\]"),
    (("refl", 1, 2, 1.5), "got 1.5")])
def test_parser_refuses(args, says):
    with pytest.raises(ValueError, match=says): parse_estimator(*args)


def test_too_many_steps_are_refused_whatever_is_drawn():
    for seed in range(20):
        with pytest.raises(ValueError, match=r"1..8 \(the number of denoising steps\); got 9"): random_k(9)(8, seeded(seed))
        with pytest.raises(ValueError, match=r"1..6 \(the steps that drtune runs at least\); got 7"): drtune(7)(8, seeded(seed))


# training

PROMPTS = ["an emoji of a fox", "an emoji of a rose"]


def colour(images, prompts):
    r, g, b = (images*2-1).unbind(1)
    return ((r-g).flatten(1).var(1) + ((r+g)/2-b).flatten(1).var(1) + 1e-6).sqrt()


OPTIONS = [dict(estimator="random_k", grad_steps=3), dict(estimator="draft_lv"), dict(estimator="refl"), dict(estimator="drtune", grad_steps=2)]


def config(folder, **options):
    return DRaFTConfig(**{**dict(output_dir=str(folder), num_inference_steps=5, batch_size=2, sample_prompts=PROMPTS[:1], sample_seeds=1, log_with=None,
                                 lr_warmup_steps=0, kl_coeff=.1, max_steps=3, sample_every=100, checkpoint_every=2), **options})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["estimator"])
def test_training_resumes_exactly(tmp_path, options):
    "The LoRA moves, the base does not, and the draws after a resume are those that would have come."
    whole, reward = load("tiny", rank=2), Reward("colour", colour)
    base = {n: p.detach().clone() for n, p in whole.network.named_parameters() if "lora" not in n}
    run = fit(whole, reward, PROMPTS, config(tmp_path/"a", **options), progress=False)
    assert all(torch.equal(p, base[n]) for n, p in whole.network.named_parameters() if "lora" not in n)
    assert all(r["grad_norm"] > 0 for r in run.rows) and run.rows[-1]["kl"] > 0
    fit(load("tiny", rank=2), reward, PROMPTS, config(tmp_path/"b", max_steps=2, **options), progress=False)
    again = load("tiny", rank=2)
    fit(again, reward, PROMPTS, config(tmp_path/"b", resume=True, **options), progress=False)
    assert_close(again.parameters(), whole.parameters(), atol=1e-5, rtol=0)  # two networks


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["estimator"])
def test_checkpointing_changes_no_gradient(options):
    model = load("tiny", rank=2)
    for k, p in enumerate(model.parameters()): torch.nn.init.normal_(p, std=.02, generator=seeded(k))
    def gradient():
        loss, _ = draft_loss(model, colour, PROMPTS, generator=seeded(), num_inference_steps=5, kl_coeff=1., **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), materialize_grads=True)])
    plain = gradient()
    model.network.enable_gradient_checkpointing()
    assert torch.allclose(plain, gradient(), atol=1e-5*plain.abs().max()) and plain.abs().max() > 0


def test_all_processes_draw_alike_from_noise_of_their_own(tmp_path, monkeypatch):
    class Enough(Exception): pass
    seen = []
    def spy(model, reward, prompts, *, generator, draws, **_):
        seen.append((draws.initial_seed(), tuple(g.initial_seed() for g in generator)))
        raise Enough
    model = load("tiny", rank=2)
    c = resolve(config(tmp_path/"run", estimator="drtune"), model)
    run = train._prepare(model, Reward("colour", colour), PROMPTS, c)
    monkeypatch.setattr(train, "draft_loss", spy)
    monkeypatch.setattr(type(run.accelerator), "num_processes", property(lambda _: 2))
    for step, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        run.step = step
        monkeypatch.setattr(type(run.accelerator), "process_index", property(lambda _: rank))
        with pytest.raises(Enough): train._one_step(run)
    draws, noise = zip(*seen)
    assert draws[0] == draws[1] != draws[2] == draws[3] and len({s for seeds in noise for s in seeds}) == sum(map(len, noise))


def test_bad_configurations(tmp_path):
    for options, says in ((dict(estimator="draft"), "estimator must be one of last_k, random_k, draft_lv, refl, drtune; got 'draft'"), (dict(estimator="random_k"), "at least 2; got 1"),
                          (dict(estimator="refl", grad_steps=2), "must be 1 for refl"), (dict(stop_within=.2), "left open for last_k"), (dict(estimator="refl", stop_within=2.), r"in \(0,1\]; got 2"),
                          (dict(lv_samples=0), "lv_samples must be at least 1; got 0")):
        with pytest.raises(ValueError, match=says): DRaFTConfig(**options)
    model = load("tiny", rank=2)
    for options, says in ((dict(estimator="drtune", grad_steps=5), "1..4 .*runs at least.*got 5"), (dict(estimator="random_k", grad_steps=6), "1..5 .*got 6"), (dict(grad_steps=6), "0..5")):
        with pytest.raises(ValueError, match=says): check_run(model, Reward("colour", colour), PROMPTS, resolve(config(tmp_path/"x", **options), model))
