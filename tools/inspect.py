"""White-box measures of a CRATE model on pictures: layers.json and inspect.png.

The picture has the coding rate and the sparsity of every layer (means over the pictures), and for each
picture the attention of the class token, head by head, and the principal components of the tokens as
colours, which show what the model takes for an object and its parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "white-box measures of a CRATE model, as numbers and as a picture"

_DRAWN = 6  # pictures in inspect.png
_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo inspect`."""
    parser.add_argument("weights", help="a file that zoo train wrote, or a registered name such as crate_tiny")
    parser.add_argument("images", nargs="+", type=Path, help="pictures or folders of them")
    parser.add_argument("--checkpoint", help="weights, where a model name is given; without, they are random")
    parser.add_argument("--pretrained", action="store_true", help="released weights, where a model name is given")
    parser.add_argument("--layer", type=int, default=-1, help="layer of attention maps and colours, from 0")
    parser.add_argument("--img-size", type=int, help="side to which pictures are resized; the model's by default")
    parser.add_argument("--lambd", type=float, help="sparsity weight, which CRATE-MAE's files do not record")
    parser.add_argument("--out", type=Path, default=Path("runs/inspect"), help="folder of the results")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")


def run(args: argparse.Namespace) -> int:
    """Measure and draw; pictures that cannot be read are named at the end and give status 1."""
    import torch

    from zoo import whitebox
    from zoo.extras import require
    from zoo.images import ImageError, read_image
    from zoo.tools.predict import find_pictures

    require("matplotlib", "train")
    model, origin = _load(args)
    if not -len(model.blocks) <= args.layer < len(model.blocks):
        raise ValueError(f"--layer {args.layer} does not exist: {args.weights} has {len(model.blocks)}, from 0")
    pictures, files, unreadable = [], [], []
    for path in find_pictures(args.images):
        try:
            pictures.append(read_image(path))
            files.append(str(path))
        except (ImageError, FileNotFoundError) as error:
            unreadable.append(str(error))
    if not pictures:
        raise ValueError(f"none of the pictures could be read: {unreadable[0]}")

    images = torch.stack([_to_input(picture, model) for picture in pictures]).to(args.device)
    model.to(args.device)
    parts = [whitebox.layer_statistics(model, chunk) for chunk in images.split(_BATCH)]
    rate = torch.cat([part.coding_rate for part in parts], dim=1).double().cpu()
    zeros = torch.cat([part.zeros for part in parts], dim=1).cpu()
    layer = args.layer % len(model.blocks)
    drawn = images[:_DRAWN]
    attention = torch.cat([whitebox.cls_attention(model, chunk, layer) for chunk in drawn.split(_BATCH)]).cpu()
    colors, foreground = (t.cpu() for t in whitebox.pca_colors(model, drawn, layer))

    args.out.mkdir(parents=True, exist_ok=True)
    summary = {
        "model": args.weights,
        "weights": origin,
        "layer": layer,
        "files": files,
        "layers": [
            {
                "layer": i,
                "coding_rate_mean": float(rate[i].mean()),
                "coding_rate_std": float(rate[i].std()) if len(files) > 1 else None,
                "zeros_mean": float(zeros[i].mean()),
                "zeros_std": float(zeros[i].std(correction=0)),
                "coding_rate": rate[i].tolist(),
                "zeros": zeros[i].tolist(),
            }
            for i in range(len(rate))
        ],
        "foreground_share": dict(zip(files, foreground.double().mean(dim=(1, 2)).tolist())),
    }
    (args.out / "layers.json").write_text(json.dumps(summary, indent=2) + "\n")
    title = f"{args.weights}, {origin}"
    shown = [picture.resize((drawn.shape[-1], drawn.shape[-2])) for picture in pictures[:_DRAWN]]
    names = [Path(file).name for file in files]
    figure = draw(title, rate, zeros, shown, names, attention, colors, foreground, layer)
    figure.savefig(args.out / "inspect.png", dpi=110)

    print(f"{'layer':>5} {'coding rate':>12} {'zeros':>7}")
    for row in summary["layers"]:
        print(f"{row['layer']:>5} {row['coding_rate_mean']:>12.1f} {100 * row['zeros_mean']:>6.1f}%")
    if len(files) > _DRAWN:
        print(f"inspect.png shows the first {_DRAWN} of {len(files)} pictures, layers.json has all")
    print(f"written: {args.out / 'layers.json'}, {args.out / 'inspect.png'}")
    for line in unreadable:
        print(f"not read: {line}", file=sys.stderr)
    return 1 if unreadable else 0


def _load(args: argparse.Namespace):
    """The model, and in words where its weights are from."""
    import timm

    import zoo
    from zoo.crate import Crate

    if Path(args.weights).suffix == ".safetensors":
        from zoo.saving import load_model

        model, origin = load_model(args.weights), "trained"
    else:
        if not timm.is_model(args.weights.split(".")[0]):
            raise ValueError(f"no model is called {args.weights!r}: `zoo list --filter 'crate*'` names them")
        options = {"lambd": args.lambd} if args.lambd is not None else {}
        classes = {"num_classes": 0} if args.weights.startswith("mae_") else {}
        model = timm.create_model(args.weights, pretrained=args.pretrained, **options, **classes)
        origin = "released weights" if args.pretrained else "random weights"
        if args.checkpoint:
            origin = Path(args.checkpoint).name
            for line in str(
                zoo.load_checkpoint(model, args.checkpoint, head="file" if not classes else "match")
            ).splitlines():
                print(line)
    if not isinstance(model, Crate):
        raise ValueError(
            f"{args.weights} is no CRATE model, and only those have these measures: pass crate_* or mae_crate_*"
        )
    if args.img_size:
        model.set_input_size(args.img_size)
    return model.eval(), origin


def _to_input(picture, model):
    """The whole picture, squeezed to the model's size (LANCZOS, as the papers' code) and normalised."""
    import numpy as np
    import torch
    from PIL import Image
    from timm.data import resolve_model_data_config

    height, width = model.patch_embed.img_size
    settings = resolve_model_data_config(model)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
    image = ((pixels - mean) / std).permute(2, 0, 1)
    if model.in_chans != 3:
        image = image.mean(dim=0, keepdim=True).expand(model.in_chans, -1, -1)
    return image.float()


def draw(title, rate, zeros, pictures, names, attention, colors, foreground, layer: int):
    """The figure: curves over the layers, then a row of maps for each picture."""
    from matplotlib.figure import Figure

    heads = attention.shape[1]
    columns = -(-heads // 2) if heads > 3 else heads
    count = len(pictures)
    figure = Figure(figsize=(1.55 * (columns + 4), 3.4 + 3.3 * count), layout="constrained")
    figure.suptitle(title, fontsize=12)
    top, *rows = figure.subfigures(1 + count, 1, height_ratios=[3.4] + [3.3] * count, squeeze=False)[:, 0]
    _draw_curves(top, rate, zeros)
    for row, picture, name, maps, color, mask in zip(rows, pictures, names, attention, colors, foreground):
        row.suptitle(f"{name}: layer {layer}", fontsize=9, x=0.01, ha="left")
        grid = row.add_gridspec(2, columns + 4)
        _show(row.add_subplot(grid[:, 0:2]), picture, "picture")
        painted = color.numpy().copy()
        painted[~mask.numpy()] = 1.0
        _show(row.add_subplot(grid[:, 2:4]), painted, "principal components", picture.size)
        for head in range(heads):
            axes = row.add_subplot(grid[head // columns, 4 + head % columns])
            _show(axes, picture.convert("L").convert("RGB"), f"head {head}")
            axes.imshow(
                maps[head].numpy(),
                extent=(0, picture.width, picture.height, 0),
                cmap="inferno",
                alpha=0.65,
                interpolation="bilinear",
            )
    return figure


def _draw_curves(figure, rate, zeros) -> None:
    layers = range(len(rate))
    left, right = figure.subplots(1, 2)
    for axes, values, label, color in (
        (left, rate, "coding rate of the projected tokens (nats)", "#1f5fa8"),
        (right, 100 * (1 - zeros), "entries that are not zero (%)", "#b3541e"),
    ):
        mean = values.mean(dim=1)
        axes.plot(layers, mean, marker="o", markersize=4, color=color)
        if values.shape[1] > 1:
            spread = values.std(dim=1)
            axes.fill_between(layers, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("layer")
        axes.set_title(label, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def _show(axes, image, title: str, size: tuple[int, int] | None = None) -> None:
    extent = (0, size[0], size[1], 0) if size else None
    axes.imshow(image, extent=extent, interpolation="nearest" if size else None)
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()
