"""PTL and PSD against their equations, and every switch of Tables IV to VI."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax import cli, errors, trees
from dppp_jax.data import source as source_lib
from dppp_jax.data import transforms
from dppp_jax.methods import dppp, prompts
from dppp_jax.models import clip, heads, inversion
from dppp_jax.train import loop, losses, optim
from dppp_jax.train import stage as stage_lib

_P, _K, _H, _W = 3, 2, 24, 16
_LABELS = np.repeat(np.arange(_P), _K)
_CONFIG = clip.Config(
  vision=clip.VisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
  ),
  text=clip.TextConfig(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
    bos_token_id=38,
    eos_token_id=39,
  ),
  projection_dim=10,
)
_OPTIONS = dppp.Options(
  num_styles=5,
  num_selected=2,
  style_layers=1,
  style_hidden=14,
  content_hidden=14,
  projector_hidden=14,
  ptl_epochs=1,
  psd_epochs=1,
)


class Tokenizer:
  """One id for each letter pair that a word may be: enough for a prompt."""

  bos_token_id, eos_token_id, all_special_ids = 38, 39, (38, 39)

  def __call__(self, word, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [sum(word.encode()) % 37]}


def fill(shapes, seed):
  """Random leaves of a tree of shapes: no zero or one hides a mistake."""
  rng = np.random.default_rng(seed)
  leaves = {}
  for name, x in trees.flatten(shapes).items():
    leaf = 0.3 * rng.normal(size=x.shape) + name.endswith("scale")
    leaves[name] = np.float32(np.abs(leaf) if name.endswith("var") else leaf)
  return trees.unflatten(leaves)


@pytest.fixture
def forgotten():
  """Forgets the programs of earlier tests: with these they take gigabytes."""
  jax.clear_caches()


@functools.cache
def clip_params():
  return fill(clip.param_shapes(_CONFIG), 0)


@functools.cache
def make(options=_OPTIONS, dtype="float32"):
  return dppp.stages(
    _CONFIG,
    clip_params(),
    Tokenizer(),
    num_classes=7,
    batches=stage_lib.PK(_P, _K),
    augment=transforms.Augment(pad=1),
    options=options,
    dtype=jnp.dtype(dtype),
  )


def shapes_of(options=_OPTIONS):
  """Returns (params, collections) of each stage, without a compilation."""
  found, state = [], ({}, {})
  for stage in make(options):
    state = jax.eval_shape(stage.init, *state, jax.random.key(0))
    found.append(state)
  return found


@functools.cache
def states(options=_OPTIONS):
  params, collections = (fill(tree, 1) for tree in shapes_of(options)[-1])
  params["clip"] = clip_params()
  return [(params, collections)] * 2


def change(**kwargs):
  return dataclasses.replace(_OPTIONS, **kwargs)


def make_batch(dtype=np.float32):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(_P * _K, _H, _W, 3))
  return {"image": images.astype(dtype), "label": _LABELS}


def value(options=_OPTIONS, *, number=0, state=None, rng=0):
  """Returns (loss, aux), run op by op: that shares compilations."""
  params, collections = state or states()[number]
  return make(options)[number].loss(
    params, collections, make_batch(), jax.random.key(rng)
  )


def norm_logits(params, x):
  """BNNeck in training mode, by hand."""
  x = np.asarray(x)
  x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  return (x * params["norm"]["scale"]) @ params["classifier"]["kernel"]


def encode(params, sentence_ids, slots, words):
  """Text features of ids in which the words stand in the slots."""
  tower, variables = clip.TextTower(_CONFIG.text), {"params": params["clip"]}
  tokens = tower.apply(variables, jnp.array([sentence_ids]), method="embed")
  tokens = np.repeat(np.asarray(tokens), len(words), axis=0)
  for i, slot in enumerate(slots):
    tokens[:, slot] = words[:, i]
  return tower.apply(
    variables, embeddings=tokens, eot=len(sentence_ids) - 1
  ).projected


def by_hand(params):
  """The features of both stages, module by module after Eq. 1 to 5 and 14."""
  image = clip.VisionTower(_CONFIG.vision).apply(
    {"params": params["clip"]}, make_batch()["image"], patch_blocks=(1,)
  )
  v_g = image.projected
  apply = lambda module, name, *x: module.apply({"params": params[name]}, *x)
  c = apply(
    inversion.ContentInversion(12, hidden=14), "content_inversion", v_g
  )[:, None]
  extractor = inversion.StyleExtractor(
    10, num_tokens=5, num_selected=2, num_layers=1
  )
  s = apply(extractor, "style", image.patches[1], v_g)
  s = apply(inversion.StyleInversion(12, hidden=14), "style_inversion", s)
  word = lambda w: sum(w.encode()) % 37
  ids = lambda text: [38, *(word(w) for w in text.split()), 39]
  found = {
    "x11": image.penultimate_cls,
    "x12": image.cls,
    "v_g": v_g,
    "t_sc": encode(
      params,
      ids("a X X style of a X person"),
      (2, 3, 7),
      np.concatenate([s, c], axis=1),
    ),
    "t_c": encode(params, ids("a photo of a X person"), (5,), c),
  }
  if "projector" in params:
    found["v_c"] = apply(heads.Projector(10, hidden=14), "projector", v_g)
  return found


def test_ptl_is_equation_13():
  params = states()[0][0]
  x = by_hand(params)
  id_loss = sum(
    losses.cross_entropy(norm_logits(params[neck], x[name]), _LABELS)
    for neck, name in (("neck_cls", "x12"), ("neck_projected", "v_g"))
  )
  tri_img = sum(losses.triplet(x[k], _LABELS) for k in ("x11", "x12", "v_g"))
  sup_con = losses.sup_con(x["v_g"], x["t_sc"], _LABELS)
  sup_con += losses.sup_con(x["t_sc"], x["v_g"], _LABELS)
  tri_txt = losses.triplet(x["t_c"], _LABELS, squared=True)
  loss, aux = value()
  metrics = aux.metrics
  for name, expected in {
    "id": id_loss,
    "tri_img": tri_img,
    "sup_con": sup_con,
    "tri_txt": tri_txt,
  }.items():
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)
  total = id_loss + tri_img + sup_con + tri_txt
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["acc_i2t"],
    losses.retrieval_accuracy(x["v_g"], x["t_sc"], _LABELS),
  )
  assert {"acc_cls", "acc_projected"} <= set(metrics)
  assert all(jnp.shape(x) == () for x in metrics.values())


def test_psd_is_equation_16():
  params = states()[1][0]
  x = by_hand(params)
  logits = norm_logits(params["neck_content"], x["v_c"])
  expected = losses.triplet(x["v_c"], _LABELS)
  expected += losses.cross_entropy(logits, _LABELS)
  sup_con = losses.sup_con(x["v_c"], x["t_c"], _LABELS)
  sup_con += losses.sup_con(x["t_c"], x["v_c"], _LABELS)
  loss, aux = value(number=1)
  np.testing.assert_allclose(aux.metrics["sup_con"], sup_con, rtol=1e-5)
  np.testing.assert_allclose(loss, expected + sup_con, rtol=1e-5)
  np.testing.assert_allclose(
    aux.metrics["acc_content"], losses.accuracy(logits, _LABELS)
  )


@pytest.mark.parametrize(
  ("number", "weight", "terms"),
  [
    (0, "sup_con_weight", ("sup_con",)),
    (0, "reid_weight", ("tri_img", "id")),
    (0, "tri_txt_weight", ("tri_txt",)),
    (1, "psd_reid_weight", ("tri_img", "id")),
    (1, "psd_sup_con_weight", ("sup_con",)),
  ],
)
def test_each_row_of_table_iv_drops_one_term(number, weight, terms):
  state = states()[number]
  total, aux = value(number=number)
  term = sum(aux.metrics[name] for name in terms)
  less, less_aux = value(change(**{weight: 0.0}), number=number, state=state)
  np.testing.assert_allclose(less, total - term, rtol=1e-5)
  assert not set(terms) & set(less_aux.metrics)
  half, _ = value(change(**{weight: 0.5}), number=number, state=state)
  np.testing.assert_allclose(half, total - term / 2, rtol=1e-5)


def test_modules_that_no_loss_reads_are_not_made():
  made = lambda **kwargs: set(shapes_of(change(**kwargs))[0][0])
  assert made() == {
    "clip",
    "content_inversion",
    "style",
    "style_inversion",
    "neck_cls",
    "neck_projected",
  }
  # Table IV a.
  assert made(reid_weight=0.0, tri_txt_weight=0.0) == {
    "clip",
    "content_inversion",
    "style",
    "style_inversion",
  }
  # Table V, the generic prompt.
  assert made(prompt="generic", tri_txt_weight=0.0, psd_epochs=0) == {
    "clip",
    "neck_cls",
    "neck_projected",
  }
  assert set(shapes_of()[1][0]) == made() | {"projector", "neck_content"}


def test_table_v_changes_the_text_alone():
  params = states()[0][0]
  x = by_hand(params)
  content, aux = value(change(prompt="content"), state=states()[0])
  expected = losses.symmetric_sup_con(x["v_g"], x["t_c"], _LABELS)
  np.testing.assert_allclose(aux.metrics["sup_con"], expected, rtol=1e-5)
  full, full_aux = value()
  gap = full_aux.metrics["sup_con"] - expected
  np.testing.assert_allclose(content, full - gap, rtol=1e-5)
  options = change(prompt="generic", tri_txt_weight=0.0, psd_epochs=0)
  _, aux = value(options, state=states()[0])
  ids = prompts.generic(Tokenizer()).ids
  text = encode(params, list(ids), (), np.zeros((1, 0, 12)))
  text = jnp.repeat(text, _P * _K, axis=0)
  expected = losses.symmetric_sup_con(x["v_g"], text, _LABELS)
  np.testing.assert_allclose(aux.metrics["sup_con"], expected, rtol=1e-5)
  # One text for all pictures: no column of Eq. 7 differs.
  np.testing.assert_allclose(
    losses.sup_con(x["v_g"], text, _LABELS), np.log(_P * _K), rtol=1e-5
  )


def test_table_vi_and_the_order_of_styles():
  state = states()[0]
  sup_con = lambda **kwargs: float(
    value(change(**kwargs), state=state)[1].metrics["sup_con"]
  )
  found = {
    "k2": sup_con(),
    "k3": sup_con(num_selected=3),
    "all": sup_con(num_selected=5),
    "all, by slot": sup_con(num_selected=5, style_order="slot"),
    "last": sup_con(style_source="last"),
    "stop": sup_con(full_stop=True),
    "sigmoid": sup_con(style_sigmoid=True),
    "cosine": sup_con(similarity="cosine", temperature=0.07),
  }
  values = list(found.values())
  assert len({round(v, 7) for v in values}) == len(values), found


def test_options_of_the_losses():
  state = states()[0]
  metrics = lambda **kwargs: value(change(**kwargs), state=state)[1].metrics
  x = by_hand(state[0])
  raw = [x[k] for k in ("x11", "x12", "v_g")]
  for given, expected in (
    ({"margin": 0.7}, {"margin": 0.7}),
    ({"soft_margin": True}, {"margin": "soft"}),
    ({"squared": True}, {"squared": True}),
  ):
    tri_img = sum(losses.triplet(f, _LABELS, **expected) for f in raw)
    np.testing.assert_allclose(metrics(**given)["tri_img"], tri_img, rtol=1e-5)
  tri_txt = losses.triplet(x["t_c"], _LABELS, margin=0.9)
  np.testing.assert_allclose(
    metrics(text_margin=0.9, text_squared=False)["tri_txt"], tri_txt, rtol=1e-5
  )
  full, aux = value()
  less, _ = value(change(id_weight=0.25), state=state)
  np.testing.assert_allclose(less, full - 0.75 * aux.metrics["id"], rtol=1e-5)
  assert metrics(label_smoothing=0.0)["id"] != aux.metrics["id"]


def test_dropout_is_the_only_chance_in_the_loss():
  assert value(rng=0)[0] == value(rng=1)[0]
  options = change(style_dropout=0.5)
  assert value(options, rng=0)[0] != value(options, rng=1)[0]
  assert value(options, number=1, rng=0)[0] == value(options, number=1)[0]


@pytest.mark.usefixtures("forgotten")
def test_ptl_gradient_in_float64():
  """Finite differences along a random direction of all trainables."""
  with jax.enable_x64(True):
    stages = make(_OPTIONS, "float64")
    params, collections = jax.tree.map(
      lambda x: np.asarray(x, float), states()[0]
    )
    trainable, frozen, _ = optim.split(params, stages[0].rules)

    @jax.jit
    @jax.value_and_grad
    def loss(flat):
      tree = trees.unflatten({**flat, **frozen})
      key = jax.random.key(0)
      return stages[0].loss(tree, collections, make_batch(float), key)[0]

    rng = np.random.default_rng(0)
    step = {k: 1e-6 * rng.normal(size=x.shape) for k, x in trainable.items()}
    at = lambda sign: loss(
      {k: x + sign * step[k] for k, x in trainable.items()}
    )
    grads = at(0)[1]
    change_of = sum((grads[k] * step[k]).sum() for k in grads)
    np.testing.assert_allclose(change_of, (at(1)[0] - at(-1)[0]) / 2, rtol=1e-5)
    for name, grad in grads.items():
      # A key's bias shifts a whole row of the softmax; the position table
      # and all the rest must learn.
      if not name.endswith("k_proj/bias"):
        assert np.abs(grad).max() > 1e-12, name


def test_psd_gradient_is_zero_outside_of_the_projector():
  stages = make()
  params, collections = states()[1]
  grads = jax.jit(
    jax.grad(
      lambda p: stages[1].loss(p, collections, make_batch(), jax.random.key(0))[
        0
      ]
    )
  )(params)
  learns = set()
  for name, grad in trees.flatten(grads).items():
    if np.asarray(grad).any():
      learns.add(name.split("/")[0])
  assert learns == {"projector", "neck_content"}


def test_rates_by_name():
  rates = [
    trees.match(trees.flatten(params), stage.rules)
    for stage, (params, _) in zip(make(), shapes_of(), strict=True)
  ]
  by_module = [{}, {}]
  for i in (0, 1):
    for name, rate in rates[i].items():
      parts = name.split("/")
      key = "/".join(parts[:2]) if parts[0] == "clip" else parts[0]
      by_module[i].setdefault(key, set()).add(rate)
  assert by_module[0] == {
    "clip/vision_model": {5e-6},
    "clip/visual_projection": {5e-6},
    "clip/text_model": {None},
    "clip/text_projection": {None},
    "clip/logit_scale": {None},
    "content_inversion": {5e-5},
    "style": {5e-5},
    "style_inversion": {5e-5},
    "neck_cls": {5e-5},
    "neck_projected": {5e-5},
  }
  trained = {k for k, v in by_module[1].items() if v == {5e-5}}
  assert trained == {"projector", "neck_content"}
  assert {r for v in by_module[1].values() for r in v} == {None, 5e-5}
  rules = make(change(train_encoder=False))[0].rules
  frozen = trees.match(trees.flatten(shapes_of()[0][0]), rules)
  for name, rate in frozen.items():
    assert rate == (None if name.startswith("clip/") else 5e-5), name


def test_schedule_counts_as_clip_reid():
  schedule = make(dppp.Options())[0].schedule
  factors = [schedule(epoch, 0.0) for epoch in (1, 14, 15, 19, 20)]
  np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1, 0.01], rtol=1e-12)
  options = change(warmup_epochs=10)
  assert make(options)[0].schedule(1, 0.0) == pytest.approx(0.19)


def test_statistics_of_a_content_batch_norm_stop_with_ptl():
  options = change(content_batch_norm=True)
  state = states(options)[0]

  def changed(number):
    aux = value(options, number=number, state=state)[1]
    after = trees.flatten(aux.collections["batch_stats"])
    before = trees.flatten(state[1]["batch_stats"])
    assert before.keys() == after.keys()
    return {
      name.split("/")[0]
      for name, x in before.items()
      if not np.array_equal(x, after[name])
    }

  assert changed(0) == {"content_inversion", "neck_cls", "neck_projected"}
  assert changed(1) == {"neck_content"}


def test_bfloat16_stays_near():
  stages = make(_OPTIONS, "bfloat16")
  loss, aux = jax.eval_shape(
    stages[0].loss, *states()[0], make_batch(), jax.random.key(0)
  )
  assert loss.dtype == jnp.float32
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(aux.collections) == kinds(states()[0][1])
  loss, _ = jax.jit(stages[1].loss)(
    *states()[1], make_batch(), jax.random.key(0)
  )
  np.testing.assert_allclose(loss, value(number=1)[0], rtol=0.03)


@pytest.mark.usefixtures("forgotten")
def test_two_stages_in_the_loop(tmp_path):
  """Real steps: PTL leaves the text tower, PSD everything but the projector."""
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 255, (4 * _K, _H, _W, 3), np.uint8)
  pids = np.repeat(np.arange(4), _K)
  source = source_lib.Arrays(pictures, pids=pids, camids=np.zeros_like(pids))
  seen = {}

  def evaluator(name, params):
    seen[name] = trees.flatten(jax.tree.map(np.array, params))
    return {}

  outcome = loop.fit(
    make(),
    source,
    workdir=tmp_path / "run",
    options=loop.Options(
      image_size=(_H, _W), interpolation="bilinear", num_threads=1
    ),
    evaluator=evaluator,
  )
  assert outcome.finished
  ptl, psd = seen["ptl"], seen["psd"]
  for name, x in trees.flatten({"clip": clip_params()}).items():
    is_vision = name.startswith(("clip/vision_model", "clip/visual_projection"))
    assert np.array_equal(x, ptl[name]) != is_vision, name
  for name, x in ptl.items():
    assert x.tobytes() == psd[name].tobytes(), name
  start = trees.flatten(shapes_of()[1][0])
  new = psd.keys() - ptl.keys()
  assert {name.split("/")[0] for name in new} == {"projector", "neck_content"}
  assert all(psd[name].shape == start[name].shape for name in new)


@pytest.mark.parametrize(
  ("kwargs", "says"),
  [
    ({"prompt": "contents"}, "prompt 'contents': choose one of generic"),
    ({"similarity": "l2"}, "similarity 'l2'"),
    ({"style_order": "rank"}, "style_order"),
    ({"style_source": "first"}, "style_source"),
    ({"num_selected": 6}, "num_selected 6 must lie in 1..num_styles"),
    ({"num_selected": 0}, "num_selected=0: give a whole number"),
    ({"id_weight": -1.0}, "id_weight=-1.0: give a number of at least 0"),
    ({"label_smoothing": 1.5}, "label_smoothing=1.5: give a number from 0"),
    ({"encoder_lr": float("nan")}, "encoder_lr=nan"),
    ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
    ({"decay_epochs": (0,)}, "decay_epochs=(0,)"),
    ({"prompt": "generic"}, "set dppp.tri_txt_weight to 0"),
    (
      {"prompt": "generic", "tri_txt_weight": 0.0},
      "psd_sup_con_weight needs content words",
    ),
    ({"ptl_epochs": 0}, "psd_sup_con_weight needs content words"),
    (
      {"sup_con_weight": 0.0, "reid_weight": 0.0, "tri_txt_weight": 0.0},
      "all weights of PTL are 0",
    ),
    (
      {"psd_reid_weight": 0.0, "psd_sup_con_weight": 0.0},
      "all weights of PSD are 0",
    ),
  ],
)
def test_options_that_contradict_each_other(kwargs, says):
  with pytest.raises(errors.UserError, match="config dppp") as caught:
    change(**kwargs)
  assert says in str(caught.value)
  assert "\n" not in str(caught.value)


def test_options_that_do_not_fit_the_clip():
  with pytest.raises(errors.UserError, match="33 tokens, this CLIP reads 32"):
    make.__wrapped__(change(num_selected=25, num_styles=25))
  with pytest.raises(errors.UserError, match="style_heads 3"):
    make.__wrapped__(change(style_heads=3))


def test_extractor_spec():
  common = {"image_size": (96, 48), "mean": (0.5,) * 3, "std": (0.25,) * 3}
  spec = dppp.extractor_spec(_CONFIG, stage="psd", options=_OPTIONS, **common)
  spec = json.loads(json.dumps(spec))
  assert spec["feature"] == "content"
  assert spec["projection_dim"] == 10
  assert spec["image_size"] == [96, 48]
  assert spec["std"] == [0.25] * 3
  assert spec["interpolation"] == "bilinear"
  assert clip.VisionConfig(**spec["vision"]) == _CONFIG.vision
  made = heads.Projector(**spec["projector"]).init(
    jax.random.key(0), jnp.zeros((1, 10))
  )["params"]
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(made) == shapes(states()[1][0]["projector"])
  spec = dppp.extractor_spec(_CONFIG, stage="ptl", options=_OPTIONS, **common)
  assert (spec["feature"], spec["projector"]) == ("projected", None)
  spec = dppp.extractor_spec(_CONFIG, stage="psd", feature="concat", **common)
  assert (spec["feature"], spec["projector"]) == ("concat", None)
  with pytest.raises(errors.UserError, match="psd_epochs above 0"):
    dppp.extractor_spec(_CONFIG, stage="ptl", feature="content", **common)


def test_configs():
  """The default is the paper's recipe, word by word; presets are valid."""
  config = cli.load_config("configs/dppp.py")
  assert set(config.dppp) == {f.name for f in dataclasses.fields(dppp.Options)}
  assert dppp.Options(**config.dppp) == dppp.Options()
  assert (config.train.P, config.train.K) == (8, 8)
  assert config.data.image_size == (256, 128)
  augment = transforms.Augment(**config.augment)
  assert augment == transforms.Augment()
  for preset in ("mini", "smoke"):
    config = cli.load_config(f"configs/dppp.py:{preset}")
    options = dppp.Options(**config.dppp)
    assert (options.num_styles, options.num_selected) == (24, 6)
    assert config.data.image_size == (96, 48)
    transforms.Augment(**config.augment)
  with pytest.raises(errors.UserError, match="unknown preset 'big'"):
    cli.load_config("configs/dppp.py:big")
