"""The networks of the seven scripts and those that reports A to E print, layer for layer: kinds, kernels, strides,
padding, biases, counts, shapes."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import bigan
import cdcgan
import dcgan
import mdgan
import unrolled
import wgan_clip
import wgan_gp

BOTH = pytest.mark.parametrize("module", [dcgan, wgan_clip], ids=lambda m: m.__name__)
PLAIN = [wgan_gp, dcgan, wgan_clip, unrolled, mdgan]  # G(z) and D(x) of one shape; cdcgan and bigan have their own


def pair(module, *argv, channels=1, classes=10):
    """G and D as the script makes them from its flags."""
    torch.manual_seed(0)
    args = module.parse_args([str(a) for a in argv])
    more = [classes] if module in (cdcgan, wgan_clip) else []
    return module.Generator(args, channels, *more), module.Discriminator(args, channels, *more)


def layers(net):
    """What each layer is, in order; reshapes, one-hot rows and the like (no weights) aside."""
    out = []
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            assert m.dilation == (1, 1) and m.groups == 1 and m.padding_mode == "zeros"
            assert not isinstance(m, nn.ConvTranspose2d) or m.output_padding == (0, 0)
            assert all(len(set(sides)) == 1 for sides in (m.kernel_size, m.stride, m.padding))
            shape = m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]
            out.append((type(m).__name__, *shape, "bias" if m.bias is not None else "no bias"))
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
            plain = isinstance(m, (nn.Sequential, nn.Flatten, nn.Unflatten, nn.Identity))
            assert plain or type(m).__module__.split(".")[0] != "torch", m
    return out


def up(a, b, stride=2, pad=1, bias="no bias", kernel=4):
    return "ConvTranspose2d", a, b, kernel, stride, pad, bias


def down(a, b, stride=2, pad=1, bias="no bias", kernel=4):
    return "Conv2d", a, b, kernel, stride, pad, bias


def bn(width):
    return "BatchNorm2d", width


def size(net):
    return sum(p.numel() for p in net.parameters())


LEAKY = ("LeakyReLU", 0.2)


# every side -----------------------------------------------------------------------------------------------------------

KERNELS = {  # of the layers that double a map of 4; 3 makes 7 of it
    16: [4, 4],
    28: [3, 4, 4],
    32: [4, 4, 4],
    64: [4, 4, 4, 4],
    128: [4, 4, 4, 4, 4],
    256: [4, 4, 4, 4, 4, 4],
}
SIDES = pytest.mark.parametrize("side", KERNELS)


@pytest.mark.parametrize("module", PLAIN, ids=lambda m: m.__name__)
@SIDES
@pytest.mark.parametrize("channels", [1, 3])
def test_convolutional_pairs(module, side, channels):
    """A norm after every hidden map of G. In D none, but for wgan_clip's if asked, whose first block has none."""
    more = ["--d-norm", "batch"] if module is wgan_clip else []
    G, D = pair(module, "--image-size", side, "--latent-dim", 7, "--ngf", 2, "--ndf", 3, *more, channels=channels)
    kernels = KERNELS[side]
    widths = [2 * 2**i for i in reversed(range(len(kernels)))]
    wanted = [up(7, widths[0], 1, 0)]
    for a, b, k in zip(widths, [*widths[1:], channels], kernels):
        wanted += [bn(a), "ReLU", up(a, b, kernel=k)]
    assert layers(G) == [*wanted, "Tanh"]
    hidden = zip(widths, [*widths[1:], channels], kernels)
    assert size(G) == 16 * 7 * widths[0] + sum(k * k * a * b + 2 * a for a, b, k in hidden)

    widths = [channels, *(3 * 2**i for i in range(len(kernels)))]
    outputs, biases = {wgan_gp: (1, 1), mdgan: (9, 9)}.get(module, (1, 0))
    wanted = []
    for i, (a, b, k) in enumerate(zip(widths, widths[1:], reversed(kernels))):
        normed = module is wgan_clip and i > 0
        wanted += [down(a, b, kernel=k, bias="no bias" if normed else "bias"), *[bn(b)] * normed, LEAKY]
    assert layers(D) == [*wanted, down(widths[-1], outputs, 1, 0, bias="bias" if biases else "no bias")]
    weights = sum(k * k * a * b for a, b, k in zip(widths, widths[1:], reversed(kernels)))
    norms = sum(widths[2:]) if module is wgan_clip else 0  # two numbers a channel, in the place of one bias
    assert size(D) == weights + sum(widths[1:]) + norms + 16 * widths[-1] * outputs + biases

    x = G(torch.randn(2, 7))
    assert x.shape == (2, channels, side, side) and x.abs().max() <= 1
    assert D(x).shape == (2,)


@pytest.mark.parametrize("side", [16, 32, 64, 128, 256])
def test_conditional_pair_of_every_side(side):
    """Half of the first maps are of the label; in D as many as of the image."""
    n = len(KERNELS[side])
    G, D = pair(cdcgan, "--image-size", side, "--latent-dim", 7, "--ngf", 2, "--ndf", 3, channels=3, classes=5)
    widths = [2 * 2**i for i in reversed(range(n))]
    hidden = zip(widths, [*widths[1:], 3])
    norms = 2 * (sum(widths) - widths[0] // 2)  # none in the half of the first maps that is of the label
    assert size(G) == 16 * (7 + 5) * widths[0] // 2 + 16 * sum(a * b for a, b in hidden) + norms + 3
    widths = [3 * 2**i for i in range(n)]
    ins = [6, *widths[1:]]
    assert size(D) == 16 * (3 + 5) * 3 + 2 * 3 + sum(16 * a * b + b for a, b in zip(ins, widths[1:])) + 16 * ins[-1] + 1
    y = torch.tensor([3, 0])
    x = G(torch.randn(2, 7), y)
    assert x.shape == (2, 3, side, side) and x.abs().max() <= 1
    assert D(x, y).shape == (2,)


@pytest.mark.parametrize("module", [*PLAIN, cdcgan, bigan], ids=lambda m: m.__name__)
@pytest.mark.parametrize("side", [8, 27, 48, 512])
def test_a_side_that_does_not_double_from_4_is_one_line(module, side, capsys):
    args = module.parse_args([])
    args.image_size = side
    kinds = [module.Generator, module.Discriminator, *([bigan.Encoder] if module is bigan else [])]
    more = [10] if module in (cdcgan, wgan_clip) else []
    calls = [lambda kind=kind: kind(args, 1, *more) for kind in kinds]
    calls.append(lambda: module.parse_args(["--image-size", str(side)]))  # before any data are decoded
    for call in calls:
        with pytest.raises(SystemExit) as stop:
            call()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and f"--image-size {side}" in err


# report A -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("how", ["deconv", "nearest", "bilinear"])
def test_report_a_sections_a_to_c(module, how):
    """At 64x64, 16 wide: (a) ConvTranspose2d(in, out, 4, 2, 1); (b), (c) Upsample, Conv2d(in, out, 5, padding=2)."""
    flags = ["--paper", "--image-size", 64, "--ngf", 16, "--ndf", 16, "--upsample", how]
    if how != "deconv":
        flags += ["--upsample-kernel", 5]
    G, D = pair(module, *flags, channels=3)

    def twice(a, b):
        return [up(a, b)] if how == "deconv" else [("Upsample", 2, how), ("Conv2d", a, b, 5, 1, 2, "no bias")]

    wanted = [up(100, 128, 1, 0), bn(128), "ReLU", *twice(128, 64), bn(64), "ReLU", *twice(64, 32), bn(32), "ReLU"]
    assert layers(G) == [*wanted, *twice(32, 16), bn(16), "ReLU", *twice(16, 3), "Tanh"]
    kernel = 16 if how == "deconv" else 25  # numbers in it
    hidden = 128 * 64 + 64 * 32 + 32 * 16 + 16 * 3
    assert size(G) == 16 * 100 * 128 + kernel * hidden + 2 * (128 + 64 + 32 + 16)
    assert size(G) == {16: 378_080, 25: 475_280}[kernel]
    wanted = [down(3, 16, bias="bias"), LEAKY, down(16, 32), bn(32), LEAKY, down(32, 64), bn(64), LEAKY]
    assert layers(D) == [*wanted, down(64, 128), bn(128), LEAKY, down(128, 1, 1, 0)]
    assert G(torch.randn(2, 100)).shape == (2, 3, 64, 64) and D(torch.randn(2, 3, 64, 64)).shape == (2,)


@pytest.mark.parametrize("flags", [["--paper", "--gp", 0.5], ["--paper", "--r1", 0.5], []])
def test_report_a_penalised_logit_has_no_batch_norm(flags):
    D = pair(dcgan, "--image-size", 64, "--ndf", 16, *flags, channels=3)[1]
    wanted = [v for a, b in ((3, 16), (16, 32), (32, 64), (64, 128)) for v in (down(a, b, bias="bias"), LEAKY)]
    assert layers(D) == [*wanted, down(128, 1, 1, 0)]


@pytest.mark.parametrize("module", [*PLAIN, bigan, cdcgan], ids=lambda m: m.__name__)
@pytest.mark.parametrize("how", ["nearest", "bilinear"])
def test_by_default_a_convolution_of_3_follows_a_resize(module, how):
    G = pair(module, "--image-size", 64, "--ngf", 4, "--upsample", how, channels=3)[0]
    found = [m for m in G.modules() if isinstance(m, nn.Upsample | nn.Conv2d | nn.ConvTranspose2d)]
    from_z = [m for m in found if isinstance(m, nn.ConvTranspose2d)]
    assert [m.kernel_size for m in from_z] == [(4, 4)] * len(from_z)  # 1 to 4, of z, and of the label in cdcgan.py
    assert len(from_z) == (2 if module is cdcgan else 1)
    doubled = [m for m in found if m not in from_z]
    assert [type(m) for m in doubled] == 4 * [nn.Upsample, nn.Conv2d] and all(m.mode == how for m in doubled[::2])
    shapes = [(16, 32, 3, 3), (8, 16, 3, 3), (4, 8, 3, 3), (3, 4, 3, 3)]
    assert [tuple(m.weight.shape) for m in doubled[1::2]] == shapes and all(m.padding == (1, 1) for m in doubled[1::2])
    assert [m.bias is None for m in doubled[1::2]] == [True, True, True, module is not cdcgan]


@pytest.mark.parametrize("how", ["nearest", "bilinear"])
def test_upsampling_is_the_named_resize(how):
    G = pair(dcgan, "--image-size", 32, "--ngf", 4, "--upsample", how)[0]
    x = torch.randn(2, 5, 3, 3)
    wanted = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if how == "bilinear":
        wanted = F.interpolate(x, (6, 6), mode="bilinear", align_corners=False)
    found = [m for m in G.modules() if isinstance(m, nn.Upsample)]
    assert len(found) == 3
    for m in found:
        torch.testing.assert_close(m(x), wanted)


# report B -------------------------------------------------------------------------------------------------------------


@BOTH
def test_report_b_tables_1_and_2(module):
    """12, 128 and 28 of table 1 read 512, 256/128 and 128/3; no batch norm on the logit; no sigmoid."""
    G, D = pair(module, "--paper", "--image-size", 64, "--ngf", 128, "--ndf", 128, channels=3)
    wanted = [up(100, 1024, 1, 0), bn(1024), "ReLU", up(1024, 512), bn(512), "ReLU", up(512, 256), bn(256), "ReLU"]
    assert layers(G) == [*wanted, up(256, 128), bn(128), "ReLU", up(128, 3), "Tanh"]
    wanted = [down(3, 128, bias="bias"), LEAKY, down(128, 256), bn(256), LEAKY, down(256, 512), bn(512), LEAKY]
    assert layers(D) == [*wanted, down(512, 1024), bn(1024), LEAKY, down(1024, 1, 1, 0)]
    assert size(G) == 16 * (100 * 1024 + 1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + 2 * (1024 + 512 + 256 + 128)
    assert size(G) == 12_658_432
    assert size(D) == 16 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 1024 + 1024) + 128 + 2 * (256 + 512 + 1024)
    assert size(D) == 11_036_288
    assert G(torch.randn(2, 100)).shape == (2, 3, 64, 64) and D(torch.randn(2, 3, 64, 64)).shape == (2,)


# report C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_report_c_section_1_2(channels):
    G, D = pair(dcgan, "--paper", "--norm-first", channels=channels)
    wanted = [up(100, 128, 1, 0), bn(128), "ReLU", up(128, 64), bn(64), "ReLU", up(64, 32), bn(32), "ReLU"]
    assert layers(G) == [*wanted, up(32, channels), "Tanh"]
    wanted = [down(channels, 32), bn(32), LEAKY, down(32, 64), bn(64), LEAKY, down(64, 128), bn(128), LEAKY]
    assert layers(D) == [*wanted, down(128, 1, 1, 0)]
    assert size(G) == 16 * (100 * 128 + 128 * 64 + 64 * 32 + 32 * channels) + 2 * (128 + 64 + 32)
    assert size(D) == 16 * (channels * 32 + 32 * 64 + 64 * 128 + 128) + 2 * (32 + 64 + 128)
    assert (size(G), size(D)) == {1: (369_600, 166_848), 3: (370_624, 167_872)}[channels]
    assert G(torch.randn(2, 100)).shape == (2, channels, 32, 32)
    assert D(torch.randn(2, channels, 32, 32)).shape == (2,)


@pytest.mark.parametrize("channels", [1, 3])
def test_report_c_critic(channels):
    """The same pair without a norm in the critic, and with biases throughout."""
    G, D = pair(wgan_gp, "--paper", channels=channels)
    assert layers(G) == layers(pair(dcgan, "--paper", channels=channels)[0])
    wanted = [v for a, b in ((channels, 32), (32, 64), (64, 128)) for v in (down(a, b, bias="bias"), LEAKY)]
    assert layers(D) == [*wanted, down(128, 1, 1, 0, bias="bias")]
    assert channels == 3 or (size(G), size(D)) == (369_600, 166_625)


def test_report_c_figure_5():
    """Section 2.2. G: z and label branches of 256 each; D: picture and label branches of 64 each."""
    G, D = pair(cdcgan, "--paper")
    assert layers(G) == [
        *(up(100, 256, 1, 0), bn(256), "ReLU"),
        *(up(10, 256, 1, 0), bn(256), "ReLU"),
        *(up(512, 256), bn(256), "ReLU", up(256, 128), bn(128), "ReLU", up(128, 1, bias="bias"), "Tanh"),
    ]
    assert layers(D) == [
        *(down(1, 64, bias="bias"), LEAKY),
        *(down(10, 64, bias="bias"), LEAKY),
        *(down(128, 256), bn(256), LEAKY, down(256, 512), bn(512), LEAKY, down(512, 1, 1, 0, bias="bias")),
    ]
    norms = 2 * (256 + 256 + 256 + 128)
    assert size(G) == 16 * (100 * 256 + 10 * 256 + 512 * 256 + 256 * 128 + 128) + 1 + norms
    assert size(D) == 16 * (64 + 10 * 64 + 128 * 256 + 256 * 512 + 512) + (64 + 64 + 1) + 2 * (256 + 512)
    assert (size(G), size(D)) == (3_075_841, 2_642_561)
    y = torch.tensor([3, 0])
    assert G(torch.randn(2, 100), y).shape == (2, 1, 32, 32) and D(torch.randn(2, 1, 32, 32), y).shape == (2,)


@pytest.mark.parametrize("net", ["G", "D"])
def test_report_c_branches_join_picture_first_with_one_hot_labels(net):
    """Read off the inputs of three layers: z's maps, then the label's; one-hot rows, in D spread over planes."""
    nets = pair(cdcgan, "--paper", "--ngf", 8, "--ndf", 8)
    y = torch.tensor([3, 0, 7, 3])
    hot = F.one_hot(y, 10).float()[:, :, None, None]
    x, planes = torch.randn(4, 100), hot
    if net == "D":
        x, planes = torch.randn(4, 1, 32, 32), hot.expand(-1, -1, 32, 32)
    net = nets["GD".index(net)]
    first, second, joined = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))][:3]
    seen = {}
    for name, m in (("x", first), ("y", second), ("both", joined)):
        m.register_forward_hook(lambda m, a, out, name=name: seen.update({name: a[0], f"{name} out": out}))
    net(x, y)
    assert torch.equal(seen["x"].flatten(), x.flatten()) and torch.equal(seen["y"], planes)
    branches = torch.cat([seen["x out"], seen["y out"]], 1)
    if net is nets[0]:
        scale = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)][:2])
        wanted = F.relu(F.batch_norm(branches, None, None, scale, None, True))
    else:
        wanted = F.leaky_relu(branches, 0.2)
    torch.testing.assert_close(seen["both"], wanted)


def test_by_default_a_label_does_not_look_at_the_other_labels_of_the_batch():
    """With batch norm in that branch, as the course has it, the same label has other features in another batch."""
    y = torch.tensor([3, 0, 7, 3]), torch.tensor([3, 3, 3, 0])
    for flags, same in (([], True), (["--paper"], False)):
        G = pair(cdcgan, *flags)[0].train()
        first, second = (G.from_label(labels)[0] for labels in y)
        assert torch.equal(first, second) == same


def test_report_c_question_7_leaves_the_label_branch_out():
    G, D = pair(cdcgan, "--paper", "--d-ignores-label")
    wanted = [down(1, 64, bias="bias"), LEAKY, down(64, 256), bn(256), LEAKY, down(256, 512), bn(512), LEAKY]
    assert layers(D) == [*wanted, down(512, 1, 1, 0, bias="bias")]
    assert layers(G) == layers(pair(cdcgan, "--paper")[0])


# report D -------------------------------------------------------------------------------------------------------------


def test_report_d_three_numbers_for_a_class_beside_97_of_noise():
    flags = ["--paper", "--conditional", "--latent-dim", 97, "--image-size", 64]
    G, D = pair(wgan_clip, *flags, channels=3, classes=3)
    assert layers(G)[0] == up(100, 256, 1, 0) and layers(D)[0] == down(3 + 3, 32, bias="bias")
    (embedding,) = [p for p in G.parameters() if p.shape == (3, 3)]
    z, y, seen = torch.randn(4, 97), torch.tensor([2, 0, 2, 1]), []
    first = next(m for m in G.modules() if isinstance(m, nn.ConvTranspose2d))
    first.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    G(z, y)
    assert torch.equal(seen[0].flatten(1), torch.cat([z, F.embedding(y, embedding)], 1))
    blend = torch.tensor([[0.5, 0.0, 0.5]])  # shares of the classes
    G.eval()(z[:1], blend)
    torch.testing.assert_close(seen[1].flatten(1), torch.cat([z[:1], (embedding[:1] + embedding[2:]) / 2], 1))


def test_report_d_critic_sees_the_label_as_planes():
    D = pair(wgan_clip, "--conditional", "--image-size", 32, "--ndf", 4, channels=3, classes=3)[1]
    x, y, seen = torch.randn(2, 3, 32, 32), torch.tensor([2, 0]), []
    first = next(m for m in D.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    D(x, y)
    planes = F.one_hot(y, 3).float()[:, :, None, None].expand(-1, -1, 32, 32)
    assert torch.equal(seen[0], torch.cat([x, planes], 1))


@pytest.mark.parametrize("dim", [None, 3, 50])
@pytest.mark.parametrize("arch", ["mlp", "dcgan"])
def test_a_wider_embedding_widens_g_alone(dim, arch):
    """As many numbers as classes where not said."""
    flags = ["--arch", arch, "--latent-dim", 20, "--ngf", 4, "--ndf", 4]
    more = [] if dim is None else ["--label-embedding-dim", dim]
    G, D = pair(wgan_clip, *flags, "--conditional", *more, classes=3)
    plain_g, plain_d = pair(wgan_clip, *flags, classes=3)
    first = 256 if arch == "mlp" else 16 * 16  # numbers made from each number of the input
    dim = dim or 3
    assert size(G) - size(plain_g) == 3 * dim + first * dim
    assert size(D) - size(plain_d) == 3 * (28 * 28 * 1024 if arch == "mlp" else 16 * 4)


# report E -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [*PLAIN, cdcgan], ids=lambda m: m.__name__)
def test_report_e_fully_connected_pair(module):
    G, D = pair(module, "--arch", "mlp", "--paper")
    labels = 10 if module is cdcgan else 0
    last = 9 if module is mdgan else 1
    wanted = []
    for a, b in ((100 + labels, 256), (256, 512), (512, 1024)):
        wanted += [("Linear", a, b, "no bias"), ("BatchNorm1d", b), LEAKY]
    assert layers(G) == [*wanted, ("Linear", 1024, 784, "bias"), "Tanh"]
    wanted = []
    for a, b in ((784 + labels, 1024), (1024, 512), (512, 256)):
        wanted += [("Linear", a, b, "bias"), LEAKY]
    assert layers(D) == [*wanted, ("Linear", 256, last, "bias")]
    assert size(G) == (100 + labels) * 256 + 256 * 512 + 512 * 1024 + 1025 * 784 + 2 * (256 + 512 + 1024)
    assert size(D) == (785 + labels) * 1024 + 1025 * 512 + 513 * 256 + 257 * last
    y = [torch.tensor([3, 0])] if labels else []
    assert G(torch.randn(2, 100), *y).shape == (2, 1, 28, 28) and D(torch.randn(2, 1, 28, 28), *y).shape == (2,)


# where norms and biases go --------------------------------------------------------------------------------------------


def norms(net):
    return [type(m).__name__ for m in net.modules() if "Norm" in type(m).__name__]


@BOTH
@pytest.mark.parametrize("side, blocks", [(28, 3), (64, 4)])
def test_batch_norm_in_every_block_but_ds_first_and_the_outputs(module, side, blocks):
    flags = ["--image-size", side, "--ngf", 4, "--ndf", 4]
    G, D = pair(module, *flags, "--d-norm", "batch")
    assert norms(G) == ["BatchNorm2d"] * blocks and norms(D) == ["BatchNorm2d"] * (blocks - 1)
    kinds = [k if isinstance(k, str) else k[0] for k in layers(D)]
    assert kinds[1] == "LeakyReLU" and kinds[-1] == "Conv2d" and layers(G)[-1] == "Tanh"
    other, none = pair(module, *flags, "--d-norm", "none")
    assert norms(none) == [] and norms(other) == norms(G)
    assert all(m.bias is not None for m in [m for m in none.modules() if isinstance(m, nn.Conv2d)][:-1])


@BOTH
def test_batch_norm_in_a_fully_connected_critic_is_on_request(module):
    assert norms(pair(module, "--arch", "mlp")[1]) == norms(pair(module, "--arch", "mlp", "--paper")[1]) == []
    D = pair(module, "--arch", "mlp", "--d-norm", "batch")[1]
    wanted = [("Linear", 784, 1024, "bias"), LEAKY]
    for a, b in ((1024, 512), (512, 256)):
        wanted += [("Linear", a, b, "no bias"), ("BatchNorm1d", b), LEAKY]
    assert layers(D) == [*wanted, ("Linear", 256, 1, "bias")]


@pytest.mark.parametrize("arch, kinds", [("dcgan", ["Conv2d", "BatchNorm2d"]), ("mlp", ["Linear", "BatchNorm1d"])])
def test_norm_first_adds_one_norm_and_yields_to_d_norm_none(arch, kinds):
    flags = ["--arch", arch, "--d-norm", "batch"]
    plain, first = (pair(dcgan, *flags, *more)[1] for more in ([], ["--norm-first"]))
    assert [k[0] for k in layers(first)][:3] == [*kinds, "LeakyReLU"]
    assert layers(first)[0][-1] == "no bias" and len(norms(first)) == len(norms(plain)) + 1
    assert norms(pair(dcgan, "--arch", arch, "--norm-first", "--d-norm", "none")[1]) == []


@pytest.mark.parametrize("ngf, channels", [(4, 1), (3, 3), (1, 1)])
def test_without_g_norm_every_hidden_layer_has_a_bias(ngf, channels):
    """Also where the width of a map happens to be that of the picture."""
    G = pair(wgan_clip, "--g-norm", "none", "--ngf", ngf, "--image-size", 64, channels=channels)[0]
    assert norms(G) == []
    biases = [m.bias is not None for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert biases == [True] * 4 + [False]
    G = pair(wgan_clip, "--g-norm", "none", "--arch", "mlp")[0]
    assert norms(G) == [] and all(m.bias is not None for m in G.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
def test_layer_norm_in_g_is_over_all_numbers_of_one_picture(arch):
    flags = ["--arch", arch, "--ngf", 4, "--latent-dim", 100]
    G = pair(wgan_clip, *flags, "--g-norm", "layer")[0]
    plain = pair(wgan_clip, *flags)[0]
    found = [m for m in G.modules() if "Norm" in type(m).__name__]
    assert len(found) == 3 and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in found)
    assert not list(G.buffers()) and size(G) == size(plain)
    for m, width in zip(found, (16, 8, 4) if arch == "dcgan" else (256, 512, 1024)):
        x = torch.randn(3, width, 5, 5) if arch == "dcgan" else torch.randn(3, width)
        m.weight.data.uniform_()
        m.bias.data.uniform_()
        weight, bias = ((p[:, None, None] if arch == "dcgan" else p) for p in (m.weight, m.bias))
        torch.testing.assert_close(m(x), F.layer_norm(x, x.shape[1:], eps=1e-5) * weight + bias)
    z = torch.randn(4, 100)
    other = torch.cat([z[:3], 9 * torch.randn(1, 100)])
    torch.testing.assert_close(G(z)[:3], G(other)[:3])  # in train mode: one picture does not see another
    assert (plain(z)[:3] - plain(other)[:3]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
@pytest.mark.parametrize("conditional", [[], ["--conditional"]])
def test_dropout_after_every_hidden_activation_of_the_critic(arch, conditional):
    flags = ["--arch", arch, "--ndf", 4, "--ngf", 4, *conditional]
    G, D = pair(wgan_clip, *flags, "--d-dropout", 0.3)
    for net in (G, *pair(wgan_clip, *flags)):
        assert not any("Dropout" in type(m).__name__ for m in net.modules())
    order = [m for m in D.net if isinstance(m, (nn.LeakyReLU, nn.Dropout))]
    assert len(order) == 6 and all(isinstance(m, nn.LeakyReLU) for m in order[::2])
    assert all(not isinstance(m, nn.LeakyReLU) and m.p == 0.3 for m in order[1::2])
    seen = []
    order[1].register_forward_hook(lambda m, x, out: seen.append((x[0], out)))
    D(torch.randn(64, 1, 28, 28), torch.zeros(64).long())
    x, out = seen[0]
    assert abs((out == 0).double().mean() - 0.3) < 0.02
    torch.testing.assert_close(out[out != 0], x[out != 0] / 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_its_share_its_mean_and_its_dtype(dtype):
    """.002 would be .004 by numbers that are drawn in bfloat16."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1000, dtype=dtype, requires_grad=True)
    layer = wgan_clip.Dropout(0.002)
    out = layer(x)
    assert out.dtype == dtype and abs((out == 0).double().mean() - 0.002) < 4 * (0.002 / 1e6) ** 0.5
    assert out.double().mean().item() == pytest.approx(1, abs=3e-3 if dtype == torch.bfloat16 else 2e-4)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0] == 0, out == 0)
    assert layer.eval()(x) is x


# ranges, initialisation -----------------------------------------------------------------------------------------------

EVERY = [
    *((m, []) for m in PLAIN),
    (dcgan, ["--arch", "mlp", "--image-size", 40]),
    (dcgan, ["--upsample", "nearest"]),
    (dcgan, ["--paper", "--norm-first"]),
    (cdcgan, []),
    (cdcgan, ["--d-ignores-label"]),
    (cdcgan, ["--arch", "mlp"]),
    (cdcgan, ["--arch", "mlp", "--d-ignores-label"]),
    (wgan_clip, ["--upsample", "bilinear", "--d-norm", "none"]),
    (wgan_clip, ["--conditional"]),
    (wgan_clip, ["--conditional", "--arch", "mlp"]),
    (wgan_clip, ["--conditional", "--d-ignores-label", "--g-norm", "layer"]),
]
EVERY = pytest.mark.parametrize("module, argv", EVERY, ids=[f"{m.__name__} {' '.join(map(str, a))}" for m, a in EVERY])


@EVERY
def test_tanh_bounds_the_image_and_nothing_bounds_the_score(module, argv):
    flags = [*argv, "--latent-dim", 7, "--ngf", 3, "--ndf", 5]
    G, D = pair(module, *flags, channels=3, classes=4)
    side = module.parse_args([str(a) for a in argv]).image_size
    [m for m in G.modules() if hasattr(m, "weight")][-1].weight.data.mul_(1e6)
    for n in (1, 4):
        y = [torch.arange(n)] if module in (cdcgan, wgan_clip) else []
        x = G.eval()(torch.randn(n, 7), *y)
        assert x.shape == (n, 3, side, side) and 0.5 < x.abs().max() <= 1
        big = D.eval()(1e6 * torch.randn(n, 3, side, side), *y)
        assert big.shape == (n,) and big.abs().max() > 1.5


@EVERY
def test_no_weight_is_idle(module, argv):
    """A loss on D(G(z)) reaches every weight of G, and one on D(x) every weight of D."""
    G, D = pair(module, *argv, "--latent-dim", 7, "--ngf", 3, "--ndf", 5, classes=4)
    y = [torch.arange(8) % 4] if module in (cdcgan, wgan_clip) else []
    x = G(torch.randn(8, 7), *y)
    (D(x, *y) * torch.arange(8.0)).sum().backward()
    for net in (G, D):
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


CONV = (nn.Conv2d, nn.ConvTranspose2d)


@pytest.mark.parametrize(
    "module, argv",
    [
        *((m, ["--image-size", 64]) for m in PLAIN),
        (dcgan, ["--upsample", "nearest", "--paper"]),
        (cdcgan, ["--ngf", 32, "--ndf", 32]),
    ],
)
def test_weights_are_drawn_as_in_the_dcgan_paper(module, argv):
    nets = pair(module, *argv)
    convs = [m.weight for net in nets for m in net.modules() if isinstance(m, CONV)]
    scales = torch.cat([m.weight for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert len(convs) >= 8
    for w, mean in [*((w, 0) for w in convs), (scales, 1)]:
        w, n = (w.detach().double().flatten() - mean) / 0.02, w.numel()
        assert abs(w.mean()) < 4 / n**0.5
        assert abs(w.square().mean() - 1) < 4 * (2 / n) ** 0.5
        assert abs(w.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5  # normal: the fourth moment is 3
    assert all((m.bias == 0).all() for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["wgan_gp", "dcgan", "cdcgan", "wgan_clip", "bigan", "unrolled", "mdgan"])
def test_init_reaches_a_weight_under_spectral_norm(name):
    """Where the layer's own weight is parametrizations.weight.original, and .weight what is made of it."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(64, 32, 4), nn.Conv2d(32, 64, 4), nn.ConvTranspose2d(64, 32, 4)]
    first, second, third, linear = (spectral_norm(m) for m in (*convs, nn.Linear(5, 5)))
    net = nn.Sequential(first, nn.BatchNorm2d(32), second, third, linear)
    untouched = [m.bias for m in net] + [linear.parametrizations.weight.original]
    kept = [t.detach().clone() for t in untouched]
    net.apply(importlib.import_module(name).dcgan_init)
    for m in (first, second, third):
        w = m.parametrizations.weight.original
        assert w.std().item() == pytest.approx(0.02, rel=0.03) and abs(w.mean()) < 4 * 0.02 / w.numel() ** 0.5
        for _ in range(30):
            m(torch.zeros(1, m.in_channels, 4, 4))  # each forward in train mode is a power iteration
        matrix = m.eval().weight.transpose(0, int(isinstance(m, nn.ConvTranspose2d))).flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=0.02)
    assert net[1].weight.mean().item() == pytest.approx(1, abs=0.02) and 0.01 < net[1].weight.std() < 0.03
    assert all(torch.equal(a, b) for a, b in zip(kept, untouched))


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
def test_pytorchs_own_initialisation(upsample):
    """U(-b, b) with b = fan_in ** -.5, and batch norm's scale 1."""
    nets = pair(dcgan, "--paper", "--init", "default", "--upsample", upsample)
    for m in (m for net in nets for m in net.modules() if isinstance(m, CONV)):
        bound = m.weight[0].numel() ** -0.5
        w = m.weight.detach().double().flatten() / bound
        assert w.abs().max() <= 1 + 1e-6 and w.abs().max() > 0.95
        assert abs(w.square().mean() - 1 / 3) < 4 * (4 / 45 / w.numel()) ** 0.5
    assert all((m.weight == 1).all() for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d))
