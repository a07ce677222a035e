"""What the maps cost: `skin_gradcam.gradcam` against a plain forward pass, with the peers in the same rounds.

The claim: the maps of all three classes cost at most 1.05 times a plain `inference_mode` forward pass, and the graph
kept for them is at most 0.1 MiB an image (weights not counted).

CPU time of one thread, so that other jobs on the machine count as little as possible. They still count: they take turns
in the caches and share the core, which makes the same forward pass up to half as slow again from one second to the
next. Therefore

- each run of a contender stands between two runs of the plain forward pass, and is divided by their mean;
- the order changes from round to round, and the table shows the median of these ratios over the rounds, with a 95 %
  interval of the median (order statistics, no assumption about the noise);
- our own maps are measured in more rounds, until the interval is narrower than 0.02 or the rounds are used up; the
  peers, which are far from the limit, in every fourth round.

Random weights, evaluation mode, float32, 224x224 pixels.

    python benchmarks/gradcam_cost.py            # the full run, about 15 minutes; writes results/gradcam_cost.json
    python benchmarks/gradcam_cost.py --quick    # half a minute, one network and batch; writes nothing without --out
"""
from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torchvision
from medians import interval
from torch import Tensor, nn
from tqdm import tqdm

from skin_gradcam.gradcam import closed_form, gradcam

ROOT = Path(__file__).resolve().parent.parent
N_CLASSES, SIZE, LIMIT_RATIO, LIMIT_MIB = 3, 224, 1.05, .1
FORWARD, OURS = 'plain forward (inference_mode)', 'skin_gradcam gradcam'
ROUNDS = {1: (20, 60), 8: (8, 20), 32: (5, 10)}        # batch: rounds at least, at most
QUICK = {1: (4, 4)}
NARROW, PEERS_EVERY, MANY = .02, 4, 8


@dataclass
class Contender:
    name: str
    maps: int                                # classes that get a map; 0 for a forward pass alone
    run: Callable[[Tensor], object]

    @property
    def key(self) -> str: return f'{self.name}, {self.maps} class{"es" * (self.maps > 1)}' if self.maps else self.name


def networks() -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    "Name, model, name of the layer that is pooled, classifier"
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None, num_classes=N_CLASSES).eval()
    yield 'resnet18', resnet, 'layer4', resnet.fc
    lite = timm.create_model('tf_efficientnet_lite0', num_classes=N_CLASSES).eval()
    yield 'tf_efficientnet_lite0', lite, 'bn2', lite.classifier


def own(model: nn.Module, layer: str, classifier: nn.Linear) -> list[Contender]:
    "The forward pass, our maps, and the formula they equal"
    def forward(x):
        with torch.inference_mode(): return model(x)
    def formula(x):
        kept: list[Tensor] = []
        hook = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
        try:
            with torch.inference_mode():
                scores = model(x)
                return scores, closed_form(classifier.weight, kept[0])
        finally: hook.remove()
    return [Contender(FORWARD, 0, forward),
            Contender('forward, graph recorded', 0, lambda x: model(x)),
            Contender('closed form W.A/(hw)', N_CLASSES, formula),
            Contender(OURS, 1, lambda x: gradcam(model, x)),
            Contender(OURS, N_CLASSES, lambda x: gradcam(model, x, 'all')),
            Contender('skin_gradcam hirescam', N_CLASSES, lambda x: gradcam(model, x, 'all', 'hirescam')),
            Contender('skin_gradcam cam', N_CLASSES, lambda x: gradcam(model, x, 'all', 'cam'))]


def peers(model: nn.Module, layer: str, batch: int) -> list[Contender]:
    """Each in the way its own documentation shows. captum's maps and pytorch-grad-cam's cycles keep the graph of every
    class alive at once, 7 GB for three classes of 32 pictures: those two get all classes up to `MANY` pictures only."""
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM as PytorchGradCam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import GradCAM as TorchCam
    target, captum = model.get_submodule(layer), LayerGradCam(model, model.get_submodule(layer))
    def by_captum(x):
        with torch.no_grad(): best = model(x).argmax(1)
        return captum.attribute(x, best)
    def by_captum_all(x): return [captum.attribute(x, c) for c in range(N_CLASSES)]
    def by_torchcam(x):
        with TorchCam(model, layer) as cam:
            scores = model(x)
            return cam(scores.argmax(1).tolist(), scores)
    def by_torchcam_all(x):
        with TorchCam(model, layer) as cam:
            scores = model(x)
            return [cam(c, scores, retain_graph=True) for c in range(N_CLASSES)]
    def by_pgc(x):
        with PytorchGradCam(model, [target]) as cam: return cam(x, None)
    def by_pgc_all(x):
        with PytorchGradCam(model, [target]) as cam:
            return [cam(x, [ClassifierOutputTarget(c)] * len(x)) for c in range(N_CLASSES)]
    both = [('captum LayerGradCam', by_captum, by_captum_all), ('torchcam GradCAM', by_torchcam, by_torchcam_all),
            ('pytorch-grad-cam GradCAM', by_pgc, by_pgc_all)]
    return [Contender(name, n, f) for name, one, every in both for n, f in ((1, one), (N_CLASSES, every))
            if n == 1 or batch <= MANY or name == 'torchcam GradCAM']


class Kept:
    "A tensor that autograd keeps, as long as it keeps it; `alive` counts who keeps each storage"
    def __init__(self, t: Tensor, alive: Counter[tuple[int, int]]):
        self.t, self.alive = t, alive
        self.key = (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        alive[self.key] += 1

    def __del__(self) -> None:
        self.alive[self.key] -= 1
        if not self.alive[self.key]: del self.alive[self.key]


def kept_mib(model: nn.Module, run: Callable, x: Tensor) -> float:
    "MiB an image that autograd keeps for backward passes, at most at one time; each storage once, weights not counted"
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive, most = Counter[tuple[int, int]](), [0]
    def pack(t: Tensor) -> Kept:
        k = Kept(t, alive)
        most[0] = max(most[0], sum(size for pointer, size in alive if pointer not in weights))
        return k
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: k.t): run(x)
    return most[0] / len(x) / 2**20


def cpu_ms(run: Callable[[Tensor], object], x: Tensor) -> float:
    "CPU milliseconds an image of one run"
    gc.collect()
    gc.disable()
    began = time.process_time()
    result = run(x)
    took = time.process_time() - began
    gc.enable()
    del result
    return took / len(x) * 1e3


@dataclass
class Times:
    "CPU milliseconds an image of a contender, and of the forward passes before and after it, by round"
    own: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]: return [a / b for a, b in zip(self.own, self.forward, strict=True)]


def a_round(contenders: list[Contender], x: Tensor, times: dict[str, Times]) -> None:
    "Every contender once, between two forward passes"
    forward = next(c for c in contenders if c.name == FORWARD)
    before = cpu_ms(forward.run, x)
    for c in contenders:
        own, after = cpu_ms(c.run, x), cpu_ms(forward.run, x)
        times[c.key].own.append(own)
        times[c.key].forward.append((before + after) / 2)
        before = after


def measure(own: list[Contender], peers: list[Contender], x: Tensor, rounds: tuple[int, int], title: str
            ) -> dict[str, Times]:
    "Rounds until the ratio of our maps of all classes is known well enough"
    times = {c.key: Times() for c in own + peers}
    dice = random.Random(0)
    for c in own + peers: c.run(x)                                    # warm up; the layer is found here
    for r in tqdm(range(rounds[1]), desc=title, disable=None, leave=False):
        some = own + (peers if r % PEERS_EVERY == 0 else [])
        a_round(dice.sample(some, len(some)), x, times)
        low, high = interval(times[f'{OURS}, {N_CLASSES} classes'].ratios)
        if r + 1 >= rounds[0] and high - low <= NARROW: break
    return times


def table(contenders: list[Contender], times: dict[str, Times], kept: dict[str, float]) -> list[dict]:
    rows = []
    for c in contenders:
        t = times[c.key]
        low, high = interval(t.ratios)
        rows.append(dict(name=c.name, classes=c.maps, ms_per_image=round(statistics.median(t.own), 3),
                         ratio=round(statistics.median(t.ratios), 4), ratio_low=round(low, 4),
                         ratio_high=round(high, 4), rounds=len(t.own), kept_mib_per_image=round(kept[c.key], 4)))
    return rows


def show(title: str, rows: list[dict]) -> None:
    print(f'\n{title}\n{"":42s}{"ms/image":>10s}{"ratio":>8s}{"95 % interval":>16s}{"rounds":>8s}'
          f'{"kept MiB":>10s}')
    for r in rows:
        name = f'{r["name"]}, {r["classes"]} class{"es" * (r["classes"] > 1)}' if r['classes'] else r['name']
        print(f'{name:42s}{r["ms_per_image"]:10.2f}{r["ratio"]:8.3f}{r["ratio_low"]:8.3f}{r["ratio_high"]:8.3f}'
              f'{r["rounds"]:8d}{r["kept_mib_per_image"]:10.3f}')


def machine(load: list[float]) -> dict:
    packages = ('torch', 'torchvision', 'timm', 'captum', 'torchcam', 'grad-cam')
    return dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count(), threads=1,
                clock='process_time', load=[round(min(load), 1), round(max(load), 1)],
                versions={p: importlib.metadata.version(p) for p in packages})


def summary(cases: dict[str, dict]) -> dict:
    "The claim: the worst of our maps of all classes"
    ours = [r for c in cases.values() for r in c['rows'] if r['name'] == OURS and r['classes'] == N_CLASSES]
    worst, most = max(r['ratio'] for r in ours), max(r['kept_mib_per_image'] for r in ours)
    return dict(worst_ratio=worst, most_kept_mib_per_image=most, held=worst <= LIMIT_RATIO and most <= LIMIT_MIB,
                interval_within=all(r['ratio_high'] <= LIMIT_RATIO for r in ours),
                limits=dict(ratio=LIMIT_RATIO, kept_mib_per_image=LIMIT_MIB))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='resnet18, batch 1, few rounds, nothing written')
    p.add_argument('--out', type=Path, help='JSON file to write (default: results/gradcam_cost.json; --quick: none)')
    p.add_argument('--check', action='store_true', help='exit code 1 if a limit is passed')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    logging.getLogger('torchcam').setLevel(logging.ERROR)
    torch.set_num_threads(1)
    plan, cases, load = QUICK if a.quick else ROUNDS, {}, [os.getloadavg()[0]]
    out = a.out or (None if a.quick else ROOT / 'results' / 'gradcam_cost.json')
    for name, model, layer, classifier in networks():
        if a.quick and cases: break
        for batch, rounds in plan.items():
            ours, others = own(model, layer, classifier), peers(model, layer, batch)
            x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
            times = measure(ours, others, x, rounds, f'{name}, batch {batch}')
            kept = {c.key: kept_mib(model, c.run, x) for c in ours + others}
            rows = table(ours + others, times, kept)
            load.append(os.getloadavg()[0])
            show(f'{name}, batch {batch}, load of the machine {load[-1]:.1f}', rows)
            cases[f'{name}/{batch}'] = dict(network=name, batch=batch, load=round(load[-1], 1), rows=rows)
            gc.collect()
    s = summary(cases)
    print(f'\nmaps of all {N_CLASSES} classes: at most {s["worst_ratio"]:.3f} times the forward pass '
          f'(limit {LIMIT_RATIO}), at most {s["most_kept_mib_per_image"]:.4f} MiB kept an image (limit {LIMIT_MIB}): '
          f'{"held" if s["held"] else "NOT HELD"}'
          f'{"" if s["interval_within"] else " (the interval of a ratio goes beyond: repeat on a quieter machine)"}')
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = dict(machine=machine(load), size=SIZE, classes=N_CLASSES, summary=s, cases=cases)
        out.write_text(json.dumps(report, indent=1) + '\n')
        print(f'written: {out.name}')
    return int(a.check and not s['held'])


if __name__ == '__main__': sys.exit(main())
