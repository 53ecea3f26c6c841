"""Recorded numbers of the published implementations, by kind."""

import ast
import os
from pathlib import Path

from safetensors import safe_open

FOLDER = Path(os.environ.get("POSTTRAIN_PARITY_DIR", Path(__file__).parent / "parity"))


class Vectors:
    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.meta = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.name = path.stem

    def __getitem__(self, key):
        return self.tensors[key]

    def __contains__(self, key):
        return key in self.tensors

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def number(self, key):
        return float(self.meta[key])

    def points(self):
        count = len({k.split(".")[1] for k in self.tensors if k.startswith("point.")})
        return [self.under(f"point.{i:02d}.") for i in range(count)]

    def transformer(self, prefix="weight."):
        from diffusers import SD3Transformer2DModel

        network = SD3Transformer2DModel(**ast.literal_eval(self.meta["config"]))
        network.load_state_dict(self.under(prefix))
        return network.eval()


def of_kind(kind):
    found = [v for v in map(Vectors, sorted(FOLDER.glob("*.safetensors"))) if v.meta["kind"] == kind]
    assert found, f"no vectors of kind {kind} in {FOLDER}"
    return found


def assert_close(actual, expected, tolerance):
    """max |a - b| / max |b| under ``tolerance``."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


def ids(vectors):
    return vectors.name
