"""FLOP, bytes and kernels of a compiled program, counted from its HLO text.

    found = hlo_cost.count(compiled.as_text())

XLA's own cost analysis says nothing of a program that was compiled for a device
that is not there. Every top-level instruction of a scheduled GPU program is a
kernel or a library call, or moves nothing.

FLOP are those of matrix products, convolutions and attentions, a multiplication
and an addition each. Bytes are those of operands and results at the borders of
kernels: what caches hold is counted again, and of what a kernel only slices or
gathers the part that it takes is counted. Both are estimates.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re

_BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
  "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64,
  "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
# What is there without a kernel.
_FREE = {
  "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
  "opt-barrier", "partition-id", "replica-id", "add-dependency",
}  # fmt: skip
_PASSED = ("bitcast", "convert", "reduce")  # A part needs a part.
_SLICES = {"slice", "dynamic-slice", "gather"}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_BEGIN = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SCORES = re.compile(
  r'"intermediate_tensor_shape":\s*\{[^{}]*"dimensions":\s*\[([^\]]*)\]'
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')

KINDS = ("attention", "convolution", "product", "fusion", "other")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    """Returns the number of its entries."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Returns its bytes."""
    return (self.size * _BITS.get(self.dtype, 8) + 7) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without "%".
    arrays: its result, a tuple's arrays one after the other.
    opcode: e.g. "fusion".
    operands: names.
    attributes: what stands behind the operands.
    is_root: whether the computation returns it.
    index: of a parameter.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  index: int = 0

  @property
  def nbytes(self) -> int:
    """Returns the bytes of the result."""
    return sum(array.nbytes for array in self.arrays)

  def called(self, key: str) -> list[str]:
    """Returns the computations that an attribute names."""
    match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
    return _NAME.findall(match.group(1)) if match else []

  def numbers(self, key: str) -> tuple[int, ...]:
    """Returns the numbers of an attribute such as lhs_batch_dims={0,1}."""
    match = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
    return _integers(match.group(1)) if match else ()


@dataclasses.dataclass
class Work:
  """What one instruction does, each time that it runs.

  Attributes:
    name: of the instruction.
    kind: of `KINDS`.
    flops: {dtype of the operands: FLOP}.
    nbytes: read and written.
    left_out: bytes of operands of which a part alone is read, the rest.
    times: how often it runs.
    op_name: where it comes from.
  """

  name: str
  kind: str
  flops: dict[str, float]
  nbytes: int
  left_out: int
  times: int
  op_name: str


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a program does.

  Attributes:
    works: of every kernel, those of the largest branch of a conditional alone.
    unknown_loops: loops of which nobody knows how often they run: they are
      counted once.
  """

  works: Sequence[Work]
  unknown_loops: int

  @property
  def flops(self) -> dict[str, float]:
    """Returns {dtype of the operands: FLOP}."""
    total: collections.Counter[str] = collections.Counter()
    for work in self.works:
      for dtype, value in work.flops.items():
        total[dtype] += work.times * value
    return dict(total)

  @property
  def total_flops(self) -> float:
    """Returns the FLOP of all dtypes."""
    return sum(self.flops.values())

  @property
  def wide_share(self) -> float:
    """Returns the share of the FLOP that are of float32 or wider."""
    wide = sum(self.flops.get(name, 0) for name in ("f32", "f64"))
    return wide / self.total_flops if wide else 0.0

  @property
  def nbytes(self) -> int:
    """Returns the bytes that kernels read and write."""
    return sum(work.times * work.nbytes for work in self.works)

  @property
  def left_out(self) -> int:
    """Returns the bytes of operands that are sliced or gathered, the rest."""
    return sum(work.times * work.left_out for work in self.works)

  @property
  def kernels(self) -> dict[str, int]:
    """Returns {kind: launches}."""
    total = dict.fromkeys(KINDS, 0)
    for work in self.works:
      total[work.kind] += work.times
    return total

  def top(self, number: int = 20) -> list[Work]:
    """Returns the instructions that move most."""
    key = lambda work: -work.times * work.nbytes
    return sorted(self.works, key=key)[:number]


def count(text: str) -> Cost:
  """Counts the work of a compiled program.

  Args:
    text: of `compiled.as_text()`, for a GPU.

  Raises:
    ValueError: it has no entry computation.
  """
  computations, entry = parse(text)
  if entry is None:
    raise ValueError("the HLO text has no ENTRY computation")
  counter = _Counter(computations)
  works = list(counter.walk(entry, 1))
  return Cost(works, counter.unknown_loops)


def parse(
  text: str,
) -> tuple[dict[str, dict[str, Instruction]], str | None]:
  """Returns {computation: {name: instruction}} and the entry's name."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if begin := _BEGIN.match(line):
      current = computations.setdefault(begin.group(2), {})
      if begin.group(1):
        entry = begin.group(2)
    elif line == "}":
      current = None
    elif current is not None:
      instruction = _instruction(_COMMENT.sub("", line))
      if instruction is not None:
        current[instruction.name] = instruction
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  match = _LINE.match(line)
  if match is None:
    return None
  root, name, shape, opcode, rest = match.groups()
  inside, attributes = _closed(rest)
  return Instruction(
    name,
    tuple(Array(kind, _integers(dims)) for kind, dims in _SHAPE.findall(shape)),
    opcode,
    () if opcode == "constant" else tuple(_NAME.findall(inside)),
    attributes,
    root is not None,
    int(inside) if opcode == "parameter" else 0,
  )


def _closed(text: str) -> tuple[str, str]:
  """Cuts a text at the parenthesis that closes what began before it."""
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[:i], text[i + 1 :]
  return text, ""


def _integers(text: str) -> tuple[int, ...]:
  return tuple(int(x) for x in text.split(",") if x)


class _Counter:
  """Walks through computations."""

  def __init__(self, computations: Mapping[str, Mapping[str, Instruction]]):
    self._computations = computations
    self.unknown_loops = 0

  def walk(self, name: str, times: int) -> Iterator[Work]:
    """Yields the work of a computation that runs some times."""
    body = self._computations[name]
    for one in body.values():
      if one.opcode in _FREE or one.opcode.endswith("-done"):
        continue
      if one.opcode == "while":
        match = _TRIPS.search(one.attributes)
        self.unknown_loops += match is None
        trips = int(match.group(1)) if match else 1
        for key in ("condition", "body"):
          for inner in one.called(key):
            yield from self.walk(inner, times * trips)
      elif one.opcode == "conditional":
        yield from self._largest(one, times)
      elif one.opcode == "call":
        for inner in one.called("to_apply"):
          yield from self.walk(inner, times)
      elif one.opcode == "async-start":
        for inner in one.called("calls"):
          yield from self.walk(inner, times)
      else:
        yield self._work(one, body, times)

  def _largest(self, one: Instruction, times: int) -> list[Work]:
    """Returns the work of the branch of a conditional that does most."""
    names = one.called("branch_computations")
    for key in ("true_computation", "false_computation"):
      names += one.called(key)
    branches = [list(self.walk(name, times)) for name in names]
    size = lambda works: (
      sum(sum(work.flops.values()) for work in works),
      sum(work.nbytes for work in works),
    )
    return max(branches, key=size)

  def _work(
    self, one: Instruction, body: Mapping[str, Instruction], times: int
  ) -> Work:
    products = list(self._products(one, body))
    flops: collections.Counter[str] = collections.Counter()
    for _, dtype, value in products:
      flops[dtype] += value
    kinds = {kind for kind, _, _ in products}
    usual = "fusion" if one.opcode == "fusion" else "other"
    kind = next((kind for kind in KINDS if kind in kinds), usual)
    nbytes, left_out = self._bytes(one, body)
    match = _OP_NAME.search(one.attributes)
    source = match.group(1) if match else ""
    return Work(one.name, kind, dict(flops), nbytes, left_out, times, source)

  def _products(
    self, one: Instruction, body: Mapping[str, Instruction]
  ) -> Iterator[tuple[str, str, float]]:
    """Yields (kind, dtype, FLOP) of the products in an instruction."""
    arrays = lambda name: body[name].arrays if name in body else ()
    given = [array for name in one.operands for array in arrays(name)[:1]]
    if one.opcode == "fusion":
      for inner in one.called("calls"):
        fused = self._computations[inner]
        for part in fused.values():
          yield from self._products(part, fused)
    elif one.opcode == "dot":
      yield "product", _widest(given[:2]), _dot_flops(one, given[0])
    elif one.opcode == "convolution":
      yield "convolution", _widest(given[:2]), _convolution_flops(one, given)
    elif one.opcode == "custom-call":
      yield from _library_call(one, given)

  def _bytes(
    self, one: Instruction, body: Mapping[str, Instruction]
  ) -> tuple[int, int]:
    """Returns the bytes that are moved, and those that are left out."""
    operands = [body[name] for name in one.operands if name in body]
    if one.opcode in _SLICES:
      others = sum(x.nbytes for x in operands[1:])
      left = max(0, operands[0].nbytes - one.nbytes)
      return 2 * one.nbytes + others, left
    if one.opcode == "dynamic-update-slice":
      return 2 * operands[1].nbytes, operands[0].nbytes
    fused = None
    if one.opcode == "fusion":
      fused = self._computations[one.called("calls")[0]]
    total, left = 0, 0
    for name in dict.fromkeys(one.operands):  # Each once.
      if name not in body:
        continue
      whole = used = body[name].nbytes
      if fused is not None:
        places = [i for i, other in enumerate(one.operands) if other == name]
        used = sum(_read_bytes(fused, place) for place in places)
        used = min(used, whole)
      total, left = total + used, left + whole - used
    written = one.nbytes if fused is None else _written_bytes(fused)
    return total + written, left + max(0, one.nbytes - written)


def _read_bytes(fused: Mapping[str, Instruction], place: int) -> int:
  """Returns how much of a parameter a fusion reads."""
  (parameter,) = (
    one
    for one in fused.values()
    if one.opcode == "parameter" and one.index == place
  )
  sizes, total = {parameter.name: parameter.nbytes}, 0
  for one in fused.values():  # Operands stand before what uses them.
    used = [i for i, name in enumerate(one.operands) if name in sizes]
    if not used:
      continue
    if one.opcode in _PASSED and used == [0] and not one.is_root:
      sizes[one.name] = one.nbytes
    elif one.opcode in _SLICES and used == [0]:
      # A part of a converted or reduced array needs that part of the whole.
      share = one.nbytes / sizes[one.operands[0]]
      total += round(parameter.nbytes * share)
    elif one.opcode == "dynamic-update-slice" and used == [0]:
      continue  # It is written in place.
    else:
      return parameter.nbytes
  return min(total, parameter.nbytes)


def _written_bytes(fused: Mapping[str, Instruction]) -> int:
  """Returns how much a fusion writes: of an update in place the update."""
  (root,) = (one for one in fused.values() if one.is_root)
  results = [root]
  if root.opcode == "tuple":
    results = [fused[name] for name in root.operands]

  def written(one: Instruction) -> int:
    while one.opcode == "bitcast":
      one = fused[one.operands[0]]
    if one.opcode == "dynamic-update-slice":
      return fused[one.operands[1]].nbytes
    return one.nbytes

  return sum(written(one) for one in results)


def _widest(arrays: Sequence[Array]) -> str:
  return max(arrays, key=lambda array: _BITS.get(array.dtype, 0)).dtype


def _dot_flops(one: Instruction, left: Array) -> float:
  depth = math.prod(left.dims[i] for i in one.numbers("lhs_contracting_dims"))
  return 2.0 * depth * one.arrays[0].size


def _convolution_flops(one: Instruction, given: Sequence[Array]) -> float:
  """Returns 2 x outputs x taps x channels read, of any direction."""
  match = re.search(r"\bdim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  assert match is not None, one.name
  out, kernel = one.arrays[0], given[1]
  if "convBackwardFilter" in one.attributes:
    out, kernel = given[1], one.arrays[0]
  elif "convBackwardInput" in one.attributes:
    out = given[0]
  taps = kernel.size / kernel.dims[match.group(2).index("o")]
  # Zeros between the entries of what is read (a transposed convolution).
  dilation = re.search(r"\blhs_dilate=([\dx]+)", one.attributes)
  zeros = math.prod(map(int, dilation.group(1).split("x"))) if dilation else 1
  return 2.0 * out.size * taps / zeros


def _library_call(
  one: Instruction, given: Sequence[Array]
) -> Iterator[tuple[str, str, float]]:
  """Yields (kind, dtype, FLOP) of a call of cuDNN or cuBLAS."""
  match = re.search(r'custom_call_target="([^"]*)"', one.attributes)
  target = match.group(1) if match else ""
  if target.startswith("__cudnn$fmha"):
    scores = _SCORES.search(one.attributes)
    assert scores is not None, one.name
    pairs = math.prod(map(int, re.findall(r"\d+", scores.group(1))))
    # Forward q k and p v; backward the first again, and four gradients.
    products = 5 if target.endswith("Backward") else 2
    yield (
      "attention",
      given[0].dtype,
      products * 2.0 * pairs * given[0].dims[-1],
    )
  elif target.startswith("__cudnn$conv"):
    yield "convolution", _widest(given[:2]), _convolution_flops(one, given)
  elif target.startswith("__cublas"):
    key = r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]'
    dims = re.search(key, one.attributes)
    assert dims is not None, one.name
    depth = math.prod(
      given[0].dims[int(i)] for i in re.findall(r"\d+", dims.group(1))
    )
    yield "product", _widest(given[:2]), 2.0 * depth * one.arrays[0].size


def table(cost: Cost, number: int = 30) -> str:
  """Returns the instructions that move most, one a line."""
  lines = [
    f"{work.times * work.nbytes / 1e6:10.1f} MB {work.times:5d} x"
    f" {work.kind:11} {work.name}  {work.op_name[-80:]}"
    for work in cost.top(number)
  ]
  return "\n".join(lines)


def by_source(cost: Cost) -> dict[str, int]:
  """Returns {operation in the source: bytes}, the largest first."""
  total: collections.Counter[str] = collections.Counter()
  for work in cost.works:
    total[work.op_name] += work.times * work.nbytes
  return dict(total.most_common())
