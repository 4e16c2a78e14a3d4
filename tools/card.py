"""Write a model card: Markdown with the hub's front matter, from the registry, the manifest and a results file.

  zoo card caformer_s18.sail_in1k --results runs/results.jsonl --out README.md

The machine-readable model-index has measured results of complete data sets only. What authors claim stands in a table
beside what was measured, under its name.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.manifest import Weights, find_weights, known_weights
from zoo.tools.comparison import show
from zoo.tools.records import Record, read_results

_PIPELINES = {
    "classification": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
    "superresolution": "image-to-image",
    "backbone": "image-feature-extraction",
}
_HUB_METRICS = {"top1": "accuracy", "top5": "accuracy", "real_top1": "accuracy", "zero_shot_top1": "accuracy"}
_HUB_METRICS |= {"miou": "mean_iou"}
_NAMES = {"imagenet-1k": "ImageNet-1k", "imagenet-21k": "ImageNet-21k", "imagenet-22k": "ImageNet-22k"}
_NAMES |= {"coco": "COCO 2017", "ade20k": "ADE20K", "cityscapes": "Cityscapes", "set5": "Set5", "set14": "Set14"}
_NAMES |= {"b100": "B100", "urban100": "Urban100", "manga109": "Manga109"}
# parts of tags that name the data that weights were trained on
_TRAINED_ON = {
    "in1k": "imagenet-1k",
    "in21k": "imagenet-21k",
    "in22k": "imagenet-22k",
    "datacomp1b": "datacomp-1b",
    "coco": "coco",
    "ade20k": "ade20k",
    "cityscapes": "cityscapes",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
}
_ACCESS = {
    "url": "direct download",
    "hub": "the Hugging Face hub",
    "drive": "by hand, through a browser",
    "dead": "the authors' link is dead",
    "unreleased": "never released",
    "packaged": "comes with zoo",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo card`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL[.TAG]", help="registered name, or a name of the manifest")
    parser.add_argument("--results", help="results file of zoo eval (default: runs/results.jsonl, if it is there)")
    parser.add_argument("--out", help="file to write; printed by default")


def run(args: argparse.Namespace) -> int:
    """Print or write the card."""
    default = Path("runs/results.jsonl")
    results = args.results or (str(default) if default.is_file() else None)
    text = make_card(args.model, read_results(results) if results else [])
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text, encoding="utf-8")
        print(f"{args.model} -> {args.out}")
    else:
        print(text, end="")
    return 0


def make_card(name: str, results: Sequence[Record] = ()) -> str:
    """The card of a model with its weights.

    Args:
        name: MODEL or MODEL.TAG.
        results: of any models; those of this one are taken.

    Raises:
        ValueError: neither a registered model nor one of the manifest.
    """
    from timm.models import is_model

    from zoo.tools.recognition import has_tag

    base, _, tag = name.partition(".")
    weights = find_weights(name)
    if weights is None and not is_model(base):
        raise ValueError(f"no model is called {name!r}: `zoo list` and `zoo weights list` name them")
    if weights is None and tag and not has_tag(base, tag):
        there = ", ".join(w.tag for w in known_weights() if w.model == base) or "none"
        raise ValueError(f"{base} has no weights with the tag {tag!r}: the manifest has {there}")
    tag = weights.tag if weights else tag
    own = _newest([r for r in results if r.model == base and (r.tag or "") == tag])
    parts = [
        _front_matter(base, weights, own),
        f"# {base}{f'.{tag}' if tag else ''}",
        *_about(base, weights),
        "## Facts",
        _facts(base, weights),
        "## Use",
        _use(base, weights),
        "## Evaluation",
        *_evaluation(weights, own),
        "## Limitations",
        _limitations(base, weights, own),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _newest(records: list[Record]) -> list[Record]:
    """The last record of each data set, split, number of images and set of settings that differ from the claim's."""
    kept = {(r.dataset, r.split, r.images, tuple(r.differing)): r for r in records}
    return list(kept.values())


# ---- front matter


def _front_matter(model: str, weights: Weights | None, results: Sequence[Record]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(metadata(model, weights, results), sort_keys=False, allow_unicode=True)}---"


def metadata(model: str, weights: Weights | None, results: Sequence[Record]) -> dict[str, Any]:
    """The hub's front matter: nothing in it is a claim."""
    task = weights.task if weights else (results[0].task if results else "classification")
    pipeline = _PIPELINES[task]
    content: dict[str, Any] = {
        "license": (weights.license if weights else None) or "unknown",
        "library_name": "zoo-vision" if weights is not None and weights.door else "timm",
        "pipeline_tag": pipeline,
        "tags": list(dict.fromkeys([pipeline, "timm", "zoo", *_family(model)])),
    }
    datasets = trained_on(weights)
    if datasets:
        content["datasets"] = datasets
    entries = [_index_entry(record, pipeline) for record in results if record.complete and not record.differing]
    entries = entries or _manifest_entries(weights, pipeline)
    if entries:
        name = weights.name if weights else model
        content["model-index"] = [{"name": name, "results": entries}]
    return content


def trained_on(weights: Weights | None) -> list[str]:
    """The data that the weights' tag names."""
    if weights is None:
        return []
    parts = weights.tag.lower().split("_")
    return list(dict.fromkeys(_TRAINED_ON[part] for part in parts if part in _TRAINED_ON))


def _family(model: str) -> list[str]:
    from timm.models import is_model

    from zoo.registry import is_zoo_model, model_family

    if is_model(model):
        return [model_family(model)] if is_zoo_model(model) else []
    return [re.sub(r"_x[234]$", "", model)]


def _index_entry(record: Record, pipeline: str) -> dict[str, Any]:
    dataset = {"name": _NAMES.get(record.dataset, record.dataset), "type": record.dataset, "split": record.split}
    return {
        "task": {"type": pipeline},
        "dataset": dataset,
        "metrics": [_index_metric(name, value) for name, value in record.metrics.items()],
    }


def _index_metric(name: str, value: float) -> dict[str, Any]:
    return {"type": _HUB_METRICS.get(name, name.split("_")[0]), "name": name, "value": round(float(value), 4)}


def _manifest_entries(weights: Weights | None, pipeline: str) -> list[dict[str, Any]]:
    """What the manifest has as measured."""
    if weights is None or not weights.measured:
        return []
    stated = weights.evaluation.get("dataset", "unknown")
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, value in weights.measured.items():
        dataset = stated if isinstance(stated, str) else name.rpartition("_")[2]
        groups.setdefault(dataset, []).append(_index_metric(name, value))
    split = weights.evaluation.get("split", "val" if isinstance(stated, str) else "test")
    return [
        {
            "task": {"type": pipeline},
            "dataset": {"name": _NAMES.get(dataset, dataset), "type": dataset, "split": split},
            "metrics": metrics,
        }
        for dataset, metrics in groups.items()
    ]


# ---- text


def _module_of(model: str) -> Any:
    from timm.models import is_model, model_entrypoint

    return sys.modules[model_entrypoint(model).__module__] if is_model(model) else None


def _about(model: str, weights: Weights | None) -> list[str]:
    from timm.models import is_model, model_entrypoint

    described = model_entrypoint(model) if is_model(model) else _head_class(weights)
    about = (inspect.getdoc(described) or "") if described else ""
    about = " ".join(about.split("\n\n")[0].split())
    parts = [_escape(about)] if about else []
    reading = getattr(_module_of(model), "READING", None)
    if reading:
        parts.append(f"**A reading of the paper, not the authors' code:** {_escape(reading)}")
    if weights is not None and weights.options:
        shown = ", ".join(f"`{key}={value!r}`" for key, value in weights.options.items())
        parts.append(f"Built with {shown}.")
    return parts


def _head_class(weights: Weights | None) -> type | None:
    from torch import device

    if weights is None or not weights.door:
        return None
    with device("meta"):
        return type(weights.build())


def _facts(model: str, weights: Weights | None) -> str:
    rows = _size_rows(model, weights)
    if weights is not None:
        rows.append(("licence of the weights", f"`{weights.license}`" if weights.license else "unknown: not stated"))
        if weights.source:
            rows.append(("source", weights.source))
        rows.append(("weights", _ACCESS[weights.access]))
        for label, value in (("file", weights.file), ("hub", weights.hub_id), ("SHA-256", weights.sha256)):
            if value:
                rows.append((label, f"`{value}`"))
        trained = trained_on(weights)
        if trained:
            rows.append(("trained on", ", ".join(trained)))
    else:
        rows.append(("licence of the weights", "unknown: the manifest lists none for this name"))
    papers = getattr(_module_of(model), "default_cfgs", {})
    cfg = papers.get(model)
    ids = getattr(getattr(cfg, "default", None), "paper_ids", None)
    if ids:
        ids = [ids] if isinstance(ids, str) else ids
        rows.append(("paper", ", ".join(ids)))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_escape(str(value))} |" for name, value in rows)])


def _size_rows(model: str, weights: Weights | None) -> list[tuple[str, str]]:
    import timm
    from timm.data import resolve_data_config
    from timm.models import is_model
    from torch import device

    from zoo.tools.info import multiply_adds

    if weights is not None and (weights.door or is_model(model)):
        build = weights.build
    elif is_model(model):
        build = lambda: timm.create_model(model)  # noqa: E731
    else:
        return [("size", "stands in the file of weights only")]
    with device("meta"):
        network = build().eval()
    rows = [("parameters", f"{sum(p.numel() for p in network.parameters()):,}")]
    if is_model(model) and not (weights is not None and weights.door):
        cfg = resolve_data_config({}, model=network)
        stated = weights.evaluation if weights else {}
        shape = tuple(stated.get("input_size", cfg["input_size"]))
        with device("meta"):
            macs = multiply_adds(network, (1, *shape))
        rows.append(
            ("multiply-adds", f"{macs / 1e9:.2f} G at {'x'.join(map(str, shape))} (matrix products, convolutions)")
        )
        crop = stated.get("crop_pct", cfg["crop_pct"])
        kind = stated.get("interpolation", cfg["interpolation"])
        rows.append(("input", f"{'x'.join(map(str, shape))}, {kind}, crop {crop:.3g}, mean {_numbers(cfg['mean'])}, "
                              f"std {_numbers(cfg['std'])}"))  # fmt: skip
    elif getattr(network, "scale", None) and weights.door == "create_upscaler":
        rows.append(("input", f"RGB pictures of any size, enlarged {network.scale} times"))
    else:
        sizes = {k: v for k, v in weights.evaluation.items() if k in ("short_side", "max_side", "input_size")}
        rows.append(("input", ", ".join(f"{k} {v}" for k, v in sizes.items()) or "pictures of any size"))
    return rows


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _use(model: str, weights: Weights | None) -> str:
    from timm.models import is_model

    if weights is not None and weights.door == "create_upscaler":
        lines = ["import zoo"]
        if weights.access == "packaged":
            lines.append(f'model = zoo.create_upscaler("craft", scale={model[-1]}, pretrained=True)')
        else:
            lines.append(f'model = zoo.create_upscaler("craft", checkpoint="{weights.file or "weights.pth"}")')
        lines.append('model.predict("small.png").image.save("large.png")')
    elif weights is not None and weights.door:
        arguments = "".join(f", {key}={value!r}" for key, value in weights.options.items())
        lines = [
            "import zoo",
            f'model = zoo.{weights.door}("{model}"{arguments})',
            f'zoo.load_checkpoint(model, "{weights.file or "weights.pth"}")',
        ]
    elif weights is not None and not is_model(model):
        lines = [f'model = zoo.load_model("{model}.safetensors")  # after: zoo convert FILE --out {model}.safetensors']
        lines = ["import zoo", *lines, 'print(zoo.predict(model, "photo.jpg"))']
    else:
        options = "".join(f", {key}={value!r}" for key, value in (weights.options if weights else {}).items())
        obtainable = weights is None or weights.access in ("url", "hub", "packaged")
        how = ", pretrained=True" if obtainable else ""
        tagged = _timm_name(model, weights)
        lines = ["import timm, zoo", f'model = timm.create_model("{tagged}"{how}{options}).eval()']
        if not obtainable:
            lines.append(f'zoo.load_checkpoint(model, "{weights.file or "weights.pth"}")')
        features = weights is not None and weights.task == "backbone"
        last = "features = model.forward_features(images)" if features else 'print(zoo.predict(model, "photo.jpg"))'
        lines.append(last)
    return "\n".join(["```python", *lines, "```"])


def _timm_name(model: str, weights: Weights | None) -> str:
    from zoo.tools.recognition import has_tag

    tagged = weights is not None and has_tag(model, weights.tag)
    return f"{model}.{weights.tag}" if tagged else model


def _evaluation(weights: Weights | None, results: Sequence[Record]) -> list[str]:
    claimed: Mapping[str, float] = weights.claimed if weights else {}
    rows, seen = [], set()
    for record in results:
        for name, value in record.metrics.items():
            claim = record.claims.get(name)
            seen |= {name} if claim is not None else set()
            spread = f" ± {record.errors[name]:.2f}" if name in record.errors else ""
            rows.append((name, _where(record), _shown(name, claim), f"{show(name, value)}{spread}", _images(record)))
    if weights is not None:
        stated = weights.evaluation.get("dataset", "")
        done = {name for name, *_ in rows} if not claimed else seen
        for name in [name for name in {**claimed, **weights.measured} if name not in done]:
            place = stated if isinstance(stated, str) else name.rpartition("_")[2]
            values = (_shown(name, claimed.get(name)), _shown(name, weights.measured.get(name)))
            rows.append((name, _NAMES.get(place, place), *values, ""))
    if not rows:
        return ["Nothing is claimed for these weights, and nothing was measured."]
    table = ["| metric | data set | claimed | measured | images |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]
    parts = ["\n".join(table)]
    if claimed:
        parts.append(
            "*claimed*: what the authors state, not verified here unless a measured value stands beside it. "
            "*measured*: by `zoo eval --compare` with these weights; - where nobody has."
        )
        if weights.task == "backbone":
            parts.append("The claims are of the paper's whole model, of which these weights are a part.")
    else:
        parts.append("*measured*: by `zoo eval` with these weights; nothing is claimed for them.")
    if results:
        parts.append("\n".join(["Settings of the measurements:", "", *dict.fromkeys(_settings(r) for r in results)]))
    elif weights is not None and weights.evaluation:
        what = "claim" if claimed else "measurement"
        parts.append(f"Settings of the {what}: {_pairs(weights.evaluation)}.")
    return parts


def _shown(name: str, value: float | None) -> str:
    return "-" if value is None else show(name, value)


def _where(record: Record) -> str:
    name = _NAMES.get(record.dataset, record.dataset)
    return name if record.split == "test" else f"{name} {record.split}"


def _images(record: Record) -> str:
    if record.total is None or record.complete:
        return f"{record.images:,}"
    return f"{record.images:,} of {record.total:,} (a subset)"


def _settings(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    text = f"- {_where(record)}: {_pairs(record.settings)}; {record.device}, {versions}, {record.date[:10]}"
    return text + (f". Differs from the claim's settings: {'; '.join(record.differing)}" if record.differing else "")


def _pairs(settings: Mapping[str, Any]) -> str:
    def plain(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return ", ".join(f"{name} {plain(value)}" for name, value in settings.items())


def _limitations(model: str, weights: Weights | None, results: Sequence[Record]) -> str:
    lines = []
    measured = bool(results) or bool(weights and weights.measured)
    if weights is not None and weights.access in ("unreleased", "dead"):
        lines.append(f"The weights cannot be had: {_ACCESS[weights.access]}. The architecture alone is usable.")
    if getattr(_module_of(model), "READING", None):
        lines.append("The architecture is a reading of a paper without public code; the authors' model may differ.")
    if not measured:
        lines.append("No accuracy was measured with these weights here.")
    if any(not record.complete for record in results):
        lines.append("Some measurements are of a subset of a data set and must not be quoted as its figure.")
    if any(record.total is None for record in results):
        lines.append("Some measurements are on private or unlisted images, which compare with nothing else.")
    if weights is None or not weights.license:
        lines.append("The licence of the weights is unknown: ask the authors before anything but private study.")
    task = weights.task if weights else "classification"
    if task == "classification":
        lines.append("Any picture gets one of the classes of the training data, also one that shows none of them.")
    elif task in ("detection", "segmentation"):
        lines.append("Only the classes of the training data are found.")
    elif task == "superresolution":
        lines.append("Detail is guessed from what was seen in training; noise and JPEG artefacts are enlarged too.")
    trained = trained_on(weights)
    if any(name.startswith("imagenet") for name in trained):
        lines.append("ImageNet's own terms (non-commercial research) apply to its images.")
    if weights is not None and weights.note:
        lines.append(f"Note of the manifest: {weights.note.rstrip('.')}.")
    return "\n".join(f"- {_escape(line)}" for line in lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
