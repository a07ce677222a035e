"""Explaining an archive: equal to a serial run, exact when killed, whatever the archive is made of. The reduced form of
benchmarks/scale_speed.py, whose stored figures are held here too."""
from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from skin_gradcam.bundle import default_bundle
from skin_gradcam.inference import Explainer, list_pictures
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.runtime import runtime_backend

pa = pytest.importorskip('pyarrow', reason="pip install 'skin_gradcam[scale]'")
pytest.importorskip('ray', reason="pip install 'skin_gradcam[scale]'")
psutil = pytest.importorskip('psutil', reason='pip install psutil')

import pyarrow.parquet as pq  # noqa: E402

from skin_gradcam import scale  # noqa: E402
from skin_gradcam.files import locked  # noqa: E402
from skin_gradcam.scale import ArchiveError, Dataset, check_dataset, explain_archive, list_archive  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
N = 96
SLOW = """
import sys, time
from skin_gradcam import scale
class Worker(scale.ShardWorker):
    def __call__(self, batch):
        time.sleep(1.5)
        return super().__call__(batch)
scale.ShardWorker, Worker.__name__ = Worker, 'ShardWorker'
scale.explain_archive(sys.argv[1], sys.argv[2], actors=2, per_shard=16, bs=8, progress=False)
"""


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Phantoms, one of them under a second name, and two files that are no pictures"
    folder = tmp_path_factory.mktemp('archive') / 'pictures'
    (folder / 'sub').mkdir(parents=True)
    for i in range(N - 2):
        name = f'sub/{i:03d}.jpg' if i % 5 == 0 else f'{i:03d}.jpg'
        Image.fromarray(draw_phantom(CLASSES[i % 3], seed=i).image).save(folder / name)
    (folder / '007b.png').write_bytes(b'no picture')
    (folder / '050b.jpg').write_bytes((folder / '001.jpg').read_bytes()[:900])
    return folder


@pytest.fixture(scope='module')
def serial(pictures):
    "The answers of a plain Explainer in one thread, by id"
    from threadpoolctl import threadpool_limits
    files = [pictures / s.file for s in list_archive(pictures)]
    assert sorted(files) == sorted(list_pictures(pictures))
    b = default_bundle()
    with threadpool_limits(1):
        answers = list(Explainer(b, runtime_backend(b, threads=1)).explain_many(files, bs=8, keep_side=0))
    return {str(f.relative_to(pictures)): a for f, a in zip(files, answers)}


@pytest.fixture(scope='module')
def whole(pictures, tmp_path_factory):
    "A dataset that nobody disturbed"
    out = tmp_path_factory.mktemp('whole') / 'out'
    told = explain_archive(pictures, out, actors=2, per_shard=16, bs=8, progress=False)
    assert (told['rows'], told['new']) == (N, N)
    return out


def content(out: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.glob('rows-*.parquet'))}


def same_as(row: dict, a) -> None:
    "A row holds what the answer holds, to the last bit; maps as float16"
    assert row['decision'] == a.decision
    if a.decision == 'unreadable':
        assert row['error'] == a.reason and row['p_nv'] is None
        return
    assert [row[f'p_{c}'] for c in CLASSES] == a.p.tolist() and row['strangeness'] == a.strangeness
    assert [np.float32(row[f'logit_{c}']) for c in CLASSES] == list(a.logits)
    assert (row['width'], row['height'], row['notes']) == (a.geometry.width, a.geometry.height, list(a.notes))
    for c, m in zip(CLASSES, a.maps): assert np.array_equal(np.float32(row[f'map_{c}']), m.astype(np.float16).ravel())


def test_equal_to_a_serial_run_bit_for_bit(pictures, serial, whole):
    rows = Dataset(whole).read().to_pylist()
    assert [r['id'] for r in rows] == list(serial) and len(rows) == N
    for r in rows:
        same_as(r, serial[r['id']])
        assert r['sha256'] == hashlib.sha256((pictures / r['id']).read_bytes()).hexdigest()
    assert {r['id'] for r in rows if r['error']} == {'007b.png', '050b.jpg'}


def test_other_programs_read_it(whole):
    import duckdb
    import pandas as pd
    df = pd.read_parquet(whole)
    assert len(df) == N and df.id.is_unique and df.map_nv.dropna().map(len).eq(49).all()
    asked = f"select count(*), count(distinct id), sum(list_sum(map_mel)) from '{whole}/*.parquet'"
    n, ids, evidence = duckdb.sql(asked).fetchall()[0]
    assert (n, ids) == (N, N)
    assert evidence == pytest.approx(sum(map(sum, df.map_mel.dropna())), rel=1e-5)


def slow_run(pictures: Path, out: Path) -> subprocess.Popen:
    "A run that leaves time to kill it"
    env = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
    return subprocess.Popen([sys.executable, '-c', SLOW, str(pictures), str(out)], env=env, stderr=subprocess.PIPE)


def workers(pid: int) -> list:
    found = []
    for c in psutil.Process(pid).children(recursive=True):
        try: found += [c] if 'MapWorker' in ' '.join(c.cmdline()) else []
        except psutil.Error: pass
    return found


def wait_for(shards: int, out: Path, p: subprocess.Popen) -> None:
    "Until so many shards are there"
    until = time.monotonic() + 400
    while len(content(out)) < shards:
        assert p.poll() is None, p.stderr.read().decode()[-2000:]
        assert time.monotonic() < until, 'the run does not get on'
        time.sleep(.02)


def test_killed_driver_and_killed_worker(pictures, whole, tmp_path):
    "SIGKILL to the process that started the run; then to a worker of the run that goes on"
    out = tmp_path / 'out'
    p = slow_run(pictures, out)
    wait_for(1, out, p)
    below = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    psutil.wait_procs(below, timeout=30)
    kept = content(out)
    assert 0 < len(kept) < 6 and kept.items() <= content(whole).items()
    (out / '.rows-000005.parquet.abc.tmp').write_bytes(b'half')
    p = slow_run(pictures, out)
    wait_for(len(kept) + 1, out, p)
    if p.poll() is None and (found := workers(p.pid)): found[0].send_signal(signal.SIGKILL)
    assert p.wait() == 0, p.stderr.read().decode()[-2000:]
    assert content(out) == content(whole) and check_dataset(out)['rows'] == N
    assert sorted(f for f in os.listdir(out) if not f.startswith('rows-')) == ['_job.json', '_shards.jsonl.gz']


@pytest.fixture(scope='module')
def packed(pictures, tmp_path_factory):
    "The same pictures as tar shards and as a Parquet file with bytes"
    folder = tmp_path_factory.mktemp('packed')
    files = sorted(f for f in pictures.rglob('*') if f.is_file())
    for k in range(2):
        with tarfile.open(folder / f'{k}.tar', 'w') as t:
            for f in files[k:60:2]: t.add(f, f.name)
    rows = [dict(bytes=f.read_bytes(), path=f.name) for f in files[60:]] + [dict(bytes=None, path='lost')]
    pq.write_table(pa.table(dict(image=rows)), folder / 'rest.parquet', row_group_size=16)
    return folder, files


def test_tar_and_parquet_give_what_a_folder_gives(pictures, serial, packed, tmp_path):
    folder, files = packed
    told = explain_archive(folder, tmp_path / 'out', actors=2, per_shard=16, bs=8, progress=False)
    rows = Dataset(tmp_path / 'out').read().to_pylist()
    assert told['rows'] == len(rows) == len({r['id'] for r in rows}) == N + 1
    want = {hashlib.sha256(f.read_bytes()).hexdigest(): serial[str(f.relative_to(pictures))] for f in files}
    lost = [r for r in rows if r['sha256'] is None]
    assert [(r['id'], r['error']) for r in lost] == [(f'rest.parquet/{N - 60}', 'there are no bytes at its place')]
    for r in rows:
        if r['sha256'] is None: continue
        a = want[r['sha256']]
        assert r['decision'] == a.decision
        if a.decision != 'unreadable': assert np.allclose([r[f'p_{c}'] for c in CLASSES], a.p, atol=1e-5)


def test_an_address_that_is_no_disk(packed, tmp_path):
    "A zip file as a file system; what comes through it is what lies in it"
    import zipfile
    folder, files = packed
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        for f in files[:3]: z.write(f, f'in/{f.name}')
        z.write(folder / '0.tar', 'in/0.tar')
    url = f'zip://in::file://{tmp_path}/a.zip'
    found = list(list_archive(url))
    assert [s.id for s in found][-3:] == [f.name for f in files[:3]] and found[0].id.startswith('0.tar/')
    got = list(scale.read_sources(url, [found[0], *found[-3:]]))
    assert [d for d, _ in got[1:]] == [f.read_bytes() for f in files[:3]]
    assert got[0] == (files[0].read_bytes(), '')


def test_bad_archives_become_rows(tmp_path):
    src = tmp_path / 'src'
    src.mkdir()
    (src / 'a.tgz').write_bytes(b'\x1f\x8b')
    (src / 'b.parquet').write_bytes(b'PAR1')
    pq.write_table(pa.table(dict(x=[1])), src / 'c.parquet')
    (src / 'd.jpg').symlink_to(src / 'nowhere.jpg')
    with tarfile.open(src / 'e.tar', 'w') as t:
        info = tarfile.TarInfo('x.jpg')
        info.size = 4000
        t.addfile(info, io.BytesIO(b'x' * 4000))
    (src / 'e.tar').write_bytes((src / 'e.tar').read_bytes()[:2000])
    os.mkfifo(src / 'f.jpg')                                           # reading it would wait for ever
    found = list(list_archive(src))
    read = dict(zip([s.id for s in found], scale.read_sources(src, found, wait=0)))
    assert 'f.jpg' not in read and all(data is None and why for data, why in read.values())
    assert 'unpack it' in read['a.tgz'][1] and 'no column of bytes; there are x' in read['c.parquet'][1]


def test_refusals(pictures, whole, tmp_path):
    before, empty, foreign, flipped = content(whole), *(tmp_path / n for n in ('empty', 'foreign', 'flipped'))
    for f in (empty, foreign, flipped): f.mkdir()

    def refused(why: str, source: Path, out: Path, **kw: object) -> None:
        how = dict(per_shard=16, bs=8, progress=False)
        with pytest.raises(ArchiveError, match=why): explain_archive(source, out, **how | kw)
    refused('gate was True, is False', pictures, whole, gate=False)
    refused('bs was 8, is 16', pictures, whole, bs=16)
    with locked(whole / '_job.json'): refused('another process is writing there', pictures, whole)
    (foreign / 'rows-000000.parquet').write_bytes(b'')
    refused('rows without a job', pictures, foreign)
    refused('no such file', tmp_path / 'none', tmp_path / 'o')
    refused('no pictures there', empty, tmp_path / 'o')
    for f in whole.iterdir(): (flipped / f.name).write_bytes(f.read_bytes())
    data = bytearray((whole / '_shards.jsonl.gz').read_bytes())
    data[len(data) // 2] ^= 1
    (flipped / '_shards.jsonl.gz').write_bytes(data)
    refused('list of shards is damaged', pictures, flipped, as_listed=True)
    assert content(whole) == before


def test_workers_ask_for_a_share_of_a_gpu(pictures, tmp_path):
    """Ray is told of a GPU that is not there: two workers share it, and each sees that one alone; the network of this
    library then says what is missing. On a machine without one nothing is begun."""
    import ray

    def on_card(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert os.environ['CUDA_VISIBLE_DEVICES'] == '0'
        return np.zeros((len(x), 3), np.float32), np.zeros((len(x), 3, 7, 7), np.float32)
    how = dict(per_shard=16, bs=8, gate=False, progress=False)
    none, own, torch = (tmp_path / n for n in ('none', 'own', 'torch'))
    with pytest.raises(ArchiveError, match='PyTorch sees no GPU'): explain_archive(pictures, none, gpus=.5, **how)
    with pytest.raises(ValueError, match="gpus=1 with backend 'runtime'"):
        explain_archive(pictures, none, gpus=1, backend='runtime', **how)
    assert not none.exists()
    with pytest.raises(ArchiveError, match=r'a worker is to have 0\.5 GPUs, Ray sees 0'):
        explain_archive(pictures, none, gpus=.5, backend=on_card, **how)
    ray.init(address='local', num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
             object_store_memory=2**27, logging_level='ERROR')
    try:
        told = explain_archive(pictures, own, backend=on_card, gpus=.5, **how)
        assert (told['rows'], told['missing']) == (N, [])
        with pytest.raises(ArchiveError, match="device 'cuda': PyTorch cannot use it"):
            explain_archive(pictures, torch, gpus=1, address='auto', **how)
        assert json.loads((torch / '_job.json').read_text())['backend'] == 'torch-cuda'
        with pytest.raises(ArchiveError, match='backend was torch-cuda, is torch'):
            explain_archive(pictures, torch, backend='torch', **how)
    finally: ray.shutdown()


def test_a_flipped_bit_is_found(whole, tmp_path):
    "Pages carry checksums; the id's page comes first in the file"
    for f in whole.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    assert check_dataset(tmp_path)['damaged'] == []
    page = bytearray((whole / 'rows-000002.parquet').read_bytes())
    page[100] ^= 1
    (tmp_path / 'rows-000002.parquet').write_bytes(page)
    assert check_dataset(tmp_path)['damaged'] == [2]


def test_nothing_grows_with_the_archive(tmp_path):
    "What the listing holds at a time: 40 times the pictures, the same memory but for the packed list"
    import tracemalloc

    def peak(n: int) -> int:
        names = (f'part-{i // 1000}/ISIC_{i:07d}.jpg' for i in range(n))
        sources = (scale.Source(name, name, 90_000) for name in names)
        tracemalloc.start()
        packed, told = scale._list_lines(scale._packed(scale.cut_shards(sources)))
        used = tracemalloc.get_traced_memory()[1] - len(packed)
        tracemalloc.stop()
        assert told['pictures'] == n and told['shards'] == -(-n // 256)
        return used
    peak(10)
    assert peak(20_000) < 1.5 * peak(500) + 400_000


def test_the_stored_figures():
    f = json.loads((ROOT / 'results' / 'scale.json').read_text())
    assert f['size']['bytes_a_row'] <= f['limits']['bytes_a_row'] and f['size']['rows'] == 50_000
    assert not any(f[k]['quick'] for k in ('size', 'picture', 'speed', 'kills', 'memory'))
    assert f['kills']['kills'] == 10
    assert (f['kills']['lost'], f['kills']['doubled'], f['kills']['runs_that_differ']) == (0, 0, 0)
    assert all(f['speed'][k] >= f['limits'][k] for k in ('per_core', 'two_workers'))
    assert max(f['memory']['growth'].values()) <= f['limits']['growth']
    assert max(f['size']['query_s'].values()) < f['limits']['query_s']


def test_the_benchmark_can_be_run():
    bench = load_script('benchmarks/scale_speed.py')
    assert set(bench.PARTS) == {'speed', 'picture', 'memory', 'kills', 'size'} and bench.LIMITS['two_workers'] == 1.7
