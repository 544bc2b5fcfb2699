"""Imports point one way, and the package asks for nothing but its three dependencies."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("synapse_arch", "recipes", "merge", "serving")
BASE = {"torch", "einops", "safetensors"}
TRAIN = BASE | {"accelerate", "filelock", "tqdm"}
HF = BASE | {"tokenizers", "transformers"}
MERGE = BASE | {"numpy"}  # which safetensors[torch] brings along
SERVE = BASE | {
    "fastapi",
    "h11",
    "httpx",
    "jinja2",
    "prometheus_client",
    "pydantic",
    "pydantic_core",
    "starlette",
    "uvicorn",
}
OPTIONAL = (
    "accelerate", "cryptography", "datasets", "fastapi", "httpx", "hypothesis", "matplotlib", "mergekit", "optuna",
    "peft", "pydantic", "pytest", "redis", "scipy", "starlette", "tqdm", "transformers", "uvicorn", "yaml",
)  # fmt: skip

# A part of the code, and the parts it may import besides itself. The longest name that fits a module is its part.
RECORDS = {f"synapse_arch.introspection.{name}" for name in ("records", "analysis", "report")}
ALLOWED: dict[str, set[str]] = {
    "synapse_arch.errors": set(),
    "synapse_arch.letters": set(),
    **{name: RECORDS | {"synapse_arch.errors"} for name in RECORDS},
    "synapse_arch.ops": {"synapse_arch.errors"},
    "synapse_arch.introspection": {"synapse_arch.errors", "synapse_arch.ops", *RECORDS},
}
ALLOWED["synapse_arch.modules"] = {"synapse_arch.introspection", *ALLOWED["synapse_arch.introspection"]}
ALLOWED["synapse_arch.model"] = {"synapse_arch.modules", *ALLOWED["synapse_arch.modules"]}
ALLOWED["synapse_arch"] = set(ALLOWED)
ALLOWED["recipes"] = ALLOWED["merge"] = ALLOWED["serving"] = set(ALLOWED)
ALLOWED["merge.search"] = set(ALLOWED)  # it judges merges as recipes judge training
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(module: str, path: Path, *, top: bool = False) -> Iterator[str]:
    """Every module that `module` names in an import, or with `top` those imported as soon as it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    typing = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if top and id(node) in inside | typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the full name"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in found)


def part(module: str) -> str:
    fits = [name for name in ALLOWED if module == name or module.startswith(f"{name}.")]
    return max(fits, key=len)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    own = part(module)
    for name in imports(module, MODULES[module]):
        if name.split(".")[0] in PACKAGES and part(name) != own:
            allowed = ALLOWED[own]
            assert part(name) in allowed, f"{module} imports {name}; {own} may import {', '.join(sorted(allowed))}"


@pytest.mark.parametrize("module", MODULES)
def test_only_declared_dependencies_are_imported(module: str) -> None:
    part = "synapse_arch.hf" if module == "synapse_arch.hf" else module.split(".")[0]
    allowed = {"recipes": TRAIN, "merge": MERGE, "serving": SERVE, "synapse_arch.hf": HF}.get(part, BASE)
    for name in imports(module, MODULES[module], top=True):
        root = name.split(".")[0]
        assert root in sys.stdlib_module_names or root in PACKAGES or root in allowed, f"{module} imports {name}"


def test_importing_the_package_pulls_in_no_optional_package() -> None:
    """Nor does it print or warn. What torch imports by itself where it finds it (tqdm) does not count."""
    code = f"""
import sys, torch, einops, safetensors.torch
before = set(sys.modules)
import synapse_arch, recipes.data, recipes.optim, merge.cli
print(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_importing_the_package_does_not_import_the_compiler() -> None:
    """It takes a second, as long as torch itself."""
    code = "import sys, torch, synapse_arch; print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("serving.__main__", "fastapi", "serve"),
        ("serving.chat", "httpx", "serve"),
        ("recipes.train", "accelerate", "train"),
    ],
)
def test_a_program_names_the_extra_that_it_needs(module: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import {module}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 1
    assert found.stderr.strip().endswith(f"pip install 'synapse-arch[{extra}]'")
