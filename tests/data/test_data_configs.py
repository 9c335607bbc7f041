"""Every file of conf/data composes into settings whose sources exist; the quickstart's rows all fit its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from data_fixtures import model_config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf.config import build
from rlhf.data.phases import phase_rows, sft_corpus
from rlhf.data.quickstart import requests
from rlhf.data.sources import resolve
from rlhf.data.tokenizer import encode_answers, load_tokenizer
from rlhf.settings import DataConfig

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if path.stem != "base")


def load(name: str) -> DataConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(OmegaConf.to_container(compose(f"data/{name}").data, resolve=True), "data")


@pytest.mark.parametrize("name", NAMES)
def test_a_data_config_names_sources_that_exist(name: str) -> None:
    data = load(name)
    for item in (*data.sources, *data.sft_only, *data.ptx):
        resolve(item, data.path or "rows.jsonl")
    assert data.split != [1, 0, 0] or not data.sources


def test_the_quickstart_loses_no_row_and_knows_every_held_out_word(tmp_path: Path) -> None:
    data = replace(load("quickstart"), cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(model_config("train:word:512"), data.chat, sft_corpus(data))
    reports = {
        (phase, split): phase_rows(data, tokenizer, phase, split) for phase in ("sft", "reward", "ppo") for split in ("train", "eval")
    }
    assert all(list(report) == ["rows"] and len(rows) == report["rows"] >= 200 for rows, report in reports.values())
    texts = reports["ppo", "eval"][0]["text"][:]
    assert tokenizer.unk_token_id not in {token for ids in encode_answers(tokenizer, texts) for token in ids}
    assert all(any(request in text for request, _, _ in requests("eval")) for text in texts)
