"""`zoo card`: front matter that the hub reads, with nothing in it that was only claimed."""

from dataclasses import replace

import pytest
import yaml

from tests.tools.test_compare import RECORD
from zoo.manifest import known_weights
from zoo.tools.card import make_card
from zoo.tools.main import main
from zoo.tools.records import append_results


def front(card):
    _, text, body = card.split("---\n", 2)
    return yaml.safe_load(text), body


def record(**other):
    whole = dict(tag="in1k", images=50_000, metrics={"top1": 66.25, "top5": 87.5}, claims={"top1": 66.7})
    return replace(RECORD, **whole | other)


def test_claims_stand_in_the_table_and_not_in_the_front_matter():
    data, body = front(make_card("crate_tiny"))
    assert "model-index" not in data
    assert "66.7" not in str(data)
    assert (data["library_name"], data["pipeline_tag"], data["datasets"]) == (
        "timm",
        "image-classification",
        ["imagenet-1k"],
    )
    assert data["license"] == "unknown"
    assert "| licence of the weights | unknown: not stated |" in body
    assert "| top1 | ImageNet-1k | 66.70 | - |" in body
    assert "| parameters | 6,090,856 |" in body
    assert "| multiply-adds | 2.16 G" in body
    assert 'timm.create_model("crate_tiny' in body
    assert "pretrained=True" not in body  # never released


def test_measurements_of_whole_data_sets_are_the_index():
    results = [
        record(),
        record(images=500, metrics={"top1": 71.0}, errors={"top1": 2.03}),
        record(metrics={"top1": 60.0}, differing=["crop_pct 1.0 (claim: 0.875)"]),
        record(tag="other", metrics={"top1": 99.0}),
        record(model="crate_small", metrics={"top1": 98.0}),
    ]
    data, body = front(make_card("crate_tiny.in1k", results))
    (index,) = data["model-index"]
    assert index["name"] == "crate_tiny.in1k"
    (entry,) = index["results"]
    assert entry["dataset"] == {"name": "ImageNet-1k", "type": "imagenet-1k", "split": "val"}
    assert [(m["name"], m["type"], m["value"]) for m in entry["metrics"]] == [
        ("top1", "accuracy", 66.25),
        ("top5", "accuracy", 87.5),
    ]
    assert "| top1 | ImageNet-1k val | 66.70 | 66.25 | 50,000 |" in body
    assert "| 71.00 ± 2.03 | 500 of 50,000 (a subset) |" in body
    assert "Differs from the claim's settings: crop_pct 1.0 (claim: 0.875)" in body
    assert "must not be quoted" in body
    assert "99.00" not in body
    assert "98.00" not in body


def test_the_last_measurement_counts():
    data, _ = front(make_card("crate_tiny", [record(), record(metrics={"top1": 66.5})]))
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 66.5


def test_any_text_survives_the_front_matter():
    name = 'it\'s "a": {b} # c\n- d'
    data, _ = front(make_card("crate_tiny", [record(dataset=name, total=None)]))
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == name


def test_readings_and_packaged_weights_say_what_they_are():
    _, body = front(make_card("vim2_tiny"))
    assert "**A reading of the paper, not the authors' code:**" in body
    data, body = front(make_card("craft_x2.zoo"))
    assert (data["pipeline_tag"], data["license"]) == ("image-to-image", "apache-2.0")
    assert [r["dataset"]["type"] for r in data["model-index"][0]["results"]] == ["set5", "set14"]
    assert "| psnr_set5 | Set5 | - | 36.83 |" in body
    assert "create_upscaler" in body


def test_a_card_for_each_kind_of_entry():
    kinds = {(w.task, w.access, w.door is None): w.name for w in reversed(known_weights())}
    for name in kinds.values():
        data, body = front(make_card(name))
        assert {"license", "library_name", "pipeline_tag", "tags"} <= set(data), name
        assert "```python" in body, name


def test_the_command_writes_and_refuses(tmp_path, capsys):
    append_results(tmp_path / "r.jsonl", [record()])
    out = tmp_path / "cards" / "README.md"
    assert main(["card", "crate_tiny", "--results", str(tmp_path / "r.jsonl"), "--out", str(out)]) == 0
    assert "66.25" in out.read_text()
    assert main(["card", "crate_tinny"]) == 2
    assert "no model is called 'crate_tinny'" in capsys.readouterr().err
    assert main(["card", "crate_tiny.nope"]) == 2
    assert "no weights with the tag 'nope': the manifest has in1k" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["card"])
