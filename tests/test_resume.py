"""A run that is killed at any moment and started again ends as if nothing had happened.

One process imports everything and forks a child for every attempt: a kill costs a fraction of a second, so there can be many.
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import draft_nb  # noqa: F401  before diffusers
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from draft_nb import plots, train
from draft_nb.models import load
from draft_nb.rewards import Reward
from draft_nb.train import DRaFTConfig, checkpoints, fit, newest_checkpoint, read_history

PROMPTS = ["an emoji of a fox", "an emoji of a rose", "an emoji of a pizza"]
STEPS = 6
WHERE = "half of a checkpoint", "a checkpoint not renamed", "after a checkpoint", "half of the history", "half of the LoRA"


def colour(images, prompts):
    r, g, b = (images * 2 - 1).unbind(1)
    return ((r - g).flatten(1).var(1) + ((r + g) / 2 - b).flatten(1).var(1) + 1e-6).sqrt()


def attempt(folder):
    "The run, or what is left of it; everything random is switched on."
    model = load("tiny", rank=2, device="cpu")
    config = DRaFTConfig(output_dir=str(folder), max_steps=STEPS, batch_size=1, num_inference_steps=2, estimator="random_k", grad_steps=2, eta=1., ema_decay=.5,
                         target_kl=.01, checkpoint_every=1, sample_every=3, sample_prompts=PROMPTS[:1], sample_seeds=1, log_with=None, resume=True)
    fit(model, Reward("colour", colour), PROMPTS, config, progress=False)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(where, step):
    "Be killed in the midst of writing."
    save, rows, replace, whole = torch.save, train.write_history, Path.replace, train.save_checkpoint
    def cut(state, path):
        save(state, path)
        if state["step"] == step:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    def unnamed(self, target):
        if target.name == f"step_{step:06d}.pt": die()
        return replace(self, target)
    def after(folder, state, keep):
        whole(folder, state, keep)
        if state["step"] == step: die()
    def history(folder, table):
        if len(table) == step:
            (folder / "history.csv.part").write_text("step,lo")
            die()
        rows(folder, table)
    def lora(self, folder, **_):
        (Path(folder) / "pytorch_lora_weights.safetensors").write_bytes(b"cut short")
        die()
    if where == WHERE[0]: torch.save = cut
    if where == WHERE[1]: Path.replace = unnamed
    if where == WHERE[2]: train.save_checkpoint = after
    if where == WHERE[3]: train.write_history = history
    if where == WHERE[4]: __import__("draft_nb.models").models.Model.save = lora


def forked(folder, where=None, step=0):
    "A child that makes an attempt; its number."
    child = os.fork()
    if child: return child
    status = 1
    try:
        if where: die_at(where, step)
        attempt(folder)
        status = 0
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def worker(folder):
    torch.set_num_threads(1)
    plots.save_figure = lambda *_: None  # pictures take longer than the training
    began = time.perf_counter()
    assert ended(forked(folder / "whole")) == 0
    long = time.perf_counter() - began
    for k, where in enumerate(WHERE):
        child = forked(folder / "killed", where, k + 2)
        assert ended(child) == -signal.SIGKILL, where
        print(where, [p.name for p in checkpoints(folder / "killed")])
    for seed in (0, 1):
        r, kills = random.Random(seed), 0
        for _ in range(40):
            child = forked(folder / f"random{seed}")
            if kills < 6:
                time.sleep(r.uniform(.1, .8) * long)
                os.kill(child, signal.SIGKILL)
                kills += 1
            if ended(child) == 0: break
        print("random", seed, kills)
    assert ended(forked(folder / "killed")) == 0


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    sys.exit()

import pytest  # noqa: E402  the worker does without


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return folder


@pytest.mark.parametrize("name", ["killed", "random0", "random1"])
def test_a_killed_run_ends_as_if_it_had_not_been(folder, name):
    whole, killed = newest_checkpoint(folder / "whole", "cpu"), newest_checkpoint(folder / name, "cpu")
    assert whole["step"] == killed["step"] == STEPS
    for part in ("parameters", "average"):
        assert_close(killed[part], whole[part], atol=1e-5, rtol=0)  # another process
    for k, state in whole["optimizer"]["state"].items():
        for n, v in state.items(): assert (killed["optimizer"]["state"][k][n] - v).abs().max() <= 1e-3 * v.abs().max(), (k, n)
    assert whole["schedule"] == killed["schedule"] and whole["kl_coeff"] == pytest.approx(killed["kl_coeff"]) and whole["kl_coeff"] != 3
    assert whole["parameters"][0].abs().max() > 0
    files = [load_file(folder / n / "pytorch_lora_weights.safetensors") for n in ("whole", name)]
    assert_close(files[1], files[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["killed", "random0", "random1"])
def test_the_history_is_complete_without_duplicates(folder, name):
    whole, killed = ([{k: v for k, v in r.items() if k != "seconds"} for r in read_history(folder / n)] for n in ("whole", name))
    assert [r["step"] for r in killed] == list(range(1, STEPS + 1))
    for a, b in zip(killed, whole, strict=True): assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    assert [r["step"] for r in killed if "eval_reward" in r] == [3, STEPS]


def test_the_run_was_killed_where_it_hurts(folder):
    "The newest checkpoints are kept, and no half of one is left under its name."
    for name in ("whole", "killed", "random0", "random1"):
        kept = checkpoints(folder / name)
        assert [p.name for p in kept] == ["step_000005.pt", "step_000006.pt"]
        for path in kept: torch.load(path, weights_only=True)
