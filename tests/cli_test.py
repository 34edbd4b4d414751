"""Every mistake on the command line: one line on stderr, exit code 2."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

from absl import flags
import pytest

from dppp_jax import cli, errors, paths

_CONFIG = """
import ml_collections
from ml_collections import config_dict

from dppp_jax import errors

def get_config(arg="base"):
  if arg not in ("base", "large"):
    raise errors.UserError(f"preset {arg!r} is unknown: use base or large")
  config = ml_collections.ConfigDict()
  config.steps = 10 if arg == "base" else 1000
  config.lr = 0.1
  config.use_ema = True
  config.name = "x"
  config.size = (256, 128)
  config.names = ("market1501", "dukemtmcreid")
  config.none = ()
  config.gain = config_dict.FieldReference((0.5, 1.5))
  config.root = config_dict.placeholder(str)
  config.phases = (dict(lr=1.0),)
  config.sampler = ml_collections.ConfigDict({"P": 8, "K": 4})
  return config
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "base.py"
  path.write_text(_CONFIG)
  return str(path)


def _define_flags():
  flags.DEFINE_string("workdir", None, "Where to write.", required=True)
  flags.DEFINE_integer("seed", 0, "Seed.")


def _call(main, *words, **kwargs):
  with pytest.raises(SystemExit) as info:
    cli.run(
      main,
      define_flags=_define_flags,
      argv=["prog", "--workdir=w", *words],
      **kwargs,
    )
  return info.value.code or 0


def _parsed(config_file, *words):
  """Returns the config and seed that main sees."""
  seen = []
  main = lambda args: seen.append((args.config.to_dict(), args.seed))
  assert _call(main, f"--config={config_file}", *words, config="") == 0
  return seen[0]


def test_overrides_have_the_fields_types(config_file):
  config, seed = _parsed(
    config_file + ":large",
    "--config.lr=1",
    "--config.sampler.P=16",
    "--noconfig.use_ema",
    "--config.name=street",
    "--seed=3",
  )
  assert config == {
    "steps": 1000,
    "lr": 1.0,
    "use_ema": False,
    "name": "street",
    "size": (256, 128),
    "names": ("market1501", "dukemtmcreid"),
    "none": (),
    "gain": (0.5, 1.5),
    "root": None,
    "phases": ({"lr": 1.0},),
    "sampler": {"P": 16, "K": 4},
  }
  assert isinstance(config["lr"], float) and seed == 3


@pytest.mark.parametrize("text", ["384,192", "(384,192)"])
def test_tuples(config_file, text):
  config, _ = _parsed(config_file, f"--config.size={text}")
  assert config["size"] == (384, 192)


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("a,b", ("a", "b")),
    ("(a, b)", ("a", "b")),
    ("['a','b']", ("a", "b")),
    ("a,\"b\",'c'", ("a", "b", "c")),
    ("'a,b',c", ("a,b", "c")),
    ("a,", ("a",)),
    ("'a b'", ("a b",)),
    ("", ()),
    ("()", ()),
  ],
)
def test_words_are_split_at_commas(config_file, text, value):
  for key in ("names", "none"):
    config, _ = _parsed(config_file, f"--config.{key}={text}")
    assert config[key] == value
    config, _ = _parsed(config_file, f"--config.{key}", text)
    assert config[key] == value


def test_numbers_of_a_tuple_that_is_empty_by_default(config_file):
  for text, value in (("1,2", (1, 2)), ("1,2.5", (1.0, 2.5)), ("-1", (-1,))):
    config, _ = _parsed(config_file, f"--config.none={text}")
    assert config["none"] == value and type(config["none"][0]) is type(value[0])


def test_a_tuple_given_twice_is_both(config_file):
  words = ("--config.names=a", "--config.names=b,c")
  assert _parsed(config_file, *words)[0]["names"] == ("a", "b", "c")


def test_optional_values_may_be_none(config_file):
  parsed = lambda *words: _parsed(config_file, *words)[0]
  assert parsed("--config.gain=None")["gain"] is None
  assert parsed("--config.gain=0.6,1")["gain"] == (0.6, 1.0)
  assert parsed("--config.root=None")["root"] is None
  assert parsed("--config.root=a", "--config.root=None")["root"] is None
  assert parsed("--config.root=None", "--config.root=a")["root"] == "a"


def test_paths_of_flags(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  seen = []

  def call(*words):
    with pytest.raises(SystemExit) as info:
      cli.run(
        lambda args: seen.append(args.out),
        define_flags=lambda: cli.path("out", "usual", "A folder."),
        argv=["prog", *words],
      )
    return info.value.code or 0

  assert call("--out=~/data") == call("--out", "a/~b") == call() == 0
  assert seen == [f"{tmp_path}/data", "a/~b", "usual"]
  assert call("--out=") == 2
  _assert_one_line(capsys.readouterr().err, "--out=: is empty: give a path")
  assert call("--out=~nobody-of-that-name/x") == 2
  _assert_one_line(capsys.readouterr().err, "no such home folder")


def test_flags_that_do_nothing(config_file, capsys):
  idle = {"seed": "it is drawn", "config.sampler": "nothing is sampled"}
  main = lambda args: cli.refuse_idle(args, idle)
  call = lambda *words: _call(
    main, f"--config={config_file}", *words, config=""
  )
  assert call("--config.steps=3") == 0
  for words, says in (
    (["--seed=0"], "--seed does nothing here: it is drawn; leave it out"),
    (["--config.sampler.P=8"], "--config.sampler.P does nothing here: nothing"),
  ):
    assert call(*words) == 2
    _assert_one_line(capsys.readouterr().err, says)
  assert (
    _call(
      lambda args: cli.refuse_idle(args, {"config.names": "x"}),
      f"--config={config_file}",
      "--config.names=a",
      config="",
    )
    == 2
  )
  _assert_one_line(capsys.readouterr().err, "--config.names does nothing")


def test_space_between_key_and_number_is_fine(config_file):
  config, _ = _parsed(config_file, "--config.steps", "7")
  assert config["steps"] == 7


def test_config_is_locked(config_file):
  def main(args):
    args.config.step = 3

  with pytest.raises(AttributeError):
    cli.run(
      main,
      config=config_file,
      define_flags=_define_flags,
      argv=["prog", "--workdir=w"],
    )


def test_default_config_is_found_from_anywhere(tmp_path, monkeypatch):
  root = tmp_path / "root"
  (root / "configs").mkdir(parents=True)
  (root / "configs" / "base.py").write_text(_CONFIG)
  monkeypatch.setattr(cli, "ROOT", root)
  monkeypatch.chdir(tmp_path)
  assert cli.load_config("base.py:large").steps == 1000
  assert cli.load_config("configs/base.py").steps == 10
  with pytest.raises(errors.UserError, match=r"shipped ones are .*base\.py"):
    cli.load_config("bose.py")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--config.stepss=3"], "--config.stepss of .* mean --config.steps?"),
    (["--config.P=3"], "did you mean --config.sampler.P?"),
    (["--config.sampler.P.x=3"], "unknown config key --config.sampler.P.x"),
    (["--config.steps.x=3"], "unknown config key --config.steps.x"),
    (["--config.sampler=3"], "did you mean --config.sampler.P?"),
    (["--config.zzz=3"], r"unknown config key --config.zzz .*it has"),
    (["--config.steps=1e3"], "--config.steps=1e3"),
    (["--config.lr=fast"], "--config.lr=fast"),
    (["--config.use_ema", "false"], "write --config.use_ema=false"),
    (["--config.use_ema=maybe"], "--config.use_ema=maybe"),
    (["--config.size=a,b"], "--config.size"),
    (["--config.size=256 128"], r"like its default \(256, 128\)"),
    (["--config.size=None"], "--config.size=None: write it like"),
    (["--config.names=a b"], "--config.names=a b: write it like"),
    (["--config.names=a,,b"], "--config.names=a,,b: write it like"),
    (["--config.names=(a"], r"--config.names=\(a: write it like"),
    (["--config.names='a"], "--config.names='a: write it like"),
    (["--config.names=None"], "--config.names=None: write it like"),
    (["--config.none=a b"], "write numbers, or words, with commas between"),
    (["--config.gain=x,y"], "--config.gain=x,y: write it like"),
    (["--config.phases=1,2"], "--config.phases=1,2: write it like"),
    (["--seed=x"], "--seed=x"),
    (["--sed=1"], "Unknown command line flag 'sed'"),
    (["fast", "--seed=1"], "unexpected word 'fast'"),
    (["--config"], "--config needs a file"),
    (["--config=nowhere.py"], "nowhere.py: no such file"),
    (["--workdir"], "--workdir"),
  ],
)
def test_mistakes(config_file, capsys, words, message):
  main = lambda args: pytest.fail("ran")
  assert _call(main, f"--config={config_file}", *words, config="") == 2
  _assert_one_line(capsys.readouterr().err, message)


def _assert_one_line(err, message):
  import re

  assert err.startswith("error: ") and err.count("\n") == 1, err
  assert "Traceback" not in err
  assert re.search(message.replace("?", r"\?"), err), err


def test_preset_that_does_not_exist(config_file, capsys):
  assert _call(lambda args: None, f"--config={config_file}:xl", config="") == 2
  _assert_one_line(capsys.readouterr().err, "preset 'xl' is unknown")


def test_config_that_fails_names_its_line(tmp_path, capsys):
  path = tmp_path / "broken.py"
  path.write_text("def get_config():\n  return nothing\n")
  assert _call(lambda args: None, config=str(path)) == 2
  _assert_one_line(capsys.readouterr().err, "broken.py:2: .*NameError")
  path.write_text("def get_config(:\n")
  assert _call(lambda args: None, config=str(path)) == 2
  _assert_one_line(capsys.readouterr().err, "broken.py:1: .*SyntaxError")


def test_preset_for_a_config_that_has_none(tmp_path, capsys):
  path = tmp_path / "plain.py"
  path.write_text("def get_config():\n  return {}\n")
  assert _call(lambda args: None, config=f"{path}:mini") == 2
  _assert_one_line(capsys.readouterr().err, "plain.py.*TypeError")


def test_absent_required_flags(capsys):
  with pytest.raises(SystemExit) as info:
    cli.run(lambda args: None, define_flags=_define_flags, argv=["prog"])
  assert info.value.code == 2
  _assert_one_line(capsys.readouterr().err, "--workdir must have a value")
  assert _call(lambda args: None, config=cli.REQUIRED) == 2
  _assert_one_line(capsys.readouterr().err, "--config must be given")


def test_user_error_keeps_its_diff(capsys):
  def main(args):
    raise errors.UserError("a.safetensors: 1 tensor\n  - b/c (3,)")

  assert _call(main) == 2
  err = capsys.readouterr().err
  assert err == "error: a.safetensors: 1 tensor\n  - b/c (3,)\n"


def test_interrupt_is_130(capsys):
  def main(args):
    raise KeyboardInterrupt

  assert _call(main) == 130
  assert capsys.readouterr().err == "interrupted\n"


def test_bugs_keep_their_traceback():
  def main(args):
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    cli.run(main, define_flags=_define_flags, argv=["prog", "--workdir=w"])


def test_as_a_program(config_file, tmp_path):
  """The real thing once: a launcher run from another folder."""
  launcher = tmp_path / "launcher.py"
  launcher.write_text(
    textwrap.dedent(f"""
          '''Does nothing.'''
          from absl import flags
          from dppp_jax import cli

          def define_flags():
            flags.DEFINE_string("out", "o", "An output folder.")

          if __name__ == "__main__":
            cli.run(
                lambda args: print(args.config.steps, args.out),
                config={config_file!r},
                define_flags=define_flags,
            )
          """)
  )
  env = os.environ | {"PYTHONPATH": str(pathlib.Path(cli.__file__).parents[1])}
  call = lambda *words: subprocess.run(
    [sys.executable, str(launcher), *words],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  done = call("--config.steps=5", "--out=p")
  assert (done.returncode, done.stdout, done.stderr) == (0, "5 p\n", "")
  failed = call("--config.stps=5")
  assert failed.returncode == 2
  _assert_one_line(failed.stderr, "did you mean --config.steps?")
  asked = call("--help")
  assert "Does nothing." in asked.stdout and "--config" in asked.stdout
  assert "An output folder." in asked.stdout


@pytest.mark.parametrize(
  ("command", "config", "wanted"),
  [
    ("generate", "dppp.py:mini", "configs/geneperson.py"),
    ("train", "geneperson.py:mini", "configs/dppp.py"),
    ("train", "pretrain_vae.py", "configs/dppp.py"),
    ("pretrain", "geneperson.py:paperdoll", "configs/pretrain_"),
    ("pretrain", "dppp.py", "config method 'dppp': choose autoencoder"),
  ],
)
def test_a_config_of_another_command(tmp_path, capsys, command, config, wanted):
  location = cli.ROOT / "launch" / f"{command}.py"
  spec = importlib.util.spec_from_file_location("launcher", location)
  launcher = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(launcher)
  words = [f"--config={config}"]
  if command != "generate":
    words.append(f"--workdir={tmp_path / 'run'}")
  with pytest.raises(SystemExit) as info:
    cli.run(
      launcher.main,
      config="",
      define_flags=launcher.define_flags,
      argv=[command, *words],
    )
  assert info.value.code == 2
  _assert_one_line(capsys.readouterr().err, wanted)
  assert not list(tmp_path.iterdir())


def test_a_config_is_a_python_file(tmp_path, capsys):
  path = tmp_path / "notes.md"
  path.write_text("# notes")
  assert _call(lambda args: None, config=str(path)) == 2
  _assert_one_line(capsys.readouterr().err, "notes.md: is no Python file")


def test_a_folder_that_cannot_be_written(tmp_path):
  paths.refuse_unwritable(tmp_path / "a" / "b", flag="--data_dir")
  (tmp_path / "file").write_text("")
  for place in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(errors.UserError, match=r"--data_dir=.*is no folder"):
      paths.refuse_unwritable(place, flag="--data_dir")
