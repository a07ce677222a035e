"""Draw the roles of the HAM10000 study from the real table: results/ham10000_roles.csv.

They were drawn once and stay as they are. `--check` draws them again in memory and compares; without it the file is
written.

usage: python tools/draw_roles.py [--check] [--data FOLDER] [--out FILE]
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skin_gradcam.data import DataError, Manifest, draw_manifest, read_kaggle, real_data

TABLE = Path(__file__).resolve().parent.parent / 'results' / 'ham10000_roles.csv'


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--check', action='store_true', help='write nothing; exit 1 if the file differs from a new draw')
    p.add_argument('--data', type=Path, help='the folder that holds HAM10000_metadata.csv (default: found)')
    p.add_argument('--out', type=Path, default=TABLE, help='the file to write or to compare')
    a = p.parse_args(argv)
    try:
        found = real_data()
        if a.data is None and found is None:
            raise DataError('no real pictures found: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
        folder = a.data or found / 'ham10000'
        df, report = read_kaggle(folder)
        print(report)
        drawn = draw_manifest(df, folder)
        print(drawn)
        if a.check:
            same = Manifest.load(a.out, folder).hash == drawn.hash
            print(f'{a.out.name}: {"the same" if same else "DIFFERENT"}')
            return 0 if same else 1
        print(f'written: {drawn.save(a.out).name}')
    except DataError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
