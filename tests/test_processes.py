"""Two processes do what one does with twice the batch, with whole weights and with weights that are dealt out (FSDP).

One `torchrun` of this very file makes all the runs (`worker`), the tests read what it left.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import draft_nb  # noqa: F401  before diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.testing import assert_close

from draft_nb import plots, train
from draft_nb.models import asset, load
from draft_nb.rewards import Reward
from draft_nb.train import DRaFTConfig, deal, fit, newest_checkpoint, picture_generators, read_history

PROMPTS = [f"an emoji of a {w}" for w in ("fox", "rose", "pizza", "ghost", "house", "cat", "tulip", "frog")]
STEPS = 2


def colour(images, prompts):
    r, g, b = (images * 2 - 1).unbind(1)
    return ((r - g).flatten(1).var(1) + ((r + g) / 2 - b).flatten(1).var(1) + 1e-6).sqrt()


REWARD = Reward("colour", colour)
FAST = dict(guidance_scale=2., num_inference_steps=2, grad_steps=2, sample_prompts=PROMPTS[:1], sample_seeds=1, log_with=None, lr_warmup_steps=0, sample_every=99)


def small(adapter="lora"):
    "The embedded model around a network of few layers: every one costs a message between the processes."
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "block_out_channels": (32, 64), "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")})
    return load(pipe, adapter, rank=4, device="cpu")


def flat(model):
    return torch.cat([train.whole(p.detach().clone()).flatten() for p in model.parameters()])


def run(folder, adapter="lora", batch_size=2, max_steps=STEPS, **options):
    "A run; what it was given, what it did, how it ended."
    seen = dict(prompts=[], noise=[], gradients=[], calls={k: 0 for k in ("evaluate", "save_checkpoint", "write_history", "_save_pictures", "_finish_folder", "_begin_folder")})
    originals = {k: getattr(train, k) for k in ("draft_loss", "average_gradients", *seen["calls"])}

    def loss(model, reward, prompts, *, generator, **more):
        seen["prompts"] += prompts
        seen["noise"] += [g.initial_seed() for g in generator]
        return originals["draft_loss"](model, reward, prompts, generator=generator, **more)

    def average(parameters, accelerator):
        originals["average_gradients"](parameters, accelerator)
        if not seen["gradients"]: seen["gradients"].append(torch.cat([train.whole(p.grad).flatten() if p.grad is not None else torch.zeros(p.shape).flatten() for p in parameters]))

    def counted(name):
        def call(*args, **more):
            seen["calls"][name] += 1
            return originals[name](*args, **more)
        return call

    model = small(adapter)
    rate, start = 2e-4 if adapter == "lora" else 3e-5, flat(model)
    config = DRaFTConfig(**{**FAST, "output_dir": str(folder), "batch_size": batch_size, "max_steps": max_steps, "learning_rate": rate, "kl_coeff": .1, **options})
    for name, new in dict(draft_loss=loss, average_gradients=average, **{k: counted(k) for k in seen["calls"]}).items():
        setattr(train, name, new)
    try:
        done = fit(model, REWARD, PROMPTS, config, progress=False)
    finally:
        for name, old in originals.items():
            setattr(train, name, old)
    return dict(seen, start=start, weights=flat(model), rows=done.rows, kind=type(model.network).__name__)


RUNS = dict(
    lora={}, accumulated=dict(gradient_accumulation_steps=2), lora_dealt=dict(sharded=True, gradient_checkpointing=True),
    full_dealt=dict(adapter="full", sharded=True, ema_decay=.5, num_inference_steps=1, grad_steps=1),
)
RESUMED = "lora", "full_dealt"  # stopped after the first step


def worker(folder):
    for name, options in RUNS.items():
        if name != "full_dealt":
            torch.save(run(folder / name, **options), folder / f"{name}-{os.environ['RANK']}.pt")
    for name in RESUMED:
        first = run(folder / f"{name}_resumed", max_steps=1, **RUNS[name])
        seen = run(folder / f"{name}_resumed", resume=True, **RUNS[name])
        seen |= {k: first[k] + seen[k] for k in ("prompts", "noise")} | dict(gradients=first["gradients"])
        torch.save(seen, folder / f"{name}_resumed-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    plots.save_figure = lambda *_: None  # no pictures, they take longer than the training
    worker(Path(sys.argv[1]))
    sys.exit()

import pytest  # noqa: E402  the worker does without


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two(folder):
    "What the two processes say, by run."
    return {path.stem[:-2]: [torch.load(folder / f"{path.stem[:-2]}-{r}.pt", weights_only=True) for r in (0, 1)] for path in folder.glob("*-0.pt")}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The same in this process alone."
    known = {}
    def ask(**options):
        key = str(options)
        if key not in known: known[key] = run(tmp_path_factory.mktemp("one") / "run", **options)
        return known[key]
    return ask


@pytest.mark.parametrize("name, alone", [
    ("lora", dict(batch_size=4)),
    ("lora", dict(batch_size=2, gradient_accumulation_steps=2)),
    ("accumulated", dict(batch_size=4, gradient_accumulation_steps=2)),
    ("lora_dealt", dict(batch_size=4)),
    ("full_dealt_resumed", dict(batch_size=4, adapter="full", ema_decay=.5, num_inference_steps=1, grad_steps=1)),
])
def test_two_processes_train_as_one_with_twice_the_batch(two, one, name, alone):
    one = one(**alone)
    for rank in two[name]:
        gradient, mine = one["gradients"][0], rank["gradients"][0]
        assert gradient.abs().max() > 0 and (gradient - mine).abs().max() <= 1e-5 * gradient.abs().max()
        apart = (rank["weights"] - one["weights"]).abs().max()
        assert apart <= 1e-5 and apart <= .1 * (one["weights"] - one["start"]).abs().max()
    for a, b in zip(two[name][0]["rows"], one["rows"], strict=True):
        assert a["step"] == b["step"]
        assert all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5) for k in ("loss", "reward", "kl", "grad_norm"))


def test_both_processes_hold_the_same_weights(two):
    for name, (a, b) in two.items():
        assert_close(a["weights"], b["weights"], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["lora", "accumulated", "lora_dealt", "full_dealt_resumed"])
def test_prompts_are_dealt_without_overlap_and_every_picture_has_its_own_noise(two, name):
    a, b = two[name]
    n = len(a["prompts"])
    assert n == STEPS * 2 * (2 if name == "accumulated" else 1) == len(b["prompts"])
    dealt = [p for k in range(0, n, 2) for p in a["prompts"][k:k + 2] + b["prompts"][k:k + 2]]
    for k in range(0, len(dealt), len(PROMPTS)):  # an epoch
        assert len({*dealt[k:k + len(PROMPTS)]}) == len(dealt[k:k + len(PROMPTS)])
    assert len({*a["noise"], *b["noise"]}) == 2 * n


def test_noise_is_a_function_of_seed_step_and_process():
    "So a checkpoint needs no random state."
    def noise(seed, position):
        torch.rand(3)  # the global state does not matter
        return torch.stack([torch.randn(4, generator=g) for g in picture_generators(seed, position, 2)])
    assert torch.equal(noise(0, 5), noise(0, 5))
    rows = torch.cat([noise(seed, position) for seed in (0, 1) for position in range(4)])
    assert len(rows.unique(dim=0)) == len(rows)
    assert torch.equal(torch.cat([noise(0, 2), noise(0, 3)]), torch.stack([torch.randn(4, generator=g) for g in picture_generators(0, 1, 4)]))
    assert deal(PROMPTS, 1, 4, 0) == deal(PROMPTS, 2, 2, 0) + deal(PROMPTS, 3, 2, 0)


def test_files_are_written_once(two, folder):
    for name, (a, b) in two.items():
        files = {k: v for k, v in b["calls"].items() if k != "evaluate"}
        assert not any(files.values()), (name, files)
        assert all(a["calls"].values()), name
        assert b["calls"]["evaluate"] == (a["calls"]["evaluate"] if "dealt" in name else 0), name  # where weights are dealt out all must help
        assert [r["step"] for r in read_history(folder / name)] == [1, 2]


def test_two_processes_resume_exactly(two):
    for whole, resumed in zip(two["lora"], two["lora_resumed"]):
        assert_close(resumed["weights"], whole["weights"], atol=1e-5, rtol=0)


def test_weights_that_are_dealt_out_leave_whole_files(two, folder):
    assert two["full_dealt_resumed"][0]["kind"] == "FSDPUNet2DConditionModel"
    lora = small(folder / "lora_dealt")
    assert torch.equal(torch.cat([p.flatten() for p in lora.parameters()]), two["lora_dealt"][0]["weights"])
    pipe = StableDiffusionPipeline.from_pretrained(folder / "full_dealt_resumed")
    assert json.loads((folder / "full_dealt_resumed/unet/config.json").read_text())["_class_name"] == type(pipe.unet).__name__ == "UNet2DConditionModel"
    state = newest_checkpoint(folder / "full_dealt_resumed", "cpu")
    assert state["processes"] == 2 and all(type(v) is torch.Tensor for v in state["parameters"] + state["average"])
    assert torch.equal(torch.cat([p.flatten() for p in state["parameters"]]), two["full_dealt_resumed"][0]["weights"])
    assert torch.equal(torch.cat([p.flatten() for p in pipe.unet.parameters()]), torch.cat([p.flatten() for p in state["average"]]))  # the average is what is kept


def test_another_number_of_processes_is_refused(folder):
    with pytest.raises(ValueError, match="must keep its number of processes, 2; got 1"):
        run(folder / "lora", max_steps=3, resume=True)


def test_one_process_has_nobody_to_deal_to(tmp_path):
    with pytest.raises(ValueError, match="sharded needs at least two processes"):
        run(tmp_path / "run", sharded=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [dict(optimizer="adamw8bit"), dict(mixed_precision="fp16")])
def test_what_fsdp_does_not_go_with_is_refused(options):
    with pytest.raises(ValueError, match="sharded goes with"):
        train._check_processes(DRaFTConfig(sharded=True, **options), 2)
