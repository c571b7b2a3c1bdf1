"""State of PyTorch, Flax, Haiku and Equinox comes in, goes on, and leaves again."""

from __future__ import annotations

import functools
import inspect
import json
import pathlib
import pickle
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch_reference
from flax import nnx
from jax import lax
from matrices import true_norm

import jsn
from jsn import interop

API = ["parametrizations", "hooks"]
normalize = jax.jit(jsn.normalize, static_argnames="n_steps")
fold = jax.jit(jsn.fold)


def rel(found, expected) -> float:
    """The largest error, relative to the largest entry."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float(abs(found - expected).max() / max(abs(expected).max(), 1e-30))


def state_dict_of(seed: int, h: int, w: int, *, steps: int = 1, old: bool = False) -> dict:
    """A torch state dict of one Linear, made in numpy: u and v after some power steps."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((h, w)).astype(np.float32)
    u = rng.standard_normal(h).astype(np.float32)
    for _ in range(steps):
        v = W.T @ u / np.linalg.norm(W.T @ u)
        u = W @ v / np.linalg.norm(W @ v)
    v = W.T @ u / np.linalg.norm(W.T @ u)
    names = ("fc.weight_orig", "fc.weight_u", "fc.weight_v")
    new = [f"fc.parametrizations.weight.{part}" for part in ("original", "0._u", "0._v")]
    return dict(zip(names if old else new, (W, u, v), strict=True)) | {
        "fc.bias": np.zeros(h, np.float32)
    }


# --- a torch SN-GAN critic ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.set_num_threads(1)
    return torch


def make_critic(torch, api: str | None, seed: int = 0):
    """The critic of Miyato et al. 2018, small: convolutions that halve, and a linear head."""
    torch.manual_seed(seed)
    wrap = {
        "parametrizations": torch.nn.utils.parametrizations.spectral_norm,
        "hooks": torch.nn.utils.spectral_norm,
        None: lambda layer: layer,
    }[api]
    t = torch.nn
    return t.Sequential(
        wrap(t.Conv2d(3, 8, 3, stride=1, padding=1)),
        t.LeakyReLU(0.1),
        wrap(t.Conv2d(8, 16, 4, stride=2, padding=1)),
        t.LeakyReLU(0.1),
        wrap(t.Conv2d(16, 16, 3, stride=1, padding=1)),
        t.LeakyReLU(0.1),
        t.Flatten(),
        wrap(t.Linear(16 * 4 * 4, 1)),
    )


def critic_in_jax(params, x):
    """The same critic on torch's own layouts."""
    for name, stride in (("0", 1), ("2", 2), ("4", 1)):
        W, b = params[f"{name}.weight"], params[f"{name}.bias"]
        dims = ("NCHW", "OIHW", "NCHW")
        pad = [(1, 1), (1, 1)]
        x = lax.conv_general_dilated(x, W, (stride, stride), pad, dimension_numbers=dims)
        x = jax.nn.leaky_relu(x + b.reshape(1, -1, 1, 1), 0.1)
    x = x.reshape(len(x), -1)
    return x @ params["7.weight"].T + params["7.bias"].reshape(1, -1)


def make_images():
    return np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    return make_images()


def trained(torch, api, images, n_steps: int = 3):
    """A critic after a few optimizer steps, ended by a forward pass on the final weights."""
    critic = make_critic(torch, api)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(n_steps):
        optimizer.zero_grad()
        critic(torch.tensor(images)).square().mean().backward()
        optimizer.step()
    critic(torch.tensor(images))
    return critic


def outputs(torch, critic, images):
    with torch.no_grad():
        return critic(torch.tensor(images)).numpy()


@pytest.mark.parametrize(("api", "n_steps"), [("parametrizations", 0), ("hooks", 1)])
def test_a_recorded_critic_gives_its_outputs_and_exports_back(api, n_steps, images):
    """Runs without torch; `torch_reference.py` wrote what is compared with."""
    before = torch_reference.read(f"critic/{api}/start/")
    params, state = interop.from_torch(before)
    normalized, _ = normalize(params, state, n_steps=n_steps)
    expected = torch_reference.read(f"critic/{api}/")["outputs"]
    assert rel(critic_in_jax(normalized, images), expected) < 1e-5
    exported = interop.to_torch(params, state, old=api == "hooks", tensors=False)
    assert exported.keys() == before.keys()
    for name, x in exported.items():
        if not name.endswith("_v"):
            np.testing.assert_array_equal(x, before[name])


def test_a_parametrized_critic_gives_the_same_outputs(torch, images):
    critic = trained(torch, "parametrizations", images).eval()
    params, state = interop.from_torch(critic.state_dict())
    normalized, _ = normalize(params, state, n_steps=0)
    assert rel(critic_in_jax(normalized, images), outputs(torch, critic, images)) < 1e-5


def test_a_hooked_critic_gives_the_outputs_of_its_next_training_pass(torch, images):
    critic = trained(torch, "hooks", images)
    params, state = interop.from_torch(critic.state_dict())
    normalized, state = normalize(params, state, n_steps=1)
    assert rel(critic_in_jax(normalized, images), outputs(torch, critic.train(), images)) < 1e-5
    for layer in ("0", "2", "4", "7"):
        u = critic.state_dict()[f"{layer}.weight_u"].numpy()
        assert rel(state.u[f"{layer}.weight"][0], u) < 1e-5


@pytest.mark.parametrize("api", API)
def test_a_converged_critic_gives_the_same_outputs_in_both_forms(torch, images, api):
    critic = trained(torch, api, images)
    for _ in range(300):
        outputs(torch, critic, images)
    params, state = interop.from_torch(critic.eval().state_dict())
    normalized, _ = normalize(params, state, n_steps=0)
    assert rel(critic_in_jax(normalized, images), outputs(torch, critic, images)) < 1e-5


@pytest.mark.parametrize("api", API)
def test_a_critic_exports_back_and_loads_strictly(torch, images, api):
    critic = trained(torch, api, images)
    before = {name: x.clone() for name, x in critic.state_dict().items()}
    exported = interop.to_torch(*interop.from_torch(before), old=api == "hooks")
    assert exported.keys() == before.keys()
    for name, x in exported.items():
        assert x.dtype == before[name].dtype
        if not name.endswith("_v"):
            assert torch.equal(x, before[name]), name
    fresh = make_critic(torch, api, seed=1)
    fresh.load_state_dict(exported, strict=True)
    critic.train(), fresh.train()
    assert rel(outputs(torch, fresh, images), outputs(torch, critic, images)) < 1e-5
    if api == "parametrizations":
        critic.eval(), fresh.eval()
        assert rel(outputs(torch, fresh, images), outputs(torch, critic, images)) < 1e-5


def test_a_checkpoint_changes_from_one_form_to_the_other(torch, images):
    critic = trained(torch, "hooks", images)
    params, state = interop.from_torch(critic.state_dict())
    modern = make_critic(torch, "parametrizations", seed=1)
    modern.load_state_dict(interop.to_torch(params, state), strict=True)
    normalized, _ = normalize(params, state, n_steps=0)
    expected = outputs(torch, modern.eval(), images)
    assert rel(critic_in_jax(normalized, images), expected) < 1e-5


@pytest.mark.slow
def test_a_block_of_sixteen_leaves_for_torch_with_its_best_vector(torch, images):
    params, state = interop.from_torch(
        trained(torch, "parametrizations", images).state_dict(), block_size=16
    )
    assert state.u["2.weight"].shape == (16, 16)
    normalized, state = normalize(params, state)
    for name, x in normalized.items():
        if name.endswith("weight"):
            assert true_norm(x, in_axes=1) == pytest.approx(1, abs=1e-3)
    critic = make_critic(torch, "parametrizations", seed=1)
    critic.load_state_dict(interop.to_torch(params, state), strict=True)
    normalized, _ = normalize(params, state, n_steps=0)
    expected = outputs(torch, critic.eval(), images)
    assert rel(critic_in_jax(normalized, images), expected) < 1e-5


def test_plain_weights_leave_for_a_torch_model_without_spectral_norm(torch, images):
    params, state = interop.from_torch(trained(torch, "hooks", images).state_dict())
    plain = fold(params, state)
    critic = make_critic(torch, None, seed=1)
    critic.load_state_dict(interop.to_torch(plain), strict=True)
    assert rel(critic_in_jax(plain, images), outputs(torch, critic, images)) < 1e-5


def test_the_import_shares_no_memory_with_the_torch_model(torch, images):
    critic = trained(torch, "parametrizations", images)
    params, state = interop.from_torch(critic.state_dict())
    kept = jax.tree.map(np.array, (params, state))
    with torch.no_grad():
        for x in [*critic.parameters(), *critic.buffers()]:
            x.zero_()
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, (params, state)))
    exported = interop.to_torch(params, state)
    for x in exported.values():
        x.zero_()
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, (params, state)))


@pytest.mark.parametrize("api", API)
@pytest.mark.parametrize("shape", [(8, 8, 4, 4), (6, 10, 3, 3)], ids=["square", "oblong"])
def test_conv_transpose_is_seen_along_its_second_axis(torch, api, shape):
    wrap = {
        "parametrizations": torch.nn.utils.parametrizations.spectral_norm,
        "hooks": torch.nn.utils.spectral_norm,
    }[api]
    torch.manual_seed(0)
    layer = wrap(torch.nn.ConvTranspose2d(*shape[:2], shape[2]))
    x = torch.randn(2, shape[0], 5, 5)
    layer(x)
    params, state = interop.from_torch(layer.state_dict())
    assert dict(state.operators)["weight"] == jsn.Matrix(out_axis=1)
    assert state.u["weight"].shape == (1, shape[1])
    layer(x), layer.eval()(x)
    n_steps = {"parametrizations": 2, "hooks": 1}[api]
    normalized, state = normalize(params, state, n_steps=n_steps - 1)
    normalized, state = normalize(params, state, n_steps=1 if api == "hooks" else 0)
    assert rel(normalized["weight"], layer.weight.detach().numpy()) < 1e-5
    exported = interop.to_torch(params, state, old=api == "hooks")
    layer.load_state_dict(exported, strict=True)


def test_a_square_weight_that_was_never_used_is_seen_along_its_first_axis(torch):
    torch.manual_seed(0)
    for layer in (torch.nn.Linear(32, 32), torch.nn.Conv2d(16, 16, 3)):
        state_dict = torch.nn.utils.spectral_norm(layer).state_dict()
        _, state = interop.from_torch(state_dict)
        assert dict(state.operators)["weight"] == jsn.Matrix(out_axis=0)


def test_a_rule_settles_which_axis_is_the_output(torch):
    torch.manual_seed(0)
    layer = torch.nn.utils.spectral_norm(torch.nn.ConvTranspose2d(16, 16, 3))  # never used
    rules = [("weight$", jsn.Matrix(out_axis=1))]
    params, state = interop.from_torch(layer.state_dict(), rules=rules)
    assert dict(state.operators)["weight"] == jsn.Matrix(out_axis=1)
    assert rel(state.u["weight"][0], layer.weight_u) == 0
    normalized, _ = normalize(params, state)
    layer(torch.zeros(1, 16, 4, 4))
    assert rel(normalized["weight"], layer.weight.detach()) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tensors_of_other_precisions(torch, dtype):
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 4))
    state_dict = layer.to(getattr(torch, dtype)).state_dict()
    params, state = interop.from_torch(state_dict)
    expected = jnp.float32 if dtype == "float64" and not jax.config.jax_enable_x64 else dtype
    assert params["weight"].dtype == expected
    assert state.u["weight"].dtype == jnp.float32
    exported = interop.to_torch(params, state)
    for name in state_dict:
        if not name.endswith("_v"):
            error = rel(exported[name].double(), state_dict[name].double())
            assert error == 0 or (error < 1e-7 and dtype == "float64")
    layer.load_state_dict(exported, strict=True)


def test_buffers_and_pruned_weights_are_handed_through(torch):
    torch.manual_seed(0)
    from torch.nn.utils.prune import l1_unstructured

    model = torch.nn.Sequential(
        torch.nn.utils.spectral_norm(torch.nn.Linear(4, 5)),
        torch.nn.BatchNorm1d(5),
        l1_unstructured(torch.nn.Linear(5, 3), "weight", 0.5),
    )
    model[1].num_batches_tracked += 2**40
    before = model.state_dict()
    params, state = interop.from_torch(before)
    assert [path for path, _ in state.operators] == ["0.weight"]
    assert params["1.num_batches_tracked"] == 2**40  # exact: JAX has no int64 here
    normalized, state = jsn.normalize(params, state, n_steps=0)
    assert true_norm(normalized["0.weight"], 1) > 1  # torch's hook starts from a random u
    exported = interop.to_torch(params, state, old=True)
    model.load_state_dict(exported, strict=True)
    for name in before:
        if not name.endswith("_v"):
            assert torch.equal(before[name], exported[name]), name


# --- torch's layout, without torch ---------------------------------------------------------------


def test_numpy_and_jax_arrays_will_do():
    state_dict = state_dict_of(0, 5, 7)
    params, state = interop.from_torch(state_dict)
    assert set(params) == {"fc.weight", "fc.bias"}
    assert state.u["fc.bias"] is None
    again = interop.from_torch({name: jnp.asarray(x) for name, x in state_dict.items()})
    assert jax.tree.all(jax.tree.map(np.array_equal, (params, state), again))


def test_names_of_data_parallel_and_root_modules():
    for prefix in ("", "module.", "_orig_mod.a.b.0."):
        for old in (False, True):
            entries = state_dict_of(0, 5, 7, old=old)
            entries = {prefix + k.removeprefix("fc."): x for k, x in entries.items()}
            params, state = interop.from_torch(entries)
            assert set(params) == {f"{prefix}weight", f"{prefix}bias"}
            exported = interop.to_torch(params, state, old=old, tensors=False)
            assert set(exported) == set(entries)


def test_any_parameter_name_is_read():
    entries = state_dict_of(0, 12, 3)
    entries = {k.replace("weight", "weight_hh_l0"): x for k, x in entries.items()}
    params, state = interop.from_torch(entries)
    assert state.u["fc.weight_hh_l0"].shape == (1, 12)
    assert set(interop.to_torch(params, state)) == set(entries)


def test_the_form_of_pytorch_1_0_is_read():
    entries = state_dict_of(0, 5, 7, old=True)
    del entries["fc.weight_v"]
    entries["fc.weight"] = entries["fc.weight_orig"] / 3
    params, state = interop.from_torch(entries)
    assert rel(params["fc.weight"], entries["fc.weight_orig"]) == 0
    assert rel(state.u["fc.weight"][0], entries["fc.weight_u"]) == 0


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_lost_u_is_started_anew(bad):
    entries = state_dict_of(0, 40, 30)
    entries["fc.parametrizations.weight.0._u"][:] = bad
    params, state = interop.from_torch(entries)
    normalized, _ = normalize(params, state, n_steps=0)
    assert true_norm(normalized["fc.weight"], 1) == pytest.approx(1, abs=1e-3)


def test_a_block_size_makes_the_state_as_true_as_init_does():
    params, state = interop.from_torch(state_dict_of(0, 40, 30), block_size=8)
    expected = jsn.init(params, rules=jsn.TORCH, block_size=8)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, expected))


def test_nested_parameters_export_under_dotted_names():
    params = {"body": {"0": {"weight": jnp.eye(3), "bias": jnp.ones(3)}}, "none": None}
    state = jsn.init(params, rules=jsn.TORCH)
    assert set(interop.to_torch(params, state)) == {
        "body.0.parametrizations.weight.original",
        "body.0.parametrizations.weight.0._u",
        "body.0.parametrizations.weight.0._v",
        "body.0.bias",
    }


def test_safetensors_in_and_out_where_torch_cannot_be_imported(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors.numpy import save_file

    entries = state_dict_of(0, 5, 7)
    save_file(entries, tmp_path / "critic.safetensors")
    program = """
        import sys
        sys.modules["torch"] = None  # from here on, import torch raises
        import numpy as np, jsn
        from safetensors.numpy import load_file, save_file
        source, target = sys.argv[1:]
        params, state = jsn.interop.from_torch(source)
        save_file(jsn.interop.to_torch(params, state, tensors=False), target)
        before, after = load_file(source), load_file(target)
        assert before.keys() == after.keys()
        for name in before:
            np.testing.assert_allclose(before[name], after[name], atol=1e-6)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    files = [str(tmp_path / "critic.safetensors"), str(tmp_path / "back.safetensors")]
    subprocess.run([*command, *files], check=True, timeout=120)


def test_safetensors_of_bfloat16_and_integers(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    W = np.asarray(np.eye(3, 4), ml_dtypes.bfloat16)
    u = np.array([1, 0, 0], np.float32)
    arrays = {
        "parametrizations.weight.original": ("BF16", W),
        "parametrizations.weight.0._u": ("F32", u),
        "steps": ("I64", np.array(2**40)),
    }
    header, blob = {}, b""
    for name, (dtype, x) in arrays.items():
        offsets = [len(blob), len(blob) + x.nbytes]
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": offsets}
        blob += x.tobytes()
    text = json.dumps(header).encode()
    path = tmp_path / "half.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)
    params, state = interop.from_torch(path)
    assert params["weight"].dtype == jnp.bfloat16
    assert rel(params["weight"], W) == 0
    assert params["steps"] == 2**40
    assert rel(state.u["weight"][0], u) == 0


# --- what is wrong is told ----------------------------------------------------------------------


def test_a_pickle_is_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "opened",))

    for name in ("critic.pt", "critic.pth", "pytorch_model.bin", "critic"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match="weights_only=True"):
            interop.from_torch(tmp_path / name)
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / "critic.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        interop.from_torch(str(tmp_path / "critic.safetensors"))
    assert not (tmp_path / "opened").exists()


def test_files_that_are_missing_cut_short_or_no_files(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="no such file"):
        interop.from_torch(tmp_path / "nowhere.safetensors")
    save_file(state_dict_of(0, 5, 7), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    for size in (0, 4, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read"):
            interop.from_torch(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"folder\.safetensors cannot be read"):
        interop.from_torch(tmp_path / "folder.safetensors")


def test_packages_that_are_missing(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        interop.from_torch(tmp_path / "x.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torch"):
        interop.to_torch({"weight": jnp.eye(2)}, tensors=True)
    exported = interop.to_torch({"weight": jnp.eye(2)})
    assert isinstance(exported["weight"], np.ndarray)
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match="pip install equinox"):
        interop.from_equinox({}, None)


def changed(**entries):
    """A good state dict with some entries replaced, or taken out by None."""
    names = {"W": "original", "u": "0._u", "v": "0._v"}
    good = state_dict_of(0, 5, 7)
    for key, value in entries.items():
        name = f"fc.parametrizations.weight.{names[key]}" if key in names else key
        good[name] = value
    return {name: value for name, value in good.items() if value is not None}


BAD_STATE_DICTS = [
    ({}, ValueError, "nothing here is spectrally normalized"),
    ({"fc.weight": np.eye(3)}, ValueError, r"jsn\.init\(params, rules=jsn\.TORCH\)"),
    (3, TypeError, "expected a state dict .* found int"),
    ([1, 2], TypeError, "found list"),
    ({"model": {"fc.weight": np.eye(3)}, "epoch": 3}, ValueError, "model: found dict(.|\n)*epoch"),
    ({1: np.eye(3)}, ValueError, "the name is a int"),
    (changed(x=np.array([object()])), ValueError, "x: found dtype object"),
    (changed(x=np.array("text")), ValueError, "x: found dtype <U4"),
    (changed(x=np.ones(3, np.longdouble)), ValueError, "x: found dtype float128"),
    (changed(x=np.ones(3, "M8[s]")), ValueError, "x: found dtype datetime64"),
    (changed(u=None), ValueError, "fc.weight: found original and v, but no u"),
    (changed(W=None), ValueError, "fc.weight: found u and v, but no original"),
    (changed(u=np.ones(4, np.float32)), ValueError, r"fc.weight: .*\(4,\).*fit no axis.*\(5, 7\)"),
    (changed(v=np.ones(6, np.float32)), ValueError, r"\(6,\) fit no axis"),
    (changed(u=np.ones((5, 1), np.float32)), ValueError, r"\(5, 1\)"),
    (changed(u=np.ones(5, np.int32)), ValueError, "u has dtype int32"),
    (changed(u=np.ones(5, np.complex64)), ValueError, "u has dtype complex64"),
    (changed(W=np.ones((5, 7), np.int32)), TypeError, r"fc\.weight: found dtype int32"),
    (changed(W=np.ones(()), v=None), ValueError, "fit no axis"),
    (changed(W=np.ones((0, 7)), u=np.ones(0), v=np.ones(7)), ValueError, "fit no axis"),
    (changed(W=np.ones(5), v=None), ValueError, "needs at least 2 axes"),
    (changed(**{"fc.weight": np.eye(3)}), ValueError, "fc.weight: is here both with and"),
    (
        {**state_dict_of(0, 5, 7), **state_dict_of(0, 5, 7, old=True)},
        ValueError,
        "both of torch's forms",
    ),
    (
        changed(**{"ln.parametrizations.weight.original0": np.ones(3)}),
        ValueError,
        "ln.*original0: belongs to a parametrization other than",
    ),
    (changed(**{"o.parametrizations.weight.1._u": np.ones(3)}), ValueError, "other than spectral"),
    (changed(**{"o.parametrizations.weight.original": np.ones(3)}), ValueError, "o.weight: .*no u"),
    (changed(**{"o.weight_orig": np.ones((3, 3))}), ValueError, "o.weight: .*no u"),
]


@pytest.mark.parametrize(("source", "kind", "message"), BAD_STATE_DICTS)
def test_bad_state_dicts_are_told_by_name(source, kind, message):
    with pytest.raises(kind, match=message) as caught:
        interop.from_torch(source)
    assert str(caught.value).startswith("jsn.interop.from_torch")


def test_all_bad_entries_are_told_at_once():
    entries = {f"{i}.{k}": x for i in range(3) for k, x in changed(u=np.ones(4)).items()}
    with pytest.raises(ValueError, match="3 entries cannot be used") as caught:
        interop.from_torch(entries)
    assert all(f"{i}.fc.weight" in str(caught.value) for i in range(3))


def test_bad_options():
    good = state_dict_of(0, 5, 7)
    with pytest.raises(ValueError, match="block_size is 0"):
        interop.from_torch(good, block_size=0)
    with pytest.raises(TypeError, match="rules are malformed"):
        interop.from_torch(good, rules="weight")
    with pytest.raises(ValueError, match="matches no leaf"):
        interop.from_torch(good, rules=[("nowhere", None)])
    with pytest.raises(ValueError, match="no leaf of the parameters is normalized"):
        interop.from_torch(good, rules=[("weight", None)])


def test_tensors_that_hold_nothing_readable(torch):
    for x in (torch.ones(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(ValueError, match=r"fc\.bias: "):
            interop.from_torch(changed(**{"fc.bias": x}))


def test_what_torch_cannot_express_is_told():
    params = {"a": jnp.ones((2, 3, 4)), "b": jnp.eye(3), "c": jnp.ones((4, 5, 6))}
    rules = [("a", jsn.Matrix(batch_axis=0)), ("b", jsn.Matrix()), ("c", jsn.Matrix(0, None))]
    state = jsn.init(params, rules=rules)
    with pytest.raises(ValueError, match="2 weights cannot be expressed") as caught:
        interop.to_torch({**params, "c": params["c"]}, state)
    assert "jsn.fold" in str(caught.value)
    with pytest.raises(TypeError, match="expected the SNState"):
        interop.to_torch(params, {"a": 1})
    with pytest.raises(ValueError, match="does not fit"):
        interop.to_torch({"b": jnp.eye(3)}, state)


# --- Flax linen ----------------------------------------------------------------------------------


class LinenCritic(nn.Module):
    """A critic with Flax's own spectral normalization, or without."""

    normalized: bool = True

    @nn.compact
    def __call__(self, x, update_stats=False):
        def wrap(layer):
            if not self.normalized:
                return layer
            return lambda x: nn.SpectralNorm(layer)(x, update_stats=update_stats)

        x = nn.leaky_relu(wrap(nn.Conv(8, (3, 3)))(x))
        x = nn.BatchNorm(use_running_average=True)(x)
        return wrap(nn.Dense(5))(x.mean(axis=(1, 2)))


@functools.partial(jax.jit, static_argnames=("model", "n_steps"))
def linen_trained(model, x, n_steps: int = 3):
    variables = model.init(jax.random.key(0), x)
    for _ in range(n_steps):
        _, updates = model.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    return variables


def test_a_linen_checkpoint_goes_on_under_the_decorator():
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    flax_model, variables = LinenCritic(), linen_trained(LinenCritic(), x)
    params, stats = variables["params"], variables["batch_stats"]
    state = interop.from_flax_linen(params, stats)
    assert sorted(path for path, _ in state.operators) == [
        "Conv_0/kernel",
        "Dense_0/kernel",
    ]
    ours = jsn.linen.spectral_norm(LinenCritic)(normalized=False)
    mine = {"params": params, "sn_state": {"spectral_norm": state}}
    mine["batch_stats"] = {"BatchNorm_0": stats["BatchNorm_0"]}

    @jax.jit
    def both(mine, variables):
        y, updates = ours.apply(mine, x, mutable=["sn_state"])
        theirs = flax_model.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        return y, {**mine, **updates}, theirs[0], {**variables, **theirs[1]}

    for _ in range(2):
        y, mine, expected, variables = both(mine, variables)
        assert rel(y, expected) < 1e-5
    back = interop.to_flax_linen(params, mine["sn_state"], stats)
    assert jax.tree.structure(back) == jax.tree.structure(stats)
    y, _, expected, _ = both(mine, {"params": params, "batch_stats": back})
    assert rel(y, expected) < 1e-5


def test_linen_vectors_come_back_bit_for_bit():
    x = jnp.ones((2, 8, 8, 3))
    variables = linen_trained(LinenCritic(), x)
    params, stats = variables["params"], variables["batch_stats"]
    back = interop.to_flax_linen(params, interop.from_flax_linen(params, stats), stats)
    for scope, entries in stats.items():
        for name, value in entries.items():
            if name.endswith("/u") or scope == "BatchNorm_0":
                assert np.array_equal(back[scope][name], value), name


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, update_stats=False):
        return nn.SpectralNorm(nn.Dense(4))(x, update_stats=update_stats)


class EveryScope(nn.Module):
    """The places where Flax may keep the statistics of a layer."""

    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.outside = nn.SpectralNorm(self.conv)
        self.nested = Nested()
        self.adopted = nn.SpectralNorm(nn.Dense(6))
        self.whole = nn.SpectralNorm(nn.Sequential([nn.Dense(4), nn.Dense(4)]))

    def __call__(self, x, update_stats=False):
        x = self.outside(x, update_stats=update_stats)
        x = self.nested(x, update_stats=update_stats)
        x = self.adopted(x, update_stats=update_stats)
        return self.whole(x, update_stats=update_stats)


@pytest.mark.slow
def test_linen_statistics_are_found_in_every_scope():
    variables = jax.jit(EveryScope().init)(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    params, stats = variables["params"], variables["batch_stats"]
    state = interop.from_flax_linen(params, stats)
    us = {
        "conv/kernel": stats["outside"]["conv/kernel/u"],
        "nested/Dense_0/kernel": stats["nested"]["SpectralNorm_0"]["Dense_0/kernel/u"],
        "adopted/layer_instance/kernel": stats["adopted"]["layer_instance/kernel/u"],
    }
    whole = {
        f"whole/layer_instance/layers_{i}/kernel": stats["whole"][
            f"layer_instance/layers_{i}/kernel/u"
        ]
        for i in range(2)
    }
    flat = {"/".join(k.key for k in path): u for path, u in jax.tree.leaves_with_path(state.u)}
    assert flat.keys() == (us | whole).keys()
    for path, u in (us | whole).items():
        assert rel(flat[path], u / jnp.linalg.norm(u)) < 1e-6, path  # Flax starts unnormalized


@pytest.mark.slow
def test_linen_layers_under_scan_have_a_vector_each():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.SpectralNorm(nn.Dense(6))(x, update_stats=True), None

    stack = nn.scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )()
    variables = jax.jit(stack.init)(jax.random.key(0), jnp.ones((2, 6)), None)
    params, stats = variables["params"], variables["batch_stats"]
    state = interop.from_flax_linen(params, stats)
    assert state.u["Dense_0"]["kernel"].shape == (3, 1, 6)
    normalized, state = normalize(params, state)
    y = jnp.ones((2, 6))
    for W, b in zip(normalized["Dense_0"]["kernel"], normalized["Dense_0"]["bias"], strict=True):
        y = y @ W + b.reshape(1, -1)
    expected = stack.apply(variables, jnp.ones((2, 6)), None, mutable=["batch_stats"])[0][0]
    assert rel(y, expected) < 1e-5
    back = interop.to_flax_linen(params, state, stats)
    assert back["SpectralNorm_0"]["Dense_0/kernel/sigma"].shape == (3,)


def test_rules_let_go_of_what_flax_normalizes_by_accident():
    model = nn.SpectralNorm(nn.MultiHeadDotProductAttention(2))
    x = jnp.ones((1, 3, 4))
    variables = jax.jit(functools.partial(model.init, update_stats=False))(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]
    state = interop.from_flax_linen(params, stats)
    assert state.u["layer_instance"]["query"]["bias"] is not None
    rules = [("bias$", None), *jsn.FLAX]
    state = interop.from_flax_linen(params, stats, rules=rules, block_size=4)
    assert state.u["layer_instance"]["query"]["bias"] is None
    assert state.u["layer_instance"]["query"]["kernel"].shape == (4, 2, 2)
    with pytest.raises(ValueError, match="query/bias: is not normalized by the state"):
        interop.to_flax_linen(params, state, stats)


def flat_stats(**extra):
    return {"SpectralNorm_0": {"Dense_0/kernel/u": jnp.ones((1, 4)), **extra}}


def test_bad_linen_collections_are_told_by_name():
    params = {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    sigma = {"Dense_0/kernel/sigma": jnp.ones(())}
    good = flat_stats(**sigma)
    assert interop.from_flax_linen(params, good).u["Dense_0"]["kernel"].shape == (1, 4)
    cases = [
        (params, None, TypeError, "expected the collection"),
        (params, {}, ValueError, "nothing here is spectrally normalized"),
        (params, {"BatchNorm_0": {"mean": jnp.ones(3)}}, ValueError, "BatchNorm_0/mean"),
        ({"Dense_1": params["Dense_0"]}, good, ValueError, "there is no such parameter"),
        ({"Dense_0": {"kernel": jnp.ones((3, 5))}}, good, ValueError, r"\(1, 4\): does not fit"),
        (params, good | {"b": good["SpectralNorm_0"]}, ValueError, "which has one already"),
    ]
    for tree, stats, kind, message in cases:
        with pytest.raises(kind, match=message):
            interop.from_flax_linen(tree, stats)
    two = {"Dense_0": params["Dense_0"], "Dense_1": params["Dense_0"]}
    state = jsn.init(two)
    with pytest.raises(ValueError, match=r"Dense_1/kernel: is not in the flax\.linen"):
        interop.to_flax_linen(two, state, good)
    state = jsn.init(params, rules=[("kernel", jsn.Matrix(out_axis=0))])
    with pytest.raises(ValueError, match=r"is seen as Matrix\(out_axis=0\), expected"):
        interop.to_flax_linen(params, state, good)
    with pytest.raises(TypeError, match="expected the collection"):
        interop.to_flax_linen(params, state, 3)


# --- Flax nnx ------------------------------------------------------------------------------------


needs_nnx = pytest.mark.skipif(
    not hasattr(nnx, "SpectralNorm"), reason="this Flax has no nnx.SpectralNorm yet"
)


def nnx_model(normalized: bool):
    rngs = nnx.Rngs(0)

    def wrap(layer):
        return nnx.SpectralNorm(layer, rngs=rngs) if normalized else layer

    return nnx.Sequential(
        wrap(nnx.Linear(6, 8, rngs=rngs)),
        nnx.relu,
        nnx.BatchNorm(8, use_running_average=True, rngs=rngs),
        wrap(nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs))),
    )


@pytest.mark.slow
@needs_nnx
def test_an_nnx_model_leaves_its_wrappers_and_comes_back():
    wrapped, plain = nnx_model(True), nnx_model(False)
    x = jax.random.normal(jax.random.key(1), (4, 6))
    run = nnx.jit(lambda model, x: model(x))
    for _ in range(3):
        run(wrapped, x)
    before = jax.tree.map(np.array, nnx.state(wrapped))
    params, state = interop.from_flax_nnx(wrapped)
    assert sorted(path for path, _ in state.operators) == [
        "layers/0/kernel",
        "layers/3/layers/0/kernel",
        "layers/3/layers/1/kernel",
    ]
    assert nnx.to_flat_state(params).paths == nnx.to_flat_state(nnx.state(plain, nnx.Param)).paths
    normalized, state = normalize(params, state)
    nnx.update(plain, normalized)
    assert (
        rel(run(plain, x), run(wrapped, x)) < 1e-5
    )  # nnx overwrites the weights of `wrapped` here
    kept = interop.from_flax_nnx(before)[0]  # nothing of `params` was shared
    assert jax.tree.all(jax.tree.map(np.array_equal, params, kept))

    other = nnx_model(True)
    nnx.update(other, interop.to_flax_nnx(params, interop.from_flax_nnx(before)[1], before))
    for path, x in nnx.to_flat_state(nnx.state(other, (nnx.Param, nnx.BatchStat))):
        expected = dict(nnx.to_flat_state(before))[path][...]
        if "sigma" not in str(path):
            assert np.array_equal(x[...], expected), path


@needs_nnx
def test_an_nnx_state_goes_on_in_jsn_nnx():
    wrapped, plain = nnx_model(True), nnx_model(False)
    x = jax.random.normal(jax.random.key(1), (4, 6))
    run = nnx.jit(lambda model, x: model(x))
    for _ in range(50):
        run(wrapped, x)
    nnx.update(plain, interop.from_flax_nnx(wrapped)[0])
    ours = jsn.nnx.spectral_norm(plain)
    ours.eval()
    assert rel(run(ours, x), run(wrapped, x)) < 1e-3


@needs_nnx
def test_bad_nnx_models_are_told():
    wrapped, plain = nnx_model(True), nnx_model(False)
    with pytest.raises(TypeError, match=r"expected an nnx\.Module"):
        interop.from_flax_nnx({"layers": 1})
    with pytest.raises(ValueError, match="nothing here is spectrally normalized"):
        interop.from_flax_nnx(plain)
    params, _ = interop.from_flax_nnx(wrapped)
    del params["layers"][0]["bias"]
    state_without = jsn.init(params)
    with pytest.raises(ValueError, match=r"layers/0/bias: expected shape \(8,\), found nothing"):
        interop.to_flax_nnx(params, state_without, wrapped)
    params, _ = interop.from_flax_nnx(wrapped)
    state = jsn.init(params, rules=[("layers/0", None), *jsn.FLAX])
    with pytest.raises(ValueError, match="layers/0/kernel: is not normalized by the state"):
        interop.to_flax_nnx(params, state, wrapped)
    wrapped.layers[0].layer_instance.kernel = nnx.Param(jnp.ones((6, 5)))
    with pytest.raises(ValueError, match=r"\(1, 8\): does not fit .* of shape \(6, 5\)"):
        interop.from_flax_nnx(wrapped)


# --- Haiku ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hk():
    return pytest.importorskip("haiku", reason="dm-haiku is not installed")


def test_a_haiku_parameter_tree_comes_and_goes(hk):
    x = jax.random.normal(jax.random.key(1), (2, 6))
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 5])(x)))
    tree = hk.transform_with_state(lambda p: hk.SNParamsTree(eps=0, ignore_regex=".*/b$")(p))
    apply = jax.jit(tree.apply)
    params = jax.jit(net.init)(jax.random.key(0), x)
    _, hk_state = jax.jit(tree.init)(jax.random.key(1), params)
    _, hk_state = apply({}, hk_state, None, params)
    state = interop.from_haiku(params, hk_state)
    assert [path for path, _ in state.operators] == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    normalized, _ = normalize(params, state)
    expected, _ = apply({}, hk_state, None, params)
    for path, W in jax.tree.leaves_with_path(normalized):
        assert rel(W, expected[path[0].key][path[1].key]) < 1e-5
    assert rel(net.apply(normalized, x), net.apply(expected, x)) < 1e-5
    back = interop.to_haiku(params, state, hk_state)
    assert jax.tree.structure(back) == jax.tree.structure(hk_state)
    for module, entries in hk_state.items():
        assert np.array_equal(back[module]["u0"], entries["u0"])
        W = params["mlp/~/linear_" + module[-4]]["w"]
        assert back[module]["sigma"] == pytest.approx(np.linalg.norm(W @ entries["u0"][0]), 1e-5)


def test_a_haiku_vector_that_fits_two_parameters_is_given_by_name():
    """Also where Haiku is not installed."""
    params = {"layer": {n: jnp.ones(s) for n, s in (("w", (6, 4)), ("a", (4, 7)), ("b", (2, 7)))}}
    vector = lambda n: {"u0": jnp.ones((1, n)), "sigma": jnp.ones(())}
    hk_state = {"layer/spectral_norm": vector(4), "layer/~/early": vector(7)}
    with pytest.raises(ValueError, match="may belong to layer/a or layer/b"):
        interop.from_haiku(params, hk_state)
    names = {"layer/~/early": "layer/a"}
    state = interop.from_haiku(params, hk_state, names=names)
    assert [path for path, _ in state.operators] == ["layer/a", "layer/w"]
    back = interop.to_haiku(params, state, hk_state, names=names)
    assert back["layer/~/early"]["sigma"] == pytest.approx(np.sqrt(4 * 7), rel=1e-6)


@pytest.mark.slow
def test_haiku_modules_tell_their_parameter_by_its_place_or_by_name(hk):
    class Layer(hk.Module):
        def __init__(self, n):
            super().__init__()
            self.n, self.made_early = n, hk.SpectralNorm(name="early")

        def __call__(self, x):
            shapes = {"w": (x.shape[-1], self.n), "w2": (self.n, 7), "w3": (2, 7)}
            init = hk.initializers.RandomNormal()
            w, w2, _ = (hk.get_parameter(name, s, init=init) for name, s in shapes.items())
            return x @ hk.SpectralNorm()(w) @ self.made_early(w2)

    net = hk.transform_with_state(lambda x: Layer(4)(Layer(3)(x)))
    x = jnp.ones((2, 6))
    params, hk_state = jax.jit(net.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match="may belong to layer/w2 or layer/w3") as caught:
        interop.from_haiku(params, hk_state)
    assert "names={" in str(caught.value)
    names = {"layer/~/early": "layer/w2", "layer_1/~/early": "layer_1/w2"}
    state = interop.from_haiku(params, hk_state, names=names)
    assert sorted(path for path, _ in state.operators) == [
        "layer/w",
        "layer/w2",
        "layer_1/w",
        "layer_1/w2",
    ]
    back = interop.to_haiku(params, state, hk_state, names=names)
    assert jax.tree.structure(back) == jax.tree.structure(hk_state)
    with pytest.raises(TypeError, match="expected the state of"):
        interop.from_haiku(params, None)
    with pytest.raises(TypeError, match="expected the state of"):
        interop.to_haiku(params, state, 1)


# --- Equinox -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eqx():
    return pytest.importorskip("equinox", reason="equinox is not installed")


def eqx_critic(eqx, seed: int = 0):
    def make():
        keys = jax.random.split(jax.random.key(seed), 6)
        return eqx.nn.Sequential(
            [
                eqx.nn.SpectralNorm(eqx.nn.Conv2d(3, 8, 3, key=keys[0]), "weight", key=keys[1]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.SpectralNorm(eqx.nn.Linear(32, 5, key=keys[2]), "weight", key=keys[3]),
                eqx.nn.Linear(5, 1, key=keys[4]),
            ]
        )

    return eqx.nn.make_with_state(make)()


@pytest.mark.slow
def test_an_equinox_model_leaves_its_wrappers_and_comes_back(eqx):
    x = jax.random.normal(jax.random.key(1), (3, 4, 4))
    wrapped, eqx_state = eqx_critic(eqx)
    model, state = interop.from_equinox(wrapped, eqx_state)
    assert [path for path, _ in state.operators] == ["layers/0/weight", "layers/3/weight"]
    normalized, _ = eqx.filter_jit(jsn.normalize)(model, state, n_steps=0)
    run = eqx.filter_jit(lambda model, *args: model(*args))
    expected, eqx_state = run(eqx.nn.inference_mode(wrapped), x, eqx_state)
    assert rel(run(normalized, x), expected) < 1e-5

    other, other_state = eqx_critic(eqx, seed=5)
    back, back_state = interop.to_equinox(model, state, other, other_state)
    for found, target in zip(jax.tree.leaves(back), jax.tree.leaves(wrapped), strict=True):
        assert not isinstance(found, jax.Array) or np.array_equal(found, target)
    assert rel(run(eqx.nn.inference_mode(back), x, back_state)[0], expected) < 1e-5
    for index in (0, 3):
        u, v = back_state.get(back.layers[index].uv_index)
        u_was, v_was = eqx_state.get(wrapped.layers[index].uv_index)
        assert np.array_equal(u, u_was)
        assert rel(v, v_was) < 1e-5
    run(other, x, other_state)  # the template and its state are still usable


def test_bad_equinox_models_are_told(eqx):
    wrapped, eqx_state = eqx_critic(eqx)
    model, state = interop.from_equinox(wrapped, eqx_state)
    with pytest.raises(ValueError, match="nothing here is spectrally normalized"):
        interop.from_equinox(model, eqx_state)
    with pytest.raises(ValueError, match=r"layers/0/weight: .*not in the state"):
        interop.from_equinox(wrapped, eqx.nn.State(model))
    with pytest.raises(ValueError, match="parameters of another structure"):
        interop.to_equinox({"a": 1}, state, wrapped, eqx_state)
    state = jsn.init(model, rules=[("layers/(3|4)/weight", jsn.Matrix(out_axis=0))])
    with pytest.raises(ValueError, match="layers/4/weight: has no wrapper") as caught:
        interop.to_equinox(model, state, wrapped, eqx_state)
    assert "layers/0/weight: is not normalized" in str(caught.value)


# --- the examples that need what may be missing, so are no doctests ------------------------------


def example_of(function) -> str:
    return inspect.getdoc(function).split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("function", [interop.from_equinox, interop.to_equinox])
def test_the_equinox_examples_run(eqx, function):
    exec(textwrap.dedent(example_of(function)), {})


@needs_nnx
@pytest.mark.parametrize("function", [interop.from_flax_nnx, interop.to_flax_nnx])
def test_the_nnx_examples_run(function):
    exec(textwrap.dedent(example_of(function)), {})


# --- docs/coming_from.md -------------------------------------------------------------------------

GUIDE = pathlib.Path(__file__).parent.parent / "docs" / "coming_from.md"
NEEDS = {
    "Flax linen": None,
    "Flax NNX": None,
    "PyTorch": "torch",
    "Keras": "keras",
    "Haiku": "haiku",
    "Equinox": "equinox",
}


@pytest.mark.slow
@pytest.mark.parametrize("section", NEEDS)
def test_the_code_of_the_guide_runs(section, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    if section == "Flax NNX" and not hasattr(nnx, "SpectralNorm"):
        pytest.skip("this Flax has no nnx.SpectralNorm yet")
    if NEEDS[section]:
        pytest.importorskip(NEEDS[section], reason=f"{NEEDS[section]} is not installed")
    text = GUIDE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert blocks
    with jax.numpy_rank_promotion("allow"):  # a reader's own code may broadcast
        exec("\n".join(blocks), {"__name__": "guide"})


def test_the_guide_has_a_section_for_each_library():
    sections = [line[3:] for line in GUIDE.read_text().splitlines() if line.startswith("## ")]
    assert sections == list(NEEDS)


def test_safetensors_of_a_dtype_without_an_array(tmp_path):
    """Scales of microscaling formats, four bits to a number: refused by name."""
    header = json.dumps({"fc.weight": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}})
    path = tmp_path / "scales.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0\0")
    with pytest.raises(ValueError, match=r"(?s)fc\.weight.*F8_E8M0.*Expected one of F64"):
        jsn.interop.from_torch(path)
