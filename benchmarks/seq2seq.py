"""EmbeddingAttentionSeq2Seq with an LSTM: steploop's, the same unrolled by hand in PyTorch, and in JAX scans.

All of them give the cross entropy of every label, (T, B). Parameters are a dict with the names of the module's
state_dict; JAX has all that needs no state outside of its scans, as steploop finds it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steploop.seq2seq.legacy import EmbeddingAttentionSeq2Seq
from steploop.seq2seq.tf_cells import BasicLSTMCell, Linear

from .data import Data, Workload
from .peers import Blank, EagerLoop, Jax, Peer, Runner, Steploop, named_arrays, tensors_of, torch_runner

FORGET_BIAS = 1.0


class Model(nn.Module):
    """source (S, B), labels (T, B) -> the cross entropy of the labels (T, B), each given those before it."""

    def __init__(self, work: Workload, backend: str = "auto", save: str = "auto") -> None:
        super().__init__()
        projection = None
        if work.kind == "seq2seq":
            self.softmax = Linear(work.H, work.V)
            projection = self.softmax.kernel, self.softmax.bias
        else:
            self.softmax = None
        self.model = EmbeddingAttentionSeq2Seq(
            BasicLSTMCell(work.H),
            work.V,
            work.V,
            work.I,
            output_projection=projection,
            backend=backend,
            save=save,
        )

    def forward(self, source: Tensor, labels: Tensor) -> Tensor:
        outputs, _ = self.model(source, shifted(labels))
        logits = outputs if self.softmax is None else self.softmax(outputs)
        return losses(logits, labels)


def shifted(labels: Tensor) -> Tensor:
    """What the decoder reads: 0, then the labels but the last."""
    return torch.cat([torch.zeros_like(labels[:1]), labels[:-1]])


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)


def make_model(work: Workload, **options: str) -> Model:
    """The model, with the same weights whoever asks."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Model(work, **options)


def make_runner(peer: Peer, work: Workload, data: Data, mode: str) -> Runner:
    """The peer's runner; Blank for one that has no such model."""
    if isinstance(peer, Steploop) and not peer.padded:
        model, tensors = make_model(work, backend=peer.backend, save=peer.save), tensors_of(data)
        return _torch_runner(lambda: model(tensors["source"], tensors["x"]), model, tensors, mode)
    if type(peer) is EagerLoop:
        model, tensors = make_model(work), tensors_of(data)
        p, run = dict(model.named_parameters()), unrolled_hoisted if peer.hoist else unrolled
        return _torch_runner(lambda: run(p, tensors["source"], tensors["x"]), model, tensors, mode)
    if isinstance(peer, Jax):
        peer.check_installed()
        return _jax_runner(work, data, mode)
    raise Blank("not written for this model")


def _torch_runner(forward: Callable[[], Tensor], model: Model, tensors: dict[str, Tensor], mode: str) -> Runner:
    kept = "forward" if mode == "forward" else "training"  # labels have no gradient
    return torch_runner(forward, dict(model.named_parameters()), tensors, kept)


# ---- by hand -----------------------------------------------------------------------------------------------

ENCODER, DECODER = "model.encoder", "model.decoder.one_step"
ATTENTION = f"{DECODER}.cell"


def cell_names(p: dict[str, Any]) -> tuple[str, str | None]:
    """(the decoder's LSTM, its projection or None)."""
    wrapped = f"{ATTENTION}.cell.projection.kernel" in p
    inside = f"{ATTENTION}.cell"
    return (f"{inside}.cell.linear", f"{inside}.projection") if wrapped else (f"{inside}.linear", None)


def linear(p: dict[str, Any], name: str, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, -1) @ p[f"{name}.kernel"] + p[f"{name}.bias"]


def lstm(p: dict[str, Any], name: str, x: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    i, j, f, o = linear(p, name, x, h).chunk(4, -1)
    c = torch.sigmoid(f + FORGET_BIAS) * c + torch.sigmoid(i) * torch.tanh(j)
    return c, torch.sigmoid(o) * torch.tanh(c)


def encoded(p: dict[str, Tensor], xs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, S, H) and the last c and h, step by step over embedded labels."""
    c = h = xs[0].new_zeros(xs[0].shape[0], p[f"{ENCODER}.cell.linear.kernel"].shape[1] // 4)
    memory = []
    for x in xs:
        c, h = lstm(p, f"{ENCODER}.cell.linear", x, c, h)
        memory.append(h)
    return torch.stack(memory, 1), c, h


def attend(p: dict[str, Tensor], keys: Tensor, states: Tensor, c: Tensor, h: Tensor) -> Tensor:
    query = linear(p, f"{ATTENTION}.query", c, h).unsqueeze(1)
    weights = (p[f"{ATTENTION}.attention_v"][0] * torch.tanh(keys + query)).sum(-1).softmax(-1)
    return torch.bmm(weights.unsqueeze(1), states).squeeze(1)


def logits_of(p: dict[str, Tensor], projection: str | None, h: Tensor, attended: Tensor) -> Tensor:
    out = h if projection is None else linear(p, projection, h)
    y = linear(p, f"{ATTENTION}.output_projection", out, attended)
    return linear(p, "softmax", y) if "softmax.kernel" in p else y


def unrolled(p: dict[str, Tensor], source: Tensor, labels: Tensor) -> Tensor:
    """Step by step, as TF1 unrolls it: all of a step, its logits and loss too, before the next."""
    name, projection = cell_names(p)
    states, c, h = encoded(p, [F.embedding(step, p[f"{ENCODER}.embedding"]) for step in source])
    keys, attended, found = states @ p[f"{ATTENTION}.attention_kernel"], torch.zeros_like(h), []
    for given, label in zip(shifted(labels), labels):
        x = F.embedding(given, p[f"{DECODER}.embedding"])
        c, h = lstm(p, name, linear(p, f"{ATTENTION}.input_projection", x, attended), c, h)
        attended = attend(p, keys, states, c, h)
        found.append(F.cross_entropy(logits_of(p, projection, h, attended), label, reduction="none"))
    return torch.stack(found)


def unrolled_hoisted(p: dict[str, Tensor], source: Tensor, labels: Tensor) -> Tensor:
    """The same by a careful hand: embeddings before the loops, logits and losses of all steps after them."""
    name, projection = cell_names(p)
    states, c, h = encoded(p, list(F.embedding(source, p[f"{ENCODER}.embedding"])))
    keys, attended, read = states @ p[f"{ATTENTION}.attention_kernel"], torch.zeros_like(h), []
    for x in F.embedding(shifted(labels), p[f"{DECODER}.embedding"]):
        c, h = lstm(p, name, linear(p, f"{ATTENTION}.input_projection", x, attended), c, h)
        attended = attend(p, keys, states, c, h)
        read.append((h, attended))
    return losses(logits_of(p, projection, *map(torch.stack, zip(*read))), labels)


# ---- JAX ---------------------------------------------------------------------------------------------------


def _jax_runner(work: Workload, data: Data, mode: str) -> Runner:
    import jax
    from jax import numpy as jnp

    sigmoid = jax.nn.sigmoid

    def cell(gates: Any, c: Any) -> tuple[Any, Any]:
        i, j, f, o = jnp.split(gates, 4, -1)
        c = sigmoid(f + FORGET_BIAS) * c + sigmoid(i) * jnp.tanh(j)
        return c, sigmoid(o) * jnp.tanh(c)

    def outputs(p: Any, source: Any, labels: Any) -> Any:
        name, projection = cell_names(p)
        dense = lambda name, x: x @ p[f"{name}.kernel"] + p[f"{name}.bias"]
        kernel, size = p[f"{ENCODER}.cell.linear.kernel"], work.I
        zeros = jnp.zeros((source.shape[1], work.H), jnp.float32)
        embedded = p[f"{ENCODER}.embedding"][source] @ kernel[:size] + p[f"{ENCODER}.cell.linear.bias"]

        def encode(state: Any, x: Any) -> Any:
            state = cell(x + state[1] @ kernel[size:], state[0])
            return state, state[1]

        (c, h), memory = jax.lax.scan(encode, (zeros, zeros), embedded)
        states = memory.transpose(1, 0, 2)
        keys, v = states @ p[f"{ATTENTION}.attention_kernel"], p[f"{ATTENTION}.attention_v"][0]
        merge, of_cell = p[f"{ATTENTION}.input_projection.kernel"], p[f"{name}.kernel"]
        given = jnp.concatenate([jnp.zeros_like(labels[:1]), labels[:-1]])
        x = p[f"{DECODER}.embedding"][given] @ merge[:size] + p[f"{ATTENTION}.input_projection.bias"]

        def decode(state: Any, x: Any) -> Any:
            c, h, attended = state
            gates = (x + attended @ merge[size:]) @ of_cell[:size] + h @ of_cell[size:] + p[f"{name}.bias"]
            c, h = cell(gates, c)
            query = dense(f"{ATTENTION}.query", jnp.concatenate([c, h], -1))[:, None]
            weights = jax.nn.softmax((v * jnp.tanh(keys + query)).sum(-1), -1)
            attended = jnp.einsum("bs,bsa->ba", weights, states)
            return (c, h, attended), (h, attended)

        _, (h, attended) = jax.lax.scan(decode, (c, h, zeros), x)
        out = h if projection is None else dense(projection, h)
        y = dense(f"{ATTENTION}.output_projection", jnp.concatenate([out, attended], -1))
        y = dense("softmax", y) if "softmax.kernel" in p else y
        chosen = jnp.take_along_axis(jax.nn.log_softmax(y, -1), labels[..., None], -1)
        return -chosen[..., 0]

    p = {name: jnp.asarray(value.numpy()) for name, value in make_model(work).state_dict().items()}
    source, labels, cotangent = (jnp.asarray(array) for array in (data.source, data.x, data.cotangent))

    def gradients(p: Any, source: Any, labels: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(lambda p: outputs(p, source, labels), p)
        return y, pull(cotangent)[0]

    if mode == "forward":
        function = jax.jit(outputs)
        return Runner(lambda: (jax.block_until_ready(function(p, source, labels)), {}), named_arrays)
    function = jax.jit(gradients)
    return Runner(lambda: jax.block_until_ready(function(p, source, labels, cotangent)), named_arrays)
