"""Detection recipes of PoolFormer, SLAB, FcaFormer, ViM2 and SpaRTAN on COCO, and one for images of your own.

The papers count a warm-up of 500 iterations of 16 images, and step schedules in epochs. Their detectors are
mmdetection's; zoo's are torchvision's with the same settings, so the figures are what the papers report, not ours.
"""

from __future__ import annotations

from zoo.train.recipe import DetectionRecipe

_WARMUP = 500 * 16 / 117266  # iterations in epochs of COCO's images with objects
_MULTI_SCALE = tuple(range(480, 801, 32))


def _steps(epochs: int, lr: float, **values) -> dict:
    """12 epochs with the rate falling after 8 and 11, or 36 with 27 and 33, from a warm-up of a thousandth."""
    return (
        dict(
            epochs=epochs,
            batch_size=16,
            optimizer="adamw",
            lr=lr,
            schedule="step",
            milestones={12: (8.0, 11.0), 36: (27.0, 33.0)}[epochs],
            warmup_epochs=_WARMUP,
            warmup_lr=lr * 1e-3,
            pretrained=True,
            test_short=800,
            test_long=1333,
            workers=8,
        )
        | values
    )


RECIPES = {}


def _add(name: str, doc: str, **values) -> None:
    def preset(**changes) -> DetectionRecipe:
        return DetectionRecipe(**(values | changes))

    preset.__name__, preset.__doc__ = name, doc
    RECIPES[name] = preset


for _size, _retina, _box, _mask in (("s12", 36.2, 37.3, 34.6), ("s24", 38.9, 40.1, 37.0), ("s36", 39.5, 41.0, 37.7)):
    _add(
        f"coco_retinanet_poolformer_{_size}",
        f"RetinaNet, 1x, AdamW 1e-4, one scale. The paper: {_retina} AP.",
        head="retinanet",
        model=f"poolformerv1_{_size}",
        map_norm="group",
        short_sides=(800,),
        **_steps(12, 1e-4, weight_decay=1e-4),
    )
    _add(
        f"coco_mask_rcnn_poolformer_{_size}",
        f"Mask R-CNN, 1x, AdamW 2e-4, one scale. The paper: {_box} box AP, {_mask} mask AP.",
        head="mask_rcnn",
        model=f"poolformerv1_{_size}",
        map_norm="group",
        short_sides=(800,),
        **_steps(12, 2e-4, weight_decay=1e-4),
    )

for _model, _drop_path, _ap in (("slab_swin_t", 0.1, 43.1), ("slab_swin_s", 0.2, 46.2)):
    _add(
        f"coco_mask_rcnn_{_model}",
        f"Mask R-CNN, 1x, AdamW 1e-4, DETR's crops. The paper: {_ap} box AP, with shifted windows of its own.",
        head="mask_rcnn",
        model=_model,
        map_norm="layer",
        drop_path=_drop_path,
        short_sides=_MULTI_SCALE,
        crop_policy=True,
        **_steps(12, 1e-4, weight_decay=0.05),
    )

for _epochs, _name, _drop_path, _ap in ((12, "1x", 0.1, 42.9), (36, "3x", 0.2, None)):
    _add(
        f"coco_mask_rcnn_swin_t_prepbn_{_name}",
        f"Mask R-CNN, {_name}, AdamW 1e-4, DETR's crops." + (f" The paper: {_ap} box AP." if _ap else ""),
        head="mask_rcnn",
        model="swin_t_prepbn",
        map_norm="layer",
        drop_path=_drop_path,
        short_sides=_MULTI_SCALE,
        crop_policy=True,
        **_steps(_epochs, 1e-4, weight_decay=0.05),
    )

_add(
    "coco_mask_rcnn_fcaformer_l2",
    "Mask R-CNN, 3x, AdamW 1e-4, decay 0.95 a layer. The paper: 47.0 box AP, 42.1 mask AP, with windowed attention.",
    head="mask_rcnn",
    model="fcaformer_l2",
    map_norm="layer",
    drop_path=0.2,
    layer_decay=0.95,
    short_sides=_MULTI_SCALE,
    precision="fp16",
    **_steps(36, 1e-4, weight_decay=0.05),
)

for _model, _drop_path in (("vim2_tiny", 0.2), ("vim2_small", 0.3)):
    for _epochs, _name in ((12, "1x"), (36, "3x")):
        _add(
            f"coco_mask_rcnn_{_model}_{_name}",
            f"Mask R-CNN, {_name}, AdamW 1e-4: the rate and the epochs are the paper's, the rest Swin's.",
            head="mask_rcnn",
            model=_model,
            map_norm="layer",
            drop_path=_drop_path,
            short_sides=(800,) if _epochs == 12 else _MULTI_SCALE,
            **_steps(_epochs, 1e-4, weight_decay=0.05),
        )

_add(
    "coco_rt_detr_spartan_tiny",
    "RT-DETR, 72 epochs: SpaRTAN as its backbone, everything else RT-DETR's. The paper: 50.0 AP, for a size that it "
    "does not name. Images are not normalised, as there.",
    head="rt_detr",
    model="spartan_tiny",
    pretrained=True,
    head_args={
        "multi_scale": list(range(480, 801, 32)),
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    },
    epochs=72,
    batch_size=16,
    optimizer="adamw",
    lr=1e-4,
    backbone_lr=0.1,
    weight_decay=1e-4,
    schedule="constant",
    warmup_epochs=0,
    clip_grad=0.1,
    ema_decay=0.9999,
    train_size=640,
    test_short=640,
    color=0.5,
    zoom_out=0.5,
    iou_crop=0.8,
    workers=8,
)


def finetune_detection(**changes) -> DetectionRecipe:
    """A detector on images of your own, on a CPU or one GPU: small images, few a step, frozen statistics.

    Give `--pretrained` or `--backbone-checkpoint`, and `--head mask_rcnn` for masks. Write `--test-short` and
    `--short-sides` larger for small objects.
    """
    return DetectionRecipe(
        **dict(
            head="retinanet",
            model="caformer_s18",
            epochs=30,
            batch_size=4,
            optimizer="adamw",
            lr=2e-4,
            min_lr=1e-6,
            warmup_epochs=1,
            weight_decay=0.05,
            clip_grad=1.0,
            freeze_norm=True,
            short_sides=(288, 320, 352, 384, 416, 448, 480),
            max_long=800,
            color=0.5,
            test_short=384,
            test_long=640,
            val_interval=5,
        )
        | changes
    )


RECIPES["finetune_detection"] = finetune_detection
