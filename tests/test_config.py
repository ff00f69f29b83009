import dataclasses
import json

import pytest

from fastvid.config import OPTION_GROUPS, PROTOCOLS, Grid, KDOptions, TrainConfig, VIDOptions, method_parts
from fastvid.errors import InputError


@pytest.mark.parametrize(
    "given, protocol, epochs, batch_size",
    [
        pytest.param({}, "seed", 200, 128, id="full-set"),
        pytest.param({"per_class": 100}, "seed", 1000, 128, id="reduced-set-trains-longer"),
        pytest.param(
            {"dataset": "cifar100", "per_class": 500},
            "seed",
            1000,
            128,
            id="naming-the-whole-class-counts-as-reduced",
        ),
        pytest.param({"per_class": 100, "epochs": 7}, "seed", 7, 128, id="epochs-win-over-the-protocol"),
        pytest.param({"batch_size": 64}, "seed", 200, 64, id="batch-size-wins-over-the-protocol"),
        pytest.param(
            {"dataset": "digits"}, "quick", PROTOCOLS["quick"].full_epochs, 32, id="digits-are-quick"
        ),
        pytest.param(
            {"dataset": "digits", "per_class": 7},
            "quick",
            PROTOCOLS["quick"].reduced_epochs,
            32,
            id="reduced-digits",
        ),
        pytest.param(
            {"dataset": "digits", "protocol": "seed"},
            "seed",
            200,
            128,
            id="a-protocol-that-is-named-wins-over-the-data-set",
        ),
        pytest.param(
            {"protocol": "quick", "per_class": 7},
            "quick",
            PROTOCOLS["quick"].reduced_epochs,
            32,
            id="quick-cifar",
        ),
    ],
)
def test_length_and_batch_size_follow_from_protocol_data_set_and_subset(given, protocol, epochs, batch_size):
    resolved = TrainConfig(**given).resolved()
    assert (resolved.protocol, resolved.epochs, resolved.batch_size) == (protocol, epochs, batch_size)


def test_evaluations_follow_the_protocol_unless_given():
    assert TrainConfig().resolved().evaluations == PROTOCOLS["seed"].evaluations
    assert TrainConfig(dataset="digits").resolved().evaluations == PROTOCOLS["quick"].evaluations
    assert TrainConfig(evaluations=3).resolved().evaluations == 3


def test_resolving_changes_nothing_else_and_twice_is_once():
    config = TrainConfig(dataset="digits", method=("vid", "kd+at"), seed=5, kd=KDOptions(alpha=0.5))
    resolved = config.resolved()
    assert resolved.resolved() == resolved
    changed = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(resolved, field.name)
    }
    assert changed == {"protocol", "epochs", "batch_size", "evaluations", "vid"}


@pytest.mark.parametrize(
    "options, weight",
    [
        (VIDOptions(), 30.0),
        (VIDOptions(variant="repdistiller"), 1.0),
        (VIDOptions(weight=0.0), 0.0),
        (VIDOptions(variant="repdistiller", weight=3.0), 3.0),
    ],
)
def test_the_weight_of_vid_is_that_of_its_variant_unless_given(options, weight):
    assert TrainConfig(vid=options).resolved().vid == dataclasses.replace(options, weight=weight)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("teacher", ()),
        ("student", ()),
        ("kd", ("kd",)),
        ("kd+at", ("kd", "at")),
        ("kd+vid", ("kd", "vid")),
        ("kd+fitnet+at+vid", OPTION_GROUPS),
    ],
)
def test_a_sum_is_split_into_its_terms(name, parts):
    assert method_parts(name) == parts
    assert TrainConfig(method=(name,)).needs_teacher == bool(parts)


@pytest.mark.parametrize(
    "name, phrase",
    [
        pytest.param(
            "dkd",
            "unknown method 'dkd': choose from teacher, student, kd, fitnet, at, vid, or a sum",
            id="unknown",
        ),
        pytest.param("at+kd", "unknown method 'at\\+kd': write it 'kd\\+at'", id="another-order"),
        pytest.param("vid+at+kd", "write it 'kd\\+at\\+vid'", id="another-order-of-three"),
        pytest.param("kd+kd", "unknown method 'kd\\+kd': choose from", id="a-term-twice"),
        pytest.param("kd+student", "unknown method 'kd\\+student'", id="student-is-no-term"),
        pytest.param("VID", "unknown method 'VID'", id="capitals"),
        pytest.param("", "unknown method ''", id="empty"),
        pytest.param("kd+", "unknown method 'kd\\+'", id="empty-term"),
    ],
)
def test_another_method_name_is_refused_with_the_known_ones_or_the_right_spelling(name, phrase):
    with pytest.raises(InputError, match=phrase):
        TrainConfig(method=("student", name))


@pytest.mark.parametrize(
    "settings, phrase",
    [
        pytest.param(
            {"method": ("vid", "kd", "vid")},
            "--method is vid,kd,vid, wanted one or more methods, each once",
            id="a-method-twice",
        ),
        pytest.param({"method": ()}, "--method is , wanted one or more", id="no-method"),
        pytest.param({"per_class": 0}, "--per-class is 0, wanted 1 or more", id="no-images"),
        pytest.param(
            {"validation_per_class": -1},
            "--validation-per-class is -1, wanted 0 or more",
            id="negative-validation",
        ),
        pytest.param({"seed": -1}, "--seed is -1, wanted 0 or more", id="negative-seed"),
        pytest.param(
            {"seed": 2**64}, "--seed is 18446744073709551616, wanted", id="seed-beyond-the-generators"
        ),
        pytest.param({"epochs": 0}, "--epochs is 0, wanted 1 or more", id="no-epochs"),
        pytest.param({"batch_size": 0}, "--batch-size is 0, wanted 1 or more", id="empty-batch"),
        pytest.param({"evaluations": 0}, "--evaluations is 0, wanted 1 or more", id="never-evaluated"),
        pytest.param(
            {"learning_rate": float("nan")}, "--learning-rate is nan, wanted a finite number", id="nan"
        ),
        pytest.param(
            {"weight_decay": float("inf")}, "--weight-decay is inf, wanted a finite number", id="infinite"
        ),
        pytest.param(
            {"momentum": -0.1},
            "--momentum is -0.1, wanted a finite number that is not negative",
            id="negative",
        ),
        pytest.param({"clip_norm": -1.0}, "--clip-norm is -1.0", id="negative-norm"),
        pytest.param(
            {"milestones": (0.3, 1.5)},
            r"--milestones is .*1\.5.*, wanted shares between 0 and 1",
            id="milestone-after-the-end",
        ),
        pytest.param({"milestones": (float("nan"),)}, "--milestones is", id="milestone-nan"),
    ],
)
def test_a_number_out_of_range_is_named_as_its_option(settings, phrase):
    with pytest.raises(InputError, match=phrase):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "group, settings, phrase",
    [
        ("kd", {"temperature": 0.0}, "--kd-temperature is 0.0, wanted more than 0"),
        ("kd", {"alpha": 1.5}, "--kd-alpha is 1.5, wanted at most 1"),
        ("kd", {"alpha": -0.5}, "--kd-alpha is -0.5, wanted a finite number that is not negative"),
        ("fitnet", {"hint_share": 1.0}, "--fitnet-hint-share is 1.0, wanted a share between 0 and 1"),
        (
            "fitnet",
            {"tap": ("group9",)},
            "--fitnet-tap is group9, wanted all, or one or more of stem, group1",
        ),
        ("fitnet", {"tap": ("all", "stem")}, "--fitnet-tap is all,stem, wanted"),
        ("fitnet", {"tap": ()}, "--fitnet-tap is , wanted"),
        ("at", {"weight": float("inf")}, "--at-weight is inf"),
        ("vid", {"weight": -1.0}, "--vid-weight is -1.0"),
    ],
)
def test_a_number_of_a_method_out_of_range_is_named_as_its_option(group, settings, phrase):
    options = type(getattr(TrainConfig(), group))
    with pytest.raises(InputError, match=phrase):
        TrainConfig(**{group: options(**settings)})


def test_the_configuration_survives_json_up_to_lists():
    settings = dataclasses.asdict(TrainConfig(method=("vid", "kd+at")).resolved())
    read = json.loads(json.dumps(settings, allow_nan=False))
    assert read.pop("method") == ["vid", "kd+at"] and settings.pop("method") == ("vid", "kd+at")
    assert read.pop("milestones") == list(settings.pop("milestones"))
    assert read["fitnet"].pop("tap") == list(settings["fitnet"].pop("tap"))
    assert read == settings and set(OPTION_GROUPS) == {"kd", "fitnet", "at", "vid"} <= settings.keys()


@pytest.mark.parametrize(
    "dataset, fractions", [("cifar10", ("full", "20", "10", "2")), ("digits", ("full", "5"))]
)
def test_the_grid_has_the_columns_of_the_paper_and_fewer_for_digits(dataset, fractions):
    assert Grid().fractions_of(dataset) == fractions
    assert Grid(fractions=("2",)).fractions_of(dataset) == ("2",)


@pytest.mark.parametrize("fraction", ["0", "100", "-5", "101", "half", "", "nan", "inf"])
def test_a_fraction_is_full_or_a_percentage(fraction):
    with pytest.raises(
        InputError, match=f"--fractions is full,{fraction}, wanted full or percents between 0 and 100"
    ):
        Grid(fractions=("full", fraction))


def test_a_grid_has_one_seed_or_more():
    with pytest.raises(InputError, match="--seeds is 0, wanted 1 or more"):
        Grid(seeds=0)


@pytest.mark.parametrize(
    "methods, phrase",
    [(("vid", "dkd"), "unknown method 'dkd'"), (("vid", "vid"), "--methods is vid,vid, wanted .* each once")],
)
def test_a_grid_refuses_an_unknown_method_and_one_given_twice(methods, phrase):
    with pytest.raises(InputError, match=phrase):
        Grid(methods=methods)
