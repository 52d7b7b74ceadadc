"""The steps of models.py in JAX, as `jax.lax.scan` programs with the input product outside the scan.

Parameters are a dict with the names of the PyTorch step's state_dict. Imports JAX: only for the JAX peer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .data import HEADS, state_shapes

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


def heads_project(p: dict[str, Any], x: Any) -> Any:
    return linear(p, "layer", x)


def heads(projected: Any) -> tuple[Any, ...]:
    """Query, key and value (B, HEADS, D); two gates (B, HEADS)."""
    batch, wide = projected.shape[0], (projected.shape[1] - 2 * HEADS) // 3
    q, k, v = (a.reshape(batch, HEADS, -1) for a in jnp.split(projected[:, : 3 * wide], 3, -1))
    return q, k, v, *jnp.split(sigmoid(projected[:, 3 * wide :]), 2, -1)


def linear_attention(p: dict[str, Any], projected: Any, states: Any) -> Any:
    q, k, v, decay, _ = heads(projected)
    S = decay[..., None, None] * states[0] + k[..., :, None] * v[..., None, :]
    return (S,), jnp.einsum("bhkv,bhk->bhv", S, q).reshape(len(q), -1)


def delta(p: dict[str, Any], projected: Any, states: Any) -> Any:
    q, k, v, beta, _ = heads(projected)
    k = k / jnp.maximum(jnp.sqrt(jnp.square(k).sum(-1, keepdims=True)), 1e-12)
    old = jnp.einsum("bhvk,bhk->bhv", states[0], k)
    S = states[0] + (beta[..., None] * (v - old))[..., :, None] * k[..., None, :]
    return (S,), jnp.einsum("bhvk,bhk->bhv", S, q).reshape(len(q), -1)


def mlstm(p: dict[str, Any], projected: Any, states: Any) -> Any:
    q, k, v, i, f = heads(projected)
    before, n, m = states
    bound = jnp.maximum(jnp.log(f) + m, i)
    i, f = jnp.exp(i - bound), jnp.exp(jnp.log(f) + m - bound)
    S = f[..., None, None] * before + i[..., None, None] * (v[..., :, None] * k[..., None, :])
    n = f[..., None] * n + i[..., None] * k
    read = jnp.einsum("bhvk,bhk->bhv", S, q) / jnp.maximum(jnp.abs((n * q).sum(-1, keepdims=True)), 1.0)
    return (S, n, bound), read.reshape(len(q), -1)


def fast_weights(p: dict[str, Any], projected: Any, states: Any) -> Any:
    x = heads(projected)[2]
    before, h = states
    S = 0.9 * before + 0.1 * h[..., :, None] * h[..., None, :]
    slow = linear(p, "slow", h.reshape(len(h), -1)).reshape(h.shape)
    h = jnp.tanh(x + slow + jnp.einsum("bhvk,bhk->bhv", S, h))
    return (S, h), h.reshape(len(h), -1)


MODELS: dict[str, Any] = {
    "lstm": (lstm_project, lstm),
    "gru": (gru_project, gru),
    "stranger": (gates_project, stranger),
    "lnlstm": (lnlstm_project, lnlstm),
    "decoder": (decoder_project, decoder),
    "linear attention": (heads_project, linear_attention),
    "delta rule": (heads_project, delta),
    "mLSTM": (heads_project, mlstm),
    "fast weights": (heads_project, fast_weights),
}


def sequence(
    kind: str, hidden: int, p: dict[str, Any], x: Any, resets: Any = None, **constants: Any
) -> tuple[Any, Any]:
    """Outputs (T, B, H) and the last states."""
    project, advance = MODELS[kind]
    initial = tuple(jnp.zeros((x.shape[1], *shape), x.dtype) for shape in state_shapes(kind, hidden))

    def body(states: Any, slices: Any) -> Any:
        projected, reset = slices
        if reset is not None:
            states = tuple(jnp.where(jnp.expand_dims(reset, range(1, s.ndim)), 0.0, s) for s in states)
        return advance(p, projected, states, **constants)

    states, y = jax.lax.scan(body, initial, (project(p, x), resets))
    return y, states
