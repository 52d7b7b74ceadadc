"""What single operations of sl.memory promise beyond the common battery, and what RETURNN's issues were
about."""

from __future__ import annotations

import time

import pytest
import torch
from compiled_backends import COMPILED
from memory_cases import ARPA, Leaky, arpa_score, arpa_table
from torch import nn
from torch.nn import functional as F

import steploop as sl
from steploop import memory
from steploop.compiler import capture_store


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- the last output of a layer ------------------------------------------------------------------------------


def padded(*lengths):
    return torch.randn(len(lengths), 4, 3), torch.tensor(lengths)


@pytest.mark.parametrize("layer", [sl.nn.LSTM, nn.LSTM, sl.nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_the_last_output_of_a_torch_layer(layer, bidirectional, number):
    """As Keras's Bidirectional(return_sequences=False): each half is what its direction ended with."""
    torch.manual_seed(3)
    made = layer(3, 5, num_layers=number, batch_first=True, bidirectional=bidirectional)
    rnn = memory.SequenceRNN(made, output="last")
    x, lengths = padded(4, 1, 3)
    if layer.__module__.startswith("torch"):
        found, lengths = sl.Loop(rnn)(x[None])[0][0], torch.tensor([4, 4, 4])
    else:
        found = sl.Loop(rnn)(x[None], lengths[None])[0][0]
    for row, length, y in zip(x, lengths, found):
        alone, _ = made(row[:length])
        expected = torch.cat([alone[-1, :5], alone[0, 5:]])
        close(y, expected)


def test_a_module_of_ones_own_says_what_is_last():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = sl.nn.Bidirectional(sl.nn.GRUCell(3, 4), sl.nn.GRUCell(3, 4), batch_first=True)
            self.top = nn.Linear(8, 2)

        def last_output(self, x, lengths=None):
            y, state = self.both.last_output(x, lengths=lengths)
            return self.top(y), state

    encoder = Encoder()
    x, lengths = padded(4, 2, 0)
    found = sl.Loop(memory.SequenceRNN(encoder, output="last"))(x[None], lengths[None])[0][0]
    close(found, encoder.last_output(x, lengths=lengths)[0])


# -- RETURNN's issues ----------------------------------------------------------------------------------------


class Energies(sl.Step):
    """Dots with decoder time T in the left operand, the right one, both, none, beside encoder time S."""

    def step(self, x, memory, again):
        left = torch.einsum("bk,bsk->bs", x, memory)
        right = torch.einsum("bsk,bk->bs", memory, x)
        both = torch.einsum("bk,bk->b", x, x)
        none = torch.einsum("bsk,brk->bsr", memory, again)
        return left, right, both, none


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
@pytest.mark.parametrize("inner", [4, 5])
def test_issue_569_dot_never_confuses_axes(backend, inner):
    """Equal sizes of time and memory (T = S = 5), or of features and memory, change nothing."""
    x, source, again = torch.randn(5, 3, inner), torch.randn(3, 5, inner), torch.randn(3, 4, inner)
    (left, right, both, none), _ = sl.Loop(Energies(), backend=backend)(x, memory=source, again=again)
    close(left, torch.einsum("tbk,bsk->tbs", x, source))
    close(right, left)
    close(both, (x * x).sum(-1))
    close(none, torch.einsum("bsk,brk->bsr", source, again).expand(5, -1, -1, -1))


def test_issue_570_window_is_the_same_in_and_out_of_a_loop():
    """One meaning, whatever the form: `left` frames before, zeros at the start, T never in the window
    axis."""
    x = torch.randn(4, 2, 4)

    class In(sl.Step):
        def __init__(self):
            super().__init__()
            self.window = memory.Window(3)
            self.h = sl.State(4)

        def step(self, x):
            frames = self.window(x + 0 * self.h.prev)
            self.h.next = frames.sum(1)
            return frames

    alone, _ = memory.Window(3)(x)
    for backend in [*COMPILED, "reference"]:
        close(sl.Loop(In(), backend=backend)(x)[0], alone)
    assert alone.shape == (4, 2, 4, 4)
    close(alone[0, :, :3], torch.zeros(2, 3, 4))
    close(alone[3], x.transpose(0, 1))


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
def test_issue_637_step_index_broadcasts_over_other_axes(backend):
    class Near(sl.Step):
        def __init__(self):
            super().__init__()
            self.index = memory.StepIndex()

        def step(self, x, source):
            places = torch.arange(source.shape[1])
            near = (places - self.index().unsqueeze(1)).abs() <= 1  # (B, S)
            return x * (near.to(x.dtype) * source).sum(1)

    x, source = torch.randn(5, 3), torch.randn(3, 5)
    near = ((torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1).float()
    close(sl.Loop(Near(), backend=backend)(x, source=source)[0], x * torch.einsum("ts,bs->tb", near, source))


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
def test_issue_698_previous_values_inside_a_child(backend):
    """Every child has its own past, also where the same kind of child stands twice, nested, and masked."""

    class Child(sl.Step):
        def __init__(self):
            super().__init__()
            self.previous = memory.Delay(init=1.0)

        def step(self, x):
            return x - self.previous(x)

    class Parent(sl.Step):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.previous = Child(), Child(), memory.Delay()

        def step(self, x):
            return self.two(self.one(x)) + self.previous(x)

    x = torch.randn(5, 2, 3)
    before = torch.cat([torch.ones(1, 2, 3), x[:-1]])
    once = x - before
    twice = once - torch.cat([torch.ones(1, 2, 3), once[:-1]])
    close(sl.Loop(Parent(), backend=backend)(x)[0], twice + torch.cat([torch.zeros(1, 2, 3), x[:-1]]))


@pytest.mark.parametrize("backend", [*COMPILED, "reference"])
def test_issue_769_masked_computation(backend):
    """A child that depends on its own past and on the loop's other states, a mask that is made in the
    loop."""

    class Blocks(sl.Step):
        def __init__(self):
            super().__init__()
            self.masked = memory.Masked(sl.nn.GRUCell(3, 3), initial=0.5)
            self.total = sl.State(3)

        def step(self, x):
            y = self.masked(x + self.total.prev, where=x[:, 0] > 0)
            self.total.next = torch.tanh(self.total.prev + y)
            return y

    torch.manual_seed(3)
    step, x, lengths = Blocks(), torch.randn(6, 3, 3), torch.tensor([6, 4, 0])
    h, total = torch.zeros(3, 3), torch.zeros(3, 3)
    y, expected = torch.full((3, 3), 0.5), []
    cell = nn.GRUCell(3, 3)
    cell.load_state_dict(step.masked.cell.state_dict())
    for t in range(6):
        where = (x[t, :, :1] > 0) & (t < lengths[:, None])
        new = cell(x[t] + total, h)
        h, y = torch.where(where, new, h), torch.where(where, new, y)
        total = torch.where(t < lengths[:, None], torch.tanh(total + y), total)
        expected.append(torch.where(t < lengths[:, None], y, 0.0))
    found, state = sl.Loop(step, backend=backend)(x, lengths=lengths)
    close(found, torch.stack(expected))
    close(state["masked.cell.h"], h)


@pytest.mark.parametrize("backend", COMPILED)
def test_issue_1044_random_numbers_are_fresh_at_every_step(backend):
    """A random operation that nothing forces to stay in the loop draws for every step all the same."""

    class Noisy(sl.Step):
        def __init__(self):
            super().__init__()
            self.total = memory.CumSum()

        def step(self, x):
            return self.total(F.dropout(x, 0.5, training=True))

    loop, x = sl.Loop(Noisy(), backend=backend), torch.ones(50, 2, 20)
    torch.manual_seed(1)
    y, _ = loop(x)
    drawn = torch.diff(y, dim=0, prepend=torch.zeros(1, 2, 20))
    assert 0.4 < (drawn > 1).float().mean() < 0.6
    assert len({tuple(row) for row in (drawn > 1)[:, 0].tolist()}) > 45
    torch.manual_seed(1)
    close(loop(x)[0], y)


# -- attention and histories ---------------------------------------------------------------------------------


@pytest.fixture
def attention_calls(monkeypatch):
    calls = []
    real = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize(
    "given", [{}, {"lengths": [6, 3]}, {"resets": True}], ids=["plain", "lengths", "resets"]
)
def test_a_whole_sequence_is_one_attention_call(attention_calls, given):
    x = torch.randn(6, 2, 8)
    op = memory.CausalSelfAttention(2, 8)
    given = {
        name: torch.rand(6, 2) < 0.3 if value is True else torch.tensor(value)
        for name, value in given.items()
    }
    _, state = op(x, **given)
    assert len(attention_calls) == 1
    assert attention_calls[0]["is_causal"] == ("resets" not in given)
    op(x, state=state)
    assert len(attention_calls) == 2
    assert attention_calls[1]["attn_mask"] is not None


def test_inside_a_step_it_is_one_attention_call(attention_calls):
    class Block(sl.Step):
        def __init__(self):
            super().__init__()
            self.attention, self.out = memory.CausalSelfAttention(2, 8), nn.Linear(8, 8)

        def step(self, x):
            return x + self.out(self.attention(torch.tanh(x)))

    loop, x = sl.Loop(Block()), torch.randn(6, 2, 8)
    loop(x)
    attention_calls.clear()
    loop(x)
    assert len(attention_calls) == 1


def test_a_stream_doubles_its_history():
    op, x = memory.CausalSelfAttention(2, 8), torch.randn(40, 2, 8)
    loop = sl.Loop(op, backend="eager")
    whole, _ = op(x)
    stream = loop.stream(2)
    sizes, found = [], []
    with torch.no_grad():
        for t in range(40):
            found.append(stream(x[t]))
            sizes.append(stream.state["keys"].shape[1])
            if t == 20:
                before = capture_store.captured
    close(torch.stack(found), whole)
    assert sorted(set(sizes)) == [16, 32, 64]
    assert capture_store.captured - before <= 1


def test_a_reset_stream_needs_no_more_room():
    op = memory.History()
    stream = sl.Loop(op, backend="eager").stream(2)
    with torch.no_grad():
        for t in range(60):
            stream(torch.randn(2, 3), resets=torch.full((2,), t % 8 == 0))
    assert stream.state["frames"].shape[1] == 16


def test_states_of_a_sequence_go_on_in_a_stream_and_back():
    op, x = memory.CausalSelfAttention(2, 8, rope=True), torch.randn(30, 2, 8)
    whole, _ = op(x)
    with torch.no_grad():
        _, state = op(x[:5])
        stream = sl.Loop(op, backend="eager").stream(2, state=state)
        found = [stream(x[t]) for t in range(5, 25)]
        rest, _ = op(x[25:], state=stream.state)
    close(torch.cat([torch.stack(found), rest]), whole[5:])


def test_window_may_look_ahead_over_a_whole_sequence():
    x = torch.arange(1.0, 6).reshape(5, 1).repeat(1, 2)
    lengths = torch.tensor([5, 3])
    y, _ = memory.Window(1, right=2)(x, lengths=lengths)
    assert y[:, 0].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 0], [4, 5, 0, 0]]
    assert y[:3, 1].tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 0]]
    resets = torch.tensor([[0, 0, 1, 0, 0]], dtype=torch.bool).t().expand(-1, 2)
    y, _ = memory.Window(1, right=1)(x, resets=resets)
    assert y[:, 0].tolist() == [[0, 1, 2], [1, 2, 0], [0, 3, 4], [3, 4, 5], [4, 5, 0]]


# -- masked computation --------------------------------------------------------------------------------------


def test_unmask_spreads_kept_steps():
    y, mask = (
        torch.tensor([[1.0, 5], [2, 6], [3, 7]]),
        torch.tensor([[0, 1], [1, 1], [0, 0], [1, 1], [1, 1]]).bool(),
    )
    expected = [[-1, 5], [1, 6], [1, 6], [2, 7], [3, 7]]
    assert memory.unmask(y, mask, -1.0).tolist() == expected
    cut = memory.unmask(y, mask, -1.0, lengths=torch.tensor([3, 5]))
    assert cut[:, 0].tolist() == [-1, 1, 1, 1, 1]


def test_masked_from_is_masked_over_the_kept_steps():
    torch.manual_seed(2)
    cell, x, mask = Leaky(), torch.randn(7, 2, 3, dtype=torch.float64), torch.rand(7, 2) < 0.5
    lengths = torch.tensor([7, 4])
    kept = mask & (torch.arange(7)[:, None] < lengths)
    order = torch.argsort((~kept).int(), dim=0, stable=True)
    compact = x.gather(0, order.unsqueeze(-1).expand_as(x))
    valid = (torch.arange(7)[:, None] < lengths).unsqueeze(-1)
    expected, _ = memory.Masked(cell)(x, where=mask, lengths=lengths)
    close(memory.masked_from(cell, compact, mask, lengths=lengths) * valid, expected)
    found, _ = memory.MaskedFrom(cell)(where=mask, source=compact.transpose(0, 1), lengths=lengths)
    close(found, expected)


def test_unmask_inside_a_step_is_what_masked_gives():
    class Both(sl.Step):
        def __init__(self):
            super().__init__()
            self.masked = memory.Masked(Leaky())

        def step(self, x):
            where = x[:, 0] > 0
            return memory.unmask(self.masked(x, where=where), where)

    x = torch.randn(5, 2, 3, dtype=torch.float64)
    both = Both()
    close(both(x)[0], both.masked(x, where=x[..., 0] > 0)[0])
    assert both.masked.child is both.masked.cell


def test_masked_batch_first():
    op, x, where = memory.Masked(Leaky()), torch.randn(5, 2, 3).double(), torch.rand(5, 2) < 0.5
    turned, _ = sl.Loop(op, batch_first=True)(x.transpose(0, 1), where=where.t())
    close(turned.transpose(0, 1), op(x, where=where)[0])


# -- edit distance, 2-D LSTM, n-grams, choices ---------------------------------------------------------------


def test_edit_distance_table():
    a, b = (torch.tensor([[ord(c) for c in word]]) for word in ("kitten", "sitting"))
    table = memory.EditDistance().table(a.t(), target=b)
    assert table.shape == (7, 1, 8)
    assert table[0, 0].tolist() == list(range(8))
    assert table[-1, 0, -1] == 3
    kept = memory.EditDistance().table(a.t(), target=b, lengths=torch.tensor([2]))
    assert torch.equal(kept[3:], kept[2:3].expand(4, -1, -1))


def test_two_d_lstm_is_five_times_as_fast_as_a_double_loop():
    steps, positions, batch, size = 32, 32, 4, 16
    op = memory.TwoDLSTM(size, size, size)
    x, source = torch.randn(steps, batch, size), torch.randn(batch, positions, size)

    def double_loop():
        zeros = torch.zeros(batch, size)
        above = [(zeros, zeros)] * positions
        for t in range(steps):
            left, row = (zeros, zeros), []
            for s in range(positions):
                gates = F.linear(source[:, s], op.weight_source, op.bias) + F.linear(x[t], op.weight_target)
                gates = gates + F.linear(left[0], op.weight_h) + F.linear(above[s][0], op.weight_v)
                i, f, mix, o, g = gates.chunk(5, -1)
                mix = mix.sigmoid()
                c = i.sigmoid() * g.tanh() + f.sigmoid() * (mix * above[s][1] + (1 - mix) * left[1])
                left = (o.sigmoid() * c.tanh(), c)
                row.append(left)
            above = row
        return above[-1][0]

    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # on a shared machine, threads that wait for each other would be what is measured
    with torch.no_grad():
        close(op(x, source=source)[0][-1], double_loop())
        ratios = [_seconds(double_loop) / _seconds(lambda: op(x, source=source)) for _ in range(3)]
    torch.set_num_threads(threads)
    assert max(ratios) >= 5, ratios


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "model.arpa"
    path.write_text(ARPA)
    return path


def test_all_next_scores_every_token(arpa):
    scorer, table = memory.NGramScorer(arpa), arpa_table(ARPA)
    tokens = scorer.encode(["a", "b", "c", "a", "b"]).unsqueeze(1)
    words = ["<s>", "a", "b", "c", "a", "b"]
    log10 = torch.log(torch.tensor(10.0))
    state = None
    for t in range(5):
        _, state = scorer(tokens[t : t + 1], state=state)
        expected = [arpa_score(table, (*words[: t + 2][-2:], word)) for word in scorer.words]
        close(scorer.all_next(state)[0], torch.tensor(expected) * log10)


def test_all_next_inside_a_step(arpa):
    class Rescored(sl.Step):
        def __init__(self):
            super().__init__()
            self.scorer = memory.NGramScorer(arpa)

        def step(self, token):
            return self.scorer(token), self.scorer.all_next()

    tokens = torch.randint(0, 6, (6, 2))
    step = Rescored()
    (score, following), _ = step(tokens)
    close(following[:-1].gather(2, tokens[1:].unsqueeze(-1)).squeeze(-1), score[1:])
    total = following.exp().sum(-1)
    assert bool((total > 0).all())


def test_unknown_words(arpa, tmp_path):
    scorer = memory.NGramScorer(arpa, vocabulary=["a", "elephant", "b"])
    known = memory.NGramScorer(arpa)
    found, _ = scorer(torch.tensor([[0], [1], [2]]))
    close(found, known(known.encode(["a", "<unk>", "b"]).unsqueeze(1))[0])
    without = tmp_path / "without.arpa"
    without.write_text(ARPA.replace("ngram 1=6", "ngram 1=5").replace("-1.0\t<unk>\n", ""))
    found, _ = memory.NGramScorer(without, vocabulary=["a", "elephant", "b"], unknown=-7.0)(
        torch.tensor([[0], [1], [2]])
    )
    log10 = torch.log(torch.tensor(10.0))
    close(found[:, 0], torch.tensor([-0.3, -0.15 - 0.2 - 7.0, -0.9]) * log10)


@pytest.mark.parametrize(
    "change, line, word",
    [
        (("\\data\\", "data"), 99, "ARPA"),
        (("ngram 2=5", "ngram 3=5"), 3, "ngram 2"),
        (("ngram 1=6", "ngram 1=7"), 14, "as many"),
        (("-0.7\ta\t-0.2", "-0.7 a b c"), 9, "malformed"),
        (("-0.7\ta\t-0.2", "minus\ta"), 9, "number"),
        (("-0.7\ta\t-0.2", "0.7\ta"), 9, "above 0"),
        (("-0.9\tb\t-0.4", "-0.9\ta"), 10, "twice"),
        (("a b\t-0.25", "a x\t-0.25"), 16, "no unigram"),
        (("\\2-grams:", "\\5-grams:"), 14, "missing"),
        (("-0.1\ta b c", "-0.1\ta b c\t-0.3"), 23, "malformed"),
        (("\\end\\", ""), 25, "end"),
    ],
)
def test_malformed_arpa_names_file_and_line(tmp_path, change, line, word):
    path = tmp_path / "bad.arpa"
    path.write_text(ARPA.replace(*change))
    with pytest.raises(sl.DataError, match=word) as caught:
        memory.NGramScorer(path)
    lines = path.read_text().splitlines()
    assert f"{path}:" in str(caught.value)
    found = int(str(caught.value).split(f"{path}:")[1].split()[0])
    assert found == min(line, len(lines)), caught.value


def test_no_arpa_file_is_a_data_error(tmp_path):
    with pytest.raises(sl.DataError, match="nowhere"):
        memory.NGramScorer(tmp_path / "nowhere.arpa")


class Speller(sl.Step):
    """A decoder whose next step reads the label before."""

    def __init__(self, **options):
        super().__init__()
        self.choice = memory.Choice(start=0, **options)
        self.embedding, self.cell, self.out = nn.Embedding(5, 4), sl.nn.GRUCell(4, 4), nn.Linear(4, 5)

    def step(self, target=None):
        scores = self.out(self.cell(self.embedding(self.choice.previous())))
        return scores, self.choice(scores, target)


def test_choice_is_given_or_the_models_own():
    step = Speller()
    (_, own), _ = step(steps=6, batch_size=2)
    (scores, given), _ = step(own)
    assert torch.equal(given, own)
    assert torch.equal(scores.argmax(-1), own)
    sampled = Speller(method="sample", temperature=5.0)
    (_, a), _ = sampled(steps=40, batch_size=2)
    assert len(a.unique()) > 2


class Corrected(sl.Step):
    """A speller that is told the right label at some steps, by an argument or from outside."""

    def __init__(self, speller, imposes):
        super().__init__()
        self.speller, self.imposes = speller, imposes

    def step(self, target, where):
        if self.imposes:
            scores, own = self.speller()
            label = torch.where(where, target, own)
            self.speller.choice.impose(label)
            return scores, label
        choice = self.speller.choice
        scores = self.speller.out(self.speller.cell(self.speller.embedding(choice.previous())))
        return scores, choice(scores, target, where=where)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_label_may_be_imposed_row_by_row(backend):
    speller, target, where = Speller(), torch.randint(0, 5, (7, 3)), torch.rand(7, 3) < 0.5
    (scores, labels), state = sl.Loop(Corrected(speller, False), backend=backend)(target, where)
    own = scores.argmax(-1)
    assert torch.equal(labels, torch.where(where, target, own))
    (again, _), _ = speller(labels)  # the same labels, all of them given
    torch.testing.assert_close(again, scores)
    (imposed, told), after = sl.Loop(Corrected(speller, True), backend=backend)(target, where)
    torch.testing.assert_close(imposed, scores)
    assert torch.equal(told, labels)
    assert torch.equal(after["speller.choice.last"], state["speller.choice.last"])


def test_choice_takes_where_by_name_over_a_whole_sequence():
    scores, target, where = torch.randn(4, 2, 5), torch.randint(0, 5, (4, 2)), torch.rand(4, 2) < 0.5
    labels, _ = memory.Choice()(scores, target, where=where)
    assert torch.equal(labels, torch.where(where, target, scores.argmax(-1)))


# -- attention dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_attention_drops_that_share_of_the_weights_and_none_in_eval_mode(inside):
    attention = memory.CausalSelfAttention(4, dropout=0.25)
    step = attention
    if inside:

        class Holds(sl.Step):
            def __init__(self):
                super().__init__()
                self.attention = attention

            def step(self, q, k, v):
                return self.attention(q, k, v)

        step = Holds()
    steps = 12
    q, k, v = torch.zeros(steps, 500, 4), torch.zeros(steps, 500, 4), torch.ones(steps, 500, 4)
    y, _ = step(q, k, v)  # equal weights of ones: what is kept, over 0.75
    kept = y[-1] * 0.75
    assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / kept.numel() / steps) ** 0.5
    assert (kept * steps - (kept * steps).round()).abs().max() < 1e-4
    assert not torch.equal(step(q, k, v)[0], y)
    torch.manual_seed(5)
    first, _ = step(q, k, v)
    torch.manual_seed(5)
    assert torch.equal(step(q, k, v)[0], first)
    torch.testing.assert_close(step.eval()(q, k, v)[0], v)


def test_the_gradient_of_attention_is_that_of_the_same_dropped_weights():
    """Inside a step a whole sequence's gradient computes the outputs again: from the same seeds."""

    class Holds(sl.Step):
        def __init__(self):
            super().__init__()
            self.attention = memory.CausalSelfAttention(2, dropout=0.5)

        def step(self, v):
            return self.attention(torch.zeros_like(v), torch.zeros_like(v), v)

    v = torch.ones(6, 3, 4, requires_grad=True)
    y, _ = Holds()(v)
    (gradient,) = torch.autograd.grad(y.sum(), v)
    torch.testing.assert_close((gradient * v).sum(), y.sum())  # linear in v


# -- moving steps together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [6, 3, 0]])
def test_compact_is_the_inverse_of_unmask(lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    x = torch.randn(6, 3, 2, requires_grad=True)
    where = torch.rand(6, 3) < 0.5
    kept = where if lengths is None else where & (torch.arange(6)[:, None] < lengths)
    moved = memory.compact({"x": x, "n": torch.arange(18).view(6, 3)}, where, lengths)
    count = kept.sum(0)
    assert moved["x"].shape == (int(count.max()), 3, 2)
    for b in range(3):
        assert torch.equal(moved["x"][: count[b], b], x[kept[:, b], b])
        assert (moved["x"][count[b] :, b] == 0).all()
        assert moved["n"][: count[b], b].tolist() == (kept[:, b].nonzero()[:, 0] * 3 + b).tolist()
    spread = memory.unmask(moved["x"], where, lengths=lengths)
    assert torch.equal(spread[kept], x[kept])
    (gradient,) = torch.autograd.grad(spread[kept].square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach() * kept.unsqueeze(-1))


def test_compact_never_reads_what_is_left_out():
    x = torch.randn(4, 2)
    where = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]]).bool()
    x[~where] = float("nan")
    x.requires_grad_()
    moved = memory.compact(x, where)
    assert moved.shape == (2, 2) and moved.isfinite().all()
    moved.sum().backward()
    assert torch.equal(x.grad, where.float())


def test_compact_of_nothing():
    assert memory.compact(torch.randn(4, 2, 3), torch.zeros(4, 2).bool()).shape == (0, 2, 3)
    assert memory.compact(torch.randn(0, 2, 3), torch.zeros(0, 2).bool()).shape == (0, 2, 3)
    assert memory.compact(torch.randn(4, 0, 3), torch.zeros(4, 0).bool()).shape == (0, 0, 3)


def test_masked_from_of_compact_is_masked():
    cell, x, where = sl.nn.GRUCell(3, 4), torch.randn(7, 2, 3), torch.rand(7, 2) < 0.5
    y = memory.masked_from(cell, memory.compact(x, where), where)
    torch.testing.assert_close(y, memory.Masked(cell)(x, where=where)[0])


# -- errors --------------------------------------------------------------------------------------------------

X = torch.randn(3, 2, 4)
BAD = [
    (lambda: memory.Delay(0), sl.InputError, "n "),
    (lambda: memory.Delay(1.5), sl.InputError, "n "),
    (lambda: memory.Window(-1), sl.InputError, "left"),
    (lambda: memory.Window(1, right="a"), sl.InputError, "right"),
    (lambda: memory.CausalConv1d(4, 0, 3), sl.InputError, "out_channels"),
    (lambda: memory.CausalConv1d(4, 4, 3, groups=3), sl.InputError, "groups"),
    (lambda: memory.CausalConv1d(5, 4, 3)(X), sl.InputError, "x "),
    (lambda: memory.CausalSelfAttention(0, 4), sl.InputError, "heads"),
    (lambda: memory.CausalSelfAttention(3, 4), sl.InputError, "key_size"),
    (lambda: memory.CausalSelfAttention(2, value_size=3), sl.InputError, "value_size"),
    (lambda: memory.CausalSelfAttention(2, relative=1), sl.InputError, "key_size"),
    (lambda: memory.CausalSelfAttention(2, 6)(X), sl.InputError, "x "),
    (lambda: memory.CausalSelfAttention(2)(X), sl.InputError, "q, k and v"),
    (lambda: memory.CausalSelfAttention(2, 4)(X, X, X), sl.InputError, "size"),
    (lambda: memory.RelativePositions(-1), sl.InputError, "clip"),
    (lambda: memory.PositionalEncoding(4, "sideways"), sl.InputError, "layout"),
    (lambda: memory.PositionalEncoding(5)(X), sl.InputError, "x "),
    (lambda: memory.EditDistance(blank=0.5), sl.InputError, "blank"),
    (lambda: memory.EditDistance()(X[..., 0], target=torch.zeros(2, 3).long()), sl.InputError, "a "),
    (lambda: memory.EditDistance()(X[..., 0].long(), target=X[0]), sl.InputError, "target"),
    (lambda: memory.EditDistance()(X[..., 0].long()), sl.InputError, "target"),
    (lambda: memory.Masked(nn.Linear(4, 4)), sl.StepError, "Step"),
    (lambda: memory.Masked(Leaky())(X, where=X[..., 0]), sl.InputError, "where"),
    (lambda: memory.Masked(Leaky())(X, where=X[..., 0] > 0, wrong=X[0]), sl.SteploopError, "wrong"),
    (lambda: memory.unmask(X, X[..., 0]), sl.InputError, "mask"),
    (lambda: memory.SequenceRNN(Leaky(), output="middle"), sl.InputError, "output"),
    (lambda: memory.SequenceRNN(3), sl.StepError, "SequenceRNN"),
    (lambda: memory.SequenceRNN(sl.Loop(Leaky(), batch_first=True), reverse=True), sl.StepError, "its own"),
    (lambda: memory.SequenceRNN(sl.nn.Bidirectional(Leaky(), Leaky())), sl.StepError, "batch_first=True"),
    (lambda: memory.SequenceRNN(nn.LSTM(4, 3), output="last"), sl.StepError, "batch_first=True"),
    (lambda: memory.SequenceRNN(nn.Linear(4, 3), output="last"), sl.StepError, "last_output"),
    (lambda: memory.SequenceRNN(Leaky())(X[..., 0]), sl.InputError, "x "),
    (lambda: memory.TwoDLSTM(4, 4, 4, pooling="median"), sl.InputError, "pooling"),
    (lambda: memory.TwoDLSTM(4, 0, 4), sl.InputError, "target_size"),
    (lambda: memory.TwoDLSTM(4, 4, 4)(X, source=torch.randn(2, 3, 5)), sl.InputError, "source"),
    (lambda: memory.Choice(method="best"), sl.InputError, "method"),
    (lambda: memory.Choice(temperature=0), sl.InputError, "temperature"),
    (lambda: memory.Choice()(X, X), sl.InputError, "target"),
    (lambda: memory.Choice()(X, X[..., 0].long(), where=X[..., 0]), sl.InputError, "where"),
    (lambda: memory.Choice()(X, None, X[..., 0] > 0), sl.InputError, "target"),
    (lambda: memory.CausalSelfAttention(2, 4, dropout=1.5), sl.InputError, "dropout"),
    (lambda: memory.compact(X, X[..., 0]), sl.InputError, "where"),
    (lambda: memory.compact(X, X[:2, :, 0] > 0), sl.InputError, "same T and B"),
]


@pytest.mark.parametrize("call, error, name", BAD)
def test_bad_arguments_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()


def test_looking_ahead_inside_a_step_is_an_error():
    class Ahead(sl.Step):
        def __init__(self):
            super().__init__()
            self.window = memory.Window(1, right=1)

        def step(self, x):
            return self.window(x)

    with pytest.raises(sl.StepError, match="right"):
        Ahead()(X)


def test_a_streams_state_before_its_first_step_is_an_error():
    stream = sl.Loop(memory.CumSum()).stream(2)
    with pytest.raises(sl.StateError, match="first step"):
        stream.state  # noqa: B018


def test_a_step_that_does_not_say_a_states_shape():
    class Forgot(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(...)

        def step(self, x):
            self.h.next = self.h.prev + x
            return x

    with pytest.raises(sl.StateError, match="sized"):
        Forgot()(X)


def test_all_next_outside_a_step_needs_a_state(arpa):
    with pytest.raises(sl.StateError, match="state"):
        memory.NGramScorer(arpa).all_next()
    with pytest.raises(sl.InputError, match="token"):
        memory.NGramScorer(arpa)(X)


# -- ways of calling -----------------------------------------------------------------------------------------


def test_packed_sequences():
    rows = [torch.randn(5, 3), torch.randn(3, 3)]
    with torch.device("cpu"):  # where torch wants its lengths
        packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    y, state = memory.CumSum()(packed)
    for found, row in zip(nn.utils.rnn.unpack_sequence(y), rows, strict=True):
        close(found, row.cumsum(0))
    close(state["total"], torch.stack([row.sum(0) for row in rows]))


def test_verify_compares_both_forms():
    report = sl.verify(sl.Loop(memory.CausalSelfAttention(1, 3)), torch.randn(6, 2, 3))
    assert "agree" in str(report)


def test_constants_and_begin_of_a_masked_child():
    class Child(sl.Step):
        def __init__(self):
            super().__init__()
            self.h = sl.State(3)

        def begin(self, start):
            self.h.prev = start

        def step(self, x, bias):
            self.h.next = torch.tanh(x + bias + self.h.prev)
            return self.h.next

    x, where = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.5
    given = {"bias": torch.randn(2, 3, requires_grad=True), "start": torch.ones(2, 3)}
    found = []
    for backend in ("reference", "auto"):
        y, _ = sl.Loop(memory.Masked(Child()), backend=backend)(x, where=where, **given)
        found.append((y, *torch.autograd.grad(y.sum(), given["bias"])))
    close(found[0], found[1])


def test_what_stands_before_the_start_may_be_learned():
    init = nn.Parameter(torch.randn(3))
    y, _ = memory.Delay(2, init=init)(torch.randn(6, 2, 3))
    close(y[:2], init.detach().expand(2, 2, 3))
    (gradient,) = torch.autograd.grad(y.sum(), init)
    close(gradient, torch.full((3,), 4.0))


def test_copies_keep_their_own_count():
    import copy
    import pickle

    for twin in (copy.deepcopy(memory.History()), pickle.loads(pickle.dumps(memory.History()))):
        assert twin.frames.grows_with is twin.count
    shared = sl.share(memory.CausalSelfAttention(1, 4))
    assert shared.keys.grows_with is shared.count


def test_parameters_are_named_like_the_childs():
    names = set(memory.Masked(sl.nn.LSTMCell(3, 3)).state_dict())
    assert names == {"cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh"}
    assert set(memory.CausalConv1d(2, 3, 4).state_dict()) == set(nn.Conv1d(2, 3, 4).state_dict())


def test_a_new_number_of_steps_captures_nothing_anew():
    class Looped(sl.Step):
        def __init__(self):
            super().__init__()
            self.attention, self.h = memory.CausalSelfAttention(1, 3), sl.State(3)

        def step(self, x):
            self.h.next = torch.tanh(self.attention(x + self.h.prev))
            return self.h.next

    loop = sl.Loop(Looped(), backend="eager")
    for steps in (4, 5):
        loop(torch.randn(steps, 2, 3))
    before = capture_store.captured
    for steps in (6, 9, 12):
        loop(torch.randn(steps, 2, 3))
    assert capture_store.captured == before


def test_a_changed_layer_is_sized_anew():
    """Shapes that a first step told are told again when the step changes."""

    class Projected(sl.Step):
        def __init__(self):
            super().__init__()
            self.linear, self.before = nn.Linear(3, 4), memory.Delay()

        def step(self, x):
            return self.before(self.linear(x))

    step, x = Projected(), torch.randn(5, 2, 3)
    assert step(x)[0].shape == (5, 2, 4)
    step.linear = nn.Linear(3, 6)
    assert step(x)[0].shape == (5, 2, 6)
    assert step(x[:, :1])[0].shape == (5, 1, 6)


def test_a_constant_may_differ_from_step_to_step():
    """A keyword argument of an operation inside a step is any value that the step has."""

    class PerStep(sl.Step):
        def __init__(self):
            super().__init__()
            self.distance = memory.EditDistance()

        def step(self, a, target):
            return self.distance(a, target=target)

    a, target = torch.randint(0, 3, (6, 2)), torch.randint(0, 3, (6, 2, 4))
    expected, _ = sl.Loop(PerStep(), backend="reference")(a, target)
    assert torch.equal(sl.Loop(PerStep())(a, target)[0], expected)


def test_a_step_that_fixes_the_batch():
    """Masks and resets are then part of the step, and so of what an operation's states are read through."""

    class Fixed(sl.Step):
        def __init__(self):
            super().__init__()
            self.total = memory.CumSum()

        def step(self, x):
            return self.total(x.reshape(len(x), -1))

    x, resets = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.4
    expected, _ = sl.Loop(Fixed(), backend="reference")(x, resets=resets)
    close(sl.Loop(Fixed())(x, resets=resets)[0], expected)
