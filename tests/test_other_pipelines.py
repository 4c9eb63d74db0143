"`annealed` around pipelines with two denoisers, two calls a step, lists, other names, own ways of counting; and around those that it refuses."
import copy
import inspect
import warnings

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    MotionAdapter,
    PNDMScheduler,
    PRXPipeline,
    PRXTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from draft_nb.adapters import add_lora, base_of, lora_layers, trainable
from draft_nb.pipelines import annealed, denoisers_of

T = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def vae(channels=4):
    return AutoencoderKL(block_out_channels=(8,), latent_channels=channels, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


# Each of these returns a pipeline, what it is called with, and the number of calls of a denoiser in a step.

def wan_network():
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32,
                                 num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32)


def wan(experts=2):
    pipe = WanPipeline(tokenizer=None, text_encoder=None, scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.),
                       vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]),
                       transformer=wan_network(), transformer_2=wan_network() if experts == 2 else None, boundary_ratio=.875 if experts == 2 else None)
    return pipe, dict(prompt_embeds=noise(1, 16, 32), negative_prompt_embeds=noise(1, 16, 32, seed=1), height=16, width=16, num_frames=5, guidance_scale=3.), 2


def chroma():
    net = ChromaTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                                   axes_dims_rope=[4, 4, 8], approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    pipe = ChromaPipeline(scheduler=flow(), vae=vae(1), text_encoder=None, tokenizer=None, transformer=net)
    mask = torch.ones(1, 8)
    return pipe, dict(prompt_embeds=noise(1, 8, 32), prompt_attention_mask=mask, negative_prompt_embeds=noise(1, 8, 32, seed=1), negative_prompt_attention_mask=mask,
                      height=16, width=16, guidance_scale=3.), 2


def qwen():
    net = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
                                      guidance_embeds=False, axes_dims_rope=(8, 4, 4))
    pipe = QwenImagePipeline(scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=net)
    mask = torch.ones(1, 7, dtype=torch.long)
    return pipe, dict(prompt_embeds=noise(1, 7, 16), prompt_embeds_mask=mask, negative_prompt_embeds=noise(1, 7, 16, seed=1), negative_prompt_embeds_mask=mask,
                      height=32, width=32, true_cfg_scale=3.), 2


def krea():
    net = Krea2Transformer2DModel(in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8,
                                  text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
                                  num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.)
    pipe = Krea2Pipeline(scheduler=flow(use_dynamic_shifting=True), vae=None, text_encoder=None, tokenizer=None, transformer=net, text_encoder_select_layers=(0, 1, 2))
    mask = torch.ones(1, 6, dtype=torch.bool)
    return pipe, dict(prompt_embeds=noise(1, 6, 3, 16), prompt_embeds_mask=mask, negative_prompt_embeds=noise(1, 6, 3, 16, seed=1), negative_prompt_embeds_mask=mask,
                      height=32, width=32, guidance_scale=3.), 2


def z_image():
    net = ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5,
                                   qk_norm=True, cap_feat_dim=16, rope_theta=256., t_scale=1000., axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    for p in (net.x_pad_token, net.cap_pad_token):
        torch.nn.init.ones_(p)
    pipe = ZImagePipeline(scheduler=flow(), vae=vae(), text_encoder=None, tokenizer=None, transformer=net)
    return pipe, dict(prompt_embeds=[noise(7, 16), noise(5, 16, seed=2)], negative_prompt_embeds=[noise(7, 16, seed=1), noise(7, 16, seed=3)], height=16, width=16, guidance_scale=3.), 1


def hidream():
    net = HiDreamImageTransformer2DModel(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
                                         caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
                                         max_resolution=(32, 32), llama_layers=(0, 1))
    none = {f"{k}{n}": None for k in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")}
    pipe = HiDreamImagePipeline(scheduler=flow(), vae=vae(), transformer=net, **none)
    given = {f"{sign}{k}": noise(*shape, seed=len(sign)) for sign in ("", "negative_")
             for k, shape in dict(prompt_embeds_t5=(1, 6, 32), prompt_embeds_llama3=(2, 1, 6, 16), pooled_prompt_embeds=(1, 64)).items()}
    return pipe, dict(**given, height=16, width=16, guidance_scale=3.), 1


def prx():
    net = PRXTransformer2DModel(patch_size=1, in_channels=4, context_in_dim=8, hidden_size=8, mlp_ratio=2., num_heads=2, depth=1, axes_dim=[2, 2])
    pipe = PRXPipeline(transformer=net, scheduler=flow(), text_encoder=None, tokenizer=None, vae=vae())
    mask = torch.ones(1, 6, dtype=torch.bool)
    return pipe, dict(prompt=None, prompt_embeds=noise(1, 6, 8), negative_prompt_embeds=noise(1, 6, 8, seed=1), prompt_attention_mask=mask, negative_prompt_attention_mask=mask,
                      height=16, width=16, guidance_scale=3., use_resolution_binning=False), 1


def small_unet():
    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def animatediff():
    motion = MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2)
    pipe = AnimateDiffPipeline(vae=vae(), text_encoder=None, tokenizer=None, unet=small_unet(), motion_adapter=motion, scheduler=DDIMScheduler(clip_sample=False))
    return pipe, dict(prompt_embeds=noise(1, 6, 16), negative_prompt_embeds=noise(1, 6, 16, seed=1), height=8, width=8, num_frames=3, guidance_scale=3.), 1


def pag():
    pipe = StableDiffusionPAGPipeline(vae=vae(), text_encoder=None, tokenizer=None, unet=small_unet(), scheduler=DDIMScheduler(clip_sample=False), safety_checker=None,
                                      feature_extractor=None, requires_safety_checker=False, pag_applied_layers=["mid", "up", "down"])
    return pipe, dict(prompt_embeds=noise(1, 6, 16), negative_prompt_embeds=noise(1, 6, 16, seed=1), height=8, width=8, guidance_scale=3., pag_scale=2.), 1


def cogvideo():
    net = CogVideoXTransformer3DModel(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32, num_layers=1, sample_width=2,
                                      sample_height=2, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=16)
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=net, scheduler=CogVideoXDPMScheduler())
    return pipe, dict(prompt_embeds=noise(1, 16, 32), negative_prompt_embeds=noise(1, 16, 32, seed=1), height=16, width=16, num_frames=9, guidance_scale=3., eta=0.), 1


ALL = dict(wan_2_2=wan, wan=lambda: wan(1), chroma=chroma, qwen=qwen, krea_2=krea, z_image=z_image, hidream=hidream, prx=prx, animatediff=animatediff, pag=pag, cogvideo=cogvideo)
each = pytest.mark.parametrize("kind", ALL)


def tuned(kind):
    "A tiny pipeline whose denoisers carry a LoRA that shows."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, given, calls = ALL[kind]()
    pipe.set_progress_bar_config(disable=True)
    for network in denoisers_of(pipe).values():
        network.eval()
        add_lora(network, 4, targets=["to_q", "to_k", "to_v", "to_out.0", "q_proj", "img_qkv_proj"])
        for k, p in enumerate(trainable(network)):
            torch.nn.init.normal_(p, std=.3, generator=generator(k))
    def run(steps=T, **more):
        return pipe(**given | more, num_inference_steps=steps, generator=generator(5), output_type="latent", return_dict=False)[0]
    return pipe, run, calls


def switched_off(pipe, run):
    "What the base draws."
    flags = [(layer, layer._disable_adapters) for network in denoisers_of(pipe).values() for layer in lora_layers(network)]
    for layer, _ in flags:
        layer._disable_adapters = True
    try:
        return run()
    finally:
        for layer, flag in flags:
            layer._disable_adapters = flag


def mixture(base, best, w):
    if isinstance(base, torch.Tensor):
        return (1 - w) * base + w * best
    if isinstance(base, dict):
        return type(base)(**{k: mixture(v, best[k], w) for k, v in base.items()})
    return type(base)(mixture(b, d, w) for b, d in zip(base, best, strict=True))


def by_hand(pipe, run, weights):
    "The blend made by replacing each denoiser's forward; one weight a call, whichever network is asked."
    calls, networks = iter(weights), list(denoisers_of(pipe).values())
    def replaced(network):
        forward = network.forward
        def both(*args, **kwargs):
            w = next(calls)
            with base_of(network):
                base = forward(*args, **kwargs)
            return mixture(base, forward(*args, **kwargs), w)
        both.__signature__ = inspect.signature(forward)
        return both
    kept = [vars(network).get("forward") for network in networks]
    for network in networks:
        network.forward = replaced(network)
    try:
        out = run()
    finally:
        for network, forward in zip(networks, kept, strict=True):
            del network.forward
            if forward is not None:
                network.forward = forward
    assert next(calls, None) is None
    return out


def state(pipe):
    "What must be the same afterwards."
    return [set(vars(pipe.scheduler)) & {"step", "set_timesteps"}, *[(vars(n).get("forward"), list(getattr(n, "_diffusers_hook", pipe).__dict__.get("hooks", ()))) for n in denoisers_of(pipe).values()]]


quiet = pytest.mark.filterwarnings("ignore:base and tuned take two passes")


@quiet
@each
def test_weights_0_and_1_are_base_and_tuned_and_between_is_the_blend(kind):
    pipe, run, calls = tuned(kind)
    best, base = run(), switched_off(pipe, run)
    assert (best - base).abs().max() > 1e-3
    for weight, expected in (("draft", best), ("base", base)):
        with annealed(pipe, weight):
            assert torch.equal(run(), expected)
    expected = by_hand(pipe, run, [i / T for i in range(T) for _ in range(calls)])
    with annealed(pipe, "linear"):
        ours = run()
    assert (ours - expected).abs().max() < 2e-5 and min((ours - o).abs().max() for o in (best, base)) > 1e-4
    assert torch.equal(run(), best)
