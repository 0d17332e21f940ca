"""Model cards."""

import yaml

from hf_gdc.hub import write_model_card


def front_matter(folder, base_model) -> dict:
    write_model_card(folder, "T", "P(x) = a(x)", "command", {"kl": 0.5}, "data", base_model)
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_a_card_names_the_base_model_if_it_is_on_the_hub(tmp_path):
    assert front_matter(tmp_path, "org/model")["base_model"] == "org/model"
    for folder_or_none in (str(tmp_path), None):
        assert "base_model" not in front_matter(tmp_path, folder_or_none)
    assert front_matter(tmp_path, None)["library_name"] == "transformers"
