"Every family against its stock pipeline: tiny networks of the real classes with random weights."
import contextlib
import json
import re
from functools import cache

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.testing import assert_close
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from draft_nb.adapters import lora_layers
from draft_nb.models import FAMILIES, asset, load, without_history
from draft_nb.pipelines import annealed
from draft_nb.sampler import denoise, noise_level, sample
from draft_nb.train import draft_loss

pytestmark = pytest.mark.numeric

PROMPTS = ["a fox", "a red apple on a blue background"]
T = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# tiny pipelines

@cache
def clip_tokenizer():
    return CLIPTokenizer.from_pretrained(asset("tiny/tokenizer"))


def clip(cls=CLIPTextModel, width=16, layers=2, act="quick_gelu"):
    return cls(CLIPTextConfig(vocab_size=3072, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2, hidden_act=act,
                              max_position_embeddings=32, projection_dim=16, bos_token_id=3070, eos_token_id=3071, pad_token_id=3071))


@cache
def t5_tokenizer():
    letters = [(c, -3.) for c in "abcdefghijklmnopqrstuvwxyz,."]
    return T5Tokenizer(vocab=[("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("▁", -2.), *letters], extra_ids=0)


def t5():
    return T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"))


@cache
def gemma_tokenizer():
    instruction = " ".join(SanaPipeline.__call__.__wrapped__.__kwdefaults__ or SanaPipeline.__call__.__wrapped__.__defaults__[-1])
    bpe = Tokenizer(BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator([instruction], BpeTrainer(vocab_size=600, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return GemmaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])


def gemma():
    return Gemma2Model(Gemma2Config(vocab_size=600, hidden_size=16, head_dim=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    num_key_value_heads=2, max_position_embeddings=2048, attn_implementation="eager"))


def vae(channels=4, **options):
    return AutoencoderKL(block_out_channels=(8, 16), latent_channels=channels, norm_num_groups=4, sample_size=16, **options,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def unet(width=16, **options):
    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=width, attention_head_dim=2,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options)


BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", steps_offset=1)
DDIM = dict(**BETAS, clip_sample=False, set_alpha_to_one=False)


def sd(**options):
    return StableDiffusionPipeline(vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet(use_linear_projection=bool(options)),
                                   scheduler=DDIMScheduler(**DDIM, **options), safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sdxl(**options):
    return StableDiffusionXLPipeline(vae=vae(scaling_factor=.13025), text_encoder=clip(), text_encoder_2=clip(CLIPTextModelWithProjection, width=24),
                                     tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), scheduler=EulerDiscreteScheduler(**BETAS), add_watermarker=False, **options,
                                     unet=unet(40, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
                                               transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=6 * 8 + 16))


def pixart():
    net = PixArtTransformer2DModel(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
                                   in_channels=4, out_channels=8, cross_attention_dim=24)
    return PixArtSigmaPipeline(tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae(scaling_factor=.13025), transformer=net, scheduler=DDIMScheduler(clip_sample=False))


def sd3(dynamic=False, **options):
    net = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                                caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=16, **options)
    encoders = dict(text_encoder=clip(CLIPTextModelWithProjection), text_encoder_2=clip(CLIPTextModelWithProjection), text_encoder_3=t5())
    tokenizers = dict(tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5_tokenizer())
    return StableDiffusion3Pipeline(transformer=net, vae=vae(scaling_factor=1.5305, shift_factor=.0609), **encoders, **tokenizers,
                                    scheduler=FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=dynamic, base_image_seq_len=4, max_image_seq_len=64))


def flux(guided=True):
    net = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                 joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guided)
    pipe = FluxPipeline(transformer=net, vae=vae(scaling_factor=1.5305, shift_factor=.0609), text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(),
                        tokenizer_2=t5_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, base_image_seq_len=4, max_image_seq_len=64))
    pipe.default_sample_size = 8
    return pipe


def sana():
    net = SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2,
                                 cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16, sample_size=16)
    both = dict(block_out_channels=(8, 8), layers_per_block=(1, 1), qkv_multiscales=((), (5,)), block_types=("ResBlock", "EfficientViTBlock"))
    dc = AutoencoderDC(latent_channels=4, attention_head_dim=2, **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in both.items()},
                       downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=.41407)
    return SanaPipeline(tokenizer=gemma_tokenizer(), text_encoder=gemma(), vae=dc, transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.))


BUILD = {
    "sd1": sd,
    "sd2": lambda: sd(prediction_type="v_prediction"),
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "sd3.5": lambda: sd3(dynamic=True, qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux-dev": flux,
    "flux-schnell": lambda: flux(guided=False),
    "sana": sana,
}
SCALE = 3.  # of guidance


def build(kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe = BUILD[kind]()
    for part in (p for p in pipe.components.values() if isinstance(p, torch.nn.Module)):
        part.eval()
    pipe.vae.decoder.conv_out.weight.data.mul_(.3)  # pictures well inside [0,1], where no clamp is at work
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shake(model):
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=.2, generator=generator(k))
    return model


@cache
def tuned(kind):
    return shake(load(build(kind), rank=2))


each = pytest.mark.parametrize("kind", list(BUILD))
each_family = pytest.mark.parametrize("kind", ["sd1", "sdxl", "pixart", "sd3.5", "flux-dev", "sana"])


def stock(pipe, x, run=None, cut=None, **options):
    "The pipeline's own pictures; `cut` is the step after which the gradient is cut."
    run = run or type(pipe).__call__
    if isinstance(pipe, FluxPipeline):
        x = pipe._pack_latents(x, *x.shape)
    if isinstance(pipe, (PixArtSigmaPipeline, SanaPipeline)):
        options |= dict(use_resolution_binning=False, clean_caption=False)
    if isinstance(pipe, SanaPipeline):
        options = dict(height=32, width=32) | options
    if isinstance(pipe, PixArtSigmaPipeline):
        def on_step(i, t, latents):
            if i == cut:
                latents.detach_()
        options |= dict(callback=on_step, callback_steps=1)
    else:
        def on_step(pipe, i, t, kwargs):
            return {"latents": kwargs["latents"].detach()} if i == cut else kwargs
        options |= dict(callback_on_step_end=on_step)
    return run(pipe, PROMPTS, latents=x.clone(), num_inference_steps=T, guidance_scale=SCALE, output_type="pt", **options).images


def noise(model):
    return model.latents(2, generator=generator())


def reward(images, prompts=None):
    return torch.randn(images[0].shape, generator=generator(9)).mul(images).mean((1, 2, 3)) * 10


# the same pictures

@each
@pytest.mark.parametrize("guidance_scale", [SCALE, 1.])
def test_the_stock_pipeline_draws_the_same_picture(kind, guidance_scale, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SCALE", guidance_scale)
    model = tuned(kind)
    ours = sample(model, PROMPTS, steps=T, guidance_scale=guidance_scale).images
    theirs = stock(model.pipe, noise(model))
    assert ours.shape == theirs.shape and ours.std() > .003
    assert (ours - theirs).abs().max() < 1e-5


@each_family
def test_at_another_size(kind):
    model, size = tuned(kind), dict(height=64, width=32) if kind == "sana" else dict(height=24, width=8)
    ours = sample(model, PROMPTS, steps=T, guidance_scale=SCALE, **size).images
    x = model.latents(2, generator=generator(), **size)
    theirs = stock(model.pipe, x, **size)
    assert ours.shape[-2:] == tuple(size.values()) and (ours - theirs).abs().max() < 1e-5
    with pytest.raises(ValueError, match="height must be a multiple of"):
        model.latents(1, generator=generator(), height=25)


@each
def test_guidance_changes_the_picture(kind):
    model = tuned(kind)
    one, three = (sample(model, PROMPTS, steps=T, guidance_scale=s).images for s in (1., 3.))
    if kind == "flux-schnell":  # which has none
        assert torch.equal(one, three)
    else:
        assert not torch.allclose(one, three, atol=1e-4)


def test_families_are_sampled_as_they_were_trained():
    usual = {k: (tuned(k).steps, tuned(k).guidance_scale) for k in BUILD}
    assert usual["sd1"] == (50, 7.5) and usual["sdxl"] == (40, 5.)
    assert usual["sd3"] == (28, 7.) and usual["flux-dev"] == (28, 3.5) and usual["pixart"] == usual["sana"] == (20, 4.5)
    assert {type(tuned(k)) for k in BUILD} == set(FAMILIES.values())


# the same gradient

@each
@pytest.mark.parametrize("K", [1, 2])
def test_the_gradient_is_autograd_through_the_stock_pipeline(kind, K):
    model = tuned(kind)
    x = noise(model)
    predict = model.denoiser(model.encode(PROMPTS), SCALE)
    for s in denoise(predict, x, model.scheduler, steps=T, grad_steps=K, **model.timesteps_kwargs(x, T)):
        pass
    images = model.decode(s.prev)
    assert 0 < images.min() and images.max() < 1  # no clamp is at work
    ours = torch.autograd.grad(reward(images).mean(), model.parameters(), allow_unused=True)
    theirs = torch.autograd.grad(reward(stock(model.pipe, x, type(model.pipe).__call__.__wrapped__, cut=T - K - 1)).mean(), model.parameters(), allow_unused=True)
    assert [g is None for g in ours] == [g is None for g in theirs]
    ours, theirs = (torch.cat([g.flatten() for g in o if g is not None]) for o in (ours, theirs))
    assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-3 * theirs.norm()


# base, tuned and between

@each_family
def test_weights_0_and_1_are_base_and_tuned(kind):
    bare = load(build(kind), adapter=None)
    def run(m, w):
        return sample(m, PROMPTS, weight=w, steps=T, guidance_scale=SCALE).images
    before = run(bare, "draft")
    model = shake(load(bare.pipe, rank=2))  # the same tensors, with a LoRA
    base, best = run(model, "base"), run(model, "draft")
    assert torch.equal(base, before)
    assert_close(run(tuned(kind), "base"), base, atol=1e-5, rtol=0)  # another copy
    assert not torch.allclose(base, best, atol=1e-4)
    assert torch.allclose(run(model, lambda i, n: torch.tensor([0., 1.])), torch.stack([base[0], best[1]]), atol=1e-5)


@each_family
def test_both_doors_anneal_to_the_same_picture(kind):
    model = tuned(kind)
    ours = sample(model, PROMPTS, weight="linear", steps=T, guidance_scale=SCALE).images
    with annealed(model.pipe, "linear"):
        theirs = stock(model.pipe, noise(model))
    assert (ours - theirs).abs().max() < 1e-5


# LoRA

def suffixes(model):
    return {t for t in model.lora_targets for n, _ in model.network.named_modules() if n.endswith(f".{t}")}


@each_family
def test_every_attention_and_feed_forward_layer_is_adapted(kind):
    model = tuned(kind)
    found, missing = suffixes(model), set(model.lora_targets) - suffixes(model)
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= found
    assert missing <= ({"ff.net.0.proj", "ff.net.2"} if kind == "sana" else set())
    blocks = [(n, m) for n, m in build(kind).components[model.component].named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    bare = [n for n, _ in blocks if "block" in n and not n.endswith(tuple(model.lora_targets))]
    norms = ("norm", "adaln", "time_emb", "resnets", "samplers", "proj_in", "proj_out", "conv_depth")
    assert [n for n in bare if not any(o in n for o in norms)] == []


@each_family
def test_the_saved_lora_draws_the_same_picture_in_stock_diffusers(kind, tmp_path):
    model, other = tuned(kind), build(kind)
    file = model.save(tmp_path)
    assert file == tmp_path / "pytorch_lora_weights.safetensors" and file.is_file()
    x, expected = noise(model), sample(model, PROMPTS, steps=T, guidance_scale=SCALE).images
    if kind == "pixart":
        from peft import PeftModel
        other.transformer = PeftModel.from_pretrained(other.transformer, tmp_path)
    else:
        other.load_lora_weights(tmp_path)
    assert (expected - stock(other, x)).abs().max() < 1e-5
    again = load(build(kind), adapter=tmp_path)
    assert_close(sample(again, PROMPTS, steps=T, guidance_scale=SCALE).images, expected, atol=1e-5, rtol=0)  # read from disk
    assert len(again.parameters()) == len(model.parameters()) and len(lora_layers(again.network)) == len(lora_layers(model.network))


def said(file, component):
    "The metadata of a LoRA file."
    with safe_open(file, "pt") as f:
        whole = json.loads(f.metadata()["lora_adapter_metadata"])
    assert all(k.startswith(f"{component}.") for k in whole)
    return {k.removeprefix(f"{component}."): v for k, v in whole.items()}


@each_family
@pytest.mark.parametrize("options, more", [({}, {}), (dict(alpha=3.), {}), (dict(rslora=True), dict(use_rslora=True)), (dict(dora=True), dict(use_dora=True))])
def test_a_file_says_only_what_differs_from_peft_s_defaults(kind, options, more, tmp_path):
    "Fields that are younger than the reader's peft would make the file unreadable; alpha, rsLoRA and DoRA come back."
    if kind == "sana" and options.get("dora"):
        options = options | dict(targets=["to_q"])  # DoRA is for neither of its grouped convolutions
    model = shake(load(build(kind), rank=2, **options))
    file = model.save(tmp_path)
    made = dict(peft_type="LORA", r=2, lora_alpha=options.get("alpha", 2), target_modules=sorted(options.get("targets", model.lora_targets)), **more)
    assert said(file, model.component) == made
    again = load(build(kind), adapter=file)
    ours, theirs = lora_layers(model.network), lora_layers(again.network)
    assert [m.scaling["default"] for m in ours] == [m.scaling["default"] for m in theirs]
    assert [m.use_dora["default"] for m in ours] == [m.use_dora["default"] for m in theirs] == [bool(options.get("dora"))] * len(ours)
    assert said(again.save(tmp_path / "again"), model.component) == made
    if kind == "pixart":
        assert json.loads((tmp_path / "adapter_config.json").read_text()) == made


def test_the_shipped_lora_says_no_more():
    assert set(said(asset("tiny-aligned") / "pytorch_lora_weights.safetensors", "unet")) == {"peft_type", "r", "lora_alpha", "target_modules"}


@pytest.mark.filterwarnings("ignore:While injecting")
def test_a_lora_of_another_network_is_refused(tmp_path):
    tuned("sana").save(tmp_path)
    for kind in ("pixart", "sd3", "sdxl"):
        with pytest.raises(ValueError, match="adapter must"):
            load(build(kind), adapter=tmp_path)


@pytest.mark.parametrize("kind", ["sdxl", "pixart", "sd3", "flux-dev", "sana"])
def test_a_fully_trained_model_is_saved_as_a_pipeline(kind, tmp_path):
    model = load(build(kind), adapter="full")
    base = sample(model, PROMPTS, weight="base", steps=T).images
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=generator(k)), alpha=.02)
    assert torch.equal(sample(model, PROMPTS, weight="base", steps=T).images, base)
    model.save(tmp_path)
    again = load(str(tmp_path), adapter=None)
    assert type(again) is type(model)
    if kind == "flux-dev":
        again.pipe.default_sample_size = 8  # the pipeline's class, not its files, knows the size
    for name, p in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], p)
    assert_close(sample(again, PROMPTS, steps=T).images, sample(model, PROMPTS, steps=T).images, atol=1e-5, rtol=0)  # a copy from disk lies elsewhere in memory: equal to rounding


# training

@each_family
def test_draft_loss_trains_every_family(kind):
    model = shake(load(build(kind), rank=2))
    before = [p.detach().clone() for p in model.parameters()]
    frozen = {n: p.detach().clone() for n, p in model.network.named_parameters() if not p.requires_grad}
    loss, parts = draft_loss(model, reward, PROMPTS, generator=generator(), num_inference_steps=T, guidance_scale=SCALE, grad_steps=2, kl_coeff=.5)
    assert parts["kl"] > 0 and torch.allclose(loss.detach(), .5 * parts["kl"] - parts["reward"].mean(), atol=1e-6)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=.1).step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(torch.equal(p, frozen[n]) for n, p in model.network.named_parameters() if n in frozen)


@pytest.mark.parametrize("kind, factor", [
    ("sd1", lambda alpha, sigma: 1.), ("sd2", lambda alpha, sigma: alpha), ("sdxl", lambda alpha, sigma: 1.), ("pixart", lambda alpha, sigma: 1.),
    *((k, lambda alpha, sigma: 1 - sigma) for k in ("sd3", "sd3.5", "flux-dev", "flux-schnell", "sana"))])
def test_the_kl_is_about_the_noise(kind, factor):
    "What the network predicts is turned into noise: the gap of two flow velocities counts (1-sigma) times, of two v-predictions alpha times."
    model = tuned(kind)
    x, predict = noise(model), model.denoiser(model.encode(PROMPTS), SCALE)
    states = [s for s in denoise(predict, x, model.scheduler, steps=T, grad_steps=2, with_base=True, **model.timesteps_kwargs(x, T)) if s.i >= T - 2]
    for s in states:
        with torch.no_grad():
            gap = predict(s.model_input, s.t, 1.) - predict(s.model_input, s.t, 0.)
        assert torch.allclose(s.epsilon - s.epsilon_base, factor(*noise_level(s.scheduler, s.i)) * gap, atol=1e-5)


# what each family is told

def test_sdxl_is_led_away_from_zeros_where_its_pipeline_is():
    zeros, empty = tuned("sdxl"), load(sdxl(force_zeros_for_empty_prompt=False), adapter=None)
    cond = zeros.encode(PROMPTS)
    assert all(not v[:2].any() and v[2:].any(-1).all() for v in cond.values())
    assert all(v[:2].any() for v in zeros.encode(PROMPTS, "ugly").values())
    assert all(v[2:].any() for v in zeros.encode([""] * 2).values())  # a prompt may be empty, too
    assert all(v[:2].any() for v in empty.encode(PROMPTS).values())
    ours = sample(empty, PROMPTS, steps=T, guidance_scale=SCALE).images
    assert (ours - stock(empty.pipe, noise(empty))).abs().max() < 1e-5


def test_sdxl_with_a_mean_and_a_deviation_for_each_channel():
    pipe = build("sdxl")
    pipe.vae.register_to_config(latents_mean=[-.2, .1, .3, 0.], latents_std=[.8, 1.2, 1., .5])
    model = load(pipe, adapter=None)
    ours = sample(model, PROMPTS, steps=T, guidance_scale=SCALE).images
    assert (ours - stock(pipe, noise(model))).abs().max() < 1e-5


@pytest.mark.parametrize("size", [{}, dict(height=24, width=8)])
def test_sdxl_is_told_the_size(size):
    model, told = tuned("sdxl"), []
    hook = model.network.register_forward_pre_hook(lambda net, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True)
    with contextlib.closing(denoise(model.denoiser(model.encode(PROMPTS)), model.latents(2, generator=generator(), **size), model.scheduler, steps=1)) as states:
        next(states)
    hook.remove()
    h, w = size.values() or (16, 16)
    assert told[0].tolist() == [[h, w, 0, 0, h, w]] * 4


@each_family
def test_a_negative_prompt_as_in_the_stock_pipeline(kind):
    model = tuned(kind)
    x, cond = noise(model), model.encode(PROMPTS, "blurred and dark")
    with torch.no_grad():
        for s in denoise(model.denoiser(cond, SCALE), x, model.scheduler, steps=T, **model.timesteps_kwargs(x, T)):
            pass
    negative = {} if "flux" in kind else dict(negative_prompt="blurred and dark" if kind in ("pixart", "sana") else ["blurred and dark"] * 2)
    assert (model.decode(s.prev) - stock(model.pipe, x, **negative)).abs().max() < 1e-5


@each_family
def test_every_tensor_of_the_condition_has_a_row_for_each_prompt(kind):
    cond = tuned(kind).encode(PROMPTS)
    assert {len(v) for v in tuned(kind).denoiser(cond).cond.values()} == {4}
    alone = tuned(kind).encode(PROMPTS[1:])
    for k, v in cond.items():
        assert_close(alone[k][1], v[3], atol=1e-5, rtol=0)  # another batch


# loading

@pytest.mark.parametrize("scheduler, kind", [
    (DPMSolverMultistepScheduler(**BETAS), "pixart"),
    (UniPCMultistepScheduler(beta_start=.0001, beta_end=.02), "pixart"),
    (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.), "sana")])
def test_a_solver_with_a_history_becomes_its_first_order(scheduler, kind, tmp_path):
    pipe = build(kind)
    pipe.scheduler = scheduler
    pipe.save_pretrained(tmp_path)
    built = load(pipe, rank=2)
    assert built.scheduler is scheduler  # a pipeline that somebody built stays as it is
    options = dict(generator=generator(), num_inference_steps=T, guidance_scale=SCALE, grad_steps=2, kl_coeff=.5)
    with pytest.raises(ValueError, match="single-step"):
        draft_loss(built, reward, PROMPTS, **options)
    model = shake(load(str(tmp_path), rank=2))
    own = model.scheduler
    assert own.config.solver_order == 1 and without_history(own).config == own.config
    scheduler.set_timesteps(20)
    own.set_timesteps(20)
    assert torch.allclose(own.sigmas, scheduler.sigmas, atol=1e-5)
    draft_loss(model, reward, PROMPTS, **options)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    ours = sample(model, PROMPTS, steps=T, guidance_scale=SCALE).images
    assert (ours - stock(model.pipe, noise(model))).abs().max() < 1e-5


def test_the_gradient_through_a_first_order_solver_is_a_difference_quotient():
    own = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3., solver_order=1)
    x, theta = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    def end(p, K=2):
        for s in denoise(lambda x, t, w: p * x, x, own, steps=5, grad_steps=K, weight=1):
            pass
        return s.prev.sum()
    def last_two(p):
        with torch.no_grad():
            for s in denoise(lambda x, t, w: (p if t in own_timesteps[-2:] else theta) * x, x, own, steps=5):
                pass
        return s.prev.sum()
    own.set_timesteps(5)
    own_timesteps, h = own.timesteps, 1e-3
    slope, = torch.autograd.grad(end(theta), theta)
    quotient = (last_two(theta.detach() + h) - last_two(theta.detach() - h)) / (2 * h)
    assert abs(slope - quotient) < 1e-2 * abs(quotient)


def test_half_precision_leaves_the_sdxl_autoencoder_alone():
    model = load(build("sdxl"), dtype=torch.float16, device="cpu")
    assert model.pipe.vae.dtype == torch.float32 and model.pipe.text_encoder.dtype == torch.float16
    assert model.dtype == torch.float16 and model.latents(1, generator=generator()).dtype == torch.float16


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "sana"])
def test_bfloat16_comes_close(kind):
    model = load(build(kind), dtype=torch.bfloat16, device="cpu")
    exact, rough = (sample(m, PROMPTS, steps=T, guidance_scale=SCALE) for m in (load(build(kind)), model))
    assert model.dtype == torch.bfloat16 and (exact.images - rough.images).abs().mean() < .02


# one file in the layout of its authors

def renamed(state, *rules):
    def rename(key):
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        return key
    return {rename(k): v.contiguous() for k, v in state.items()}


def unet_as_published(net):
    per = net.config.layers_per_block + 1
    def place(offset, last=None):
        return lambda m: f"{offset + int(m[1]) * per + int(m[2] if last is None else last)}"
    resnet = [(rf"\b{a}\b", b) for a, b in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
                                           ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"))]
    blocks = {k for k in net.state_dict() if "attentions" not in k and "transformer" not in k}
    inner = renamed({k: v for k, v in net.state_dict().items() if k in blocks and "resnets" in k}, *resnet) | {k: v for k, v in net.state_dict().items() if "resnets" not in k}
    crossed = [i for i, kind in enumerate(net.config.up_block_types) if kind.startswith("CrossAttn")]
    def block(side, part, slot):
        first = 1 if side == "down" else 0
        name = "input_blocks" if side == "down" else "output_blocks"
        return rf"^{side}_blocks\.(\d+)\.{part}\.(\d+)\.", lambda m: f"{name}.{place(first)(m)}.{slot}."
    return renamed(
        inner, block("down", "resnets", 0), block("down", "attentions", 1), block("up", "resnets", 0), block("up", "attentions", 1),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.", lambda m: f"input_blocks.{place(1, per - 1)(m)}.0.op."),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.", lambda m: f"output_blocks.{place(0, per - 1)(m)}.{2 if int(m[1]) in crossed else 1}.conv."),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"), (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"), (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
        (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"), (r"^", "model.diffusion_model."))


def vae_as_published(net):
    last = len(net.config.up_block_types) - 1
    state = {k: v[..., None, None] if re.search(r"attentions.*(to_.*|proj.*)\.weight", k) else v for k, v in net.state_dict().items()}
    return renamed(
        state, (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block"), (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"mid_block\.attentions\.0", "mid.attn_1"), ("group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."), (r"to_out\.0", "proj_out"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), (r"^", "first_stage_model."))


def clip_as_published(net, prefix):
    return renamed(net.state_dict(), (r"^(text_model\.)?", f"{prefix}transformer.text_model."))


def open_clip_as_published(net, prefix):
    state = renamed(net.state_dict(), (r"^text_model\.", ""))
    for i in range(net.config.num_hidden_layers):
        at = f"encoder.layers.{i}.self_attn."
        for kind in ("weight", "bias"):
            state[f"{at}in_proj_{kind}"] = torch.cat([state.pop(f"{at}{o}_proj.{kind}") for o in "qkv"])
    state["text_projection"] = state.pop("text_projection.weight").T
    return renamed(state, (r"^encoder\.layers", "transformer.resblocks"), ("self_attn", "attn"), (r"layer_norm(\d)", r"ln_\1"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
                   (r"^embeddings\.token_embedding", "token_embedding"), (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
                   ("final_layer_norm", "ln_final"), (r"^", prefix))


def as_published(pipe):
    state = unet_as_published(pipe.unet) | vae_as_published(pipe.vae)
    if isinstance(pipe, StableDiffusionXLPipeline):
        return state | clip_as_published(pipe.text_encoder, "conditioner.embedders.0.") | open_clip_as_published(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return state | clip_as_published(pipe.text_encoder, "cond_stage_model.")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_checkpoint_in_one_file(kind, tmp_path):
    pipe, file = build(kind), tmp_path / "model.safetensors"
    save_file(as_published(pipe), file)
    pipe.save_pretrained(tmp_path / "settings")
    for weights in (tmp_path / "settings").rglob("*.safetensors"):
        weights.unlink()  # settings and tokenizers are all that is read
    model = load(str(file), adapter=None, config=tmp_path / "settings")
    assert type(model.pipe) is type(pipe)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name in pipe.components:
            ours, theirs = getattr(model.pipe, name).state_dict(), getattr(pipe, name).state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert_close(sample(model, PROMPTS, steps=T).images, sample(load(pipe, adapter=None), PROMPTS, steps=T).images, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="config must be a diffusers folder, or a hub id that can be reached"):
        load(str(file))  # the hub is out of reach here
    with pytest.raises(ValueError, match="config must be"):
        load(str(file), config=tmp_path)


def test_files_that_are_no_checkpoint(tmp_path):
    settings = tmp_path / "settings"
    build("sd1").save_pretrained(settings)
    for name, write in (("cut", lambda f: f.write_bytes(b"x")), ("partial", lambda f: save_file(unet_as_published(build("sd1").unet), f))):
        write(tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=f"model must be a.*{name}.safetensors"):
            load(str(tmp_path / f"{name}.safetensors"), config=settings)
