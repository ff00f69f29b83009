import hashlib
import json
import pickle
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastvid import checkpoint
from fastvid.checkpoint import load_network, load_state, load_weights, save_state, save_weights
from fastvid.errors import InputError
from fastvid.wresnet import WideResNet

SMALL = {  # every kind of tensor that a checkpoint holds
    "conv1.weight": torch.arange(18.0).reshape(2, 1, 3, 3),
    "bn1.num_batches_tracked": torch.tensor(7),
    "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
}


def network(depth=10, width=1, num_classes=10, seed=0):
    """With running statistics and counters as after some training."""
    torch.manual_seed(seed)
    made = WideResNet(depth, width, num_classes)
    with torch.no_grad():
        made(torch.randn(2, 3, 32, 32))
    return made


def same(one, other):
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in ((one[name], other[name]) for name in one)
    )


# --- weights


def test_weights_come_back_equal_with_their_metadata_and_the_hash_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    sha256 = save_weights(path, SMALL, {"accuracy": "91.22 on test"})
    tensors, metadata, *_ = load_weights(path)
    assert same(tensors, SMALL) and metadata["accuracy"] == "91.22 on test"
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_channels_last_weights_that_require_grad_are_saved_as_plain_values(tmp_path):
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    save_weights(tmp_path / "a.safetensors", {"w": weight}, {})
    loaded = load_weights(tmp_path / "a.safetensors")[0]["w"]
    assert torch.equal(loaded, weight) and not loaded.requires_grad


def test_equal_tensors_have_equal_checksums_and_any_change_another(tmp_path):
    def checksum(tensors):
        save_weights(tmp_path / "a.safetensors", tensors, {"anything": "else"})
        return load_weights(tmp_path / "a.safetensors")[1]["tensors_sha256"]

    first = checksum(SMALL)
    assert checksum(dict(reversed(SMALL.items()))) == first
    conv = SMALL["conv1.weight"]
    changes = {
        "value": {"conv1.weight": conv + 1},
        "shape": {"conv1.weight": conv.flatten()},
        "dtype": {"half": SMALL["half"].view(torch.float16)},
        "name": {"more": conv.clone()},
    }
    assert len({first, *(checksum(SMALL | change) for change in changes.values())}) == 1 + len(changes)


def test_safetensors_of_others_load_without_a_checksum(tmp_path):
    save_file(SMALL, tmp_path / "a.safetensors")
    weights = load_weights(tmp_path / "a.safetensors")
    assert same(weights.tensors, SMALL) and weights.metadata == {} and not weights.verified


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(
            lambda path: save_weights(path.with_suffix(".safetensors"), SMALL, {"dataset": "digits"}),
            id="safetensors",
        ),
        pytest.param(lambda path: torch.save({"model": SMALL}, path), id="pth"),
    ],
)
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, write):
    write(tmp_path / "a.pth")
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    choose, refused = random.Random(0), 0
    for position in [
        *range(0, len(content), max(1, len(content) // 300)),
        *choose.choices(range(len(content)), k=100),
    ]:
        mutant = bytearray(content)
        mutant[position] ^= 1 << choose.randrange(8)
        path.write_bytes(mutant)
        try:
            tensors = load_weights(path).tensors
        except InputError as error:
            refused += str(error).startswith(str(path)) and "\n" not in str(error)
            continue
        assert same(tensors, SMALL), f"bit flip in byte {position} changed the tensors unseen"
        refused += 1
    assert refused >= 400


@pytest.mark.parametrize("kept", [0, 1, 100, -1], ids=["empty", "one-byte", "header", "all-but-one-byte"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_was_cut_is_refused_with_its_path(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    save_weights(path, SMALL, {}) if suffix == ".safetensors" else torch.save(SMALL, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        InputError, match=f"{path}.*: copy (it|or make it) again|{path}.*: copy or make the file again"
    ):
        load_weights(path)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="bare"),
        pytest.param(lambda state: {"epoch": 240, "model": state, "best_acc": 75.6}, id="RepDistiller"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 200}, id="state_dict"),
        pytest.param(
            lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
            id="DataParallel",
        ),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoints_of_others_load_as_a_network(tmp_path, wrap, zipped):
    original = network()
    torch.save(wrap(original.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert same(load_network(tmp_path / "a.pth", 10, 1, 10).state_dict(), original.state_dict())


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="nothing"),
        pytest.param([torch.zeros(2)], id="list"),
        pytest.param(torch.zeros(2), id="tensor"),
        pytest.param({"epoch": 3}, id="no-tensors"),
        pytest.param({"model": {}}, id="empty-model"),
        pytest.param({0: torch.zeros(2)}, id="numbers-as-names"),
    ],
)
def test_a_torch_file_without_a_state_dict_says_what_is_wanted(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match="a.pth holds no state dict, neither directly nor under 'model' or 'state_dict'"
    ):
        load_weights(tmp_path / "a.pth")


# --- networks


def test_a_network_is_loaded_frozen_in_eval_mode_and_computes_the_same(tmp_path):
    original, images = network(seed=3).eval(), torch.randn(2, 3, 32, 32)
    save_weights(tmp_path / "a.safetensors", original.state_dict(), {})
    loaded = load_network(tmp_path / "a.safetensors", 10, 1, 10)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(images).logits, original(images).logits)


def test_the_real_teacher_loads_with_its_own_names(teacher_file):
    loaded = load_network(teacher_file, 40, 2, 10)
    assert torch.equal(loaded.conv1.weight, load_weights(teacher_file)[0]["conv1.weight"])


def test_counters_of_batches_may_be_missing(tmp_path):
    state = network().state_dict()
    save_weights(
        tmp_path / "a.safetensors", {name: t for name, t in state.items() if "num_batches" not in name}, {}
    )
    loaded = load_network(tmp_path / "a.safetensors", 10, 1, 10).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state if "num_batches" not in name)


def test_regressors_beside_a_student_do_not_hinder_loading_it(tmp_path):
    state = network().state_dict()
    save_weights(tmp_path / "a.safetensors", state | {checkpoint.METHOD_PREFIX + "raw": torch.ones(3)}, {})
    assert same(load_network(tmp_path / "a.safetensors", 10, 1, 10).state_dict(), state)


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "depth, width, classes, phrase",
    [
        pytest.param(
            10,
            2,
            10,
            "holds a WRN-10-1 for 10 classes, but a WRN-10-2 for 10 was asked for: set --teacher-depth",
            id="width",
        ),
        pytest.param(
            16, 1, 10, "holds a WRN-10-1 for 10 classes, but a WRN-16-1 for 10 was asked for", id="depth"
        ),
        pytest.param(
            10,
            1,
            100,
            "holds a WRN-10-1 for 10 classes, but a WRN-10-1 for 100 was asked for: .* take a teacher",
            id="classes",
        ),
    ],
)
def test_another_architecture_is_named_beside_the_one_that_was_asked_for(
    tmp_path, depth, width, classes, phrase
):
    save_weights(tmp_path / "a.safetensors", network().state_dict(), {})
    with pytest.raises(InputError, match=phrase):
        load_network(tmp_path / "a.safetensors", depth, width, classes)


@pytest.mark.parametrize(
    "change, phrase",
    [
        pytest.param(
            lambda state: state.pop("bn1.bias"),
            "missing keys bn1.bias; unexpected keys none; other shapes none",
            id="missing",
        ),
        pytest.param(
            lambda state: state.update(extra=torch.ones(1)),
            "missing keys none; unexpected keys extra;",
            id="unexpected",
        ),
        pytest.param(
            lambda state: state.update({"fc.bias": torch.ones(7)}),
            "other shapes fc.bias: take weights with the names of",
            id="shape",
        ),
        pytest.param(
            lambda state: [state.pop(name) for name in list(state) if "block2" in name],
            r"missing keys block2\.\S+, .* and \d+ more;",
            id="a-group",
        ),
        pytest.param(
            lambda state: state.update({f"net.{name}": state.pop(name) for name in list(state)}),
            r"missing keys block1.* unexpected keys net\.",
            id="prefix",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path, change, phrase):
    state = network().state_dict()
    change(state)
    save_weights(tmp_path / "a.safetensors", state, {})
    with pytest.raises(InputError, match=f"a.safetensors does not fit a WRN-10-1: .*{phrase}"):
        load_network(tmp_path / "a.safetensors", 10, 1, 10)


# --- resume state


def test_a_state_comes_back_equal_with_its_structure(tmp_path):
    state = {
        "position": 12,
        "seconds": 0.1,
        "name": "vid",
        "none": None,
        "history": [{"epoch": 1, "variances": {"stem": [1.0, 2.0]}}],
        "learner": {
            "network": SMALL,
            "optimizer": {
                "state": {0: {"momentum_buffer": torch.randn(3)}},
                "param_groups": [{"params": [0]}],
            },
        },
    }
    save_state(tmp_path / "a.resume", state)
    loaded = load_state(tmp_path / "a.resume")
    buffers = [s["learner"]["optimizer"]["state"][0].pop("momentum_buffer") for s in (loaded, state)]
    assert torch.equal(*buffers) and same(loaded["learner"].pop("network"), state["learner"].pop("network"))
    assert loaded == state


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda content, path: torch.save(content, path), id="zip"),
        pytest.param(
            lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False), id="legacy"
        ),
        pytest.param(
            lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)), id="bare-pickle"
        ),
    ],
)
def test_code_in_a_torch_file_does_not_run(tmp_path, write, canary):
    write({"model": {"conv1.weight": torch.ones(1), "x": canary}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="a.pth: not a readable torch file of tensors"):
        load_weights(tmp_path / "a.pth")
    assert not canary.sang


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_random_bytes_are_refused_in_one_line(tmp_path, suffix, seed):
    choose = random.Random(seed)
    for start in (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}", b"\x08\0\0\0\0\0\0\0", b"(", b"c"):
        for length in (0, 1, 30, 3000):
            (tmp_path / f"a{suffix}").write_bytes(start + choose.randbytes(length))
            with pytest.raises(InputError) as caught:
                load_weights(tmp_path / f"a{suffix}")
            assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_weights_and_a_folder_in_their_place_are_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match=f"no weights at {path}: check the path"):
            load_weights(path)


def test_the_metadata_of_a_file_can_be_read_by_any_safetensors_reader(tmp_path):
    save_weights(tmp_path / "a.safetensors", SMALL, {"architecture": "WRN-16-1"})
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["fastvid"])["architecture"] == "WRN-16-1" and set(
            file.keys()
        ) == set(SMALL)


@pytest.mark.parametrize(
    "metadata", [{"classes": "zero,one", "normalisation": "imagenet"}, None], ids=["of-others", "none"]
)
def test_metadata_of_other_programs_says_nothing(tmp_path, metadata):
    save_file(SMALL, tmp_path / "a.safetensors", metadata)
    assert load_weights(tmp_path / "a.safetensors")[1] == {}


@pytest.mark.parametrize("text", ["{torn", "[1]"], ids=["torn", "no-object"])
def test_metadata_of_ours_that_is_damaged_is_refused(tmp_path, text):
    save_file(SMALL, tmp_path / "a.safetensors", {"fastvid": text})
    with pytest.raises(InputError, match="a.safetensors: not a readable safetensors file"):
        load_weights(tmp_path / "a.safetensors")


@pytest.mark.survival("wrong but well-formed")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensor: tensor.to_sparse(), id="sparse"),
        pytest.param(lambda tensor: tensor.to("meta"), id="meta"),
        pytest.param(lambda tensor: tensor.to(torch.complex64), id="complex"),
        pytest.param(lambda tensor: tensor.to(torch.int32), id="integer"),
        pytest.param(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), id="quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_weights_that_are_no_plain_numbers_are_refused_with_their_name(tmp_path, change):
    state = WideResNet(10, 1).state_dict()
    torch.save(state | {"fc.weight": change(state["fc.weight"])}, tmp_path / "a.pth")
    with pytest.raises(
        InputError,
        match="a.pth(: not a readable torch file| holds weights that are not plain .*: fc.weight: )",
    ):
        load_network(tmp_path / "a.pth", 10, 1, 10)


def test_a_damaged_name_of_our_metadata_does_not_turn_a_file_into_a_foreign_one(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(path, WideResNet(10, 1).state_dict(), {"dataset": "digits"})
    content = path.read_bytes()
    assert content.count(b'"fastvid"') == 1
    path.write_bytes(content.replace(b'"fastvid"', b'"gastvid"'))
    with pytest.raises(
        InputError, match="the file has checksums of fastvid, but not under 'fastvid'.*: copy it again"
    ):
        load_weights(path)


def test_the_counters_of_batch_norms_may_be_anything(tmp_path):
    state = WideResNet(10, 1).state_dict()
    torch.save(state | {"bn1.num_batches_tracked": torch.tensor(3, device="meta")}, tmp_path / "a.pth")
    assert torch.equal(load_network(tmp_path / "a.pth", 10, 1, 10).fc.weight, state["fc.weight"])
