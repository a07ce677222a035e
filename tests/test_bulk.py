"""Bulk runs that are killed, that meet a full disk, and that grow: nothing lost, nothing doubled. The
reduced form of benchmarks/bulk_speed.py, whose stored figures are held here too."""
from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from disks import disk_of_1_mib
from PIL import Image

from skin_gradcam import bulk
from skin_gradcam.bulk import BulkError, Store, bulk_job, explain_bulk, read_shard
from skin_gradcam.bundle import default_bundle
from skin_gradcam.inference import Explainer, NameKeeper, add_map, write_predictions
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom

ROOT = Path(__file__).resolve().parent.parent
N = 24
SLOW = """
import sys, time
sys.path.insert(0, sys.argv[3])
from bulk_speed import stand_in
from skin_gradcam.bulk import explain_bulk
from skin_gradcam.bundle import default_bundle
from skin_gradcam.inference import Explainer
def backend(x):
    time.sleep(.05)
    return stand_in(x)
print('ready', flush=True)
ex = Explainer(default_bundle(), backend)
explain_bulk(ex, sys.argv[1], sys.argv[2], overlays=2, bs=2, per_shard=2, progress=False)
"""


backend = load_script('benchmarks/bulk_speed.py').stand_in


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bulk') / 'pictures'
    folder.mkdir()
    for i in range(N):
        Image.fromarray(draw_phantom(CLASSES[i % 3], seed=i).image).save(folder / f'{i:02d}.jpg')
    (folder / '07b.png').write_bytes(b'no picture')
    return folder


@pytest.fixture(scope='module')
def straight(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp('straight')
    write_predictions(Explainer(default_bundle(), backend).explain_many(pictures), out, overlays=2)
    return out


def slow_run(pictures: Path, out: Path) -> subprocess.Popen:
    "A run that leaves time to kill it, once its imports are done"
    command = [sys.executable, '-c', SLOW, str(pictures), str(out), str(ROOT / 'benchmarks')]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=out.parent, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert p.stdout.readline() == b'ready\n'
    return p


def same(a: Path, b: Path) -> bool:
    "Equal tables, equal maps, the same overlays"
    with np.load(a / 'maps.npz') as x, np.load(b / 'maps.npz') as y:
        maps = x.files == y.files and all(np.array_equal(x[n], y[n]) for n in x.files)
    tables = (a / 'predictions.csv').read_bytes() == (b / 'predictions.csv').read_bytes()
    return maps and tables and sorted(os.listdir(a / 'overlays')) == sorted(os.listdir(b / 'overlays'))


def test_killed_again_and_again(pictures, straight, tmp_path):
    "SIGKILL after some shards, then a run to the end: the files of a run that nobody disturbed"
    out, grown = tmp_path / 'out', [0]
    for shards in (1, 3, 6):
        p = slow_run(pictures, out)
        while len(list((out / '.answers').glob('[0-9]*.npz'))) < shards: time.sleep(.005)
        time.sleep(.03)
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
        assert not (out / 'predictions.csv').exists()
        shards = sorted((out / '.answers').glob('[0-9]*.npz')) if out.exists() else []
        keys = [k for f in shards for k, _ in read_shard(f)]
        assert len(keys) == len(set(keys)) and len(keys) >= grown[-1]
        grown.append(len(keys))
    assert 0 < grown[-1] < N
    assert slow_run(pictures, out).wait() == 0
    assert same(out, straight)
    assert not [f for f in os.listdir(out) if f.startswith('.')]


def test_full_disk_keeps_what_was_written(pictures, straight, tmp_path, monkeypatch):
    "A disk of 1 MiB is full after some shards of padded maps; with room again the run goes on"
    def pretend():
        def full(*a, **k): raise OSError(28, 'No space left on device')
        monkeypatch.setattr(bulk, 'write_atomic', full)
    wide = lambda x: (backend(x)[0], np.repeat(np.repeat(backend(x)[1], 16, 2), 16, 3))  # noqa: E731
    explainer = Explainer(default_bundle(), wide)
    with disk_of_1_mib(tmp_path / 'disk', pretend):
        with pytest.raises(OSError, match='No space left'):
            explain_bulk(explainer, pictures, tmp_path / 'disk' / 'out', bs=2, per_shard=2, progress=False)
        place = tmp_path / 'disk' / 'out' / '.answers'
        kept = [k for f in sorted(place.glob('[0-9]*.npz')) for k, _ in read_shard(f)]
        assert not (tmp_path / 'disk' / 'out' / 'predictions.csv').exists()
        if os.path.ismount(tmp_path / 'disk'):
            assert 0 < len(kept) < N
            store = Store(place, bulk_job(explainer))
            assert len(store) == len(kept) and all(k in store for k in kept)


def test_a_changed_picture_is_explained_again(pictures, tmp_path):
    few = tmp_path / 'few'
    few.mkdir()
    for i in range(4): (few / f'{i}.jpg').write_bytes((pictures / f'{i:02d}.jpg').read_bytes())
    asked = []

    def stops(x):
        if len(asked) == 3: raise RuntimeError('stop')
        asked.append(len(x))
        return backend(x)
    with pytest.raises(RuntimeError, match='stop'):
        explain_bulk(Explainer(default_bundle(), stops), few, tmp_path / 'out', bs=1, per_shard=1, progress=False)
    (few / '1.jpg').write_bytes((pictures / '23.jpg').read_bytes())
    (few / '2.jpg').unlink()
    asked.clear()
    table = explain_bulk(Explainer(default_bundle(), stops), few, tmp_path / 'out', bs=1, per_shard=1, progress=False)
    assert len(asked) == 2                                              # the changed one and the one that was left
    with open(table, newline='') as f: rows = {r['image']: r for r in csv.DictReader(f)}
    assert list(rows) == ['0.jpg', '1.jpg', '3.jpg']
    alone = Explainer(default_bundle(), backend)(few / '1.jpg')
    assert float(rows['1.jpg']['p_mel']) == pytest.approx(alone.probabilities['mel'], abs=1e-6)


def test_two_at_once(pictures, tmp_path):
    p = slow_run(pictures, tmp_path / 'out')
    while not (tmp_path / 'out' / '.answers.lock').exists(): time.sleep(.005)
    with pytest.raises(BulkError, match='another process is writing there'):
        explain_bulk(Explainer(default_bundle(), backend), pictures, tmp_path / 'out', progress=False)
    assert p.wait() == 0


@pytest.mark.alone
def test_the_bulk_benchmark_runs_and_its_figures_hold(tmp_path):
    subprocess.run([sys.executable, ROOT / 'benchmarks' / 'bulk_speed.py', '--quick', '--out', tmp_path / 'b.json'],
                   check=True, capture_output=True)
    quick = json.loads((tmp_path / 'b.json').read_text())
    assert quick['kills']['wrong'] == 0 and quick['kills']['kills'] >= 2 and quick['speed']['ratio'] > .4
    s = json.loads((ROOT / 'results' / 'bulk.json').read_text())
    assert s['speed']['ratio'] >= .85
    m = s['memory']     # of each picture some 200 bytes stay: its entry in the directory of maps.npz, and a few hashes
    assert m['pictures'] == [1000, 20000] and m['growth'] <= .05
    assert s['kills'] == s['kills'] | dict(kills=20, lost=0, doubled=0, wrong=0)


def test_what_stays_in_memory_of_each_picture(tmp_path):
    "Listing, names, store and maps of 6,000 pictures: less than 500 bytes of each, most of them in the zip file's list"
    folder, explainer = tmp_path / 'in', Explainer(default_bundle(), backend)
    folder.mkdir()
    for i in range(6000): open(f'{folder}/{i:05d}.jpg', 'x').close()
    store = Store(tmp_path / 'store', bulk_job(explainer))
    e, names = explainer(draw_phantom('nv', seed=1).picture), NameKeeper()
    archive = zipfile.ZipFile(tmp_path / 'm', 'w')
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    n, known = bulk._list_sources(store, folder)
    for i, (name, _, key) in enumerate(bulk._listed(store)):
        add_map(archive, names(name), e.maps)
        if i < 640: store.add(key, e)
        elif i % 64 == 0: store.note(i, [key] * 64)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    archive.close()
    assert (n, known, len(store.hashes)) == (6000, 0, 6016)
    assert (after - before) / n < 500
    with np.load(tmp_path / 'm') as npz: assert len(npz.files) == 6000 and np.array_equal(npz['05999.jpg'], e.maps)


def test_a_run_with_other_choices_is_not_gone_on_with(pictures, tmp_path):
    "Views and gate change the numbers, a prior does not"
    few = tmp_path / 'few'
    few.mkdir()
    for i in range(3): (few / f'{i}.jpg').write_bytes((pictures / f'{i:02d}.jpg').read_bytes())

    def stops(x): raise RuntimeError('stop')
    with pytest.raises(RuntimeError):
        explain_bulk(Explainer(default_bundle(), stops), few, tmp_path / 'out', progress=False)
    for other in (dict(views=8), dict(gate=False)):
        with pytest.raises(BulkError, match='another model, version, number of views or gate'):
            explain_bulk(Explainer(default_bundle(), backend, **other), few, tmp_path / 'out', progress=False)
    prior = Explainer(default_bundle(), backend, prior=(.8, .1, .1))
    table = explain_bulk(prior, few, tmp_path / 'out', progress=False)
    straight = write_predictions(prior.explain_many(few), tmp_path / 'straight')
    assert table.read_bytes() == straight.read_bytes()


def test_the_gate_and_the_notes_go_through_the_store(tmp_path):
    "A drawing and noise through the model that ships: the table of a bulk run is that of a direct one"
    few, ex = tmp_path / 'few', Explainer.load()
    few.mkdir()
    draw_phantom('mel', seed=3).picture.save(few / 'drawing.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(few / 'noise.png')
    draw_phantom('nv', seed=1).picture.resize((30, 22)).resize((300, 225)).save(few / 'soft.png')
    table = explain_bulk(ex, few, tmp_path / 'out', progress=False)
    straight = write_predictions(ex.explain_many(few, bs=16), tmp_path / 'straight')
    assert table.read_bytes() == straight.read_bytes()
    with open(table, newline='') as f: rows = {r['image']: r for r in csv.DictReader(f)}
    assert rows['noise.png']['decision'] == 'not_dermoscopic' and 'blurred' in rows['soft.png']['notes']
