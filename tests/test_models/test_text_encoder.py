"""Frozen language encoders: mean hidden states of texts, windows, the cache."""

import copy
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast, T5Config

from language_models import TINY_MODEL
from medgemma_clinical.files import InputError
from medgemma_clinical.models import text_encoder
from medgemma_clinical.models.text_encoder import CACHE, TextEncoder, encoder_record, with_states
from trajectories import dataset_of

CPU = torch.device("cpu")
TEXTS = ["no fever", "", "fever and vomiting", "was well", "fever " * 40, "well " * 9 + "fever"]
LONGEST = 16


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Write a small BERT that reads 16 tokens at once, and its tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *{*" ".join([*TEXTS, "a"]).split()}]
    tokenizer = Tokenizer(models.WordLevel({x: k for k, x in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONGEST,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 64, "max_position_embeddings": LONGEST}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["bert", "decoder"])
def name(request):
    return request.getfixturevalue("bert") if request.param == "bert" else TINY_MODEL


def test_a_text_is_the_mean_of_its_states_whatever_is_read_beside_it(name):
    encoder = TextEncoder(name, None, CPU)
    states = encoder.read(TEXTS)
    model = AutoModel.from_pretrained(name).eval()
    for k in (0, 2, 3):
        ids = encoder.tokenizer(TEXTS[k], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        begin, end = len(encoder.before), len(hidden) - len(encoder.behind)
        assert states[k] == pytest.approx(hidden[begin:end].mean(dim=0).numpy(), abs=1e-5)
    assert np.isnan(states).all(axis=1).tolist() == [not text for text in TEXTS]
    assert encoder.read(TEXTS[::-1])[::-1] == pytest.approx(states, abs=1e-5, nan_ok=True)
    assert np.isnan(encoder.read(["", ""])).all()


def test_a_longer_text_is_read_in_windows_that_overlap_by_a_quarter(bert):
    encoder = TextEncoder(bert, None, CPU)
    room = LONGEST - 2  # [CLS] and [SEP]
    windows = [window for window in encoder.windows(TEXTS) if window.text == 4]
    assert [window.begin for window in windows] == [0, 11, 22, 26]
    assert {len(window.ids) for window in windows} == {room}
    assert windows[-1].begin + room == 40  # its end is read
    states = encoder.read(TEXTS)
    assert states[4] == pytest.approx(encoder.means(windows).mean(axis=0), abs=1e-5)


def test_states_are_read_once_and_kept_for_the_owner_alone(bert, tmp_path, monkeypatch):
    data, record = dataset_of(["9 (0h)"] * 6, clinical_context=TEXTS), encoder_record(bert)
    cache = tmp_path / "run" / CACHE
    first = with_states(data, bert, record, cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    content = cache.read_bytes()
    assert not [word for word in ("fever", "vomiting", "well") if word.encode() in content]
    loads = []
    monkeypatch.setattr(text_encoder, "load_encoder", lambda *args: loads.append(args))
    again = with_states(data, bert, record, cache)
    assert np.array_equal(first.text_states, again.text_states, equal_nan=True)
    assert not loads
    monkeypatch.undo()
    more = copy.copy(data)
    more.contexts = np.array([*TEXTS[:5], "a new note"], object)
    added = with_states(more, bert, record, cache)
    assert np.array_equal(added.text_states[:5], first.text_states[:5], equal_nan=True)
    assert not np.array_equal(added.text_states[5], first.text_states[5])
    # Rows keep their states where some are chosen.
    assert np.array_equal(first.subset(np.array([3, 0])).text_states, first.text_states[[3, 0]])


def test_an_altered_cache_is_refused_and_another_encoders_is_not_read(bert, tmp_path):
    data, record = dataset_of(["9 (0h)"] * 6, clinical_context=TEXTS), encoder_record(bert)
    cache = tmp_path / CACHE
    bert_states = with_states(data, bert, record, cache).text_states
    other = with_states(data, TINY_MODEL, encoder_record(TINY_MODEL), cache).text_states
    assert other.shape != bert_states.shape
    with_states(data, bert, record, cache)
    with safe_open(cache, "np") as file:
        about, states = file.metadata(), file.get_tensor("states").copy()
    states[0, 0] += 1
    save_file({"states": states}, cache, about)
    with pytest.raises(InputError, match=CACHE):
        with_states(data, bert, record, cache)
    cache.write_bytes(b"x")
    with pytest.raises(InputError, match=CACHE):
        with_states(data, bert, record, cache)


def test_a_model_of_another_kind_is_refused(tmp_path):
    T5Config(vocab_size=9, d_model=8).save_pretrained(tmp_path)
    for name in (tmp_path, "nothing/here"):
        with pytest.raises(InputError, match="--text_model"):
            TextEncoder(str(name), None, CPU)
