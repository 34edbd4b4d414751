"""What every launcher shares: flags, configs, and errors in one line.

A launcher is

    def define_flags():
      cli.path("data_dir", "data", "Folder of the dataset.")
    def main(args):
      train(args.config, args.data_dir)
    cli.run(main, config="dppp.py:mini", define_flags=define_flags)

Exit codes: 0 done, 2 the user can mend it (one line says how), 130 Ctrl-C.
Any other exception is a bug and keeps its traceback.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from dppp_jax import errors, paths, process

ROOT = pathlib.Path(__file__).resolve().parents[1]
REQUIRED = ""  # As `config` of `run`: there is no default.
_HELP = {"-h", "-help", "--help", "--helpfull", "--helpshort", "-?"}


def run(
  main: Callable[[flags.FlagValues], int | None],
  *,
  config: str | None = None,
  define_flags: Callable[[], None] | None = None,
  argv: Sequence[str] | None = None,
) -> NoReturn:
  """Parses the command line, runs main(flags), and exits.

  Flags are forgotten afterwards: one process (a test) runs many launchers.

  Args:
    main: what to do; reads `args.config` and the launcher's own flags.
    config: None where there is no --config; else the default, a file of
      configs/ with an optional preset ("dppp.py:mini"), or REQUIRED.
    define_flags: calls `flags.DEFINE_*`.
    argv: the command line; sys.argv by default.

  Raises:
    SystemExit: always.
  """
  process.tune_memory()
  argv = list(sys.argv if argv is None else argv)
  app.define_help_flags()
  known = set(flags.FLAGS)
  try:
    app.run(
      lambda _: _main(main),
      argv=argv,
      flags_parser=lambda words: _parse(words, config, define_flags),
    )
  except errors.UserError as error:
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
  finally:
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)


def _main(main: Callable[[flags.FlagValues], int | None]) -> int | None:
  # Libraries tell every file they touch; --verbosity=0 lets them.
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  return main(flags.FLAGS)


class _Path(flags.ArgumentParser):
  """Parses paths: "~" is the home folder, nothing is no path."""

  def parse(self, argument: str) -> str:
    if not argument:
      raise ValueError("is empty: give a path")
    return str(paths.expand(argument))

  def flag_type(self) -> str:
    return "path"


def path(
  name: str, default: str | None, text: str, *, required: bool = False
) -> None:
  """Defines a flag that is a path; every path flag is defined by this.

  Args:
    name: of the flag.
    default: its value if unset.
    text: for --help.
    required: whether it must be given.
  """
  serializer = flags.ArgumentSerializer()
  flags.DEFINE(
    _Path(), name, default, text, serializer=serializer, required=required
  )


def refuse_other(config: Mapping[str, Any], *keys: str, wanted: str) -> None:
  """Refuses a configuration of another launcher.

  Args:
    config: as nested dicts.
    *keys: that all configurations of this launcher have.
    wanted: a file of configs/ for this launcher.

  Raises:
    errors.UserError: a key is missing.
  """
  missing = [key for key in keys if key not in config]
  if missing:
    raise errors.UserError(
      f"--config: it has no {missing[0]}, and is of another command: give"
      f" {wanted}"
    )


def refuse_idle(args: flags.FlagValues, idle: Mapping[str, str]) -> None:
  """Refuses what was given on the command line and would do nothing.

  Args:
    args: of `main`.
    idle: flag, "config.key" or "config.group" -> why it does nothing here.

  Raises:
    errors.UserError: names the first such flag, and why.
  """
  given = [name for name in args if args[name].present]
  if "config" in args:
    given += [f"config.{key}" for key in args["config"].override_values]
  for name in given:
    groups = [name[:at] for at in range(len(name) + 1) if name[at:][:1] == "."]
    for key in (name, *groups):
      if key in idle:
        raise errors.UserError(
          f"--{name} does nothing here: {idle[key]}; leave it out"
        )


def write_page(path: pathlib.Path, text: str, *, check: bool, by: str) -> None:
  """Writes a generated page and prints its path.

  Args:
    path: of the page.
    text: of the page.
    check: leave the file alone, and only compare.
    by: the command that writes it.

  Raises:
    errors.UserError: `check`, and the file does not hold this text.
  """
  if not check:
    path.write_text(text)
    print(path)
  elif not path.exists() or path.read_text() != text:
    raise errors.UserError(f"{path}: out of date: run {by}")


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Loads "path.py[:preset]" by calling its get_config([preset]).

  The path is one from here, from the project's root, or inside configs/.
  """
  name, _, preset = spec.partition(":")
  places = [pathlib.Path(name), ROOT / name, ROOT / "configs" / name]
  path = next((place for place in places if place.is_file()), None)
  if path is None:
    shipped = sorted(p.name for p in (ROOT / "configs").glob("*.py"))
    raise errors.UserError(
      f"--config {name}: no such file; the shipped ones are"
      f" {', '.join('configs/' + s for s in shipped) or 'missing'}"
    )
  if path.suffix != ".py":
    raise errors.UserError(
      f"--config {name}: is no Python file: give one such as"
      " configs/geneperson.py"
    )
  module_spec = importlib.util.spec_from_file_location(
    f"dppp_config_{path.stem}", path
  )
  try:
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config(*([preset] if preset else []))
  except errors.UserError:
    raise
  except Exception as error:
    line = getattr(error, "lineno", None) or next(
      frame.lineno
      for frame in reversed(traceback.extract_tb(error.__traceback__))
      if frame.filename in (str(path), __file__)
    )
    raise errors.UserError(
      f"{path}:{line}: the config fails: {type(error).__name__}: {error}"
    ) from error
  return config.lock()


def _parse(
  argv: Sequence[str],
  config: str | None,
  define_flags: Callable[[], None] | None,
) -> list[str]:
  """Parses into flags.FLAGS; every mistake becomes a UserError."""
  if define_flags is not None:
    define_flags()
  try:
    argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    tuples = {}
    if config is not None:
      argv, spec = _take_config(argv, config)
      argv, tuples = _define_config(spec, argv)
    words = flags.FLAGS(argv)
    if config is not None:
      parsed = flags.FLAGS["config"]
      with parsed.value.unlocked():
        parsed.value.update_from_flattened_dict(tuples)
      parsed.override_values.update(tuples)
  except flags.Error as error:
    raise errors.UserError(" ".join(str(error).split())) from error
  if words[1:]:
    word = words[1]
    before = argv[argv.index(word) - 1]
    flag = before.startswith("--") and "=" not in before
    remedy = f"write {before}={word}" if flag else "flags begin with --"
    raise errors.UserError(f"unexpected word {word!r}: {remedy}")
  return words


def _take_config(argv: list[str], default: str) -> tuple[list[str], str]:
  """Cuts --config=path or --config path out of argv."""
  rest, spec = argv[:1], default
  words = iter(argv[1:])
  for word in words:
    flag, equals, value = word.partition("=")
    if flag in ("--config", "-config"):
      spec = value if equals else next(words, "")
      if not spec or spec.startswith("-"):
        raise errors.UserError("--config needs a file: --config configs/x.py")
    else:
      rest.append(word)
  return rest, spec


def _define_config(
  spec: str, argv: list[str]
) -> tuple[list[str], dict[str, Any]]:
  """Defines --config and its overrides in argv.

  Returns:
    argv without what is set already: tuples, and None for what may be None,
    neither of which ml_collections reads as people write it; and these values.
  """
  if not spec and _HELP.isdisjoint(argv):
    raise errors.UserError(
      "flag --config must be given: --config configs/x.py[:preset]"
    )
  config = load_config(spec) if spec else ml_collections.ConfigDict()
  keys = _leaves(config)
  for word in argv[1:]:
    flag = word.partition("=")[0].lstrip("-")
    key = flag.removeprefix("no").removeprefix("config.")
    if flag.startswith(("config.", "noconfig.")) and key not in keys:
      raise errors.UserError(_unknown(key, keys, spec))
  argv, texts = _take_texts(argv, keys)
  values = {key: _value(key, some, keys[key]) for key, some in texts.items()}
  config_flags.DEFINE_config_dict(
    "config",
    config,
    f"Config file with an optional preset, path.py[:preset] (now {spec});"
    " --config.key=value overrides.",
    sys_argv=argv,
  )
  flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS["config"])
  return argv, values


def _take_texts(
  argv: list[str], keys: Mapping[str, Any]
) -> tuple[list[str], dict[str, list[str]]]:
  """Cuts overrides of tuples, and to None, out of argv; key -> its texts."""
  rest, texts = argv[:1], {}
  words = iter(argv[1:])
  for word in words:
    flag, equals, text = word.partition("=")
    key = flag.lstrip("-").removeprefix("config.")
    is_override = flag.lstrip("-").startswith("config.") and key in keys
    is_tuple = is_override and _type(keys[key]) is tuple
    if is_tuple and not equals:
      text = next(words, "")
    if is_tuple or (is_override and _is_none(text, keys[key])):
      texts.setdefault(key, []).append(text)
    else:
      texts.pop(key if is_override else None, None)  # The last one counts.
      rest.append(word)
  return rest, texts


def _type(default: Any) -> type:
  if isinstance(default, ml_collections.FieldReference):
    return default.get_type()
  return type(default)


def _is_none(text: str, default: Any) -> bool:
  """Whether a text sets an optional value to None."""
  optional = isinstance(default, ml_collections.FieldReference)
  return optional and text.strip().lower() == "none"


_QUOTED = r"'[^']*'|\"[^\"]*\""
_ITEM = rf"\s*(?:{_QUOTED}|[^,'\"()\[\]{{}}]+)\s*"
_TUPLE = re.compile(rf"({_ITEM}(?:,{_ITEM})*),?\s*")


def _value(key: str, texts: Sequence[str], default: Any) -> Any:
  """Returns a tuple as people write one, or None.

  Numbers and words are split at commas, with or without brackets around them
  and quotes around words; a flag given twice is both, one after the other.
  """
  if _is_none(texts[-1], default):
    return None
  if isinstance(default, ml_collections.FieldReference):
    default = default.get()
  if default and isinstance(default[0], (Mapping, tuple, list)):
    return _literal(key, texts, default)
  items = []
  for text in texts:
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
      inner = inner[1:-1].strip()
    if inner and not _TUPLE.fullmatch(inner):
      raise _unlike(key, text, default)
    items += [item.strip() for item in re.findall(_ITEM, inner)]
  kinds = [int, float, str]
  if default:
    kinds = [type(default[0])]
  for kind in kinds:
    try:
      return tuple(_element(item, kind) for item in items)
    except ValueError:
      continue
  raise _unlike(key, ",".join(texts), default)


def _element(item: str, kind: type) -> Any:
  """Returns one item of a tuple; raises ValueError if it is another kind."""
  if kind is not str:
    return kind(item)
  if re.fullmatch(_QUOTED, item):
    return item[1:-1]
  # Two words, perhaps, or none: quotes say that it is one.
  if re.search(r"\s", item) or item.lower() == "none":
    raise ValueError(item)
  return item


def _literal(key: str, texts: Sequence[str], default: tuple) -> tuple:
  """Returns a tuple of tuples or of dicts, written as in Python."""
  try:
    value = ast.literal_eval(texts[-1])
  except (ValueError, SyntaxError) as error:
    raise _unlike(key, texts[-1], default) from error
  kind = Mapping if isinstance(default[0], Mapping) else (tuple, list)
  is_like = isinstance(value, (tuple, list))
  if not is_like or not all(isinstance(one, kind) for one in value):
    raise _unlike(key, texts[-1], default)
  return tuple(value)


def _unlike(key: str, text: str, default: Any) -> errors.UserError:
  remedy = "write numbers, or words, with commas between"
  if default:
    remedy = f"write it like its default {default}"
  return errors.UserError(f"--config.{key}={text}: {remedy}")


def _leaves(config: ml_collections.ConfigDict) -> dict[str, Any]:
  leaves = {}
  for key, value in config.items(preserve_field_references=True):
    if isinstance(value, ml_collections.ConfigDict):
      leaves |= {f"{key}.{k}": v for k, v in _leaves(value).items()}
    else:
      leaves[key] = value
  return leaves


def _unknown(key: str, keys: dict[str, Any], spec: str) -> str:
  same_name = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]
  inside = [k for k in keys if k.startswith(f"{key}.")]
  near = difflib.get_close_matches(key, keys, n=1) or same_name[:1] or inside
  hint = f"did you mean --config.{near[0]}?" if near else f"it has {[*keys]}"
  return f"unknown config key --config.{key} of {spec}: {hint}"
