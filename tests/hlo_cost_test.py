"""The counter of HLO texts, against numbers by hand."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import hlo_cost


def module(entry, *computations, shape="f32[4]"):
  """Returns the text of a module; `entry` are the lines of its entry."""
  body = "\n".join(f"  {line}" for line in entry)
  return "\n\n".join(
    [
      "HloModule jit_f, is_scheduled=true",
      *computations,
      f"ENTRY %main.1 (x.1: {shape}) -> {shape} {{\n{body}\n}}",
    ]
  )


def computation(name, *lines):
  body = "\n".join(f"  {line}" for line in lines)
  return f"%{name} (p: f32[4]) -> f32[4] {{\n{body}\n}}"


def test_a_product_is_counted_with_its_operands_and_its_result():
  found = hlo_cost.count(
    module(
      [
        "%x.1 = bf16[8,32]{1,0} parameter(0)",
        "%y.1 = bf16[32,16]{1,0} parameter(1)",
        "ROOT %dot.1 = f32[8,16]{1,0} dot(%x.1, %y.1),"
        " lhs_contracting_dims={1}, rhs_contracting_dims={0}",
      ]
    )
  )
  assert found.flops == {"bf16": 2 * 8 * 32 * 16}
  assert found.nbytes == 2 * 8 * 32 + 2 * 32 * 16 + 4 * 8 * 16
  assert found.kernels == dict.fromkeys(hlo_cost.KINDS, 0) | {"product": 1}
  assert found.wide_share == 0 and found.unknown_loops == 0


def test_what_is_wide_is_seen_inside_a_fusion():
  # As a gradient does that was taken in float32: bf16 comes in, f32 is
  # multiplied.
  fused = computation(
    "fused",
    "%p.1 = bf16[8,32]{1,0} parameter(0)",
    "%c.1 = f32[8,32]{1,0} convert(%p.1)",
    "%p.2 = f32[32,16]{1,0} parameter(1)",
    "ROOT %d.1 = f32[8,16]{1,0} dot(%c.1, %p.2), lhs_contracting_dims={1},"
    " rhs_contracting_dims={0}",
  )
  found = hlo_cost.count(
    module(
      [
        "%x.1 = bf16[8,32]{1,0} parameter(0)",
        "%y.1 = f32[32,16]{1,0} parameter(1)",
        "%b.1 = f32[32,16]{1,0} bitcast(%y.1)",
        "%f.1 = f32[8,16]{1,0} fusion(%x.1, %b.1), kind=kCustom, calls=%fused,"
        ' metadata={op_name="jit(f)/dot"}',
        "ROOT %n.1 = bf16[8,16]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1},"
        " rhs_contracting_dims={1}",
      ],
      fused,
    )
  )
  both = 2 * 8 * 32 * 16
  assert found.flops == {"f32": both, "bf16": both}
  assert found.wide_share == 0.5
  assert found.works[0].kind == "product"
  assert found.works[0].nbytes == 2 * 8 * 32 + 4 * 32 * 16 + 4 * 8 * 16
  assert found.works[0].op_name == "jit(f)/dot"
  # The same array twice is read once.
  assert found.works[1].nbytes == 2 * 8 * 32 + 2 * 8 * 16


def test_of_what_is_gathered_the_rows_count():
  fused = computation(
    "fused",
    "%p.1 = u8[1000,64]{1,0} parameter(0)",
    "%p.2 = s32[4,1]{1,0} parameter(1)",
    "%g.1 = u8[4,64]{1,0} gather(%p.1, %p.2), offset_dims={1},"
    " collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1,"
    " slice_sizes={1,64}",
    "ROOT %c.1 = f32[4,64]{1,0} convert(%g.1)",
  )
  found = hlo_cost.count(
    module(
      [
        "%x.1 = u8[1000,64]{1,0} parameter(0)",
        "%i.1 = s32[4,1]{1,0} parameter(1)",
        "ROOT %f.1 = f32[4,64]{1,0} fusion(%x.1, %i.1), kind=kLoop,"
        " calls=%fused",
      ],
      fused,
    )
  )
  assert found.nbytes == 4 * 64 + 4 * 4 + 4 * 4 * 64
  assert found.left_out == 1000 * 64 - 4 * 64
  assert found.kernels["fusion"] == 1


@pytest.mark.parametrize(
  ("root", "read"),
  [
    # One column of four is converted, added up, and then sliced off.
    ("f32[64,1]{1,0} slice(%r.1), slice={[0:64], [1:2]}", 2 * 3 * 64),
    ("f32[64,4]{1,0} negate(%r.1)", 2 * 3 * 64 * 4),
  ],
)
def test_of_a_sum_that_is_sliced_the_summed_part_counts(root, read):
  add = computation(
    "add",
    "%a.1 = f32[] parameter(0)",
    "%b.1 = f32[] parameter(1)",
    "ROOT %s.1 = f32[] add(%a.1, %b.1)",
  )
  fused = computation(
    "fused",
    "%p.1 = bf16[3,64,4]{2,1,0} parameter(0)",
    "%c.1 = f32[3,64,4]{2,1,0} convert(%p.1)",
    "%z.1 = f32[] constant(0)",
    "%r.1 = f32[64,4]{1,0} reduce(%c.1, %z.1), dimensions={0}, to_apply=%add",
    f"ROOT %o.1 = {root}",
  )
  shape = root.partition(" ")[0]
  found = hlo_cost.count(
    module(
      [
        "%x.1 = bf16[3,64,4]{2,1,0} parameter(0)",
        f"ROOT %f.1 = {shape} fusion(%x.1), kind=kLoop, calls=%fused",
      ],
      add,
      fused,
    )
  )
  written = 4 * 64 * (1 if "slice" in root else 4)
  assert found.nbytes == read + written


def test_a_conversion_reads_all_of_it():
  fused = computation(
    "fused",
    "%p.1 = bf16[8,4]{1,0} parameter(0)",
    "ROOT %c.1 = f32[8,4]{1,0} convert(%p.1)",
  )
  found = hlo_cost.count(
    module(
      [
        "%x.1 = bf16[8,4]{1,0} parameter(0)",
        "ROOT %f.1 = f32[8,4]{1,0} fusion(%x.1), kind=kLoop, calls=%fused",
      ],
      fused,
    )
  )
  assert found.nbytes == 2 * 32 + 4 * 32


def test_an_update_in_place_writes_the_update():
  fused = computation(
    "fused",
    "%p.1 = f32[10,64]{1,0} parameter(0)",
    "%p.2 = s32[] parameter(1)",
    "%p.3 = f32[64]{0} parameter(2)",
    "%u.1 = f32[1,64]{1,0} bitcast(%p.3)",
    "%z.1 = s32[] constant(0)",
    "ROOT %d.1 = f32[10,64]{1,0} dynamic-update-slice(%p.1, %u.1, %p.2, %z.1)",
  )
  found = hlo_cost.count(
    module(
      [
        "%x.1 = f32[10,64]{1,0} parameter(0)",
        "%i.1 = s32[] parameter(1)",
        "%y.1 = f32[64]{0} parameter(2)",
        "ROOT %f.1 = f32[10,64]{1,0} fusion(%x.1, %i.1, %y.1), kind=kLoop,"
        " calls=%fused",
      ],
      fused,
    )
  )
  assert found.nbytes == 4 + 4 * 64 + 4 * 64


@pytest.mark.parametrize("trips", [5, None])
def test_loops_run_as_often_as_is_known(trips):
  config = ""
  if trips:
    config = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
  body = computation(
    "body",
    "%t.1 = (s32[], f32[8,8]{1,0}) parameter(0)",
    "%g.1 = f32[8,8]{1,0} get-tuple-element(%t.1), index=1",
    "%d.1 = f32[8,8]{1,0} dot(%g.1, %g.1), lhs_contracting_dims={1},"
    " rhs_contracting_dims={0}",
    "%g.0 = s32[] get-tuple-element(%t.1), index=0",
    "ROOT %t.2 = (s32[], f32[8,8]{1,0}) tuple(%g.0, %d.1)",
  )
  condition = computation(
    "condition",
    "%t.3 = (s32[], f32[8,8]{1,0}) parameter(0)",
    "ROOT %c.1 = pred[] constant(true)",
  )
  found = hlo_cost.count(
    module(
      [
        "%x.1 = f32[8,8]{1,0} parameter(0)",
        "%z.1 = s32[] constant(0)",
        "%t.4 = (s32[], f32[8,8]{1,0}) tuple(%z.1, %x.1)",
        "%w.1 = (s32[], /*index=1*/f32[8,8]{1,0}) while(%t.4),"
        f" condition=%condition, body=%body{config}",
        "ROOT %r.1 = f32[8,8]{1,0} get-tuple-element(%w.1), index=1",
      ],
      body,
      condition,
    )
  )
  times = trips or 1
  assert found.flops == {"f32": times * 2 * 8**3}
  assert found.nbytes == times * 2 * 4 * 64
  assert found.kernels["product"] == times
  assert found.unknown_loops == (trips is None)


def test_of_branches_the_largest_counts():
  branch = lambda name, n: computation(
    name,
    f"%q.{n} = f32[{n},8]{{1,0}} parameter(0)",
    f"ROOT %d.{n} = f32[{n},{n}]{{1,0}} dot(%q.{n}, %q.{n}),"
    " lhs_contracting_dims={1}, rhs_contracting_dims={1}",
  )
  found = hlo_cost.count(
    module(
      [
        "%i.1 = s32[] parameter(0)",
        "%a.1 = f32[4,8]{1,0} parameter(1)",
        "%b.1 = f32[6,8]{1,0} parameter(2)",
        "ROOT %c.1 = f32[4,4]{1,0} conditional(%i.1, %a.1, %b.1),"
        " branch_computations={%small, %large}",
      ],
      branch("small", 4),
      branch("large", 6),
    )
  )
  assert found.flops == {"f32": 2 * 6 * 6 * 8}


@pytest.mark.parametrize(
  ("target", "products"), [("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)]
)
def test_attentions_of_cudnn(target, products):
  # 3 examples, 2 heads of 8, 5 queries, 7 keys.
  scores = (
    '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions":'
    ' ["3", "2", "5", "7"], "tuple_shapes": []}'
  )
  found = hlo_cost.count(
    module(
      [
        "%q.1 = bf16[3,5,2,8]{3,2,1,0} parameter(0)",
        "%k.1 = bf16[3,7,2,8]{3,2,1,0} parameter(1)",
        "%a.1 = (bf16[3,2,5,8]{3,1,2,0}, u8[0]{0}) custom-call(%q.1, %k.1,"
        f' %k.1), custom_call_target="__cudnn${target}", backend_config='
        f'{{"cudnn_fmha_backend_config": {{"fmha_scale": 0.1, {scores}}}}}',
        "ROOT %o.1 = bf16[3,2,5,8]{3,1,2,0} get-tuple-element(%a.1), index=0",
      ]
    )
  )
  assert found.flops == {"bf16": products * 2 * (3 * 2 * 5 * 7) * 8}
  assert found.kernels["attention"] == 1
  # Key and value are one array here.
  assert found.nbytes == 2 * (3 * 5 * 2 * 8 + 3 * 7 * 2 * 8 + 3 * 5 * 2 * 8)


@pytest.mark.parametrize(
  ("target", "result", "operands", "labels"),
  [
    ("Forward", "f", "xk", "b01f_o01i->b01f"),
    ("BackwardFilter", "k", "xf", "b01f_o01i->b01f"),
    ("BackwardInput", "x", "fk", "b01f_o01i->b01f"),
  ],
)
def test_convolutions_of_cudnn(target, result, operands, labels):
  # A picture of 10 x 8 and 3 channels; 16 kernels of 3 x 3; 10 x 8 results.
  shapes = {"x": "2,10,8,3", "k": "16,3,3,3", "f": "2,10,8,16"}
  of = lambda name: f"bf16[{shapes[name]}]{{3,2,1,0}}"
  found = hlo_cost.count(
    module(
      [
        f"%a.1 = {of(operands[0])} parameter(0)",
        f"%b.1 = {of(operands[1])} parameter(1)",
        f"%c.1 = ({of(result)}, u8[0]{{0}}) custom-call(%a.1, %b.1),"
        f" window={{size=3x3 pad=1_1x1_1}}, dim_labels={labels},"
        f' custom_call_target="__cudnn$conv{target}"',
        f"ROOT %r.1 = {of(result)} get-tuple-element(%c.1), index=0",
      ]
    )
  )
  assert found.flops == {"bf16": 2 * (2 * 10 * 8) * 16 * 3 * 3 * 3}
  assert found.kernels["convolution"] == 1


def test_products_of_cublas_and_what_is_no_product():
  found = hlo_cost.count(
    module(
      [
        "%a.1 = bf16[8,32]{1,0} parameter(0)",
        "%b.1 = bf16[16,32]{1,0} parameter(1)",
        "%g.1 = (bf16[8,16]{1,0}, s8[0]{0}) custom-call(%a.1, %b.1),"
        ' custom_call_target="__cublas$gemm", backend_config={'
        '"gemm_backend_config":{"dot_dimension_numbers":{'
        '"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["1"]}}}',
        "%r.1 = bf16[8,16]{1,0} get-tuple-element(%g.1), index=0",
        "%t.1 = (bf16[8,4]{1,0}, s32[8,4]{1,0}) custom-call(%r.1),"
        ' custom_call_target="__gpu$TopK"',
        "ROOT %c.1 = bf16[8,16]{0,1} copy(%r.1)",
      ]
    )
  )
  assert found.flops == {"bf16": 2 * 8 * 32 * 16}
  assert found.kernels["product"] == 1 and found.kernels["other"] == 2
  assert [work.name for work in found.top(1)] == ["g.1"]


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo_cost.count("HloModule nothing")
