"""What is read from the builder's log. The lines are those of TensorRT for RTX 1.7, with fewer tensors."""

from __future__ import annotations

from cllm_export.tensorrt.plan_contents import ProfileContents, read_contents

BUFFER = "{{ Name: {}, Dimensions: [16,4099], Strides: [4099,1], StrideOrder: [1,0], Datatype: Float }}"


def layer(name: str, kind: str, reads: str = "", writes: str = "") -> str:
    inputs, outputs = (BUFFER.format(each) if each else "" for each in (reads, writes))
    return f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Outputs: [ {outputs}], TacticName: , StreamId: 0"


def profile_of(*layers: str) -> ProfileContents:
    """The contents of a plan with one profile that has these layers."""
    report = ["Total Activation Memory: 512 bytes", "Total Weights Memory: 1024 bytes"]
    contents = read_contents([*report, "\n".join(("Layers:", *layers))])
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
