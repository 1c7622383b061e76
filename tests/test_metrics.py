"""metrics.py's scores, against closed forms, numpy, scipy, torch-fidelity and pytorch-fid."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from pytorch_fid import fid_score
from scipy import linalg
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.defaults import DEFAULTS

import metrics

F64 = torch.float64
SURE = 2000.0  # a logit so large that the other classes' probabilities are 0


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=F64)


def one_hot(classes, k):
    return SURE * torch.nn.functional.one_hot(torch.as_tensor(classes), k).to(F64)


def mixed(n, d, scale=1.0, shift=0.0):
    """Features with a full covariance whose eigenvalues run from .1 to 9."""
    rng = torch.Generator().manual_seed(d)
    x = randn(n, d) * torch.linspace(0.3, 3, d, dtype=F64)
    return scale * x @ torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=F64)).Q + shift


def numpy_statistics(x):
    x = x.double().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


# Inception Score


@pytest.mark.parametrize("splits", [1, 10])
@pytest.mark.parametrize("k", [2, 10, 1000])
def test_is_of_a_classifier_that_cannot_tell_is_1(k, splits):
    assert metrics.inception_score(torch.full((100, k), 3.0), splits) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("k", [2, 10])
def test_is_of_all_classes_for_certain_is_k(k):
    assert metrics.inception_score(one_hot(torch.arange(100 * k) % k, k), splits=1) == pytest.approx((k, 0), abs=1e-12)


@pytest.mark.parametrize("splits", [1, 10])
def test_is_of_one_class_is_1(splits):
    assert metrics.inception_score(one_hot([4] * 100, 10), splits) == pytest.approx((1, 0), abs=1e-12)


def test_is_of_two_answers_in_closed_form():
    """Half the pictures (p, 1 - p), half (1 - p, p): the marginal is (1/2, 1/2), so log IS = log 2 - H(p)."""
    p = torch.tensor([0.9, 0.1], dtype=F64)
    score, _ = metrics.inception_score(torch.stack([p, p.flip(0)] * 50).log(), splits=1)
    assert score == pytest.approx(2 * 0.9**0.9 * 0.1**0.1, abs=1e-12)


def test_splitting_biases_is_downwards():
    logits = one_hot(range(10), 10)
    assert metrics.inception_score(logits, splits=1)[0] == pytest.approx(10, abs=1e-12)
    assert metrics.inception_score(logits, splits=2)[0] == pytest.approx(5, abs=1e-12)
    assert metrics.inception_score(logits, splits=10)[0] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n, k, splits", [(1000, 10, 10), (500, 7, 1), (400, 50, 5)])
def test_is_agrees_with_torch_fidelity(n, k, splits, dtype):
    logits = (3 * randn(n, k) + randn(k)).to(dtype)
    theirs = metric_isc.isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=2020)
    ours = metrics.inception_score(logits, splits) if splits != 10 else metrics.inception_score(logits)
    assert ours[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-10) and ours[0] > 1.5
    assert ours[1] == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


# Mode Score


@pytest.mark.parametrize("k", [3, 10])
def test_mode_score_as_printed_is_the_inception_score_and_forgets_the_real_pictures(k):
    logits = 2 * randn(300, k) + randn(k)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    marginal = p.mean(0)
    wanted = np.exp((p * np.log(p)).sum(1).mean() - (marginal * np.log(marginal)).sum())  # exp(H(y) - E H(y|x))
    for real in (randn(200, k), 3 * randn(77, k) + 2 * randn(k)):
        assert metrics.mode_score(logits, real)[0] == pytest.approx(wanted, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("m", [1, 2, 5, 10])
def test_mode_score_as_meant_pays_for_missing_classes(m):
    """m of 10 classes, each certain, against all 10: IS = m and KL = log(10 / m)."""
    printed, meant = metrics.mode_score(one_hot(torch.arange(20 * m) % m, 10), one_hot(torch.arange(100) % 10, 10))
    assert (printed, meant) == pytest.approx((m, m * m / 10), abs=1e-12)


def test_mode_score_as_meant_in_numpy():
    fake, real = 2 * randn(300, 10) + randn(10), 2 * randn(200, 10)
    p, q = (np.exp(t.numpy()) / np.exp(t.numpy()).sum(1, keepdims=True) for t in (fake, real))
    m, star = p.mean(0), q.mean(0)
    wanted = np.exp((p * np.log(p / m)).sum(1).mean() - (m * np.log(m / star)).sum())
    assert metrics.mode_score(fake, real)[1] == pytest.approx(wanted, rel=1e-12)


# FID: closed forms


@pytest.mark.parametrize("dtype, offset", [(F64, 0), (torch.float32, 1000)])
def test_mean_and_covariance(dtype, offset):
    x = (mixed(50, 6) + offset).to(dtype)
    mean, cov = metrics.mean_and_covariance(x)
    wanted = numpy_statistics(x)
    assert mean.dtype == cov.dtype == F64
    np.testing.assert_allclose(mean, wanted[0], rtol=1e-12)
    np.testing.assert_allclose(cov, wanted[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n, d", [(200, 16), (20, 16), (10, 16), (16, 16), (5, 300), (150, 128)])
def test_fid_of_a_set_with_itself_is_0(n, d):
    x = mixed(n, d)
    trace = metrics.mean_and_covariance(x)[1].trace().item()
    assert 0 <= metrics.fid(x, x) < 1e-8 * d * trace
    assert 0 <= metrics.fid(x, x.flip(0)) < 1e-8 * d * trace


@pytest.mark.parametrize("n", [100, 6])
def test_fid_of_a_shift_is_its_squared_length(n):
    x, shift = randn(n, 12), 3 * randn(12)
    assert metrics.fid(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-7)
    assert metrics.fid(x + shift, x) == pytest.approx(shift.square().sum().item(), rel=1e-7)


def test_fid_of_commuting_covariances():
    a, b, m = torch.rand(3, 9, dtype=F64) + 0.1
    q = torch.linalg.qr(randn(9, 9)).Q
    wanted = m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    for turn in (torch.eye(9, dtype=F64), q):
        distance = metrics.frechet_distance(m, turn @ a.diag() @ turn.T, 0 * m, turn @ b.diag() @ turn.T)
        assert distance == pytest.approx(wanted.item(), rel=1e-12)


def test_fid_in_one_dimension():
    x, y = 2 * randn(50, 1) + 1, 0.5 * randn(80, 1) - 3
    wanted = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert metrics.fid(x, y) == pytest.approx(wanted.item(), rel=1e-12)


def test_fid_of_rank_1_covariances():
    u, v = randn(2, 12)
    zero = torch.zeros(12, dtype=F64)
    wanted = u.square().sum() + v.square().sum() - 2 * (u @ v).abs()
    distance = metrics.frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert distance == pytest.approx(wanted.item(), rel=1e-6)  # eigenvalues of 1e-16 leave roots of 1e-8


@pytest.mark.parametrize("d", [5, 50, 400])
def test_fid_of_two_pairs_of_pictures(d):
    """m + u and m - u: covariance 2 u u'. 1e-12 is out of reach once a (d, d) matrix is formed and its roots taken."""
    u, v, m1, m2 = randn(4, d)
    distance = metrics.fid(torch.stack([m1 + u, m1 - u]), torch.stack([m2 + v, m2 - v]))
    wanted = (m1 - m2).square().sum() + 2 * u.square().sum() + 2 * v.square().sum() - 4 * (u @ v).abs()
    assert distance == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("n", [300, 15])
def test_fid_is_blind_to_rotations_and_the_order_of_arguments(n):
    x, y, q = mixed(n, 20), mixed(n, 20, 1.5, 0.2), torch.linalg.qr(randn(20, 20)).Q
    assert metrics.fid(x @ q, y @ q) == pytest.approx(metrics.fid(x, y), rel=1e-7)
    assert metrics.fid(y, x) == pytest.approx(metrics.fid(x, y), rel=1e-7)
    assert metrics.fid(x @ q, y) > 1.01 * metrics.fid(x, y)


def test_fid_grows_by_the_squared_scale():
    x, y = mixed(60, 8), mixed(90, 8, 1.5, 0.2)
    assert metrics.fid(1e3 * x, 1e3 * y) == pytest.approx(1e6 * metrics.fid(x, y), rel=1e-10)


@pytest.mark.parametrize("d, n, runs", [(16, 2000, 8), (64, 2000, 2)])
def test_fid_of_finite_samples_of_one_law(d, n, runs):
    """N(0, I) on both sides: the estimate is (d + d (d + 1) / 4) (1/N + 1/N), to first order; the distance is 0."""
    mean = np.mean([metrics.fid(randn(n, d), randn(n, d)) for _ in range(runs)])
    assert mean == pytest.approx((d + d * (d + 1) / 4) * 2 / n, rel=0.05)


# FID: other people's programs


@pytest.mark.parametrize("n, m, d", [(300, 300, 20), (500, 100, 64), (41, 60, 40)])
def test_fid_agrees_with_sqrtm(n, m, d):
    x, y = mixed(n, d), mixed(m, d, 1.5, 0.2)
    (m1, c1), (m2, c2) = numpy_statistics(x), numpy_statistics(y)
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert metrics.fid(x, y) == pytest.approx(wanted, rel=1e-6)
    ours = metrics.frechet_distance(*map(torch.from_numpy, (m1, c1, m2, c2)))
    assert ours == pytest.approx(wanted, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_agrees_with_pytorch_fid_and_torch_fidelity():
    x, y = mixed(400, 32).float() + 5, mixed(500, 32, 0.7, 0.2).float() + 5
    pytorch_fid = fid_score.calculate_frechet_distance(*numpy_statistics(x), *numpy_statistics(y))
    statistics = [metric_fid.fid_features_to_statistics(t.double()) for t in (x, y)]
    torch_fidelity = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert metrics.fid(x, y) == pytest.approx(pytorch_fid, rel=1e-6)
    assert metrics.fid(x, y) == pytest.approx(torch_fidelity, rel=1e-6)


def exact_rank_deficient(x, y):
    """Tr (C1 C2)^(1/2) from the few non-zero eigenvalues of C1 C2: those of B C1 B', C2 = B'B."""
    (m1, c1), (m2, c2) = numpy_statistics(x), numpy_statistics(y)
    b = (y.numpy() - m2) / math.sqrt(len(y) - 1)
    values = np.sort(np.linalg.eigvalsh(b @ c1 @ b.T))[::-1][: min(len(x), len(y)) - 1]
    return ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.sqrt(values.clip(0)).sum()


@pytest.mark.parametrize(
    "n, m", [(10, 10), (10, 20), (31, 31), (32, 32), (33, 33), (31, 32), (31, 33), (200, 10), (2, 200)]
)
def test_fid_with_fewer_pictures_than_dimensions(n, m):
    """d = 32: well below it, around it, and on one side only."""
    x, y = mixed(n, 32), mixed(m, 32, 1.3, 0.3)
    statistics = [metric_fid.fid_features_to_statistics(t) for t in (x, y)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    wanted = exact_rank_deficient(x, y) if m < 32 or n < 32 else theirs
    trace = sum(np.trace(s["sigma"]) for s in statistics)
    assert wanted > 0.01 * trace
    assert theirs == pytest.approx(wanted, abs=1e-6 * trace)
    tolerance = 1e-11 if max(n, m) < 32 else 1e-6  # no roots of rounding errors in the low-rank form
    assert metrics.fid(x, y) == pytest.approx(wanted, abs=tolerance * trace)
    assert metrics.fid(y, x) == pytest.approx(wanted, abs=tolerance * trace)


def test_fid_of_pictures_all_alike():
    x, y = mixed(100, 8), torch.full((100, 8), 2.0)
    wanted = (x.mean(0) - 2).square().sum() + x.var(0).sum()
    assert metrics.fid(x, y) == pytest.approx(wanted.item(), rel=1e-10)
    assert metrics.fid(y[:5], y[:5]) == metrics.fid(y, y) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [20, 4])
@pytest.mark.parametrize("side", [0, 1])
def test_fid_refuses_features_that_are_not_finite(bad, n, side):
    sets = [randn(n, 8), randn(n, 8)]
    sets[side][1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        metrics.fid(*sets)
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(*metrics.mean_and_covariance(sets[0]), *metrics.mean_and_covariance(sets[1]))


@pytest.mark.parametrize("n, m", [(1, 1), (1, 50), (50, 1)])
def test_fid_refuses_a_single_picture(n, m):
    with pytest.raises(ValueError, match="1 rows, where 2 or more"):
        metrics.fid(randn(n, 8), randn(m, 8))


# coverage


def brute_radius(x, k):
    x = x.double().numpy()
    distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))
    return np.array([sorted(np.delete(row, i))[k - 1] for i, row in enumerate(distances)])


def test_neighbours_closer_than_the_rounding_of_a_product():
    """Pairs 1e-5 apart, far from the origin: a matrix product cannot tell which of the two a point itself is."""
    x = 100 * randn(40, 16) + 3000
    x = torch.cat([x, x + 1e-5 * randn(40, 16)])
    np.testing.assert_allclose(metrics.ball_radius(x, 1), brute_radius(x, 1), rtol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_within_a_crowd_far_from_the_origin(k):
    """Crowds of 30, 1e-5 across, at norm 12,000: about the origin a product errs by more than they are wide, and picks
    the k-th of them at random, up to twice as far off. Duplicates stay at 0."""
    x = 3000 + randn(6, 1, 16) + 1e-5 * randn(6, 30, 16)
    x = torch.cat([x.flatten(0, 1), x[:, 0].repeat(k + 1, 1)])
    assert x.norm(dim=1).min() > 11_900
    np.testing.assert_allclose(metrics.ball_radius(x, k), brute_radius(x, k), rtol=1e-5, atol=0)
    real, fake = x[:180], x[:180] + 2e-6 * randn(180, 16)
    theirs = compute_prdc((real - 3000).numpy(), (fake - 3000).numpy(), k)
    got = (*metrics.precision_recall(real, fake, k), *metrics.density_coverage(real, fake, k))
    assert got == pytest.approx([theirs[s] for s in ("precision", "recall", "density", "coverage")], abs=0.01)


def brute_coverage(real, fake, k):
    covered = 0
    for x, radius in zip(real.double().numpy(), brute_radius(real, k)):
        covered += any(math.dist(x, y) < radius for y in fake.double().numpy())
    return covered / len(real)


@pytest.mark.parametrize("n, d, k", [(12, 3, 1), (60, 16, 5), (200, 1, 3), (1100, 2, 5)])
def test_ball_radius(n, d, k):
    x = randn(n, d)
    np.testing.assert_allclose(metrics.ball_radius(x, k), brute_radius(x, k), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("n, m, d", [(8, 5, 2), (60, 40, 3), (40, 90, 20)])
def test_coverage_by_hand(n, m, d, k):
    real, fake = randn(n, d), randn(m, d) + 1.2
    wanted = brute_coverage(real, fake, k)
    assert 0 < wanted < 1
    assert metrics.coverage(real, fake, k) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("n", [10, 100])
def test_coverage_of_points_on_a_lattice(n):
    """Whole numbers: plenty of duplicates and of ties, which strict inequality leaves out."""
    real, fake = torch.randint(0, 4, (2, n, 2)).float()
    for k in (1, 2, 5):
        assert metrics.coverage(real, fake, k) == pytest.approx(brute_coverage(real, fake, k), abs=1e-12)


@pytest.mark.parametrize("n", [30, 1500])
def test_coverage_at_the_ends(n):
    x = randn(n, 4)
    assert metrics.coverage(x, x) == 1
    assert metrics.coverage(x, x[:1] + 1000) == 0


def test_coverage_of_duplicates_is_strict():
    x = torch.arange(10.0)[:, None].repeat(2, 1)
    assert metrics.ball_radius(x, 1).abs().max() == 0
    assert metrics.coverage(x, x, k=1) == 0  # a ball of radius 0 holds nothing, not even its centre
    assert metrics.coverage(x, x, k=2) == 1
    assert metrics.coverage(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0]]), k=1) == 0  # at 1's very edge


def test_coverage_takes_the_radius_as_given():
    real, fake = randn(50, 3), randn(40, 3)
    assert metrics.coverage(real, fake, radius=metrics.ball_radius(real, 5)) == metrics.coverage(real, fake, k=5)
    nearest = np.sqrt(((real[:, None] - fake[None]) ** 2).sum(2).numpy().min(1))
    assert metrics.coverage(real, fake, radius=torch.full((50,), 0.8)) == (nearest < 0.8).mean()


def test_coverage_of_one_law():
    n = m = 600
    wanted = 1 - math.prod((n - i) / (m + n - i) for i in range(1, 6))
    assert wanted == pytest.approx(0.96914, abs=1e-5)
    mean = np.mean([metrics.coverage(randn(n, 3), randn(m, 3)) for _ in range(12)])
    assert mean == pytest.approx(wanted, abs=0.006)


def test_coverage_and_outliers():
    """A real outlier's huge ball counts once, however many fakes it swallows; a fake outlier changes nothing."""
    real, outlier, fake = randn(99, 3), torch.full((1, 3), 1000.0, dtype=F64), randn(50, 3) + 300
    assert metrics.coverage(real, fake) == 0
    assert metrics.coverage(torch.cat([real, outlier]), fake) == pytest.approx(1 / 100, abs=1e-12)
    fake = randn(50, 3)
    assert metrics.coverage(real, torch.cat([fake, outlier])) == metrics.coverage(real, fake) > 0.5


def test_distances_survive_a_large_offset():
    real, fake = (randn(80, 32) + 3000).float(), (randn(60, 32) + 3000.7).float()
    assert 0.2 < brute_coverage(real, fake, 5) < 0.8
    np.testing.assert_allclose(metrics.ball_radius(real, 5), brute_radius(real, 5), rtol=1e-7)
    assert metrics.coverage(real, fake) == pytest.approx(brute_coverage(real, fake, 5), abs=1e-12)


# no number without an answer

# a function of tables (N, 40), how many of them, and the rows it needs of each
TABLES = {
    "fid": (metrics.fid, (2, 2)),
    "kid": (metrics.kid, (4, 4)),
    "coverage": (metrics.coverage, (6, 1)),
    "precision_recall": (metrics.precision_recall, (4, 4)),
    "density_coverage": (metrics.density_coverage, (6, 1)),
    "ball_radius": (lambda x: metrics.ball_radius(x, 5), (6,)),
    "mode_score": (metrics.mode_score, (1, 1)),
    "inception_score": (metrics.inception_score, (10,)),
    "inception_score, one split": (lambda x: metrics.inception_score(x, 1), (1,)),
    "class_shares": (metrics.class_shares, (1,)),
    "mean_and_covariance": (metrics.mean_and_covariance, (2,)),
    "Moments": (lambda x: fed(x).mean_and_covariance(), (2,)),
    "Moments.fid": (lambda x, y: fed(x).fid(fed(y)), (2, 2)),
}


def fed(x):
    moments = metrics.Moments()
    for part in x.split(7):
        moments.add(part)
    return moments


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", TABLES)
def test_one_number_that_is_not_finite_is_refused(name, dtype):
    """One of 40 numbers of one of 40 rows: a comparison with NaN is False, so that a count would look like a score.
    Beyond 1e50 the sixth power, which KID takes, is infinite."""
    function, least = TABLES[name]
    function(*(randn(40, 40).to(dtype) for _ in least))
    for bad in (math.nan, math.inf, -math.inf, 1e60):
        for side in range(len(least)):
            sets = [randn(40, 40) for _ in least]
            sets[side][17, 23] = bad
            with pytest.raises(ValueError, match="not finite"):
                function(*(t.to(dtype) for t in sets))


@pytest.mark.parametrize("name", TABLES)
def test_fewer_rows_than_needed_are_refused_and_that_many_are_not(name):
    function, least = TABLES[name]
    for side, rows in enumerate(least):
        for n in (n for n in {0, 1, rows - 1} if n < rows):
            with pytest.raises(ValueError, match=f"{n} rows, where {rows} or more|needs two pictures or more"):
                function(*(randn(n if i == side else 40, 40) for i in range(len(least))))
    numbers = function(*(randn(rows, 40) for rows in least))
    numbers = list(numbers.values()) if isinstance(numbers, dict) else numbers
    for v in numbers if isinstance(numbers, list | tuple) else [numbers]:
        assert torch.as_tensor(v).isfinite().all()


@pytest.mark.parametrize("name", [name for name in TABLES if "Moments" not in name])
def test_what_is_no_table_or_of_another_width_is_refused(name):
    function, least = TABLES[name]
    wrong = [[randn(40)] * len(least), [randn(40, 4, 2)] * len(least), [randn(40, 5) + 1j] * len(least)]
    for sets in wrong + ([[randn(40, 5), randn(40, 6)]] if len(least) == 2 else []):
        with pytest.raises(ValueError, match="of one width"):
            function(*sets)


def test_arrays_are_taken_as_tensors():
    x, y = randn(40, 5), randn(40, 5)
    for function in (metrics.fid, metrics.kid, metrics.mode_score, metrics.density_coverage):
        assert function(x.numpy(), y.numpy()) == function(x, y) == function(x.tolist(), y.tolist())
        kept = x.numpy().copy()
        kept.flags.writeable = False
        other_way = x.numpy()[::-1].copy()[::-1]  # a negative stride
        for same in (kept, other_way, x.numpy().astype(">f8")):
            assert function(same, y.numpy()) == function(x, y)


@pytest.mark.parametrize("values", [None, [["a"] * 5] * 40, np.ones((40, 5), object), np.ones((40, 5)) * 1j])
def test_what_is_no_numbers_is_refused_in_words_of_its_own(values):
    with pytest.raises(ValueError, match="tables of numbers are needed, not"):
        metrics.fid(values, randn(40, 5))


@pytest.mark.parametrize("n", [0, -1])
def test_no_splits_no_subsets_and_no_neighbours_are_refused(n):
    x, y = randn(40, 5), randn(40, 5)
    radius = metrics.ball_radius(x, 5)
    for name, call in (
        ("splits", lambda: metrics.inception_score(x, splits=n)),
        ("subsets", lambda: metrics.kid(x, y, subsets=n)),
        ("k", lambda: metrics.coverage(x, y, k=n)),
        ("k", lambda: metrics.precision_recall(x, y, k=n)),
        ("k", lambda: metrics.density_coverage(x, y, k=n)),
        ("k", lambda: metrics.density_coverage(x, y, k=n, radius=radius)),
    ):
        with pytest.raises(ValueError, match=f"^{name} is {n}, where 1 or more is needed"):
            call()


def test_radii_labels_and_scores_without_an_answer_are_refused():
    x, radius = randn(40, 3), metrics.ball_radius(randn(40, 3), 5)
    broken = radius.clone()
    broken[7] = math.nan
    for wrong in (broken, radius[:30]):
        for function in (
            lambda r: metrics.coverage(x, x, radius=r),
            lambda r: metrics.density_coverage(x, x, radius=r),
            lambda r: metrics.precision_recall(x, x, radii=(radius, r)),
        ):
            with pytest.raises(ValueError):
                function(wrong)
    spoiled = x.clone()
    spoiled[3, 1] = math.nan
    for sets in ((x, spoiled), (spoiled, x)):  # the radii known, so that no neighbours are looked for
        for function in (
            lambda *s: metrics.coverage(*s, radius=radius),
            lambda *s: metrics.density_coverage(*s, radius=radius),
            lambda *s: metrics.precision_recall(*s, radii=(radius, radius)),
            lambda *s: list(metrics.inside(*s, radius, True)),
        ):
            with pytest.raises(ValueError, match="not finite"):
                function(*sets)
    for labels in ([], [-1, 2], [3, 10]):
        with pytest.raises(ValueError, match="0 to 9"):
            metrics.mode_coverage(torch.tensor(labels, dtype=torch.long), 10)
    for bad in (math.nan, math.inf):
        score = torch.tensor([0.0, bad, -1])
        for function in (metrics.naive, lambda s: metrics.drs(s, 1.0), lambda s: metrics.drs_logit(s, 1.0)):
            with pytest.raises(ValueError, match="not finite"):
                function(score)
    with pytest.raises(ValueError, match="above the largest"):
        metrics.drs(torch.tensor([0.0, 1.5]), 1.0)  # more than the largest there is
    assert metrics.naive(torch.tensor([-math.inf])) == metrics.drs(torch.tensor([-math.inf]), 1.0) == 0


def test_class_shares_in_numpy():
    logits = randn(500, 8) + torch.tensor([2.5, 1, 0.5, 0.5, 0, 0, -1, -9])
    share = np.bincount(logits.numpy().argmax(1), minlength=8) / 500
    wanted = {"classes": (share >= 1 / 32).sum(), "classes_of": 8, "class_min": 0, "class_max": share.max()}
    assert metrics.class_shares(logits) == wanted and share.max() > 0.5 and 2 < wanted["classes"] < 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_library_needs_no_run_and_no_scripts(tmp_path):
    """README's lines on tensors, in a fresh process, with metrics.py alone in a folder: no files, no download."""
    shutil.copy(metrics.__file__, tmp_path)
    code = """
import torch
from metrics import precision_recall
from metrics import Classifier, coverage, density_coverage, embed, fid, inception_score, kid, mode_score
rng = torch.Generator().manual_seed(0)
x, y = (torch.randn(200, 16, generator=rng) for _ in range(2))
numbers = [fid(x, y), *kid(x, y), *inception_score(x), *mode_score(x, y), *precision_recall(x, y),
           *density_coverage(x, y), coverage(x, y)]
numbers += embed(Classifier(1, 5), (x > 0).byte().view(50, 1, 8, 8)).features.shape
import os, sys
assert sorted(os.listdir()) == ["metrics.py"] and "wgan_gp" not in sys.modules
print(*numbers)
"""
    done = subprocess.run([sys.executable, "-Bc", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    got = [float(v) for v in done.stdout.split()]
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 16, generator=rng) for _ in range(2))
    theirs = compute_prdc(x.double().numpy(), y.double().numpy(), 5)
    distance = fid_score.calculate_frechet_distance(*numpy_statistics(x), *numpy_statistics(y))
    assert got[0] == pytest.approx(distance, rel=1e-6)
    assert got[-3] == theirs["coverage"] and got[-2:] == [50, 128] and len(got) == 14


# the classifier's features


@pytest.fixture
def net():
    net = metrics.Classifier(3, 7)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), m.weight.data.uniform_(0.5, 2)
    return net


def pictures(n, size=32, channels=3):
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_one_by_one_or_together(net, training):
    x = pictures(1003)
    features, logits = net.train(training).embed(x)
    assert features.shape == (1003, 128) and logits.shape == (1003, 7) and not features.requires_grad
    for i in (0, 500, 999, 1000, 1002):
        one = net.train(training).embed(x[i : i + 1])
        torch.testing.assert_close(one, (features[i : i + 1], logits[i : i + 1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, features @ net.head.weight.T + net.head.bias, rtol=1e-4, atol=1e-5)


def test_embedding_leaves_the_running_statistics(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train().embed(pictures(20))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("size", [28, 64])
def test_embedding_looks_at_32_pixels(net, size):
    x = pictures(5, size)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :64, :64] if size == 64 else x
    same = torch.nn.functional.pad(x, (2, 2, 2, 2)) if size == 28 else x[:, :, ::2, ::2]
    torch.testing.assert_close(net.embed(x), net.embed(same), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        pictures(4).float(),
        pictures(4)[0],
        pictures(4)[:, 0],
        pictures(4, channels=1),
        pictures(4, channels=4),
        pictures(4)[..., :0],
        pictures(4).numpy(),
        pictures(4).bool(),
        pictures(4).to(torch.int16),
        None,
    ],
)
def test_embedding_refuses_what_is_no_picture(net, x):
    """Floats are on a scale unknown: 0..1, -1..1 or 0..255, a score of each would look like one."""
    net.name = "x"
    for embed in (net.embed, lambda x: metrics.embed(net, x)):
        with pytest.raises(ValueError, match="images are uint8"):
            embed(x)


def test_a_network_judges_the_side_it_was_trained_at(net):
    for side, good, bad in ((32, (28, 32), (27, 64, 16)), (64, (64,), (32, 28, 128)), (28, (), (28, 32))):
        net.side = side
        for size in good:
            assert net.embed(pictures(3, size))[0].shape == (3, 128)
        for size in bad:
            with pytest.raises(ValueError, match=f"trained on {side}"):
                net.embed(pictures(3, size))


def test_prepare_28_adds_a_black_border():
    x = pictures(4, 28) // 2 + 100
    y = metrics.Classifier(1, 10).prepare(x)
    assert y.shape == (4, 3, 32, 32) and y.dtype == torch.float32
    np.testing.assert_allclose(y[:, :, 2:30, 2:30], x.numpy() / 255, rtol=1e-6)
    y[:, :, 2:30, 2:30] = 0
    assert y.abs().max() == 0


def test_prepare_32_only_scales():
    x = pictures(4)
    np.testing.assert_allclose(metrics.Classifier(1, 10).prepare(x), x.numpy() / 255, rtol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_prepare_larger_takes_the_mean_of_each_square(factor):
    x = pictures(2, 32 * factor, 1)
    wanted = x.numpy().reshape(2, 1, 32, factor, 32, factor).mean((3, 5)) / 255
    np.testing.assert_allclose(metrics.Classifier(1, 10).prepare(x), wanted, rtol=1e-5)


# KID


def kernel(x, y):
    return (sum(a * b for a, b in zip(x.tolist(), y.tolist())) / len(x) + 1) ** 3


def test_kid_by_two_loops():
    """One subset of half the rows, drawn as torch-fidelity draws: the unbiased estimate, pair by pair."""
    x, y = randn(18, 5), randn(19, 5) + 0.5
    theirs = metrics.kid(x, y, subsets=1)
    rng = np.random.RandomState(2020)
    b, a = (t.numpy()[rng.choice(len(t), 9, replace=False)] for t in (y, x))
    own = sum(kernel(t[i], t[j]) for t in (a, b) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    cross = sum(kernel(p, q) for p in a for q in b) / 81
    assert theirs == (pytest.approx(own - 2 * cross, rel=1e-12), 0)


def test_kid_of_point_masses():
    a, b = randn(2, 6)
    wanted = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    assert metrics.kid(a.expand(20, 6), b.expand(30, 6)) == pytest.approx((wanted, 0), rel=1e-12, abs=1e-12)
    assert metrics.kid(a.expand(20, 6), a.expand(30, 6)) == pytest.approx((0, 0), abs=1e-11)


@pytest.mark.parametrize(
    "n, m, d, size, of",
    [
        (300, 300, 20, 100, 100),
        (150, 400, 64, 1000, 75),
        (150, 400, 64, 75, 75),
        (500, 501, 16, 1000, 250),
        (2100, 2000, 8, 1000, 1000),
    ],
)
def test_kid_agrees_with_torch_fidelity(n, m, d, size, of):
    """Subsets of `size`, but of half the rows at most: as large as all of them they would be all the same."""
    x, y = mixed(n, d), mixed(m, d, 1.2, 0.2)
    theirs = metric_kid.kid_features_to_metric(y, x, kid_subset_size=of, kid_subsets=8, verbose=False)
    mean, spread = metrics.kid(x, y, 8, size)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9) and spread > 0.01 * mean
    assert metrics.kid(x.float(), y.float(), 8, size)[0] == pytest.approx(mean, rel=1e-5)
    assert metrics.kid.__defaults__ == (DEFAULTS["kid_subsets"], DEFAULTS["kid_subset_size"]) == (100, 1000)


def test_kid_of_one_law_is_0_on_average_at_any_size():
    for n in (5, 50):
        values = [metrics.kid(randn(n, 3), randn(n, 3), 1)[0] for _ in range(400)]
        assert abs(np.mean(values)) < 4 * np.std(values) / 20 and min(values) < 0 < max(values)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_kid_refuses_fewer_than_four_pictures(n):
    for sets in ((randn(n, 4), randn(9, 4)), (randn(9, 4), randn(n, 4))):
        with pytest.raises(ValueError, match=f"{n} rows, where 4 or more"):
            metrics.kid(*sets)
    assert metrics.kid(randn(4, 4), randn(4, 4))[1] > 0


# precision, recall, density


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("n, m, d", [(100, 80, 2), (300, 300, 16), (60, 200, 64)])
def test_precision_and_recall_agree_with_torch_fidelity_and_prdc(n, m, d, k):
    real, fake = randn(n, d), 0.8 * randn(m, d) + 0.3
    theirs = metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=k, verbose=False)
    got = metrics.precision_recall(real, fake, k)
    assert got == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0.05 < got[0] <= 1 and 0 < got[1] < 1
    other = compute_prdc(real.numpy(), fake.numpy(), k)
    density, coverage = metrics.density_coverage(real, fake, k)
    assert got == pytest.approx((other["precision"], other["recall"]), abs=1e-12)
    assert (density, coverage) == pytest.approx((other["density"], other["coverage"]), abs=1e-12)


def test_the_same_set_twice():
    """Its own pictures are tied with their balls' rims: inside for precision, outside for density, bit for bit."""
    for x in (randn(200, 16), randn(200, 16).float(), 1000 * randn(150, 64) + 5000, randn(2500, 3)):
        for k in (1, 3, 5):
            assert metrics.precision_recall(x, x.clone(), k) == (1, 1)
            assert metrics.density_coverage(x, x.flip(0), k) == (pytest.approx(1, abs=1e-12), 1)


def test_ties_on_a_lattice():
    real, fake = torch.randint(0, 4, (2, 70, 2)).float()
    radius = {k: brute_radius(real, k) for k in (1, 3)}
    distance = np.sqrt(((fake[:, None] - real[None]) ** 2).sum(2).numpy().astype(float))
    back = np.sqrt(((real[:, None] - fake[None]) ** 2).sum(2).numpy().astype(float))
    for k in (1, 3):
        wanted = (distance <= radius[k]).any(1).mean(), (back <= brute_radius(fake, k)).any(1).mean()
        assert metrics.precision_recall(real, fake, k) == pytest.approx(wanted, abs=1e-12)
        density = (distance < radius[k]).sum() / (k * len(fake))
        assert metrics.density_coverage(real, fake, k)[0] == pytest.approx(density, abs=1e-12)
    assert metrics.precision_recall(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [9.0]]), 1) == (0.5, 1)


def test_far_sets_share_nothing():
    x = randn(50, 4)
    assert metrics.precision_recall(x, x + 1000) == (0, 0)
    assert metrics.density_coverage(x, x + 1000) == (0, 0)


def test_density_of_one_law_is_1():
    values = [metrics.density_coverage(randn(400, 4), randn(300, 4)) for _ in range(12)]
    assert np.mean([v[0] for v in values]) == pytest.approx(1, abs=0.02)
    wanted = 1 - math.prod((400 - i) / (700 - i) for i in range(1, 6))
    assert np.mean([v[1] for v in values]) == pytest.approx(wanted, abs=0.01)


def test_an_outlier_inflates_precision_and_not_density():
    real, fake = randn(100, 3), randn(100, 3) + 20
    assert metrics.precision_recall(real, fake)[0] == 0
    spoiled = torch.cat([real, torch.full((1, 3), 60.0, dtype=F64)])
    assert metrics.precision_recall(spoiled, fake)[0] == 1
    assert metrics.density_coverage(spoiled, fake)[0] == pytest.approx(1 / 5, abs=1e-12)


def test_radii_as_given():
    real, fake = randn(60, 3), randn(50, 3)
    radii = metrics.ball_radius(real, 3), metrics.ball_radius(fake, 3)
    assert metrics.precision_recall(real, fake, radii=radii) == metrics.precision_recall(real, fake)
    assert metrics.density_coverage(real, fake, 3, radii[0]) == metrics.density_coverage(real, fake, 3)
    wide = metrics.precision_recall(real, fake, radii=(radii[0] * 100, radii[1] * 0))
    assert wide == (1, 0)


def test_a_table_cut_into_blocks_is_the_whole_table(monkeypatch):
    """The matrix of distances is made in shares whose memory is used again."""
    real, fake = randn(3000, 2), randn(2000, 2) * 1.1
    shares = [len(p) for p, _ in metrics.nearness(real, fake, fake.square().sum(1))]
    assert len(shares) == 3 and sum(shares) == 3000
    other = compute_prdc(real.numpy(), fake.numpy(), 5)
    assert metrics.precision_recall(real, fake, 5) == pytest.approx((other["precision"], other["recall"]), abs=1e-12)
    got = metrics.density_coverage(real, fake)
    assert got == pytest.approx((other["density"], other["coverage"]), abs=1e-12)


def test_compare_puts_the_scores_together():
    """Each as its own function gives it, prdc's at the k that the table prints: 3, and 5."""
    x, y = randn(300, 8), randn(200, 8) * 0.8 + 0.2

    def sample(features):
        moments = metrics.Moments()
        moments.add(features)
        return metrics.Sample(moments, features, 2 * features)

    s = metrics.compare(sample(y), sample(x), train=sample(x[:100]))
    prdc = {k: compute_prdc(x.numpy(), y.numpy(), k) for k in (3, 5)}
    wanted = {name: prdc[3][name] for name in ("precision", "recall")}
    wanted |= {name: prdc[5][name] for name in ("density", "coverage")}
    wanted |= {"fid": metrics.fid(x, y), "fid_train": metrics.fid(x[:100], y)}
    wanted["kid"], wanted["kid_std"] = metrics.kid(x, y)
    wanted["inception_score"], wanted["inception_score_std"] = metrics.inception_score(2 * y)
    wanted["mode_score"] = metrics.mode_score(2 * y, 2 * x)[1]
    assert s == pytest.approx(wanted, rel=1e-9)
    few = metrics.compare(sample(y), sample(x), ["coverage"])
    assert few == {"coverage": s["coverage"]}


# stacked MNIST


class Reader(torch.nn.Module):
    """Reads a digit off a picture's brightness, 20 a unit; unsure in between."""

    batch, accuracy, labelled, name = 70, 0.97, True, "classifier-mnist/128 abcdef12"

    def embed(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 1
        v = x.double().mean((1, 2, 3)) / 20
        return torch.stack([v, v.square()], 1), -3 * (v[:, None] - torch.arange(10)).square()


def painted(triples, size=4):
    """Pictures (N, 3, size, size) of three digits each, for the Reader."""
    return (20 * torch.as_tensor(triples)).byte()[:, :, None, None].expand(-1, -1, size, size)


def test_stacked_reads_red_as_hundreds_green_as_tens_and_blue_as_ones():
    net, rng = metrics.Stacked(Reader()), np.random.RandomState(0)
    x = torch.from_numpy(rng.randint(0, 185, (40, 3, 1, 1), np.uint8)).expand(-1, -1, 4, 4)
    features, joint = net.embed(x)
    assert features.shape == (40, 6) and joint.shape == (40, 1000)
    for i in range(40):
        v = x[i, :, 0, 0].double().numpy() / 20
        p = [np.exp(-3 * (c - np.arange(10.0)) ** 2) / np.exp(-3 * (c - np.arange(10.0)) ** 2).sum() for c in v]
        assert features[i].tolist() == pytest.approx([v[0], v[0] ** 2, v[1], v[1] ** 2, v[2], v[2] ** 2])
        for r, g, b in ((0, 0, 0), (7, 1, 3), (9, 9, 9), rng.randint(0, 10, 3)):
            assert joint[i, 100 * r + 10 * g + b].item() == pytest.approx(np.log(p[0][r] * p[1][g] * p[2][b]), rel=1e-9)
    np.testing.assert_allclose(joint.exp().sum(1), 1, rtol=1e-12)
    triples = rng.randint(0, 10, (60, 3))
    assert net.embed(painted(triples))[1].argmax(1).tolist() == (triples @ [100, 10, 1]).tolist()


def test_stacked_features_are_three_times_as_wide_and_named_so():
    one = metrics.Classifier(1, 10)
    one.name, one.batch, one.accuracy = Reader.name, 100, 0.5
    net = metrics.Stacked(one)
    assert (net.name, net.batch, net.accuracy) == ("classifier-mnist on each of 3 channels/384 abcdef12", 100, 0.5)
    x = pictures(5, 28)
    features, joint = net.embed(x)
    assert features.shape == (5, 384) and joint.shape == (5, 1000)
    torch.testing.assert_close(features[:, 128:256], one.embed(x[:, 1:2])[0])


@pytest.mark.parametrize("k", [10, 1000])
def test_mode_coverage_in_closed_form(k):
    """log(K / m) where m of K classes occur, as often as each other."""
    classes = torch.randperm(k)
    for m in (k, k // 2, k // 5, 1):
        s = metrics.mode_coverage(classes[:m].repeat(3), k)
        assert s == {"modes": m, "modes_kl": pytest.approx(math.log(k / m), abs=1e-12)} and type(s["modes"]) is int
    uneven = metrics.mode_coverage(torch.tensor([3, 3, 3, 7]), k)
    wanted = 0.75 * math.log(0.75 * k) + 0.25 * math.log(0.25 * k)
    assert uneven == {"modes": 2, "modes_kl": pytest.approx(wanted, abs=1e-12)}


def test_mode_coverage_of_a_finite_sample_of_all_classes():
    """(K - 1) / (2 N) on average, to first order: .0192 of 26,000."""
    labels = torch.randint(1000, (26_000,))
    s = metrics.mode_coverage(labels, 1000)
    p = np.bincount(labels, minlength=1000) / 26_000
    assert s["modes_kl"] == pytest.approx((p * np.log(p * 1000)).sum(), abs=1e-12)
    assert s["modes"] == 1000 and s["modes_kl"] == pytest.approx(999 / 52_000, rel=0.2)


@pytest.fixture
def stacked_judge(monkeypatch):
    """A Judge of 200 stacked digits: real ones 25 triples, eight times each."""
    real = torch.tensor([[c // 100, c // 10 % 10, c % 10] for c in range(0, 1000, 40)]).repeat(8, 1)
    monkeypatch.setattr(metrics, "classifier", lambda *a: metrics.Stacked(Reader()))
    return metrics.Judge(
        "stacked_mnist",
        lambda split: (painted(real if split == "test" else torch.randint(10, (300, 3)), 28), None),
        say=lambda text: None,
    )


def test_judge_of_stacked_digits_counts_modes(stacked_judge):
    assert stacked_judge.n == 200
    made = torch.tensor([[9, c // 10 % 10, c % 10] for c in range(50)]).repeat(4, 1)
    extra = torch.zeros(30, 3, dtype=torch.int64)  # more than were asked for: not looked at
    scores = stacked_judge(painted(torch.cat([made, extra]), 28))
    assert {k: v for k, v in scores.items() if "modes" in k} == {
        "modes": 50,
        "modes_kl": pytest.approx(math.log(20), abs=1e-12),
        "modes_real": 25,
        "modes_kl_real": pytest.approx(math.log(40), abs=1e-12),
    }
    assert scores["features"] == "classifier-mnist on each of 3 channels/384 abcdef12" and scores["n_real"] == 200
    assert "50 of 1000 modes, KL 2.996 (real 25, 3.689)" in stacked_judge.line(scores)
    assert "n 200 + 200) few images: compare at this n only" in stacked_judge.line(scores)
    assert scores["class_max"] == 0.02 and scores["class_min"] == 0


def test_judge_of_other_data_counts_no_modes(monkeypatch):
    monkeypatch.setattr(metrics, "classifier", lambda *a: Reader())
    judge = metrics.Judge("mnist", lambda split: (painted(torch.randint(10, (50, 1)), 28), None), say=lambda text: None)
    scores = judge(painted(torch.randint(10, (50, 1)), 28))
    assert not any("modes" in k for k in scores) and "modes" not in judge.line(scores)


@pytest.mark.parametrize("name, n", [("stacked_mnist", 26_000), ("mnist", 10_000), ("digits", 10_000)])
def test_judge_compares_as_many_as_the_papers_do(monkeypatch, name, n):
    monkeypatch.setattr(Reader, "batch", 30_000)
    monkeypatch.setattr(metrics, "classifier", lambda *a: Reader())

    def load(split):
        return painted(torch.randint(10, (26_100, 1)), 1), None

    assert metrics.Judge(name, load, say=lambda text: None).n == n
    assert metrics.Judge(name, load, n=60, say=lambda text: None).n == 60


def test_the_distance_of_arrays_of_numpy():
    """Of diagonal covariances a, b it is |m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = np.array([4.0, 9.0]), np.array([1.0, 25.0])
    d = metrics.frechet_distance(np.array([1.0, 2.0]), np.diag(a), np.array([3.0, 5.0]), np.diag(b))
    assert d == pytest.approx(4 + 9 + 1 + 4, rel=1e-12)
    real, fake = np.random.RandomState(0).randn(2, 50, 3)
    radius = metrics.ball_radius(real, 5).numpy()
    assert metrics.coverage(real, fake, 5, radius) == metrics.coverage(real, fake, 5)
    assert metrics.density_coverage(real, fake, 5, radius) == metrics.density_coverage(real, fake, 5)


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_the_distance_of_a_collapsed_generator(rank, monkeypatch):
    """LAPACK's eigenvalues of such a covariance do not always converge. The distance is that of scipy's root."""

    def fails(*a):
        raise torch.linalg.LinAlgError("it did not converge")

    rng = np.random.RandomState(rank)
    x = rng.randn(300, rank) @ rng.randn(rank, 40) * 1e-3 + 2
    y = rng.randn(300, 40)
    means, covariances = zip(*((f.mean(0), np.cov(f, rowvar=False)) for f in (x, y)))
    root = linalg.sqrtm(covariances[0] @ covariances[1] + 0j).real
    wanted = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert metrics.fid(x, y) == pytest.approx(wanted, rel=1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert metrics.fid(x, y) == pytest.approx(wanted, rel=1e-4)
    assert metrics.fid(y, x) == pytest.approx(wanted, rel=1e-4)


def test_moments_take_an_array(x=((0.0, 1.0), (2.0, 5.0), (4.0, 6.0))):
    moments = metrics.Moments()
    moments.add(np.array(x))
    mean, cov = moments.mean_and_covariance()
    np.testing.assert_allclose(mean, np.mean(x, 0))
    np.testing.assert_allclose(cov, np.cov(np.array(x).T))


@pytest.mark.parametrize("radius", [np.ones(25), torch.ones(25), np.ones(15)])
def test_there_is_a_radius_for_each_point(radius):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for scores in (
        lambda: metrics.coverage(x, x, radius=radius),
        lambda: metrics.density_coverage(x, x, radius=radius),
        lambda: metrics.precision_recall(x, x, radii=(radius, radius)),
    ):
        with pytest.raises(ValueError, match="radii for 20 points"):
            scores()


def test_radii_may_be_an_array():
    """Every point lies in its own ball of radius 0; of no other point's ball, coverage's inequality being strict."""
    x = np.arange(20.0)[:, None]
    assert metrics.precision_recall(x, x, radii=(np.zeros(20), np.zeros(20))) == (1, 1)
    assert metrics.coverage(x, x, radius=np.zeros(20)) == 0


def test_the_printed_mode_score_is_a_number_where_a_softmax_underflows():
    """One fake and one real image, each of one class beyond doubt: the Inception Score of one image is 1."""
    printed, meant = metrics.mode_score(torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]]))
    assert printed == 1 and meant == 0


@pytest.mark.parametrize("radius", [0.8, np.ones((20, 1)), torch.tensor(1.0)])
def test_a_radius_of_another_shape_is_refused(radius):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="radii for 20 points"):
        metrics.coverage(x, x, radius=radius)


def test_radii_may_be_a_tensor_of_two_rows():
    x = torch.arange(20.0)[:, None]
    assert metrics.precision_recall(x, x, radii=torch.zeros(2, 20)) == (1, 1)


def test_radii_as_a_list_keep_their_digits():
    """With the k-th neighbour exactly on the rim, which is outside, density is 1; a radius rounded up would add it."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = metrics.ball_radius(x, 5).tolist()
    assert metrics.density_coverage(x, x, radius=radius) == (1.0, 1.0)
