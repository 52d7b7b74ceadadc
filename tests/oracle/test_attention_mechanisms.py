"""Each attention of sl.nn.attention against its formula, entry by entry, and its compiled forms against the plain loop:
values and gradients, with memories of unequal lengths, with holes, with nothing valid, and of sizes that change."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
from agree import agree, situations
from attention_cases import CASES, FIRST, MEMORY, made
from torch import nn

import steploop as sl
from steploop.nn.attention.monotonic import expected_stop

pytestmark = [pytest.mark.pairs, pytest.mark.shared_captures]

T, B, INPUT, HIDDEN = 5, 4, 3, 6
SIZES = (4, 1, 7)
MEMORIES = ("all", "lengths", "mask", "both")
every_kind = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Looks(sl.Step):
    """A GRU whose state looks at the memory before each step: everything is in one loop."""

    def __init__(self, case, dtype=torch.float64):
        super().__init__()
        self.attention = made(case, dtype)
        torch.manual_seed(3)
        self.cell = sl.nn.GRUCell(INPUT + case.context, HIDDEN).to(dtype)
        self.query = nn.Linear(HIDDEN, case.query).to(dtype)

    def step(self, x, *, memory, memory_lengths=None, memory_mask=None):
        context, weights = self.attention(
            self.query(self.cell.h.prev), memory=memory, memory_lengths=memory_lengths, memory_mask=memory_mask
        )
        return self.cell(torch.cat([x, context], -1)), context, weights


@functools.cache
def looks(case):
    return Looks(case)


def arguments(size, kind, seed=0, dtype=torch.float64):
    """(xs, memory with NaN where nothing is valid, the call's arguments, (B, S) valid)."""
    torch.manual_seed(100 * size + seed)
    xs, memory = torch.randn(T, B, INPUT, dtype=dtype), torch.randn(B, size, MEMORY, dtype=dtype)
    valid, call = torch.ones(B, size, dtype=torch.bool), {}
    if kind in ("lengths", "both"):
        call["memory_lengths"] = torch.tensor([size, 0, 1, max(size - 1, 0)])  # row 1: nothing at all
        valid = valid & sl.length_mask(call["memory_lengths"], size)
    if kind in ("mask", "both"):
        call["memory_mask"] = torch.rand(B, size) < 0.6
        valid = valid & call["memory_mask"]
    memory[~valid] = float("nan")
    return xs.requires_grad_(), memory.requires_grad_(), call, valid


def by_the_formula(case, step, xs, memory, valid):
    """((T, B, H), (T, B, C), (T, B, ...)) hidden states, contexts, weights; a row and a step at a time."""
    cell, rows = step.cell, []
    for b in range(xs.shape[1]):
        h, kept, found = torch.zeros(1, HIDDEN, dtype=torch.float64), None, []
        for x in xs[:, b]:
            q = step.query(h)[0]
            context, weights, kept = case.plain(step.attention, q, memory[b], valid[b].tolist(), kept)
            both = torch.cat([x, context]).unsqueeze(0)
            h = torch.gru_cell(both, h, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            found.append((h[0], context, weights))
        rows.append([torch.stack(parts) for parts in zip(*found, strict=True)])
    return [torch.stack(parts, 1) for parts in zip(*rows, strict=True)]


def gradients(outputs, leaves):
    torch.manual_seed(9)
    cotangents = [torch.randn_like(o) for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True, materialize_grads=True
    )


def close(found, expected, tolerance=1e-11):
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_case
def test_is_what_its_formula_says(case):
    step = looks(case)
    loops = [sl.Loop(step, backend=backend) for backend in ("reference", "auto")]
    for size in SIZES:
        xs, memory, call, valid = arguments(size, "both")
        leaves = [xs, memory, *step.parameters()]
        expected = by_the_formula(case, step, xs, memory, valid)
        wanted = list(gradients(expected, leaves))
        wanted[1] = torch.where(valid.unsqueeze(-1), wanted[1], 0.0)
        for loop in loops:
            found, _ = loop(xs, memory=memory, **call)
            close(found, expected)
            close(gradients(found, leaves), wanted, 1e-9)


@pytest.mark.parametrize(
    "backend, case",
    [*(("cpu", case) for case in FIRST), *(("eager", case) for case in FIRST[::3])],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiled_is_the_plain_loop(case, backend):
    """Sizes of the memory one after the other, a size of 1 among them, with lengths, holes and resets of the loop."""
    step = looks(case)
    how = situations(torch.tensor([5, 0, 2, 4]), torch.rand(T, B) < 0.7, torch.rand(T, B) < 0.3)
    save = ("all", "states") if backend == "cpu" else "states"
    for size, given in zip(itertools.cycle((4, 1, 7, 2)), how.values(), strict=False):
        xs, memory, call, _ = arguments(size, "both")
        agree(step, xs, memory=memory, backend=backend, save=save, **given, **call)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("case", FIRST[::4], ids=lambda case: case.name)
def test_every_way_to_say_what_is_valid(case, kind):
    step = looks(case)
    for size in SIZES:
        xs, memory, call, valid = arguments(size, kind)
        close(step(xs, memory=memory, **call)[0], by_the_formula(case, step, xs, memory, valid))


@every_kind
def test_in_single_precision(case):
    xs, memory, call, _ = arguments(7, "both", dtype=torch.float32)
    agree(Looks(case, torch.float32), xs, memory=memory, backend="cpu", save="states", **call)


@every_kind
def test_states_go_on_where_they_were_and_streams_too(case):
    step = looks(case)
    for size in (4, 7):
        xs, memory, call, _ = arguments(size, "both")
        whole, last = step(xs, memory=memory, **call)
        assert sorted(last) == sorted(["cell.h", *(f"attention.{name}" for name in case.states)])
        a, state = step(xs[:2], memory=memory, **call)
        b, after = step(xs[2:], memory=memory, state=state, **call)
        close([torch.cat(pair) for pair in zip(a, b, strict=True)], whole)
        close(after.values(), last.values())
        stream = sl.Loop(step).stream(B, memory=memory.detach(), **call)
        with torch.no_grad():
            steps = [stream(x) for x in xs]
        close([torch.stack(parts) for parts in zip(*steps, strict=True)], [w.detach() for w in whole])


@every_kind
def test_a_whole_sequence_of_queries_alone(case):
    """Without a decoder around it; those without a state need no loop."""
    attention = made(case)
    _, memory, call, valid = arguments(7, "both")
    queries = torch.randn(T, B, case.query, dtype=torch.float64)
    (contexts, weights), _ = attention(queries, memory=memory, **call)
    for b in range(B):
        kept = None
        for t in range(T):
            context, expected, kept = case.plain(attention, queries[t, b], memory[b], valid[b].tolist(), kept)
            close([contexts[t, b], weights[t, b]], [context, expected])
    plan = sl.Loop(attention).plan(queries, memory=memory, **call)
    assert bool(plan.loops) == bool(case.states), str(plan)


@every_kind
def test_nothing_to_look_at_gives_zeros(case):
    step = looks(case)
    xs = torch.randn(T, B, INPUT, dtype=torch.float64)
    for size in (0, 4):
        memory = torch.full((B, size, MEMORY), float("inf"), dtype=torch.float64)
        call = dict(memory_lengths=torch.zeros(B).long(), memory_mask=torch.rand(B, size) < 0.5)
        for backend in ("reference", "auto"):
            (_, context, weights), _ = sl.Loop(step, backend=backend)(xs, memory=memory, **call)
            assert (context == 0).all() and (weights == 0).all() and weights.shape[-1] == size


@every_kind
def test_what_depends_on_the_memory_alone_is_computed_once(case):
    """One native loop each way, and no product with the memory from a line that projects it is in one."""
    step = looks(case)
    xs, memory, call, _ = arguments(7, "both")
    plan = sl.Loop(step).plan(xs, memory=memory, **call)
    module = inspect.getmodule(type(step.attention))
    file = inspect.getsourcefile(module).rpartition("/")[2]
    places = {
        f"{file}:{number}"
        for number, line in enumerate(inspect.getsource(module).splitlines(), 1)
        if any(f"self.{name}(memory)" in line for name in case.projects)
    }
    assert len(places) == len(case.projects)
    for one in (plan, plan.backward):
        assert [loop.backend for loop in one.loops] == ["cpu"], str(one)
        if places and not (one is plan.backward and case.name == "monotonic_hard"):  # no gradient through its choice
            outside = [op for op in (*one.before, *one.after) if op.line in places]
            assert "mm" in {op.name for op in outside}, str(one)
        inside = [op for op in one.loops[0].ops if op.line in places and op.name in ("mm", "addmm", "bmm")]
        # what may be left of such a line are products of the query: (B, n), for no entry of the memory
        assert all(op.shape.startswith("(B, ") and op.shape.count(",") == 1 for op in inside), str(one)
    projected = [op for op in plan.before if op.line in places and op.name == "mm"]
    assert {op.why for op in projected} <= {"the same at every step"}


SOFTMAX = [case for case in FIRST if not case.name.startswith(("monotonic", "gaussian"))]


@pytest.mark.parametrize("case", SOFTMAX, ids=lambda case: case.name)
def test_huge_scores_of_both_signs(case):
    attention = made(case, torch.float32)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith(("energy", "keys")):
                parameter.mul_(1e9)
    memory = torch.randn(B, 7, MEMORY) * (1e9 if not case.projects else 1)
    lengths = torch.tensor([7, 3, 1, 0])
    queries = torch.randn(T, B, case.query).mul(-10).requires_grad_()
    for backend in ("reference", "cpu"):
        (context, weights), _ = sl.Loop(attention, backend=backend)(queries, memory=memory, memory_lengths=lengths)
        total = weights.sum(-1)
        assert torch.allclose(total, (lengths > 0).float().reshape(-1, *[1] * (total.dim() - 2)).expand_as(total))
        (gradient,) = torch.autograd.grad(context.sum(), queries)
        assert gradient.isfinite().all()


def test_every_attention_has_a_case():
    exported = {v for v in vars(sl.nn.attention).values() if inspect.isclass(v) and issubclass(v, sl.Step)}
    others = {sl.nn.attention.Attention, sl.nn.attention.DecoderWithAttention}
    assert exported - others == {case.covers for case in CASES}


# -- monotonic -----------------------------------------------------------------------------------------------


def stop_by_loop(stop, before):
    """Equations 13 and 14, an entry at a time."""
    q, weights = torch.zeros_like(stop[:, 0]), []
    for j in range(stop.shape[1]):
        q = (1 - stop[:, j - 1]) * q + before[:, j] if j else before[:, 0]
        weights.append(stop[:, j] * q)
    return torch.stack(weights, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 130, 1024, 1025])
def test_the_expected_stop_is_the_recurrence(size):
    """Probabilities of 0 and 1 and next to them are among them: there the quotient of the paper fails."""
    stop = torch.rand(3, size, dtype=torch.float64)
    stop[1] = torch.sigmoid(60 * torch.randn(size, dtype=torch.float64))
    stop[2] = (torch.rand(size) < 0.3).double()
    before = torch.rand(3, size, dtype=torch.float64).softmax(1)
    leaves = [stop.requires_grad_(), before.requires_grad_()]
    found, expected = expected_stop(*leaves), stop_by_loop(*leaves)
    close([found], [expected], 1e-13)
    close(gradients([found], leaves), gradients([expected], leaves), 1e-11)


def test_the_expected_stop_is_an_expectation():
    """Over all coins of 3 steps at 3 entries: the share of the hard alignments that stop there."""
    probabilities = torch.rand(3, 3, dtype=torch.float64)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for coins in itertools.product([False, True], repeat=9):
        table = torch.tensor(coins).view(3, 3)
        share = torch.where(table, probabilities, 1 - probabilities).prod()
        stood = 0
        for i in range(3):
            stops = [j for j in range(stood, 3) if table[i, j]]
            if not stops:
                break
            stood = stops[0]
            expected[i, stood] += share
    weights = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    for i in range(3):
        weights = expected_stop(probabilities[i : i + 1], weights)
        close([weights[0]], [expected[i]], 1e-13)


def test_monotonic_attention_is_soft_in_training_and_hard_in_eval_mode():
    case = next(case for case in CASES if case.name == "monotonic")
    attention = sl.nn.attention.MonotonicAttention(case.query, MEMORY, 4)
    memory, queries = torch.randn(2, 6, MEMORY), torch.randn(T, 2, case.query)
    (_, soft), _ = attention(queries, memory=memory)
    (_, again), _ = attention(queries, memory=memory)
    assert not torch.equal(soft, again) and ((soft > 0) & (soft < 1)).any()  # noise
    (_, hard), _ = attention.eval()(queries, memory=memory)
    assert ((hard == 0) | (hard == 1)).all() and (hard.sum(-1) <= 1).all()
    assert torch.equal(attention(queries, memory=memory)[0][1], hard)
    attention.train().noise = 0.0
    (_, quiet), _ = attention(queries, memory=memory)
    assert torch.equal(quiet, attention(queries, memory=memory)[0][1])


# -- others --------------------------------------------------------------------------------------------------


def test_multi_head_attention_is_torchs():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True).double()
    ours = sl.nn.attention.MultiHeadAttention(8, 5, 2, 8).double()
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.normal_()
        ours.query.weight.copy_(theirs.q_proj_weight)
        ours.keys.weight.copy_(theirs.k_proj_weight)
        ours.values.weight.copy_(theirs.v_proj_weight)
        ours.query.bias.copy_(theirs.in_proj_bias[:8])
        ours.values.bias.copy_(theirs.in_proj_bias[16:])
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    queries, memory = torch.randn(T, 3, 8).double(), torch.randn(3, 4, 5).double()
    lengths = torch.tensor([4, 1, 3])
    expected, weights = theirs(
        queries.transpose(0, 1), memory, memory, ~sl.length_mask(lengths, 4), average_attn_weights=False
    )
    (context, found), _ = ours(queries, memory=memory, memory_lengths=lengths)
    close([context.transpose(0, 1)], [expected], 1e-12)
    close([found.permute(1, 2, 0, 3)], [weights], 1e-12)


@pytest.mark.parametrize("name", ["AdditiveAttention", "DotAttention", "GeneralAttention", "MultiHeadAttention"])
def test_dropout_of_the_weights(name):
    sizes = {
        "AdditiveAttention": (4, 4, 3),
        "DotAttention": (4,),
        "GeneralAttention": (4, 4),
        "MultiHeadAttention": (4, 4, 2, 4),
    }
    attention = getattr(sl.nn.attention, name)(*sizes[name], dropout=0.3)
    queries, memory = torch.zeros(40, 30, 4), torch.ones(30, 1, 4)
    with torch.no_grad():
        (context, weights), _ = attention(queries, memory=memory)
        assert (weights == 1).all()  # as they were before
        (plain, _), _ = attention.eval()(queries, memory=memory)
    # one entry: a row (a head of it) gets nothing or all of it over 0.7
    if name != "MultiHeadAttention":
        kept = context[..., 0] != 0
        assert abs(kept.float().mean() - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
        torch.testing.assert_close(context[kept], plain[kept] / 0.7)
    assert not torch.allclose(context, plain)
    with pytest.raises(ValueError, match="dropout is a probability"):
        getattr(sl.nn.attention, name)(*sizes[name], dropout=-0.1)


class Own(sl.nn.attention.Attention):
    """What a user writes: the entry whose place is nearest to a number that the query gives."""

    query_size, memory_size = 6, MEMORY

    def __init__(self):
        super().__init__()
        self.place, self.seen = nn.Linear(6, 1), sl.State(...)

    def attend(self, query, memory, mask):
        seen = self.seen.sized(memory.shape[1], like=query)
        place = self.place(query).sigmoid() * memory.shape[1]
        scores = -((torch.arange(memory.shape[1]) - place) ** 2) - seen
        weights = sl.nn.masked_softmax(scores, mask)
        seen = seen * 0.5
        seen += weights
        self.seen.next = seen
        return weights


def test_an_attention_of_ones_own():
    class Decodes(sl.Step):
        def __init__(self):
            super().__init__()
            self.attention, self.cell = Own().double(), sl.nn.LSTMCell(INPUT + MEMORY, 6).double()

        def step(self, x, **constants):
            context, weights = self.attention(self.cell.h.prev, **constants)
            return self.cell(torch.cat([x, context], -1)), weights

    step = Decodes()
    for size, kind in zip((4, 1, 7, 2), MEMORIES, strict=True):
        xs, memory, call, _ = arguments(size, kind)
        agree(step, xs, memory=memory, backend="cpu", **call)


X = torch.randn(T, B, 6)
M = torch.randn(B, 3, MEMORY)
ADDITIVE = sl.nn.attention.AdditiveAttention(6, MEMORY, 4)
BAD = [
    (lambda: ADDITIVE(X), "memory"),
    (lambda: ADDITIVE(X, memory=M[..., :2]), r"\(B, S, 5\)"),
    (lambda: ADDITIVE(X, memory=M[:, 0]), "transpose"),
    (lambda: ADDITIVE(X[..., :3], memory=M), r"the query .*\n.*\(B, 6\)"),
    (lambda: ADDITIVE(X, memory=M.transpose(0, 1)), "B first"),
    (lambda: ADDITIVE(X, memory=M, memory_lengths=torch.ones(B)), "memory_lengths"),
    (lambda: ADDITIVE(X, memory=M, memory_lengths=torch.ones(B, 1).long()), "memory_lengths"),
    (lambda: ADDITIVE(X, memory=M, memory_mask=torch.ones(B, 3)), "memory_mask"),
    (lambda: ADDITIVE(X, memory=M, memory_mask=torch.ones(B, 2).bool()), r"\(4, 3\) bool"),
    (lambda: sl.nn.attention.MultiHeadAttention(4, 4, 3, 4), "heads divides size"),
    (lambda: sl.nn.attention.LocationSensitiveAttention(4, 4, 3, width=4), "odd"),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_arguments_are_named(call, words):
    with pytest.raises((sl.InputError, ValueError), match=words):
        call()


def test_a_state_for_another_memory_is_an_error():
    case = next(case for case in CASES if case.name == "location_sensitive")
    step = looks(case)
    xs, memory, _, _ = arguments(4, "all")
    _, state = step(xs, memory=memory)
    xs, longer, _, _ = arguments(7, "all")
    with pytest.raises(sl.StateError, match=r"attention.before.*\(4, 7\)"):
        step(xs, memory=longer, state=state)
