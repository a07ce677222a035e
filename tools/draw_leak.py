"""Two splits of the same pictures, one by lesion and one at random: how much too good is what a random split reports?

From the lesions of HAM10000 that are not in the test role 440 *pictures* a class are drawn, as one who overlooks the
column lesion_id would draw them, so that many lesions are shown more than once. `lesions` deals them into five folds by
lesion; `pictures` gives each picture a lesion of its own, which is what a random split takes for granted. The same
recipe, cross-validated on both (results/ham10000_leak_plan.json), tells the difference in points.

usage: python tools/draw_leak.py [--check] [--data FOLDER]
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from skin_gradcam.data import DataError, Manifest, draw_folds, read_kaggle, real_data

RESULTS = Path(__file__).resolve().parent.parent / 'results'
PER_CLASS, FOLDS, SEED = 440, 5, 0


def draw(folder: Path) -> dict[str, Manifest]:
    "The two manifests by name"
    df, _ = read_kaggle(folder)
    roles = Manifest.load(RESULTS / 'ham10000_roles.csv', folder)
    free = df[~df.lesion_id.isin(roles.role('test').lesion_id)].drop_duplicates('sha256').sort_values('image_id')
    d = free.groupby('dx').sample(PER_CLASS, random_state=SEED).assign(role='train', fold=-1)
    what = dict(per_class=PER_CLASS, seed=SEED, pictures='drawn without regard to lesions')
    by_lesion = draw_folds(Manifest(d, folder, recipe=what), FOLDS, SEED)
    blind = d.assign(lesion_id='picture ' + d.image_id)
    by_picture = draw_folds(Manifest(blind, folder, recipe=what | dict(lesions='overlooked')), FOLDS, SEED)
    return dict(lesions=by_lesion, pictures=by_picture)


def leaked(by_picture: Manifest, by_lesion: Manifest) -> pd.Series:
    "Share of the pictures of each class whose lesion is also in another fold"
    fold, lesion = by_picture.df.set_index('image_id').fold, by_lesion.df.set_index('image_id').lesion_id
    d = pd.DataFrame(dict(fold=fold, lesion=lesion, dx=by_lesion.df.set_index('image_id').dx))
    return d.groupby('lesion').fold.transform('nunique').gt(1).groupby(d.dx).mean()


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--check', action='store_true', help='write nothing; exit 1 if a file differs from a new draw')
    p.add_argument('--data', type=Path, help='the folder that holds HAM10000_metadata.csv (default: found)')
    a = p.parse_args(argv)
    found = real_data()
    if a.data is None and found is None:
        print('no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/', file=sys.stderr)
        return 2
    try: drawn = draw(a.data or found / 'ham10000')
    except DataError as e:
        print(e, file=sys.stderr)
        return 2
    print(leaked(drawn['pictures'], drawn['lesions']).round(3).to_dict())
    same = True
    for name, m in drawn.items():
        file = RESULTS / f'ham10000_leak_{name}.csv'
        if a.check: same &= Manifest.load(file, m.root).hash == m.hash
        else: print(f'written: {m.save(file).name}')
    return int(not same)


if __name__ == '__main__': sys.exit(main())
