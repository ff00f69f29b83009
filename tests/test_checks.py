"""What every loss refuses, with which words, and which implementation runs."""

import math

import interpreter
import pytest
import torch
from fastvid.kernels import checks

from fastvid import ATLoss, FitNetLoss, KDLoss, VIDLoss, kernels

MAP, HIDDEN, WEIGHT = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 4, 5), torch.zeros(3, 6, 1, 1)
SCALE, LOGITS = torch.zeros(3), torch.zeros(2, 10)
LAST = MAP.to(memory_format=torch.channels_last)
CALLS = {
    "vid_nll": (MAP, MAP, SCALE),
    "mean_squared_error": (MAP, MAP),
    "projected_vid_nll": (HIDDEN, WEIGHT, SCALE, MAP, SCALE),
    "attention_transfer": (MAP, HIDDEN),
    "softened_kl": (LOGITS, LOGITS),
}
each_loss = pytest.mark.parametrize("name", CALLS)


def there(tensor):
    """The tensor where Triton runs."""
    return tensor.to(interpreter.DEVICE) if tensor is not None and tensor.device.type == "cpu" else tensor


@each_loss
def test_auto_is_the_reference_on_a_cpu_and_an_unknown_implementation_is_refused(name):
    function, arguments = getattr(kernels, name), CALLS[name]
    assert function(*arguments) == function(*arguments, impl="auto") == function(*arguments, impl="reference")
    with pytest.raises(
        ValueError, match=f"{name} has no implementation 'fast': choose from auto, triton, ref"
    ):
        function(*arguments, impl="fast")


@each_loss
@pytest.mark.parametrize(
    "missing, value, phrase",
    [
        (
            "INTERPRETED",
            False,
            r"has Triton kernels for CUDA tensors only, but `\w+` is on cpu: .* impl='auto'",
        ),
        ("triton", None, r"needs Triton here: pip install triton, or pass impl='reference'"),
    ],
)
def test_triton_where_it_cannot_run_is_refused_with_the_remedy(name, missing, value, phrase, monkeypatch):
    monkeypatch.setattr(checks, missing, value)
    with pytest.raises(ValueError, match=f"{name} {phrase}"):
        getattr(kernels, name)(*CALLS[name], impl="triton")


STRIDED, WIDE = LAST[:, :, ::2, ::2], torch.zeros(1, 32769)
LAYOUT = (
    r"channels-last maps, but `target` has shape \(2, 3, 4, 5\) and strides \(60, 20, 5, 1\)"
    r"\.\nUse target\.to\(memory_format=torch\.channels_last\) where it is produced"
)


@pytest.mark.parametrize(
    "name, arguments, phrase",
    [
        ("vid_nll", (LAST.double(), LAST, SCALE), r"float16, but `mean` is float64 .*mean\.float\(\)"),
        ("vid_nll", (LAST, LAST, SCALE.double()), "`raw_scale` is float64"),
        ("vid_nll", (LAST, MAP, SCALE), LAYOUT),
        ("vid_nll", (STRIDED, STRIDED, SCALE), "needs channels-last maps, but `mean`"),
        ("vid_nll", (LAST, LAST.to("meta"), SCALE), "one device, but `mean` is on cpu and `target` on meta"),
        ("mean_squared_error", (MAP, LAST), "mean_squared_error needs .* `prediction`"),
        ("attention_transfer", (LAST, MAP), "attention_transfer needs .* `teacher`"),
        ("projected_vid_nll", (HIDDEN, WEIGHT, None, LAST, SCALE), "projected_vid_nll needs .* `hidden`"),
        ("softened_kl", (LOGITS.mT, LOGITS.mT), r"side by side, but `student_logits` .*\n.*contiguous"),
        ("softened_kl", (WIDE, WIDE), "up to 32768 classes, not 32769: pass impl='reference'"),
    ],
)
def test_tensors_that_the_kernels_cannot_take_are_named_with_the_remedy(name, arguments, phrase):
    with pytest.raises(ValueError, match=phrase.replace("cpu", interpreter.DEVICE)):
        getattr(kernels, name)(*map(there, arguments), impl="triton")


@pytest.mark.parametrize(
    "name, arguments, phrase",
    [
        ("vid_nll", (MAP[0], MAP, SCALE), r"wants .*\[B, C, H, W\], but `mean` is float32 \(3, 4, 5\)"),
        ("vid_nll", (MAP, MAP.int(), SCALE), r"`target` is int32 \(2, 3, 4, 5\)"),
        (
            "vid_nll",
            (MAP, MAP[:1], SCALE),
            r"`target` is .*\(1, 3, 4, 5\), but `mean` is .*: they must agree",
        ),
        ("vid_nll", (MAP, MAP.mT, SCALE), "agree in B, H and W"),
        ("vid_nll", (MAP, HIDDEN, SCALE), r"`target` of shape \(2, 3, 4, 5\), but it is .*\(2, 6, 4, 5\)"),
        ("vid_nll", (MAP, MAP, SCALE[:1]), r"`raw_scale` of shape \(3,\), but it is .*\(1,\)"),
        ("vid_nll", (MAP, MAP, None), r"`raw_scale` of shape \(3,\), but it is None"),
        ("attention_transfer", ([MAP], MAP), r"wants .*\[B, C, H, W\], but `student` is \[tensor"),
        ("attention_transfer", (MAP[:, :0], MAP), r"`student` is float32 \(2, 0, 4, 5\)"),
        ("attention_transfer", (MAP, MAP[:, :, :2]), "`teacher` is .*, but `student` is .*agree in B, H"),
        ("attention_transfer", (MAP, LOGITS), r"`teacher` is float32 \(2, 10\)"),
        ("projected_vid_nll", (HIDDEN[..., :1], WEIGHT, None, MAP, SCALE), "projected_vid_nll: .*agree in B"),
        ("projected_vid_nll", (HIDDEN, WEIGHT[:2], None, MAP, SCALE), r"`weight` of shape \(3, 6, 1, 1\)"),
        ("projected_vid_nll", (HIDDEN, WEIGHT, SCALE[:2], MAP, SCALE), r"wants `bias` of shape \(3,\)"),
        ("projected_vid_nll", (HIDDEN, WEIGHT, None, MAP, SCALE[:2]), r"wants `raw_scale` of shape \(3,\)"),
        (
            "softened_kl",
            (LOGITS, LOGITS[:, :1]),
            r"`student_logits` .*\(2, 10\) and `teacher_logits` .*\(2, 1\)",
        ),
        ("softened_kl", (LOGITS[0], LOGITS[0]), r"two equal shapes \[B, classes\]"),
        ("softened_kl", (LOGITS[:, :0], LOGITS[:, :0]), r"`student_logits` is float32 \(2, 0\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_what_was_wanted(name, arguments, phrase):
    with pytest.raises(ValueError, match=phrase):
        getattr(kernels, name)(*arguments)


OPTIONS = [
    *((name, "factor") for name in CALLS),
    ("projected_vid_nll", "eps"),
    ("softened_kl", "temperature"),
]


@pytest.mark.parametrize("name, option", [*OPTIONS, ("vid_nll", "eps")])
@pytest.mark.parametrize("impl", checks.IMPLEMENTATIONS)
def test_a_tensor_in_place_of_a_number_is_refused_because_it_would_get_no_gradient(name, option, impl):
    with pytest.raises(ValueError, match=f"{name} wants a number as `{option}`, .*multiply the loss"):
        getattr(kernels, name)(*CALLS[name], impl=impl, **{option: torch.tensor(2.0, requires_grad=True)})


@pytest.mark.parametrize("temperature", [0, -4.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature of more than 0"):
        kernels.softened_kl(LOGITS, LOGITS, temperature=temperature)


# --- the loss modules, whose errors name what their callers gave them

MODULES = {
    "VIDLoss": lambda **options: VIDLoss([3], [6], **options),
    "FitNetLoss": lambda **options: FitNetLoss(3, 6, **options),
    "ATLoss": ATLoss,
    "KDLoss": KDLoss,
}
VID, HINT, AT = VIDLoss([3], [6]), FitNetLoss(3, 6), ATLoss()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_refuses_an_unknown_implementation_where_it_is_made(name):
    with pytest.raises(
        ValueError, match=f"{name} has no implementation 'cuda': choose from auto, triton, ref"
    ):
        MODULES[name](impl="cuda")


@pytest.mark.parametrize(
    "call, phrase",
    [
        (lambda: VID(MAP, iter([HIDDEN])), "VIDLoss wants a list .*`teacher_maps` is a list_iterator"),
        (lambda: AT([MAP], HIDDEN), r"ATLoss wants a list .*`teacher_maps` is float32 \(2, 6, 4, 5\)"),
        (lambda: AT(iter([MAP]), [HIDDEN]), r"ATLoss wants a list .*`student_maps` is a list_iterator"),
        (lambda: AT([], []), "ATLoss wants one entry per tap in both lists, but `student_maps` has 0"),
        (
            lambda: VID([MAP] * 2, [HIDDEN] * 2),
            "VIDLoss wants 1 entries, one per tap, .*`student_maps` has 2",
        ),
        (lambda: VIDLoss([3], [6, 6]), "VIDLoss wants one entry per tap .*`teacher_channels` has 2"),
        (
            lambda: VID([HIDDEN], [HIDDEN]),
            r"made for 3 channels in `student_maps\[0\]`, but .*\(2, 6, 4, 5\)",
        ),
        (
            lambda: HINT(MAP, MAP),
            r"FitNetLoss was made for 6 channels in `teacher_maps\[0\]`, but .*\(2, 3, 4, 5\)",
        ),
        (lambda: HINT(MAP, HIDDEN[:1]), r"FitNetLoss: `teacher_maps\[0\]` .* they must agree in B, H and W"),
    ],
)
def test_a_module_names_the_maps_that_its_caller_gave(call, phrase):
    with pytest.raises(ValueError, match=phrase):
        call()


@pytest.mark.parametrize(
    "name, phrase", [("VIDLoss", r"`student_maps\[0\]`"), ("FitNetLoss", r"`student_maps\[0\]`")]
)
def test_a_module_needs_channels_last_maps_but_takes_one_channel_in_any_layout(name, phrase):
    def loss(channels, student):
        teacher = there(HIDDEN).to(memory_format=torch.channels_last)
        if name == "FitNetLoss":
            return FitNetLoss(channels, 6, impl="triton").to(interpreter.DEVICE)(there(student), teacher)
        return VIDLoss([channels], [6], impl="triton").to(interpreter.DEVICE)([there(student)], [teacher])

    assert loss(1, torch.rand(2, 1, 4, 5)).isfinite()
    with pytest.raises(ValueError, match=f"{name} needs channels-last maps, but {phrase} has shape"):
        loss(3, MAP)
