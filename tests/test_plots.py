"Figures: what is drawn, what is refused, and that matplotlib's own state stays as it was."
import subprocess
import sys
from io import BytesIO

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from draft_nb.plots import Plot, picture_rows, save_figure, figure_bytes, tradeoff, training_curves, weight_curves

HISTORY = [dict(step=s, reward=1.+s, reward_std=.5, kl=.01*s, grad_norm=1.) for s in range(6)]
HISTORY[0] |= dict(eval_reward=1., eval_judge=2., eval_diversity=.4, base_reward=.9, base_judge=2., base_diversity=.41)
HISTORY[5] |= dict(eval_reward=4., eval_judge=1., eval_diversity=.2)
POINTS = [dict(name=n, reward=r, diversity=d) for n,r,d in (("base", 1., .4), ("linear", 2., .3), ("draft", 3., .1))]


def pictures(n=2, h=8, w=8): return torch.linspace(0, 1, n*3*h*w).reshape(n, 3, h, w)

def every(): return [weight_curves({"a":[0,1], "b":[1,0]}), training_curves(HISTORY), picture_rows({"base":pictures()}), tradeoff(POINTS)]

def texts(fig): return {t.get_text() for t in fig.findobj(matplotlib.text.Text)}

def lines(ax): return {line.get_label(): line for line in ax.get_lines()}

def titles(fig): return [ax.get_title(loc="left") for ax in fig.axes]

def pixels(fig): return np.asarray(Image.open(BytesIO(figure_bytes(fig))).convert("RGB")).astype(int)


# every figure

def test_global_state_stays():
    style = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k!="backend"}
    before = style()
    for fig in every(): figure_bytes(fig)
    assert style()==before
    code = "import sys, draft_nb.plots as p; p.figure_bytes(p.weight_curves({'a':[0,1]})); print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()=="False"


@pytest.mark.parametrize("j", range(4))
def test_every_figure_shows_itself_alike(j):
    a,b = every()[j], every()[j]
    assert isinstance(a, Plot) and a._repr_png_()==b._repr_png_()
    assert len(a._repr_png_())<40_000


@pytest.mark.parametrize("j", [0, 1, 3])
def test_axes_are_labelled(j):
    for ax in every()[j].axes: assert ax.get_xlabel() and (ax.get_ylabel() or ax.get_title(loc="left"))


def test_save(tmp_path):
    path = save_figure(tradeoff(POINTS), tmp_path/"new"/"t.png", dpi=55)
    with Image.open(path) as saved:
        assert saved.format=="PNG" and saved.size==(302, 198) and saved.convert("RGB").getpixel((0,0))==(255,255,255)
    with pytest.raises(ValueError, match=".png; got"): save_figure(tradeoff(POINTS), tmp_path/"t.pdf")
    assert [p.name for p in tmp_path.iterdir()]==["new"]


def test_pictures_keep_their_colours(tmp_path):
    "Figures of lines, and what a notebook shows of large pictures, have 256 colours; a saved picture has all."
    torch.manual_seed(0)
    fig = picture_rows({"base":torch.rand(4, 3, 64, 64)})
    saved = np.asarray(Image.open(save_figure(fig, tmp_path/"a.png")))
    assert len(np.unique(saved.reshape(-1, 3), axis=0))>1000
    assert Image.open(BytesIO(fig._repr_png_())).mode=="P" and len(fig._repr_png_())<len(figure_bytes(fig))


def test_svg():
    assert figure_bytes(weight_curves({"a":[0,1]}), format="svg").decode().rstrip().endswith("</svg>")


# weights

def test_weight_curves():
    fig = weight_curves({"linear":[0, .5], "step":torch.tensor([0., 1., 1.])})
    drawn = lines(fig.axes[0])
    assert drawn["linear"].get_ydata().tolist()==[0, .5] and drawn["step"].get_ydata().tolist()==[0, 1, 1]
    assert {"linear", "step"}<=texts(fig)
    assert fig.axes[0].get_ylim()[0]<=0 and fig.axes[0].get_ylim()[1]>=1


def test_weight_curves_beyond_one():
    assert weight_curves({"far":[-1, 3]}).axes[0].get_ylim()[1]>3


def test_weight_curves_differ_without_colour():
    drawn = weight_curves({str(j):[j] for j in range(7)}).axes[0].get_lines()
    assert len({o.get_marker() for o in drawn})==len({o.get_color() for o in drawn})==7
    assert len({str(o._dash_pattern) for o in drawn})==7


@pytest.mark.parametrize("bad, message", [({}, "at least one"), ({"a":[]}, "finite numbers"), ({"a":[0, float("nan")]}, "for a"), ({"a":[[1.]]}, r"\(1, 1\)")])
def test_weight_curves_refuse(bad, message):
    with pytest.raises(ValueError, match=message): weight_curves(bad)


# training

def test_training_panels():
    fig = training_curves(HISTORY)
    assert [t.split(",")[0] for t in titles(fig)]==["Reward", "Judge", "Diversity", "KL to the base", "Gradient norm"]
    drawn = lines(fig.axes[0])
    assert drawn["training batch"].get_ydata().tolist()==[1,2,3,4,5,6]
    assert drawn["held-out prompts"].get_xdata().tolist()==[0,5] and drawn["held-out prompts"].get_ydata().tolist()==[1,4]
    assert set(drawn["base"].get_ydata())=={.9}
    assert fig.axes[0].collections, "the spread is a band"


def test_training_list_and_frame_alike():
    frame = pd.DataFrame(HISTORY)
    assert (pixels(training_curves(frame))==pixels(training_curves(HISTORY))).all()


@pytest.mark.parametrize("columns, panels", [(["reward"], 1), (["kl", "grad_norm"], 2), (["eval_judge", "eval_diversity", "kl"], 3),
                                             (["reward", "eval_judge", "kl", "grad_norm"], 4)])
def test_training_missing_columns(columns, panels):
    fig = training_curves([{k:v for k,v in row.items() if k in columns} for row in HISTORY])
    assert len(fig.axes)==panels


def test_training_takes_gaps():
    "NaN, None and empty cells are gaps; a column of nothing else is no panel; words elsewhere do not matter."
    rows = [dict(step=0, reward=1., kl=float("nan"), eval_judge=""), dict(step=1, reward=None, kl=None, note="skipped"), dict(step=2, reward=3.)]
    fig = training_curves(rows)
    assert titles(fig)==["Reward"]
    assert np.isnan(fig.axes[0].get_lines()[0].get_ydata()).tolist()==[False, True, False]


def test_training_one_step_is_visible():
    fig = training_curves([dict(step=7, kl=.1)])
    assert fig.axes[0].get_lines()[0].get_marker()=="."


def test_training_refuses():
    with pytest.raises(ValueError, match="at least one step"): training_curves(pd.DataFrame({"reward":[]}))
    with pytest.raises(ValueError, match="one of the columns reward"): training_curves([dict(step=1, loss=2.)])
    with pytest.raises(ValueError, match="one of the columns reward"): training_curves([dict(step=1, reward=float("nan"))])


# pictures

def test_picture_rows_show_the_pictures():
    images = {"base":pictures(3), "aligned":1-pictures(3)}
    fig = picture_rows(images, {"aligned":["1.0", "2.0", "3.0"]}, ["a", "b", "c"])
    shown = [ax.images[0].get_array() for ax in fig.axes]
    for a,b in zip(shown, torch.cat([*images.values()])): assert np.abs(np.asarray(a)/255-b.permute(1,2,0).numpy()).max()<=.5/255+1e-6
    assert {"base", "aligned", "1.0", "2.0", "3.0", "a", "b", "c"}<=texts(fig)


def test_picture_rows_keep_the_shape():
    fig = picture_rows({"wide":pictures(2, 8, 16)})
    box = fig.axes[0].get_window_extent()
    assert abs(box.width/box.height-2)<.02


def test_picture_rows_do_not_overlap():
    fig = picture_rows({"a":pictures(3), "b":pictures(3)}, {"a":["one\ntwo"]*3}, ["a title that is rather long for so small a picture"]*3)
    renderer = FigureCanvasAgg(fig).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in fig.texts if t.get_text()]+[ax.get_window_extent() for ax in fig.axes]
    for j,a in enumerate(boxes):
        assert a.x0>=0 and a.y0>=0 and a.x1<=fig.bbox.width+1 and a.y1<=fig.bbox.height+1
        for b in boxes[:j]: assert min(a.x1,b.x1)-max(a.x0,b.x0)<2 or min(a.y1,b.y1)-max(a.y0,b.y0)<2


def test_picture_rows_long_and_odd_prompts():
    fig = picture_rows({"base":pictures()}, column_titles=["word "*300, "$x^{"])
    figure_bytes(fig) # no formula is read
    assert max(len(t) for t in texts(fig))<60 and any(t.endswith("…") for t in texts(fig))


@pytest.mark.parametrize("args, message", [
    (({},), "at least one row"),
    (({"a":pictures()[0]},), r"got \(3, 8, 8\) for a"),
    (({"a":pictures(2), "b":pictures(3)},), r"\(2,3,H,W\); got \(3, 3, 8, 8\) for b"),
    (({"a":pictures(2)[:0]},), "for a"),
    (({"a":pictures()}, {"a":["x"]}), "one a picture, 2; got 1"),
    (({"a":pictures()}, {"c":["x", "y"]}), "name rows, a; got c"),
    (({"a":pictures()}, None, ["x"]), "one a column, 2; got 1"),
])
def test_picture_rows_refuse(args, message):
    with pytest.raises(ValueError, match=message): picture_rows(*args)


# trade-off

def test_tradeoff_points_and_names():
    fig = tradeoff(POINTS, reward_label="judge")
    assert fig.axes[0].collections[0].get_offsets().tolist()==[[p["diversity"], p["reward"]] for p in POINTS]
    assert {"base", "linear", "draft", "judge"}<=texts(fig)


def test_tradeoff_intervals():
    "Each is drawn where both ends are given; NaN is not given."
    full = POINTS[0]|dict(reward_low=.5, reward_high=1.5, diversity_low=.3, diversity_high=.5)
    half = POINTS[1]|dict(reward_low=1., reward_high=float("nan"), diversity_low=.2, diversity_high=.4)
    drawn = [(list(o.get_xdata()), list(o.get_ydata())) for o in tradeoff([full, half]).axes[0].get_lines()]
    assert drawn==[([.3,.5],[1.,1.]), ([.4,.4],[.5,1.5]), ([.2,.4],[2.,2.])]


def test_tradeoff_labels_keep_apart():
    points = [dict(name=f"power_{j}", reward=1+.02*j, diversity=.5+.002*j) for j in range(5)]+[dict(name="far", reward=3., diversity=.1)]
    fig = tradeoff(points)
    renderer = FigureCanvasAgg(fig).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in fig.axes[0].texts if t.get_text()]
    frame = fig.bbox
    for j,a in enumerate(boxes):
        assert frame.x0<=a.x0 and a.x1<=frame.x1 and frame.y0<=a.y0 and a.y1<=frame.y1
        for b in boxes[:j]: assert not a.overlaps(b)


def test_tradeoff_single_point():
    assert len(figure_bytes(tradeoff(POINTS[:1])))>1000


def test_tradeoff_refuses():
    with pytest.raises(ValueError, match="at least one point"): tradeoff([])
    with pytest.raises(ValueError, match="got None and 1.0 for x"): tradeoff([dict(name="x", diversity=1.)])
