import re

import pytest

from utils import memory, settings


def test_the_embedded_profile_is_the_default(monkeypatch):
    monkeypatch.delenv("VLM_DPO_PROFILE", raising=False)
    assert settings.load().profile == "embedded"


def test_the_environment_variable_is_read(monkeypatch):
    monkeypatch.setenv("VLM_DPO_PROFILE", "qwen")
    assert settings.load().profile == "qwen"
    assert settings.load("smolvlm").profile == "smolvlm"


def test_a_wrong_name_lists_the_right_ones(monkeypatch):
    with pytest.raises(ValueError, match="gpt") as error:
        settings.load("gpt")
    for profile in settings.PROFILES:
        assert profile in str(error.value)
    monkeypatch.setenv("VLM_DPO_PROFILE", "typo")
    with pytest.raises(ValueError, match=r"typo.*VLM_DPO_PROFILE"):
        settings.load()


def test_every_profile_is_filed_under_its_own_name():
    for name, chosen in settings.PROFILES.items():
        assert chosen.profile == name


def test_locate_finds_what_the_repository_ships_and_leaves_hub_names():
    assert settings.locate("embedded/model") == str(settings.ROOT / "embedded" / "model")
    assert settings.locate("HuggingFaceM4/idefics2-8b") == "HuggingFaceM4/idefics2-8b"


@pytest.mark.parametrize("name", ["results", "embedded/model", "owner/model"])
def test_a_path_of_the_user_s_own_comes_before_one_of_the_repository(name, tmp_path, monkeypatch):
    """Except for what is embedded, whose name means the same from everywhere."""
    repository = settings.locate(name)
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    own = str(tmp_path / name)
    assert settings.locate(name) == (repository if name == settings.EMBEDDED_MODEL else own)
    assert settings.locate(own) == own


def test_a_profile_that_trains_and_tests_on_one_split_takes_parts_of_it():
    drawn = 0
    for chosen in settings.PROFILES.values():
        if chosen.train_split == chosen.test_split:
            drawn += 1
            assert chosen.train_rows and chosen.validation_rows and chosen.test_rows
    assert drawn


@pytest.mark.parametrize(
    ("profile", "device"), [("smolvlm", 15e9), ("qwen", 15e9), ("idefics2", 24e9)]
)
def test_by_the_estimate_a_profile_fits_its_gpu_with_a_margin(profile, device):
    chosen = settings.PROFILES[profile]
    longest = memory.estimate(chosen, chosen.token_budget - memory.image_tokens(chosen))
    assert sum(longest.values()) <= device - 1.5e9
    assert chosen.batch_size * chosen.gradient_accumulation == 16


def test_no_code_of_a_model_or_data_set_is_run():
    texts = {}
    for folder in ("utils", "scripts", "notebooks", "embedded", "benchmarks"):
        for path in (settings.ROOT / folder).glob("*.*"):
            if path.suffix in (".py", ".ipynb"):
                texts[path] = path.read_text()
    assert len(texts) > 30
    trusting = re.compile(r"trust_remote_code\W+(?!False)\w")
    assert [path.name for path, text in texts.items() if trusting.search(text)] == []


def test_a_revision_is_a_branch_or_a_whole_commit():
    for chosen in settings.PROFILES.values():
        for revision in (chosen.model_revision, chosen.dataset_revision):
            assert re.fullmatch(r"main|[0-9a-f]{40}", revision), revision
