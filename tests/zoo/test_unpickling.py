"""Files with pickled objects give their tensors and run nothing, whatever they say."""

import argparse
import collections
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

import zoo
from zoo import unpickling
from zoo.checkpoint import read_checkpoint, unwrap_state_dict


def weights():
    return collections.OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(2, dtype=torch.bfloat16))


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request, tmp_path):
    """Write with torch.save in one of its formats; returns the path."""

    def write(content, name="file.pth"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=request.param)
        return tmp_path / name

    return write


def forget(monkeypatch, name, *classes):
    """A module with classes that exist while a file is written only."""
    module = types.ModuleType(name)
    for cls in classes:
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_configuration_object_beside_the_weights_is_plain_data(save, monkeypatch):
    class DictConfig:
        def __init__(self):
            self.content = {"lr": 0.1, "nested": [1, (2, 3)]}
            self.parent = self

        def __setstate__(self, state):
            raise AssertionError("code of the file was run")

    class AnyNode(dict):
        pass

    with monkeypatch.context() as patch:
        forget(patch, "omegaconf.dictconfig", DictConfig, AnyNode)
        config = DictConfig()
        path = save({"config": config, "node": AnyNode(seed=3), "model": weights(), "args": argparse.Namespace(x=1)})
    assert "omegaconf.dictconfig" not in sys.modules
    content = read_checkpoint(path)
    assert content["config"].state["content"] == {"lr": 0.1, "nested": [1, (2, 3)]}
    assert content["node"] == {"seed": 3}
    assert content["args"].state == {"x": 1}
    state = unwrap_state_dict(content)
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in weights().items())
    assert set(content.replaced) == {
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.dictconfig.AnyNode",
        "argparse.Namespace",
    }


def test_the_report_names_what_was_not_run(save):
    model = torch.nn.Linear(3, 2)
    path = save({"args": argparse.Namespace(lr=1), "state_dict": model.state_dict()})
    report = zoo.load_checkpoint(torch.nn.Linear(3, 2), path)
    assert report.complete
    assert any("argparse.Namespace" in note for note in report.notes)


def test_everything_that_training_scripts_store_is_read(save):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    view = torch.arange(24.0).reshape(4, 6).t()[1:3]
    content = {
        "args": argparse.Namespace(a=1),  # makes torch's own reader give up
        "model": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optim": optimizer.state_dict(),
        "best": np.float64(81.5),
        "array": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::-1],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "default": collections.defaultdict(list, {"k": [1]}),
        "set": {1, 2},
        "view": view,
        "same": [view, view],
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
    }
    read = read_checkpoint(save(content))
    assert all(torch.equal(v, read["model"][k]) for k, v in model.state_dict().items())
    assert torch.equal(read["parameter"], torch.ones(2))
    assert torch.equal(read["optim"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert read["best"] == 81.5
    assert read["array"].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert read["fortran"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["default"] == {"k": [1]}
    assert sorted(read["set"]) == [1, 2]
    assert torch.equal(read["view"], view)
    assert read["view"].stride() == view.stride()
    assert read["dtype"] is torch.float16
    assert (read["device"], read["size"]) == ("cpu", (1, 2))
    assert read["empty"].shape == (0, 3)
    assert read["scalar"].item() == 7


def test_a_pickle_of_arrays_is_a_checkpoint(tmp_path):
    with (tmp_path / "R-50.pkl").open("wb") as file:
        pickle.dump({"model": {"stem.w": np.ones((2, 2), np.float32)}, "__author__": "torchvision"}, file)
    state = unwrap_state_dict(read_checkpoint(tmp_path / "R-50.pkl"))
    assert torch.equal(state["stem.w"], torch.ones(2, 2))


# ---- files that want something


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Built:
    """Pickles with a state for an object's __setstate__."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Built, (self.canary,), {"x": Call(os.system, f"touch {self.canary}")})

    def __setstate__(self, state):
        open(self.canary, "w").close()


def hostile(canary):
    touch = f"touch {canary}"
    return {
        "system": Call(os.system, touch),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "getattr chain": Call(Call(getattr, Call(__import__, "os"), "system"), touch),
        "torch.load": Call(torch.load, str(canary)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "setstate": Built(str(canary)),
        "rebuild": Call(torch._utils._rebuild_tensor_v2, Call(os.system, touch), 0, (1,), (1,), False, None),
        "type": Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (touch,), None),
        "numpy": Call(np.dtype, "O"),
        "partial": Call(__import__("functools").partial, os.system, touch),
    }


@pytest.mark.parametrize("kind", list(hostile("")))
def test_a_malicious_object_does_nothing(kind, save, tmp_path):
    canary = tmp_path / "canary"
    content = {"model": weights(), "evil": None}
    try:
        path = save({**content, "evil": hostile(canary)[kind]})
    except (TypeError, pickle.PicklingError):  # calls of calls: by hand
        path = tmp_path / "raw.pkl"
        path.write_bytes(b"c__builtin__\ngetattr\n(cos\nsystem\nS'x'\ntR(S'touch " + str(canary).encode() + b"'\ntR.")
    try:
        state = unwrap_state_dict(read_checkpoint(path))
    except zoo.CheckpointError:
        state = weights()  # refused altogether
    assert torch.equal(state["a"], weights()["a"])
    assert not canary.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nsystem\n(S'touch %s'\ntR.",
        b"(S'touch %s'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch %s'\no.",
        b"cposix\nsystem\n(S'touch %s'\nt\x81.",
        b"cbuiltins\nobject\n)\x81}S'__setstate__'\ncposix\nsystem\nsbS'touch %s'\nb.",
        b"}S'state_dict'\ncposix\nsystem\n(S'touch %s'\ntRs.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93(S'touch %s'\ntR.",
    ],
)
def test_instructions_written_by_hand_do_nothing(code, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "evil.pkl").write_bytes(code % str(canary).encode())
    with pytest.raises(zoo.CheckpointError, match=r"evil\.pkl|no tensors"):
        unwrap_state_dict(read_checkpoint(tmp_path / "evil.pkl"))
    assert not canary.exists()


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("file/data.pkl", pickled)
        file.writestr("file/byteorder", "little")
        for key, data in storages:
            file.writestr(f"file/data/{key}", data)
    return path


def tensor_pickle(numel=b"K\x04", offset=b"K\x00", size=b"(K\x04t", stride=b"(K\x01t", key=b"X\x01\x00\x00\x000"):
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpu" + numel + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89NtR"
    return b"\x80\x02}(X\x01\x00\x00\x00w" + call + b"X\x01\x00\x00\x00ccargparse\nNamespace\n)\x81u."


def test_a_tensor_written_by_hand_is_read(tmp_path):
    path = archive(tmp_path / "a.pth", tensor_pickle(), [("0", struct.pack("<4f", 1, 2, 3, 4))])
    assert read_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2 ** 40


@pytest.mark.parametrize(
    "lie",
    [
        dict(numel=HUGE),
        dict(size=b"(" + HUGE + b"t", stride=b"(K\x00t"),
        dict(offset=b"K\x01"),
        dict(offset=b"I-1\n"),
        dict(stride=b"(K\x02t"),
        dict(stride=b"(I-1\nt"),
        dict(size=b"(K\x02K\x02t"),
        dict(size=b"(S'4'\nt"),
        dict(key=b"X\x0b\x00\x00\x00../../etc/x"),
        dict(key=b"X\x01\x00\x00\x009"),
    ],
)
def test_lies_about_sizes_are_refused(lie, tmp_path):
    path = archive(tmp_path / "lie.pth", tensor_pickle(**lie), [("0", struct.pack("<4f", 1, 2, 3, 4))])
    with pytest.raises(unpickling.UnpicklingRefused):
        unpickling.read(path)


def test_a_legacy_file_that_claims_more_than_it_has_is_refused(tmp_path):
    torch.save({"w": torch.ones(4), "a": argparse.Namespace()}, tmp_path / "a", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-6])
    with pytest.raises(unpickling.UnpicklingRefused):
        unpickling.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(data.replace(b"K\x04N", HUGE + b"N", 1))
    with pytest.raises(unpickling.UnpicklingRefused):
        unpickling.read(tmp_path / "a")


def test_compressed_members_are_refused(tmp_path):
    path = archive(tmp_path / "bomb.pth", tensor_pickle(), [("0", bytes(16))], zipfile.ZIP_DEFLATED)
    with pytest.raises(unpickling.UnpicklingRefused, match="compressed"):
        unpickling.read(path)


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x04N\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",  # bytes of 2 ** 60
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",  # a bytearray of 2 ** 60
        b"\x80\x04Nr\xff\xff\xff\x7f(d.",  # a place in the memo that the C unpickler would make room for
        b"\x80\x04N\x94" + b"h\x00h\x00\x86\x94" * 3 + b".",
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x82\x01.",  # an extension
        b"\x80\x02]\x94h\x00a.",  # a list in itself
        b"}q\x00X\x05\x00\x00\x00modelh\x00s.",  # a dictionary in itself
        b"((((((0000000.",
        b"t.",
        b"R.",
        b"",
        b"\x80\x02K\x01K\x02b.",
    ],
)
def test_nonsense_ends_with_a_sentence(code, tmp_path):
    (tmp_path / "x.pth").write_bytes(code or b"\x80")
    with pytest.raises(zoo.CheckpointError, match=r"x\.pth|no tensors"):
        unwrap_state_dict(read_checkpoint(tmp_path / "x.pth"))


def test_keys_that_take_forever_to_hash_are_not_hashed(tmp_path):
    code = b"\x80\x02K\x01q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )
    (tmp_path / "x.pth").write_bytes(code + b"}h\x3cK\x01s.")
    assert len(unpickling.read(tmp_path / "x.pth").content) == 1


class Quantised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Linear(2, 2)


def test_whole_pickled_models_are_refused(save):
    with pytest.raises(zoo.CheckpointError, match=r"whole pickled model \(.*Quantised\)"):
        read_checkpoint(save(Quantised()))
    with pytest.raises(zoo.CheckpointError, match=r"whole pickled model \(.*Quantised\)"):
        read_checkpoint(save({"model": Quantised(), "epoch": 3}))


def test_a_torchscript_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as file:
        file.writestr("s/data.pkl", b"\x80\x02c__torch__\nNet\n)\x81.")
        file.writestr("s/code/__torch__.py", "class Net: pass")
        file.writestr("s/constants.pkl", b"\x80\x02).")
    with pytest.raises(unpickling.UnpicklingRefused, match="TorchScript"):
        unpickling.read(tmp_path / "s.pt")
