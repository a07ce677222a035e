"""What has no place on the pages of export and runtime: the bundle that ships, real backbones, files made to do harm, a
command line without torch, the slim requirements, and the stored figures."""
from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from skin_gradcam.abstention import calibrate_gate, fit_gate
from skin_gradcam.bundle import GATE, MODEL, ONNX, BundleError, add_files, default_bundle, load_bundle, write_bundle
from skin_gradcam.data import Manifest
from skin_gradcam.evaluation import softmax
from skin_gradcam.inference import Explainer, torch_backend
from skin_gradcam.lesions import CLASSES
from skin_gradcam.models import ModelError, Preprocessing, create_model, model_from_bundle
from skin_gradcam.onnx_export import OUTPUTS, ExportError, add_onnx, differences, export_onnx, rounded
from skin_gradcam.phantoms import draw_phantom, write_phantoms
from skin_gradcam.runtime import BackendError, open_session, runtime_backend
from skin_gradcam.steps import last_stages

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = """
import sys
for m in ('torch', 'torchvision', 'timm', 'fastai', 'onnx', 'onnxscript', 'IPython'): sys.modules[m] = None
from skin_gradcam.cli import main
main(sys.argv[1:])
"""


def noise(n: int) -> np.ndarray: return np.random.default_rng(n).standard_normal((n, 3, 224, 224), np.float32)


# ---------------------------------------------------------------- the bundle that ships


def test_the_shipped_file_is_the_shipped_network():
    "Same answers as torch, half the bytes of single precision, its own notes, no trace of the machine it was made on"
    b = default_bundle()
    data = b.read(ONNX)
    trained, served = torch_backend(b), runtime_backend(b, 1)
    for n in (1, 3):
        for want, got in zip(trained(noise(n)), served(noise(n)), strict=True): assert np.abs(want - got).max() < 1e-4
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    weights = sum(np.prod(t.dims) for t in proto.graph.initializer)
    half = sum(np.prod(t.dims) for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT16)
    assert len(data) < 2.2 * weights and half > .999 * weights
    notes = {p.key: p.value for p in proto.metadata_props}
    assert notes['weights_sha256'] == b.info.files[MODEL] and notes['licence'] == 'CC BY-NC 4.0'
    assert 'Tschandl' in notes['attribution'] and 'not a medical device' in notes['limits']
    assert not re.search(rb'/(root|home|work|tmp)/|site-packages|\.py\b', data)


def test_the_weights_in_the_file_are_those_of_the_bundle():
    "Bit for bit: every tensor of the bundle that the network uses is among the file's"
    b = default_bundle()
    have = {onnx.numpy_helper.to_array(t).tobytes() for t in onnx.load_from_string(b.read(ONNX)).graph.initializer}
    lost = [k for k, v in b.tensors().items() if v.dtype == np.float16 and v.tobytes() not in have]
    assert lost == []


def test_auto_takes_onnxruntime_and_agrees(one_thread):
    b = default_bundle()
    served, trained = Explainer.load(b), Explainer.load(b, backend='torch')
    assert type(served.backend).__name__ == 'Runtime'
    for i, c in enumerate(CLASSES):
        image = draw_phantom(c, seed=i).image
        a, z = served(image), trained(image)
        assert a.decision == z.decision and np.abs(a.p - z.p).max() < 1e-4 and np.abs(a.maps - z.maps).max() < 1e-4


@pytest.mark.data
def test_real_lesions_get_the_same_answer(real_data, one_thread):
    df = Manifest.load(ROOT / 'results/ham10000_roles.csv', real_data / 'ham10000').role('calibration').head(24)
    files, b = [real_data / 'ham10000' / p for p in df.path], default_bundle()
    both = [Explainer.load(b, backend=k).batch(files, keep_side=0) for k in ('runtime', 'torch')]
    for a, z in zip(*both, strict=True):
        assert a.decision == z.decision and np.abs(a.p - z.p).max() < 1e-4 and np.abs(a.maps - z.maps).max() < 1e-4


def test_probabilities_of_the_file_are_those_of_the_bundle():
    b = default_bundle()
    z, p, f = runtime_backend(b, 1).run(noise(2), ['logits', 'probabilities', 'features'])
    weight, bias = b.head()
    assert np.abs(p - softmax(z, b.info.temperature)).max() < 1e-6
    evidence = f[:, -weight.shape[1]:] @ weight.T  # behind the stages: the pooled maps, brought to length 1
    length = (evidence * (z - bias)).sum(1, keepdims=True) / (evidence**2).sum(1, keepdims=True)
    assert length.min() > 1 and np.abs(length * evidence + bias - z).max() < 1e-4


# ---------------------------------------------------------------- backbones


@pytest.mark.parametrize('arch', ['resnet18', 'mobilenetv2_100', 'convnext_atto'])
def test_backbones_export(arch, one_thread):
    "At 64 pixels, which takes a second or two each; batch of one and of three"
    torch.manual_seed(0)
    net = create_model(arch, pretrained=False).eval()
    net.preprocessing = Preprocessing((.5,) * 3, (.5,) * 3, 64)
    data = export_onnx(net)
    assert max(differences(data, rounded(net), size=64).values()) < 1e-4
    assert [o.name for o in onnx.load_from_string(data).graph.output] == list(OUTPUTS)


def test_a_gate_may_look_at_stages(tmp_path, one_thread):
    "Either backend gives statistics of the stages that the bundle names; a gate of them refuses noise, not phantoms"
    shipped = default_bundle()
    b = add_onnx(write_bundle(tmp_path / 'a', shipped.tensors(), replace(shipped.info, gate_stages=None, gate=None)))
    names = last_stages(model_from_bundle(b).body)
    assert names == [f'model.blocks.{i}' for i in (3, 4, 5, 6)]
    made = write_bundle(tmp_path / 'b', b.tensors(), replace(b.info, gate_stages=names, gate=None))
    old = add_files(made, {ONNX: b.read(ONNX)})
    said = "made for a gate that looks at no stage, the bundle's looks at model.blocks.3, .*; export it again"
    with pytest.raises(BackendError, match=said): runtime_backend(old, 1)
    stages = add_onnx(made)
    trained, served = torch_backend(stages), runtime_backend(stages, 1)
    want, got, before = trained(noise(3)), served(noise(3)), torch_backend(b)(noise(3))
    assert want[2].shape == got[2].shape == (3, 64 + 96 + 160 + 320 + 1280) and before[2].shape == (3, 1280)
    for x, y in zip(want, got, strict=True): assert np.abs(x - y).max() < 1e-4
    for x, y in zip(want[:2], before[:2], strict=True): assert np.array_equal(x, y)  # the answer does not depend on it
    alone = [trained(noise(1 + i % 3))[2] for i in range(12)]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(lambda i: trained(noise(1 + i % 3))[2], range(12)))
    for x, y in zip(alone, together, strict=True): assert np.array_equal(x, y)  # no thread sees another one's maps
    other = write_bundle(tmp_path / 'n', b.tensors(), replace(b.info, gate_stages=['blocks.9'], gate=None))
    with pytest.raises(ModelError, match='has no stage blocks.9'): model_from_bundle(other)

    pictures = [draw_phantom(CLASSES[i % 3], seed=i).picture for i in range(90)]
    seen: list[tuple[np.ndarray, ...]] = []

    def watched(x: np.ndarray) -> tuple[np.ndarray, ...]:
        seen.append(trained(x))
        return seen[-1]
    list(Explainer(stages, backend=watched).explain_many(pictures))
    logits, _, features = (np.concatenate(v) for v in zip(*seen, strict=True))
    gate = calibrate_gate(fit_gate('mahalanobis', features[:45], logits[:45], np.arange(45) % 3, rank=8),
                          features[45:], logits[45:], refused=.05)
    from safetensors.numpy import save
    ready = Explainer(add_files(stages, {GATE: save(gate.to_arrays())}))
    static = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    assert ready(static).decision == 'not_dermoscopic'
    assert sum(e.decision == 'not_dermoscopic' for e in ready.explain_many(pictures[45:])) <= 3


def test_a_network_that_is_not_finite_is_refused():
    net = create_model('test_resnet', pretrained=False).eval()
    with torch.no_grad(): net.classifier.weight[0, 0] = float('nan')
    with pytest.raises(ExportError, match='head.1.weight is not finite'): export_onnx(net)


# ---------------------------------------------------------------- files made to do harm


def test_a_flipped_bit_is_refused(tmp_path):
    b = default_bundle()
    for f in b.folder.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    data = bytearray(b.read(ONNX))
    for where in (0, len(data) // 2, len(data) - 1):
        data[where] ^= 1
        (tmp_path / ONNX).write_bytes(data)
        with pytest.raises(BundleError, match='model.onnx: is not the file that was written'): load_bundle(tmp_path)
        data[where] ^= 1


def test_torn_files_are_refused_in_a_sentence():
    "Past the hash too: whatever the loader of onnxruntime says becomes a `BackendError`"
    data, dice = default_bundle().read(ONNX), np.random.default_rng(0)
    torn = [b'', b'\0' * 100, data[:-1], data[:5_000], data[1:], *(dice.bytes(200) for _ in range(50)),
            *(data[:int(n)] for n in dice.integers(1, len(data), 10))]
    for part in torn:
        with pytest.raises(BackendError, match='cannot load it'): open_session(part, 1)


def test_a_file_cannot_read_other_files(tmp_path, monkeypatch):
    "ONNX may keep weights in a second file; one that names a file of yours is not read"
    (tmp_path / 'secret').write_bytes(np.arange(3, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    for place in (str(tmp_path / 'secret'), '../' + tmp_path.name + '/secret'):
        t = TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
        t.external_data.add(key='location', value=place)
        y = helper.make_tensor_value_info('y', TensorProto.FLOAT, [3])
        graph = helper.make_graph([helper.make_node('Identity', ['w'], ['y'])], 'g', [], [y], [t])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
        with pytest.raises(BackendError): open_session(model.SerializeToString(), 1)


# ---------------------------------------------------------------- without torch


def test_the_command_line_explains_without_torch(tmp_path):
    write_phantoms(tmp_path / 'drawn', per_class=1)
    command = [sys.executable, '-c', WITHOUT_TORCH, 'explain', 'drawn/HAM10000_images_part_1', '--out', 'out']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'out/maps.npz') as maps: assert len(maps.files) == 3
    assert (tmp_path / 'out/report.html').stat().st_size > 10_000


def test_the_slim_requirements_are_those_of_the_package():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    everything = ' '.join(v for k, v in ini['DEFAULT'].items() if k.endswith('requirements')).split()
    lines = [s for s in (ROOT / 'requirements-serve.txt').read_text().splitlines() if s and not s.startswith('#')]
    assert 'onnxruntime' in {re.split('[<>=]', s)[0] for s in lines}
    assert [s for s in lines if s not in everything] == []
    assert not {'torch', 'fastai', 'timm', 'torchvision'} & {re.split('[<>=]', s)[0] for s in lines}


# ---------------------------------------------------------------- stored figures


def stored() -> dict: return json.loads((ROOT / 'results/runtime_speed.json').read_text(encoding='utf-8'))


def test_the_figures_hold_their_marks():
    s = stored()
    assert s['summary']['limits'] == dict(ratio=.45, start_s=1.5, half=1e-3, single=1e-4, bytes_ratio=.55)
    assert all(s['summary']['found'][k] <= v for k, v in s['summary']['limits'].items()), s['summary']
    assert s['pictures'] == 'valid and calibration' and s['agreement']['half']['n'] == 330
    assert {(r['name'], r['batch']) for r in s['latency']} >= {(n, b) for n in ('torch', 'half') for b in (1, 8, 16)}
    assert s['int8']['n'] == 330 and s['int8']['balanced_accuracy'][0] > .7


@pytest.mark.alone
@pytest.mark.peer
def test_the_speed_is_measured_beside_torch(tmp_path):
    "What CI can repeat: both engines run, agree, and onnxruntime is the quicker one"
    command = [sys.executable, ROOT / 'benchmarks/runtime_speed.py', '--quick', '--out', tmp_path / 's.json']
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 's.json').read_text())['summary']['found']
    assert found['half'] < 1e-3 and found['single'] < 1e-4 and found['bytes_ratio'] < .55 and found['ratio'] < 1
