"""What a move of a slider costs in "Draw the evidence", and how much of it is the model.

The claim: from the new value of a slider to the new picture, map and numbers at most 80 ms in the median on two cores,
of which the network is the largest part. Every slider is moved to ten places it has not been at, as a person would drag
it, all callbacks included; what the browser adds (it draws two JPEGs of about 10 kB) is not in it. The parts are
measured side by side in the same run, so that their ratio holds on a busy machine too.

    python benchmarks/widget_latency.py             # writes results/widget_latency.json
    python benchmarks/widget_latency.py --no-write  # only prints
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MS, PLACES = 80, 10


def ms(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return 1000 * (time.perf_counter() - start)


def measure() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    "Milliseconds of each move by slider, and of the parts of a step"
    from skin_gradcam.demo_logic import Features, closed_view, draw_features, paint_view
    from skin_gradcam.pictures import squash, to_input
    from skin_gradcam.widgets import evidence_demo
    demo = evidence_demo()
    state, ask = demo.parts.state, demo.parts.state.explainer
    info = ask.bundle.info
    moves: dict[str, list[float]] = {k: [] for k in state.sliders}
    parts: dict[str, list[float]] = dict(drawing_sign=[], drawing_outline=[], squashing=[], network=[], painting=[])
    for i in range(PLACES):
        for k, slider in state.sliders.items():  # in turn, so that a slow second hits all alike
            value = round(.05 + .9 * ((i * .37) % 1), 2)
            moves[k].append(ms(lambda s=slider, v=value: setattr(s, 'value', v)))
        f = Features(seed=state.seed.value, asymmetry=(i + .5) / PLACES, veil=(i + 1) / PLACES)  # of the same lesion
        parts['drawing_outline'].append(ms(lambda f=f: draw_features(f)))
        parts['drawing_sign'].append(ms(lambda f=f: draw_features(replace(f, veil=f.veil / 2))))
        picture = draw_features(f).picture
        x = to_input(squash(picture, info.size)[0], info.mean, info.std)[None]
        parts['squashing'].append(ms(lambda p=picture: to_input(squash(p, info.size)[0], info.mean, info.std)))
        parts['network'].append(ms(lambda x=x: ask.backend(x)))
        e = ask(picture, 'x')
        parts['painting'].append(ms(lambda e=e: paint_view(e.picture, closed_view(e, 'mel'))))
    assert not demo.parts.said.value, demo.parts.said.value
    return moves, parts


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--no-write', action='store_true')
    args = p.parse_args()
    before = os.getloadavg()[0]
    moves, parts = measure()
    everything = [v for vs in moves.values() for v in vs]
    step = float(np.median(everything))
    slow = float(np.percentile(everything, 90))
    figures = dict(step_ms=round(step, 1), slow_step_ms=round(slow, 1), limit_ms=LIMIT_MS,
                   network_share=round(float(np.median(parts['network'])) / step, 2),
                   by_slider_ms={k: round(float(np.median(v)), 1) for k, v in moves.items()},
                   parts_ms={k: round(float(np.median(v)), 1) for k, v in parts.items()},
                   cores=len(os.sched_getaffinity(0)), load_before=round(before, 1), python=platform.python_version())
    print(json.dumps(figures, indent=1))
    busy = before > figures['cores'] / 2
    if busy: print(f'The machine was busy (load {before:.1f}): only the ratios mean something.')
    if not args.no_write: (ROOT / 'results/widget_latency.json').write_text(json.dumps(figures, indent=1) + '\n')
    return 0 if step <= LIMIT_MS or busy else 1


if __name__ == '__main__': sys.exit(main())
