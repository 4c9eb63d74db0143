"The app: its functions without a browser, the page as it is built, and one real server with real requests."
import base64
import json
import re
import socket
import subprocess
import sys
import threading
import types
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client
from PIL import Image
from torch.testing import assert_close

from draft_nb import demo
from draft_nb.adapters import lora_layers
from draft_nb.anneal import parse_weight
from draft_nb.demo import Request, Stage
from draft_nb.models import asset, load
from draft_nb.rewards import Reward, available, load_reward
from draft_nb.sampler import sample

ROOT = Path(__file__).resolve().parent.parent
FOX = Request("an emoji of a fox", seed=3, num_images=2, steps=2, weight="linear")


@pytest.fixture(scope="module")
def runs(tmp_path_factory): return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def model():
    "The embedded model with a LoRA that was shaken: base and aligned differ whatever the shipped weights are."
    model = load("tiny", rank=4)
    for j,p in enumerate(model.parameters()): torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(j))
    return model


@pytest.fixture(scope="module")
def lora(model, runs):
    "The same LoRA as a run folder."
    model.save(runs/"shaken")
    (runs/"shaken"/"config.yaml").write_text("model: tiny\n")
    return runs/"shaken"


@pytest.fixture(scope="module")
def reward(): return load_reward("tiny")


@pytest.fixture(scope="module")
def judge(): return load_reward("tiny-judge")


@pytest.fixture
def stage(model, reward, judge, runs, lora): return Stage(model, reward, judge, runs, lora)


@pytest.fixture(scope="module")
def rows(model, reward, judge, runs):
    one = Stage(model, reward, judge, runs)
    return {k: demo.shown_row(one, FOX, k) for k in demo.ABOUT}


def images(row): return row.samples.images


def alike(got, expected):
    "The same pictures up to rounding: one level of 255."
    for a,b in zip(got, expected, strict=True): np.testing.assert_allclose(np.asarray(a, dtype=int), np.asarray(b, dtype=int), atol=1)


# the weight

def test_weights_of_the_sliders():
    "Every position of every slider is a weight, and its curve can be drawn."
    for schedule,(_,low,high,step,value,_) in demo.SCHEDULES.items():
        assert low<=value<=high
        for j in range(round((high-low)/step)+1): demo.scaled(demo.weight_of(schedule, low+j*step))
        for p in (low, value, high): assert "<svg" in demo.curve_html(demo.weight_of(schedule, p), .5, 7)
        if schedule!="linear": assert demo.schedule_of(demo.weight_of(schedule, value))==(schedule, value)


def test_weight_of():
    assert [demo.weight_of(s, .5) for s in demo.SCHEDULES]==["constant_0.5", "linear", "power_0.5", "sigmoid_0.5", "step_0.5"]
    for schedule,value,message in (("cubic", 1, "schedule must be one of constant"), ("constant", None, "number"), ("power", float("nan"), "number")):
        with pytest.raises(ValueError, match=message): demo.weight_of(schedule, value)
    assert demo.schedule_of("draft")==("constant", 1.) and demo.schedule_of("linear")[0]=="linear"
    with pytest.raises(ValueError, match="weight must be one of"): demo.schedule_of("table")


def test_scaled():
    assert [demo.scaled("power_2", .5)(i, 4) for i in range(4)]==[.5*parse_weight("power_2")(i, 4) for i in range(4)]
    assert demo.scaled("linear", .25).__name__=="0.25 x linear" and demo.scaled("sigmoid_0.3").__name__=="sigmoid_0.3"
    soft = [demo.scaled("sigmoid_0.5")(i, 20) for i in range(20)]
    assert soft==sorted(soft) and soft[0]<.01 and soft[10]==.5
    for bad,message in ((("sigmoid_2",), "sigmoid must be a number in"), (("sigmoid_x",), "got x"), (("linear", -1), "strength"), (("linear", None), "nothing"), ((None,), "name")):
        with pytest.raises(ValueError, match=message): demo.scaled(*bad)


def test_curve_in_words():
    assert "step_0.6: w goes from 0.00 to 1.00 in 5 steps, 0.40 on average" in demo.curve_html("step_0.6", 1, 5)
    assert "0.5 × step_0.6" in demo.curve_html("step_0.6", .5, 5) and "1 steps" in demo.curve_html("linear", 1, 1)
    with pytest.raises(ValueError, match="at least 1"): demo.curve_html("linear", 1, 0)


# requests

GOOD = dict(prompt="a fox", seed=0, num_images=4, steps=20, guidance_scale=3., weight="linear")
BAD = [(dict(prompt=""), "prompt must say"), (dict(prompt=" \n "), "empty"), (dict(prompt=None), "empty"), (dict(prompt="x"*10_000), "has 10000"),
       (dict(seed=1.5), "seed must be a whole number from 0 to 4294967295; got 1.5"), (dict(seed=-1), "got -1"), (dict(seed=2**32), "got 4294967296"),
       (dict(seed=None), "seed must be .* got nothing"), (dict(seed="1"), "seed"), (dict(seed=float("nan")), "seed"), (dict(seed=float("inf")), "seed"),
       (dict(seed=True), "seed"), (dict(num_images=0), "num_images must be a whole number from 1 to 8; got 0"), (dict(num_images=1000), "got 1000"),
       (dict(num_images=2.5), "num_images"), (dict(steps=0), "steps must be a whole number from 1 to 100; got 0"), (dict(steps=101), "got 101"),
       (dict(guidance_scale=float("nan")), "guidance_scale"), (dict(guidance_scale=-1), "guidance_scale"), (dict(guidance_scale=None), "got nothing"),
       (dict(weight="cubic"), "unknown weight 'cubic'"), (dict(weight="power_0"), "positive"), (dict(weight=[0., 1.]), "name"), (dict(weight=None), "name"),
       (dict(strength=3), "strength must be a number from 0 to 2; got 3"), (dict(adapter=7), "adapter"), (dict(weight="sigma_linear"), "noise level")]


def test_good_requests():
    clean = Request(**GOOD|dict(prompt=" a fox\n", seed=7.))
    assert clean.prompt=="a fox" and clean.seed==7 and isinstance(clean.seed, int) and len(clean.curve)==20
    for edge in (dict(prompt="x"*1000), dict(seed=2**32-1), dict(num_images=8), dict(num_images=1), dict(steps=1), dict(steps=100), dict(guidance_scale=0)):
        Request(**GOOD|edge)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_requests(change, message):
    "Refused in one line, before any model is asked."
    with pytest.raises(ValueError, match=message): Request(**GOOD|change)
    with pytest.raises(gr.Error) as e, demo.readable(): Request(**GOOD|change)
    assert re.search(message, e.value.message.replace("&#x27;", "'")) and "\n" not in e.value.message and not e.value.print_exception


def test_messages():
    "gradio shows a message as HTML; what does not fit into memory is one; a fault of ours is none."
    with pytest.raises(gr.Error) as e, demo.readable(): Request(**GOOD|dict(weight="<img src=x>"))
    assert "<" not in e.value.message
    for fault in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")):
        with pytest.raises(gr.Error, match="does not fit") as e, demo.readable(): raise fault
        assert "Allocator" not in e.value.message
    with pytest.raises(RuntimeError, match="shapes"), demo.readable(): raise RuntimeError("shapes")


def test_fields_say_what_is_wrong():
    verdicts = demo.check_fields("", .5, 1000, 20, None, "as started", "power", 2, 1, 1, "base and annealed")
    assert [v["is_valid"] for v in verdicts]==[False, False, False, True, False]+[True]*6
    assert "whole number" in verdicts[1]["message"] and "got nothing" in verdicts[4]["message"]


def test_links():
    for r in (FOX, Request("a & b = c? ü", weight="sigmoid_0.3", strength=.25, adapter="app-1"), Request("plain")):
        from urllib.parse import parse_qsl
        assert demo.request_of(dict(parse_qsl(demo.link_of(r)[1:])))==r
    assert demo.request_of({})is None and demo.request_of(dict(__theme="dark")) is None
    for query,message in ((dict(prompt="a", seed="x"), "seed as a number; it says x"), (dict(prompt="a", num_images="99"), "1 to 8"), (dict(prompt=""), "empty"), (dict(prompt="a", weight="cubic"), "unknown")):
        with pytest.raises(ValueError, match=message): demo.request_of(query)


# drawing

@pytest.mark.parametrize("weight", ["base", "draft", "linear", "step_0.6"])
def test_drawn_is_the_samplers(model, weight):
    "Bit for bit, and with previews of the right shape."
    request = replace(FOX, weight=weight, steps=3, guidance_scale=2.)
    steps = demo.drawn(model, request, every=0.)
    got = [next(steps) for _ in range(3)]
    assert [o[:2] for o in got]==[(1,3), (2,3), (3,3)] and [o[2] is None for o in got]==[False, False, True]
    assert got[0][2].shape==(2,3,64,64)
    expected = sample(model, FOX.prompt, weight=weight, seed=3, num_images=2, steps=3, guidance_scale=2.)
    assert torch.equal(demo.finished(steps).images, expected.images)


def test_rows_share_the_noise(stage, rows):
    "w = 0 is the base and w = 1 the aligned model, bit for bit, whatever they are called."
    assert not torch.equal(images(rows["base"]), images(rows["aligned"]))
    for weight,strength,same in (("constant_0", 1, "base"), ("linear", 0, "base"), ("constant_1", 1, "aligned"), ("step_0", 1, "aligned")):
        assert torch.equal(images(demo.finished(demo.row_of(stage, replace(FOX, weight=weight, strength=strength)))), images(rows[same]))


def test_rows_are_kept(stage, monkeypatch):
    row = demo.finished(demo.row_of(stage, FOX))
    monkeypatch.setattr(demo, "drawn", None)
    assert demo.finished(demo.row_of(stage, FOX)) is row and demo.finished(demo.row_of(stage, replace(FOX, strength=1))) is row
    for other in (dict(seed=4), dict(prompt="a hen"), dict(steps=4), dict(num_images=1), dict(guidance_scale=2), dict(weight="power_2"), dict(strength=.5), dict(adapter="shaken")):
        with pytest.raises(TypeError): next(demo.row_of(stage, replace(FOX, **other)))


def test_base_is_the_same_for_every_adapter():
    assert replace(FOX, weight="base", adapter="one").key==replace(FOX, strength=0, adapter="two").key
    assert replace(FOX, weight="draft", adapter="one").key!=replace(FOX, weight="draft", adapter="two").key


def test_kept_is_bounded(rows):
    row = rows["base"]
    kept = demo.Kept(limit=3*row.nbytes+1)
    for k in range(50): kept.put(k, row)
    assert list(kept.rows)==[47, 48, 49]
    kept.get(47)
    kept.put(50, row)
    assert list(kept.rows)==[49, 47, 50] and kept.get(48) is None
    small = demo.Kept(limit=1)
    small.put(0, row)
    assert small.get(0) is None


def test_stops_are_the_exact_pictures_up_to_rounding(stage):
    asked = [replace(FOX, strength=s) for s in demo.STOPS]
    for r,row in zip(asked, demo.rows_of(stage, asked)):
        assert torch.allclose(images(row), images(demo.finished(demo.row_of(stage, r))), atol=.01)
    assert demo.rows_of(stage, asked)[1] is not demo.finished(demo.row_of(stage, asked[1])) or stage.kept.get(asked[1].key)


def test_scores(rows, reward, judge):
    for r in rows.values():
        assert torch.equal(r.reward, reward(images(r), r.samples.prompts)) and torch.equal(r.judge, judge(images(r), r.samples.prompts))
        f = torch.nn.functional.normalize(judge.features(images(r)), dim=1)
        assert r.diversity==pytest.approx(1-(f[0]@f[1]).item(), abs=1e-5)
    plain = Reward("bright", lambda images,prompts: images.mean((1,2,3)))
    assert demo.scored(rows["base"].samples, reward, plain).diversity is None


def test_single_picture_has_no_diversity(stage):
    one = demo.finished(demo.row_of(stage, replace(FOX, num_images=1)))
    assert one.diversity is None and "needs two pictures" in demo.row_html("annealed", one, one)


def test_model_is_left_as_it_was(model, stage):
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    list(demo.show(stage, replace(FOX, seed=9)))
    assert all(torch.equal(a, b) and b.requires_grad and b.grad is None for a,b in zip(before, model.parameters()))
    assert torch.equal(state, torch.get_rng_state()) and not any(m._disable_adapters for m in lora_layers(model.network))


# many users

def test_drawings_take_turns(stage, rows, model, monkeypatch):
    "Three at once, of three weights: each gets what it gets alone, no prediction overlaps another, and nothing is held between steps."
    inside, most, got = [], [], {}
    predict = model.call
    def watched(*args):
        inside.append(threading.current_thread().name)
        most.append(len(inside))
        try: return predict(*args)
        finally: inside.pop()
    monkeypatch.setattr(model, "call", watched)
    weights = dict(base="base", annealed="linear", aligned="draft")
    def ask(k): got[k] = demo.finished(demo.row_of(stage, replace(FOX, weight=weights[k])))
    threads = [threading.Thread(target=ask, args=(k,)) for k in weights]
    for t in threads: t.start()
    for t in threads: t.join()
    assert set(most)=={1} and not inside
    assert {t.name for t in threading.enumerate() if t.name.startswith("drawing")}
    for k,row in rows.items(): assert_close(images(got[k]), images(row), atol=1e-5, rtol=0) # other threads
    steps = demo.row_of(stage, replace(FOX, seed=8))
    next(steps)
    assert stage.alone(lambda: 1)==1  # nothing is held between steps


def test_newest_request_wins(stage):
    "An older one of the same user ends at its next step without a word; another user's goes on."
    ann,bob = demo.show(stage, FOX, "ann"),demo.show(stage, replace(FOX, seed=5), "bob")
    for o in (ann, bob): next(o); next(o)
    newer = list(demo.show(stage, replace(FOX, strength=.5), "ann"))
    assert list(ann)==[] and newer[-1]["status"]
    assert "done" in {k for o in bob for k in o}
    assert {k for o in newer for k in o}=={"status", "base", "annealed", "aligned", "done"}


def test_programs_do_not_end_each_other(stage):
    assert stage.turn("")() and stage.turn("")()
    first = stage.turn("ann")
    assert first() and stage.turn("ann")() and not first()


def test_users_are_forgotten(stage):
    for k in range(10_050): stage.turn(f"user {k}")
    assert len(stage.newest)==10_000


def test_show(stage):
    got = list(demo.show(stage, FOX, "ann"))
    assert "Starting" in got[0]["status"] and "not finished" in got[1]["base"]
    shown = {k: v for o in got for k,v in o.items()}
    assert [re.findall("<h2>(.*?)</h2>", shown[k])[0] for k in demo.ABOUT]==["Base", "Annealed", "Aligned"]
    assert re.findall('data-at="(.*?)"', shown["annealed"])==["1", "0", "0.25", "0.5", "0.75"] and shown["annealed"].count("dn-on")==1
    assert shown["done"]==FOX and re.search(r"base \d+\.\d s · annealed .* · aligned .* · stops", shown["status"])
    again = list(demo.show(stage, replace(FOX, strength=.3), "ann"))
    assert "base kept" in again[-1]["status"] and "aligned kept" in again[-1]["status"]
    assert re.findall('data-at="(.*?)"', again[-1]["annealed"])==["0.3", "0", "0.25", "0.5", "0.75", "1"]
    assert not any("not finished" in o.get("base", "") for o in again)


# what is said about the rows

def test_change():
    assert demo.change(2., 1.)=="+1.00 higher" and demo.change(1., 2.)=="−1.00 lower"
    assert demo.change(2.004, 2.)=="no change" and demo.change(-.1, .1, ("worse", "better"))=="−0.200 worse"


def made(rewards, judges, shade=(0., .5, 1.), diversity=.2):
    "Rows with given mean scores."
    from draft_nb.sampler import Samples
    def row(r, j, s, w): return demo.Row(Samples(torch.full((2,3,4,4), s), torch.zeros(2,4,1,1), ["p"]*2, w, 0), torch.tensor([r,r]), torch.tensor([j,j]), diversity)
    return {k: row(*o) for k,o in zip(demo.ABOUT, zip(rewards, judges, shade, ("base", "linear", "draft")))}


def test_measures():
    r = made((20., 20.5, 21.), (3., 3., 2.5))
    assert demo.measures(r["aligned"], r["base"])==[("mean reward", "21.00", "+1.00 higher"), ("mean judge", "2.50", "−0.50 lower"), ("diversity", "0.200", "no change")]
    assert [c for *_,c in demo.measures(r["base"], r["base"])]==["", "", ""]


def test_remarks():
    assert "hacked" in demo.remarks(made((1., 2., 3.), (3., 2., 1.)))[-1]
    assert "not learned" in demo.remarks(made((1., 1., 1.), (1., 1., 1.), shade=(.5, .5, .5)))[0]
    assert demo.remarks(made((1., 2., 3.), (1., 2., 3.)))==["The blend has 50% of the reward that aligning gains, and 100% of the base's variety."]
    assert demo.remarks(made((1., 1., 1.002), (1., 1., .999)))==[], "what is shown as no change is none"


def test_html_holds_every_picture(rows):
    for k,r in rows.items():
        uris = re.findall(r'src="data:image/png;base64,(.*?)"', text := demo.row_html(k, r, rows["base"]))
        for uri,picture in zip(uris, r.samples.pil(), strict=True):
            assert Image.open(BytesIO(base64.b64decode(uri))).tobytes()==picture.tobytes()
        assert f"reward {r.reward[0]:.{demo._digits(r.reward[0])}f}" in text and len(re.findall('alt="[^"]+"', text))==2


def test_large_pictures_are_shown_small():
    from PIL import Image as I
    uri = demo._data_uri(I.new("RGB", (1024, 512)), 384)
    assert I.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).size==(384, 192)


def test_html_is_escaped(stage):
    "Neither a tag nor what gradio's templates would fill in."
    evil = '"><script>alert(1)</script>{{value}}${1}`'
    request = Request(evil, **{k: getattr(FOX, k) for k in ("num_images", "steps")})
    texts = [v for o in demo.show(stage, request) for v in o.values() if isinstance(v, str)]
    texts += [demo.closely(stage, request, 0, "base and aligned")[1], demo.take_away(stage, request, 0), demo.tradeoff_html(list(demo.tradeoff(stage, request)))]
    assert not any(bad in o for o in texts for bad in ("<script", "{{", "${", "`", '""'))
    assert "&lt;script&gt;" in texts[-3]


# one picture, and taking it away

def test_closely(stage, rows):
    (left,right),text = demo.closely(stage, FOX, 1, "base and aligned")
    assert left.size==right.size==(384,384) and text.count("<img")==2 and f"Base: reward {rows['base'].reward[1]:.2f}" in text
    assert demo.closely(stage, FOX, 7, "base and aligned")[1]==text, "a picture that is not there is the last"
    with pytest.raises(ValueError, match="pair must be one of base and annealed"): demo.closely(stage, FOX, 0, "x")


def test_png_and_json(stage, rows, lora):
    text = demo.take_away(stage, FOX, 1)
    picture,settings = (base64.b64decode(o) for o in re.findall(r'href="data:[^,]*,(.*?)"', text))
    png = Image.open(BytesIO(picture))
    assert png.tobytes()==rows["annealed"].samples.pil()[1].tobytes()
    said = json.loads(settings)
    assert json.loads(png.text["draft_nb"])==said and said["prompt"]==FOX.prompt and said["weights"]==FOX.curve and said["model"]=="tiny"
    assert said["scores"]["base"]["reward"]==rows["base"].reward.tolist() and Request(**{k: said[k] for k in GOOD})==FOX


@pytest.mark.parametrize("change", [{}, dict(strength=.3), dict(weight="sigmoid_0.4"), dict(weight="sigmoid_0.4", strength=.7, adapter="shaken"), dict(prompt="it's \"a\" \\ fox")], ids=str)
def test_copied_python_draws_the_same(stage, change, tmp_path, monkeypatch):
    "The snippet runs as it is and gives the pictures that were shown, up to rounding: it reads the weights anew."
    request = replace(FOX, **change)
    code = demo.snippet(request, "tiny", demo.folder_shown(stage, request))
    monkeypatch.chdir(tmp_path)
    there = {}
    exec(compile(code, "snippet", "exec"), there)
    shown = demo.shown_row(stage, request, "annealed").samples.pil()
    alike(there["pictures"], shown)
    assert Image.open(tmp_path/"picture-1.png").tobytes()==there["pictures"][0].tobytes()


def test_snippet_of_the_package():
    assert 'adapter=asset("tiny-aligned")' in demo.snippet(FOX) and "import asset, load" in demo.snippet(FOX)


# the trade-off

def test_tradeoff(stage):
    points = list(demo.tradeoff(stage, replace(FOX, strength=.4)))
    assert [p for p in points if p["current"]]==[points[0]] and points[0]["strength"]==.4
    assert {p["weight"] for p in points}=={"linear", *demo.RIVALS} and {p["strength"] for p in points}=={.4, *demo.STOPS}
    drawn = demo.tradeoff_html(points)
    assert drawn.count('role="button"')==drawn.count('tabindex="0"')==len(points) and drawn.count("dn-now")==1
    with pytest.raises(ValueError, match="at least 2"): next(demo.tradeoff(stage, replace(FOX, num_images=1)))


def test_labels_do_not_cover_each_other():
    for ys in ([5., 5., 5., 5.], [0., 3., 100., 101.], [9.], []):
        placed = demo.spread(ys)
        assert all(b-a>=13.99 for a,b in zip(sorted(placed), sorted(placed)[1:])) and len(placed)==len(ys)


def test_ticks():
    assert demo.ticks(0, 1)==[0, .2, .4, .6, .8, 1] and demo.ticks(-.5, 19.5, 5)==[0, 5, 10, 15]
    assert all(2<=len(demo.ticks(a, a+w))<=8 for a in (-3., 0., 1e-7, 12.3) for w in (1e-6, .3, 7., 1e4))


# runs

def test_runs_are_found(stage, lora, runs):
    assert ("shaken", "shaken") in demo.adapters(stage) and demo.adapters(stage)[0]==("shaken", demo.OWN)
    assert demo.finished_runs(runs, "another model")==[] and demo.finished_runs(runs/"none", "tiny")==[]


def test_a_run_is_the_same_model(stage, rows):
    again = demo.finished(demo.row_of(stage, replace(FOX, weight="draft", adapter="shaken")))
    assert_close(images(again), images(rows["aligned"]), atol=1e-5, rtol=0) # read from disk
    assert len(stage.others)==1 and stage.model_of("shaken") is stage.model_of("shaken")


@pytest.mark.parametrize("name", ["..", "../x", "/etc", ".", "a/../..", "shaken/../../x"])
def test_nothing_outside_is_read(stage, name):
    with pytest.raises(ValueError, match="adapter must be a folder inside"): stage.model_of(name)


def test_links_do_not_lead_outside(stage, runs, tmp_path):
    (tmp_path/demo.LORA).write_bytes(b"x")
    (runs/"way-out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="inside"): stage.model_of("way-out")


@pytest.mark.parametrize("name, message", [("nowhere", "holds no"), ("empty", "holds no"), ("broken", "must fit tiny; broken does not"), ("nul\0", "null|nul")])
def test_folders_that_are_no_lora(stage, runs, name, message):
    (runs/"empty").mkdir(exist_ok=True)
    (runs/"broken").mkdir(exist_ok=True)
    (runs/"broken"/demo.LORA).write_bytes(b"not a LoRA")
    with pytest.raises(ValueError, match=message) as e: stage.model_of(name)
    assert str(runs) not in str(e.value)


# training

@pytest.mark.parametrize("change, message", [
    (dict(prompts=""), "1 to 64 lines"), (dict(prompts="a\n"*65), "got 65"), (dict(prompts=None), "lines"), (dict(prompts="x"*1001), "has 1001"), (dict(reward="tiny-judge"), "reward must be one of tiny"),
    (dict(reward="nothing"), "one of"), (dict(steps=0), "steps"), (dict(steps=1001), "1 to 1000"), (dict(learning_rate=0), "learning_rate"), (dict(learning_rate=None), "nothing"), (dict(kl_coeff=-1), "kl_coeff")])
def test_bad_trainings(stage, change, message):
    lesson = demo.Lesson()
    with pytest.raises(ValueError, match=message): next(demo.learn(stage, lesson, **dict(prompts="a fox")|change))
    assert not lesson.busy.locked()


def test_training(stage, runs, monkeypatch):
    "One at a time; somebody else cannot stop it; Stop keeps what is there; drawing goes on beside it; the result can be chosen."
    def quick(*a, **k):
        model = load(*a, **k)
        model.steps,model.training["batch_size"] = 2,2
        return model
    monkeypatch.setattr(demo, "load", quick)
    lesson = demo.Lesson()
    going = demo.learn(stage, lesson, "an emoji of a fox\nan emoji of a frog", steps=50, learning_rate=3e-3, user="ann")
    first = next(going)
    assert first.rows==[] and "base first" in demo.lesson_html(first) and lesson.busy.locked()
    with pytest.raises(ValueError, match="one at a time"): next(demo.learn(stage, lesson, "a hen", user="bob"))
    lesson.end("bob")
    next(going)
    assert not lesson.stop.is_set()
    demo.finished(demo.row_of(stage, replace(FOX, seed=77)))
    lesson.end("ann")
    *_,last = going
    assert last.done and 1<=len(last.rows)<50 and not lesson.busy.locked()
    text = demo.lesson_html(last)
    assert f"Kept as {last.folder.name}" in text and text.count("<svg")==2 and "KL to the base" in text and "<img" in text
    assert last.folder.name in dict(demo.adapters(stage)) and last.folder.parent==runs
    trained = demo.finished(demo.row_of(stage, replace(FOX, weight="draft", adapter=last.folder.name)))
    base = demo.shown_row(stage, FOX, "base")
    assert not torch.allclose(images(trained), images(base), atol=1e-4)


def test_failed_training_frees_the_place(stage, monkeypatch):
    lesson = demo.Lesson()
    monkeypatch.setattr(demo, "fit", lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): list(demo.learn(stage, lesson, "a fox", steps=1))
    assert lesson.busy.acquire(timeout=10)


def test_new_runs_have_new_names(tmp_path):
    names = []
    for _ in range(3): names.append(demo.new_run(tmp_path)); names[-1].mkdir()
    assert len(set(names))==3


def test_the_judge_is_not_trained_against(): assert "tiny-judge" in available() and "tiny-judge" not in demo.trainable_rewards()


# the page

@pytest.fixture(scope="module")
def app(model, reward, judge, runs, lora): return demo.build(model, reward, judge, adapter=lora, runs=runs)


def test_page(app):
    assert isinstance(app, gr.Blocks) and not app.analytics_enabled and app.delete_cache
    controls = [o for o in app.blocks.values() if isinstance(o, gr.components.FormComponent)]
    assert all(o.label for o in controls) and {"Prompt", "Seed", "Images", "Steps", "Guidance scale", "Weight schedule", "Aligned model"}<={o.label for o in controls}
    assert all(o.label for o in app.blocks.values() if isinstance(o, (gr.HTML, gr.ImageSlider)) and o.value!=demo.HEAD)
    heavy = [f for f in app.fns.values() if f.concurrency_id in ("model", "training")]
    assert heavy and all(f.concurrency_limit==4 for f in heavy) and app._queue.max_size==32
    assert sum(f.validator is not None for f in app.fns.values())>=5


def test_page_fetches_nothing():
    look = demo.look()
    assert not look["theme"]._stylesheets and not look["run_history"]
    for text in (look["css"], demo.DRAG, demo.TAKE, demo.POINT, demo.LINK): assert "http" not in text and "@import" not in text and "url(" not in text


def test_zero_gpu(monkeypatch):
    "The decorator is used where its package is there, and only there."
    def f(): pass
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.on_gpu(f) is f
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=lambda duration: lambda g: (g, duration)))
    assert demo.on_gpu(f)==(f, 120)


def test_adapter(tmp_path):
    shipped = asset("tiny-aligned")
    assert demo.adapter_of(None)==(shipped if shipped.is_dir() else "lora") and demo.adapter_of(str(tmp_path))==tmp_path
    with pytest.raises(ValueError, match="there is no nowhere"): demo.adapter_of("nowhere")


@pytest.mark.parametrize("port", [0, 65536, 1.5])
def test_bad_port(port):
    with pytest.raises(ValueError, match="port must be"): demo.launch(port=port)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def client(app):
    app.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **demo.look())
    yield Client(app.local_url, verbose=False)
    app.close()


ASK = dict(prompt=FOX.prompt, seed=3, num_images=2, steps=2, guidance_scale=1., weight="linear")


def test_endpoints(client):
    "Named, with the library's names for what they take, and described."
    told = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(told)==["/compare", "/curve", "/trade_off"]
    assert [p["parameter_name"] for p in told["/compare"]["parameters"]]==["prompt", "seed", "num_images", "steps", "guidance_scale", "weight", "strength", "adapter"]
    assert client.predict("power_2", .5, 4, api_name="/curve")==[0., .03125, .125, .28125]


def test_request(client, rows):
    "Over the wire come the pictures that the sampler draws."
    got = client.predict(**ASK, api_name="/compare")
    assert [o["weight"] for o in got.values()]==["base", "linear", "draft"]
    for k,r in rows.items():
        assert got[k]["reward"]==pytest.approx(r.reward.tolist()) and got[k]["diversity"]==pytest.approx(r.diversity)
        alike([Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in got[k]["images"]], r.samples.pil())


def test_two_clients(app, client, model):
    "At once, each gets its own pictures."
    other = Client(app.local_url, verbose=False)
    jobs = {seed: c.submit(**ASK|dict(seed=seed), api_name="/compare") for c,seed in ((client, 21), (other, 22))}
    for seed,job in jobs.items():
        expected = sample(model, FOX.prompt, weight="linear", seed=seed, num_images=2, steps=2, guidance_scale=1.).pil()
        got = [Image.open(BytesIO(base64.b64decode(o.partition(",")[2]))) for o in job.result(timeout=120)["annealed"]["images"]]
        alike(got, expected)


@pytest.mark.parametrize("bad, message", [(dict(prompt=""), "empty"), (dict(prompt="x"*10_000), "10000"), (dict(seed=.5), "seed must be a whole number"), (dict(num_images=0), "1 to 8"), (dict(num_images=1000), "1 to 8"),
                                          (dict(steps=101), "1 to 100"), (dict(adapter="../.."), "inside"), (dict(adapter="nowhere"), "holds no"), (dict(weight="cubic"), "unknown weight")])
def test_bad_request(client, bad, message):
    with pytest.raises(Exception, match=message) as e: client.predict(**ASK|bad, api_name="/compare")
    assert "Traceback" not in str(e.value) and "/" not in str(e.value).replace("../..", "")
    assert len(client.predict("linear", 1., 3, api_name="/curve"))==3, "the app goes on"


def test_app_works_offline(tmp_path):
    "app.py starts, answers, and asks no other machine for anything."
    port = free_port()
    code = f"""
import socket, runpy, urllib.request
asked, real = set(), socket.getaddrinfo
def getaddrinfo(host, *a, **k):
    asked.add(host if isinstance(host, str) else (host or b"").decode())
    return real(host, *a, **k)
socket.getaddrinfo = getaddrinfo
import gradio as gr
launch = gr.Blocks.launch
def once(self, **k):
    launch(self, **k|dict(server_port={port}, prevent_thread_lock=True, quiet=True))
    page = urllib.request.urlopen(self.local_url).read().decode()
    assert "gradio" in page
    self.close()
gr.Blocks.launch = once
runpy.run_path({str(ROOT/"app.py")!r}, run_name="__main__")
outside = asked - {{"localhost", "127.0.0.1", "0.0.0.0", "::1", "", socket.gethostname()}}
assert not outside, outside
print("served")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode==0 and done.stdout.strip().endswith("served"), done.stderr
    assert len((ROOT/"app.py").read_text().splitlines())<=10
