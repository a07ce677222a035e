"""The stored figures about what maps leave behind hold their marks, and the commands that measure them and their cost
run (reduced: one network and batch, a few hundred calls)."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS, PEERS = 'skin_gradcam gradcam', ('captum LayerGradCam', 'torchcam GradCAM', 'pytorch-grad-cam GradCAM')


def stored(name: str) -> dict: return json.loads((ROOT / 'results' / name).read_text(encoding='utf-8'))


def run(script: str, *args: str, out: Path) -> dict:
    command = [sys.executable, ROOT / 'benchmarks' / script, *args, '--out', out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def row(case: dict, name: str, classes: int) -> dict:
    return next(r for r in case['rows'] if (r['name'], r['classes']) == (name, classes))


def test_the_soak_left_nothing():
    s = stored('gradcam_soak.json')
    f = s['found']
    assert f['calls'] >= 20_000 and f['faults'] > 1_000 and all(s['held'].values()) and s['wrong'] == []
    assert abs(f['rss_growth']) <= 0.01 and f['hooks'] == f['calls_wrong'] == f['tensors_growth'] == 0
    methods = {k.split(',')[0] for k in s['made']}
    assert {'gradcam', 'hirescam', 'cam', 'gradcam++', 'layercam', 'xgradcam', 'eigencam', 'scorecam', 'ablationcam',
            'finercam', 'legrad', 'random'} <= methods


def test_the_stored_cost_holds_its_marks():
    "Maps of all three classes against the plain forward pass, two networks, three batches, the peers in the same run"
    s = stored('gradcam_cost.json')
    assert set(s['cases']) == {f'{n}/{b}' for n in ('resnet18', 'tf_efficientnet_lite0') for b in (1, 8, 32)}
    ours = [row(c, OURS, 3) for c in s['cases'].values()]
    assert max(r['ratio'] for r in ours) == s['summary']['worst_ratio'] <= s['summary']['limits']['ratio'] == 1.05
    assert max(r['kept_mib_per_image'] for r in ours) <= s['summary']['limits']['kept_mib_per_image'] == 0.1
    for case in s['cases'].values():
        for peer in PEERS: assert row(case, peer, 1)['ratio'] > row(case, 'closed form W.A/(hw)', 3)['ratio']


@pytest.mark.alone
@pytest.mark.peer
def test_the_cost_is_measured_beside_the_peers(tmp_path):
    "What CI can repeat: everything runs, our graph is a thousand times smaller, the dearest peer costs twice as much"
    case = run('gradcam_cost.py', '--quick', out=tmp_path / 's.json')['cases']['resnet18/1']
    ours = row(case, OURS, 3)
    assert ours['kept_mib_per_image'] <= 0.1 and ours['rounds'] >= 4
    for peer in PEERS: assert row(case, peer, 1)['kept_mib_per_image'] > 100 * ours['kept_mib_per_image']
    assert row(case, 'pytorch-grad-cam GradCAM', 3)['ratio'] > 2 * ours['ratio']


@pytest.mark.alone
def test_a_few_hundred_calls_leave_nothing(tmp_path):
    s = run('gradcam_soak.py', '--calls', '500', '--check', out=tmp_path / 's.json')
    assert s['found']['calls'] >= 500 and all(s['held'].values()), s['wrong']


def test_the_soak_notices_what_is_left(tmp_path):
    "The measure itself: a hook left behind, a tensor kept, other bits"
    code = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
import gradcam_soak as g
torch.set_num_threads(1)
s = g.Soak()
name = 'gradcam, all'
s.good(name); s.bad('Ctrl-C in the forward pass'); s.short_lived()
assert not s.wrong
a = s.look(0)
s.net[0].register_forward_hook(lambda *a: None); kept = torch.zeros(1)
b = s.look(1)
assert b['hooks'] == a['hooks'] + 1 and b['tensors'] == a['tensors'] + 1
s.first[name] = s.first[name] + 1e-7
s.good(name)
s.faults['fine'] = (ValueError, lambda: None)
s.bad('fine')
assert len(s.wrong) == 2, s.wrong
assert not g.same(g.state(s.net.eval(), s.vit), s.before)
'''
    done = subprocess.run([sys.executable, '-c', code, ROOT / 'benchmarks'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
