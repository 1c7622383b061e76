"""The Inception of metrics.py, against pytorch-fid: its network, its function and its command, under drawn weights."""

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torch_fidelity.feature_extractor_inceptionv3 as torch_fidelity
from PIL import Image
from pytorch_fid import fid_score
from scipy import linalg
from scipy.sparse.linalg import eigsh
from torch import fx
from torch.nn import functional as F
from torchvision.models import Inception3

import metrics

FILE = metrics.INCEPTION.rsplit("/", 1)[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A TORCH_HOME whose hub/checkpoints holds He-normal weights and random batch-norm statistics. Default ones leave
    features that hardly differ between pictures, so that a wrong network would pass."""
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight.data.normal_(0, math.sqrt(2 / m.weight[0].numel()))
        elif isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.7, 1.3), m.bias.data.normal_(0, 0.2)
    torch.nn.init.normal_(net.fc.weight, 0, 0.05), torch.nn.init.normal_(net.fc.bias)
    torch.save(net.state_dict(), home / "hub/checkpoints" / FILE)
    return home / "hub/checkpoints" / FILE


@pytest.fixture(scope="module")
def ours(weights):
    return metrics.inception(weights, torch.device("cpu"))


def theirs(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: torch.load(weights))
        return pytorch_fid.inception.InceptionV3([3]).eval()


def pictures(n, size, channels=3, seed=1):
    """Smooth random blobs, so that resizing keeps them apart."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, 6, 6, generator=rng)
    return (F.interpolate(x, (size, size), mode="bicubic").clamp(0, 1) * 255).round().byte()


@pytest.fixture(scope="module")
def pair(weights):
    """Pictures of three sizes, and pytorch-fid's features of them."""
    net = theirs(weights)
    sets = [pictures(2, 32), pictures(2, 75, seed=2), pictures(1, 320, seed=3)]
    with torch.no_grad():
        return sets, [net(x.float() / 255)[0][:, :, 0, 0] for x in sets]


def test_features_agree_with_pytorch_fid(ours, pair):
    wanted = torch.cat(pair[1])
    assert wanted.shape == (5, 2048)
    assert (wanted - wanted.mean(0)).abs().mean() > 0.01 * wanted.abs().mean()  # or a wrong network would pass
    got = torch.cat([ours.embed(x)[0] for x in pair[0]])
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("which", range(9))
def test_each_pool_matters(ours, pair, which):
    """Any of the nine pools replaced, averages by padded ones, the maximum by an average, is far out of tolerance."""
    graph = copy.deepcopy(ours.body.graph)
    pools = [node for node in graph.nodes if "pool" in node.name and node.kwargs.get("stride") == 1]
    pools[which].target, pools[which].kwargs = F.avg_pool2d, {"kernel_size": 3, "stride": 1, "padding": 1}
    features, wanted = fx.GraphModule(ours.body, graph)(ours.prepare(pair[0][0][:1])), pair[1][0][:1]
    assert len(pools) == 9 and (features - wanted).abs().max() > 1e-4 * wanted.abs().max()


def test_logits_are_torch_fidelitys_without_bias(ours, weights):
    """On pictures of 299x299, which neither resizes: its input is (x - 128) / 128, ours x / 127.5 - 1."""
    net = torch_fidelity.FeatureExtractorInceptionV3("net", ["2048", "logits_unbiased"], str(weights))
    x = pictures(2, 299)
    features, logits = ours.embed(x)
    shifted = ours(((x.float() - 128) / 128).contiguous(memory_format=torch.channels_last))
    for got, wanted in zip(shifted, net(x)):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() and wanted.std(0).max() > 0
    assert logits.shape == (2, 1008) and features.shape == (2, 2048)
    bias = torch.load(weights)["fc.bias"]
    assert bias.abs().max() > 1 and (logits - features @ torch.load(weights)["fc.weight"].T).abs().max() < 1e-4


def test_grey_pictures_count_as_three_equal_channels(ours):
    x = pictures(2, 28, 1)
    for one, three in zip(ours.embed(x), ours.embed(x.repeat(1, 3, 1, 1))):
        assert (one - three).abs().max() <= 1e-5 * three.abs().max() and one.std(0).max() > 0


def test_building_it_draws_nothing_and_names_its_weights(weights, ours, tmp_path):
    state = torch.get_rng_state()
    again = metrics.inception(weights, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state) and again.name == ours.name
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    changed = torch.load(weights)
    changed["Mixed_6c.branch7x7_2.bn.bias"][3] += 1
    torch.save(changed, tmp_path / "w.pth")
    other = metrics.inception(tmp_path / "w.pth", torch.device("cpu"))
    assert other.name != ours.name and other.name.startswith("inception-2015/2048 ")


# the command ----------------------------------------------------------------------------------------------------------


def save(folder, x):
    folder.mkdir()
    for i, p in enumerate(x):
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def few_will_do(monkeypatch):
    """Two pictures a second here: scores of fewer than 50, which the command refuses (see test_cli)."""
    monkeypatch.setattr(metrics, "FEWEST", 2)


def run(capsys, *argv):
    capsys.readouterr()
    metrics.main([str(a) for a in argv])
    return capsys.readouterr()


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1: two minutes, most of them scipy's sqrtm")
def test_the_command_agrees_with_pytorch_fids(weights, tmp_path, monkeypatch, capsys):
    """`python -m pytorch_fid` with the same file in the same cache, on two folders of 100 pictures."""
    a, b = save(tmp_path / "a", pictures(100, 32)), save(tmp_path / "b", pictures(100, 32, seed=9).flip(2) // 2 + 60)
    home = {"TORCH_HOME": str(weights.parents[2]), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytorch_fid", str(a), str(b), "--device", "cpu", "--num-workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    wanted = float(done.stdout.split("FID:")[1])
    monkeypatch.setenv("TORCH_HOME", home["TORCH_HOME"])
    flags = ["--real", a, "--features", "inception", "--data-dir", tmp_path / "data", "--scores", "fid", "--json"]
    got = run(capsys, *flags, "--fake", b)
    s = json.loads(got.out)
    assert s["fid"] == pytest.approx(wanted, rel=1e-2) and wanted > 1
    assert s["n_real"] == s["n_fake"] == 100 and s["jpeg_fake"] == 0 and "too large" in got.err


def test_the_command_agrees_with_pytorch_fids_statistics(weights, tmp_path, monkeypatch, capsys, few_will_do):
    """pytorch_fid's own reading, resizing, network and statistics of the two folders; the root's trace from its few
    eigenvalues that are not 0, since scipy's takes a minute and is off by 1e-2 where the covariances are singular."""
    a, b = save(tmp_path / "a", pictures(5, 32)), save(tmp_path / "b", pictures(5, 32, seed=9).flip(2) // 2 + 60)
    net = theirs(weights)
    (m1, c1), (m2, c2) = (fid_score.compute_statistics_of_path(str(f), net, 5, 2048, "cpu", 0) for f in (a, b))
    values, vectors = eigsh(c2, k=4)
    root = vectors * np.sqrt(values)
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * np.sqrt(linalg.eigvalsh(root.T @ c1 @ root)).sum()
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    flags = ["--real", a, "--features", "inception", "--data-dir", tmp_path / "data", "--scores", "fid", "--json"]
    got = run(capsys, *flags, "--fake", b)
    s = json.loads(got.out)
    assert s["fid"] == pytest.approx(wanted, rel=1e-5) and wanted > 1
    assert s["n_real"] == s["n_fake"] == 5 and s["jpeg_fake"] == 0 and "too large" in got.err
    assert s["labelled"] is True and s["accuracy"] is None


def test_statistics_of_real_pictures_are_read_not_made_the_second_time(
    ours, tmp_path, monkeypatch, capsys, few_will_do
):
    """Other pictures are made anew. Features are mean colours here: no network runs."""
    a, b = save(tmp_path / "a", pictures(6, 32)), save(tmp_path / "b", pictures(6, 32, seed=9))
    seen = []

    def embed(self, x):
        seen.append(len(x))
        features = x.float().mean((2, 3))
        return features, features

    monkeypatch.setattr(metrics.Inception, "embed", embed)
    monkeypatch.setattr(metrics, "inception", lambda weights, device: ours)
    flags = ["--real", a, "--fake", b, "--features", "inception", "--data-dir", tmp_path / "data"]
    flags += ["--scores", "fid", "--json"]

    def fid(*more):
        seen.clear()
        return json.loads(run(capsys, *flags, *more).out)["fid"]

    first = fid("--n", 3)
    everything = sum(seen)
    assert everything > 3
    assert fid("--n", 3) == first and sum(seen) == 3  # the fakes
    assert fid() != first and sum(seen) > 6
    looked_at = metrics.some(sorted(a.iterdir()), 3)[1]
    looked_at.write_bytes((b / looked_at.name).read_bytes())
    changed = fid("--n", 3)
    assert changed != first and sum(seen) > 3
    kept = set((tmp_path / "data").iterdir())
    assert kept and fid("--n", 3, "--no-cache") == changed
    assert sum(seen) == everything and set((tmp_path / "data").iterdir()) == kept


def test_all_scores_of_inception(weights, tmp_path, capsys, few_will_do):
    a, b = save(tmp_path / "a", pictures(4, 32)), save(tmp_path / "b", pictures(4, 32, seed=5))
    flags = ["--features", "inception", "--weights", weights, "--data-dir", tmp_path / "data", "--json", "--real", a]
    s = json.loads(run(capsys, *flags, "--fake", b).out)
    same = json.loads(run(capsys, *flags, "--fake", a).out)
    assert {"fid", "kid", "inception_score", "mode_score", "precision", "recall", "density", "coverage"} <= set(s)
    assert same["fid"] < 1e-3 < s["fid"] and same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] == 1 and "accuracy" in s and 1 <= s["inception_score"] <= 4


@pytest.mark.parametrize("how", ["absent", "cut", "other", "not a dict", "no network", "cached cut"])
def test_weights_that_cannot_be_had_are_one_line(weights, tmp_path, monkeypatch, capsys, few_will_do, how):
    folder = save(tmp_path / "a", pictures(2, 8))
    path = tmp_path / "w.pth"
    if how == "cut":
        path.write_bytes(weights.read_bytes()[:100_000])
    elif how == "other":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    elif how == "not a dict":
        torch.save([1, 2], path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    named = ["--weights", path]
    if how in ("no network", "cached cut"):
        named = []
        monkeypatch.setattr(torch.hub, "urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no route to host")))
        if how == "cached cut":
            path = tmp_path / "home/hub/checkpoints" / FILE
            path.parent.mkdir(parents=True)
            path.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(SystemExit) as stop:
        run(capsys, "--real", folder, "--fake", folder, "--features", "inception", *named)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    if how == "no network":
        assert FILE in err and str(tmp_path / "home/hub/checkpoints") in err and "--weights" in err
    else:
        assert str(path) in err and ("no such file" in err) == (how == "absent") and "http" not in err
    with pytest.raises(ValueError, match="no Inception weights" if how == "no network" else path.name):
        metrics.inception(*named[1:] or [None], "cpu")  # as a library


def test_inception_refuses_what_is_no_picture(ours):
    for x in (pictures(2, 32).float(), pictures(2, 32)[0], pictures(2, 32, 2), pictures(2, 32)[..., :0]):
        with pytest.raises(ValueError, match="images are uint8"):
            ours.embed(x)


# statistics that stream -----------------------------------------------------------------------------------------------


def fed(x, sizes):
    moments, at = metrics.Moments(), 0
    for size in sizes:
        moments.add(x[at : at + size])
        at += size
    assert at == len(x) == moments.n
    return moments


@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("sizes", [[100], [7] * 14 + [2], [1] * 100, [20, 80], [19, 1, 80]])
def test_moments_in_batches_are_numpys(sizes, offset):
    x = torch.randn(100, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64) + offset
    mean, cov = fed(x, sizes).mean_and_covariance()
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-8)


def test_moments_keep_no_more_rows_than_dimensions():
    moments = fed(torch.randn(19, 20), [10, 9])
    assert sum(len(r) for r in moments.rows) == 19
    moments.add(torch.randn(1, 20))
    assert moments.rows == [] and moments.products.shape == (20, 20)
    few = fed(torch.randn(5, 20), [5]).mean_and_covariance()[1]
    assert few.shape == (20, 20)


@pytest.mark.parametrize("n, m", [(2000, 2000), (2000, 10), (10, 12), (63, 64)])
def test_fid_of_moments_agrees_with_pytorch_fid(n, m):
    torch.manual_seed(0)
    mix = torch.randn(64, 64)
    x, y = torch.randn(n, 64) @ mix, torch.randn(m, 64) @ mix * 1.1 + 0.3
    got = fed(x, [n // 2, n - n // 2]).fid(fed(y, [m]))
    if min(n, m) > 64:
        statistics = [(t.mean(0), np.cov(t, rowvar=False)) for t in (x.double().numpy(), y.double().numpy())]
        assert got == pytest.approx(fid_score.calculate_frechet_distance(*statistics[0], *statistics[1]), rel=1e-6)
    assert got == pytest.approx(metrics.fid(x, y), rel=1e-6)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            fed(torch.tensor([[1.0, bad]]), [1])
    with pytest.raises(ValueError, match=r"1 rows, where 2 or more|two pictures or more"):
        fed(x[:1], [1]).fid(fed(y, [m]))


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    net = metrics.Classifier(1, 10)
    net.name, net.batch = "net", 1000
    x = metrics.Images(pictures(40, 28, 1), 1, "x")
    first = metrics.cached(net, x, True, tmp_path, "x")
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    again = metrics.cached(net, x, True, tmp_path, "x")
    assert torch.equal(first.features, again.features) and again.moments.fid(first.moments) < 1e-6 and again.n == 40
    path.write_bytes(whole[:1000])
    assert torch.equal(metrics.cached(net, x, True, tmp_path, "x").features, first.features)
    assert len(path.read_bytes()) == len(whole)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))  # in the place of what cannot be a folder
    assert metrics.cached(net, x, False, tmp_path / "file", "x").features is None
    assert len(list((tmp_path / "user").rglob("statistics-*.pt"))) == 1


def test_progress_is_a_line_only_after_ten_seconds_or_on_a_terminal(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])

    def slow(seconds):
        for _ in range(4):
            clock[0] += seconds
            yield [0] * 5

    assert [len(b) for b in metrics.progress(slow(2), 20, "x")] == [5] * 4 and capsys.readouterr().err == ""
    list(metrics.progress(slow(6), 20, "fakes"))
    assert capsys.readouterr().err == "fakes: 10 of 20, 12 s to go\nfakes: 20 of 20, 0 s to go\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(metrics.progress(slow(1), 20, "fakes"))
    err = capsys.readouterr().err
    assert err.count("\r") == 5 and "\n" not in err and err.endswith("\r\033[K")
