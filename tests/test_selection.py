"Selection: several processes, folds that fail, answers that were tampered with, and what the leaderboard is made of"
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from skin_gradcam.data import Manifest, draw_manifest, read_folder
from skin_gradcam.evaluation import balanced_accuracy, softmax
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.selection import (OutOfFold, Trial, TrialError, choose, fold_file, fold_manifest, leaderboard,
                                    read_fold, read_plan, read_trial, run_trials, trial_interval)
from skin_gradcam.training import Recipe

ROOT = Path(__file__).resolve().parent.parent
TINY = Recipe(arch='resnet18', pretrained=False, size=48, epochs=1, freeze_epochs=0, bs=4)


@pytest.fixture(scope='module')
def manifest(tmp_path_factory) -> Manifest:
    folder = write_phantoms(tmp_path_factory.mktemp('selection') / 'phantoms', per_class=10, seed=0)
    return draw_manifest(read_folder(folder)[0], folder, per_class=10, shares=(4, 2, 2, 2), folds=2, seed=0)


@pytest.fixture(scope='module')
def answers(manifest, tmp_path_factory) -> Path:
    "Answers of one trial, run in this process with one thread"
    out, n = tmp_path_factory.mktemp('answers'), torch.get_num_threads()
    torch.set_num_threads(1)
    try: run_trials([Trial('tiny', TINY)], manifest, out / 'trials', out / 'work', cache='memory', progress=False)
    finally: torch.set_num_threads(n)
    return out / 'trials'


def test_two_processes_give_the_answers_of_one_and_a_failing_trial_stops_nobody(manifest, answers, tmp_path):
    trials = [Trial('lost', TINY.change(weights_file='nowhere.safetensors')), Trial('tiny', TINY)]
    with pytest.raises(TrialError, match='lost, seed 0, fold 0: ModelError: nowhere.safetensors: no such weights file'):
        run_trials(trials, manifest, tmp_path / 't', tmp_path / 'w', jobs=2, cache=None, progress=False)
    for k in (0, 1):
        one, two = (json.loads(fold_file(d, trials[1], 0, k).read_text()) for d in (answers, tmp_path / 't'))
        assert one['logits'] == two['logits'] and one['image_id'] == two['image_id'] and two['threads'] == 1
    assert not (tmp_path / 't' / 'lost').exists()
    assert sorted(f.name for f in (tmp_path / 'w' / 'tiny').iterdir()) == [f'seed0-fold{k}.safetensors' for k in (0, 1)]


@pytest.mark.parametrize('spoil, said', [
    (lambda t: t[:len(t)//2], 'cannot be read'), (lambda t: '', 'cannot be read'),
    (lambda t: '[]', 'no answers of a fold'),
    (lambda t: t.replace('"schema": 1', '"schema": 9'), 'no answers of a fold of this version'),
    (lambda t: json.dumps(json.loads(t) | dict(manifest='0'*64)), 'other pictures or roles'),
    (lambda t: json.dumps(json.loads(t) | dict(per_class=3)), 'another per_class')])
def test_spoiled_answers_are_refused_with_their_name(spoil, said, manifest, answers, tmp_path):
    t = Trial('tiny', TINY)
    file = fold_file(tmp_path, t, 0, 0)
    file.parent.mkdir()
    file.write_text(spoil(fold_file(answers, t, 0, 0).read_text()))
    with pytest.raises(TrialError, match=f'seed0-fold0.json.*{said}'): read_fold(file, t, 0, manifest)


def test_answers_for_fewer_pictures_are_noticed(manifest, answers, tmp_path):
    t = Trial('tiny', TINY)
    for k in (0, 1):
        d = json.loads(fold_file(answers, t, 0, k).read_text())
        for key in ('image_id', 'logits', 'logits_views', 'y'): d[key] = d[key][k:]
        file = fold_file(tmp_path, t, 0, k)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(d))
    with pytest.raises(TrialError, match='1 pictures have no answer'): read_trial(t, manifest, tmp_path)


def test_no_lesion_of_a_fold_is_trained_on(manifest):
    for k in (0, 1):
        m = fold_manifest(manifest, k)
        assert not set(m.role('train').lesion_id) & set(m.role('valid').lesion_id)
        assert not set(m.df.image_id) & set(manifest.role('test').image_id)


def test_a_learning_curve_is_nested_and_judged_on_the_same_pictures(manifest):
    few, more, whole = (fold_manifest(manifest, 0, n) for n in (2, 3, None))
    assert set(few.role('train').image_id) < set(more.role('train').image_id) < set(whole.role('train').image_id)
    assert set(few.role('valid').image_id) == set(whole.role('valid').image_id)
    assert few.role('train').dx.value_counts().to_dict() == dict(nv=2, bkl=2, mel=2)
    with pytest.raises(TrialError, match='50 pictures a class asked for'): fold_manifest(manifest, 0, 50)


def made_up(name: str, skill: float, parameters: int, seeds: int = 1, outside: str = '', n: int = 300) -> OutOfFold:
    "Answers whose skill is known"
    rng, y = np.random.default_rng(1), np.arange(n) % 3
    noise = rng.normal(size=(1, n, 3)) + .3 * np.random.default_rng(len(name)).normal(size=(seeds, n, 3))
    ids = np.arange(n).astype(str)
    t = Trial(name, TINY, tuple(range(seeds)), outside=outside)
    return OutOfFold(t, ids, ids, y, np.arange(n) // 3 % 5, noise + skill * np.eye(3)[y], 60., parameters)


def test_the_smallest_that_equals_the_best_is_taken():
    best, equal = made_up('large', 2.02, 4_000_000), made_up('small', 2., 2_000_000)
    worse = made_up('bad', 1., 1_000_000)
    taken, why = choose([best, worse, equal])
    assert taken is equal and 'not distinguishable' in why and ': distinguishable' in why
    assert 'small is taken: it cannot be told apart from large' in why


def test_what_is_outside_or_too_large_is_not_taken():
    scratch, huge = made_up('scratch', 5., 1_000_000, outside='from random weights'), made_up('huge', 5., 9_000_000)
    fair = made_up('fair', 1., 3_000_000)
    assert choose([scratch, huge, fair])[0] is fair
    assert list(leaderboard([scratch, huge, fair], 200).trial)[-1] == 'fair'  # shown all the same


def test_the_figure_of_several_seeds_is_their_mean():
    o = made_up('seeds', 1.5, 1, seeds=3)
    single = [balanced_accuracy(o.y, softmax(v)) for v in o.logits]
    assert trial_interval(balanced_accuracy, o, 200).value == pytest.approx(np.mean(single))
    assert leaderboard([o], 200).spread[0] == pytest.approx(np.ptp(single))


def test_the_plan_of_the_study():
    trials = {t.name: t for t in read_plan(ROOT / 'results' / 'ham10000_plan.json')}
    able = [t for t in trials.values() if not t.outside]
    assert len({json.dumps(t.recipe.to_dict()) for t in able}) >= 6
    assert {t.recipe.arch for t in able} >= {'tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2',
                                             'mobilenetv2_100'}
    assert all('random weights' in t.outside for t in trials.values() if not t.recipe.pretrained)
