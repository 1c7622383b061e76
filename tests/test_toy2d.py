"""The two-dimensional study: data, scores, the objectives' maths. Oracles are closed forms and finite differences."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import toy2d


def args(*flags):
    return toy2d.parse_args(["--device", "cpu", *flags])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_ring_has_as_many_modes_as_it_says():
    c = toy2d.mode_centres(args("--data", "ring"))
    assert c.shape == (8, 2) and torch.pdist(c).min().item() == pytest.approx(2 * math.sin(math.pi / 8), rel=1e-6)
    torch.testing.assert_close(c.norm(dim=1), torch.ones(8))


def test_the_grids():
    for n, line in (("25", [-4, -2, 0, 2, 4]), ("9", [-4, 0, 4])):
        c = toy2d.mode_centres(args("--data", "grid", "--modes", n))
        assert sorted(map(tuple, c.tolist())) == [(x, y) for x in line for y in line]


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "grid", "--modes", "16"],
        ["--data", "ring", "--modes", "1"],
        ["--seeds", "0"],
        ["--method", "vae"],
        ["--lr-g", "nan"],
        ["--protocol", "metz", "--data", "grid"],
        ["--slope", "2"],
        ["--bound", "-1"],
    ],
)
def test_mistakes_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        args(*flags)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_real_points_score_as_the_rayleigh_law_says():
    """3 standard deviations in the plane hold 1 - exp(-9/2); the KL's mean is about (K - 1) / 2n."""
    a = args("--data", "grid", "--seeds", "20")
    runs = toy2d.scores_of_real(a)
    quality = sum(r["high_quality"] for r in runs) / 20
    assert quality == pytest.approx(1 - math.exp(-4.5), abs=4 * math.sqrt(0.0111 * 0.9889 / 50_000))
    assert all(r["covered"] == r["strict"] == 25 and r["near"] == 1 for r in runs)
    assert sum(r["reverse_kl"] for r in runs) / 20 == pytest.approx(24 / 5000, rel=0.4)


def test_a_uniform_blob_covers_every_mode_and_is_worth_nothing():
    a = args("--data", "grid")
    x = torch.rand(50_000, 2, generator=torch.Generator().manual_seed(0)) * 10 - 5
    s = toy2d.coverage(x, toy2d.mode_centres(a), a.std)
    assert s["covered"] == 25 and s["strict"] == 0
    assert s["high_quality"] == pytest.approx(25 * math.pi * 0.15**2 / 100, rel=0.15)


def test_coverage_by_hand():
    c = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.0, 0.29], [0.0, 0.31], [1.0, 0.0], [1.0, 0.1], [1.2, 0.0], [0.74, 0.0], [0.26, 0.0], [9, 9]])
    s = toy2d.coverage(x, c, 0.1)
    assert s["covered"] == 2 and s["strict"] == 2 and s["high_quality"] == 6 / 8 and s["near"] == 3 / 8
    p = torch.tensor([2 / 6, 4 / 6])
    assert s["reverse_kl"] == pytest.approx((p * (2 * p).log()).sum().item(), rel=1e-6)


def test_runs_side_by_side_do_not_mix(float64):
    net, x = toy2d.MLP(3, 2, 5, 1), torch.randn(3, 7, 2)
    out = net(x)
    for r in range(3):
        h = x[r]
        for i in range(3):
            h = (h.relu() if i else h) @ net.weights[i][r] + net.biases[i][r]
        torch.testing.assert_close(out[r], h)
    grads = torch.autograd.grad(toy2d.mean_of_each(out[..., 0]), list(net.weights))
    alone = torch.autograd.grad(net(x)[1, :, 0].mean(), list(net.weights))
    for g, h in zip(grads, alone):
        torch.testing.assert_close(g[1], h[1])


# MD-GAN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture, radius", [("published", 0.9436), ("clusters", 2.0)])
def test_the_simplex_is_regular(mixture, radius):
    mu = toy2d.Simplex(mixture).mu.double()
    gram = radius**2 * (10 / 9 * torch.eye(10, dtype=torch.float64) - 1 / 9)
    torch.testing.assert_close(mu @ mu.T, gram, atol=1e-6, rtol=0)


def test_which_mixture_has_clusters():
    """Published constants: one blob at 0, where the largest likelihood is .0220870751 with its normaliser; R 2: ten."""
    published, clusters = toy2d.Simplex("published"), toy2d.Simplex("clusters")
    assert published.end_of_corner < 1e-6 and clusters.end_of_corner > 0.99
    lam = published.peak - math.log(10) - 4.5 * math.log(2 * math.pi * 0.25)
    assert math.exp(lam) == pytest.approx(0.0220870751, rel=1e-3)  # R = .9436 is rounded
    assert clusters.peak == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mixture", ["published", "clusters"])
def test_u_is_a_log_ratio_of_likelihoods_and_never_negative(mixture):
    s = toy2d.Simplex(mixture)
    e = torch.rand(100_000, 9, generator=torch.Generator().manual_seed(0)) * 5 - 2.5
    assert s.u(e).min().item() >= 1e-6
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(10, dtype=torch.float64)),
        torch.distributions.MultivariateNormal(s.mu.double(), 0.25 * torch.eye(9, dtype=torch.float64)),
    )
    e = e[:100].double()
    top = s.peak - math.log(10) - 4.5 * math.log(2 * math.pi * 0.25)
    torch.testing.assert_close(s.u(e), top - law.log_prob(e), atol=1e-5, rtol=1e-6)


def test_log1mexp():
    u = torch.tensor([1e-7, 1e-3, 0.5, math.log(2), 1.0, 20.0, 80.0], dtype=torch.float64, requires_grad=True)
    exact = [math.log(-math.expm1(-v)) if v < 1 else math.log1p(-math.exp(-v)) for v in u.tolist()]
    torch.testing.assert_close(toy2d.log1mexp(u), torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(toy2d.log1mexp(u).sum(), u)
    torch.testing.assert_close(slope, 1 / torch.expm1(u.detach()), rtol=1e-10, atol=0)


# looking ahead --------------------------------------------------------------------------------------------------------


class Scalar(torch.nn.Module):
    """D(x) = t x, with Adam's moments of three steps behind it."""

    def __init__(self):
        super().__init__()
        self.t = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.t * x[..., 0]


def warmed(D, steps=3):
    opt = torch.optim.Adam(D.parameters(), 0.01, (0.5, 0.999))
    for i in range(steps):
        opt.zero_grad()
        D(torch.full((1, 1, 2), float(i + 1))).square().sum().backward()
        opt.step()
    return opt


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_looking_ahead_is_adam_itself(float64, k):
    """The parameters it arrives at are those torch's Adam arrives at; D and its optimizer do not move."""
    torch.manual_seed(0)
    D = toy2d.MLP(1, 2, 4, 1)
    score = type("Squeeze", (torch.nn.Module,), {"forward": lambda self, x: self.net(x)[..., 0]})()
    score.net = D
    opt, real, fake = warmed(score), torch.randn(1, 6, 2), torch.randn(1, 6, 2)
    before = [p.clone() for p in score.parameters()]
    ahead = toy2d.look_ahead(score, opt, real, fake, k, 0.01)
    assert all(torch.equal(p, q) for p, q in zip(score.parameters(), before))
    for _ in range(k):
        opt.zero_grad()
        toy2d.discriminator_loss("gan", score(real), score(fake)).backward()
        opt.step()
    for p, q in zip(score.parameters(), ahead.values()):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_g_is_led_through_every_step_of_d(float64, k):
    """The slope of a Dirac GAN's unrolled minimax loss against central differences; first order alone is far off."""
    D, real = Scalar(), torch.zeros(1, 1, 2)
    opt = warmed(D)

    def loss(p, first_order=False):
        fake = torch.stack([p, torch.zeros_like(p)]).view(1, 1, 2)
        ahead = toy2d.look_ahead(D, opt, real, fake.detach() if first_order else fake, k, 0.05)
        return -torch.nn.functional.softplus(torch.func.functional_call(D, ahead, (fake,))).sum()

    p = torch.tensor(1.3, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(p), p)
    h = 1e-5
    difference = (loss(p.detach() + h) - loss(p.detach() - h)) / (2 * h)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)
    (detached,) = torch.autograd.grad(loss(p, first_order=True), p)
    assert abs(detached.item() - difference.item()) > 1e-3


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        toy2d.main(["--steps", "1", "--batch-size", "2"])
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("method", toy2d.METHODS)
def test_every_method_runs_on_a_gpu(method, tmp_path):
    """Networks start as on the CPU and fixed noise is the same, so untrained ones make the same points."""
    flags = ["--method", method, "--seeds", "2", "--steps", "1", "--lr-g", "0", "--lr-d", "0"]
    points = []
    for device in ("cpu", "cuda"):
        a = args(*flags, "--device", device)
        G, D = toy2d.train(a)
        assert {p.device.type for p in D.parameters()} == {device}
        z = toy2d.noise(a, 2, 50, rng=torch.Generator().manual_seed(0))
        points.append(G(z).detach().cpu())
    torch.testing.assert_close(*points, atol=1e-4, rtol=1e-4)
    toy2d.main(
        [
            "--method",
            method,
            "--seeds",
            "2",
            "--steps",
            "12",
            "--reject",
            "drs",
            "--device",
            "cuda",
            "--run-dir",
            str(tmp_path / "a"),
        ]
    )
    assert json.loads((tmp_path / "a/scores.json").read_text())["made"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_one_line(capsys):
    fails(capsys, "--device", "cuda", words=["--device cuda"])


@pytest.mark.parametrize("method", toy2d.METHODS)
def test_every_method_runs_and_draws(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy2d.main(
        ["--data", "grid", "--modes", "9", "--method", method, "--steps", "12", "--seeds", "2", "--run-dir", "a"]
    )
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"strip.png", "training.gif", "log.csv", "scores.json", "args.json"} <= names
    scores = json.loads((tmp_path / "a/scores.json").read_text())
    assert [len(scores[k]) for k in ("made", "real")] == [2, 2] and scores["real"][0]["covered"] == 9
    steps = [row.split(",")[0] for row in (tmp_path / "a/log.csv").read_text().splitlines()]
    assert steps == ["step", "2", "4", "6", "8", "10", "12"]
    assert Image.open(tmp_path / "a/strip.png").size == (6 * 260 - 4, 256)


def test_the_gradient_norm_is_that_of_the_points_between(monkeypatch, tmp_path):
    """D = |x|^2 / 2 has the gradient x: its mean norm between real points near the ring and made ones at (3, 4).

    On the segment from (1, 0) to (3, 4), (1 + 2t, 4t), the mean of the norm over t is an integral: its sum over a fine
    lattice."""
    a = args("--modes", "2", "--std", "1e-9")
    made = torch.tensor([3.0, 4.0])
    norm = toy2d.gradient_norm(a, lambda z: made.expand(1, len(z[0]), 2), lambda x: x.square().sum(-1) / 2, n=40_000)
    t = np.linspace(0, 1, 10_001)
    to_made = [np.hypot(end + (3 - end) * t, 4 * t).mean() for end in (1, -1)]  # the two modes are (1, 0) and (-1, 0)
    assert norm == pytest.approx(np.mean(to_made), rel=0.01)
    toy2d.main(["--steps", "2", "--run-dir", str(tmp_path / "a")])
    rows = list(csv.DictReader((tmp_path / "a/log.csv").open()))
    assert all(float(row["grad_norm"]) > 0 for row in rows)


def test_an_unrolled_g_takes_all_of_ds_loss():
    real, fake = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 0.25]])

    def softplus(v):
        return math.log1p(math.exp(v))

    d_loss = (softplus(-0.5) + softplus(1.0)) / 2 + (softplus(2.0) + softplus(0.25)) / 2
    assert toy2d.generator_loss("unrolled", "minimax", fake, real).item() == pytest.approx(-d_loss, rel=1e-6)
    of_fakes = (softplus(2.0) + softplus(0.25)) / 2
    assert toy2d.generator_loss("gan", "minimax", fake).item() == pytest.approx(-of_fakes, rel=1e-6)
    not_saturating = (softplus(-2.0) + softplus(-0.25)) / 2
    assert toy2d.generator_loss("unrolled", "ns", fake, real).item() == pytest.approx(not_saturating, rel=1e-6)


def test_clipped_weights_lie_within_c():
    D = toy2d.Discriminator(args("--method", "wgan_clip"), 1.0)
    before = [p.clone() for p in D.parameters()]
    toy2d.clip_weights(D, 0.05)
    for p, old in zip(D.parameters(), before):
        assert np.array_equal(p.detach().numpy(), np.clip(old.detach().numpy(), -0.05, 0.05))
    assert max(old.abs().max() for old in before) > 0.1


# G, its noise, D's slope and the rates --------------------------------------------------------------------------------


def test_g_is_bounded_by_a_tanh_or_not_at_all():
    """With rates of 0 both runs end with the same network y(z): G is 1.5 * 4 tanh y, or y in units of the grid."""
    flags = ["--data", "grid", "--lr-g", "0", "--lr-d", "0", "--steps", "1"]
    (bounded, _), (linear, _) = (toy2d.train(args(*flags, *more)) for more in ([], ["--bound", "0"]))
    z = torch.randn(1, 50, 2) * 3
    y = linear(z) / 8**0.5  # of {-4, -2, 0, 2, 4} the root mean square is the root of 8
    torch.testing.assert_close(bounded(z), 6 * torch.tanh(y))
    assert linear(100 * z).abs().max() > 6 >= bounded(100 * z).abs().max()


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_layers_and_slope(float64, slope):
    net, x = toy2d.MLP(1, 2, 5, 1, 3, slope), torch.randn(1, 40, 2)
    theirs = []
    for w, b in zip(net.weights, net.biases):
        theirs += [torch.nn.Linear(*w.shape[1:]), torch.nn.LeakyReLU(slope)]
        theirs[-2].weight.data, theirs[-2].bias.data = w.data[0].T, b.data[0, 0]
    assert len(theirs) == 8
    torch.testing.assert_close(net(x)[0], torch.nn.Sequential(*theirs[:-1])(x[0]))
    a = args("--layers", "3", "--slope", str(slope))
    assert toy2d.Discriminator(a, 1.0).net.slope == slope and len(toy2d.Discriminator(a, 1.0).net.weights) == 4


def test_noise():
    torch.manual_seed(0)
    for prior, variance, most in (("normal", 1, 5.5), ("uniform", 1 / 3, 1)):
        z = toy2d.noise(args("--prior", prior, "--latent-dim", "3"), 2, 50_000)
        assert z.shape == (2, 50_000, 3) and z.abs().max() <= most
        assert z.var().item() == pytest.approx(variance, rel=0.02) and z.mean().abs() < 0.01


@pytest.mark.parametrize("decay, wanted", [("linear", [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]), ("none", [1] * 10)])
def test_rates_are_kept_for_half_the_steps_and_then_fall_to_nothing(decay, wanted):
    seen = []
    hook = register_optimizer_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
    try:
        toy2d.train(args("--lr-g", "0.5", "--lr-d", "0.25", "--steps", "10", "--batch-size", "2", "--lr-decay", decay))
    finally:
        hook.remove()
    assert seen[::2] == pytest.approx([0.25 * w for w in wanted]) and seen[1::2] == pytest.approx(
        [0.5 * w for w in wanted]
    )


def test_what_is_given_wins_over_what_was_tuned():
    assert args("--method", "gan").lr_d == 1e-3 and args("--method", "wgan_gp").lr_d == 4e-3
    assert args("--method", "wgan_gp", "--lr-d", "1e-3").lr_d == 1e-3
    a = args("--protocol", "metz", "--method", "unrolled")
    assert (a.radius, a.std, a.lr_d, a.lr_g, a.loss) == (2, 0.02, 1e-4, 1e-3, "minimax")
    assert (a.bound, a.slope, a.layers, a.ema, a.steps) == (0, 0, 2, 0, 3000)
    a = args("--protocol", "metz", "--radius", "1", "--lr-d", "1e-3")
    assert (a.radius, a.std, a.lr_d) == (1, 0.01, 1e-3)


def test_table(tmp_path, monkeypatch, capsys):
    """A row for the real points, one a method with its mean and spread over runs, then the published ones; nothing is
    written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        toy2d,
        "run",
        lambda a, report: (
            [
                {"covered": 3 + i, "strict": 2, "high_quality": 0.25, "near": 0.5, "reverse_kl": 0.125}
                for i in range(a.seeds)
            ],
        ),
    )
    toy2d.main(["--table", "--seeds", "3", "--steps", "500", "--quick"])
    ring, grid = capsys.readouterr().out.split("\ngrid: ")
    for part in (ring, grid):
        rows = [[c.strip() for c in line.strip("| ").split("|")] for line in part.splitlines() if line.startswith("| ")]
        names = [r[0] for r in rows]
        assert names[:7] == ["method", "real", *toy2d.METHODS] and all("published" in n for n in names[7:])
        assert {len(line.split("|")) for line in part.splitlines() if line.startswith("|")} == {len(rows[0]) + 2}
        for r in rows[2:7]:
            assert r[1:7] == ["125", "4.0 +- 1.0", "2.0 +- 0.0", "25.0% +- 0.0%", "50.0% +- 0.0%", "0.125 +- 0.000"]
    assert list(tmp_path.iterdir()) == []


def fails(capsys, *flags, words=()):
    with pytest.raises(SystemExit) as stop:
        toy2d.main([*flags])
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.err.count("\n") == 1 and all(w in out.err for w in words), out.err


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "grid"],
        ["--method=gan"],
        ["--protocol", "metz"],
        ["--reject", "drs"],
        ["--modes", "8"],
        ["--run-dir", "a"],
        ["--snapshot-every", "5"],
    ],
)
def test_a_table_refuses_what_it_would_not_heed(flags, capsys):
    fails(capsys, "--table", *flags, words=["--table", flags[0].split("=")[0]])


def test_a_percentile_without_drs_is_said_and_not_taken_by_a_table(capsys):
    toy2d.parse_args(["--drs-percentile", "90"])
    assert "--drs-percentile has no effect" in capsys.readouterr().err
    fails(capsys, "--table", "--drs-percentile", "90", words=["--table", "--drs-percentile"])


def test_an_empty_run_dir_is_refused(capsys):
    """As a shell gives for a variable that is not set: the default would hide the slip."""
    fails(capsys, "--run-dir", "", words=["--run-dir", "empty"])


def test_several_processes_would_train_the_same_runs(monkeypatch, capsys):
    monkeypatch.setattr(toy2d, "WORLD", 2)
    fails(capsys, words=["one process"])


def test_quick_without_a_table_is_refused(capsys):
    fails(capsys, "--quick", words=["--quick", "--table"])


def test_a_table_says_what_ran(monkeypatch, capsys):
    seen = []
    score = {"covered": 3, "strict": 2, "high_quality": 0.25, "near": 0.5, "reverse_kl": 0.125}
    monkeypatch.setattr(toy2d, "run", lambda a, report: seen.append(a) or ([score] * a.seeds,))
    toy2d.main(["--table", "--seeds", "2", "--lr-d", "1e-4", "--loss", "ns"])
    out = capsys.readouterr()
    assert out.err == ""
    rows = [line for line in out.out.splitlines() if line.startswith(("| mdgan", "| wgan_gp"))]
    assert len(rows) == 4 and all("lr-d 0.0001" in r if "gp" in r else "loss ns" in r for r in rows)
    assert [(a.data, a.method) for a in seen] == [(d, m) for d in ("ring", "grid") for m in toy2d.METHODS]
    assert {(a.lr_d, a.loss, a.seeds) for a in seen} == {(1e-4, "ns", 2)}


def test_help_prints_the_defaults_of_the_method(capsys):
    for flags, wanted in ((["--method", "wgan_gp"], "0.004"), (["--protocol", "metz"], "0.0001"), ([], "0.001")):
        with pytest.raises(SystemExit) as stop:
            toy2d.main([*flags, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code in (None, 0) and f"Adam's rate for D (default: {wanted})" in text and "None" not in text


def test_a_run_whose_d_cannot_choose_is_left_out(monkeypatch, tmp_path, capsys):
    """The scores are written all the same; the other run's points are those the rule keeps."""
    calls = []

    def platt(real, fake):
        calls.append((real, fake))
        if len(calls) == 1:
            raise ValueError("AUC .4")
        return 1.0, 0.0, 0.7

    def rejected(kind, more, n, rng, head, percentile):
        assert (kind, n, head, percentile) == ("drs", 2500, (1.0, 0.0, 0.7), 95)
        return more(n)[0], {"acceptance": 0.25, "auc": 0.7, "warning": "weak"}

    monkeypatch.setattr(toy2d, "platt", platt)
    monkeypatch.setattr(toy2d, "rejected", rejected)
    toy2d.main(
        [
            "--data",
            "grid",
            "--steps",
            "2",
            "--seeds",
            "2",
            "--reject",
            "drs",
            "--drs-percentile",
            "95",
            "--run-dir",
            str(tmp_path / "a"),
        ]
    )
    out = capsys.readouterr().out
    assert "run 0: no points are chosen: AUC .4" in out and "run 1: weak" in out and "acceptance 25.0%" in out
    scores = json.loads((tmp_path / "a/scores.json").read_text())
    assert len(scores["made"]) == 2 and len(scores["kept"]) == 1
    assert all(len(real) == len(fake) == 10_000 for real, fake in calls) and not torch.equal(*calls[1])


def test_a_score_without_points_is_null_and_the_log_is_written_as_it_goes(monkeypatch, tmp_path):
    """Before training G makes no point of high quality; Ctrl-C at the second snapshot leaves the first one's row."""
    flags = ["--steps", "4", "--snapshot-every", "1", "--lr-g", "0", "--lr-d", "0", "--radius", "50", "--bound", "0.1"]
    toy2d.main([*flags, "--run-dir", str(tmp_path / "a")])
    text = (tmp_path / "a/scores.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["made"][0]["reverse_kl"] is None
    calls, picture = [], toy2d.picture

    def stopped(*a):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return picture(*a)

    monkeypatch.setattr(toy2d, "picture", stopped)
    with pytest.raises(SystemExit) as stop:
        toy2d.main([*flags, "--run-dir", str(tmp_path / "b")])
    assert stop.value.code == 130
    assert (tmp_path / "b/log.csv").read_text() == "".join((tmp_path / "a/log.csv").read_text().splitlines(True)[:2])


def test_a_strip_shows_ten_and_the_last(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(101)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    sheet = toy2d.strip(toy2d.some(paths, 10))
    assert sheet.size == (10 * 12 - 4, 8)
    assert [sheet.getpixel((12 * k, 0))[0] for k in range(10)] == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]
    assert toy2d.strip(toy2d.some(paths[:3], 10)).size == (3 * 12 - 4, 8)


def test_a_film_of_many_snapshots_has_48_frames(tmp_path, monkeypatch):
    """Each snapshot is a file: 10,000 of them do not lie in memory."""
    count = iter(range(100))
    monkeypatch.setattr(toy2d, "picture", lambda args, G, D: Image.new("RGB", (16, 16), (2 * next(count), 0, 0)))
    toy2d.run(args("--steps", "60", "--snapshot-every", "1", "--hidden", "2"), tmp_path, report=lambda text: None)
    film = Image.open(tmp_path / "training.gif")
    film.seek(film.n_frames - 1)
    assert len(list(tmp_path.glob("step_*.png"))) == 60 and film.n_frames <= 48
    assert film.convert("RGB").getpixel((0, 0))[0] == 2 * 59


def test_the_shading_is_the_first_runs(monkeypatch):
    """D's score is the first coordinate in run 0, the second in run 1: run 0's picture is lighter to the right."""
    a = args("--seeds", "2", "--layers", "1", "--hidden", "2")
    D = toy2d.Discriminator(a, 1.0)
    for w, b in zip(D.net.weights, D.net.biases):
        w.data.zero_(), b.data.zero_()
    D.net.weights[0].data[0, 0, 0] = D.net.weights[0].data[1, 1, 0] = 1.0
    D.net.biases[0].data += 5  # no ReLU is at its end
    D.net.weights[1].data[:, 0] = 1.0
    shade = np.asarray(toy2d.picture(a, lambda z: z + 100, D, side=64).convert("L"), dtype=float)
    assert shade[:10, 60].mean() > shade[:10, 30].mean() + 20 > shade[:10, 3].mean() + 40
    assert abs(shade[5, 20] - shade[60, 20]) < 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stream_that_takes_nothing_does_not_end_a_run(tmp_path):
    with open("/dev/full", "w") as full:
        flags = [sys.executable, str(ROOT / "toy2d.py"), "--steps", "2", "--seeds", "1", "--run-dir", str(tmp_path)]
        done = subprocess.run(flags, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "scores.json").exists()


def test_flags_of_another_method_are_said(capsys):
    args("--method", "gan", "--clip", "3", "--k", "9")
    err = capsys.readouterr().err
    assert "--clip has no effect on --method gan" in err and "--k has no effect on --method gan" in err
    args("--method", "wgan_clip", "--clip", "3")
    args("--method", "unrolled", "--k", "9", "--loss", "ns")
    assert capsys.readouterr().err == ""


def test_ctrl_c_leaves_a_table_without_a_traceback(monkeypatch):
    def interrupted(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy2d, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        toy2d.main(["--table"])
    assert stop.value.code == 130


def test_a_flag_is_written_out(capsys):
    """--table is taken out of the flags by its name, which --tab would escape."""
    with pytest.raises(SystemExit) as stop:
        toy2d.main(["--tab", "--steps", "2"])
    assert stop.value.code == 2 and "unrecognized arguments: --tab" in capsys.readouterr().err
