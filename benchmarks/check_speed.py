"""What a full check of HAM10000 costs, the first time and the second, in memory, and what it finds.

The claim: `check_folder` looks at the 9,873 pictures and masks of the archive within 60 s on two cores, and a second
time within 5 s; it takes at most 300 MB above what the imports take. Each check is a process of its own, so that memory
and imports count anew; the second finds the memory of the first.

    python benchmarks/check_speed.py             # writes results/data_check.json
    python benchmarks/check_speed.py --no-write  # only prints
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = dict(first_s=60, second_s=5, memory_mb=300)

ONE = """
import json, resource, sys, time
start = time.perf_counter()
import psutil
from skin_gradcam.checks import check_folder
imports, base = time.perf_counter() - start, psutil.Process().memory_info().rss
c = check_folder(sys.argv[1])
check = time.perf_counter() - start - imports
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
near = {d: check_folder(sys.argv[1], distance=d, patient_distance=0) for d in (2, 4)} if sys.argv[2] == 'facts' else {}
alike = c.near[(c.near.same_dx & c.near.same_patient).astype(bool)]
facts = dict(pictures=c.n_files, masks=c.masks.n, kept=c.report.kept, left_out=c.report.n_left_out,
             missing=len(c.report.missing_files), unreadable=len(c.report.unreadable),
             identical=[sorted(g) for g in c.report.duplicate_files], masks_over_all=c.masks.whole,
             empty_masks=len(c.masks.empty), two_diagnoses=len(c.report.two_diagnoses),
             same_patient=dict(pairs=len(alike), other_lesion=int((~alike.same_lesion.astype(bool)).sum())),
             near={d: dict(pairs=len(o.near), other_lesion=len(o.for_review),
                           other_diagnosis=int((~o.for_review.same_dx.astype(bool)).sum())) for d, o in near.items()})
print(json.dumps(dict(imports=imports, check=check, memory=(peak - base)/2**20, facts=facts)))
"""


def one(folder: Path, cache: str, what: str) -> dict:
    "One check in a process of its own"
    env = os.environ | dict(SKIN_GRADCAM_CACHE=cache)
    command = [sys.executable, '-c', ONE, str(folder), what]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--no-write', action='store_true')
    args = p.parse_args()
    from skin_gradcam.readers import real_data
    data = real_data()
    if data is None: p.error('the real pictures are needed: set SKIN_GRADCAM_DATA to the folder that holds ham10000/')
    with tempfile.TemporaryDirectory() as cache:
        first, second = (one(data / 'ham10000', cache, 'time') for _ in range(2))
        facts = one(data / 'ham10000', cache, 'facts')['facts']
    measured = dict(first_s=round(first['check'], 1), second_s=round(second['check'], 1),
                    memory_mb=round(max(first['memory'], second['memory'])), imports_s=round(first['imports'], 1))
    result = dict(measured=measured, limits=LIMITS, cores=os.cpu_count(), python=platform.python_version(), found=facts)
    print(json.dumps(result, indent=1))
    late = [k for k, v in LIMITS.items() if measured[k] > v]
    if late: print('over the limit:', ', '.join(late))
    if not args.no_write: (ROOT / 'results/data_check.json').write_text(json.dumps(result, indent=1) + '\n')
    return int(bool(late))


if __name__ == '__main__': sys.exit(main())
