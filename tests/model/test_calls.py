"""What a decoder, its heads and its caches say to arguments that are none: the argument first."""

from functools import partial

import pytest
import torch
from models import random_ids, random_model
from torch._subclasses.fake_tensor import FakeTensorMode

import fastgpt
from fastgpt import SequenceClassifier, TokenClassifier, run_with_cache
from fastgpt.model.rope import Rope
from fastgpt.ops import explain

IDS = torch.zeros(2, 3, dtype=torch.int64)
BAD_IDS = {
    "a list": ([[1, 2]], TypeError, "ids: expected a torch.Tensor, got list"),
    "none": (None, TypeError, "ids: expected a torch.Tensor, got NoneType"),
    "a text": ("hello", TypeError, "ids: expected a torch.Tensor, got str"),
    "floats": (IDS.float(), TypeError, "ids: expected dtype torch.int64 or torch.int32, got torch.float32"),
    "flags": (IDS.bool(), TypeError, "ids: expected dtype"),
    "bytes": (IDS.byte(), TypeError, "ids: expected dtype"),
    "one row": (IDS[0], ValueError, r"ids: expected shape \(B, T\) with at least one token, got \(3,\)"),
    "a scalar": (IDS[0, 0], ValueError, r"ids: expected shape \(B, T\)"),
    "no tokens": (IDS[:, :0], ValueError, r"ids: expected shape \(B, T\) with at least one token, got \(2, 0\)"),
    "too large": (IDS + 65, ValueError, "ids: expected token ids from 0 to 64, got 65 to 65"),
    "negative": (IDS - 1, ValueError, "ids: expected token ids from 0 to 64, got -1 to -1"),
    "sparse": (IDS.to_sparse(), TypeError, "ids: expected a strided tensor"),
    "elsewhere": (IDS.to("meta"), ValueError, "ids: expected device cpu, got meta"),
    "too many": (torch.zeros(1, 97, dtype=torch.int64), ValueError, "ids: expected at most 96 tokens"),
}
CALLS = {
    "model": lambda model, ids: model(ids),
    "hidden": lambda model, ids: model.hidden(ids),
    "encode": lambda model, ids: model.encode(ids),
    "run_with_cache": lambda model, ids: run_with_cache(model, ids),
    "cache": lambda model, ids: model(ids, cache=model.new_cache(ids.shape[0] if hasattr(ids, "shape") and ids.dim() else 2)),
    "lengths": lambda model, ids: model(ids, lengths=[1, 1]),
}


@pytest.mark.parametrize("case", BAD_IDS)
@pytest.mark.parametrize("call", CALLS)
def test_ids(call, case):
    ids, error, message = BAD_IDS[case]
    if (call, case) == ("lengths", "too many"):
        ids = ids.expand(2, -1)
    with pytest.raises(error, match=f"^{message}"):
        CALLS[call](random_model(), ids)


@pytest.mark.parametrize("head", [SequenceClassifier, TokenClassifier])
@pytest.mark.parametrize("case", [case for case in BAD_IDS if case not in ("a list", "too many")])
def test_ids_of_a_head(head, case):
    """Which takes lists, too."""
    ids, error, _ = BAD_IDS[case]
    for pad in (None, 0):
        with pytest.raises(error, match="^ids: expected"):
            head(random_model(), 3, pad_token_id=pad)(ids)
    with pytest.raises(TypeError, match="^ids: expected"):
        head(random_model(), 3)([[1.5]])


def test_int32_ids():
    model = random_model()
    ids = random_ids(model, 2, 5)
    assert torch.equal(model(ids.int()), model(ids))
    assert torch.equal(model(ids.int(), cache=model.new_cache(2)), model(ids, cache=model.new_cache(2)))


def test_caches():
    model = random_model()
    ids = random_ids(model, 2, 3)
    wrong = {
        "layers": (
            random_model(layers=1).new_cache(2),
            ValueError,
            "cache: expected 2 layers of 4 KV ",
        ),
        "heads": (random_model(num_kv_heads=2).new_cache(2), ValueError, "cache: expected 2 layers of 4 KV heads"),
        "head dim": (random_model(width=32).new_cache(2, kind="paged"), ValueError, "cache: expected 2 layers of 4 KV heads"),
        "batch": (model.new_cache(3), ValueError, "cache: expected batch size 2, as ids has, got 3"),
        "a tuple": ((1, 2), TypeError, r"cache: expected a KVCache \(see `new_cache`\), got tuple"),
        "a flag": (True, TypeError, r"cache: expected a KVCache \(see `new_cache`\), got bool"),
        "dtype": (
            random_model().double().new_cache(2),
            TypeError,
            "cache: expected dtype torch.float32, as the model's weights",
        ),
    }
    for cache, error, message in wrong.values():
        with pytest.raises(error, match=f"^{message}"), torch.no_grad():
            model(ids, cache=cache)
        assert isinstance(cache, (tuple, bool)) or cache.counts == [0] * cache.batch_size


@pytest.mark.parametrize("new", [2, "ab", [1.5, 1]])
def test_counts_are_a_list_of_integers(new):
    model = random_model()
    with torch.no_grad(), pytest.raises(TypeError, match="^new: expected a list of 2 integers"):
        model(IDS, cache=model.new_cache(2), new=new)


def test_counts_are_all_columns_by_default():
    model = random_model()
    cache = model.new_cache(2)
    with torch.no_grad():
        model(IDS, cache=cache, new=None)
    assert cache.counts == [IDS.shape[1]] * 2


def test_encoder_states():
    model, states = random_model(cross_attention=True), torch.randn(2, 4, 64)
    wrong = {
        "list": ([[1.0]], TypeError, "encoder_states: expected a torch.Tensor, got list"),
        "dims": (states[0], ValueError, "encoder_states: expected 3 dimensions"),
        "width": (states[..., :3], ValueError, r"encoder_states: expected shape \(2, 4, 64\)"),
        "dtype": (states.double(), TypeError, "encoder_states: expected dtype torch.float32"),
        "device": (states.to("meta"), ValueError, "encoder_states: expected device cpu"),
        "batch": (states[:1], ValueError, "encoder_states: expected batch size 2, as ids has, got 1"),
        "none": (None, ValueError, r"encoder_states: expected a tensor \(B, S, C\)"),
    }
    for encoder_states, error, message in wrong.values():
        for call in (
            model,
            partial(run_with_cache, model),
            lambda ids, encoder_states: model(ids, cache=model.new_cache(2, encoder_states=encoder_states)),
        ):
            with pytest.raises(error, match=f"^{message}"):
                call(IDS, encoder_states=encoder_states)


NO_CALLS = {
    "nothing": ((), {}, "missing a required argument: 'q'"),
    "too little": ((IDS,), {}, "missing a required argument: 'k'"),
    "too much": ((IDS,) * 9, {}, "too many positional arguments"),
    "another name": ((IDS,) * 3, {"heads": 3}, "got an unexpected keyword argument 'heads'"),
    "twice": ((IDS,) * 3, {"q": IDS}, "multiple values for argument 'q'"),
}


@pytest.mark.parametrize("case", NO_CALLS)
def test_explaining_an_invalid_call_raises(case):
    args, kwargs, problem = NO_CALLS[case]
    expected = r"fastgpt.attention and the arguments of a call, as in fastgpt.explain\(fastgpt.attention, ...\)"
    with pytest.raises(TypeError, match=f"^operation: expected {expected}: {problem}$"):
        fastgpt.explain(fastgpt.attention, *args, **kwargs)


def test_explain_names_operations_by_their_import_path():
    with pytest.raises(ValueError, match="^operation: expected one of ") as raised:
        fastgpt.explain("attention")
    names = str(raised.value).removeprefix("operation: expected one of ").partition(", got ")[0].split(", ")
    assert "fastgpt.decoding" in names and all(eval(name) in explain.OPERATIONS for name in names)
    with pytest.raises(TypeError, match="^operation: expected fastgpt.decoding and the arguments of .*'recording'$"):
        fastgpt.explain(fastgpt.decoding, None, None, recording=None)


@pytest.mark.parametrize("model", ["a path", None, IDS, torch.nn.Linear(3, 3), fastgpt.GPT], ids=lambda x: type(x).__name__)
def test_arguments_that_are_not_a_decoder_raise(model):
    for call in (
        lambda: fastgpt.generate(model, IDS, 3),
        lambda: fastgpt.stream(model, IDS, 3),
        lambda: run_with_cache(model, IDS),
        lambda: fastgpt.decoding(model, random_model().new_cache(2)),
        lambda: fastgpt.explain(fastgpt.decoding, model, random_model().new_cache(2)),
    ):
        with pytest.raises(TypeError, match=f"^model: expected a fastgpt.GPT, got {type(model).__name__}$"):
            call()


POSITIONS = {"learned": {}, "sinusoidal": {"position": "sinusoidal"}, "rotary": {"position": "rotary", "rope": Rope(8)}}


@pytest.mark.parametrize("position", POSITIONS)
def test_models_are_built_and_run_with_fake_tensors(position):
    with FakeTensorMode():
        model = random_model(**POSITIONS[position])
        cache = model.new_cache(2)
        assert model(torch.zeros(2, 7, dtype=torch.int64)).shape == (2, 7, 65)
        assert model(torch.zeros(2, 7, dtype=torch.int64), cache=cache).shape == (2, 7, 65)
        assert model(torch.zeros(2, 1, dtype=torch.int64), cache=cache).shape == (2, 1, 65)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_compute_what_the_model_does(position):
    """Of other batches and lengths, too."""
    model = random_model(**POSITIONS[position])
    traced = torch.jit.trace(model, random_ids(model, 2, 7))
    for shape in ((2, 7), (3, 5), (1, 20)):
        ids = random_ids(model, *shape)
        assert torch.equal(traced(ids), model(ids))


def test_no_tokens_from_weights_on_meta():
    model = random_model().to("meta")
    for call in (fastgpt.generate, fastgpt.stream):
        with pytest.raises(ValueError, match="^model: expected weights on a device with data, got the meta device$"):
            call(model, IDS.to("meta"), 3)


def test_decoding_rejects_invalid_arguments():
    model = random_model()
    with pytest.raises(TypeError, match="^cache: expected a KVCache from `new_cache`, got str$"):
        fastgpt.decoding(model, "contiguous")
    with pytest.raises(TypeError, match="^choose: expected a function of logits or None, got 3$"):
        fastgpt.decoding(model, model.new_cache(1), 3)
    with pytest.raises(TypeError, match="^recording: expected the attribute of an earlier result or None, got 3$"):
        fastgpt.decoding(model, model.new_cache(1), recording=3)


@torch.no_grad()
@pytest.mark.parametrize("token", [[1, 2], 3, None, torch.tensor(1), torch.tensor([[1], [2]])], ids=str)
def test_decoding_takes_one_token_per_sequence(token):
    model = random_model()
    cache = model.new_cache(2)
    step = fastgpt.decoding(model, cache)
    for _ in range(2):  # the second time, a recorded step refuses it
        with pytest.raises((TypeError, ValueError), match="^token: expected (a torch.Tensor|1 dimensions), got"):
            step(token)
        step(torch.tensor([1, 2]))
    assert cache.counts == [2, 2]
