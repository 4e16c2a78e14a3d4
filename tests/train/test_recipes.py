"""Recipes: complete, typed, reproducible, and with the papers' values."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm

from zoo.tools.main import build_parser
from zoo.tools.train import resolve_recipe
from zoo.train.recipe import ClassificationRecipe
from zoo.train.recipes import find_recipe, list_recipes
from zoo.train.schedules import crate_multiplier, learning_rate

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", list(list_recipes()))
def test_a_preset_is_complete_and_names_a_model_that_exists(name):
    recipe = find_recipe(name)()
    assert timm.is_model(recipe.model)
    assert list_recipes()[name].__doc__
    assert ClassificationRecipe.from_json(recipe.to_json()) == recipe


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
    ],
)
def test_papers_values(name, values):
    recipe = find_recipe(name)()
    assert {field: getattr(recipe, field) for field in values} == values


def test_metaformer_recipes_share_the_official_augmentation():
    for name, function in list_recipes().items():
        if name.startswith("imagenet_") and "former_" in name:
            recipe = function()
            assert (recipe.epochs, recipe.cooldown_epochs, recipe.min_lr, recipe.warmup_lr) == (300, 10, 1e-5, 1e-6)
            assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.random_erasing) == (0.8, 1.0, 0.1, 0.25)
            assert recipe.rand_augment == "rand-m9-mstd0.5-inc1"
            assert recipe.ema_decay is None


def test_the_cosine_is_timms():
    import torch
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
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
