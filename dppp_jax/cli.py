"""What every launcher shares: flags, configs, and errors in one line.

A launcher is

    def define_flags():
      flags.DEFINE_string("data_dir", "data", "Folder of the dataset.")
    def main(args):
      train(args.config, args.data_dir)
    cli.run(main, config="dppp.py:mini", define_flags=define_flags)

Exit codes: 0 done, 2 the user can mend it (one line says how), 130 Ctrl-C.
Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Callable, Sequence
import difflib
import importlib.util
import pathlib
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from dppp_jax import errors, process

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
    if config is not None:
      argv, spec = _take_config(argv, config)
      defaults = _define_config(spec, argv)
    words = flags.FLAGS(argv)
    if config is not None:
      _check_tuples(flags.FLAGS["config"], defaults)
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


def _define_config(spec: str, argv: list[str]) -> dict[str, Any]:
  """Defines --config and its overrides in argv; returns the defaults."""
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
  config_flags.DEFINE_config_dict(
    "config",
    config,
    f"Config file with an optional preset, path.py[:preset] (now {spec});"
    " --config.key=value overrides.",
    sys_argv=argv,
  )
  flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS["config"])
  return keys


def _check_tuples(flag: flags.Flag, defaults: dict[str, Any]) -> None:
  """Refuses ("a", "b") for a tuple of numbers, which absl lets through."""
  for key, value in flag.override_values.items():
    default = defaults[key]
    if isinstance(default, tuple) and default:
      kind = (int, float) if isinstance(default[0], float) else type(default[0])
      if not all(isinstance(v, kind) for v in value):
        raise errors.UserError(
          f"--config.{key}={value}: write it like its default {default}"
        )


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
