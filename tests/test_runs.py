"""Runs that are kept: one process a folder, what a resumed run may change, damaged checkpoints, what a failed run leaves.

Commands are real processes where two of them meet or one is killed.
"""
import os
import re
import signal
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from draft_nb import train
from draft_nb.cli import main
from draft_nb.models import load
from draft_nb.rewards import Reward, load_reward
from draft_nb.train import DRaFTConfig, RunWarning, checkpoints, claimed, fit, newest_checkpoint, read_checkpoint, read_history, save_checkpoint

PROMPTS = ["an emoji of a fox", "an emoji of a rose", "an emoji of a pizza"]
TINY = ["--num_inference_steps", "2", "--batch_size", "1", "--max_steps", "2", "--sample_prompts", "a fox", "--sample_seeds", "1", "--rank", "2", "--checkpoint_every", "1", "--log_with", "none", "--judge", "none"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "CUDA_VISIBLE_DEVICES": ""}
START = "import sys; from draft_nb import plots; from draft_nb.cli import main; plots.save_figure = lambda *_: None; sys.exit(main())"  # pictures take longer than the training


def colour(images, prompts):
    r, g, b = (images * 2 - 1).unbind(1)
    return ((r - g).flatten(1).var(1) + ((r + g) / 2 - b).flatten(1).var(1) + 1e-6).sqrt()


REWARD = Reward("colour", colour)


def begin(*argv, cwd):
    return subprocess.Popen([sys.executable, "-c", START, "train", *TINY, *argv], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*processes):
    "Statuses, and the lines on stderr that are ours."
    said = [p.communicate(timeout=300)[1] for p in processes]
    return [p.returncode for p in processes], [[line for line in text.splitlines() if line.startswith("draft-nb train:")] for text in said]


def config(folder, **options):
    return DRaFTConfig(**{**dict(output_dir=str(folder), max_steps=2, batch_size=1, num_inference_steps=2, sample_prompts=PROMPTS[:1], sample_seeds=1, checkpoint_every=1, log_with="none"), **options})


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    from draft_nb import plots
    monkeypatch.setattr(plots, "save_figure", lambda *_: None)


@pytest.fixture
def run(tmp_path):
    "A run of two steps, through the command."
    assert main(["train", *TINY, "--output_dir", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def rows(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_history(folder)]


def resumed(folder, *more):
    return main(["train", *TINY, "--max_steps", "3", "--resume", "--output_dir", str(folder), *more])


# one process a folder

def test_of_two_commands_at_once_one_has_the_folder(tmp_path):
    "Both start from nothing; the second is refused in one line, and what the first leaves is whole."
    codes, said = ended(begin("--output_dir", "run", cwd=tmp_path), begin("--output_dir", "run", cwd=tmp_path))
    assert sorted(codes) == [0, 2]
    (line,) = said[codes.index(2)]
    assert "output_dir must be" in line and ("another one trains in run" in line or "run holds a run" in line)
    assert [r["step"] for r in read_history(tmp_path / "run")] == [1, 2] and (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_two_commands_without_a_folder_have_two(tmp_path):
    codes, _ = ended(begin(cwd=tmp_path), begin(cwd=tmp_path))
    assert codes == [0, 0]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["draft-1", "draft-2"]
    for n in (1, 2):
        assert [r["step"] for r in read_history(tmp_path / f"runs/draft-{n}")] == [1, 2]


def test_one_resumes_and_a_killed_process_holds_nothing(tmp_path):
    folder = tmp_path / "run"
    killed = begin("--output_dir", "run", "--max_steps", "999", cwd=tmp_path)
    try:
        while len(read_history(folder)) < 2:
            assert killed.poll() is None, killed.stderr.read()
            time.sleep(.02)
        with pytest.raises(ValueError, match="in use by one process; another one trains"):  # while it runs
            fit(load("tiny", rank=2), REWARD, PROMPTS, config(folder, resume=True), progress=False)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    done = len(read_history(folder))
    codes, said = ended(*(begin("--output_dir", "run", "--resume", "--max_steps", str(done + 3), cwd=tmp_path) for _ in range(2)))
    if sorted(codes) == [0, 2]:
        assert "another one trains in run" in said[codes.index(2)][0]
    else:  # one was so late that the other had finished
        assert codes == [0, 0]
    assert [r["step"] for r in read_history(folder)] == list(range(1, done + 4))


def test_threads_and_links_do_not_share_a_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    with claimed(tmp_path / "run"):
        for name in ("run", "link"):
            with pytest.raises(ValueError, match="in use by one process"), claimed(tmp_path / name, resume=True):
                pass
    with claimed(tmp_path / "link"):
        pass


def test_processes_agree_on_the_folder(tmp_path):
    "Two processes of one run take one new folder; where the main one is refused, both end."
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python", sys.executable, "-c", START, "train", *TINY, "--device", "cpu"]
    done = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["draft-1"] and [r["step"] for r in read_history(tmp_path / "runs/draft-1")] == [1, 2]
    with claimed(tmp_path / "held"):
        done = subprocess.run([*words, "--output_dir", "held"], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "another one trains in held" in done.stderr and not read_history(tmp_path / "held")


# what decides a run

def test_a_runs_configuration_makes_it_again(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    own = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "0.7*tiny + 0.3*jpeg", "--normalize", "base", "--alpha", "3", "--targets", "to_q, to_v", "--rslora", "--judge", "tiny-judge", "--dtype", "float32"]
    assert main(["train", *TINY, *own, "--output_dir", str(tmp_path / "a")]) == 0
    about = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert {k: about[k] for k in ("model", "adapter", "rank", "alpha", "rslora", "dora", "targets", "dtype", "reward", "normalize", "judge", "num_prompts")} == dict(
        model="tiny", adapter="lora", rank=2, alpha=3, rslora=True, dora=False, targets="to_q,to_v", dtype="float32", reward="0.7*tiny + 0.3*jpeg", normalize="base", judge="tiny-judge", num_prompts=3)
    assert set(about["versions"]) == {"draft_nb", "torch", "diffusers", "peft", "transformers"} and len(about["prompts_sha256"]) == 64
    capsys.readouterr()
    assert main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    assert "warning" not in capsys.readouterr().err
    for x, y in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert x == pytest.approx(y, abs=1e-5)
    again = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert {k for k in about if about[k] != again[k]} == {"output_dir"}
    (tmp_path / "prompts.txt").write_text("something else")
    assert main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "c")]) == 0
    assert re.search("warning: this is not the run of .* again; changed: num_prompts: 3 -> 1; prompts_sha256: ", capsys.readouterr().err)


@pytest.mark.parametrize("adapter", ["full", "file", "dora"])
def test_every_adapter_is_made_again(tmp_path, adapter):
    file = str(load("tiny", rank=3, alpha=6.).save(tmp_path))
    given = {"full": ["--adapter", "full", "--learning_rate", "1e-5"], "file": ["--adapter", file], "dora": ["--dora"]}[adapter]
    flags = TINY if adapter == "dora" else [v for k, v in zip(["", *TINY], TINY) if "--rank" not in (k, v)]  # only a new LoRA has a rank to choose
    assert main(["train", *flags, "--max_steps", "1", *given, "--output_dir", str(tmp_path / "a")]) == 0
    about = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (about["adapter"], about["rank"], about["alpha"], about["dora"]) == {"full": ("full", None, None, False), "file": (file, 3, 6, False), "dora": ("lora", 2, 2, True)}[adapter]
    assert main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    for x, y in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert x == pytest.approx(y, abs=1e-5)


@pytest.mark.parametrize("given, message", [
    (["--rank", "4"], "rank: 2 -> 4; alpha: 2.0 -> 4.0"), (["--alpha", "4"], "alpha: 2.0 -> 4.0"), (["--rslora"], "rslora: False -> True"), (["--dora"], "dora: False -> True"),
    (["--targets", "to_q"], "targets: '.*' -> 'to_q'"), (["--dtype", "bfloat16"], "dtype: 'float32' -> 'bfloat16'"), (["--adapter", "full"], "rank needs adapter 'lora', a new one; got 2 with 'full'"),
    (["--reward", "jpeg"], "reward: 'tiny' -> 'jpeg'"), (["--reward", "tiny + jpeg", "--normalize", "base"], "reward: 'tiny' -> '.*'; normalize: None -> 'base'"),
    (["--judge", "tiny-judge"], "judge: 'none' -> 'tiny-judge'"), (["--prompts", "other.txt"], "num_prompts: 64 -> 1; prompts_sha256: "), (["--learning_rate", "1"], "learning_rate: 0.003 -> 1.0"),
    (["--seed", "1"], "seed: 0 -> 1"), (["--ema_decay", ".5"], "ema_decay: None -> 0.5"),
])
def test_another_setting_is_another_run(given, message, capsys, tmp_path, monkeypatch, finished):
    folder, monkey = finished, monkeypatch
    monkey.chdir(tmp_path)
    Path("other.txt").write_text("a ghost\n")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert resumed(folder, *given) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"^draft-nb train: (a resumed run must keep its configuration; changed: .*)?{message}", line)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    codes, said = ended(begin("--output_dir", "run", cwd=folder.parent))
    assert codes == [0], said
    return folder


def test_another_model_is_another_run(tmp_path):
    "Found on the model, also where two models go by one name."
    from diffusers import StableDiffusionPipeline

    from draft_nb.models import asset
    def pipeline(factor):
        pipe = StableDiffusionPipeline.from_pretrained(asset("tiny"))
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight.mul_(factor)
        return pipe
    fit(load(pipeline(1), rank=2), REWARD, PROMPTS, config(tmp_path / "run"), progress=False)
    later = config(tmp_path / "run", max_steps=3, resume=True)
    for model, reward, prompts, message in [
        (load(pipeline(.9), rank=2), REWARD, PROMPTS, "base_sha256: '.*' -> '.*'$"),
        (load("tiny", rank=2), REWARD, PROMPTS, "model: 'StableDiffusionPipeline' -> 'tiny'"),
        (load(pipeline(1), rank=3), REWARD, PROMPTS, "rank: 2 -> 3; alpha: 2.0 -> 3.0"),
        (load(pipeline(1), rank=2, targets=["to_q"]), REWARD, PROMPTS, "targets: "),
        (load(pipeline(1), rank=2), Reward("other", colour), PROMPTS, "reward: 'colour' -> 'other'"),
        (load(pipeline(1), rank=2), REWARD, PROMPTS[::-1], "changed: prompts_sha256: "),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(model, reward, prompts, later, progress=False)
    with pytest.raises(ValueError, match="judge: 'none' -> 'colour'"):
        fit(load(pipeline(1), rank=2), REWARD, PROMPTS, later, judge=REWARD, progress=False)
    assert len(fit(load(pipeline(1), rank=2), REWARD, PROMPTS, later, progress=False).rows) == 3


def test_other_versions_are_said(run, capsys):
    "So is another end where the learning rate is paced by it."
    about = yaml.safe_load((run / "config.yaml").read_text())
    about["versions"]["peft"] = "0.1"
    about["lr_scheduler"] = "cosine"
    (run / "config.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    assert resumed(run, "--lr_scheduler", "cosine") == 0
    said = capsys.readouterr().err
    assert re.search(r"^draft-nb train: warning: .*other versions.* peft 0\.1 -> ", said, re.M)
    assert re.search(r"^draft-nb train: warning: lr_scheduler cosine ends with the run: max_steps 2 -> 3", said, re.M)
    assert yaml.safe_load((run / "config.yaml").read_text())["versions"]["peft"] != "0.1"


@pytest.mark.parametrize("text", ["", "- a", "a: [", None])
def test_a_run_without_its_configuration_is_not_resumed(run, text, capsys):
    (run / "config.yaml").unlink() if text is None else (run / "config.yaml").write_text(text)
    assert resumed(run) == 2
    assert re.search("^draft-nb train: (config.yaml must|resume needs the config.yaml)", capsys.readouterr().err, re.M)


# where it lies

def test_a_moved_run_goes_on_where_it_is(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = run.rename(tmp_path / "elsewhere" / "moved")
    assert main(["train", "--config", str(moved / "config.yaml"), "--resume", "--max_steps", "3"]) == 0
    assert not run.exists() and [r["step"] for r in read_history(moved)] == [1, 2, 3]
    assert yaml.safe_load((moved / "config.yaml").read_text())["output_dir"] == str(moved)
    assert resumed(moved, "--max_steps", "4") == 0 and not run.exists() and len(read_history(moved)) == 4


def test_a_configuration_beside_no_run_names_its_folder_itself(tmp_path):
    (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path / 'run'}\nmax_steps: 1\n")
    (tmp_path / "checkpoints").mkdir()
    assert main(["train", *TINY[:4], *TINY[6:], "--config", str(tmp_path / "config.yaml")]) == 0
    assert (tmp_path / "run" / "history.csv").is_file()


def test_resume_needs_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--resume"]) == 2 and "resume needs the folder of a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# checkpoints

def at_numbers(path):
    "A place among the numbers of the largest tensor: no header is longer than 1000 bytes."
    with zipfile.ZipFile(path) as parts:
        return max(parts.infolist(), key=lambda i: i.file_size).header_offset + 1000


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut": data = data[:len(data) // 2]
    if how == "empty": data = b""
    if how == "text": data = b"not a checkpoint"
    if how == "zeros": data = bytes(len(data))
    if how == "zeroed inside":
        at = at_numbers(path)
        data[at:at + 64] = bytes(64)
    if how == "one bit": data[at_numbers(path)] ^= 1
    if how == "a list":
        torch.save([1, 2], path)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "zeros", "zeroed inside", "one bit", "a list"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(tmp_path, how):
    for n in (1, 2, 3):
        save_checkpoint(tmp_path, dict(step=n, parameters=[torch.randn(200, 20), torch.randn(3)]), keep=3)
    spoil(checkpoints(tmp_path)[-1], how)
    with pytest.raises(ValueError, match="a checkpoint must .*step_000003.pt"):
        read_checkpoint(checkpoints(tmp_path)[-1])
    with pytest.warns(RunWarning, match="step_000003.pt.*; the run goes on from step 2"):
        assert newest_checkpoint(tmp_path, "cpu")["step"] == 2
    spoil(checkpoints(tmp_path)[-2], "cut")
    spoil(checkpoints(tmp_path)[-3], how)
    with pytest.raises(ValueError, match="resume needs a whole checkpoint, and .* holds none: .*step_000003.*step_000002.*step_000001"):
        newest_checkpoint(tmp_path, "cpu")


def test_whole_checkpoints_are_taken_without_a_word(tmp_path):
    save_checkpoint(tmp_path, dict(step=1, parameters=[torch.randn(200, 20)]), keep=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path, "cpu")["step"] == 1 and newest_checkpoint(tmp_path / "none", "cpu") is None


def test_a_run_goes_on_from_the_checkpoint_before(run, tmp_path, capsys):
    spoil(run / "checkpoints" / "step_000002.pt", "zeroed inside")
    assert resumed(run) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draft-nb train:")]
    assert len(lines) == 1 and "warning" in lines[0] and "step_000002.pt" in lines[0] and "from step 1" in lines[0]
    assert main(["train", *TINY, "--max_steps", "3", "--output_dir", str(tmp_path / "whole")]) == 0
    for x, y in zip(rows(run), rows(tmp_path / "whole"), strict=True):
        assert x == pytest.approx(y, abs=1e-5)
    assert [read_checkpoint(p)["step"] for p in checkpoints(run)] == [2, 3]


def test_damaged_all_or_gone_all_is_no_new_beginning(run, capsys):
    history = (run / "history.csv").read_bytes()
    for p in checkpoints(run): spoil(p, "cut")
    assert resumed(run) == 2 and "resume needs a whole checkpoint" in capsys.readouterr().err
    for p in checkpoints(run): p.unlink()
    assert resumed(run) == 2 and "resume needs a checkpoint" in capsys.readouterr().err
    assert (run / "history.csv").read_bytes() == history


def test_a_run_without_checkpoint_yet_begins_again_and_says_so(tmp_path):
    with pytest.raises(RuntimeError):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path / "run", checkpoint_every=9), on_step=lambda row: fail_at(row, 2), progress=False)
    with pytest.warns(RunWarning, match="has no checkpoint yet; its 1 steps are done again, from step 0"):
        assert [r["step"] for r in fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path / "run", resume=True), progress=False).rows] == [1, 2]


def test_a_checkpoint_of_another_model_is_refused(run):
    state = read_checkpoint(checkpoints(run)[-1])
    save_checkpoint(run, state | dict(parameters=state["parameters"][1:]), keep=2)
    assert resumed(run) == 2


# what a failed run leaves

@pytest.mark.parametrize("given, message", [(["--grad_steps", "5"], "grad_steps must lie in"), ([], None)])
@pytest.mark.parametrize("where", [["--output_dir", "deep/er/run"], []])
def test_a_failure_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, capsys, given, message, where):
    "Whether in the checks or, as here, in the first step itself; the corrected command then has the same folder."
    monkeypatch.chdir(tmp_path)
    def broken(run):
        raise ValueError("the first step failed")
    with monkeypatch.context() as m:
        if message is None: m.setattr(train, "_one_step", broken)
        assert main(["train", *TINY, *given, *where]) == 2
    assert (message or "the first step failed") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["train", *TINY, *where]) == 0
    assert (tmp_path / (where[1] if where else "runs/draft-1") / "history.csv").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_what_was_in_the_folder_stays(tmp_path, monkeypatch, error):
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "mine.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    def broken(run):
        (folder / "made-meanwhile.txt").write_text("somebody's")
        (folder / train.TRACKED).mkdir()  # as tensorboard does
        (folder / train.TRACKED / "events").write_bytes(b"x")
        raise error("no")
    monkeypatch.setattr(train, "_one_step", broken)
    with pytest.raises(error):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(folder), progress=False)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == ["made-meanwhile.txt", "notes.txt", "samples", "samples/mine.png"]


def test_a_failure_after_a_step_keeps_the_run(tmp_path):
    with pytest.raises(RuntimeError):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path / "run", max_steps=4), on_step=lambda row: fail_at(row, 3), progress=False)
    assert [r["step"] for r in read_history(tmp_path / "run")] == [1, 2] and len(checkpoints(tmp_path / "run")) == 2
    fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path / "run", max_steps=4, resume=True), progress=False)
    assert [r["step"] for r in read_history(tmp_path / "run")] == [1, 2, 3, 4]


def fail_at(row, step):
    if row["step"] == step:
        raise RuntimeError("lost")


def test_what_a_killed_process_left_without_a_step_is_as_good_as_new(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import os
from test_runs import *
train._one_step = lambda run: os.kill(os.getpid(), signal.SIGKILL)
fit(load("tiny", rank=2), REWARD, PROMPTS, config({str(folder)!r}), progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=ENV, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (folder / "config.yaml").is_file()
    fit(load("tiny", rank=3), REWARD, PROMPTS, config(folder, learning_rate=1e-4), progress=False)
    assert yaml.safe_load((folder / "config.yaml").read_text())["rank"] == 3


@pytest.mark.parametrize("name", ["config.yaml", "history.csv", "pytorch_lora_weights.safetensors", "model_index.json", "checkpoints/step_000001.pt"])
def test_somebodys_folder_is_not_written_over(tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ValueError, match="output_dir must be new"):
        fit(load("tiny", rank=2), REWARD, PROMPTS, config(tmp_path / "run"), progress=False)
    assert [p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()] == [name] and (tmp_path / "run" / name).read_text() == "mine"


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "run").write_text("x")
    assert main(["train", *TINY, "--output_dir", str(tmp_path / "run")]) == 2 and "output_dir must be a folder" in capsys.readouterr().err


# who may read it

@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_umask_applies(tmp_path, mask, mode):
    old = os.umask(mask)
    try:
        model, judge = load("tiny", rank=2), load_reward("tiny-judge")
        fit(model, REWARD, PROMPTS, config(tmp_path / "run"), judge=judge, progress=False)
        from draft_nb.export import export_lora
        from draft_nb.sweep import keep_recommendation
        keep_recommendation(tmp_path / "run", "linear", "why")
        model.save(tmp_path / "weighted", weight="linear")
        for form in ("diffusers", "kohya", "merged"): export_lora(tmp_path / "run", tmp_path / form, form)
        load("tiny", "full").save(tmp_path / "full")
    finally:
        os.umask(old)
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len([p for p in written if p.suffix == ".safetensors"]) >= 10 and any(p.suffix == ".pt" for p in written)
    assert {p.relative_to(tmp_path).as_posix(): oct(stat.S_IMODE(p.stat().st_mode)) for p in written if stat.S_IMODE(p.stat().st_mode) != mode} == {}
    assert load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
