"""Weights w(i,T), their parser, and the blend."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draft_nb import anneal
from draft_nb.anneal import blend, blended, parse_weight, weight_name, weights_at

pytestmark = pytest.mark.numeric

finite = st.floats(-3, 3, allow_nan=False)


@pytest.mark.parametrize("spec, expected", [
    ("base", [0, 0, 0, 0, 0]), ("draft", [1, 1, 1, 1, 1]), ("constant_0.3", [.3]*5), ("linear", [0, .2, .4, .6, .8]),
    ("power_2", [0, .04, .16, .36, .64]), ("step_0.6", [0, 0, 0, 1, 1])])
def test_reference_weights(spec, expected):
    assert weights_at(spec, 5) == pytest.approx(expected)


def test_step_switches_at_15_of_25():
    assert weights_at("step_0.6", 25) == [0.]*15 + [1.]*10


@given(T=st.integers(1, 200), tau=st.integers(0, 200))
def test_step_hits_its_own_fraction(T, tau):
    "The threshold k/T is reached at step k exactly, whatever its float looks like."
    k = min(tau, T)
    assert weights_at(anneal.step(k/T), T) == [0.]*k + [1.]*(T-k)


@given(p=st.floats(.01, 50), T=st.integers(1, 200))
def test_power_starts_at_zero_and_grows_below_one(p, T):
    ws = weights_at(anneal.power(p), T)
    assert ws[0] == 0 and ws == sorted(ws) and ws[-1] < 1 and all(w == (i/T)**p for i, w in enumerate(ws))


@given(p=st.floats(.01, 50), q=st.floats(.01, 50), T=st.integers(1, 50))
def test_larger_power_trusts_the_base_longer(p, q, T):
    low, high = sorted((p, q))
    assert all(a >= b for a, b in zip(weights_at(anneal.power(low), T), weights_at(anneal.power(high), T)))


@given(number=st.integers(1, 10_000).map(lambda n: n/1000), made=st.sampled_from(["constant", "power", "step"]))
def test_name_reads_back(number, made):
    if made == "step": number /= 10
    weight = getattr(anneal, made)(number)
    assert weights_at(weight.__name__, 7) == weights_at(weight, 7)
    assert parse_weight(weight.__name__).__name__ == weight.__name__


def test_readable_names():
    assert parse_weight("power_2").__name__ == "power_2"
    assert [weight_name(o) for o in ("base", "linear", 1, .25, "step_0.60", [0, 1])] == ["base", "linear", "constant_1", "constant_0.25", "step_0.6", "table"]
    class Mine:
        def __call__(self, i, T): return 0.
    assert weight_name(Mine()) == "Mine"


@given(v=finite, T=st.integers(1, 9))
def test_numbers_are_constants_also_beyond_0_and_1(v, T):
    assert weights_at(v, T) == weights_at(torch.tensor(v, dtype=torch.float64), T) == [v]*T
    assert weights_at(str(v), T) == [v]*T


@given(values=st.lists(finite, min_size=1, max_size=9))
def test_tables_of_every_make(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    for spec in (values, tuple(values), tensor, tensor.numpy()): assert weights_at(spec, len(values)) == values


def test_callables_pass_unchanged():
    def mine(i, T): return .5
    assert parse_weight(mine) is mine and parse_weight("linear") is anneal.linear


@pytest.mark.parametrize("spec", ["lnear", "power", "power2", "base_1", "linear_", "", "cosine_2", "0.5x"])
def test_unknown_names_are_answered_with_the_known(spec):
    with pytest.raises(ValueError, match=r"known: base, draft, linear, constant_<v>, power_<p>, step_<tau>"): parse_weight(spec)


@pytest.mark.parametrize("spec, says", [
    ("power_x", r"power must be .*'x'"), ("power_0", r"power must be .*positive.*'0'"), ("power_-1", r"positive.*'-1'"), ("power_nan", r"power .*'nan'"),
    ("power_inf", r"power .*'inf'"), ("constant_x", "constant must be a finite"), ("constant_inf", "constant must be a finite"),
    ("step_2", r"step must be .*\[0,1\].*'2'"), ("step_-0.1", "step must be"), ("nan", "constant must be a finite"), (math.nan, "finite.*nan"),
    ([0, math.nan], "table.*nan"), ([0, "x"], "table.*'x'"), ([[0, 1], [1, 0]], "table"), (torch.zeros(2, 2), "table"), ([], "got none"),
    (None, "got None"), ({"a": 1}, "callable or a list")])
def test_bad_numbers_say_so(spec, says):
    with pytest.raises(ValueError, match=says): parse_weight(spec)


@pytest.mark.parametrize("weight, T, says", [
    ([0, .5, 1], 4, "T is 4, the table has 3"), (lambda i, T: math.nan if i == 3 else 0., 5, "step 3 of 5.*nan"),
    (lambda i, T: torch.tensor([0., math.inf]), 5, "step 0 of 5.*inf"), (lambda i, T: torch.zeros(2, 2), 5, r"\(2, 2\)"),
    (lambda i, T: None, 5, "step 0 of 5.*None"), (lambda i, T: "x", 2, "'x'"), ("linear", 0, "at least 1; got 0")])
def test_bad_weights_are_found_before_any_step(weight, T, says):
    with pytest.raises(ValueError, match=says): weights_at(weight, T)


def test_weights_keep_their_kind():
    per_image = torch.tensor([.5, 1., 2.])
    assert all(type(w) is float for w in weights_at(lambda i, T: torch.tensor(i/T), 4) + weights_at(lambda i, T: 1, 3))
    assert all(torch.equal(w, (i/4)**per_image) for i, w in enumerate(weights_at(lambda i, T: (i/T)**per_image, 4)))


def pair(dtype=torch.float32, shape=(3, 4, 5, 5)):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 16, 8), (3,)])
def test_ends_of_the_blend_are_exact(dtype, shape):
    u, v = pair(dtype, shape)
    for w in (0., 0, torch.tensor(0.), torch.zeros(3)): assert torch.equal(blend(u, v, w), u)
    for w in (1., 1, torch.tensor(1.), torch.ones(3)): assert torch.equal(blend(u, v, w), v)
    assert blend(u, v, .3).dtype == dtype and blend(u, v, torch.rand(3)).dtype == dtype


@given(w=finite)
def test_blend_is_the_definition(w):
    u, v = pair(torch.float64)
    torch.testing.assert_close(blend(u, v, w), (1-w)*u + w*v)
    torch.testing.assert_close(blend(u, v, w), blend(v, u, 1-w))
    assert torch.equal(blend(u, u, w).isfinite(), u.isfinite())


@given(ws=st.tuples(finite, finite, finite))
def test_per_image_weights_equal_one_by_one(ws):
    u, v = pair()
    together = blend(u, v, torch.tensor(ws))
    for j, w in enumerate(ws): torch.testing.assert_close(together[j:j+1], blend(u[j:j+1], v[j:j+1], w), atol=1e-6, rtol=0)


def test_half_precision_weight_is_not_rounded_first():
    u, v = torch.zeros(1, 4, dtype=torch.bfloat16), torch.full((1, 4), 100., dtype=torch.bfloat16)
    assert blend(u, v, .3645).float().eq(torch.tensor(36.45).bfloat16().float()).all()


def test_gradient_is_the_weight():
    u, v = pair(torch.float64)
    u.requires_grad_(), v.requires_grad_()
    ws = torch.tensor([0., .25, 1.], dtype=torch.float64)
    blend(u, v, ws).sum().backward()
    assert torch.equal(v.grad[:, 0, 0, 0], ws) and torch.equal(u.grad[:, 0, 0, 0], 1-ws)


@pytest.mark.parametrize("tuned, w, says", [
    (torch.zeros(2, 4, 5, 5), .5, r"one shape; got \(3, 4, 5, 5\) and \(2, 4, 5, 5\)"), (torch.zeros(3, 4, 5, 5), torch.zeros(2), r"\(3,\); got shape \(2,\)"),
    (torch.zeros(3, 4, 5, 5), torch.zeros(3, 1), r"got shape \(3, 1\)")])
def test_bad_blends(tuned, w, says):
    with pytest.raises(ValueError, match=says): blend(torch.zeros(3, 4, 5, 5), tuned, w)


@pytest.mark.parametrize("w, asked", [(0., ["base"]), (0, ["base"]), (1., ["tuned"]), (.5, ["base", "tuned"]), (torch.ones(3), ["tuned"]), (torch.zeros(3), ["base"]), (torch.tensor([0., 1., 1.]), ["base", "tuned"])])
def test_blended_asks_only_who_counts(w, asked):
    u, v = pair()
    calls = []
    predict = blended(lambda x, t: calls.append("base") or u, lambda x, t: calls.append("tuned") or v)
    torch.testing.assert_close(predict(None, 0, w), blend(u, v, w))
    assert calls == asked
