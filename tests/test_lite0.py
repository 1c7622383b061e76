"""What tests/lite0.py scores: the pictures of a folder as they are, and samples of the labels asked for."""

import sys

import lite0
import numpy as np
import pytest
import torch
from PIL import Image

import cdcgan
import wgan_clip


def test_a_folder_is_read_in_order_as_three_channels(tmp_path):
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    colour = np.stack([grey, grey + 50, grey + 100], axis=2)
    Image.fromarray(colour).save(tmp_path / "b.png")
    Image.fromarray(grey).save(tmp_path / "a.png")
    x = lite0.samples(tmp_path, torch.zeros(2))
    assert x.dtype == torch.uint8
    assert x[0].tolist() == [grey.tolist()] * 3
    assert x[1, :, 1, 2].tolist() == [6, 56, 106]


def test_a_conditional_checkpoint_is_asked_for_the_labels(tmp_path, monkeypatch):
    """G draws its label as a grey: 2 y / 255 - 1 is byte y. A copy of the script, of another name, is asked too."""

    class G(torch.nn.Module):
        def forward(self, z, y):
            return (2 * y / 255 - 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    args = {"latent_dim": 3, "prior": "normal"}
    y = torch.arange(150) % 7
    monkeypatch.setattr(cdcgan, "load", lambda path: G())
    monkeypatch.setitem(sys.modules, "my_gan", cdcgan)
    for script in ("cdcgan", "my_gan"):
        torch.save({"script": script, "args": args}, tmp_path / "last.pt")
        x = lite0.samples(tmp_path / "last.pt", y)
        assert x.shape == (150, 3, 8, 8)
        assert x[:, 1, 2, 3].tolist() == y.tolist()


def test_wgan_clip_takes_labels_by_a_flag(tmp_path, monkeypatch):
    class G(torch.nn.Module):
        def forward(self, z, y=None):
            return torch.zeros(len(z), 1, 8, 8) if y is None else torch.ones(len(z), 1, 8, 8)

    monkeypatch.setattr(wgan_clip, "load", lambda path: G())
    for conditional in (True, False):
        args = {"latent_dim": 3, "prior": "normal", "conditional": conditional}
        torch.save({"script": "wgan_clip", "args": args}, tmp_path / "last.pt")
        x = lite0.samples(tmp_path / "last.pt", torch.zeros(5, dtype=torch.int64))
        assert x.unique().tolist() == [255 if conditional else 128]


def test_a_folder_of_more_images_is_drawn_from_at_random_and_one_of_fewer_refused(tmp_path):
    """Classes may lie together: of 60 files, in three blocks of 20, 30 are drawn from all three."""
    for i in range(60):
        Image.new("RGB", (4, 4), (i // 20, 0, 0)).save(tmp_path / f"{i:02}.{'png' if i % 2 else 'webp'}", lossless=True)
    x = lite0.samples(tmp_path, torch.zeros(30))
    assert x.shape == (30, 3, 4, 4)
    assert min(x[:, 0, 0, 0].bincount(minlength=3)) >= 5
    assert torch.equal(x, lite0.samples(tmp_path, torch.zeros(30)))
    with pytest.raises(SystemExit, match="holds 60 images, and 61 are compared"):
        lite0.samples(tmp_path, torch.zeros(61))


def test_several_have_a_mean_and_a_standard_deviation(monkeypatch, capsys):
    """FIDs of 10, 12 and 17: 13 and sqrt((9 + 1 + 16) / 2) = 3.6."""
    fids = iter([5.0, 10.0, 12.0, 17.0])
    monkeypatch.setattr(lite0.metrics, "load_data", lambda *a: (torch.zeros(8, 1, 1, 1), torch.zeros(8), []))
    monkeypatch.setattr(lite0, "network", lambda: None)
    monkeypatch.setattr(lite0, "features", lambda net, x: x)
    monkeypatch.setattr(lite0, "samples", lambda path, labels: labels)
    monkeypatch.setattr(lite0, "scores", lambda real, fake: (next(fids), 0.5, 0.25, 0.125))
    monkeypatch.setattr("sys.argv", ["lite0.py", "a", "b", "c"])
    lite0.main()
    lines = capsys.readouterr().out.splitlines()
    assert "n 4 + 4" in lines and lines[-2] == "c: FID 17.0  coverage 0.500  precision 0.250  recall 0.125"
    rest = "coverage 0.500 ± 0.000  precision 0.250 ± 0.000  recall 0.125 ± 0.000"
    assert lines[-1] == f"mean of 3: FID 13.0 ± 3.6  {rest}"


def test_the_network_is_given_128_pixels_of_its_own_range():
    """Black is -127/128 and white 1, over the whole enlarged picture; the maps are averaged."""
    seen = []

    class Net:
        def extract_features(self, x):
            seen.append(x)
            return torch.arange(4.0).view(1, 1, 2, 2).expand(len(x), 5, 2, 2)

    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 64, 64)
    f = lite0.features(Net(), x)
    assert seen[0].shape == (2, 3, 128, 128)
    assert seen[0][0].unique().tolist() == [-127 / 128]
    assert seen[0][1].unique().tolist() == [1.0]
    assert f.tolist() == [[1.5] * 5] * 2


def test_enlarged_edges_stay_within_the_range():
    """Bicubic interpolation overshoots at an edge: the values are cut, as those of a picture would be."""

    class Net:
        def extract_features(self, x):
            assert -127 / 128 <= x.min()
            assert x.max() <= 1
            return x

    x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    x[..., 32:] = 255
    assert lite0.features(Net(), x)[0, 0] == pytest.approx(1 / 256, abs=0.01)  # half of it -127/128, half 1


@pytest.mark.parametrize(
    "split, n_train, n_test, n", [("train", 20, 3, 4), ("test", 20, 3, 3), ("test", 20, 9, 4), ("train", 7, 9, 3)]
)
def test_samples_are_held_against_the_split_that_is_asked_for(split, n_train, n_test, n, monkeypatch, capsys):
    """Training images are the numbers from 0, test images those from 100. As many fakes as real images, and as many
    others for the floor, which are never among the real ones."""
    data = {"train": torch.arange(n_train).view(-1, 1, 1, 1), "test": 100 + torch.arange(n_test).view(-1, 1, 1, 1)}
    monkeypatch.setattr(lite0.metrics, "load_data", lambda dataset, folder, size, split: (data[split], data[split], []))
    monkeypatch.setattr(lite0, "N", 4)
    monkeypatch.setattr(lite0, "network", lambda: None)
    monkeypatch.setattr(lite0, "features", lambda net, x: x.flatten().tolist())
    monkeypatch.setattr(lite0, "samples", lambda path, labels: 1000 + torch.arange(len(labels)))
    lines = {}
    monkeypatch.setattr(lite0, "scores", lambda real, fake: (real, fake))
    monkeypatch.setattr(lite0, "line", lambda name, values: lines.update({name: values}))
    monkeypatch.setattr("sys.argv", ["lite0.py", "--split", split, "last.pt"])
    lite0.main()
    real, other = lines["other real images"]
    assert len(set(real)) == len(set(other)) == n
    assert set(real) <= set(data[split].flatten().tolist())
    assert set(other) <= set(range(n_train)) - set(real)
    assert ("3 + 3 images are compared" in capsys.readouterr().out) == (n_train == 7)
    assert lines["last.pt"] == (real, [1000, 1001, 1002, 1003][:n])
