"What can be trained, and what it costs in memory: LoRA's variants, the whole network with its base elsewhere, switches that change no result."
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from torch.testing import assert_close

from draft_nb import plots
from draft_nb.adapters import trainable
from draft_nb.models import load
from draft_nb.rewards import Reward
from draft_nb.sampler import sample
from draft_nb.train import DRaFTConfig, draft_loss, fit

PROMPTS = ["an emoji of a fox", "an emoji of a rose", "an emoji of a pizza", "a ghost"]


def colour(images, prompts):
    r, g, b = (images * 2 - 1).unbind(1)
    return ((r - g).flatten(1).var(1) + ((r + g) / 2 - b).flatten(1).var(1) + 1e-6).sqrt()


REWARD = Reward("colour", colour)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    "They take longer than the training."
    monkeypatch.setattr(plots, "save_figure", lambda *_: None)


def config(tmp_path, **options):
    fast = dict(num_inference_steps=4, batch_size=2, sample_prompts=PROMPTS[:2], sample_seeds=2, sample_every=99, log_with=None, lr_warmup_steps=0)
    return DRaFTConfig(**{**fast, "output_dir": str(tmp_path / "run"), "max_steps": 2, "kl_coeff": .01, **options})


def lora_layers(model):
    return [m for m in model.network.modules() if isinstance(m, LoraLayer)]


def test_a_lora_is_as_it_was_asked_for():
    model = load("tiny", rank=4, alpha=8, targets=["to_q", "to_v"])
    layers = lora_layers(model)
    assert {n.rsplit(".", 1)[1] for n, m in model.network.named_modules() if isinstance(m, LoraLayer)} == {"to_q", "to_v"}
    assert all(m.r["default"] == 4 and m.scaling["default"] == 2 for m in layers)
    assert all(m.scaling["default"] == pytest.approx(8 / 4**.5) for m in lora_layers(load("tiny", rank=4, alpha=8, rslora=True)))
    assert all(m.use_dora["default"] for m in lora_layers(load("tiny", rank=4, dora=True)))
    assert len(lora_layers(load("tiny", rank=4))) > len(layers)


@pytest.mark.parametrize("options", [dict(alpha=8.), dict(rslora=True), dict(dora=True), dict(targets=["to_q"])])
def test_every_kind_of_lora_trains_and_comes_back(tmp_path, options):
    model = load("tiny", rank=4, **options)
    frozen = {n: p.detach().clone() for n, p in model.network.named_parameters() if not p.requires_grad}
    start = [p.detach().clone() for p in model.parameters()]
    base = sample(model, PROMPTS[:1], weight="base", steps=2).images
    fit(model, REWARD, PROMPTS, config(tmp_path, learning_rate=1e-2), progress=False)
    assert all(torch.equal(p, frozen[n]) for n, p in model.network.named_parameters() if n in frozen)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert_close(sample(model, PROMPTS[:1], weight="base", steps=2).images, base, atol=1e-5, rtol=0)  # the weights went elsewhere and back
    mine = sample(model, PROMPTS[:2], steps=2).images
    assert not torch.allclose(mine[:1], base, atol=1e-3)
    assert torch.allclose(sample(load("tiny", tmp_path / "run"), PROMPTS[:2], steps=2).images, mine, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(base_dtype=torch.bfloat16, base_device="cpu")])
def test_the_whole_network_learns_and_its_base_stays(tmp_path, options):
    model = load("tiny", "full", **options)
    assert {p.dtype for p in model.frozen.parameters()} == {options.get("base_dtype", torch.float32)} and {p.dtype for p in model.parameters()} == {torch.float32}
    base, start = [p.clone() for p in model.frozen.parameters()], [p.detach().clone() for p in model.parameters()]
    run = fit(model, REWARD, PROMPTS, config(tmp_path, max_steps=6, learning_rate=3e-4), progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.frozen.parameters(), base, strict=True))
    assert len(start) == len([*model.network.parameters()]) and all(not torch.equal(p, q) for p, q in zip(model.parameters(), start))
    assert run.after["reward"] > 1.05 * run.before["reward"]
    assert run.history.kl.iloc[-1] > 0
    pipe = StableDiffusionPipeline.from_pretrained(run.folder)
    pipe.set_progress_bar_config(disable=True)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), model.parameters(), strict=True))
    noise = model.latents(2, generator=torch.Generator().manual_seed(0))
    theirs = pipe(PROMPTS[:2], latents=noise, num_inference_steps=4, guidance_scale=1., output_type="pt").images
    assert torch.allclose(sample(model, PROMPTS[:2], steps=4).images, theirs, atol=2e-3)


def test_a_base_of_half_precision_gives_nearly_the_same_pictures_and_kl():
    exact, half = load("tiny", "full"), load("tiny", "full", base_dtype=torch.bfloat16)
    pictures = [sample(m, PROMPTS[:2], weight="base", steps=4).images for m in (exact, half)]
    assert 0 < (pictures[0] - pictures[1]).abs().mean() < .02
    for model in exact, half:
        for k, p in enumerate(model.parameters()): p.data += .02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * p.std(correction=0).nan_to_num()
    kl = [draft_loss(m, REWARD, PROMPTS[:2], generator=torch.Generator().manual_seed(0), num_inference_steps=4)[1]["kl"].item() for m in (exact, half)]
    assert kl[0] > 0 and kl[1] == pytest.approx(kl[0], rel=.3)


@pytest.mark.parametrize("adapter, options, message", [
    ("full", dict(alpha=8), "alpha needs adapter='lora'; got alpha=8 with adapter='full'"),
    ("full", dict(dora=True), "dora needs adapter='lora'"),
    (None, dict(targets=["to_q"]), "targets needs adapter='lora'"),
    ("lora", dict(base_device="cpu"), "base_device needs adapter='full'; got base_device='cpu' with adapter='lora'"),
    ("lora", dict(base_dtype=torch.bfloat16), "base_dtype needs adapter='full'"),
    ("lora", dict(targets=["nowhere"]), "targets must name layers of UNet2DConditionModel"),
])
def test_options_of_the_other_kind_are_refused(adapter, options, message):
    with pytest.raises(ValueError, match=message):
        load("tiny", adapter, **options)


def test_a_base_needs_a_device_that_is_there():
    with pytest.raises(ValueError, match="device must be one that is there"):
        load("tiny", "full", base_device="cuda:77")


def test_what_saves_memory_changes_no_weight(tmp_path):
    weights = {}
    for option in ("", "gradient_checkpointing", "decoder_checkpointing", "vae_slicing", "offload_text_encoders"):
        model = load("tiny", rank=4)
        fit(model, REWARD, PROMPTS, config(tmp_path / option, learning_rate=1e-3, num_inference_steps=2, grad_steps=2, **({option: True} if option else {})), progress=False)
        weights[option] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.allclose(weights[option], weights[""], atol=1e-5), option
        assert (model.parked, model.pipe.vae.use_slicing) == (option == "offload_text_encoders", option == "vae_slicing")
        assert model.network.is_gradient_checkpointing == (option == "gradient_checkpointing")
        assert model.pipe.vae.is_gradient_checkpointing == (option in ("gradient_checkpointing", "decoder_checkpointing"))


def test_the_decoder_may_go_without_what_the_denoiser_has(tmp_path):
    model = load("tiny", rank=4)
    fit(model, REWARD, PROMPTS, config(tmp_path, num_inference_steps=2, gradient_checkpointing=True, decoder_checkpointing=False), progress=False)
    assert model.network.is_gradient_checkpointing and not model.pipe.vae.is_gradient_checkpointing


def test_the_metadata_say_how_a_lora_was_made(tmp_path):
    import json
    file = load("tiny", rank=4, alpha=8., rslora=True).save(tmp_path)
    with safe_open(file, "pt") as f: said = json.loads(f.metadata()["lora_adapter_metadata"])
    assert said["unet.r"] == 4 and said["unet.lora_alpha"] == 8 and said["unet.use_rslora"]


def test_two_runs_in_one_process_may_differ_in_precision(tmp_path):
    for precision in ("no", "bf16"):
        model = load("tiny", rank=4)
        run = fit(model, REWARD, PROMPTS, config(tmp_path / precision, mixed_precision=precision, learning_rate=1e-3), progress=False)
        assert all(p.dtype == torch.float32 for p in trainable(model.network)) and run.rows[-1]["skipped"] == 0
