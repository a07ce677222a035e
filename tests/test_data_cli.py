"`skin-gradcam data ...` as a process: what a person types, and what they read when it is wrong"
from __future__ import annotations

import os

import pandas as pd
import pytest
from test_cli import call

from skin_gradcam.data import Manifest
from skin_gradcam.phantoms import write_phantoms


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    os.environ['SKIN_GRADCAM_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    yield
    del os.environ['SKIN_GRADCAM_CACHE']


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp('drawn'), per_class=12, views=2, seed=2, width=96, height=72)


@pytest.fixture(scope='module')
def own_table(tmp_path_factory, drawn):
    "The same pictures with a table of one's own: other columns, other words"
    folder = tmp_path_factory.mktemp('own')
    t = pd.read_csv(drawn / 'HAM10000_metadata.csv')
    for p in (drawn / 'HAM10000_images_part_1').iterdir(): (folder / p.name).write_bytes(p.read_bytes())
    words = dict(nv='Nevus', mel='Melanoma', bkl='Keratosis')
    t = pd.DataFrame(dict(Datei=t.image_id + '.JPG', Diagnose=t.dx.map(words), Herd=t.lesion_id))
    t.to_csv(folder / 'befunde.csv', index=False, sep=';', encoding='utf-8-sig')
    return folder


OWN = ['--image', 'Datei', '--label', 'Diagnose', '--lesion', 'Herd',
       '--word', 'nevus=nv', '--word', 'melanoma=mel', '--word', 'keratosis=bkl']


def fails(*args, cwd=None) -> str:
    "The one line on the error stream of a command that ends with code 2"
    code, out, err = call('data', *args, cwd=cwd)
    assert code == 2 and err.count('\n') == 1 and err.startswith('skin-gradcam: ') and 'Traceback' not in err, err
    return err


def test_check_then_draw(drawn, tmp_path):
    code, out, err = call('data', 'check', drawn, '--out', tmp_path / 'checked')
    assert code == 0, err
    assert '72 of 72 rows kept' in out and 'diagnosis method' in out
    assert {p.name for p in (tmp_path / 'checked').iterdir()} == {'check.html', 'left_out.csv', 'near_duplicates.csv'}
    code, out, err = call('data', 'draw', drawn, '--out', tmp_path / 'roles.csv', '--all-pictures', '--folds', 3)
    assert code == 0, err
    m = Manifest.load(tmp_path / 'roles.csv', drawn)
    assert len(m) == 72 and m.df.fold.max() == 2


def test_a_table_of_ones_own(own_table, tmp_path):
    code, out, err = call('data', 'check', own_table, *OWN)
    assert code == 0 and '72 of 72 rows kept' in out, err
    code, out, err = call('data', 'audit', own_table, *OWN, '--draws', 3)
    assert code == 0 and 'mean' in out, err
    code, out, err = call('data', 'draw', own_table, *OWN, '--out', tmp_path / 'roles.csv')
    assert code == 0, err
    assert Manifest.load(tmp_path / 'roles.csv', own_table).df.lesion_id.str.startswith('PL_').all()


def test_what_is_wrong_is_one_line(drawn, own_table, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert 'neither HAM10000_metadata.csv' in fails('check', tmp_path / 'empty')
    assert "no column 'dx'" in fails('check', own_table, '--image', 'Datei', '--lesion', 'Herd')
    assert 'no column' in fails('audit', own_table)
    assert "no usable picture" in fails('check', own_table, *OWN[:6])  # words of the table that nobody translated
    assert 'does not exist' in fails('check', tmp_path / 'nowhere')
    assert '--word nevus: write WORD=CLASS' in fails('draw', drawn, '--out', tmp_path / 'x.csv', '--word', 'nevus')
    assert 'columns missing: dataset' in fails('draw', drawn, '--out', tmp_path / 'x.csv', '--stratify', 'dataset')
    assert 'use at most 12' in fails('draw', drawn, '--out', tmp_path / 'x.csv', '--per-class', 13)
    assert not (tmp_path / 'x.csv').exists()
    (tmp_path / 'torn.csv').write_text('# skin_gradcam manifest\n# schema: 1\n')
    assert 'torn.csv: not a manifest' in fails('card', '--manifest', tmp_path / 'torn.csv', '--out', tmp_path / 'c.md')


def test_a_manifest_is_not_overwritten(drawn, tmp_path):
    args = ['draw', drawn, '--out', tmp_path / 'roles.csv', '--per-class', 10]
    assert call('data', *args)[0] == 0
    first = (tmp_path / 'roles.csv').read_bytes()
    assert 'already there' in fails(*args, '--seed', 1) and (tmp_path / 'roles.csv').read_bytes() == first
    assert call('data', *args, '--seed', 1, '--overwrite')[0] == 0 and (tmp_path / 'roles.csv').read_bytes() != first


def test_card_of_phantoms(drawn, tmp_path):
    assert call('data', 'draw', drawn, '--out', tmp_path / 'roles.csv', '--per-class', 10)[0] == 0
    args = ['card', '--manifest', tmp_path / 'roles.csv', '--out']
    code, out, err = call('data', *args, tmp_path / 'c.html', '--data', drawn)
    assert code == 0 and 'not answered yet: ' in out, err
    assert '<html' in (tmp_path / 'c.html').read_text()
    assert 'c.pdf' in fails(*args, tmp_path / 'c.pdf')
