from utils import progress


def test_all_items_come_in_order():
    assert list(progress.progress(range(7), "counting")) == list(range(7))
    assert list(progress.progress([], "nothing")) == []


def test_bars_are_hidden_by_the_environment(monkeypatch):
    for value, shown in (("1", False), ("0", True), ("", True)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        assert progress.watched() == shown
