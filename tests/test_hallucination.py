import numpy as np
import pytest

from utils.hallucination import chair, chair_counts, pope, pope_counts, says_no
from utils.statistics import rate


def test_chair_by_hand():
    said, truths = [["cup", "clock", "clock"], ["book"], []], [["cup", "book"], ["book"], ["car"]]
    assert chair(said, truths) == {"chair_i": 2 / 4, "chair_s": 1 / 3, "recall": 2 / 4}
    assert chair_counts(said, truths)["chair_i"].tolist() == [[2, 3], [0, 1], [0, 0]]


def test_chair_without_any_mention_says_so():
    with pytest.raises(ZeroDivisionError, match="no answer names any object"):
        chair([[]], [["cup"]])


@pytest.mark.parametrize("answer", ["NO", "none", "No!", "no\n", "It isn't", "", "Maybe", "Yes. No.", "Yes, there is a cup."])
def test_pope_reads_these_as_yes(answer):
    assert not says_no(answer)


@pytest.mark.parametrize("answer", ["No", "no", "No, there is no cup.", "Yes, not a doubt", "It is not, I think"])
def test_pope_reads_these_as_no(answer):
    assert says_no(answer)


def test_pope_by_hand():
    scores = pope(["Yes", "Yes", "No", "No"], ["yes", "no", "no", "yes"])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    with pytest.raises(ZeroDivisionError, match="every answer is a no"):
        pope(["No"], ["no"])


def test_pope_f1_is_that_of_precision_and_recall():
    rng = np.random.default_rng(0)
    answers, labels = (list(rng.choice(["yes", "no"], 200)) for _ in range(2))
    p, r = (rate(pope_counts(answers, labels)[name]) for name in ("precision", "recall"))
    assert rate(pope_counts(answers, labels)["f1"]) == pytest.approx(2 * p * r / (p + r))
