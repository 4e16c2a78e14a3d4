"""`make demo-detection` and `make demo-segmentation`: about a minute each on two cores, and pictures at the end.

A handful of photographs of COCO is learned by heart by a small network that starts from random weights: masks and
boxes come out as they went in, which shows that data, head, losses and evaluation fit together. It is no test of how
well a detector does on photographs that it has not seen; for that train on a whole data set.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from zoo.tools.demo import STUDENT

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "coco_ccby"

_SHARED = dict(epochs=2, warmup_epochs=0.1, freeze_norm=False, hflip=0.0, workers=0, clip_grad=5.0)
SETTINGS = {
    "detection": dict(
        head="mask_rcnn",
        model="stdc1",
        epoch_steps=60,
        batch_size=3,
        lr=2e-3,
        weight_decay=1e-4,
        short_sides=(128,),
        max_long=256,
        color=0.0,
        test_short=128,
        test_long=256,
        val_interval=2,
        head_args=dict(
            out_channels=64,
            anchor_sizes=[[16], [32], [64], [128], [256]],
            rpn_pre_nms_top_n_train=200,
            rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=100,
            box_batch_size_per_image=16,
            box_score_thresh=0.5,
        ),
    ),
    "segmentation": dict(
        kind="panoptic",
        model="ascan_tiny",
        model_args=STUDENT,
        epoch_steps=45,
        batch_size=3,
        lr=1e-3,
        min_lr=1e-5,
        weight_decay=0.0,
        backbone_lr=1.0,
        crop_size=(128, 128),
        jitter_scale=(1.0, 1.0),
        color_distortion=False,
        test_short=128,
        loss_points=1024,
        val_interval=2,
        head_args={"num_queries": 20},
    ),
}
PHOTOGRAPHS = {"detection": (10303, 10444, 10073), "segmentation": (10303, 10444, 10440)}
_FILE = {"detection": "instances", "segmentation": "panoptic"}


def copy_photographs(task: str, folder: Path) -> Path:
    """The demo's photographs as a data set of their own, both splits alike, with the categories that they have."""
    name, wanted = _FILE[task], set(PHOTOGRAPHS[task])
    content = json.loads((DATA / "annotations" / f"{name}_train2017.json").read_text())
    content["images"] = [image for image in content["images"] if image["id"] in wanted]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in wanted]
    parts = [part for a in content["annotations"] for part in a.get("segments_info", [a])]
    used = {part["category_id"] for part in parts}
    content["categories"] = [category for category in content["categories"] if category["id"] in used]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "annotations" / f"{name}_{split}2017.json").write_text(json.dumps(content))
        (folder / f"{split}2017").mkdir()
        for image in content["images"]:
            shutil.copy(DATA / "train2017" / image["file_name"], folder / f"{split}2017")
        if task == "segmentation":
            (folder / f"panoptic_{split}2017").mkdir()
            for annotation in content["annotations"]:
                shutil.copy(DATA / "panoptic_train2017" / annotation["file_name"], folder / f"panoptic_{split}2017")
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Run the demo of a task; everything that it made is in runs/demo-<task>."""
    from zoo.train.recipes import find_recipe
    from zoo.train.trainer import train

    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0] not in SETTINGS:
        print(f"usage: python -m zoo.tools.demo_dense {{{','.join(SETTINGS)}}}", file=sys.stderr)
        return 2
    task = arguments[0]
    if not DATA.is_dir():
        print(f"the demo needs the photographs of the repository, and {DATA} is not there: run it in a checkout")
        return 2
    out = Path("runs") / f"demo-{task}"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    data = copy_photographs(task, out / "photographs")
    result = train(find_recipe(f"finetune_{task}")(**(_SHARED | SETTINGS[task]), data=str(data), out=str(out / "run")))
    print(f"\n{result.table}\n{time.perf_counter() - start:.0f} s; learned by heart: {out}/run/predictions.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
