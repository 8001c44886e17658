import pytest

from utils import settings


def test_four_profiles_and_the_default(monkeypatch):
    assert list(settings.PROFILES) == ["embedded", "smolvlm", "qwen", "idefics2"]
    monkeypatch.delenv("VLM_DPO_PROFILE", raising=False)
    assert settings.load().profile == "embedded"


def test_the_environment_variable_is_read(monkeypatch):
    monkeypatch.setenv("VLM_DPO_PROFILE", "qwen")
    assert settings.load(None).profile == "qwen" and settings.load("smolvlm").profile == "smolvlm"


def test_a_wrong_name_lists_the_right_ones(monkeypatch):
    with pytest.raises(ValueError, match="embedded, smolvlm, qwen, idefics2"):
        settings.load("gpt")
    monkeypatch.setenv("VLM_DPO_PROFILE", "typo")
    with pytest.raises(ValueError, match=r"'typo'.*VLM_DPO_PROFILE"):
        settings.load()


def test_locate_finds_what_the_repository_ships_and_leaves_hub_names():
    assert settings.locate("embedded/model") == str(settings.ROOT / "embedded" / "model")
    assert settings.locate("HuggingFaceM4/idefics2-8b") == "HuggingFaceM4/idefics2-8b"
