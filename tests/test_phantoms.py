"""Phantoms: what has no place on their page (many seeds, extremes, other sizes, what a fresh process imports)."""
import hashlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from skin_gradcam.lesions import CLASSES
from skin_gradcam.phantoms import draw_phantom, each_phantom, phantom_grid, phantom_set, write_phantoms

SMALL = dict(width=120, height=90)
OPTIONS = dict(drawn={}, ragged=dict(asymmetry=1., border=1.), round=dict(asymmetry=0., border=0.),
               covered=dict(hair=1., vignette=1.))


def run(code):
    "What `code` prints in a new process"
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()


def test_no_torch():
    assert run("import sys, skin_gradcam.phantoms; "
               "print([m for m in ('torch', 'fastai', 'timm', 'cv2') if m in sys.modules])") == '[]'


def test_import_does_no_work():
    assert run("import skin_gradcam.phantoms as p; print(p.spectrum.cache_info().currsize)") == '0'


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize('view', [0, 1, 2])
def test_promises_hold_for_any_seed(options, view):
    for seed in range(0, 1200, 100):
        p = draw_phantom(CLASSES[seed // 100 % 3], seed, view=view, **SMALL, **options)
        assert .08 < p.evidence_share <= .15, p
        assert not (p.evidence & ~p.lesion_mask).any()
        rim = np.ones_like(p.evidence); rim[2:-2, 2:-2] = False
        assert not (p.evidence & rim).any(), f'evidence touches the frame: {p}'
        assert .25 < p.lesion_mask.mean() < .6
        largest = ndimage.sum_labels(p.evidence, *ndimage.label(p.evidence)[:1], index=range(1, 9)).max()
        assert largest > .97 * p.evidence.sum(), 'the patch is one piece'


def test_same_picture_in_another_process():
    code = ("import hashlib; from skin_gradcam.phantoms import draw_phantom as d; "
            "print(hashlib.sha256(d('bkl', 123, ink=True, ruler=True, bubbles=3).image.tobytes()).hexdigest())")
    here = draw_phantom('bkl', 123, ink=True, ruler=True, bubbles=3).image
    assert run(code) == hashlib.sha256(here.tobytes()).hexdigest()


def test_one_part_leaves_the_others_alone():
    a, b = draw_phantom('nv', 4, hair=0), draw_phantom('nv', 4, hair=0, ruler=True, ink=True)
    assert (a.lesion_mask == b.lesion_mask).all() and (a.evidence == b.evidence).all()
    changed = (a.image != b.image).any(-1)
    assert not changed[~ndimage.binary_dilation(b.artefact, iterations=14)].any() and changed[b.artefact].mean() > .95


def test_shortcuts_stay_off_the_evidence():
    drawn = [draw_phantom('mel', s, ruler=True, ink=True, **SMALL) for s in range(40)]
    assert all(p.artefact.any() for p in drawn)
    assert sum((p.artefact & p.evidence).sum() for p in drawn) < .02 * sum(p.evidence.sum() for p in drawn)


def test_the_patch_does_not_lean_on_the_class():
    """Same seed, same place: outside the evidence the classes are the same picture, and its mask is the same too."""
    for seed in range(12):
        a, b, c = (draw_phantom(c, seed, view=seed % 2, **SMALL) for c in CLASSES)
        assert (a.evidence == b.evidence).all() and (a.evidence == c.evidence).all()
        assert (a.image == b.image)[~a.evidence].all() and (a.image == c.image)[~a.evidence].all()


def test_strength_fades_the_sign():
    none, half, full = (draw_phantom('mel', 9, hair=0, veil=s) for s in (0, .5, 1))
    change = [np.abs(p.image.astype(float) - none.image)[full.evidence].mean() for p in (half, full)]
    assert 3 < change[0] < change[1]
    assert not none.evidence.any() and none.options['signs'] == dict.fromkeys(CLASSES, 0.)


def test_every_sign_at_its_own_place():
    p = draw_phantom('mel', 23, network=1, cysts=1)
    a, b, c = (p.features[k] for k in CLASSES)
    assert (p.evidence == c).all()
    assert max((a & b).sum(), (a & c).sum(), (b & c).sum()) < .25 * min(a.sum(), b.sum(), c.sum())


@pytest.mark.parametrize('size', [(600, 450), (224, 224), (150, 200), (400, 200), (16, 16)])
def test_sizes(size):
    w, h = size
    p = draw_phantom('nv', 6, width=w, height=h)
    assert p.image.shape == (h, w, 3) and p.lesion_mask.shape == p.evidence.shape == p.artefact.shape == (h, w)
    assert p.evidence.any() and p.image.std() > 5


def test_resolution_changes_nothing_but_resolution():
    small, large = draw_phantom('bkl', 8), draw_phantom('bkl', 8, width=600, height=450)
    for a, b in ((small.lesion_mask, large.lesion_mask), (small.evidence, large.evidence)):
        b = b[::2, ::2] | b[1::2, 1::2]
        assert (a & b).sum() / (a | b).sum() > .93


def test_views_differ_as_pictures_do():
    a, b = draw_phantom('nv', 2, view=0), draw_phantom('nv', 2, view=1)
    assert a.lesion_id == b.lesion_id and a.image_id != b.image_id
    assert (a.image != b.image).mean() > .5 and (a.evidence != b.evidence).any()
    assert draw_phantom('bkl', 2).lesion_id != a.lesion_id


def test_bad_options():
    with pytest.raises(ValueError, match='unknown class'): draw_phantom('akiec', 0)
    with pytest.raises(ValueError, match='non-negative'): draw_phantom('nv', -1)
    with pytest.raises(ValueError, match='veil is -0.1'): draw_phantom('nv', 0, veil=-.1)
    with pytest.raises(ValueError, match='hair is nan'): draw_phantom('nv', 0, hair=float('nan'))
    with pytest.raises(TypeError, match='beard'): draw_phantom('nv', 0, beard=1)
    with pytest.raises(ValueError, match='at least 1'): next(each_phantom(3, views=0))


def test_bad_options_leave_no_half_set(tmp_path):
    with pytest.raises(ValueError, match='hair'): write_phantoms(tmp_path / 'x', per_class=1, hair=3)
    assert not (tmp_path / 'x' / 'HAM10000_metadata.csv').exists()


def test_written_set_is_the_same_each_time(tmp_path):
    roots = [write_phantoms(tmp_path / n, per_class=2, seed=5, views=2, **SMALL) for n in 'ab']
    files = [sorted(p.relative_to(r) for p in r.rglob('*') if p.is_file()) for r in roots]
    assert files[0] == files[1] and len(files[0]) == 3 * 12 + 1
    assert all((roots[0] / f).read_bytes() == (roots[1] / f).read_bytes() for f in files[0])


def test_written_set_reads_like_kaggles(tmp_path):
    root = write_phantoms(tmp_path / 'set', per_class=3, seed=1, **SMALL)
    df = pd.read_csv(root / 'HAM10000_metadata.csv')
    assert list(df.columns) == ['lesion_id', 'image_id', 'dx', 'dx_type', 'age', 'sex', 'localization']
    assert df.image_id.is_unique and (df.dx_type == 'phantom').all()
    assert df.dx.value_counts().to_dict() == dict.fromkeys(CLASSES, 3)
    for i in df.image_id:
        mask = Image.open(root / 'HAM10000_segmentations_lesion_tschandl' / f'{i}_segmentation.png')
        spot = Image.open(root / 'evidence' / f'{i}_evidence.png')
        photo = Image.open(root / 'HAM10000_images_part_1' / f'{i}.jpg')
        assert mask.mode == spot.mode == '1' and mask.size == spot.size == photo.size == (120, 90)
        assert not (np.asarray(spot) & ~np.asarray(mask)).any()


def test_seeds_of_sets_do_not_meet():
    a, b = phantom_set(4, seed=0, **SMALL), phantom_set(4, seed=1, **SMALL)
    assert not {p.options['seed'] for p in a} & {p.options['seed'] for p in b}


def test_grid_takes_mixed_sizes():
    mixed = [draw_phantom('nv', 1), draw_phantom('mel', 1, width=224, height=224)]
    sheet = phantom_grid(mixed, columns=3, width=60, masks=True)
    assert sheet.image.size == (2 * 64 - 4, 60) and sheet.jpeg().startswith(b'\xff\xd8')
