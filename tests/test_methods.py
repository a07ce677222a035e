"""The family of methods in `skin_gradcam.gradcam`: closed forms, brute force, invariants, on toy and known nets."""
from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import vgg

from skin_gradcam import gradcam as room
from skin_gradcam.engine import Spot, head_of, quiet_forward, record
from skin_gradcam.gradcam import (
    METHODS,
    attention_slope,
    channel_drops,
    fuse,
    gradcam,
    no_evidence,
    normalised,
    smoothed,
)

CONV = [m for m in METHODS if m != 'legrad']
# ten architectures and the layer whose head is not only pooling and a linear layer, by builder
ZOO = {'resnet18': 'layer3', 'resnet50': 'layer4.1', 'densenet121': 'features.transition3', 'vgg11': '0.15',
       'mobilenet_v3_small': 'features.8', 'regnet_y_400mf': 'trunk_output.block3', 'swin_t': 'features.5',
       'tf_efficientnet_lite0': 'blocks.5', 'efficientnet_b0': 'blocks.5', 'convnext_atto': 'stages.2'}
TIMM = {'tf_efficientnet_lite0', 'efficientnet_b0', 'convnext_atto'}


pytestmark = pytest.mark.usefixtures('one_thread')


class Net(nn.Module):
    "Pooling and one linear layer, or something of its own in between"
    def __init__(self, behind=None):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, 2, 1))
        self.relu, self.fc, self.behind = nn.ReLU(inplace=True), nn.Linear(6, 4), behind
    def forward(self, x):
        f = self.relu(self.body(x))
        return self.fc((f if self.behind is None else self.behind(f)).mean((2, 3)))


def make(behind=None) -> Net:
    torch.manual_seed(0)
    return Net(behind).eval()


def make_vit(**kw) -> VisionTransformer:
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=4)
    vit = VisionTransformer(**{**small, **kw})
    for p in vit.parameters(): p.data = torch.randn_like(p) * .2
    return vit.eval()


@pytest.fixture(scope='module')
def x() -> torch.Tensor: return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def rel(a: torch.Tensor, b: torch.Tensor) -> float: return float((a - b).abs().max() / b.abs().max())


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = [t.flatten().argsort().argsort().float() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_the_list_of_what_is_tested_is_true():
    "Every test that the docstring of test_gradcam.py names is there"
    here, listed = Path(__file__).parent, (Path(__file__).parent / 'test_gradcam.py').read_text().split('"""')[1]
    files = {'': 'test_gradcam.py', 'P': 'test_gradcam_peers.py', 'M': 'test_methods.py'}
    entries = re.findall(r'^ ?(\d+) [^:]+:([^:]*?)(?=^ ?\d+ |\Z)', listed, re.M | re.S)
    assert [int(n) for n, _ in entries] == list(range(1, 24))
    for _, names in entries:
        for mark, name in re.findall(r'\b(?:([PM]) )?([a-z]+(?:_[a-z]+)+)\b', names):
            assert f'def test_{name}(' in (here / files[mark]).read_text(), name


# ---------------------------------------------------------------- closed forms


def test_closed_forms_behind_pooling_and_a_linear_layer(x):
    net = make()
    f, w, logits = record(net, x).features[0], net.fc.weight.detach(), net(x).detach()
    z, total, pooled = f[0, 0].numel(), f.sum((2, 3)), f.mean((2, 3))
    def weighted(k): return torch.einsum('bck,bkhw->bchw', k, f)
    g = (w / z).expand(3, 4, 6)
    cam = weighted(g)
    expected = {
        'cam': cam, 'gradcam': cam, 'hirescam': cam, 'xgradcam': cam, 'layercam': weighted(g.relu()),
        'gradcam++': weighted(z * g.relu() / (2 + total[:, None] * g)),
        'ablationcam': weighted(w * pooled[:, None])}
    near = torch.stack([(o[:, None] - o).abs().fill_diagonal_(9e9).argsort(1)[:, :3] for o in logits])
    expected['finercam'] = cam - .6 * torch.stack([c[n].mean(1) for c, n in zip(cam, near, strict=True)])
    for method, maps in expected.items(): assert rel(gradcam(net, x, 'all', method), maps) < 2e-6, method


def test_layercam_covers_hirescam(x):
    for layer in ('relu', 'body.1'):                                 # behind a ReLU, deep and early
        hires, layercam = (gradcam(make(), x, 'all', m, layer) for m in ('hirescam', 'layercam'))
        assert (layercam >= hires.relu() - 1e-6).all() and (layercam > hires.relu() + 1e-3).any()


def test_gradcampp_is_the_formula_of_the_paper_cell_by_cell(x):
    net = make(lambda f: f * f)                                       # so that gradients differ from cell to cell
    f = record(net, x).features[0].requires_grad_()
    g, = torch.autograd.grad(net.fc((f * f).mean((2, 3)))[:, 1].sum(), f)
    f, g = f.detach().double(), g.double()
    below = 2 * g**2 + f.sum((2, 3), keepdim=True) * g**3
    alpha = torch.where(below == 0, 0., g**2 / below)
    expected = ((alpha * g.relu()).sum((2, 3), keepdim=True) * f).sum(1)
    assert rel(gradcam(net, x, 1, 'gradcam++').double(), expected) < 1e-5


@pytest.mark.parametrize('layer', [None, 'body.0', 'body.2'])
def test_xgradcam_sums_to_what_hirescam_sums_to(x, layer):
    net = make(lambda f: f.exp() * f)
    sums = [gradcam(net, x, 'all', m, layer).sum((2, 3)) for m in ('xgradcam', 'hirescam')]
    assert rel(*sums) < 1e-4


def test_eigencam_is_the_first_component_and_its_sign_is_kept(x):
    f = record(make(), x).features[0]
    u, s, vt = np.linalg.svd(f.flatten(2).mT.double().numpy(), full_matrices=False)
    maps = gradcam(make(), x, 'all', 'eigencam')
    assert torch.equal(maps[:, 0], maps[:, 3])
    for m, a, v in zip(maps[:, 0], f.double(), vt, strict=True):
        direct = np.einsum('k,khw->hw', v[0], a.numpy())
        assert abs(m.double().numpy() - direct * np.sign(direct.sum())).max() < 1e-5
    assert (maps >= 0).all()                                          # behind a ReLU (Perron and Frobenius)
    assert torch.equal(room.eigencam_map(-f), room.eigencam_map(f))


def test_maps_in_logits_are_linear_in_the_target(x):
    net = make(lambda f: f.tanh() * f)
    for method, kind in METHODS.items():
        if kind.unit != 'logit' or method in ('cam', 'layercam'): continue
        every = gradcam(net, x, 'all', method)
        assert rel(gradcam(net, x, lambda o: 3 * o[:, 2] - o[:, 0], method), 3 * every[:, 2] - every[:, 0]) < 1e-5
    for method in ('ablationcam', 'random'):
        every = gradcam(net, x, 'all', method)
        assert rel(gradcam(net, x, lambda o: o[:, 2] - o[:, 0], method), every[:, 2] - every[:, 0]) < 1e-4


@pytest.mark.parametrize('method', CONV)
def test_what_a_method_says_of_itself_is_true(x, method):
    kind, maps = METHODS[method], gradcam(make(), x, 'all', method)
    assert kind.signed or (maps >= 0).all()
    assert kind.by_class == (not torch.equal(maps[:, 0], maps[:, 1]))
    runs, net = [], make()
    gradcam(net, x, 'all', method)                                    # the layer is known now
    net.body[0].register_forward_hook(lambda m, i, o: runs.append(len(o)))
    gradcam(net, x, 'all', method)
    f = record(make(), x).features[0]
    masks = int((f.amax((2, 3)) > f.amin((2, 3))).sum())              # of channels that are not flat; and a blank one
    assert sum(runs) == 3 + (masks + 1 if method == 'scorecam' else 0)       # ablation: closed form
    doubled = make()
    doubled.fc.weight.data, doubled.fc.bias.data = 2 * doubled.fc.weight.data, 2 * doubled.fc.bias.data
    if kind.unit == 'logit': assert rel(gradcam(doubled, x, 'all', method), 2 * maps) < 1e-5


# ---------------------------------------------------------------- the head run again


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in TIMM: return timm.create_model(name, num_classes=3).eval()
    if name != 'vgg11': return torchvision.models.get_model(name, weights=None, num_classes=3).eval()
    classifier = nn.Sequential(nn.Linear(2048, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 3))
    return nn.Sequential(vgg.make_layers(vgg.cfgs['A']), nn.AdaptiveAvgPool2d(2), nn.Flatten(), classifier).eval()


@pytest.fixture(scope='module', params=ZOO)
def known(request) -> tuple[str, nn.Module, torch.Tensor]:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return request.param, build(request.param), x


def ablate(model: nn.Module, x: torch.Tensor, layer: str, k: int) -> torch.Tensor:
    "Brute force: the whole model, with one channel of a layer's output set to zero"
    def hook(m, i, o):
        o = o.clone()
        o[:, k] = 0
        return o
    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        with torch.no_grad(): return model(x)
    finally: handle.remove()


def test_the_head_is_the_model(known):
    "On ten architectures, behind the pooled layer and an early one: same bits, and right where the features are others"
    name, model, x = known
    for layer in (None, ZOO[name]):
        rec = record(model, x, layer)
        head = head_of(rec)
        assert torch.equal(head(rec.features[0]), rec.logits.detach().float())
        changed = rec.features[0].clone()
        changed[:, 1] = 0
        swap = changed.movedim(1, -1) if rec.layouts[0] == 'NHWC' else changed
        spot = rec.spots[0]
        calls = iter(range(spot.calls))
        hook = lambda m, i, o, spot=spot, swap=swap, calls=calls: swap.clone() if next(calls) == spot.index else None
        true = quiet_forward(model, x, [(model.get_submodule(spot.name), hook)])
        assert torch.equal(head(changed), true)


def test_every_method_on_ten_architectures(known):
    name, model, x = known
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for method in CONV:
        if method == 'scorecam': continue                              # hundreds of forward passes; below
        if method == 'cam' and name in ('densenet121', 'vgg11', 'mobilenet_v3_small', 'convnext_atto'):
            with pytest.raises(ValueError, match='take hirescam'): gradcam(model, x, 'all', method)
            continue
        maps = gradcam(model, x, 'all', method)
        assert maps.shape[:2] == (2, 3) and maps.dtype == torch.float32 and maps.isfinite().all(), method
        assert maps.abs().max() > 0, method
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize('behind', [lambda f: f * f, lambda f: torch.cat([f[:, :3], f[:, 3:].relu_()], 1),
                                    lambda f: f.add_(f.flip(1)), lambda f: f - f.mean((2, 3), keepdim=True) / 2])
def test_ablation_is_brute_force(x, behind):
    net = make(behind)
    drops = channel_drops(record(net, x))
    for k in range(6): assert torch.allclose(drops[..., k], (net(x) - ablate(net, x, 'relu', k)).detach(), atol=1e-5)
    f = record(net, x).features[0]
    assert rel(gradcam(net, x, 2, 'ablationcam'), torch.einsum('bk,bkhw->bhw', drops[:, 2], f)) < 1e-6


def test_ablation_in_closed_form_is_brute_force(x):
    net = make()
    drops = channel_drops(record(net, x))
    for k in range(6): assert torch.allclose(drops[..., k], (net(x) - ablate(net, x, 'relu', k)).detach(), atol=1e-5)


def test_ablation_of_an_early_layer_of_a_resnet_is_brute_force():
    "With additions in place and shortcuts around the layer"
    model, x = build('resnet18'), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    drops, y = channel_drops(record(model, x, 'layer4.0')), model(x).detach()
    for k in (0, 17, 511): assert torch.allclose(drops[..., k], y - ablate(model, x, 'layer4.0', k), atol=1e-5)


def test_a_head_that_cannot_be_followed_is_refused(x):
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f): return f * 2
        @staticmethod
        def backward(ctx, g): return g * 2
    def hidden(f): return torch.from_numpy(f.detach().numpy().copy()) * 2
    def partly(f): return f + Own.apply(f.relu().as_subclass(torch.Tensor))
    for behind in (hidden, partly):
        net = make(behind)
        with pytest.raises(ValueError, match="behind 'relu' cannot be run again by itself"):
            gradcam(net, x, method='ablationcam', layer='relu')
        assert not any(m._forward_hooks for m in net.modules())


def test_two_threads_run_heads_again(x):
    net, got = make(lambda f: f * f), {}
    inputs = [x, x.flip(0) * 2]
    expected = [gradcam(net, o, 'all', 'ablationcam') for o in inputs]
    def work(i): got[i] = [gradcam(net, inputs[i], 'all', 'ablationcam') for _ in range(10)]
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.equal(m, expected[i]) for i in (0, 1) for m in got[i])


def test_scorecam_is_brute_force(x):
    net = make()
    f = record(net, x).features[0]
    up = F.interpolate(f, (32, 32), mode='bilinear', align_corners=False)
    low, high = up.amin((2, 3), keepdim=True), up.amax((2, 3), keepdim=True)
    masks = torch.where(high > low, (up - low) / (high - low), torch.zeros(()))
    scores = torch.stack([net(x * masks[:, k:k + 1]) for k in range(6)], 1).detach()
    for c in range(4):
        expected = torch.einsum('bk,bkhw->bhw', scores[..., c].softmax(1), f)
        assert rel(gradcam(net, x, c, 'scorecam'), expected) < 1e-5


# ---------------------------------------------------------------- batches, randomness, sanity


@pytest.mark.parametrize('method', CONV)
def test_every_method_keeps_pictures_apart(x, method):
    net = make()
    together = gradcam(net, x, 'all', method)
    assert torch.equal(gradcam(net, x[[2, 0, 1]], 'all', method), together[[2, 0, 1]])
    assert rel(torch.cat([gradcam(net, o[None], 'all', method) for o in x]), together) < 1e-5
    assert torch.equal(gradcam(net, torch.cat([x[:1], x[1:] * 7]), 'all', method)[0], together[0])


def test_the_random_control_is_of_the_picture_alone(x):
    net = make()
    torch.manual_seed(1)
    first = gradcam(net, x, 'all', 'random')
    torch.manual_seed(2)
    assert torch.equal(gradcam(net, x, 'all', 'random'), first)
    assert abs(spearman(first, gradcam(net, x, 'all'))) < .9
    nudged = x.clone()
    nudged[0, 0, 0, 0] += 1e-3
    again = gradcam(net, nudged, 'all', 'random')
    assert rel(again[:1], first[:1]) > .1 and torch.equal(again[1:], first[1:])


def test_new_weights_make_a_new_map(x):
    "Adebayo's test in its mildest form; what knows nothing of the class is found out by it"
    net, other = make(), make()
    torch.manual_seed(9)
    other.fc.weight.data = torch.randn_like(other.fc.weight)
    for method in set(CONV) - {'eigencam', 'random', 'scorecam'}:
        a, b = (gradcam(n, x, 1, method) for n in (net, other))
        assert rel(a / a.abs().max(), b / b.abs().max()) > .05, method
    assert rel(gradcam(other, x, 'all'), gradcam(other, x, 'all', 'cam')) < 1e-6     # and it is the new rows' map
    for method in ('eigencam', 'random'): assert torch.equal(gradcam(net, x, 1, method), gradcam(other, x, 1, method))


# ---------------------------------------------------------------- numbers that are no numbers


extreme = st.sampled_from([0., 1e-38, 1e-20, 1., -1., 5., 1e10, -1e10, -1e-38])


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (1, 3, 2, 3), elements=extreme), arrays(np.float32, (1, 3, 2, 3), elements=extreme))
def test_rules_never_give_nan(f, g):
    f, g = torch.from_numpy(f), torch.from_numpy(g)
    for rule in (room.gradcam_map, room.hirescam_map, room.gradcampp_map, room.layercam_map, room.xgradcam_map):
        assert not rule(f, g).isnan().any(), rule.__name__
    assert room.eigencam_map(f).isfinite().all()
    for m in (f, room.gradcam_map(f, g)): assert normalised(m).isfinite().all()


def test_normalised_maps(x):
    maps = gradcam(make(), x, 'all')
    unit = normalised(maps)
    none = no_evidence(maps)
    assert torch.equal(unit.amax((2, 3)), (~none).float()) and (unit >= 0).all()
    for s in (1e-9, 1e-30, 1e9): assert torch.allclose(normalised(maps * s), unit, atol=1e-6)
    against = -maps.abs() - 1e-3
    assert no_evidence(against).all() and not normalised(against).any()
    assert not no_evidence(against.index_put((torch.tensor(0),) * 4, torch.tensor(.5)))[0, 0]
    assert no_evidence(torch.tensor([[-1., 1e-8]])) and not no_evidence(torch.tensor([[-1., 1e-3]]))
    for dtype in (torch.float16, torch.bfloat16):
        net = make().to(dtype)
        assert (normalised(gradcam(net, x.to(dtype), 'all')) - unit).abs().max() < .06


# ---------------------------------------------------------------- smoothing, fusing


class Symmetric(nn.Module):
    "Looks the same from all eight sides"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        w = torch.randn(6, 3, 3, 3)
        w = sum(room.turn(w, k) for k in range(8))
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)
        self.conv.weight.data = w / 8
    def forward(self, x): return self.fc(F.avg_pool2d(self.conv(x).relu(), 4).mean((2, 3)))


@pytest.mark.parametrize('method', ['gradcam', 'layercam', 'gradcam++', 'eigencam', 'ablationcam'])
def test_turns_come_back(x, method):
    net = Symmetric()
    plain = gradcam(net, x, 1, method)
    for over in ('flips', 'turns'): assert rel(smoothed(net, x, 1, method, over=over), plain) < 1e-5
    uneven = make()                                                    # no symmetry at all, and still
    for k in (0, 2, 4, 6):
        turned = smoothed(uneven, room.turn(x, k), 1, method)
        assert rel(turned, room.turn(smoothed(uneven, x, 1, method), k)) < 1e-4
    assert rel(gradcam(uneven, x.flip(3), 1, method), gradcam(uneven, x, 1, method).flip(2)) > .01


def test_smoothing_adds_up_and_keeps_the_class(x):
    net = make()
    sides = torch.stack([net(room.turn(x, k)).detach() for k in range(8)]).mean(0)
    maps = smoothed(net, x, 'all', over='turns')
    assert torch.allclose(maps.sum((2, 3)) + net.fc.bias.detach(), sides, atol=1e-5)
    top = net(x).argmax(1)
    assert torch.equal(smoothed(net, x, over='turns'), maps[range(3), top])
    assert torch.equal(smoothed(net, x, over='noise', noise=0., n=1), gradcam(net, x))
    noisy = smoothed(net, x, 'all', over='noise', n=3)
    assert not torch.equal(noisy, gradcam(net, x, 'all'))
    assert torch.equal(noisy, smoothed(net, x, 'all', over='noise', n=3))
    assert not torch.equal(noisy, smoothed(net, x, 'all', over='noise', n=3, seed=1))
    wide = torch.randn(1, 3, 24, 40)
    assert smoothed(net, wide).shape == (1, 6, 10)
    with torch.inference_mode(): assert torch.equal(smoothed(net, x.clone(), over='turns'), maps[range(3), top])


def test_fused_maps_sit_where_their_layers_are():
    "A single cell of a coarse map keeps its centre on the fine grid; a constant stays one; a tie of scales is undone"
    coarse, fine = torch.zeros(1, 4, 4), torch.zeros(1, 16, 16)
    coarse[0, 1, 2] = 5
    up = fuse([coarse, fine])[0] * 2
    rows, cols = (torch.arange(16.) + .5 for _ in 'xy')
    assert torch.allclose((up * rows[:, None]).sum() / up.sum(), torch.tensor(6.))       # 1.5 cells of 4
    assert torch.allclose((up * cols).sum() / up.sum(), torch.tensor(10.))
    assert torch.equal(fuse([torch.ones(1, 3, 5), torch.ones(1, 7, 9)]), torch.ones(1, 7, 9))
    net = make()
    x = torch.randn(2, 3, 33, 48)
    maps = gradcam(net, x, 'all', 'layercam', ['body.1', 'relu'])
    fused = fuse(maps)
    assert fused.shape == (2, 4, 17, 24) and fused.abs().amax() <= 1
    assert torch.allclose(fuse([maps[0] * 100, maps[1]]), fused, atol=1e-6)
    assert torch.allclose(fuse([maps[0][:, 1]])[0], maps[0][0, 1] / maps[0][0, 1].abs().max())


# ---------------------------------------------------------------- transformers


def test_legrad_is_the_gradient_of_the_attention():
    "Against attention that is written out and differentiated by autograd"
    vit = make_vit()
    x = torch.randn(2, 3, 32, 32)
    for block in vit.blocks: block.attn.fused_attn = False             # for the reference: softmax, then a product
    kept = []
    class Keep(nn.Module):
        def forward(self, a):
            a.retain_grad()
            kept.append(a)
            return a
    for block in vit.blocks: block.attn.attn_drop = Keep()
    tokens = []
    hooks = [b.register_forward_hook(lambda m, i, o: tokens.append(o)) for b in vit.blocks]
    y = vit(x)
    for h in hooks: h.remove()
    scores = [vit.head(vit.norm(z.mean(1)))[:, 3].sum() for z in tokens]
    grads = [torch.autograd.grad(s, a, retain_graph=True)[0] for s, a in zip(scores, kept, strict=True)]
    expected = torch.stack([g.relu().mean((1, 2))[:, 1:].view(2, 4, 4) for g in grads]).mean(0)
    plain = make_vit()
    assert torch.allclose(plain(x), y, atol=1e-5)
    assert rel(gradcam(plain, x, 3, 'legrad'), expected) < 1e-5
    assert rel(gradcam(plain, x, lambda o: 2 * o[:, 3], 'legrad'), 2 * expected) < 1e-5


def test_the_slope_of_the_attention_with_a_pencil():
    g, values, weight = torch.tensor([[[1.], [2]]]), torch.tensor([[[9., 9, 3], [9, 9, -1]]]), torch.tensor([[2.]])
    assert torch.equal(attention_slope(g, values, weight, 1), torch.tensor([[[[6., -2], [12, -4]]]]))


@pytest.mark.parametrize('kw', [
    {}, dict(class_token=False, global_pool='avg'), dict(reg_tokens=3), dict(init_values=.1), dict(img_size=(32, 48)),
    dict(qk_norm=True), dict(global_pool='avg')])
def test_legrad_on_the_transformers_of_timm(kw):
    vit = make_vit(**kw).train()
    x = torch.randn(3, 3, *vit.patch_embed.img_size)
    for p in vit.parameters(): p.requires_grad_(False)
    maps = gradcam(vit, x, 'all', 'legrad')
    assert maps.shape == (3, 4, *vit.patch_embed.grid_size) and maps.isfinite().all() and (maps >= 0).all()
    assert vit.training and not any(m._forward_hooks for m in vit.modules())
    assert torch.equal(gradcam(vit, x, 1, 'legrad'), maps[:, 1])
    assert rel(gradcam(vit, x[1:2], 'all', 'legrad'), maps[1:2]) < 1e-5
    assert torch.equal(gradcam(vit, x[[2, 0, 1]], 'all', 'legrad'), maps[[2, 0, 1]])
    with torch.inference_mode(): assert torch.equal(gradcam(vit, x.clone(), 'all', 'legrad'), maps)
    vit.head.weight.data.neg_()
    assert rel(gradcam(vit, x, 'all', 'legrad'), maps) > .05


@pytest.mark.parametrize('model', [
    lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3),
    lambda: make_vit(global_pool='map', class_token=False), lambda: make_vit(scale_attn_norm=True), make])
def test_legrad_refuses_the_rest(model):
    with pytest.raises(ValueError, match="method legrad is for timm's VisionTransformer .* take gradcam or hirescam"):
        gradcam(model(), torch.randn(1, 3, 32, 32), method='legrad')


def test_legrad_and_the_others_do_not_mix(x):
    vit = make_vit()
    with pytest.raises(ValueError, match="method='legrad' is for the vision transformers of timm"): gradcam(vit, x)
    with pytest.raises(ValueError, match='leave layer away'): gradcam(vit, x, method='legrad', layer='blocks.1')
    with pytest.raises(ValueError, match='recorded with record_attention'):
        room.class_maps(record(make(), x), method='legrad')
    assert record(make(), x).spots == [Spot('relu')]


# ---------------------------------------------------------------- rules of one's own


def test_a_rule_of_ones_own(x):
    net = make()
    assert torch.equal(gradcam(net, x, 1, lambda f, g: (g * f).sum(1)), gradcam(net, x, 1, 'hirescam'))
    with pytest.raises(ValueError, match='or a function of features and gradient'): gradcam(net, x, method=3)


def test_a_model_with_one_class_has_no_neighbours(x):
    net = make()
    net.fc = nn.Linear(6, 1)
    assert gradcam(net, x).shape == (3, 8, 8)
    with pytest.raises(ValueError, match='finercam compares classes'): gradcam(net, x, method='finercam')
