"""What every loss refuses at its border, and which implementation runs."""
import math

import pytest
import torch

from fastvid import kernels

MAP = torch.zeros(2, 3, 4, 5)
SCALE = torch.zeros(3)
WEIGHT = torch.zeros(3, 6, 1, 1)
HIDDEN = torch.zeros(2, 6, 4, 5)
LOGITS = torch.zeros(2, 10)

CALLS = {
    "vid_nll": (MAP, MAP, SCALE),
    "projected_vid_nll": (HIDDEN, WEIGHT, SCALE, MAP, SCALE),
    "attention_transfer": (MAP, HIDDEN),
    "softened_kl": (LOGITS, LOGITS),
}


@pytest.mark.parametrize("name", CALLS)
def test_auto_and_reference_run_and_anything_else_is_refused_with_the_choices(name):
    function, arguments = getattr(kernels, name), CALLS[name]
    assert function(*arguments) == function(*arguments, impl="auto") == function(*arguments, impl="reference")
    for unknown in ("triton", "fast", None):
        with pytest.raises(ValueError, match=rf"{name} has no implementation {unknown!r}: choose from auto, reference"):
            function(*arguments, impl=unknown)


@pytest.mark.parametrize("name, arguments, phrase", [
    pytest.param("vid_nll", (MAP[0], MAP, SCALE), r"vid_nll wants .*\[B, C, H, W\], but `mean` is float32 \(3, 4, 5\)", id="no-batch"),
    pytest.param("vid_nll", (MAP, MAP.int(), SCALE), r"`target` is int32 \(2, 3, 4, 5\)", id="integers"),
    pytest.param("vid_nll", (MAP, MAP[:1], SCALE), r"`target` is .*\(1, 3, 4, 5\), but `mean` is .*: they must agree in B", id="batch"),
    pytest.param("vid_nll", (MAP, MAP.mT, SCALE), r"agree in B, H and W", id="height-and-width"),
    pytest.param("vid_nll", (MAP, HIDDEN, SCALE), r"`target` of shape \(2, 3, 4, 5\), but it is .*\(2, 6, 4, 5\)", id="channels"),
    pytest.param("vid_nll", (MAP, MAP, SCALE[:1]), r"`raw_scale` of shape \(3,\), but it is .*\(1,\)", id="scale-that-would-broadcast"),
    pytest.param("vid_nll", (MAP, MAP, SCALE[:, None, None]), r"`raw_scale` .*\(3,\), but .*\(3, 1, 1\)", id="scale-as-a-map"),
    pytest.param("projected_vid_nll", (HIDDEN[..., :1], WEIGHT, None, MAP, SCALE), r"projected_vid_nll: .*agree in B", id="hidden"),
    pytest.param("projected_vid_nll", (HIDDEN, WEIGHT[:, :, 0, 0], None, MAP, SCALE), r"`weight` of shape \(3, 6, 1, 1\)", id="matrix"),
    pytest.param("projected_vid_nll", (HIDDEN, WEIGHT[:2], None, MAP, SCALE), r"`weight` of shape \(3, 6, 1, 1\)", id="too-few-outputs"),
    pytest.param("projected_vid_nll", (HIDDEN, WEIGHT, SCALE[:2], MAP, SCALE), r"wants `bias` of shape \(3,\)", id="bias"),
    pytest.param("projected_vid_nll", (HIDDEN, WEIGHT, None, MAP, SCALE[:2]), r"wants `raw_scale` of shape \(3,\)", id="projected-scale"),
    pytest.param("attention_transfer", (MAP, MAP[:, :, :2]), r"`teacher` is .*, but `student` is .*agree in B, H and W", id="attention"),
    pytest.param("attention_transfer", (MAP, LOGITS), r"`teacher` is float32 \(2, 10\)", id="attention-of-logits"),
    pytest.param("softened_kl", (LOGITS, LOGITS[:, :1]), r"`student_logits` is .*\(2, 10\) and `teacher_logits` .*\(2, 1\)", id="classes"),
    pytest.param("softened_kl", (LOGITS[0], LOGITS[0]), r"two equal shapes \[B, classes\]", id="one-image-without-batch"),
])
def test_tensors_that_do_not_fit_are_named_with_what_was_wanted(name, arguments, phrase):
    with pytest.raises(ValueError, match=phrase):
        getattr(kernels, name)(*arguments)


@pytest.mark.parametrize("temperature", [0, -4.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature of more than 0"):
        kernels.softened_kl(LOGITS, LOGITS, temperature=temperature)
