"DRaFT+ on the embedded model: gradients, what moves, what is kept, what is refused."
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from draft_nb.models import asset, load
from draft_nb.prompts import read_prompts
from draft_nb.rewards import Reward, load_reward
from draft_nb.sampler import sample
from draft_nb.train import (
    COLUMNS, DRaFTConfig, NotFinite, alarms, check_run, deal, draft_loss, evaluate, fit, newest_checkpoint, read_history, resolve,
    score_latents, skipped_steps,
)

PROMPTS = ["an emoji of a fox", "an emoji of a rose", "an emoji of a pizza", "a ghost"]


def colour(images, prompts):
    r, g, b = (images * 2 - 1).unbind(1)
    return ((r - g).flatten(1).var(1) + ((r + g) / 2 - b).flatten(1).var(1) + 1e-6).sqrt()


REWARD = Reward("colour", colour)
FAST = dict(num_inference_steps=4, batch_size=2, sample_prompts=PROMPTS[:2], sample_seeds=2, log_with=None, lr_warmup_steps=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(model, std=.02):
    for k, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=std, generator=generator(k))
    return model


def config(tmp_path, **options):
    return DRaFTConfig(**{**FAST, "output_dir": str(tmp_path / "run"), "max_steps": 3, **options})


def loss_and_gradient(model, seed=0, **options):
    options = dict(num_inference_steps=4, **options)
    loss, parts = draft_loss(model, REWARD, PROMPTS[:2], generator=generator(seed), **options)
    grads = torch.autograd.grad(loss, model.parameters(), materialize_grads=True)
    return loss.item(), torch.cat([g.flatten() for g in grads]), parts


@pytest.fixture(scope="module")
def model():
    return moved(load("tiny", rank=4))


@pytest.mark.numeric
def test_the_forward_pass_is_the_same_for_every_k(model):
    results = [loss_and_gradient(model, grad_steps=k, kl_coeff=0.) for k in (1, 2, 4)]
    assert [r[0] for r in results] == pytest.approx([results[0][0]] * 3, rel=1e-5)  # with a graph PyTorch may take other kernels
    assert not torch.allclose(results[0][1], results[1][1])


@pytest.mark.numeric
@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_equals_autograd_through_the_stock_pipeline(k):
    "K = T: the whole of the stock pipeline's undecorated call carries gradient."
    model = moved(load("tiny", rank=4))
    steps = k
    x = model.latents(2, generator=generator())
    images = type(model.pipe).__call__.__wrapped__(model.pipe, PROMPTS[:2], latents=x, num_inference_steps=steps, guidance_scale=3., output_type="latent").images
    theirs = torch.autograd.grad(-REWARD(model.decode(images), PROMPTS[:2]).mean(), model.parameters())
    loss, _ = draft_loss(model, REWARD, PROMPTS[:2], generator=generator(), num_inference_steps=steps, guidance_scale=3., grad_steps=k, kl_coeff=0.)
    mine = torch.autograd.grad(loss, model.parameters())
    scale = max(g.abs().max() for g in theirs)
    assert all((a - b).abs().max() <= 1e-4 * scale for a, b in zip(mine, theirs))


@pytest.mark.numeric
@pytest.mark.parametrize("kl_on", ["guided", "conditional"])
def test_checkpointing_changes_no_gradient(kl_on):
    model = moved(load("tiny", rank=4))
    _, plain, _ = loss_and_gradient(model, grad_steps=2, kl_coeff=1., kl_on=kl_on)
    model.network.enable_gradient_checkpointing()
    _, again, _ = loss_and_gradient(model, grad_steps=2, kl_coeff=1., kl_on=kl_on)
    assert torch.allclose(plain, again, atol=1e-5 * plain.abs().max())


def test_kl_coeff_0_runs_no_base_pass(model):
    from draft_nb import models
    asked = []
    original = models.base_of
    models.base_of = lambda *a: (asked.append(1), original(*a))[1]
    try:
        loss_and_gradient(model, kl_coeff=0.)
        assert not asked
        loss_and_gradient(model, kl_coeff=.1, grad_steps=2)
        assert len(asked) == 2
    finally:
        models.base_of = original


@pytest.mark.numeric
def test_the_loss_is_its_parts(model):
    loss, _, parts = loss_and_gradient(model, kl_coeff=.7, grad_steps=2)
    assert loss == pytest.approx(.7 * parts["kl"].item() - parts["reward"].mean().item(), rel=1e-5)
    assert parts["kl"] > 0
    assert loss_and_gradient(load("tiny", rank=4), kl_coeff=.7)[2]["kl"] == 0


def test_kl_alone_pulls_back_to_the_base():
    model = moved(load("tiny", rank=4), std=.2)
    flat = Reward("flat", lambda images, prompts: images.mean((1, 2, 3)) * 0)
    optimizer, kls = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(8):
        loss, parts = draft_loss(model, flat, PROMPTS[:2], generator=generator(), num_inference_steps=4, kl_coeff=1.)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        kls.append(parts["kl"].item())
    assert kls[-1] < .5 * kls[0]


def saved_bytes(model, steps):
    total = []
    def pack(t):
        total.append(t.numel() * t.element_size())
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        draft_loss(model, REWARD, PROMPTS[:2], generator=generator(), num_inference_steps=steps, grad_steps=1, kl_coeff=.1)
    return sum(total)


def test_the_prefix_holds_no_graph(model):
    assert saved_bytes(model, 2) == saved_bytes(model, 9)


def test_a_run_moves_the_lora_not_the_base_and_raises_the_reward(tmp_path):
    model = load("tiny", rank=4)
    start = {n: p.detach().clone() for n, p in model.pipe.unet.named_parameters()}
    run = fit(model, REWARD, PROMPTS, config(tmp_path, max_steps=20, learning_rate=3e-3, kl_coeff=.01, sample_every=20), progress=False)
    for n, p in model.pipe.unet.named_parameters():
        assert torch.equal(p, start[n]) != ("lora" in n), n
    assert run.after["reward"] > run.before["reward"] * 1.05
    assert run.history.reward[-5:].mean() > run.history.reward[:5].mean()
    assert (run.history.kl >= 0).all() and run.history.kl.iloc[-1] > 0
    folder = run.folder
    for name in ("config.yaml", "history.csv", "README.md", "curves.png", "before_after.png", "pytorch_lora_weights.safetensors", "samples/step_000020.png"):
        assert (folder / name).stat().st_size > 100, name
    again = load("tiny", adapter=folder)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    assert_close(sample(again, PROMPTS, steps=4).images, sample(model, PROMPTS, steps=4).images, atol=1e-5, rtol=0)
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 3e-3
    assert read_history(folder)[-1]["eval_reward"] == pytest.approx(run.after["reward"])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_random_numbers(tmp_path):
    weights = []
    for k, seed in enumerate((0, 0, 1)):
        model = load("tiny", rank=2)
        state = torch.random.get_rng_state()
        fit(model, REWARD, PROMPTS, config(tmp_path / str(k), seed=seed), progress=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert_close(weights[0], weights[1], atol=1e-5, rtol=0)  # two networks
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(weights[0], weights[2]))


@pytest.mark.parametrize("options", [{}, {"ema_decay": .5}, pytest.param({"eta": 1., "gradient_accumulation_steps": 2}, marks=pytest.mark.numeric)])
def test_resume_is_exact(tmp_path, options):
    whole, parts = load("tiny", rank=2), load("tiny", rank=2)
    fit(whole, REWARD, PROMPTS, config(tmp_path / "a", max_steps=4, checkpoint_every=2, **options), progress=False)
    fit(parts, REWARD, PROMPTS, config(tmp_path / "b", max_steps=2, checkpoint_every=2, **options), progress=False)
    fresh = load("tiny", rank=2)
    run = fit(fresh, REWARD, PROMPTS, config(tmp_path / "b", max_steps=4, checkpoint_every=2, resume=True, **options), progress=False)
    assert_close(fresh.parameters(), whole.parameters(), atol=1e-5, rtol=0)  # two networks
    assert [r["step"] for r in run.rows] == [1, 2, 3, 4]


def test_resume_refuses_another_configuration(tmp_path):
    fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path, max_steps=1), progress=False)
    with pytest.raises(ValueError, match="learning_rate: 0.003 -> 0.5"):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path, max_steps=2, learning_rate=.5, resume=True), progress=False)
    with pytest.raises(ValueError, match="output_dir must be new"):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path), progress=False)


def test_a_killed_run_leaves_whole_files(tmp_path):
    code = f"""
import os, draft_nb.train as t
from test_train import *
old = t.save_checkpoint
def die(folder, state, keep):
    old(folder, state, keep)
    if state["step"] == 2:
        (folder/"checkpoints"/"step_000003.pt").write_bytes(b"cut short")
        os.kill(os.getpid(), 9)
t.save_checkpoint = die
fit(load("tiny", rank=2), REWARD, PROMPTS, DRaFTConfig(**FAST, output_dir={str(tmp_path / "run")!r}, max_steps=4, checkpoint_every=1), progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="tests", capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert newest_checkpoint(tmp_path / "run", "cpu")["step"] == 2
    killed, whole = load("tiny", rank=2), load("tiny", rank=2)
    fit(killed, REWARD, PROMPTS, config(tmp_path, max_steps=4, checkpoint_every=1, resume=True), progress=False)
    fit(whole, REWARD, PROMPTS, config(tmp_path / "whole", max_steps=4, checkpoint_every=1), progress=False)
    assert_close(killed.parameters(), whole.parameters(), atol=1e-5, rtol=0)  # another process


def nan_when(bad):
    "Colour, but NaN in the training steps and evaluations that `bad` names by their numbers: (step, None) or (None, evaluation), both from 1."
    steps, looks = [], []
    def score(images, prompts):
        if len(images) == 1: return colour(images, prompts)  # what is tried before the run
        seen = steps if images.requires_grad else looks
        seen.append(1)
        now = (len(steps), None) if seen is steps else (None, len(looks))
        return colour(images, prompts) * (float("nan") if bad(*now) else 1)
    return Reward("at times", score)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path):
    model = load("tiny", rank=2)
    start, same = [p.detach().clone() for p in model.parameters()], []
    def look(_): same.append(all(torch.equal(p, q) for p, q in zip(model.parameters(), start)))
    run = fit(model, nan_when(lambda step, look: step in (1, 2, 4)), PROMPTS, config(tmp_path, max_steps=4), on_step=look, progress=False)
    assert [r["skipped"] for r in run.rows] == [1, 2, 0, 1] and skipped_steps(run.rows) == 3
    assert same == [True, True, False, False]


@pytest.mark.parametrize("max_steps, steps", [(12, "ten steps in a row"), (3, "all 3 steps"), (1, "the only step")])
def test_a_reward_that_is_nan_for_good_is_no_success(tmp_path, max_steps, steps):
    with pytest.raises(RuntimeError, match=rf"{steps} had a loss or gradient that is not finite \(reward is nan, loss is nan, grad_norm is nan\); no step before was kept"):
        fit(load("tiny", rank=2), nan_when(lambda step, look: step is not None), PROMPTS, config(tmp_path, max_steps=max_steps), progress=False)
    assert [r["skipped"] for r in read_history(tmp_path / "run")] == list(range(1, min(max_steps, 10) + 1))
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


def test_a_run_that_ends_in_nan_says_where_its_last_good_state_is(tmp_path):
    reward = nan_when(lambda step, look: step is not None and step > 2)
    with pytest.raises(NotFinite, match=r"ten steps in a row .*; the last good state is .*step_000002.pt"):
        fit(load("tiny", rank=2), reward, PROMPTS, config(tmp_path, max_steps=20, checkpoint_every=2), progress=False)


@pytest.mark.parametrize("bad, message", [
    (lambda step, look: (step or 0) > 1 or (look or 0) > 1, "at times gives nan for the last pictures; 2 of 3 steps were skipped"),
    (lambda step, look: look is not None, "at times gives nan for the base's pictures"),
])
def test_an_evaluation_that_is_nan_is_no_success(tmp_path, bad, message):
    with pytest.raises(NotFinite, match=message):
        fit(load("tiny", rank=2), nan_when(bad), PROMPTS, config(tmp_path, max_steps=3, sample_prompts=PROMPTS[:1]), progress=False)
    assert not (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("at_a_time", [None, 1])
def test_pictures_that_are_nan_are_skipped_steps_and_are_called_so(tmp_path, at_a_time):
    model = load("tiny", rank=2)
    start, decode, calls = [p.detach().clone() for p in model.parameters()], model.decode, []
    def broken(latents):
        images = decode(latents)
        calls.append(1)
        return images * float("nan") if latents.requires_grad else images
    model.decode = broken
    with pytest.raises(NotFinite, match=r"ten steps in a row .* \(the pictures are NaN\)"):
        fit(model, REWARD, PROMPTS, config(tmp_path, max_steps=12, reward_batch_size=at_a_time), progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start))


def test_one_picture_that_is_nan_spoils_its_own_score_alone(model):
    decode = model.decode
    def broken(latents):
        images = decode(latents).clone()
        images[1, :, 0, 0] = float("nan")
        return images
    latents = model.latents(2, generator=generator())
    whole, _, _ = score_latents(model, REWARD, latents, PROMPTS[:2])
    model.decode = broken
    try: scores, images, _ = score_latents(model, REWARD, latents, PROMPTS[:2])
    finally: del model.decode
    assert torch.equal(scores[0], whole[0]) and scores[1].isnan() and images[1].isnan().any()


def test_a_plain_function_is_a_reward(tmp_path):
    named = fit(load("tiny", rank=2), Reward("colour", colour), PROMPTS, config(tmp_path / "a"), judge=Reward("judge", colour), progress=False)
    plain = fit(load("tiny", rank=2), colour, PROMPTS, config(tmp_path / "b"), judge=lambda images, prompts: colour(images, prompts), progress=False)
    def without_time(rows): return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert without_time(plain.rows) == without_time(named.rows) and plain.after["judge"] == plain.after["reward"]
    assert yaml.safe_load((plain.folder / "config.yaml").read_text())["reward"] == "colour"


@pytest.mark.parametrize("options, message", [
    (dict(reward="tiny"), "reward must be a reward or a function of pictures and prompts, see load_reward; got 'tiny'"),
    (dict(reward=lambda images: images), "reward must take pictures and prompts; <lambda> takes"),
    (dict(reward=lambda i, p: colour(i, p).mean()), r"<lambda> must return one score an image, a tensor \(1,\); got \(\)"),
    (dict(reward=lambda i, p: colour(i, p).tolist()), "<lambda> must return one score an image.*; got list"),
    (dict(reward=lambda i, p: colour(i.detach(), p)), "reward must carry a gradient"),
    (dict(judge="tiny-judge"), "judge must be a reward or a function"),
    (dict(judge=lambda i, p: 3.), "must return one score an image"),
    (dict(judge=lambda i, p: colour(i, p) * float("nan")), "judge must be finite"),
    (dict(prompts=["a fox", None]), "prompts must be texts; got None"),
    (dict(prompts=[]), "prompts must hold at least one text"),
])
def test_what_is_no_reward_is_refused_before_the_folder_is_made(tmp_path, options, message):
    given = dict(reward=REWARD, prompts=PROMPTS, judge=None) | options
    with pytest.raises(ValueError, match=message):
        fit(load("tiny", rank=2), given["reward"], given["prompts"], config(tmp_path), judge=given["judge"], progress=False)
    assert not (tmp_path / "run").exists()


def test_every_prompt_once_an_epoch():
    deck = [str(k) for k in range(10)]
    dealt = sum((deal(deck, n, 3, seed=4) for n in range(10)), [])
    assert all(sorted(dealt[k:k + 10]) == sorted(deck) for k in (0, 10, 20))


def test_evaluation_pairs_the_noise(model):
    base, images, _ = evaluate(model, REWARD, PROMPTS[:2], weight="base", seeds=2, steps=3)
    bare, again, _ = evaluate(load("tiny", adapter=None), REWARD, PROMPTS[:2], weight="draft", seeds=2, steps=3, chunk=3)
    assert torch.allclose(images, again, atol=1e-4) and base["reward"] == pytest.approx(bare["reward"], rel=1e-3)


@pytest.mark.parametrize("options, message", [
    ({"grad_steps": 0}, "grad_steps must be at least 1; got 0"),
    ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ({"learning_rate": 0}, "learning_rate must be greater than 0; got 0"),
    ({"kl_coeff": -1}, "kl_coeff must be at least 0; got -1"),
    ({"kl_on": "all"}, "kl_on must be one of guided, conditional; got 'all'"),
    ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw8bit"),
    ({"ema_decay": 1}, r"ema_decay must be in \[0,1\); got 1"),
    ({"eta": 2}, r"eta must be in \[0,1\]; got 2"),
    ({"reward_batch_size": 0}, "reward_batch_size must be at least 1; got 0"),
    ({"reward_batch_size": 2, "mixed_precision": "fp16"}, "reward_batch_size must be left open with mixed_precision fp16.*; got 2"),
])
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        DRaFTConfig(**options)


COUNTS = ["max_steps", "batch_size", "gradient_accumulation_steps", "num_inference_steps", "grad_steps", "lv_samples", "reward_batch_size", "checkpoint_every",
          "keep_checkpoints", "sample_every", "sample_seeds", "patience", "lr_warmup_steps", "seed"]
AMOUNTS = ["guidance_scale", "eta", "stop_within", "kl_coeff", "target_kl", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "ema_decay",
           "diversity_floor", "drift"]
WORDS = ["output_dir", "estimator", "kl_reduction", "kl_on", "lr_scheduler", "optimizer", "mixed_precision", "prefix", "log_with", "features"]
SWITCHES = ["gradient_checkpointing", "decoder_checkpointing", "vae_slicing", "offload_text_encoders", "sharded", "resume"]


def test_every_field_is_checked():
    from dataclasses import fields
    assert {f.name for f in fields(DRaFTConfig)} == {*COUNTS, *AMOUNTS, *WORDS, *SWITCHES, "guidance_interval", "sample_prompts"}


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("names, values, rule", [
    (COUNTS, [2.5, 2., True, False, "3", INF, NAN, [3], b"3", 1j], "must be a whole number"),
    (COUNTS, [10**30, -1, -10**30], "must be"),
    (AMOUNTS, [INF, -INF, NAN, True, "0.5", [.5], 1j, np.float32("nan"), 10**400], "must be a finite number"),
    (AMOUNTS, [-1, 1e300], "must be"),
    (WORDS, [True, False, 3, b"adamw", ["adamw"], ""], "must be"),
    (SWITCHES, ["no", "false", 0, 1, 1., "x"], "must be True or False"),
    (["guidance_interval"], [.5, "01", (.1,), (.1, .2, .3), (NAN, 1), (0, INF), (False, True), (.5, .1), ("0", "1"), (0, None)], "must be two numbers, 0 <= low < high <= 1"),
    (["sample_prompts"], [None, 3, [3], [None], [["a"]], b"a fox", {"a": 1}, {"a", "b"}], "must be texts"),
])
def test_values_of_the_wrong_kind_are_refused_by_name(names, values, rule):
    for name in names:
        for value in values:
            with pytest.raises(ValueError) as e: DRaFTConfig(**{name: value})
            assert str(e.value).startswith(f"{name} {rule}") and "; got " in str(e.value), (name, value)
            assert len(str(e.value).splitlines()) == 1


def test_values_become_those_of_python():
    from pathlib import Path
    c = DRaFTConfig(max_steps=np.int64(3), learning_rate=np.float32(.5), kl_coeff=1, resume=np.bool_(True), sample_prompts=np.array(["a", "b"]), output_dir=Path("x") / "y",
                    guidance_interval=[0, np.float64(.5)], optimizer=np.str_("adamw"), seed=np.uint32(2**32 - 1))
    assert yaml.safe_load(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in vars(c).items()}))["seed"] == 2**32 - 1
    assert (c.max_steps, c.learning_rate, c.kl_coeff, c.resume, c.sample_prompts, c.output_dir, c.guidance_interval) == (3, .5, 1., True, ("a", "b"), "x/y", (0., .5))
    assert [type(v) for v in (c.max_steps, c.learning_rate, c.kl_coeff, c.resume, c.optimizer, c.sample_prompts[0])] == [int, float, float, bool, str, str]
    assert DRaFTConfig(sample_prompts="a fox").sample_prompts == ("a fox",)


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match="MB free"):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path), progress=False)
    assert not (tmp_path / "run").exists()


def test_bad_runs(tmp_path):
    model, good = load("tiny", rank=2), config(tmp_path)
    cases = [
        (model, REWARD, [], good, "prompts must hold at least one text"),
        (model, REWARD, PROMPTS, config(tmp_path, grad_steps=5), "grad_steps must lie in 0..4"),
        (load("tiny", adapter=None), REWARD, PROMPTS, good, "something to train"),
        (model, Reward("looks", colour, differentiable=False), PROMPTS, good, "looks is not"),
        (model, Reward("cut", lambda i, p: colour(i.detach(), p)), PROMPTS, good, "cut must carry a gradient"),
        (model, Reward("nan", lambda i, p: colour(i, p) * float("nan")), PROMPTS, good, "reward must be finite; nan gives nan"),
        (model, Reward("one", lambda i, p: colour(i, p).mean()), PROMPTS, good, "one must return one score an image"),
        (model, Reward("rank", lambda i, p: colour(i, p)-colour(i, p).mean()), PROMPTS, config(tmp_path, reward_batch_size=1), "reward_batch_size must be at least batch_size, 2, .* as rank does; got 1"),
        (model, Reward("spread", lambda i, p: colour(i, p)/(colour(i, p).std(correction=0)+.01)), PROMPTS, config(tmp_path, reward_batch_size=1), "as spread does; got 1"),
    ]
    for m, reward, prompts, c, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(m, reward, prompts, c, progress=False)
    assert not (tmp_path / "run").exists()
    from diffusers import UniPCMultistepScheduler
    multi = load("tiny", rank=2)
    multi.pipe.scheduler = UniPCMultistepScheduler.from_config(multi.scheduler.config)
    with pytest.raises(ValueError, match="UniPC"):
        check_run(multi, REWARD, PROMPTS, resolve(good, multi))


def test_a_combination_is_standardised_by_the_base_once_and_logged_by_its_parts(tmp_path):
    from draft_nb.rewards import weighted
    light = Reward("light", lambda images, prompts: 100 * images.mean((1, 2, 3)))
    both = weighted([(1, REWARD), (.5, light)], normalize="base")
    run = fit(load("tiny", rank=2), both, PROMPTS, config(tmp_path, max_steps=2), progress=False)
    stats = yaml.safe_load((run.folder / "config.yaml").read_text())["reward_stats"]
    assert set(stats) == {"colour", "light"} and stats["light"][0] > 10
    for row in run.rows:
        by_hand = (row["reward_colour"] - stats["colour"][0]) / stats["colour"][1] + .5 * (row["reward_light"] - stats["light"][0]) / stats["light"][1]
        assert row["reward"] == pytest.approx(by_hand, abs=1e-4)
    assert read_history(run.folder)[-1]["reward_light"] == pytest.approx(run.rows[-1]["reward_light"])
    again = fit(load("tiny", rank=2), both, PROMPTS, config(tmp_path, max_steps=3, resume=True), progress=False)
    assert yaml.safe_load((again.folder / "config.yaml").read_text())["reward_stats"] == stats


def test_the_end_that_was_asked_for_keeps_what_is_there(tmp_path):
    model, seen = load("tiny", rank=2), []
    run = fit(model, REWARD, PROMPTS, config(tmp_path, max_steps=9), on_step=lambda row: seen.append(row["step"]) or row["step"] == 2, progress=False)
    assert seen == [1, 2] == [r["step"] for r in run.rows] and newest_checkpoint(run.folder, "cpu")["step"] == 2
    assert (run.folder / "pytorch_lora_weights.safetensors").is_file() and "eval_reward" in run.rows[-1]


def test_hacking_is_said_and_ends_the_run_where_that_was_asked_for(tmp_path, capsys):
    spoil = Reward("spoil", lambda images, prompts: -colour(images, prompts))
    run = fit(load("tiny", rank=4), REWARD, PROMPTS, config(tmp_path, max_steps=30, sample_every=3, patience=2, learning_rate=1e-2, kl_coeff=0.), judge=spoil, progress=False)
    assert len(run.rows) < 30 and [r["alarm_judge"] for r in run.rows if "alarm_judge" in r][-2:] == [1, 1]
    said = capsys.readouterr()
    assert "the held-out judge fell" in said.out+said.err and "the run ended after" in said.out+said.err


@pytest.mark.parametrize("reward, kl_coeff, alarm", [("-1*jpeg", 0., 1), ("tiny", None, 0)])
def test_a_fine_pattern_over_everything_raises_an_alarm(tmp_path, capsys, reward, kl_coeff, alarm):
    evaluation = dict(sample_every=20, sample_prompts=("an emoji of a fox", "an emoji of a rocket"), sample_seeds=2)
    c = DRaFTConfig(output_dir=tmp_path / "run", max_steps=20, kl_coeff=kl_coeff, log_with="none", **evaluation)
    run = fit(load("tiny"), load_reward(reward), read_prompts(asset("prompts.txt")), c, progress=False)
    last = read_history(run.folder)[-1]
    assert last["step"] == 20 and last["alarm_texture"] == alarm and last["eval_reward"] > run.before["reward"]
    change = last["eval_texture"] / run.before["texture"]
    assert change > 2 if alarm else .85 < change < 1.2
    said = capsys.readouterr()
    assert ("texture is" in said.out+said.err) == bool(alarm)
    about = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert 0 < last["eval_diversity"] and about["features"] == ("tiny-judge" if alarm else None)
    assert "| texture |" in (run.folder / "README.md").read_text()


def test_diversity_is_seen_by_the_judge_the_reward_or_what_is_embedded(tmp_path):
    model, embedded, blind = load("tiny", adapter=None), load_reward("tiny-judge"), Reward("colour", colour)
    def seen(x): return x.mean((2, 3))
    def diversity_of(reward, **options):
        return evaluate(model, reward, ["a fox", "a rose"], seeds=3, steps=2, weight="base", **options)[0]["diversity"]
    by_default = diversity_of(blind)
    assert by_default == pytest.approx(diversity_of(blind, judge=embedded), abs=1e-5) == pytest.approx(diversity_of(embedded), abs=1e-5)
    assert by_default == pytest.approx(diversity_of(blind, features="tiny-judge"), abs=1e-5)
    own = diversity_of(Reward("colour", colour, features=seen))
    assert own == pytest.approx(diversity_of(embedded, judge=blind, features=seen), abs=1e-5) and abs(own-by_default) > 1e-3
    with pytest.raises(ValueError, match="features must be efficientnet"):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path, features="nothing"), progress=False)
    assert not (tmp_path / "run").exists()


def test_alarms_beside_a_base_without_any():
    base = dict(reward=1., saturation=0., contrast=.2, texture=.01)
    assert alarms(base, base, base) == {}
    found = alarms(base, base, base | dict(saturation=.1, texture=.005))
    assert found == dict(saturation="saturation is 0.1, the base has none", texture="texture is 50% of the base's")
    assert {"eval_texture", "alarm_texture", "eval_contrast", "alarm_contrast"} <= set(COLUMNS)


def test_kl_coeff_is_steered_to_the_target(tmp_path):
    free = fit(load("tiny", rank=4), REWARD, PROMPTS, config(tmp_path / "free", max_steps=8, learning_rate=3e-3, kl_coeff=.01), progress=False)
    far = fit(load("tiny", rank=4), REWARD, PROMPTS, config(tmp_path / "far", max_steps=8, learning_rate=3e-3, kl_coeff=.01, target_kl=free.rows[-1]["kl"] / 100), progress=False)
    assert all(r["kl_coeff"] == .01 for r in free.rows) and far.rows[-1]["kl_coeff"] > far.rows[0]["kl_coeff"]


def test_text_encoders_on_the_cpu_change_nothing(tmp_path):
    weights = []
    for k, options in enumerate(({}, dict(offload_text_encoders=True))):
        model = load("tiny", rank=2)
        fit(model, REWARD, PROMPTS, config(tmp_path / str(k), max_steps=2, **options), progress=False)
        weights.append([p.detach().clone() for p in model.parameters()])
        assert model.parked == bool(options)
    assert_close(*weights, atol=1e-5, rtol=0)
