"""What the maps cost: `skin_gradcam.gradcam` against a plain forward pass, with the peers in the same rounds.

The claim: the maps of all three classes cost at most 1.05 times a plain `inference_mode` forward pass, and the graph
kept for them is at most 0.1 MiB an image (weights not counted).

CPU time of one thread, so that other jobs on the machine count as little as possible. Every round runs each contender
once, in an order that turns from round to round; each time is divided by the forward pass of the same round, and the
table shows the median of these ratios. Random weights, evaluation mode, float32, 224x224 pixels.

    python benchmarks/gradcam_cost.py            # the full run, about half an hour; writes results/gradcam_cost.json
    python benchmarks/gradcam_cost.py --quick    # two minutes, writes nothing unless --out is given
"""
from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from skin_gradcam.gradcam import closed_form, gradcam

ROOT = Path(__file__).resolve().parent.parent
N_CLASSES, SIZE, LIMIT_RATIO, LIMIT_MIB = 3, 224, 1.05, .1
FORWARD, OURS = 'plain forward (inference_mode)', 'skin_gradcam gradcam'
ROUNDS, QUICK = {1: 31, 8: 15, 32: 9}, {1: 7, 8: 3}


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


def peers(model: nn.Module, layer: str) -> list[Contender]:
    "Each in the way its own documentation shows"
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
    return [Contender(name, n, f) for name, one, every in both for n, f in ((1, one), (N_CLASSES, every))]


def kept_mib(model: nn.Module, run: Callable, x: Tensor) -> float:
    "MiB an image that autograd keeps for a backward pass: every storage once, the weights not counted"
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): run(x)
    return sum(v for k, v in sizes.items() if k not in weights) / len(x) / 2**20


def measure(contenders: list[Contender], x: Tensor, rounds: int, bar: tqdm) -> dict[str, list[float]]:
    "CPU milliseconds an image, for each contender and round"
    times: dict[str, list[float]] = {c.key: [] for c in contenders}
    for c in contenders: c.run(x)                                     # warm up; the layer is found here
    for r in range(rounds):
        turned = contenders[r % len(contenders):] + contenders[:r % len(contenders)]
        for c in turned:
            gc.collect()
            gc.disable()
            began = time.process_time()
            result = c.run(x)
            times[c.key].append((time.process_time() - began) / len(x) * 1e3)
            gc.enable()
            del result
            bar.update()
    return times


def table(contenders: list[Contender], times: dict[str, list[float]], kept: dict[str, float]) -> list[dict]:
    base = times[FORWARD]
    rows = []
    for c in contenders:
        ratios = sorted(a / b for a, b in zip(times[c.key], base, strict=True))
        rows.append(dict(name=c.name, classes=c.maps, ms_per_image=round(statistics.median(times[c.key]), 3),
                         ratio=round(statistics.median(ratios), 4), ratio_low=round(ratios[len(ratios) // 4], 4),
                         ratio_high=round(ratios[-1 - len(ratios) // 4], 4), kept_mib_per_image=round(kept[c.key], 4)))
    return rows


def show(title: str, rows: list[dict]) -> None:
    print(f'\n{title}\n{"":42s}{"ms/image":>10s}{"ratio":>8s}{"quartiles":>16s}{"kept MiB":>10s}')
    for r in rows:
        name = f'{r["name"]}, {r["classes"]} class{"es" * (r["classes"] > 1)}' if r['classes'] else r['name']
        print(f'{name:42s}{r["ms_per_image"]:10.2f}{r["ratio"]:8.3f}{r["ratio_low"]:8.3f}{r["ratio_high"]:8.3f}'
              f'{r["kept_mib_per_image"]:10.3f}')


def machine() -> dict:
    packages = ('torch', 'torchvision', 'timm', 'captum', 'torchcam', 'grad-cam')
    return dict(python=platform.python_version(), machine=platform.machine(), cores=os.cpu_count(), threads=1,
                clock='process_time', load=round(os.getloadavg()[0], 1),
                versions={p: importlib.metadata.version(p) for p in packages})


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--quick', action='store_true', help='batches of 1 and 8, few rounds, nothing written')
    p.add_argument('--out', type=Path, help='JSON file to write (default: results/gradcam_cost.json; --quick: none)')
    p.add_argument('--check', action='store_true', help='exit code 1 if a limit is passed')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    logging.getLogger('torchcam').setLevel(logging.ERROR)
    torch.set_num_threads(1)
    plan, cases = QUICK if a.quick else ROUNDS, {}
    for name, model, layer, classifier in networks():
        contenders = own(model, layer, classifier) + peers(model, layer)
        for batch, rounds in plan.items():
            x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
            with tqdm(total=rounds * len(contenders), desc=f'{name}, batch {batch}', disable=None, leave=False) as bar:
                times = measure(contenders, x, rounds, bar)
            kept = {c.key: kept_mib(model, c.run, x) for c in contenders}
            rows = table(contenders, times, kept)
            show(f'{name}, batch {batch}, {rounds} rounds', rows)
            cases[f'{name}/{batch}'] = dict(network=name, batch=batch, rounds=rounds, rows=rows)
    ours = [r for c in cases.values() for r in c['rows'] if r['name'] == OURS and r['classes'] == N_CLASSES]
    worst, most = max(r['ratio'] for r in ours), max(r['kept_mib_per_image'] for r in ours)
    good = worst <= LIMIT_RATIO and most <= LIMIT_MIB
    print(f'\nmaps of all {N_CLASSES} classes: at most {worst:.3f} times the forward pass (limit {LIMIT_RATIO}), '
          f'at most {most:.4f} MiB kept an image (limit {LIMIT_MIB}): {"held" if good else "NOT HELD"}')
    out = a.out or (None if a.quick else ROOT / 'results' / 'gradcam_cost.json')
    if out:
        limits = dict(ratio=LIMIT_RATIO, kept_mib_per_image=LIMIT_MIB)
        summary = dict(worst_ratio=worst, most_kept_mib_per_image=most, held=good, limits=limits)
        out.parent.mkdir(parents=True, exist_ok=True)
        report = dict(machine=machine(), size=SIZE, classes=N_CLASSES, summary=summary, cases=cases)
        out.write_text(json.dumps(report, indent=1) + '\n')
        print(f'written: {out.name}')
    return int(a.check and not good)


if __name__ == '__main__': sys.exit(main())
