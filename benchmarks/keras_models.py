"""The layers of the benchmarks in Keras 3 on its JAX backend. Imports Keras: only for the Keras peer.

Keras is batch first: x (B, T, I).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


class LayerNormLSTMCell(keras.layers.Layer):
    """LayerNormLSTM of models.py as a Keras cell. Its input's last feature is 1 where a row starts anew."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.hidden_size, self.state_size, self.output_size = hidden_size, [hidden_size] * 2, hidden_size
        add = lambda name, *shape: self.add_weight(shape=shape, name=name)
        self.kernel = add("kernel", input_size, 4 * hidden_size)
        self.bias = add("bias", 4 * hidden_size)
        self.recurrent = add("recurrent", hidden_size, 4 * hidden_size)
        sizes = {"norm_x": 4 * hidden_size, "norm_h": 4 * hidden_size, "norm_c": hidden_size}
        self.norms = {k: (add(f"{k}_gain", n), add(f"{k}_bias", n)) for k, n in sizes.items()}

    def norm(self, name: str, x: Any) -> Any:
        gain, bias = self.norms[name]
        mean = ops.mean(x, -1, keepdims=True)
        variance = ops.mean(ops.square(x - mean), -1, keepdims=True)
        return (x - mean) * ops.rsqrt(variance + 1e-5) * gain + bias

    def call(self, x: Any, states: Any, training: bool = False) -> Any:
        keep = 1.0 - x[:, -1:]
        h, c = states[0] * keep, states[1] * keep
        from_x = self.norm("norm_x", ops.matmul(x[:, :-1], self.kernel) + self.bias)
        i, f, g, o = ops.split(from_x + self.norm("norm_h", ops.matmul(h, self.recurrent)), 4, -1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(self.norm("norm_c", c))
        return h, [h, c]


def make_layer(kind: str, inputs: int, hidden: int) -> keras.layers.Layer | None:
    """The layer of a kind, or None where Keras has none."""
    if kind == "lstm":
        return keras.layers.LSTM(hidden, return_sequences=True)
    if kind == "gru":
        return keras.layers.GRU(hidden, return_sequences=True, reset_after=True)
    if kind == "lnlstm":
        return keras.layers.RNN(LayerNormLSTMCell(inputs, hidden), return_sequences=True)
    return None


def to_keras(kind: str, p: dict[str, np.ndarray]) -> list[np.ndarray]:
    """PyTorch's weights in the order of the layer's `trainable_variables`."""
    if kind == "lstm":
        return [p["weight_ih"].T, p["weight_hh"].T, p["bias_ih"] + p["bias_hh"]]
    if kind == "gru":
        biases = np.stack([_swap(p["bias_ih"]), _swap(p["bias_hh"])])
        return [_swap(p["weight_ih"]).T, _swap(p["weight_hh"]).T, biases]
    norms = [p[f"{name}.{part}"] for name in ("norm_x", "norm_h", "norm_c") for part in ("weight", "bias")]
    return [p["input_gates.weight"].T, p["input_gates.bias"], p["hidden_gates.weight"].T, *norms]


def from_keras(kind: str, values: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients in that order by PyTorch's names."""
    if kind == "lstm":
        return {"weight_ih": values[0].T, "weight_hh": values[1].T, "bias_ih": values[2]}
    if kind == "gru":
        named = {"weight_ih": _swap(values[0].T), "weight_hh": _swap(values[1].T)}
        return named | {"bias_ih": _swap(values[2][0]), "bias_hh": _swap(values[2][1])}
    names = ["input_gates.weight", "input_gates.bias", "hidden_gates.weight"]
    names += [f"{name}.{part}" for name in ("norm_x", "norm_h", "norm_c") for part in ("weight", "bias")]
    turned = {"input_gates.weight", "hidden_gates.weight"}
    return {name: v.T if name in turned else v for name, v in zip(names, values, strict=True)}


def _swap(gates: np.ndarray) -> np.ndarray:
    """PyTorch's r, z, n and Keras' z, r, n, either way."""
    r, z, n = np.split(gates, 3, 0)
    return np.concatenate([z, r, n], 0)
