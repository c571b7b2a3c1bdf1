"""What torch's spectral normalization does, recorded, so that parity is tested without torch.

`python tests/torch_reference.py`, where torch is installed, writes `tests/data/torch.npz` anew. It
holds, for each of torch's two forms, the state dict of a layer before training and its raw weight
after some of 25 steps; and the state dict of a small critic, with its outputs.
"""

from __future__ import annotations

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).parent / "data" / "torch.npz"
RATES = {"hooks": 0.1, "parametrizations": 0.03}
RAW = {"hooks": "weight_orig", "parametrizations": "parametrizations.weight.original"}
STEPS = np.array([0, 1, 4, 9, 24])
"""Which steps of training are kept."""


def read(prefix: str) -> dict[str, np.ndarray]:
    """The recorded arrays below a prefix, by the rest of their names."""
    with np.load(PATH) as arrays:
        return {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}


def main() -> None:
    import test_interop as critics
    import test_parity as parity
    import torch

    torch.set_num_threads(1)
    wraps = {
        "hooks": torch.nn.utils.spectral_norm,
        "parametrizations": torch.nn.utils.parametrizations.spectral_norm,
    }
    arrays = {"version": np.array(torch.__version__)}

    def add(prefix: str, state_dict: dict) -> None:
        arrays.update({f"{prefix}/{name}": x.numpy().copy() for name, x in state_dict.items()})

    for api, wrap in wraps.items():
        for kind in parity.KINDS:
            layer, task = parity.torch_layer(torch, kind, wrap), parity.make_task(kind)
            if api == "parametrizations":
                parity.settle(layer)
            add(f"{kind}/{api}/start", layer.state_dict())
            weights = parity.trained_in_torch(torch, layer, task, RAW[api], RATES[api])
            arrays[f"{kind}/{api}/weights"] = weights[STEPS]
        images = critics.make_images()
        critic = critics.trained(torch, api, images)
        critic = critic.eval() if api == "parametrizations" else critic
        add(f"critic/{api}/start", critic.state_dict())
        arrays[f"critic/{api}/outputs"] = critics.outputs(torch, critic, images)
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH.name}: {len(arrays)} arrays, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
