"The facts of HAM10000 as its tables show them, and statistics of the real pictures"
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from skin_gradcam.data import Manifest
from skin_gradcam.overview import (
    AGE_BANDS,
    UNKNOWN,
    average_pictures,
    channel_stats,
    each_picture,
    montage,
    plots,
    tables,
)
from skin_gradcam.pictures import PictureError

STUDY = Path(__file__).parents[1]/'results'/'ham10000_roles.csv'
CODES = ('nv', 'mel', 'bkl', 'bcc', 'akiec', 'vasc', 'df')


@pytest.fixture(scope='module')
def metadata(real_data):
    "All 10,015 rows, whether their files are there or not"
    return pd.read_csv(real_data/'ham10000'/'HAM10000_metadata.csv')


@pytest.fixture(scope='module')
def counted(metadata):
    return tables(metadata, CODES)


@pytest.mark.data
def test_composition_of_ham10000(counted):
    expected = dict(nv=(6705, 5403, 988, 2290, 6), mel=(1113, 614, 384, 883, 6), bkl=(1099, 727, 287, 659, 6),
                    bcc=(514, 327, 152, 339, 4), akiec=(327, 228, 77, 176, 4), vasc=(142, 98, 34, 78, 4),
                    df=(115, 73, 34, 76, 3), all=(10015, 7470, 1956, 4501, 6))
    assert {k: tuple(v) for k, v in counted['classes'].T.items()} == expected
    views = counted['pictures a lesion'].lesions['all']
    assert views.to_dict() == {'1': 5514, '2': 1423, '3': 490, '4': 34, '5': 5, '6': 4, 'all': 7470}


@pytest.mark.data
def test_how_ham10000_was_diagnosed(counted):
    t = counted['diagnosis method'].pictures
    assert t['all'].to_dict() == dict(histo=5340, confocal=69, consensus=902, follow_up=3704, all=10015)
    assert t.loc['histo', list(CODES)].tolist() == [2498, 1113, 766, 514, 327, 67, 55]
    assert t.mel.to_dict() == dict(histo=1113, confocal=0, consensus=0, follow_up=0, all=1113)
    lesions = counted['diagnosis method'].lesions.loc['histo']  # the stratum that figures are also given for
    assert (lesions.nv, lesions.bkl, lesions.mel) == (1367, 487, 614)


@pytest.mark.data
def test_people_of_ham10000(counted):
    age, sex, site = (counted[k].pictures for k in ('age', 'sex', 'site'))
    assert (age.loc['0 (doubtful)', 'all'], age.loc[UNKNOWN, 'all']) == (39, 57)
    assert age.loc['0 (doubtful)', ['nv', 'bkl', 'mel']].tolist() == [30, 5, 0]
    assert sex[['nv', 'mel', 'bkl']].to_dict('list') == dict(
        nv=[3237, 3421, 47, 6705], mel=[424, 689, 0, 1113], bkl=[463, 626, 10, 1099])
    assert list(sex.index) == ['female', 'male', UNKNOWN, 'all'] and sex.loc[UNKNOWN, 'all'] == 57
    assert site.loc[UNKNOWN, 'all'] == 234 and site.index[-2] == UNKNOWN
    assert age.loc[['under 10', '10 to 19'], ['mel', 'bkl']].sum().tolist() == [1, 1]       # the data card says so
    assert set(age.index) <= {*AGE_BANDS, UNKNOWN, 'all'}


@pytest.mark.data
def test_nothing_is_lost_in_any_table(counted, metadata):
    for name, t in counted.items():
        if name == 'classes': continue
        assert t.pictures[:-1].sum().tolist() == t.pictures.loc['all'].tolist(), name
        assert t.loc['all', ('lesions', 'all')] == metadata.lesion_id.nunique(), name
        assert (t.lesions[:-1].sum() >= t.lesions.loc['all']).all(), name


@pytest.mark.data
def test_statistics_of_the_training_role(real_data):
    m = Manifest.load(STUDY, real_data/'ham10000')
    mean, std = channel_stats(m, size=32)
    slow = np.stack([np.asarray(Image.open(p).convert('RGB').resize((32, 32), Image.Resampling.BILINEAR))
                     for p in m.paths(m.role('train'))])/255
    np.testing.assert_allclose(mean, slow.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(std, slow.std((0, 1, 2)), atol=1e-12)
    assert mean[0] > mean[2] > mean[1] and (std < .25).all()      # skin is pink


@pytest.mark.data
def test_average_pictures_of_real_lesions(real_data):
    m = Manifest.load(STUDY, real_data/'ham10000')
    for name, a in average_pictures(m.role('valid'), m.root, size=48).items():
        assert a.n == 55 and a.mean[24, 24].mean() < a.mean[2:6, 20:28].mean() - .1, name   # dark in the middle
        assert a.mean.min() > 0 and 0 < a.std.max() <= .5


@pytest.mark.data
def test_a_real_montage_can_be_looked_at(real_data):
    m = Manifest.load(STUDY, real_data/'ham10000')
    sheet = montage(m.role('valid'), m.root, n=4, side=64)
    tile = np.asarray(sheet.image)[:64, 44:108]
    assert sheet.image.size == (44 + 4*68 - 4, 3*68 - 4) and tile.std() > 5


def test_squares_do_not_overflow(tmp_path):
    "White pictures give the largest sums there are"
    paths = [tmp_path/f'{i}.png' for i in range(40)]
    for p in paths: Image.new('RGB', (64, 64), 'white').save(p)
    mean, std = channel_stats(paths, size=512)
    assert mean.tolist() == [1, 1, 1] and std.tolist() == [0, 0, 0]


def test_few_pictures_wait_in_memory(tmp_path, monkeypatch):
    "However slow the reader of the stream, at most a handful are decoded ahead"
    Image.new('RGB', (16, 16)).save(tmp_path/'a.png')
    opened = []

    def read(path):
        opened.append(path)
        return Image.open(path).convert('RGB')
    monkeypatch.setattr('skin_gradcam.overview.open_picture', read)
    stream = each_picture([tmp_path/'a.png']*100, 16, workers=2)
    next(stream)
    assert len(opened) <= 5
    assert sum(1 for _ in stream) == 99 and len(opened) == 100


def test_one_broken_picture_is_named_and_the_threads_end(tmp_path):
    Image.new('RGB', (16, 16)).save(tmp_path/'good.png')
    (tmp_path/'bad.jpg').write_bytes(b'\xff\xd8\xff half')
    with pytest.raises(PictureError, match=r'bad\.jpg'):
        channel_stats([tmp_path/'good.png', tmp_path/'bad.jpg']*20, size=16)


@pytest.mark.parametrize('classes', [('nv',), ('nv', 'bkl', 'mel'), CODES, ('wart', 'callus')])
def test_plots_for_any_classes(classes):
    n = 3*len(classes)
    df = pd.DataFrame(dict(image_id=map(str, range(n)), dx=list(classes)*3, lesion_id=[str(i//2) for i in range(n)],
                           age=[None]*n, localization='back', dx_type=''))
    drawn = plots(df)
    assert list(drawn) == ['pictures a lesion', 'diagnosis method', 'age', 'site']
    for f in drawn.values():
        assert len(f.axes[0].containers) == len(classes) and f.dpi == 72
        f.canvas.draw()


def test_import_is_light():
    heavy = "{'torch','fastai','timm','torchvision','matplotlib'}"
    code = f"import sys, skin_gradcam.overview; print(sorted({heavy} & set(sys.modules)))"
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert got.stdout.strip() == '[]', got.stderr
