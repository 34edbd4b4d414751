"""What only a GPU can tell; benchmarks/device.sh runs this.

Each section is a process of its own with a share of the time: one that fails or
takes too long leaves a note, and the others run. The file is written anew after
each of them.

    about      devices, versions, free memory
    resize     a resize of both sides, as XLA writes it and as this project does
    attention  its gradients in bfloat16, against float32 on the same device
    features   of the extractor, likewise
    loss       of the first PTL step and its gradient's norm, likewise
    ptl        the PTL step, against PyTorch compiled; memory
    canvas     an SDXL canvas with two ControlNets, against diffusers compiled
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

_HERE = pathlib.Path(__file__).resolve().parent
_LIMIT = 540  # Seconds of all sections.
# Seconds of each at most; what one leaves is there for the next.
_SECTIONS = {
  "about": 40,
  "resize": 50,
  "attention": 60,
  "features": 50,
  "loss": 120,
  "ptl": 160,
  "canvas": 320,
}
# Queries, keys, causal: towers of CLIP at odd and even lengths, a UNet's.
_ATTENTIONS = (
  (129, 129, False),
  (128, 128, False),
  (77, 77, True),
  (36, 77, False),
)
# Of those that are benchmarks of their own: their arguments, tiny ones last.
_SCRIPTS = {
  "ptl": (
    ["train_step.py", "--rounds", "5", "--steps", "10"],
    [
      *("train_step.py", "--model", "tiny", "--rounds", "1"),
      "--no_compile",
    ],
  ),
  "canvas": (
    [
      *("generation.py", "--model", "canvas", "--batches", "1,4"),
      *("--rounds", "2", "--no_first"),
    ],
    [
      *("generation.py", "--model", "mini", "--batches", "1"),
      *("--rounds", "1", "--steps", "2", "--no_first", "--no_compile"),
    ],
  ),
}


def _about(tiny: bool) -> dict[str, Any]:
  """Returns devices and versions, of JAX and of PyTorch."""
  del tiny
  import common
  import jax

  found: dict[str, Any] = {"environment": common.environment()}
  found["memory"] = jax.devices()[0].memory_stats()
  try:
    import torch

    found["torch_cuda"] = torch.cuda.is_available()
    found["torch"] = torch.__version__
  except ImportError:
    found["torch_cuda"], found["torch"] = False, None
  if not found["torch_cuda"]:
    found["note"] = "torch has no CUDA here: nothing is compared with it"
  return found


def _resize(tiny: bool) -> dict[str, Any]:
  """Resizes a batch of pictures both ways, each guarded."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dppp_jax.models import resizing

  shape, size = (
    ((2, 16, 12, 3), (8, 8))
    if tiny
    else (
      (42, 256, 128, 3),
      (320, 320),
    )
  )
  images = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
  whole = (shape[0], *size, 3)
  plain = lambda x: jax.image.resize(x, whole, "lanczos3", antialias=True)
  with jax.default_matmul_precision("highest"):
    single = np.stack(
      [
        np.asarray(jax.image.resize(x, (*size, 3), "lanczos3", antialias=True))
        for x in images[:2]
      ]
    )
  found: dict[str, Any] = {}
  ours = lambda x: resizing.resize(x, size, "lanczos3", antialias=True)
  for name, function in (("jax.image.resize", plain), ("ours", ours)):
    try:
      made = np.asarray(jax.jit(function)(jnp.asarray(images)))
      worst = float(np.abs(made[:2] - single).max())
      found[name] = {"compiles": True, "largest_difference": worst}
    except Exception as error:  # That is the question.
      line = str(error).splitlines()[0][:300]
      found[name] = {"compiles": False, "error": line}
  return found


def _relative(made: Any, wanted: Any) -> float:
  """Returns the relative L2 error of trees of arrays."""
  import jax
  import numpy as np

  flat = lambda tree: np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )
  made, wanted = flat(made), flat(wanted)
  return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


def _attention(tiny: bool) -> dict[str, Any]:
  """Gradients at odd and even numbers of tokens, causal and across."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dppp_jax.models import attention

  heads, d, examples = (2, 8, 2) if tiny else (12, 64, 64)
  found = {}
  for n, m, causal in _ATTENTIONS:
    rng = np.random.default_rng(n)
    draw = lambda rows, rng=rng: rng.standard_normal(
      (examples, rows, heads, d), np.float32
    )
    q, k, v, weight = draw(n), draw(m), draw(m), draw(n)

    def loss(args, weight=weight, causal=causal):
      out = attention.dot_product(*args, causal=causal)
      return jnp.sum(out.astype(jnp.float32) * weight)

    cast = lambda dtype, args=(q, k, v): [jnp.asarray(x, dtype) for x in args]
    gradient = jax.jit(jax.value_and_grad(loss))
    with jax.default_matmul_precision("highest"):
      wanted = gradient(cast(jnp.float32))
    made = gradient(cast(jnp.bfloat16))
    name = f"{n} x {m}{', causal' if causal else ''}"
    found[name] = _relative(made[1], wanted[1])
  return found


def _features(tiny: bool) -> dict[str, Any]:
  """Features of the extractor, random weights: cosines with float32."""
  import aot_programs
  import jax
  import numpy as np

  rng = np.random.default_rng(0)
  job = aot_programs.extractor(tiny, dtype="bfloat16")
  wide = aot_programs.extractor(tiny, dtype="float32")
  params = aot_programs.random_params(job.args[0])
  images = rng.integers(0, 256, job.args[1].shape, np.uint8)
  with jax.default_matmul_precision("highest"):
    wanted = np.asarray(jax.jit(wide.function)(params, images))
  made = np.asarray(jax.jit(job.function)(params, images))
  cosines = (made * wanted).sum(1)
  return {"lowest_cosine": float(cosines.min())}


def _loss(tiny: bool) -> dict[str, Any]:
  """Loss and gradient norm of the first PTL step, both dtypes."""
  import aot_programs
  import ptl

  setting = aot_programs.paper_setting(tiny)
  found = {}
  for name in ("float32", "bfloat16"):
    with tempfile.TemporaryDirectory() as scratch:
      side = ptl.Side(str(pathlib.Path(scratch) / "clip"), setting)
      ((loss, norm),) = side.check("", 1, bfloat16=name == "bfloat16")
    found[name] = {"loss": loss, "gradient_norm": norm}
  return found


def _section(
  name: str, *, tiny: bool, limit: float, cache: str
) -> dict[str, Any]:
  """Runs a section in a process of its own and returns what it found.

  Args:
    name: of `_SECTIONS`.
    tiny: for a CPU.
    limit: seconds.
    cache: folder of compiled programs, which sections share.
  """
  if limit < 5:
    return {"note": "left out: the time was over"}
  with tempfile.TemporaryDirectory() as scratch:
    result = pathlib.Path(scratch) / "section.json"
    environment = {
      **os.environ,
      "BENCHMARK_RESULTS": scratch,
      "JAX_COMPILATION_CACHE_DIR": cache,
    }
    if name in _SCRIPTS:
      script, *arguments = _SCRIPTS[name][tiny]
      if script == "generation.py":
        arguments += ["--limit", str(int(limit - 30))]
        arguments += ["--cache", cache]
    else:
      script = "device.py"
      arguments = ["--section", name, "--out", str(result)]
      arguments += ["--tiny"] if tiny else []
    command = [sys.executable, str(_HERE / script), *arguments]
    begin, said = time.monotonic(), ""
    process = subprocess.Popen(
      command,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    try:
      said, _ = process.communicate(timeout=limit)
      note = None if process.returncode == 0 else f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, 9)  # What it started, too.
      said, _ = process.communicate()
      note = f"stopped after {limit:.0f} s"
    files = [result] if result.is_file() else []
    files += sorted(pathlib.Path(scratch).glob("*-*.json"))
    found: dict[str, Any] = {}
    for file in files[:1]:
      found = json.loads(file.read_text())
      found = found.get("results", found)
    found["seconds"] = round(time.monotonic() - begin, 1)
    if note is not None:
      found["note"] = note
      found["said"] = said.splitlines()[-15:]
    return found


def main() -> None:
  """Runs all sections, or one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default=str(_HERE / "results"))
  parser.add_argument("--begun", type=float, default=time.time())
  parser.add_argument("--tiny", action="store_true", help="for a CPU")
  alone = [name for name in _SECTIONS if name not in _SCRIPTS]
  parser.add_argument("--section", choices=alone)
  args = parser.parse_args()
  # Several processes share the device, and PyTorch's with them.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if args.section:
    found = globals()[f"_{args.section}"](args.tiny)
    pathlib.Path(args.out).write_text(json.dumps(found) + "\n")
    return
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  place, found = out / "device.json", {}
  with tempfile.TemporaryDirectory() as cache:
    for name, seconds in _SECTIONS.items():
      left = _LIMIT - (time.time() - args.begun)
      print(f"{name}: {left:.0f} s are left", flush=True)
      limit = min(seconds, left)
      found[name] = _section(name, tiny=args.tiny, limit=limit, cache=cache)
      scratch = place.with_name(f".{place.name}.tmp")
      scratch.write_text(json.dumps(found, indent=2) + "\n")
      scratch.replace(place)
      print(json.dumps(found[name])[:600], flush=True)
  print(place)


if __name__ == "__main__":
  main()
