"""Our maps against captum, torchcam and pytorch-grad-cam: equal where these are right, their faults shown where not.

The negative controls matter as much as the comparisons: they show that a test of this kind can fail, and why the room
does what it does. Random weights, small pictures, nothing is downloaded. What is tested where: test_gradcam.py says.
"""
from __future__ import annotations

import logging

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import vgg

from skin_gradcam.gradcam import (
    closed_form,
    completeness_gap,
    eigencam_map,
    find_layer,
    gradcam,
    gradient_is_flat,
    record,
    smoothed,
    xgradcam_map,
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings('ignore'), pytest.mark.usefixtures('one_thread')]
captum_attr = pytest.importorskip('captum.attr', reason="captum is not installed: pip install -e '.[dev]'")
torchcam_methods = pytest.importorskip('torchcam.methods', reason="torchcam is not installed: pip install -e '.[dev]'")
pgc = pytest.importorskip('pytorch_grad_cam', reason="grad-cam is not installed: pip install -e '.[dev]'")
logging.getLogger('torchcam').setLevel(logging.ERROR)

CLASSES = [3, 0]
# where the pooling gets its input; whether the whole head is pooling and one linear layer; whether anything works in
# place behind the layer (then only captum is a peer)
NETS = dict(resnet18=('layer4', True, False), vgg11=('features', False, False), densenet121=('features', False, True),
            tf_efficientnet_lite0=('bn2', True, False), mobilenet_v3_small=('features', False, False),
            resnet50=('layer4', True, False), efficientnet_b0=('bn2', True, False), swin_t=('permute', True, False),
            convnext_atto=('norm_pre', False, False), regnet_y_400mf=('trunk_output', True, False))
TIMM = {'tf_efficientnet_lite0', 'efficientnet_b0', 'convnext_atto'}


def small_vgg() -> nn.Module:
    "VGG-11 with a classifier of 1.6 instead of 120 million weights: flattened features, ReLU, dropout as ever"
    with torch.device('meta'): model = torchvision.models.vgg11(weights=None, init_weights=False)
    model.features = vgg.make_layers(vgg.cfgs['A'])
    for m in model.features:
        if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
    model.classifier = nn.Sequential(nn.Linear(25088, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 7))
    return model


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in TIMM: return timm.create_model(name, num_classes=7).eval()
    if name == 'vgg11': return small_vgg().eval()
    return torchvision.models.get_model(name, weights=None, num_classes=7).eval()


@pytest.fixture(scope='module')
def x() -> torch.Tensor: return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=NETS)
def case(request) -> tuple[str, nn.Module, str]: return request.param, make(request.param), NETS[request.param][0]


def rel(a: torch.Tensor, b: torch.Tensor) -> float: return float((a - b).abs().max() / b.abs().max())


def by_captum(model, x, layer, classes) -> torch.Tensor:
    method = captum_attr.LayerGradCam(model, model.get_submodule(layer))
    return method.attribute(x, torch.tensor(classes))[:, 0].detach()


def by_captum_hires(model, x, layer, classes) -> torch.Tensor:
    method = captum_attr.LayerGradientXActivation(model, model.get_submodule(layer))
    return method.attribute(x, torch.tensor(classes)).sum(1).detach()


def by_torchcam(model, x, layer, classes, method='GradCAM', **kw) -> torch.Tensor:
    with getattr(torchcam_methods, method)(model, layer, **kw) as cam:
        return cam(list(classes), model(x), normalized=False)[0].detach()


def by_pgc(model, x, layer, classes, method='GradCAM') -> torch.Tensor:
    "The raw map, before anything is cut off or stretched"
    target = model.get_submodule(layer)
    with getattr(pgc, method)(model, [target]) as cam:
        scores = cam.activations_and_grads(x)
        scores[range(len(x)), classes].sum().backward()
        kept = cam.activations_and_grads
        acts, grads = (t[0].detach().numpy() for t in (kept.activations, kept.gradients))
        maps = torch.from_numpy(cam.get_cam_image(x, target, None, acts, grads, False))
    model.zero_grad(set_to_none=True)
    return maps


# ---------------------------------------------------------------- oracles 1 to 5


def test_the_layer_is_found(case, x):
    _, model, layer = case
    assert find_layer(model, x)[0] == layer


def test_gradcam_equals_captum(case, x):
    _, model, layer = case
    assert rel(gradcam(model, x, CLASSES), by_captum(model, x, layer, CLASSES)) <= 1e-6
    assert rel(gradcam(model, x), by_captum(model, x, layer, model(x).argmax(1).tolist())) <= 1e-6


def test_gradcam_equals_torchcam_and_pgc_where_nothing_works_in_place(case, x):
    name, model, layer = case
    ours = gradcam(model, x, CLASSES)
    if NETS[name][2]:                                    # negative control: an in-place ReLU behind the layer
        assert rel(by_torchcam(model, x, layer, CLASSES), ours.relu()) > .1
        assert rel(by_pgc(model, x, layer, CLASSES), ours) > .1
    else:
        assert rel(ours.relu(), by_torchcam(model, x, layer, CLASSES)) <= 1e-6
        assert rel(ours, by_pgc(model, x, layer, CLASSES)) <= 5e-6


def test_hirescam_equals_captum_and_pgc(case, x):
    name, model, layer = case
    ours = gradcam(model, x, CLASSES, 'hirescam')
    assert rel(ours, by_captum_hires(model, x, layer, CLASSES)) <= 2e-6
    if not NETS[name][2]: assert rel(ours, by_pgc(model, x, layer, CLASSES, 'HiResCAM')) <= 5e-6


def test_pooling_and_a_linear_layer_make_them_one(case, x):
    name, model, _ = case
    rec, last = record(model, x), [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    maps = gradcam(model, x, 'all')
    flat = gradient_is_flat(rec)
    assert flat == (name not in ('vgg11', 'densenet121'))     # also with an MLP or a norm behind the pooling
    assert (rel(maps, gradcam(model, x, 'all', 'hirescam')) < 2e-6) == flat
    if NETS[name][1]:
        assert rel(maps, closed_form(last.weight.detach(), rec.features[0])) < 2e-6
        assert rel(maps, gradcam(model, x, 'all', 'cam')) < 2e-6
        gap = completeness_gap(maps, rec.logits.detach(), last.bias.detach())
        assert gap.abs().max() < 2e-6 * rec.logits.abs().max()
    else:
        with pytest.raises(ValueError, match='take hirescam'): gradcam(model, x, 'all', 'cam')


def test_all_classes_equal_single_ones(case, x):
    _, model, layer = case
    every = gradcam(model, x, 'all')
    assert every.shape[:2] == (2, 7)
    for c in (1, 6): assert rel(every[:, c], by_captum(model, x, layer, [c] * 2)) <= 1e-6


# ---------------------------------------------------------------- where the peers go wrong


def test_the_last_conv_of_vgg_is_a_trap(x):
    model, layer = make('vgg11'), 'features.18'          # ReLU(inplace=True) comes next
    assert isinstance(model.get_submodule(layer), nn.Conv2d)
    ours, captum = gradcam(model, x, CLASSES, layer=layer), by_captum(model, x, layer, CLASSES)
    assert rel(ours, captum) <= 1e-6
    assert rel(by_torchcam(model, x, layer, CLASSES), captum.relu()) > .3
    assert rel(by_pgc(model, x, layer, CLASSES), captum) > .3
    for m in model.modules():
        if isinstance(m, nn.ReLU): m.inplace = False     # with the trap taken away all four agree
    assert rel(gradcam(model, x, CLASSES, layer=layer), captum) <= 1e-6
    assert rel(by_torchcam(model, x, layer, CLASSES), captum.relu()) <= 1e-6
    assert rel(by_pgc(model, x, layer, CLASSES), captum) <= 5e-6


def test_the_trap_with_a_pencil():
    "The numbers of the page: a convolution gives (-8 2; 4 -2), a ReLU works in place, the logit is 4 times the mean"
    x = torch.tensor([[[[-8., 2], [4, -2]]]])
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(1, 1, bias=False))
    net[0].weight.data.fill_(1)
    net[4].weight.data.fill_(4)
    right = torch.tensor([[[-4., 1], [2, -1]]])
    assert torch.equal(gradcam(net, x, layer='0'), right) and torch.equal(by_captum(net, x, '0', [0]), right)
    assert torch.equal(by_pgc(net, x, '0', [0]), torch.tensor([[[0., 1], [2, 0]]]))       # of no layer
    assert torch.equal(by_torchcam(net, x, '0', [0]), torch.tensor([[[0., 2], [4, 0]]]))  # of the ReLU


def test_frozen_weights_and_no_grad(x):
    model, layer = make('resnet18'), 'layer4'
    expected = gradcam(model, x, CLASSES)
    for p in model.parameters(): p.requires_grad_(False)
    assert torch.equal(gradcam(model, x, CLASSES), expected)
    for peer in (by_torchcam, by_pgc):
        with pytest.raises((RuntimeError, AttributeError, TypeError, ValueError)): peer(model, x, layer, CLASSES)
    for p in model.parameters(): p.requires_grad_(True)
    with torch.inference_mode():
        inside = x.clone()
        assert torch.equal(gradcam(model, inside, CLASSES), expected)
        for peer in (by_captum, by_torchcam, by_pgc):
            with pytest.raises((RuntimeError, AttributeError, TypeError, ValueError, AssertionError)):
                peer(model, inside, layer, CLASSES)


def test_what_they_leave_behind(x):
    model, layer = make('resnet18').train(), 'layer4'
    mark = torch.ones_like(model.fc.weight)
    model.fc.weight.grad = mark
    statistics = model.bn1.running_mean.clone()
    gradcam(model, x, CLASSES)
    assert model.training and model.fc.weight.grad is mark and torch.equal(model.bn1.running_mean, statistics)
    by_captum(model, x, layer, CLASSES)
    assert not torch.equal(model.bn1.running_mean, statistics)           # the statistics have learned from the picture
    targets = [pgc.utils.model_targets.ClassifierOutputTarget(c) for c in CLASSES]
    with pgc.GradCAM(model, [model.layer4]) as cam: cam(x, targets)
    assert not model.training                                            # evaluation mode for good
    assert not torch.equal(model.fc.weight.grad, torch.ones_like(mark))  # the next optimiser step would apply this


def test_channels_last_is_no_map_of_768_columns(x):
    torch.manual_seed(0)
    model = torchvision.models.swin_t(weights=None, num_classes=7).eval()
    assert gradcam(model, x, CLASSES, layer='features').shape == (2, 2, 2)
    assert by_captum(model, x, 'features', CLASSES).shape == (2, 2, 768)
    assert by_torchcam(model, x, 'features', CLASSES).shape == (2, 2, 768)


# ---------------------------------------------------------------- the family


def gap_net(scale: float = 1., seed: int = 0) -> nn.Module:
    "No interpolation anywhere: the map is as large as the picture"
    torch.manual_seed(seed)
    body = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU()
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    net[-1].weight.data *= scale
    return net


@pytest.fixture(scope='module')
def small() -> torch.Tensor: return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(('ours', 'theirs'), [('layercam', 'LayerCAM'), ('xgradcam', 'XGradCAM')])
def test_layercam_and_xgradcam_equal_both_peers(case, x, ours, theirs):
    name, model, layer = case
    raw = gradcam(model, x, CLASSES, ours)
    by = by_pgc(model, x, layer, CLASSES, theirs), by_torchcam(model, x, layer, CLASSES, theirs)
    if NETS[name][2] and ours == 'xgradcam': assert rel(by[0], raw) > .05 and rel(by[1], raw.relu()) > .05   # in place
    elif ours == 'layercam' or not (record(model, x).features[0] < 0).any():
        assert rel(raw, by[0]) < 1e-5 and rel(raw.relu(), by[1]) < 1e-5
    total = gradcam(model, x, CLASSES, 'hirescam').sum((1, 2))
    if ours == 'xgradcam': assert ((raw.sum((1, 2)) - total).abs() / raw.abs().sum((1, 2))).max() < 1e-4


def test_xgradcam_of_a_channel_that_sums_to_nothing():
    "Their small constant makes its weight ten million; ours takes no part"
    f, g = torch.tensor([[[[1., -1]], [[2, 2]]]]), torch.tensor([[[[1., 0]], [[.5, .5]]]])
    assert torch.equal(xgradcam_map(f, g), torch.tensor([[[1., 1]]]))
    w = pgc.XGradCAM.get_cam_weights(None, None, None, None, f.numpy(), g.numpy())
    assert w[0, 0] > 1e6 and abs(w[0, 1] - .5) < 1e-6


def test_gradcampp_equals_pgc_where_its_constant_does_not_matter(small):
    "Its 1e-6 is added to squared gradients: where these are of the order of 1 it is harmless, of 1e-4 it is not"
    net = gap_net(144.)                                              # 12x12 cells: gradients of order 1
    ours, theirs = gradcam(net, small, CLASSES, 'gradcam++', '3'), by_pgc(net, small, '3', CLASSES, 'GradCAMPlusPlus')
    assert rel(theirs, ours) < 1e-4
    net = gap_net()                                                  # gradients of order 1/144
    ours, theirs = gradcam(net, small, CLASSES, 'gradcam++', '3'), by_pgc(net, small, '3', CLASSES, 'GradCAMPlusPlus')
    assert rel(theirs, ours) > 1e-3
    model, pictures = make('resnet18'), torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    ours = gradcam(model, pictures, CLASSES, 'gradcam++')
    assert rel(by_pgc(model, pictures, 'layer4', CLASSES, 'GradCAMPlusPlus'), ours) > .01


def test_gradcampp_of_torchcam_forgets_its_division(small):
    "It divides a copy of the coefficients, so their weights are sums of g^3 instead of g/(2+Sg)"
    net = gap_net(144.)
    f = record(net, small, '3').features[0]
    g = (net[-1].weight.detach()[CLASSES] / 144).relu()
    theirs = by_torchcam(net, small, '3', CLASSES, 'GradCAMpp')
    assert rel(theirs, torch.einsum('bk,bkhw->bhw', 144 * g**3, f)) < 1e-5
    assert rel(theirs, gradcam(net, small, CLASSES, 'gradcam++', '3')) > .1


def test_eigencam_equals_pgc_on_centred_features(small):
    "Which subtracts the mean of each channel, and leaves the sign to chance"
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
    f = record(gap_net(), small, '3').features[0]
    centred = f - f.mean((2, 3), keepdim=True)
    for ours, theirs in zip(eigencam_map(centred), torch.from_numpy(get_2d_projection(f.numpy())), strict=True):
        assert min(rel(ours, theirs), rel(-ours, theirs)) < 1e-4
    assert rel(eigencam_map(f), eigencam_map(centred)) > .1


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_scorecam_equals_both_peers_where_nothing_is_interpolated(small, seed):
    net = gap_net(8., seed)
    ours = gradcam(net, small, CLASSES, 'scorecam', '3')
    assert rel(ours, by_torchcam(net, small, '3', CLASSES, 'ScoreCAM')) < 1e-4
    targets = [pgc.utils.model_targets.ClassifierOutputTarget(c) for c in CLASSES]
    with pgc.ScoreCAM(net, [net[3]]) as cam:
        f = record(net, small, '3').features[0]
        weights = torch.from_numpy(cam.get_cam_weights(small, net[3], targets, f.numpy(), None))
    assert rel(ours, torch.einsum('bk,bkhw->bhw', weights, f)) < 1e-4


def test_ablationcam_equals_pgc_times_the_logit(small):
    "Whose division by the logit turns the map around where that is negative"
    net = gap_net(4.)
    net[-1].bias.data = torch.tensor([3., 0, 0, -3])
    classes = [0, 3]
    logits = net(small)[range(2), classes].detach()
    assert logits[0] > 0 > logits[1]
    targets = [pgc.utils.model_targets.ClassifierOutputTarget(c) for c in classes]
    with pgc.AblationCAM(net, [net[3]]) as cam:
        f = record(net, small, '3').features[0]
        weights = torch.from_numpy(cam.get_cam_weights(small, net[3], targets, f.numpy(), None))
    ours = gradcam(net, small, classes, 'ablationcam', '3')
    assert rel(ours, torch.einsum('bk,bkhw->bhw', weights * logits[:, None], f)) < 1e-4


def test_finercam_equals_torchcam(case, x):
    name, model, layer = case
    with torchcam_methods.FinerCAM(model, layer) as cam: theirs = cam(CLASSES, model(x), normalized=False)[0].detach()
    ours = gradcam(model, x, CLASSES, 'finercam').relu()
    assert rel(theirs, ours) > .05 if NETS[name][2] else rel(ours, theirs) < 1e-5


def test_legrad_equals_torchcam():
    "The same transformer in both libraries"
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=4).eval()
    for p in theirs.parameters(): p.data = torch.randn_like(p) * .2
    small = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, mlp_ratio=2, num_classes=4)
    ours = VisionTransformer(**small).eval()
    state = {'cls_token': theirs.class_token, 'pos_embed': theirs.encoder.pos_embedding}
    for a, b in {'conv_proj': 'patch_embed.proj', 'encoder.ln': 'norm', 'heads.head': 'head'}.items():
        for kind in ('weight', 'bias'): state[f'{b}.{kind}'] = theirs.get_parameter(f'{a}.{kind}')
    pairs = {'ln_1.': 'norm1.', 'ln_2.': 'norm2.', 'self_attention.in_proj_': 'attn.qkv.', 'mlp.0.': 'mlp.fc1.',
             'self_attention.out_proj.': 'attn.proj.', 'mlp.3.': 'mlp.fc2.'}
    for i in range(3):
        for a, b in pairs.items():
            for kind in ('weight', 'bias'):
                state[f'blocks.{i}.{b}{kind}'] = theirs.get_parameter(f'encoder.layers.encoder_layer_{i}.{a}{kind}')
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert rel(ours(x).detach(), theirs(x).detach()) < 1e-5
    with torchcam_methods.LeGrad(theirs, list(theirs.encoder.layers)) as cam:
        expected = cam(CLASSES, theirs(x), normalized=False)[0].detach()
    assert rel(gradcam(ours, x, CLASSES, 'legrad'), expected) < 1e-5


def test_smoothed_flips_equal_the_mean_of_captums_maps(x):
    model = make('resnet18')
    maps = [by_captum(model, x.flip(d), 'layer4', CLASSES).flip([i - 1 for i in d]) for d in ([], [2], [3], [2, 3])]
    assert rel(smoothed(model, x, CLASSES), torch.stack(maps).mean(0)) < 1e-5
