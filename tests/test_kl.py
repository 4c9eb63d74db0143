"""The KL in noise space, the KL in nats, and the conversions between kinds of prediction."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from draft_nb.anneal import blend
from draft_nb.kl import gaussian_kl, to_epsilon, to_x0, transition_kl

pytestmark = pytest.mark.numeric

kinds = ("epsilon", "v_prediction", "sample", "flow")
seeds, scales = st.integers(0, 10**6), st.floats(.1, 3)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_reference_numbers():
    n = torch.arange(1, 145, dtype=torch.float64).reshape(2, 2, 4, 3, 3)
    a, b = n.sin(), n.cos()
    assert gaussian_kl(a, b, "none").mean(1).tolist() == pytest.approx([1.002835, 1.000956], abs=1e-6)
    assert gaussian_kl(a, b).item() == pytest.approx(1.002835+1.000956, abs=2e-6)
    assert gaussian_kl(a, b, reduction="mean").item() == pytest.approx(1.001895, abs=1e-6)


def test_reference_numbers_with_guidance():
    def guided(u, c, s): return torch.full((1, 1, 4, 2, 2), u + s*(c-u))
    assert gaussian_kl(guided(.12, .25, 7.5), guided(.10, .20, 7.5)).item() == pytest.approx(.060025, abs=1e-6)
    assert gaussian_kl(guided(.12, .25, 1), guided(.10, .20, 1)).item() == pytest.approx(.0025, abs=1e-6)


@given(K=st.integers(1, 4), B=st.integers(1, 4), tail=st.lists(st.integers(1, 5), max_size=3), seed=seeds)
def test_reductions_agree_with_the_definition(K, B, tail, seed):
    a, b = normal(2, K, B, *tail, seed=seed)
    none = gaussian_kl(a, b, "none")
    assert none.shape == (K, B)
    for k in range(K):
        for j in range(B): torch.testing.assert_close(none[k, j], (a[k, j]-b[k, j]).square().mean())
    torch.testing.assert_close(gaussian_kl(a, b), none.sum(0).mean())
    torch.testing.assert_close(gaussian_kl(a, b, "mean"), none.mean())
    if K == 1: torch.testing.assert_close(gaussian_kl(a, b), gaussian_kl(a, b, "mean"))


@given(seed=seeds, s=scales)
def test_identities(seed, s):
    a, b = normal(2, 3, 4, 2, 3, 3, seed=seed)
    assert gaussian_kl(a, a) == 0 and gaussian_kl(a, b) > 0
    assert torch.equal(gaussian_kl(a, b), gaussian_kl(b, a))
    torch.testing.assert_close(gaussian_kl(b+s*(a-b), b), s*s*gaussian_kl(a, b), rtol=1e-4, atol=1e-5)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(gaussian_kl(a[:, order], b[:, order], "none"), gaussian_kl(a, b, "none")[:, order])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_always_float32(dtype, reduction):
    a, b = normal(2, 1, 2, 4, 8, 8).to(dtype)
    value = gaussian_kl(a, b, reduction)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, gaussian_kl(a.float(), b.float(), reduction))


def test_gradient_reaches_the_tuned_noise():
    a, b = normal(2, 2, 3, 4, 2, 2)
    a.requires_grad_()
    gaussian_kl(a, b).backward()
    torch.testing.assert_close(a.grad, 2*(a-b).detach()/(3*16))


@pytest.mark.parametrize("a, b, reduction, says", [
    ((2, 2, 4, 3, 3), (1, 2, 4, 3, 3), "sum", r"\(2, 2, 4, 3, 3\) and \(1, 2, 4, 3, 3\)"), ((2,), (2,), "sum", r"\(K,B,...\); got \(2,\)"),
    ((2, 2), (2, 2), "total", "one of sum, mean, none; got 'total'"), ((2, 2), (2, 2), None, "sum, mean, none")])
def test_bad_input(a, b, reduction, says):
    with pytest.raises(ValueError, match=says): gaussian_kl(torch.zeros(a), torch.zeros(b), reduction)


@given(seed=seeds, sigma=scales)
def test_transition_is_torch_s_kl(seed, sigma):
    a, b = normal(2, 3, 4, 2, 2, seed=seed)
    torch.testing.assert_close(transition_kl(a, b, sigma), kl_divergence(Normal(a, sigma), Normal(b, sigma)).flatten(1).sum(1), rtol=1e-4, atol=1e-5)
    per_image = sigma*torch.tensor([1., 2., 3.])
    torch.testing.assert_close(transition_kl(a, b, per_image)*torch.tensor([1., 4., 9.]), transition_kl(a, b, sigma))


@pytest.mark.parametrize("sigma", [0., -1., float("nan"), torch.tensor([1., 0.])])
def test_deterministic_step_has_no_density(sigma):
    with pytest.raises(ValueError, match="sigma must be positive.*no transition density"): transition_kl(torch.zeros(2, 4), torch.zeros(2, 4), sigma)


def test_transition_shapes():
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\)"): transition_kl(torch.zeros(2, 4), torch.zeros(3, 4), 1.)


def setting(kind, sigma, seed=0):
    x0, eps = normal(2, 2, 4, 3, 3, seed=seed, dtype=torch.float64)
    alpha = 1-sigma if kind == "flow" else (1-sigma**2)**.5
    made = dict(epsilon=eps, v_prediction=alpha*eps-sigma*x0, sample=x0, flow=eps-x0)[kind]
    return x0, eps, alpha*x0+sigma*eps, made, alpha


@given(kind=st.sampled_from(kinds), sigma=st.floats(.01, .99), seed=seeds)
def test_conversions_bring_both_back(kind, sigma, seed):
    x0, eps, x, made, alpha = setting(kind, sigma, seed)
    torch.testing.assert_close(to_epsilon(made, x, alpha, sigma, kind), eps, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(to_x0(made, x, alpha, sigma, kind), x0, rtol=1e-6, atol=1e-9)


@given(kind=st.sampled_from(kinds), sigma=st.floats(.05, .95), seed=seeds)
def test_noise_and_clean_make_up_x_for_any_prediction(kind, sigma, seed):
    _, _, x, made, alpha = setting(kind, sigma, seed)
    made = made + normal(*made.shape, seed=seed+1, dtype=torch.float64)
    torch.testing.assert_close(alpha*to_x0(made, x, alpha, sigma, kind) + sigma*to_epsilon(made, x, alpha, sigma, kind), x)


@given(sigma=st.floats(.05, .95), seed=seeds)
def test_a_gap_in_v_is_a_smaller_gap_in_epsilon(sigma, seed):
    for kind, factor in (("v_prediction", (1-sigma**2)**.5), ("flow", 1-sigma), ("epsilon", 1.)):
        _, _, x, v, alpha = setting(kind, sigma, seed)
        v_base = normal(*v.shape, seed=seed+1, dtype=torch.float64)
        torch.testing.assert_close(to_epsilon(v, x, alpha, sigma, kind)-to_epsilon(v_base, x, alpha, sigma, kind), factor*(v-v_base))


@given(kind=st.sampled_from(kinds), sigma=st.floats(.05, .95), w=st.floats(-1, 2), seed=seeds)
def test_blending_predictions_blends_the_noise(kind, sigma, w, seed):
    _, _, x, u, alpha = setting(kind, sigma, seed)
    v = normal(*u.shape, seed=seed+1, dtype=torch.float64)
    for convert in (to_epsilon, to_x0):
        mixed = convert(blend(u, v, w), x, alpha, sigma, kind)
        torch.testing.assert_close(mixed, blend(convert(u, x, alpha, sigma, kind), convert(v, x, alpha, sigma, kind), w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convert", [to_epsilon, to_x0])
def test_unknown_kind(convert):
    with pytest.raises(ValueError, match="one of epsilon, v_prediction, sample, flow; got 'score'"): convert(torch.zeros(1), torch.zeros(1), .5, .5, "score")
