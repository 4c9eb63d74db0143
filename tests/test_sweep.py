"A sweep: the same noise for every weight, stored as it goes, and a recommendation by a rule that is stated."
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import draft_nb.sweep as module
from draft_nb.cli import main
from draft_nb.metrics import diversity, interval, paired_interval, vendi
from draft_nb.models import asset, load
from draft_nb.plots import Plot, tradeoffs
from draft_nb.rewards import Reward, load_reward
from draft_nb.sampler import sample
from draft_nb.sweep import (KEYS, MEASURED, WEIGHTS, at_equal_diversity, by_prompt, compare, fingerprint, judged, keep_recommendation,
                            lora_scale, measured, read_sweep,
                            recommended_weight, report, summary, sweep, tradeoff_points, write_report)

PROMPTS = ["an emoji of a fox", 'an emoji of a "rose", é']
FEW = dict(seeds=2, steps=2, progress=False)
LORA = asset("tiny-aligned") / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def model(): return load("tiny", adapter=LORA, device="cpu")

@pytest.fixture(scope="module")
def rewards(): return [load_reward(n, "cpu") for n in ("tiny", "tiny-judge")]

@pytest.fixture(scope="module")
def table(model, rewards): return sweep(model, rewards, PROMPTS, ["base", "linear", "step_0.5", "draft"], scales=[.5], **FEW)

def close(a, b): pd.testing.assert_frame_equal(a, b, rtol=2e-3, atol=2e-3)

@pytest.fixture
def drawn(monkeypatch):
    "Every picture that is drawn, as (weight, prompt, seed); none may be after bad input."
    seen = []
    real = module.sample_each
    def counted(model, prompts, weights, seed, **options):
        seen.extend((module.weight_name(w), p, s) for w in weights for p, s in zip(prompts, seed))
        return real(model, prompts, weights, seed=seed, **options)
    monkeypatch.setattr(module, "sample_each", counted)
    return seen


# what is measured

def test_every_weight_sees_the_same_noise(model, rewards, table):
    "Each row is the picture that `sample` draws alone from that seed, scored with its own prompt."
    assert list(table.columns) == ["weight", "scale", "prompt", "seed", "tiny", "tiny-judge", *MEASURED]
    assert MEASURED == ("diversity", "vendi", "saturation", "contrast", "texture")
    assert len(table) == 5*2*2 and not table.isna().any().any()
    assert list(table[:4].prompt) == [PROMPTS[0]]*2+[PROMPTS[1]]*2 and list(table[:4].seed) == [0, 1, 0, 1]
    for weight, scale in (("base", 1), ("linear", 1), ("step_0.5", 1), ("draft", 1), ("draft", .5)):
        rows = table[(table.weight == weight) & (table.scale == scale)]
        with lora_scale(model.network, scale):
            images = torch.cat([sample(model, [r.prompt], weight, steps=2, seed=[r.seed]).images for r in rows.itertuples()])
        for r in rewards: np.testing.assert_allclose(rows[r.name], r(images, list(rows.prompt)), rtol=1e-3, atol=1e-3)
        features = rewards[1].features(images).view(2, 2, -1)
        means = rows.groupby("prompt", sort=False)[["diversity", "vendi"]].mean()
        np.testing.assert_allclose(means.diversity, diversity(features), atol=1e-3)
        np.testing.assert_allclose(means.vendi, vendi(features), atol=2e-3)


@pytest.mark.parametrize("chunk", [1, 3])
def test_batches_do_not_matter(model, rewards, table, chunk):
    close(sweep(model, rewards, PROMPTS, ["base", "linear", "step_0.5", "draft"], scales=[.5], chunk=chunk, **FEW), table)


def test_a_batch_holds_at_most_chunk_pictures(model, rewards, monkeypatch):
    sizes, real = [], module.sample_each
    monkeypatch.setattr(module, "sample_each", lambda model, prompts, weights, **o: sizes.append(len(prompts)*len(weights)) or real(model, prompts, weights, **o))
    for chunk in 2, 5:
        sweep(model, rewards, PROMPTS, ["base", "linear", "draft"], chunk=chunk, **FEW)
        assert max(sizes) <= chunk and sum(sizes) == 12
        sizes.clear()


def test_model_stays_as_it_was(model, table):
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), lora_scale(model.network, .3): 1/0
    assert fingerprint(model) == before


def test_lora_scale_is_linear(model):
    "The LoRA's share of a layer's output, so many times."
    layer = module.lora_layers(model.network)[0]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    base, full = layer.base_layer(x), layer(x)
    for s in 0, .25, 2:
        with lora_scale(model.network, s): torch.testing.assert_close(layer(x)-base, s*(full-base), atol=1e-5, rtol=1e-4)
    assert torch.equal(layer(x), full)


def test_rewards_by_name_list_and_dict(rewards):
    def names(*a): return [r.name for r in judged(*a, device="cpu")]
    tiny, other = rewards
    assert names("tiny", "tiny-judge") == names([tiny, other]) == names(tiny, other) == names(["tiny", "jpeg", "tiny-judge"], "tiny-judge")[:2] == ["tiny", "tiny-judge"]
    assert names({"mine": tiny, "theirs": other}) == ["mine", "theirs"]
    def by_hand(images, prompts): return images.mean((1, 2, 3))
    assert names(by_hand, tiny) == ["by_hand", "tiny"]


def test_features_of_ones_own(model, rewards):
    "Diversity in a space of one's choice; a constant one has none."
    flat = sweep(model, rewards, PROMPTS, ["base"], features=lambda images: torch.ones(len(images), 4), **FEW)
    assert flat.diversity.abs().max() < 1e-3 and (flat.vendi-1).abs().max() < 1e-2


# stored as it goes

ASKED, QUICK = ["base", "linear", "draft"], FEW | dict(steps=1)

def test_continues_where_it_was_killed(model, rewards, tmp_path, drawn):
    whole = sweep(model, rewards, PROMPTS, ASKED, scales=[.5], chunk=3, folder=tmp_path/"whole", **QUICK)
    drawn.clear()
    calls = []
    def dying(images, prompts):
        calls.append(len(images))
        if len(calls) == 8: raise KeyboardInterrupt
        return rewards[1](images, prompts)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, [rewards[0], replace(rewards[1], score=dying)], PROMPTS, ASKED, scales=[.5], chunk=3, folder=tmp_path/"killed", **QUICK)
    kept = read_sweep(tmp_path/"killed")
    assert len(kept) == 7 and kept.diversity.isna().all()
    drawn.clear()
    again = sweep(model, rewards, PROMPTS, ASKED, scales=[.5], chunk=3, folder=tmp_path/"killed", **QUICK)
    close(again, whole)
    had = {(r.weight, r.prompt, r.seed) for r in kept.itertuples()}
    assert len(drawn) == 16-7 and not had & {*drawn[:-4]} # the last four are of another LoRA scale
    drawn.clear()
    assert sweep(model, rewards, PROMPTS, ASKED, scales=[.5], chunk=3, folder=tmp_path/"killed", **QUICK).equals(again) and not drawn
    keys = ["weight", "scale", "prompt", "seed"]
    close(read_sweep(tmp_path/"whole")[keys].merge(whole, on=keys), read_sweep(tmp_path/"whole")) # the file says what was returned


@pytest.mark.parametrize("csv_bytes, feature_bytes", [(-9, -1), (0, -1500), (-10**9, 0)])
def test_files_that_were_cut_short(model, rewards, tmp_path, csv_bytes, feature_bytes):
    whole = sweep(model, rewards, PROMPTS, ["base", "draft"], folder=tmp_path, **QUICK)
    for name, cut in ("sweep.csv", csv_bytes), ("features.f16", feature_bytes):
        data = (tmp_path/name).read_bytes()
        (tmp_path/name).write_bytes(data[:max(0, len(data)+cut)])
    if csv_bytes == -10**9: (tmp_path/"sweep.csv").unlink()
    close(sweep(model, rewards, PROMPTS, ["base", "draft"], folder=tmp_path, **QUICK), whole)
    assert not [*tmp_path.glob("*.part")] and len(read_sweep(tmp_path)) == 8


def test_more_weights_later(model, rewards, tmp_path, drawn, table):
    sweep(model, rewards, PROMPTS, ["base"], folder=tmp_path, **FEW)
    drawn.clear()
    t = sweep(model, rewards, PROMPTS, ["linear", "base"], folder=tmp_path, **FEW)
    assert {w for w, *_ in drawn} == {"linear"}
    assert list(t.weight.unique()) == ["linear", "base"]
    close(t[t.weight == "base"].reset_index(drop=True), table[:4])


def test_progress_is_shown(model, rewards, capsys):
    sweep(model, rewards, PROMPTS, ["base", "draft"], seeds=2, steps=1)
    assert "8/8" in capsys.readouterr().err


# bad input, before any sampling

def parts(**more): return dict(rewards=["tiny", "tiny-judge"], prompts=PROMPTS, weights=["base", "draft"]) | FEW | more

@pytest.mark.parametrize("change, message", [
    (dict(seeds=1), "seeds must be at least 2, diversity is not defined for fewer; got 1"),
    (dict(seeds=[5]), "seeds must be at least 2"),
    (dict(seeds=[5, 5]), "seeds must differ"),
    (dict(rewards="tiny"), "judge must be given, a reward that was not trained against; got tiny alone"),
    (dict(rewards=["tiny"], judge="tiny"), "judge must be held out; tiny was trained against"),
    (dict(rewards=["0.5*tiny + 0.5*tiny-judge"], judge="tiny-judge"), "judge must be held out; tiny-judge was trained against"),
    (dict(rewards=[]), "rewards must hold the reward that was trained against"),
    (dict(rewards=["tiny", "tiny-judge", "tiny-judge"]), None),
    (dict(rewards={"seed": "tiny", "judge": "tiny-judge"}), "'seed' is a column of the table"),
    (dict(rewards=["tiny", "beauty"]), "unknown reward 'beauty'"),
    (dict(weights=["linear", "linear"]), "weights must differ from one another; linear is there 2 times"),
    (dict(weights=["power_2", "power_2.0"]), "power_2 is there 2 times"),
    (dict(weights=[]), "at least one weight"),
    (dict(weights="linear"), "weights must be a list"),
    (dict(weights=["cubic"]), "unknown weight 'cubic'"),
    (dict(weights=[[0., 1., 1.]]), "one weight a step: T is 2, the table has 3"),
    (dict(scales=[.5, .5]), "scales must differ from one another; scale_0.5"),
    (dict(scales=[1]), "scales must differ from 1"),
    (dict(scales=[-1.]), "scales must be positive numbers; got -1.0"),
    (dict(prompts=[]), "prompts must hold at least one text"),
    (dict(prompts=["a", "a"]), "prompts must differ from one another; 'a' is there 2 times"),
    (dict(features="eyes"), "features must be efficientnet"),
    (dict(chunk=0), "chunk must be a whole number, at least 1; got 0"),
    (dict(steps=-1), "steps must be a whole number"),
])
def test_bad_input(model, drawn, tmp_path, change, message):
    given = parts(**change)
    if message is None: # the same judge twice is one judge
        assert [r.name for r in judged(given["rewards"], device="cpu")] == ["tiny", "tiny-judge"]
        return
    for folder in None, tmp_path/"new":
        if folder and "weights" in change and not isinstance(change["weights"][:1], str) and isinstance((change["weights"] or [""])[0], list): message = "must be names"
        with pytest.raises(ValueError, match=message.replace("(", r"\(")): sweep(model, given["rewards"], given["prompts"], given["weights"], folder=folder, **{k: v for k, v in given.items() if k not in ("rewards", "prompts", "weights")})
        assert not drawn and not (tmp_path/"new").exists()


def test_unwritable_folder(model, rewards, drawn, tmp_path):
    (tmp_path/"file").write_text("here already")
    for folder in tmp_path/"file", tmp_path/"file"/"below":
        with pytest.raises(ValueError, match="folder must be one that can be written to; .*file"): sweep(model, rewards, PROMPTS, ["base"], folder=folder, **FEW)
    assert not drawn and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("what, change", [("model", dict(lora=True)), ("prompts", dict(prompts=PROMPTS[:1])), ("prompts", dict(prompts=PROMPTS[::-1])), ("seeds", dict(seeds=3)),
                                          ("steps", dict(steps=3)), ("guidance_scale", dict(guidance_scale=2.)), ("rewards", dict(judge="jpeg")), ("features", dict(features="tiny"))])
def test_a_file_of_another_sweep(model, rewards, drawn, tmp_path, what, change):
    sweep(model, rewards, PROMPTS, ["base"], folder=tmp_path, **FEW)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    drawn.clear()
    options = FEW | {k: v for k, v in change.items() if k not in ("lora", "prompts")}
    with pytest.raises(ValueError, match=f"folder must be new or hold a sweep of the same {what}; {tmp_path} holds one with"):
        with lora_scale(model.network, .5 if "lora" in change else 1.): sweep(model, rewards, change.get("prompts", PROMPTS), ["base"], folder=tmp_path, **options)
    assert not drawn and {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_files_that_are_no_sweep(model, rewards, drawn, tmp_path):
    (tmp_path/"sweep.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has a sweep.csv without its sweep.json"): sweep(model, rewards, PROMPTS, ["base"], folder=tmp_path, **FEW)
    with pytest.raises(ValueError, match="lacks the columns"): read_sweep(tmp_path)
    (tmp_path/"sweep.json").write_text("{")
    with pytest.raises(ValueError, match="folder must hold a sweep that can be read"): sweep(model, rewards, PROMPTS, ["base"], folder=tmp_path, **FEW)
    with pytest.raises(ValueError, match="there is no"): read_sweep(tmp_path/"nowhere")
    assert not drawn


def test_other_bad_input(model, rewards, drawn):
    def blind(images, prompts): return images.mean((1, 2, 3))
    with pytest.raises(ValueError, match="features must be given"): sweep(model, [Reward("a", blind), Reward("b", blind)], PROMPTS, ["base"], **FEW)
    plain = load("tiny", adapter=None, device="cpu")
    with pytest.raises(ValueError, match="model must carry an adapter"): sweep(plain, rewards, PROMPTS, ["base"], **FEW)
    with pytest.raises(ValueError, match="scales need a LoRA"), lora_scale(plain.network, .5): pass
    full = load("tiny", adapter="full", device="cpu")
    with pytest.raises(ValueError, match="scales need a LoRA"): sweep(full, rewards, PROMPTS, ["base"], scales=[.5], **FEW)
    assert not drawn


# the summary and the rule

def made(**points):
    "A table without a model: name -> (judge of each prompt, diversity)."
    rows = [dict(weight="draft" if n.startswith("scale_") else n, scale=float(n[6:]) if n.startswith("scale_") else 1., prompt=f"p{k}", seed=s, reward=5*g+s, judge=j+s, diversity=d, vendi=1.)
            for n, (g, js, d) in points.items() for k, j in enumerate(js) for s in (0, 1)]
    return pd.DataFrame(rows)

def test_summary_is_paired(table):
    means = summary(table).set_index("name")
    assert list(means.index) == ["base", "linear", "step_0.5", "draft", "scale_0.5"] and measured(table)[:2] == ["tiny", "tiny-judge"]
    def tensor(weight): return torch.tensor(table[(table.weight == weight) & (table.scale == 1)]["tiny"].to_numpy().reshape(2, 2))
    row = means.loc["linear"]
    assert math.isclose(row["tiny"], tensor("linear").mean(), rel_tol=1e-9)
    np.testing.assert_allclose((row["tiny_low"], row["tiny_high"]), interval(tensor("linear")))
    np.testing.assert_allclose((row["tiny_gain_low"], row["tiny_gain_high"]), paired_interval(tensor("linear"), tensor("base")))
    pd.testing.assert_frame_equal(summary(table.sample(frac=1, random_state=0).sort_values("weight", key=lambda c: c.map(list(WEIGHTS+("step_0.5",)).index), kind="stable")).set_index("name").sort_index()[["tiny"]],
                                  means.sort_index()[["tiny"]])


def test_pairing_narrows_the_interval():
    "Prompts that differ by far more than the weights do."
    hard = [1., 5., 9., 20., 33.]
    means = summary(made(base=(0, hard, .4), linear=(1, [h+1+.01*k for k, h in enumerate(hard)], .3))).set_index("name").loc["linear"]
    assert means.judge_high-means.judge_low > 10 and 0 < means.judge_gain_high-means.judge_gain_low < .1


def test_summary_of_one_prompt_and_without_base():
    one = summary(made(base=(0, [1.], .4), draft=(1, [2.], .3)))
    assert one.judge_gain.tolist() == [0, 1] and one.judge_low.isna().all()
    assert recommended_weight(one, "judge") == "base" # nothing tells it from chance
    alone = summary(made(linear=(0, [1., 2.], .4)))
    assert "judge_gain" not in alone
    with pytest.raises(ValueError, match="weights must hold 'base'"): recommended_weight(alone, "judge")
    lame = made(base=(0, [1., 2.], .4), draft=(1, [2.], .3))
    with pytest.raises(ValueError, match="the same prompts; draft has 1 of 2"): summary(lame)


STEADY = [1., 2., 3.]
def up(g): return [v+g+.01*k for k, v in enumerate(STEADY)]

@pytest.mark.parametrize("points, keep, best", [
    (dict(base=(0, STEADY, .4), linear=(1, up(1), .3), draft=(2, up(2), .1)), .5, "linear"),     # draft keeps a quarter
    (dict(base=(0, STEADY, .4), linear=(1, up(1), .3), draft=(2, up(2), .1)), .25, "draft"),
    (dict(base=(0, STEADY, .4), linear=(1, up(1), .3), draft=(2, up(.5), .25)), .5, "linear"),   # dominated
    (dict(base=(0, STEADY, .4), linear=(1, up(-.2), .3), draft=(2, up(-1), .2)), .5, "base"),    # hacked
    (dict(base=(0, STEADY, .4), linear=(1, [4., -1., 5.], .3)), .5, "base"),                     # may be chance
    (dict(base=(0, STEADY, .4), **{"scale_0.5": (1, up(3), .4)}, linear=(1, up(1), .3)), .5, "linear"), # a file can recommend no scale
])
def test_rule(points, keep, best): assert recommended_weight(summary(made(**points)), "judge", keep) == best


def test_report_says_what_it_saw():
    best, words = report(made(base=(0, STEADY, .4), linear=(1, up(1), .3), draft=(2, up(-1), .2)))
    assert best == "linear" and words.startswith("Recommended weight: `linear` (judge +1.01 [+1, +1.02] over the base")
    assert "75% of the base's diversity" in words and "Rule: among the weights that no other one beats" in words and "on 3 prompts with 2 seeds each" in words
    assert "reward is highest for `draft`" in words and "falls: the reward was hacked" in words and words.count("\n") == 1
    best, words = report(made(base=(0, STEADY, .4), draft=(2, up(1), .1)))
    assert best == "base" and "no weight is better than the base in the eyes of judge" in words and "rises, too" in words


def test_rule_refuses(table):
    means = summary(table)
    with pytest.raises(ValueError, match="keep must lie"): recommended_weight(means, "tiny", 2)
    with pytest.raises(ValueError, match="judge must be a column"): recommended_weight(means, "beauty")
    with pytest.raises(ValueError, match="for one run; the table holds several"): recommended_weight(means.assign(run=["", "a", "b", "b", "b"]), "tiny")


# what it leaves

@pytest.fixture
def run(model, tmp_path):
    "The folder of a finished run, without the training."
    folder = tmp_path/"run"
    model.save(folder)
    (folder/"config.yaml").write_text(f"model: tiny\nreward: tiny\nsample_prompts: {json.dumps(PROMPTS)}\n")
    (folder/"README.md").write_text("# Card\n\nText.\n")
    return folder


def test_command(run, tmp_path, capsys):
    before = load_file(run/"pytorch_lora_weights.safetensors")
    command = ["sweep", "--run", str(run), "--weights", "base,linear,power_2,draft", "--scales", "0.5", "--seeds", "2", "--num_inference_steps", "2", "--output_dir", str(tmp_path/"out")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert {p.name for p in (tmp_path/"out").iterdir()} >= {"sweep.csv", "sweep.json", "pareto.png", "grid.png", "report.md"}
    words = (tmp_path/"out"/"report.md").read_text()
    assert words in said and words.count("\n") == 1
    best = words.split("`")[1]
    assert len(read_sweep(tmp_path/"out")) == 5*2*2
    after = load_file(run/"pytorch_lora_weights.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert load("tiny", adapter=run, device="cpu").recommended == best
    card = (run/"README.md").read_text()
    assert main(command) == 0 # nothing left to draw, the card's line is replaced
    assert (run/"README.md").read_text() == card and card.startswith("# Card\n\nText.\n\nRecommended weight: `"+best) and card.count("Recommended weight") == 1


def test_pictures(model, rewards, tmp_path):
    t = sweep(model, rewards, PROMPTS, ["base", "draft"], scales=[.5], folder=tmp_path, **FEW)
    assert sorted(p.name for p in (tmp_path/"pictures").iterdir()) == [f"{n}-{s}.png" for n in ("base", "draft", "scale_0.5") for s in (0, 1)]
    write_report(tmp_path, t)
    for name in "pareto.png", "grid.png": assert 1000 < (tmp_path/name).stat().st_size < 200_000
    expected = sample(model, [PROMPTS[0]], "draft", steps=2, seed=[1]).images[0]
    assert (module._picture(tmp_path/"pictures"/"draft-1.png")-expected).abs().max() < 2/255


def test_keep_recommendation_without_a_card(run):
    (run/"README.md").unlink()
    assert keep_recommendation(run, "linear", "why") == [run/"pytorch_lora_weights.safetensors"]
    with pytest.raises(ValueError, match="unknown weight"): keep_recommendation(run, "cubic", "why")


@pytest.mark.parametrize("argv, message", [
    (["--weights", "linear,draft"], "weights must hold base"), (["--weights", "base,base"], "base is there 2 times"), (["--seeds", "1"], "seeds must lie in 2..10000"),
    (["--scales", "a"], "scales must be numbers"), (["--model", "owner/name"], "judge must be given"), (["--judge", "tiny"], "judge must be held out"),
    (["--keep", "2"], "keep must lie in"), (["--prompts", "nowhere.txt"], "there is no nowhere.txt"), (["--output_dir", __file__], "output_dir must be a folder"),
])
def test_command_refuses(run, argv, message, capsys, drawn, monkeypatch):
    if "owner/name" in argv: monkeypatch.setattr("draft_nb.models.load", lambda *_, **__: load("tiny", adapter=run, device="cpu"))
    card = (run/"README.md").read_text()
    assert main(["sweep", "--run", str(run), *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and len(err.splitlines()) == 1
    assert not drawn and not (run/"sweep").exists() and (run/"README.md").read_text() == card


# several runs

def test_compare(model, run, tmp_path):
    "Runs, LoRA files and checkpoints on one table; the base is drawn once and belongs to none."
    state = dict(step=1, parameters=[p.detach()*0 for p in model.parameters()], average=None)
    (run/"checkpoints").mkdir()
    torch.save(state, run/"checkpoints"/"step_000001.pt")
    runs = {"whole": run, "file": run/"pytorch_lora_weights.safetensors", "zero": run/"checkpoints"/"step_000001.pt"}
    t = compare("tiny", runs, ["tiny", "tiny-judge"], PROMPTS, ["base", "draft"], scales={"whole": [.5]}, folder=tmp_path/"sweeps", device="cpu", **FEW)
    means = summary(t).set_index("name")
    assert list(means.index) == ["base", "whole draft", "whole scale_0.5", "file draft", "zero draft"]
    assert set(KEYS) < set(t.columns) and t[t.weight == "base"].run.eq("").all()
    assert math.isclose(means.loc["zero draft", "tiny_gain"], 0, abs_tol=1e-3) and math.isclose(means.loc["file draft", "tiny"], means.loc["whole draft", "tiny"], abs_tol=1e-3)
    assert {p.name for p in (tmp_path/"sweeps").iterdir()} == set(runs)
    (run/"checkpoints"/"step_000001.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="a checkpoint must be whole"): compare("tiny", dict(a=runs["zero"]), ["tiny", "tiny-judge"], PROMPTS, device="cpu", **FEW)
    with pytest.raises(ValueError, match="runs must be finished; there is no"): compare("tiny", dict(a=tmp_path/"nowhere"), ["tiny", "tiny-judge"], PROMPTS, **FEW)
    with pytest.raises(ValueError, match="at least one run"): compare("tiny", {}, ["tiny", "tiny-judge"], PROMPTS, **FEW)


def test_stored_means_are_enough(table, tmp_path):
    by_prompt(table).to_csv(tmp_path/"means.csv", index=False)
    pd.testing.assert_frame_equal(summary(read_sweep(tmp_path/"means.csv")), summary(table))


def test_at_equal_diversity():
    flat = [0., 0., 0.]
    t = made(base=(0, flat, .4), linear=(0, [1., 1., 1.], .3), draft=(0, [2., 2., 2.], .1), **{"scale_0.5": (0, [1., .7, 1.3], .2), "scale_2": (0, flat, .05)})
    curve = ["draft", "base", "linear"] # in any order
    mean, low, high = at_equal_diversity(t, curve, "scale_0.5", "judge")
    assert math.isclose(mean, .5) and .1 < low < .5 < high < .9
    assert at_equal_diversity(t, curve, "scale_0.5", "judge") == (mean, low, high) # the same resamples
    assert all(map(math.isnan, at_equal_diversity(t, curve, "scale_2", "judge")))
    with pytest.raises(ValueError, match="curve and rival must be names of points"): at_equal_diversity(t, curve, "scale_3", "judge")


# the plot

def test_plot_of_a_sweep(table):
    means = summary(table)
    points = tradeoff_points(means, "tiny-judge")
    assert {p["group"] for p in points} == {"annealing", "LoRA scale"} and all(p["reward_low"] <= p["reward"] <= p["reward_high"] for p in points)
    assert not any("group" in p for p in tradeoff_points(means[means.scale == 1], "tiny"))
    fig = tradeoffs({m: tradeoff_points(means, m) for m in ("tiny", "tiny-judge")}, front=True)
    assert isinstance(fig, Plot) and [ax.get_ylabel() for ax in fig.axes] == ["tiny", "tiny-judge"]
    shown = {t.get_text() for ax in fig.axes for t in ax.texts}
    assert {"base", "linear", "step_0.5", "draft", "scale_0.5"} <= shown
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["Pareto front", "annealing", "LoRA scale"]
    looks = {(line.get_marker(), str(line.get_linestyle()), line.get_color()) for line in fig.axes[0].get_lines() if line.get_label() in ("annealing", "LoRA scale")}
    assert len(looks) == 2 and len({m for m, *_ in looks}) == 2 # a marker each, for eyes without colour


def test_the_front_is_the_front():
    points = [dict(name=n, reward=r, diversity=d) for n, r, d in (("a", 1, 4), ("b", 3, 3), ("c", 2, 2), ("d", 4, 1))]
    line = next(o for o in tradeoffs({"r": points}, front=True).axes[0].get_lines() if o.get_label() == "Pareto front")
    assert list(zip(*line.get_data())) == [(1, 4), (3, 3), (4, 1)]
    with pytest.raises(ValueError, match="panels must hold"): tradeoffs({})
