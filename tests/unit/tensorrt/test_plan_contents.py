"""What is read from the builder's log. The lines are those of TensorRT for RTX 1.7, with fewer tensors."""

from __future__ import annotations

import pytest

from cllm_export.tensorrt.plan_contents import ProfileContents, read_contents

BUFFER = "{{ Name: {}, Dimensions: [{}], Strides: [4099,1], StrideOrder: [1,0], Datatype: {} }}"
KV_LENGTH = 32


def layer(name: str, kind: str, reads: str = "", writes: str = "", *, datatype: str = "Half") -> str:
    """A layer's line. A cache has 48 rows in each of two heads, and what is made of it has S rows."""
    inputs, outputs = (
        BUFFER.format(each, "1,2,48,64" if "present" in each else "1,2,-1,64", datatype) if each else ""
        for each in (reads, writes)
    )
    return f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Outputs: [ {outputs}], TacticName: , StreamId: 0"


def profile_of(*layers: str) -> ProfileContents:
    """The contents of a plan with one profile that has these layers."""
    report = ["Total Activation Memory: 512 bytes", "Total Weights Memory: 1024 bytes"]
    contents = read_contents([*report, "\n".join(("Layers:", *layers))], kv_length=KV_LENGTH)
    assert contents is not None and contents.weight_bytes == 1024
    (profile,) = contents.profiles
    return profile


def test_layers_that_launch_nothing_are_no_kernels():
    profile = profile_of(
        layer("[ShapeHostToDeviceCopy 0]", "ShapeHostToDevice", writes="Shape_0_0"),
        layer("__mye1_0_myl1_0", "shape_call"),
        layer("__mye2_myl1_1", "signal"),
        layer("MatMul_9_myl1_2", "gemm", "a", "b"),
        layer("__mye3_myl1_3", "wait"),
    )
    assert (profile.kernels, profile.host_copies) == (1, 1)


def test_a_kernel_that_only_copies_the_logits_is_counted():
    padded = layer("__myl_FcCast_myl1_1", "runtime_fusion", "rows", "padded")
    assert profile_of(padded, layer("__myl_Slic_myl1_2", "kgen", "padded", "logits [profile 2]")).logits_copies == 1
    assert profile_of(padded, layer("__myl_CastTopk_myl1_2", "kgen", "scores", "logits")).logits_copies == 0
    assert profile_of(padded, layer("__myl_Slic_myl1_2", "kgen", "padded", "hidden")).logits_copies == 0


def test_a_kernel_that_reads_the_cache_only_to_write_it_elsewhere_is_a_copy():
    update = layer("__myl_ScatSlic_myl1_1", "kgen", "present_key.0", "present_key.0")
    attention = layer("_gemm_mha_v2_myl1_3", "kgen", "present_key.0", "c")
    profile = profile_of(update, layer("__myl_SlicMul_myl1_2", "kgen", "present_key.0", "b"), attention)
    assert (profile.cache_copies, profile.attention) == (1, {"gemm_mha_v2": 1})
    assert profile.cache_copy_bytes == 2 * (2 * KV_LENGTH * 64 * 2), "S of the 48 rows are read, and S are written"
    in_fp32 = layer("__myl_SlicMul_myl1_2", "kgen", "present_key.0", "b", datatype="Float")
    assert profile_of(in_fp32).cache_copy_bytes == 2 * (2 * KV_LENGTH * 64 * 4)


@pytest.mark.parametrize(
    ("there", "instead"), [("Half", "Unheard"), ("[1,2,48,64]", "[]"), ("[1,2,48,64]", "[96]"), ("[1,2,-1,64]", "[]")]
)
def test_a_log_with_a_datatype_or_shape_that_no_cache_has_says_nothing_instead_of_a_wrong_figure(there, instead):
    report = ["Total Activation Memory: 512 bytes", "Total Weights Memory: 1024 bytes"]
    copy = layer("__myl_SlicMul_myl1_2", "kgen", "present_key.0", "b")
    assert read_contents([*report, f"Layers:\n{copy}"], kv_length=KV_LENGTH) is not None
    assert read_contents([*report, f"Layers:\n{copy.replace(there, instead)}"], kv_length=KV_LENGTH) is None
