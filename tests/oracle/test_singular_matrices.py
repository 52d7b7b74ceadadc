"""Where torch.linalg raises in the plain loop, a compiled loop raises as well: with the step and the row."""

from __future__ import annotations

import pytest
import torch
from agree import agree

import steploop as sl

T, B, N = 6, 3, 3


def solve(matrix, x):
    return torch.linalg.solve(matrix, x)


def solve_columns(matrix, x):
    return torch.linalg.solve(matrix, x.unsqueeze(-1)).squeeze(-1)


def inv(matrix, x):
    return torch.einsum("bij,bj->bi", torch.linalg.inv(matrix), x)


def inverse(matrix, x):
    return (matrix.inverse() @ x.unsqueeze(-1)).squeeze(-1)


def lu_factor(matrix, x):
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(matrix), x.unsqueeze(-1)).squeeze(-1)


def cholesky(matrix, x):
    return torch.cholesky_solve(x.unsqueeze(-1), torch.linalg.cholesky(matrix)).squeeze(-1)


def two_at_once(matrix, x):
    """A matrix for each of two heads."""
    heads = torch.stack([matrix, torch.eye(N, dtype=x.dtype).expand_as(matrix)], 1)
    return torch.linalg.solve(heads, torch.stack([x, x], 1)).sum(1)


def by_vmap(matrix, x):
    return torch.func.vmap(torch.linalg.solve)(matrix, x)


WAYS = [solve, solve_columns, inv, inverse, lu_factor, cholesky, two_at_once, by_vmap]


class Before(sl.Step):
    """The matrix is given: its factors are made for all steps at once."""

    def __init__(self, way):
        super().__init__()
        self.way, self.h = way, sl.State(N)

    def step(self, matrix, x):
        self.h.next = torch.tanh(0.5 * self.h.prev + self.way(matrix, x))
        return self.h.next


class Inside(Before):
    """The matrix is made of the state."""

    def step(self, matrix, x):
        change = 0.1 * self.h.prev.unsqueeze(-1) * self.h.prev.unsqueeze(-2)
        self.h.next = torch.tanh(self.way(matrix + matrix[:, :1, :1] * change, x))
        return self.h.next


@pytest.fixture(params=[Before, Inside])
def kind(request):
    return request.param


def given():
    torch.manual_seed(0)
    root = torch.randn(T, B, N, N, dtype=torch.float64)
    return root @ root.mT + torch.eye(N, dtype=torch.float64), torch.randn(T, B, N, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("way", WAYS)
def test_a_singular_matrix_is_an_error(way, kind, backend):
    step, (matrix, x) = kind(way), given()
    agree(step, matrix, x, backend=backend, save="auto")
    broken = matrix.clone()
    broken[4, 1], broken[5, 0] = 0.0, 0.0
    loop = sl.Loop(step, backend=backend)
    expected = "cpu" if backend == "auto" else "eager"
    assert {planned.backend for planned in loop.plan(matrix, x).loops} == {expected}
    for training in (False, True):
        x.requires_grad_(training)
        with pytest.raises(RuntimeError):  # LinAlgError, but for lu_factor
            sl.Loop(step, backend="reference")(broken, x)
        with pytest.raises(sl.SingularError, match=r"step 4, row 1: ") as caught:
            loop(broken, x)
        assert __file__ in str(caught.value) and "_ex" in str(caught.value)
    agree(step, matrix, x, backend=backend, save="auto", loop={"reverse": True})  # nothing is left of it
    with pytest.raises(sl.SingularError, match=r"step 5, row 0: "):
        sl.Loop(step, backend=backend, reverse=True)(broken, x)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_rows_that_do_not_run_are_not_looked_at(kind, backend):
    step, (matrix, x) = kind(solve), given()
    matrix[4:, 1] = 0.0
    lengths = torch.tensor([T, 4, 2])
    agree(step, matrix, x, backend=backend, save="auto", lengths=lengths)
    matrix[1, 2] = 0.0
    with pytest.raises(sl.SingularError, match=r"step 1, row 2: "):
        sl.Loop(step, backend=backend)(matrix, x, lengths=lengths)


class Ends(Before):
    """A row ends after as many steps as its `last`; what it would solve then is singular."""

    def __init__(self, way):
        super().__init__(way)
        self.t, self.done = sl.State((), dtype=torch.int64), sl.State((), dtype=torch.bool)

    def step(self, matrix, x, *, last):
        self.t.next = self.t.prev + 1
        self.done.next = self.t.next >= last
        return super().step(matrix, x)


class Mixes(Before):
    """Rows are mixed: a masked step is a part of the step, which all rows run."""

    def step(self, matrix, x):
        y = super().step(matrix, x)
        return y - y.mean(0, keepdim=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_steps_that_a_row_does_not_take_are_not_looked_at(backend, training):
    matrix, x = given()
    x.requires_grad_(training)
    last = torch.tensor([T, 4, 2])
    matrix[4:, 1], matrix[2:, 2] = 0.0, 0.0
    results = []
    for name in ("reference", backend):
        loop = sl.Loop(Ends(solve), backend=name, until="done")
        outputs, state = loop(matrix, x, last=last)
        gradients = torch.autograd.grad(outputs.sum(), x) if training else ()
        results.append([outputs, state["h"], *gradients])
    torch.testing.assert_close(*results)
    agree(Mixes(solve), matrix, x, backend=backend, save="auto", lengths=last)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_loop_that_ends_by_itself_names_the_step(backend):
    matrix, x = given()
    matrix[5, 0] = 0.0
    loop = sl.Loop(Ends(solve), backend=backend, until="done")
    with torch.no_grad(), pytest.raises(sl.SingularError, match=r"step 5, row 0: "):
        loop(matrix, x, last=torch.tensor([T, 4, 2]))


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_streams_raise_as_well(kind, backend):
    matrix, x = given()
    with torch.no_grad():
        stream = sl.Loop(kind(solve), backend=backend).stream(B)
        for t in range(3):
            stream(matrix[t], x[t])
        with pytest.raises(torch.linalg.LinAlgError):
            stream(torch.zeros_like(matrix[3]), x[3])
        stream(matrix[3], x[3])


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_the_forms_that_check_nothing_raise_nothing(kind, backend):
    def unchecked(matrix, x):
        found, info = torch.linalg.solve_ex(matrix, x)
        return torch.where(info.unsqueeze(-1) != 0, 0.0, found)

    matrix, x = given()
    matrix[4, 1] = 0.0
    agree(kind(unchecked), matrix, x, backend=backend, save="auto", backward=False)
