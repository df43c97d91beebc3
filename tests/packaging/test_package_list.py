"""A subpackage missing from setup.cfg imports fine from a checkout and is silently absent from the wheel."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def options() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser["options"]


def package_dir(options: configparser.SectionProxy) -> dict[str, Path]:
    pairs = (line.split("=") for line in options["package_dir"].strip().splitlines())
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


def packages_in_tree(roots: dict[str, Path]) -> set[str]:
    found = set()
    for name, root in roots.items():
        for init in root.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(root).parts]))
    return found


def test_list_equals_tree(options: configparser.SectionProxy) -> None:
    listed = options["packages"].split()
    assert sorted(listed) == sorted(packages_in_tree(package_dir(options)))


def test_every_python_file_is_in_a_package(options: configparser.SectionProxy) -> None:
    for root in package_dir(options).values():
        for file in root.rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file} would not be in the wheel"


def folder_of(package: str, roots: dict[str, Path]) -> Path:
    root = max((name for name in roots if f"{package}.".startswith(f"{name}.")), key=len)
    return roots[root].joinpath(*package[len(root) :].strip(".").split("."))


def test_every_data_file_is_in_the_wheel(options: configparser.SectionProxy) -> None:
    roots = package_dir(options)
    packaged = {
        file
        for package, patterns in options.parser["options.package_data"].items()
        for pattern in patterns.split(",")
        # setuptools' `**` at the end matches files too, pathlib's does not.
        for file in folder_of(package, roots).glob(re.sub(r"\*\*$", "**/*", pattern.strip()))
    }
    for root in roots.values():
        data = {f for f in root.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
        assert data <= packaged, f"not in the wheel: {sorted(data - packaged)}"


def test_no_init_where_it_would_shadow() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_checkout_does_not_shadow_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports the package `kernels` where it is installed; ours must not stand before it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_data_select_is_not_importable_twice() -> None:
    code = "import data_select"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "import vfl_train.data_select" in done.stderr


def test_mapped_packages_import(tmp_path: Path) -> None:
    code = "import vfl_train.data_select, vfl_train.kernels, vfl_train.recipes"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_constraints_pin_every_requirement(options: configparser.SectionProxy) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    by_name = {canonicalize_name(pin.name): next(iter(pin.specifier)) for pin in pins}
    assert all(spec.operator == "==" for spec in by_name.values())
    for line in options["install_requires"].strip().splitlines():
        if line.startswith("#"):
            continue
        wanted = Requirement(line)
        assert by_name[canonicalize_name(wanted.name)].version in wanted.specifier, line


def test_license_and_version() -> None:
    import vfl_train

    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert f"## {vfl_train.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
