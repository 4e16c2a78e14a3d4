"""timm's own test-suite over zoo's models.

The suite is in timm's source distribution only (Apache-2.0); it is fetched into an ignored folder and its
functions are called directly. Structure tests (on the meta device) run over every registered model. Tests
that compute run over the smallest model of each class; `ZOO_TIMM_SUITE=all` runs them over every model.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

import zoo

CACHE = Path(__file__).parents[2] / ".cache"
RUN_ALL = os.environ.get("ZOO_TIMM_SUITE") == "all"

# name of the suite's function -> its arguments after the model's name
COMPUTING = {
    "test_model_forward": (1,),
    "test_model_backward": (2,),
    "test_model_forward_torchscript": (1,),
    "test_model_forward_fx": (1,),
    "test_model_backward_fx": (1,),
    "test_model_forward_fx_torchscript": (1,),
    "test_model_forward_intermediates": (1,),
    "test_model_forward_intermediates_features": (1,),
    "test_prune_intermediate_layers_contract": (),
}

# (pattern of names, function): why zoo's own tests say it instead
EXEMPT = {
    ("randformer_*", "test_model_backward"): "the random matrices are frozen by design and get no gradient",
    (
        "randformer_*",
        "test_model_backward_fx",
    ): "the random matrices are frozen by design and get no gradient",
    (
        "randformer_*",
        "test_prune_intermediate_layers_contract",
    ): "its token grids exist at the built size only",
}


def _suite_path() -> Path:
    path = CACHE / f"timm-{timm.__version__}" / "tests" / "test_models.py"
    if path.is_file():
        return path
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        command += [f"timm=={timm.__version__}", "--dest", folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        archives = list(Path(folder).glob("timm-*.tar.gz"))
        if not archives:
            pytest.skip(f"timm's source distribution could not be fetched: {result.stderr.strip()[-200:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        if not path.is_file():  # another worker may have been faster
            path.parent.parent.mkdir(exist_ok=True)
            extracted = Path(folder) / f"timm-{timm.__version__}" / "tests"
            try:
                extracted.rename(path.parent)
            except OSError:
                assert path.is_file()
    return path


@pytest.fixture(scope="module")
def suite():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite's own markers are not registered here
        spec = importlib.util.spec_from_file_location("timm_test_models", _suite_path())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _tagged(name: str) -> str:
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return f"{name}.{cfg.tag}" if cfg is not None and getattr(cfg, "tag", None) else name


def _is_map_model(name: str) -> bool:
    return get_pretrained_cfg(name).pool_size is not None


@functools.cache
def _parameters(name: str) -> tuple[type, int]:
    with torch.device("meta"):
        model = timm.create_model(name)
    return type(model), sum(p.numel() for p in model.parameters())


@functools.cache
def _smallest_of_class() -> dict[tuple, str]:
    smallest: dict[tuple, str] = {}
    for name in zoo.list_models():
        # the same class builds different graphs under different names: poolformerv1_s12, identityformer_s12
        cls, size = _parameters(name)
        key = (cls, re.split(r"_(?=[^_]*\d|tiny|small|base|large|huge)", name)[0])
        if key not in smallest or size < _parameters(smallest[key])[1]:
            smallest[key] = name
    return smallest


@pytest.mark.parametrize("name", zoo.list_models())
def test_structure(suite, name):
    run = suite.test_model_default_cfgs if _is_map_model(name) else suite.test_model_default_cfgs_non_std
    run(_tagged(name), 1, "meta")


@pytest.mark.parametrize("function", [*COMPUTING, "test_model_forward_features"])
@pytest.mark.parametrize("name", zoo.list_models())
def test_computation(suite, name, function):
    for (pattern, exempt), reason in EXEMPT.items():
        if exempt == function and fnmatch.fnmatch(name, pattern):
            pytest.skip(reason)
    if not RUN_ALL and name not in _smallest_of_class().values():
        pytest.skip("a smaller model of the same class runs it; ZOO_TIMM_SUITE=all runs every model")
    if function == "test_model_forward_features" and not _is_map_model(name):
        pytest.skip("the suite asks four stages of this test, and this model has one scale")
    getattr(suite, function)(name, *COMPUTING.get(function, (1,)))
