"""`orchestrator generate` on an adapter's folder: texts, a conversation, one clear error each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.generate import CHAT_HELP, chat, generate_text
from orchestrator.errors import BaseModelError, ConfigError
from orchestrator.files import file_digest, read_json, write_json
from orchestrator.records import TrialDone
from orchestrator.tracking.adapter_model import (
    DamagedFiles,
    continued,
    encode,
    end_where_taught,
    load,
    reply,
)
from tests.sweeps import with_changes
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import train


@pytest.fixture(scope="module")
def trained(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    _, events = train(make_spec(num_slots=1), [trial_config(steps=2)], folder)
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    return Path(done.adapter_dir)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def change_record(folder: Path, **changes: object) -> None:
    path = folder / "orchestrator.json"
    path.write_text(json.dumps(with_changes(json.loads(path.read_text()), changes)))


def generate(folder: Path) -> int:
    return generate_text("What is 1 plus 1?", str(folder), 2, 0.0, "")


def test_an_adapter_folder_generates(adapter: Path) -> None:
    assert generate(adapter) == 0


def test_an_adapter_folder_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder .*nowhere: choose models:/NAME@ALIAS"):
        generate(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "orchestrator.json"]
)
def test_a_folder_that_lacks_an_adapters_file_is_refused_with_the_remedy(
    adapter: Path, name: str
) -> None:
    (adapter / name).unlink()
    with pytest.raises(ConfigError, match=f"has no {name}: choose models:/NAME@ALIAS"):
        generate(adapter)


def test_a_damaged_record_is_named(adapter: Path) -> None:
    (adapter / "orchestrator.json").write_text("{")
    with pytest.raises(ConfigError, match="orchestrator.json is damaged"):
        generate(adapter)


def test_changed_weights_are_never_loaded(adapter: Path) -> None:
    weights = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ConfigError, match="adapter_model.safetensors is damaged: its digest"):
        generate(adapter)
    with pytest.raises(DamagedFiles, match="is damaged"):
        load(adapter)


def test_an_adapter_of_which_peft_would_leave_a_part_out_is_never_used(adapter: Path) -> None:
    config = read_json(adapter / "adapter_config.json")
    config["target_modules"].remove("q_proj")
    write_json(adapter / "adapter_config.json", config)
    files = read_json(adapter / "orchestrator.json")["files"]
    found = file_digest(adapter / "adapter_config.json")
    change_record(adapter, files=files | {"adapter_config.json": found})
    with pytest.raises(DamagedFiles, match=r"PEFT has loaded \d+ of its \d+ tensors, and 0 others"):
        load(adapter)
    with pytest.raises(BaseModelError, match="PEFT has loaded"):
        generate(adapter)


def test_an_adapter_without_digests_is_not_trusted(adapter: Path) -> None:
    change_record(adapter, files={})
    with pytest.raises(ConfigError, match="has no digest of adapter_model.safetensors"):
        generate(adapter)


def test_another_base_model_in_the_same_place_is_refused(
    adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base_folder, tmp_path / "base")
    change_record(adapter, base_model__folder=str(other))
    assert generate(adapter) == 0
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(BaseModelError, match="is not the base model that the adapter was trained"):
        generate(adapter)


def test_a_conversation_goes_on_from_what_was_said(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_record(adapter, template="chat")
    _, tokenizer = load(adapter)
    lines = ["What is 1 plus 1?", "", "And 2 plus 2?", "/new", "What is 1 plus 1?", "/exit", "no"]
    assert chat(str(adapter), 4, 0.0, "", lines) == 0
    printed, told = capsys.readouterr()
    assert CHAT_HELP in told, "through the libraries' silence"
    first, second, again = texts = printed.splitlines()
    assert first == again
    model, _ = load(adapter)
    said = [{"role": "user", "content": lines[0]}, {"role": "assistant", "content": first}]
    said.append({"role": "user", "content": lines[2]})
    assert reply(model, tokenizer, said, max_new_tokens=4) == second, texts


def test_a_conversation_needs_a_chat_template(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="trained without a chat template"):
        chat(str(adapter), 4, 0.0, "", [])


def test_a_base_model_that_is_not_on_this_machine_is_one_clear_error(adapter: Path) -> None:
    change_record(adapter, base_model__folder="/nowhere")
    with pytest.raises(BaseModelError, match="not in /nowhere.*ORCHESTRATOR_BASE_MODEL"):
        generate(adapter)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12, "suppress_tokens": list(range(40, 200))},
        {"num_beams": 4, "do_sample": True, "temperature": 0.7, "top_k": 20},
    ],
)
def test_the_likeliest_token_is_that_of_the_model_whatever_its_base_says_of_generation(
    adapter: Path, own: dict[str, object]
) -> None:
    """Scores and `--temperature 0` are of the model, not of penalties that the base came with."""
    model, tokenizer = load(adapter)
    base = model.get_base_model()
    prompts = [encode(tokenizer, f"What is {number} plus 1?") for number in range(3)]
    base.generation_config.update(**own)
    before = base.generation_config.to_dict()
    for ids in prompts:
        expected = tokenizer.decode(by_hand(model, ids, 12, end=1), skip_special_tokens=True)
        for asked in (model, base):
            assert continued(asked, tokenizer, [ids], 12) == [expected]
    assert base.generation_config.to_dict() == before


def test_each_token_that_ends_a_text_of_the_base_ends_one(adapter: Path) -> None:
    model, tokenizer = load(adapter)
    ids = encode(tokenizer, "What is 1 plus 1?")
    first, *_ = by_hand(model, ids, 1, end=1)
    model.get_base_model().generation_config.eos_token_id = [1, first]
    assert len(tokenizer(continued(model, tokenizer, [ids], 12)[0])["input_ids"]) <= 1


def by_hand(model: Any, ids: list[int], count: int, end: int) -> list[int]:
    """The likeliest tokens, one forward pass each."""
    found: list[int] = []
    while len(found) < count and found[-1:] != [end]:
        logits = model(input_ids=torch.tensor([ids + found])).logits
        found.append(int(logits[0, -1].argmax()))
    return found


def test_a_text_ends_where_the_chat_template_closes_a_turn(tmp_path: Path) -> None:
    """An adapter was taught that end, whatever ends the texts of its base."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(make_base_model(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token, model.generation_config.eos_token_id = "<|pad|>", 2
    end_where_taught(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == [
        "<|pad|>", "<|end|>", "<|system|>"
    ]  # fmt: skip
    tokenizer.chat_template, model.generation_config.eos_token_id = None, None
    end_where_taught(model, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
