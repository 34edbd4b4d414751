"""The vocabulary, the people drawn from it, and the tool that extends it."""

import copy
import http.server
import itertools
import json
import math
import pathlib
import runpy
import threading

import pytest

from dppp_jax import errors
from dppp_jax.geneperson import dataset, prompts, vocabulary

TOOL = str(
  pathlib.Path(__file__).parents[1] / "data_tools/expand_vocabulary.py"
)


@pytest.fixture(scope="module")
def people():
  drawn = prompts.People(3)
  return [drawn[pid] for pid in range(800)]


@pytest.fixture
def raw():
  return copy.deepcopy(vocabulary.default().raw)


def test_lists_are_rich_and_every_word_is_used_once():
  words = vocabulary.default()
  for gender in words.genders:
    for key in ("upper_type", "lower_type", "footwear_type", "hair_style"):
      assert len(words.values(key, gender)) >= 12
  assert len(words.values("upper_color")) >= 30
  assert words.values("upper_color") == words.values("footwear_color")
  assert words.values("hair_color") != words.values("upper_color")
  assert len(words.values("lighting")) == 9  # Fig. 4 of the paper.
  union = words.values("upper_type")
  assert len(union) == len(set(union)) > len(words.values("upper_type", "man"))


def test_prompt_is_the_papers_with_the_views_early():
  words = {
    "gender": "woman", "activity": "walking",
    "upper_type": "shirt", "upper_color": "pink", "upper_pattern": "plaid",
    "lower_type": "jeans", "lower_color": "black",
    "lower_pattern": "distressed",
    "footwear_type": "loafers", "footwear_color": "white",
    "footwear_pattern": "plain",
    "lighting": "day, sunshine", "body": "slim figure",
    "hair_color": "dark brown", "hair_length": "waist-length",
    "hair_texture": "straight", "hair_style": "high ponytail",
    "skin": "warm beige",
  }  # fmt: skip
  person = prompts.Person(0, words)
  assert person.prompt() == (
    "woman, walking, multiple views of the same character, multiple views,"
    " front view, side view, back view, simple background, pink plaid shirt,"
    " black distressed jeans, white loafers, day, sunshine, slim figure,"
    " dark brown hair color, waist-length hair, straight hair texture,"
    " high ponytail, warm beige skin"
  )
  assert person.attributes["hair_style"] == "straight, high ponytail"
  assert set(person.attributes) <= set(dataset.ATTRIBUTES)
  assert person.prompt("a {gender} in {upper}") == "a woman in pink plaid shirt"
  assert vocabulary.default().objection(words) is None


def test_nobody_wears_what_another_wears(people):
  outfits = {tuple(p.words[key] for key in vocabulary.OUTFIT) for p in people}
  assert len(outfits) == len(people)
  # Not by being sorted: neighbours differ in most garments.
  same = [
    a.words[f"{part}_type"] == b.words[f"{part}_type"]
    for a, b in itertools.pairwise(people)
    for part in ("upper", "lower", "footwear")
  ]
  assert sum(same) / len(same) < 0.15


def test_numbers_of_outfits_are_shuffled_without_loss(raw):
  """The permutation of a small vocabulary reaches every outfit once."""
  for key in ("upper_type", "lower_type", "footwear_type"):
    raw[key] = {g: words[:2] for g, words in raw[key].items()}
  raw["color"] = raw["color"][:2]
  for key in ("upper_pattern", "lower_pattern", "footwear_pattern"):
    raw[key] = raw[key][:2]
  raw["rules"] = []
  drawn = prompts.People(1, vocabulary=vocabulary.Vocabulary(raw))
  count = drawn._outfits
  kinds = [len(drawn.vocabulary.values(key)) for key in vocabulary.OUTFIT[::3]]
  assert count == math.prod(kinds) * 2**6 < 5000
  numbers = [drawn._permute(i) for i in range(count)]
  assert sorted(numbers) == list(range(count))
  # Far from their places: a third of the range on average.
  moved = sum(abs(a - b) for a, b in enumerate(numbers)) / count
  assert 0.28 < moved / count < 0.39
  with pytest.raises(errors.UserError, match="extend it"):
    drawn[drawn.capacity]


def test_people_do_not_depend_on_how_many_are_asked_for(people):
  again = prompts.People(3)
  for pid in (799, 5, 0, 123):
    assert again[pid] == people[pid]
  other = prompts.People(4)
  assert sum(other[i].words == people[i].words for i in range(20)) == 0


def test_seed_and_pid_give_these_people():
  """Pinned: whoever changes them changes every dataset made so far."""
  drawn = prompts.People(0)
  found = [drawn[pid].words[key] for pid, key in PINNED]
  assert found == list(PINNED.values())


PINNED = {
  (0, "upper_type"): "hoodie",
  (0, "lower_color"): "turquoise",
  (1, "hair_style"): "side part",
  (6640, "upper_pattern"): "striped",
  (6640, "footwear_type"): "slip-on shoes",
  (6640, "skin"): "warm beige",
}


def test_rules_hold_for_everybody(people):
  words = vocabulary.default()
  for person in people:
    gender = person.words["gender"]
    assert words.objection(person.words) is None
    for key, word in person.words.items():
      assert word in words.values(key, gender)
  assert 0.4 < sum(p.words["gender"] == "man" for p in people) / 800 < 0.6
  for key in ("upper_color", "skin", "lighting", "body"):
    used = {p.words[key] for p in people}
    assert used == set(words.values(key))
  for person in people:
    if person.words["lower_type"] == "tights":
      assert "dress" in person.words["upper_type"] or (
        person.words["upper_type"] == "tunic"
      )
    if person.words["hair_style"] == "bald":
      assert person.words["hair_length"] == "shaved"


@pytest.mark.parametrize(
  "words,why",
  [
    ({"upper_pattern": "floral", "lower_pattern": "plaid"}, "loud"),
    ({"upper_type": "parka", "lower_type": "shorts"}, "bare legs"),
    ({"hair_length": "short", "hair_style": "man bun"}, "bun"),
    ({"upper_type": "sweater dress", "lower_type": "jeans"}, "dress"),
    ({"upper_type": "parka", "lower_type": "jeans"}, None),
    ({"upper_type": "sweater dress"}, None),
    ({"lower_type": "jeans"}, None),
  ],
)
def test_objections(words, why):
  found = vocabulary.default().objection(words)
  assert (found is None) if why is None else (why in found)


def test_backgrounds_match_the_light():
  assert prompts.background("outdoors, street, building, tree", "dusk") == (
    "scenery, outdoors, street, building, tree, dusk, realistic, photo"
    " background"
  )
  for light in vocabulary.default().values("lighting"):
    for place in prompts.places(light):
      assert ("indoors" in light) == place.startswith("indoors")


def test_parses_what_models_answer():
  parse = vocabulary.parse_answer
  assert parse('Sure!\n["Teal", "rust red"]\nEnjoy.') == ["teal", "rust red"]
  assert parse(
    "Here are some:\n\n1. **Teal**: a dark cyan.\n2) Rust - warm\n- sea green."
    "\n\u2022 plum (dark)\nHope it helps."
  ) == ["teal", "rust", "sea green", "plum"]
  assert parse("I cannot do that.") == []
  # A footnote is no list, and neither is one of numbers.
  assert parse("As [1] and [2, 3] say:\n- sea green\n- plum") == [
    "sea green",
    "plum",
  ]
  assert parse('See [1]:\n["Teal"]') == ["teal"]


def test_merge_checks_every_word(raw):
  before = copy.deepcopy(raw)
  long = "a very long name of a colour that nobody uses"
  words = ["sea green", "Blacks", "sea-green", "navy-blue", "nike red", long]
  merged, refused = vocabulary.merge(raw, "color", words)
  assert merged["color"] == [*before["color"], "sea green"]
  assert raw == before
  assert set(refused) == set(words[1:])
  assert "already" in refused["sea-green"]
  assert "already" in refused["navy-blue"]
  assert "forbidden" in refused["nike red"]
  assert "longer" in refused[long]
  merged, _ = vocabulary.merge(raw, "body", ["lanky figure"], gender="man")
  assert "lanky figure" in merged["body"]["man"]
  assert "lanky figure" not in merged["body"]["woman"]
  _, refused = vocabulary.merge(
    raw, "upper_type", ["school uniform"], gender="man"
  )
  assert "forbidden" in refused["school uniform"]


@pytest.mark.parametrize(
  "change,words",
  [
    (lambda raw: raw.pop("skin"), "lacks the lists skin"),
    (lambda raw: raw["color"].append("Black"), "twice"),
    (lambda raw: raw["color"].append("t33l"), "letters"),
    (lambda raw: raw["skin"].append("sexy"), "forbidden"),
    (lambda raw: raw["body"].pop("man"), "should be for woman, man"),
    (
      lambda raw: raw["rules"][0]["when"].update(upper_type=["toga"]),
      "toga",
    ),
    (lambda raw: raw["rules"].append({"if": 1}), "a rule has"),
    # Of another type.
    (lambda raw: raw.update(color=[1, 2]), "color should be a list of words"),
    (lambda raw: raw.update(skin=None), "skin should be a list of words"),
    (lambda raw: raw.update(upper_color=3), "upper_color should be a list of"),
    (lambda raw: raw.update(gender=3), "gender should be a list of words"),
    (lambda raw: raw.update(gender={"man": ["man"]}), "gender is for man and"),
    (lambda raw: raw.update(place=["a street"]), "should be for outdoors, ind"),
    (lambda raw: raw["place"].pop("indoors"), "place is for outdoors and"),
    (lambda raw: raw.update(rules={}), "rules should be a list"),
    (lambda raw: raw["rules"].append(3), "a rule has .*, not 3"),
    (lambda raw: raw["rules"][0].update(when=["a"]), "when of the rule"),
    (lambda raw: raw["rules"][0]["when"].update(skin=3), "when of the rule"),
    (lambda raw: raw["rules"][0]["when"].update(rules=["a"]), "in no list"),
  ],
)
def test_refuses_broken_vocabularies(raw, tmp_path, change, words):
  change(raw)
  path = tmp_path / "mine.json"
  path.write_text(json.dumps(raw))
  with pytest.raises(errors.UserError, match=words) as caught:
    vocabulary.load(path)
  assert "mine.json" in str(caught.value)


def test_refuses_a_vocabulary_that_is_no_object(tmp_path):
  (tmp_path / "mine.json").write_text("3")
  with pytest.raises(errors.UserError, match=r"mine\.json holds no JSON objec"):
    vocabulary.load(tmp_path / "mine.json")


@pytest.mark.parametrize(
  "template", ["{gender!x}", "{gender:d}", "{lighting:>{skin}}", "{gender!r}"]
)
def test_refuses_placeholders_with_a_format(people, template):
  with pytest.raises(errors.UserError, match="takes no format: leave out"):
    people[0].prompt(template)


def test_refuses_unknown_placeholders(people):
  with pytest.raises(errors.UserError, match="shoes"):
    people[0].prompt("a {gender} in {shoes}")
  with pytest.raises(errors.UserError, match="template"):
    people[0].prompt("a {gender")
  with pytest.raises(errors.UserError, match=r"\{\} is no attribute"):
    people[0].prompt("a {}")


def test_rules_that_leave_nothing_are_named(raw):
  genders = {"gender": list(raw["gender"])}
  raw["rules"] = [{"why": "no", "when": genders, "not": genders}]
  drawn = prompts.People(0, vocabulary=vocabulary.Vocabulary(raw))
  with pytest.raises(errors.UserError, match="object to every"):
    drawn[0]


class _Stub(http.server.BaseHTTPRequestHandler):
  """A language model that knows two answers."""

  asked: list

  def do_POST(self):
    size = int(self.headers["Content-Length"])
    body = json.loads(self.rfile.read(size))
    self.asked.append((self.path, self.headers.get("Authorization"), body))
    question = body["messages"][0]["content"]
    answer = "1. Sea Green\n2. Black\n3. gucci red"
    if "hairstyles of a man" in question:
      answer = '["mohawk", "MAN BUN"]'
    elif "hairstyles" in question:
      answer = '["crown braid"]'
    reply = {"choices": [{"message": {"content": answer}}]}
    if "silent" in self.path:
      reply = {"choices": [{"message": {"content": None}}]}
    if "broken" in self.path:
      reply = {"error": "no such model"}
    data = json.dumps(reply).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args):
    pass


@pytest.fixture
def server():
  _Stub.asked = []
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stub) as found:
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    thread.join()


def _run_tool(monkeypatch, *args):
  monkeypatch.setattr("sys.argv", [TOOL, *args])
  with pytest.raises(SystemExit) as caught:
    runpy.run_path(TOOL, run_name="__main__")
  return caught.value.code or 0


def test_tool_asks_and_merges(server, tmp_path, monkeypatch, capsys):
  out = tmp_path / "more.json"
  monkeypatch.setenv("MY_KEY", "sesame")
  args = ("--endpoint", f"{server}/v1", "--model", "m", "--out", str(out))
  options = ("--ask", "color", "--ask", "hair_style", "--api_key_env", "MY_KEY")
  assert _run_tool(monkeypatch, *args, *options) == 0
  paths, keys, bodies = zip(*_Stub.asked)
  assert set(paths) == {"/v1/chat/completions"}
  assert set(keys) == {"Bearer sesame"}
  questions = [body["messages"][0]["content"] for body in bodies]
  assert questions[0].startswith("Please list specific color names?")
  assert len(questions) == 3 and bodies[0]["model"] == "m"
  merged = vocabulary.load(out)
  before = vocabulary.default()
  assert merged.raw["color"] == [*before.raw["color"], "sea green"]
  assert merged.raw["hair_style"]["man"][-1] == "mohawk"
  assert merged.raw["hair_style"]["woman"][-1] == "crown braid"
  assert merged.digest != before.digest
  said = capsys.readouterr().out
  assert "color: 1 of 3 added" in said
  assert "not 'gucci red': it holds the forbidden word 'gucci'" in said
  # The file that is there is not overwritten.
  assert _run_tool(monkeypatch, *args) == 2
  assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
  "endpoint,words",
  [
    ("{server}/broken", "gave no answer"),
    ("{server}/silent", "gave no answer (TypeError"),
    ("http://127.0.0.1:port/v1", "gave no answer"),
    ("nowhere", "gave no answer"),
  ],
)
def test_tool_says_what_went_wrong(
  server, tmp_path, monkeypatch, capsys, endpoint, words
):
  out, endpoint = tmp_path / "more.json", endpoint.format(server=server)
  args = ("--endpoint", endpoint, "--model", "m", "--out", str(out))
  assert _run_tool(monkeypatch, *args) == 2
  assert words in capsys.readouterr().err
  assert not out.exists()


def test_tool_asks_nothing_where_it_cannot_write(
  server, tmp_path, monkeypatch, capsys
):
  out = tmp_path / "no" / "more.json"
  args = ("--endpoint", f"{server}/v1", "--model", "m", "--out", str(out))
  assert _run_tool(monkeypatch, *args) == 2
  assert "exists, or has no folder" in capsys.readouterr().err
  assert not _Stub.asked
