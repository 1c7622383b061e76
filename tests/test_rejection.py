"""Rejection sampling, against laws known in closed form, scikit-learn and scripted random numbers."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import metrics

F64 = torch.float64
P_G, P_D = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
LOGIT = torch.from_numpy(np.log(P_D / P_G))
NAIVE = P_G * P_D / (P_G + P_D)  # not normalised: its sum is the acceptance
N = 100_000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def discrete(seed=1, shift=0.0, scale=1.0):
    """more(k) of the three-valued generator: the values (k, 1), and their exact log-ratio, shifted and scaled."""
    rng = seeded(seed)

    def more(k):
        x = torch.multinomial(torch.from_numpy(P_G), k, True, generator=rng)
        return x[:, None].byte(), (LOGIT[x] * scale + shift).float()

    return more


def plain(told):
    """rejected's dict, for a comparison."""
    return {**told, "index": told["index"].tolist()}


def counts(x):
    return np.bincount(x.flatten().numpy(), minlength=3)


def same_law(x, law):
    return stats.chisquare(counts(x), len(x) * law / law.sum()).pvalue


# the discrete oracle --------------------------------------------------------------------------------------------------


def test_drs_without_eps_and_gamma_accepts_with_the_ratio_itself():
    score = torch.cat([torch.linspace(-700, 0, 1001, dtype=F64), -torch.logspace(-18, 0, 50, dtype=F64)])
    np.testing.assert_allclose(metrics.drs(score, 0.0, 0.0, 0.0), np.exp(score.numpy()), rtol=1e-12)
    np.testing.assert_allclose(metrics.drs(LOGIT, LOGIT.max(), eps=0.0), P_D / P_G / 2.5, rtol=1e-12)


def test_drs_by_the_papers_formula():
    """F in plain float64 numpy, where its digits hold; at the maximum, the limit -log(eps)."""
    for eps in (1e-8, 1e-3):
        d = np.array([-30, -10, -3, -1, -0.5, -0.1])
        wanted = d - np.log(1 - np.exp(d - eps))
        for gamma in (-2.0, 0.0, 1.5):
            chance = metrics.drs(torch.from_numpy(d) + 7, 7.0, gamma, eps)
            np.testing.assert_allclose(chance, 1 / (1 + np.exp(gamma - wanted)), rtol=1e-9)
        top = metrics.drs(torch.tensor([3.0], dtype=F64), 3.0, 0.0, eps).item()
        assert math.log(top / (1 - top)) == pytest.approx(-math.log(-math.expm1(-eps)), rel=1e-6)
    assert metrics.drs_logit(3.0, 3.0, 1e-12).item() == pytest.approx(12 * math.log(10), rel=1e-9)
    assert metrics.drs(torch.tensor([3.0]), 3.0, 18.0).item() > 0.5  # F is 18.4 there: in float32 it would be inf


def test_drs_keeps_what_the_data_hold():
    x, told = metrics.rejected("drs", discrete(), N, seeded(2), percentile=None)
    assert len(x) == N and x.dtype == torch.uint8 and same_law(x, P_D) > 1e-3
    assert same_law(x, P_G) < 1e-9 and same_law(x, NAIVE) < 1e-9
    assert told["acceptance"] == pytest.approx(0.4, abs=5 * math.sqrt(0.24 * 0.4 / N)) and told["burn_in"] == 10_000
    assert told["attempts"] == pytest.approx(N / 0.4, abs=5 * math.sqrt(N * 0.6) / 0.4)
    assert told["attempts_per_10000"] == told["attempts"] / 10 and told["auc"] is None and told["warning"] is None


def test_naive_keeps_half_way():
    x, told = metrics.rejected("naive", discrete(), N, seeded(2))
    np.testing.assert_allclose(NAIVE / NAIVE.sum(), (0.32787, 0.34426, 0.32787), atol=1e-5)
    assert NAIVE.sum() == pytest.approx(0.43571, abs=1e-5)
    assert same_law(x, NAIVE) > 1e-3 and same_law(x, P_D) < 1e-9
    assert told["attempts"] == pytest.approx(N / 0.43571, abs=5 * math.sqrt(N * 0.56429) / 0.43571)
    assert told["burn_in"] == 0


def test_naive_is_the_sigmoid():
    score = torch.linspace(-40, 40, 81)
    np.testing.assert_allclose(metrics.naive(score), 1 / (1 + np.exp(-score.double().numpy())), rtol=1e-12)


def test_a_constant_on_all_scores_changes_nothing_in_drs():
    """The scores are whole numbers: adding 100 rounds nothing."""

    def more(shift):
        rng = seeded(3)

        def draw(k):
            score = torch.randint(-6, 3, (k,), generator=rng).float()
            return score[:, None], score + shift

        return draw

    tolds = []
    for q in (60, None):
        same = [metrics.rejected("drs", more(c), 5000, seeded(4), percentile=q) for c in (0, 100, -100)]
        tolds.append(plain(same[0][1]))
        assert all(torch.equal(x, same[0][0]) and plain(told) == tolds[-1] for x, told in same)
    assert tolds[0] != tolds[1]
    naive = [metrics.rejected("naive", more(c), 5000, seeded(4))[1]["attempts"] for c in (0, 3)]
    assert naive[0] > 1.3 * naive[1]


def test_a_larger_gamma_keeps_less():
    score = torch.linspace(-8, 2, 200, dtype=F64)
    chances = torch.stack([metrics.drs(score, 2.0, g) for g in (-5, -1, 0, 1, 5)])
    assert (chances.diff(dim=0) < 0).all() and (chances.diff(dim=1) > 0).all()
    attempts = [metrics.rejected("drs", discrete(), 5000, seeded(2), percentile=q)[1]["attempts"] for q in (10, 60, 95)]
    assert attempts[0] < attempts[1] < attempts[2]


@pytest.mark.parametrize("q", [30, 60, 95])
def test_gamma_by_percentile_halves_the_chance_there(q):
    """Scores N(0, 1): above the percentile at least every second is kept, below it at most; the whole by quadrature."""
    rng, seen = seeded(5), []

    def more(k):
        s = torch.randn(k, generator=rng, dtype=F64)
        seen.append(s)
        return s[:, None], s

    x, told = metrics.rejected("drs", more, 20_000, seeded(6), percentile=q, burn_in=20_000)
    cut, tried = stats.norm.ppf(q / 100), torch.cat(seen)[20_000:][: told["attempts"]]
    assert (x > cut).sum() / (tried > cut).sum() > 0.5 > (x < cut).sum() / (tried < cut).sum()
    s, top = np.linspace(-9, 4, 20_001), torch.cat(seen)[:20_000].max().item()
    f = s - top - np.log(-np.expm1(np.minimum(s - top, -1e-8)))
    f_cut = cut - top - math.log(-math.expm1(cut - top))
    wanted = np.trapezoid(stats.norm.pdf(s) / (1 + np.exp(f_cut - f)), s)
    assert told["acceptance"] == pytest.approx(wanted, rel=0.05)


# accounting -----------------------------------------------------------------------------------------------------------


class Scripted:
    """In place of torch.rand: these uniforms, one after the other."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, k, generator=None, dtype=None):
        return torch.tensor([self.values.pop(0) for _ in range(k)], dtype=dtype)


def counter(score=0.0):
    drawn = [0]

    def more(k):
        drawn[0] += k
        return torch.arange(drawn[0] - k, drawn[0])[:, None], torch.full((k,), score)

    return more


@pytest.mark.parametrize("batch", [1, 3, 5, 100])
@pytest.mark.parametrize("n, kept, attempts", [(1, [2], 3), (3, [2, 3, 6], 7), (4, [2, 3, 6, 9], 10)])
def test_attempts_end_with_the_last_one_kept(monkeypatch, batch, n, kept, attempts):
    """Score 0: kept below .5. The tail of a batch after the n-th is not counted."""
    uniforms = [0.9, 0.7, 0.1, 0.49, 0.51, 0.5, 0.0, 0.8, 0.99, 0.3] + [0.2] * 100
    monkeypatch.setattr(metrics.torch, "rand", Scripted(uniforms))
    x, told = metrics.rejected("naive", counter(), n, None, batch=batch)
    assert x.flatten().tolist() == told["index"].tolist() == kept and told["attempts"] == attempts
    assert told["acceptance"] == n / attempts and told["attempts_per_10000"] == pytest.approx(10_000 * attempts / n)


@pytest.mark.parametrize("kind", ["naive", "drs"])
def test_the_choice_does_not_depend_on_the_batch_and_repeats(kind):
    scores = torch.randn(100_000, generator=seeded(7))

    def more(at=0):
        def draw(k):
            nonlocal at
            at += k
            return torch.arange(at - k, at)[:, None], scores[at - k : at]

        return draw

    for percentile in (60, None):  # a burn-in so short that the maximum rises later
        results = [
            metrics.rejected(kind, more(), 300, seeded(8), batch=b, burn_in=20, percentile=percentile)
            for b in (300, 300, 70, 20, 1)
        ]
        first = results[0][0], plain(results[0][1])
        assert all(torch.equal(x, first[0]) and plain(told) == first[1] for x, told in results)
        assert torch.equal(first[0].flatten(), torch.tensor(first[1]["index"]) + first[1]["burn_in"])
        assert results[0][0].min() >= (20 if kind == "drs" else 0)  # the burn-in is dropped
        other = metrics.rejected(kind, more(), 300, seeded(9), burn_in=20, percentile=percentile)
        assert not torch.equal(other[0], results[0][0])


def test_the_maximum_rises_while_sampling():
    """A burn-in of 1 knows only the smallest score; what is kept after the first largest must still follow p_d."""
    first = [True]
    draw = discrete()

    def more(k):
        x, score = draw(k)
        if first:
            first.pop()
            x.zero_()
            score.fill_(LOGIT[0])
        return x, score

    x, told = metrics.rejected("drs", more, N, seeded(2), percentile=None, burn_in=1)
    assert same_law(x[100:], P_D) > 1e-3 and told["burn_in"] == 1


def test_a_later_maximum_has_no_say_over_earlier_pictures():
    """Uniforms of .9 within one batch: at its own maximum each picture is kept almost for sure, below it not."""
    chances = []
    scores = torch.tensor([0.0, 1.0, 1.0, -3.0, 2.0, 1.0])
    drs = metrics.drs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "drs", lambda *a, **k: chances.append(drs(*a, **k)) or chances[-1])
        patch.setattr(metrics.torch, "rand", Scripted([0.9] * 6))
        x, _ = metrics.rejected(
            "drs", lambda k: (torch.arange(k)[:, None], scores[:k]), 4, None, percentile=None, burn_in=1, batch=6
        )
    assert x.flatten().tolist() == [0, 1, 2, 4]
    np.testing.assert_allclose(chances[0][[3, 5]], [math.exp(-4), math.exp(-1)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["naive", "drs"])
def test_nothing_kept_is_an_error_after_patience(kind):
    first = [kind == "drs"]

    def more(k):
        score = torch.full((k,), -2000.0)
        if first and first.pop():
            score[0] = 0
        return torch.zeros(k, 1), score

    with pytest.raises(ValueError, match=r"not one of 500 .* was kept .*: 0 of 10"):
        metrics.rejected(kind, more, 10, seeded(0), percentile=None, batch=10, patience=50)


def test_patience_starts_anew_with_each_picture_kept(monkeypatch):
    monkeypatch.setattr(metrics.torch, "rand", Scripted([0.9, 0.9, 0.1] * 10))
    assert metrics.rejected("naive", counter(), 10, None, batch=1, patience=3)[1]["attempts"] == 30


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["naive", "drs"])
def test_scores_that_are_not_finite_are_an_error(kind, bad):
    def more(k):
        score = torch.zeros(k)
        score[-1] = bad
        return torch.zeros(k, 1), score

    with pytest.raises(ValueError, match="not finite"):
        metrics.rejected(kind, more, 10, seeded(0))


def test_another_kind_of_rejection_is_an_error():
    with pytest.raises(ValueError, match="naive or drs, not none"):
        metrics.rejected("none", discrete(), 10, seeded(0))


@pytest.mark.parametrize(
    "burn_in, percentile, refused", [(0, 60, True), (0, 0, True), (0, None, False), (1, 60, False)]
)
def test_a_percentile_of_no_scores_is_refused(burn_in, percentile, refused):
    """Without a burn-in there is nothing to take a percentile of; once it was ignored, and nothing said so."""

    def call(kind, n=100):
        return metrics.rejected(kind, discrete(), n, seeded(2), percentile=percentile, burn_in=burn_in)

    if refused:
        with pytest.raises(ValueError, match=r"percentile .* burn_in"):
            call("drs")
    else:
        assert len(call("drs")[0]) == 100
    assert len(call("naive")[0]) == 100  # it has neither
    with pytest.raises(ValueError, match="1 or more"):
        call("naive", 0)


def test_scores_come_in_any_shape_and_with_gradients():
    score = torch.zeros(1000, 1, requires_grad=True)
    blank = torch.zeros(1000, 1, 2, 2, dtype=torch.uint8)
    x, told = metrics.rejected("naive", lambda k: (blank[:k], score[:k]), 100, seeded(0))
    assert x.shape == (100, 1, 2, 2) and not x.requires_grad and 120 < told["attempts"] < 300


# Platt ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, m, centre, scale",
    [(1000, 1000, 0, 1), (300, 2000, 0, 1), (2000, 300, 500, 40), (500, 500, -3, 1e-3), (40, 40, 0, 1e4)],
)
def test_platt_agrees_with_scikit_learn(n, m, centre, scale):
    """Its equal-weight fit of the standardised scores, the scale put back."""
    rng = np.random.RandomState(0)
    real, fake = rng.randn(n) * 1.5 + 1, rng.randn(m)
    x, y = np.concatenate([real, fake]), np.arange(n + m) < n
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(x[:, None], y)
    a, b, auc = metrics.platt(torch.from_numpy(real * scale + centre), torch.from_numpy(fake * scale + centre))
    assert a * scale == pytest.approx(theirs.coef_.item(), rel=1e-4)
    assert b + a * centre == pytest.approx(theirs.intercept_.item(), rel=1e-4, abs=1e-4)
    assert auc == pytest.approx(roc_auc_score(y, x), abs=1e-12)


def test_platt_finds_the_exact_ratio():
    """N(1, 1) against N(-1, 1): log p_d / p_g = 2 x, hidden in a critic's scale and constant."""
    x = torch.randn(2, 200_000, generator=seeded(1), dtype=F64)
    a, b, auc = metrics.platt(7 * (x[0] + 1) - 30, 7 * (x[1] - 1) - 30)
    assert 7 * a == pytest.approx(2, abs=0.02) and b - 30 * a == pytest.approx(0, abs=0.02)
    assert auc == pytest.approx(stats.norm.cdf(math.sqrt(2)), abs=0.003)


def test_platt_counts_ties_by_half():
    real, fake = torch.tensor([0.0, 1, 1, 2]), torch.tensor([0.0, 0, 1, 3])
    assert metrics.platt(torch.cat([real, real + 1]), fake)[2] == pytest.approx(
        roc_auc_score([1] * 8 + [0] * 4, torch.cat([real, real + 1, fake])), abs=1e-12
    )


@pytest.mark.parametrize(
    "real, fake, match",
    [
        ([1.0, 2, 3], [4.0, 5, 6], "rate"),
        ([1.0, 2, 3], [1.5, 2.5, 3.5], "rate"),
        ([1.0, 1], [1.0, 1], "rate"),
        ([4.0, 5, 6], [1.0, 2, 3], "above every"),
        ([3.0, 5, 6], [1.0, 2, 3], "above every"),
        ([1.0], [0.0, 1], "two"),
        ([1.0, math.nan], [0.0, 1], "finite"),
        ([1.0, 2], [0.0, math.inf], "finite"),
    ],
)
def test_platt_refuses(real, fake, match):
    with pytest.raises(ValueError, match=match):
        metrics.platt(torch.tensor(real), torch.tensor(fake))


def test_a_head_takes_the_place_of_the_score():
    bare = metrics.rejected("drs", discrete(), 2000, seeded(3), percentile=None)
    headed = metrics.rejected("drs", discrete(scale=4, shift=32), 2000, seeded(3), (0.25, -8.0, 0.7), percentile=None)
    assert torch.equal(bare[0], headed[0]) and plain(headed[1]) == {**plain(bare[1]), "auc": 0.7}
    bare = metrics.rejected("naive", discrete(), 2000, seeded(3))[1]
    headed = metrics.rejected("naive", discrete(scale=4, shift=32), 2000, seeded(3), (0.25, -8.0, 0.7))[1]
    assert bare["attempts"] == headed["attempts"]


def test_a_blind_head_keeps_nearly_all_and_says_so():
    """AUC near .5: a is near 0, every chance near 1 without gamma, and there is a warning."""
    x = torch.randn(2, 3000, generator=seeded(11), dtype=F64)
    head = metrics.platt(x[0] + 0.02, x[1])
    rng = seeded(12)

    def more(k):
        score = torch.randn(k, generator=rng)
        return score[:, None], score

    _, told = metrics.rejected("drs", more, 2000, seeded(3), head, percentile=None)
    assert head[2] < 0.55 and told["acceptance"] > 0.8 and "hardly" in told["warning"]


# a mixture in two dimensions ------------------------------------------------------------------------------------------

CENTRES = torch.cartesian_prod(torch.arange(-4.0, 5, 2), torch.arange(-4.0, 5, 2)).double()
STD, BROAD, SHARE = 0.05, 0.5, 0.7  # the generator: SHARE of the data's own law, the rest spread around the modes


def log_law(x, std):
    d2 = torch.cdist(x, CENTRES).square()
    return (-d2 / (2 * std * std)).logsumexp(1) - math.log(25 * 2 * math.pi * std * std)


def mixture(k, rng, share):
    std = torch.where(torch.rand(k, 1, generator=rng) < share, STD, BROAD)
    return CENTRES[torch.randint(25, (k,), generator=rng)] + std * torch.randn(k, 2, generator=rng, dtype=F64)


def critic(x):
    """The exact log-ratio as a critic would give it: on a scale of its own, with a constant of its own."""
    own = log_law(x, STD)
    fake = torch.logaddexp(own + math.log(SHARE), log_law(x, BROAD) + math.log(1 - SHARE))
    return 5 * (own - fake).clamp(min=-30) + 400


def high_quality(x):
    return (torch.cdist(x, CENTRES).amin(1) < 3 * STD).double().mean().item()


@pytest.mark.parametrize("percentile, share", [(None, 0.98), (60, 0.97), (95, 0.97)])
def test_a_critic_with_a_platt_head_cleans_a_grid_of_25(percentile, share):
    """From about .7 of high quality to the data's own 1 - exp(-4.5) = .989, over all modes alike."""
    rng = seeded(20)
    head = metrics.platt(critic(mixture(4000, rng, 1.0)), critic(mixture(4000, rng, SHARE)))
    before = mixture(10_000, rng, SHARE)
    wanted = SHARE * (1 - math.exp(-4.5)) + (1 - SHARE) * (1 - math.exp(-4.5 * (STD / BROAD) ** 2))
    assert high_quality(before) == pytest.approx(wanted, abs=0.02) and wanted < 0.72

    def more(k):
        x = mixture(k, rng, SHARE)
        return x, critic(x)

    after, told = metrics.rejected("drs", more, 10_000, seeded(21), head, percentile=percentile)
    assert high_quality(after) > share
    modes = torch.bincount(torch.cdist(after, CENTRES).argmin(1), minlength=25)
    assert stats.chisquare(modes.numpy()).pvalue > 1e-3
    if percentile is None:
        assert told["acceptance"] == pytest.approx(SHARE, abs=0.1) and high_quality(after) < 0.995


def test_the_mixtures_exact_ratio_is_undone_exactly():
    """Without a head, from the log-ratio itself: the radii follow Rayleigh's law, one in SHARE is kept."""
    rng = seeded(22)

    def more(k):
        x = mixture(k, rng, SHARE)
        return x, (critic(x) - 400) / 5

    after, told = metrics.rejected("drs", more, 20_000, seeded(23), percentile=None)
    radius = torch.cdist(after, CENTRES).amin(1).numpy() / STD
    assert stats.kstest(radius, stats.rayleigh.cdf).pvalue > 1e-3
    assert stats.kstest(torch.cdist(mixture(20_000, rng, SHARE), CENTRES).amin(1) / STD, "rayleigh").pvalue < 1e-9
    ratio = 1 / (SHARE + (1 - SHARE) * (STD / BROAD) ** 2)  # at a centre, the largest (the other centres aside)
    assert told["acceptance"] == pytest.approx(1 / ratio, abs=5 * math.sqrt(0.3 * 0.7 / 28_000))


# a run's choice -------------------------------------------------------------------------------------------------------


def study(kind, sample, score, held=None, classes=None, **flags):
    """A Study of nothing but z (n, 2), and the keys that its noise is asked for."""
    data = {"dataset": "digits", "data_dir": "data", "image_size": 28, "run_dir": "run", "device": "cpu"}
    how = {"reject": kind, "seed": 11, "drs_percentile": None, "latent_dim": 2, "prior": "normal"}
    how["label"] = "shares"
    batches = SimpleNamespace(held=held, training_set=None, channels=1, classes=classes or {})
    args = SimpleNamespace(**data, **(how | flags))
    made = metrics.Study(args, batches, sample, score, conditional=bool(classes))
    keys, noise = [], made.noise

    def noted(n, *key):
        keys.append((n, *key))
        return noise(n, *key)

    made.noise = noted
    return made, keys


def noise(n, *key):
    return torch.randn(n, 2, generator=metrics.seeded(11, *key))


def as_it_is(z, y):
    return z


def first_number(x, y):
    return x[:, 0]


def test_chosen_naive_keeps_what_the_rule_keeps():
    """In numpy: the images of noise(1000, *key, 2, 1), (.., 2, 2) and so on in turn, each with its uniform."""
    made, keys = study("naive", as_it_is, lambda x, y: 3 * x[:, 0] - 1)
    x, y, took = made.chosen(700, 6, 4)
    z = torch.cat([noise(1000, 6, 4, 2, i) for i in (1, 2)])
    rng = metrics.seeded(11, 6, 4, 1)
    u = np.concatenate([torch.rand(1000, generator=rng, dtype=F64) for _ in range(2)])
    score = (3 * z[:, 0] - 1).double().numpy()
    kept = np.nonzero(u < 1 / (1 + np.exp(-score)))[0][:700]
    assert torch.equal(x, z[kept]) and torch.equal(y, torch.zeros(700, dtype=torch.long))
    assert took["attempts"] == kept[-1] + 1 and keys == [(1000, 6, 4, 2, 1), (1000, 6, 4, 2, 2)]
    assert took["acceptance"] == 700 / took["attempts"]
    assert took["line"] == f"{took['attempts']} attempts, {took['acceptance']:.1%} kept"
    assert torch.equal(made.chosen(700, 6, 4)[0], x) and not torch.equal(made.chosen(700, 6, 5)[0], x)


def classes_of(z):
    """The three-valued generator from z: N(0, 1) cut at P_G's quantiles."""
    return torch.bucketize(z[:, 0].contiguous(), torch.from_numpy(stats.norm.ppf(P_G.cumsum()[:2])).float())


def test_chosen_drs_calibrates_a_critic_on_held_images_and_keeps_the_datas_law():
    """The critic's scores are 7 times the log-ratio, plus 40: only held-out images and fresh fakes can tell."""
    held = torch.multinomial(torch.from_numpy(P_D), 60_000, True, generator=seeded(1))[:, None], torch.arange(60_000)
    rated = []

    def score(x, y):
        rated.append((x, y))
        return 7 * LOGIT[x[:, 0].long()] + 40

    made, keys = study("drs", lambda z, y: classes_of(z)[:, None].byte(), score, held)
    x, _, took = made.chosen(5000, 8)
    for part in (0, 1):
        of_held = [r[part] for r in rated if r[0].dtype == torch.int64]
        assert torch.equal(torch.cat(of_held), held[part])  # once, with their labels
    assert sum(k[0] for k in keys[:120]) == 60_000 and len({k[1:] for k in keys}) == len(keys)  # as many fakes, fresh z
    assert same_law(x, P_D) > 1e-3 and same_law(x, P_G) < 1e-9 and same_law(x, NAIVE) < 1e-9
    fakes = torch.cat([classes_of(noise(500, 8, 2, i)) for i in range(1, 121)])
    auc = roc_auc_score(np.arange(120_000) < 60_000, torch.cat([LOGIT[held[0][:, 0]], LOGIT[fakes]]).numpy())
    assert took["auc"] == pytest.approx(auc, abs=1e-12) and f"AUC {auc:.3f}" in took["line"]
    naive = study("naive", made.sample, made.score, held)[0].chosen(20_000, 8)[2]
    assert naive["attempts"] < 20_010 and naive["auc"] is None  # its sigmoid says yes to nearly all


def test_chosen_passes_the_percentile_on():
    held = torch.randn(2000, 1, generator=seeded(3)) + 1, torch.zeros(2000)
    attempts = []
    for q in (10.0, 60.0, 95.0):
        made, _ = study("drs", as_it_is, first_number, held, drs_percentile=q)
        attempts.append(made.chosen(1000, 6)[2]["attempts"])
    assert attempts[0] < attempts[1] < attempts[2]


CLASSES = {"many": 80, "few": 10, "rare": 10}


@pytest.mark.parametrize("kind", ["naive", "drs"])
def test_chosen_asks_for_the_datas_shares_and_returns_what_each_image_was_asked_for(kind):
    """The image is its label, which the score must not see; two runs of one key ask alike, another key otherwise."""
    held = torch.randn(700, 2, generator=seeded(3)) + 1, torch.zeros(700, dtype=torch.long)

    def sample(z, y):
        return torch.stack([z[:, 0], y.float()], 1)

    made, _ = study(kind, sample, first_number, held, CLASSES)
    x, y, _ = made.chosen(3000, 6)
    assert torch.equal(x[:, 1], y.float())
    assert np.abs(np.bincount(y, minlength=3) / 3000 - [0.8, 0.1, 0.1]).max() < 0.02
    assert torch.equal(made.chosen(3000, 6)[1], y) and not torch.equal(made.chosen(3000, 7)[1], y)
    x, y, _ = made.chosen(3000, 6, labels=lambda n, *key: torch.arange(n) % 3)
    assert torch.equal(x[:, 1], y.float())
    assert np.abs(np.bincount(y, minlength=3) / 3000 - 1 / 3).max() < 0.04


def test_chosen_refuses_a_d_that_tells_nothing_and_warns_of_batch_norm(capsys):
    held = torch.zeros(500, 1), torch.zeros(500)
    low = torch.rand(500, generator=seeded(1))
    real = torch.randn(500, generator=seeded(1))

    def blind(x, y):
        return -low if x.shape[1] == 1 else x[:, 0] + 5

    with pytest.raises(ValueError, match="nothing to select by"):
        study("drs", as_it_is, blind, held)[0].chosen(10, 6)
    for norm, warned in (("batch", True), ("none", False), ("layer", False)):
        study("naive", as_it_is, first_number, d_norm=norm)[0].chosen(10, 6)
        assert ("batch norm" in capsys.readouterr().out) == warned

    def seeing(x, y):
        return real + 1 if x.shape[1] == 1 else x[:, 0]

    study("drs", as_it_is, seeing, held, d_norm="batch")[0].chosen(10, 6)
    assert capsys.readouterr().out == ""  # calibrated as it is: what it says in eval mode is what counts


@pytest.mark.parametrize("label", ["one", None])
def test_a_single_class_is_calibrated_on_its_own_held_out_images(label):
    """D knows the class and nothing else: real and fake images of one class score alike, so there is nothing to select
    by. Against real images of all classes, fakes of a class that scores low or high would look well told apart."""
    y_held = torch.arange(600) % 3
    rng = seeded(5)
    held = torch.randn(600, 1, generator=rng), y_held
    rated = []

    def score(x, y):
        rated.append((x, y))
        return 5.0 * y + 1e-3 * x[:, 0]

    made, _ = study("drs", lambda z, y: z[:, :1], score, held, {"zero": 9, "one": 9, "two": 9}, label=label or "shares")
    labels = None if label is None else lambda k, *key: torch.full((k,), 1)
    try:
        made.chosen(50, 8, labels=labels)
    except ValueError:
        pass  # noise: an AUC near one half either way
    of_held = [pair for pair in rated if torch.isin(pair[0], held[0]).all()]
    x_real, y_real = (torch.cat(parts) for parts in zip(*of_held))
    if label is None:
        assert torch.equal(y_real, y_held)
    else:
        assert (y_real == 1).all() and torch.equal(x_real, held[0][y_held == 1])
        fakes = torch.cat([y for x, y in rated if not torch.isin(x, held[0]).any()])
        assert (fakes == 1).all()


@pytest.mark.parametrize("percentile", [-1, 101, math.nan])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ValueError, match=r"in 0\.\.100"):
        metrics.rejected("drs", discrete(), 10, seeded(0), percentile=percentile, burn_in=100)
