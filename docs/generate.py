"""Write the generated tables of the pages: `python docs/generate.py`, or with --check only compare.

A page holds `<!-- generated: variants crate -->` ... `<!-- end -->`; what stands between is replaced. Sources are
the registry (names, input sizes), `weights/manifest.json` (claims, where weights are) and `docs/models.json`
(parameters and multiply-adds, counted by `--count`, about half a minute).

Multiply-adds are those of matrix products and convolutions of one image at the model's own size, counted by torch's
FlopCounterMode on the meta device, as `zoo info MODEL` counts them. Norms, activations and scans are not counted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config

import zoo
from zoo.manifest import Weights, known_weights
from zoo.registry import model_family
from zoo.tools.info import multiply_adds

DOCS = Path(__file__).resolve().parent
COUNTS = DOCS / "models.json"
BLOCK = re.compile(r"(<!-- generated: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# page -> files of zoo that define its models, and patterns of timm's models that belong to it
FAMILIES = {
    "metaformer": (("metaformer",), ("poolformerv2_*", "convformer_*", "caformer_*")),
    "crate": (("crate", "crate_mae"), ()),
    "fcaformer": (("fcaformer",), ()),
    "slab": (("slab",), ()),
    "ascan": (("ascan",), ()),
    "ninformer": (("ninformer",), ()),
    "activator": (("activator",), ()),
    "spartan": (("spartan",), ()),
    "vim2": (("vim2",), ()),
    "stdc": (("stdc",), ()),
}
TITLES = {
    "metaformer": "MetaFormer",
    "crate": "CRATE",
    "fcaformer": "FcaFormer",
    "slab": "SLAB",
    "ascan": "AsCAN",
    "ninformer": "NiNformer",
    "activator": "Activator",
    "spartan": "SpaRTAN",
    "vim2": "ViM2",
    "stdc": "STDC",
}
METRICS = {
    "top1": "{} %",
    "zero_shot_top1": "{} % zero-shot",
    "box_ap": "{} box AP",
    "mask_ap": "{} mask AP",
    "miou": "{} mIoU",
    "pq": "{} PQ",
    "psnr_set14": "{} dB on Set14",
    "psnr_set5": "{} dB on Set5",
}
ACCESS = {
    "url": "download",
    "hub": "hub",
    "drive": "by hand",
    "dead": "dead link",
    "unreleased": "never released",
    "packaged": "in the package",
}


def models_of(family: str) -> list[str]:
    """The registered names of a family, zoo's first."""
    modules, patterns = FAMILIES[family]
    own = [name for name in zoo.list_models() if model_family(name) in modules]
    return own + [name for pattern in patterns for name in timm.list_models(pattern)]


def count(name: str) -> dict[str, int]:
    """Parameters, multiply-adds and input size of a model, without making its weights."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        size = resolve_data_config({}, model=model)["input_size"]
        macs = multiply_adds(model, (1, *size))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": macs, "input": size[-1]}


def read_counts() -> dict[str, dict[str, int]]:
    """What `--count` wrote."""
    return json.loads(COUNTS.read_text())


def classifier_entries(name: str) -> list[Weights]:
    """The manifest's entries for a model as a classifier; where there are none, those of its features."""
    entries = [w for w in known_weights() if w.model == name]
    return [w for w in entries if w.task == "classification"] or entries


def claim(weights: Weights) -> str:
    """The accuracies that the authors state, in words."""
    return ", ".join(METRICS[key].format(value) for key, value in weights.claimed.items() if key in METRICS)


def _row(name: str, counts: dict[str, dict[str, int]]) -> str:
    entries = classifier_entries(name)
    claims = claim(entries[0]) if entries else ""
    access = ", ".join(dict.fromkeys(ACCESS[w.access] for w in entries))
    n = counts[name]
    macs = f"{n['macs'] / 1e9:.2f} G" if n["macs"] >= 1e8 else f"{n['macs'] / 1e6:.0f} M"
    return f"| `{name}` | {n['params'] / 1e6:.2f} M | {macs} | {n['input']} | {claims or '-'} | {access or '-'} |"


HEADER = ["| model | parameters | multiply-adds | input | claimed top-1 | weights |", "|---|---|---|---|---|---|"]


def variants(family: str) -> list[str]:
    """A row for each model of a family."""
    counts = read_counts()
    return [*HEADER, *(_row(name, counts) for name in models_of(family))]


def released(family: str) -> list[str]:
    """A row for each file that the manifest knows for the models of a family."""
    names = models_of(family)
    return _files([w for w in known_weights() if w.model in names])


def files(task: str) -> list[str]:
    """A row for each file that the manifest knows for a task."""
    return _files([w for w in known_weights() if w.task == task])


def _files(entries: list[Weights]) -> list[str]:
    rows = []
    for weights in entries:
        if weights.access == "unreleased":
            continue
        where = _hub(weights.hub_id) if weights.hub_id else weights.url or weights.source or ""
        name = weights.file or weights.hub_id or "page"
        link = f"[{name}]({where})" if "://" in where else f"`{name}`"
        note = f"{weights.note[0].upper()}{weights.note[1:]}" if weights.note else ""
        note = note.replace("|", "/").replace("<", "&lt;")
        cells = (f"`{weights.model}.{weights.tag}`", ACCESS[weights.access], link, claim(weights) or "-", note)
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return ["No file is known."]
    return ["| model and tag | how | file | claim | |", "|---|---|---|---|---|", *rows]


def _hub(repository: str) -> str:
    return f"https://huggingface.co/{repository}"


def all_models() -> list[str]:
    """Every model of the documented families, by size."""
    counts = read_counts()
    pages = {name: family for family in FAMILIES for name in models_of(family)}
    rows = []
    for name in sorted(pages, key=lambda n: counts[n]["params"]):
        row = _row(name, counts)
        rows.append(f"{row} [{TITLES[pages[name]]}]({pages[name]}.md) |")
    return [f"{HEADER[0]} family |", f"{HEADER[1]}---|", *rows]


def render(what: str) -> str:
    """The content of a generated block."""
    kind, *family = what.split()
    makers = {"variants": variants, "released": released, "files": files, "all": all_models}
    return "\n".join(["", *makers[kind](*family), "", ""])


def rewrite(text: str) -> str:
    """A page with its generated blocks made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{render(m[2])}{m[3]}", text)


def stale_pages() -> list[Path]:
    """Pages whose generated blocks differ from what they would be now."""
    return [page for page in sorted(DOCS.rglob("*.md")) if rewrite(page.read_text()) != page.read_text()]


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    parser.add_argument("--count", action="store_true", help="count parameters and multiply-adds of every model first")
    args = parser.parse_args(arguments)
    if args.count:
        names = sorted({name for family in FAMILIES for name in models_of(family)})
        lines = [f'  "{name}": {json.dumps(count(name))}' for name in names]
        COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    pages = stale_pages()
    for page in pages:
        print(f"{'out of date' if args.check else 'written'}: {page.relative_to(DOCS.parent)}")
        if not args.check:
            page.write_text(rewrite(page.read_text()))
    return 1 if args.check and pages else 0


if __name__ == "__main__":
    sys.exit(main())
