"""Our maps against captum, torchcam and pytorch-grad-cam: equal where these are right, their faults shown where not.

The negative controls matter as much as the comparisons: they show that a test of this kind can fail, and why the room
does what it does. Random weights, small pictures, nothing is downloaded.
"""
from __future__ import annotations

import logging

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import vgg

from skin_gradcam.gradcam import closed_form, completeness_gap, find_layer, gradcam, gradient_is_flat, record

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings('ignore')]
captum_attr = pytest.importorskip('captum.attr', reason="captum is not installed: pip install -e '.[dev]'")
torchcam_methods = pytest.importorskip('torchcam.methods', reason="torchcam is not installed: pip install -e '.[dev]'")
pgc = pytest.importorskip('pytorch_grad_cam', reason="grad-cam is not installed: pip install -e '.[dev]'")
logging.getLogger('torchcam').setLevel(logging.ERROR)

CLASSES = [3, 0]
# where the pooling gets its input; whether the whole head is pooling and one linear layer; whether anything works in
# place behind the layer (then only captum is a peer)
NETS = dict(resnet18=('layer4', True, False), vgg11=('features', False, False), densenet121=('features', False, True),
            tf_efficientnet_lite0=('bn2', True, False), mobilenet_v3_small=('features', False, False))


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
    if name.startswith('tf_'): return timm.create_model(name, num_classes=7).eval()
    if name == 'vgg11': return small_vgg().eval()
    return torchvision.models.get_model(name, weights=None, num_classes=7).eval()


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def x() -> torch.Tensor: return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=NETS)
def case(request) -> tuple[str, nn.Module, str]: return request.param, make(request.param), NETS[request.param][0]


def rel(a: torch.Tensor, b: torch.Tensor) -> float: return float((a - b).abs().max() / b.abs().max())


def by_captum(model, x, layer, classes) -> torch.Tensor:
    method = captum_attr.LayerGradCam(model, model.get_submodule(layer))
    return method.attribute(x, torch.tensor(classes))[:, 0].detach()


def by_captum_hires(model, x, layer, classes) -> torch.Tensor:
    method = captum_attr.LayerGradientXActivation(model, model.get_submodule(layer))
    return method.attribute(x, torch.tensor(classes)).sum(1).detach()


def by_torchcam(model, x, layer, classes) -> torch.Tensor:
    with torchcam_methods.GradCAM(model, layer) as cam:
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
    assert flat == (name not in ('vgg11', 'densenet121'))
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
    assert gradcam(model, x, CLASSES, layer='features').shape == (2, 3, 3)
    assert by_captum(model, x, 'features', CLASSES).shape == (2, 3, 768)
    assert by_torchcam(model, x, 'features', CLASSES).shape == (2, 3, 768)
