"""What can go wrong with a cache file: full disks, killed and competing processes, damage, other versions."""
from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from disks import disk_of_1_mib
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skin_gradcam import cache as C
from skin_gradcam.cache import CacheError, Squares, cached_squares, hash_pictures, list_squares, prune_squares
from skin_gradcam.files import locked
from skin_gradcam.pictures import PictureError, open_picture, squash

N, SIZE = 12, 64


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(N): Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root/f'p{i:02}.png')
    return sorted(root.glob('*.png'))


@pytest.fixture(scope='module')
def ids(paths): return hash_pictures(paths)


@pytest.fixture(scope='module')
def whole(paths, tmp_path_factory):
    "An undisturbed cache"
    s = cached_squares(paths, SIZE, tmp_path_factory.mktemp('whole'))
    return Whole(s.path.name, s.path.read_bytes())


@dataclass
class Whole:
    name: str
    data: bytes = field(repr=False)


def left(folder): return sorted(p.name for p in Path(folder).iterdir() if p.suffix != '.lock')


def test_the_pixels_are_those_of_the_decoder(paths, ids, tmp_path):
    s = cached_squares(paths, SIZE, tmp_path)
    for k, p in zip(s.positions(ids), paths, strict=True):
        assert np.array_equal(s.pixels[k], np.asarray(squash(open_picture(p), SIZE)[0]).transpose(2, 0, 1))


def test_same_file_twice_is_one_square(paths, tmp_path):
    s = cached_squares([paths[0], paths[1], paths[0]], 16, tmp_path)
    assert len(s) == 2


# ---------------------------------------------------------------- full disks


def full_disk(monkeypatch):
    "An `os` that behaves like a disk of 1 MiB, where none can be mounted"
    def reserve(fd, start, n):
        if start + n > 2**20: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return lambda: monkeypatch.setattr(C.os, 'posix_fallocate', reserve, raising=False)


def test_a_full_disk_is_refused_at_once(paths, tmp_path, monkeypatch):
    "Before the first picture is decoded, and with what is needed; older caches stay, and nothing new is left"
    opened, real = [], C.decode_checked
    monkeypatch.setattr(C, 'decode_checked', lambda *a: opened.append(a) or real(*a))
    with disk_of_1_mib(tmp_path/'disk', full_disk(monkeypatch)):
        small = cached_squares(paths, 32, tmp_path/'disk')
        bytes_of_small = small.pixels.tobytes()
        opened.clear()
        with pytest.raises(OSError, match='needs 2.36 MB and the disk is full; free some space, or name another') as e:
            cached_squares(paths, 256, tmp_path/'disk')
        assert e.value.errno == errno.ENOSPC and str(tmp_path/'disk') in str(e.value) and not opened
        assert left(tmp_path/'disk') == [small.path.name]
        assert cached_squares(paths, 32, tmp_path/'disk').pixels.tobytes() == bytes_of_small
        del small


def test_a_full_disk_where_nothing_can_be_reserved(paths, tmp_path, monkeypatch):
    monkeypatch.delattr(C.os, 'posix_fallocate', raising=False)
    monkeypatch.setattr(C.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
    with pytest.raises(OSError, match='the disk is full'): cached_squares(paths, SIZE, tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize('code,words', [(errno.ENOSPC, 'the disk is full'), (errno.EIO, 'it cannot be written')])
def test_a_disk_that_fails_in_the_middle(paths, tmp_path, monkeypatch, code, words):
    def broken(fd): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(C.os, 'fsync', broken)
    with pytest.raises(OSError, match=words) as e: cached_squares(paths, SIZE, tmp_path)
    assert e.value.errno == code and left(tmp_path) == []


def test_a_folder_that_cannot_be(paths, tmp_path):
    (tmp_path/'file').write_text('')
    for folder in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(OSError, match='no cache of squares can be made here .*; name another folder') as e:
            cached_squares(paths, SIZE, folder)
        assert str(folder) in str(e.value) and (tmp_path/'file').read_text() == ''


def test_a_folder_that_may_not_be_written(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(C.os, 'access', lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(OSError, match='can be made here .Permission denied.; name another folder .SKIN_GRADCAM_CACHE'):
        cached_squares(paths, SIZE, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- killed and competing processes

BUILD = '''
import os, signal, sys, time
from pathlib import Path
from skin_gradcam import cache as C
folder, stage, log = sys.argv[1:4]
paths = [Path(p) for p in sys.argv[4:]]
def die(*a): os.kill(os.getpid(), signal.SIGKILL)
real, made = C.decode_checked, []
def decode(*a):
    made.append(a)
    with open(log, 'ab') as f: f.write(b'.')
    if stage == f'square {len(made)}': die()
    if stage == 'slow': time.sleep(.1)
    return real(*a)
C.decode_checked = decode
if stage == 'reserve': C.reserve = die
if stage == 'fsync': C.os.fsync = die
if stage == 'footer': C.footer_bytes = die
if stage == 'rename': C.os.replace = die
if stage == 'folder': C.sync_folder = die
print(C.cached_squares(paths, 64, folder, threads=1).verify().pixels.sum(dtype='int64'))
'''


def build(folder, stage, paths, log=None, **kw):
    command = [sys.executable, '-c', BUILD, str(folder), stage, str(log or Path(folder)/'log.lock'), *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs signals')
@pytest.mark.parametrize('stage', ['reserve', 'square 1', f'square {N}', 'footer', 'fsync', 'rename', 'folder'])
def test_killed_at(stage, paths, tmp_path, whole):
    "Before the rename nothing counts, after it everything; what is left is taken over by the next who tries"
    assert build(tmp_path, stage, paths).wait() == -signal.SIGKILL
    assert whole.name not in left(tmp_path) if stage != 'folder' else left(tmp_path) == [whole.name]
    assert [p.name for p, _, _ in list_squares(tmp_path)] == ([whole.name] if stage == 'folder' else [])
    assert cached_squares(paths, SIZE, tmp_path).path.read_bytes() == whole.data
    assert left(tmp_path) == [whole.name]


def test_killed_from_outside_and_pruned(paths, tmp_path, whole):
    "While it works the half-made file is left alone; once it is dead, it goes"
    p = build(tmp_path, 'slow', paths)
    half, end = tmp_path/f'.{whole.name}.tmp', time.monotonic() + 60
    while not half.exists() and time.monotonic() < end: time.sleep(.02)
    assert prune_squares(tmp_path) == [] and half.exists()
    p.kill()
    assert p.wait() == -signal.SIGKILL and left(tmp_path) == [half.name]
    assert prune_squares(tmp_path) == [half] and left(tmp_path) == []


def test_two_processes_make_one(paths, tmp_path, whole):
    "Both get the whole cache, and every picture was decoded once"
    both = [build(tmp_path, 'slow', paths) for _ in range(2)]
    sums = [int(p.communicate(timeout=120)[0]) for p in both]
    assert sums[0] == sums[1] > 0
    assert (tmp_path/'log.lock').stat().st_size == N
    assert left(tmp_path) == [whole.name] and (tmp_path/whole.name).read_bytes() == whole.data


def test_a_cache_that_is_there_needs_no_lock(paths, ids, tmp_path, whole):
    "So a folder that may only be read serves, and so do pictures that are gone"
    (tmp_path/whole.name).write_bytes(whole.data)
    with locked(tmp_path/whole.name):
        s = cached_squares([p.with_name('gone') for p in paths], SIZE, tmp_path, ids)
    assert len(s) == N


@pytest.mark.skipif(not Path('/proc/self/smaps').exists(), reason='needs the maps of Linux')
def test_the_pixels_are_shared(tmp_path, whole):
    "Reading all of it copies nothing: the map has its pages from the file and none of its own"
    path = tmp_path/whole.name
    path.write_bytes(whole.data)
    s = Squares(path)
    assert s.pixels.sum() > 0
    part = Path('/proc/self/smaps').read_text().partition(str(path))[2].splitlines()
    facts = dict(line.split(':', 1) for line in part[1:20])
    assert facts['Anonymous'].split() == ['0', 'kB'] and int(facts['Rss'].split()[0]) > N*3*SIZE**2/1024


def test_a_pickle_is_a_path(tmp_path, whole):
    (tmp_path/whole.name).write_bytes(whole.data)
    s = Squares(tmp_path/whole.name)
    data = pickle.dumps(s)
    assert len(data) < 1000 and np.array_equal(pickle.loads(data).pixels, s.pixels)


# ---------------------------------------------------------------- damage and other versions


@settings(max_examples=400, deadline=None)
@given(pick=st.data())
def test_any_changed_byte_is_seen(pick, whole, tmp_path_factory):
    "Everywhere: head, pixels, footer, end"
    bent_file = tmp_path_factory.getbasetemp()/'bent.npy'
    n = len(whole.data)
    at = pick.draw(st.one_of(st.integers(0, 127), st.integers(0, n - 1), st.integers(n - 1200, n - 1)))
    bent = bytearray(whole.data)
    bent[at] ^= pick.draw(st.integers(1, 255))
    bent_file.write_bytes(bent)
    with pytest.raises(CacheError, match='^bent.npy: .*delete it'): Squares(bent_file).verify()


@settings(max_examples=50, deadline=None)
@given(pick=st.data())
def test_any_other_length_is_seen(pick, whole, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    n = pick.draw(st.one_of(st.integers(0, 300), st.integers(0, len(whole.data) - 1)))
    for torn in (whole.data[:n], whole.data[n + 1:], whole.data + bytes(n % 50 + 1)):
        (folder/'torn.npy').write_bytes(torn)
        with pytest.raises(CacheError, match='delete it'): Squares(folder/'torn.npy').verify()


def with_footer(data, **change):
    "The file with another footer, its checksum right"
    n = C._tail.unpack(data[-C._tail.size:])[1]
    end = len(data) - C._tail.size - n
    return data[:end] + C.footer_bytes(json.loads(data[end:end + n]) | change)


@pytest.mark.parametrize('schema,advice', [(0, 'older'), (99, 'newer'), (None, 'older')])
def test_another_schema(schema, advice, paths, tmp_path, whole):
    "Refused by who opens it, made again by who needs it; the file stays until the new one is complete"
    path = tmp_path/whole.name
    path.write_bytes(with_footer(whole.data, schema=schema))
    with pytest.raises(CacheError, match=f'cache schema {schema}, this version reads 1; .* the {advice} version'):
        Squares(path)
    with pytest.warns(UserWarning, match=f'cache schema {schema}, this version reads 1: making it again'):
        s = cached_squares(paths, SIZE, tmp_path)
    assert s.path == path and path.read_bytes() == whole.data and left(tmp_path) == [whole.name]


@pytest.mark.parametrize('kind', ['torn', 'bent', 'empty', 'foreign'])
def test_damage_is_repaired_with_a_word(kind, paths, tmp_path, whole):
    path, data = tmp_path/whole.name, bytearray(whole.data)
    data[5000] ^= 1
    path.write_bytes(dict(torn=whole.data[:9000], bent=bytes(data), empty=b'', foreign=paths[0].read_bytes())[kind])
    words = '1 of 12 squares are damaged' if kind == 'bent' else 'no complete cache of squares'
    with pytest.warns(UserWarning, match=f'{words}.*: making it again'): cached_squares(paths, SIZE, tmp_path)
    assert path.read_bytes() == whole.data


def test_damage_without_the_pictures(paths, ids, tmp_path, whole):
    "It cannot be made again: the name of a picture, and the damaged file is still there"
    (tmp_path/whole.name).write_bytes(whole.data[:9000])
    gone = [p.with_name('gone.png') for p in paths]
    with pytest.warns(UserWarning), pytest.raises(PictureError, match='gone.png: there is no such file'):
        cached_squares(gone, SIZE, tmp_path, ids)
    assert (tmp_path/whole.name).read_bytes() == whole.data[:9000] and left(tmp_path) == [whole.name]


def test_another_decoder_another_file(paths, ids, tmp_path, monkeypatch):
    a = cached_squares(paths, 16, tmp_path)
    monkeypatch.setattr(C, 'decoder_version', lambda: 'another')
    b = cached_squares(paths[:3], 16, tmp_path)
    assert a.path != b.path and len(b) == 3, 'not read from the wider cache of another decoder'


# ---------------------------------------------------------------- bad pictures


def test_bad_pictures_are_named(paths, ids, tmp_path):
    torn = tmp_path/'torn.png'
    torn.write_bytes(paths[0].read_bytes()[:400])
    with pytest.raises(PictureError, match='^mole 7: the PNG file breaks off'):
        cached_squares([*paths, torn], 16, tmp_path/'c', names=[*map(str, paths), 'mole 7'])
    with pytest.raises(PictureError, match='^mole 7: the file has other bytes than the table says; restore it'):
        cached_squares([paths[0]], 16, tmp_path/'c', ids[1:2], ['mole 7'])
    with pytest.raises(PictureError, match='missing.png: there is no such file'):
        cached_squares([tmp_path/'missing.png'], 16, tmp_path/'c')
    assert left(tmp_path/'c') == []


@pytest.mark.parametrize('kw', [dict(paths=[]), dict(ids=['a', 'b']), dict(names=['a', 'b']), dict(size=0)])
def test_wrong_arguments(kw, paths, tmp_path):
    with pytest.raises(CacheError): cached_squares(**{**dict(paths=paths[:1], size=16, folder=tmp_path), **kw})


@pytest.mark.data
def test_the_study(real_data, tmp_path):
    "Its pictures decoded once: the same numbers as from memory, and the second time not one is opened"
    from skin_gradcam.data import Manifest
    from skin_gradcam.loaders import decode_all
    m = Manifest.load(Path(__file__).parents[1]/'results'/'ham10000_roles.csv', real_data/'ham10000')
    s = cached_squares(m.paths(), 48, tmp_path, list(m.df.sha256), list(m.df.path))
    valid = m.role('valid')
    want = decode_all(m.paths(valid), 48).numpy()
    assert np.array_equal(s.pixels[s.positions(list(valid.sha256))], want)
    again = cached_squares(['nowhere']*len(valid), 48, tmp_path, list(valid.sha256))
    assert again.path == s.path and len(again) == len(m)
