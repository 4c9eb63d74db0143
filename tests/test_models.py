"The embedded model through our loop and through the stock pipeline."
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch.testing import assert_close

from draft_nb.models import FAMILIES, asset, check_device, clamp_unit, load
from draft_nb.pipelines import annealed
from draft_nb.sampler import denoise, sample

pytestmark = pytest.mark.numeric

PROMPTS = ["an emoji of a fox", "an emoji of a red apple on a blue background", "a ghost"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    model = load("tiny", rank=4)
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=.05, generator=generator(k))
    return model


@pytest.fixture(scope="module")
def noise(model):
    return model.latents(len(PROMPTS), generator=generator())


def stock(pipe, x, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, latents=x.clone(), output_type="pt", **options).images


@pytest.mark.parametrize("guidance_scale", [1., 3., 7.5])
def test_the_stock_pipeline_draws_the_same_picture(model, noise, guidance_scale):
    ours = sample(model, PROMPTS, steps=6, guidance_scale=guidance_scale, seed=0).images
    theirs = stock(model.pipe, noise, num_inference_steps=6, guidance_scale=guidance_scale)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("eta", [0., .9])
def test_the_same_with_noise_in_the_steps(model, noise, eta):
    g = generator(5)
    theirs = stock(model.pipe, noise, num_inference_steps=5, guidance_scale=2., eta=eta, generator=g)
    assert (with_noise(model, noise, eta) - theirs).abs().max() < 1e-5


def with_noise(model, noise, eta):
    predict, h = model.denoiser(model.encode(PROMPTS), 2.), generator(5)
    with torch.no_grad():
        for s in denoise(predict, noise, model.scheduler, steps=5, eta=eta, generator=h):
            pass
        return model.decode(s.prev)


def test_all_of_the_noise(model, noise):
    "The stock pipeline draws NaN at eta=1 on some CPUs; both of our doors draw the same picture everywhere."
    drawn = with_noise(model, noise, 1.)
    with annealed(model.pipe, "draft"):
        theirs = stock(model.pipe, noise, num_inference_steps=5, guidance_scale=2., eta=1., generator=generator(5))
    assert drawn.isfinite().all() and (drawn - theirs).abs().max() < 1e-5


def test_the_same_with_euler(noise):
    model = load("tiny", rank=4)
    model.pipe.scheduler = EulerDiscreteScheduler.from_config(model.scheduler.config)
    model.pipe.scheduler.set_timesteps(6)
    ours = sample(model, PROMPTS, steps=6, guidance_scale=3., seed=0).images
    theirs = stock(model.pipe, noise, num_inference_steps=6, guidance_scale=3.)
    assert (ours - theirs).abs().max() < 1e-4  # Euler's latents begin 14 times as large, rounding with them


def test_the_scheduler_and_the_global_random_numbers_stay_as_they_were(model):
    before, state = dict(model.scheduler.__dict__), torch.random.get_rng_state()
    sample(model, PROMPTS, steps=3)
    load("tiny", rank=2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert before.keys() == model.scheduler.__dict__.keys()


def test_weights_0_and_1_are_base_and_tuned(model, noise):
    bare = load("tiny", adapter=None)
    before = sample(bare, PROMPTS, weight="draft", steps=4, guidance_scale=1.).images
    own = load(bare.pipe, rank=4)  # the same tensors, with a LoRA
    for p, q in zip(own.parameters(), model.parameters(), strict=True): p.data.copy_(q.data)
    assert torch.equal(sample(own, PROMPTS, weight="base", steps=4, guidance_scale=1.).images, before)
    assert_close(sample(model, PROMPTS, weight="base", steps=4).images, before, atol=1e-5, rtol=0)  # another copy
    tuned = sample(model, PROMPTS, weight="draft", steps=4).images
    each = sample(model, PROMPTS, weight=lambda i, T: torch.tensor([0., 1., 1.]), steps=4).images
    assert torch.allclose(each[1:], tuned[1:], atol=1e-5) and not torch.allclose(each[0], tuned[0], atol=1e-3)


@pytest.mark.parametrize("fused, expected", [(True, [[6], [6], [12], [6], [6], [8]]), (False, [[6], [6], [6, 6], [6], [6], [4, 4]])])
def test_only_the_rows_that_a_weight_needs_and_one_pass_if_fused(model, noise, fused, expected):
    calls = []
    hook = model.network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    predict, t = model.denoiser(model.encode(PROMPTS), 3., fused=fused), torch.tensor(499)
    try:
        with torch.no_grad():
            counts = []
            for w in (0., 1., .5, torch.zeros(3), torch.ones(3), torch.tensor([0., 1., .5])):
                calls.clear()
                predict(noise, t, w)
                counts.append(list(calls))
    finally:
        hook.remove()
    assert counts == expected


def test_guidance_and_its_parts(model, noise):
    cond, t = model.encode(PROMPTS), torch.tensor(499)
    with torch.no_grad():
        _, prompted = model.denoiser(cond, 1.).parts(noise, t)
        guided, again = model.denoiser(cond, 3.).parts(noise, t)
        without = model.denoiser(model.encode([""] * 3), 1.)(noise, t)
    assert torch.allclose(prompted, again, atol=1e-5)
    assert torch.allclose(guided, without + 3 * (prompted - without), atol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch():
    alone, together = load("tiny", adapter=None), load("tiny", adapter=None)  # each with its own memory of prompts
    a = alone.encode(PROMPTS[:1])["encoder_hidden_states"][1]
    b = together.encode(PROMPTS)["encoder_hidden_states"][3]
    assert_close(a, b, atol=1e-5, rtol=0)


def test_the_saved_lora_draws_the_same_picture_in_stock_diffusers(model, noise, tmp_path):
    file = model.save(tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    pipe.load_lora_weights(tmp_path)
    ours = sample(model, PROMPTS, steps=6, guidance_scale=3., seed=0).images
    assert (ours - stock(pipe, noise, num_inference_steps=6, guidance_scale=3.)).abs().max() < 1e-5
    for path in (tmp_path, file):
        again = load("tiny", adapter=path)
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
        assert_close(sample(again, PROMPTS, steps=6).images, sample(model, PROMPTS, steps=6).images, atol=1e-5, rtol=0)


def test_alpha_other_than_rank_survives_the_file(noise, tmp_path):
    from draft_nb.adapters import add_lora
    model = load("tiny", adapter=None)
    add_lora(model.network, 4, alpha=1)
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=.1, generator=generator(k))
    model.save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    pipe.load_lora_weights(tmp_path)
    ours = sample(model, PROMPTS, steps=4, guidance_scale=3.).images
    assert (ours - stock(pipe, noise, num_inference_steps=4, guidance_scale=3.)).abs().max() < 1e-5


def test_a_fully_trained_model_is_saved_as_a_pipeline(tmp_path):
    model = load("tiny", adapter="full")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    model.save(tmp_path)
    again = load(str(tmp_path), adapter=None)
    assert all(torch.equal(p, q) for p, q in zip(again.network.parameters(), model.parameters(), strict=True))
    assert_close(sample(again, PROMPTS, steps=2, guidance_scale=7.5).images, sample(model, PROMPTS, steps=2, guidance_scale=7.5).images, atol=1e-5, rtol=0)
    base = sample(model, PROMPTS, weight="base", steps=2).images
    assert_close(base, sample(load("tiny", adapter=None), PROMPTS, steps=2).images, atol=1e-5, rtol=0)


def test_the_stock_pipeline_loads_in_float32_offline():
    code = ("import draft_nb, torch; from diffusers import StableDiffusionPipeline; from draft_nb.models import asset;"
            "p = StableDiffusionPipeline.from_pretrained(asset('tiny'));"
            "assert {p.unet.dtype, p.vae.dtype, p.text_encoder.dtype} == {torch.float32};"
            "assert p('a fox', num_inference_steps=2, output_type='np').images.shape == (1, 64, 64, 3)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_embedded_files_are_small():
    assert sum(f.stat().st_size for f in asset(".").rglob("*") if f.is_file()) <= 40e6


def test_pndm_becomes_ddim_with_the_same_noise(tmp_path):
    from diffusers import PNDMScheduler
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    pipe.scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, steps_offset=1, skip_prk_steps=True)
    pipe.save_pretrained(tmp_path)
    model = load(str(tmp_path), adapter=None)
    assert isinstance(model.scheduler, DDIMScheduler)
    assert_close(model.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod, atol=0, rtol=1e-6)
    assert load(pipe, adapter=None).scheduler is pipe.scheduler  # a pipeline that somebody built stays as it is


def test_clamp_lets_gradients_lead_back_inside():
    x = torch.linspace(-1, 2, 13, requires_grad=True)
    down, = torch.autograd.grad(clamp_unit(x).sum(), x)
    up, = torch.autograd.grad(-clamp_unit(x).sum(), x)
    assert down.tolist() == [float(v >= 0) for v in x] and (-up).tolist() == [float(v <= 1) for v in x]


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="owner/name"):
        load("no such model")
    with pytest.raises(ValueError, match="holds no model_index.json"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="file that exists"):
        load(str(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match="there is no"):
        load("tiny", adapter=tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="adapter must be a safetensors file"):
        load("tiny", adapter=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="0 CUDA devices"):
            check_device("cuda")
    with pytest.raises(ValueError, match="at least one text"):
        model.encode([])
    with pytest.raises(ValueError, match="texts; got 3"):
        model.encode([3])
    with pytest.raises(ValueError, match="carries no adapter"):
        sample(load("tiny", adapter=None), PROMPTS, weight="linear", steps=2)
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        load("tiny", rank=0)
    with pytest.raises(ValueError, match="nothing to save"):
        load("tiny", adapter=None).save(tmp_path)


def test_an_unknown_pipeline_is_refused_with_the_known_families():
    from diffusers import DDPMPipeline, UNet2DModel
    pipe = DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4), DDIMScheduler())
    with pytest.raises(ValueError, match=f"{', '.join(FAMILIES)}.*DDPMPipeline"):
        load(pipe)


def test_a_lora_of_another_size_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    model = load("tiny", rank=4)
    file = model.save(tmp_path)
    tensors = {k: torch.zeros(v.shape[0] + 1, v.shape[1] + 1) for k, v in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="adapter must fit"):
        load("tiny", adapter=file)
