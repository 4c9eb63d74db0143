"""Installs the lowest version of every direct dependency that settings.ini allows, and tries the package with it.

    python .ci/lowest.py                 a new environment, the installation, the smoke test; the environment is removed
    python .ci/lowest.py --keep FOLDER   the environment is made in FOLDER and stays
    python .ci/lowest.py --torch 2.6.0   with this version of torch, and the torchvision that fits it

On request, not at every change: run it after a change in `requirements`, and write down here what came out.
uv finds the versions (`--resolution lowest-direct`); what those packages need themselves is as new as they allow.
torch and torchvision are those of the Python that runs the script, unless --torch says otherwise: a second build of
torch is a download of gigabytes. The floor of torch in settings.ini is therefore declared, not tested.

Last run: 2026-11-26 on Python 3.11.7, passed, with torch 2.13.0+cpu, torchvision 0.28.0, diffusers 0.42.0,
transformers 5.6.0, peft 0.18.0, accelerate 1.10.0, open_clip_torch 3.3.0, safetensors 0.8.0, huggingface_hub 1.32.0,
filelock 3.16.0, gradio 6.0.0, pydantic 2.11.10, numpy 1.26.0, pandas 2.1.0, pillow 10.0.0, matplotlib 3.8.0, pyyaml 6.0.1, tqdm 4.60.0, tyro 1.0.0.
One step below, seen to fail: transformers 5.5.4 (random text encoder), open_clip_torch 3.2.0, peft 0.17.0.
"""
import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--num_inference_steps", "3", "--device", "cpu"]


def install(folder, torch):
    "The lowest allowed set in a new environment; returns its Python."
    import venv
    venv.create(folder, with_pip=True)
    python = Path(folder)/("Scripts" if os.name=="nt" else "bin")/"python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    asked = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS"), "SSL_CERT_FILE": os.environ.get("PIP_CERT")}
    env = os.environ | {k:v for k,v in asked.items() if v}
    pins = [f"torch=={torch}"] if torch else [f"{name}=={version(name)}" for name in ("torch", "torchvision")]
    command = [python, "-m", "uv", "pip", "install", "--python", python, "--resolution", "lowest-direct", "--editable", ROOT, *pins]
    subprocess.run(command, check=True, env=env)
    return python


def show():
    "The versions of the direct dependencies."
    from configparser import ConfigParser
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    names = [re.match(r"[\w.-]+", r)[0] for r in config["DEFAULT"]["requirements"].split()]
    print(f"Python {sys.version.split()[0]};", ", ".join(f"{name} {version(name)}" for name in names))


def import_all():
    "Every module; those that remake the embedded model need the developer's packages."
    import draft_nb
    for module in pkgutil.iter_modules(draft_nb.__path__):
        if not module.name.startswith(("tiny_", "__")): importlib.import_module(f"draft_nb.{module.name}")


def use_the_command_line(folder):
    "Train, sample, sweep and export; returns the run's folder."
    from draft_nb.cli import main
    run = folder/"run"
    few = ["--max_steps", "2", "--batch_size", "2", "--sample_prompts", "a fox", "a rose", "--sample_seeds", "2"]
    commands = [["train", *RUN, *few, "--output_dir", str(run)],
                ["sample", *RUN, "--lora", str(run), "--prompt", "a fox", "--output_dir", str(folder/"pictures")],
                ["sweep", *RUN, "--run", str(run), "--weights", "base,linear,draft", "--seeds", "2", "--output_dir", str(folder/"sweep")],
                ["export", "--run", str(run), "--format", "kohya"], ["export", "--run", str(run), "--format", "merged"]]
    for argv in commands:
        status = main(argv)
        assert status==0, f"draft-nb {' '.join(argv)}: exit status {status}"
    return run


def carry_a_lora(folder, **options):
    "A LoRA draws the same picture before and after the disk, and in the stock pipeline."
    import torch
    from diffusers import StableDiffusionPipeline

    from draft_nb.models import asset, load
    from draft_nb.sampler import sample
    model = load("tiny", device="cpu", rank=4, **options)
    for k,p in enumerate(model.parameters()): torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(k))
    file = model.save(folder)
    ours = sample(model, ["a fox"], steps=3, seed=0).images
    again = sample(load("tiny", adapter=file, device="cpu"), ["a fox"], steps=3, seed=0).images
    pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
    pipe.load_lora_weights(folder)
    x = model.latents(1, generator=torch.Generator().manual_seed(0))
    theirs = pipe(["a fox"], latents=x, num_inference_steps=3, guidance_scale=1., output_type="pt").images
    for other in again, theirs: torch.testing.assert_close(other, ours, atol=1e-5, rtol=0)


def score():
    "The embedded rewards like a picture of the embedded model better than noise: neither holds random numbers."
    import torch

    from draft_nb.models import load
    from draft_nb.rewards import load_reward
    from draft_nb.sampler import sample
    prompts = ["an emoji of a fox", "an emoji of a red apple"]
    picture = sample(load("tiny", adapter=None, device="cpu"), prompts, steps=10, seed=0).images
    noise = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0))
    for name in "tiny", "tiny-judge":
        reward = load_reward(name, "cpu")
        here, there = reward(picture, prompts).mean().item(), reward(noise, prompts).mean().item()
        print(f"{name}: {here:.2f} for pictures, {there:.2f} for noise")
        assert here>there+3, name


def smoke():
    "What a user does first."
    show()
    import_all()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        use_the_command_line(folder)
        for name,options in dict(plain={}, alpha=dict(alpha=3.), rslora=dict(rslora=True), dora=dict(dora=True)).items():
            carry_a_lora(folder/name, **options)
    score()
    print("The lowest allowed set passes.")


def main():
    parser = argparse.ArgumentParser(description="Install the lowest allowed set of dependencies and run a smoke test.")
    parser.add_argument("--keep", metavar="FOLDER", help="make the environment here, and leave it")
    parser.add_argument("--torch", metavar="VERSION", help="by default that of this Python")
    parser.add_argument("--smoke", action="store_true", help="install nothing: the smoke test alone, with this Python")
    args = parser.parse_args()
    if args.smoke: return smoke()
    with tempfile.TemporaryDirectory() as scratch:
        python = install(args.keep or scratch, args.torch)
        env = {k:v for k,v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        subprocess.run([python, __file__, "--smoke"], check=True, env=env | {"HF_HUB_OFFLINE": "1"}, cwd=scratch)


if __name__=="__main__": main()
