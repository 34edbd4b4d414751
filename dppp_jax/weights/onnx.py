"""The convolutions of an ONNX file, in the order in which they run.

An exporter may fold batch norms into convolutions and rename every tensor, so
that only the order of the graph still says which is which. That little is read
here straight from the protobuf: graph, nodes, initialisers, raw numbers. No
code of the file runs, and nothing outside of it is opened.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import pathlib

import numpy as np

from dppp_jax import errors, files, paths

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {1: np.float32, 10: np.float16, 11: np.float64}
# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_TENSOR = 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME = 1, 2, 4, 8
_TENSOR_RAW, _TENSOR_LOCATION = 9, 14
# What only networks of whole numbers have.
_QUANTISED = frozenset(
  (
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QuantizeLinear",
  )
)


@dataclasses.dataclass
class Conv:
  """One convolution, with the batch norm behind it where there is one.

  Attributes:
    weight: [out, in, h, w].
    bias: [out], or None.
    norm: scale, bias, mean and var, each [out], or None where the exporter
      folded them into weight and bias.
  """

  weight: np.ndarray
  bias: np.ndarray | None
  norm: tuple[np.ndarray, ...] | None = None


def read_convs(path: str | pathlib.Path) -> list[Conv]:
  """Returns all convolutions of an ONNX file in the order of its graph.

  Raises:
    errors.UserError: the file is missing, truncated, no ONNX file, quantised,
      or keeps its numbers elsewhere or in another type.
  """
  path = paths.expand(path)
  if not path.is_file():
    raise errors.UserError(f"{path} does not exist: give an ONNX file")
  files.refuse_impostor(path, wanted="give an ONNX file of float numbers")
  try:
    convs = _convs(memoryview(path.read_bytes()), path)
  except (ValueError, IndexError, KeyError) as error:
    raise errors.UserError(
      f"{path} is truncated or no ONNX file ({error}): fetch it again"
    ) from error
  return convs


def _convs(data: memoryview, path: pathlib.Path) -> list[Conv]:
  nodes, tensors, graphs = [], {}, 0
  for number, graph in _fields(data):
    if number != _MODEL_GRAPH:
      continue
    graphs += 1
    for kind, value in _fields(graph):
      if kind == _GRAPH_INITIALIZER:
        name, array = _tensor(value, path)
        tensors[name] = array
      elif kind == _GRAPH_NODE:
        nodes.append(_node(value, path))
  if not graphs:
    raise ValueError("no graph in it")
  quantised = sorted({op for op, *_ in nodes} & _QUANTISED)
  if quantised:
    raise errors.UserError(
      f"{path} is quantised ({', '.join(quantised)}: numbers of 8 bits): give"
      " the file of float numbers"
    )
  convs: list[Conv] = []
  made: dict[str, Conv] = {}  # Output of a convolution -> that convolution.
  for op, inputs, outputs, constant in nodes:
    if op == "Constant" and outputs:
      tensors[outputs[0]] = constant
    elif op == "Identity" and inputs[0] in tensors:
      tensors[outputs[0]] = tensors[inputs[0]]  # One tensor for two uses.
    elif op == "Conv":
      weight, *bias = (_look_up(tensors, name, op, path) for name in inputs[1:])
      if weight.ndim != 4:
        raise _strange(f"Conv with a kernel of shape {weight.shape}", path)
      made[outputs[0]] = Conv(weight, bias[0] if bias else None)
      convs.append(made[outputs[0]])
    elif op == "BatchNormalization" and inputs[0] in made:
      made[inputs[0]].norm = tuple(
        _look_up(tensors, name, op, path) for name in inputs[1:5]
      )
  return convs


def _strange(said: str, path: pathlib.Path) -> errors.UserError:
  """Returns the error about a whole file of another network."""
  return errors.UserError(
    f"{path} is an ONNX file of a network that is not read here ({said}): give"
    " one of float numbers whose weights stand in it"
  )


def _look_up(
  tensors: dict[str, np.ndarray | None],
  name: str,
  op: str,
  path: pathlib.Path,
) -> np.ndarray:
  if name not in tensors:
    raise _strange(f"{op} without its tensor {name!r}", path)
  found = tensors[name]
  if found is None:
    said = f"{op} of numbers that are no float32, float16 or float64"
    raise _strange(said, path)
  return found


def _node(
  data: memoryview, path: pathlib.Path
) -> tuple[str, Sequence[str], Sequence[str], np.ndarray | None]:
  """Returns operation, inputs, outputs, and the tensor of a Constant."""
  op, inputs, outputs, attributes = "", [], [], []
  for number, value in _fields(data):
    if number == _NODE_INPUT:
      inputs.append(_text(value))
    elif number == _NODE_OUTPUT:
      outputs.append(_text(value))
    elif number == _NODE_OP:
      op = _text(value)
    elif number == _NODE_ATTRIBUTE:
      attributes.append(value)
  constant = None
  for attribute in attributes if op == "Constant" else ():
    for number, value in _fields(attribute):
      if number == _ATTRIBUTE_TENSOR:
        constant = _tensor(value, path)[1]
  return op, inputs, outputs, constant


def _tensor(
  data: memoryview, path: pathlib.Path
) -> tuple[str, np.ndarray | None]:
  """Returns name and numbers; None for integers, which no layer here holds."""
  dims, kind, name, raw, floats = [], 0, "", None, []
  for number, value in _fields(data):
    if number == _TENSOR_DIMS:
      packed = not isinstance(value, int)
      dims += _varints(value) if packed else [value]
    elif number == _TENSOR_TYPE:
      kind = value
    elif number == _TENSOR_NAME:
      name = _text(value)
    elif number == _TENSOR_RAW:
      raw = _raw(value)
    elif number == _TENSOR_FLOATS:
      floats.append(_raw(value))
    elif number == _TENSOR_LOCATION and value:
      raise errors.UserError(
        f"{path} keeps its numbers in another file: export it in one file"
      )
  if kind not in _DTYPES:
    return name, None
  dtype = np.dtype(_DTYPES[kind])
  data = b"".join(floats) if raw is None else raw
  if len(data) != dtype.itemsize * math.prod(dims):
    raise ValueError(f"tensor {name!r} has another size than its shape")
  return name, np.frombuffer(data, dtype.newbyteorder("<")).reshape(dims)


def _raw(value: memoryview | int) -> memoryview:
  if isinstance(value, int):
    raise ValueError("a number where bytes were expected")
  return value


def _text(value: memoryview | int) -> str:
  return bytes(_raw(value)).decode("utf-8")


def _varints(data: memoryview) -> list[int]:
  values, at = [], 0
  while at < len(data):
    value, at = _varint(data, at)
    values.append(value)
  return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  value = 0
  for shift in range(0, 70, 7):
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, at
  raise ValueError("a number without an end")


def _fields(
  data: memoryview | int,
) -> Iterator[tuple[int, memoryview | int]]:
  """Yields (field number, value) of a message: int, or the raw bytes."""
  data, at = _raw(data), 0
  while at < len(data):
    tag, at = _varint(data, at)
    number, wire = tag >> 3, tag & 7
    if wire == _VARINT:
      value, at = _varint(data, at)
      yield number, value
      continue
    if wire == _BYTES:
      size, at = _varint(data, at)
    elif wire in (_FIXED32, _FIXED64):
      size = 4 if wire == _FIXED32 else 8
    else:
      raise ValueError(f"wire type {wire}")
    if at + size > len(data):
      raise ValueError("it ends in the middle of a field")
    yield number, data[at : at + size]
    at += size
