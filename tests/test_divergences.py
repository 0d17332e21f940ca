"""The table of divergences, against autograd, textbook formulas and their definitions on discrete distributions."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_gdc.divergences import Divergence, available_divergences, get_divergence

ALPHAS = [-1.0, 0.0, 0.5, 1.0, 2.0, 3.5]
DIVERGENCES = [get_divergence(name) for name in available_divergences() if name != "alpha"]
DIVERGENCES += [get_divergence("alpha", alpha=alpha) for alpha in ALPHAS]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda divergence: divergence.name)

# Textbook f(t) and f'(t), in whatever gauge the books use (Nowozin et al. 2016, table 6; Amari's alpha).
TEXTBOOK = {
    "kl": (lambda t: -math.log(t), lambda t: 1 - 1 / t),
    "reverse_kl": (lambda t: t * math.log(t), math.log),
    "js": (lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2), lambda t: math.log(2 * t / (1 + t))),
    "tv": (lambda t: abs(t - 1) / 2, lambda t: math.copysign(0.5, t - 1) if t != 1 else 0.0),
    "chi2": (lambda t: (1 - t) ** 2 / t, lambda t: 1 - t**-2),
    "reverse_chi2": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
    "hellinger": (lambda t: (math.sqrt(t) - 1) ** 2, lambda t: 1 - t**-0.5),
    "jeffreys": (lambda t: (t - 1) * math.log(t), lambda t: math.log(t) + 1 - 1 / t),
    "non_saturating": (lambda t: (1 + t) * math.log((1 + t) / 2) - (t - 1), lambda t: math.log((1 + t) / 2)),
    "seqgan": (lambda t: -math.log((1 + t) / 2) + (t - 1) / 2, lambda t: 0.5 - 1 / (1 + t)),
}
# Definitions as sums over points; xlogy gives 0 * log 0 = 0 and a positive number over 0 gives inf.
DEFINITIONS = {
    "kl": lambda p, pi: torch.xlogy(p, p / pi),
    "reverse_kl": lambda p, pi: torch.xlogy(pi, pi / p),
    "js": lambda p, pi: torch.xlogy(p, 2 * p / (p + pi)) + torch.xlogy(pi, 2 * pi / (p + pi)),
    "tv": lambda p, pi: (p - pi).abs() / 2,
    "chi2": lambda p, pi: (p - pi) ** 2 / pi,
    "reverse_chi2": lambda p, pi: (pi - p) ** 2 / p,
    "hellinger": lambda p, pi: (p.sqrt() - pi.sqrt()) ** 2,
    "jeffreys": lambda p, pi: torch.xlogy(p, p / pi) + torch.xlogy(pi, pi / p),
    "non_saturating": lambda p, pi: torch.xlogy(p + pi, (p + pi) / (2 * p)),
    "seqgan": lambda p, pi: torch.xlogy(p, 2 * p / (p + pi)),
}


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def by_f(divergence, p, pi):
    """E_p f(t) + f'(inf) * pi(p = 0), the formula that the library is built on."""
    support = p > 0
    off = float(pi[~support].sum())
    inside = (p * divergence.f(pi.log() - p.log()))[support].sum()
    return float(inside) + (divergence.f_prime_inf * off if off else 0.0)


def random_pair(seed, p_zeros=0, pi_zeros=0):
    generator = torch.Generator().manual_seed(seed)
    p, pi = (-torch.rand(2, 12, dtype=torch.float64, generator=generator).log()).unbind()
    p[:p_zeros], pi[12 - pi_zeros :] = 0.0, 0.0
    return p / p.sum(), pi / pi.sum()


def test_the_table_is_the_designs():
    assert set(TEXTBOOK) == set(DEFINITIONS) == set(available_divergences()) - {"alpha"}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_values_are_the_textbooks_in_the_fixed_gauge(name):
    book_f, book_prime = TEXTBOOK[name]
    shift = {"kl": -1.0, "reverse_kl": 1.0}.get(name, 0.0)  # f'(1) of the book's f
    for t in (1e-3, 0.2, 0.9, 1.0, 1.1, 7.0, 1e3):
        log_t = tensor(math.log(t))
        assert float(get_divergence(name).f(log_t)) == pytest.approx(book_f(t) - shift * (t - 1), rel=1e-12, abs=1e-14)
        assert float(get_divergence(name).f_prime(log_t)) == pytest.approx(book_prime(t), rel=1e-11, abs=1e-14)


@every_divergence
def test_f_prime_is_the_derivative_of_f(divergence):
    t = torch.cat([torch.logspace(-3, -0.01, 40), torch.logspace(0.01, 3, 40)]).double().requires_grad_()
    divergence.f(t.log()).sum().backward()
    torch.testing.assert_close(divergence.f_prime(t.detach().log()), t.grad, rtol=1e-9, atol=1e-12)


@every_divergence
def test_gauge(divergence):
    assert float(divergence.f(tensor(0.0))) == 0.0 and float(divergence.f_prime(tensor(0.0))) == 0.0


@every_divergence
@settings(deadline=None)
@given(x=st.floats(allow_nan=False), y=st.floats(-30, 30))
@example(x=88.5, y=0.0)  # the largest that exp takes in float32
@example(x=709.5, y=0.0)  # and in float64
def test_never_nan_never_negative_and_convex(divergence, x, y):
    for dtype in (torch.float32, torch.float64):
        log_t = tensor(x, y, math.inf, -math.inf, dtype=dtype)
        f, f_prime = divergence.f(log_t), divergence.f_prime(log_t)
        assert f.dtype == f_prime.dtype == dtype and not f.isnan().any() and not f_prime.isnan().any()
        assert (f >= -4 * torch.finfo(dtype).eps).all()  # rounding of terms of size 1 that cancel
        low, high = sorted([x, y])
        slopes = divergence.f_prime(tensor(low, high, dtype=dtype))
        assert slopes[1] >= slopes[0] - 4 * torch.finfo(dtype).eps * slopes.abs().max().nan_to_num(posinf=0.0)


LIMITS = {  # f(0), f'(0), f'(inf)
    "kl": (math.inf, -math.inf, 1.0),
    "reverse_kl": (1.0, -math.inf, math.inf),
    "js": (math.log(2), -math.inf, math.log(2)),
    "tv": (0.5, -0.5, 0.5),
    "chi2": (math.inf, -math.inf, 1.0),
    "reverse_chi2": (1.0, -2.0, math.inf),
    "hellinger": (1.0, -math.inf, 1.0),
    "jeffreys": (math.inf, -math.inf, math.inf),
    "non_saturating": (1 - math.log(2), -math.log(2), math.inf),
    "seqgan": (math.log(2) - 0.5, -0.5, 0.5),
    "alpha(-1)": (math.inf, -math.inf, 0.5),
    "alpha(0)": (math.inf, -math.inf, 1.0),
    "alpha(0.5)": (2.0, -math.inf, 2.0),
    "alpha(1)": (1.0, -math.inf, math.inf),
    "alpha(2)": (0.5, -1.0, math.inf),
    "alpha(3.5)": (1 / 3.5, -1 / 2.5, math.inf),
}


@every_divergence
def test_limits(divergence):
    at_zero, slope_at_zero, slope_at_inf = LIMITS[divergence.name]
    for dtype in (torch.float32, torch.float64):
        ends = tensor(-math.inf, math.inf, dtype=dtype)
        assert divergence.f(ends).tolist() == pytest.approx([at_zero, math.inf], rel=1e-6)
        assert divergence.f_prime(ends).tolist() == pytest.approx([slope_at_zero, slope_at_inf], rel=1e-6)
    assert divergence.f_prime_inf == pytest.approx(slope_at_inf, rel=1e-15)
    assert divergence.admits_hard_constraints == math.isfinite(slope_at_inf)


@every_divergence
def test_values_pass_into_their_limits(divergence):
    """A wrong limit, as of a masked branch, would be a jump."""
    near, ends = tensor(-1000.0, 700.0), tensor(-math.inf, math.inf)
    for function in (divergence.f, divergence.f_prime):
        for value, limit in zip(function(near).tolist(), function(ends).tolist(), strict=True):
            assert abs(value) > 300 if math.isinf(limit) else value == pytest.approx(limit, abs=1e-12)


@pytest.mark.parametrize(
    ("alpha", "name", "factor"),
    [(1e-7, "kl", 1), (1 - 1e-7, "reverse_kl", 1), (0.0, "kl", 1), (1.0, "reverse_kl", 1)]
    + [(0.5, "hellinger", 2), (2.0, "reverse_chi2", 0.5), (-1.0, "chi2", 0.5)],
)
def test_alpha_family(alpha, name, factor):
    log_t = torch.linspace(-4, 4, 33, dtype=torch.float64)
    family, member = get_divergence("alpha", alpha=alpha), get_divergence(name)
    torch.testing.assert_close(family.f(log_t), factor * member.f(log_t), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(family.f_prime(log_t), factor * member.f_prime(log_t), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize(("p_zeros", "pi_zeros"), [(0, 0), (4, 0), (0, 3), (4, 3)])
def test_definitions_on_discrete_distributions(name, p_zeros, pi_zeros):
    divergence = get_divergence(name)
    for seed in range(5):
        p, pi = random_pair(seed, p_zeros, pi_zeros)
        assert by_f(divergence, p, pi) == pytest.approx(float(DEFINITIONS[name](p, pi).sum()), rel=1e-12)


def test_js_is_twice_jensen_shannon():
    p, pi = random_pair(0, p_zeros=3, pi_zeros=2)

    def entropy(distribution):
        return -torch.xlogy(distribution, distribution).sum()

    jensen_shannon = entropy((p + pi) / 2) - (entropy(p) + entropy(pi)) / 2
    assert by_f(get_divergence("js"), p, pi) == pytest.approx(2 * float(jensen_shannon), rel=1e-12)


@every_divergence
def test_zero_baseline_is_claimed_for_kl_alone(divergence):
    """E_pi f'(pi/p) = 0 for every pi, also where p = 0, is what `baseline_is_zero` promises."""
    means = []
    for seed in range(5):
        p, pi = random_pair(seed, p_zeros=seed)
        means.append(float((pi * divergence.f_prime(pi.log() - p.log())).sum()))
    assert divergence.baseline_is_zero == (max(map(abs, means)) < 1e-12)


@every_divergence
def test_a_divergence_in_another_gauge_is_the_same(divergence):
    shifted = Divergence(
        "mine",
        lambda log_t: divergence.f(log_t) + 3 * torch.expm1(log_t),
        lambda log_t: divergence.f_prime(log_t) + 3,
    )
    log_t = torch.tensor([-math.inf, -3.0, 0.0, 2.0, 800.0, math.inf], dtype=torch.float64)
    torch.testing.assert_close(shifted.f(log_t), divergence.f(log_t))
    torch.testing.assert_close(shifted.f_prime(log_t), divergence.f_prime(log_t))
    assert shifted.f_prime_inf == pytest.approx(divergence.f_prime_inf)


def test_the_example_of_the_docs():
    mine = Divergence("my_kl", f=lambda log_t: -log_t, f_prime=lambda log_t: -torch.exp(-log_t))
    for pair in (random_pair(1), random_pair(2, p_zeros=5)):
        assert by_f(mine, *pair) == pytest.approx(by_f(get_divergence("kl"), *pair), rel=1e-12)
    assert get_divergence(mine) is mine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("jz", {}), r"unknown divergence 'jz'\. Did you mean 'js'\? Known: kl, reverse_kl, js, .*, alpha\."),
        (("wasserstein-one", {}), r"unknown divergence 'wasserstein-one'\. Known: kl"),
        (("alpha", {}), r"'alpha' takes alpha, but got none"),
        (("alpha", {"beta": 1}), r"'alpha' takes alpha, but got beta=1"),
        (("js", {"alpha": 0.5}), r"'js' takes no parameters, but got alpha=0\.5"),
        ((get_divergence("kl"), {"alpha": 0.5}), r"'kl' takes no parameters, but got alpha=0\.5"),
    ],
)
def test_errors_of_names(arguments, message):
    name, kwargs = arguments
    with pytest.raises(ValueError, match=message):
        get_divergence(name, **kwargs)


def test_errors_of_functions():
    with pytest.raises(ValueError, match="'one': f must be 0 at log t = 0, but it is 1"):
        Divergence("one", lambda log_t: log_t.exp(), lambda log_t: torch.ones_like(log_t))
    with pytest.raises(ValueError, match=r"'wild': f_prime must have .* a limit .*gives 0\.0 and nan"):
        Divergence("wild", lambda log_t: log_t * 0, lambda log_t: log_t.exp() - log_t.exp() * (1 + 0 * log_t))
