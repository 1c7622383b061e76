"""The networks that reports A to E print, layer for layer: kinds, kernels, strides, padding, biases, counts, shapes."""
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import cdcgan
import dcgan
import wgan_clip

BOTH = pytest.mark.parametrize("module", [dcgan, wgan_clip], ids=lambda m: m.__name__)


def pair(module, *argv, channels=1, classes=10, dim=None):
    """G and D as the script makes them from its flags."""
    torch.manual_seed(0)
    args = module.parse_args([str(a) for a in argv])
    args.classes, args.label_embedding_dim = classes, dim or classes  # train() knows them from the data
    return module.make_generator(args, channels), module.make_discriminator(args, channels)


def layers(net):
    """What each layer is, in order; reshapes, one-hot rows and the like (no weights) aside."""
    out = []
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            assert m.dilation == (1, 1) and m.groups == 1 and m.padding_mode == "zeros"
            assert not isinstance(m, nn.ConvTranspose2d) or m.output_padding == (0, 0)
            assert all(len(set(pair)) == 1 for pair in (m.kernel_size, m.stride, m.padding))
            out.append((type(m).__name__, m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0],
                        "bias" if m.bias is not None else "no bias"))
        elif isinstance(m, nn.Linear):
            out.append(("Linear", m.in_features, m.out_features, "bias" if m.bias is not None else "no bias"))
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert (m.eps, m.momentum, m.affine, m.track_running_stats) == (1e-5, 0.1, True, True)
            out.append((type(m).__name__, m.num_features))
        elif isinstance(m, nn.LeakyReLU):
            out.append(("LeakyReLU", m.negative_slope))
        elif isinstance(m, nn.Upsample):
            assert m.size is None and m.align_corners is not True
            out.append(("Upsample", m.scale_factor, m.mode))
        elif isinstance(m, (nn.ReLU, nn.Tanh, nn.GroupNorm, nn.LayerNorm, nn.Dropout)):
            out.append(type(m).__name__)
        else:
            assert type(m).__module__.split(".")[0] != "torch" or isinstance(
                m, (nn.Sequential, nn.Flatten, nn.Unflatten, nn.Identity)), m
    return out


def up(a, b, stride=2, pad=1, bias="no bias"):
    return "ConvTranspose2d", a, b, 4, stride, pad, bias


def down(a, b, stride=2, pad=1, bias="no bias"):
    return "Conv2d", a, b, 4, stride, pad, bias


def bn(width):
    return "BatchNorm2d", width


def size(net):
    return sum(p.numel() for p in net.parameters())


LEAKY = ("LeakyReLU", 0.2)


# report A -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("how", ["deconv", "nearest", "bilinear"])
def test_report_a_sections_a_to_c(module, how):
    """At 64x64, 16 wide: (a) ConvTranspose2d(in, out, 4, 2, 1); (b), (c) Upsample, Conv2d(in, out, 5, padding=2)."""
    G, D = pair(module, "--image-size", 64, "--ngf", 16, "--ndf", 16, "--upsample", how, channels=3)

    def twice(a, b):
        return [up(a, b)] if how == "deconv" else [("Upsample", 2, how), ("Conv2d", a, b, 5, 1, 2, "no bias")]

    assert layers(G) == [up(100, 128, 1, 0), bn(128), "ReLU", *twice(128, 64), bn(64), "ReLU", *twice(64, 32), bn(32),
                         "ReLU", *twice(32, 16), bn(16), "ReLU", *twice(16, 3), "Tanh"]
    kernel = 16 if how == "deconv" else 25  # numbers in it
    assert size(G) == (16 * 100 * 128 + kernel * (128 * 64 + 64 * 32 + 32 * 16 + 16 * 3)
                       + 2 * (128 + 64 + 32 + 16))
    assert size(G) == {16: 378_080, 25: 475_280}[kernel]
    assert layers(D) == [down(3, 16, bias="bias"), LEAKY, down(16, 32), bn(32), LEAKY, down(32, 64), bn(64), LEAKY,
                         down(64, 128), bn(128), LEAKY, down(128, 1, 1, 0)]
    assert G(torch.randn(2, 100)).shape == (2, 3, 64, 64) and D(torch.randn(2, 3, 64, 64)).shape == (2,)


@pytest.mark.parametrize("flag", ["--gp", "--r1"])
def test_report_a_penalised_logit_has_no_batch_norm(flag):
    D = pair(dcgan, "--image-size", 64, "--ndf", 16, flag, 0.5, channels=3)[1]
    assert layers(D) == [down(3, 16, bias="bias"), LEAKY, down(16, 32, bias="bias"), LEAKY, down(32, 64, bias="bias"),
                         LEAKY, down(64, 128, bias="bias"), LEAKY, down(128, 1, 1, 0)]


@pytest.mark.parametrize("how, mode", [("nearest", "nearest"), ("bilinear", "bilinear")])
def test_upsampling_is_the_named_resize(how, mode):
    G = pair(dcgan, "--ngf", 4, "--upsample", how)[0]
    x = torch.randn(2, 5, 3, 3)
    for m in (m for m in G.modules() if isinstance(m, nn.Upsample)):
        wanted = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if how == "nearest" else F.interpolate(
            x, (6, 6), mode="bilinear", align_corners=False)
        torch.testing.assert_close(m(x), wanted)


# report B -------------------------------------------------------------------------------------------------------------


@BOTH
def test_report_b_tables_1_and_2(module):
    """12, 128 and 28 of table 1 read 512, 256/128 and 128/3; no batch norm on the logit; no sigmoid."""
    G, D = pair(module, "--image-size", 64, "--ngf", 128, "--ndf", 128, channels=3)
    assert layers(G) == [up(100, 1024, 1, 0), bn(1024), "ReLU", up(1024, 512), bn(512), "ReLU", up(512, 256), bn(256),
                         "ReLU", up(256, 128), bn(128), "ReLU", up(128, 3), "Tanh"]
    assert layers(D) == [down(3, 128, bias="bias"), LEAKY, down(128, 256), bn(256), LEAKY, down(256, 512), bn(512),
                         LEAKY, down(512, 1024), bn(1024), LEAKY, down(1024, 1, 1, 0)]
    assert size(G) == 16 * (100 * 1024 + 1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + 2 * (1024 + 512 + 256 + 128)
    assert size(G) == 12_658_432
    assert size(D) == 16 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 1024 + 1024) + 128 + 2 * (256 + 512 + 1024)
    assert size(D) == 11_036_288
    assert G(torch.randn(2, 100)).shape == (2, 3, 64, 64) and D(torch.randn(2, 3, 64, 64)).shape == (2,)


# report C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_report_c_section_1_2(channels):
    G, D = pair(dcgan, "--image-size", 32, "--norm-first", "--ngf", 32, "--ndf", 32, channels=channels)
    assert layers(G) == [up(100, 128, 1, 0), bn(128), "ReLU", up(128, 64), bn(64), "ReLU", up(64, 32), bn(32), "ReLU",
                         up(32, channels), "Tanh"]
    assert layers(D) == [down(channels, 32), bn(32), LEAKY, down(32, 64), bn(64), LEAKY, down(64, 128), bn(128), LEAKY,
                         down(128, 1, 1, 0)]
    assert size(G) == 16 * (100 * 128 + 128 * 64 + 64 * 32 + 32 * channels) + 2 * (128 + 64 + 32)
    assert size(D) == 16 * (channels * 32 + 32 * 64 + 64 * 128 + 128) + 2 * (32 + 64 + 128)
    assert (size(G), size(D)) == {1: (369_600, 166_848), 3: (370_624, 167_872)}[channels]
    assert G(torch.randn(2, 100)).shape == (2, channels, 32, 32)
    assert D(torch.randn(2, channels, 32, 32)).shape == (2,)


def test_report_c_figure_5():
    """Section 2.2. G: z and label branches of 256 each; D: picture and label branches of 64 each."""
    G, D = pair(cdcgan)
    assert layers(G) == [up(100, 256, 1, 0), bn(256), "ReLU", up(10, 256, 1, 0), bn(256), "ReLU",
                         up(512, 256), bn(256), "ReLU", up(256, 128), bn(128), "ReLU", up(128, 1, bias="bias"), "Tanh"]
    assert layers(D) == [down(1, 64, bias="bias"), LEAKY, down(10, 64, bias="bias"), LEAKY,
                         down(128, 256), bn(256), LEAKY, down(256, 512), bn(512), LEAKY,
                         down(512, 1, 1, 0, bias="bias")]
    assert size(G) == (16 * (100 * 256 + 10 * 256 + 512 * 256 + 256 * 128 + 128) + 1
                       + 2 * (256 + 256 + 256 + 128))  # 3,075,841
    assert size(D) == (16 * (64 + 10 * 64 + 128 * 256 + 256 * 512 + 512) + (64 + 64 + 1) + 2 * (256 + 512))  # 2,642,561
    assert (size(G), size(D)) == (3_075_841, 2_642_561)
    y = torch.tensor([3, 0])
    assert G(torch.randn(2, 100), y).shape == (2, 1, 32, 32) and D(torch.randn(2, 1, 32, 32), y).shape == (2,)


def test_report_c_branches_join_picture_first_with_one_hot_labels():
    """Read off the inputs of three layers: z's maps, then the label's; one-hot rows, in D spread over planes."""
    G, D = pair(cdcgan, "--ngf", 8, "--ndf", 8)
    y, hot = torch.tensor([3, 0, 7, 3]), F.one_hot(torch.tensor([3, 0, 7, 3]), 10).float()
    for net, x, planes in ((G, torch.randn(4, 100), hot[:, :, None, None]),
                           (D, torch.randn(4, 1, 32, 32), hot[:, :, None, None].expand(-1, -1, 32, 32))):
        first, second, joined = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))][:3]
        seen = {}
        for name, m in (("x", first), ("y", second), ("both", joined)):
            m.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0]}))
            m.register_forward_hook(lambda m, a, out, name=name: seen.update({f"{name} out": out}))
        net(x, y)
        assert torch.equal(seen["x"].flatten(), x.flatten()) and torch.equal(seen["y"], planes)
        branches = torch.cat([seen["x out"], seen["y out"]], 1)
        wanted = F.relu(F.batch_norm(branches, None, None, torch.cat([m.weight for m in net.modules() if isinstance(
            m, nn.BatchNorm2d)][:2]), None, True)) if net is G else F.leaky_relu(branches, 0.2)
        torch.testing.assert_close(seen["both"], wanted)


def test_report_c_question_7_leaves_the_label_branch_out():
    D = pair(cdcgan, "--d-ignores-label")[1]
    assert layers(D) == [down(1, 64, bias="bias"), LEAKY, down(64, 256), bn(256), LEAKY, down(256, 512), bn(512), LEAKY,
                         down(512, 1, 1, 0, bias="bias")]
    assert layers(pair(cdcgan, "--d-ignores-label")[0]) == layers(pair(cdcgan)[0])


# report D -------------------------------------------------------------------------------------------------------------


def test_report_d_three_numbers_for_a_class_beside_97_of_noise():
    G, D = pair(wgan_clip, "--conditional", "--latent-dim", 97, "--image-size", 64, channels=3, classes=3)
    assert layers(G)[0] == up(100, 256, 1, 0) and layers(D)[0] == down(3 + 3, 32, bias="bias")
    table = [p for p in G.parameters() if p.shape == (3, 3)]
    assert len(table) == 1
    z, y, seen = torch.randn(4, 97), torch.tensor([2, 0, 2, 1]), []
    next(m for m in G.modules() if isinstance(m, nn.ConvTranspose2d)).register_forward_pre_hook(
        lambda m, x: seen.append(x[0]))
    G(z, y)
    assert torch.equal(seen[0].flatten(1), torch.cat([z, F.embedding(y, table[0])], 1))


def test_report_d_critic_sees_the_label_as_planes():
    D = pair(wgan_clip, "--conditional", "--ndf", 4, channels=3, classes=3)[1]
    x, y, seen = torch.randn(2, 3, 32, 32), torch.tensor([2, 0]), []
    next(m for m in D.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    D(x, y)
    planes = F.one_hot(y, 3).float()[:, :, None, None].expand(-1, -1, 32, 32)
    assert torch.equal(seen[0], torch.cat([x, planes], 1))


@pytest.mark.parametrize("dim", [3, 50])
@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_a_wider_embedding_widens_g_alone(dim, arch):
    flags = ["--conditional", "--arch", arch, "--latent-dim", 100 - dim, "--ngf", 4, "--ndf", 4]
    G, D = pair(wgan_clip, *flags, classes=3, dim=dim)
    plain_g, plain_d = pair(wgan_clip, *flags[1:], classes=3)
    first = 256 if arch == "mlp" else 16 * 16  # numbers made from each number of the input
    assert size(G) - size(plain_g) == 3 * dim + first * dim
    assert size(D) - size(plain_d) == 3 * (28 * 28 * 1024 if arch == "mlp" else 16 * 4)


# report E -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [dcgan, wgan_clip, cdcgan], ids=lambda m: m.__name__)
def test_report_e_fully_connected_pair(module):
    G, D = pair(module, "--arch", "mlp")
    labels = 10 if module is cdcgan else 0
    assert layers(G) == [("Linear", 100 + labels, 256, "no bias"), ("BatchNorm1d", 256), LEAKY,
                         ("Linear", 256, 512, "no bias"), ("BatchNorm1d", 512), LEAKY,
                         ("Linear", 512, 1024, "no bias"), ("BatchNorm1d", 1024), LEAKY,
                         ("Linear", 1024, 784, "bias"), "Tanh"]
    assert layers(D) == [("Linear", 784 + labels, 1024, "bias"), LEAKY, ("Linear", 1024, 512, "bias"), LEAKY,
                         ("Linear", 512, 256, "bias"), LEAKY, ("Linear", 256, 1, "bias")]
    assert size(G) == (100 + labels) * 256 + 256 * 512 + 512 * 1024 + 1025 * 784 + 2 * (256 + 512 + 1024)
    assert size(D) == (785 + labels) * 1024 + 1025 * 512 + 513 * 256 + 257
    y = [torch.tensor([3, 0])] if labels else []
    assert G(torch.randn(2, 100), *y).shape == (2, 1, 28, 28) and D(torch.randn(2, 1, 28, 28), *y).shape == (2,)


# where norms and biases go --------------------------------------------------------------------------------------------


def norms(net):
    return [type(m).__name__ for m in net.modules() if "Norm" in type(m).__name__]


@BOTH
@pytest.mark.parametrize("side, blocks", [(28, 2), (32, 3), (64, 4)])
def test_batch_norm_in_every_block_but_ds_first_and_the_outputs(module, side, blocks):
    flags = ["--image-size", side, "--ngf", 4, "--ndf", 4]
    G, D = pair(module, *flags)
    assert norms(G) == ["BatchNorm2d"] * blocks and norms(D) == ["BatchNorm2d"] * (blocks - 1)
    kinds = [k if isinstance(k, str) else k[0] for k in layers(D)]
    assert kinds[1] == "LeakyReLU" and kinds[-1] == "Conv2d" and layers(G)[-1] == "Tanh"
    assert [k if isinstance(k, str) else k[0] for k in layers(G)][-2] == "ConvTranspose2d"
    none = pair(module, *flags, "--d-norm", "none")[1]
    assert norms(none) == [] and norms(pair(module, *flags, "--d-norm", "none")[0]) == norms(G)
    assert all(m.bias is not None for m in [m for m in none.modules() if isinstance(m, nn.Conv2d)][:-1])


@BOTH
def test_batch_norm_in_a_fully_connected_critic_is_on_request(module):
    assert norms(pair(module, "--arch", "mlp")[1]) == []
    D = pair(module, "--arch", "mlp", "--d-norm", "batch")[1]
    assert layers(D) == [("Linear", 784, 1024, "bias"), LEAKY,
                         ("Linear", 1024, 512, "no bias"), ("BatchNorm1d", 512), LEAKY,
                         ("Linear", 512, 256, "no bias"), ("BatchNorm1d", 256), LEAKY, ("Linear", 256, 1, "bias")]


def test_norm_first_adds_one_norm_and_yields_to_d_norm_none():
    for arch, kind in (("dcgan", "BatchNorm2d"), ("mlp", "BatchNorm1d")):
        flags = ["--arch", arch, "--d-norm", "batch"]
        plain, first = (pair(dcgan, *flags, *more)[1] for more in ([], ["--norm-first"]))
        kinds = [k[0] for k in layers(first)]
        assert kinds[:3] == ["Conv2d" if arch == "dcgan" else "Linear", kind, "LeakyReLU"]
        assert layers(first)[0][-1] == "no bias" and len(norms(first)) == len(norms(plain)) + 1
    assert norms(pair(dcgan, "--norm-first", "--d-norm", "none")[1]) == []


@pytest.mark.parametrize("ngf, channels", [(4, 1), (3, 3), (1, 1)])
def test_without_g_norm_every_hidden_layer_has_a_bias(ngf, channels):
    """Also where the width of a map happens to be that of the picture."""
    G = pair(wgan_clip, "--g-norm", "none", "--ngf", ngf, "--image-size", 64, channels=channels)[0]
    assert norms(G) == []
    assert [m.bias is not None for m in G.modules() if isinstance(m, nn.ConvTranspose2d)][:-1] == [True] * 4
    G = pair(wgan_clip, "--g-norm", "none", "--arch", "mlp")[0]
    assert norms(G) == [] and all(m.bias is not None for m in G.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
def test_layer_norm_in_g_is_over_all_numbers_of_one_picture(arch):
    G = pair(wgan_clip, "--g-norm", "layer", "--arch", arch, "--ngf", 4)[0]
    plain = pair(wgan_clip, "--arch", arch, "--ngf", 4)[0]
    found = [m for m in G.modules() if "Norm" in type(m).__name__]
    assert len(found) == 3 and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in found)
    assert not list(G.buffers()) and size(G) == size(plain)
    for m, width in zip(found, (16, 8, 4) if arch == "dcgan" else (256, 512, 1024)):
        x = torch.randn(3, width, 5, 5) if arch == "dcgan" else torch.randn(3, width)
        m.weight.data.uniform_(), m.bias.data.uniform_()
        scale = [p[:, None, None] if arch == "dcgan" else p for p in (m.weight, m.bias)]
        torch.testing.assert_close(m(x), F.layer_norm(x, x.shape[1:], eps=1e-5) * scale[0] + scale[1])
    z = torch.randn(4, 100)
    other = torch.cat([z[:3], 9 * torch.randn(1, 100)])
    torch.testing.assert_close(G(z)[:3], G(other)[:3])  # in train mode: one picture does not see another
    assert (plain(z)[:3] - plain(other)[:3]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
@pytest.mark.parametrize("conditional", [[], ["--conditional"]])
def test_dropout_after_every_hidden_activation_of_the_critic(arch, conditional):
    flags = ["--arch", arch, "--ndf", 4, "--ngf", 4, *conditional]
    G, D = pair(wgan_clip, *flags, "--d-dropout", 0.3)
    assert not any("Dropout" in type(m).__name__ for m in G.modules())
    assert not any("Dropout" in type(m).__name__ for m in pair(wgan_clip, *flags)[1].modules())
    order = [m for m in D if isinstance(m, (nn.LeakyReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d))]
    assert len(order) == 6 and all(isinstance(m, nn.LeakyReLU) for m in order[::2])
    assert all(not isinstance(m, nn.LeakyReLU) and m.p == 0.3 for m in order[1::2])
    seen = []
    order[1].register_forward_hook(lambda m, x, out: seen.append((x[0], out)))
    side = 32 if arch == "dcgan" else 28
    D(torch.randn(64, 1, side, side), *([torch.zeros(64).long()] if conditional else []))
    x, out = seen[0]
    assert abs((out == 0).double().mean() - 0.3) < 0.02
    torch.testing.assert_close(out[out != 0], x[out != 0] / 0.7)


def test_dropout_masks_of_two_ranks_are_every_other_row_of_one(monkeypatch):
    """From one seed, as ranks have it; together they are the mask that one process draws for the whole batch."""
    def mask(rank, world, n):
        monkeypatch.setattr(wgan_clip, "RANK", rank), monkeypatch.setattr(wgan_clip, "WORLD", world)
        torch.manual_seed(7)
        return wgan_clip.Dropout(0.3)(torch.ones(n, 40, 5))

    whole, halves = mask(0, 1, 32), [mask(r, 2, 16) for r in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole) and not torch.equal(*halves)
    assert (halves[0] != halves[1]).double().mean().item() == pytest.approx(2 * 0.3 * 0.7, abs=0.04)
    assert set(whole.flatten().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - 0.3))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_its_share_its_mean_and_its_dtype(dtype):
    """.002 would be .004 by numbers that are drawn in bfloat16."""
    x = torch.ones(1000, 1000, dtype=dtype, requires_grad=True)
    layer = wgan_clip.Dropout(0.002)
    out = layer(x)
    assert out.dtype == dtype and abs((out == 0).double().mean() - 0.002) < 4 * (0.002 / 1e6) ** 0.5
    assert out.double().mean().item() == pytest.approx(1, abs=3e-3 if dtype == torch.bfloat16 else 2e-4)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0] == 0, out == 0)
    assert layer.eval()(x) is x


# shapes, ranges, initialisation ---------------------------------------------------------------------------------------

EVERY = [(dcgan, ["--image-size", s]) for s in (28, 32, 64)] + [
    (dcgan, ["--arch", "mlp"]), (dcgan, ["--arch", "mlp", "--image-size", 40]), (dcgan, ["--upsample", "nearest"]),
    (cdcgan, []), (cdcgan, ["--d-ignores-label"]), (cdcgan, ["--arch", "mlp"]),
    (cdcgan, ["--arch", "mlp", "--d-ignores-label"])] + [
    (wgan_clip, ["--image-size", s]) for s in (28, 32, 64)] + [
    (wgan_clip, ["--arch", "mlp"]), (wgan_clip, ["--upsample", "bilinear", "--image-size", 28]),
    (wgan_clip, ["--conditional"]), (wgan_clip, ["--conditional", "--arch", "mlp"]),
    (wgan_clip, ["--conditional", "--d-ignores-label", "--g-norm", "layer"])]


@pytest.mark.parametrize("module, argv", EVERY, ids=lambda v: v.__name__ if not isinstance(v, list) else " ".join(
    map(str, v)))
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_ranges(module, argv, channels):
    flags = [*argv, "--latent-dim", 7, "--ngf", 3, "--ndf", 5]
    G, D = pair(module, *flags, channels=channels, classes=4)
    side = module.parse_args([str(a) for a in argv]).image_size
    given = module is cdcgan or "--conditional" in argv
    [m for m in G.modules() if hasattr(m, "weight")][-1].weight.data.mul_(1e6)  # large: tanh must bound it
    for n in (1, 4):
        y = [torch.arange(n)] if given else []
        x = G.eval()(torch.randn(n, 7), *y)
        assert x.shape == (n, channels, side, side) and 0.5 < x.abs().max() <= 1
        big = D.eval()(1e6 * torch.randn(n, channels, side, side), *([] if "--d-ignores-label" in argv else y))
        assert big.shape == (n,) and big.abs().max() > 1.5  # a logit or a score: nothing bounds it


CONV = (nn.Conv2d, nn.ConvTranspose2d)


@pytest.mark.parametrize("module, argv", [(dcgan, ["--image-size", 64]), (dcgan, ["--upsample", "nearest"]),
                                          (cdcgan, ["--ngf", 32, "--ndf", 32]), (wgan_clip, ["--image-size", 64])])
def test_weights_are_drawn_as_in_the_dcgan_paper(module, argv):
    nets = pair(module, *argv)
    convs = [m.weight for net in nets for m in net.modules() if isinstance(m, CONV)]
    scales = torch.cat([m.weight for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert len(convs) >= 8
    for w, mean in [*((w, 0) for w in convs), (scales, 1)]:
        w, n = (w.detach().double().flatten() - mean) / 0.02, w.numel()
        assert abs(w.mean()) < 4 / n ** 0.5
        assert abs(w.square().mean() - 1) < 4 * (2 / n) ** 0.5
        assert abs(w.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5  # normal: the fourth moment is 3
    assert all((m.bias == 0).all() for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["wgan_gp", "dcgan", "cdcgan", "wgan_clip", "bigan", "unrolled", "mdgan"])
def test_init_reaches_a_weight_under_spectral_norm(name):
    """Where the layer's own weight is parametrizations.weight.original, and .weight what is made of it."""
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Conv2d(64, 32, 4)), nn.BatchNorm2d(32), spectral_norm(nn.Conv2d(32, 64, 4)),
                        spectral_norm(nn.ConvTranspose2d(64, 32, 4)), spectral_norm(nn.Linear(5, 5)))
    kept = [m.bias.detach().clone() for m in net] + [net[4].parametrizations.weight.original.detach().clone()]
    net.apply(importlib.import_module(name).dcgan_init)
    for m in (net[0], net[2], net[3]):
        w = m.parametrizations.weight.original
        assert w.std().item() == pytest.approx(0.02, rel=0.03) and abs(w.mean()) < 4 * 0.02 / w.numel() ** 0.5
        for _ in range(30): m(torch.zeros(1, m.in_channels, 4, 4))  # each forward in train mode is a power iteration
        matrix = m.eval().weight.transpose(0, int(isinstance(m, nn.ConvTranspose2d))).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=0.02)
    assert net[1].weight.mean().item() == pytest.approx(1, abs=0.02) and 0.01 < net[1].weight.std() < 0.03
    left = [m.bias for m in net] + [net[4].parametrizations.weight.original]
    assert all(torch.equal(a, b) for a, b in zip(kept, left))


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
def test_pytorchs_own_initialisation(upsample):
    """U(-b, b) with b = fan_in ** -.5, and batch norm's scale 1."""
    nets = pair(dcgan, "--init", "default", "--upsample", upsample)
    for m in (m for net in nets for m in net.modules() if isinstance(m, CONV)):
        bound = m.weight[0].numel() ** -0.5
        w = m.weight.detach().double().flatten() / bound
        assert w.abs().max() <= 1 + 1e-6 and w.abs().max() > 0.95
        assert abs(w.square().mean() - 1 / 3) < 4 * (4 / 45 / w.numel()) ** 0.5
    assert all((m.weight == 1).all() for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("module, argv", EVERY, ids=lambda v: v.__name__ if not isinstance(v, list) else " ".join(
    map(str, v)))
def test_no_weight_is_idle(module, argv):
    """A loss on D(G(z)) reaches every weight of G, and one on D(x) every weight of D."""
    G, D = pair(module, *argv, "--latent-dim", 7, "--ngf", 3, "--ndf", 5, classes=4)
    given = module is cdcgan or "--conditional" in argv
    y = [torch.arange(8) % 4] if given else []
    x = G(torch.randn(8, 7), *y)
    (D(x, *([] if "--d-ignores-label" in argv else y)) * torch.arange(8.0)).sum().backward()
    for net in (G, D):
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name
