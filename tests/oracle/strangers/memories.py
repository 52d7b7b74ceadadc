"""Networks with external memory: stacks, queues, NTM, DNC, associative memories, slots and modules."""

import torch
import torch.nn.functional as F
from torch import nn

from . import stranger


def sequences(features):
    return lambda steps, batch: torch.randn(steps, batch, features)


def zeros(*shapes):
    return lambda b: tuple(torch.zeros(b, *shape) for shape in shapes)


@stranger
def neural_turing_machine():
    slots, width = 6, 4
    controller, head = nn.LSTMCell(3 + width, 8), nn.Linear(8, width + 1 + 1 + 3 + 1 + 2 * width)
    start = nn.Parameter(torch.randn(slots, width) * 0.1)

    def fn(state, x):
        h, c, memory, weights, read = state
        h, c = controller(torch.cat([x, read], dim=1), (h, c))
        key, beta, gate, shift, gamma, erase, add = head(h).split([width, 1, 1, 3, 1, width, width], dim=1)
        memory = memory + start * 0.01
        content = F.softmax(F.softplus(beta) * F.cosine_similarity(memory + 1e-9, key.unsqueeze(1), dim=-1), dim=1)
        weights = torch.sigmoid(gate) * content + (1 - torch.sigmoid(gate)) * weights
        shift = F.softmax(shift, 1)
        rolled = sum(shift[:, i : i + 1] * torch.roll(weights, i - 1, dims=1) for i in range(3))
        sharp = (rolled + 1e-9) ** (1 + F.softplus(gamma))
        weights = sharp / sharp.sum(1, keepdim=True)
        memory = memory * (1 - torch.einsum("bn,bw->bnw", weights, erase.sigmoid()))
        memory = memory + torch.einsum("bn,bw->bnw", weights, torch.tanh(add))
        read = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
        return (h, c, memory, weights, read), read

    return fn, zeros((8,), (8,), (slots, width), (slots,), (width,)), sequences(3)


@stranger
def differentiable_neural_computer():
    slots, width = 5, 3
    controller = nn.GRUCell(2 + width, 6)
    head = nn.Linear(6, width + 1 + width + width + 1 + 1 + 1 + width + 1 + 3)

    def address(memory, key, strength):
        similarity = torch.einsum("bnw,bw->bn", F.normalize(memory + 1e-6, dim=-1), F.normalize(key, dim=-1))
        return (similarity * (1 + F.softplus(strength))).softmax(-1)

    def fn(s, x):
        h = controller(torch.cat([x, s["read"]], -1), s["h"])
        parts = head(h).split([width, 1, width, width, 1, 1, 1, width, 1, 3], -1)
        wkey, wstrength, erase, write, free, alloc, gate, rkey, rstrength, modes = parts
        retention = 1 - free.sigmoid() * s["rw"]
        usage = (s["usage"] + s["ww"] - s["usage"] * s["ww"]) * retention
        ordered, order = torch.sort(usage, dim=-1)
        product = torch.cumprod(torch.cat([torch.ones_like(ordered[:, :1]), ordered[:, :-1]], -1), -1)
        allocation = torch.zeros_like(usage).scatter(-1, order, (1 - ordered) * product)
        content = address(s["memory"], wkey, wstrength)
        ww = gate.sigmoid() * (alloc.sigmoid() * allocation + (1 - alloc.sigmoid()) * content)
        memory = s["memory"] * (1 - ww.unsqueeze(-1) * erase.sigmoid().unsqueeze(1)) + ww.unsqueeze(-1) * write.unsqueeze(1)
        link = (1 - ww.unsqueeze(2) - ww.unsqueeze(1)) * s["link"] + ww.unsqueeze(2) * s["precedence"].unsqueeze(1)
        link = link * (1 - torch.eye(slots, device=x.device))
        precedence = (1 - ww.sum(-1, keepdim=True)) * s["precedence"] + ww
        forward, backward = link @ s["rw"].unsqueeze(-1), link.transpose(1, 2) @ s["rw"].unsqueeze(-1)
        choices = torch.stack([backward.squeeze(-1), address(memory, rkey, rstrength), forward.squeeze(-1)], -1)
        rw = (choices * modes.softmax(-1).unsqueeze(1)).sum(-1)
        read = (rw.unsqueeze(1) @ memory).squeeze(1)
        new = dict(h=h, memory=memory, usage=usage, ww=ww, rw=rw, link=link, precedence=precedence, read=read)
        return new, (read, usage.min(-1).values)

    def init(b):
        shapes = dict(h=(6,), memory=(slots, width), usage=(slots,), ww=(slots,), rw=(slots,), link=(slots, slots),
                      precedence=(slots,), read=(width,))  # fmt: skip
        return {name: torch.zeros(b, *shape) for name, shape in shapes.items()}

    return fn, init, sequences(2)


@stranger
def neural_stack():
    """Grefenstette 2015: a stack of strengths, for a fixed depth."""
    depth, width = 5, 3
    control = nn.Linear(2 + width, width + 2)

    def fn(carry, x):
        values, strengths, read = carry
        v, push, pop = control(torch.cat([x, read], -1)).split([width, 1, 1], -1)
        push, pop = push.sigmoid(), pop.sigmoid()
        above = strengths.flip(1).cumsum(1).flip(1) - strengths
        strengths = F.relu(strengths - F.relu(pop - above))
        values = torch.cat([values[:, 1:], v.tanh().unsqueeze(1)], 1)
        strengths = torch.cat([strengths[:, 1:], push], 1)
        above = strengths.flip(1).cumsum(1).flip(1) - strengths
        used = torch.minimum(strengths, F.relu(1 - above))
        return (values, strengths, (used.unsqueeze(-1) * values).sum(1)), used

    return fn, zeros((depth, width), (depth,), (width,)), sequences(2)


@stranger
def ring_buffer_with_a_pointer():
    buffer_size = 4

    def fn(carry, x):
        buffer, pointer = carry
        rows = torch.arange(x.shape[0], device=x.device)
        buffer = buffer.clone()
        buffer[rows, pointer] = x
        pointer = (pointer + 1) % buffer_size
        oldest = buffer[rows, pointer]
        return (buffer, pointer), oldest + buffer.mean(1)

    return fn, lambda b: (torch.zeros(b, 4, 3), torch.zeros(b, dtype=torch.long)), sequences(3)


@stranger
def queue_by_rolling():
    def fn(buffer, x):
        buffer = torch.roll(buffer, shifts=-1, dims=1)
        buffer[:, -1] = x
        return buffer, torch.einsum("bti,t->bi", buffer, torch.linspace(0, 1, 5))

    return fn, lambda b: torch.zeros(b, 5, 2), sequences(2)


@stranger
def modern_hopfield():
    patterns = nn.Parameter(torch.randn(7, 4))

    def fn(h, x):
        state = h + x
        for _ in range(3):
            state = (2.0 * state @ patterns.t()).softmax(dim=1) @ patterns
        return state, torch.logsumexp(state @ patterns.T, 1)

    return fn, lambda b: torch.zeros(b, 4), sequences(4)


@stranger
def recurrent_independent_mechanisms():
    units, width, active = 4, 6, 2
    w, u = nn.Parameter(torch.randn(units, width, width) / 3), nn.Parameter(torch.randn(units, 5, width) / 3)
    score, communicate = nn.Linear(width, 5), nn.MultiheadAttention(width, 2, batch_first=True)

    def fn(h, x):
        scores = torch.einsum("bki,bi->bk", score(h), x)
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(active, dim=1).indices, 1.0).unsqueeze(-1)
        new = torch.tanh(torch.einsum("bki,kij->bkj", h, w) + torch.einsum("bi,kij->bkj", x, u))
        new = new + communicate(new, new, new, need_weights=False)[0]
        h = torch.where(chosen.bool(), new, h)
        return h, h.flatten(1)

    return fn, lambda b: torch.zeros(b, units, width), sequences(5)


@stranger
def relational_memory_core():
    slots, width = 3, 8
    attention, norm = nn.MultiheadAttention(width, 2, batch_first=True), nn.LayerNorm(width)
    embed, gates = nn.Linear(4, width), nn.Linear(width, 2 * width)

    def fn(memory, x):
        inputs = embed(x)[:, None]
        joined = torch.cat([memory, inputs], 1)
        attended, weights = attention(memory, joined, joined)
        new = norm(memory + attended)
        new = norm(new + F.gelu(new))
        i, f = torch.chunk(gates(inputs) + gates(torch.tanh(memory)), 2, dim=2)
        memory = torch.sigmoid(i) * torch.tanh(new) + torch.sigmoid(f + 1) * memory
        return memory, (memory.view(memory.shape[0], -1), weights)

    return fn, lambda b: torch.eye(width)[:slots].expand(b, -1, -1), sequences(4)


@stranger
def transformer_with_a_window():
    """A cache of keys and values, shifted by one entry a step, under a growing mask."""
    window, width = 4, 6
    qkv, out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def fn(carry, x):
        keys, values, count = carry
        q, k, v = qkv(x).chunk(3, -1)
        keys, values = torch.cat([keys[:, 1:], k[:, None]], 1), torch.cat([values[:, 1:], v[:, None]], 1)
        count = (count + 1).clamp(max=window)
        valid = torch.arange(window, device=x.device)[None] >= window - count[:, None]
        heads = lambda t: t.view(t.shape[0], -1, 2, width // 2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads(q[:, None]), heads(keys), heads(values), attn_mask=valid[:, None, None])
        return (keys, values, count), x + out(mixed.transpose(1, 2).reshape(-1, width))

    def init(b):
        return torch.zeros(b, window, width), torch.zeros(b, window, width), torch.zeros(b, dtype=torch.int64)

    return fn, init, sequences(width)


@stranger
def key_value_dictionary():
    """Writes to the least used place, reads the nearest one."""
    query = nn.Linear(3, 3)

    def fn(carry, x):
        keys, values, age = carry
        place = F.one_hot(age.argmax(1), 4).bool()
        keys = torch.where(place[..., None], query(x)[:, None], keys)
        values = torch.where(place.unsqueeze(-1), x[:, None, :], values)
        distance = torch.cdist(query(x).unsqueeze(1), keys).squeeze(1)
        near = distance.argmin(-1)
        read = values[torch.arange(len(x)), near]
        age = torch.where(F.one_hot(near, 4) > 0, 0, age + 1)
        return (keys, values, age), read

    return fn, lambda b: (torch.randn(b, 4, 3), torch.zeros(b, 4, 3), torch.arange(4).repeat(b, 1)), sequences(3)


@stranger
def capsules_with_routing():
    w = nn.Parameter(torch.randn(5, 3, 4, 2) / 2)

    def squash(s):
        n2 = s.pow(2).sum(-1, keepdim=True)
        return n2 / (1 + n2) * s / (n2 + 1e-8).sqrt()

    def fn(prior, x):
        votes = torch.einsum("bid,iodk->biok", x.view(-1, 5, 4), w.permute(0, 1, 2, 3))
        logits = prior
        for i in range(3):
            c = logits.softmax(2)
            v = squash((c.unsqueeze(-1) * votes).sum(1))
            if i < 2:
                logits = logits + (votes * v.unsqueeze(1)).sum(-1)
        return 0.5 * logits, v.norm(dim=-1)

    return fn, lambda b: torch.zeros(b, 5, 3), sequences(20)


@stranger
def graph_network():
    """Messages over a fixed graph, added up by index_add and by scatter_reduce."""
    source, target = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([1, 2, 3, 0, 1, 2])
    message, update = nn.Linear(6, 3), nn.GRUCell(3 + 2, 3)

    def fn(nodes, x):
        sent = torch.relu(message(torch.cat([nodes[:, source], nodes[:, target]], -1)))
        total = torch.zeros_like(nodes).index_add(1, target, sent)
        index = target.view(1, -1, 1).expand_as(sent)
        top = torch.zeros_like(nodes).scatter_reduce(1, index, sent, reduce="amax", include_self=True)
        inputs = torch.cat([total + top, x.unsqueeze(1).expand(-1, 4, -1)], -1)
        nodes = update(inputs.flatten(0, 1), nodes.flatten(0, 1)).unflatten(0, (-1, 4))
        return nodes, nodes.amax(1)

    return fn, lambda b: torch.randn(b, 4, 3), sequences(2)  # no two alike: a tie of amax would be settled by rounding
