"""What every loss refuses at its border, and which implementation runs."""

import math

import interpreter
import pytest
import torch
from fastvid.kernels import checks

from fastvid import ATLoss, FitNetLoss, KDLoss, VIDLoss, kernels

MAP = torch.zeros(2, 3, 4, 5)
SCALE = torch.zeros(3)
WEIGHT = torch.zeros(3, 6, 1, 1)
HIDDEN = torch.zeros(2, 6, 4, 5)
LOGITS = torch.zeros(2, 10)

CALLS = {
    "vid_nll": (MAP, MAP, SCALE),
    "mean_squared_error": (MAP, MAP),
    "projected_vid_nll": (HIDDEN, WEIGHT, SCALE, MAP, SCALE),
    "attention_transfer": (MAP, HIDDEN),
    "softened_kl": (LOGITS, LOGITS),
}


NCHW = torch.zeros(2, 3, 4, 5)
LAST = NCHW.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CALLS)
def test_auto_and_reference_run_on_any_cpu_tensors_and_an_unknown_implementation_is_refused_with_the_choices(
    name,
):
    function, arguments = getattr(kernels, name), CALLS[name]
    assert function(*arguments) == function(*arguments, impl="auto") == function(*arguments, impl="reference")
    for unknown in ("cuda", "fast", None):
        with pytest.raises(
            ValueError,
            match=rf"{name} has no implementation {unknown!r}: choose from auto, triton, reference",
        ):
            function(*arguments, impl=unknown)


@pytest.mark.parametrize("name", CALLS)
def test_triton_on_cpu_tensors_is_refused_with_the_remedy_unless_the_interpreter_runs(name, monkeypatch):
    monkeypatch.setattr(checks, "INTERPRETED", False)
    with pytest.raises(
        ValueError,
        match=rf"{name} has Triton kernels for CUDA tensors only, but `\w+` is on cpu: move .* impl='auto'",
    ):
        getattr(kernels, name)(*CALLS[name], impl="triton")


@pytest.mark.parametrize("name", CALLS)
def test_triton_where_it_is_not_installed_is_refused_with_the_remedy(name, monkeypatch):
    monkeypatch.setattr(checks, "triton", None)
    with pytest.raises(
        ValueError,
        match=rf"{name} runs in Triton here, which is not installed: pip install triton, or pass impl='ref",
    ):
        getattr(kernels, name)(*CALLS[name], impl="triton")


@pytest.mark.parametrize(
    "name, arguments, phrase",
    [
        pytest.param(
            "vid_nll",
            (LAST.double(), LAST, SCALE),
            r"float16, but `mean` is float64 .*mean\.float\(\)",
            id="fp64",
        ),
        pytest.param("vid_nll", (LAST, LAST, SCALE.double()), r"`raw_scale` is float64", id="fp64-scale"),
        pytest.param(
            "vid_nll",
            (LAST, NCHW, SCALE),
            r"channels-last maps, but `target` has shape \(2, 3, 4, 5\) and strides \(60, 20, 5, 1\)"
            r"\.\nUse target\.to\(memory_format=torch\.channels_last\) where it is produced",
            id="nchw",
        ),
        pytest.param(
            "mean_squared_error",
            (NCHW, LAST),
            r"mean_squared_error needs .* `prediction`",
            id="nchw-prediction",
        ),
        pytest.param(
            "attention_transfer", (LAST, NCHW), r"attention_transfer needs .* `teacher`", id="nchw-teacher"
        ),
        pytest.param(
            "projected_vid_nll",
            (HIDDEN, WEIGHT, None, LAST, SCALE),
            r"projected_vid_nll needs .* `hidden`",
            id="nchw-hidden",
        ),
        pytest.param(
            "vid_nll",
            (LAST[:, :, ::2, ::2], LAST[:, :, ::2, ::2], SCALE),
            r"needs channels-last maps, but `mean`",
            id="strided",
        ),
        pytest.param(
            "softened_kl",
            (LOGITS.mT, LOGITS.mT),
            r"side by side, but `student_logits` .*\n.*contiguous",
            id="columns",
        ),
        pytest.param(
            "softened_kl",
            (torch.zeros(1, 32769),) * 2,
            r"up to 32768 classes, but .* pass impl='reference'",
            id="too-many-classes",
        ),
        pytest.param(
            "vid_nll",
            (LAST, LAST.to("meta"), SCALE),
            r"one device, but `mean` is on cpu and `target` on meta",
            id="devices",
        ),
    ],
)
def test_tensors_that_the_kernels_cannot_take_are_named_with_the_remedy(name, arguments, phrase):
    arguments = [
        x.to(interpreter.DEVICE) if x is not None and x.device.type == "cpu" else x for x in arguments
    ]
    with pytest.raises(ValueError, match=phrase.replace("cpu", interpreter.DEVICE)):
        getattr(kernels, name)(*arguments, impl="triton")


def test_maps_and_logits_without_channels_or_classes_are_refused():
    with pytest.raises(ValueError, match=r"`student` is float32 \(2, 0, 4, 5\)"):
        kernels.attention_transfer(MAP[:, :0], MAP)
    with pytest.raises(ValueError, match=r"`student_logits` is float32 \(2, 0\)"):
        kernels.softened_kl(LOGITS[:, :0], LOGITS[:, :0])


@pytest.mark.parametrize(
    "name, arguments, phrase",
    [
        pytest.param(
            "vid_nll",
            (MAP[0], MAP, SCALE),
            r"vid_nll wants .*\[B, C, H, W\], but `mean` is float32 \(3, 4, 5\)",
            id="no-batch",
        ),
        pytest.param("vid_nll", (MAP, MAP.int(), SCALE), r"`target` is int32 \(2, 3, 4, 5\)", id="integers"),
        pytest.param(
            "vid_nll",
            (MAP, MAP[:1], SCALE),
            r"`target` is .*\(1, 3, 4, 5\), but `mean` is .*: they must agree in B",
            id="batch",
        ),
        pytest.param("vid_nll", (MAP, MAP.mT, SCALE), r"agree in B, H and W", id="height-and-width"),
        pytest.param(
            "vid_nll",
            (MAP, HIDDEN, SCALE),
            r"`target` of shape \(2, 3, 4, 5\), but it is .*\(2, 6, 4, 5\)",
            id="channels",
        ),
        pytest.param(
            "vid_nll",
            (MAP, MAP, SCALE[:1]),
            r"`raw_scale` of shape \(3,\), but it is .*\(1,\)",
            id="scale-that-would-broadcast",
        ),
        pytest.param(
            "vid_nll",
            (MAP, MAP, SCALE[:, None, None]),
            r"`raw_scale` .*\(3,\), but .*\(3, 1, 1\)",
            id="scale-as-a-map",
        ),
        pytest.param(
            "vid_nll", (MAP, MAP, None), r"`raw_scale` of shape \(3,\), but it is None", id="no-scale"
        ),
        pytest.param(
            "attention_transfer",
            ([MAP], MAP),
            r"attention_transfer wants .*\[B, C, H, W\], but `student` is \[tensor",
            id="list",
        ),
        pytest.param(
            "projected_vid_nll",
            (HIDDEN[..., :1], WEIGHT, None, MAP, SCALE),
            r"projected_vid_nll: .*agree in B",
            id="hidden",
        ),
        pytest.param(
            "projected_vid_nll",
            (HIDDEN, WEIGHT[:, :, 0, 0], None, MAP, SCALE),
            r"`weight` of shape \(3, 6, 1, 1\)",
            id="matrix",
        ),
        pytest.param(
            "projected_vid_nll",
            (HIDDEN, WEIGHT[:2], None, MAP, SCALE),
            r"`weight` of shape \(3, 6, 1, 1\)",
            id="too-few-outputs",
        ),
        pytest.param(
            "projected_vid_nll",
            (HIDDEN, WEIGHT, SCALE[:2], MAP, SCALE),
            r"wants `bias` of shape \(3,\)",
            id="bias",
        ),
        pytest.param(
            "projected_vid_nll",
            (HIDDEN, WEIGHT, None, MAP, SCALE[:2]),
            r"wants `raw_scale` of shape \(3,\)",
            id="projected-scale",
        ),
        pytest.param(
            "attention_transfer",
            (MAP, MAP[:, :, :2]),
            r"`teacher` is .*, but `student` is .*agree in B, H and W",
            id="attention",
        ),
        pytest.param(
            "attention_transfer", (MAP, LOGITS), r"`teacher` is float32 \(2, 10\)", id="attention-of-logits"
        ),
        pytest.param(
            "softened_kl",
            (LOGITS, LOGITS[:, :1]),
            r"`student_logits` is .*\(2, 10\) and `teacher_logits` .*\(2, 1\)",
            id="classes",
        ),
        pytest.param(
            "softened_kl",
            (LOGITS[0], LOGITS[0]),
            r"two equal shapes \[B, classes\]",
            id="one-image-without-batch",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_what_was_wanted(name, arguments, phrase):
    with pytest.raises(ValueError, match=phrase):
        getattr(kernels, name)(*arguments)


@pytest.mark.parametrize("impl", checks.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name, option",
    [
        *((name, "factor") for name in CALLS),
        ("vid_nll", "eps"),
        ("projected_vid_nll", "eps"),
        ("softened_kl", "temperature"),
    ],
)
def test_a_tensor_where_a_kernel_wants_a_number_is_refused_because_it_could_not_learn(name, option, impl):
    with pytest.raises(
        ValueError, match=f"{name} wants a number as `{option}`, but it is a tensor: .*multiply the loss"
    ):
        getattr(kernels, name)(*CALLS[name], impl=impl, **{option: torch.tensor(2.0, requires_grad=True)})


@pytest.mark.parametrize("temperature", [0, -4.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature of more than 0"):
        kernels.softened_kl(LOGITS, LOGITS, temperature=temperature)


# --- the loss modules, which speak of what their callers gave them

MODULES = {
    "VIDLoss": lambda **o: VIDLoss([3], [6], **o),
    "FitNetLoss": lambda **o: FitNetLoss(3, 6, **o),
    "ATLoss": ATLoss,
    "KDLoss": KDLoss,
}
VID, HINT = VIDLoss([3], [6]), FitNetLoss(3, 6)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_refuses_an_unknown_implementation_where_it_is_made(name):
    with pytest.raises(
        ValueError, match=f"{name} has no implementation 'cuda': choose from auto, triton, reference"
    ):
        MODULES[name](impl="cuda")


@pytest.mark.parametrize(
    "call, phrase",
    [
        pytest.param(
            lambda: VID(MAP, HIDDEN),
            r"VIDLoss wants a list .*`student_maps` is float32 \(2, 3, 4, 5\)",
            id="bare-map",
        ),
        pytest.param(
            lambda: ATLoss()([MAP], HIDDEN),
            r"ATLoss wants a list .*`teacher_maps` is float32 \(2, 6, 4, 5\)",
            id="bare-teacher-map",
        ),
        pytest.param(
            lambda: ATLoss()(iter([MAP]), [HIDDEN]),
            r"ATLoss wants a list .*`student_maps` is a list_iterator",
            id="iterator",
        ),
        pytest.param(
            lambda: ATLoss()([], []),
            r"ATLoss wants one entry per tap in both lists, but `student_maps` has 0",
            id="none",
        ),
        pytest.param(
            lambda: VID([MAP] * 2, [HIDDEN] * 2),
            r"VIDLoss wants 1 entries, one per tap, .*`student_maps` has 2",
            id="two",
        ),
        pytest.param(
            lambda: VIDLoss([3], [6, 6]),
            r"VIDLoss wants one entry per tap .*`teacher_channels` has 2",
            id="channels",
        ),
        pytest.param(
            lambda: VID([HIDDEN], [HIDDEN]),
            r"made for 3 channels in `student_maps\[0\]`, but .*\(2, 6, 4, 5\)",
            id="wide",
        ),
        pytest.param(
            lambda: HINT(MAP, MAP),
            r"FitNetLoss was made for 6 channels in `teacher_map`, but .*\(2, 3, 4, 5\)",
            id="hint",
        ),
        pytest.param(
            lambda: HINT(MAP, HIDDEN[:1]),
            r"FitNetLoss: `teacher_map` .* they must agree in B, H and W",
            id="batch",
        ),
    ],
)
def test_a_module_names_the_maps_that_its_caller_gave(call, phrase):
    with pytest.raises(ValueError, match=phrase):
        call()


@pytest.mark.parametrize(
    "name, phrase", [("VIDLoss", r"`student_maps\[0\]`"), ("FitNetLoss", "`student_map`")]
)
def test_a_module_asks_for_channels_last_of_the_map_that_its_caller_gave(name, phrase):
    loss = MODULES[name](impl="triton").to(interpreter.DEVICE)
    student, teacher = (
        NCHW.to(interpreter.DEVICE),
        HIDDEN.to(interpreter.DEVICE, memory_format=torch.channels_last),
    )
    with pytest.raises(ValueError, match=f"{name} needs channels-last maps, but {phrase} has shape"):
        loss(*(([student], [teacher]) if name == "VIDLoss" else (student, teacher)))


@pytest.mark.parametrize("name", ["VIDLoss", "FitNetLoss"])
def test_a_student_map_of_one_channel_whose_layout_is_ambiguous_is_taken(name):
    student, teacher = (
        torch.rand(2, 1, 4, 5, device=interpreter.DEVICE),
        HIDDEN.to(interpreter.DEVICE, memory_format=torch.channels_last),
    )
    loss = VIDLoss([1], [6], impl="triton") if name == "VIDLoss" else FitNetLoss(1, 6, impl="triton")
    assert loss.to(interpreter.DEVICE)(
        *(([student], [teacher]) if name == "VIDLoss" else (student, teacher))
    ).isfinite()
