"""The steps of models.py in JAX, as `jax.lax.scan` programs with the input product outside the scan.

Parameters are a dict with the names of the PyTorch step's state_dict. Imports JAX: only for the JAX peer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

sigmoid = jax.nn.sigmoid


def linear(p: dict[str, Any], name: str, x: Any) -> Any:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p: dict[str, Any], name: str, x: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


def lstm_project(p: dict[str, Any], x: Any) -> Any:
    return x @ p["weight_ih"].T + (p["bias_ih"] + p["bias_hh"])


def lstm(p: dict[str, Any], projected: Any, states: Any) -> Any:
    h, c = states
    i, f, g, o = jnp.split(projected + h @ p["weight_hh"].T, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gru_project(p: dict[str, Any], x: Any) -> Any:
    return x @ p["weight_ih"].T + p["bias_ih"]


def gru(p: dict[str, Any], projected: Any, states: Any) -> Any:
    (h,) = states
    x_r, x_z, x_n = jnp.split(projected, 3, -1)
    h_r, h_z, h_n = jnp.split(h @ p["weight_hh"].T + p["bias_hh"], 3, -1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    h = n + z * (h - n)
    return (h,), h


def gates_project(p: dict[str, Any], x: Any) -> Any:
    return linear(p, "input_gates", x)


def stranger(p: dict[str, Any], projected: Any, states: Any) -> Any:
    h, c, m = states
    o, g, f, i = jnp.split(projected + linear(p, "hidden_gates", h), 4, -1)
    i = sigmoid(i + p["peep_i"] * c)
    f = sigmoid(f + p["peep_f"] * c)
    c = f * c + i * gelu(g)
    a = sigmoid(p["decay"])
    m = a * m + (1 - a) * c
    h = sigmoid(o + p["peep_o"] * m) * gelu(c)
    return (h, c, m), h


def lnlstm_project(p: dict[str, Any], x: Any) -> Any:
    return layer_norm(p, "norm_x", linear(p, "input_gates", x))


def lnlstm(p: dict[str, Any], projected: Any, states: Any) -> Any:
    h, c = states
    sums = projected + layer_norm(p, "norm_h", linear(p, "hidden_gates", h))
    i, f, g, o = jnp.split(sums, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(layer_norm(p, "norm_c", c))
    return (h, c), h


def decoder_project(p: dict[str, Any], x: Any) -> Any:
    return linear(p, "word_gates", x)


def decoder(p: dict[str, Any], projected: Any, states: Any, memory: Any, memory_mask: Any) -> Any:
    h, c, fed = states
    sums = projected + linear(p, "fed_gates", fed) + linear(p, "hidden_gates", h)
    i, f, g, o = jnp.split(sums, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    scores = jnp.einsum("bsh,bh->bs", memory, linear(p, "query", h))
    weights = jax.nn.softmax(jnp.where(memory_mask, scores, -jnp.inf), -1)
    context = jnp.einsum("bs,bsh->bh", weights, memory)
    fed = jnp.tanh(linear(p, "combine", jnp.concatenate([context, h], -1)))
    return (h, c, fed), fed


MODELS: dict[str, Any] = {
    "lstm": (lstm_project, lstm, 2),
    "gru": (gru_project, gru, 1),
    "stranger": (gates_project, stranger, 3),
    "lnlstm": (lnlstm_project, lnlstm, 2),
    "decoder": (decoder_project, decoder, 3),
}


def sequence(
    kind: str, hidden: int, p: dict[str, Any], x: Any, resets: Any = None, **constants: Any
) -> tuple[Any, Any]:
    """Outputs (T, B, H) and the last states."""
    project, advance, count = MODELS[kind]
    initial = tuple(jnp.zeros((x.shape[1], hidden), x.dtype) for _ in range(count))

    def body(states: Any, slices: Any) -> Any:
        projected, reset = slices
        if reset is not None:
            states = tuple(jnp.where(reset[:, None], 0.0, s) for s in states)
        return advance(p, projected, states, **constants)

    states, y = jax.lax.scan(body, initial, (project(p, x), resets))
    return y, states
