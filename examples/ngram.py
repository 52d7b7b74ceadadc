"""A trigram model by counting: text -> ARPA file -> scores of whole sequences and of every next word.

python examples/ngram.py [text file]      without one: the Shakespeare texts, if they are installed
"""

import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import steploop as sl

DISCOUNT = 0.75


def sentences(text: str) -> list[list[str]]:
    """The words of a text in lower case, line by line."""
    lines = (re.findall(r"[a-z']+", line.lower()) for line in text.splitlines())
    return [line for line in lines if line]


def count(lines: list[list[str]], words: int, order: int) -> list[Counter]:
    """Counters of n-grams of every order; all but the most frequent words become <unk>."""
    known = {word for word, _ in Counter(w for line in lines for w in line).most_common(words)}
    counts = [Counter() for _ in range(order)]
    for line in lines:
        line = ["<s>", *(word if word in known else "<unk>" for word in line), "</s>"]
        for n in range(1, order + 1):
            counts[n - 1].update(tuple(line[i : i + n]) for i in range(len(line) - n + 1))
    return counts


def back_off(counts: list[Counter]) -> tuple[dict, dict]:
    """(probabilities, back-off weights) by absolute discounting: every context's probabilities sum to 1.

    A seen n-gram gives up DISCOUNT counts; what its context saves goes to the words not seen after it, in
    proportion to their probabilities after the shorter context.
    """
    unigrams = Counter({gram: n for gram, n in counts[0].items() if gram != ("<s>",)})
    unigrams[("<unk>",)] += 1
    total = sum(unigrams.values())
    probability = {gram: n / total for gram, n in unigrams.items()}
    weight = {}
    for grams in counts[1:]:
        after = defaultdict(list)
        for gram, n in grams.items():
            after[gram[:-1]].append((gram, n))
        for context, found in after.items():
            total = sum(n for _, n in found)
            saved = DISCOUNT * len(found) / total
            left = 1 - sum(shorter(probability, weight, gram[1:]) for gram, _ in found)
            for gram, n in found:
                probability[gram] = (n - DISCOUNT) / total
            weight[context] = saved / left
    return probability, weight


def shorter(probability: dict, weight: dict, gram: tuple) -> float:
    """The probability of a word after the context that is to be backed off to."""
    if gram in probability:
        return probability[gram]
    return weight.get(gram[:-1], 1.0) * shorter(probability, weight, gram[1:])


def write_arpa(path: Path, counts: list[Counter]) -> None:
    """An ARPA file: log10 probabilities and back-off weights."""
    probability, weight = back_off(counts)
    probability[("<s>",)] = 0.0
    sections = [sorted(gram for gram in probability if len(gram) == n + 1) for n in range(len(counts))]
    lines = ["\\data\\", *(f"ngram {n + 1}={len(grams)}" for n, grams in enumerate(sections))]
    for n, grams in enumerate(sections, 1):
        lines += ["", f"\\{n}-grams:"]
        for gram in grams:
            p = math.log10(probability[gram]) if probability[gram] else -99
            bow = f"\t{math.log10(weight[gram]):.7f}" if gram in weight else ""
            lines.append(f"{p:.7f}\t{' '.join(gram)}{bow}")
    path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")


def model(text: str, path: Path, words: int = 2000, order: int = 3) -> sl.memory.NGramScorer:
    """A scorer of a text's n-grams, by way of the file `path`."""
    write_arpa(path, count(sentences(text), words, order))
    return sl.memory.NGramScorer(path)


if __name__ == "__main__":
    import tempfile

    from steploop.recipes.texts import shakespeare

    text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else shakespeare()
    with tempfile.TemporaryDirectory() as folder:
        scorer = model(text, Path(folder) / "model.arpa")
    line = "to be or not to be that is the question </s>".split()
    scores, state = scorer(scorer.encode(line).unsqueeze(1))
    for word, score in zip(line, scores[:, 0].tolist(), strict=True):
        print(f"{word:12} {score:8.3f}")
    _, state = scorer(scorer.encode(["to", "be"]).unsqueeze(1))
    best = scorer.all_next(state)[0].topk(5)
    print(
        "after `to be`:",
        ", ".join(f"{scorer.words[i]} {p:.3f}" for p, i in zip(best.values.exp(), best.indices, strict=True)),
    )
