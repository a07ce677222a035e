"Accidents that a bundle must survive or refuse: flipped bits, kills, full disks, odd files, fuzzed descriptions"
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skin_gradcam import bundle as B
from skin_gradcam.bundle import BundleError, BundleInfo, load_bundle, seal_json, write_bundle

INFO = BundleInfo(name='t', arch='resnet18', classes=['nv', 'bkl', 'mel'], size=64, mean=[.5] * 3, std=[.5] * 3,
                  manifest_hash='0' * 64, seen_lesions=dict(train=['a'], valid=[], calibration=[]))
WEIGHTS = {'head.1.weight': np.arange(24, dtype=np.float16).reshape(3, 8), 'head.1.bias': np.zeros(3, np.float16)}


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / 'b', WEIGHTS, INFO, {'CARD.md': b'card'})


def leftovers(folder):
    return [f.name for f in folder.iterdir() if f.name.startswith('.')]


def test_import_needs_no_torch():
    code = ("import sys, skin_gradcam.bundle\n"
            "bad = [m for m in ('torch', 'fastai', 'timm', 'matplotlib', 'sklearn') if m in sys.modules]\n"
            "assert not bad, bad")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_every_flipped_bit_is_found(bundle):
    rng = random.Random(0)
    for file in sorted(bundle.folder.iterdir()):
        good = file.read_bytes()
        bits = range(8 * len(good)) if len(good) < 100 else rng.sample(range(8 * len(good)), 400)
        for bit in bits:
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            with pytest.raises(BundleError): load_bundle(bundle.folder)
        file.write_bytes(good)
    assert load_bundle(bundle.folder) == bundle


def test_every_truncation_is_found(bundle):
    for file in sorted(bundle.folder.iterdir()):
        good = file.read_bytes()
        for n in range(0, len(good), max(1, len(good) // 60)):
            file.write_bytes(good[:n])
            with pytest.raises(BundleError, match=file.name): load_bundle(bundle.folder)
        file.write_bytes(good)


def test_a_file_swapped_after_loading_is_found(bundle):
    (bundle.folder / B.MODEL).write_bytes(B.save_tensors({k: v + 1 for k, v in WEIGHTS.items()}))
    with pytest.raises(BundleError, match='SHA-256 differs'): bundle.tensors()


def test_resealed_weights_that_are_no_numbers(bundle):
    for data, said in ((b'not safetensors', 'no readable safetensors'), (b'', 'no readable safetensors'),
                       (B.save_tensors({'w': np.array([np.nan])}), 'NaN')):
        (bundle.folder / B.MODEL).write_bytes(data)
        files = {**bundle.info.files, B.MODEL: B.hashlib.sha256(data).hexdigest()}
        (bundle.folder / B.INFO).write_bytes(seal_json(replace(bundle.info, files=files).to_dict()))
        with pytest.raises(BundleError, match=said): load_bundle(bundle.folder).tensors()


def test_odd_files_neither_hang_nor_eat_memory(bundle):
    model, info = bundle.folder / B.MODEL, bundle.folder / B.INFO
    model.unlink()
    os.mkfifo(model)
    with pytest.raises(BundleError, match='no regular file'): load_bundle(bundle.folder)
    with open(info, 'r+b') as f: f.truncate(2**34)  # sparse
    with pytest.raises(BundleError, match='larger than'): load_bundle(bundle.folder)
    info.write_bytes(b'{"a":' * 200_000)
    with pytest.raises(BundleError, match='bundle.json'): load_bundle(bundle.folder)
    with pytest.raises(BundleError, match='no folder'): load_bundle(info)
    with pytest.raises(BundleError, match='no folder'): load_bundle(bundle.folder / 'nowhere')


FUZZ = settings(max_examples=200, deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(st.none() | st.booleans() | st.integers(-10**17, 10**17) | st.text(max_size=8)
                           | st.floats(allow_nan=False, allow_infinity=False),
                           lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=3))


@settings(FUZZ)
@given(field=st.sampled_from(INFO.keys()), value=json_values)
def test_fuzzed_fields_are_accepted_or_refused(bundle, field, value):
    "A sealed description with one field replaced by anything: a `BundleError` or a bundle, no other exception"
    (bundle.folder / B.INFO).write_bytes(seal_json({**bundle.info.to_dict(), field: value}))
    try: load_bundle(bundle.folder)
    except BundleError as e: assert 'b' in str(e) and ';' in str(e)


@settings(FUZZ)
@given(data=st.binary(max_size=200))
def test_fuzzed_descriptions_are_refused(bundle, data):
    (bundle.folder / B.INFO).write_bytes(data)
    with pytest.raises(BundleError, match='bundle.json'): load_bundle(bundle.folder)


CHILD = """
import sys
import numpy as np
from dataclasses import replace
from skin_gradcam.bundle import BundleError, BundleInfo, write_bundle
INFO = BundleInfo(name='t', arch='resnet18', classes=['nv', 'bkl', 'mel'], size=64, mean=[.5] * 3, std=[.5] * 3,
                  manifest_hash='0' * 64, seen_lesions=dict(train=['a'], valid=[], calibration=[]))
"""
LIMIT = CHILD + """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: write_bundle(sys.argv[1], {'w': np.zeros(1_000_000, np.float16)}, replace(INFO, name='new'))
except BundleError as e: print(e)
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='needs setrlimit')
def test_a_write_that_the_system_refuses_leaves_the_old_bundle(bundle):
    "The system stops the file at 100 kB, as a full disk would"
    out = subprocess.run([sys.executable, '-c', LIMIT, str(bundle.folder)], check=True, capture_output=True, text=True)
    assert 'untouched' in out.stdout
    assert load_bundle(bundle.folder) == bundle
    assert not leftovers(bundle.folder.parent)


@pytest.mark.parametrize('step', ['replace', 'rename', 'fsync', 'mkdir'])
def test_each_failing_step_leaves_the_old_bundle(bundle, monkeypatch, step):
    where = B.Path if step == 'mkdir' else B.os
    def fail(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(where, step, fail)
    with pytest.raises(BundleError, match='No space left'):
        write_bundle(bundle.folder, WEIGHTS, replace(INFO, name='new'))
    monkeypatch.undo()
    assert load_bundle(bundle.folder) == bundle
    assert not leftovers(bundle.folder.parent)


def test_an_interrupt_leaves_the_old_bundle(bundle, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(B.os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt): write_bundle(bundle.folder, WEIGHTS, replace(INFO, name='new'))
    monkeypatch.undo()
    assert load_bundle(bundle.folder) == bundle
    assert not leftovers(bundle.folder.parent)


WRITER = CHILD + """
print('go', flush=True)
for k in range(10**6): write_bundle(sys.argv[1], {'w': np.zeros(9)}, replace(INFO, name=f'n{k}'))
"""


def test_a_kill_at_any_moment_leaves_a_whole_bundle(bundle):
    "The old or the new one; between two renames it lies beside, and the message says where"
    rng = random.Random(0)
    for _ in range(4):
        p = subprocess.Popen([sys.executable, '-c', WRITER, str(bundle.folder)], stdout=subprocess.PIPE)
        assert p.stdout.readline() == b'go\n'
        time.sleep(rng.random() / 5)
        p.send_signal(signal.SIGKILL)
        p.wait()
        p.stdout.close()
        try: load_bundle(bundle.folder)
        except BundleError as e:
            assert f'rename .{bundle.folder.name}.previous to {bundle.folder.name}' in str(e)
            os.rename(B._previous(bundle.folder), bundle.folder)
            load_bundle(bundle.folder)
    write_bundle(bundle.folder, WEIGHTS, INFO)
    assert not B._previous(bundle.folder).exists()


def test_two_writers_leave_a_whole_bundle(bundle):
    refused = []

    def write(name):
        for k in range(15):
            try: write_bundle(bundle.folder, WEIGHTS, replace(INFO, name=f'{name}{k}'))
            except BaseException as e: refused.append(e)
    both = [threading.Thread(target=write, args=(n,)) for n in 'xy']
    for t in both: t.start()
    for t in both: t.join()
    assert {type(e) for e in refused} <= {BundleError}, refused
    write_bundle(bundle.folder, WEIGHTS, INFO)
    assert load_bundle(bundle.folder).name == 't'


def test_a_folder_that_goes_while_it_is_read_is_refused(bundle, monkeypatch):
    "Another process may be replacing it"
    def gone(self): raise FileNotFoundError(2, 'No such file or directory', str(self))
    monkeypatch.setattr(B.Path, 'iterdir', gone)
    with pytest.raises(BundleError, match='if another process is replacing it, try again'): load_bundle(bundle.folder)


def test_a_copied_or_moved_bundle_is_the_same(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / 'copy')
    assert load_bundle(tmp_path / 'copy').hash == bundle.hash
    os.symlink(bundle.folder, tmp_path / 'link')
    assert load_bundle(tmp_path / 'link').hash == bundle.hash


def test_the_bundle_that_ships():
    "It is whole, and it says what a reader must know; a checkout without one says so"
    try: b = B.default_bundle()
    except BundleError as e:
        assert 'comes without a model here' in str(e)
        return
    assert tuple(b.classes) == B.CLASSES and b.info.licence and b.info.attribution and b.info.manifest_hash
    assert all(b.info.seen_lesions[r] for r in B.SEEN_ROLES)
    assert sum((b.folder / n).stat().st_size for n in b.info.files) < 30 * 2**20
    weight, bias = b.head()
    assert weight.shape[0] == 3 and np.isfinite(weight).all() and bias.shape == (3,)
