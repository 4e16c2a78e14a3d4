"""Recipes: complete, typed, reproducible, and with the papers' values."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch

from zoo.heads import list_heads
from zoo.schedules import crate_multiplier, learning_rate
from zoo.tools.main import build_parser
from zoo.tools.train import resolve_recipe
from zoo.train.engine import build_optimizer
from zoo.train.recipe import ClassificationRecipe
from zoo.train.recipes import find_recipe, list_recipes, metaformer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", list(list_recipes()))
def test_a_preset_is_complete_and_names_a_model_that_exists(name):
    recipe = find_recipe(name)()
    assert timm.is_model(recipe.model) or recipe.model in list_heads("super-resolution")
    assert list_recipes()[name].__doc__
    assert type(recipe).from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("imagenet_poolformer_s12", dict(lr=1e-3, batch_size=1024, warmup_epochs=5, drop_path=0.1, optimizer="adamw")),
        ("imagenet_poolformer_m48", dict(lr=1e-3, batch_size=1024, drop_path=0.4)),
        ("imagenet_poolformerv2_m36", dict(lr=4e-3, batch_size=4096, drop_path=0.3)),
        ("imagenet_randformer_m48", dict(lr=4e-3, batch_size=4096, drop_path=0.3)),
        ("imagenet_identityformer_m48", dict(lr=4e-3, drop_path=0.4)),
        ("imagenet_convformer_b36", dict(lr=4e-3, warmup_epochs=20, drop_path=0.6, head_dropout=0.0)),
        ("imagenet_caformer_s18", dict(optimizer="lamb", lr=8e-3, warmup_epochs=20, drop_path=0.15, head_dropout=0.0)),
        ("imagenet_caformer_b36", dict(optimizer="lamb", lr=8e-3, drop_path=0.6, head_dropout=0.5)),
        ("finetune384_convformer_m36", dict(lr=5e-5, batch_size=1024, epochs=30, drop_path=0.8, head_dropout=0.4)),
        ("finetune384_caformer_m36", dict(optimizer="lamb", lr=1e-4, drop_path=0.7, ema_decay=0.9999, mixup=0.0)),
        ("imagenet_crate", dict(optimizer="lion", lr=2e-4, weight_decay=0.05, batch_size=512, epochs=200)),
        ("imagenet_crate_paper", dict(optimizer="lion", lr=2.4e-4, weight_decay=0.5, batch_size=2048, epochs=150)),
        ("finetune_crate", dict(optimizer="adamw", lr=5e-5, weight_decay=0.01, batch_size=256, epochs=200)),
        ("finetune_crate_alpha", dict(lr=1.6e-4, weight_decay=0.1, clip_grad=1.0, epochs=91, betas=(0.9, 0.95))),
        ("imagenet21k_crate_alpha", dict(lr=8e-4, min_lr=1e-6, warmup_epochs=10, label_smoothing=0.0)),
        ("imagenet_fcaformer_l1", dict(lr=2e-3, batch_size=1024, weight_decay=0.05, drop_path=0.0, epochs=300)),
        ("imagenet_fcaformer_l2", dict(warmup_epochs=20, warmup_lr=0.0, min_lr=1e-6, drop_path=0.1, eps=1e-8)),
        ("imagenet_fcaformer_l3", dict(ema_decay=0.9999, clip_grad=None, drop_path=0.2, precision="float32")),
        ("imagenet_fcaformer_l4", dict(drop_path=0.4, random_erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)),
        ("imagenet_slab_deit_t", dict(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, batch_size=1024, clip_grad=5.0)),
        ("imagenet_slab_deit_s", dict(warmup_epochs=20, cooldown_epochs=0, recalibrate_epochs=10, weight_decay=0.05)),
        ("imagenet_pvt_t_prepbn", dict(lr=1e-3, min_lr=2e-5, warmup_lr=2e-6, warmup_epochs=5, cooldown_epochs=10)),
        ("imagenet_pvt_s_prepbn", dict(lr=5e-4, batch_size=512, clip_grad=None, drop_path=0.1)),
        ("imagenet_pvt_m_prepbn", dict(lr=1e-3, batch_size=1024, clip_grad=1.0, drop_path=0.3)),
        ("imagenet_slab_pvt_m", dict(lr=5e-4, batch_size=512, clip_grad=1.0, drop_path=0.3)),
        ("imagenet_swin_t_prepbn", dict(lr=1e-3, clip_grad=5.0, drop_path=0.1, model_args={"norm_layer": "prepbn"})),
        ("imagenet_slab_swin_s", dict(lr=1e-3, min_lr=1e-5, clip_grad=5.0, drop_path=0.3)),
        ("imagenet_slab_swin_b", dict(lr=5e-4, batch_size=512, clip_grad=5.0, drop_path=0.5)),
        ("imagenet_slab_cswin_t", dict(lr=2e-3, min_lr=4e-5, warmup_lr=4e-6, batch_size=2048, clip_grad=None)),
        ("imagenet_ascan_large", dict(lr=1e-3, batch_size=1024, clip_grad=1.0, ema_decay=0.9999, drop_path=0.3)),
        ("cifar_ninformer", dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=128, epochs=100)),
        ("cifar_ninformer", dict(schedule="constant", crop_padding=4, hflip=0.5, model_args={"proj_drop_rate": 0.5})),
        ("imagenet_ninformer_base", dict(lr=1e-3, batch_size=1024, drop_path=0.2, repeated_augmentation=3)),
        ("cifar_activator", dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=128, epochs=100, hflip=0.0)),
        ("cifar_activator_geglu", dict(crop_padding=0, color_jitter=None, label_smoothing=0.0, model_args={})),
        ("imagenet_spartan_tiny", dict(lr=2.5e-3, batch_size=2048, weight_decay=0.03, warmup_lr=1e-4, min_lr=1e-6)),
        ("imagenet_spartan_tiny", dict(mixup=0.2, cutmix=1.0, label_smoothing=0.0, img_size=256, crop_pct=1.0)),
        ("imagenet_spartan_xtiny", dict(rand_augment="torchvision-n2-m7", erasing_mode="const", drop_path=0.1)),
        ("imagenet_vim2_tiny", dict(lr=1e-3, batch_size=1024, weight_decay=0.05, warmup_epochs=20, drop_path=0.2)),
        ("imagenet_vim2_small", dict(betas=(0.9, 0.999), clip_grad=5.0, epochs=300, drop_path=0.3)),
    ],
)
def test_papers_values(name, values):
    recipe = find_recipe(name)()
    assert {field: getattr(recipe, field) for field in values} == values


def test_metaformer_recipes_share_the_official_augmentation():
    for name, function in metaformer.RECIPES.items():
        if name.startswith("imagenet_"):
            recipe = function()
            assert (recipe.epochs, recipe.cooldown_epochs, recipe.min_lr, recipe.warmup_lr) == (300, 10, 1e-5, 1e-6)
            assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.random_erasing) == (0.8, 1.0, 0.1, 0.25)
            assert recipe.rand_augment == "rand-m9-mstd0.5-inc1"
            assert recipe.ema_decay is None


def test_the_cosine_is_timms():
    from timm.scheduler import CosineLRScheduler

    recipe = find_recipe("imagenet_poolformer_s12")()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=300, lr_min=recipe.min_lr, warmup_t=5, warmup_lr_init=recipe.warmup_lr
    )
    for epoch in range(recipe.total_epochs):
        scheduler.step(epoch)
        assert learning_rate(recipe, epoch + 0.7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_crates_schedule_is_the_official_one():
    golden = json.loads((GOLDEN / "crate" / "lr_schedule.json").read_text())
    for epochs in (200, 90):
        computed = [crate_multiplier(epoch, epochs) for epoch in range(epochs)]
        assert computed == pytest.approx(golden[f"E{epochs}"][:epochs], rel=1e-12)


def test_fcaformers_schedule_is_the_official_one():
    golden = json.loads((GOLDEN / "fcaformer" / "lr_schedule_imagenet.json").read_text())
    recipe, steps = find_recipe("imagenet_fcaformer_l2")(), golden["steps_per_epoch"]
    for step, rate in golden["values"]:
        assert learning_rate(recipe, step / steps, steps) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("name", ["slab_swin_t", "slab_deit", "slab_pvt_t", "slab_cswin_t"])
def test_slabs_schedules_are_the_official_ones(name):
    schedules = json.loads((GOLDEN / "slab" / "lr_schedule.json").read_text())["schedules"]
    golden = next(schedule for key, schedule in schedules.items() if key.split(" ")[0] == name)
    recipe = find_recipe(f"imagenet_{'slab_deit_t' if name == 'slab_deit' else name}")()
    assert recipe.batch_size == golden["batch_per_gpu"] * golden["gpus"]
    for update, rate in golden["points_update_lr"]:
        assert learning_rate(recipe, update / golden["iterations_per_epoch"]) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("imagenet_slab_swin_t", 60_000),
        ("imagenet_slab_swin_b", 60_000),
        ("imagenet_slab_deit_t", 60_000),
        ("imagenet_slab_cswin_t", 120_000),
        ("imagenet_deit_s_prepbn", 300_000),
        ("imagenet_pvt_t_prepbn", 300_000),
        ("imagenet_pvt_s_prepbn", 300_000),
    ],
)
def test_slabs_gamma_falls_as_fast_as_in_the_official_configurations(name, steps):
    recipe, images = find_recipe(name)(), 1_281_167
    assert recipe.prepbn_share * recipe.epochs * (images // recipe.batch_size) == pytest.approx(steps, rel=2e-3)


def test_spartans_schedule_is_the_official_one():
    golden = json.loads((GOLDEN / "spartan" / "lr_schedule.json").read_text())["lr_by_epoch"]
    recipe = find_recipe("imagenet_spartan_tiny")()
    rates = [learning_rate(recipe, epoch + 0.5) for epoch in range(300)]
    assert rates == pytest.approx(golden[:300], rel=1e-9)


def test_family_groups_decay_what_the_authors_decay():
    model = timm.create_model("fcaformer_l1", num_classes=10)
    optimizer = build_optimizer(find_recipe("imagenet_fcaformer_l1")(weight_decay=0.3), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        kept = parameter.ndim <= 1 or name.endswith(".bias")
        assert decay[id(parameter)] == (0.0 if kept else 0.3), name
    assert type(optimizer) is torch.optim.AdamW
    model = timm.create_model("slab_deit_t", num_classes=10, depth=1)
    optimizer = build_optimizer(find_recipe("imagenet_slab_deit_t")(), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert decay[id(named["pos_embed"])] == decay[id(named["blocks.0.norm1.norm2.alpha"])] == 0.0
    assert decay[id(named["blocks.0.attn.positional_encoding"])] == 0.05


def test_spartans_decay_is_the_official_one():
    model = timm.create_model("spartan_tiny")
    optimizer = build_optimizer(find_recipe("imagenet_spartan_tiny")(), model)
    tensors = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert tensors == {0.03: 366, 0.0: 451}


def test_a_family_without_rules_of_its_own_is_named():
    model = timm.create_model("crate_tiny", num_classes=3, depth=1)
    with pytest.raises(ValueError, match="crate_tiny has no rules of its own: use timm"):
        build_optimizer(ClassificationRecipe(model="crate_tiny", param_groups="family"), model)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(prepbn_share=1.5), "prepbn_share is 1.5, expected above prepbn_warmup"),
        (dict(prepbn_share=0.2, prepbn_warmup=0.3), "prepbn_share is 0.2, expected above prepbn_warmup"),
        (dict(prepbn_warmup=0.3), "prepbn_warmup is 0.3, expected 0 while prepbn_share is unset"),
        (dict(recalibrate_epochs=1, ema_decay=0.9), "recalibrate_epochs is 1, expected 0 while ema_decay is set"),
        (dict(param_groups="family", layer_decay=0.7), "layer_decay is 0.7, expected unset while param_groups"),
        (dict(erasing_mode="noise"), "erasing_mode is 'noise', expected one of pixel, rand, const"),
        (dict(repeated_augmentation=0), "repeated_augmentation is 0, expected at least 1"),
        (dict(crop_padding=-1), "crop_padding is -1"),
        (dict(schedule="cosin"), "schedule is 'cosin', expected one of cosine"),
        (dict(val_fraction=1.5), "val_fraction is 1.5, expected between 0 and 1"),
        (dict(drop_path=2.0), "drop_path is 2.0"),
        (dict(epochs=0), "epochs is 0, expected at least 1"),
        (dict(pretrained=True, checkpoint="x"), "a model starts from one set of weights"),
    ],
)
def test_a_wrong_value_is_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ClassificationRecipe(**change)


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="no field learning_rate"):
        ClassificationRecipe.from_json('{"learning_rate": 1}')
    with pytest.raises(ValueError, match="no field learning_rate"):
        ClassificationRecipe().replace(learning_rate=1)


def test_every_field_is_a_flag_of_zoo_train():
    parser = build_parser("train")
    base = ["train"]
    for field in dataclasses.fields(ClassificationRecipe):
        value = getattr(ClassificationRecipe(), field.name)
        text = json.dumps(value) if isinstance(value, dict) else value
        if value is None or value == "":
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(text)
        args = parser.parse_args([*base, f"--{field.name.replace('_', '-')}", text])
        assert getattr(resolve_recipe(args), field.name) == value


def test_flags_override_the_preset_and_nothing_else():
    args = build_parser("train").parse_args(["train", "--recipe", "finetune", "--lr", "3e-4", "--channels-last"])
    expected = find_recipe("finetune")(lr=3e-4, channels_last=True)
    assert resolve_recipe(args) == expected
