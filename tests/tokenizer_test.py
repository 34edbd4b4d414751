"""weights/tokenizer.py: its files from merges, and what its import says."""

import logging
import pathlib
import sys

import transformers

from dppp_jax.weights import load, tokenizer

_NOTICE = "PyTorch was not found"


def test_merges_make_the_layout_of_clip(tmp_path):
  count = tokenizer.write(tmp_path, [("a", "b"), ("ab", "c</w>")])
  assert count == 2 * 256 + 2 + 2
  read = load.tokenizer(tmp_path)
  ids = read("abc ab")["input_ids"]
  # Bytes and bytes that end a word first, then the merges, then the marks.
  byte = lambda c: ord(c) - ord("!")
  assert ids == [514, 513, byte("a"), 256 + byte("b"), 515]


def test_the_import_is_silent_about_pytorch_alone(
  tmp_path, monkeypatch, request
):
  """transformers greets everybody who has no PyTorch; nobody here needs it."""
  init = pathlib.Path(transformers.__file__).read_text(encoding="utf-8")
  assert _NOTICE in init  # Else there is nothing to be silent about.
  (tmp_path / "transformers.py").write_text(
    "import logging\n"
    "log = logging.getLogger('transformers')\n"
    f"log.warning('{_NOTICE}. Models are not available.')\n"
    "log.warning('something else')\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "transformers")
  logger = logging.getLogger("transformers")
  said = []
  handler = logging.Handler()
  handler.emit = lambda record: said.append(record.getMessage())
  monkeypatch.setattr(logger, "handlers", [handler])
  monkeypatch.setattr(logger, "disabled", False)
  level = logger.level  # Other tests may have made it quiet.
  request.addfinalizer(lambda: logger.setLevel(level))
  logger.setLevel(logging.WARNING)
  assert tokenizer.library().__file__ == str(tmp_path / "transformers.py")
  logger.warning(_NOTICE)  # From elsewhere: not ours to hide.
  assert said == ["something else", _NOTICE]
