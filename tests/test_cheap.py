"Cheap annealing: one fused pass, shared beginnings, a gap that is refreshed now and then; and weights by noise and by file."
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors import safe_open
from torch.testing import assert_close

from draft_nb import adapters
from draft_nb.anneal import by_noise, parse_weight, refreshed, weights_at
from draft_nb.models import asset, load
from draft_nb.pipelines import annealed
from draft_nb.sampler import denoise, noise_level, sample, sample_each

pytestmark = pytest.mark.numeric

PROMPTS = ["an emoji of a fox", "a rose"]
SIX = ["base", "draft", "linear", "power_2", "power_4", "step_0.6"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tuned(**options):
    model = load("tiny", rank=4, **options)
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=.1, generator=generator(k))
    return model


@pytest.fixture(scope="module")
def model():
    return tuned()


@pytest.fixture
def rows(model):
    "The number of rows of every call of the network."
    asked = []
    hook = model.network.conv_in.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    yield asked
    hook.remove()


def stock(model, **options):
    x = model.latents(2, generator=generator())
    return model.pipe(PROMPTS, latents=x.clone(), **{**dict(num_inference_steps=6, guidance_scale=3., output_type="pt"), **options}).images


# ------------------------------------------------------------------------------------------------ one pass

@pytest.mark.parametrize("guidance_scale", [1., 3.])
@pytest.mark.parametrize("w", [.3, 1.5, torch.tensor([0., .7]), torch.tensor([.2, 1.])])
def test_one_pass_predicts_what_two_predict(model, guidance_scale, w):
    x, t, cond = model.latents(2, generator=generator()), torch.tensor(601), model.encode(PROMPTS)
    with torch.no_grad():
        one, two = [model.denoiser(cond, guidance_scale, fused=fused)(x, t, w) for fused in (True, False)]
    assert (one-two).abs().max() < 5e-6*guidance_scale


def test_one_pass_is_one_call_of_twice_the_rows(model, rows):
    for fused, expected in (True, [2]+[4]*3), (False, [2]+[2, 2]*3):
        rows.clear()
        sample(model, PROMPTS, weight="linear", steps=4, fused=fused)
        assert rows == expected


@pytest.mark.parametrize("weight", ["linear", "constant_0.3", "step_0.5"])
def test_the_stock_pipeline_fused_draws_the_same(model, weight):
    with annealed(model.pipe, weight):
        one = stock(model)
    with annealed(model.pipe, weight, fused=False):
        two = stock(model)
    assert (one-two).abs().max() < 5e-5


def test_after_a_fused_pass_nothing_is_left(model):
    "Also where another library has put its own `forward` on a layer."
    layers = adapters.lora_layers(model.network)
    def own(): return [vars(o).get("forward") for o in layers]
    assert own() == [None]*len(layers)
    layers[0].forward = kept = layers[0].forward
    before = own()
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), adapters.lora_rows(model.network, torch.ones(2)):
        assert None not in own() and own()[0] is not kept
        raise KeyboardInterrupt
    assert own() == before
    del layers[0].forward


@pytest.mark.parametrize("on", [[0., 0.], [1., 1.], [0., 1.], [1., 0., 1.], [0., 1., 1., 0.]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_rows_may_be_chosen(on, dtype):
    "Rows of the tuned model and of the base, in any order; the LoRA stays in float32 beside a base of half precision."
    model = tuned()
    for name, p in model.network.named_parameters():
        if "lora_" not in name: p.data = p.data.to(dtype)
    n = len(on)
    x, t, cond = torch.randn(n, *model.latent_shape, generator=generator()).to(dtype), torch.tensor(601), {k: v[n:].to(dtype) for k, v in model.encode(["an emoji of a fox"]*n).items()}
    with torch.no_grad():
        with adapters.base_of(model.network): base = model.call(model.network, x, t, cond)
        tune = model.call(model.network, x, t, cond)
        with adapters.lora_rows(model.network, torch.tensor(on)): both = model.call(model.network, x, t, cond)
    assert both.dtype == dtype and (base-tune).abs().max() > .05
    wanted = torch.where(torch.tensor(on).bool().view(-1, 1, 1, 1), tune, base)
    assert (both-wanted).abs().max() < (1e-5 if dtype == torch.float32 else .05)*wanted.abs().max()


def test_what_cannot_be_switched_row_by_row_takes_two_passes(rows):
    model = tuned()
    assert adapters.fusable(model.network)
    model.network.fuse_lora()
    assert not adapters.fusable(model.network)
    full = load("tiny", adapter="full")
    asked = []
    for network in full.network, full.frozen:
        network.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    sample(full, PROMPTS, weight="constant_0.5", steps=2)
    assert asked == [2, 2]*2


def test_rows_must_fit_the_batch(model):
    x, t, cond = model.latents(2, generator=generator()), torch.tensor(601), model.encode(PROMPTS)
    with pytest.raises(ValueError, match="must have 3 rows.*got 2"), adapters.lora_rows(model.network, torch.ones(3)):
        model.denoiser(cond, 1.)(x, t)


def test_a_blend_with_gradient_equals_the_blend_without(model):
    x, t, cond = model.latents(2, generator=generator()), torch.tensor(601), model.encode(PROMPTS)
    predict = model.denoiser(cond, 3.)
    with torch.no_grad():
        expected = predict(x, t, .4)
    got = predict(x, t, .4)
    got.sum().backward()
    assert torch.allclose(got, expected, atol=2e-5) and all(p.grad is not None for p in model.parameters())
    for p in model.parameters():
        p.grad = None


def test_a_blend_under_checkpointing_is_refused(model):
    predict, x = model.denoiser(model.encode(PROMPTS), 1.), model.latents(2, generator=generator())
    model.network.enable_gradient_checkpointing()
    try:
        with pytest.raises(ValueError, match="weight must be 1 where gradients flow"):
            predict(x, torch.tensor(601), .5)
        with torch.no_grad():
            predict(x, torch.tensor(601), .5)
    finally:
        model.network.disable_gradient_checkpointing()


# -------------------------------------------------------------------------------------------- shared beginnings

@pytest.mark.parametrize("share", [True, False])
def test_together_is_what_one_by_one_is(model, share):
    together = sample_each(model, PROMPTS, SIX, steps=5, guidance_scale=3., seed=[3, 4], share=share)
    for got, weight in zip(together, SIX):
        alone = sample(model, PROMPTS, weight=weight, steps=5, guidance_scale=3., seed=[3, 4])
        assert (got.images-alone.images).abs().max() < 1e-4, weight
        assert (got.weight, got.seed, got.prompts) == (alone.weight, alone.seed, alone.prompts)


def test_what_weights_have_in_common_is_asked_once(model, rows):
    sample_each(model, PROMPTS, ["base", "step_0.6", "linear", "draft"], steps=5)
    # two pictures each: base|draft, base+linear|draft, base|base+linear|draft; then step leaves the base: base|step|base+linear|draft
    assert rows == [4, 6, 8, 10, 10]


def test_a_weight_that_repeats_costs_nothing(model, rows):
    a, b = sample_each(model, "a rose", ["power_2", "power_2"], steps=4)
    assert torch.equal(a.images, b.images) and rows == [1, 2, 2, 2]


def test_noise_of_the_steps_is_shared_too(model):
    options = dict(steps=4, eta=1., seed=[5, 6])
    together = sample_each(model, PROMPTS, ["base", "linear"], **options)
    for got, weight in zip(together, ["base", "linear"]):
        assert (got.images-sample(model, PROMPTS, weight=weight, **options).images).abs().max() < 1e-4
    with pytest.raises(ValueError, match="generator must be given"):
        sample_each(model, PROMPTS, ["base", "linear"], steps=4, eta=1., seed=5)


def test_per_image_weights_inside(model):
    mixed = lambda i, T: torch.tensor([0., 1.])
    base, both = sample_each(model, PROMPTS, ["base", mixed], steps=3, seed=[1, 2])
    assert (base.images[0]-both.images[0]).abs().max() < 1e-5 and (base.images[1]-both.images[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ refresh

@pytest.mark.parametrize("m, T, expected", [(1, 7, 1+6*2), (2, 7, 1+6+3), (3, 7, 1+6+2), (5, 7, 1+6+2)])
def test_refresh_asks_for_both_every_mth_time(model, rows, m, T, expected):
    sample(model, "a rose", weight="linear", steps=T, refresh=m)
    assert sum(rows) == expected
    rows.clear()
    with annealed(model.pipe, "linear", refresh=m):
        model.pipe("a rose", num_inference_steps=T, guidance_scale=1., generator=generator())
    assert sum(rows) == expected


def test_refresh_comes_near_and_nearer(model):
    exact = sample(model, PROMPTS, weight="linear", steps=12)
    errors = [(sample(model, PROMPTS, weight="linear", steps=12, refresh=m).images-exact.images).square().mean().item() for m in (1, 2, 6)]
    plain = (sample(model, PROMPTS, weight="draft", steps=12).images-exact.images).square().mean().item()
    assert errors[0] == 0 and 0 < errors[1] < errors[2] < plain/4


def test_refresh_through_the_stock_pipeline_is_the_same(model):
    ours = sample(model, PROMPTS, weight="linear", steps=6, guidance_scale=3., refresh=2).images
    with annealed(model.pipe, "linear", refresh=2):
        assert (stock(model)-ours).abs().max() < 5e-5
    with annealed(model.pipe, "linear", refresh=2):  # a second run begins anew
        stock(model)
        assert (stock(model)-ours).abs().max() < 5e-5


def test_a_gap_that_does_not_change_makes_refresh_exact():
    def predict(x, t, w=1.): return x+w*2
    predict.apart = lambda x, t: (x, x+2)
    asked = refreshed(predict, 4)
    for k in range(9):
        x, w = torch.tensor([float(k)]), k/9
        assert asked(x, 0, w).item() == pytest.approx(predict(x, 0, w).item())


@pytest.mark.parametrize("m", [0, -1, 1.5, "2", None])
def test_a_bad_refresh_is_refused(model, m):
    with pytest.raises(ValueError, match="refresh must be a whole number, at least 1"):
        sample(model, "a rose", weight="linear", steps=2, refresh=m)
    with pytest.raises(ValueError, match="refresh must be a whole number, at least 1"), annealed(model.pipe, "linear", refresh=m):
        pass


# ------------------------------------------------------------------------------------------------ by noise

def levels(scheduler, steps):
    scheduler.set_timesteps(steps)
    return [noise_level(scheduler, i) for i in range(len(scheduler.timesteps))]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_by_noise_a_weight_does_not_depend_on_the_number_of_steps(kind):
    scheduler = kind(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, timestep_spacing="trailing")
    points = {}
    for T in (10, 20):
        got = levels(scheduler, T)
        for (a, s), w in zip(got, weights_at("sigma_power_2", T, got.__getitem__)):
            assert w == pytest.approx((a/(a+s))**2)
            points.setdefault(round(s, 3), []).append(w)
    shared = [o for o in points.values() if len(o) == 2]
    assert len(shared) >= 9 and all(a == pytest.approx(b, abs=2e-3) for a, b in shared)


def test_by_noise_in_both_doors(model):
    ours = sample(model, PROMPTS, weight="sigma_linear", steps=6, guidance_scale=3., seed=0).images
    with annealed(model.pipe, "sigma_linear"):
        assert (stock(model)-ours).abs().max() < 5e-5
    by_hand = [a/(a+s) for a, s in levels(DDIMScheduler.from_config(model.scheduler.config), 6)]
    assert (sample(model, PROMPTS, weight=by_hand, steps=6, guidance_scale=3., seed=0).images-ours).abs().max() < 1e-5


@pytest.mark.parametrize("bad, says", [("sigma_", "unknown weight"), ("sigma_cubic", "unknown weight"), ("sigma_power_-1", "positive"), ([.1, .2], "got a table")])
def test_bad_weights_by_noise(bad, says):
    with pytest.raises(ValueError, match=says):
        by_noise(bad) if isinstance(bad, list) else parse_weight(bad)


def test_by_noise_twice_is_once():
    assert by_noise("sigma_linear").__name__ == "sigma_linear"


# ------------------------------------------------------------------------------------------------ recommended

def test_the_recommended_weight_travels_with_the_file(model, tmp_path):
    file = model.save(tmp_path, weight="power_2")
    with safe_open(file, "pt") as f:
        assert f.metadata()["draft_nb.weight"] == "power_2" and "lora_adapter_metadata" in f.metadata()
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)  # stock diffusers, as someone does who downloaded the file
    options = dict(latents=model.latents(2, generator=generator()), num_inference_steps=4, guidance_scale=3., output_type="pt")
    with annealed(pipe, "power_2"):
        named = pipe(PROMPTS, **options).images
    with annealed(pipe, "recommended"):
        assert torch.equal(pipe(PROMPTS, **options).images, named)
    again = load("tiny", adapter=tmp_path)
    assert again.recommended == "power_2"
    assert sample(again, "a rose", weight="recommended", steps=2).weight == "power_2"
    again.save(tmp_path/"again")
    assert load("tiny", adapter=tmp_path/"again").recommended == "power_2"


def test_without_a_recommendation_the_error_says_so(tmp_path):
    model = tuned()
    with pytest.raises(ValueError, match="brings none"):
        sample(model, "a rose", weight="recommended", steps=2)
    with pytest.raises(ValueError, match="brings none"), annealed(model.pipe, "recommended"):
        pass
    with pytest.raises(ValueError, match="unknown weight"):
        model.save(tmp_path, weight="cubic")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ a base that differs

def test_a_base_with_another_scheduler_is_refused(model):
    other = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
    with pytest.raises(ValueError, match="base must have the scheduler of the pipe.*EulerDiscrete"), annealed(model.pipe, "linear", base=other):
        pass
    other.scheduler = DDIMScheduler.from_config(model.scheduler.config, beta_end=model.scheduler.config.beta_end/2)
    with pytest.raises(ValueError, match="beta_end"), annealed(model.pipe, "linear", base=other):
        pass
    with annealed(model.pipe, "linear", base=other.unet):
        got = stock(model)
    with annealed(model.pipe, "linear"):
        assert (stock(model)-got).abs().max() < 5e-5


def test_states_know_their_weight_by_noise(model):
    predict = model.denoiser(model.encode(PROMPTS), 1.)
    with torch.no_grad():
        states = list(denoise(predict, model.latents(2, generator=generator()), model.scheduler, steps=3, weight="sigma_linear"))
    assert [s.w for s in states] == pytest.approx([a/(a+b) for a, b in levels(DDIMScheduler.from_config(model.scheduler.config), 3)])


def test_threads_that_share_a_model_do_not_see_each_others_switch(model):
    from concurrent.futures import ThreadPoolExecutor
    def draw(k): return sample(model, PROMPTS[:1+k % 2], weight=SIX[k % 6], steps=4, seed=k).images
    alone = [draw(k) for k in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(draw, range(6)))
    assert_close(together, alone, atol=1e-5, rtol=0)  # other threads
