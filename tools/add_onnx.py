"""Put the network of a bundle into it as ONNX, so that it answers without torch; by default into the one that ships.

    python tools/add_onnx.py                 # skin_gradcam/assets/default
    python tools/add_onnx.py RUN/bundle

The weights keep their bytes; the bundle's own hash changes, and with it what names it: run `nbdev-test`, the pages that
print it and `python benchmarks/resize_parity.py` afterwards. The list of files in MODEL_CARD.md is brought up to date.
"""
import argparse
import hashlib
from pathlib import Path

from skin_gradcam.bundle import MODEL, ONNX, Bundle, add_files, default_bundle, load_bundle
from skin_gradcam.onnx_export import export_onnx

CARD, TABLE = "MODEL_CARD.md", "| file | SHA-256 |\n|---|---|\n"


def card_with(bundle: Bundle, files: dict[str, bytes]) -> dict[str, bytes]:
    "The bundle's card with further files in its list of files; empty for a bundle without a card"
    if CARD not in bundle.info.files:
        return {}
    text = bundle.read(CARD).decode()
    if text.count(TABLE) != 1:
        raise SystemExit(f"{bundle.folder / CARD}: has no list of files; write the card again with model_card")
    listed = {n: s for n, s in bundle.info.files.items() if n != CARD}
    listed |= {n: hashlib.sha256(data).hexdigest() for n, data in files.items()}
    rows = "".join(f"| {n} | `{s}` |\n" for n, s in listed.items())
    before, after = text.split(TABLE)
    rest = after.splitlines(keepends=True)
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    return {CARD: (before + TABLE + rows + "".join(rest)).encode()}


def add(bundle: Bundle) -> Bundle:
    "The bundle with its ONNX file and a card that lists it"
    data = export_onnx(bundle)
    done = add_files(bundle, {ONNX: data, **card_with(bundle, {ONNX: data})})
    if done.info.files[MODEL] != bundle.info.files[MODEL]:
        raise SystemExit(f"{bundle.folder}: the weights changed")
    print(f"{bundle.folder.name}: {ONNX} of {len(data) / 1e6:.2f} MB; the bundle is now {done.hash[:12]}")
    return done


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("bundle", type=Path, nargs="?", help="folder of a bundle; default the one that ships")
    args = ap.parse_args()
    add(load_bundle(args.bundle, classes=None) if args.bundle else default_bundle())
