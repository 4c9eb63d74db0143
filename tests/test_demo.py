"The app: its functions without a browser, the page as it is built, and one real server with one real request."
import base64
import re
import socket
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import gradio as gr
import pytest
import torch
from gradio_client import Client
from PIL import Image

from draft_nb import demo
from draft_nb.adapters import lora_layers
from draft_nb.anneal import parse_weight
from draft_nb.models import asset, load
from draft_nb.rewards import Reward, load_reward
from draft_nb.sampler import sample

ROOT = Path(__file__).resolve().parent.parent
FAST = dict(seed=3, num_images=2, steps=3, guidance_scale=2.)


@pytest.fixture(scope="module")
def model():
    "The embedded model with a LoRA that was shaken: base and aligned differ whatever the shipped weights are."
    model = load("tiny", rank=4)
    for j,p in enumerate(model.parameters()): torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(j))
    return model


@pytest.fixture(scope="module")
def reward(): return load_reward("tiny")


@pytest.fixture(scope="module")
def judge(): return load_reward("tiny-judge")


@pytest.fixture(scope="module")
def rows(model, reward, judge): return demo.compare(model, reward, judge, "an emoji of a fox", **FAST, weight="linear")


def images(rows): return {k: r.samples.images for k,r in rows.items()}


# three rows

def test_rows(rows, reward, judge):
    assert list(rows)==["base", "annealed", "aligned"]
    for r in rows.values():
        assert r.samples.images.shape==(2, 3, 64, 64) and r.samples.prompts==["an emoji of a fox"]*2 and r.samples.seed==3
        assert torch.equal(r.reward, reward(r.samples.images, r.samples.prompts)) and torch.equal(r.judge, judge(r.samples.images, r.samples.prompts))
        f = torch.nn.functional.normalize(judge.features(r.samples.images), dim=1)
        assert r.diversity==pytest.approx(1-(f[0]@f[1]).item(), abs=1e-5)
    assert [r.samples.weight for r in rows.values()]==["base", "linear", "draft"]
    assert not torch.equal(images(rows)["base"], images(rows)["aligned"])


@pytest.mark.parametrize("weight, same", [("constant_0", "base"), ("base", "base"), ("constant_1", "aligned"), ("step_0", "aligned")])
def test_rows_share_the_noise(model, reward, judge, rows, weight, same):
    "w = 0 is the base and w = 1 the aligned model, bit for bit, and neither depends on the weight in the middle."
    again = images(demo.compare(model, reward, judge, "an emoji of a fox", **FAST, weight=weight))
    assert torch.equal(again["annealed"], again[same])
    assert torch.equal(again["base"], images(rows)["base"]) and torch.equal(again["aligned"], images(rows)["aligned"])


def test_rows_are_the_samplers(model, rows):
    for k,w in (("base", "base"), ("annealed", "linear"), ("aligned", "draft")):
        assert torch.equal(sample(model, "an emoji of a fox", weight=w, **FAST).images, images(rows)[k])


def test_seed_matters(model, reward, judge, rows):
    other = demo.compare(model, reward, judge, "an emoji of a fox", **FAST|dict(seed=4), weight="linear")
    assert not torch.equal(images(other)["base"], images(rows)["base"])


def test_single_picture_has_no_diversity(model, reward, judge):
    one = demo.compare(model, reward, judge, "a fox", **FAST|dict(num_images=1), weight="linear")
    assert {r.diversity for r in one.values()}=={None}
    assert "needs two pictures" in demo.rows_html(one, 1.)


def test_judge_without_features(model, reward):
    plain = Reward("bright", lambda images,prompts: images.mean((1,2,3)))
    assert demo.compare(model, reward, plain, "a fox", **FAST, weight="base")["base"].diversity is None


def test_model_is_left_as_it_was(model, reward, judge):
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    demo.compare(model, reward, judge, "a fox", **FAST, weight="power_2")
    assert all(torch.equal(a, b) and b.requires_grad and b.grad is None for a,b in zip(before, model.parameters()))
    assert torch.equal(state, torch.get_rng_state()) and not any(m._disable_adapters for m in lora_layers(model.network))


# requests

GOOD = dict(prompt="a fox", seed=0, num_images=4, steps=20, guidance_scale=3., weight="linear")
BAD = [(dict(prompt=""), "prompt must say"), (dict(prompt=" \n "), "empty"), (dict(prompt=None), "empty"), (dict(prompt="x"*1001), "has 1001"),
       (dict(seed=1.5), "seed must be a whole number from 0 to 4294967295; got 1.5"), (dict(seed=-1), "got -1"), (dict(seed=2**32), "got 4294967296"),
       (dict(seed=None), "seed must be .* got nothing"), (dict(seed="1"), "seed"), (dict(seed=float("nan")), "seed"), (dict(seed=float("inf")), "seed"),
       (dict(seed=True), "seed"), (dict(num_images=0), "num_images must be a whole number from 1 to 8; got 0"), (dict(num_images=9), "got 9"),
       (dict(num_images=2.5), "num_images"), (dict(steps=0), "steps must be a whole number from 1 to 100; got 0"), (dict(steps=101), "got 101"),
       (dict(guidance_scale=float("nan")), "guidance_scale"), (dict(guidance_scale=-1), "guidance_scale"), (dict(guidance_scale=None), "got nothing"),
       (dict(weight="cubic"), "unknown weight 'cubic'"), (dict(weight="power_0"), "positive"), (dict(weight=[0., 1.]), "T is 20"), (dict(weight=None), "weight")]


def test_good_requests():
    clean = demo.check_request(**GOOD|dict(prompt=" a fox\n", seed=7.))
    assert clean["prompt"]=="a fox" and clean["seed"]==7 and isinstance(clean["seed"], int) and clean["weight"] is parse_weight("linear")
    for edge in (dict(prompt="x"*1000), dict(seed=2**32-1), dict(num_images=8), dict(num_images=1), dict(steps=1), dict(steps=100), dict(guidance_scale=0)):
        demo.check_request(**GOOD|edge)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_requests(change, message):
    "Refused in one line, before the model is asked: here there is none."
    with pytest.raises(ValueError, match=message): demo.compare(None, None, None, **GOOD|change)
    with pytest.raises(gr.Error) as e: demo.answer(threading.Lock(), None, None, None, *(GOOD|change).values())
    assert re.search(message, e.value.message) and "\n" not in e.value.message and not e.value.print_exception


def test_messages_are_escaped():
    "gradio shows a message as HTML."
    with pytest.raises(gr.Error) as e: demo.answer(threading.Lock(), None, None, None, *(GOOD|dict(weight="<img src=x>")).values())
    assert "<" not in e.value.message


def test_bad_requests_do_not_wait():
    "A bad request is refused while another one is being drawn."
    lock = threading.Lock()
    with lock, pytest.raises(gr.Error): demo.answer(lock, None, None, None, *(GOOD|dict(prompt="")).values())


def test_one_generation_at_a_time(model, reward, judge, rows):
    "Two requests at once give what each gives alone: nobody meets the other's switched-off adapters."
    lock, got = threading.Lock(), {}
    inside, most = [], []
    class Watched:
        def __enter__(self): lock.acquire(); inside.append(1); most.append(len(inside))
        def __exit__(self, *a): inside.pop(); lock.release()
    def ask(j): got[j] = demo.answer(Watched(), model, reward, judge, "an emoji of a fox", *FAST.values(), "linear")
    threads = [threading.Thread(target=ask, args=(j,)) for j in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert most==[1, 1, 1]
    for one in got.values():
        for k in rows: assert torch.equal(images(one)[k], images(rows)[k])


# the weight

def test_weights_of_the_sliders():
    "Every position of every slider is a weight, and its curve can be drawn."
    for schedule,(_,low,high,step,value,_) in demo.SCHEDULES.items():
        assert low<=value<=high
        for j in range(round((high-low)/step)+1): parse_weight(demo.weight_of(schedule, low+j*step))
        for p in (low, value, high): assert "<svg" in demo.curve_html(demo.weight_of(schedule, p), 7)


def test_weight_of():
    assert [demo.weight_of(s, .5) for s in demo.SCHEDULES]==["constant_0.5", "linear", "power_0.5", "step_0.5"]
    assert parse_weight(demo.weight_of("power", 2))(1, 2)==.25
    for schedule,value,message in (("cubic", 1, "schedule must be one of constant"), ("power", 0, "positive"), ("step", 2, "0,1"), ("constant", None, "number")):
        with pytest.raises(ValueError, match=message): demo.weight_of(schedule, value)


def test_curve_in_words():
    assert "step_0.6: w goes from 0.00 to 1.00 in 5 steps, 0.40 on average" in demo.curve_html("step_0.6", 5)
    assert "1 steps" in demo.curve_html("linear", 1)
    with pytest.raises(ValueError, match="at least 1"): demo.curve_html("linear", 0)


# what is said about the rows

def test_change():
    assert demo.change(2., 1.)=="+1.00 higher" and demo.change(1., 2.)=="−1.00 lower"
    assert demo.change(2.004, 2.)=="no change" and demo.change(-.1, .1, ("worse", "better"))=="−0.200 worse"


def made(rewards, judges, shade=(0., .5, 1.), diversity=.2):
    "Rows with given mean scores."
    from draft_nb.sampler import Samples
    def row(r, j, s, w): return demo.Row(Samples(torch.full((2,3,4,4), s), torch.zeros(2,4,1,1), ["p"]*2, w, 0), torch.tensor([r,r]), torch.tensor([j,j]), diversity)
    return {k: row(*o) for k,o in zip(("base", "annealed", "aligned"), zip(rewards, judges, shade, ("base", "linear", "draft")))}


def test_measures():
    r = made((20., 20.5, 21.), (3., 3., 2.5))
    assert demo.measures(r["aligned"], r["base"])==[("mean reward", "21.00", "+1.00 higher"), ("mean judge", "2.50", "−0.50 lower"), ("diversity", "0.200", "no change")]
    assert [c for *_,c in demo.measures(r["base"], r["base"])]==["", "", ""]


def test_remarks():
    assert "hacked" in demo.remarks(made((1., 2., 3.), (3., 2., 1.)))[0]
    assert "not learned" in demo.remarks(made((1., 1., 1.), (1., 1., 1.), shade=(.5, .5, .5)))[0]
    assert demo.remarks(made((1., 2., 3.), (1., 2., 3.)))==[]
    assert demo.remarks(made((1., 1., 1.002), (1., 1., .999)))==[], "what is shown as no change is none"


def test_html_holds_every_picture(rows):
    drawn = demo.rows_html(rows, 1.5)
    assert [re.sub("<.*?>", "", o) for o in re.findall("<h2>.*?</h2>", drawn)]==["Base", "Annealed", "Aligned"]
    uris = re.findall(r'src="data:image/png;base64,(.*?)"', drawn)
    for uri,picture in zip(uris, [o for r in rows.values() for o in r.samples.pil()], strict=True):
        assert Image.open(BytesIO(base64.b64decode(uri))).tobytes()==picture.tobytes()
    assert drawn.count("<figcaption>")==6 and all(f"reward {r.reward[0]:.{demo._digits(r.reward[0])}f}" in drawn for r in rows.values())
    assert len(re.findall('alt="[^"]+"', drawn))==6


def test_html_is_escaped(model, reward, judge):
    drawn = demo.rows_html(demo.compare(model, reward, judge, '"><script>alert(1)</script>', **FAST, weight="linear"), 1.)
    assert "<script" not in drawn and drawn.count("&quot;&gt;&lt;script&gt;")==7


# the page

@pytest.fixture(scope="module")
def app(model, reward, judge): return demo.build(model, reward, judge)


def test_page(app):
    assert isinstance(app, gr.Blocks) and not app.analytics_enabled
    controls = [o for o in app.blocks.values() if isinstance(o, gr.components.FormComponent)]
    assert all(o.label for o in controls) and {"Prompt", "Seed", "Images", "Steps", "Guidance scale", "Weight schedule"}<={o.label for o in controls}
    assert [f.api_name for f in app.fns.values() if f.api_visibility=="public"]==["compare"]
    heavy = [f for f in app.fns.values() if f.concurrency_id=="model"]
    assert len(heavy)==2 and all(f.concurrency_limit==1 for f in heavy)


def test_page_fetches_nothing():
    look = demo.look()
    assert not look["theme"]._stylesheets and "http" not in look["css"] and "@import" not in look["css"]


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


def test_request(client, rows):
    "Over the wire come the pictures that the sampler draws."
    got = client.predict("an emoji of a fox", *FAST.values(), "linear", api_name="/compare")
    for k,r in rows.items():
        assert got[k]["weight"]==r.samples.weight and got[k]["reward"]==pytest.approx(r.reward.tolist()) and got[k]["diversity"]==pytest.approx(r.diversity)
        for uri,picture in zip(got[k]["images"], r.samples.pil(), strict=True):
            assert Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).tobytes()==picture.tobytes()


@pytest.mark.parametrize("bad, message", [(("", 0, 1, 2, 3., "linear"), "empty"), (("a fox", .5, 1, 2, 3., "linear"), "seed must be a whole number"),
                                          (("a fox", 0, 9, 2, 3., "linear"), "1 to 8"), (("a fox", 0, 1, 101, 3., "linear"), "1 to 100")])
def test_bad_request(client, bad, message):
    with pytest.raises(Exception, match=message) as e: client.predict(*bad, api_name="/compare")
    assert "Traceback" not in str(e.value)


def test_app_works_offline():
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
runpy.run_path("app.py", run_name="__main__")
outside = asked - {{"localhost", "127.0.0.1", "0.0.0.0", "::1", "", socket.gethostname()}}
assert not outside, outside
print("served")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode==0 and done.stdout.strip().endswith("served"), done.stderr
    assert len((ROOT/"app.py").read_text().splitlines())<=10
