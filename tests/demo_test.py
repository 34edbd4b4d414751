"""What the demo's report shows of the way from a prompt to pictures."""

import base64
import re
import types

import cv2
import numpy as np

from dppp_jax import demo
from dppp_jax.geneperson import canvas, maker

_LAYOUT = canvas.Layout(rows=2, cols=3, cell=(96, 48), multiple=16)


class _Maker:
  """Makes people of noise; the second cell is always thrown away."""

  layout = _LAYOUT

  def steps(self, pids):
    return map(self._steps, pids)

  def _steps(self, pid):
    rng = np.random.default_rng(pid)
    draw = lambda *shape: rng.integers(0, 256, shape, np.uint8)
    cells = draw(6, 96, 48, 3)
    plan = types.SimpleNamespace(
      prompt=f"person <{pid}>", skeletons=draw(*_LAYOUT.size, 3)
    )
    return maker.Steps(
      plan,
      canvas.join(cells, _LAYOUT),
      cells,
      draw(6, 96, 48),
      [None, "blurred", None, None, None, None],
      {i: draw(96, 48, 3) for i in (0, 2, 3, 4, 5)},
    )


def test_the_story_shows_skeletons_canvas_mattes_and_pictures():
  section = demo._story(_Maker(), [4, 7])
  pictures = re.findall(r"base64,([^\"]+)\"", section.body)
  assert len(pictures) == 2
  assert "person &lt;4&gt;" in section.body and "<4>" not in section.body
  for pid, text in zip((4, 7), pictures, strict=True):
    data = np.frombuffer(base64.b64decode(text), np.uint8)
    shown = cv2.imdecode(data, cv2.IMREAD_COLOR)[::2, ::2, ::-1]
    (person,) = _Maker().steps([pid])
    skeletons, drawn, mattes, fused = np.split(shown, 4, axis=1)
    np.testing.assert_array_equal(skeletons, person.plan.skeletons)
    np.testing.assert_array_equal(drawn, person.canvas)
    cells = canvas.cut(mattes, _LAYOUT)
    np.testing.assert_array_equal(cells[..., 0], person.alpha)
    for i, cell in enumerate(canvas.cut(fused, _LAYOUT)):
      want = person.pictures.get(i, np.full((96, 48, 3), 255))
      np.testing.assert_array_equal(cell, want)
