"`annealed` around pipelines that somebody else wrote: tiny networks of the real classes."
import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from torch.testing import assert_close

from draft_nb.adapters import base_of
from draft_nb.models import load
from draft_nb.pipelines import annealed, denoiser_of

pytestmark = pytest.mark.numeric

PROMPTS = ["an emoji of a fox", "a rose"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    model = load("tiny", rank=4)
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=.1, generator=generator(k))
    return model


def picture(seed=3):
    return torch.rand(2, 3, 64, 64, generator=generator(seed))


def text2img(model):
    x = model.latents(2, generator=generator())
    return lambda pipe: pipe(PROMPTS, latents=x.clone(), num_inference_steps=6, guidance_scale=3., output_type="pt").images


def img2img(model):
    pipe = StableDiffusionImg2ImgPipeline(**model.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda pipe: pipe(PROMPTS, picture(), strength=.6, num_inference_steps=10, guidance_scale=3., generator=generator(1), output_type="pt").images


def inpaint(model):
    pipe = StableDiffusionInpaintPipeline(**model.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 16:48] = 1
    return pipe, lambda pipe: pipe(PROMPTS, picture(), mask, height=64, width=64, strength=1., num_inference_steps=6, guidance_scale=3., generator=generator(1), output_type="pt").images


def controlnet(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        control = ControlNetModel.from_unet(load("tiny", adapter=None).network, conditioning_embedding_out_channels=(8, 16, 32), load_weights_from_unet=True)
    for p in (p for n, p in control.named_parameters() if "controlnet" in n):
        torch.nn.init.normal_(p, std=.02, generator=generator(p.numel()))
    parts = {k: v for k, v in model.pipe.components.items()}
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=control.eval(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda pipe: pipe(PROMPTS, picture(), num_inference_steps=4, guidance_scale=3., generator=generator(1), output_type="pt").images


def by_hand(pipe, run, model, weights):
    "The blend made by replacing the denoiser's forward, with the weights of the calls listed."
    net, calls = denoiser_of(pipe), iter(weights)
    forward = net.forward
    def both(*args, **kwargs):
        w = next(calls)
        with base_of(net):
            base = forward(*args, **kwargs)
        return ((1 - w) * base[0] + w * forward(*args, **kwargs)[0],)
    net.forward = both
    try:
        return run(pipe)
    finally:
        net.forward = forward
        assert next(calls, None) is None


@pytest.mark.parametrize("make, weights", [
    (img2img, [(4 + k) / 10 for k in range(6)]),  # strength .6 starts at step 4 of 10
    (inpaint, [k / 6 for k in range(6)]),
    (controlnet, [k / 4 for k in range(4)]),
])
def test_other_pipelines(model, make, weights):
    pipe, run = make(model)
    tuned = run(pipe)
    with annealed(pipe, "linear"):
        ours = run(pipe)
    assert (ours - by_hand(pipe, run, model, weights)).abs().max() < 1e-5
    assert torch.equal(run(pipe), tuned) and not torch.allclose(ours, tuned, atol=1e-3)


@pytest.mark.parametrize("scheduler, T", [(HeunDiscreteScheduler, 11), (PNDMScheduler, 7), (EulerDiscreteScheduler, 6), (DPMSolverMultistepScheduler, 6)])
def test_t_is_what_the_scheduler_runs(model, scheduler, T):
    model.pipe.scheduler = scheduler.from_config(model.scheduler.config, **({"skip_prk_steps": True} if scheduler is PNDMScheduler else {}))
    run, seen = text2img(model), []
    def weight(i, T):
        seen.append((i, T))
        return i / T
    with annealed(model.pipe, weight):
        ours = run(model.pipe)
    assert seen == [(i, T) for i in range(T)]
    assert (ours - by_hand(model.pipe, run, model, [i / T for i in range(T)])).abs().max() < 1e-5


def test_weights_0_and_1_run_one_pass_and_are_exact(model):
    run, calls = text2img(model), []
    tuned = run(model.pipe)
    with base_of(model.network):
        base = run(model.pipe)
    assert_close(base, run(load("tiny", adapter=None).pipe), atol=1e-5, rtol=0)  # another network
    hook = model.network.conv_in.register_forward_hook(lambda *_: calls.append(1))
    for weight, expected in (("draft", tuned), ("base", base)):
        calls.clear()
        with annealed(model.pipe, weight):
            assert torch.equal(run(model.pipe), expected)
        assert len(calls) == 6
    calls.clear()
    with annealed(model.pipe, "step_0.5"):
        run(model.pipe)
    assert len(calls) == 6
    hook.remove()


def test_a_frozen_network_as_base(model):
    run = text2img(model)
    frozen = load("tiny", adapter=None)
    with annealed(model.pipe, "linear"):
        expected = run(model.pipe)
    for base in (frozen.network, frozen.pipe):
        with annealed(model.pipe, "linear", base=base):
            assert torch.allclose(run(model.pipe), expected, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_as_it_was_after_an_exception_in_the_middle(model, error):
    run = text2img(model)
    tuned, forward, before = run(model.pipe), model.network.forward, set(vars(model.scheduler))
    def stop(pipe, i, t, kwargs):
        if i == 2:
            raise error
        return kwargs
    with pytest.raises(error):
        with annealed(model.pipe, "linear"):
            model.pipe(PROMPTS, num_inference_steps=6, generator=generator(), callback_on_step_end=stop)
    assert set(vars(model.scheduler)) == before and not model.network._diffusers_hook.hooks
    assert model.network.forward == forward and torch.equal(run(model.pipe), tuned)


def test_two_pipelines_share_a_denoiser(model):
    other = StableDiffusionPipeline(**{**model.pipe.components, "scheduler": copy.deepcopy(model.scheduler)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    run = text2img(model)
    alone = []
    for pipe, weight in ((model.pipe, "linear"), (other, "base")):
        with annealed(pipe, weight):
            alone.append(run(pipe))
    with annealed(model.pipe, "linear"), annealed(other, "base"):
        together = [run(model.pipe), run(other), run(model.pipe)]
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1]) and torch.equal(together[2], alone[0])


def test_refusals(model):
    other = load("tiny", adapter=None)
    with pytest.raises(ValueError, match="must carry a LoRA, or base be given"):
        with annealed(other.pipe, "linear"):
            pass
    other.pipe.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="base must predict what the pipe predicts, v_prediction; it predicts epsilon"):
        with annealed(model.pipe, "linear", base=other.pipe):
            pass
    with pytest.raises(ValueError, match="base must be a UNet2DConditionModel"):
        with annealed(model.pipe, "linear", base=model.pipe.vae):
            pass
    with pytest.raises(ValueError, match="known: base, draft, linear"):
        with annealed(model.pipe, "cubic"):
            pass
    with pytest.raises(ValueError, match="divide the batch"):
        with annealed(model.pipe, lambda i, T: torch.tensor([.1, .2, .3])):
            text2img(model)(model.pipe)
