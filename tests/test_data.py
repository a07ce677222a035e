"""Reading, grouping and drawing: what goes wrong with real folders, and that no option leaks a lesion."""
from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import load_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from skin_gradcam import data, readers
from skin_gradcam.data import (
    ROLES,
    DataError,
    LeakError,
    Manifest,
    check_files,
    check_leak,
    draw_manifest,
    extend_train,
    find_pictures,
    join_duplicates,
    manifest_hash,
    read_classes,
    read_folder,
    read_kaggle,
    read_table,
)
from skin_gradcam.lesions import CLASSES

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / 'results' / 'ham10000_roles.csv'
STUDY_HASH = '0f0c46fe1af231f43f21545e7ab9d99e9550a6589ff189dc11088b901f33cc80'


def picture(path: Path, seed: int = 0, side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=80)
    return path


def archive(folder: Path, rows: list[tuple], draw: bool = True) -> Path:
    "The Kaggle layout: rows are (lesion_id, image_id, dx)"
    images = folder / 'HAM10000_images_part_1'
    images.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(dict.fromkeys(r[1] for r in rows)):
        if draw: picture(images / f'{image}.jpg', i)
    table = pd.DataFrame(rows, columns=['lesion_id', 'image_id', 'dx'])
    table.to_csv(folder / 'HAM10000_metadata.csv', index=False)
    return folder


def lesions(n: int | dict[str, int], views: int = 1) -> pd.DataFrame:
    "A table as the readers make it, without files"
    n = n if isinstance(n, dict) else dict.fromkeys(CLASSES, n)
    each = [(dx, i, v) for dx, k in n.items() for i in range(k) for v in 'abcdef'[:views]]
    rows = [(f'{dx}{i:03}{v}', f'L{dx}{i:03}', dx) for dx, i, v in each]
    df = pd.DataFrame(rows, columns=['image_id', 'lesion_id', 'dx'])
    shas = [hashlib.sha256(i.encode()).hexdigest() for i in df.image_id]
    return df.assign(path=df.image_id + '.jpg', sha256=shas)


# ---------------------------------------------------------------- files


def test_missing_pictures_are_named_and_the_rest_goes_on(tmp_path):
    rows = [('L1', 'A1', 'nv'), ('L2', 'A2', 'mel'), ('L3', 'V1', 'vasc'), ('L4', 'V2', 'vasc')]
    folder = archive(tmp_path, rows)
    for name in ('V1', 'V2'): (folder / f'HAM10000_images_part_1/{name}.jpg').unlink()
    df, report = read_kaggle(folder)
    assert list(df.image_id) == ['A1', 'A2']
    assert report.missing_files == {'V1': 'vasc', 'V2': 'vasc'}
    assert 'left out 2: files missing (vasc 2): V1, V2' in str(report)
    with pytest.raises(DataError, match=r'no usable picture of vasc; HAM10000_metadata.csv: 0 of 4 rows kept'):
        read_kaggle(folder, classes=('vasc',))


def test_no_pictures_at_all(tmp_path):
    with pytest.raises(DataError, match='no usable picture of nv, bkl, mel.*files missing'):
        read_kaggle(archive(tmp_path, [('L1', 'A1', 'nv')], draw=False))


@pytest.mark.parametrize('check', ['fast', 'decode'])
@pytest.mark.parametrize('what', ['empty', 'half', 'header only', 'text', 'one pixel', 'folder'])
def test_unreadable_pictures(tmp_path, check, what):
    folder = archive(tmp_path, [('L1', 'A1', 'nv'), ('L2', 'A2', 'nv')])
    bad = folder / 'HAM10000_images_part_1/A2.jpg'
    whole = bad.read_bytes()
    content = {'empty': b'', 'half': whole[:len(whole) // 2], 'header only': whole[:200], 'text': b'id,dx\n1,nv\n'}
    if what in content: bad.write_bytes(content[what])
    elif what == 'one pixel': picture(bad, side=1)
    else:
        bad.unlink()
        bad.mkdir()
    df, report = read_kaggle(folder, check=check)
    assert list(df.image_id) == ['A1']
    assert report.n_rows == report.n_kept + report.n_left_out
    assert list(report.missing_files if what == 'folder' else report.unreadable) == ['A2']
    assert 'A2' in str(report)


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    folder = tmp_path / 'images'
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    folder.mkdir()
    Image.fromarray(pixels).save(folder / 'a.png')
    raw = bytearray((folder / 'a.png').read_bytes())
    raw[len(raw) // 2] ^= 255
    (folder / 'a.png').write_bytes(raw)
    picture(folder / 'b.jpg')
    (tmp_path / 't.csv').write_text('image_id,dx,lesion_id\na,nv,1\nb,nv,2\n')
    assert read_table(tmp_path, 't.csv', check='fast')[1].n_kept == 2
    report = read_table(tmp_path, 't.csv', check='decode')[1]
    assert list(report.unreadable) == ['a'] and report.n_kept == 1


def test_a_decompression_bomb_is_refused_unread(tmp_path):
    import struct
    import zlib
    def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind+body))
    head = struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')
    folder = archive(tmp_path, [('L1', 'A1', 'nv'), ('L2', 'A2', 'nv')])
    (folder / 'HAM10000_images_part_1/A2.jpg').write_bytes(png)
    report = read_kaggle(folder)[1]
    assert '30000x30000' in report.unreadable['A2']


def test_folders_twice_and_in_lower_case(tmp_path):
    folder = archive(tmp_path, [('L1', 'A1', 'nv'), ('L2', 'A2', 'nv'), ('L3', 'A3', 'nv')])
    part = folder / 'HAM10000_images_part_1'
    twin = folder / 'ham10000_IMAGES_part_1'
    twin.mkdir()
    for n in ('A1', 'A2'): (twin / f'{n}.JPG').write_bytes((part / f'{n}.jpg').read_bytes())
    picture(twin / 'A3.jpg', 99)
    (part / 'A2.jpg').write_bytes(b'')  # the broken one of two copies does no harm
    df, report = read_kaggle(folder)
    assert df.set_index('image_id').path.to_dict() == {'A1': 'HAM10000_images_part_1/A1.jpg',
                                                        'A2': 'ham10000_IMAGES_part_1/A2.JPG'}
    assert report.ambiguous_files == {'A3': ['HAM10000_images_part_1/A3.jpg', 'ham10000_IMAGES_part_1/A3.jpg']}
    assert 'may mean several different files' in str(report)


def test_masks_and_hidden_files_are_not_pictures(tmp_path):
    folder = archive(tmp_path, [('L1', 'A1', 'nv')])
    picture(folder / 'HAM10000_segmentations_lesion_tschandl/A1.png')
    picture(folder / 'HAM10000_images_part_1/._A1.jpg')
    picture(folder / '__MACOSX/HAM10000_images_part_1/A1.jpg', 5)
    df, report = read_kaggle(folder)
    assert list(df.path) == ['HAM10000_images_part_1/A1.jpg'] and report.not_listed == 0


def test_links_that_lead_back(tmp_path):
    picture(tmp_path / 'images/a.jpg')
    (tmp_path / 'images/again').symlink_to(tmp_path, target_is_directory=True)
    assert find_pictures(tmp_path) == ['images/a.jpg']


def test_a_folder_without_permission_is_an_error(tmp_path, monkeypatch):
    picture(tmp_path / 'images_1/a.jpg')
    scandir = os.scandir
    def closed(path):
        if str(path).endswith('images_1'): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(DataError, match=r'images_1: cannot be listed \(Permission denied\)'): find_pictures(tmp_path)


def test_a_file_without_permission_is_counted(tmp_path, monkeypatch):
    folder = archive(tmp_path, [('L1', 'A1', 'nv'), ('L2', 'A2', 'nv')])
    real_open = open
    def closed(path, *args, **kw):
        if str(path).endswith('A2.jpg'): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real_open(path, *args, **kw)
    monkeypatch.setattr('builtins.open', closed)
    report = read_kaggle(folder)[1]
    assert 'Permission denied' in report.unreadable['A2'] and report.n_kept == 1


# ---------------------------------------------------------------- tables


def test_unknown_labels(tmp_path):
    rows = [('L1', 'A1', 'nv'), ('L2', 'A2', 'wart'), ('L3', 'A3', ''), ('L4', 'A4', ' NV '), ('L5', 'A5', 'df')]
    df, report = read_kaggle(archive(tmp_path, rows))
    assert list(df.dx) == ['nv', 'nv']
    assert report.unknown_labels == {'': ['A3'], 'wart': ['A2']} and report.other_classes == {'df': 1}


def test_classes_of_your_own(tmp_path):
    folder = archive(tmp_path, [('L1', 'A1', 'Benign'), ('L2', 'A2', 'MALIGNANT'), ('L3', 'A3', 'nv')])
    df, report = read_kaggle(folder, classes=('benign', 'malignant'))
    assert list(df.dx) == ['benign', 'malignant'] and report.other_classes == {'nv': 1}


def test_duplicate_ids(tmp_path):
    rows = [('L1', 'A1', 'nv'), ('L1', 'A1', 'nv'), ('L1', 'A1', 'nv'), ('L2', 'A2', 'nv'), ('L2', 'A2', 'mel'),
            ('L3', 'A3', 'nv'), ('L4', 'A3', 'nv'), ('L5', 'A4', 'mel')]
    df, report = read_kaggle(archive(tmp_path, rows))
    assert list(df.image_id) == ['A1', 'A4']
    assert report.duplicate_ids == {'A1': 2} and report.conflicting_ids == {'A2': 2, 'A3': 2}
    assert report.n_left_out == 6


@pytest.mark.parametrize('column', ['lesion_id', 'image_id', 'dx'])
def test_a_column_that_is_missing(tmp_path, column):
    folder = archive(tmp_path, [('L1', 'A1', 'nv')])
    table = folder / 'HAM10000_metadata.csv'
    table.write_text(table.read_text().replace(column, 'other'))
    found = ', '.join('other' if c == column else c for c in ('lesion_id', 'image_id', 'dx'))
    with pytest.raises(DataError, match=f'HAM10000_metadata.csv: no column {column!r}, found {found}; name yours'):
        read_kaggle(folder)


@pytest.mark.parametrize('sep', [',', ';', '\t'])
@pytest.mark.parametrize('bom', ['', '\ufeff'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_separators_and_marks(tmp_path, sep, bom, end):
    picture(tmp_path / 'x/0012.jpg')
    text = bom + end.join([sep.join(['image_id', ' dx', 'lesion_id']), sep.join(['0012', ' nv', '007'])]) + end
    (tmp_path / 't.csv').write_bytes(text.encode())
    df, _ = read_folder(tmp_path)
    assert df[['image_id', 'path', 'dx', 'lesion_id']].to_numpy().tolist() == [['0012', 'x/0012.jpg', 'nv', '007']]


@pytest.mark.parametrize('content, message', [
    (b'', 'the table is empty'),
    (b'image_id,dx,lesion_id\n', 'columns but no rows'),
    (b'image_id,dx,lesion_id\na,nv,1\na,nv,1,2,3,4\n', 'no readable table'),
    ('image_id,dx,lesion_id\nä,nv,1\n'.encode('latin-1'), 'not UTF-8'),
])
def test_tables_that_are_none(tmp_path, content, message):
    picture(tmp_path / 'a.jpg')
    (tmp_path / 't.csv').write_bytes(content)
    with pytest.raises(DataError, match=message): read_table(tmp_path, 't.csv')
    with pytest.raises(DataError, match='nope.csv: no such table'): read_table(tmp_path, 'nope.csv')


def test_windows_and_foreign_paths(tmp_path):
    picture(tmp_path / 'b/12.jpg', 1)
    picture(tmp_path / 'c/12.jpg', 2)
    picture(tmp_path / 'c/13.png', 3)
    picture(tmp_path.parent / 'outside.jpg')
    names = [r'b\12.jpg', r'C:\Users\me\study\c\12.jpg', '/pictures/me/13.PNG', '../outside.jpg', r'..\..\outside.jpg']
    t = pd.DataFrame(dict(image_id=names, dx='nv', lesion_id=list('12345')))
    t.to_csv(tmp_path / 't.csv', index=False)
    df, report = read_table(tmp_path, 't.csv')
    assert list(df.path) == ['b/12.jpg', 'c/12.jpg', 'c/13.png']
    assert list(df.image_id) == ['b/12', 'c/12', 'c/13']
    assert sorted(report.missing_files) == ['../../outside', '../outside']


def test_names_with_colons_dots_and_spaces(tmp_path):
    names = ['a:1', 'v1.2', 'two words', 'Muttermal ä', '#7', 'x,y']
    for i, n in enumerate([*names, '1']): picture(tmp_path / f'{n}.jpg', i)
    pd.DataFrame(dict(image_id=names, dx='nv', lesion_id=names)).to_csv(tmp_path / 't.csv', index=False)
    df, _ = read_table(tmp_path, 't.csv')
    assert list(df.path) == [f'{n}.jpg' for n in names]


def test_one_name_with_two_suffixes(tmp_path):
    for i, n in enumerate(['nv/1.jpg', 'nv/1.png', 'mel/1.jpg']): picture(tmp_path / n, i)
    df, report = read_classes(tmp_path)
    assert list(df.image_id) == ['mel/1', 'nv/1.jpg', 'nv/1.png'] and not report.n_left_out


def test_missing_lesion_ids(tmp_path):
    rows = [('L1', 'A1', 'nv'), ('', 'A2', 'nv'), ('NaN', 'A3', 'nv'), ('  ', 'A4', 'mel'), ('A2', 'A5', 'mel')]
    df, report = read_kaggle(archive(tmp_path, rows))
    assert df.lesion_id.is_unique and report.no_lesion == ['A2', 'A3', 'A4']
    assert '3 pictures without a lesion id, each its own lesion' in str(report)


def test_ages_that_are_none(tmp_path):
    folder = archive(tmp_path, [('L1', 'A1', 'nv'), ('L2', 'A2', 'nv'), ('L3', 'A3', 'nv')])
    t = pd.read_csv(folder / 'HAM10000_metadata.csv').assign(age=['50', 'old', None], sex='female', other='x')
    t.to_csv(folder / 'HAM10000_metadata.csv', index=False)
    df, report = read_kaggle(folder)
    assert df.age.dtype == float and list(df.age.fillna(-1)) == [50, -1, -1]
    assert report.notes == ['1 ages are no numbers: taken as unknown']
    assert 'other' not in df
    assert list(read_table(folder, 'HAM10000_metadata.csv', keep=['other'])[0].other) == ['x'] * 3
    with pytest.raises(DataError, match="no column 'nope', found .*; name yours with keep="):
        read_table(folder, 'HAM10000_metadata.csv', keep=['nope'])


def test_identical_files_join_their_lesions(tmp_path):
    rows = [('L3', 'A1', 'nv'), ('L2', 'A2', 'nv'), ('L2', 'A3', 'nv'), ('L1', 'A4', 'nv'), ('L9', 'A5', 'nv')]
    folder = archive(tmp_path, rows)
    part = folder / 'HAM10000_images_part_1'
    for a, b in (('A1', 'A2'), ('A3', 'A4')): (part / f'{b}.jpg').write_bytes((part / f'{a}.jpg').read_bytes())
    df, report = read_kaggle(folder)
    assert list(df.lesion_id) == ['L1'] * 4 + ['L9']
    assert sorted(report.duplicate_files) == [['A1', 'A2'], ['A3', 'A4']]
    assert report.joined_lesions == {'L1': ['L1', 'L2', 'L3']}


def test_one_picture_under_two_diagnoses(tmp_path):
    picture(tmp_path / 'nv/a.jpg')
    picture(tmp_path / 'mel/b.jpg')
    df, report = read_classes(tmp_path)
    assert list(report.two_diagnoses.values()) == [['mel', 'nv']]
    assert 'correct or drop them before drawing' in str(report)
    with pytest.raises(DataError, match=r'two diagnoses: image:mel/b \(mel, nv: mel/b, nv/a\); correct the table'):
        draw_manifest(df, tmp_path, per_class=1)


@pytest.fixture(scope='module')
def messy(tmp_path_factory) -> Path:
    "Pictures of all sorts: sound, broken, copies, twins"
    folder = tmp_path_factory.mktemp('messy')
    for i in range(4): picture(folder / f'images/p{i}.jpg', i)
    picture(folder / 'images/copy.jpg', 0)
    picture(folder / 'more/p1.jpg', 9)
    (folder / 'images/broken.jpg').write_bytes(b'no')
    return folder


NAMES = st.sampled_from(['p0', 'p1', 'p2.jpg', 'p3', 'copy', 'broken', 'gone', r'images\p2.jpg', 'images/p1.jpg', ''])
LABELS = st.sampled_from(['nv', 'mel', 'bkl', 'MEL', 'df', 'wart', ''])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(NAMES, LABELS, st.sampled_from(['1', '2', '3', ''])), min_size=1, max_size=12))
def test_every_row_is_counted_once(messy, rows):
    table = messy.parent / f'{messy.name}.csv'
    pd.DataFrame(rows, columns=['image_id', 'dx', 'lesion_id']).to_csv(table, index=False)
    try: df, report = read_table(messy, table)
    except DataError as e:
        assert 'no usable picture' in str(e)
        return
    assert report.n_rows == len(rows) == report.n_kept + report.n_left_out
    assert report.n_kept == len(df) == sum(n for n, _ in report.kept.values())
    assert df.image_id.is_unique and df.notna().all(axis=None)
    assert (df.groupby('sha256').lesion_id.nunique() == 1).all()


# ---------------------------------------------------------------- roles


@settings(max_examples=100, deadline=None)
@given(n=st.fixed_dictionaries({c: st.integers(1, 25) for c in CLASSES}), views=st.integers(1, 3),
       copies=st.lists(st.tuples(st.integers(0, 74), st.integers(0, 74)), max_size=6),
       per_class=st.none() | st.integers(1, 25), shares=st.tuples(*[st.integers(0, 6)] * 4), folds=st.integers(1, 6),
       one=st.booleans(), seed=st.integers(0, 2**32), extend=st.booleans(), cap=st.none() | st.integers(0, 40))
def test_no_options_put_a_lesion_in_two_roles(n, views, copies, per_class, shares, folds, one, seed, extend, cap):
    df = lesions(n, views)
    for a, b in copies:  # identical files under two lesions, at times of two diagnoses
        df.loc[a % len(df), 'sha256'] = df.sha256[b % len(df)]
    try: m = draw_manifest(df, '.', per_class, shares, folds, one, seed, all_for_train=extend)
    except LeakError: raise
    except DataError: return
    if cap is not None: m = extend_train(m, df, cap)
    d = m.df
    check_leak(d)
    assert (d.groupby('lesion_id').role.nunique() == 1).all() and (d.groupby('sha256').role.nunique() == 1).all()
    assert (d[d.fold >= 0].groupby('lesion_id').fold.nunique() == 1).all()
    assert (d.fold[d.role == 'test'] == -1).all()
    if one and not extend and cap is None: assert d.lesion_id.is_unique and (d.fold[d.role != 'test'] >= 0).all()
    if one: assert d[d.role != 'train'].lesion_id.is_unique
    for r, s in zip(ROLES, shares, strict=True): assert (m.counts().loc[r] > 0).all() == (s > 0)
    assert draw_manifest(df[::-1], '.', per_class, shares, folds, one, seed).hash == m.hash or extend or cap is not None


OPS = st.lists(st.sampled_from(['extend', 'folds', 'round', 'save', 'stratify', 'join']), max_size=6)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(6, 16), views=st.integers(1, 3), ops=OPS, seed=st.integers(0, 2**16), one=st.booleans(),
       same=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda p: p[0] != p[1]), max_size=5))
def test_no_sequence_of_steps_puts_a_lesion_in_two_roles(tmp_path, n, views, ops, seed, one, same):
    df = lesions(n, views).assign(sex=lambda d: np.where(d.index % 3 == 0, 'female', 'male'))
    groups = [[df.image_id[a % len(df)], df.image_id[b % len(df)]] for a, b in same]
    groups = [g for g in groups if len(set(g)) == 2 and df.set_index('image_id').dx[g].nunique() == 1]
    df = data.join_lesions(df, groups)
    by = ['sex'] if 'stratify' in ops else []
    try: m = draw_manifest(df, '.', None, (3, 1, 1, 1), 2, one, seed, stratify=by)
    except DataError: return
    test = set(m.role('test').lesion_id)
    for op in ops:
        if op == 'extend': m = extend_train(m, df)
        elif op == 'folds': m = data.draw_folds(m, 2, seed)
        elif op == 'round': m = m.with_fold(seed % 2)
        elif op == 'save': m = Manifest.load(m.save(tmp_path / 'm.csv'), '.')
        elif op == 'join':  # the user finds two more pictures of one lesion, too late: the manifest must refuse them
            late = [[m.df.image_id[0], m.df.image_id[len(m) - 1]]]
            joined = data.join_lesions(m.df, late)
            if m.df.role[0] != m.df.role[len(m) - 1]:
                with pytest.raises(DataError): Manifest(joined, '.')
    d = m.df
    check_leak(d)
    assert (d.groupby('lesion_id').role.nunique() == 1).all() and (d.groupby('sha256').role.nunique() == 1).all()
    assert (d[d.fold >= 0].groupby('lesion_id').fold.nunique() == 1).all()
    assert set(d.lesion_id[d.role == 'test']) == test and (d.fold[d.role == 'test'] == -1).all()
    for g in groups: assert d[d.image_id.isin(g)].role.nunique() <= 1
    if 'round' in ops and 'folds' not in ops: assert set(d.fold[d.role == 'valid']) == {seed % 2}


def test_strata_are_spread():
    df = lesions(60).assign(dx_type=lambda d: np.where(d.index % 60 < 40, 'histo', 'follow_up'))
    m = draw_manifest(df, '.', 50, stratify='dx_type')
    chosen = m.df.groupby(['dx', 'dx_type']).size()
    for (dx, kind), total in chosen.items():
        share = m.df[(m.df.dx == dx) & (m.df.dx_type == kind)].role.value_counts() / total
        for role, s in zip(ROLES, (.6, .1, .1, .2), strict=True): assert abs(share.get(role, 0) - s) <= 1.01 / total
    assert set(m.df.image_id) == set(draw_manifest(df, '.', 50).df.image_id)  # the same lesions, other seats


def test_two_manifests_mixed(tmp_path, manifest):
    a, b = manifest.save(tmp_path / 'a.csv'), draw_manifest(lesions(12), '.', 10, seed=9).save(tmp_path / 'b.csv')
    both = tmp_path / 'both.csv'
    both.write_text(a.read_text() + b.read_text())
    with pytest.raises(DataError, match='both.csv: several manifests in one file; keep them apart'):
        Manifest.load(both, '.')
    head, rows = a.read_text().split('\nimage_id', 1)[0], b.read_text().split('\nimage_id', 1)[1]
    both.write_text(head + '\nimage_id' + rows)
    with pytest.raises(DataError, match='both.csv: changed after saving'): Manifest.load(both, '.')
    with pytest.raises(DataError, match='pictures that stand twice'):
        Manifest(pd.concat([manifest.df, manifest.df.assign(role='test', fold=-1)]), '.')


def test_folds_are_even():
    m = draw_manifest(lesions(110, 2), '.', per_class=110)
    assert pd.crosstab(m.df.fold, m.df.dx).loc[0:].to_numpy().tolist() == [[18, 18, 18]] * 3 + [[17, 17, 17]] * 2


@pytest.mark.parametrize('n, kw, message', [
    (dict(nv=60, bkl=7, mel=60), {}, r'per_class=550, but the lesions are nv 60, bkl 7, mel 60; use at most 7'),
    (dict(nv=60, bkl=2, mel=60), dict(per_class=None), r'bkl: 2 drawn \(there are nv 60, bkl 2, mel 60\), none for'),
    (dict(nv=60, bkl=0, mel=60), dict(per_class=None), r'too few lesions of bkl: 0 drawn'),
    (9, dict(per_class=9, folds=9), 'none for one of 9 folds'),
    (9, dict(per_class=9, folds=0), 'folds=0'),
    (9, dict(per_class=0), 'per_class=0'),
    (9, dict(per_class=9, shares=(8, 2)), 'give four numbers'),
    (9, dict(per_class=9, shares=(0, 1, 1, 1)), 'train above 0'),
    (9, dict(per_class=9, shares=(5, -1, 1, 1)), 'give four numbers'),
    (9, dict(per_class=9, classes=('nv', 'mel')), 'labels bkl are not in nv, mel'),
])
def test_draws_that_cannot_be(n, kw, message):
    with pytest.raises(DataError, match=message): draw_manifest(lesions(n), '.', **kw)


def test_more_for_train_needs_the_same_table():
    df = lesions(12, 2)
    m = draw_manifest(df, '.', per_class=10)
    with pytest.raises(DataError, match='not the table that the roles were drawn from'):
        extend_train(m, df.assign(lesion_id='x' + df.lesion_id))
    copy = df.assign(image_id='new' + df.image_id, lesion_id='new' + df.lesion_id)  # the same bytes under new names
    more = extend_train(m, pd.concat([df, copy]))
    held = set(m.df.sha256[m.df.role != 'train'])
    assert not held & set(more.role('train').sha256)


# ---------------------------------------------------------------- manifest


TEN = draw_manifest(lesions(10), '.', per_class=10)


@pytest.fixture
def manifest() -> Manifest:
    return draw_manifest(lesions(10), '.', per_class=10)


def test_hash_is_the_same_for_ever(tmp_path, manifest):
    "A literal: whoever changes it makes every saved manifest unreadable and must raise MANIFEST_SCHEMA"
    assert manifest.hash == 'ce5067cdc348b836e0d00650cad0614178403e801322150e1308c783407c33ad'
    awkward = manifest.df.assign(age=np.nan, sex=pd.NA, n=np.arange(30, dtype='float32'), ok=True, w=[0.1, None] * 15)
    want = manifest_hash(awkward, CLASSES)
    assert want == 'bcd5f2b6ee678edee172e55a211748fedd7245d8df295326b2d958f14cc17eaf'
    assert manifest_hash(awkward.astype(object), CLASSES) == want
    assert manifest_hash(awkward.astype({'n': 'int8', 'image_id': 'category', 'dx': 'string'}), CLASSES) == want
    m = Manifest(awkward, tmp_path)
    assert Manifest.load(m.save(tmp_path / 'm.csv'), 'elsewhere').hash == want


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.text(st.characters(blacklist_categories=['Cs']), max_size=8), min_size=30, max_size=30))
@example(values=[*'\r\n",#\ufeff\x00\x85\u2028', 'NaN', 'NA', '1e5', '007', ' x ', *[''] * 16])
def test_any_text_survives_the_file(tmp_path, values):
    m = Manifest(TEN.df.assign(note=values), '.')
    again = Manifest.load(m.save(tmp_path / 'm.csv'), '.')
    assert again.hash == m.hash
    assert list(again.df.note.fillna('')) == list(m.df.note)


def test_changed_files_do_not_load(tmp_path, manifest):
    raw = manifest.save(tmp_path / 'm.csv').read_bytes()
    body = raw.index(b'image_id,')
    rnd, bad = random.Random(0), tmp_path / 'bad.csv'
    for _ in range(150):
        i, b = rnd.randrange(len(raw)), rnd.randrange(256)
        if raw[i] == b: continue
        bad.write_bytes(raw[:i] + bytes([b]) + raw[i + 1:])
        if i >= body and raw[i] not in b'\r\n' and b not in b'\r\n"':
            with pytest.raises(DataError): Manifest.load(bad, '.')
        else:
            try: assert Manifest.load(bad, '.').hash == manifest.hash
            except DataError as e: assert str(e).startswith('bad.csv: ')
    for cut in (0, 10, body, body + 50, len(raw) - 30):
        bad.write_bytes(raw[:cut])
        with pytest.raises(DataError): Manifest.load(bad, '.')


def test_other_systems_line_ends_and_marks_are_harmless(tmp_path, manifest):
    raw = manifest.save(tmp_path / 'm.csv').read_bytes()
    (tmp_path / 'm.csv').write_bytes(b'\xef\xbb\xbf' + raw.replace(b'\n', b'\r\n'))
    assert Manifest.load(tmp_path / 'm.csv', '.').hash == manifest.hash
    assert len(pd.read_csv(tmp_path / 'm.csv', comment='#')) == 30


@pytest.mark.parametrize('old, new, message', [
    ('# schema: 1', '# schema: 0', 'schema 0, this version reads 1; draw the roles again'),
    ('# schema: 1', '# schema: 2', 'update skin_gradcam'),
    ('# schema: 1', '# schema: x', 'schema x, this version reads 1'),
    ('# classes: [', '# classes: 5 [', 'damaged manifest'),
    ('# recipe: {', '# recipe: [1] {', 'damaged manifest'),
    ('# classes: ["nv", "bkl", "mel"]', '# classes: ["mel", "bkl", "nv"]', 'changed after saving'),
    ('# hash: ', '# hash: f', 'changed after saving'),
    ('# hash: ', '# no: ', 'not a manifest'),
    (',train,', ',test,', 'changed after saving'),
])
def test_headers(tmp_path, manifest, old, new, message):
    file = manifest.save(tmp_path / 'm.csv')
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message): Manifest.load(file, '.')


def test_a_recipe_that_is_none(tmp_path, manifest):
    file = manifest.save(tmp_path / 'm.csv')
    file.write_text(re.sub('# recipe: .*', '# recipe: [1]', file.read_text()))
    with pytest.raises(DataError, match='damaged manifest'): Manifest.load(file, '.')


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(DataError, match='no.csv: cannot be read'): Manifest.load(tmp_path / 'no.csv', '.')
    with pytest.raises(DataError, match='cannot be read'): Manifest.load(tmp_path, '.')
    (tmp_path / 'x.csv').write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match='not a manifest'): Manifest.load(tmp_path / 'x.csv', '.')


def test_a_leak_cannot_be_saved_even_with_its_right_hash(tmp_path, manifest):
    good = manifest.save(tmp_path / 'm.csv').read_bytes()
    leaking = manifest.df.copy()
    nv = leaking.index[leaking.dx == 'nv']
    train, test = (next(i for i in nv if leaking.role[i] == r) for r in ('train', 'test'))
    leaking.loc[test, 'lesion_id'] = leaking.lesion_id[train]
    with pytest.raises(LeakError, match=r'1 lesions in two roles: Lnv\d+ \(test and train\)'): Manifest(leaking, '.')
    manifest.df = leaking
    with pytest.raises(LeakError): manifest.save(tmp_path / 'm.csv')
    assert (tmp_path / 'm.csv').read_bytes() == good
    (tmp_path / 'forged.csv').write_text(data._manifest_text(manifest))  # a header whose hash fits the leak
    with pytest.raises(LeakError): Manifest.load(tmp_path / 'forged.csv', '.')


@pytest.mark.parametrize('column, value, message', [
    ('path', '/etc/passwd', 'leave the folder'), ('path', '../x.jpg', 'leave the folder'),
    ('path', r'a\..\..\x.jpg', 'leave the folder'), ('path', r'\\server\x.jpg', 'leave the folder'),
    ('role', 'dev', 'roles other than'), ('dx', 'wart', 'labels other than'), ('fold', 0.5, 'whole numbers'),
    ('fold', -2, 'whole numbers'), ('fold', 'x', 'whole numbers'), ('sha256', '', 'column sha256: 1 empty'),
    ('lesion_id', None, 'column lesion_id: 1 empty'), ('image_id', 'nv001a', 'stand twice: nv001a'),
])
def test_tables_that_are_no_manifest(manifest, column, value, message):
    df = manifest.df.astype(object)
    df.loc[df.index[df.image_id == 'nv000a'], column] = value
    with pytest.raises(DataError, match=message): Manifest(df, '.')


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_full_disk_leaves_the_old_file(tmp_path, manifest, monkeypatch, call):
    old = manifest.save(tmp_path / 'm.csv').read_bytes()
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match='No space left'): draw_manifest(lesions(11), '.', 11).save(tmp_path / 'm.csv')
    assert (tmp_path / 'm.csv').read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ['m.csv']


def test_two_writers_at_once(tmp_path):
    both = [draw_manifest(lesions(10), '.', 10, seed=s) for s in (0, 1)]
    def write(m):
        for _ in range(10): m.save(tmp_path / 'm.csv')
    threads = [threading.Thread(target=write, args=(m,)) for m in both]
    for t in threads: t.start()
    for t in threads: t.join()
    assert Manifest.load(tmp_path / 'm.csv', '.').hash in {m.hash for m in both}
    assert [p.name for p in tmp_path.iterdir()] == ['m.csv']


def test_join_duplicates_follows_chains():
    rnd = random.Random(0)
    n = 2000
    df = pd.DataFrame(dict(lesion_id=[f'{i:04}' for i in range(n)] * 2, sha256=[f's{i}' for i in range(n)] + [''] * n))
    order = rnd.sample(range(n), n)
    for a, b in zip(order, order[1:], strict=False): df.loc[n + a, 'sha256'] = df.sha256[b]
    df.loc[n + order[-1], 'sha256'] = 'end'
    assert set(join_duplicates(df).lesion_id) == {'0000'}


# ---------------------------------------------------------------- the study's roles


def test_the_committed_roles():
    m = Manifest.load(STUDY, '../shared/data/ham10000')
    assert m.hash == STUDY_HASH
    assert m.counts().to_numpy().tolist() == [[330] * 3, [55] * 3, [55] * 3, [110] * 3]
    assert m.df.lesion_id.is_unique and m.df.sha256.is_unique
    assert pd.crosstab(m.df.fold, m.df.dx).to_numpy().tolist() == [[110] * 3] + [[88] * 3] * 5
    assert m.df.path.str.fullmatch(r'HAM10000_images_part_[12]/ISIC_\d{7}\.jpg').all()
    drawn = m.df[['image_id', 'lesion_id', 'dx', 'role', 'fold']]
    text = '\n'.join(','.join(map(str, r)) for r in drawn.itertuples(index=False))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == '22eb1f355770f19a8b8447482a7a30dcc367290c268cf6e534f167975d52a02e'


def test_where_the_data_is(tmp_path, monkeypatch):
    (tmp_path / 'ham10000').mkdir()
    monkeypatch.setenv('SKIN_GRADCAM_DATA', str(tmp_path))
    assert data.real_data() == tmp_path
    monkeypatch.setenv('SKIN_GRADCAM_DATA', str(tmp_path / 'ham10000'))
    with pytest.raises(DataError, match='no folder ham10000 there'): data.real_data()
    monkeypatch.delenv('SKIN_GRADCAM_DATA')
    monkeypatch.setattr(readers.skin_gradcam, '__file__', str(tmp_path / 'elsewhere/repo/skin_gradcam/__init__.py'))
    assert data.real_data() is None
    (tmp_path / 'elsewhere/shared/data/ham10000').mkdir(parents=True)
    assert data.real_data() == tmp_path / 'elsewhere/shared/data'


@pytest.fixture(scope='session')
def ham(real_data) -> tuple[pd.DataFrame, data.ReadReport]:
    return read_folder(real_data / 'ham10000')


@pytest.mark.data
def test_the_real_archive(ham):
    df, report = ham
    assert (report.n_rows, report.n_kept, report.n_left_out) == (10015, 8917, 1098)
    assert report.kept == {'nv': (6705, 5403), 'bkl': (1099, 727), 'mel': (1113, 614)}
    assert len(report.missing_files) == 142 and set(report.missing_files.values()) == {'vasc'}
    assert report.other_classes == {'akiec': 327, 'bcc': 514, 'df': 115}
    assert sorted(report.duplicate_files) == [['ISIC_0024366', 'ISIC_0029861'], ['ISIC_0024777', 'ISIC_0029938']]
    assert not report.unreadable and not report.joined_lesions and not report.two_diagnoses and not report.no_lesion


@pytest.mark.data
def test_drawing_the_study_again_gives_the_committed_table(ham, real_data, tmp_path):
    m = draw_manifest(ham[0], real_data / 'ham10000')
    assert m.hash == STUDY_HASH
    assert m.save(tmp_path / 'roles.csv').read_bytes() == STUDY.read_bytes()


@pytest.mark.data
def test_what_the_shipped_model_may_train_on(ham, real_data):
    study = Manifest.load(STUDY, real_data / 'ham10000')
    more = extend_train(study, ham[0])
    assert more.counts().loc['train'].to_dict() == {'nv': 6435, 'bkl': 763, 'mel': 713}
    held = study.df[study.df.role != 'train']
    assert not set(held.lesion_id) & set(more.role('train').lesion_id)
    assert len(held) == len(more) - len(more.role('train'))


@pytest.mark.data
def test_a_random_split_would_leak_as_the_page_says(ham):
    df, shares = ham[0], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        some = pd.concat([df[df.dx == c].sample(550, random_state=rng) for c in CLASSES])
        test = some.sample(frac=.2, random_state=rng)
        seen = test.lesion_id.isin(some.drop(test.index).lesion_id)
        shares.append([seen.mean(), seen[test.dx == 'mel'].mean()])
    overall, mel = np.mean(shares, axis=0)
    assert abs(overall - .24) < .015 and abs(mel - .39) < .02


@pytest.mark.data
def test_the_leak_audit_finds_the_known_shares(ham):
    "550 a class, 80/20: 0.24 overall (SD .02), 0.39 of mel (SD .05), 0.30 of bkl, 0.03 of nv"
    t = data.leak_audit(ham[0], 550, .2, draws=200, seed=1)
    for name, mean in dict(all=.239, mel=.390, bkl=.297, nv=.031).items(): assert abs(t['mean'][name] - mean) < .01, t
    assert abs(t.sd['all'] - .02) < .005 and abs(t.sd.mel - .05) < .01
    assert t.loc['all', 'pictures'] == 8917 and t.loc['mel', 'lesions'] == 614


@pytest.mark.data
def test_rounds_of_the_study(real_data):
    study = Manifest.load(STUDY, real_data / 'ham10000')
    valid = pd.concat([study.with_fold(k).role('valid') for k in range(5)])
    assert sorted(valid.image_id) == sorted(study.df.image_id[study.df.role != 'test']) and len(valid) == 1320
    assert study.with_fold(0).counts().loc['train'].tolist() == [352] * 3


@pytest.mark.data
def test_files_against_the_manifest(real_data, tmp_path):
    study = Manifest.load(STUDY, real_data / 'ham10000')
    assert check_files(study) == {}
    one = study.df.path[0]
    picture(tmp_path / one)
    wrong = check_files(Manifest(study.df, tmp_path))
    assert wrong.pop(study.df.image_id[0]) == 'other bytes than when the roles were drawn'
    assert set(wrong.values()) == {'missing'} and len(wrong) == 1649


@pytest.mark.data
def test_the_command_that_draws_the_roles(ham, real_data, tmp_path, monkeypatch, capsys):
    command = load_script('tools/draw_roles.py')
    monkeypatch.setattr(command, 'read_kaggle', lambda folder: ham)
    assert command.main(['--check']) == 0
    assert command.main(['--out', str(tmp_path / 'new.csv')]) == 0
    assert (tmp_path / 'new.csv').read_bytes() == STUDY.read_bytes()
    other = draw_manifest(ham[0], real_data / 'ham10000', seed=1).save(tmp_path / 'other.csv')
    assert command.main(['--check', '--out', str(other)]) == 1
    assert 'other.csv: DIFFERENT' in capsys.readouterr().out
    monkeypatch.setenv('SKIN_GRADCAM_DATA', str(tmp_path))
    assert command.main(['--check']) == 2
    assert 'no folder ham10000 there' in capsys.readouterr().err
