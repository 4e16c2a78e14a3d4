"""A wheel built from the checkout works in a fresh environment, outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_creates_a_model_outside_the_repository(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path)]
    if shutil.which("uv"):
        build.append("--installer=uv")
    result = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"zoo"}, "only `zoo` may land in site-packages"

    # A fresh environment that borrows torch and timm from this one, without this one's editable zoo.
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    )  # fmt: skip
    zipfile.ZipFile(wheel).extractall(site)
    borrowed = Path(sysconfig.get_path("purelib"))
    for entry in borrowed.iterdir():
        if "zoo" not in entry.name and not entry.name.endswith(".pth") and not (site / entry.name).exists():
            os.symlink(entry, site / entry.name)
    code = (
        "import timm, zoo, zoo.train, zoo.tools, zoo.kernels; from zoo.manifest import known_weights;"
        "m = timm.create_model('crate_tiny', num_classes=3, depth=1); print(zoo.__file__, len(known_weights()) > 0)"
    )
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout
    assert result.stdout.strip().endswith("True")
