"""Official files of every family become zoo's files and come back to the bit; wrong ones give one sentence."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import tests.parity.fcaformer
import tests.parity.slab
import zoo
from tests.parity.golden import GOLDEN, Case, output_error
from zoo.checkpoint import read_checkpoint, unwrap_state_dict
from zoo.saving import read_metadata
from zoo.tools.conversion import convert_file, write_official
from zoo.tools.main import main

# golden case -> what must be said about it: nothing where the entries tell
CASES = {
    "activator/uniform_activator_cifar10": [],
    "activator/activator_c100": [],
    "ascan/ascan_tiny": ["--model", "ascan_tiny"],  # large: in half precision, its output is not compared
    "craft/craft_x2_gray": [],
    "craft/craft_x4_masked": ["--model-args", '{"shift_mask": true}'],
    "crate/crate_tiny": [],
    "crate/mae_crate_tiny": [],
    "fcaformer/fcaformer_l1": ["--model", "fcaformer_l1"],
    "fcaformer/dense_l2_256x320": ["--model", "fcaformer_l2", "--model-args", '{"dense": true}'],
    "metaformer/identityformer_s12": ["--model", "identityformer_s12"],
    "metaformer/convformer_s18": ["--model", "convformer_s18"],
    "metaformer/poolformer_s12_feat": ["--model", "poolformerv1_s12", "--model-args", '{"dense": true}'],
    "ninformer/ninformer_gray28": [],
    "pem/pem_stdc1_ade20k_semantic": [],
    "slab/slab_cswin_t": ["--model", "slab_cswin_t"],
    "spartan/spartan_tiny_c10_odd_150x101": [],
    "vim2/vim2_tiny_64": ["--model", "vim2_tiny"],
}
# what is compared with the record, and how it comes out of the model
OUTPUTS = ("logits", "sr", "feat0", "pred_logits")


def official_state(case):
    if "derived_buffers" in case:
        case["derived_buffers"] = [n if isinstance(n, str) else n[0] for n in case["derived_buffers"]]
    if case.path.parent.name == "slab":
        state = tests.parity.slab.official_state(case)
    elif case.path.parent.name == "fcaformer":
        state = tests.parity.fcaformer.official_state(case)
    else:
        state = case.weights()
    for name, shape, kind in case["state_dict"]:
        if name not in state:
            state[name] = torch.zeros(shape, dtype=getattr(torch, kind.removeprefix("torch.")))
    return {name: state[name].contiguous() for name, _, _ in case["state_dict"]}


def first(output):
    output = getattr(output, "class_logits", output)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(("number", "name"), list(enumerate(CASES)), ids=list(CASES))
def test_an_official_file_goes_through_convert_verify_and_back(number, name, tmp_path, capsys):
    case = Case(GOLDEN / f"{name}.json")
    official = official_state(case)
    large = sum(value.numel() for value in official.values()) > 2e7
    if large:
        official = {n: v.half() if v.is_floating_point() else v for n, v in official.items()}
    elif number % 2:
        official = {n: v.float() if v.is_floating_point() else v for n, v in official.items()}
    path, converted, back = tmp_path / "official.pth", tmp_path / "zoo.safetensors", tmp_path / "back.pth"
    if number % 3:
        torch.save({"epoch": 1, "state_dict": {f"module.{n}": v for n, v in official.items()}}, path)
    else:
        path = path.with_suffix(".safetensors")
        save_file(official, path)
    assert main(["convert", str(path), "--out", str(converted), *CASES[name]]) == 0, capsys.readouterr().err

    described = read_metadata(converted)
    assert described["converted_from"]["file"] == path.name
    assert len(described["converted_from"]["sha256"]) == 64
    model = zoo.load_model(converted)
    compared = next((key for key in OUTPUTS if key in case["outputs"]), None)
    if compared and not large:
        with torch.no_grad():
            output = first(model(case.input().float()))
        assert output_error(case["outputs"][compared], output) < 1e-4
    del model

    if compared and number % 2 == 0 and not large:
        assert main(["verify", str(converted), "--golden", str(case.path)]) == 0
        told = capsys.readouterr().out
        assert told.count(": good") >= 2
        assert "WRONG" not in told

    suffix = ".safetensors" if number % 4 == 0 else ".pth"
    assert main(["convert", str(converted), "--to", "official", "--out", str(back.with_suffix(suffix))]) == 0
    again = read_checkpoint(back.with_suffix(suffix))
    assert again.keys() == official.keys()
    for entry, value in official.items():
        assert again[entry].dtype == value.dtype
        assert torch.equal(again[entry], value), entry


@pytest.fixture(scope="module")
def crate(tmp_path_factory):
    """A folder with a small official CRATE file, its golden case and the state."""
    folder = tmp_path_factory.mktemp("crate")
    case = Case(GOLDEN / "activator/uniform_activator_cifar10.json")
    state = {name: value.float() for name, value in official_state(case).items()}
    torch.save(state, folder / "official.pth")
    return folder, state, case


def sentence(capsys, *arguments, status=2):
    """The one sentence that a command fails with."""
    assert main([str(argument) for argument in arguments]) == status
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def test_wrong_files_give_one_sentence(crate, tmp_path, capsys):
    folder, state, _ = crate
    path = folder / "official.pth"
    out = tmp_path / "x.safetensors"
    assert "does not fit crate_tiny: " in sentence(capsys, "verify", path, "--model", "crate_tiny")
    assert "does not fit crate_tiny: " in sentence(capsys, "convert", path, "--out", out, "--model", "crate_tiny")
    seven = ("--model-args", '{"num_classes": 7}')
    told = sentence(capsys, "verify", path, "--model", "uniform_activator_patch4_32", *seven)
    assert "num_classes is 7 in --model-args and 10 in the file" in told
    assert "no model is called so" in sentence(capsys, "verify", path, "--model", "crate_tinny")
    assert "has no such name and tag" in sentence(capsys, "verify", path, "--model", "crate_tiny.x")
    data = path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    assert "truncated or not a checkpoint" in sentence(capsys, "verify", tmp_path / "cut.pth")
    save_file(state, tmp_path / "cut.safetensors")
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert "truncated" in sentence(capsys, "convert", tmp_path / "cut.safetensors", "--out", out)
    torch.save({"a.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    assert "a file of no known layout" in sentence(capsys, "convert", tmp_path / "other.pth", "--out", out)
    torch.save({**state, "patcher.bias": state["patcher.bias"] * float("nan")}, tmp_path / "nan.pth")
    assert "not finite in 1 entries" in sentence(capsys, "convert", tmp_path / "nan.pth", "--out", out)
    assert "not finite in 1 entries" in sentence(capsys, "verify", tmp_path / "nan.pth")
    assert "no checkpoint at" in sentence(capsys, "verify", tmp_path / "none.pth")
    back = ("--to", "official", "--out", tmp_path / "y.pth")
    assert "was not written by zoo" in sentence(capsys, "convert", path, *back)
    assert not out.exists()


def test_a_file_that_several_models_fit_names_them(tmp_path, capsys):
    case = Case(GOLDEN / "metaformer/metaformer_id_s12.json")
    torch.save({n: v.half() for n, v in official_state(case).items()}, tmp_path / "a.pth")
    told = sentence(capsys, "convert", tmp_path / "a.pth", "--out", tmp_path / "b.safetensors")
    assert "fits several models, metaformer_id_s12 and poolformerv1_s12: say which with --model" in told
    # the released file's name says it
    (tmp_path / "a.pth").rename(tmp_path / "poolformer_s12.pth.tar")
    assert main(["convert", str(tmp_path / "poolformer_s12.pth.tar"), "--out", str(tmp_path / "b.safetensors")]) == 0
    described = read_metadata(tmp_path / "b.safetensors")
    assert described["weights"] == "poolformerv1_s12.sail_in1k"
    assert described["license"] == "apache-2.0"
    assert described["source"] == "https://github.com/sail-sg/poolformer"
    assert described["input"]["crop_pct"] == 0.9


def test_a_folder_is_converted_file_by_file(crate, tmp_path, capsys):
    _, state, _ = crate
    (tmp_path / "in" / "deep").mkdir(parents=True)
    torch.save({"model": state}, tmp_path / "in" / "deep" / "a.pth.tar")
    save_file(state, tmp_path / "in" / "b.safetensors")
    (tmp_path / "in" / "bad.pth").write_bytes(b"<html>")
    (tmp_path / "in" / "README.md").write_text("no weights")
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "in"), "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "2 of 3 files converted, 1 failed" in told.out
    assert "bad.pth" in told.err
    assert "web page" in told.err
    for name in ("deep/a.safetensors", "b.safetensors"):
        assert zoo.load_model(out / name).num_classes == 10
    assert main(["convert", str(tmp_path / "in"), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_trained_file_takes_the_layout_of_an_official_one(crate, tmp_path, capsys):
    folder, state, _ = crate
    model = timm.create_model("uniform_activator_patch4_32", num_classes=10)
    zoo.save_model(model, tmp_path / "trained.safetensors")
    to = ["--to", "official", "--out", str(tmp_path / "back.pth")]
    assert "pass --like" in sentence(capsys, "convert", tmp_path / "trained.safetensors", *to)
    like = ["--like", str(folder / "official.pth")]
    assert main(["convert", str(tmp_path / "trained.safetensors"), *to, *like]) == 0
    back = torch.load(tmp_path / "back.pth")
    assert back.keys() == state.keys()
    again = timm.create_model("uniform_activator_patch4_32", num_classes=10)
    assert zoo.load_checkpoint(again, tmp_path / "back.pth").layout == "Uniform Activator"
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    assert any(not torch.equal(back[n], state[n]) for n in state)


def test_an_entry_that_is_stored_twice_is_remembered_as_a_copy(tmp_path):
    case = Case(GOLDEN / "pem/pem_stdc1_ade20k_semantic.json")
    official = {n: v.half() if v.is_floating_point() else v for n, v in official_state(case).items()}
    first_of = {n: n.replace("backbone.x2.0.", "backbone.features.") for n in official if ".x2.0." in n}
    twins = {n: f for n, f in first_of.items() if f in official and official[f].shape == official[n].shape}
    assert twins
    official |= {n: official[f] for n, f in twins.items()}
    torch.save(official, tmp_path / "a.pth")
    done = convert_file(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert not set(twins) & set(done["aside"])
    write_official(tmp_path / "b.safetensors", tmp_path / "c.pth")
    back = torch.load(tmp_path / "c.pth")
    assert all(torch.equal(back[n], v) and back[n].dtype == v.dtype for n, v in official.items())


def test_a_detector_in_mmdetections_layout_is_recognised(tmp_path):
    from tests.heads.test_detection_files import _as_mmdetection, _randomised

    model = _randomised("retinanet", norm=None)
    content = _as_mmdetection(model)
    official = content["state_dict"]
    torch.save(content, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b.safetensors")]) == 0
    again = zoo.load_model(tmp_path / "b.safetensors")
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    assert main(["convert", str(tmp_path / "b.safetensors"), "--to", "official", "--out", str(tmp_path / "c.pth")]) == 0
    back = unwrap_state_dict(torch.load(tmp_path / "c.pth"))
    assert all(torch.equal(back[n], v) for n, v in official.items())


def test_a_golden_case_of_other_weights_says_nothing(crate, tmp_path, capsys):
    folder, state, case = crate
    assert main(["verify", str(folder / "official.pth"), "--golden", str(case.path)]) == 0
    assert "logits in float64" in capsys.readouterr().out
    torch.save({n: v * 2 for n, v in state.items()}, tmp_path / "trained.pth")
    told = sentence(capsys, "verify", tmp_path / "trained.pth", "--golden", case.path)
    assert "holds other weights than the golden case" in told
    (tmp_path / "no.json").write_text("{}")
    told = sentence(capsys, "verify", folder / "official.pth", "--golden", tmp_path / "no.json")
    assert "no golden case of a whole model" in told
    # a network that computes something else, with the right weights
    wrong = dict(case) | {"outputs": {"logits": case["outputs"]["logits"] | {"values": [1.0] * 10}}}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert main(["verify", str(folder / "official.pth"), "--golden", str(tmp_path / "wrong.json")]) == 1
    assert "WRONG" in capsys.readouterr().out
