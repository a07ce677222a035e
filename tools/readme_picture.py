"""Draw nbs/images/phantom_maps.jpg, the picture of README.md, from the model that `skin-gradcam demo` trained.

    skin-gradcam demo && python tools/readme_picture.py [runs/demo]

A phantom that the demo never saw, with the outline of the evidence it was drawn with, and its three maps on one scale.
"""
import argparse
from pathlib import Path

from skin_gradcam.display import show_maps
from skin_gradcam.inference import Explainer
from skin_gradcam.phantoms import draw_phantom, tile

ROOT = Path(__file__).parents[1]
SEED = 100_003  # far from the seeds of the demo's own phantoms

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("demo", type=Path, nargs="?", default=ROOT / "runs" / "demo")
    args = ap.parse_args()
    phantom = draw_phantom("mel", SEED)
    e = Explainer.load(args.demo / "run" / "bundle")(phantom.image, name="phantom")
    out = ROOT / "nbs" / "images" / "phantom_maps.jpg"
    out.parent.mkdir(exist_ok=True)
    chart = show_maps(tile(phantom, 600, masks=True), e.maps, p=e.p, logits=e.logits)
    out.write_bytes(chart.render("jpg", 80))
    print(e, f"\n{out.relative_to(ROOT)}: {out.stat().st_size // 1000} kB")
