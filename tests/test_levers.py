"What makes steps cheaper changes nothing else: a copy for the steps without gradient, guidance in a part of the steps only."
import json
import os
import platform
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import yaml
from torch.testing import assert_close

from draft_nb import train
from draft_nb.adapters import lora_layers, plain_copy, remerge
from draft_nb.cli import main
from draft_nb.models import load
from draft_nb.rewards import Reward, load_reward
from draft_nb.sampler import sample, sample_each
from draft_nb.train import DRaFTConfig, draft_loss, fit, make_optimizer, resolve

PROMPTS = ["an emoji of a fox", "an emoji of a rose"]
REWARD = Reward("red", lambda images, prompts: images[:, 0].mean((1, 2)))
FAST = dict(num_inference_steps=3, batch_size=2, max_steps=3, sample_prompts=PROMPTS[:1], sample_seeds=1, log_with=None, lr_warmup_steps=0)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def tuned(**options):
    model = load("tiny", device="cpu", **options)
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=.05, generator=generator(k))
    return model


def gradient(model, plain=None, reward=REWARD, prompts=PROMPTS, **options):
    loss, parts = draft_loss(model, reward, prompts, generator=generator(), num_inference_steps=4, kl_coeff=1., plain=plain, **options)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), materialize_grads=True)]), parts


def apart(a, b): return ((a-b).norm()/b.norm()).item()


@pytest.mark.parametrize("options", [{}, dict(rank=4, alpha=2.), dict(rslora=True), dict(targets=["to_q", "conv1"])])
def test_the_merged_copy_gives_the_same_gradient(options):
    model = tuned(**options)
    plain = model.prefix_network("merged")
    assert not lora_layers(plain) and not any(p.requires_grad for p in plain.parameters() if all(p is not q for q in model.parameters()))
    wanted, parts = gradient(model)
    got, same = gradient(model, plain)
    assert apart(got, wanted) < 1e-4 and (same["images"]-parts["images"]).abs().max() < 1e-4
    rough, _ = gradient(model, model.prefix_network("bfloat16"))
    assert 0 < apart(rough, wanted) < .3


@pytest.mark.parametrize("options", [{}, dict(grad_steps=3), dict(estimator="draft_lv"), dict(estimator="refl", stop_within=.5)])
@pytest.mark.parametrize("at_a_time", [1, 2, 3])
def test_scored_a_few_at_a_time_the_gradient_is_the_same(options, at_a_time):
    model = tuned()
    four = dict(prompts=PROMPTS*2, reward=load_reward("0.7*tiny + 0.3*tiny-judge"))
    wanted, all_at_once = gradient(model, **four, **options)
    got, few = gradient(model, reward_batch_size=at_a_time, **four, **options)
    assert apart(got, wanted) < 2e-3  # rounding may bring a pixel to the other side of the clamp; a wrong sign at the clamp costs 2 to 3 per cent
    for name in "reward", "images":
        assert few[name].shape == all_at_once[name].shape and torch.allclose(few[name], all_at_once[name], atol=1e-4)
    assert {*few["parts"]} == {*all_at_once["parts"]} and all(len(v) == 4 and torch.allclose(v, all_at_once["parts"][n], atol=1e-3) for n, v in few["parts"].items())


def test_a_few_at_a_time_hold_fewer_activations():
    model, held = tuned(), []
    reward = Reward("red", lambda images, prompts: held.append(len(images)) or images[:, 0].mean((1, 2)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape[0] if t.dim() == 4 and t.shape[-1] == 64 else 0) or t, lambda t: t):
        loss, _ = draft_loss(model, reward, PROMPTS*2, generator=generator(), num_inference_steps=3, kl_coeff=0., reward_batch_size=2)
    assert held == [2, 2] and max(saved) == 2  # pictures, of four
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_which_models_score_a_few_at_a_time():
    model = load("tiny", rank=2)
    assert resolve(DRaFTConfig(mixed_precision="fp16"), model).reward_batch_size is None
    assert resolve(DRaFTConfig(reward_batch_size=3), model).reward_batch_size == 3
    assert type(model).__dataclass_fields__["training"].default_factory()["reward_batch_size"] == 1


def test_the_copy_follows_and_the_network_is_not_touched():
    model = tuned()
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    plain = model.prefix_network("merged")
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)
    stale, wanted = gradient(model, plain)[0], gradient(model)[0]
    model.update_prefix(plain)
    assert apart(gradient(model, plain)[0], wanted) < 1e-3 < apart(stale, wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items() if "lora_" not in k)


def test_only_steps_without_gradient_ask_the_copy():
    model, asked = tuned(), []
    plain = model.prefix_network("merged")
    plain.register_forward_pre_hook(lambda *_: asked.append("copy"))
    model.network.register_forward_pre_hook(lambda *_: asked.append("network"))
    gradient(model, plain)
    assert asked == ["copy"]*3+["network"]*2  # the base, then the tuned model
    asked.clear()
    gradient(model, plain, estimator="drtune", grad_steps=2)
    assert asked.count("copy") and asked.count("network") == 4


@pytest.mark.parametrize("prefix, adapter", [("network", "lora"), ("merged", "lora"), ("bfloat16", "lora"), ("bfloat16", "full")])
def test_a_run_learns_and_its_base_stays(tmp_path, prefix, adapter):
    model = load("tiny", adapter, device="cpu")
    base = {n: p.detach().clone() for n, p in (model.frozen or model.network).named_parameters() if "lora_" not in n}
    start = [p.detach().clone() for p in model.parameters()]
    run = fit(model, REWARD, PROMPTS, DRaFTConfig(output_dir=str(tmp_path/"run"), prefix=prefix, learning_rate=1e-3 if adapter == "lora" else 1e-5, **FAST), progress=False)
    assert len(run.rows) == 3 and any(not torch.equal(p, q) for p, q in zip(model.parameters(), start))
    assert all(torch.equal(p, base[n]) for n, p in (model.frozen or model.network).named_parameters() if "lora_" not in n)
    assert yaml.safe_load((tmp_path/"run"/"config.yaml").read_text())["prefix"] == prefix
    with pytest.raises(ValueError, match=f"prefix: '{prefix}' -> "):
        fit(model, REWARD, PROMPTS, DRaFTConfig(output_dir=str(tmp_path/"run"), prefix="network" if prefix != "network" else "merged", learning_rate=1e-3 if adapter == "lora" else 1e-5, resume=True, **FAST), progress=False)


def test_what_it_is_by_default():
    assert resolve(DRaFTConfig(), load("tiny")).prefix == "merged"
    assert resolve(DRaFTConfig(), load("tiny", dora=True)).prefix == "network"
    assert resolve(DRaFTConfig(), load("tiny", adapter="full")).prefix == "network"
    assert resolve(DRaFTConfig(sharded=True), load("tiny")).prefix == "network"


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="prefix must be one of network, merged, bfloat16; got 'fast'"): DRaFTConfig(prefix="fast")
    for model in load("tiny", dora=True), load("tiny", adapter="full"):
        with pytest.raises(ValueError, match="prefix must be network"):
            fit(model, REWARD, PROMPTS, DRaFTConfig(output_dir=str(tmp_path/"no"), prefix="merged", **FAST), progress=False)
    assert not (tmp_path/"no"/"config.yaml").exists()
    model = tuned()
    for interval in ((.8, .2), (-.1, 1.), (0., 1.1), (.5,)):
        with pytest.raises(ValueError, match="guidance_interval must be two numbers"): sample(model, PROMPTS, steps=2, guidance_scale=3., guidance_interval=interval)
    with pytest.raises(ValueError, match="guidance_interval must be two numbers"): DRaFTConfig(guidance_interval=(.8, .2))


def test_a_copy_in_bfloat16_is_rounded_once():
    model = tuned()
    small = plain_copy(model.network, torch.bfloat16)
    layer = next(n for n, m in model.network.named_modules() if n.endswith("to_q") and m in lora_layers(model.network))
    own = model.network.get_submodule(layer)
    exact = own.base_layer.weight+own.get_delta_weight("default")
    assert torch.equal(small.get_submodule(layer).weight, exact.to(torch.bfloat16))
    assert remerge(small, model.network) is small


# guidance in a part of the steps

def rows(model, **options):
    seen = []
    hook = model.network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = sample(model, PROMPTS, steps=5, guidance_scale=3., **options).images
    hook.remove()
    return seen, images


def test_guidance_where_it_is_asked_for():
    model = tuned()
    whole, images = rows(model)
    assert whole == [4]*5
    for interval in (0., 1.), [0, 1]:
        assert torch.equal(rows(model, guidance_interval=interval)[1], images)
    part, others = rows(model, guidance_interval=(.3, .7))
    own = deepcopy(model.scheduler)
    own.set_timesteps(5)
    wanted = [4 if 300 <= t <= 700 else 2 for t in own.timesteps.tolist()]
    assert part == wanted and {*wanted} == {2, 4} and not torch.allclose(others, images, atol=1e-4)
    blended, _ = rows(model, guidance_interval=(.3, .7), weight="constant_0.5")
    assert blended == [2*n for n in wanted]
    both = sample_each(model, PROMPTS, ["base", "draft"], steps=5, guidance_scale=3., guidance_interval=(.3, .7), seed=[0, 1])
    assert (both[1].images-sample(model, PROMPTS, steps=5, guidance_scale=3., guidance_interval=(.3, .7), seed=[0, 1]).images).abs().max() < 1e-4


def test_guidance_interval_in_training(tmp_path, capsys):
    model = tuned()
    wanted, _ = gradient(model, guidance_scale=3., guidance_interval=(0., 1.))
    assert torch.equal(gradient(model, guidance_scale=3.)[0], wanted) and apart(gradient(model, guidance_scale=3., guidance_interval=(.5, 1.))[0], wanted) > .01
    command = ["train", "--num_inference_steps", "3", "--batch-size", "2", "--max_steps", "1", "--sample_prompts", "a fox", "--sample_seeds", "1", "--rank", "2", "--guidance_scale", "3",
               "--output_dir", str(tmp_path/"run")]
    assert main([*command, "--guidance_interval", "0.2", "0.8"]) == 0
    assert yaml.safe_load((tmp_path/"run"/"config.yaml").read_text())["guidance_interval"] == [.2, .8]
    assert main(["train", "--config", str(tmp_path/"run"/"config.yaml"), "--output_dir", str(tmp_path/"again")]) == 0
    assert main([*command, "--guidance_interval", "0.8", "0.2"]) == 2 and "guidance_interval must be two numbers" in capsys.readouterr().err


def test_a_reward_that_draws_by_chance_is_no_reward_that_compares(tmp_path):
    torch.manual_seed(0)
    by_chance = Reward("jitter", lambda images, prompts: images.mean((1, 2, 3)) * (1 + torch.rand(len(images))))
    options = dict(output_dir=tmp_path / "run", max_steps=1, batch_size=2, num_inference_steps=2, reward_batch_size=1, sample_seeds=1)
    assert len(fit(load("tiny", rank=2), by_chance, PROMPTS, DRaFTConfig(**options), progress=False).rows) == 1


def formats(*networks):
    return [p.is_contiguous() for n in networks for p in n.parameters() if p.ndim == 4 and p.shape[-1] > 1 and p.shape[1] > 1]


def test_training_has_convolutions_channels_last_and_leaves_them_as_they_were(tmp_path):
    model, seen = load("tiny", rank=2), []
    before = sample(model, PROMPTS, seed=0, steps=2, weight="base").images
    def look(row):
        seen.append(formats(model.network, model.pipe.vae))
        raise KeyboardInterrupt  # whatever ends it
    with pytest.raises(KeyboardInterrupt):
        fit(model, REWARD, PROMPTS, DRaFTConfig(output_dir=tmp_path / "run", max_steps=2, batch_size=2, num_inference_steps=2, learning_rate=1e-20, sample_seeds=1), on_step=look, progress=False)
    assert not any(seen[0]) and all(formats(model.network, model.pipe.vae))
    assert_close(sample(model, PROMPTS, seed=0, steps=2, weight="base").images, before, atol=1e-5, rtol=0)  # the weights went elsewhere and back


HELD = """
import draft_nb, json, torch
from draft_nb.bench import memory, pages_so_far
from draft_nb.train import freed_memory_kept
def rss(): return memory("VmRSS") / 2**20
def large(): return [torch.ones(2**20) for _ in range(50)]
start = rss()
with freed_memory_kept() as told:
    for _ in range(4): large()
    before = pages_so_far()
    large(); anew, inside = pages_so_far() - before, rss()
print(json.dumps(dict(told=told, anew=anew, inside=inside - start, after=rss() - start)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize("environment", [{}, dict(MALLOC_PERTURB_="0"), dict(GLIBC_TUNABLES="glibc.malloc.perturb=0")])
def test_freed_memory_is_kept_and_given_back_at_the_end(monkeypatch, environment):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for k in [k for k in os.environ if k.startswith("MALLOC_")]:
        monkeypatch.delenv(k)
    found = json.loads(subprocess.run([sys.executable, "-c", HELD], env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout)
    assert found["told"] == (not environment)  # what the user chose stays
    if found["told"]:
        assert found["anew"] < 2000 and found["inside"] > 190 and found["after"] < 60


def test_a_run_keeps_freed_memory_until_it_ends_however_it_ends(tmp_path, monkeypatch):
    told = []

    class Library:
        def mallopt(self, what, value):
            told.append((what, value))
            return 1

        def malloc_trim(self, pad):
            told.append("trimmed")

    monkeypatch.setattr(train.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: Library())
    for k in [k for k in os.environ if k.startswith("MALLOC_") or k == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(k)
    def look(row):
        told.append("step")
        raise KeyboardInterrupt
    config = DRaFTConfig(output_dir=tmp_path / "run", max_steps=2, batch_size=2, num_inference_steps=2, sample_seeds=1)
    with pytest.raises(KeyboardInterrupt):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config, on_step=look, progress=False)
    assert told == [(-3, 32 * 2**20), (-1, -1), "step", (-1, 64 * 2**20), "trimmed"]
    told.clear()
    monkeypatch.setattr(Library, "mallopt", lambda self, what, value: 0)  # a library that refuses
    with train.freed_memory_kept() as kept:
        assert not kept
    monkeypatch.setattr(train.platform, "libc_ver", lambda: ("", ""))
    with train.freed_memory_kept() as kept:
        assert not kept and not told


def test_what_lies_channels_last_already_stays_so_and_learns_the_same(tmp_path):
    learned = []
    for last in (False, True):
        model = load("tiny", "full")
        if last:
            model.network.to(memory_format=torch.channels_last)
        fit(model, REWARD, PROMPTS, DRaFTConfig(output_dir=tmp_path / str(last), max_steps=2, batch_size=2, num_inference_steps=2, learning_rate=1e-5, kl_coeff=0., sample_seeds=1), progress=False)
        assert all(f != last for f in formats(model.network))
        learned.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (learned[0] - learned[1]).abs().max() < 3e-5 and (learned[0] - learned[1]).abs().mean() < 1e-6


def test_adamw_is_not_misled_by_how_weights_lie():
    weight = torch.randn(8, 16, 3, 3, generator=generator())
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(weight.clone().contiguous(memory_format=form))
        optimizer = make_optimizer([p], resolve(DRaFTConfig(learning_rate=.1), load("tiny", rank=2)))
        for k in range(2):  # as after an average over processes: gradients always lie one way
            p.grad = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(k))
            optimizer.step()
        results.append(p.detach().contiguous())
    assert torch.allclose(*results, atol=1e-5)
