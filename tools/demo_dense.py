"""`make demo-detection` and `make demo-segmentation`: a few minutes on 23 to 33 photographs, and a picture at the end.

Both put a head on an ImageNet backbone of timm's (EfficientNet-Lite0) and train on photographs of COCO. So few cannot
make a good detector: the pictures show how far a few minutes go, on photographs that were not trained on.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from zoo.tools.demo import BACKBONE

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "coco_ccby"

_SHARED = dict(
    model="tf_efficientnet_lite0",
    backbone_checkpoint=str(BACKBONE),
    data=str(DATA),
    batch_size=4,
    lr=5e-4,
    val_interval=5,
)
SETTINGS = {
    "detection": dict(
        head="mask_rcnn",
        epochs=15,
        short_sides=(192, 224, 256, 288),
        max_long=400,
        test_short=256,
        test_long=400,
        head_args=dict(box_batch_size_per_image=128, rpn_post_nms_top_n_train=300, rpn_post_nms_top_n_test=300),
    ),
    "segmentation": dict(
        kind="panoptic", epochs=25, crop_size=(224, 224), test_short=224, test_long=400, object_threshold=0.5
    ),
}


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
    result = train(find_recipe(f"finetune_{task}")(**_SHARED, **SETTINGS[task], out=str(out)))
    print(f"\n{result.table}\n{time.perf_counter() - start:.0f} s; look at {out}/predictions.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
