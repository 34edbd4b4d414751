"""The floors of docs/design.md, held by the imports themselves."""

import ast
import functools
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

# A room imports only from floors below its own. Modules of the package root
# that are not named here are rooms of their own, and so must be added.
_FLOORS = {
  "errors": 0,
  "files": 1,
  "paths": 1,
  "ranges": 1,
  "types": 1,
  "trees": 1,
  "rngs": 1,
  "process": 1,
  "devices": 1,
  "logs": 1,
  "interrupts": 1,
  "workers": 1,
  "data": 2,
  "checkpoints": 2,
  "models": 2,
  "diffusion": 3,
  "weights": 3,
  "train": 4,
  "evals": 4,
  "geneperson": 4,
  "methods": 5,
  "paperdoll": 5,
  "cli": 6,
  "generation": 7,
  "pretraining": 7,
  "training": 7,
  "demo": 8,
}
_TOP = ("launch", "data_tools", "benchmarks", "configs", "tests")
# pip name -> the only places that may import it.
_KEPT_TO = {
  "flax": ("dppp_jax/models/",),
  "optax": ("dppp_jax/train/",),
  "orbax": ("dppp_jax/checkpoints.py",),
  "torch": ("tests/", "benchmarks/", "dppp_jax/weights/hub.py"),
  "diffusers": ("tests/", "benchmarks/"),
  "transformers": ("tests/", "benchmarks/", "dppp_jax/weights/"),
  "tensorflow": ("tests/",),
  "tensorboardX": ("dppp_jax/logs.py", "tests/"),
  "ml_collections": (
    "configs/",
    "launch/",
    "tests/",
    "dppp_jax/cli.py",
  ),
}


def _files(folder: str) -> list[pathlib.Path]:
  return sorted((_ROOT / folder).rglob("*.py"))


@functools.cache
def _imports(path: pathlib.Path) -> list[str]:
  """Returns the dotted names that a file imports, at any depth of it."""
  names = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def _room(path: pathlib.Path) -> str:
  part = path.relative_to(_ROOT / "dppp_jax").parts[0]
  return part.removesuffix(".py")


def test_every_room_has_a_floor():
  rooms = {_room(path) for path in _files("dppp_jax")}
  assert rooms - {"__init__", "assets"} <= set(_FLOORS)


@pytest.mark.parametrize(
  "path", _files("dppp_jax"), ids=lambda p: str(p.relative_to(_ROOT))
)
def test_imports_go_down(path):
  room = _room(path)
  if room == "__init__":
    pytest.skip("the front door opens lazily into every room")
  for name in _imports(path):
    assert name.split(".")[0] not in _TOP, f"{path} imports {name}"
    match = re.match(r"dppp_jax\.(\w+)", name)
    if match is None or match[1] == room:
      continue
    other = match[1]
    assert _FLOORS[other] < _FLOORS[room], (
      f"{path.name} ({room}, floor {_FLOORS[room]}) imports {name}"
      f" (floor {_FLOORS[other]})"
    )


def test_each_library_stays_in_its_room():
  found = []
  for folder in ("dppp_jax", "launch", "data_tools", "configs", *_TOP[2:3]):
    for path in _files(folder):
      place = str(path.relative_to(_ROOT))
      for name in _imports(path):
        allowed = _KEPT_TO.get(name.split(".")[0])
        if allowed and not place.startswith(allowed):
          found.append(f"{place} imports {name}")
  assert not found


def test_torch_in_weights_is_lazy():
  tree = ast.parse((_ROOT / "dppp_jax/weights/hub.py").read_text())
  top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
  names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
  assert "torch" not in names


def test_data_room_needs_jax_only_in_transforms():
  for path in _files("dppp_jax/data"):
    uses = any(name.split(".")[0] == "jax" for name in _imports(path))
    if path.name not in ("transforms.py", "loader.py"):
      assert not uses, f"{path.name} imports jax"


def test_loop_is_handed_its_evaluator():
  names = _imports(_ROOT / "dppp_jax/train/loop.py")
  assert not any(name.startswith("dppp_jax.evals") for name in names)


@pytest.mark.parametrize("folder", ["launch", "data_tools"])
def test_launchers_are_tested(folder):
  tests = "\n".join(
    path.read_text()
    for path in _files("tests")
    if path.name != "architecture_test.py"
  )
  for path in _files(folder):
    assert f"{folder}/{path.name}" in tests, f"no test runs {path.name}"


def test_modules_are_imported_not_names():
  """`from dppp_jax.models import clip`, never `... .clip import CLIP`."""
  modules = {
    str(p.relative_to(_ROOT).with_suffix("")).replace("/", ".")
    for p in _files("dppp_jax")
  }
  packages = {m.removesuffix(".__init__") for m in modules}
  for folder in ("dppp_jax", "launch", "data_tools"):
    for path in _files(folder):
      for name in _imports(path):
        if name.startswith("dppp_jax."):
          assert name in packages, f"{path}: {name} is no module"
