"The command as an engineer types it."
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from safetensors.torch import load_file

from draft_nb import export, train
from draft_nb.cli import COMMANDS, flag_types, main, new_folder, parse_flags, read_config, train_flags
from draft_nb.train import DRaFTConfig

TINY = ["--num_inference_steps", "3", "--batch-size", "2", "--max_steps", "2", "--sample_prompts", "a fox", "a rose", "--sample_seeds", "2", "--rank", "2"]


def test_train_and_sample(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, "--output_dir", str(run)]) == 0
    out = capsys.readouterr().out
    for name in ("reward", "judge", "diversity"):
        assert re.search(rf"^{name} +-?[\d.]+ +-?[\d.]+ +[+-][\d.]+$", out, re.M), name
    assert "before_after.png" in out and "draft-nb sample" in out and "draft-nb app --run" in out
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    command = ["sample", "--lora", str(run), "--prompt", "a fox", "--num-inference-steps", "3", "--num_images", "2", "--output_dir", str(tmp_path / "p")]
    for weight in ("base", "draft", "linear", "power_2", "step_0.6", "constant_0.5"):
        assert main([*command, "--weight", weight]) == 0
    assert len(list((tmp_path / "p").glob("*.png"))) >= 2
    assert main(["train", *TINY, "--output_dir", str(run)]) == 2
    assert "output_dir must be new" in capsys.readouterr().err
    for format, name in dict(diffusers="pytorch_lora_weights.safetensors", kohya="tiny-tiny.safetensors", merged="model_index.json").items():
        assert main(["export", "--run", str(run), "--format", format]) == 0
        path = tmp_path / f"run-{format}"
        assert capsys.readouterr().out.strip() == str(path if format == "merged" else path / name) and (path / name).is_file()
    assert not (tmp_path / "run-diffusers" / "checkpoints").exists()
    assert main(["export", "--run", str(run), "--format", "kohya", "--output-dir", str(tmp_path / "k.safetensors"), "--title", "Fox"]) == 0
    assert (tmp_path / "k.safetensors").is_file()


@pytest.mark.parametrize("argv, status, said", [
    ([], 2, "usage: draft-nb COMMAND"), (["--help"], 0, "usage: draft-nb COMMAND"), (["dance"], 2, "unknown command 'dance'"),
    (["sample", "--help"], 0, "usage: draft-nb sample"), (["train", "--grad_steps", "0"], 2, "grad_steps must be at least 1; got 0"),
])
def test_every_door_is_the_same(argv, status, said):
    "`draft-nb`, `python -m draft_nb` and `python -m draft_nb.cli`: the same words and the same exit status."
    doors = ["-c", "import sys; from draft_nb.cli import main; sys.exit(main())"], ["-m", "draft_nb"], ["-m", "draft_nb.cli"]
    done = [subprocess.run([sys.executable, *door, *argv], capture_output=True, text=True) for door in doors]
    assert [d.returncode for d in done] == [status]*3 and said in done[0].stdout+done[0].stderr
    assert len({(d.stdout, d.stderr) for d in done}) == 1


def test_yaml_and_flags(tmp_path):
    (tmp_path / "run.yaml").write_text(f"num_inference_steps: 3\nbatch_size: 2\nmax_steps: 5\nlearning_rate: 2e-4\nsample_prompts: [a fox, a rose]\nsample_seeds: 2\nrank: 2\nlog_with: null\noutput_dir: {tmp_path / 'run'}\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--max_steps", "1"]) == 0
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 2
    again = tmp_path / "run" / "config.yaml"  # of the run that this was: a config that can be used again
    flags = parse_flags(train_flags(), [*read_config(again, flag_types(train_flags())), "--output_dir", str(tmp_path / "again")])
    assert flags.run.learning_rate == 2e-4 and flags.run.max_steps == 1 and flags.run.sample_prompts == ("a fox", "a rose") and flags.reward == "tiny"


def test_flags_win_wherever_they_stand(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(COMMANDS, "train", replace(COMMANDS["train"], work=seen.append))
    (tmp_path / "c.yaml").write_text("learning-rate: 2e-4\nresume: true\nsample_prompts: [a, b]\nmodel: owner/name\ngradient_checkpointing: true\nguidance_scale: 1\n")
    for argv in (["--config", str(tmp_path / "c.yaml"), "--learning_rate", "1e-3", "--no-resume", "--sample_prompts", "c"],
                 ["--learning-rate=1e-3", "--no_resume", "--sample_prompts", "c", f"--config={tmp_path / 'c.yaml'}"]):
        assert main(["train", *argv]) == 0
        run = seen[-1].run
        assert (run.learning_rate, run.resume, run.sample_prompts) == (1e-3, False, ("c",))
        assert (seen[-1].model, run.gradient_checkpointing, run.guidance_scale) == ("owner/name", True, 1.)


def test_every_field_has_help_and_a_flag():
    shown = subprocess.run([sys.executable, "-c", "from draft_nb.cli import main; main()", "train", "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "400"}).stdout
    source = inspect.getsource(DRaFTConfig) + inspect.getsource(train_flags)
    for f in [*fields(DRaFTConfig), *fields(train_flags())]:
        if f.name == "run":
            continue
        comment = re.search(rf"^ +{f.name}:[^#\n]*# (.+)$", source, re.M)[1]
        line = re.search(rf"--{f.name}\b.*\n?.*", shown)[0]
        assert " ".join(comment.split()) in " ".join(line.split()), f.name
        default = f.default if f.name != "output_dir" else "runs/"
        assert f"(default: {' '.join(default) if isinstance(default, tuple) else default}" in line, f.name


@pytest.mark.parametrize("argv, message", [
    (["dance"], "unknown command 'dance'; known: train, sample, sweep, app, export"),
    (["train", "--grad_steps", "0"], "grad_steps must be at least 1; got 0"),
    (["train", "--kl_reduction", "max"], "kl_reduction must be one of sum, mean; got 'max'"),
    (["train", "--grad_steps", "11"], "grad_steps must lie in 0..10"),
    (["train", "--reward", "beauty"], "unknown reward 'beauty'"),
    (["train", "--model", "nothing"], "prompts must be given"),
    (["train", "--prompts", "nothing.txt"], "there is no nothing.txt"),
    (["train", "--config", "nothing.yaml"], "there is no nothing.yaml"),
    (["sample"], "prompt must be given"),
    (["sample", "--prompt", "a fox", "--weight", "power_0", "--lora", "x"], "power must be a positive number"),
    (["sample", "--prompt", "a fox", "--lora", "nowhere"], "there is no nowhere"),
    (["sample", "--prompt", "a fox", "--model", "no such model"], "owner/name"),
    (["app", "--run", "nowhere"], "there is no nowhere"),
    (["export"], "Missing from draft-nb export: --run"),
    (["export", "--run", "nowhere"], "run must be the folder of a run"),
    (["export", "--run", "nowhere", "--format", "onnx"], "format must be one of diffusers, kohya, merged; got 'onnx'"),
    (["train", "--lerning_rate", "1"], "unknown flag --lerning_rate; did you mean '--learning_rate'?"),
    (["train", "--lerning-rate=1"], "did you mean '--learning_rate'?"),
    (["train", "--max_steps", "many"], "--max_steps: no type matching {None}|INT could be instantiated from ['many']."),
    (["train", "--max_steps"], "Missing value for argument '--max_steps'"),
    (["train", "fast"], "unexpected word 'fast'"),
    (["train", "--prompt_column", "x", "--prompts", __file__], "prompt_column is for tables"),
])
def test_bad_input_is_one_line_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_terminal_without_frames(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import sys; from draft_nb.cli import main; sys.exit(main())", "export"], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"})
    assert done.returncode == 2 and done.stderr.strip() == "draft-nb export: Missing from draft-nb export: --run STR Folder of a finished run (required)"


@pytest.mark.parametrize("text, message", [
    ("max_step: 3", "unknown key 'max_step' in .*; did you mean 'max_steps'"), ("zzz: 3", "unknown key 'zzz' in [^;]*$"), ("config: x", "unknown key 'config'"),
    ("- 3", "names and values"), ("optimizer: on", "optimizer must be one of adamw, adamw8bit; got 'on'"), ("resume: maybe", "resume must be true or false"),
    ("sample_prompts:\n- an emoji: a fox", "needs quotes"), ("sample_prompts: [a, null]", "must be a list of single values"), ("max_steps: 1\nmax-steps: 2", "max_steps is there twice"),
    ("max_steps: 1:30", "--max_steps: no type matching"), ("max_steps: true", "--max_steps: no type matching"), ("kl_coeff: .inf", "--kl_coeff: no type matching"), ("a: [", "must be YAML"), ("run: {max_steps: 3}", "unknown key 'run'"), ("max_steps: {a: 3}", "max_steps must be a value"),
    ("max_steps: many", "--max_steps: no type matching"), ("eta: 3", r"eta must be in \[0,1\]; got 3.0"),
])
def test_bad_yaml(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err.strip()) and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("text, expected", [
    ("log_with: no", dict(log_with="no")), ("mixed_precision: no", dict(mixed_precision="no")), ("resume: yes", dict(resume=True)), ("resume: off", dict(resume=False)),
    ("gradient_checkpointing: no", dict(gradient_checkpointing=False)), ("sample_prompts: a fox", dict(sample_prompts=("a fox",))), ("sample_prompts: yes", dict(sample_prompts=("yes",))),
    ("sample_prompts: [yes, no, 12:30, 2024-01-31, 1e3, ~x]", dict(sample_prompts=("yes", "no", "12:30", "2024-01-31", "1e3", "~x"))),
    ("sample_prompts:\n- --max_steps=3\n- --resume\n- -a fox\n- a rose\nmax_steps: 7", dict(sample_prompts=("--max_steps=3", "--resume", "-a fox", "a rose"), max_steps=7, resume=False)),
    ("sample_prompts: --resume", dict(sample_prompts=("--resume",), resume=False)), ("sample_prompts: []", dict(sample_prompts=())), ("output_dir: 2024-01-31", dict(output_dir="2024-01-31")),
    ("guidance_interval: [0.1, 0.5]", dict(guidance_interval=(.1, .5))), ("max_steps: null", dict(max_steps=None)), ("", {}),
])
def test_yaml_says_what_is_written(tmp_path, monkeypatch, text, expected):
    seen = []
    monkeypatch.setitem(COMMANDS, "train", replace(COMMANDS["train"], work=seen.append))
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    assert {k: getattr(seen[0].run, k) for k in expected} == expected


def test_a_runs_own_config_says_the_same_again(tmp_path):
    import yaml
    config = DRaFTConfig(sample_prompts=("no", "--resume", "-", "12:30", "null", "a: b", "# x", "'", "ünï"), log_with="no", guidance_interval=(.1, .5), gradient_checkpointing=False, ema_decay=.5)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(train._plain(config)))
    assert parse_flags(train_flags(), read_config(tmp_path / "config.yaml", flag_types(train_flags()))).run == config


@pytest.mark.parametrize("argv, message", [
    (["--kl_coeff", "inf"], "kl_coeff must be a finite number, at least 0; got inf"), (["--learning_rate", "inf"], "learning_rate must be a finite number, greater than 0; got inf"),
    (["--learning_rate", "nan"], "got nan"), (["--learning_rate", "1e300"], "learning_rate must be at most"), (["--alpha", "nan"], "alpha must be a finite number, greater than 0; got nan"),
    (["--alpha", "0"], "alpha must be"), (["--rank", "0"], "rank must be at least 1; got 0"), (["--seed", "-1"], "seed must be in 0..4294967295; got -1"),
    (["--max_steps", "2.5"], "--max_steps: no type matching"), (["--log_with", "paper"], "log_with must be one of none"), (["--lr_scheduler", "piecewise_constant"], "lr_scheduler must be one of linear"),
    (["--reward", "nan*tiny"], "must be a number; got 'nan'"),
])
def test_numbers_that_are_none_are_refused(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_comes_to_nothing_is_one_line_and_no_success(tmp_path, monkeypatch, capsys):
    from draft_nb import rewards
    def broken(*_, **__): return rewards.Reward("broken", lambda images, prompts: images.mean((1, 2, 3)) * (1 if len(images) == 1 else float("nan")))
    monkeypatch.setattr(rewards, "load_reward", broken)
    assert main(["train", *TINY, "--judge", "no", "--output_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert "reward must be finite; broken gives nan for the base's pictures" in said.err.strip().splitlines()[-1]
    assert [line for line in said.out.splitlines() if not line.startswith("prompts: ")] == []


def test_the_report_counts_what_was_skipped(tmp_path, capsys):
    from draft_nb.cli import report
    rows = [dict(step=k + 1, skipped=n) for k, n in enumerate((1, 2, 0, 1))]
    report(train.Run(tmp_path, rows, dict(reward=1.), dict(reward=2.)), "tiny")
    assert "3 of 4 steps were skipped" in capsys.readouterr().out
    report(train.Run(tmp_path, rows[2:3], dict(reward=1.), dict(reward=2.)), "tiny")
    assert "skipped" not in capsys.readouterr().out


def test_ctrl_c_is_130_and_one_line(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "fit", stopped)
    assert main(["train", *TINY, "--output_dir", str(tmp_path / "run")]) == 130
    err = capsys.readouterr().err.strip().splitlines()
    assert err == [f"draft-nb train: interrupted; go on from the last checkpoint with --resume --output_dir {tmp_path / 'run'}"]
    monkeypatch.setitem(COMMANDS, "app", replace(COMMANDS["app"], work=stopped))
    assert main(["app"]) == 130 and capsys.readouterr().err == "draft-nb app: interrupted\n"


def test_a_fault_is_no_success(monkeypatch, capsys):
    def broken(_):
        raise TypeError("ten steps in a row")
    monkeypatch.setitem(COMMANDS, "app", replace(COMMANDS["app"], work=broken))
    assert main(["app"]) == 1  # and is not passed off as bad input
    assert capsys.readouterr().err == "draft-nb app: this is a fault in draft_nb: TypeError: ten steps in a row; DRAFT_NB_DEBUG=1 shows where\n"


def test_the_parser_waits_for_a_command():
    code = "import sys; from draft_nb.cli import main; main(['--help']); main(['sample', '--help']); print(sorted({'torch', 'diffusers', 'transformers', 'gradio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.rstrip().endswith("[]")


def test_new_folders_count_up(tmp_path):
    assert new_folder(tmp_path).name == "draft-1"
    (tmp_path / "draft-1").mkdir()
    assert new_folder(tmp_path).name == "draft-2"


def test_help_of_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert name in out
        assert main([name, "--help"]) == 0


def test_where_a_lora_goes(tmp_path):
    assert main(["train", *TINY, "--targets", "to_q, to_v", "--dtype", "float32", "--output_dir", str(tmp_path / "run")]) == 0
    assert {k.split(".lora")[0].rpartition(".")[2] for k in load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")} == {"to_q", "to_v"}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "on 2 prompts" not in card and "| 2 prompts, 2 seeds each |" in card and "![" in card and "curves.png" in card and card.count("Recommended weight: ") == 1


def test_processes_part_in_good_order(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: left.append(1))
    monkeypatch.setattr(train, "fit", lambda *_, **__: (_ for _ in ()).throw(ValueError("no")))
    assert main(["train", *TINY, "--output_dir", str(tmp_path / "run")]) == 2 and left == [1]


def test_export_to_the_hub(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(export, "check_hub", lambda: None)
    sent = []
    monkeypatch.setattr(export, "export_lora", lambda *_, **__: tmp_path / "out" / "k.safetensors")
    monkeypatch.setattr(export, "push_to_hub", lambda folder, name, private: sent.append((folder, name, private)) or "address")
    assert main(["export", "--run", str(tmp_path / "x"), "--format", "kohya", "--push-to-hub", "owner/name", "--private"]) == 0
    assert sent == [(tmp_path / "out", "owner/name", True)] and capsys.readouterr().out.endswith("address\n")
