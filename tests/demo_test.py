"""What the demo's report shows of the way from a prompt to pictures."""

import base64
import re

import cv2
import numpy as np
import PIL.Image

from dppp_jax import demo


def test_the_story_shows_what_the_generation_drew_with_its_prompts(tmp_path):
  prompts = {str(pid): f"person <{pid}>" for pid in (0, 4, 99)}
  files = [tmp_path / f"steps-{pid:06d}.jpg" for pid in (4, 99)]
  smooth = np.linspace(0, 255, 96 * 48 * 3).reshape(96, 48, 3)
  pictures = [np.uint8(smooth), np.uint8(255 - smooth)]
  for file, picture in zip(files, pictures, strict=True):
    PIL.Image.fromarray(picture).save(file, quality=95)
  section = demo._story(files, prompts)
  shown = re.findall(r"base64,([^\"]+)\"", section.body)
  assert len(shown) == 2
  # Each below its own picture.
  captions = re.findall(r"<figcaption>(.*?)</figcaption>", section.body)
  assert captions == ["person &lt;4&gt;", "person &lt;99&gt;"]
  assert "<4>" not in section.body
  for picture, text in zip(pictures, shown, strict=True):
    data = np.frombuffer(base64.b64decode(text), np.uint8)
    found = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    assert found.shape == (192, 96, 3)
    for dy, dx in np.ndindex(2, 2):  # Twice as large.
      assert np.abs(found[dy::2, dx::2] - picture).mean() < 2
