"""`zoo weights`: what is known, what is here, and files that were fetched by hand."""

import pytest
import timm
import torch

import zoo
from zoo.manifest import known_weights
from zoo.tools.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def run(capsys, *arguments):
    """Status, output and error of a command."""
    status = main(["weights", *map(str, arguments)])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_the_list_can_be_narrowed(folder, capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert out.splitlines()[-1] == f"{len(known_weights())} of {len(known_weights())}"
    assert len(out.splitlines()) == len(known_weights()) + 2
    _, out, _ = run(capsys, "list", "crate_alpha*", "--access", "hub")
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == [
        "crate_alpha_base_p16.in21k_ft_in1k",
        "crate_alpha_large_p14.in21k_ft_in1k",
        "crate_alpha_large_p14.datacomp1b",
        "crate_alpha_huge_p14.datacomp1b",
    ]
    _, out, _ = run(capsys, "list", "--task", "segmentation")
    assert "pem.r50_cityscapes_panoptic" in out
    _, out, _ = run(capsys, "list", "--family", "craft")
    assert all(line.startswith("craft_x") for line in out.splitlines()[1:-1])
    _, out, _ = run(capsys, "list", "--local")
    assert "craft_x2.zoo" in out
    assert "yes" in out
    assert run(capsys, "list", "nothing*")[0] == 1


def test_weights_that_are_here_are_given_and_others_explained(folder, capsys):
    status, out, _ = run(capsys, "get", "craft_x2")
    assert status == 0
    assert out.strip().endswith("craft_x2.zoo.safetensors")
    status, out, err = run(capsys, "get", "craft_x2.zoo", "crate_tiny")
    assert status == 1
    assert "never released" in err
    status, _, err = run(capsys, "get", "crate_small.in21k")
    assert status == 2
    assert "crate_small.in21k is not in the manifest: it has crate_small.in1k" in err
    assert run(capsys, "verify", "crate_small")[0] == 2


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file as the authors' script writes it."""
    path = tmp_path_factory.mktemp("official") / "NiNformerImageClassification.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("activator_patch4_32").state_dict(), path)
    return path


def test_a_file_is_added_under_the_name_that_pretrained_looks_for(folder, official, capsys):
    status, out, err = run(capsys, "add", official, "--model", "activator_patch4_32.cifar10")
    assert status == 0, err
    target = folder / "activator_patch4_32.cifar10.pth"
    assert str(target) in out
    assert [p.name for p in folder.iterdir()] == [target.name]
    model = timm.create_model("activator_patch4_32", pretrained=True)
    assert torch.equal(model.head.weight, torch.load(official)["head.weight"])

    status, _, err = run(capsys, "add", official, "--model", "activator_patch4_32")
    assert status == 2
    assert "is there already: pass --force to replace it" in err
    assert run(capsys, "add", official, "--model", "activator_patch4_32", "--force")[0] == 0
    assert "yes" in run(capsys, "list", "activator_patch4_32.cifar10")[1]

    status, out, _ = run(capsys, "verify", "activator_patch4_32")
    assert status == 0
    assert "1 of 1 files are good" in out
    target.write_bytes(target.read_bytes()[:5000])
    status, _, err = run(capsys, "verify", target)
    assert status == 1
    assert "truncated" in err


def test_a_converted_file_takes_the_place_of_the_official_one(folder, official, tmp_path, capsys):
    run(capsys, "add", official, "--model", "activator_patch4_32.cifar10")
    converted = tmp_path / "a.safetensors"
    assert main(["convert", str(official), "--out", str(converted), "--model", "activator_patch4_32.cifar10"]) == 0
    status, _, err = run(capsys, "add", converted, "--force")
    assert status == 0, err
    assert [p.name for p in folder.iterdir()] == ["activator_patch4_32.cifar10.safetensors"]
    model = timm.create_model("activator_patch4_32", pretrained=True)
    assert torch.equal(model.head.weight, zoo.load_model(converted).head.weight)


def test_a_file_of_another_model_is_not_added(folder, official, capsys):
    status, _, err = run(capsys, "add", official, "--model", "crate_tiny")
    assert status == 2
    assert "does not fit crate_tiny" in err
    assert not folder.exists() or not list(folder.iterdir())


def test_all_files_at_hand_are_verified_by_default(folder, capsys):
    status, out, _ = run(capsys, "verify")
    assert status == 0
    assert "craft_x2.zoo.safetensors: good" in out
