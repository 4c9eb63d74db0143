"`annealed` around pipelines with two denoisers, two calls a step, lists or other names, and around those that it refuses."

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
    return AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=channels,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


# Each of these returns a pipeline, what it is called with, and the number of calls of a denoiser in a step.


def wan_network():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def wan(experts=2):
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]),
        transformer=wan_network(),
        transformer_2=wan_network() if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
    )
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 16, 32),
            negative_prompt_embeds=noise(1, 16, 32, seed=1),
            height=16,
            width=16,
            num_frames=5,
            guidance_scale=3.0,
        ),
        2,
    )


def chroma():
    net = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = ChromaPipeline(scheduler=flow(), vae=vae(1), text_encoder=None, tokenizer=None, transformer=net)
    mask = torch.ones(1, 8)
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 8, 32),
            prompt_attention_mask=mask,
            negative_prompt_embeds=noise(1, 8, 32, seed=1),
            negative_prompt_attention_mask=mask,
            height=16,
            width=16,
            guidance_scale=3.0,
        ),
        2,
    )


def qwen():
    net = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = QwenImagePipeline(scheduler=flow(), vae=None, text_encoder=None, tokenizer=None, transformer=net)
    mask = torch.ones(1, 7, dtype=torch.long)
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 7, 16),
            prompt_embeds_mask=mask,
            negative_prompt_embeds=noise(1, 7, 16, seed=1),
            negative_prompt_embeds_mask=mask,
            height=32,
            width=32,
            true_cfg_scale=3.0,
        ),
        2,
    )


def krea():
    net = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    pipe = Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=net,
        text_encoder_select_layers=(0, 1, 2),
    )
    mask = torch.ones(1, 6, dtype=torch.bool)
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 6, 3, 16),
            prompt_embeds_mask=mask,
            negative_prompt_embeds=noise(1, 6, 3, 16, seed=1),
            negative_prompt_embeds_mask=mask,
            height=32,
            width=32,
            guidance_scale=3.0,
        ),
        2,
    )


def z_image():
    net = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for p in (net.x_pad_token, net.cap_pad_token):
        torch.nn.init.ones_(p)
    pipe = ZImagePipeline(scheduler=flow(), vae=vae(), text_encoder=None, tokenizer=None, transformer=net)
    return (
        pipe,
        dict(
            prompt_embeds=[noise(7, 16), noise(5, 16, seed=2)],
            negative_prompt_embeds=[noise(7, 16, seed=1), noise(7, 16, seed=3)],
            height=16,
            width=16,
            guidance_scale=3.0,
        ),
        1,
    )


def hidream():
    net = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    none = {f"{k}{n}": None for k in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")}
    pipe = HiDreamImagePipeline(scheduler=flow(), vae=vae(), transformer=net, **none)
    pipe.default_sample_size = 8
    given = {
        f"{sign}{k}": noise(*shape, seed=len(sign))
        for sign in ("", "negative_")
        for k, shape in dict(prompt_embeds_t5=(1, 6, 32), prompt_embeds_llama3=(2, 1, 6, 16), pooled_prompt_embeds=(1, 64)).items()
    }
    return pipe, dict(**given, height=16, width=16, guidance_scale=3.0), 1


def prx():
    net = PRXTransformer2DModel(
        patch_size=1, in_channels=4, context_in_dim=8, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)  # it is made with zeros, which hide a LoRA
    pipe = PRXPipeline(transformer=net, scheduler=flow(), text_encoder=None, tokenizer=None, vae=vae())
    mask = torch.ones(1, 6, dtype=torch.bool)
    return (
        pipe,
        dict(
            prompt=None,
            prompt_embeds=noise(1, 6, 8),
            negative_prompt_embeds=noise(1, 6, 8, seed=1),
            prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask,
            height=16,
            width=16,
            guidance_scale=3.0,
            use_resolution_binning=False,
        ),
        1,
    )


def small_unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def animatediff():
    motion = MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2)
    pipe = AnimateDiffPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=small_unet(), motion_adapter=motion, scheduler=DDIMScheduler(clip_sample=False)
    )
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 6, 16),
            negative_prompt_embeds=noise(1, 6, 16, seed=1),
            height=8,
            width=8,
            num_frames=3,
            guidance_scale=3.0,
        ),
        1,
    )


def pag():
    pipe = StableDiffusionPAGPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=small_unet(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        pag_applied_layers=["mid", "up", "down"],
    )
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 6, 16),
            negative_prompt_embeds=noise(1, 6, 16, seed=1),
            height=8,
            width=8,
            guidance_scale=3.0,
            pag_scale=2.0,
        ),
        1,
    )


def cogvideo():
    net = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=net, scheduler=CogVideoXDPMScheduler())
    return (
        pipe,
        dict(
            prompt_embeds=noise(1, 16, 32),
            negative_prompt_embeds=noise(1, 16, 32, seed=1),
            height=16,
            width=16,
            num_frames=9,
            guidance_scale=3.0,
            eta=0.0,
        ),
        1,
    )


ALL = dict(
    wan_2_2=wan,
    wan=lambda: wan(1),
    chroma=chroma,
    qwen=qwen,
    krea_2=krea,
    z_image=z_image,
    hidream=hidream,
    prx=prx,
    animatediff=animatediff,
    pag=pag,
    cogvideo=cogvideo,
)
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
            torch.nn.init.normal_(p, std=0.3, generator=generator(k))

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
    networks = denoisers_of(pipe).values()
    hooks = [list(n._diffusers_hook.hooks) for n in networks if "_diffusers_hook" in vars(n)]
    return {"step", "set_timesteps"} & set(vars(pipe.scheduler)), [vars(n).get("forward") for n in networks], [h for h in hooks if h]


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


@quiet
@each
def test_as_it_was_after_an_exception_and_when_nested(kind):
    pipe, run, _ = tuned(kind)
    best, before = run(), state(pipe)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop), annealed(pipe, "linear"), annealed(pipe, "base"):
        run(callback_on_step_end=stop)
    assert state(pipe) == before == (set(), [None] * len(denoisers_of(pipe)), [])
    with annealed(pipe, "base"):
        with annealed(pipe, "draft"):
            assert torch.equal(run(), best)
        assert not torch.equal(run(), best)
    assert torch.equal(run(), best)


# two denoisers


def counted(pipe):
    "Number of passes through each denoiser so far."
    calls = {name: 0 for name in denoisers_of(pipe)}
    for name, network in denoisers_of(pipe).items():

        def count(*_, name=name):
            calls[name] += 1

        next(network.children()).register_forward_hook(count)
    return calls


def test_both_experts_are_blended_each_with_its_own_lora():
    pipe, run, _ = tuned("wan_2_2")
    best, base, asked = run(), switched_off(pipe, run), counted(pipe)
    with annealed(pipe, "constant_0.5", fused=False):
        run()
    assert set(asked) == {"transformer", "transformer_2"} and min(asked.values()) > 0 and sum(asked.values()) == 2 * 2 * T
    second = pipe.transformer_2
    pipe.transformer_2 = wan(1)[0].transformer  # the LoRA is on the first expert alone: the second is the same in base and tuned
    pipe.transformer_2.load_state_dict({k.replace(".base_layer", ""): v for k, v in second.state_dict().items() if "lora_" not in k})
    expected = switched_off(pipe, run)
    assert torch.allclose(expected, base, atol=1e-5) and not torch.allclose(run(), best, atol=1e-3)
    with annealed(pipe, "base"):
        assert torch.equal(run(), expected)


def plain_of(pipe, name):
    "The denoiser without its LoRA, as a network of its own."
    bare = wan(1)[0].transformer.eval()
    bare.load_state_dict({k.replace(".base_layer", ""): v for k, v in getattr(pipe, name).state_dict().items() if "lora_" not in k})
    return bare


def test_base_may_be_a_pipeline_with_both_experts_or_a_mapping():
    pipe, run, _ = tuned("wan_2_2")
    base, plain = switched_off(pipe, run), {name: plain_of(pipe, name) for name in denoisers_of(pipe)}
    with annealed(pipe, "linear"):
        expected = run()
    other = WanPipeline(**{**pipe.components, **plain, "scheduler": copy.deepcopy(pipe.scheduler)}, boundary_ratio=0.875)
    for given in (other, plain, {"transformer": plain["transformer"]}):  # the last: the second has a LoRA
        with annealed(pipe, "base", base=given):
            assert torch.allclose(run(), base, atol=1e-5)
        with annealed(pipe, "linear", base=given):
            assert torch.allclose(run(), expected, atol=1e-5)
    for given, message in (
        (plain["transformer"], "pipeline or a mapping with transformer, transformer_2"),
        ({"unet": plain["transformer"]}, "by the names transformer, transformer_2.*got unet"),
        ({}, "got none"),
        ({"transformer": pipe.vae}, "must be a WanTransformer3DModel"),
        (pipe, "another network than the pipe"),
    ):
        with pytest.raises(ValueError, match=message), annealed(pipe, "linear", base=given):
            pass
    other.transformer_2 = None
    with pytest.raises(ValueError, match="must be a WanTransformer3DModel"), annealed(pipe, "linear", base=other):
        pass
    with pytest.raises(ValueError, match="must carry a LoRA, or base be given"), annealed(other, "linear"):
        pass
    with pytest.raises(ValueError, match="must carry a LoRA, or base be given"), annealed(other, "linear", base={"transformer": None}):
        pass


# a gap of its own for each call of a step


class Gaps:
    "An independent blend with remembered gaps: one for each place of a call in its step."

    def __init__(self, calls, m):
        self.calls, self.m, self.k, self.known = calls, m, 0, {}

    def __call__(self, base, best):
        i, place = divmod(self.k, self.calls)
        self.k += 1
        w, (gap, age) = i / T, self.known.get(place, (None, self.m))
        age += 1
        if w == 0:
            self.known[place] = gap, age
            return base
        if gap is None or age >= self.m:
            gap, age = best - base, 0
        self.known[place] = gap, age
        return base + w * gap if w < 0.5 else best - (1 - w) * gap


@quiet
@pytest.mark.parametrize("kind", ["chroma", "qwen", "krea_2", "wan_2_2"])
def test_the_gap_of_a_call_is_its_own(kind):
    pipe, run, calls = tuned(kind)
    networks = list(denoisers_of(pipe).values())
    if kind == "wan_2_2":
        pipe.register_to_config(boundary_ratio=0.0)  # one expert for all steps
    gaps = Gaps(calls, 3)

    def replaced(network, forward):
        def both(*args, **kwargs):
            with base_of(network):
                base = forward(*args, **kwargs)[0]
            return (gaps(base, forward(*args, **kwargs)[0]),)

        return both

    for network in networks:
        network.forward = replaced(network, network.forward)
    expected = run()
    for network in networks:
        del network.forward
    with annealed(pipe, "linear", refresh=3):
        assert (run() - expected).abs().max() < 1e-5
        asked = counted(pipe)
        assert (run() - expected).abs().max() < 1e-5
    with annealed(pipe, "linear"):
        assert (run() - expected).abs().max() > 1e-5
    if kind in ("qwen", "krea_2"):  # two passes: base alone, both, one, one; for the prompt and for the negative one
        with annealed(pipe, "linear", refresh=3, fused=False):
            for name in asked:
                asked[name] = 0
            run()
        assert sum(asked.values()) == 2 * (1 + 2 + 1 + 1)


# a callback that asks the network


@quiet
@pytest.mark.parametrize("kind", ["qwen", "prx", "animatediff", "wan_2_2"])
@pytest.mark.parametrize("refresh", [1, 2])
def test_a_callback_may_ask_the_network_between_and_after_the_steps(kind, refresh):
    pipe, run, calls = tuned(kind)
    network, heard = list(denoisers_of(pipe).values())[-1], []
    last = {}
    network.register_forward_pre_hook(
        lambda _, args, kwargs: last.update(call=(args, kwargs)) if not last.get("own") else None, with_kwargs=True
    )

    def ask(pipe, i, t, kwargs):
        if "call" in last:
            last["own"] = True
            args, given = last["call"]
            heard.append((i, network(*args, **given)))
            last["own"] = False
        return kwargs

    with annealed(pipe, "linear", refresh=refresh):
        alone = run()
        asked = run(callback_on_step_end=ask)
    assert heard[-1][0] == T - 1
    if refresh == 1:
        assert torch.equal(asked, alone)
        args, given = last["call"]
        with torch.no_grad():
            best = network(*args, **given)
            with base_of(network):
                base = network(*args, **given)

        def tensor(o):
            return o[0] if isinstance(o, tuple) else o.sample

        wanted = mixture(tensor(base), tensor(best), (T - 1) / T)
        assert (tensor(heard[-1][1]) - wanted).abs().max() < 1e-5
    else:
        assert (asked - alone).abs().max() < 0.2 * (alone - switched_off(pipe, run)).abs().max()


# one warning, one refusal


@pytest.mark.parametrize("kind, warned", [("animatediff", 1), ("krea_2", 1), ("z_image", 1), ("pag", 1), ("wan_2_2", 0), ("chroma", 0)])
def test_two_passes_are_said_once(kind, warned):
    pipe, run, _ = tuned(kind)
    for fused, expected in ((True, warned), (False, 0)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with annealed(pipe, "linear", fused=fused):
                run()
                run()
        said = [str(o.message) for o in said if "two passes" in str(o.message)]
        assert len(said) == expected and all(type(pipe).__name__ in o and "fused=False" in o for o in said)


def test_rows_that_a_known_network_reshapes_take_two_passes():
    pipe, run, calls = tuned("wan")
    pipe.transformer.condition_embedder.text_embedder.linear_1.register_forward_pre_hook(lambda _, args: (args[0],))
    add = pipe.transformer.blocks[0].attn1.to_q
    forward = pipe.transformer.blocks[0].attn1.forward

    def folded(hidden_states, *args, **kwargs):  # a network that calls a layer with other rows
        add(hidden_states.flatten(0, 1))
        return forward(hidden_states, *args, **kwargs)

    pipe.transformer.blocks[0].attn1.forward = folded
    expected = by_hand(pipe, run, [i / T for i in range(T) for _ in range(calls)])
    with (
        pytest.warns(UserWarning, match="two passes through the WanTransformer3DModel of WanPipeline.*must have 2 rows"),
        annealed(pipe, "linear"),
    ):
        assert (run() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["pyramid", "faster", "first_block", "taylor", "mag"])
def test_a_cache_is_refused_by_name(kind):
    import diffusers

    configs = dict(
        pyramid=lambda pipe: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
        faster=lambda pipe: diffusers.FasterCacheConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
        first_block=lambda pipe: FirstBlockCacheConfig(threshold=0.1),
        taylor=lambda pipe: diffusers.TaylorSeerCacheConfig(),
        mag=lambda pipe: diffusers.MagCacheConfig(num_inference_steps=T, mag_ratios=torch.ones(T)),
    )
    pipe, run, _ = tuned("wan_2_2")
    for name, network in denoisers_of(pipe).items():
        best = run()
        network.enable_cache(configs[kind](pipe))
        with (
            pytest.raises(ValueError, match=rf"pipe\.{name} must have no cache.*CacheConfig|BroadcastConfig.*call disable_cache"),
            annealed(pipe, "linear"),
        ):
            pass
        network.disable_cache()
        with annealed(pipe, "draft"):
            assert torch.equal(run(), best)
            network.enable_cache(configs[kind](pipe))
            with pytest.raises(ValueError, match="must have no cache"):
                run()
            network.disable_cache()
        assert torch.equal(run(), best)


def test_a_fused_lora_is_refused_and_stays_fused():
    pipe, run, _ = tuned("wan_2_2")
    best = run()
    pipe.transformer_2.fuse_lora()
    fused = run()
    with pytest.raises(ValueError, match=r"LoRA .*must not be fused.*; call unfuse_lora"), annealed(pipe, "linear"):
        pass
    assert all(layer.merged for layer in lora_layers(pipe.transformer_2)) and torch.equal(run(), fused)
    with annealed(
        pipe, "draft", base={name: plain_of(tuned("wan_2_2")[0], name) for name in denoisers_of(pipe)}
    ):  # nothing is switched: it may be fused
        assert torch.equal(run(), fused)
    pipe.transformer_2.unfuse_lora()
    with annealed(pipe, "draft"):
        assert torch.allclose(run(), best, atol=1e-5)
        pipe.transformer_2.fuse_lora()
        with pytest.raises(ValueError, match="must not be fused"):
            run()
        pipe.transformer_2.unfuse_lora()


def sd(scheduler, **more):
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=small_unet().eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    add_lora(pipe.unet, 4)
    for k, p in enumerate(trainable(pipe.unet)):
        torch.nn.init.normal_(p, std=0.3, generator=generator(k))
    return pipe


GIVEN = dict(
    prompt_embeds=noise(1, 6, 16),
    negative_prompt_embeds=noise(1, 6, 16, seed=1),
    guidance_scale=3.0,
    output_type="latent",
    return_dict=False,
)


class StepsACopy(StableDiffusionPipeline):
    "Steps a copy of its scheduler; `scaled` hands the network another timestep than the scheduler's."

    @torch.no_grad()
    def __call__(self, steps, scaled, copies):
        self.scheduler.set_timesteps(steps)
        own, x = copy.deepcopy(self.scheduler) if copies else self.scheduler, noise(1, 4, 8, 8)
        for t in self.scheduler.timesteps:
            out = self.unet(x, t + 0.0 if scaled else t, encoder_hidden_states=GIVEN["prompt_embeds"])[0]
            x = own.step(out, t, x)[0] if copies is not None else x - out / steps
        return x


@pytest.mark.parametrize("copies, message", [(True, "StepsACopy steps a copy of it"), (None, "StepsACopy goes on without it")])
def test_a_pipeline_with_steps_of_its_own_is_refused_by_name(copies, message):
    pipe = StepsACopy(**sd(DDIMScheduler(clip_sample=False)).components, requires_safety_checker=False)
    best = pipe(T, True, copies)
    with pytest.raises(ValueError, match=message), annealed(pipe, "linear"):
        pipe(T, True, copies)
    assert torch.equal(pipe(T, True, copies), best)
    expected = by_hand(pipe, lambda: pipe(T, False, copies), [i / T for i in range(T)])
    with annealed(pipe, "linear"):  # the timestep itself tells the step
        assert (pipe(T, False, copies) - expected).abs().max() < 1e-5


def test_pipelines_that_cannot_be_followed_are_refused_before_they_draw():
    net = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    add_lora(net, 4)
    sky = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None, text_encoder=None, transformer=net, vae=None, scheduler=UniPCMultistepScheduler()
    )
    with pytest.raises(ValueError, match="steps of SkyReelsV2DiffusionForcingPipeline: it steps copies"), annealed(sky, "linear"):
        pass
    pipe = sd(DDIMScheduler(clip_sample=False))
    pipe.image_encoder = None
    add_lora(pipe.vae, 4, targets=["to_q"])
    with pytest.raises(ValueError, match="StableDiffusionPipeline has one on its vae"), annealed(pipe, "linear"):
        pass
    pipe = sd(DDIMScheduler(clip_sample=False))
    pipe.scheduler = None
    with pytest.raises(ValueError, match="one scheduler, named scheduler.*StableDiffusionPipeline has"), annealed(pipe, "linear"):
        pass


def test_nothing_is_replaced_inside():
    pipe = sd(DDIMScheduler(clip_sample=False))
    scheduler, unet = pipe.scheduler, pipe.unet
    with annealed(pipe, "linear"):
        pipe.scheduler = DDIMScheduler(clip_sample=False)
        with pytest.raises(ValueError, match="scheduler of StableDiffusionPipeline must not be replaced"):
            pipe(**GIVEN, num_inference_steps=2, generator=generator())
        pipe.scheduler, pipe.unet = scheduler, small_unet()
        with pytest.raises(ValueError, match="unet of StableDiffusionPipeline must not be replaced"):
            pipe(**GIVEN, num_inference_steps=2, generator=generator())
        pipe.unet = unet
        pipe(**GIVEN, num_inference_steps=2, generator=generator())
    assert not {"step", "set_timesteps"} & set(vars(scheduler))


# which step it is


@pytest.mark.parametrize("strength, first", [(1.0, 0), (0.75, 2), (0.625, 3), (0.25, 6)])
def test_a_start_between_timesteps_that_repeat(strength, first):
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipe = StableDiffusionImg2ImgPipeline(**sd(scheduler).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            image=torch.rand(1, 3, 8, 8, generator=generator()), strength=strength, num_inference_steps=8, generator=generator(), **GIVEN
        )[0]

    expected = by_hand(pipe, run, [i / 9 for i in range(first, 9)])  # 9 timesteps, the second is there twice
    with annealed(pipe, "linear"):
        assert (run() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_copy_of_the_scheduler_is_a_plain_scheduler():
    pipe = sd(DDIMScheduler(clip_sample=False))
    seen = []

    def weight(i, n):
        seen.append(i)
        return 0.5

    with annealed(pipe, weight):
        other = copy.deepcopy(pipe.scheduler)
        other.set_timesteps(3)
        assert not seen and len(pipe.scheduler.timesteps) != 3
        assert inspect.signature(other.step) == inspect.signature(DDIMScheduler().step) == inspect.signature(pipe.scheduler.step)
        pipe(**GIVEN, num_inference_steps=2, generator=generator())
    assert seen == [0, 1]
    x = noise(1, 4, 8, 8)
    assert other.step(x, other.timesteps[0], x).prev_sample.shape == x.shape


@quiet
def test_a_weight_a_picture_where_pictures_are_a_list():
    pipe, run, _ = tuned("z_image")
    best, base = run(), switched_off(pipe, run)
    with annealed(pipe, lambda i, n: torch.tensor([0.0, 1.0])):
        both = run()
    assert torch.allclose(both[:1], base[:1], atol=1e-5) and torch.allclose(both[1:], best[1:], atol=1e-5)
    with pytest.raises(ValueError, match="3 weights for a batch of 4"), annealed(pipe, lambda i, n: torch.tensor([0.0, 1.0, 0.5])):
        run()


# compiled networks


@quiet
def test_a_compiled_network_is_blended_or_refused():
    torch._dynamo.reset()
    pipe, draw, _ = tuned("qwen")
    plain = pipe.transformer

    def run():
        return draw(steps=2)

    best, base = run(), switched_off(pipe, run)
    with annealed(pipe, "constant_0.3"):
        between = run()
    pipe.transformer = torch.compile(plain, backend="eager")
    assert torch.allclose(run(), best, atol=1e-5)
    for weight, expected in (("draft", best), ("base", base), ("constant_0.3", between)):
        with annealed(pipe, weight):
            assert torch.allclose(run(), expected, atol=1e-5)
    with annealed(pipe, "base"), annealed(pipe, "constant_0.3"):
        assert torch.allclose(run(), between, atol=1e-5)
    assert (
        torch.allclose(run(), best, atol=1e-5)
        and "forward" not in vars(plain)
        and isinstance(pipe.transformer, torch._dynamo.OptimizedModule)
    )
    pipe.transformer = plain
    plain.compile(backend="eager")
    with (
        pytest.raises(ValueError, match=r"pipe\.transformer must not be compiled in place.*use torch\.compile\(pipe\.transformer\)"),
        annealed(pipe, "linear"),
    ):
        pass
    plain._compiled_call_impl = None
    plain.transformer_blocks[0].compile(backend="eager")
    with annealed(pipe, "constant_0.3"):
        assert torch.allclose(run(), between, atol=1e-5)
