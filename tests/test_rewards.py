"The protocol of rewards, and the embedded ones."
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from draft_nb.models import asset
from draft_nb.rewards import (KNOWN, Reward, available, calibrate, clip_preprocess, colorfulness, jpeg_size, load_reward, parse_reward,
                              quantisation, resize, square, standardise, weighted)

pytestmark = pytest.mark.numeric

PROMPTS = ["an emoji of a fox", "an emoji of a rose on a blue background", "a pizza"]


def pictures(n=3, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["tiny", "tiny-judge"])
def reward(request):
    return load_reward(request.param)


def test_equals_open_clip_itself(reward):
    clip = open_clip.create_model(f"local-dir:{asset('rewards')/reward.name}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{asset('rewards')/reward.name}")(PROMPTS)
    with torch.no_grad():
        image, text = clip.encode_image(pictures() * 2 - 1, normalize=True), clip.encode_text(ids, normalize=True)
        expected = clip.logit_scale.exp() * (image * text).sum(1)
        assert torch.allclose(reward(pictures(), PROMPTS), expected, atol=1e-4)


def test_deterministic_and_per_image(reward):
    with torch.no_grad():
        scores = reward(pictures(), PROMPTS)
        assert scores.dtype == torch.float32 and torch.equal(scores, reward(pictures(), PROMPTS))
        order = [2, 0, 1]
        assert torch.allclose(reward(pictures()[order], [PROMPTS[k] for k in order]), scores[order], atol=1e-4)
        alone = torch.cat([reward(pictures()[k:k + 1], PROMPTS[k:k + 1]) for k in range(3)])
        assert torch.allclose(alone, scores, atol=1e-4)


def test_gradient_against_a_difference_quotient(reward):
    x = pictures(1).requires_grad_()
    slope, = torch.autograd.grad(reward(x, PROMPTS[:1]).sum(), x)
    direction = slope / slope.norm()
    with torch.no_grad():
        h = 1e-2
        quotient = (reward((x + h * direction).clamp(0, 1), PROMPTS[:1]) - reward((x - h * direction).clamp(0, 1), PROMPTS[:1])) / (2 * h)
    assert quotient.item() == pytest.approx(slope.norm().item(), rel=.1)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 80), (33, 70)])
def test_any_size(reward, size):
    x = torch.rand(2, 3, *size).requires_grad_()
    score = reward(x, PROMPTS[:2])
    score.sum().backward()
    assert score.shape == (2,) and x.grad.isfinite().all()


def test_parameters_are_frozen(reward):
    x = pictures(2).requires_grad_()
    reward(x, PROMPTS[:2]).sum().backward()
    assert x.grad is not None and not any(t.requires_grad for t in (reward(pictures(2), PROMPTS[:2]),))


def test_the_judge_is_another_network():
    a, b = load_reward("tiny"), load_reward("tiny-judge")
    assert a.features(pictures()).shape == b.features(pictures()).shape
    assert not torch.allclose(a.features(pictures()), b.features(pictures()), atol=.1)


def test_preprocess_against_pil():
    import numpy as np
    rng = np.random.default_rng(0)
    coarse = Image.fromarray((rng.random((12, 16, 3)) * 255).astype("uint8")).resize((640, 480), Image.BICUBIC)
    theirs = coarse.resize((298, 224), Image.BICUBIC).crop((37, 0, 261, 224))
    x = torch.tensor(np.asarray(coarse)).permute(2, 0, 1)[None] / 255
    mine = clip_preprocess(x, 224, mean=(0, 0, 0), std=(1, 1, 1))[0].permute(1, 2, 0)
    assert (mine - torch.tensor(np.asarray(theirs)) / 255).abs().mean() < .0015


@given(a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_weighted_is_linear_and_keeps_its_parts(a, b):
    one, two = Reward("one", lambda i, p: i.mean((1, 2, 3))), Reward("two", lambda i, p: i[:, 0].mean((1, 2)))
    x, both = pictures(), weighted([(a, one), (b, two)])
    assert torch.allclose(both(x, PROMPTS), a * one(x, PROMPTS) + b * two(x, PROMPTS), atol=1e-5)
    assert set(both.each(x, PROMPTS)) == {"one", "two"}


def test_combination_by_name():
    both = load_reward("0.7*tiny + 0.3*tiny-judge")
    expected = .7 * load_reward("tiny")(pictures(), PROMPTS) + .3 * load_reward("tiny-judge")(pictures(), PROMPTS)
    with torch.no_grad():
        assert torch.allclose(both(pictures(), PROMPTS), expected, atol=1e-4)
    assert [(w, r.name) for w, r in both.parts] == [(.7, "tiny"), (.3, "tiny-judge")]


@pytest.mark.parametrize("spec, message", [
    ("beauty", "unknown reward 'beauty'; known: tiny, tiny-judge, jpeg, .*hpsv2.1, imagereward, aesthetic"),
    ("half*tiny", "must be a number; got 'half'"),
    ("nan*tiny", "must be a number; got 'nan'"),
    ("*tiny", "must be a number; got ''"),
    ("tiny-0.5*jpeg", "must be a number; got 'tiny-0.5' in .*between spaces"),
    ("tiny + ", "unknown reward ''"),
    ("", "unknown reward ''"),
    ("/no/such/folder", "unknown reward '/no/such/folder'"),
])
def test_unknown_names(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


@pytest.mark.parametrize("images, prompts, message", [
    (torch.rand(3, 64, 64), ["a"], "images must be"),
    (torch.rand(1, 1, 64, 64), ["a"], "images must be"),
    (torch.rand(2, 3, 64, 64), ["a"], "one text an image; got 1 for 2"),
    (torch.rand(1, 3, 64, 64), "a", "one text an image"),
    (torch.rand(1, 3, 64, 64) * 2, ["a"], r"lie in \[0,1\]"),
    (torch.rand(1, 3, 64, 64) - .5, ["a"], r"lie in \[0,1\]"),
    (torch.full((1, 3, 64, 64), float("nan")), ["a"], "got nan"),
    (torch.rand(1, 3, 64, 64) + 1.02, ["a"], r"lie in \[0,1\]"),
    (torch.rand(1, 3, 64, 64), [], "at least one text; got none"),
    (torch.rand(0, 3, 64, 64), [], "at least one text; got none"),
    (torch.rand(1, 3, 0, 64), ["a"], "must have pixels"),
    (torch.rand(1, 3, 64, 64), [None], "must be texts; got None"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a"], "floating point numbers; got .*uint8"),
    ([[0.]], ["a"], "images must be .*; got list"),
])
def test_bad_pictures(reward, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        reward(images, prompts)


def test_bad_callables():
    x = pictures(2).requires_grad_()
    with pytest.raises(ValueError, match="one score an image"):
        load_reward(lambda images, prompts: images.mean())(x, ["a", "b"])
    with pytest.raises(ValueError, match="must carry a gradient"):
        load_reward(lambda images, prompts: images.detach().mean((1, 2, 3)))(x, ["a", "b"])
    with pytest.raises(ValueError, match="one score an image, a tensor .*; got list"):
        load_reward(lambda images, prompts: [0., 1.])(x, ["a", "b"])


def test_rounding_is_let_through():
    "Half precision makes 1.004 of a 1."
    for low, high in ((-.004, 1.004), (-.0099, 1.0099)):
        assert load_reward("colorfulness", "cpu")(torch.tensor([low, high, .5]).view(1, 3, 1, 1).expand(1, 3, 4, 4), ["a"]).isfinite().all()


# callables

def person(images, prompts): return torch.arange(len(images), dtype=torch.float32)
person.differentiable = False


def test_any_callable_is_a_reward():
    x = pictures(2).requires_grad_()
    assert load_reward(person).name == "person" and not load_reward(person).differentiable
    assert load_reward(person)(x, ["a", "b"]).tolist() == [0., 1.]
    both = weighted([(1, person), (.5, load_reward("jpeg", "cpu"))])
    assert not both.differentiable and set(both.each(x, ["a", "b"])) == {"person", "jpeg"}
    bright = load_reward(lambda images, prompts: images.mean((1, 2, 3)).double())
    assert bright.differentiable and bright(x, ["a", "b"]).dtype == torch.float32


def test_training_refuses_what_has_no_gradient_by_name():
    from draft_nb.models import load
    from draft_nb.train import DRaFTConfig, check_run
    model = load("tiny")
    for reward in (load_reward(person), weighted([(1, person), (1, load_reward("jpeg", "cpu"))])):
        with pytest.raises(ValueError, match="must be differentiable.*person"): check_run(model, reward, ["a fox"], DRaFTConfig())
    def blind(images, prompts): return images.detach().mean((1, 2, 3))
    with pytest.raises(ValueError, match="blind must carry a gradient"): check_run(model, load_reward(blind), ["a fox"], DRaFTConfig())


# without weights

def smooth(seed, size, n=4):
    coarse = torch.rand(n, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_quantisation_is_libjpegs(quality):
    import io
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg", quality=quality)
    tables = Image.open(file).quantization
    for ours, k in zip(quantisation(quality), (0, 1)): assert ours.flatten().long().tolist() == list(tables[k])


@pytest.mark.parametrize("size", [(64, 64), (150, 97), (256, 256)])
def test_jpeg_size_against_libjpeg(size):
    import io
    def real(x):
        file = io.BytesIO()
        Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "jpeg", quality=95)
        return len(file.getvalue()) / 1000
    noise = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(3))
    x = torch.cat([(smooth(0, size) * (1 - a) + noise * a) for a in (0., .03, .3)])
    ours, theirs = jpeg_size(x), torch.tensor([real(o) for o in x])
    assert ((ours - theirs).abs() / theirs).max() < .15
    order = [0, 4, 8]
    assert ours[order].argsort().tolist() == theirs[order].argsort().tolist()


def test_jpeg_rewards_what_compresses():
    reward, against = load_reward("jpeg", "cpu"), load_reward("-jpeg", "cpu")
    flat, busy = torch.full((1, 3, 64, 64), .5), pictures(1)
    assert reward(flat, ["a"]) > reward(busy, ["a"]) and against(flat, ["a"]) < against(busy, ["a"])
    assert reward(flat, ["a"]).item() == pytest.approx(-.689, abs=.1)  # libjpeg's 689 bytes


@pytest.mark.parametrize("name", ["jpeg", "colorfulness"])
def test_weightless_gradient_against_finite_differences(name):
    reward = load_reward(name, "cpu", dtype=torch.float64)
    x = (.2 + .6 * torch.rand(2, 3, 19, 22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    assert reward(x, ["a", "b"]).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda t: reward(t, ["a", "b"]), x, fast_mode=True)


@pytest.mark.parametrize("name", ["jpeg", "colorfulness"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 40), (64, 64)])
def test_weightless_any_size_per_image(name, size):
    reward = load_reward(name, "cpu")
    x = torch.rand(3, 3, *size, requires_grad=True)
    scores = reward(x, PROMPTS)
    scores.sum().backward()
    assert scores.dtype == torch.float32 and x.grad.isfinite().all()
    torch.testing.assert_close(torch.cat([reward(x[k:k + 1], PROMPTS[:1]) for k in range(3)]), scores)


@pytest.mark.parametrize("name", ["tiny", "jpeg", "colorfulness"])
def test_autocast_changes_nothing(name):
    reward = load_reward(name, "cpu")
    with torch.no_grad():
        plain = reward(pictures(), PROMPTS)
        with torch.autocast("cpu", torch.bfloat16): assert torch.equal(reward(pictures(), PROMPTS), plain)


def test_colorfulness_by_numpy():
    import numpy as np
    x = pictures(1)
    r, g, b = x[0].numpy().astype("float64") * 255
    rg, yb = r - g, (r + g) / 2 - b
    expected = np.hypot(rg.std(), yb.std()) + .3 * np.hypot(rg.mean(), yb.mean())
    assert colorfulness(x).item() == pytest.approx(expected, rel=1e-5)


def test_a_grey_picture_has_a_finite_slope():
    x = torch.full((1, 3, 16, 16), .5, requires_grad=True)
    for name in ("jpeg", "colorfulness"): assert torch.autograd.grad(load_reward(name, "cpu")(x, ["a"]).sum(), x)[0].isfinite().all()


# squares

@pytest.mark.parametrize("size", [(300, 200), (200, 300), (37, 41), (224, 131), (640, 479)])
@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
def test_squares_against_open_clip(size, fit):
    "open_clip's own transforms on PIL pictures."
    import numpy as np
    from open_clip.transform import PreprocessCfg, image_transform_v2
    rng = np.random.default_rng(0)
    picture = Image.fromarray((rng.random((9, 12, 3)) * 255).astype("uint8")).resize(size, Image.BICUBIC)
    theirs = image_transform_v2(PreprocessCfg(size=112, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=fit), is_train=False)(picture)
    mine = square(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255, 112, fit)[0]
    assert mine.shape == theirs.shape and (mine - theirs).abs().mean() < .0015


def test_white_keeps_its_gradient():
    "A rounding error above 1 is not an overshoot."
    x = torch.ones(1, 3, 100, 90, requires_grad=True)
    assert (torch.autograd.grad(clip_preprocess(x, 64, fit="squash").sum(), x)[0] > 0).all()
    sharp = torch.zeros(1, 1, 1, 40).index_fill(3, torch.arange(20, 40), 1.).expand(1, 3, 40, 40).clone().requires_grad_()
    out = resize(sharp, 80, 80)
    assert 0 <= out.min() and out.max() <= 1


def test_unknown_fit():
    with pytest.raises(ValueError, match="fit must be one of shortest, floor, longest, squash; got 'wide'"): square(pictures(), 32, "wide")


# combinations

@pytest.mark.parametrize("text, expected", [
    ("tiny", [(1., "tiny", None)]),
    ("0.7*pickscore + 0.3*aesthetic", [(.7, "pickscore", None), (.3, "aesthetic", None)]),
    ("0.7*tiny+0.3*tiny-judge", [(.7, "tiny", None), (.3, "tiny-judge", None)]),
    ("tiny - 0.1*jpeg", [(1., "tiny", None), (-.1, "jpeg", None)]),
    ("tiny -0.1*jpeg", [(1., "tiny", None), (-.1, "jpeg", None)]),
    ("-jpeg", [(-1., "jpeg", None)]), ("- 2 * jpeg", [(-2., "jpeg", None)]), ("tiny - -1*jpeg", [(1., "tiny", None), (1., "jpeg", None)]),
    ("1e-2*clip + 1e+2*tiny", [(.01, "clip", None), (100., "tiny", None)]), ("1e+2*tiny+2.E-1*jpeg", [(100., "tiny", None), (.2, "jpeg", None)]),
    ("2*clip:ViT-B-32/laion2b_s34b_b79k - tiny-judge", [(2., "clip:ViT-B-32/laion2b_s34b_b79k", None), (-1., "tiny-judge", None)]),
    ("hpsv2.1@/x/a-b/HPS_v2.1_compressed.pt + 0.5*aesthetic@sac+logos+ava1-l14-linearMSE.pth",
     [(1., "hpsv2.1", "/x/a-b/HPS_v2.1_compressed.pt"), (.5, "aesthetic", "sac+logos+ava1-l14-linearMSE.pth")]),
    ("/folders/my-clip + tiny", [(1., "/folders/my-clip", None), (1., "tiny", None)]),
])
def test_parser(text, expected):
    assert parse_reward(text) == expected


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, allow_nan=False), st.sampled_from(sorted(KNOWN)), st.sampled_from(["", "@/a/b-c+d"])), min_size=1, max_size=4))
def test_parser_reads_what_is_written(parts):
    assert parse_reward(" + ".join(f"{w!r}*{n}{p}" for w, n, p in parts)) == [(w, n, p[1:] or None) for w, n, p in parts]


def test_negative_weights_in_the_name():
    both = load_reward("tiny - 0.1*jpeg", "cpu")
    assert both.name == "1*tiny - 0.1*jpeg" and parse_reward(both.name) == [(1., "tiny", None), (-.1, "jpeg", None)]
    assert load_reward("-jpeg", "cpu").name == "-1*jpeg"
    with torch.no_grad():
        total, each = both.with_parts(pictures(), PROMPTS)
        assert torch.allclose(total, each["tiny"] - .1 * each["jpeg"], atol=1e-5) and torch.equal(total, both(pictures(), PROMPTS))


def test_a_part_named_twice_is_loaded_once_and_keeps_both_names():
    both = load_reward("jpeg + 2*jpeg", "cpu")
    assert list(both.each(pictures(), PROMPTS)) == ["jpeg", "jpeg (2)"]
    assert both.parts[0][1].score is both.parts[1][1].score


@pytest.mark.parametrize("weight", ["a", None, float("nan"), float("inf"), [1]])
def test_weights_must_be_numbers(weight):
    with pytest.raises(ValueError, match="a weight of a combination must be a number; got .* for person"): weighted([(weight, person)])


def test_no_parts():
    with pytest.raises(ValueError, match="at least one part"): weighted([])


def test_path_belongs_to_one_reward():
    with pytest.raises(ValueError, match="write name@path"): load_reward("tiny + jpeg", path="/x")


def test_offline_rewards_are_available():
    assert available()[:4] == ["tiny", "tiny-judge", "jpeg", "colorfulness"]


# standardised

def test_calibrated_parts_count_in_deviations():
    base = smooth(1, (64, 64), 16)
    prompts = ["an emoji"] * 16
    parts = "0.7*tiny - 0.3*jpeg"
    reward = calibrate(load_reward(parts, "cpu", normalize="base"), base, prompts)
    each = reward.each(base, prompts)
    expected = sum(w * (each[n] - each[n].mean()) / each[n].std() for n, w in (("tiny", .7), ("jpeg", -.3)))
    assert torch.allclose(reward(base, prompts), expected, atol=1e-4)
    assert torch.allclose(each["jpeg"], load_reward("jpeg", "cpu")(base, prompts)), "parts stay in their own units"


def test_stats_go_through_a_runs_configuration():
    import yaml
    base, prompts = smooth(1, (64, 64), 8), ["an emoji"] * 8
    reward = calibrate(load_reward("jpeg + colorfulness", "cpu", normalize="base"), base, prompts)
    stored = yaml.safe_load(yaml.safe_dump({k: list(v) for k, v in reward.stats.items()}))
    again = load_reward("jpeg + colorfulness", "cpu", normalize=stored)
    torch.testing.assert_close(again(base, prompts), reward(base, prompts))
    assert again.name == reward.name


def test_uncalibrated_is_refused():
    with pytest.raises(ValueError, match="must be calibrated"): load_reward("jpeg", "cpu", normalize="base")(pictures(), PROMPTS)


def test_standardise():
    x, bright = pictures(), Reward("bright", lambda i, p: i.mean((1, 2, 3)))
    assert torch.allclose(standardise(bright, .4, .1)(x, PROMPTS), (bright(x, PROMPTS) - .4) / .1, atol=1e-5)
    measured = calibrate(bright, x, PROMPTS)
    assert measured(x, PROMPTS).mean().abs() < 1e-4 and measured(x, PROMPTS).std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("make, message", [
    (lambda: standardise(person, 0., 0.), "deviation of person must be greater than 0.*; got 0"),
    (lambda: calibrate(lambda i, p: i.mean((1, 2, 3)) * 0, pictures(), PROMPTS), "must be greater than 0"),
    (lambda: calibrate(person, pictures(1), ["a"]), "at least 2"),
    (lambda: weighted([(1, person)], normalize={"jpeg": (0., 1.)}), "a mean and a deviation for each of person"),
    (lambda: weighted([(1, person)], normalize="mine"), "normalize must be 'base'.*got 'mine'"),
])
def test_bad_statistics(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"): load_reward("tiny", "cpu", chunk=0)
