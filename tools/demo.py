"""`make demo`: from photographs to a picture of predictions, in a few minutes on two cores.

An ImageNet backbone of timm's (EfficientNet-Lite0) is fine-tuned on 600 photographs of clothes and then teaches
a small zoo model (AsCAN, 0.9 M parameters) that starts from random weights. Both are measured on 186 photographs
that neither was trained on. At last a photograph is enlarged with CRAFT and zoo's own x2 weights.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "clothing10"
BACKBONE = ROOT / "tests" / "data" / "weights" / "tf_efficientnet_lite0.fp16.safetensors"
PHOTOGRAPH = DATA / "val" / "shoes" / "5bb088ac-ea91-419b-851e-1b04b7ce57db.jpg"  # not trained on
OUT = Path("runs") / "demo"
STUDENT = {"stem_width": 16, "widths": [32, 64, 128, 192], "patterns": ["C", "CC", "CC", "CT"]}


def main() -> int:
    """Run the demo; everything that it made is in runs/demo."""
    from zoo.train.recipes import find_recipe
    from zoo.train.trainer import train

    if not DATA.is_dir():
        print(f"the demo needs the photographs of the repository, and {DATA} is not there: run it in a checkout")
        return 2
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    print("1. fine-tune an ImageNet backbone on 600 photographs: the teacher")
    teacher = train(
        find_recipe("finetune")(
            model="tf_efficientnet_lite0",
            checkpoint=str(BACKBONE),
            data=str(DATA),
            out=str(OUT / "teacher"),
            img_size=128,
            epochs=4,
            lr=1e-3,
            channels_last=True,
        )
    )
    elapsed = time.perf_counter() - start
    print(f"\n2. distil it into a small AsCAN that starts from random weights ({elapsed:.0f} s so far)")
    student = train(
        find_recipe("scratch")(
            model="ascan_tiny",
            model_args=STUDENT,
            data=str(DATA),
            out=str(OUT),
            teacher=str(teacher.weights),
            distill_weight=0.8,
            distill_views=16,
            img_size=64,
            epochs=64,
            val_interval=8,
            lr=1e-3,
            batch_size=32,
            warmup_epochs=2,
            drop_path=0.0,
            mixup=0.0,
            cutmix=0.0,
            rand_augment=None,
            color_jitter=0.3,
            clip_grad=5.0,
            channels_last=True,
        )
    )
    from zoo.tools.demo_sr import draw_upscaling

    print("\n3. enlarge a photograph twice with zoo's CRAFT weights")
    print(draw_upscaling(PHOTOGRAPH, OUT / "sr.png"))
    chance = 100 / len(student.evaluation.classes)
    print(f"\nstudent, on {len(student.evaluation.paths)} photographs that it has not seen (chance: {chance:.0f} %)")
    print(student.table)
    print(f"teacher: {teacher.evaluation.scores['top1']:.1f} % top-1")
    print(f"{time.perf_counter() - start:.0f} s; look at {OUT}/predictions.png, curves.png, confusion.png, sr.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
