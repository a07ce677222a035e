"""A look at a whole folder: every kind of bad file has its reason, the memory of earlier checks is never in the way."""
from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skin_gradcam import checks
from skin_gradcam.checks import FactStore, check_folder, close_pairs, inspect_files, left_out, save_check
from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.readers import DataError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SKIN_GRADCAM_CACHE', str(tmp_path / 'cache'))


def photo(seed: int = 0, size: tuple[int, int] = (60, 45), mode: str = 'RGB') -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size).convert(mode)


def saved(im: Image.Image, fmt: str = 'JPEG', **kw) -> bytes:
    out = io.BytesIO()
    im.save(out, fmt, **kw)
    return out.getvalue()


def bomb() -> bytes:
    "The header of a PNG of 30,000 by 30,000 pixels"
    def chunk(k: bytes, d: bytes) -> bytes:
        return struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))

    head = struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0' * 9000)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(photo(9), exif=exif)


WIDE = Image.fromarray((np.arange(60 * 45, dtype=np.uint16) * 20).reshape(45, 60))
FRAMES = [photo(i) for i in range(3)]
SOUND = {  # each of these is a picture, whatever it looks like at first; 16-bit, CMYK and so on are converted
    'plain.jpg': saved(photo(1)), 'wide.png': saved(WIDE, 'PNG'), 'cmyk.jpg': saved(photo(2, mode='CMYK')),
    'palette.png': saved(photo(3, mode='P'), 'PNG'), 'alpha.png': saved(photo(4, mode='RGBA'), 'PNG'),
    'film.gif': saved(FRAMES[0], 'GIF', save_all=True, append_images=FRAMES[1:]), 'turned.jpg': turned(6)}
BAD = {
    'torn.jpg': (saved(photo(5, (400, 300)))[:2000], 'breaks off'),
    'text.jpg': (b'429 Too Many Requests', 'this is text, not a picture'),
    'page.jpg': (b'<!doctype html><html></html>', 'a web page'), 'empty.jpg': (b'', 'the file is empty'),
    'dot.png': (saved(Image.new('RGB', (1, 1)), 'PNG'), 'the picture is 1x1 pixels'),
    'bomb.png': (bomb(), '30000x30000 pixels, 900 million'),
    'raw.tif': (saved(Image.fromarray(np.ones((20, 20), np.float32)), 'TIFF'), 'floating point')}


@pytest.fixture
def menagerie(tmp_path) -> Path:
    "A folder with one picture of every kind, and a table"
    folder = tmp_path / 'menagerie'
    folder.mkdir()
    for name, data in SOUND.items(): (folder / name).write_bytes(data)
    for name, (data, _) in BAD.items(): (folder / name).write_bytes(data)
    names = [*SOUND, *BAD, 'gone.jpg']
    rows = [(n, CLASSES[i % 3], f'L{i}') for i, n in enumerate(names)]
    pd.DataFrame(rows, columns=['image_id', 'dx', 'lesion_id']).to_csv(folder / 'table.csv', index=False)
    return folder


def test_every_kind_of_file_has_its_fate(menagerie):
    c = check_folder(menagerie)
    assert c.report.n_kept == len(SOUND) and c.report.n_rows == c.report.n_kept + c.report.n_left_out
    for name, (_, reason) in BAD.items(): assert reason in c.report.unreadable[Path(name).stem]
    assert list(c.report.missing_files) == ['gone']
    size = c.df.set_index('image_id')[['width', 'height']]
    assert size.loc['turned'].tolist() == [45, 60] and size.drop('turned').to_numpy().tolist() == [[60, 45]] * 6
    assert c.df.phash.str.fullmatch('[0-9a-f]{16}').all()
    assert set(left_out(c.report).name) == {'gone', *(Path(n).stem for n in BAD)}


def test_the_second_look_is_the_first(menagerie, monkeypatch):
    first = check_folder(menagerie)
    monkeypatch.setattr(checks, 'look_at', lambda *a: pytest.fail('decoded again'))
    again = check_folder(menagerie)
    assert str(again) == str(first)
    pd.testing.assert_frame_equal(again.df, first.df)


def test_one_changed_byte_is_another_file(menagerie):
    check_folder(menagerie)
    data = bytearray(SOUND['plain.jpg'])
    data[-40] ^= 0xff  # in the pixels
    (menagerie / 'plain.jpg').write_bytes(data)
    (menagerie / 'alpha.png').write_bytes(saved(photo(4), 'PNG')[:-60])
    c = check_folder(menagerie)
    assert 'alpha' in c.report.unreadable
    assert c.df.set_index('image_id').sha256['plain'] == hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- the memory


def test_a_full_disk_is_said_and_harmless(menagerie, monkeypatch):
    connect = sqlite3.connect

    def full(*a, **kw):
        db = connect(*a, **kw)
        db.execute('pragma max_page_count=1')  # what SQLite says then is what it says on a full disk
        return db

    monkeypatch.setattr(checks.sqlite3, 'connect', full)
    c = check_folder(menagerie)
    assert c.report.n_kept == len(SOUND)
    assert 'database or disk is full' in c.notes[0] and 'free some space' in c.notes[0]


def test_a_folder_that_cannot_be_made(menagerie, tmp_path, monkeypatch):
    (tmp_path / 'flat').write_text('a file where a folder should be')
    monkeypatch.setenv('SKIN_GRADCAM_CACHE', str(tmp_path / 'flat'))
    c = check_folder(menagerie)
    assert c.report.n_kept == len(SOUND) and 'is not used' in c.notes[0]


@pytest.mark.parametrize('damage', ['garbage', 'truncated', 'other table'])
def test_a_damaged_memory_is_said_and_harmless(menagerie, damage):
    first = check_folder(menagerie)
    file = FactStore().file
    if damage == 'garbage': file.write_bytes(os.urandom(9000))
    elif damage == 'truncated': file.write_bytes(file.read_bytes()[:700])
    else:
        file.unlink()
        db = sqlite3.connect(file)
        db.execute('create table facts (something text)')
        db.close()
    c = check_folder(menagerie)
    assert (c.report.n_kept, c.report.unreadable) == (first.report.n_kept, first.report.unreadable)
    assert len(c.notes) == 1 and 'is not used' in c.notes[0]


LOOK = """
import sys
from skin_gradcam import checks
checks.BLOCK = 8
print('ready', flush=True)
c = checks.check_folder(sys.argv[1])
print(len(c.df), len(c.near), c.notes, flush=True)
"""


def look(folder: Path) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, '-c', LOOK, str(folder)], **pipes)


def test_two_checks_at_once(tmp_path):
    drawn = write_phantoms(tmp_path / 'drawn', per_class=20, seed=3, width=120, height=90)
    said = [p.communicate(timeout=120) for p in [look(drawn), look(drawn)]]
    assert said[0][0] == said[1][0] and '60 ' in said[0][0] and said[0][0].strip().endswith('[]'), said
    assert len(FactStore().get(mask=False)) == 60 == len(FactStore().get(mask=True))


def test_a_killed_check_keeps_what_it_saw(tmp_path):
    drawn = write_phantoms(tmp_path / 'drawn', per_class=60, seed=4, width=300, height=225)
    p = look(drawn)
    p.stdout.readline()
    for _ in range(2000):
        time.sleep(.01)
        if FactStore().file.exists() and (n := len(FactStore().get(mask=False))): break
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert 0 < n
    kept = FactStore().get(mask=False)
    c = check_folder(drawn)
    assert not c.notes and len(c.df) == 180 and all(FactStore().get(mask=False)[k] == f for k, f in kept.items())


def test_files_that_go_while_they_are_looked_at(tmp_path):
    facts = inspect_files(tmp_path, ['a.jpg', 'b/c.jpg'])
    assert {f.reason for f in facts.values()} == {'there is no such file'}


# ---------------------------------------------------------------- near duplicates


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 15), max_size=30), st.integers(0, 64))
def test_pairs_like_the_definition(numbers, distance):
    slow = [[a, b, (x ^ y).bit_count()] for a, x in enumerate(numbers) for b, y in enumerate(numbers)
            if a < b and (x ^ y).bit_count() <= distance]
    assert close_pairs([f'{n:016x}' for n in numbers], distance).tolist() == slow


def test_many_pairs_need_little_memory():
    import tracemalloc
    hashes = [f'{n:016x}' for n in np.random.default_rng(0).integers(0, 2**63, 12_000)]
    tracemalloc.start()
    close_pairs(hashes, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20


def test_the_list_of_the_user_is_obeyed_and_checked(menagerie, tmp_path):
    same = tmp_path / 'same.csv'
    same.write_text('a,b\nplain,palette\ngone,plain\n')  # a picture that is missing may be named: it is in the table
    c = check_folder(menagerie, same_lesion=same)
    assert c.df.set_index('image_id').lesion_id[['plain', 'palette']].nunique() == 1
    same.write_text('a,b\nplain,nobody\n')
    with pytest.raises(DataError, match='pictures that the table does not: nobody; correct the list'):
        check_folder(menagerie, same_lesion=same)
    same.write_text('first,second\nplain,alpha\n')
    with pytest.raises(DataError, match="no column 'a', found first, second"): check_folder(menagerie, same_lesion=same)


def test_the_page_stands_alone(menagerie, tmp_path):
    text = save_check(check_folder(menagerie), tmp_path / 'out').read_text(encoding='utf-8')
    assert 'http://www.w3.org' in text  # the name of SVG, not an address that is loaded
    assert 'src="http' not in text and '@import' not in text and str(tmp_path) not in text
    assert '<script' not in text


def test_names_cannot_become_markup(tmp_path):
    folder = tmp_path / 'odd'
    folder.mkdir()
    (folder / 'a.jpg').write_bytes(saved(photo(1)))
    (folder / 'x.csv').write_text('image_id,dx,lesion_id\na,nv,1\n<script>alert(1)</script>,mel,2\n')
    c = check_folder(folder)
    assert '<script' not in c._repr_html_() and '&lt;script' in c._repr_html_()


# ---------------------------------------------------------------- real pictures


@pytest.mark.data
def test_the_real_archive(real_data):
    "What the stored check says, seen again"
    c = check_folder(real_data / 'ham10000', patient_distance=0)
    stored = json.loads((ROOT / 'results/data_check.json').read_text())['found']
    assert (c.n_files, c.masks.n, c.report.n_left_out) == (stored['pictures'], stored['masks'], stored['left_out'])
    assert {k: list(v) for k, v in c.report.kept.items()} == stored['kept']
    assert (c.masks.whole, len(c.masks.empty)) == (stored['masks_over_all'], stored['empty_masks'])
    assert c.masks.without == [] and c.masks.other_shape == [] and len(c.masks.strangers) == 0
    assert sorted(map(sorted, c.report.duplicate_files)) == sorted(stored['identical'])
    other = int((~c.for_review.same_dx.astype(bool)).sum())
    near = dict(pairs=len(c.near), other_lesion=len(c.for_review), other_diagnosis=other)
    assert near == stored['near']['2']


@pytest.mark.data
def test_the_lesions_that_are_there_twice(real_data):
    "Each pair of the committed list is found for review, and joins when it is handed back"
    twins = ROOT / 'results/ham10000_same_lesion.csv'
    found = check_folder(real_data / 'ham10000').for_review
    found = {frozenset((r.a, r.b)): r for r in found.itertuples()}
    for r in pd.read_csv(twins).itertuples():
        f = found[frozenset((r.a, r.b))]
        assert (f.distance, f.dx_a, f.dx_b) == (r.distance, r.dx, r.dx) and f.same_patient
        assert {f.lesion_a, f.lesion_b} == {r.lesion_a, r.lesion_b}
    joined = check_folder(real_data / 'ham10000', same_lesion=twins)
    assert len(joined.report.joined_lesions) == 6  # the seventh pair is df, which was not asked for
    assert joined.report.kept == {'nv': (6705, 5399), 'bkl': (1099, 725), 'mel': (1113, 614)}
