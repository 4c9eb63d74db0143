"The command as an engineer types it."
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from draft_nb.cli import COMMANDS, field_help, main, new_folder, read_config, read_prompts
from draft_nb.models import asset
from draft_nb.train import DRaFTConfig

TINY = ["--num_inference_steps", "3", "--batch-size", "2", "--max_steps", "2", "--sample_prompts", "a fox|a rose", "--sample_seeds", "2", "--rank", "2"]


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


def test_yaml_and_flags(tmp_path):
    (tmp_path / "run.yaml").write_text(f"num_inference_steps: 3\nbatch_size: 2\nmax_steps: 5\nsample_prompts: [a fox, a rose]\nsample_seeds: 2\nrank: 2\nlog_with: null\noutput_dir: {tmp_path / 'run'}\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--max_steps", "1"]) == 0
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 2


def test_every_field_has_help_and_a_flag():
    helps = field_help(DRaFTConfig)
    assert set(helps) == {f.name for f in fields(DRaFTConfig)}
    shown = subprocess.run([sys.executable, "-c", "from draft_nb.cli import main; main()", "train", "--help"], capture_output=True, text=True).stdout
    assert all(f"--{f.name}" in shown for f in fields(DRaFTConfig))


@pytest.mark.parametrize("argv, message", [
    (["dance"], "unknown command 'dance'; known: train, sample, app"),
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
])
def test_bad_input_is_one_line_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_unknown_flags_and_words_instead_of_numbers(capsys):
    assert main(["train", "--lerning_rate", "1"]) == 2
    assert main(["train", "--max_steps", "many"]) == 2
    assert "max_steps" in capsys.readouterr().err


def test_unknown_yaml_key_names_the_nearest(tmp_path):
    (tmp_path / "c.yaml").write_text("max_step: 3")
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        read_config(tmp_path / "c.yaml", {"max_steps"})


def test_new_folders_count_up(tmp_path):
    assert new_folder(tmp_path).name == "draft-1"
    (tmp_path / "draft-1").mkdir()
    assert new_folder(tmp_path).name == "draft-2"


def test_embedded_prompts_do_not_overlap():
    train, test = (read_prompts(asset(n)) for n in ("prompts.txt", "test_prompts.txt"))
    assert len(train) == 64 and len(test) == 8 and not set(train) & set(test)


def test_help_of_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert name in out
        assert main([name, "--help"]) == 0
