"""The vocabulary, the people drawn from it, and the tool that extends it."""

import collections
import copy
import http.server
import itertools
import json
import pathlib
import re
import runpy
import threading

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import dataset, outfits, prompts, vocabulary

ROOT = pathlib.Path(__file__).parents[1]
TOOL = str(ROOT / "data_tools/expand_vocabulary.py")


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
  for word in (*words.values("body"), *words.values("hair_length")):
    assert "build" not in word and word != "shaved"
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
    "skin": "warm beige", "build": "maternal",
  }  # fmt: skip
  person = prompts.Person(0, words)
  assert person.prompt() == (
    "woman, walking, multiple views of the same character, multiple views,"
    " front view, side view, back view, simple background, pink plaid shirt,"
    " black distressed jeans, white loafers, day, sunshine, slim figure,"
    " maternal build body, dark brown waist-length straight hair,"
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


def test_all_people_of_a_small_vocabulary_differ(raw):
  """Every place is somebody's, in no order, and none is given twice."""
  for key in ("upper_type", "lower_type", "footwear_type"):
    raw[key] = {g: words[:2] for g, words in raw[key].items()}
  raw["color"] = raw["color"][:3]
  raw["rules"] = [
    {
      "why": "no red jeans",
      "when": {"lower_type": ["jeans"]},
      "not": {"lower_color": raw["color"][:1]},
    }
  ]
  drawn = prompts.People(1, vocabulary=vocabulary.Vocabulary(raw))
  # 2 x 2 x 2 types of each gender, which share 3 x 2 x 3 colours or more.
  assert drawn.capacity == 2 * 8 * 9
  people = [drawn[pid].words for pid in range(drawn.capacity)]
  outfits = {tuple(words[key] for key in vocabulary.OUTFIT) for words in people}
  assert len(outfits) == len(people)
  for words in people:
    is_jeans = words["lower_type"] == "jeans"
    assert not (is_jeans and words["lower_color"] == raw["color"][0])
  numbers = [drawn._permute(i, drawn.capacity) for i in range(drawn.capacity)]
  assert sorted(numbers) == list(range(drawn.capacity))
  # Far from their places: a third of the range on average.
  moved = sum(abs(a - b) for a, b in enumerate(numbers)) / drawn.capacity
  assert 0.28 < moved / drawn.capacity < 0.39
  with pytest.raises(errors.UserError, match="extend it"):
    drawn[drawn.capacity]


@pytest.mark.parametrize("gender", ["woman", "man"])
def test_every_type_has_its_even_share(people, gender):
  """By construction in the weights, and so among the people."""
  shares = outfits.shares(vocabulary.default(), gender)
  for words in shares.values():
    np.testing.assert_allclose(list(words.values()), 1, atol=0.03)
  mine = [p.words for p in people if p.words["gender"] == gender]
  for key in outfits.TYPES:
    counts = collections.Counter(words[key] for words in mine)
    even = len(mine) / len(shares[key])
    # Poisson: of 13 expected, fewer than 3 once in a thousand.
    assert all(even / 5 < counts[word] < 2.5 * even for word in shares[key])
  hair = outfits.balanced(vocabulary.default(), outfits.HAIR, gender)
  for key in outfits.HAIR:
    found = dict.fromkeys(vocabulary.default().values(key, gender), 0.0)
    for words, weight in zip(hair.words, hair.weights, strict=True):
      found[words[key]] += weight * len(found)
    assert all(0.6 < share < 1.5 for share in found.values())


def test_weights_are_even_where_rules_let_them():
  """Against the known answers of small tables."""
  allowed = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
  weights = outfits.balance(allowed)
  np.testing.assert_allclose(weights.sum(0), 1 / 3, atol=1e-9)
  np.testing.assert_allclose(weights.sum(1), 1 / 3, atol=1e-9)
  assert not weights[~allowed].any()
  # Proportional fitting keeps cross-ratios: of the full part all are 1.
  ratio = weights[0, 0] * weights[1, 1] / (weights[0, 1] * weights[1, 0])
  np.testing.assert_allclose(ratio, 1, rtol=1e-9)
  np.testing.assert_allclose(outfits.balance(np.ones((2, 3), bool)), 1 / 6)
  # Two of three rows go with one column alone: nobody gets an even share.
  weights = outfits.balance(np.array([[1, 0], [1, 0], [1, 1]], bool))
  assert 0.5 < weights.sum(0)[0] < 2 / 3 and weights.sum(1)[2] > 1 / 3


@pytest.mark.parametrize(
  "types",
  [
    {"upper_type": coat, "lower_type": shorts}
    for coat in ("trench coat", "raincoat", "blazer", "wool coat")
    for shorts in ("shorts", "denim shorts")
  ]
  + [
    {"upper_type": "suit jacket", "lower_type": "cargo shorts"},
    {"upper_type": "blazer", "footwear_type": "flip-flops"},
    {"upper_type": "blazer", "footwear_type": "sandals"},
    {"upper_type": "suit jacket", "footwear_type": "rain boots"},
    {"upper_type": "midi dress", "footwear_type": "hiking boots"},
    {"upper_type": "raincoat", "footwear_type": "flip-flops"},
    {"upper_type": "parka", "footwear_type": "sandals"},
    {"upper_type": "hoodie", "lower_type": "dress pants"},
    {"lower_type": "tights", "footwear_type": "sandals"},
    {"lower_type": "track pants", "footwear_type": "oxford shoes"},
  ],
  ids=lambda types: "+".join(types.values()),
)
def test_nobody_wears_what_does_not_go_together(types):
  words = vocabulary.default()
  assert words.objection(types) is not None
  for gender in words.genders:
    for worn in outfits.balanced(words, outfits.TYPES, gender).words:
      assert not types.items() <= worn.items()


def test_plausible_combinations_are_those_without_objections():
  """All at once, as one by one."""
  words = vocabulary.default()
  rng = np.random.default_rng(0)
  for keys, known in (
    (outfits.TYPES, {"gender": "man"}),
    (outfits.PATTERNS, {"upper_type": "parka", "lower_type": "jeans"}),
    (("upper_pattern", "lower_type"), {"upper_type": "sweater dress"}),
    (outfits.HAIR, {"gender": "woman"}),
  ):
    gender = known.get("gender")
    mask = words.plausible(keys, known, gender=gender)
    lists = [words.values(key, gender) for key in keys]
    assert mask.shape == tuple(map(len, lists))
    for _ in range(300):
      at = tuple(int(rng.integers(size)) for size in mask.shape)
      picked = {k: v[i] for k, v, i in zip(keys, lists, at, strict=True)}
      # Of known words alone no rule is asked.
      assert mask[at] == (words.objection({**known, **picked}) is None)


def test_bald_people_have_no_hair(people):
  bald = [p for p in people if p.words["hair_style"] == "bald"]
  assert bald
  for person in bald:
    parts = person.prompt().split(", ")
    assert "bald" in parts and not any("hair" in part for part in parts)
    assert person.attributes["hair_style"] == "bald"
    assert person.attributes["hair_color"] == "none"
    assert person.attributes["hair_length"] == "none"
    whole = person.prompt("a {gender} of {skin} skin with {hair_color} hair")
    assert "none" not in whole and "  " not in whole
    assert person.prompt("{hair_color} {hair_length}, {gender}") == "man"
  for person in people:
    if person not in bald:
      assert "none" not in person.words.values()
      assert f"{person.words['hair_texture']} hair, " in person.prompt()
  assert {
    p.words["hair_texture"]
    for p in people
    if p.words["hair_style"] == "cornrows"
  } == {"curly", "coily", "thick"}


def test_every_prompt_has_both_words_for_the_body(people):
  for person in people:
    build = {"woman": "maternal", "man": "male"}[person.words["gender"]]
    assert f" figure, {build} build body, " in person.prompt()


def test_no_prompt_is_longer_than_clip_reads():
  """The longest words of every slot together, by CLIP's own counts of them."""
  counts = json.loads((ROOT / "tests/clip_token_counts.json").read_text())
  size = lambda text: sum(counts[w] for w in re.findall(r"[^\s,]+|,", text))
  words = vocabulary.default()
  fixed = size(re.sub(r"\{\w+\}", " ", prompts.TEMPLATE))
  for gender in words.genders:
    longest = lambda key, gender=gender: max(
      map(size, words.values(key, gender))
    )
    total = fixed + size(gender) + sum(map(longest, words.keys))
    for part in ("upper", "lower", "footwear"):
      kind, pattern = f"{part}_type", f"{part}_pattern"
      total += longest(f"{part}_color") + max(
        size(a) + (0 if b == "plain" else size(b))
        for a in words.values(kind, gender)
        for b in words.values(pattern, gender)
        if words.objection({"gender": gender, kind: a, pattern: b}) is None
      )
    assert total + 2 <= 77  # Both end marks.
  for light in words.values("lighting"):
    for place in prompts.places(light):
      assert size(prompts.background(place, light)) + 2 <= 77


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
  (0, "upper_type"): "t-shirt",
  (0, "lower_color"): "coral",
  (1, "hair_style"): "undercut",
  (6640, "upper_pattern"): "striped",
  (6640, "footwear_type"): "hiking boots",
  (6640, "skin"): "fair",
}


def test_rules_hold_for_everybody(people):
  words = vocabulary.default()
  for person in people:
    gender = person.words["gender"]
    assert words.objection(person.words) is None
    for key, word in person.words.items():
      assert word in (*words.values(key, gender), "none")
  assert 0.4 < sum(p.words["gender"] == "man" for p in people) / 800 < 0.6
  for key in ("upper_color", "skin", "lighting", "body"):
    used = {p.words[key] for p in people} - {"none"}
    assert used == set(words.values(key))
  for person in people:
    if person.words["lower_type"] == "tights":
      assert "dress" in person.words["upper_type"] or (
        person.words["upper_type"] == "tunic"
      )


@pytest.mark.parametrize(
  "words,why",
  [
    ({"upper_pattern": "floral", "lower_pattern": "plaid"}, "loud"),
    ({"upper_type": "parka", "lower_type": "shorts"}, "shorts"),
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
  words = ["sea green", "Blacks", "sea-green", "na-vy", "nike red", long]
  merged, refused = vocabulary.merge(raw, "color", words)
  assert merged["color"] == [*before["color"], "sea green"]
  assert raw == before
  assert set(refused) == set(words[1:])
  assert "already" in refused["sea-green"]
  assert "already" in refused["na-vy"]
  assert "forbidden" in refused["nike red"]
  assert "longer" in refused[long]
  merged, _ = vocabulary.merge(raw, "body", ["lanky figure"], gender="man")
  assert "lanky figure" in merged["body"]["man"]
  assert "lanky figure" not in merged["body"]["woman"]
  _, refused = vocabulary.merge(
    raw, "upper_type", ["school uniform"], gender="man"
  )
  assert "forbidden" in refused["school uniform"]


def test_added_words_obey_the_rules_of_their_kind(raw):
  """A word is of the kind that lists its longest ending."""
  added = {
    "upper_type": ["quilted parka", "cream dinner jackets", "lace midi dress"],
    "lower_type": ["linen shorts", "faded denim shorts"],
    "footwear_type": ["suede desert boots", "rubber flip flops"],
    "upper_pattern": ["small gingham check"],
    "hair_style": ["long braid"],
  }
  for key, words in added.items():
    gender = None if key == "upper_pattern" else "man"
    raw, refused = vocabulary.merge(raw, key, words, gender=gender)
    assert not refused
  words = vocabulary.Vocabulary(raw)
  for upper, lower in (
    ("quilted parka", "linen shorts"),
    ("cream dinner jackets", "jeans"),
    ("lace midi dress", "trousers"),
  ):
    assert words.objection({"upper_type": upper, "lower_type": lower})
  fine = {"upper_type": "t-shirt", "lower_type": "faded denim shorts"}
  assert words.objection(fine) is None
  washed = {"lower_type": "linen shorts", "lower_pattern": "acid wash"}
  assert "denim" in words.objection(washed)
  beach = {"upper_type": "blazer", "footwear_type": "rubber flip flops"}
  assert "blazers" in words.objection(beach)
  check = {"upper_pattern": "small gingham check", "lower_pattern": "floral"}
  assert "loud" in words.objection(check)
  short = {"hair_length": "short", "hair_style": "long braid"}
  assert "braid" in words.objection(short)
  unworn = outfits.unworn(words, outfits.TYPES, "man")
  assert unworn == [("upper_type", "lace midi dress")]  # Men have no tights.
  with pytest.raises(
    errors.UserError, match=r"'lace midi dress' .man.: the rul"
  ):
    outfits.shares(words, "man")
  raw["upper_type"]["man"].remove("lace midi dress")
  words = vocabulary.Vocabulary(raw)
  worn = outfits.shares(words, "man")["upper_type"]
  assert all(0.5 < worn[word] < 2 for word in added["upper_type"][:2])
  # What no rule knows is not taken.
  _, refused = vocabulary.merge(raw, "upper_type", ["toga"], gender="man")
  assert "kinds.upper_type" in refused["toga"]


def test_vocabularies_without_kinds_take_any_word(raw):
  kinds = raw.pop("kinds")
  raw["rules"] = []
  raw, refused = vocabulary.merge(raw, "upper_type", ["toga"], gender="man")
  assert not refused
  vocabulary.Vocabulary(raw)
  raw["kinds"] = kinds
  with pytest.raises(
    errors.UserError, match=r"kinds\.upper_type: 'toga' is of"
  ):
    vocabulary.Vocabulary(raw)


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
    (lambda raw: raw.update(kinds=[]), "kinds should be an object"),
    (lambda raw: raw["kinds"].update(skirts={}), "kinds.skirts: there is no"),
    (lambda raw: raw["kinds"].update(skin=[]), "kinds.skin should be an obj"),
    (
      lambda raw: raw["kinds"]["hair_style"].update(bald=3),
      "kinds.hair_style should give a list of words by kind",
    ),
    (
      lambda raw: raw["kinds"]["hair_style"]["loose"].append("bun"),
      "kinds.hair_style: 'bun' is of two kinds",
    ),
    (
      lambda raw: raw["rules"][-1].update(none=["gender"]),
      "says of .'gender'. that somebody has none",
    ),
    (
      lambda raw: raw["rules"][0].update(when={"skin_kind": ["pale"]}),
      "speaks of skin_kind 'pale', which is in no list",
    ),
    (
      lambda raw: raw["rules"][0].update(
        when={"gender": ["man"]}, **{"not": {"upper_color": ["pink"]}}
      ),
      "colours are the same for all",
    ),
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


def test_tool_counts_tokens(tmp_path, monkeypatch, capsys):
  """With the small vocabulary that is shipped; CLIP's is not."""
  tool = str(ROOT / "data_tools/clip_token_counts.py")
  out = tmp_path / "counts.json"
  folder = ROOT / "dppp_jax/assets/mini/clip"

  def run(*args):
    monkeypatch.setattr("sys.argv", [tool, f"--tokenizer={folder}", *args])
    with pytest.raises(SystemExit) as caught:
      runpy.run_path(tool, run_name="__main__")
    return caught.value.code or 0

  assert run(f"--out={out}") == 0
  counts, clips = (
    json.loads(path.read_text())
    for path in (out, ROOT / "tests/clip_token_counts.json")
  )
  assert counts.keys() == clips.keys()
  assert counts["walking"] == clips["walking"] == 1
  assert run(f"--out={out}", "--check") == 0
  assert "agrees" in capsys.readouterr().out
  assert run("--check") == 2
  assert "is not of this tokenizer" in capsys.readouterr().err


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
