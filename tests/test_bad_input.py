"What a user can do wrong ends in one line on stderr that names the parameter, status 2, nothing written; no traceback."
import errno
import io
import json
import os
import resource
import shlex
import shutil
import signal
import stat
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from draft_nb import cli, export, train
from draft_nb.cli import COMMANDS, check_output, main, one_line, verdict
from draft_nb.models import asset, check_device, load
from draft_nb.train import about_run, markdown, model_card, read_history, write_aside

JUNK = bytes(range(256)) * 8
ABOUT = dict(model="tiny", reward="tiny", max_steps=80, sample_prompts=["a fox", "a rose"])
HISTORY = b"step,loss,kl,skipped\r\n1,0.5,0.1,0\r\n2,0.25,0.2,0\r\n"


def copied(source, folder):
    "A copy whose files are links: a model weighs nothing."
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def put(file, data):
    "Write a file anew, so that what it was linked with stays as it is."
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with every kind of wrong file, model and run."
    p = tmp_path_factory.mktemp("place")
    for ending in ("txt", "csv", "json", "jsonl", "parquet", "tar", "safetensors", "yaml"):
        put(p / f"empty.{ending}", b"")
        put(p / f"binary.{ending}", JUNK)
    texts = {"text.txt": "hello\n", "text.safetensors": "hello\n", "good.txt": "a fox\na rose\n", "twice.txt": "a fox\na fox\n", "blank.txt": "\n \n", "good.csv": "id,prompt\n1,a fox\n",
             "cut.json": '["a fox", "a r', "one.json": '{"a": 1}', "numbers.json": "[1, 2]", "list.yaml": "- 3\n", "broken.yaml": "a: [", "word.yaml": "hello\n", "nested.yaml": "max_steps: {a: 3}\n",
             "unknown.yaml": "max_step: 3\n", "tag.yaml": "max_steps: !!python/object:os.system {}\n", "typed.yaml": "max_steps: many\n", "good.yaml": "max_steps: 2\n", "a'\".txt": "", "🦊.txt": "",
             "badjson/config.json": "{", "vit/config.json": '{"model_type": "dinov2"}', "vit/model.safetensors": JUNK, "other/config.json": '{"model_type": "bert"}',
             "sweeps/json/sweep.json": "{", "sweeps/csv/sweep.csv": "a,b\n", "sweeps/list/sweep.json": "[]", "sweeps/empty/sweep.json": "", "benches/list/bench.json": "[]", "benches/broken/bench.json": "{",
             "benches/binary/bench.json": JUNK, "latin.txt": b"caf\xe9\xff\n"}
    for name, text in texts.items():
        put(p / name, text)
    for name in ("folder", "folder.safetensors", "benches/folder/bench.json"):
        (p / name).mkdir(parents=True)
    os.symlink("loop", p / "loop")
    os.symlink("gone", p / "dangling")
    os.mkfifo(p / "fifo")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for k in range(9):
            member = tarfile.TarInfo(f"{k}.txt")
            member.size = 3000
            archive.addfile(member, io.BytesIO(torch.randint(65, 90, (3000,), generator=torch.Generator().manual_seed(k), dtype=torch.uint8).numpy().tobytes()))
    put(p / "cut.tar.gz", packed.getvalue()[:len(packed.getvalue()) // 2])
    tuned = (asset("tiny-aligned") / "pytorch_lora_weights.safetensors").read_bytes()
    put(p / "cut.safetensors", tuned[:len(tuned) // 2])
    save_file({"x": torch.zeros(2)}, p / "other.safetensors")
    models(p)
    runs(p / "runs", tuned)
    return p


def models(p):
    "Copies of the embedded model and reward, each with something wrong."
    index = json.loads((asset("tiny") / "model_index.json").read_text())
    unet = next((asset("tiny") / "unet").glob("*.safetensors")).name
    for name, file, data in [
        ("empty", "model_index.json", ""), ("list", "model_index.json", "[1]"), ("word", "model_index.json", "hello"), ("unknown", "model_index.json", json.dumps(index | {"_class_name": "NoSuchPipeline"})),
        ("noclass", "model_index.json", json.dumps({k: v for k, v in index.items() if k != "_class_name"})), ("weird", "model_index.json", json.dumps(index | {"unet": ["diffusers", "Nope"]})),
        ("cut", f"unet/{unet}", JUNK), ("zero", f"unet/{unet}", b""), ("badjson", "unet/config.json", "{"),
    ]:
        put(copied(asset("tiny"), p / f"model_{name}") / file, data)
    shutil.rmtree(copied(asset("tiny"), p / "model_missing") / "unet")
    for name, text in [("bad", "{"), ("list", "[]"), ("nocfg", "{}")]:
        put(copied(asset("rewards") / "tiny", p / f"reward_{name}") / "open_clip_config.json", text)


def runs(folder, tuned):
    "Run folders, each with something wrong."
    def config(**changed):
        return yaml.safe_dump({k: v for k, v in (ABOUT | changed).items() if v is not None})
    configs = {"good": config(), "config_empty": "", "config_list": "- 1\n", "config_word": "hello", "config_nomodel": config(model=None), "config_noreward": config(reward=None), "config_broken": "a: [",
               "config_binary": JUNK, "config_latin": "model: caf\xe9".encode("latin1"), "config_deep": "[" * 5000, "model_number": config(model=3), "model_list": config(model=["tiny"]),
               "model_gone": config(model="no/where"), "reward_number": config(reward=3), "reward_list": config(reward=["tiny"]), "reward_gone": config(reward="beauty"),
               "prompts_word": config(sample_prompts="a fox"), "prompts_numbers": config(sample_prompts=[1, 2]), "prompts_twice": config(sample_prompts=["a fox", "a fox"])}
    for name, text in configs.items():
        put(folder / name / "config.yaml", text)
        put(folder / name / "pytorch_lora_weights.safetensors", tuned)
    for name, lora in {"unfinished": None, "cut": tuned[:9999], "empty": b"", "text": b"hello", "zeros": bytes(9999)}.items():
        put(folder / name / "config.yaml", config())
        if lora is not None:
            put(folder / name / "pytorch_lora_weights.safetensors", lora)
    (folder / "config_folder" / "config.yaml").mkdir(parents=True)
    put(folder / "config_folder" / "pytorch_lora_weights.safetensors", tuned)
    put(copied(asset("tiny"), folder / "whole_cut") / "config.yaml", config())
    put(next((folder / "whole_cut" / "unet").glob("*.safetensors")), JUNK)
    histories = {"cut": HISTORY[:-5], "fields": HISTORY[:-9] + b"\r\n", "binary": JUNK, "words": HISTORY.replace(b"\n2,", b"\ntwo,"), "empty": b"", "header": HISTORY.split(b"\n", 1)[1]}
    for name, data in histories.items():
        put(folder / f"history_{name}" / "config.yaml", config())
        put(folder / f"history_{name}" / "history.csv", data)


NUMBERS = ["max_steps", "batch_size", "gradient_accumulation_steps", "num_inference_steps", "grad_steps", "lv_samples", "reward_batch_size", "checkpoint_every", "keep_checkpoints", "sample_every",
           "sample_seeds", "patience"]
FRACTIONS = ["guidance_scale", "eta", "stop_within", "kl_coeff", "target_kl", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "ema_decay", "diversity_floor", "drift"]
NAMES = ["estimator", "kl_reduction", "kl_on", "optimizer", "mixed_precision", "prefix", "lr_scheduler", "base_dtype", "dtype", "device", "base_device", "reward", "judge", "log_with"]
PROMPTS = ["nowhere.txt", "empty.txt", "binary.txt", "folder", "loop", "dangling", "latin.txt", "blank.txt", "fifo", "/dev/null", "/dev/full", "🦊.txt", "empty.csv", "empty.json", "empty.jsonl", "cut.json",
           "one.json", "numbers.json", "binary.csv", "binary.json", "binary.jsonl", "binary.tar", "empty.tar", "text.txt/x", "a\nb.txt"]
OUTPUTS = ["text.txt", "text.txt/x", "loop", "loop/x", "/dev/full", "/dev/null/x", "/proc/nope", "dangling/x", "fifo", "''", "x" * 300, "folder/" + "x" * 300]
MODELS = ["nowhere", "a/b/c", "''", "folder", "text.txt", "loop", "dangling", "nowhere.safetensors", "empty.safetensors", "binary.safetensors", "folder.safetensors", "http://x/y", "../x", "'owner/na me'", "owner/name",
          *(f"model_{n}" for n in ("empty", "list", "word", "unknown", "noclass", "weird", "cut", "zero", "badjson", "missing"))]
RUNS = ["config_empty", "config_list", "config_word", "config_nomodel", "config_broken", "config_binary", "config_latin", "config_deep", "config_folder", "model_number", "model_list", "model_gone"]

TABLE = """
'' => unknown command
dance => unknown command
--train => unknown command
Train => unknown command
-x => unknown command
'tra\nin' => unknown command
🦊 => unknown command
train --lr_scheduler piecewise_constant => lr_scheduler must be one of
train --lr_scheduler Cosine => lr_scheduler
train --device cudaa => device must be one that is there
train --device cuda:-1 => device
train --device cuda:99 => device
train --device cuda:x => device
train --device meta => device
train --device cpu:99 => device
train --device CPU => device
train --device 0 => device
train --adapter full --base_device cudaa => base_device
train --adapter full --base_device meta => base_device
train --adapter full --rank 4 => rank
train --adapter full --rslora => rslora
train --targets nothing => targets
train --targets , => targets
train --rank many => rank
train --rank 0 => rank
train --rank 99999999999 => rank
train --alpha much => alpha
train --seed -1 => seed
train --seed 99999999999999999999999 => seed
train --grad_steps 11 => grad_steps
train --guidance_interval 0.5 => guidance_interval
train --guidance_interval 0.8 0.2 => guidance_interval
train --guidance_interval a b => guidance_interval
train --guidance_interval 0 2 => guidance_interval
train --resume=maybe => resume
train --resume= => resume
train --no_resum => no_resum
train --max_steps 3 --max_steps => max_steps
train --max_steps 3 4 => '4'
train --max_steps=3=4 => max_steps
train -- => '--'
train - => '-'
train ---max_steps 3 => max_steps
train --run x => run
train --output-dirr x => output_dir
train --max_step 3 => max_steps
train --sharded => sharded
train --optimizer adamw8bit => optimizer
train --mixed_precision fp16 --reward_batch_size 2 => reward_batch_size
train --estimator refl --stop_within 0 => stop_within
train --prompts good.csv --prompt_column nope => prompt_column
train --prompts good.txt --prompt_column x => prompt_column
train --prompt_column x => prompt_column
train --model owner/name => prompts
train --normalize twice => normalize
train --config nowhere.yaml => config
train --config empty.yaml --config nowhere.yaml => config
train --config binary.yaml => config
train --config folder => config
train --config loop => config
train --config dangling => config
train --config fifo => config
train --config /dev/zero => config
train --config list.yaml => config
train --config broken.yaml => config
train --config word.yaml => config
train --config tag.yaml => config
train --config latin.txt => config
train --config '' => config
train --config => config
train --config nested.yaml => max_steps
train --config unknown.yaml => max_step
train --config typed.yaml => max_steps
train --reward '' => reward
train --reward beauty => reward
train --reward 'tiny +' => reward
train --reward x*tiny => reward
train --reward nan*tiny => reward
train --reward inf*tiny => reward
train --reward tiny@ => reward
train --reward tiny@nowhere => reward
train --reward tiny@folder => reward
train --reward @ => reward
train --reward pickscore@folder => reward
train --reward pickscore@binary.safetensors => reward
train --reward hpsv2@empty.txt => reward
train --reward clip:nope/x => reward
train --reward reward_bad => reward
train --reward reward_list => reward
train --reward reward_nocfg => reward
train --judge beauty => judge
train --judge tiny@nowhere => judge
train --output_dir runs/good => output_dir
train --output_dir runs/config_list --resume => config
train --output_dir runs/config_empty --resume => config
train --output_dir runs/config_broken --resume => config
train --output_dir runs/history_cut --resume => history
train --output_dir runs/history_fields --resume => history
train --output_dir runs/history_binary --resume => history
train --output_dir runs/history_words --resume => history
train --output_dir runs/history_empty --resume => history
train --output_dir runs/history_header --resume => history
train --adapter nowhere.safetensors => adapter
train --adapter cut.safetensors => adapter
train --adapter other.safetensors => adapter
train --adapter runs/text => adapter
sample => prompt
sample --prompt => prompt
sample --prompt '' => prompt
sample --prompt a b => 'b'
sample --prompts fox => prompts
sample --prompt fox --weight cubic => weight
sample --prompt fox --weight linear => weight
sample --prompt fox --weight recommended => weight
sample --prompt fox --lora runs/good --weight '' => weight
sample --prompt fox --lora runs/good --weight power_ => weight
sample --prompt fox --lora runs/good --weight power_0 => power
sample --prompt fox --lora runs/good --weight power_inf => power
sample --prompt fox --lora runs/good --weight step_2 => step
sample --prompt fox --lora runs/good --weight constant_x => constant
sample --prompt fox --lora runs/cut => lora
sample --prompt fox --lora runs/empty => lora
sample --prompt fox --lora runs/unfinished => lora
sample --prompt fox --lora folder => lora
sample --prompt fox --lora loop => lora
sample --prompt fox --lora nowhere.safetensors => lora
sample --prompt fox --lora binary.safetensors => lora
sample --prompt fox --lora other.safetensors => lora
sample --prompt fox --num_images 0 => num_images
sample --prompt fox --num_images two => num_images
sample --prompt fox --num_images 99999999999999 => num_images
sample --prompt fox --num_inference_steps 0 => num_inference_steps
sample --prompt fox --num_inference_steps 5000 => num_inference_steps
sample --prompt fox --guidance_scale nan => guidance_scale
sample --prompt fox --guidance_scale inf => guidance_scale
sample --prompt fox --seed -1 => seed
sample --prompt fox --seed 99999999999999999999999 => seed
sample --prompt fox --seed 1e3 => seed
sample --prompt fox --device cudaa => device
sample --prompt fox --device '' => device
sample --prompt fox --loora x => lora
sweep => run
sweep --run => run
sweep --run '' => run
sweep --run nowhere => run
sweep --run folder => run
sweep --run loop => run
sweep --run binary.safetensors --model tiny --reward tiny => run
sweep --run runs/cut => run
sweep --run runs/empty => run
sweep --run runs/unfinished => run
sweep --run runs/config_noreward => reward
sweep --run runs/reward_number => reward
sweep --run runs/reward_list => reward
sweep --run runs/reward_gone => reward
sweep --run runs/prompts_word => prompts
sweep --run runs/prompts_numbers => prompts
sweep --run runs/prompts_twice => prompts
sweep --run runs/good --weights linear => weights
sweep --run runs/good --weights , => weights
sweep --run runs/good --weights base,cubic => weight
sweep --run runs/good --weights base,base => weights
sweep --run runs/good --weights base,power_-1 => power
sweep --run runs/good --scales x => scales
sweep --run runs/good --scales 0 => scales
sweep --run runs/good --scales nan => scales
sweep --run runs/good --seeds 1 => seeds
sweep --run runs/good --seeds 2.5 => seeds
sweep --run runs/good --seeds 99999999999999 => seeds
sweep --run runs/good --prompts nowhere.txt => prompts
sweep --run runs/good --prompts twice.txt => prompts
sweep --run runs/good --prompt_column x => prompt_column
sweep --run runs/good --reward beauty => reward
sweep --run runs/good --judge beauty => judge
sweep --run runs/good --judge tiny => judge
sweep --run runs/good --features nonsense => features
sweep --run runs/good --features jpeg => features
sweep --run runs/good --features dino: => features
sweep --run runs/good --features dino:folder => features
sweep --run runs/good --features dino:badjson => features
sweep --run runs/good --features dino:other => features
sweep --run runs/good --features dino:vit => features
sweep --run runs/good --keep 2 => keep
sweep --run runs/good --keep nan => keep
sweep --run runs/good --num_inference_steps 0 => num_inference_steps
sweep --run runs/good --guidance_scale nan => guidance_scale
sweep --run runs/good --chunk 0 => chunk
sweep --run runs/good --device cudaa => device
sweep --run runs/good --wieghts x => weights
sweep --run runs/good --output_dir sweeps/json => sweep.json
sweep --run runs/good --output_dir sweeps/empty => sweep.json
sweep --run runs/good --output_dir sweeps/csv => sweep.json
sweep --run runs/good --output_dir sweeps/list => sweep
export => run
export --run => run
export --run '' => run
export --run nowhere => run
export --run folder => run
export --run text.txt => run
export --run / => run
export --run loop => run
export --run runs/unfinished => run
export --run runs/cut => run
export --run runs/empty => run
export --run runs/zeros => run
export --run runs/whole_cut => model
export --run runs/good --format onnx => format
export --run runs/good --format '' => format
export --run runs/good --format Diffusers => format
export --run runs/good --format merged --output_dir x.safetensors => format
export --run runs/good --output_dir folder.safetensors => output_dir
export --run runs/good --push_to_hub 'no name' => push_to_hub
export --run runs/good --push_to_hub '' => push_to_hub
export --run runs/good --push_to_hub a/b/c => push_to_hub
export --run runs/good --private=perhaps => private
export --run runs/good --titel x => title
app --run nowhere => run
app --run text.txt => run
app --run loop => run
app --run '' => run
app --run runs/config_list => config
app --run runs/model_gone => run
app --port x => port
app --port 0 => port
app --port 65536 => port
app --port 1.5 => port
app --prot 7860 => port
app fox => 'fox'
bench --minimal --what speed => what
bench --minimal --what , => what
bench --minimal --what peer => peer
bench --minimal --what peer --peer text.txt => peer
bench --minimal --model sdxl => model
bench --minimal --device cudaa => device
bench --minimal --device cuda:99 => device
bench --minimal --rounds 0 => rounds
bench --minimal --rounds x => rounds
bench --minimal --output_dir benches/list => bench.json
bench --minimal --output_dir benches/broken => bench.json
bench --minimal --output_dir benches/binary => bench.json
bench --minimal --output_dir benches/folder => bench.json
bench --minimal=maybe => minimal
""".replace("tra\nin", "tra\\nin")

CASES = [tuple(line.rsplit(" => ", 1)) for line in TABLE.strip().splitlines()]
CASES += [(f"train --{f} {v}", f) for f in NUMBERS for v in ("many", "2.5", "''", "0", "-3")]
CASES += [(f"train --{f} {v}", f) for f in FRACTIONS for v in ("much", "nan", "-1", "''")]
CASES += [(f"train --{f}", f) for f in [*NUMBERS, *FRACTIONS, *NAMES]]
CASES += [(f"train --{f} {v}", f) for f in NAMES for v in ("nonsense", "''")]
CASES += [(f"train --prompts {shlex.quote(f)}", "prompts") for f in PROMPTS]
CASES += [(f"{c} --output_dir {f}", "output_dir") for c in ("train", "sample --prompt fox", "sweep --run runs/good", "export --run runs/good", "bench --minimal") for f in OUTPUTS]
CASES += [(f"sample --prompt fox --model {m}", "model") for m in MODELS]
CASES += [(f"{c} --run runs/{r}", r.partition("_")[0]) for c in ("sweep", "export") for r in RUNS]


def state(folder):
    "Every name with its mode, and of files size and time, links not followed."
    found = {str(p.relative_to(folder)): p.lstat() for p in folder.rglob("*")}
    return {k: (s.st_mode,) if stat.S_ISDIR(s.st_mode) else (s.st_mode, s.st_mtime_ns, s.st_size) for k, s in found.items()}


@pytest.mark.parametrize("words, said", CASES, ids=lambda v: v[:70].encode("ascii", "backslashreplace").decode())
def test_one_line_status_2_and_nothing_written(words, said, place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    before = state(place)
    status = main(shlex.split(words))
    out, err = capfd.readouterr()
    counted = [line for line in out.splitlines() if line.startswith("prompts: ")]  # how many were read is said before what fails later
    assert (status, out.splitlines()) == (2, counted[:1]), err
    assert len(err.splitlines()) == 1 and err.startswith("draft-nb") and "Traceback" not in err, err
    assert said.replace("-", "_") in err.replace("-", "_"), err
    assert state(place) == before


def test_the_table_is_long():
    assert len(CASES) >= 400 and {w.split()[0] for w, _ in CASES} >= set(COMMANDS)


def test_a_port_that_is_taken(capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["app", "--port", str(port)]) == 2
    assert capfd.readouterr().err.startswith(f"draft-nb app: port must be free; {port}: ")


@pytest.mark.parametrize("name, data, said", [("list", [1, 2], "holds a list"), ("words", {"a": 1}, "has no step"), ("less", {"step": 1}, "processes is missing"), ("other", None, "differ in number or shape")])
def test_a_checkpoint_that_is_none(tmp_path, capfd, name, data, said):
    command = ["train", "--max_steps", "1", "--num_inference_steps", "2", "--batch_size", "1", "--rank", "2", "--sample_prompts", "a fox", "--sample_seeds", "1", "--judge", "none", "--log_with", "none",
               "--output_dir", str(tmp_path / "run")]
    assert main(command) == 0
    file = train.checkpoints(tmp_path / "run")[-1]
    kept = torch.load(file, weights_only=True)
    torch.save(kept | dict(parameters=kept["parameters"][:3]) if data is None else data, file)
    capfd.readouterr()
    assert main([*command, "--resume"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "checkpoint must hold" in err and said in err


def test_offline_nothing_is_exported_for_the_hub(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = state(place)
    for offline, token, said in [(True, "t", "HF_HUB_OFFLINE is set"), (False, None, "needs a token")]:
        monkeypatch.setattr(export.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(export, "get_token", lambda: token)  # noqa: B023  called at once
        assert main(["export", "--run", "runs/good", "--push_to_hub", "owner/name"]) == 2
        err = capfd.readouterr().err
        assert "push_to_hub" in err and said in err and len(err.splitlines()) == 1
    assert state(place) == before


def test_a_hub_that_refuses(place, tmp_path, monkeypatch, capfd):
    class Hub:
        def __init__(self, token=None):
            pass

        def whoami(self):
            return dict(name="me")

        def create_repo(self, *_, **__):
            raise export.HTTPError("403 Forbidden:\nno rights")

    monkeypatch.setattr(export.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(export, "get_token", lambda: "t")
    monkeypatch.setattr(export, "HfApi", Hub)
    assert main(["export", "--run", str(place / "runs" / "good"), "--output_dir", str(tmp_path / "out"), "--push_to_hub", "owner/name"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "push_to_hub must be a repository" in err and "403 Forbidden" in err and str(tmp_path / "out") in err
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


# what an exception becomes

@pytest.mark.parametrize("error, status, said", [
    (ValueError("eta must be\nin [0,1]; got \x1b[31m3"), 2, r"eta must be in [0,1]; got \x1b[31m3"), (ValueError(), 2, "ValueError"), (SafetensorError("no space"), 2, "no space"),
    (FileNotFoundError(errno.ENOENT, "No such file", "/there/x/y"), 2, "output_dir must be a file or a folder that can be used; /there/x/y: No such file"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "output_dir must be on a disk with room; /there: No space left on device"), (ConnectionError("offline"), 2, "offline"),
    (MemoryError(), 2, "memory must suffice"), (torch.OutOfMemoryError("CUDA out of memory"), 2, "CUDA out of memory"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "batch_size"),
    (KeyboardInterrupt(), 130, "interrupted"), (KeyboardInterrupt("go on with --resume"), 130, "interrupted; go on with --resume"), (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    *[(e, 1, f"this is a fault in draft_nb: {type(e).__name__}: ") for e in (TypeError("x"), AttributeError("x"), KeyError("x"), IndexError("x"), RuntimeError("shapes"), AssertionError("x"), ImportError("x"))],
])
def test_verdict(error, status, said):
    got = verdict(error, cli.Sample(output_dir="/there"))
    assert got[0] == status and got[1].startswith(said) if status == 1 else said in got[1]
    assert "\n" not in got[1] and (status != 1 or got[1].endswith("DRAFT_NB_DEBUG=1 shows where"))


def test_debug_shows_the_traceback(monkeypatch, capfd):
    monkeypatch.setenv("DRAFT_NB_DEBUG", "1")
    assert main(["sample"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == 'draft-nb sample: prompt must be given: --prompt "an emoji of a fox"'


def test_one_line_keeps_names_and_hides_commands():
    assert one_line("a\n\tb  c") == "a b c" and one_line("füchse 🦊") == "füchse 🦊" and one_line("\x07\udcff") == "\\x07\\udcff"
    assert len(one_line("x" * 5000)) == 1000


def test_an_interrupt_that_a_library_turned_into_something_else(monkeypatch, capfd):
    def work(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    monkeypatch.setitem(COMMANDS, "app", replace(COMMANDS["app"], work=work))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["app"]) == 130 and capfd.readouterr().err == "draft-nb app: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_folder_is_tried_without_a_trace(tmp_path):
    check_output("output_dir", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    for folder in (tmp_path / "f" / "x", tmp_path / "f"):
        (tmp_path / "f").write_text("")
        with pytest.raises(ValueError, match="output_dir must be a folder"):
            check_output("output_dir", folder)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    for error in (RuntimeError("PytorchStreamWriter failed"), SafetensorError("I/O error"), OSError(errno.ENOSPC, "No space left")):
        def write(path, error=error):
            path.write_text("half")
            raise error
        with pytest.raises(OSError):
            write_aside(tmp_path / "a", write)
        assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_devices():
    assert check_device("cpu").type == "cpu"
    for name in ("cudaa", "", "meta", "cpu:1", "cuda:77", "xla"):
        with pytest.raises(ValueError, match="device must be one that is there, cpu"):
            check_device(name)


def test_a_history_is_read_whole_or_not_at_all(tmp_path):
    assert read_history(tmp_path) == []
    (tmp_path / "history.csv").write_bytes(HISTORY)
    assert read_history(tmp_path) == [dict(step=1, loss=.5, kl=.1, skipped=0), dict(step=2, loss=.25, kl=.2, skipped=0)]
    for cut in range(len(HISTORY) - 1):
        (tmp_path / "history.csv").write_bytes(HISTORY[:cut])
        if HISTORY[:cut].endswith(b"\n"):
            assert read_history(tmp_path) == read_history(tmp_path)[:cut // 10]
        else:
            with pytest.raises(ValueError, match="history.csv must"):
                read_history(tmp_path)


def test_what_a_run_says_of_itself(tmp_path):
    assert about_run(tmp_path) == {}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(ABOUT))
    assert about_run(tmp_path) == ABOUT


# the card

@pytest.mark.parametrize("name", ["a: b", "[x]", "- y", "no", "3", "'q\" <b>*_`|", "line\nbreak: true\n---", "ü🦊", "#x", "x" * 300])
def test_a_card_holds_any_name(name):
    model, reward = load("tiny"), type("R", (), dict(name=name))()
    model.name = name
    config = train.resolve(train.DRaFTConfig(max_steps=1, sample_prompts=("a",)), model)
    card = model_card(model, reward, config, dict(reward=1.), dict(reward=2.))
    _, front, body = card.split("---\n", 2) if "---" not in name else (None, *card[4:].split("\n---\n", 1))
    assert yaml.safe_load(front) == dict(base_model=name, library_name="diffusers", tags=["text-to-image", "lora", "draft_nb"])
    title = body.splitlines()[0]
    assert title == f"# {markdown(name)} aligned with {markdown(name)}"
    plain = title.replace("\\\\", "\0")
    for mark in "*_`<>|[]":
        assert plain.count(mark) == plain.count("\\" + mark), mark


# real processes

def ran(*argv, shell=None, **options):
    "The command as a shell starts it."
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    code = "import sys; from draft_nb.cli import main; sys.exit(main())"
    line = shlex.join([sys.executable, "-c", code, *argv]) + (f" {shell}" if shell else "")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, timeout=120, **options)


@pytest.mark.parametrize("shell, status", [("| head -1", 0), ("| head -0; exit ${PIPESTATUS[0]}", 141), ("> /dev/full", 2), (">&-", 0), ("2>&-", 0)])
def test_nobody_reads(shell, status):
    done = ran("sample", "--help", shell=shell)
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.stderr.splitlines() == (["draft-nb sample: standard output must take what is printed; No space left on device"] if status == 2 else [])


@pytest.mark.parametrize("seconds", [.3, .6, 1.])
def test_ctrl_c_in_the_first_moments(seconds, tmp_path):
    "From the moment that this package's code runs; before it, Python itself answers."
    code = "import sys; print('on', flush=True); from draft_nb.cli import main; sys.exit(main())"
    def heard():  # a shell that starts this test in the background has the signal ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, "-c", code, "train"], preexec_fn=heard, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout.readline() == "on\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and len(err.splitlines()) == 1 and "interrupted" in err, err


def test_ctrl_c_while_the_module_is_read(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("")
    (tmp_path / "difflib.py").write_text("raise KeyboardInterrupt\n")  # the moment is met exactly
    done = subprocess.run([sys.executable, "-c", "from draft_nb.cli import main"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == 130 and done.stderr == "draft-nb: interrupted\n"


@pytest.mark.parametrize("words", ["export --run {run} --output_dir {out}/x", "export --run {run} --format merged --output_dir {out}/x", "sample --prompt fox --num_inference_steps 2 --output_dir {out}/x"])
def test_a_disk_that_is_full(words, place, tmp_path):
    "A limit on the size of files stands in for it: the write fails half-way."
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16 if words.startswith("export") else 2**10, -1))
    (tmp_path / "x").mkdir()
    done = ran(*words.format(run=place / "runs" / "good", out=tmp_path).split(), preexec_fn=limited)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.part"))
