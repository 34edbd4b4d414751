"""Users' files: which a folder shows, what JSON says, what a file really is.

A folder that a Mac has copied, JSON that Windows has saved, and a download that
ended at a web page are users' everyday: whoever reads a user's file asks here.
"""

from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

from dppp_jax import errors

# What a file really is, by its first bytes, and what to do then. Mac's copies
# and downloads that ended at a web page are the most common ones.
_IMPOSTORS = (
  (
    b"version https://git-lfs",
    "is a Git LFS pointer, not the file itself: run git lfs pull",
  ),
  (
    b"\0\5\26\7",
    "is the double that a Mac keeps of another file: name the file without ._",
  ),
  (b"GGUF", "is a GGUF file, whose numbers are quantised: {want}"),
  (b"\x1f\x8b", "is compressed (gzip): unpack it first"),
  (b"BZh", "is compressed (bzip2): unpack it first"),
  (b"\xfd7zXZ", "is compressed (xz): unpack it first"),
  (b"\x28\xb5\x2f\xfd", "is compressed (zstd): unpack it first"),
  (b"7z\xbc\xaf", "is an archive (7z): unpack it first"),
  (b"Rar!", "is an archive (rar): unpack it first"),
  (b"\x89HDF", "is an HDF5 file (Keras): {want}"),
  (b"\x93NUMPY", "is an array of NumPy: {want}"),
  (b"\x89PNG", "is a picture: {want}"),
  (b"\xff\xd8\xff", "is a picture: {want}"),
)
_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")
_HEAD = 512  # Bytes that are looked at.
_SHOWN = 60  # Characters of a text that stands where weights should.


def visible(folder: str | os.PathLike, *suffixes: str) -> list[pathlib.Path]:
  """Returns the files of a folder that a user sees, sorted by name.

  Python's glob, unlike a shell's, finds what begins with a dot: the doubles
  that a Mac writes (`._x.json` beside every `x.json`), `.DS_Store`, scratch
  files. Suffixes count in any case. A link that leads nowhere is a file that
  cannot be read: its reader says so.

  Args:
    folder: where to look; not deeper. One that is not there holds none.
    *suffixes: such as ".json"; none: all files.
  """
  wanted = tuple(suffix.lower() for suffix in suffixes)
  try:
    paths = list(pathlib.Path(folder).iterdir())
  except FileNotFoundError:  # Another process may just have removed it.
    return []
  return sorted(
    path
    for path in paths
    if not path.name.startswith(".")
    and (not wanted or path.name.lower().endswith(wanted))
    and not path.is_dir()
  )


def has_visible(folder: str | os.PathLike) -> bool:
  """Tells whether a folder shows anything, a file or a folder."""
  names = os.listdir(folder)
  return any(not name.startswith(".") for name in names)


def suffix(path: str | os.PathLike) -> str:
  """Returns the suffix in lower case."""
  return pathlib.Path(path).suffix.lower()


def read_json(
  path: str | os.PathLike, *, wanted: str = "fetch it again"
) -> Any:
  """Reads JSON of any encoding that JSON may have, with or without a mark.

  Args:
    path: the file.
    wanted: what to do about a file that is none.

  Raises:
    errors.UserError: the file is missing, is no JSON, or names a key twice.
  """
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
  except OSError as error:
    raise errors.UserError(
      f"{path} cannot be read ({error.strerror}): {wanted}"
    ) from error
  refuse_impostor(path, wanted=wanted, is_text=True)
  return parse_json(data, str(path), wanted=wanted)


def parse_json(
  data: bytes | str, where: str, *, wanted: str = "fetch it again"
) -> Any:
  """Parses JSON; arguments and errors as of `read_json`.

  Args:
    data: the text, or its bytes.
    where: the file, for the errors.
    wanted: what to do about a text that is none.
  """
  try:
    return json.loads(data, object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:  # Of Unicode, too.
    said = (str(error).splitlines() or ["empty"])[0]
    raise errors.UserError(f"{where} is not JSON ({said}): {wanted}") from error


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Returns the dict of a JSON object; for `json.loads(object_pairs_hook=)`.

  Raises:
    ValueError: a key stands there twice, of which JSON readers take the last.
  """
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {twice!r} stands in it twice")
  return values


def refuse_impostor(
  path: str | os.PathLike,
  *,
  wanted: str = "give a .safetensors file",
  is_text: bool = False,
) -> None:
  """Calls a file by its right name where its first bytes say another one.

  Args:
    path: an existing file.
    wanted: what to give instead.
    is_text: the file is meant to be text, such as JSON.

  Raises:
    errors.UserError: it is empty, a web page, a pointer, an archive ...
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      head = file.read(_HEAD)
  except OSError as error:
    raise errors.UserError(
      f"{path} cannot be read ({error.strerror}): {wanted}"
    ) from error
  if not head:
    raise errors.UserError(
      f"{path} is truncated: it is empty, 0 bytes: fetch it again"
    )
  if not is_text and is_safetensors(path):
    return  # Its first bytes are a length, which may look like any mark.
  for mark, said in _IMPOSTORS:
    if head.startswith(mark):
      raise errors.UserError(f"{path} {said.format(want=wanted)}")
  if head[257:262] == b"ustar":
    raise errors.UserError(f"{path} is an archive (tar): unpack it first")
  begin = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
  if begin.startswith(_PAGE):
    raise errors.UserError(
      f"{path} is a web page, not the file itself: its download needs a login"
      " or the licence accepted; fetch it again"
    )
  if is_text:
    return
  text = head.decode("ascii", "replace")
  if all(c.isprintable() or c in "\r\n\t" for c in text):
    line = " ".join(text.split())[:_SHOWN]
    raise errors.UserError(
      f"{path} is a text that begins {line!r}, not weights: fetch it again"
    )


def is_safetensors(path: str | os.PathLike) -> bool:
  """Tells whether a file begins as .safetensors do, whatever its name."""
  with pathlib.Path(path).open("rb") as file:
    head = file.read(9)
    size = file.seek(0, os.SEEK_END)
  length = int.from_bytes(head[:8], "little")
  return head[8:] == b"{" and 8 + length <= size
